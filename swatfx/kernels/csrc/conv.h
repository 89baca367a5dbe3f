/* What a sparse product on image tiles is asked to do; forward and input gradient are both one. */
#ifndef SWATFX_CONV_H
#define SWATFX_CONV_H

#include "tile.h"

enum { MAX_TAPS = 256 };

typedef struct {
    int64_t weight; /* floats from a (filter, channel) pair's first weight */
    int64_t dy, dx; /* where it reads the input, from the output's position times the input step */
} tap;

/* out[row][y * step_out_y + at_y][x * step_out_x + at_x] =
 *     sum over channels and taps of weight * in[channel][y * step_y + dy][x * step_x + dx],
 * for y < grid_height and x < grid_width, each a vector over the batch; zero outside the input. */
typedef struct {
    int64_t batch, channels, height, width; /* of the input */
    int64_t rows, out_height, out_width;    /* of the result */
    int64_t grid_height, grid_width;
    int64_t step_y, step_x;
    int64_t step_out_y, step_out_x, at_y, at_x;
    int64_t rows_are_filters;            /* 1 forward; 0 in the input gradient, whose rows are channels */
    int64_t weight_channel, weight_taps; /* a filter: floats between its channels; kernel positions */
    int64_t groups, weight_group;       /* rows and channels are a group's */
    int64_t threads;
    int64_t taps;
    tap tap[MAX_TAPS];
} conv_problem;

/* in: [groups * channels][height][width][batch]; out: [groups * rows][out_height][out_width][batch];
 * bias: [groups * rows] or NULL. Weights count whose magnitude is not below the threshold. Returns 0,
 * NO_MEMORY, or DOES_NOT_FIT where a tile with its halo is too large. */
EXPORT int sparse_conv(const conv_problem *p, const float *in, const float *weight, const float *bias, float *out,
                       float threshold);

#endif
