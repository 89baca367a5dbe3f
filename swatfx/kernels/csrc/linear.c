/* The dense weight gradient of a linear layer from a packed sparse activation.
 *
 * As in wgrad.c, but the activation was packed (row, feature) and the output gradient has its features
 * innermost already. The rows are cut into strips; within one, nonzeros are sorted by feature.
 *
 * Stands on plan.c, tile.c and tile_bf16.c.
 */
#include "exports.h"
#include "plan.h"
#include "tile.h"
#include "transpose.h"

/* Cells: [strips][features]. */
typedef struct {
    int64_t *begin; /* [cells + 1]; NULL if it failed */
    int32_t *offset;
    float *value;
    int failed; /* NO_MEMORY or DOES_NOT_FIT */
} sorted;

static void free_sorted(sorted *s) {
    free(s->begin);
    free(s->offset);
    free(s->value);
}

static inline int64_t row_bits(const uint8_t *mask, int64_t at, int64_t n) {
    int64_t count = 0;
    for (int64_t i = at; i < at + n;) {
        if ((i & 63) == 0 && i + 64 <= at + n) {
            uint64_t word;
            memcpy(&word, mask + (i >> 3), 8);
            count += __builtin_popcountll(word);
            i += 64;
        } else {
            count += mask[i >> 3] >> (i & 7) & 1;
            i++;
        }
    }
    return count;
}

/* Calls of `visit` for each nonzero of rows [m0, m1) in order; `i` is the first one's number. */
#define EACH_NONZERO(p, mask, m0, m1, i, visit)                                                 \
    for (int64_t m = (m0); m < (m1); m++) {                                                     \
        const int64_t end = (m + 1) * (p)->inputs;                                              \
        for (int64_t bit = m * (p)->inputs; bit < end;) {                                       \
            const int64_t n = min64(end - bit, 64 - (bit & 7));                                 \
            uint64_t word = 0;                                                                  \
            memcpy(&word, (mask) + (bit >> 3), ((bit & 7) + n + 7) >> 3);                       \
            word >>= bit & 7;                                                                   \
            if (n < 64) word &= (1ull << n) - 1;                                                \
            for (; word; word &= word - 1) {                                                    \
                const int64_t c = bit + __builtin_ctzll(word) - m * (p)->inputs;                \
                visit;                                                                          \
                (i)++;                                                                          \
            }                                                                                   \
            bit += n;                                                                           \
        }                                                                                       \
    }

static sorted sort_nonzeros(const linear_problem *p, int64_t strip_rows, int64_t strips, int64_t width,
                            const uint8_t *packed, int64_t header, int64_t count_of_values) {
    const int64_t cells = strips * p->inputs;
    const uint8_t *values = packed + header;
    sorted out = {calloc(cells + 1, sizeof(int64_t)), NULL, NULL, 0};
    int64_t *first = calloc(strips + 1, sizeof(int64_t)), *cursor = malloc((cells + 1) * sizeof(int64_t));
    int failed = !out.begin || !first || !cursor ? NO_MEMORY : 0;
    if (!failed) {
#pragma omp parallel for num_threads((int)p->threads) schedule(static)
        for (int64_t s = 0; s < strips; s++) {
            const int64_t m0 = s * strip_rows, m1 = min64(p->rows, m0 + strip_rows);
            int64_t *count = out.begin + 1 + s * p->inputs, i = 0;
            first[s + 1] = row_bits(packed, m0 * p->inputs, (m1 - m0) * p->inputs);
            EACH_NONZERO(p, packed, m0, m1, i, count[c]++)
        }
        for (int64_t s = 0; s < strips; s++) first[s + 1] += first[s];
        for (int64_t i = 0; i < cells; i++) out.begin[i + 1] += out.begin[i];
        memcpy(cursor, out.begin, (cells + 1) * sizeof(int64_t));
        out.offset = malloc((out.begin[cells] + 1) * sizeof(int32_t));
        out.value = malloc((out.begin[cells] + 1) * sizeof(float));
        failed = !out.offset || !out.value ? NO_MEMORY : first[strips] != count_of_values ? DOES_NOT_FIT : 0;
    }
    if (!failed) {
#pragma omp parallel for num_threads((int)p->threads) schedule(static)
        for (int64_t s = 0; s < strips; s++) {
            const int64_t m0 = s * strip_rows, m1 = min64(p->rows, m0 + strip_rows);
            int64_t *const to = cursor + s * p->inputs, i = first[s];
            EACH_NONZERO(p, packed, m0, m1, i, {
                out.offset[to[c]] = (int32_t)((m - m0) * width);
                out.value[to[c]++] = value_at(values, p->half, i);
            })
        }
    }
    free(first);
    free(cursor);
    if (failed) {
        free_sorted(&out);
        out = (sorted){.failed = failed};
    }
    return out;
}

