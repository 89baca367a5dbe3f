/* Transposing tiles of two-byte elements: eight columns of 8, 16 or 32 rows.
 *
 * A register of 16, 32 or 64 bytes is as many pieces of eight elements, each of another row: eight of
 * them, interleaved three times within their pieces, are eight columns. Nothing crosses a piece but when
 * it is read, from memory, which costs no shuffle.
 */
#ifndef SWATFX_TILES_BF16_H
#define SWATFX_TILES_BF16_H

#include "lanes.h"

/* Columns of a tile, and rows of the tallest. */
#if defined(__AVX512BW__)
enum { TILE = 8, TALLEST = 32 };
#elif defined(__AVX2__)
enum { TILE = 8, TALLEST = 16 };
#else
enum { TILE = 8, TALLEST = 8 };
#endif

typedef uint16_t piece __attribute__((vector_size(16)));
typedef uint16_t piece_in_memory __attribute__((vector_size(16), aligned(2), may_alias));

/* The `low` and the `high` shuffle of registers i and i + 4, side by side: three times, and what was
 * element c of register r is element r of register c. */
#define INTERLEAVE(row, type, low, high)                                                            \
    _Pragma("GCC unroll 3") for (int stage = 0; stage < 3; stage++) {                               \
        type next[TILE];                                                                            \
        _Pragma("GCC unroll 4") for (int i = 0; i < TILE / 2; i++) {                                \
            next[2 * i] = low(row[i], row[i + TILE / 2]);                                           \
            next[2 * i + 1] = high(row[i], row[i + TILE / 2]);                                      \
        }                                                                                           \
        _Pragma("GCC unroll 8") for (int i = 0; i < TILE; i++) row[i] = next[i];                    \
    }

#if defined(__clang__)
#define PIECE_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define PIECE_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define PIECE_LOW(a, b) __builtin_shuffle(a, b, (piece){0, 8, 1, 9, 2, 10, 3, 11})
#define PIECE_HIGH(a, b) __builtin_shuffle(a, b, (piece){4, 12, 5, 13, 6, 14, 7, 15})
#endif

INLINE void transpose8(const bf16 *in, int64_t in_row, bf16 *out, int64_t out_row, int past) {
    piece row[TILE];
    _Pragma("GCC unroll 8") for (int i = 0; i < TILE; i++) {
        row[i] = *(const piece_in_memory *)(in + i * in_row);
    }
    INTERLEAVE(row, piece, PIECE_LOW, PIECE_HIGH)
    _Pragma("GCC unroll 8") for (int i = 0; i < TILE; i++) {
        *(piece_in_memory *)(out + i * out_row) = row[i];
    }
    (void)past; /* too little of a line */
}

#if defined(__AVX2__)
#include <immintrin.h>

INLINE __m128i piece_at(const bf16 *p) { return _mm_loadu_si128((const __m128i *)p); }

/* `past`: past the caches, to rows that begin on lines, or on halves of them. */
INLINE void transpose16(const bf16 *in, int64_t in_row, bf16 *out, int64_t out_row, int past) {
    __m256i row[TILE];
    _Pragma("GCC unroll 8") for (int i = 0; i < TILE; i++) {
        row[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(piece_at(in + i * in_row)),
                                         piece_at(in + (i + 8) * in_row), 1);
    }
    INTERLEAVE(row, __m256i, _mm256_unpacklo_epi16, _mm256_unpackhi_epi16)
    _Pragma("GCC unroll 8") for (int i = 0; i < TILE; i++) {
        __m256i *to = (__m256i *)(out + i * out_row);
        if (past) {
            _mm256_stream_si256(to, row[i]);
        } else {
            _mm256_storeu_si256(to, row[i]);
        }
    }
}
#endif

#if defined(__AVX512BW__)
INLINE void transpose32(const bf16 *in, int64_t in_row, bf16 *out, int64_t out_row, int past) {
    __m512i row[TILE];
    _Pragma("GCC unroll 8") for (int i = 0; i < TILE; i++) {
        const bf16 *at = in + i * in_row;
        __m256i low = _mm256_castsi128_si256(piece_at(at)), high;
        low = _mm256_inserti128_si256(low, piece_at(at + 8 * in_row), 1);
        high = _mm256_castsi128_si256(piece_at(at + 16 * in_row));
        high = _mm256_inserti128_si256(high, piece_at(at + 24 * in_row), 1);
        row[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    INTERLEAVE(row, __m512i, _mm512_unpacklo_epi16, _mm512_unpackhi_epi16)
    _Pragma("GCC unroll 8") for (int i = 0; i < TILE; i++) {
        __m512i *to = (__m512i *)(out + i * out_row);
        if (past) {
            _mm512_stream_si512(to, row[i]);
        } else {
            _mm512_storeu_si512(to, row[i]);
        }
    }
}
#endif

#endif
