/* Batch normalisation with what follows it: an addition, a ReLU, and what backward will need.
 *
 * A channel is reduced and then written at once, while its input is still in the cache. Channels are
 * shared out among threads, or, where they are too few, the parts of each.
 */
#include "norm.h"

#include <math.h>

affine affine_of(float mean, float invstd, float weight, float bias) {
    float scale = invstd * weight;
    return (affine){scale, bias - mean * scale};
}

static float mean_of(const float *x, int64_t length) {
    wide sum = splat(0);
    for (int64_t i = 0; i < length; i += LANES) {
        sum = add(sum, get_some(x + i, (int)min64(LANES, length - i), 0));
    }
    return lane_sum(sum) / (float)length;
}

/* Parts [from, to) of a channel. Each block is taken relative to the mean of the one before: one
 * pass, and nothing cancels. */
INLINE moments reduce_as(const float *x, const extent *e, int64_t channel, int64_t from, int64_t to,
                         const int ends) {
    double origin = 0, count = 0, sum = 0, square = 0;
    float center = 0;
    wide zero = splat(0), s0 = zero, s1 = zero, q0 = zero, q1 = zero;
    wide low = splat(INFINITY), high = splat(-INFINITY);
    int64_t pending = 0;
    for (int64_t part = from; part < to; part++) {
        span all = part_of(e, channel, part);
        for (int64_t i = all.begin; i < all.end;) {
            int64_t end = min64(all.end, i + BLOCK - pending);
            if (count == 0 && pending == 0) origin = center = mean_of(x + i, end - i);
            pending += end - i;
            wide c = splat(center);
            for (; i + 2 * LANES <= end; i += 2 * LANES) {
                wide a = get(x + i), b = get(x + i + LANES);
                if (ends) {
                    low = least(low, least(a, b));
                    high = most(high, most(a, b));
                }
                a = sub(a, c);
                b = sub(b, c);
                s0 = add(s0, a);
                s1 = add(s1, b);
                q0 = multiply_add(a, a, q0);
                q1 = multiply_add(b, b, q1);
            }
            for (; i < end; i += LANES) {
                int some = (int)min64(LANES, end - i);
                wide a = get_some(x + i, some, center);
                if (ends) {
                    low = least(low, get_some(x + i, some, x[i]));
                    high = most(high, get_some(x + i, some, x[i]));
                }
                a = sub(a, c);
                s0 = add(s0, a);
                q0 = multiply_add(a, a, q0);
            }
            i = end;
            if (pending == BLOCK || (part + 1 == to && end == all.end)) {
                double far = center - origin, n = (double)pending;
                double block = lane_sum(add(s0, s1));
                sum += block + n * far;
                square += lane_sum(add(q0, q1)) + 2 * far * block + n * far * far;
                count += n;
                center += (float)(block / n);
                s0 = s1 = q0 = q1 = zero;
                pending = 0;
            }
        }
    }
    double mean = count ? sum / count : 0;
    return (moments){count, origin + mean, square - sum * mean, lane_min(low), lane_max(high)};
}

static moments reduce(const forward *f, const extent *e, int64_t channel, int64_t from, int64_t to) {
    return f->codes ? reduce_as(f->x, e, channel, from, to, 1)
                    : reduce_as(f->x, e, channel, from, to, 0);
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

INLINE void write_as(const forward *f, const extent *e, int64_t channel, int64_t from, int64_t to,
                     encoder to_code, const int residual, const int relu, const int bits,
                     const int codes) {
    float weight = f->weight ? f->weight[channel] : 1, bias = f->bias ? f->bias[channel] : 0;
    affine line = affine_of(f->mean[channel], f->invstd[channel], weight, bias);
    writer how = {splat(line.scale),    splat(line.shift),  splat(to_code.mean),
                  splat(to_code.invstd), splat(to_code.tie), splat(to_code.inverse),
                  splat(to_code.first),  at_least(splat(weight), splat(0))};
    for (int64_t part = from; part < to; part++) {
        span all = part_of(e, channel, part);
        int past = f->past && on_line(f->y + all.begin);
        EACH_PIECE(all.begin, all.end - all.begin,
                   write_output(f, &how, all.begin + i, count, past, residual, relu, bits, codes));
    }
    settle();
}

static void write(const forward *f, const extent *e, int64_t channel, int64_t from, int64_t to,
                  encoder to_code) {
#define WRITE(...) write_as(f, e, channel, from, to, to_code, __VA_ARGS__)
    EACH_OUTPUT(f, WRITE);
}

/* In eval mode the running statistics are used, else new_mean and new_var are made of them. What is
 * not given, or not asked for, is NULL. Nothing may be empty. */
EXPORT void swatfx_norm(const float *x, const float *residual, const float *weight,
                        const float *bias, const float *running_mean, const float *running_var,
                        float *y, float *mean, float *invstd, float *new_mean, float *new_var,
                        uint8_t *bits, uint8_t *codes, float *header, int64_t channels,
                        int64_t runs, int64_t length, int64_t run_step, int64_t channel_step,
                        double momentum, double eps, int training, int relu, int threads) {
    extent e = {channels, runs, length, run_step, channel_step, threads};
    forward f = {x,      residual, weight,   bias, running_mean, running_var, y,        mean,
                 invstd, new_mean, new_var,  bits, codes,        header,      momentum, eps,
                 training, relu, outgrows_cache(channels * runs * length)};
    int64_t parts = parts_of(&e);
    int reduces = training || codes;
    if (is_last(&e)) {
        norm_last(&f, &e);
        return;
    }
    if (bits && length % LANES) memset(bits, 0, (size_t)(channels * runs * length + 7) / 8);
    if (!shares_channels(&e)) {
#pragma omp parallel for schedule(dynamic, channels_a_task(&e)) num_threads(threads)
        for (int64_t c = 0; c < channels; c++) {
            moments m = reduces ? reduce(&f, &e, c, 0, parts) : (moments){0};
            write(&f, &e, c, 0, parts, finish_moments(&f, &e, c, m));
        }
        return;
    }
    moments partial[2][threads];
    encoder to_code[2];
#pragma omp parallel num_threads(threads)
    {
        int team = omp_get_num_threads(), me = omp_get_thread_num();
        int64_t from = parts * me / team, to = parts * (me + 1) / team;
        for (int64_t c = 0; c < channels; c++) {
            /* Two rows in turn: nobody is a whole channel ahead of a barrier. */
            partial[c % 2][me] = reduces ? reduce(&f, &e, c, from, to) : (moments){0};
#pragma omp barrier
            if (me == 0) {
                moments all = partial[c % 2][0];
                for (int t = 1; t < team; t++) all = combine_moments(all, partial[c % 2][t]);
                to_code[c % 2] = finish_moments(&f, &e, c, all);
            }
#pragma omp barrier
            write(&f, &e, c, from, to, to_code[c % 2]);
        }
    }
}
