/* The inner loop over bfloat16: one function a tile shape, as in tile.c, with sums in floats.
 *
 * A register holds twice as many elements as floats. Widened by a shift or a mask, those at even places make
 * one vector of sums, those at odd places the other; a word of the dot product (tile_bf16_dot.c, which
 * includes this file) does the same without widening. Their order is put right when a tile is stored.
 *
 * Stands on tile_bf16_dot.c.
 */
#include "tile.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif

#define ONE static inline __attribute__((always_inline))

/* Floats of a native register, and the permutations that part and join even and odd places. */
#if defined(__AVX512F__)
enum { R = 16 };
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define FRONT 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define BACK 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
enum { R = 8 };
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#define FRONT 0, 8, 1, 9, 2, 10, 3, 11
#define BACK 4, 12, 5, 13, 6, 14, 7, 15
#else
enum { R = 4 };
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#define FRONT 0, 4, 1, 5
#define BACK 2, 6, 3, 7
#endif
enum { MAX_CHUNKS = MAX_TILE * LANES / (2 * R), SMALL_CHUNKS = 2 };

typedef float reg __attribute__((vector_size(4 * R)));
typedef int32_t words __attribute__((vector_size(4 * R)));
typedef uint32_t bits __attribute__((vector_size(4 * R)));
typedef float unaligned_reg __attribute__((vector_size(4 * R), aligned(4), may_alias));
typedef uint32_t unaligned_bits __attribute__((vector_size(4 * R), aligned(2), may_alias));

ONE reg all(float x) { return x - (reg){0}; }

/* 2 R elements; only the first R of them where `half`: nothing behind those is read. */
ONE bits chunk_at(const bf16 *p, const int half) {
#if defined(__AVX512F__)
    if (half) return (bits)_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)p));
#endif
    (void)half;
    return *(const unaligned_bits *)p;
}

/* A weight, as both kinds of product want it. */
typedef struct {
#if defined(SWATFX_DOT)
    bits even, odd;
#else
    reg value;
#endif
} factor;

ONE factor factor_of(float w) {
#if defined(SWATFX_DOT)
    uint32_t word;
    memcpy(&word, &w, sizeof word);
    const bits odd = word - (bits){0};
    return (factor){odd >> 16, odd};
#else
    return (factor){all(w)};
#endif
}

ONE void multiply_add(reg *even, reg *odd, factor w, bits x) {
#if defined(SWATFX_DOT)
    *even = (reg)_mm512_dpbf16_ps((__m512)*even, (__m512bh)x, (__m512bh)w.even);
    *odd = (reg)_mm512_dpbf16_ps((__m512)*odd, (__m512bh)x, (__m512bh)w.odd);
#else
    *even += w.value * (reg)(x << 16);
    *odd += w.value * (reg)(x & 0xffff0000);
#endif
}

/* Sums in the order of elements, to the two vectors of them and back. */
ONE void load_sums(const float *p, reg *even, reg *odd, const int half) {
    const reg front = *(const unaligned_reg *)p;
    reg back = all(0);
    if (!half) back = *(const unaligned_reg *)(p + R);
    *even = SHUFFLE(front, back, EVEN);
    *odd = SHUFFLE(front, back, ODD);
}

ONE void store_sums(float *p, reg even, reg odd, const int half) {
    *(unaligned_reg *)p = SHUFFLE(even, odd, FRONT);
    if (!half) *(unaligned_reg *)(p + R) = SHUFFLE(even, odd, BACK);
}

/* To the nearest, ties to even, in the upper half of each word; NaN stays one. */
ONE bits rounded(reg v) {
    const bits x = (bits)v, near = x + (x >> 16 & 1) + 0x7fff, nan = (bits)(v != v);
    return ((x | 0x400000) & nan) | (near & ~nan);
}

