/* The scratch buffer of a product on image tiles; its layout is plan.h's. */
#ifndef SWATFX_SCRATCH_H
#define SWATFX_SCRATCH_H

#include "elem.h"
#include "plan.h"

/* `channels` planes of the input, from `in` on, under the tile at (y0, x0): the images from `image` on, zero
 * where there is no input. Planes of the scratch are at->plane apart. */
void TYPED(copy_tile)(const conv_problem *p, const plan *at, const elem *in, int64_t image, int64_t y0, int64_t x0,
                      int64_t channels, elem *scratch);

#endif
