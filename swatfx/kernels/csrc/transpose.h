/* A 16 x 16 transpose, from rows at from[i] to rows at `to + j * to_row`; of floats, and of elements. */
#ifndef SWATFX_TRANSPOSE_H
#define SWATFX_TRANSPOSE_H

#include "common.h"
#include "elem.h"

#if defined(__AVX512F__)
typedef uint16_t halves __attribute__((vector_size(32)));
typedef int16_t halves_index __attribute__((vector_size(32)));

/* One of four stages: pairs of rows `step` apart exchange every second run of `step` lanes. */
#define TRANSPOSE_STAGE(row, index, step, low, high)                 \
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) {       \
        if (i & (step)) continue;                                    \
        const row a = r[i], b = r[i + (step)];                       \
        r[i] = __builtin_shuffle(a, b, (index)TRANSPOSE_LIST low);   \
        r[i + (step)] = __builtin_shuffle(a, b, (index)TRANSPOSE_LIST high); \
    }
#define TRANSPOSE_LIST(...) {__VA_ARGS__}
#define TRANSPOSE(row, index)                                                                    \
    TRANSPOSE_STAGE(row, index, 8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),     \
                    (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))              \
    TRANSPOSE_STAGE(row, index, 4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),   \
                    (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))                \
    TRANSPOSE_STAGE(row, index, 2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),   \
                    (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))                \
    TRANSPOSE_STAGE(row, index, 1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),  \
                    (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))

static inline void transpose16(const float *const from[LANES], float *to, int64_t to_row) {
    vec r[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) r[i] = load(from[i]);
    TRANSPOSE(vec, ivec)
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(to + i * to_row, r[i]);
}

static inline void transpose16_bf16(const bf16 *const from[LANES], bf16 *to, int64_t to_row) {
    halves r[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) memcpy(&r[i], from[i], sizeof r[i]);
    TRANSPOSE(halves, halves_index)
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) memcpy(to + i * to_row, &r[i], sizeof r[i]);
}
#else
static inline void transpose16(const float *const from[LANES], float *to, int64_t to_row) {
    for (int j = 0; j < LANES; j++)
        for (int i = 0; i < LANES; i++) to[j * to_row + i] = from[i][j];
}

static inline void transpose16_bf16(const bf16 *const from[LANES], bf16 *to, int64_t to_row) {
    for (int j = 0; j < LANES; j++)
        for (int i = 0; i < LANES; i++) to[j * to_row + i] = from[i][j];
}
#endif

#if defined(SWATFX_BF16)
#define transpose_elements transpose16_bf16
#else
#define transpose_elements transpose16
#endif

#endif
