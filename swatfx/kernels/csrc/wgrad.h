/* The dense weight gradient of a convolution from a packed sparse activation. */
#ifndef SWATFX_WGRAD_H
#define SWATFX_WGRAD_H

#include "conv.h"

typedef struct {
    int64_t batch, channels, height, width; /* of the activation; channels and filters are a group's */
    int64_t filters, out_height, out_width;
    int64_t kernel_y, kernel_x, step_y, step_x, pad_y, pad_x, dilation_y, dilation_x;
    int64_t weight_filter, weight_channel, weight_y, weight_x; /* strides of the result, in floats */
    int64_t groups, threads, half; /* half: values are bfloat16, not float */
} wgrad_problem;

/* packed: bitmask of (channel, y, x, image) order, then `values` values `header` bytes behind it;
 * grad: [groups * filters][out_height][out_width][batch]. Returns 0, NO_MEMORY, or DOES_NOT_FIT where a
 * strip of the gradient is too large, or the mask has not as many bits as there are values. */
EXPORT int sparse_weight_gradient(const wgrad_problem *p, const uint8_t *packed, int64_t header, int64_t values,
                                  const float *grad, float *out);

#endif
