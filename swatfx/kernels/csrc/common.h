/* What every kernel shares: vector types of the compiler's extensions.
 *
 * One source for all machines: a vector is sixteen floats, and the compiler makes one 512-bit, two
 * 256-bit or four 128-bit registers of it. No header of torch: tensors come as raw pointers.
 */
#ifndef SWATFX_COMMON_H
#define SWATFX_COMMON_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <omp.h>

enum { LANES = 16 };

/* Floats of a scratch buffer: offsets into it are 32 bits wide, and every thread has one. */
enum { MAX_SCRATCH = 1 << 26 };

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
/* The same, where nothing is known of the address. */
typedef float uvec __attribute__((vector_size(64), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const uvec *)p; }
static inline void store(float *p, vec v) { *(uvec *)p = v; }
static inline vec broadcast(float x) {
    return (vec){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* What part `i` of `parts` of `n` items begins at, in multiples of `unit`. */
static inline int64_t part_begin(int64_t n, int64_t unit, int64_t i, int64_t parts) {
    int64_t units = (n + unit - 1) / unit;
    return min64(n, units * i / parts * unit);
}

#endif
