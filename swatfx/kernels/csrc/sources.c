/* Which sources the library was built from, for the loader to hold against those it finds.
 *
 * Stands on no other .c file.
 */
#include "exports.h"

#ifndef SWATFX_SOURCES
#define SWATFX_SOURCES "" /* built by hand: whoever did, answers for it */
#endif

const char *swatfx_sources(void) { return SWATFX_SOURCES; }
