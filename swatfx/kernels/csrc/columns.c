/* The k-th largest magnitude of every column of a matrix, which lies row by row in memory.
 *
 * With the batch innermost, a column is a sample. Short columns are searched by bisection, a column a
 * lane. Long ones take one pass over the matrix as kth.c does, with an interval for every lane: the
 * pattern of columns in a vector comes back after period(columns) vectors.
 *
 * Stands on kth.c.
 */
#include "kth.h"

enum {
    SHORT = 1 << 13,
    BLOCK = 64, /* vectors between two looks at what room is left */
    MOST_SAMPLES = 1 << 12,
};

static int64_t period(int64_t columns) {
    int64_t a = columns, b = WIDE;
    while (b) {
        int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return columns / a;
}

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static void copy_column(
    const void *x, int bytes, int64_t rows, int64_t columns, int64_t column, int32_t *out
) {
    for (int64_t r = 0; r < rows; r++) out[r] = key_at(x, r * columns + column, bytes);
}

/* A column a lane: keys[rows], rows a multiple of four, by bisection in all lanes at once. */
static kvec bisect_lanes(const kvec *keys, int64_t rows, int64_t k, kvec *greatest) {
    kvec top = all_lanes(-1);
    for (int64_t r = 0; r < rows; r++) top = greater(keys[r], top);
    *greatest = top;
    /* k keys or more are >= low, fewer are > high: the k-th is one of low, ..., high. */
    kvec low = {0}, high = top, wanted = all_lanes((int32_t)k), found = {0};
    for (;;) {
        kvec open = (low < high) & ~found;
        if (!any(open)) break;
        kvec below = low + (high - low) / 2, counts = count_all_greater(keys, rows, below);
        kvec enough = counts >= wanted;
        low = choose(open & enough, below + 1, low);
        high = choose(open & ~enough, below, high);
        found |= counts == wanted; /* then the k-th is the least that is >= low */
    }
    kvec least = top;
    for (int64_t r = 0; r < rows; r++)
        least = choose((keys[r] >= low) & (keys[r] < least), keys[r], least);
    return least;
}

int kth_of_short(
    const void *x, int bytes, int64_t rows, int64_t row_step, int64_t columns, int64_t column_step,
    int64_t k, int threads, int32_t *out, int32_t *greatest
) {
    int32_t top = -1, failed = 0;
    int64_t tiles = (columns + WIDE - 1) / WIDE, padded = (rows + 3) / 4 * 4;
    threads = (int)min64(threads, min64(tiles, rows * columns / PART + 1));
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(max : top, failed)
    {
        kvec *keys = aligned_alloc(sizeof(kvec), (size_t)padded * sizeof *keys);
        failed = !keys;
        for (int64_t r = rows; r < padded && keys; r++) keys[r] = all_lanes(-1);
#pragma omp for
        for (int64_t tile = 0; tile < tiles; tile++) {
            if (!keys) continue;
            int64_t first = tile * WIDE, count = min64(WIDE, columns - first);
            for (int64_t r = 0; r < rows; r++) {
                int64_t i = first * column_step + r * row_step;
                if (column_step == 1 && count == WIDE) {
                    keys[r] = keys_at(x, i, bytes);
                    continue;
                }
                int32_t lanes[WIDE];
                for (int64_t c = 0; c < WIDE; c++)
                    lanes[c] = c < count ? key_at(x, i + c * column_step, bytes) : -1;
                keys[r] = *(const ukvec *)lanes;
            }
            kvec most, kth = bisect_lanes(keys, padded, k, &most);
            for (int64_t c = 0; c < count; c++) out[first + c] = kth[c];
            int32_t one = greatest_lane(most);
            top = one > top ? one : top;
        }
        free(keys);
    }
    *greatest = top;
    return failed;
}

typedef struct {
    int64_t period;
    kvec *lo, *hi, *column; /* by vector of the pattern */
    interval *of;           /* by column */
    int ties;
} intervals;

/* Samples whole rows, `m` of them: one line of memory serves sixteen columns. */
static void bracket_columns(
    const void *x, int bytes, int64_t rows, int64_t columns, int64_t k, double deviations, int threads,
    int32_t *sample, int64_t m, intervals *in
) {
    int64_t stride = rows / m;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t j = 0; j < m; j++) {
            int64_t row = j * stride + scattered((uint64_t)j, stride);
            for (int64_t c = 0; c < columns; c++)
                sample[c * m + j] = key_at(x, row * columns + c, bytes);
        }
#pragma omp for
        for (int64_t c = 0; c < columns; c++)
            in->of[c] = bracket(sample + c * m, m, rows, k, deviations);
    }
    in->ties = 0;
    for (int64_t c = 0; c < columns; c++) in->ties |= in->of[c].ties;
    for (int64_t e = 0; e < in->period * WIDE; e++) {
        in->lo[e / WIDE][e % WIDE] = in->of[e % columns].lo;
        in->hi[e / WIDE][e % WIDE] = in->of[e % columns].hi;
        in->column[e / WIDE][e % WIDE] = (int32_t)(e % columns);
    }
}

