/* Packed activations as lists of nonzeros, one for each channel of each tile of the weight gradient. */
#ifndef SWATFX_LISTS_H
#define SWATFX_LISTS_H

#include "common.h"
#include "problems.h"

/* Kernel positions that meet an activation row (or column) with this remainder by the stride. */
typedef struct {
    int64_t count;
    int64_t tap[MAX_KERNEL];   /* kernel position, */
    int64_t shift[MAX_KERNEL]; /* and the output row it meets, from that of the activation: (row + pad) / stride */
} phase;

/* How the work is cut: images by lanes, activation rows by strips. Scratch for the output gradient of
 * a strip: [row][image][column][filter], with `above` rows and `left` columns of halo. */
typedef struct {
    int64_t strip_rows, strips;
    int64_t filters;              /* of a scratch, a multiple of LANES */
    int64_t above, left;          /* halo before the first activation's own output position */
    int64_t rows, columns;        /* of the scratch */
    phase y[MAX_STRIDE], x[MAX_STRIDE];
} cut;

/* Cells: [blocks][strips][phases][channels]; a phase is one of y, `turn` div step_x, with one of x. */
typedef struct {
    int64_t blocks;      /* of images */
    int64_t *begin;      /* of each cell; NULL if it failed */
    int failed;          /* NO_MEMORY or DOES_NOT_FIT */
    int64_t *count;
    int32_t *offset;     /* floats into the scratch of the strip */
    const float *value;
    float *owned_values; /* `value`, unless the packed values serve as they lie */
} lists;

/* The first output row that a strip's scratch holds. */
static inline int64_t strip_top(const wgrad_problem *p, const cut *at, int64_t strip) {
    return (strip * at->strip_rows + p->pad_y) / p->step_y - at->above;
}

static inline int64_t cell(const wgrad_problem *p, const cut *at, int64_t block, int64_t strip, int64_t turn,
                           int64_t channel, int64_t channels) {
    return ((block * at->strips + strip) * p->step_y * p->step_x + turn) * channels + channel;
}

/* Fails with DOES_NOT_FIT unless the mask has `values` bits set. */
lists build_lists(const wgrad_problem *p, const cut *at, const uint8_t *packed, int64_t header, int64_t values);
void free_lists(lists *l);

#endif
