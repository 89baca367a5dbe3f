/* Masks: bytes of 0 and 1 to bits and back, and a tensor's Top-K as a dense tensor.
 *
 * Stands on no other .c file.
 */
#include "exports.h"
#include "pack.h"

int64_t swatfx_bits_of_mask(const uint8_t *mask, int64_t n, uint8_t *bits, int threads) {
    int64_t whole = n / 8, set = 0;
    threads = threads_for(n, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+ : set)
    for (int64_t i = 0; i < whole; i++) {
        uint64_t eight;
        memcpy(&eight, mask + 8 * i, 8);
        /* Each product's bits meet no other's: byte j lands on bit 56 + j, and the sum on top. */
        bits[i] = (uint8_t)(eight * 0x0102040810204080u >> 56);
        set += (int64_t)(eight * 0x0101010101010101u >> 56);
    }
    if (whole * 8 < n) bits[whole] = 0;
    for (int64_t i = whole * 8; i < n; i++) {
        bits[whole] |= (uint8_t)(mask[i] << (i % 8));
        set += mask[i];
    }
    return set;
}

void swatfx_mask_of_bits(const uint8_t *bits, int64_t n, uint8_t *mask, int threads) {
    int64_t whole = n / 8;
    threads = threads_for(n, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < whole; i++) {
        /* The byte eight times, one bit left of each; adding carries that bit to the top. */
        uint64_t eight = bits[i] * 0x0101010101010101u & 0x8040201008040201u;
        eight = (eight + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
        memcpy(mask + 8 * i, &eight, 8);
    }
    for (int64_t i = whole * 8; i < n; i++) mask[i] = bits[whole] >> (i % 8) & 1;
}

void swatfx_keep_top(
    const void *x, int bytes, int64_t n, const void *threshold, int32_t nan, void *out, int threads
) {
    int32_t bound = bound_of(threshold, 0, bytes, nan, 0);
    threads = threads_for(n, threads);
    if (bytes == 4) {
        const int32_t *in = x;
        int32_t *kept = out;
#pragma omp parallel for simd num_threads(threads) if (parallel : threads > 1)
        for (int64_t i = 0; i < n; i++) kept[i] = (in[i] & 0x7fffffff) >= bound ? in[i] : 0;
    } else {
        const int16_t *in = x;
        int16_t *kept = out;
#pragma omp parallel for simd num_threads(threads) if (parallel : threads > 1)
        for (int64_t i = 0; i < n; i++) kept[i] = (in[i] & 0x7fff) >= bound ? in[i] : 0;
    }
}

void swatfx_keep_bits(const void *x, int bytes, int64_t n, const uint8_t *bits, void *out, int threads) {
    threads = threads_for(n, threads);
    /* All ones where the bit is set: eight elements a byte. */
#define KEEP(type)                                                                                     \
    const type *in = x;                                                                                \
    type *kept = out;                                                                                  \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t i = 0; i < n / 8; i++) { \
        for (int j = 0; j < 8; j++) kept[8 * i + j] = in[8 * i + j] & (type)-(bits[i] >> j & 1);       \
    }                                                                                                  \
    for (int64_t i = n / 8 * 8; i < n; i++) kept[i] = in[i] & (type)-(bits[i / 8] >> i % 8 & 1);
    if (bytes == 4) {
        KEEP(int32_t)
    } else {
        KEEP(int16_t)
    }
#undef KEEP
}
