/* The numbers of one channel that both forms of batch normalisation (norm_runs.c, norm_last.c) need:
 * its statistics and the grids of its codes forward, what its sums make of the gradients backward.
 *
 * Stands on no other .c file.
 */
#include "norm_backward.h"

#include <math.h>

affine affine_of(float mean, float invstd, float weight, float bias) {
    float scale = invstd * weight;
    return (affine){scale, bias - mean * scale};
}

moments combine_moments(moments a, moments b) {
    if (a.count == 0 || b.count == 0) return a.count == 0 ? b : a;
    double count = a.count + b.count, apart = b.mean - a.mean;
    return (moments){count, a.mean + apart * b.count / count,
                     a.square + b.square + apart * apart * a.count * b.count / count};
}

static float root_of(float h) { return copysignf(sqrtf(fabsf(h)), h); }

static float larger(float a, float b) { return a > b ? a : b; }

void choose_grid(const forward *f, const extent *e, int64_t channel, int64_t group, float low,
                 float high) {
    header_of_codes to = header_at(f->header, e->channels, size_of_channel(e));
    int64_t at = group * e->channels + channel;
    float mean = f->mean[channel], invstd = f->invstd[channel], top = f->width == 8 ? 255 : 15;
    low = (low - mean) * invstd;
    high = (high - mean) * invstd;
    if (!f->relu || f->residual) {
        plain_grid(to, at, low, high, f->width);
        return;
    }
    low = root_of(low);
    high = root_of(high);
    float weight = f->weight ? f->weight[channel] : 1, bias = f->bias ? f->bias[channel] : 0;
    float tie = weight != 0 ? root_of(-bias / weight) : low, coarse = (high - low) / (top - 2);
    tie = tie > high ? high : tie;
    tie = tie < low ? low : tie;
    float below = coarse > 0 ? ceilf((tie - low) / coarse) : 0;
    if (!(below >= 0 && below < top)) below = 0; /* of NaN or infinity */
    float step = larger((tie - low) / larger(below, 1), (high - tie) / larger(top - 1 - below, 1));
    to.step[at] = step;
    to.base[at] = tie - below * step;
    to.first[at] = (uint8_t)(below + 1);
}

static float blend(double momentum, double found, float running) {
    return (float)(momentum * found + (1 - momentum) * running);
}

void finish_moments(const forward *f, int64_t channel, moments m) {
    double mean = m.mean, var = m.square / m.count;
    if (f->training) {
        double unbiased = m.square / (m.count - 1), momentum = f->momentum;
        if (f->new_mean) f->new_mean[channel] = blend(momentum, mean, f->running_mean[channel]);
        if (f->new_var) f->new_var[channel] = blend(momentum, unbiased, f->running_var[channel]);
    } else {
        mean = f->running_mean[channel];
        var = f->running_var[channel];
    }
    f->mean[channel] = (float)mean;
    f->invstd[channel] = (float)(1 / sqrt(var + f->eps));
}

plane finish_sums(const backward *b, const extent *e, int64_t channel, sums s) {
    double invstd = b->invstd[channel], weight = b->weight ? b->weight[channel] : 1;
    double unit = b->codes ? 1 : invstd; /* from h to normalised x */
    double count = (double)size_of_channel(e), a = weight * invstd;
    /* In training what was coded has the sum 0. */
    double mean = b->training ? s.h / count : 0, gh = s.gh - mean * s.g;
    if (b->dweight) b->dweight[channel] = (float)(gh * unit);
    if (b->dbias) b->dbias[channel] = (float)s.g;
    if (!b->training) return (plane){(float)a, 0, 0};
    double of_h = -a * unit * unit * gh / count;
    return (plane){(float)a, (float)of_h, (float)(-a * s.g / count - of_h * mean)};
}
