/* Top-K of a weight's blocks as a dense tensor: one pass, where plain torch takes a dozen.
 *
 * Stands on no other .c file.
 */
#include "exports.h"

#include <math.h>
#include <string.h>

enum { CHUNK = 64 }; /* taps at a time */

/* Sums of squares of `taps` blocks, in the order of swatfx/selectors/blocks.py; the square of a float is an
 * exact double. */
static inline void add_squares(const block_problem *p, const float *x, int64_t filters, int64_t channels, int64_t taps,
                               double *sum) {
    for (int64_t t = 0; t < taps; t++) sum[t] = 0;
    for (int64_t f = 0; f < filters; f++) {
        double row[CHUNK];
        for (int64_t t = 0; t < taps; t++) row[t] = 0;
        for (int64_t c = 0; c < channels; c++) {
            const float *from = x + f * p->filter_stride + c * p->channel_stride;
            for (int64_t t = 0; t < taps; t++) {
                const double one = from[t * p->tap_stride];
                row[t] += one * one;
            }
        }
        for (int64_t t = 0; t < taps; t++) sum[t] += row[t];
    }
}

/* Whether the root of the mean square is not below the threshold: as a float, which takes a root only where
 * it might round to the threshold itself; or NaN. */
static inline int reaches(double energy, double size, float threshold) {
    const double bound = (double)threshold * threshold * size, near = 1e-6 * bound;
    if (energy < bound - near) return 0;
    if (energy > bound + near) return 1;
    return !((float)sqrt(energy / size) < threshold);
}

void swatfx_keep_blocks(const block_problem *p, const float *x, float threshold, float *out) {
    const int64_t high = p->block_filters, wide = p->block_channels, rows = (p->filters + high - 1) / high;
#pragma omp parallel for num_threads((int)p->threads) if (p->threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t f0 = row * high, filters = p->filters - f0 < high ? p->filters - f0 : high;
        for (int64_t c0 = 0; c0 < p->channels; c0 += wide) {
            const int64_t channels = p->channels - c0 < wide ? p->channels - c0 : wide;
            for (int64_t t0 = 0; t0 < p->taps; t0 += CHUNK) {
                const int64_t at = f0 * p->filter_stride + c0 * p->channel_stride + t0 * p->tap_stride;
                const int64_t taps = p->taps - t0 < CHUNK ? p->taps - t0 : CHUNK;
                double sum[CHUNK];
                uint32_t keep[CHUNK]; /* all bits, or none */
                add_squares(p, x + at, filters, channels, taps, sum);
                for (int64_t t = 0; t < taps; t++)
                    keep[t] = -(uint32_t)reaches(sum[t], (double)(filters * channels), threshold);
                for (int64_t f = 0; f < filters; f++)
                    for (int64_t c = 0; c < channels; c++)
                        for (int64_t t = 0; t < taps; t++) {
                            const int64_t i = at + f * p->filter_stride + c * p->channel_stride + t * p->tap_stride;
                            uint32_t bits;
                            memcpy(&bits, x + i, sizeof bits);
                            bits &= keep[t];
                            memcpy(out + i, &bits, sizeof bits);
                        }
            }
        }
    }
}
