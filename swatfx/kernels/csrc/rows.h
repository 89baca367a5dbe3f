/* Sparse weights in the form that the tile kernels read: for every block and row, offsets and values. */
#ifndef SWATFX_ROWS_H
#define SWATFX_ROWS_H

#include "plan.h"

typedef struct {
    int64_t *begin; /* [blocks * rows + 1]; NULL if memory ran out */
    int32_t *offset; /* in elements, into the scratch buffer */
    float *value;   /* of a weight; NULL of places */
    int32_t *place; /* in the filter, in memory order; NULL of weights */
} sparse_rows;

/* `half`: values are rounded to bfloat16, to the nearest; those that are zero then stay. */
sparse_rows build_rows(const conv_problem *p, const plan *at, const float *weight, float threshold, int half);
/* The only row of a problem with one channel and one row, into `offset` and `value`, which have room for all
 * taps: how many. */
int64_t build_row(const conv_problem *p, const plan *at, const float *weight, float threshold, int half,
                  int32_t *offset, float *value);
/* The places of forward's weights whose bits are set, from that of the first weight's, `first`, on. */
sparse_rows build_places(const conv_problem *p, const plan *at, const uint8_t *bits, int64_t first);
/* Likewise; `place` is in the filter. */
int64_t build_row_of_places(const conv_problem *p, const plan *at, const uint8_t *bits, int64_t first, int32_t *offset,
                            int32_t *place);
void free_rows(sparse_rows *rows);

/* Rows of weights in one piece of memory: begin, offsets and values of so many cells. How many bytes that takes;
 * nothing is written if `room` is less. */
int64_t lay_rows(const sparse_rows *rows, int64_t cells, char *to, int64_t room);
/* Rows that lie at *from, which moves on to what follows; not to be freed. */
sparse_rows made_rows(const char **from, int64_t cells);

#endif
