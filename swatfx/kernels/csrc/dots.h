/* The inner loop of a sampled product: dot products of one tile with a tile of the scratch at each offset. */
#ifndef SWATFX_DOTS_H
#define SWATFX_DOTS_H

#include "common.h"
#include "elem.h"

/* A tile is stacks of rows of `length` elements that lie together. */
typedef struct {
    const elem *grad, *in;
    int64_t stacks, rows, length;
    int64_t grad_stack, grad_row, in_stack, in_row; /* elements between two */
} dots_at;

/* sums[i] += the tile at `grad` times that at `in` + offset[i]. Nothing outside of the rows is read. */
void TYPED(add_dots)(const int32_t *offset, int64_t count, dots_at at, float *sums);

#endif
