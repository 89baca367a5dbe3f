/* Sixteen numbers to and from codes of eight or four bits, by the format of swatfx/ops/codes.py.
 *
 * The grid of a group is the same for all lanes where a group lies in one piece, and one a lane where
 * rows lie side by side.
 */
#ifndef SWATFX_CODES_H
#define SWATFX_CODES_H

#include "lanes.h"

#include <math.h>

enum { GROUP = 256 }; /* elements, as in codes.py */

/* Sixteen words of 32 bits, in as many registers as a `wide`. */
#if defined(__AVX512F__)
enum { WORD_REGS = 1 };
#else
enum { WORD_REGS = REGS };
#endif
typedef uint32_t word_reg __attribute__((vector_size(64 / WORD_REGS)));
typedef int32_t whole_reg __attribute__((vector_size(64 / WORD_REGS)));
typedef float float_reg __attribute__((vector_size(64 / WORD_REGS)));
typedef struct {
    word_reg r[WORD_REGS];
} words;
#define EACH_WORD _Pragma("GCC unroll 4") for (int k = 0; k < WORD_REGS; k++)

#if defined(__AVX512F__)
INLINE words words_of(wide v) { return (words){{(word_reg)v.r}}; }
INLINE wide wide_of(float_reg r[WORD_REGS]) { return (wide){(__m512)r[0]}; }
INLINE wide divide(wide a, wide b) { return (wide){_mm512_div_ps(a.r, b.r)}; }
/* With the sign of what it is of. */
INLINE wide root(wide v) {
    const __m512 sign = _mm512_set1_ps(-0.0f), size = _mm512_sqrt_ps(_mm512_andnot_ps(sign, v.r));
    return (wide){_mm512_or_ps(size, _mm512_and_ps(sign, v.r))};
}
INLINE wide square(wide v) {
    return (wide){_mm512_mul_ps(v.r, _mm512_andnot_ps(_mm512_set1_ps(-0.0f), v.r))};
}
#else
INLINE words words_of(wide v) {
    words w;
    EACH_WORD w.r[k] = (word_reg)v.r[k];
    return w;
}
INLINE wide wide_of(float_reg r[WORD_REGS]) {
    wide v;
    EACH v.r[k] = r[k];
    return v;
}
INLINE wide divide(wide a, wide b) {
    EACH a.r[k] /= b.r[k];
    return a;
}
INLINE reg size_of(reg v) { return (reg)((reg_mask)v & 0x7fffffff); }
INLINE wide root(wide v) {
    EACH {
        reg size = size_of(v.r[k]), found;
        for (int l = 0; l < REG; l++) found[l] = sqrtf(size[l]);
        v.r[k] = (reg)((reg_mask)found | ((reg_mask)v.r[k] & ~0x7fffffff));
    }
    return v;
}
INLINE wide square(wide v) {
    EACH v.r[k] *= size_of(v.r[k]);
    return v;
}
#endif

INLINE mask first_lanes(int count) { return from_bits((1u << count) - 1); }

INLINE words word_splat(uint32_t x) {
    words w;
    EACH_WORD w.r[k] = x - (word_reg){0};
    return w;
}

/* `mixed` of codes.py. */
INLINE words mixed(words w) {
    EACH_WORD w.r[k] = (w.r[k] ^ w.r[k] >> 16) * 0x7feb352d;
    return w;
}

INLINE words differ(words a, words b) {
    EACH_WORD a.r[k] ^= b.r[k];
    return a;
}

/* The numbers that decide on elements `at` and on, of groups with such a key. */
INLINE wide noise(words key, int64_t at) {
    float_reg found[WORD_REGS];
    EACH_WORD {
        word_reg lane;
        for (int l = 0; l < LANES / WORD_REGS; l++) lane[l] = (uint32_t)(k * (LANES / WORD_REGS) + l);
        key.r[k] += (lane + (uint32_t)at) * 0x9e3779b9;
    }
    key = mixed(key);
    EACH_WORD found[k] = __builtin_convertvector((whole_reg)(key.r[k] >> 8), float_reg) * 0x1p-24f;
    return wide_of(found);
}

/* A header's arrays: as in codes.py. */
typedef struct {
    float *base, *step;
    uint8_t *first;
} header_of_codes;

static inline int64_t groups_of(int64_t length) { return (length + GROUP - 1) / GROUP; }

static inline header_of_codes header_at(float *header, int64_t rows, int64_t length) {
    int64_t grids = rows * groups_of(length);
    return (header_of_codes){header, header + grids, (uint8_t *)(header + 2 * grids)};
}

