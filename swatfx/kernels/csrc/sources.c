/* Which sources the library was built from, for the loader to hold against those it finds, and whether this
 * processor has all that it was built for.
 *
 * Stands on no other .c file.
 */
#include "exports.h"

#ifndef SWATFX_SOURCES
#define SWATFX_SOURCES "" /* built by hand: whoever did, answers for it */
#endif

const char *swatfx_sources(void) { return SWATFX_SOURCES; }

int swatfx_runs_here(void) {
#if defined(__AVX512BF16__)
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 1; /* the loader has asked torch for the rest */
#endif
}