/* Both rounded, each element at its place. */
ONE bits joined(reg even, reg odd) {
#if defined(SWATFX_DOT)
    const __m512i front = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (bits)_mm512_permutexvar_epi16(front, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#else
    return rounded(even) >> 16 | (rounded(odd) & 0xffff0000);
#endif
}

/* The chunk's elements, a column of LANES of them `col` behind the one before. */
ONE void store_chunk(bf16 *out, int64_t col, reg even, reg odd, const int half, int stream) {
    const bits x = joined(even, odd);
#if defined(__AVX512F__)
    const __m512i v = (__m512i)x;
    if (!half && col == LANES) {
        if (stream)
            _mm512_stream_si512((__m512i *)out, v);
        else
            _mm512_storeu_si512(out, v);
        return;
    }
    _mm256_storeu_si256((__m256i *)out, _mm512_castsi512_si256(v));
    if (!half) _mm256_storeu_si256((__m256i *)(out + col), _mm512_extracti64x4_epi64(v, 1));
#else
    (void)col, (void)half, (void)stream;
    *(unaligned_bits *)out = x;
#endif
}

ONE void run(const int rows, const int cols, nonzeros e, tile_at_bf16 at, float start) {
    const int chunks = (cols * LANES + 2 * R - 1) / (2 * R), size = rows * chunks, ragged = cols * LANES % (2 * R) != 0;
    const int64_t in_row = at.in_row;
    reg even[MAX_CHUNKS], odd[MAX_CHUNKS];
#define EACH_CHUNK(...)                                                                                       \
    _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++) {                                                  \
        _Pragma("GCC unroll 16") for (int c = 0; c < chunks; c++) {                                           \
            const int i = r * chunks + c, half = ragged && c == chunks - 1;                                   \
            __VA_ARGS__;                                                                                      \
        }                                                                                                     \
    }
    if (at.from) {
        EACH_CHUNK(load_sums(at.from + r * at.sums_row + c * 2 * R, &even[i], &odd[i], half))
    } else {
#pragma GCC unroll 32
        for (int i = 0; i < size; i++) even[i] = odd[i] = all(start);
    }
    int64_t k = 0;
    if (size <= SMALL_CHUNKS) { /* too few sums to hide what a multiply-add takes: twice as many */
        reg more_even[SMALL_CHUNKS], more_odd[SMALL_CHUNKS];
#pragma GCC unroll 2
        for (int i = 0; i < size; i++) more_even[i] = more_odd[i] = all(0);
        for (; k + 1 < e.count; k += 2) {
            const factor one = factor_of(e.value[k]), other = factor_of(e.value[k + 1]);
            const bf16 *in = at.in + e.offset[k], *next = at.in + e.offset[k + 1];
            EACH_CHUNK({
                multiply_add(&even[i], &odd[i], one, chunk_at(in + r * in_row + c * 2 * R, half));
                multiply_add(&more_even[i], &more_odd[i], other, chunk_at(next + r * in_row + c * 2 * R, half));
            })
        }
#pragma GCC unroll 2
        for (int i = 0; i < size; i++) even[i] += more_even[i], odd[i] += more_odd[i];
    }
    for (; k < e.count; k++) {
        const factor w = factor_of(e.value[k]);
        const bf16 *in = at.in + e.offset[k];
        EACH_CHUNK(multiply_add(&even[i], &odd[i], w, chunk_at(in + r * in_row + c * 2 * R, half)))
    }
    if (at.sums) {
        EACH_CHUNK(store_sums(at.sums + r * at.sums_row + c * 2 * R, even[i], odd[i], half))
        return;
    }
    EACH_CHUNK({
        const int64_t first = (int64_t)c * 2 * R; /* of the row's elements */
        bf16 *to = at.out + r * at.out_row + first / LANES * at.out_col + first % LANES;
        store_chunk(to, at.out_col, even[i], odd[i], half, at.stream);
    })
}

#define TILE(ROWS, COLS)                                                                      \
    static void tile_##ROWS##_##COLS(nonzeros e, tile_at_bf16 at, float start) { \
        run(ROWS, COLS, e, at, start);                                                        \
    }
