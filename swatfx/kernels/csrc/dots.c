/* Several dot products at a time, for as many sums in registers: each vector of the one tile that all share is
 * loaded once, and every multiplication reads the other straight from memory.
 *
 * Stands on no other .c file.
 */
#include "dots.h"
#include "lanes.h"

#if defined(__AVX512F__)
enum { GROUP_OF = 8 };
#else
enum { GROUP_OF = 4 };
#endif

#define EACH_ROW(...)                                                          \
    for (int64_t s = 0; s < at.stacks; s++)                                    \
        for (int64_t r = 0; r < at.rows; r++) {                                \
            const elem *grad = at.grad + s * at.grad_stack + r * at.grad_row;  \
            const elem *in = at.in + s * at.in_stack + r * at.in_row;          \
            __VA_ARGS__                                                        \
        }

#if defined(SWATFX_BF16) && defined(__AVX512BF16__)
/* By the processor's dot product of pairs: twice the elements a load, nothing to widen. */
enum { PAIRS = 2 * LANES };

static inline __attribute__((always_inline)) void add_group_of_pairs(
    const int n, const int32_t *offset, dots_at at, float *sums) {
    const int rest = (int)(at.length % PAIRS);
    const __mmask32 some = (__mmask32)((1ull << rest) - 1);
    __m512 sum[GROUP_OF];
    _Pragma("GCC unroll 8") for (int i = 0; i < n; i++) sum[i] = _mm512_setzero_ps();
    EACH_ROW({
        for (int64_t k = 0; k + PAIRS <= at.length; k += PAIRS) {
            const __m512bh shared = (__m512bh)_mm512_loadu_si512(grad + k);
            _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)
                sum[i] = _mm512_dpbf16_ps(sum[i], shared, (__m512bh)_mm512_loadu_si512(in + k + offset[i]));
        }
        if (rest) {
            const int64_t k = at.length - rest;
            const __m512bh shared = (__m512bh)_mm512_maskz_loadu_epi16(some, grad + k);
            _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)
                sum[i] = _mm512_dpbf16_ps(
                    sum[i], shared, (__m512bh)_mm512_maskz_loadu_epi16(some, in + k + offset[i]));
        }
    })
    _Pragma("GCC unroll 8") for (int i = 0; i < n; i++) sums[i] += _mm512_reduce_add_ps(sum[i]);
}

void TYPED(add_dots)(const int32_t *offset, int64_t count, dots_at at, float *sums) {
    int64_t i = 0;
    for (; i + GROUP_OF <= count; i += GROUP_OF) add_group_of_pairs(GROUP_OF, offset + i, at, sums + i);
    if (i + 4 <= count) add_group_of_pairs(4, offset + i, at, sums + i), i += 4;
    if (i + 2 <= count) add_group_of_pairs(2, offset + i, at, sums + i), i += 2;
    if (i < count) add_group_of_pairs(1, offset + i, at, sums + i);
}
#else
INLINE void add_group(const int n, const int32_t *offset, dots_at at, float *sums) {
    const int rest = (int)(at.length % LANES);
    wide sum[GROUP_OF];
    _Pragma("GCC unroll 8") for (int i = 0; i < n; i++) sum[i] = splat(0);
    EACH_ROW({
        for (int64_t k = 0; k + LANES <= at.length; k += LANES) {
            const wide shared = get(grad + k);
            _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)
                sum[i] = multiply_add(shared, get(in + k + offset[i]), sum[i]);
        }
        if (rest) {
            const int64_t k = at.length - rest;
            const wide shared = get_part(grad + k, rest, 0);
            _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)
                sum[i] = multiply_add(shared, get_part(in + k + offset[i], rest, 0), sum[i]);
        }
    })
    _Pragma("GCC unroll 8") for (int i = 0; i < n; i++) sums[i] += lane_sum(sum[i]);
}

void TYPED(add_dots)(const int32_t *offset, int64_t count, dots_at at, float *sums) {
    int64_t i = 0;
    for (; i + GROUP_OF <= count; i += GROUP_OF) add_group(GROUP_OF, offset + i, at, sums + i);
#if defined(__AVX512F__)
    if (i + 4 <= count) add_group(4, offset + i, at, sums + i), i += 4;
#endif
    if (i + 2 <= count) add_group(2, offset + i, at, sums + i), i += 2;
    if (i < count) add_group(1, offset + i, at, sums + i);
}
#endif