/* One thread's vectors, from a whole number of patterns; -1 if there is no room for what it finds. */
static inline int64_t scan_as(
    const void *x, int bytes, int64_t n, int64_t begin, int64_t end, const intervals *in, tally *sums,
    int32_t *found, int32_t *column, int64_t room
) {
    int64_t count = 0, j = 0;
    for (int64_t v = begin; v < end; v++) {
        if ((v - begin) % BLOCK == 0 && count + BLOCK * WIDE > room) return -1;
        int64_t i = v * WIDE;
        kvec keys = i + WIDE <= n ? keys_at(x, i, bytes) : last_keys(x, i, n - i, bytes);
        kvec lo = in->lo[j], hi = in->hi[j];
        count_keys(sums + j, keys, lo, hi, in->ties);
        count += append_inside(found + count, column + count, keys, lo, hi, in->column[j]);
        if (++j == in->period) j = 0;
    }
    return count;
}

static int64_t scan(
    const void *x, int bytes, int64_t n, int64_t begin, int64_t end, const intervals *in, tally *sums,
    int32_t *found, int32_t *column, int64_t room
) {
    if (bytes == 4) return scan_as(x, 4, n, begin, end, in, sums, found, column, room);
    return scan_as(x, 2, n, begin, end, in, sums, found, column, room);
}

/* What is known of one column after the pass. */
typedef struct {
    int64_t above, from_hi, from_lo, inside, begin;
} standing;

/* Adds what one thread counted, lane by lane; returns the greatest key that it met. */
static int32_t add_up(const tally *sums, const intervals *in, int64_t columns, standing *known) {
    int32_t top = -1;
    for (int64_t e = 0; e < in->period * WIDE; e++) {
        standing *s = known + e % columns;
        const tally *t = sums + e / WIDE;
        int lane = (int)(e % WIDE);
        s->above += in->ties ? t->above[lane] : t->from_hi[lane];
        s->from_hi += t->from_hi[lane];
        s->from_lo += t->from_lo[lane];
        top = t->greatest[lane] > top ? t->greatest[lane] : top;
    }
    return top;
}

/* What the threads found, in runs of room keys and room columns: counts them by column, and tells
 * where a column's begin once they are sorted. Returns how many there are. */
static int64_t count_found(
    const int32_t *found, int64_t room, const int64_t *counts, int threads, int64_t columns, standing *known
) {
    int64_t total = 0;
    for (int t = 0; t < threads; t++)
        for (int64_t i = 0; i < counts[t]; i++) known[found[(2 * t + 1) * room + i]].inside++;
    for (int64_t c = 0; c < columns; c++) {
        known[c].begin = total;
        total += known[c].inside;
    }
    return total;
}

static void sort_found(
    const int32_t *found, int64_t room, const int64_t *counts, int threads, standing *known, int32_t *sorted
) {
    for (int t = 0; t < threads; t++) {
        const int32_t *keys = found + 2 * room * t, *column = keys + room;
        for (int64_t i = 0; i < counts[t]; i++) sorted[known[column[i]].begin++] = keys[i];
    }
}

