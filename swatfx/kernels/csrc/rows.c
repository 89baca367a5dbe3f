/* From a dense weight and a threshold to sparse rows, in one pass at memory speed.
 *
 * Each filter's nonzeros are compressed in memory order, and sorted by counting into cells, which are rows
 * for every block of channels: of the filter in forward, of their channels in the input gradient.
 *
 * Stands on no other .c file.
 */
#include "rows.h"

#include <math.h>
#include <omp.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

/* Keeps what the reference keeps: not below the threshold (NaN stays), and not zero. */
static inline int kept(float x, float threshold) { return (!(fabsf(x) < threshold)) & (x != 0); }

/* Nonzeros of n floats, to `index` and `value`: how many. Up to LANES elements past the last are written too. */
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
        _mm512_storeu_ps(value + count, _mm512_maskz_compress_ps(keep, x));
        _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(keep, at));
        at = _mm512_add_epi32(at, _mm512_set1_epi32(LANES));
        count += __builtin_popcount(keep);
    }
#else
    for (; i < n; i++) {
        value[count] = w[i], index[count] = (int32_t)i;
        count += kept(w[i], threshold);
    }
#endif
    return count;
}

/* Which of n bits from `first` on are set, to `index`: how many. Up to LANES elements past the last are written too. */
static int64_t compress_bits(const uint8_t *bits, int64_t first, int64_t n, int32_t *index) {
    int64_t count = 0, i = 0;
#if defined(__AVX512F__)
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; first % 8 == 0 && i + LANES <= n; i += LANES) {
        uint16_t set;
        memcpy(&set, bits + (first + i) / 8, sizeof set);
        _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(set, at));
        at = _mm512_add_epi32(at, _mm512_set1_epi32(LANES));
        count += __builtin_popcount(set);
    }
    if (i == n) return count;
#endif
    for (int64_t byte = (first + i) / 8; byte <= (first + n - 1) / 8; byte++) {
        const int64_t from = byte * 8 - first; /* of its lowest bit */
        uint32_t set = bits[byte];
        if (from < i) set &= 0xffu << (i - from);
        if (n - from < 8) set &= 0xffu >> (8 - (n - from));
        for (; set; set &= set - 1) index[count++] = (int32_t)from + __builtin_ctz(set);
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

/* What a position within a filter, in memory order, stands for: in forward the block of its channel, and its
 * place in the scratch; in the input gradient its channel, which is the row, and its tap's place. */
typedef struct {
    int32_t cell;
    int32_t offset; /* negative where this problem has no such tap */
} position;

static position *positions(const conv_problem *p, const plan *at, int64_t channels, int64_t size) {
    position *out = malloc(size * sizeof(position));
    if (!out) return NULL;
    for (int64_t i = 0; i < size; i++) out[i].offset = -1;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t t = 0; t < p->taps; t++) {
            position *const to = out + c * p->weight_channel + p->tap[t].weight;
            *to = (position){(int32_t)c, (int32_t)at->offset[t]};
            if (!p->rows_are_filters) continue;
            to->cell = (int32_t)(c / at->block);
            to->offset += (int32_t)(c % at->block * at->plane);
        }
    return out;
}

/* What is there to be compressed: weights that are not below a threshold, or places whose bit is set. */
typedef struct {
    const float *weight;
    float threshold;
    int half;
    const uint8_t *bits; /* or NULL */
    int64_t first;       /* bit */
} source;

/* The nonzeros of the filters that one thread compresses, filter by filter. */
typedef struct {
    int32_t *index;
    float *value; /* NULL of places */
    int64_t used, room;
} share;

/* Room for `more` nonzeros, and for what compressing writes behind them; not 0: there is none. */
static int make_way(share *own, int64_t more, int places) {
    if (own->used + more + LANES <= own->room) return 0;
    const int64_t room = own->used + more + LANES + own->room;
    int32_t *index = realloc(own->index, room * sizeof(int32_t));
    if (index) own->index = index;
    float *value = places ? NULL : realloc(own->value, room * sizeof(float));
    if (value) own->value = value;
    if (!index || !(places || value)) return 1;
    own->room = room;
    return 0;
}

/* A share for each thread, made by one: memory of other threads goes back to the system, and comes as new pages.
 * What is never written costs nothing: there is room for a third of all, where most are a tenth. */
static share *make_shares(int64_t threads, int64_t filters, int64_t size, int places) {
    share *all = calloc(threads, sizeof(share));
    for (int64_t t = 0; all && t < threads; t++)
        if (make_way(all + t, (filters / threads + 1) * size / 3 + size, places)) return all; /* tries again */
    return all;
}

static void free_shares(share *all, int64_t threads) {
    for (int64_t t = 0; all && t < threads; t++) {
        free(all[t].index);
        free(all[t].value);
    }
    free(all);
}

/* Compresses filters [from, to) of `size` elements; count[f]: nonzeros of filter f. */
static int compress_share(const source *what, int64_t size, int64_t from, int64_t to, share *own, int64_t *count) {
    for (int64_t f = from; f < to; f++) {
        if (make_way(own, size, what->bits != NULL)) return 1;
        int32_t *index = own->index + own->used;
        if (what->bits) {
            count[f] = compress_bits(what->bits, what->first + f * size, size, index);
        } else {
            float *value = own->value + own->used;
            count[f] = compress(what->weight + f * size, size, what->threshold, index, value);
            if (what->half) round_values(value, count[f]);
        }
        own->used += count[f];
    }
    return 0;
}

