/* One function a tile shape: the compiler keeps the accumulators in registers only if the shape is a constant.
 *
 * Stands on no other .c file.
 */
#include "tile.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define HIDE(x) __asm__("" : "+r"(x))

/* A native register: wider ones, the compiler would keep in memory. */
#if defined(__AVX512F__)
enum { REG_LANES = 16 };
#elif defined(__AVX__)
enum { REG_LANES = 8 };
#else
enum { REG_LANES = 4 };
#endif
enum { PARTS = LANES / REG_LANES, SMALL_TILE = 6 };
typedef float reg __attribute__((vector_size(REG_LANES * 4)));
typedef float unaligned_reg __attribute__((vector_size(REG_LANES * 4), aligned(4), may_alias));

static inline reg load_reg(const float *p) { return *(const unaligned_reg *)p; }
static inline void store_reg(float *p, reg r) { *(unaligned_reg *)p = r; }
static inline reg all(float x) { return x - (reg){0}; }

static inline __attribute__((always_inline)) void run(
    const int rows, const int cols, nonzeros e, tile_at at, int first, float start) {
    reg acc[MAX_TILE * PARTS];
    const int size = rows * cols * PARTS, width = cols * PARTS;
    const int64_t in_row = at.in_row;
    float *out = at.out;
    int64_t row = at.out_row, col = at.out_col;
    if (first) {
#pragma GCC unroll 32
        for (int i = 0; i < size; i++) acc[i] = all(start);
    } else {
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++, out += row) {
            const float *from = out;
#pragma GCC unroll 32
            for (int c = 0; c < width; c++) {
                acc[r * width + c] = load_reg(from + c % PARTS * REG_LANES);
                if (c % PARTS == PARTS - 1) from += col;
            }
        }
    }
    int64_t k = 0;
    if (size <= SMALL_TILE) { /* too few sums to hide what a multiply-add takes: twice as many */
        reg odd[MAX_TILE * PARTS];
#pragma GCC unroll 32
        for (int i = 0; i < size; i++) odd[i] = all(0);
        for (; k + 1 < e.count; k += 2) {
            const reg one = all(e.value[k]), other = all(e.value[k + 1]);
            const float *in = at.in + e.offset[k], *next = at.in + e.offset[k + 1];
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++, in += in_row, next += in_row) {
#pragma GCC unroll 32
                for (int c = 0; c < width; c++) {
                    acc[r * width + c] += one * load_reg(in + c * REG_LANES);
                    odd[r * width + c] += other * load_reg(next + c * REG_LANES);
                }
            }
        }
#pragma GCC unroll 32
        for (int i = 0; i < size; i++) acc[i] += odd[i];
    }
    for (; k < e.count; k++) {
        const reg value = all(e.value[k]);
        const float *in = at.in + e.offset[k];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++, in += in_row) {
            HIDE(in); /* one pointer a row, constant offsets from it */
#pragma GCC unroll 32
            for (int c = 0; c < width; c++) acc[r * width + c] += value * load_reg(in + c * REG_LANES);
        }
    }
    out = at.out;
    HIDE(row); /* else the compiler keeps every address from above, on the stack */
    HIDE(col);
#if defined(__AVX512F__)
    if (at.stream) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++, out += row) {
            float *to = out;
#pragma GCC unroll 32
            for (int c = 0; c < cols; c++, to += col) _mm512_stream_ps(to, (__m512)acc[r * cols + c]);
        }
        return;
    }
#endif
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++, out += row) {
        float *to = out;
#pragma GCC unroll 32
        for (int c = 0; c < width; c++) {
            store_reg(to + c % PARTS * REG_LANES, acc[r * width + c]);
            if (c % PARTS == PARTS - 1) to += col;
        }
    }
}

#define TILE(R, C)                                                                             \
    static void tile_##R##_##C(nonzeros e, tile_at at, int first, float start) { \
        run(R, C, e, at, first, start);                                                      \
    }
#define NAME(R, C) [R][C] = tile_##R##_##C,

#define SMALL(X) \
    X(1, 1) X(1, 2) X(1, 3) X(2, 1) X(3, 1)
#define MIDDLE(X) \
    X(1, 4) X(1, 5) X(1, 6) X(2, 2) X(2, 3) X(3, 2) X(4, 1)
#define LARGE(X) \
    X(1, 7) X(1, 8) X(1, 9) X(1, 10) X(1, 11) X(1, 12) X(1, 13) X(1, 14) X(1, 15) X(1, 16) \
    X(1, 17) X(1, 18) X(1, 19) X(1, 20) X(1, 21) X(1, 22) X(1, 23) X(1, 24) X(1, 25) \
    X(1, 26) X(1, 27) X(1, 28) X(2, 4) X(2, 5) X(2, 6) X(2, 7) X(2, 8) X(2, 9) X(2, 10) \
    X(2, 11) X(2, 12) X(2, 13) X(2, 14) X(3, 3) X(3, 4) X(3, 5) X(3, 6) X(3, 7) X(3, 8) \
    X(3, 9) X(4, 2) X(4, 3) X(4, 4) X(4, 5) X(4, 6) X(4, 7)

SMALL(TILE)
#if defined(__AVX512F__) || defined(__AVX__) || defined(__aarch64__)
MIDDLE(TILE)
#endif
#if defined(__AVX512F__)
LARGE(TILE)
#endif

static const tile_function TILES[MAX_TILE_ROWS + 1][29] = {
    SMALL(NAME)
#if defined(__AVX512F__) || defined(__AVX__) || defined(__aarch64__)
    MIDDLE(NAME)
#endif
#if defined(__AVX512F__)
    LARGE(NAME)
#endif
};

tile_function tile_kernel(int64_t rows, int64_t cols) { return TILES[rows][cols]; }

static inline __attribute__((always_inline)) void run_group(
    const int cols, const shared_nonzeros *e, const float *from, int64_t at, int64_t out_col, int first) {
    reg acc[GROUP][MAX_GROUP_COLS * PARTS];
    const int width = cols * PARTS;
#pragma GCC unroll 4
    for (int g = 0; g < GROUP; g++) {
#pragma GCC unroll 32
        for (int c = 0; c < width; c++)
            acc[g][c] = first ? all(e->start[g])
                              : load_reg(e->out[g] + at + c / PARTS * out_col + c % PARTS * REG_LANES);
    }
    const float *v0 = e->value[0], *v1 = e->value[1], *v2 = e->value[2], *v3 = e->value[3];
    for (int64_t k = 0; k < e->count; k++) {
        const float *in = from + e->offset[k];
        const reg value[GROUP] = {all(v0[k]), all(v1[k]), all(v2[k]), all(v3[k])};
#pragma GCC unroll 32
        for (int c = 0; c < width; c++) {
            const reg x = load_reg(in + c * REG_LANES);
#pragma GCC unroll 4
            for (int g = 0; g < GROUP; g++) acc[g][c] += value[g] * x;
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < GROUP; g++) {
#pragma GCC unroll 32
        for (int c = 0; c < width; c++)
            store_reg(e->out[g] + at + c / PARTS * out_col + c % PARTS * REG_LANES, acc[g][c]);
    }
}

#define GROUPED(C)                                                                                          \
    static void group_##C(const shared_nonzeros *e, const float *in, int64_t at, int64_t out_col, int first) { \
        run_group(C, e, in, at, out_col, first);                                                            \
    }

GROUP_WIDTHS(GROUPED)

static const group_function GROUPS[MAX_GROUP_COLS + 1] = {GROUP_WIDTHS(GROUP_NAME)};

group_function group_kernel(int64_t cols) { return GROUPS[cols]; }
