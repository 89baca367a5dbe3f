/* Layer normalisation of a matrix whose rows are features: each column is normalised by itself.
 *
 * A vector is sixteen columns, and a block of them is read from memory once: it stays in the cache for the
 * passes that follow. Threads share out blocks.
 *
 * Stands on no other .c file.
 */
#include <math.h>

#include "exports.h"
#include "pieces.h"

/* BLOCK columns are some lines of each row, so that a processor fetches ahead. SHORT sums of single
 * precision are added up before they join the rest: with many features nothing small is lost. */
enum { BLOCK = 256, VECTORS = BLOCK / LANES, SHORT = 64 };

/* `sum` and what has not joined it yet. */
typedef struct {
    wide sum[VECTORS], few[VECTORS];
} total;

INLINE void clear(wide *sums) {
    for (int v = 0; v < VECTORS; v++) sums[v] = splat(0);
}

INLINE void join(total *t, int64_t feature, int64_t features) {
    if ((feature + 1) % SHORT && feature + 1 != features) return;
    for (int v = 0; v < VECTORS; v++) t->sum[v] = add(t->sum[v], t->few[v]);
    clear(t->few);
}

INLINE void begin(total *t) {
    clear(t->sum);
    clear(t->few);
}

/* Do a statement for every vector of a block of `width` columns: `count` columns from `at` on. */
#define EACH_VECTOR(width, ...)                                                                     \
    for (int v = 0; LANES * v < (width); v++) {                                                     \
        int at = LANES * v, count = (int)min64(LANES, (width) - at);                                \
        __VA_ARGS__;                                                                                \
    }

static void block_forward(const elem *x, const float *weight, const float *bias, elem *y, float *mean,
                          float *rstd, int64_t features, int64_t columns, int width, double eps, int past) {
    total t, rest;
    wide center[VECTORS], scale[VECTORS], share = splat((float)(1 / (double)features));
    begin(&t);
    for (int64_t f = 0; f < features; f++) {
        const elem *row = x + f * columns;
        EACH_VECTOR(width, t.few[v] = add(t.few[v], get_some(row + at, count, 0)));
        join(&t, f, features);
    }
    for (int v = 0; v < VECTORS; v++) center[v] = mul(t.sum[v], share);
    /* The mean of what is left corrects the mean: of equal values, however large, nothing remains. */
    begin(&t);
    begin(&rest);
    for (int64_t f = 0; f < features; f++) {
        const elem *row = x + f * columns;
        EACH_VECTOR(width, {
            wide far = sub(get_some(row + at, count, 0), center[v]);
            rest.few[v] = add(rest.few[v], far);
            t.few[v] = multiply_add(far, far, t.few[v]);
        });
        join(&t, f, features);
        join(&rest, f, features);
    }
    EACH_VECTOR(width, {
        wide off = mul(rest.sum[v], share);
        float found[LANES];
        put(found, sub(mul(t.sum[v], share), mul(off, off)));
        for (int l = 0; l < LANES; l++) found[l] = (float)(1 / sqrt((found[l] < 0 ? 0 : (double)found[l]) + eps));
        center[v] = add(center[v], off);
        scale[v] = get(found);
        put_some(mean + at, center[v], count);
        put_some(rstd + at, scale[v], count);
    });
    for (int64_t f = 0; f < features; f++) {
        wide w = splat(weight ? weight[f] : 1), b = splat(bias ? bias[f] : 0);
        EACH_VECTOR(width, {
            wide seen = mul(sub(get_some(x + f * columns + at, count, 0), center[v]), scale[v]);
            put_result(y + f * columns + at, multiply_add(seen, w, b), count, past);
        });
    }
}

void TYPED(swatfx_layer_norm)(const elem *x, const float *weight, const float *bias, elem *y, float *mean,
                              float *rstd, int64_t features, int64_t columns, double eps, int threads) {
    int past = outgrows_cache(features * columns) && on_line(y) && columns % LANES == 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < columns; c += BLOCK) {
        int width = (int)min64(BLOCK, columns - c);
        block_forward(x + c, weight, bias, y + c, mean + c, rstd + c, features, columns, width, eps, past);
        settle();
    }
}

/* Of a block: dx if it is wanted, and what the parameters' gradients gain, in `dweight` and `dbias`. */
static void block_backward(const elem *grad, const elem *x, const float *weight, const float *mean,
                           const float *rstd, elem *dx, double *dweight, double *dbias, int64_t features,
                           int64_t columns, int width, int past) {
    total plain, along;
    wide center[VECTORS], scale[VECTORS], share = splat((float)(1 / (double)features));
    begin(&plain);
    begin(&along);
    EACH_VECTOR(width, {
        center[v] = get_some(mean + at, count, 0);
        scale[v] = get_some(rstd + at, count, 0);
    });
    for (int64_t f = 0; f < features; f++) {
        const elem *row = x + f * columns, *up = grad + f * columns;
        wide w = splat(weight ? weight[f] : 1), gains = splat(0), sums = splat(0);
        EACH_VECTOR(width, {
            wide seen = mul(sub(get_some(row + at, count, 0), center[v]), scale[v]);
            wide g = get_some(up + at, count, 0), gained = mul(g, seen);
            gains = add(gains, gained);
            sums = add(sums, g);
            plain.few[v] = multiply_add(g, w, plain.few[v]);
            along.few[v] = multiply_add(gained, w, along.few[v]);
        });
        dweight[f] += lane_sum(gains);
        dbias[f] += lane_sum(sums);
        join(&plain, f, features);
        join(&along, f, features);
    }
    if (!dx) return;
    for (int v = 0; v < VECTORS; v++) {
        plain.sum[v] = mul(plain.sum[v], share);
        along.sum[v] = mul(along.sum[v], share);
    }
    for (int64_t f = 0; f < features; f++) {
        wide w = splat(weight ? weight[f] : 1);
        EACH_VECTOR(width, {
            wide seen = mul(sub(get_some(x + f * columns + at, count, 0), center[v]), scale[v]);
            wide g = mul(get_some(grad + f * columns + at, count, 0), w);
            wide rest = sub(sub(g, plain.sum[v]), mul(seen, along.sum[v]));
            put_result(dx + f * columns + at, mul(rest, scale[v]), count, past);
        });
    }
}

void TYPED(swatfx_layer_norm_backward)(const elem *grad, const elem *x, const float *weight, const float *mean,
                                       const float *rstd, elem *dx, double *dweight, double *dbias,
                                       int64_t features, int64_t columns, int threads) {
    int past = dx && outgrows_cache(features * columns) && on_line(dx) && columns % LANES == 0;
    int64_t blocks = (columns + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t part = 0; part < threads; part++) {
        double *gains = dweight + part * features, *sums = dbias + part * features;
        memset(gains, 0, (size_t)features * sizeof *gains);
        memset(sums, 0, (size_t)features * sizeof *sums);
        for (int64_t b = blocks * part / threads; b < blocks * (part + 1) / threads; b++) {
            int64_t c = b * BLOCK;
            int width = (int)min64(BLOCK, columns - c);
            block_backward(grad + c, x + c, weight, mean + c, rstd + c, dx ? dx + c : NULL, gains, sums,
                           features, columns, width, past);
        }
        settle();
    }
}
