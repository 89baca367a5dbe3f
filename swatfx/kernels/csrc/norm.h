/* What forward and backward of batch normalisation share: where a channel lies, and what is done with
 * sixteen elements of it, or with one element of each of sixteen channels.
 *
 * A channel is `runs` runs of `length` elements, `run_step` apart; channel c begins at c *
 * channel_step. Where runs are one element long (norm_last.c), channels lie side by side. What both
 * forms make of a channel's sums is in norm_channel.c. Elements are float or bfloat16 (elem.h); what is
 * kept of a channel is float, and summed in double.
 */
#ifndef SWATFX_NORM_H
#define SWATFX_NORM_H

#define SWATFX_FLUSHES /* see lanes.h */
#include "codes.h"
#include "pieces.h"

#define affine_of TYPED(affine_of)
#define combine_moments TYPED(combine_moments)
#define finish_moments TYPED(finish_moments)
#define choose_grid TYPED(choose_grid)
#define norm_runs TYPED(norm_runs)
#define norm_last TYPED(norm_last)

/* PART: what a channel is cut into between threads, at least. BLOCK: what is added up in single precision
 * before it goes into a double. */
enum { PART = 1 << 14, BLOCK = 1024 };

typedef struct {
    int64_t channels, runs, length, run_step, channel_step;
    int threads;
} extent;

/* Elements [begin, end) of the tensor. */
typedef struct {
    int64_t begin, end;
} span;

/* Elements of a channel. */
static inline int64_t size_of_channel(const extent *e) { return e->runs * e->length; }

/* Elements [from, to) of a channel, as far as they lie in one run. */
static inline span span_of(const extent *e, int64_t channel, int64_t from, int64_t to) {
    int64_t run = from / e->length, begin = from - run * e->length;
    int64_t at = channel * e->channel_step + run * e->run_step + begin;
    return (span){at, at + min64(e->length - begin, to - from)};
}

/* Do a statement for every `all`, a span of the elements [from, to) of a channel. */
#define EACH_SPAN(e, channel, from, to, ...)                                                        \
    for (int64_t next = (from); next < (to);) {                                                     \
        const span all = span_of(e, channel, next, to);                                             \
        next += all.end - all.begin;                                                                \
        __VA_ARGS__;                                                                                \
    }

static inline int is_last(const extent *e) { return e->length == 1 && e->channel_step == 1; }

/* Whether threads share each channel rather than divide the channels. */
static inline int shares_channels(const extent *e) {
    return e->threads > 1 && e->channels < 4 * e->threads && e->channels % e->threads &&
           size_of_channel(e) >= 2 * PART * e->threads;
}

/* Channels that a thread takes at a time: small ones by the dozen. */
static inline int channels_a_task(const extent *e) {
    return (int)(1 + PART / (size_of_channel(e) + 1));
}

/* y = x * scale + shift. Backward asks for the sign of y again: it must get the same two floats, so
 * there is one such function, and it is never inlined. */
typedef struct {
    float scale, shift;
} affine;

__attribute__((noinline)) affine affine_of(float mean, float invstd, float weight, float bias);

/* What a forward is given and asked for; NULL where it is not. */
typedef struct {
    const elem *x, *residual;
    const float *weight, *bias, *running_mean, *running_var;
    elem *y;
    float *mean, *invstd, *new_mean, *new_var;
    uint8_t *bits, *codes;
    float *header; /* of codes */
    double momentum, eps;
    int training, relu, width, past; /* width: bits of a code */
    uint32_t seed;
} forward;

typedef struct {
    double count, mean, square; /* square: sum of squared distances from the mean */
} moments;

moments combine_moments(moments a, moments b);

/* Writes down a channel's statistics, in eval mode the running ones. */
void finish_moments(const forward *f, int64_t channel, moments m);

/* Chooses the grid of a channel's group, whose elements are from `low` to `high`, and writes it down. */
void choose_grid(const forward *f, const extent *e, int64_t channel, int64_t group, float low,
                 float high);

/* How elements are written; `up` is where the weight is not negative. */
typedef struct {
    wide scale, shift, mean;
    encoder grid; /* of x - mean */
    mask up;
} writer;

/* Where the ReLU lets through: where what is stored of y is above zero. Up to half of the least bfloat16
 * there is, that is zero; so are all subnormals where the processor rounds. */
#if defined(__AVX512BF16__)
#define ROUNDED_TO_ZERO (0x1p-126f - 0x1p-149f)
#else
#define ROUNDED_TO_ZERO 0x1p-134f
#endif
INLINE mask lets_through(wide y) { return above(y, splat(HALF ? ROUNDED_TO_ZERO : 0)); }

/* `count` elements at `at`. */
INLINE void write_output(const forward *f, const writer *how, int64_t at, int count, int past,
                         const int residual, const int relu, const int bits, const int width) {
    wide x = get_some(f->x + at, count, 0), y = multiply_add(x, how->scale, how->shift);
    mask keep = how->up;
    if (residual) y = add(y, get_some(f->residual + at, count, 0));
    if (relu) {
        keep = lets_through(y);
        y = only(keep, y);
        if (bits) put_bits(f->bits, at, count, to_bits(keep));
    }
    put_result(f->y + at, y, count, past);
    if (width) {
        mask over = agree(keep, how->up);
        wide q = encode(&how->grid, sub(x, how->mean), over, at, relu && !residual, width);
        put_codes(f->codes, at, q, count, width);
    }
}

/* One copy of a function for each kind of forward. */
#define EACH_OUTPUT(f, call)                                                                        \
    do {                                                                                            \
        int residual = (f)->residual != NULL, bits = (f)->bits != NULL;                             \
        if ((f)->codes && (f)->width == 8) {                                                        \
            EACH_CODED(f, call, 8);                                                                 \
        } else if ((f)->codes) {                                                                    \
            EACH_CODED(f, call, 4);                                                                 \
        } else if ((f)->relu && residual && bits) {                                                 \
            call(1, 1, 1, 0);                                                                       \
        } else if ((f)->relu && !residual && !bits) {                                               \
            call(0, 1, 0, 0);                                                                       \
        } else if ((f)->relu) {                                                                     \
            call(residual, 1, bits, 0);                                                             \
        } else {                                                                                    \
            call(residual, 0, 0, 0);                                                                \
        }                                                                                           \
    } while (0)
#define EACH_CODED(f, call, width)                                                                  \
    do {                                                                                            \
        if (!(f)->relu) {                                                                           \
            call(residual, 0, 0, width);                                                            \
        } else if (residual) {                                                                      \
            call(1, 1, bits, width);                                                                \
        } else {                                                                                    \
            call(0, 1, bits, width);                                                                \
        }                                                                                           \
    } while (0)

/* The two forms of forward: norm_runs.c, and norm_last.c for what is_last. */
void norm_runs(const forward *f, const extent *e);
void norm_last(const forward *f, const extent *e);

#endif
