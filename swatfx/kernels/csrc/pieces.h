/* A run of elements in pieces of sixteen: bits of masks, results that go past the caches.
 *
 * Bits are those of swatfx/tensors/bits.py: element i is bit i mod 8 of byte i div 8.
 */
#ifndef SWATFX_PIECES_H
#define SWATFX_PIECES_H

#include "lanes.h"

/* Writing past the caches (put_past; settle() before others may read) pays where a result is too
 * large to be still there when it is read: a quarter less time from 25 MB on, none at 12. */
INLINE int outgrows_cache(int64_t elements) {
    return elements * (int64_t)sizeof(elem) >= 1 << 24;
}
/* Where a piece of sixteen may be written so: on a line, or in bfloat16 on half of one. */
INLINE int on_line(const void *p) { return (uintptr_t)p % (LANES * sizeof(elem)) == 0; }

/* `past`: whether to write past the caches, if the run begins on a line. */
INLINE void put_result(elem *p, wide v, int count, int past) {
    if (past && count == LANES) {
        put_past(p, v);
    } else {
        put_some(p, v, count);
    }
}

/* Write `count` bits at element `at`. A byte shared with another run, perhaps another thread's, is
 * only ever or-ed: the buffer begins as zeros unless every run is a multiple of sixteen. */
INLINE void put_bits(uint8_t *bits, int64_t at, int count, uint32_t set) {
    if (count == LANES) {
        uint16_t whole = (uint16_t)set;
        memcpy(bits + at / 8, &whole, 2);
        return;
    }
    uint32_t shifted = (set & ((1u << count) - 1)) << (at & 7);
    for (uint8_t *byte = bits + at / 8; shifted; byte++, shifted >>= 8) {
        __atomic_fetch_or(byte, (uint8_t)shifted, __ATOMIC_RELAXED);
    }
}

INLINE uint32_t get_bits(const uint8_t *bits, int64_t at, int count) {
    uint32_t found = 0;
    if (count == LANES) {
        uint16_t whole;
        memcpy(&whole, bits + at / 8, 2);
        return whole;
    }
    for (int64_t byte = at / 8, shift = 0; 8 * byte < at + count; byte++, shift += 8) {
        found |= (uint32_t)bits[byte] << shift;
    }
    return found >> (at & 7);
}

/* Do a statement for every piece of a run of `length` elements that begins at element `start` of
 * its tensor: `i` is where in the run, `count` how many elements. Pieces of sixteen begin at whole
 * bytes of the tensor's bits; what is left over at both ends is smaller. */
#define EACH_PIECE(start, length, ...)                                                              \
    do {                                                                                            \
        int64_t i = 0, head = min64(-(start) & 7, length);                                          \
        if (head) {                                                                                 \
            const int count = (int)head;                                                            \
            __VA_ARGS__;                                                                            \
        }                                                                                           \
        for (i = head; i + LANES <= (length); i += LANES) {                                         \
            const int count = LANES;                                                                \
            __VA_ARGS__;                                                                            \
        }                                                                                           \
        if (i < (length)) {                                                                         \
            const int count = (int)((length)-i);                                                    \
            __VA_ARGS__;                                                                            \
        }                                                                                           \
    } while (0)

#endif
