/* Which sources the library was built from, for the loader to hold against those it finds. */
#include "common.h"

#ifndef SWATFX_SOURCES
#define SWATFX_SOURCES "" /* built by hand: whoever did, answers for it */
#endif

EXPORT const char *swatfx_sources(void) { return SWATFX_SOURCES; }
