/* Memory orders of an activation: transposing copies between them.
 *
 * Every change of layout is a batch of transpositions of a matrix with strides of its own (see
 * kernels/layout.py). A tile of floats is TILE x TILE and goes through as many registers, one of bfloat16
 * is in tiles_bf16.h; a task is a run of matrices by a run of columns, so that neighbouring tiles write,
 * and read, the lines next to each other.
 *
 * Stands on no other .c file.
 */
#include "exports.h"
#include "pieces.h"

#if defined(SWATFX_BF16)
#include "tiles_bf16.h"
#else
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (tile_index){__VA_ARGS__})
#endif

/* A shuffle wider than the machine's registers would be taken apart element by element: the tile is
 * as wide as they are. STAGE(d, ...) exchanges the off-diagonal halves of all blocks of 2d x 2d. */
#if defined(__AVX512F__)
enum { TILE = 16 };
typedef int32_t tile_index __attribute__((vector_size(64)));
typedef float tile_row __attribute__((vector_size(64)));
typedef float tile_loaded __attribute__((vector_size(64), aligned(4), may_alias));
#define STAGES                                                                                      \
    STAGE(8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),                              \
          (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))                           \
    STAGE(4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),                            \
          (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))                             \
    STAGE(2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),                            \
          (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))                             \
    STAGE(1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),                           \
          (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#elif defined(__AVX__)
enum { TILE = 8 };
typedef int32_t tile_index __attribute__((vector_size(32)));
typedef float tile_row __attribute__((vector_size(32)));
typedef float tile_loaded __attribute__((vector_size(32), aligned(4), may_alias));
#define STAGES                                                                                      \
    STAGE(4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))                              \
    STAGE(2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))                              \
    STAGE(1, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
#else
enum { TILE = 4 };
typedef int32_t tile_index __attribute__((vector_size(16)));
typedef float tile_row __attribute__((vector_size(16)));
typedef float tile_loaded __attribute__((vector_size(16), aligned(4), may_alias));
#define STAGES                                                                                      \
    STAGE(2, (0, 1, 4, 5), (2, 3, 6, 7))                                                            \
    STAGE(1, (0, 4, 2, 6), (1, 5, 3, 7))
#endif

#define LIST(...) __VA_ARGS__
#define STAGE(d, low, high)                                                                         \
    _Pragma("GCC unroll 16") for (int i = 0; i < TILE; i++) if (!(i & d)) {                         \
        tile_row a = row[i], b = row[i + d];                                                        \
        row[i] = SHUFFLE(a, b, LIST low);                                                           \
        row[i + d] = SHUFFLE(a, b, LIST high);                                                      \
    }

INLINE void transpose_tile(const float *in, int64_t in_row, float *out, int64_t out_row, int past) {
    tile_row row[TILE];
    _Pragma("GCC unroll 16") for (int i = 0; i < TILE; i++) {
        row[i] = *(const tile_loaded *)(in + i * in_row);
    }
    STAGES
    _Pragma("GCC unroll 16") for (int i = 0; i < TILE; i++) {
#if defined(__AVX512F__)
        if (past) {
            put_past(out + i * out_row, (wide){(__m512)row[i]});
            continue;
        }
#endif
        *(tile_loaded *)(out + i * out_row) = row[i];
    }
    (void)past; /* a narrower tile's row is no whole line */
}
enum { TALLEST = TILE };
#endif

static void transpose_edge(const elem *in, int64_t in_row, elem *out, int64_t out_row,
                           int64_t rows, int64_t cols) {
    for (int64_t j = 0; j < cols; j++) {
        for (int64_t i = 0; i < rows; i++) {
            out[j * out_row + i] = in[i * in_row + j];
        }
    }
}

enum { A_LINE = 64 / sizeof(elem) };

INLINE void fetch_rows(const elem *at, int64_t row, const int rows) {
    _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++) __builtin_prefetch(at + i * row, 0, 3);
}

/* All whole tiles of some height, from row i on, of columns [j, end). */
#define EACH_TILE(height, transpose)                                                                \
    for (; i + (height) <= rows; i += (height)) {                                                   \
        if (ahead) fetch_rows(in + i * in_row + j + ahead, in_row, height);                         \
        for (int64_t c = j; c + TILE <= end; c += TILE) {                                           \
            transpose(in + i * in_row + c, in_row, out + c * out_row + i, out_row, past);           \
        }                                                                                           \
    }

/* Columns [j, end) of one matrix of `rows` rows, at most a line of them: out[j][i] = in[i][j]. `lines`:
 * whether whole lines of `out` are written. */
INLINE void transpose_columns(const elem *in, int64_t in_row, elem *out, int64_t out_row,
                              int64_t rows, int64_t j, int64_t end, int64_t ahead, int lines,
                              const int past) {
    int64_t i = 0, tiled = j + (end - j) / TILE * TILE;
#if defined(SWATFX_BF16)
#if defined(__AVX512BW__)
    if (lines || !past) EACH_TILE(32, transpose32)
#endif
#if defined(__AVX2__)
    EACH_TILE(16, transpose16)
#endif
    EACH_TILE(8, transpose8)
#else
    EACH_TILE(TILE, transpose_tile)
#endif
    (void)lines; /* which only the largest tile of two-byte elements asks for */
    transpose_edge(in + i * in_row + j, in_row, out + j * out_row + i, out_row, rows - i, tiled - j);
    transpose_edge(in + tiled, in_row, out + tiled * out_row, out_row, rows, end - tiled);
}

void TYPED(swatfx_transpose)(const elem *in, elem *out, int64_t batch, int64_t rows, int64_t cols,
                             int64_t in_row, int64_t out_row, int64_t in_batch, int64_t out_batch,
                             int threads) {
    enum { COLUMNS = 256 };
    /* Whole lines written past the caches: half the time from 8 MB on, and never more. */
    int past = batch * rows * cols * (int64_t)sizeof *out >= 1 << 22 && (uintptr_t)out % 64 == 0 &&
               out_row % LANES == 0 && out_batch % LANES == 0;
    int lines = TALLEST * sizeof(elem) >= 64 && out_row % A_LINE == 0 && out_batch % A_LINE == 0;
    /* What is read comes by whole lines, unless half lines are written that are not side by side: of such
     * few stay open. */
    int64_t step = HALF && (!past || lines || out_row == LANES) ? A_LINE : TILE;
    /* Matrices inside each other, which have neighbouring lines, go together. And no processor
     * follows as many rows at once by itself: a tile fetches for one soon to come. */
    int64_t woven = 0 < in_batch && in_batch < in_row, matrices = woven ? 16 : 1;
    int64_t ahead = !past ? 0 : woven ? 2 * in_batch : 128;
    int64_t strips = (cols + COLUMNS - 1) / COLUMNS, groups = (batch + matrices - 1) / matrices;
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * rows * cols > 1 << 14)
    for (int64_t task = 0; task < groups * strips; task++) {
        int64_t b_begin = task / strips * matrices, b_end = min64(batch, b_begin + matrices);
        int64_t j_begin = task % strips * COLUMNS, j_end = min64(cols, j_begin + COLUMNS);
        for (int64_t j = j_begin; j < j_end; j += step) {
            for (int64_t b = b_begin; b < b_end; b++) {
                const elem *from = in + b * in_batch;
                elem *to = out + b * out_batch;
                int64_t end = min64(j_end, j + step);
                if (past) {
                    transpose_columns(from, in_row, to, out_row, rows, j, end, ahead, lines, 1);
                } else {
                    transpose_columns(from, in_row, to, out_row, rows, j, end, ahead, lines, 0);
                }
            }
        }
        settle();
    }
}
