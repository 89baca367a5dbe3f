/* The inner loop of every sparse product: one row of nonzeros against a tile of vectors.
 *
 * A tile is `rows` by `cols` vectors, all held in registers. Each nonzero adds its multiple of as many
 * vectors of the scratch buffer, at its own offset: one broadcast for the whole tile, and every
 * multiplication reads its operand straight from memory.
 */
#ifndef SWATFX_TILE_H
#define SWATFX_TILE_H

#include "common.h"

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

/* Rows of a group, which share their offsets (structured sparsity): each vector that is read serves
 * all of them. */
enum { GROUP = 4 };
#if defined(__AVX512F__)
enum { MAX_GROUP_COLS = 6 };
#else
enum { MAX_GROUP_COLS = 1 };
#endif

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

#endif
