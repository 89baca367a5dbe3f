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

/* packed: bitmask of (channel, y, x, image) order, then values `header` bytes behind it;
 * grad: [groups * filters][out_height][out_width][batch]. Returns 1 if memory ran out, else 0. */
EXPORT int sparse_weight_gradient(const wgrad_problem *p, const uint8_t *packed, int64_t header, const float *grad,
                                  float *out);

#endif
