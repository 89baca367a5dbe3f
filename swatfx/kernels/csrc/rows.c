/* From a dense weight and a threshold to sparse rows, in a few passes at memory speed.
 *
 * First each filter's nonzeros are compressed in memory order. Forward then only translates positions
 * into scratch offsets; the input gradient, whose rows are channels, sorts them by counting.
 *
 * Stands on no other .c file.
 */
#include "rows.h"

#include <math.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

/* Keeps what the reference keeps: not below the threshold (NaN stays), and not zero. */
static inline int kept(float x, float threshold) { return (!(fabsf(x) < threshold)) & (x != 0); }

/* Nonzeros of n floats: how many; written to `index` and `value` unless those are NULL.
 * Up to LANES - 1 elements past the last are written too. */
static int64_t compress(const float *w, int64_t n, float threshold, int32_t *index, float *value) {
    int64_t count = 0, i = 0;
#if defined(__AVX512F__)
    const __m512 least = _mm512_set1_ps(threshold), zero = _mm512_setzero_ps();
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i < n; i += LANES) {
        const __mmask16 valid = n - i >= LANES ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        const __m512 x = _mm512_maskz_loadu_ps(valid, w + i);
        const __mmask16 keep = _mm512_mask_cmp_ps_mask(valid, _mm512_abs_ps(x), least, _CMP_NLT_UQ) &
                               _mm512_cmp_ps_mask(x, zero, _CMP_NEQ_UQ);
        if (value) {
            _mm512_storeu_ps(value + count, _mm512_maskz_compress_ps(keep, x));
            _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(keep, at));
            at = _mm512_add_epi32(at, _mm512_set1_epi32(LANES));
        }
        count += __builtin_popcount(keep);
    }
#else
    for (; i < n; i++) {
        if (value) value[count] = w[i], index[count] = (int32_t)i;
        count += kept(w[i], threshold);
    }
#endif
    return count;
}

/* Which of n bits from `first` on are set: how many; written to `index` unless that is NULL.
 * Up to LANES - 1 elements past the last are written too. */
static int64_t compress_bits(const uint8_t *bits, int64_t first, int64_t n, int32_t *index) {
    int64_t count = 0, i = 0;
#if defined(__AVX512F__)
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; first % 8 == 0 && i + LANES <= n; i += LANES) {
        uint16_t set;
        memcpy(&set, bits + (first + i) / 8, sizeof set);
        if (index) {
            _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(set, at));
            at = _mm512_add_epi32(at, _mm512_set1_epi32(LANES));
        }
        count += __builtin_popcount(set);
    }
    if (i == n) return count;
#endif
    for (int64_t byte = (first + i) / 8; byte <= (first + n - 1) / 8; byte++) {
        const int64_t from = byte * 8 - first; /* of its lowest bit */
        uint32_t set = bits[byte];
        if (from < i) set &= 0xffu << (i - from);
        if (n - from < 8) set &= 0xffu >> (8 - (n - from));
        for (; index && set; set &= set - 1) index[count++] = (int32_t)from + __builtin_ctz(set);
        count += __builtin_popcount(set);
    }
    return count;
}

/* To the nearest bfloat16, ties to even; NaN stays one. */
static void round_values(float *value, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t x;
        memcpy(&x, value + i, sizeof x);
        const uint32_t near = x + (x >> 16 & 1) + 0x7fff, quiet = x | 0x400000;
        x = (value[i] != value[i] ? quiet : near) & 0xffff0000;
        memcpy(value + i, &x, sizeof x);
    }
}

/* What a position within a filter, in memory order, stands for. */
typedef struct {
    int32_t place;  /* the row, if rows are channels; else the channel's block */
    int32_t offset; /* in the scratch: of its tap, and of its channel, if that is not the row; negative where this
                     * problem has no such tap */
} position;

