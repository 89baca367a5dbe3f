/* A 16 x 16 transpose, from rows at `from + i * from_row` to rows at `to + j * to_row`. */
#ifndef SWATFX_TRANSPOSE_H
#define SWATFX_TRANSPOSE_H

#include "common.h"

#if defined(__AVX512F__)
/* One of four stages: pairs of rows `step` apart exchange every second run of `step` lanes. */
static inline __attribute__((always_inline)) void transpose_stage(vec r[LANES], const int step, ivec low, ivec high) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (i & step) continue;
        const vec a = r[i], b = r[i + step];
        r[i] = __builtin_shuffle(a, b, low);
        r[i + step] = __builtin_shuffle(a, b, high);
    }
}

static inline void transpose16(const float *const from[LANES], float *to, int64_t to_row) {
    vec r[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) r[i] = load(from[i]);
    transpose_stage(r, 8, (ivec){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
                    (ivec){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    transpose_stage(r, 4, (ivec){0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
                    (ivec){4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
    transpose_stage(r, 2, (ivec){0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
                    (ivec){2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
    transpose_stage(r, 1, (ivec){0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
                    (ivec){1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31});
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(to + i * to_row, r[i]);
}
#else
static inline void transpose16(const float *const from[LANES], float *to, int64_t to_row) {
    for (int j = 0; j < LANES; j++)
        for (int i = 0; i < LANES; i++) to[j * to_row + i] = from[i][j];
}
#endif

#endif
