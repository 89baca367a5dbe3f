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

#include "pieces.h"

#define affine_of TYPED(affine_of)
#define combine_moments TYPED(combine_moments)
#define finish_moments TYPED(finish_moments)
#define norm_runs TYPED(norm_runs)
#define norm_last TYPED(norm_last)

/* PART: what a channel is cut into between threads. BLOCK: what is added up in single precision
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

static inline int64_t parts_of(const extent *e) {
    return e->runs * ((e->length + PART - 1) / PART);
}

static inline span part_of(const extent *e, int64_t channel, int64_t part) {
    int64_t a_run = (e->length + PART - 1) / PART, from = part % a_run * PART;
    int64_t run = channel * e->channel_step + part / a_run * e->run_step;
    return (span){run + from, run + min64(e->length, from + PART)};
}

static inline int is_last(const extent *e) { return e->length == 1 && e->channel_step == 1; }

/* Whether threads share each channel rather than divide the channels. */
static inline int shares_channels(const extent *e) {
    return e->threads > 1 && e->channels < 4 * e->threads && e->channels % e->threads &&
           e->runs * e->length >= 2 * PART * e->threads;
}

/* Channels that a thread takes at a time: small ones by the dozen. */
static inline int channels_a_task(const extent *e) {
    return (int)(1 + PART / (e->runs * e->length + 1));
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
    int training, relu, past;
} forward;

typedef struct {
    double count, mean, square; /* square: sum of squared distances from the mean */
    float low, high;
} moments;

/* The coding of a channel, as documented at swatfx::batch_norm; `tie` is where y changes its sign. */
typedef struct {
    float mean, invstd, tie, inverse, first;
} encoder;

moments combine_moments(moments a, moments b);

/* Writes down a channel's statistics, in eval mode the running ones, and chooses its coding. */
encoder finish_moments(const forward *f, const extent *e, int64_t channel, moments m);

/* The same in vectors; `up` is where the weight is not negative. */
typedef struct {
    wide scale, shift, mean, invstd, tie, inverse, first;
    mask up;
} writer;

/* Where the ReLU lets through: where what is stored of y is above zero. Up to half of the least bfloat16
 * there is, that is zero. */
INLINE mask lets_through(wide y) { return above(y, splat(HALF ? 0x1p-134f : 0)); }

/* `count` elements at `at`. */
INLINE void write_output(const forward *f, const writer *how, int64_t at, int count, int past,
                         const int residual, const int relu, const int bits, const int codes) {
    wide x = get_some(f->x + at, count, 0), y = multiply_add(x, how->scale, how->shift);
    mask keep = how->up;
    if (residual) y = add(y, get_some(f->residual + at, count, 0));
    if (relu) {
        keep = lets_through(y);
        y = only(keep, y);
        if (bits) put_bits(f->bits, at, count, to_bits(keep));
    }
    put_result(f->y + at, y, count, past);
    if (codes) {
        wide q = mul(sub(mul(sub(x, how->mean), how->invstd), how->tie), how->inverse);
        q = add(whole_below(q), how->first);
        if (relu && !residual) {
            wide above = most(q, how->first), below = least(q, sub(how->first, splat(1)));
            q = choose(agree(keep, how->up), above, below);
        }
        put_some_bytes(f->codes + at, least(most(q, splat(0)), splat(255)), count);
    }
}

/* One copy of a function for each kind of forward. */
#define EACH_OUTPUT(f, call)                                                                        \
    do {                                                                                            \
        int residual = (f)->residual != NULL, bits = (f)->bits != NULL;                             \
        if ((f)->codes && (f)->relu) {                                                              \
            call(residual, 1, bits, 1);                                                             \
        } else if ((f)->codes) {                                                                    \
            call(residual, 0, 0, 1);                                                                \
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

/* The two forms of forward: norm_runs.c, and norm_last.c for what is_last. */
void norm_runs(const forward *f, const extent *e);
void norm_last(const forward *f, const extent *e);

#endif
