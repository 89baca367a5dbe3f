/* The k-th largest magnitude, exactly, in one pass over the tensor (Floyd and Rivest's selection).
 *
 * A small sample tells an interval that holds the k-th largest almost surely. One pass counts what
 * lies above it and collects what lies inside, one or two elements in a hundred, among which the
 * search goes on. Where the interval misses, a radix histogram finds the same key in three passes.
 *
 * Stands on no other .c file.
 */
#include "kth.h"

#include <math.h>

enum {
    BLOCK = 64 * WIDE, /* elements between two looks at what room is left */
    MOST_SAMPLES = 1 << 14,
    MOST_THREADS = 256,
};

/* keys[rows], rows a multiple of four, padded with -1. */
static int32_t bisect(const kvec *keys, int64_t rows, int64_t k, int32_t *greatest) {
    kvec top = all_lanes(-1);
    for (int64_t r = 0; r < rows; r++) top = greater(keys[r], top);
    *greatest = greatest_lane(top);
    int32_t low = 0, high = *greatest; /* k keys or more are >= low, fewer are > high */
    while (low < high) {
        int32_t below = low + (high - low) / 2;
        int64_t count = sum_lanes(count_all_greater(keys, rows, all_lanes(below)));
        if (count < k) {
            high = below;
            continue;
        }
        low = below + 1;
        if (count > k) continue;
        kvec least = all_lanes(*greatest); /* exactly k: the k-th is the least of them */
        for (int64_t r = 0; r < rows; r++)
            least = choose((keys[r] > below) & (keys[r] < least), keys[r], least);
        return -greatest_lane(-least);
    }
    return low;
}

static int32_t kth_of_few(const void *x, int bytes, int64_t n, int64_t k, int32_t *greatest) {
    kvec keys[FEW / WIDE];
    int64_t whole = n / WIDE, rows = whole;
    for (int64_t r = 0; r < whole; r++) keys[r] = keys_at(x, r * WIDE, bytes);
    if (whole * WIDE < n) keys[rows++] = last_keys(x, whole * WIDE, n - whole * WIDE, bytes);
    while (rows % 4) keys[rows++] = all_lanes(-1);
    return bisect(keys, rows, k, greatest);
}

void count_digit(
    const void *x, int bytes, int64_t n, int32_t prefix, int shift, int width, int64_t *counts,
    int threads
) {
    threads = (int)min64(threads, n / PART + 1);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        /* Four tables, so that equal neighbours do not wait for each other's increments. */
        uint32_t table[4][2048] = {{0}};
        int parts = omp_get_num_threads(), part = omp_get_thread_num();
        int64_t begin = part_begin(n, WIDE, part, parts), end = part_begin(n, WIDE, part + 1, parts);
        uint32_t digits = (1u << width) - 1;
        for (int64_t i = begin; i < end; i += WIDE) {
            kvec keys = i + WIDE <= end ? keys_at(x, i, bytes) : last_keys(x, i, end - i, bytes);
            kvec match = (keys >> (shift + width)) == prefix;
            if (!any(match)) continue;
            for (int lane = 0; lane < WIDE; lane++)
                table[lane & 3][((uint32_t)keys[lane] >> shift) & digits] += match[lane] & 1;
        }
        for (uint32_t d = 0; d <= digits; d++) {
            int64_t count = (int64_t)table[0][d] + table[1][d] + table[2][d] + table[3][d];
            if (!count) continue;
#pragma omp atomic
            counts[d] += count;
        }
    }
}

static int32_t kth_by_histogram(const void *x, int bytes, int64_t n, int64_t k, int threads) {
    static const int digits[3][2] = {{20, 11}, {9, 11}, {0, 9}};
    int32_t prefix = 0;
    for (int d = 0; d < 3; d++) {
        int shift = digits[d][0], width = digits[d][1];
        int64_t counts[2048] = {0};
        count_digit(x, bytes, n, prefix, shift, width, counts, threads);
        int32_t digit = (1 << width) - 1;
        for (; counts[digit] < k; digit--) k -= counts[digit];
        prefix = prefix << width | digit;
    }
    return prefix;
}

interval bracket(const int32_t *sample, int64_t m, int64_t n, int64_t k, double deviations) {
    double p = (double)k / (double)n, wide = deviations * sqrt(p * (1 - p) * (double)m);
    /* One more, for the tail is longer than the normal one's where few are wanted. */
    int64_t slack = (int64_t)wide + (deviations > 0), rank = (int64_t)(p * (double)m);
    int64_t above = rank - slack, below = rank + slack + 1, same = 0;
    int32_t ignored, hi = INT32_MAX, lo = 0;
    if (above >= 1) hi = kth_key(sample, 4, m, above, deviations, 1, &ignored);
    if (below <= m) lo = kth_key(sample, 4, m, below, deviations, 1, &ignored);
    for (int64_t j = 0; j < m; j++) same += (sample[j] == lo) | (sample[j] == hi);
    if (same > m / 32) return (interval){lo, hi, 1};
    /* Few are equal to either: they are collected with the others. */
    return (interval){lo - 1, hi < INT32_MAX ? hi + 1 : hi, 0};
}

