/* Shapes of max pooling, forward and backward.
 *
 * Vectors lie along `inner` (see `pooling`) where it fills them. Where it does not, a row is first
 * parted by its columns modulo the stride, so that the columns which neighbouring windows see at the
 * same place lie side by side, and vectors lie along the row.
 */
#ifndef SWATFX_POOL_H
#define SWATFX_POOL_H

#include "pieces.h"
#include "problems.h"

static inline int64_t div_up(int64_t a, int64_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }

/* First and one past the last place of a window that is inside the image. */
typedef struct {
    int64_t first, end;
} places;

static inline places inside(const pooling *p, int axis, int64_t out) {
    int64_t origin = out * p->stride[axis] - p->padding[axis], dilation = p->dilation[axis];
    int64_t extent = axis ? p->width : p->height, kernel = p->kernel[axis];
    return (places){min64(kernel, div_up(-origin, dilation)),
                    min64(kernel, div_up(extent - origin, dilation))};
}

/* A parted row: as many parts as the stride, each of `part_length` elements; part q holds columns q, q +
 * stride, ..., counted from where the first window begins. */
static inline int64_t part_length(const pooling *p) {
    int64_t seen = (p->out_width - 1) * p->stride[1] + (p->kernel[1] - 1) * p->dilation[1] + 1;
    return div_up(seen, p->stride[1]) * p->inner;
}

/* Steps of a part that are columns of the image: column = step * stride + shift. */
static inline places steps_inside(const pooling *p, int64_t part, int64_t length, int64_t *shift) {
    *shift = part - p->padding[1];
    int64_t first = min64(length, div_up(-*shift, p->stride[1]));
    int64_t end = min64(length, div_up(p->width - *shift, p->stride[1]));
    return (places){first, end > first ? end : first};
}

static inline int along_row(const pooling *p) { return p->inner < LANES; }

#endif