#define NAME(ROWS, COLS) [ROWS][COLS] = tile_##ROWS##_##COLS,

#define SMALL(X) X(1, 1) X(1, 2) X(1, 3) X(2, 1) X(3, 1)
#define MIDDLE(X) X(1, 4) X(1, 5) X(1, 6) X(2, 2) X(2, 3) X(3, 2) X(4, 1)
#define LARGE(X) \
    X(1, 7) X(1, 8) X(1, 9) X(1, 10) X(1, 11) X(1, 12) X(1, 13) X(1, 14) X(1, 15) X(1, 16) \
    X(1, 17) X(1, 18) X(1, 19) X(1, 20) X(1, 21) X(1, 22) X(1, 23) X(1, 24) X(1, 25) \
    X(1, 26) X(1, 27) X(1, 28) X(2, 4) X(2, 5) X(2, 6) X(2, 7) X(2, 8) X(2, 9) X(2, 10) \
    X(2, 11) X(2, 12) X(2, 13) X(2, 14) X(3, 3) X(3, 4) X(3, 5) X(3, 6) X(3, 7) X(3, 8) \
    X(4, 2) X(4, 3) X(4, 4) X(4, 5) X(4, 6)

#if defined(__AVX512F__)
#define SHAPES(X) SMALL(X) MIDDLE(X) LARGE(X)
#elif defined(__AVX__) || defined(__aarch64__)
#define SHAPES(X) SMALL(X) MIDDLE(X)
#else
#define SHAPES(X) SMALL(X)
#endif

SHAPES(TILE)
static const tile_function_bf16 TILES[MAX_TILE_ROWS + 1][29] = {SHAPES(NAME)};

/* Rows of a group. What they share is read once, and widened once; or, as the dot product takes two pairs,
 * interleaved once with what their next nonzero reads. Both elements of a word then count: half as many
 * products, of sums in the order that interleaving leaves. */
#if defined(SWATFX_DOT)
ONE void to_interleaved(reg *even, reg *odd) {
    const __m512 e = (__m512)*even, o = (__m512)*odd;
    *even = (reg)_mm512_unpacklo_ps(e, o);
    *odd = (reg)_mm512_unpackhi_ps(e, o);
}

ONE void from_interleaved(reg *low, reg *high) {
    const __m512 l = (__m512)*low, h = (__m512)*high;
    *low = (reg)_mm512_shuffle_ps(l, h, 0x88);
    *high = (reg)_mm512_shuffle_ps(l, h, 0xdd);
}

ONE bits pair_of(float one, float other) {
    uint32_t first, second;
    memcpy(&first, &one, sizeof first);
    memcpy(&second, &other, sizeof second);
    return (first >> 16 | second) - (bits){0};
}
#endif

