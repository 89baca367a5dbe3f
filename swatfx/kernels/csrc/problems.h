/* What products and pooling are asked to do: structures that Python fills in (kernels/problems.py,
 * linear.py, pool.py). All fields are int64_t, so that no compiler pads them. What values they may have is
 * said in exports.h, with the functions that take them.
 */
#ifndef SWATFX_PROBLEMS_H
#define SWATFX_PROBLEMS_H

#include <stdint.h>

enum {
    MAX_TAPS = 256,   /* of a conv_problem; as in problems.py */
    MAX_STRIDE = 16,  /* of a wgrad_problem; as in fitting.py */
    MAX_KERNEL = 64,  /* of a wgrad_problem, either way; as in fitting.py */
    MOST_CELLS = 256, /* of a pooling's window, whose cells a byte numbers; as in swatfx/ops/pool.py */
};

/* What a product returns besides 0. */
enum {
    NO_MEMORY = 1,    /* no room for its buffers */
    DOES_NOT_FIT = 2, /* left to the caller, who has a slower way */
};

typedef struct {
    int64_t weight; /* floats from a (filter, channel) pair's first weight */
    int64_t dy, dx; /* where it reads the input, from the output's position times the input step */
} tap;

/* A sum of shifted planes; forward and each phase of an input gradient are both one:
 *
 * out[row][y * step_out_y + at_y][x * step_out_x + at_x] =
 *     sum over channels and taps of weight * in[channel][y * step_y + dy][x * step_x + dx],
 *
 * for y < grid_height and x < grid_width, each a vector over the batch; zero outside the input. */
typedef struct {
    int64_t batch;                          /* images */
    int64_t channels, height, width;        /* of the input, channels of a group */
    int64_t rows, out_height, out_width;    /* of the result, rows of a group */
    int64_t grid_height, grid_width;        /* positions of the result that this problem writes */
    int64_t step_y, step_x;                 /* in the input, from one of them to the next */
    int64_t step_out_y, step_out_x;         /* in the result, from one of them to the next */
    int64_t at_y, at_x;                     /* in the result, the first of them */
    int64_t rows_are_filters;               /* 1 forward; 0 in the input gradient, whose rows are channels */
    int64_t weight_channel;                 /* floats between a filter's channels */
    int64_t weight_taps;                    /* kernel positions, of which the problem may have fewer taps */
    int64_t groups;
    int64_t weight_group;                   /* floats between the weights of two groups */
    int64_t threads;
    int64_t taps;
    tap tap[MAX_TAPS]; /* the first `taps` of them count */
} conv_problem;

/* The dense weight gradient of a convolution from a packed sparse activation. */
typedef struct {
    int64_t batch, channels, height, width;    /* of the activation, channels of a group */
    int64_t filters, out_height, out_width;    /* of the output gradient, filters of a group */
    int64_t kernel_y, kernel_x, step_y, step_x; /* kernel size, stride */
    int64_t pad_y, pad_x, dilation_y, dilation_x;
    int64_t weight_filter, weight_channel, weight_y, weight_x; /* strides of the result, in floats */
    int64_t groups, threads;
    int64_t half; /* 1: packed values are bfloat16; 0: float */
} wgrad_problem;

/* The dense weight gradient of a linear layer from a packed sparse activation. */
typedef struct {
    int64_t rows;            /* of the activation and of the output gradient */
    int64_t inputs, outputs; /* features: columns of the one and of the other */
    int64_t threads;
    int64_t half; /* as in wgrad_problem */
} linear_problem;

/* A weight [filter][channel][tap], whatever its order, by blocks of neighbouring filters and channels at one
 * tap; the last of either may be smaller. */
typedef struct {
    int64_t filters, channels, taps;
    int64_t filter_stride, channel_stride, tap_stride; /* in floats */
    int64_t block_filters, block_channels;
    int64_t threads;
} block_problem;

/* Max pooling of `planes` planes of `height` x `width` positions of `inner` floats each: planes are
 * channels and `inner` images in "batch_innermost", images and channels in "channels_last"; in row-major
 * order planes are (image, channel) and `inner` is one. */
typedef struct {
    int64_t planes, inner, height, width, out_height, out_width;
    int64_t kernel[2], stride[2], padding[2], dilation[2]; /* (y, x) each */
} pooling;

/* A batch norm, and its backward: swatfx_norm and swatfx_norm_backward in exports.h say what they hold. A
 * `void *` is to elements of the function's type. Where channels lie is told as in `extent` of norm.h. */
typedef struct {
    const void *x, *residual;
    const float *weight, *bias, *running_mean, *running_var;
    void *y;
    float *mean, *invstd, *new_mean, *new_var;
    uint8_t *bits, *codes;
    float *header;
    int64_t seed, threads;
    int64_t channels, runs, length, run_step, channel_step;
    int64_t training, relu, width;
    double momentum, eps;
} norm_problem;

typedef struct {
    const void *grad, *x;
    const float *weight, *bias, *mean, *invstd;
    const uint8_t *bits, *codes;
    const float *header;
    void *dx, *dresidual;
    float *dweight, *dbias;
    int64_t threads;
    int64_t channels, runs, length, run_step, channel_step;
    int64_t training, relu, width;
} norm_backward_problem;

#endif