static position *positions(const conv_problem *p, const plan *at, int64_t channels, int64_t stride,
                           int64_t size) {
    position *out = malloc(size * sizeof(position));
    if (!out) return NULL;
    for (int64_t i = 0; i < size; i++) out[i] = (position){0, -1};
    for (int64_t c = 0; c < channels; c++) {
        const int64_t block = p->rows_are_filters ? c / at->block : 0;
        const int64_t plane = p->rows_are_filters ? (c - block * at->block) * at->plane : 0;
        for (int64_t t = 0; t < p->taps; t++)
            out[c * stride + p->tap[t].weight] =
                (position){(int32_t)(p->rows_are_filters ? block : c), (int32_t)(plane + at->offset[t])};
    }
    return out;
}

typedef struct {
    int64_t filters, channels, size; /* size: elements of a filter, which lie together */
    int64_t *begin;                  /* [filters + 1] */
    int32_t *index;
    float *value;
} compressed;

/* What is there to be compressed: weights that are not below a threshold, or places whose bit is set. */
typedef struct {
    const float *weight;
    float threshold;
    int half;
    const uint8_t *bits; /* or NULL */
    int64_t first;       /* bit */
} source;

static int64_t compress_filter(const compressed *c, const source *from, int64_t f, int32_t *index, float *value) {
    if (from->bits) return compress_bits(from->bits, from->first + f * c->size, c->size, index);
    const int64_t count = compress(from->weight + f * c->size, c->size, from->threshold, index, value);
    if (value && from->half) round_values(value, count);
    return count;
}

static int compress_filters(compressed *c, const source *from, int threads) {
    const int64_t padding = LANES;
    c->begin = calloc(c->filters + 1, sizeof(int64_t));
    if (!c->begin) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t f = 0; f < c->filters; f++)
        c->begin[f + 1] = compress_filter(c, from, f, NULL, NULL) + padding;
    for (int64_t f = 0; f < c->filters; f++) c->begin[f + 1] += c->begin[f];
    c->index = malloc((c->begin[c->filters] + 1) * sizeof(int32_t));
    c->value = from->bits ? NULL : malloc((c->begin[c->filters] + 1) * sizeof(float));
    if (!c->index || !(from->bits || c->value)) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t f = 0; f < c->filters; f++) {
        const int64_t begin = c->begin[f];
        compress_filter(c, from, f, c->index + begin, c->value ? c->value + begin : NULL);
    }
    return 0;
}

/* Counts (fill = 0) or places (fill = 1) one filter's nonzeros, a row's; `cursor` moves as they are placed. */
static inline void sort_row(const compressed *c, const position *where, int64_t f, int64_t count, int64_t rows,
                            int64_t *cursor, sparse_rows *out, int fill) {
    const int32_t *index = c->index + c->begin[f];
    const float *value = out->value ? c->value + c->begin[f] : NULL;
    for (int64_t i = 0; i < count;) {
        /* In most memory orders channels of a block lie together: a run of nonzeros is one cell's. */
        const int32_t block = where[index[i]].place;
        int64_t *const cell = cursor + block * rows + f;
        int64_t to = *cell;
        for (; i < count && where[index[i]].place == block; i++) {
            const position q = where[index[i]];
            if (q.offset < 0) continue;
            if (fill) {
                out->offset[to] = q.offset;
                if (value)
                    out->value[to] = value[i];
                else
                    out->place[to] = index[i];
            }
            to++;
        }
        *cell = to;
    }
}

/* Likewise of a filter that is a channel of the scratch, whose nonzeros are all rows'. */
static inline void sort_channel(const compressed *c, const position *where, int64_t f, int64_t count, const plan *at,
                                int64_t rows, int64_t *cursor, sparse_rows *out, int fill) {
    const int32_t *index = c->index + c->begin[f];
    const float *value = c->value + c->begin[f];
    const int64_t block = f / at->block;
    const int32_t plane = (int32_t)((f - block * at->block) * at->plane);
    int64_t *const cells = cursor + block * rows;
    for (int64_t i = 0; i < count; i++) {
        const position q = where[index[i]];
        if (q.offset < 0) continue;
        const int64_t to = cells[q.place]++;
        if (!fill) continue;
        out->offset[to] = plane + q.offset;
        out->value[to] = value[i];
    }
}

