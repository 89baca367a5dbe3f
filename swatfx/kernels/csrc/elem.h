/* The type that an activation and its gradient lie in: float, or bfloat16 in a file that says so.
 *
 * A kernel is written once. The file of its name in bf16/ defines SWATFX_BF16 and includes it: functions that
 * others call are then TYPED, `elem` is two bytes wide, and get, put and their kin (lanes.h) convert. Sums,
 * statistics and parameters are floats either way.
 */
#ifndef SWATFX_ELEM_H
#define SWATFX_ELEM_H

#include <stdint.h>
#include <string.h>

typedef uint16_t bf16; /* the upper half of a float */

static inline float widen(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* The i-th of packed values, bfloat16 if `half`, which need not be aligned. */
static inline float value_at(const uint8_t *values, int64_t half, int64_t i) {
    bf16 top;
    float v;
    if (!half) {
        memcpy(&v, values + 4 * i, sizeof v);
        return v;
    }
    memcpy(&top, values + 2 * i, sizeof top);
    return widen(top);
}

#if defined(SWATFX_BF16)
typedef bf16 elem;
#define TYPED(name) name##_bf16
enum { HALF = 1 };
#else
typedef float elem;
#define TYPED(name) name
enum { HALF = 0 };
#endif

/* Whether no element is infinite or NaN; of floats nobody asks. */
static inline int all_finite(const elem *x, int64_t n) {
    int found = 0;
#if defined(SWATFX_BF16)
    for (int64_t i = 0; i < n; i++) found |= (x[i] & 0x7f80) == 0x7f80;
#endif
    (void)x, (void)n;
    return !found;
}

#endif