static int kth_of_long(
    const void *x, int bytes, int64_t rows, int64_t columns, int64_t k, double deviations, int threads,
    int32_t *out, int32_t *greatest
) {
    int64_t n = rows * columns, vectors = (n + WIDE - 1) / WIDE, p = period(columns);
    int64_t m = min64(MOST_SAMPLES, rows / 16), room = n / 8 + 2 * BLOCK * WIDE;
    threads = (int)min64(threads, n / PART + 1);
    interval *bounds = malloc((size_t)columns * sizeof *bounds);
    kvec *tables = aligned_alloc(sizeof(kvec), (size_t)p * 3 * sizeof *tables);
    tally *tallies = aligned_alloc(sizeof(kvec), (size_t)(p * threads) * sizeof *tallies);
    int32_t *found = malloc((size_t)(room * threads) * 2 * sizeof *found);
    int32_t *sample = malloc((size_t)(m * columns) * sizeof *sample), *sorted = NULL;
    int64_t *counts = calloc((size_t)threads, sizeof *counts);
    standing *known = calloc((size_t)columns, sizeof *known);
    int32_t top = -1;
    int failed = 1, missed = 0;
    if (!bounds || !tables || !tallies || !found || !sample || !counts || !known) goto done;

    intervals in = {p, tables, tables + p, tables + 2 * p, bounds, 0};
    bracket_columns(x, bytes, rows, columns, k, deviations, threads, sample, m, &in);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int parts = omp_get_num_threads(), part = omp_get_thread_num();
        tally *mine = tallies + p * part;
        for (int64_t j = 0; j < p; j++) mine[j] = empty_tally();
        int32_t *keys = found + 2 * room * part;
        int64_t begin = part_begin(vectors, p, part, parts), end = part_begin(vectors, p, part + 1, parts);
        counts[part] = scan(x, bytes, n, begin, end, &in, mine, keys, keys + room, room);
#pragma omp critical(swatfx_kth_of_long)
        {
            int32_t one = add_up(mine, &in, columns, known);
            top = one > top ? one : top;
            missed |= counts[part] < 0;
        }
    }
    sorted = malloc((size_t)(count_found(found, room, counts, threads, columns, known) + 1) * sizeof *sorted);
    if (!sorted) goto done;
    sort_found(found, room, counts, threads, known, sorted); /* begin is the end of a run now */
    failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(max : top, failed)
    for (int64_t c = 0; c < columns; c++) {
        const standing *s = known + c;
        const int32_t *inside = sorted + s->begin - s->inside;
        int32_t one = -1;
        if (missed || k <= s->above || k > max64(s->from_lo, s->from_hi + s->inside)) {
            int32_t *keys = malloc((size_t)rows * sizeof *keys);
            failed |= !keys;
            if (!keys) continue;
            copy_column(x, bytes, rows, columns, c, keys);
            out[c] = kth_key(keys, 4, rows, k, deviations, 1, &one);
            free(keys);
            top = one > top ? one : top; /* a pass that ran out of room did not meet them all */
        } else if (k <= s->from_hi) {
            out[c] = bounds[c].hi;
        } else if (k <= s->from_hi + s->inside) {
            out[c] = kth_key(inside, 4, s->inside, k - s->from_hi, deviations, 1, &one);
        } else {
            out[c] = bounds[c].lo;
        }
    }
    *greatest = top;
done:
    free(sorted);
    free(known);
    free(counts);
    free(sample);
    free(found);
    free(tallies);
    free(tables);
    free(bounds);
    return failed;
}

int kth_of_columns(
    const void *x, int bytes, int64_t rows, int64_t columns, int64_t k, double deviations, int threads,
    int32_t *out, int32_t *greatest
) {
    if (rows <= SHORT)
        return kth_of_short(x, bytes, rows, columns, columns, 1, k, threads, out, greatest);
    return kth_of_long(x, bytes, rows, columns, k, deviations, threads, out, greatest);
}
