/* Thresholds of a tensor's groups: its k-th largest magnitudes, and whether it holds NaN.
 *
 * Chooses between the searches of one run and of many columns, and how threads share them.
 * Stands on kth.c and columns.c.
 */
#include "exports.h"
#include "kth.h"

int32_t swatfx_greatest(const void *x, int bytes, int64_t n, int threads) {
    return greatest_key(x, bytes, n, threads);
}

void swatfx_count_digit(
    const void *x, int64_t n, int32_t prefix, int shift, int width, int64_t *counts, int threads
) {
    count_digit(x, 4, n, prefix, shift, width, counts, threads);
}

static const void *block_at(const void *x, int bytes, int64_t element) {
    return (const char *)x + element * bytes;
}

enum { NO_ROOM = -2 }; /* below every key, and below -1, what none is */

/* The groups of one matrix; returns its greatest key, or NO_ROOM. */
static int32_t kth_of_block(
    const void *x, int bytes, int64_t rows, int64_t columns, int64_t k, double deviations, int threads,
    int32_t *kth
) {
    int32_t top = -1;
    int failed = 0;
    if (columns == 1)
        *kth = kth_key(x, bytes, rows, k, deviations, threads, &top);
    else
        failed = kth_of_columns(x, bytes, rows, columns, k, deviations, threads, kth, &top);
    return failed ? NO_ROOM : top;
}

int32_t swatfx_kth(
    const void *x, int bytes, int64_t blocks, int64_t rows, int64_t columns, int64_t k,
    double deviations, void *out, int threads
) {
    int32_t greatest = -1, failed = 0, *kth = malloc((size_t)(blocks * columns) * sizeof *kth);
    if (!kth) return NO_ROOM;
    if (columns == 1 && rows <= FEW && blocks > 1) {
        failed = kth_of_short(x, bytes, rows, 1, blocks, rows, k, threads, kth, &greatest);
    } else if (blocks >= threads && threads > 1) {
#pragma omp parallel for num_threads(threads) reduction(max : greatest) reduction(| : failed)
        for (int64_t b = 0; b < blocks; b++) {
            int32_t top = kth_of_block(block_at(x, bytes, b * rows * columns), bytes, rows, columns, k,
                                       deviations, 1, kth + b * columns);
            greatest = top > greatest ? top : greatest;
            failed |= top == NO_ROOM;
        }
    } else {
        /* Threads share a group, outside of any parallel region: OpenMP makes new threads for a nested one. */
        for (int64_t b = 0; b < blocks; b++) {
            int32_t top = kth_of_block(block_at(x, bytes, b * rows * columns), bytes, rows, columns, k,
                                       deviations, threads, kth + b * columns);
            greatest = top > greatest ? top : greatest;
            failed |= top == NO_ROOM;
        }
    }
    for (int64_t g = 0; g < blocks * columns; g++) {
        if (bytes == 4)
            ((int32_t *)out)[g] = kth[g];
        else
            ((uint16_t *)out)[g] = (uint16_t)kth[g];
    }
    free(kth);
    return failed ? NO_ROOM : greatest;
}