/* Where a filter's nonzeros go: cells are [block][row]. */
typedef struct {
    int64_t row, block, held; /* in forward the row; in the input gradient the block and place in the scratch */
} filter_at;

static filter_at filter_of(const conv_problem *p, const plan *at, int64_t f) {
    if (p->rows_are_filters) return (filter_at){f, 0, 0};
    const int64_t block = f / at->block;
    return (filter_at){0, block, (f - block * at->block) * at->plane};
}

static inline int64_t cell_of(const conv_problem *p, filter_at f, position q) {
    return p->rows_are_filters ? q.cell * p->rows + f.row : f.block * p->rows + q.cell;
}

static void count_filter(const conv_problem *p, const position *where, filter_at f, const int32_t *index, int64_t count,
                         int64_t *cells) {
    for (int64_t i = 0; i < count; i++) {
        const position q = where[index[i]];
        if (q.offset >= 0) cells[cell_of(p, f, q)]++;
    }
}

static void place_filter(const conv_problem *p, const position *where, filter_at f, const int32_t *index,
                         const float *value, int64_t count, int64_t *cursor, const sparse_rows *out) {
    for (int64_t i = 0; i < count; i++) {
        const position q = where[index[i]];
        if (q.offset < 0) continue;
        const int64_t to = cursor[cell_of(p, f, q)]++;
        out->offset[to] = (int32_t)f.held + q.offset;
        if (value)
            out->value[to] = value[i];
        else
            out->place[to] = index[i];
    }
}

/* From counts a thread and cell to where each thread's nonzeros begin: those of a cell are in the order of
 * filters. The number of all. */
static int64_t begin_cells(int64_t *cells, int64_t count, int threads, int64_t *begin) {
    int64_t all = 0;
    for (int64_t i = 0; i < count; i++) {
        begin[i] = all;
        for (int t = 0; t < threads; t++) {
            const int64_t found = cells[t * count + i];
            cells[t * count + i] = all;
            all += found;
        }
    }
    begin[count] = all;
    return all;
}

static int make_rows(sparse_rows *out, int64_t all, int places) {
    out->offset = malloc((all + 1) * sizeof(int32_t));
    if (places)
        out->place = malloc((all + 1) * sizeof(int32_t));
    else
        out->value = malloc((all + 1) * sizeof(float));
    return !out->offset || !(places ? (void *)out->place : (void *)out->value);
}

/* Weights are read once: they come from memory, all else is small. Each thread has a run of filters. */
static sparse_rows build(const conv_problem *p, const plan *at, source from) {
    const int64_t filters = p->rows_are_filters ? p->rows : p->channels;
    const int64_t channels = p->rows_are_filters ? p->channels : p->rows;
    const int64_t size = channels * p->weight_taps, count = at->blocks * p->rows;
    position *where = positions(p, at, channels, size);
    sparse_rows out = {.begin = malloc((count + 1) * sizeof(int64_t))};
    int64_t *cells = calloc(p->threads * count, sizeof(int64_t)), *counts = malloc((filters + 1) * sizeof(int64_t));
    share *shares = make_shares(p->threads, filters, size, from.bits != NULL);
    const int ready = where && out.begin && cells && counts && shares;
    int failed = !ready;
#pragma omp parallel num_threads((int)p->threads)
    if (ready) {
        const int team = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t f0 = filters * me / team, f1 = filters * (me + 1) / team;
        int64_t *const cursor = cells + me * count;
        share *const own = shares + me;
        const int full = compress_share(&from, size, f0, f1, own, counts);
        for (int64_t f = f0, i = 0; f < f1 && !full; i += counts[f++])
            count_filter(p, where, filter_of(p, at, f), own->index + i, counts[f], cursor);
#pragma omp critical(swatfx_rows)
        failed |= full;
#pragma omp barrier
#pragma omp single
        failed = failed || make_rows(&out, begin_cells(cells, count, team, out.begin), from.bits != NULL);
        for (int64_t f = f0, i = 0; f < f1 && !failed; i += counts[f++])
            place_filter(p, where, filter_of(p, at, f), own->index + i, own->value ? own->value + i : NULL, counts[f],
                         cursor, &out);
    }
    free_shares(shares, p->threads);
    free(where);
    free(cells);
    free(counts);
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

int64_t lay_rows(const sparse_rows *rows, int64_t cells, char *to, int64_t room) {
    const int64_t head = (cells + 1) * sizeof(int64_t), half = rows->begin[cells] * sizeof(int32_t);
    if (room < head + 2 * half) return head + 2 * half;
    memcpy(to, rows->begin, head);
    memcpy(to + head, rows->offset, half);
    memcpy(to + head + half, rows->value, half);
    return head + 2 * half;
}

sparse_rows made_rows(const char **from, int64_t cells) {
    sparse_rows rows = {.begin = (int64_t *)*from};
    rows.offset = (int32_t *)(rows.begin + cells + 1);
    rows.value = (float *)(rows.offset + rows.begin[cells]);
    *from = (const char *)(rows.value + rows.begin[cells]);
    return rows;
}