/* The grid of numbers from `low` to `high` where there is no border. */
static inline void plain_grid(header_of_codes to, int64_t at, float low, float high, int width) {
    float from = copysignf(sqrtf(fabsf(low)), low), reach = copysignf(sqrtf(fabsf(high)), high) - from;
    to.step[at] = reach / (width == 8 ? 255 : 15);
    to.base[at] = from + to.step[at];
    to.first[at] = 0;
}

/* The place of a number is root * inverse + offset, and places are told from the grid; `below`: that of
 * the border, or -1; `key`: of the noise. */
typedef struct {
    wide base, step, inverse, offset, below;
    words key;
} encoder;

typedef struct {
    wide base, step, first;
} decoder;

/* For numbers that are `unit` times as large as those that the grid is of. */
INLINE encoder encoder_of(wide base, wide step, wide first, wide unit, uint32_t seed) {
    words key = mixed(differ(mixed(differ(word_splat(seed), words_of(base))), words_of(step)));
    wide zero = splat(0), to = root(unit), inverse;
    base = mul(base, to);
    step = mul(step, to);
    inverse = choose(above(step, zero), divide(splat(1), step), zero);
    return (encoder){base, step, inverse, sub(zero, mul(base, inverse)), sub(first, splat(1)), key};
}

/* Codes of h. `over`: which lie above the border, if there is one (`sided`). */
INLINE wide encode(const encoder *how, wide h, mask over, int64_t at, const int sided, const int width) {
    wide below = how->below, one = splat(1), top = splat(width == 8 ? 254 : 14), least_place = below;
    wide t = multiply_add(root(h), how->inverse, how->offset);
    if (width == 8) {
        t = whole_below(add(t, splat(0.5f)));
    } else {
        t = whole_below(t);
        wide w = multiply_add(t, how->step, how->base), under = square(w);
        wide apart = sub(square(add(w, how->step)), under);
        t = add_where(above(sub(h, under), mul(noise(how->key, at), apart)), t, one);
    }
    if (sided) {
        least_place = only(over, below);
        top = choose(over, top, below);
    }
    /* That of NaN is some place, too. */
    t = least(most(t, least_place), top);
    return sided ? add_where(over, t, one) : add(t, one);
}

/* What `code` stands for. */
INLINE wide decode(const decoder *how, wide code) {
    wide t = add_where(at_least(code, how->first), code, splat(-1));
    return square(multiply_add(t, how->step, how->base));
}

/* Sixteen codes of four bits, from an even one on. */
#if defined(__AVX512F__)
INLINE void put_halves(uint8_t *p, wide v) {
    const __m128i whole = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(v.r));
    const __m128i both = _mm_maddubs_epi16(whole, _mm_set1_epi16(0x1001));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(both, both));
}
INLINE wide get_halves(const uint8_t *p) {
    const __m128i both = _mm_loadl_epi64((const __m128i *)p), low = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(both, low), odd = _mm_and_si128(_mm_srli_epi16(both, 4), low);
    return (wide){_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)))};
}
#else
INLINE void put_halves(uint8_t *p, wide v) {
    uint8_t whole[LANES];
    put_bytes(whole, v);
    for (int i = 0; i < LANES / 2; i++) p[i] = (uint8_t)(whole[2 * i] | whole[2 * i + 1] << 4);
}
INLINE wide get_halves(const uint8_t *p) {
    uint8_t whole[LANES];
    for (int i = 0; i < LANES / 2; i++) {
        whole[2 * i] = p[i] & 15;
        whole[2 * i + 1] = p[i] >> 4;
    }
    return get_bytes(whole);
}
#endif

/* Write `count` codes from element `at` on, which is even if there are sixteen. A byte shared with
 * another run is only ever or-ed, as in put_bits. */
INLINE void put_codes(uint8_t *codes, int64_t at, wide v, int count, const int width) {
    if (width == 8) {
        put_some_bytes(codes + at, v, count);
    } else if (count == LANES) {
        put_halves(codes + at / 2, v);
    } else {
        uint8_t whole[LANES];
        put_bytes(whole, v);
        for (int64_t l = at; l < at + count; l++) {
            __atomic_fetch_or(codes + l / 2, (uint8_t)(whole[l - at] << l % 2 * 4), __ATOMIC_RELAXED);
        }
    }
}

INLINE wide get_codes(const uint8_t *codes, int64_t at, int count, const int width) {
    uint8_t whole[LANES] = {0};
    if (width == 8) return get_some_bytes(codes + at, count);
    if (count == LANES) return get_halves(codes + at / 2);
    for (int64_t l = at; l < at + count; l++) whole[l - at] = codes[l / 2] >> l % 2 * 4 & 15;
    return get_bytes(whole);
}

#endif