/* grad[m][f0 ...] of a strip, `width` wide, zero past the last output. */
static void fill_scratch(const linear_problem *p, const elem *grad, int64_t m0, int64_t m1, int64_t f0, int64_t width,
                         elem *scratch) {
    const int64_t count = min64(width, p->outputs - f0);
    for (int64_t m = m0; m < m1; m++) {
        elem *to = scratch + (m - m0) * width;
        memcpy(to, grad + m * p->outputs + f0, count * sizeof(elem));
        memset(to + count, 0, (width - count) * sizeof(elem));
    }
}

/* sums[c][f] -> out[f0 + f][c]. */
static void write_result(const linear_problem *p, const float *sums, int64_t width, int64_t f0, int64_t c0, int64_t c1,
                         float *out) {
    const int64_t outputs = min64(width, p->outputs - f0);
    for (int64_t c = c0; c < c1; c += LANES)
        for (int64_t f = 0; f < outputs; f += LANES) {
            const float *rows[LANES];
            for (int64_t i = 0; i < LANES; i++) rows[i] = sums + (min64(c + i, c1 - 1) - c0) * width + f;
            float *to = out + (f0 + f) * p->inputs + c;
            const int64_t high = min64(LANES, outputs - f), wide = min64(LANES, c1 - c);
            if (high == LANES && wide == LANES) {
                transpose16(rows, to, p->inputs);
            } else {
                for (int64_t j = 0; j < high; j++)
                    for (int64_t i = 0; i < wide; i++) to[j * p->inputs + i] = rows[i][j];
            }
        }
}

int TYPED(sparse_linear_weight_gradient)(const linear_problem *p, const uint8_t *packed, int64_t header,
                                         int64_t values, const elem *grad, float *out) {
    const int64_t vectors = ceil_div(p->outputs, LANES), most = min64(min64(vectors, 8), MAX_TILE);
    const int64_t wide = ceil_div(vectors, ceil_div(vectors, most)), width = wide * LANES;
    const int64_t budget = cache_bytes() / 2 / (int64_t)sizeof(elem);
    const int64_t strip_rows = max64(1, min64(p->rows, budget / width)), strips = ceil_div(p->rows, strip_rows);
    sorted s = sort_nonzeros(p, strip_rows, strips, width, packed, header, values);
    if (!s.begin) return s.failed;
    const int64_t blocks = ceil_div(p->outputs, width);
    const int64_t shares = blocks >= p->threads ? 1 : min64(ceil_div(p->threads, blocks), p->inputs);
    const int64_t share_inputs = ceil_div(p->inputs, shares);
    int failed = 0;
#pragma omp parallel num_threads((int)p->threads) reduction(| : failed)
    {
        elem *scratch = aligned_alloc(64, (strip_rows * width + LANES) / 32 * 32 * sizeof(elem));
        float *sums = aligned_alloc(64, share_inputs * width * sizeof(float));
        failed |= !scratch || !sums;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < blocks * shares; unit++) {
            const int64_t f0 = unit / shares * width, c0 = unit % shares * share_inputs;
            const int64_t c1 = min64(p->inputs, c0 + share_inputs);
            if (failed || c0 >= c1) continue;
            for (int64_t strip = 0; strip < strips; strip++) {
                const int64_t m0 = strip * strip_rows, m1 = min64(p->rows, m0 + strip_rows);
                fill_scratch(p, grad, m0, m1, f0, width, scratch);
                const int finite = all_finite(scratch, (m1 - m0) * width);
                for (int64_t c = c0; c < c1; c++) {
                    const int64_t from = s.begin[strip * p->inputs + c], until = s.begin[strip * p->inputs + c + 1];
                    if (from == until && strip) continue;
                    const nonzeros e = {s.offset + from, s.value + from, until - from};
                    float *to = sums + (c - c0) * width;
#if defined(SWATFX_BF16)
                    const tile_at_bf16 at = {scratch, 0, NULL, 0, 0, 0, strip ? to : NULL, to, 0};
                    tile_kernel_bf16(1, wide, finite)(e, at, 0);
#else
                    const tile_at at = {scratch, 0, to, 0, LANES, 0};
                    tile_kernel(1, wide)(e, at, strip == 0, 0);
                    (void)finite;
#endif
                }
            }
            write_result(p, sums, width, f0, c0, c1, out);
        }
        free(scratch);
        free(sums);
    }
    free_sorted(&s);
    return failed ? NO_MEMORY : 0;
}
