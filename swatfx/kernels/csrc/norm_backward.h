/* What both backwards of batch normalisation share; see norm.h. */
#ifndef SWATFX_NORM_BACKWARD_H
#define SWATFX_NORM_BACKWARD_H

#include "norm.h"

#define finish_sums TYPED(finish_sums)
#define norm_runs_backward TYPED(norm_runs_backward)
#define norm_last_backward TYPED(norm_last_backward)

/* Where the ReLU let through: everywhere, or as say bits, codes, the sign of y computed again. */
enum mask_from { ALL, BITS, CODES, SIGN };
/* What normalised x is to be had from. */
enum source { NOTHING, X, BYTE, HALF_BYTE };

typedef struct {
    const elem *grad, *x;
    const float *weight, *bias, *mean, *invstd;
    const uint8_t *bits, *codes; /* x, codes or both are NULL */
    const float *header;
    elem *dx, *dresidual; /* NULL where not wanted, as the next two */
    float *dweight, *dbias;
    int training, width, past; /* width: bits of a code */
    enum mask_from masks;
} backward;

/* Of g, the gradient below the ReLU, of g * h, where h is x - mean, or normalised x if that was what
 * was kept, and of h in that case: codes change it. */
typedef struct {
    double g, gh, h;
} sums;

/* dx = g * a + h * b + c. */
typedef struct {
    float a, b, c;
} plane;

/* Keeps a channel's sums as gradients of weight and bias, and says what they make of dx. */
plane finish_sums(const backward *b, const extent *e, int64_t channel, sums s);

static inline int wants_sums(const backward *b) {
    return b->dweight || b->dbias || (b->dx && b->training);
}

/* What elements are read with, as in norm.h; codes above the border are where y is positive, or, where
 * the weight is negative, below. */
typedef struct {
    wide scale, shift, mean;
    decoder grid;
    mask up;
} reader;

INLINE int is_coded(const enum source from_what) { return from_what == BYTE || from_what == HALF_BYTE; }

/* g and h of `count` elements at `at`. */
INLINE wide read_gradient(const backward *b, const reader *how, int64_t at, int count, wide *h,
                          const enum mask_from masks, const enum source from_what) {
    wide g = get_some(b->grad + at, count, 0), code = splat(0), x = code;
    *h = x;
    if (is_coded(from_what)) {
        code = get_codes(b->codes, at, count, from_what == BYTE ? 8 : 4);
        *h = decode(&how->grid, code);
    } else if (from_what == X) {
        x = get_some(b->x + at, count, 0);
        *h = sub(x, how->mean);
    }
    if (masks == SIGN) g = only(lets_through(multiply_add(x, how->scale, how->shift)), g);
    if (masks == BITS) g = only(from_bits(get_bits(b->bits, at, count)), g);
    if (masks == CODES) g = only(agree(at_least(code, how->grid.first), how->up), g);
    return g;
}

INLINE void write_gradient(const backward *b, const reader *how, wide of_g, wide of_h, wide rest,
                           int64_t at, int count, int past, const enum mask_from masks,
                           const enum source from_what) {
    wide h, g = read_gradient(b, how, at, count, &h, masks, from_what);
    if (b->dresidual) put_result(b->dresidual + at, g, count, past);
    if (b->dx) {
        /* Of running statistics x is no part: where it is infinite, 0 times it would be NaN. */
        wide d = multiply_add(g, of_g, b->training ? multiply_add(h, of_h, rest) : rest);
        put_result(b->dx + at, d, count, past);
    }
}

/* One copy of a function for each way to read a gradient. */
#define EACH_WAY(b, call)                                                                           \
    switch ((b)->masks) {                                                                           \
    case SIGN: call(SIGN, X); break;                                                                \
    case CODES:                                                                                     \
        if ((b)->width == 8) {                                                                      \
            call(CODES, BYTE);                                                                      \
        } else {                                                                                    \
            call(CODES, HALF_BYTE);                                                                 \
        }                                                                                           \
        break;                                                                                      \
    case BITS: EACH_SOURCE(b, call, BITS); break;                                                   \
    default: EACH_SOURCE(b, call, ALL);                                                             \
    }
#define EACH_SOURCE(b, call, masks)                                                                 \
    if ((b)->codes && (b)->width == 8) {                                                            \
        call(masks, BYTE);                                                                          \
    } else if ((b)->codes) {                                                                        \
        call(masks, HALF_BYTE);                                                                     \
    } else if ((b)->x) {                                                                            \
        call(masks, X);                                                                             \
    } else {                                                                                        \
        call(masks, NOTHING);                                                                       \
    }

/* The two forms of backward, as in norm.h. */
void norm_runs_backward(const backward *b, const extent *e);
void norm_last_backward(const backward *b, const extent *e);

#endif
