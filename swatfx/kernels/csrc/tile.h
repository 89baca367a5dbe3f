/* The inner loop of every sparse product: one row of nonzeros against a tile of vectors.
 *
 * A tile is `rows` by `cols` vectors, all held in registers. Each nonzero adds its multiple of as many
 * vectors of the scratch buffer, at its own offset: one broadcast for the whole tile, and every
 * multiplication reads its operand straight from memory.
 */
#ifndef SWATFX_TILE_H
#define SWATFX_TILE_H

#include "common.h"
#include "elem.h"

/* Vectors of a tile that registers can hold, with one left for the broadcast and some to spare. */
#if defined(__AVX512F__)
enum { MAX_TILE = 28 };
#elif defined(__AVX__) || defined(__aarch64__)
enum { MAX_TILE = 6 };
#else
enum { MAX_TILE = 3 };
#endif
enum { MAX_TILE_ROWS = 4 };

typedef struct {
    const int32_t *offset; /* in floats, into the scratch buffer */
    const float *value;
    int64_t count;
} nonzeros;

typedef struct {
    const float *in;
    int64_t in_row; /* floats between rows of the tile in the scratch buffer */
    float *out;
    int64_t out_row, out_col; /* floats between rows and columns of the tile in the result */
    int stream;               /* write around the caches; `out` is aligned to a vector then */
} tile_at;

/* out (+)= sum of value * in[offset ..]; starts from `start` in every lane if `first`, else from out. */
typedef void (*tile_function)(nonzeros, tile_at, int first, float start);

/* The function for a tile of `rows` by `cols` vectors, rows * cols <= MAX_TILE. */
tile_function tile_kernel(int64_t rows, int64_t cols);

/* ---- Over bfloat16: tile_bf16.c ---- */

/* As tile_at, in elements. Sums are floats, those of a row of the tile side by side. */
typedef struct {
    const bf16 *in;
    int64_t in_row;
    bf16 *out;
    int64_t out_row, out_col;
    int stream;        /* `out` is aligned to 64 bytes, and columns lie side by side */
    const float *from; /* sums to go on with; NULL: `start` in every lane */
    float *sums;       /* where sums go; NULL: rounded, to `out` */
    int64_t sums_row;  /* floats between rows of sums */
} tile_at_bf16;

typedef void (*tile_function_bf16)(nonzeros, tile_at_bf16, float start);

/* The function for a tile of `rows` by `cols` vectors, rows <= rows_of_tile. Values of nonzeros are such that
 * bfloat16 holds them; `finite`: so is all that is read. */
tile_function_bf16 tile_kernel_bf16(int64_t rows, int64_t cols, int finite);
/* The one that needs both; NULL where the library was not built for a processor with a dot product. */
tile_function_bf16 tile_kernel_dot(int64_t rows, int64_t cols);

/* Rows of a tile that is `cols` vectors wide which registers can hold; at least one. */
static inline int64_t rows_of_tile(int64_t cols, int half) {
#if defined(__AVX512F__)
    if (half) return MAX_TILE / 2 / ((cols + 1) / 2);
#endif
    (void)half;
    return MAX_TILE / cols;
}

/* ---- Groups ---- */

/* Rows of a group, which share their offsets (structured sparsity): each vector that is read serves
 * all of them. */
enum { GROUP = 4 };
#if defined(__AVX512F__)
enum { MAX_GROUP_COLS = 6 };
#define GROUP_WIDTHS(X) X(1) X(2) X(3) X(4) X(5) X(6)
#else
enum { MAX_GROUP_COLS = 1 };
#define GROUP_WIDTHS(X) X(1)
#endif
/* An entry of the table of their functions. */
#define GROUP_NAME(C) [C] = group_##C,

typedef struct {
    const int32_t *offset;
    const float *value[GROUP];
    float *out[GROUP];
    float start[GROUP];
    int64_t count;
} shared_nonzeros;

/* As a tile of one row, for the GROUP rows of `e`: reads at `in`, writes at out[..] + at, each vector
 * `out_col` floats on. */
typedef void (*group_function)(const shared_nonzeros *e, const float *in, int64_t at, int64_t out_col, int first);

/* The function for `cols` vectors, at most MAX_GROUP_COLS. */
group_function group_kernel(int64_t cols);

/* Likewise over bfloat16; sums are floats, those of a row side by side. */
typedef struct {
    const int32_t *offset;
    const float *value[GROUP];
    bf16 *out[GROUP];
    float *sums[GROUP]; /* read where the product `goes_on`, else it begins with `start`; */
    float start[GROUP];
    int goes_on, stays; /* written where it `stays`, else it is rounded, to `out` */
    int64_t count;
} shared_nonzeros_bf16;

/* `sums_at`: of the first vector, in each row's sums. */
typedef void (*group_function_bf16)(const shared_nonzeros_bf16 *e, const bf16 *in, int64_t at, int64_t out_col,
                                    int64_t sums_at);

/* As tile_kernel_bf16 and tile_kernel_dot. */
group_function_bf16 group_kernel_bf16(int64_t cols, int finite);
group_function_bf16 group_kernel_dot(int64_t cols);

#endif
