/* The numbers of one channel that both forms of batch normalisation (norm_runs.c, norm_last.c) need:
 * its statistics and coding forward, what its sums make of the gradients backward.
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
                     a.square + b.square + apart * apart * a.count * b.count / count,
                     a.low < b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
}

static encoder choose_coding(const forward *f, const extent *e, int64_t channel, moments m) {
    float mean = f->mean[channel], invstd = f->invstd[channel];
    float weight = f->weight ? f->weight[channel] : 1, bias = f->bias ? f->bias[channel] : 0;
    float low = (m.low - mean) * invstd, high = (m.high - mean) * invstd;
    float step = (high - low) / 254, inverse = step > 0 ? 1 / step : 0, tie = low;
    if (f->relu && !f->residual && weight != 0) {
        tie = -bias / weight;
        tie = tie > high ? high : tie;
        tie = tie < low ? low : tie;
    }
    float first = floorf((tie - low) * inverse) + 1;
    f->header[channel] = step;
    f->header[e->channels + channel] = tie + (0.5f - first) * step;
    f->header[2 * e->channels + channel] = first;
    return (encoder){mean, invstd, tie, inverse, first};
}

static float blend(double momentum, double found, float running) {
    return (float)(momentum * found + (1 - momentum) * running);
}

encoder finish_moments(const forward *f, const extent *e, int64_t channel, moments m) {
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
    return f->codes ? choose_coding(f, e, channel, m) : (encoder){0};
}

plane finish_sums(const backward *b, const extent *e, int64_t channel, sums s) {
    double invstd = b->invstd[channel], weight = b->weight ? b->weight[channel] : 1;
    double unit = b->codes ? 1 : invstd; /* from h to normalised x */
    double count = (double)(e->runs * e->length), a = weight * invstd;
    if (b->dweight) b->dweight[channel] = (float)(s.gh * unit);
    if (b->dbias) b->dbias[channel] = (float)s.g;
    if (!b->training) return (plane){(float)a, 0, 0};
    return (plane){(float)a, (float)(-a * unit * unit * s.gh / count), (float)(-a * s.g / count)};
}
