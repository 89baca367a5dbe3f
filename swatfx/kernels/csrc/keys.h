/* Magnitudes as integers: the bits of |x| order like |x|, and NaN above infinity.
 *
 * A key is 32 bits wide whatever the dtype: of a 16-bit float it is the 15 bits below the sign.
 * Vectors of keys are as wide as the machine's registers: wider comparisons would be taken apart.
 */
#ifndef SWATFX_KEYS_H
#define SWATFX_KEYS_H

#include "common.h"
#if defined(__AVX512F__)
#include <immintrin.h>
enum { WIDE = 16 };
#elif defined(__AVX2__)
enum { WIDE = 8 };
#else
enum { WIDE = 4 };
#endif

typedef int32_t kvec __attribute__((vector_size(4 * WIDE)));
typedef int32_t ukvec __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef int64_t lvec __attribute__((vector_size(4 * WIDE)));
typedef uint16_t hvec __attribute__((vector_size(2 * WIDE)));
typedef uint16_t uhvec __attribute__((vector_size(2 * WIDE), aligned(2), may_alias));

static inline kvec all_lanes(int32_t x) { return (kvec){0} + x; }

/* Keys from element `i` of `x`, whose elements take 4 or 2 `bytes`. */
static inline kvec keys_at(const void *x, int64_t i, int bytes) {
    if (bytes == 4) return *(const ukvec *)((const int32_t *)x + i) & 0x7fffffff;
    hvec half = *(const uhvec *)((const uint16_t *)x + i);
    return __builtin_convertvector(half, kvec) & 0x7fff;
}

static inline int32_t key_at(const void *x, int64_t i, int bytes) {
    if (bytes == 4) return ((const int32_t *)x)[i] & 0x7fffffff;
    return ((const uint16_t *)x)[i] & 0x7fff;
}

/* The last `count` < WIDE keys, and -1, which is below every key, in the lanes behind them. */
static inline kvec last_keys(const void *x, int64_t i, int64_t count, int bytes) {
    kvec keys = all_lanes(-1);
    for (int64_t lane = 0; lane < count; lane++) keys[lane] = key_at(x, i + lane, bytes);
    return keys;
}

static inline int any(kvec mask) {
    lvec wide = (lvec)mask;
    int64_t joined = 0;
    for (int lane = 0; lane < WIDE / 2; lane++) joined |= wide[lane];
    return joined != 0;
}

static inline int64_t sum_lanes(kvec x) {
    int64_t sum = 0;
    for (int lane = 0; lane < WIDE; lane++) sum += x[lane];
    return sum;
}

static inline int32_t greatest_lane(kvec x) {
    int32_t greatest = x[0];
    for (int lane = 1; lane < WIDE; lane++) greatest = x[lane] > greatest ? x[lane] : greatest;
    return greatest;
}

static inline kvec choose(kvec mask, kvec a, kvec b) { return (a & mask) | (b & ~mask); }

static inline kvec greater(kvec a, kvec b) {
#if defined(__AVX512F__)
    return (kvec)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
    return choose(a > b, a, b);
#endif
}

/* `count`, and one more in every lane where a > b. */
static inline kvec count_greater(kvec count, kvec a, kvec b) {
#if defined(__AVX512F__)
    __mmask16 mask = _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
    __m512i sum = (__m512i)count;
    return (kvec)_mm512_mask_sub_epi32(sum, mask, sum, _mm512_set1_epi32(-1));
#else
    return count - (a > b);
#endif
}

/* How many of keys[rows], rows a multiple of four, are greater, lane by lane: four counts at a time,
 * so that none waits for the one before. */
static inline kvec count_all_greater(const kvec *keys, int64_t rows, kvec bound) {
    kvec a = {0}, b = {0}, c = {0}, d = {0};
    for (int64_t r = 0; r < rows; r += 4) {
        a = count_greater(a, keys[r], bound);
        b = count_greater(b, keys[r + 1], bound);
        c = count_greater(c, keys[r + 2], bound);
        d = count_greater(d, keys[r + 3], bound);
    }
    return (a + b) + (c + d);
}

/* The smallest key, `least` or more, that is not below threshold `i`. Nothing is below one that is
 * negative or NaN; keys from `nan` on are NaN. */
static inline int32_t bound_of(
    const void *threshold, int64_t i, int bytes, int32_t nan, int32_t least
) {
    int32_t key = key_at(threshold, i, bytes);
    int32_t bits = bytes == 4 ? ((const int32_t *)threshold)[i] : ((const int16_t *)threshold)[i];
    return bits < 0 || key >= nan || key < least ? least : key;
}

#endif
