/* The most that this machine does of what a sparse product is made of: `rates.py` compiles and calls it.
 *
 * Vectors are as wide as those of the library of swatfx that runs, whose compiler options this is
 * given. Loads are of whole vectors at their own alignment, one behind the other.
 */
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

/* Takes a register as it is: what filled it must have run, and may not be known to the compiler. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#define HOLD(x) __asm__ volatile("" : "+v"(x))
#elif defined(__AVX__)
enum { LANES = 8 };
#define HOLD(x) __asm__ volatile("" : "+x"(x))
#elif defined(__SSE2__)
enum { LANES = 4 };
#define HOLD(x) __asm__ volatile("" : "+x"(x))
#elif defined(__aarch64__)
enum { LANES = 4 };
#define HOLD(x) __asm__ volatile("" : "+w"(x))
#else
#error "no register to hold a vector in is known here"
#endif
/* Sums that are under way at a time, more than a multiply-add's latency takes; two registers are left. */
enum { SUMS = LANES == 16 ? 24 : 12, STEP = 16, BYTES = LANES * 4 };
typedef float reg __attribute__((vector_size(BYTES)));

static void multiply(int64_t times, int dot) {
    reg sum[SUMS], x = (reg){0} + 0.5f;
    HOLD(x);
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; i++) sum[i] = x; /* unrolled, else the sums lie in memory */
#if defined(__AVX512BF16__)
    if (dot) {
        for (int64_t t = 0; t < times; t++) {
#pragma GCC unroll 24
            for (int i = 0; i < SUMS; i++) {
                sum[i] = (reg)_mm512_dpbf16_ps((__m512)sum[i], (__m512bh)x, (__m512bh)x);
                HOLD(sum[i]);
            }
        }
        return;
    }
#endif
    (void)dot;
    for (int64_t t = 0; t < times; t++) {
#pragma GCC unroll 24
        for (int i = 0; i < SUMS; i++) {
            sum[i] = sum[i] * x + x; /* toward one: never infinite, never tiny */
            HOLD(sum[i]);
        }
    }
}

static void load(const char *from, int64_t bytes, int64_t times) {
    for (int64_t t = 0; t < times; t++)
        for (int64_t at = 0; at < bytes; at += STEP * BYTES) {
#pragma GCC unroll 16
            for (int i = 0; i < STEP; i++) {
                reg x = *(const reg *)(from + at + i * BYTES);
                HOLD(x);
            }
        }
}

/* What `swatfx_rate` can measure; `rates.py` has the same numbers. */
enum { FMA, DOT, LOAD };

/* Products (sums that grew), or bytes loaded, a second, of so many threads at once; each loads `bytes`
 * of its own, a multiple of 4096, `times` over. 0 where the processor has no dot product of bfloat16, or
 * there is no memory. */
double swatfx_rate(int what, int64_t bytes, int64_t times, int threads) {
    double seconds = 0;
    int failed = 0;
#if !defined(__AVX512BF16__)
    if (what == DOT) return 0;
#endif
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        char *own = what == LOAD ? aligned_alloc(4096, bytes) : NULL;
        if (own) memset(own, 1, bytes);
        failed |= what == LOAD && !own;
        if (own) load(own, bytes, 1);
#pragma omp barrier
        const double start = omp_get_wtime();
        if (what != LOAD)
            multiply(times, what == DOT);
        else if (own)
            load(own, bytes, times);
        const double mine = omp_get_wtime() - start;
#pragma omp critical(swatfx_rate)
        seconds = mine > seconds ? mine : seconds;
        free(own);
    }
    const double each = what == LOAD ? (double)bytes : (double)SUMS * LANES;
    return failed || seconds <= 0 ? 0 : each * (double)times * threads / seconds;
}