ONE void run_group(const int cols, const shared_nonzeros_bf16 *e, const bf16 *from, int64_t at, int64_t out_col,
                   int64_t sums_at) {
    enum { MOST = (MAX_GROUP_COLS * LANES + 2 * R - 1) / (2 * R) };
    const int chunks = (cols * LANES + 2 * R - 1) / (2 * R), ragged = cols * LANES % (2 * R) != 0;
    reg even[GROUP][MOST], odd[GROUP][MOST];
#define EACH_SUM(...)                                                                                         \
    _Pragma("GCC unroll 4") for (int g = 0; g < GROUP; g++) {                                                 \
        _Pragma("GCC unroll 16") for (int c = 0; c < chunks; c++) {                                           \
            const int half = ragged && c == chunks - 1;                                                       \
            __VA_ARGS__;                                                                                      \
        }                                                                                                     \
    }
    EACH_SUM({
        if (e->goes_on)
            load_sums(e->sums[g] + sums_at + c * 2 * R, &even[g][c], &odd[g][c], half);
        else
            even[g][c] = odd[g][c] = all(e->start[g]);
    })
    const float *v0 = e->value[0], *v1 = e->value[1], *v2 = e->value[2], *v3 = e->value[3];
    int64_t k = 0;
#if defined(SWATFX_DOT)
    EACH_SUM((void)half; to_interleaved(&even[g][c], &odd[g][c]))
    for (; k < e->count; k += 2) {
        const int alone = k + 1 == e->count; /* the last of an odd number is read twice, and counts once */
        const bf16 *in = from + e->offset[k], *next = from + e->offset[k + !alone];
#define PAIR(v) alone ? pair_of(v[k], 0) : pair_of(v[k], v[k + 1])
        const bits w[GROUP] = {PAIR(v0), PAIR(v1), PAIR(v2), PAIR(v3)};
#undef PAIR
#pragma GCC unroll 16
        for (int c = 0; c < chunks; c++) {
            const int half = ragged && c == chunks - 1;
            const __m512i x = (__m512i)chunk_at(in + c * 2 * R, half), y = (__m512i)chunk_at(next + c * 2 * R, half);
            const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(x, y), high = (__m512bh)_mm512_unpackhi_epi16(x, y);
#pragma GCC unroll 4
            for (int g = 0; g < GROUP; g++) {
                even[g][c] = (reg)_mm512_dpbf16_ps((__m512)even[g][c], low, (__m512bh)w[g]);
                odd[g][c] = (reg)_mm512_dpbf16_ps((__m512)odd[g][c], high, (__m512bh)w[g]);
            }
        }
    }
    EACH_SUM((void)half; from_interleaved(&even[g][c], &odd[g][c]))
#else
    for (; k < e->count; k++) {
        const bf16 *in = from + e->offset[k];
        const reg w[GROUP] = {all(v0[k]), all(v1[k]), all(v2[k]), all(v3[k])};
#pragma GCC unroll 16
        for (int c = 0; c < chunks; c++) {
            const bits x = chunk_at(in + c * 2 * R, ragged && c == chunks - 1);
            const reg low = (reg)(x << 16), high = (reg)(x & 0xffff0000);
#pragma GCC unroll 4
            for (int g = 0; g < GROUP; g++) even[g][c] += w[g] * low, odd[g][c] += w[g] * high;
        }
    }
#endif
    if (e->stays) {
        EACH_SUM(store_sums(e->sums[g] + sums_at + c * 2 * R, even[g][c], odd[g][c], half))
        return;
    }
    EACH_SUM({
        const int64_t first = (int64_t)c * 2 * R;
        bf16 *to = e->out[g] + at + first / LANES * out_col + first % LANES;
        store_chunk(to, out_col, even[g][c], odd[g][c], half, 0);
    })
}

#define GROUPED(C)                                                                                              \
    static void group_##C(const shared_nonzeros_bf16 *e, const bf16 *in, int64_t at, int64_t out_col,           \
                          int64_t sums_at) {                                                                    \
        run_group(C, e, in, at, out_col, sums_at);                                                              \
    }

GROUP_WIDTHS(GROUPED)

static const group_function_bf16 GROUPS[MAX_GROUP_COLS + 1] = {GROUP_WIDTHS(GROUP_NAME)};

#if defined(SWATFX_DOT)
tile_function_bf16 tile_kernel_dot(int64_t rows, int64_t cols) { return TILES[rows][cols]; }
group_function_bf16 group_kernel_dot(int64_t cols) { return GROUPS[cols]; }
#else
tile_function_bf16 tile_kernel_bf16(int64_t rows, int64_t cols, int finite) {
    const tile_function_bf16 dot = finite ? tile_kernel_dot(rows, cols) : NULL;
    return dot ? dot : TILES[rows][cols];
}

group_function_bf16 group_kernel_bf16(int64_t cols, int finite) {
    const group_function_bf16 dot = finite ? group_kernel_dot(cols) : NULL;
    return dot ? dot : GROUPS[cols];
}
#endif
