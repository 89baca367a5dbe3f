/* Batch normalisation where a channel is made of runs, with what follows it: an addition, a ReLU, and
 * what backward will need.
 *
 * A channel is reduced and then written at once, while its input is still in the cache. Channels are
 * shared out among threads, or, where they are too few, the parts of each.
 *
 * Stands on norm_channel.c.
 */
#include "norm.h"

#include <math.h>

static float mean_of(const elem *x, int64_t length) {
    wide sum = splat(0);
    for (int64_t i = 0; i < length; i += LANES) {
        sum = add(sum, get_some(x + i, (int)min64(LANES, length - i), 0));
    }
    return lane_sum(sum) / (float)length;
}

/* Parts [from, to) of a channel. Each block is taken relative to the mean of the one before: one
 * pass, and nothing cancels. */
INLINE moments reduce_as(const elem *x, const extent *e, int64_t channel, int64_t from, int64_t to,
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
                    low = least(low, get_some(x + i, some, get_one(x + i)));
                    high = most(high, get_some(x + i, some, get_one(x + i)));
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

void norm_runs(const forward *f, const extent *e) {
    int64_t parts = parts_of(e);
    int reduces = f->training || f->codes;
    if (f->bits && e->length % LANES) memset(f->bits, 0, (size_t)(e->channels * e->runs * e->length + 7) / 8);
    if (!shares_channels(e)) {
#pragma omp parallel for schedule(dynamic, channels_a_task(e)) num_threads(e->threads)
        for (int64_t c = 0; c < e->channels; c++) {
            moments m = reduces ? reduce(f, e, c, 0, parts) : (moments){0};
            write(f, e, c, 0, parts, finish_moments(f, e, c, m));
        }
        return;
    }
    moments partial[2][e->threads];
    encoder to_code[2];
#pragma omp parallel num_threads(e->threads)
    {
        int team = omp_get_num_threads(), me = omp_get_thread_num();
        int64_t from = parts * me / team, to = parts * (me + 1) / team;
        for (int64_t c = 0; c < e->channels; c++) {
            /* Two rows in turn: nobody is a whole channel ahead of a barrier. */
            partial[c % 2][me] = reduces ? reduce(f, e, c, from, to) : (moments){0};
#pragma omp barrier
            if (me == 0) {
                moments all = partial[c % 2][0];
                for (int t = 1; t < team; t++) all = combine_moments(all, partial[c % 2][t]);
                to_code[c % 2] = finish_moments(f, e, c, all);
            }
#pragma omp barrier
            write(f, e, c, from, to, to_code[c % 2]);
        }
    }
}
