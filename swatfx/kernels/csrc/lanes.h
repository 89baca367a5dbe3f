/* Sixteen floats in whatever registers the machine has; masks of them, bytes, partial vectors.
 *
 * `wide` is a struct and not a vector of the compiler's: one wider than the registers would be kept in
 * memory across a loop. What reads and writes them takes floats or bfloat16: by the type of its pointer.
 */
#ifndef SWATFX_LANES_H
#define SWATFX_LANES_H

#include "common.h"
#include "elem.h"

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include <immintrin.h>

typedef struct {
    __m512 r;
} wide;
typedef __mmask16 mask;

INLINE wide splat(float x) { return (wide){_mm512_set1_ps(x)}; }
INLINE wide get_float(const float *p) { return (wide){_mm512_loadu_ps(p)}; }
INLINE void put_float(float *p, wide v) { _mm512_storeu_ps(p, v.r); }
INLINE wide add(wide a, wide b) { return (wide){_mm512_add_ps(a.r, b.r)}; }
INLINE wide sub(wide a, wide b) { return (wide){_mm512_sub_ps(a.r, b.r)}; }
INLINE wide mul(wide a, wide b) { return (wide){_mm512_mul_ps(a.r, b.r)}; }
INLINE wide least(wide a, wide b) { return (wide){_mm512_min_ps(a.r, b.r)}; }
INLINE wide most(wide a, wide b) { return (wide){_mm512_max_ps(a.r, b.r)}; }
INLINE wide multiply_add(wide a, wide b, wide c) { return (wide){_mm512_fmadd_ps(a.r, b.r, c.r)}; }
INLINE float lane_sum(wide v) { return _mm512_reduce_add_ps(v.r); }
INLINE float lane_min(wide v) { return _mm512_reduce_min_ps(v.r); }
INLINE float lane_max(wide v) { return _mm512_reduce_max_ps(v.r); }
/* Where not a <= b: also where a is NaN, as torch.relu has it. */
INLINE mask above(wide a, wide b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_NLE_UQ); }
INLINE mask at_least(wide a, wide b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_GE_OQ); }
INLINE mask agree(mask a, mask b) { return (mask) ~(a ^ b); }
/* Where a > b or a is NaN: how a maximum of torch's is passed on. */
INLINE mask beats(wide a, wide b) {
    return _mm512_cmp_ps_mask(a.r, b.r, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a.r, a.r, _CMP_UNORD_Q);
}
/* The load that comes before stays whole: no processor fetches ahead of masked ones. */
#define LOADED(v) __asm__("" : "+v"((v).r))
INLINE wide only(mask keep, wide v) {
    LOADED(v);
    return (wide){_mm512_maskz_mov_ps(keep, v.r)};
}
INLINE wide choose(mask first, wide a, wide b) {
    LOADED(a);
    LOADED(b);
    return (wide){_mm512_mask_mov_ps(b.r, first, a.r)};
}
INLINE wide add_where(mask m, wide sum, wide v) {
    LOADED(v);
    return (wide){_mm512_mask_add_ps(sum.r, m, sum.r, v.r)};
}
INLINE mask bytes_equal(const uint8_t *p, int byte) {
    return _mm_cmpeq_epi8_mask(_mm_loadu_si128((const __m128i *)p), _mm_set1_epi8((char)byte));
}
INLINE uint32_t to_bits(mask m) { return m; }
INLINE mask from_bits(uint32_t bits) { return (mask)bits; }
INLINE wide whole_below(wide v) {
    return (wide){_mm512_roundscale_ps(v.r, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
INLINE void put_bytes(uint8_t *p, wide v) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(v.r)));
}
INLINE wide get_bytes(const uint8_t *p) {
    return (wide){_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)))};
}
INLINE wide get_part_float(const float *p, int count, float fill) {
    return (wide){_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (mask)((1u << count) - 1), p)};
}
INLINE void put_part_float(float *p, wide v, int count) {
    _mm512_mask_storeu_ps(p, (mask)((1u << count) - 1), v.r);
}
INLINE void put_past_float(float *p, wide v) { _mm512_stream_ps(p, v.r); }
INLINE void settle(void) { _mm_sfence(); }
INLINE wide widened(__m256i h) {
    return (wide){_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
/* To the nearest, ties to even; NaN stays one. Subnormals are zero in a file that says so, where the
 * processor rounds. */
#if defined(__AVX512BF16__) && defined(SWATFX_FLUSHES)
INLINE __m256i narrowed(wide v) { return (__m256i)_mm512_cvtneps_pbh(v.r); }
#else
INLINE __m256i narrowed(wide v) {
    const __m512i x = _mm512_castps_si512(v.r), odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v.r, v.r, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(x, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(near, nan, quiet), 16));
}
#endif
INLINE wide get_bf16(const bf16 *p) { return widened(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void put_bf16(bf16 *p, wide v) { _mm256_storeu_si256((__m256i *)p, narrowed(v)); }
INLINE void put_past_bf16(bf16 *p, wide v) { _mm256_stream_si256((__m256i *)p, narrowed(v)); }
INLINE wide get_part_bf16(const bf16 *p, int count, float fill) {
    const mask some = (mask)((1u << count) - 1);
    const wide v = widened(_mm256_maskz_loadu_epi16(some, p));
    return (wide){_mm512_mask_mov_ps(_mm512_set1_ps(fill), some, v.r)};
}
INLINE void put_part_bf16(bf16 *p, wide v, int count) {
    _mm256_mask_storeu_epi16(p, (mask)((1u << count) - 1), narrowed(v));
}
#else
#if defined(__AVX__)
enum { REG = 8 };
#else
enum { REG = 4 };
#endif
enum { REGS = LANES / REG };

typedef float reg __attribute__((vector_size(4 * REG)));
typedef int32_t reg_mask __attribute__((vector_size(4 * REG)));
typedef uint8_t reg_bytes __attribute__((vector_size(REG)));
typedef float reg_in_memory __attribute__((vector_size(4 * REG), aligned(4), may_alias));
typedef struct {
    reg r[REGS];
} wide;
typedef struct {
    reg_mask r[REGS];
} mask;

#define EACH _Pragma("GCC unroll 4") for (int k = 0; k < REGS; k++)

INLINE wide splat(float x) {
    wide v;
    EACH v.r[k] = x - (reg){0};
    return v;
}
INLINE wide get_float(const float *p) {
    wide v;
    EACH v.r[k] = *(const reg_in_memory *)(p + REG * k);
    return v;
}
INLINE void put_float(float *p, wide v) { EACH *(reg_in_memory *)(p + REG * k) = v.r[k]; }
INLINE wide add(wide a, wide b) {
    EACH a.r[k] += b.r[k];
    return a;
}
INLINE wide sub(wide a, wide b) {
    EACH a.r[k] -= b.r[k];
    return a;
}
INLINE wide mul(wide a, wide b) {
    EACH a.r[k] *= b.r[k];
    return a;
}
INLINE reg pick(reg_mask m, reg a, reg b) { return (reg)(((reg_mask)a & m) | ((reg_mask)b & ~m)); }
INLINE wide least(wide a, wide b) {
    EACH a.r[k] = pick(a.r[k] < b.r[k], a.r[k], b.r[k]);
    return a;
}
INLINE wide most(wide a, wide b) {
    EACH a.r[k] = pick(a.r[k] > b.r[k], a.r[k], b.r[k]);
    return a;
}
INLINE wide multiply_add(wide a, wide b, wide c) {
    EACH c.r[k] = a.r[k] * b.r[k] + c.r[k];
    return c;
}
INLINE float lane_sum(wide v) {
    float sum[REG];
    reg s = v.r[0];
    for (int k = 1; k < REGS; k++) s += v.r[k];
    memcpy(sum, &s, sizeof sum);
    for (int half = REG / 2; half; half /= 2) {
        for (int l = 0; l < half; l++) sum[l] += sum[l + half];
    }
    return sum[0];
}
INLINE float lane_min(wide v) {
    float found = v.r[0][0];
    EACH for (int l = 0; l < REG; l++) found = v.r[k][l] < found ? v.r[k][l] : found;
    return found;
}
INLINE float lane_max(wide v) {
    float found = v.r[0][0];
    EACH for (int l = 0; l < REG; l++) found = v.r[k][l] > found ? v.r[k][l] : found;
    return found;
}
INLINE mask above(wide a, wide b) {
    mask m;
    EACH m.r[k] = ~(a.r[k] <= b.r[k]);
    return m;
}
INLINE mask at_least(wide a, wide b) {
    mask m;
    EACH m.r[k] = a.r[k] >= b.r[k];
    return m;
}
INLINE mask agree(mask a, mask b) {
    EACH a.r[k] = ~(a.r[k] ^ b.r[k]);
    return a;
}
INLINE mask beats(wide a, wide b) {
    mask m;
    EACH m.r[k] = (a.r[k] > b.r[k]) | (a.r[k] != a.r[k]);
    return m;
}
INLINE wide only(mask keep, wide v) {
    EACH v.r[k] = (reg)((reg_mask)v.r[k] & keep.r[k]);
    return v;
}
INLINE wide choose(mask first, wide a, wide b) {
    EACH a.r[k] = pick(first.r[k], a.r[k], b.r[k]);
    return a;
}
INLINE reg_mask lane_bit(int k) {
    reg_mask bit = {1, 2, 4, 8};
#if defined(__AVX__)
    bit = (reg_mask){1, 2, 4, 8, 16, 32, 64, 128};
#endif
    return bit << REG * k;
}
INLINE uint32_t to_bits(mask m) {
    reg_mask bits = m.r[0] & lane_bit(0);
    int64_t half[REG / 2], all;
    for (int k = 1; k < REGS; k++) bits |= m.r[k] & lane_bit(k);
    memcpy(half, &bits, sizeof half);
    all = half[0] | half[1];
    for (int h = 2; h < REG / 2; h++) all |= half[h];
    return (uint32_t)(all | all >> 32) & 0xffff;
}
INLINE mask from_bits(uint32_t bits) {
    mask m;
    EACH m.r[k] = (((reg_mask){0} + (int32_t)bits) & lane_bit(k)) != 0;
    return m;
}
/* Of values that an int32 holds. */
INLINE wide whole_below(wide v) {
    EACH {
        reg cut = __builtin_convertvector(__builtin_convertvector(v.r[k], reg_mask), reg);
        v.r[k] = cut + __builtin_convertvector(cut > v.r[k], reg);
    }
    return v;
}
INLINE void put_bytes(uint8_t *p, wide v) {
    EACH {
        reg_bytes b = __builtin_convertvector(__builtin_convertvector(v.r[k], reg_mask), reg_bytes);
        memcpy(p + REG * k, &b, REG);
    }
}
INLINE wide get_bytes(const uint8_t *p) {
    wide v;
    EACH {
        reg_bytes b;
        memcpy(&b, p + REG * k, REG);
        v.r[k] = __builtin_convertvector(__builtin_convertvector(b, reg_mask), reg);
    }
    return v;
}
INLINE wide add_where(mask m, wide sum, wide v) { return add(sum, only(m, v)); }
INLINE mask bytes_equal(const uint8_t *p, int byte) {
    wide found = get_bytes(p);
    mask m;
    EACH m.r[k] = found.r[k] == (float)byte;
    return m;
}
INLINE wide get_part_float(const float *p, int count, float fill) {
    float whole[LANES];
    for (int l = 0; l < LANES; l++) whole[l] = l < count ? p[l] : fill;
    return get_float(whole);
}
INLINE void put_part_float(float *p, wide v, int count) {
    float whole[LANES];
    put_float(whole, v);
    for (int l = 0; l < count; l++) p[l] = whole[l];
}
INLINE void put_past_float(float *p, wide v) { put_float(p, v); }
INLINE void settle(void) {}
typedef uint32_t reg_bits __attribute__((vector_size(4 * REG)));
typedef uint16_t reg_halves __attribute__((vector_size(2 * REG)));
INLINE wide get_bf16(const bf16 *p) {
    wide v;
    EACH {
        reg_halves h;
        memcpy(&h, p + REG * k, sizeof h);
        v.r[k] = (reg)(__builtin_convertvector(h, reg_bits) << 16);
    }
    return v;
}
/* To the nearest, ties to even; NaN stays one. */
INLINE void put_bf16(bf16 *p, wide v) {
    EACH {
        reg_bits x = (reg_bits)v.r[k], near = x + (x >> 16 & 1) + 0x7fff;
        reg_mask nan = v.r[k] != v.r[k];
        x = ((x | 0x400000) & (reg_bits)nan) | (near & ~(reg_bits)nan);
        reg_halves h = __builtin_convertvector(x >> 16, reg_halves);
        memcpy(p + REG * k, &h, sizeof h);
    }
}
INLINE void put_past_bf16(bf16 *p, wide v) { put_bf16(p, v); }
INLINE wide get_part_bf16(const bf16 *p, int count, float fill) {
    bf16 whole[LANES] = {0};
    memcpy(whole, p, (size_t)count * sizeof *p);
    return choose(from_bits((1u << count) - 1), get_bf16(whole), splat(fill));
}
INLINE void put_part_bf16(bf16 *p, wide v, int count) {
    bf16 whole[LANES];
    put_bf16(whole, v);
    memcpy(p, whole, (size_t)count * sizeof *p);
}
#endif

INLINE mask above_zero(wide v) { return above(v, splat(0)); }

/* One element as a float. */
INLINE float get_one_float(const float *p) { return *p; }
INLINE float get_one_bf16(const bf16 *p) { return widen(*p); }

#define BY_TYPE(name, p)                                                                           \
    _Generic((p), float *: name##_float, const float *: name##_float, bf16 *: name##_bf16,          \
             const bf16 *: name##_bf16)
#define get(p) BY_TYPE(get, p)(p)
#define get_one(p) BY_TYPE(get_one, p)(p)
#define get_part(p, count, fill) BY_TYPE(get_part, p)(p, count, fill)
#define put(p, v) _Generic((p), float *: put_float, bf16 *: put_bf16)(p, v)
#define put_part(p, v, count) _Generic((p), float *: put_part_float, bf16 *: put_part_bf16)(p, v, count)
#define put_past(p, v) _Generic((p), float *: put_past_float, bf16 *: put_past_bf16)(p, v)

INLINE wide get_some_float(const float *p, int count, float fill) {
    return count == LANES ? get(p) : get_part(p, count, fill);
}
INLINE wide get_some_bf16(const bf16 *p, int count, float fill) {
    return count == LANES ? get(p) : get_part(p, count, fill);
}
INLINE void put_some_float(float *p, wide v, int count) {
    if (count == LANES) {
        put(p, v);
    } else {
        put_part(p, v, count);
    }
}
INLINE void put_some_bf16(bf16 *p, wide v, int count) {
    if (count == LANES) {
        put(p, v);
    } else {
        put_part(p, v, count);
    }
}
#define get_some(p, count, fill) BY_TYPE(get_some, p)(p, count, fill)
#define put_some(p, v, count) _Generic((p), float *: put_some_float, bf16 *: put_some_bf16)(p, v, count)

INLINE wide get_some_bytes(const uint8_t *p, int count) {
    uint8_t whole[LANES] = {0};
    if (count == LANES) return get_bytes(p);
    memcpy(whole, p, (size_t)count);
    return get_bytes(whole);
}
INLINE void put_some_bytes(uint8_t *p, wide v, int count) {
    uint8_t whole[LANES];
    if (count == LANES) {
        put_bytes(p, v);
    } else {
        put_bytes(whole, v);
        memcpy(p, whole, (size_t)count);
    }
}

#endif
