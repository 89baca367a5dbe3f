/* Batch normalisation where a channel is made of runs, with what follows it: an addition, a ReLU, and
 * what backward will need.
 *
 * A channel is reduced and then written at once, while its input is still in the cache. Channels are
 * shared out among threads, or, where they are too few, the elements of each, by whole groups of codes.
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

/* The least and the greatest element of each group that a thread reduced, by turns. */
static float *room_for_ends(const forward *f, const extent *e) {
    return f->codes ? malloc((size_t)groups_of(size_of_channel(e)) * 2 * sizeof(float)) : NULL;
}

/* Elements [from, to) of a channel. Each block is taken relative to the mean of the one before: one
 * pass, and nothing cancels. It goes from group to group of codes, of which one begins at `from`, also
 * where there are none: sums are then the same, and so is what the model makes of them. */
INLINE moments reduce_as(const elem *x, const extent *e, int64_t channel, int64_t from, int64_t to,
                         float *ends, const int keeps_ends) {
    double origin = 0, count = 0, sum = 0, square = 0;
    float center = 0;
    wide zero = splat(0), s0 = zero, s1 = zero, q0 = zero, q1 = zero;
    wide low = splat(INFINITY), high = splat(-INFINITY);
    int64_t pending = 0, left = to - from;
    EACH_SPAN(e, channel, from, to, {
        for (int64_t i = all.begin; i < all.end;) {
            int64_t end = min64(all.end, i + GROUP - pending % GROUP);
            if (count == 0 && pending == 0) origin = center = mean_of(x + i, end - i);
            pending += end - i;
            left -= end - i;
            wide c = splat(center);
            for (; i + 2 * LANES <= end; i += 2 * LANES) {
                wide a = get(x + i), b = get(x + i + LANES);
                if (keeps_ends) {
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
                if (keeps_ends) {
                    low = least(low, get_some(x + i, some, get_one(x + i)));
                    high = most(high, get_some(x + i, some, get_one(x + i)));
                }
                a = sub(a, c);
                s0 = add(s0, a);
                q0 = multiply_add(a, a, q0);
            }
            i = end;
            if (keeps_ends && (pending % GROUP == 0 || left == 0)) {
                *ends++ = lane_min(low);
                *ends++ = lane_max(high);
                low = splat(INFINITY);
                high = splat(-INFINITY);
            }
            if (pending == BLOCK || left == 0) {
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
    });
    double mean = count ? sum / count : 0;
    return (moments){count, origin + mean, square - sum * mean};
}

static moments reduce(const forward *f, const extent *e, int64_t channel, int64_t from, int64_t to,
                      float *ends) {
    if (!f->training && !f->codes) return (moments){0};
    return ends ? reduce_as(f->x, e, channel, from, to, ends, 1)
                : reduce_as(f->x, e, channel, from, to, ends, 0);
}

INLINE void write_as(const forward *f, const extent *e, int64_t channel, int64_t from, int64_t to,
                       const float *ends, const int residual, const int relu, const int bits,
                       const int width) {
    float weight = f->weight ? f->weight[channel] : 1, bias = f->bias ? f->bias[channel] : 0;
    affine line = affine_of(f->mean[channel], f->invstd[channel], weight, bias);
    writer how = {.scale = splat(line.scale),
                  .shift = splat(line.shift),
                  .mean = splat(f->mean[channel]),
                  .up = at_least(splat(weight), splat(0))};
    header_of_codes grids = header_at(f->header, e->channels, size_of_channel(e));
    wide unit = splat(1 / f->invstd[channel]);
    for (int64_t begin = from, end; begin < to; begin = end) {
        end = width ? min64(to, begin + GROUP) : to;
        if (width) {
            int64_t group = begin / GROUP, at = group * e->channels + channel;
            const float *these = ends + 2 * (group - from / GROUP);
            choose_grid(f, e, channel, group, these[0], these[1]);
            how.grid = encoder_of(splat(grids.base[at]), splat(grids.step[at]),
                                  splat(grids.first[at]), unit, f->seed);
        }
        EACH_SPAN(e, channel, begin, end, {
            int past = f->past && on_line(f->y + all.begin);
            EACH_PIECE(all.begin, all.end - all.begin,
                       write_output(f, &how, all.begin + i, count, past, residual, relu, bits,
                                    width));
        });
    }
    settle();
}

static void write(const forward *f, const extent *e, int64_t channel, int64_t from, int64_t to,
                  const float *ends) {
#define WRITE(...) write_as(f, e, channel, from, to, ends, __VA_ARGS__)
    EACH_OUTPUT(f, WRITE);
}

void norm_runs(const forward *f, const extent *e) {
    int64_t length = size_of_channel(e), elements = e->channels * length;
    if (e->length % LANES) {
        if (f->bits) memset(f->bits, 0, (size_t)(elements + 7) / 8);
        if (f->codes && f->width == 4) memset(f->codes, 0, (size_t)(elements + 1) / 2);
    }
    if (!shares_channels(e)) {
#pragma omp parallel num_threads(e->threads)
        {
            float *ends = room_for_ends(f, e);
#pragma omp for schedule(dynamic, channels_a_task(e))
            for (int64_t c = 0; c < e->channels; c++) {
                finish_moments(f, c, reduce(f, e, c, 0, length, ends));
                write(f, e, c, 0, length, ends);
            }
            free(ends);
        }
        return;
    }
    moments partial[2][e->threads];
#pragma omp parallel num_threads(e->threads)
    {
        int team = omp_get_num_threads(), me = omp_get_thread_num();
        int64_t from = part_begin(length, GROUP, me, team);
        int64_t to = part_begin(length, GROUP, me + 1, team);
        float *ends = room_for_ends(f, e);
        for (int64_t c = 0; c < e->channels; c++) {
            /* Two rows in turn: nobody is a whole channel ahead of a barrier. */
            partial[c % 2][me] = reduce(f, e, c, from, to, ends);
#pragma omp barrier
            if (me == 0) {
                moments all = partial[c % 2][0];
                for (int t = 1; t < team; t++) all = combine_moments(all, partial[c % 2][t]);
                finish_moments(f, c, all);
            }
#pragma omp barrier
            write(f, e, c, from, to, ends);
        }
        free(ends);
    }
}
