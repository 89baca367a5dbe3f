/* Values where a bitmask says: into a dense tensor, or out of one.
 *
 * Stands on no other .c file.
 */
#include "exports.h"
#include "pack.h"

enum { STREAMED = 1 << 24 }; /* bytes */

#if defined(__AVX512F__)
/* All sixteen, past the caches; `i` is a multiple of sixteen and x is aligned to 64 bytes. */
static inline void stream_lanes(void *x, int64_t i, int bytes, __m512i lanes) {
    if (bytes == 4)
        _mm512_stream_si512((__m512i *)((int32_t *)x + i), lanes);
    else
        _mm256_stream_si256((__m256i *)((uint16_t *)x + i), _mm512_cvtepi32_epi16(lanes));
}
#endif

/* Word w of the mask of n elements; bits behind the last do not count. */
static inline uint64_t word_in(const uint64_t *mask, int64_t w, int64_t n) {
    int64_t count = n - w * WORD;
    return count < WORD ? mask[w] & (((uint64_t)1 << count) - 1) : mask[w];
}

static int64_t count_bits(const uint64_t *mask, int64_t n, int64_t from, int64_t to) {
    int64_t count = 0;
    for (int64_t w = from; w < to; w++) count += __builtin_popcountll(word_in(mask, w, n));
    return count;
}

/* Elements of a tensor of n, words [from, to) of its mask, into values from `at` on. */
static inline void gather(
    const void *x, int bytes, int64_t n, const uint64_t *mask, int64_t from, int64_t to, void *values,
    int64_t at
) {
    for (int64_t w = from; w < to; w++) {
        uint64_t word = word_in(mask, w, n);
#if defined(__AVX512F__)
        for (int e = 0; e < WORD; e += WIDE) {
            __mmask16 kept = (__mmask16)(word >> e);
            int count = __builtin_popcount(kept);
            __m512i lanes = load_lanes(x, w * WORD + e, bytes, kept);
            store_lanes(values, at, bytes, first_lanes(count), _mm512_maskz_compress_epi32(kept, lanes));
            at += count;
        }
#else
        for (; word; word &= word - 1) move_one(values, at++, x, w * WORD + __builtin_ctzll(word), bytes);
#endif
    }
}

/* The inverse; zero where nothing was kept. What no cache could hold until it is read is written past
 * them, which spares reading the lines first. */
static inline void scatter(
    void *x, int bytes, int64_t n, const uint64_t *mask, int64_t from, int64_t to, const void *values,
    int64_t at
) {
#if defined(__AVX512F__)
    int streams = n * bytes >= STREAMED && (uintptr_t)x % 64 == 0;
#endif
    for (int64_t w = from; w < to; w++) {
        uint64_t word = word_in(mask, w, n);
        int64_t i = w * WORD, count = min64(WORD, n - i);
#if defined(__AVX512F__)
        for (int e = 0; e < WORD; e += WIDE) {
            __mmask16 kept = (__mmask16)(word >> e);
            int here = __builtin_popcount(kept);
            __m512i lanes = load_lanes(values, at, bytes, first_lanes(here));
            lanes = _mm512_maskz_expand_epi32(kept, lanes);
            if (streams && count == WORD)
                stream_lanes(x, i + e, bytes, lanes);
            else
                store_lanes(x, i + e, bytes, first_lanes(count - e), lanes);
            at += here;
        }
#else
        memset((char *)x + i * bytes, 0, (size_t)(count * bytes));
        for (; word; word &= word - 1) move_one(x, i + __builtin_ctzll(word), values, at++, bytes);
#endif
    }
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

/* Runs gather (is_packing) or scatter over the threads' parts, each from its own place in values. */
static int64_t move_kept(
    void *x, int bytes, int64_t n, const uint64_t *mask, void *values, int64_t wanted, int is_packing,
    int threads
) {
    int64_t words = words_of(n), total = 0;
    threads = threads_for(n, threads);
    int64_t *counts = calloc((size_t)threads, sizeof *counts);
    if (!counts) return -1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int parts = omp_get_num_threads(), part = omp_get_thread_num();
        int64_t from, to;
        own_words(words, &from, &to);
        counts[part] = count_bits(mask, n, from, to);
#pragma omp barrier
        int64_t at = 0, sum = 0;
        for (int p = 0; p < parts; p++) {
            at += p < part ? counts[p] : 0;
            sum += counts[p];
        }
        if (part == 0) total = sum;
        if (sum == wanted) {
            if (is_packing && bytes == 4) gather(x, 4, n, mask, from, to, values, at);
            if (is_packing && bytes == 2) gather(x, 2, n, mask, from, to, values, at);
            if (!is_packing && bytes == 4) scatter(x, 4, n, mask, from, to, values, at);
            if (!is_packing && bytes == 2) scatter(x, 2, n, mask, from, to, values, at);
        }
    }
    free(counts);
    return total;
}

int64_t swatfx_gather(
    void *x, int bytes, int64_t n, const uint64_t *mask, void *values, int64_t count, int threads
) {
    return move_kept(x, bytes, n, mask, values, count, 1, threads);
}

int64_t swatfx_scatter(
    void *x, int bytes, int64_t n, const uint64_t *mask, void *values, int64_t count, int threads
) {
    return move_kept(x, bytes, n, mask, values, count, 0, threads);
}
