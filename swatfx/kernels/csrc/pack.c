/* Packing by a bitmask: element i of a tensor is bit i mod 8 of byte i div 8.
 *
 * One pass makes the bits and stages the values that they keep; once the caller has made room for as
 * many, they are brought together. Values are moved, never computed with: what is 4 bytes wide is
 * float32, what is 2 bytes wide bfloat16 or float16.
 *
 * Stands on no other .c file.
 */
#include "exports.h"
#include "pack.h"

#if !defined(__AVX512F__)
/* Which of the 64 elements from `i` are not below their bounds. Eight rows of eight go bit by bit into
 * eight lanes: a matrix of bits that wants transposing, for want of an instruction that gathers signs. */
static inline uint64_t word_at(const void *x, int64_t i, int bytes, const int32_t *bounds) {
    int32_t lanes[8];
    for (int half = 0; half < 8; half += WIDE) {
        kvec bits = {0};
        for (int row = 0; row < 8; row++) {
            int e = 8 * row + half;
            bits |= (keys_at(x, i + e, bytes) >= *(const ukvec *)(bounds + e)) & (1 << row);
        }
        *(ukvec *)(lanes + half) = bits;
    }
    uint64_t word = 0, swapped;
    for (int lane = 0; lane < 8; lane++) word |= (uint64_t)lanes[lane] << 8 * lane;
    swapped = (word ^ (word >> 7)) & 0x00aa00aa00aa00aau;
    word ^= swapped ^ (swapped << 7);
    swapped = (word ^ (word >> 14)) & 0x0000cccc0000ccccu;
    word ^= swapped ^ (swapped << 14);
    swapped = (word ^ (word >> 28)) & 0x00000000f0f0f0f0u;
    return word ^ swapped ^ (swapped << 28);
}
#endif

/* Thresholds of groups: blocks of `rows` by `columns` elements, a column of a block a group. */
typedef struct {
    const void *thresholds; /* [blocks][columns], in the tensor's dtype */
    int bytes;
    int32_t nan; /* keys from here on are NaN */
    int64_t rows, columns;
    int64_t begin, end; /* of the block that is in the table */
    int32_t *table;     /* bounds of 64 elements from each column on */
    int32_t across[WORD];
} groups;

/* Zeros are never stored: 1 is the least bound. */
static int32_t bound_in(const groups *g, int64_t block, int64_t column) {
    return bound_of(g->thresholds, block * g->columns + column, g->bytes, g->nan, 1);
}

/* Bounds of the 64 elements from `i`, of which `count` exist. */
static inline const int32_t *bounds_at(groups *g, int64_t i, int64_t count) {
    if (i >= g->begin && i + count <= g->end)
        return g->table + (g->columns == 1 ? 0 : (i - g->begin) % g->columns);
    int64_t each = g->rows * g->columns, block = i / each, at = i - block * each;
    if (at + count <= each) {
        g->begin = block * each;
        g->end = g->begin + each;
        for (int64_t e = 0; e < g->columns + WORD; e++)
            g->table[e] = e < g->columns ? bound_in(g, block, e) : g->table[e - g->columns];
        return g->table + at % g->columns;
    }
    int64_t column = at % g->columns;
    for (int64_t e = 0; e < count; block++, at = 0, column = 0) {
        for (; e < count && at < each; e++, at++) {
            g->across[e] = bound_in(g, block, column);
            if (++column == g->columns) column = 0;
        }
    }
    return g->across;
}

/* Words [from, to) of the mask, and the values that they keep, written from element `from` * 64 of
 * `staged` on: as many as are read, so a whole vector may be written. Returns how many are kept. */
static inline int64_t pack_part(
    groups *g, const void *x, int bytes, int64_t n, int64_t from, int64_t to, uint64_t *mask, void *staged
) {
    int64_t at = from * WORD;
    for (int64_t w = from; w < to; w++) {
        int64_t i = w * WORD, count = min64(WORD, n - i);
        const int32_t *bounds = bounds_at(g, i, count);
        uint64_t word = 0;
        if (count < WORD) {
            for (int64_t e = 0; e < count; e++)
                word |= (uint64_t)(key_at(x, i + e, bytes) >= bounds[e]) << e;
        } else {
#if defined(__AVX512F__)
            for (int e = 0; e < WORD; e += WIDE) {
                __m512i keys = (__m512i)keys_at(x, i + e, bytes);
                __mmask16 kept = _mm512_cmpge_epi32_mask(keys, _mm512_loadu_si512(bounds + e));
                __m512i lanes = load_lanes(x, i + e, bytes, 0xffff);
                store_lanes(staged, at, bytes, 0xffff, _mm512_maskz_compress_epi32(kept, lanes));
                word |= (uint64_t)kept << e;
                at += __builtin_popcount(kept);
            }
            mask[w] = word;
            continue;
#else
            word = word_at(x, i, bytes, bounds);
#endif
        }
        mask[w] = word;
        for (; word; word &= word - 1) move_one(staged, at++, x, i + __builtin_ctzll(word), bytes);
    }
    return at - from * WORD;
}

int64_t swatfx_pack_top(
    const void *x, int bytes, int64_t n, const void *thresholds, int32_t nan, int64_t rows,
    int64_t columns, uint64_t *mask, void *staged, staging *parts, int threads
) {
    int64_t kept = 0, failed = 0;
    memset(parts, 0, (size_t)threads * sizeof *parts);
    threads = threads_for(n, threads);
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : kept, failed)
    {
        int64_t from, to;
        own_words(words_of(n), &from, &to);
        groups g = {thresholds, bytes, nan, rows, columns, 0, 0, NULL, {0}};
        g.table = malloc((size_t)(columns + WORD) * sizeof *g.table);
        if (!g.table)
            failed = 1;
        else if (bytes == 4)
            kept = pack_part(&g, x, 4, n, from, to, mask, staged);
        else
            kept = pack_part(&g, x, 2, n, from, to, mask, staged);
        parts[omp_get_thread_num()] = (staging){from * WORD, kept};
        free(g.table);
    }
    return failed ? -1 : kept;
}

void swatfx_pack_join(
    const void *staged, int bytes, const staging *parts, void *values, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        int64_t at = 0;
        if (!parts[part].count) continue;
        for (int before = 0; before < part; before++) at += parts[before].count;
        memcpy(
            (char *)values + at * bytes, (const char *)staged + parts[part].from * bytes,
            (size_t)(parts[part].count * bytes)
        );
    }
}