static int bracket_of(
    const void *x, int bytes, int64_t n, int64_t k, double deviations, interval *in
) {
    int64_t m = min64(MOST_SAMPLES, n / 64 > FEW / 2 ? n / 64 : FEW / 2), stride = n / m;
    int32_t *sample = malloc((size_t)m * sizeof *sample);
    if (!sample) return 0;
    for (int64_t j = 0; j < m; j++)
        sample[j] = key_at(x, j * stride + scattered((uint64_t)j, stride), bytes);
    *in = bracket(sample, m, n, k, deviations);
    free(sample);
    return 1;
}

/* One thread's pass; returns how many keys it found inside, -1 if there was no room for them. */
static inline int64_t scan_as(
    const void *x, int bytes, int64_t begin, int64_t end, interval in, int ties, tally *sum,
    int32_t *found, int64_t room
) {
    kvec lo = all_lanes(in.lo), hi = all_lanes(in.hi);
    tally t = *sum; /* a local copy stays in registers */
    int64_t count = 0, i = begin, whole = begin + (end - begin) / WIDE * WIDE;
    while (i < whole) {
        if (count + BLOCK > room) return -1;
        for (int64_t stop = min64(whole, i + BLOCK); i < stop; i += WIDE) {
            kvec keys = keys_at(x, i, bytes);
            count_keys(&t, keys, lo, hi, ties);
            count += append_inside(found + count, NULL, keys, lo, hi, keys);
        }
    }
    if (i < end) {
        if (count + WIDE > room) return -1;
        kvec keys = last_keys(x, i, end - i, bytes);
        count_keys(&t, keys, lo, hi, ties);
        count += append_inside(found + count, NULL, keys, lo, hi, keys);
    }
    *sum = t;
    return count;
}

static int64_t scan(
    const void *x, int bytes, int64_t begin, int64_t end, interval in, tally *sum, int32_t *found,
    int64_t room
) {
    if (bytes != 4) return scan_as(x, 2, begin, end, in, in.ties, sum, found, room);
    if (in.ties) return scan_as(x, 4, begin, end, in, 1, sum, found, room);
    return scan_as(x, 4, begin, end, in, 0, sum, found, room);
}

int32_t greatest_key(const void *x, int bytes, int64_t n, int threads) {
    int32_t greatest = -1;
    threads = (int)min64(threads, n / PART + 1);
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(max : greatest)
    {
        int parts = omp_get_num_threads(), part = omp_get_thread_num();
        int64_t begin = part_begin(n, WIDE, part, parts), end = part_begin(n, WIDE, part + 1, parts);
        int64_t whole = begin + (end - begin) / WIDE * WIDE;
        kvec top = whole < end ? last_keys(x, whole, end - whole, bytes) : all_lanes(-1);
        for (int64_t i = begin; i < whole; i += WIDE) top = greater(keys_at(x, i, bytes), top);
        greatest = greatest_lane(top);
    }
    return greatest;
}

int32_t kth_key(
    const void *x, int bytes, int64_t n, int64_t k, double deviations, int threads, int32_t *greatest
) {
    if (n <= FEW) return kth_of_few(x, bytes, n, k, greatest);
    threads = (int)min64(min64(threads, MOST_THREADS), n / PART + 1);
    int32_t kth = -1, ignored;
    interval in;
    /* Of m samples, 2 * deviations * sqrt(m p (1 - p)) fall inside, and as large a part of the n keys;
     * any one thread may meet them all. */
    int64_t room = n / 16 + 4 * BLOCK + (n <= (1 << 20) ? n / 4 : 0);
    int32_t *found = malloc((size_t)(room * threads) * sizeof *found);
    if (!found || !bracket_of(x, bytes, n, k, deviations, &in)) goto miss;

    tally sum = empty_tally();
    int64_t counts[MOST_THREADS] = {0};
    if (threads == 1) {
        counts[0] = scan(x, bytes, 0, n, in, &sum, found, room);
    } else {
#pragma omp parallel num_threads(threads)
        {
            int parts = omp_get_num_threads(), part = omp_get_thread_num();
            int64_t begin = part_begin(n, WIDE, part, parts), end = part_begin(n, WIDE, part + 1, parts);
            tally mine = empty_tally();
            counts[part] = scan(x, bytes, begin, end, in, &mine, found + part * room, room);
#pragma omp critical(swatfx_kth_key)
            {
                sum.above += mine.above;
                sum.from_hi += mine.from_hi;
                sum.from_lo += mine.from_lo;
                sum.greatest = greater(mine.greatest, sum.greatest);
            }
        }
    }
    int64_t inside = 0;
    for (int part = 0; part < threads; part++) {
        if (counts[part] < 0) goto miss;
        memmove(found + inside, found + part * room, (size_t)counts[part] * sizeof *found);
        inside += counts[part];
    }
    int64_t from_hi = sum_lanes(sum.from_hi), above = in.ties ? sum_lanes(sum.above) : from_hi;
    /* Nothing is gained by searching among most of the keys. */
    if (k <= above || inside > n / 2) goto miss;
    if (k <= from_hi)
        kth = in.hi;
    else if (k <= from_hi + inside)
        kth = kth_key(found, 4, inside, k - from_hi, deviations, 1, &ignored);
    else if (k <= sum_lanes(sum.from_lo))
        kth = in.lo;
    else
        goto miss;
    *greatest = greatest_lane(sum.greatest);
    free(found);
    return kth;
miss:
    free(found);
    *greatest = greatest_key(x, bytes, n, threads);
    return kth_by_histogram(x, bytes, n, k, threads);
}
