/* What packing and unpacking share: words of the mask, and vectors of elements that are only moved. */
#ifndef SWATFX_PACK_H
#define SWATFX_PACK_H

#include "keys.h"

enum { WORD = 64 };

/* No more threads than there is work for. */
static inline int threads_for(int64_t n, int threads) {
    return (int)min64(threads, (n >> 17) + 1);
}

static inline int64_t words_of(int64_t n) { return (n + WORD - 1) / WORD; }

/* The words that are the calling thread's share. */
static inline void own_words(int64_t words, int64_t *from, int64_t *to) {
    int parts = omp_get_num_threads(), part = omp_get_thread_num();
    *from = part_begin(words, 1, part, parts);
    *to = part_begin(words, 1, part + 1, parts);
}

#if defined(__AVX512F__)
static inline __mmask16 first_lanes(int64_t count) {
    return (__mmask16)_bzhi_u32(0xffff, (unsigned)(count < 0 ? 0 : count > 16 ? 16 : count));
}

/* Sixteen elements, of which those in `mask` exist, one a 32-bit lane. */
static inline __m512i load_lanes(const void *x, int64_t i, int bytes, __mmask16 mask) {
    if (bytes == 4) return _mm512_maskz_loadu_epi32(mask, (const int32_t *)x + i);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + i));
}

static inline void store_lanes(void *x, int64_t i, int bytes, __mmask16 mask, __m512i lanes) {
    if (bytes == 4)
        _mm512_mask_storeu_epi32((int32_t *)x + i, mask, lanes);
    else
        _mm256_mask_storeu_epi16((uint16_t *)x + i, mask, _mm512_cvtepi32_epi16(lanes));
}
#endif

static inline void move_one(void *out, int64_t to, const void *x, int64_t from, int bytes) {
    if (bytes == 4)
        ((int32_t *)out)[to] = ((const int32_t *)x)[from];
    else
        ((int16_t *)out)[to] = ((const int16_t *)x)[from];
}

#endif
