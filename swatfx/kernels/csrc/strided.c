/* Every few positions of a plane, as a plane of their own, and back: a pointwise convolution with a
 * stride reads and writes no others.
 *
 * Stands on no other .c file.
 */
#include "common.h"
#include "exports.h"

static inline void copy_run(elem *to, const elem *from, int64_t n) {
    if (n == LANES)
        memcpy(to, from, LANES * sizeof(elem)); /* a size that the compiler knows */
    else
        memcpy(to, from, n * sizeof(elem));
}

void TYPED(take_strided)(const elem *in, elem *out, int64_t planes, int64_t height, int64_t width, int64_t step_y,
                  int64_t step_x, int64_t batch, int threads) {
    const int64_t rows = (height + step_y - 1) / step_y, cols = (width + step_x - 1) / step_x;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < planes; k++)
        for (int64_t y = 0; y < rows; y++) {
            const elem *from = in + (k * height + y * step_y) * width * batch;
            elem *to = out + (k * rows + y) * cols * batch;
            for (int64_t x = 0; x < cols; x++) copy_run(to + x * batch, from + x * step_x * batch, batch);
        }
}

void TYPED(put_strided)(const elem *in, elem *out, int64_t planes, int64_t height, int64_t width, int64_t step_y,
                 int64_t step_x, int64_t batch, int threads) {
    const int64_t rows = (height + step_y - 1) / step_y, cols = (width + step_x - 1) / step_x;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < planes; k++)
        for (int64_t y = 0; y < height; y++) {
            elem *to = out + (k * height + y) * width * batch;
            memset(to, 0, width * batch * sizeof(elem));
            if (y % step_y) continue;
            const elem *from = in + (k * rows + y / step_y) * cols * batch;
            for (int64_t x = 0; x < cols; x++) copy_run(to + x * step_x * batch, from + x * batch, batch);
        }
}
