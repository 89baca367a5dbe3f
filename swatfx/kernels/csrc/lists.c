/* Decodes a bitmask and its values: counts first, then writes.
 *
 * Stands on no other .c file.
 */
#include "lists.h"

#include "elem.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

/* Bits [at, at + n) of the mask, n <= LANES, which is `bytes` long, a multiple of 8. */
static inline uint32_t bits_at(const uint8_t *mask, int64_t bytes, int64_t at, int64_t n) {
    const int64_t byte = min64(at >> 3, bytes - 4);
    uint32_t word;
    memcpy(&word, mask + byte, 4);
    return word >> (at - 8 * byte) & ((1u << n) - 1);
}

typedef struct {
    const uint8_t *values;
    int half;
} source;

/* Appends the values from the i-th on, one for each bit; lane n lies at base + n * pitch. */
#if defined(__AVX512F__)
static inline void append(uint32_t bits, source s, int64_t i, int32_t base, __m512i pitches, int32_t *offset,
                          float *value) {
    const __mmask16 valid = (__mmask16)_bzhi_u32(0xffff, __builtin_popcount(bits));
    const __m512i at = _mm512_add_epi32(pitches, _mm512_set1_epi32(base));
    _mm512_mask_storeu_epi32(offset, valid, _mm512_maskz_compress_epi32((__mmask16)bits, at));
    __m512 x;
    if (s.half)
        x = _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, s.values + 2 * i)), 16));
    else
        x = _mm512_maskz_loadu_ps(valid, s.values + 4 * i);
    _mm512_mask_storeu_ps(value, valid, x);
}
#else
static inline void append(uint32_t bits, source s, int64_t i, int32_t base, int32_t pitch, int32_t *offset,
                          float *value) {
    for (int64_t k = 0; bits; k++, bits &= bits - 1) {
        offset[k] = base + __builtin_ctz(bits) * pitch;
        value[k] = value_at(s.values, s.half, i + k);
    }
}
#endif

/* How many of the bits [at, at + n) are set. */
static int64_t count_bits(const uint8_t *mask, int64_t bytes, int64_t at, int64_t n) {
    int64_t count = 0;
    for (; n && (at & 63); at++, n--) count += mask[at >> 3] >> (at & 7) & 1;
    for (; n >= 64; at += 64, n -= 64) {
        uint64_t word;
        memcpy(&word, mask + (at >> 3), 8);
        count += __builtin_popcountll(word);
    }
    for (; n > 0; at += LANES, n -= LANES) count += __builtin_popcount(bits_at(mask, bytes, at, min64(LANES, n)));
    return count;
}

/* Where an input column's nonzeros go. */
typedef struct {
    int32_t offset; /* in the scratch, from its row */
    int32_t phase;  /* negative: no kernel position meets it */
} column;

typedef struct {
    const wgrad_problem *p;
    const cut *at;
    const uint8_t *mask;
    int64_t mask_bytes;
    source values;
    const column *columns;
} decoder;

/* What `append` adds to a lane's number times the pitch. */
static inline
#if defined(__AVX512F__)
    __m512i
    lane_offsets(int32_t pitch) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_mullo_epi32(lane, _mm512_set1_epi32(pitch));
}
#else
    int32_t
    lane_offsets(int32_t pitch) {
    return pitch;
}
#endif

/* The cell of block 0, and where the row begins in the scratch. */
static inline int64_t row_cell(const decoder *d, int64_t y, int64_t c, int32_t *base) {
    const wgrad_problem *p = d->p;
    const int64_t strip = y / d->at->strip_rows;
    const int64_t row = (y + p->pad_y) / p->step_y - strip_top(p, d->at, strip);
    *base = (int32_t)(row * min64(LANES, p->batch) * d->at->columns * d->at->filters);
    return cell(p, d->at, 0, strip, (y + p->pad_y) % p->step_y * p->step_x, c, p->groups * p->channels);
}

static inline int row_is_used(const decoder *d, int64_t y) {
    return d->at->y[(y + d->p->pad_y) % d->p->step_y].count > 0;
}

/* One block of images and stride 1: cells lie as the packed values do, which serve as they are, if they are
 * floats. Writes the offsets of channel c, whose values are [i, end). */
static void decode_in_order(const decoder *d, int64_t c, int64_t i, int64_t end, lists *to) {
    const wgrad_problem *p = d->p;
    const int64_t lanes = p->batch, mask_bytes = d->mask_bytes, width = p->width;
    const int32_t pitch = (int32_t)(d->at->columns * d->at->filters);
    const uint8_t *const mask = d->mask;
    const column *const columns = d->columns;
    int32_t *const offset = to->offset;
    int64_t bit = c * p->height * width * lanes;
#if defined(__AVX512F__)
    const __m512i pitches = lane_offsets(pitch);
#endif
    for (int64_t y = 0; y < p->height; y++) {
        int32_t base;
        const int64_t at = row_cell(d, y, c, &base), from = i;
        if (y % d->at->strip_rows == 0) to->begin[at] = i;
        for (int64_t x = 0; x < width; x++, bit += lanes) {
            uint32_t bits = bits_at(mask, mask_bytes, bit, lanes);
            const int32_t start = base + columns[x].offset;
#if defined(__AVX512F__)
            const __m512i found =
                _mm512_maskz_compress_epi32((__mmask16)bits, _mm512_add_epi32(pitches, _mm512_set1_epi32(start)));
            /* What is written past the last of these is overwritten by the next. */
            if (i + LANES <= end)
                _mm512_storeu_si512(offset + i, found);
            else
                _mm512_mask_storeu_epi32(offset + i, (__mmask16)_bzhi_u32(0xffff, __builtin_popcount(bits)), found);
            i += __builtin_popcount(bits);
#else
            for (; bits; bits &= bits - 1) offset[i++] = start + __builtin_ctz(bits) * pitch;
#endif
        }
        to->count[at] += i - from;
    }
    (void)end;
}

