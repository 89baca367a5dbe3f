/* An input tile with its halo, copied to where it stays in the second-level cache: padding, stride and batch
 * tail are settled by the copy.
 *
 * Stands on no other .c file.
 */
#include "scratch.h"

/* Columns [from, until) of an image row, a block of lanes each. */
static inline __attribute__((always_inline)) void copy_columns(
    elem *to, const elem *line, int64_t from, int64_t until, int64_t step, int64_t lanes) {
    for (int64_t c = from; c < until; c++) memcpy(to + c * lanes, line + c * step, lanes * sizeof(elem));
}

void TYPED(copy_tile)(const conv_problem *p, const plan *at, const elem *in, int64_t image, int64_t y0, int64_t x0,
                      int64_t channels, elem *scratch) {
    const int64_t rows = at->halo_y + 1 + (at->tile_rows - 1) * p->step_y, columns = at->line / at->lanes;
    const int64_t top = y0 * p->step_y + at->min_dy, left = x0 * p->step_x + at->min_dx;
    for (int64_t k = 0; k < channels; k++)
        for (int64_t r = 0; r < rows; r++) {
            elem *to = scratch + k * at->plane + r * at->row;
            const int64_t y = top + r;
            if (y < 0 || y >= p->height) {
                memset(to, 0, at->row * sizeof(elem));
                continue;
            }
            const elem *line = in + ((k * p->height + y) * p->width) * p->batch + image;
            for (int64_t phase = 0; phase < p->step_x; phase++, to += at->line) {
                const int64_t x = left + phase;
                /* Columns c for which x + c * step lies within the input. */
                const int64_t from = x >= 0 ? 0 : min64(columns, ceil_div(-x, p->step_x));
                const int64_t until =
                    max64(from, min64(columns, p->width > x ? ceil_div(p->width - x, p->step_x) : 0));
                memset(to, 0, from * at->lanes * sizeof(elem));
                const elem *first = line + x * p->batch;
                if (k + 1 < channels) /* planes lie far apart: have the next one's row on its way */
                    for (int64_t c = from; c < until; c++)
                        __builtin_prefetch(first + p->height * p->width * p->batch + c * p->step_x * p->batch, 0, 2);
                if (p->step_x == 1 && p->batch == at->lanes)
                    memcpy(to + from * at->lanes, first + from * at->lanes,
                           (until - from) * at->lanes * sizeof(elem));
                else if (at->lanes == LANES)
                    copy_columns(to, first, from, until, p->step_x * p->batch, LANES);
                else
                    copy_columns(to, first, from, until, p->step_x * p->batch, at->lanes);
                memset(to + until * at->lanes, 0, (columns - until) * at->lanes * sizeof(elem));
            }
        }
}
