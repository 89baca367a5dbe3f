/* The dense weight gradient of a linear layer from a packed sparse activation. */
#ifndef SWATFX_LINEAR_H
#define SWATFX_LINEAR_H

#include "common.h"

typedef struct {
    int64_t rows, inputs, outputs, threads, half; /* half: values are bfloat16, not float */
} linear_problem;

/* packed: bitmask of (row, input) order, then values `header` bytes behind it; grad: [rows][outputs];
 * out: [outputs][inputs]. Returns 1 if memory ran out, else 0. */
EXPORT int sparse_linear_weight_gradient(const linear_problem *p, const uint8_t *packed, int64_t header,
                                         const float *grad, float *out);

#endif
