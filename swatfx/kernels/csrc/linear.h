/* The dense weight gradient of a linear layer from a packed sparse activation. */
#ifndef SWATFX_LINEAR_H
#define SWATFX_LINEAR_H

#include "common.h"

typedef struct {
    int64_t rows, inputs, outputs, threads, half; /* half: values are bfloat16, not float */
} linear_problem;

/* packed: bitmask of (row, input) order, then `values` values `header` bytes behind it;
 * grad: [rows][outputs]; out: [outputs][inputs]. Returns 0, NO_MEMORY, or DOES_NOT_FIT where the mask
 * has not as many bits as there are values. */
EXPORT int sparse_linear_weight_gradient(const linear_problem *p, const uint8_t *packed, int64_t header,
                                         int64_t values, const float *grad, float *out);

#endif