/* Any other case. Channel c, whose first value is the i-th: counts its cells (`cursor` is NULL), or
 * appends to them. */
static int64_t scan(const decoder *d, int64_t c, int64_t i, int64_t *cursor, lists *to) {
    const wgrad_problem *p = d->p;
    const int64_t all = p->groups * p->channels, batch = p->batch, width = p->width;
    const int64_t block_cells = d->at->strips * p->step_y * p->step_x * all;
    const int32_t pitch = (int32_t)(d->at->columns * d->at->filters);
    const __typeof__(lane_offsets(0)) pitches = lane_offsets(pitch);
    int64_t *const cells = cursor ? cursor : to->count;
    int64_t bit = c * p->height * width * batch;
    for (int64_t y = 0; y < p->height; y++) {
        if (!row_is_used(d, y)) {
            i += count_bits(d->mask, d->mask_bytes, bit, width * batch), bit += width * batch;
            continue;
        }
        int32_t base;
        int64_t *const row_cells = cells + row_cell(d, y, c, &base);
        for (int64_t x = 0; x < width; x++) {
            const column col = d->columns[x];
            if (col.phase < 0) {
                i += count_bits(d->mask, d->mask_bytes, bit, batch), bit += batch;
                continue;
            }
            int64_t *at = row_cells + col.phase * all;
            for (int64_t image = 0; image < batch; image += LANES, at += block_cells) {
                const int64_t n = min64(LANES, batch - image);
                const uint32_t bits = bits_at(d->mask, d->mask_bytes, bit, n);
                if (cursor)
                    append(bits, d->values, i, base + col.offset, pitches, to->offset + *at, to->owned_values + *at);
                *at += __builtin_popcount(bits);
                bit += n, i += __builtin_popcount(bits);
            }
        }
    }
    return i;
}

/* Values of bfloat16 as floats; NULL if there is no memory. */
static float *widened(const uint8_t *values, int64_t n, int threads) {
    float *out = malloc((n + 1) * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 1 << 14)
    for (int64_t i = 0; i < (out ? n : 0); i++) out[i] = value_at(values, 1, i);
    return out;
}

static column *find_columns(const wgrad_problem *p, const cut *at) {
    column *out = malloc((p->width + 1) * sizeof(column));
    for (int64_t x = 0; out && x < p->width; x++) {
        const int64_t to = (x + p->pad_x) / p->step_x + at->left, turn = (x + p->pad_x) % p->step_x;
        out[x] = (column){(int32_t)(to * at->filters), (int32_t)(at->x[turn].count ? turn : -1)};
    }
    return out;
}

lists build_lists(const wgrad_problem *p, const cut *at, const uint8_t *packed, int64_t header, int64_t values) {
    const int64_t channels = p->groups * p->channels, positions = p->height * p->width * p->batch;
    const int threads = (int)p->threads;
    const int in_order = p->batch <= LANES && p->step_y == 1 && p->step_x == 1;
    lists out = {.blocks = (p->batch + LANES - 1) / LANES};
    const int64_t cells = out.blocks * at->strips * p->step_y * p->step_x * channels;
    column *columns = find_columns(p, at);
    const decoder d = {p, at, packed, header, {packed + header, (int)p->half}, columns};
    int64_t *first = calloc(channels + 1, sizeof(int64_t)), *cursor = NULL;
    out.begin = calloc(cells + 1, sizeof(int64_t));
    out.count = calloc(cells + 1, sizeof(int64_t));
    int failed = !columns || !first || !out.begin || !out.count ? NO_MEMORY : 0;
    if (!failed) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t c = 0; c < channels; c++)
            first[c + 1] = in_order ? count_bits(packed, header, c * positions, positions) : scan(&d, c, 0, NULL, &out);
        for (int64_t c = 0; c < channels; c++) first[c + 1] += first[c];
        out.offset = malloc((first[channels] + 1) * sizeof(int32_t));
        failed = !out.offset ? NO_MEMORY : first[channels] != values ? DOES_NOT_FIT : 0;
    }
    if (!failed && in_order) {
        out.value = (const float *)(packed + header);
        if (p->half) out.value = out.owned_values = widened(packed + header, values, threads);
        failed = !out.value ? NO_MEMORY : 0;
    }
    if (!failed && in_order) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t c = 0; c < channels; c++) decode_in_order(&d, c, first[c], first[c + 1], &out);
    } else if (!failed) {
        for (int64_t i = 0; i < cells; i++) out.begin[i + 1] = out.begin[i] + out.count[i];
        out.value = out.owned_values = malloc((out.begin[cells] + 1) * sizeof(float));
        cursor = malloc((cells + 1) * sizeof(int64_t));
        failed = !out.value || !cursor ? NO_MEMORY : 0;
    }
    if (cursor && !failed) {
        memcpy(cursor, out.begin, cells * sizeof(int64_t));
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t c = 0; c < channels; c++) scan(&d, c, first[c], cursor, &out);
    }
    free(columns);
    free(first);
    free(cursor);
    if (failed) free_lists(&out), out.failed = failed;
    return out;
}

void free_lists(lists *l) {
    free(l->begin);
    free(l->count);
    free(l->offset);
    free(l->owned_values);
    *l = (lists){0};
}