static sparse_rows build(const conv_problem *p, const plan *at, source from) {
    const int by_filter = p->rows_are_filters;
    const int threads = (int)p->threads;
    const int64_t cells = at->blocks * p->rows;
    compressed c = {by_filter ? p->rows : p->channels, by_filter ? p->channels : p->rows, 0, NULL, NULL, NULL};
    c.size = c.channels * p->weight_taps;
    position *where = positions(p, at, c.channels, p->weight_channel, c.size);
    sparse_rows out = {.begin = calloc(cells + 1, sizeof(int64_t))};
    int64_t *cursor = calloc(cells + 1, sizeof(int64_t));
    int failed = !where || !out.begin || !cursor || compress_filters(&c, &from, threads);
    /* Filters that share a cell go to one thread, in order: one filter, or a block of them. */
    const int64_t unit = by_filter ? 1 : at->block;
    for (int fill = 0; fill < 2 && !failed; fill++) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t u = 0; u < ceil_div(c.filters, unit); u++)
            for (int64_t f = u * unit; f < min64(c.filters, (u + 1) * unit); f++) {
                const int64_t count = c.begin[f + 1] - c.begin[f] - LANES;
                int64_t *const to = fill ? cursor : out.begin + 1;
                if (by_filter)
                    sort_row(&c, where, f, count, p->rows, to, &out, fill);
                else
                    sort_channel(&c, where, f, count, at, p->rows, to, &out, fill);
            }
        if (fill) break;
        for (int64_t i = 0; i < cells; i++) out.begin[i + 1] += out.begin[i];
        memcpy(cursor, out.begin, cells * sizeof(int64_t));
        out.offset = malloc((out.begin[cells] + 1) * sizeof(int32_t));
        if (from.bits)
            out.place = malloc((out.begin[cells] + 1) * sizeof(int32_t));
        else
            out.value = malloc((out.begin[cells] + 1) * sizeof(float));
        failed = !out.offset || !(from.bits ? (void *)out.place : (void *)out.value);
    }
    free(where);
    free(cursor);
    free(c.begin);
    free(c.index);
    free(c.value);
    if (failed) free_rows(&out);
    return out;
}

sparse_rows build_rows(const conv_problem *p, const plan *at, const float *weight, float threshold, int half) {
    return build(p, at, (source){.weight = weight, .threshold = threshold, .half = half});
}

sparse_rows build_places(const conv_problem *p, const plan *at, const uint8_t *bits, int64_t first) {
    return build(p, at, (source){.bits = bits, .first = first});
}

int64_t build_row(const conv_problem *p, const plan *at, const float *weight, float threshold, int half,
                  int32_t *offset, float *value) {
    int64_t count = 0;
    for (int64_t t = 0; t < p->taps; t++)
        if (kept(weight[p->tap[t].weight], threshold)) {
            offset[count] = (int32_t)at->offset[t];
            value[count++] = weight[p->tap[t].weight];
        }
    if (half) round_values(value, count);
    return count;
}

int64_t build_row_of_places(const conv_problem *p, const plan *at, const uint8_t *bits, int64_t first, int32_t *offset,
                            int32_t *place) {
    int64_t count = 0;
    for (int64_t t = 0; t < p->taps; t++) {
        const int64_t bit = first + p->tap[t].weight;
        if (bits[bit / 8] >> bit % 8 & 1) {
            offset[count] = (int32_t)at->offset[t];
            place[count++] = (int32_t)p->tap[t].weight;
        }
    }
    return count;
}

void free_rows(sparse_rows *rows) {
    free(rows->begin);
    free(rows->offset);
    free(rows->value);
    free(rows->place);
    *rows = (sparse_rows){NULL, NULL, NULL, NULL};
}
