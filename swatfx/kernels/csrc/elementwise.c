/* ReLU and dropout with a bit an element, and their backward. The order of elements does not matter
 * here: a tensor is a run of `n`, cut into pieces of whole bytes of bits.
 *
 * Stands on no other .c file.
 */
#include "exports.h"
#include "pieces.h"

enum { CHUNK = 1 << 14 };

/* A parallel loop over chunks, with a statement for each piece of sixteen elements, `i` being where
 * in the tensor. */
#define EACH_CHUNK(n, threads, ...)                                                                 \
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (n > 2 * CHUNK)")            \
    for (int64_t chunk = 0; chunk < (n + CHUNK - 1) / CHUNK; chunk++) {                             \
        int64_t begin = chunk * CHUNK, length = min64(n - begin, CHUNK);                            \
        EACH_PIECE(begin, length, {                                                                 \
            int64_t at = begin + i;                                                                 \
            __VA_ARGS__;                                                                            \
        });                                                                                         \
        settle();                                                                                   \
    }

/* Bits that are or-ed begin as zeros: those of the last piece. */
static void clear_tail(uint8_t *bits, int64_t n) {
    int64_t whole = n / LANES * LANES / 8;
    if (n % LANES) memset(bits + whole, 0, (size_t)((n + 7) / 8 - whole));
}

void TYPED(swatfx_relu)(const elem *x, elem *y, uint8_t *bits, int64_t n, int threads) {
    int past = outgrows_cache(n) && on_line(y);
    clear_tail(bits, n);
    EACH_CHUNK(n, threads, {
        wide v = get_some(x + at, count, 0);
        mask keep = above_zero(v);
        put_bits(bits, at, count, to_bits(keep));
        put_result(y + at, only(keep, v), count, past);
    })
}

void TYPED(swatfx_relu_backward)(const elem *grad, const uint8_t *bits, elem *dx, int64_t n,
                          int threads) {
    int past = outgrows_cache(n) && on_line(dx);
    EACH_CHUNK(n, threads, {
        wide g = only(from_bits(get_bits(bits, at, count)), get_some(grad + at, count, 0));
        put_result(dx + at, g, count, past);
    })
}

void TYPED(swatfx_dropout)(const elem *x, elem *y, uint8_t *bits, float scale, int64_t n,
                    int threads) {
    wide factor = splat(scale);
    clear_tail(bits, n);
    EACH_CHUNK(n, threads, {
        wide drawn = get_some(y + at, count, 0);
        put_bits(bits, at, count, to_bits(above_zero(drawn)));
        put_some(y + at, mul(get_some(x + at, count, 0), mul(drawn, factor)), count);
    })
}

void TYPED(swatfx_dropout_backward)(const elem *grad, const uint8_t *bits, elem *dx, float scale,
                             int64_t n, int threads) {
    int past = outgrows_cache(n) && on_line(dx);
    wide factor = splat(scale);
    EACH_CHUNK(n, threads, {
        /* A product also where a bit is clear: zero times infinity is NaN. */
        wide noise = only(from_bits(get_bits(bits, at, count)), factor);
        put_result(dx + at, mul(get_some(grad + at, count, 0), noise), count, past);
    })
}
