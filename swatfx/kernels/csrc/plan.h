/* How a product on image tiles is cut to fit registers and the second-level cache. */
#ifndef SWATFX_PLAN_H
#define SWATFX_PLAN_H

#include "common.h"
#include "problems.h"

/* Scratch: [channel of a block][row][phase of x][column][lane]. */
typedef struct {
    int in_place;               /* the input serves as the scratch: nothing to pad, and no conflicts */
    int flat;                   /* rows of the scratch, with their halos, are one run: columns between are for nothing */
    int64_t lanes;              /* images of a block, at most LANES */
    int64_t stack;              /* blocks of images in the scratch, of a sampled product; else 0 */
    int64_t block, blocks;      /* input channels that are in the scratch at a time */
    int64_t tile_rows, tile_cols; /* output positions that a scratch serves */
    int64_t kernel_rows, kernel_vectors, kernel_cols; /* and a call of the inner loop; vectors of a row, or of all */
    int64_t min_dy, min_dx, halo_y, halo_x;
    int64_t line, row, plane; /* elements: a phase's columns, all phases, a channel */
    int64_t offset[MAX_TAPS];
} plan;

/* Size of the second-level cache. */
int64_t cache_bytes(void);

/* `half`: elements are bfloat16. */
plan make_plan(const conv_problem *p, int64_t lanes, int half);
/* Of a sampled product: scratch is [channel of a block][block of images][row][phase of x][column][lane]. */
plan make_sampled_plan(const conv_problem *p, int64_t lanes, int half);

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
/* Vectors of so many rows in one run. */
static inline int64_t flat_vectors(const plan *at, int64_t rows) {
    return ceil_div(rows * at->line - at->halo_x * at->lanes, LANES);
}
/* Calls of the inner loop that a column of tiles takes, as far as they have sums of their own. */
static inline int64_t sums_rows(const plan *at) {
    return at->flat ? ceil_div(at->tile_rows, at->kernel_rows) : at->tile_rows;
}
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

#endif
