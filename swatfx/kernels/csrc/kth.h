/* The search for the k-th largest key: what one pass learns, and who searches what.
 *
 * kth.c searches one run of keys; columns.c, which stands on it, the columns of a matrix; threshold.c,
 * which stands on both, is what Python calls.
 */
#ifndef SWATFX_KTH_H
#define SWATFX_KTH_H

#include "keys.h"

/* Keys that are searched by bisection; keys that make another thread worth while. */
enum { FEW = 1024, PART = 1 << 17 };

/* What one pass over some keys learns about an interval (lo, hi), one count a lane. */
typedef struct {
    kvec above, from_hi, from_lo; /* how many keys are > hi, >= hi, >= lo */
    kvec greatest;
} tally;

static inline tally empty_tally(void) { return (tally){{0}, {0}, {0}, all_lanes(-1)}; }

/* Without `ties`, when hardly a key can be equal to lo or hi, only from_hi is counted. */
static inline void count_keys(tally *t, kvec keys, kvec lo, kvec hi, int ties) {
    t->from_hi = count_greater(t->from_hi, keys, hi - 1);
    t->greatest = greater(keys, t->greatest);
    if (!ties) return;
    t->above = count_greater(t->above, keys, hi);
    t->from_lo = count_greater(t->from_lo, keys, lo - 1);
}

/* Writes the keys strictly between lo and hi, and beside each what its lane of `tags` holds unless
 * `tagged` is NULL. Returns how many they are; a whole vector may be written. */
static inline int64_t append_inside(
    int32_t *found, int32_t *tagged, kvec keys, kvec lo, kvec hi, kvec tags
) {
#if defined(__AVX512F__)
    __mmask16 inside = _mm512_cmpgt_epi32_mask((__m512i)keys, (__m512i)lo)
                       & _mm512_cmplt_epi32_mask((__m512i)keys, (__m512i)hi);
    /* In a register, then stored whole: a compressing store is many times slower on some machines. */
    _mm512_storeu_si512(found, _mm512_maskz_compress_epi32(inside, (__m512i)keys));
    if (tagged) _mm512_storeu_si512(tagged, _mm512_maskz_compress_epi32(inside, (__m512i)tags));
    return __builtin_popcount(inside);
#else
    kvec inside = (keys > lo) & (keys < hi);
    if (!any(inside)) return 0;
    int64_t count = 0;
    for (int lane = 0; lane < WIDE; lane++) {
        found[count] = keys[lane];
        if (tagged) tagged[count] = tags[lane];
        count += inside[lane] & 1;
    }
    return count;
#endif
}

/* An interval of keys that holds the k-th largest but for chance. */
typedef struct {
    int32_t lo, hi;
    int ties; /* whether many keys may be equal to one of the two */
} interval;

/* The interval that a sample of `m` keys tells, to find the k-th of `n`; see kth.c.
 * `deviations` says how seldom it misses. */
interval bracket(const int32_t *sample, int64_t m, int64_t n, int64_t k, double deviations);

/* The k-th largest of n > 0 keys (1 <= k <= n) and, in `greatest`, the largest; see kth.c. */
int32_t kth_key(
    const void *x, int bytes, int64_t n, int64_t k, double deviations, int threads, int32_t *greatest
);

/* The largest of n keys; -1 if there are none. */
int32_t greatest_key(const void *x, int bytes, int64_t n, int threads);

/* Counts of one digit among the keys whose higher digits are `prefix`; adds to counts[1 << width]. */
void count_digit(
    const void *x, int bytes, int64_t n, int32_t prefix, int shift, int width, int64_t *counts, int threads
);

/* As kth_key for each of `columns` short columns, whose keys are `row_step` apart and which begin
 * `column_step` apart, into `out`; see columns.c. Returns 1 if there is no memory, else 0. */
int kth_of_short(
    const void *x, int bytes, int64_t rows, int64_t row_step, int64_t columns, int64_t column_step,
    int64_t k, int threads, int32_t *out, int32_t *greatest
);

/* The same for the columns of a matrix, short or long. */
int kth_of_columns(
    const void *x, int bytes, int64_t rows, int64_t columns, int64_t k, double deviations, int threads,
    int32_t *out, int32_t *greatest
);

/* An index in [0, span), the same for the same `j`, spread evenly whatever pattern the data has. */
static inline int64_t scattered(uint64_t j, int64_t span) {
    j = (j + 1) * 0x9e3779b97f4a7c15u;
    j = (j ^ (j >> 30)) * 0xbf58476d1ce4e5b9u;
    j ^= j >> 31;
    return (int64_t)(((j >> 32) * (uint64_t)span) >> 32);
}

#endif
