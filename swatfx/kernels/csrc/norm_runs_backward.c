/* Backward of batch normalisation where a channel is made of runs: its sums, then its gradients, as in
 * norm_runs.c.
 *
 * Stands on norm_channel.c.
 */
#include "norm_backward.h"

static reader reader_of(const backward *b, int64_t channel) {
    float weight = b->weight ? b->weight[channel] : 1, bias = b->bias ? b->bias[channel] : 0;
    affine line = affine_of(b->mean[channel], b->invstd[channel], weight, bias);
    return (reader){.scale = splat(line.scale),
                    .shift = splat(line.shift),
                    .mean = splat(b->mean[channel]),
                    .up = at_least(splat(weight), splat(0))};
}

/* Where a group ends that begins at element `begin` of a channel, `to` being the last; its grid. */
INLINE int64_t next_group(const backward *b, const extent *e, int64_t channel, int64_t begin,
                          int64_t to, reader *how) {
    if (!b->codes) return to;
    header_of_codes grids = header_at((float *)b->header, e->channels, size_of_channel(e));
    int64_t at = begin / GROUP * e->channels + channel;
    how->grid = (decoder){splat(grids.base[at]), splat(grids.step[at]), splat(grids.first[at])};
    return min64(to, begin + GROUP);
}

INLINE sums reduce_as(const backward *b, const extent *e, int64_t channel, int64_t from, int64_t to,
                      const enum mask_from masks, const enum source from_what) {
    reader how = reader_of(b, channel);
    sums all_sums = {0, 0, 0};
    for (int64_t first = from, last; first < to; first = last) {
        last = next_group(b, e, channel, first, to, &how);
        EACH_SPAN(e, channel, first, last, {
            for (int64_t begin = all.begin, end; begin < all.end; begin = end) {
                end = min64(all.end, (begin / BLOCK + 1) * BLOCK);
                wide g = splat(0), gh = g, h_sum = g;
                EACH_PIECE(begin, end - begin, {
                    wide h, found = read_gradient(b, &how, begin + i, count, &h, masks, from_what);
                    g = add(g, found);
                    gh = multiply_add(found, h, gh);
                    if (is_coded(from_what)) h_sum = add_where(first_lanes(count), h_sum, h);
                });
                all_sums.g += lane_sum(g);
                all_sums.gh += lane_sum(gh);
                if (is_coded(from_what)) all_sums.h += lane_sum(h_sum);
            }
        });
    }
    return all_sums;
}

INLINE void write_as(const backward *b, const extent *e, int64_t channel, int64_t from, int64_t to,
                     plane to_dx, const enum mask_from masks, const enum source from_what) {
    reader how = reader_of(b, channel);
    wide of_g = splat(to_dx.a), of_h = splat(to_dx.b), rest = splat(to_dx.c);
    for (int64_t first = from, last; first < to; first = last) {
        last = next_group(b, e, channel, first, to, &how);
        EACH_SPAN(e, channel, first, last, {
            int past = b->past && on_line(b->dx + all.begin) && on_line(b->dresidual + all.begin);
            EACH_PIECE(all.begin, all.end - all.begin,
                       write_gradient(b, &how, of_g, of_h, rest, all.begin + i, count, past, masks,
                                      from_what));
        });
    }
    settle();
}

static sums reduce(const backward *b, const extent *e, int64_t channel, int64_t from, int64_t to) {
    sums found;
#define REDUCE(masks, source) found = reduce_as(b, e, channel, from, to, masks, source)
    EACH_WAY(b, REDUCE)
    return found;
}

static void write(const backward *b, const extent *e, int64_t channel, int64_t from, int64_t to,
                  plane to_dx) {
#define WRITE(masks, source) write_as(b, e, channel, from, to, to_dx, masks, source)
    EACH_WAY(b, WRITE)
}

void norm_runs_backward(const backward *b, const extent *e) {
    int64_t length = size_of_channel(e);
    int reduces = wants_sums(b), writes = b->dx || b->dresidual;
    if (!shares_channels(e)) {
#pragma omp parallel for schedule(dynamic, channels_a_task(e)) num_threads(e->threads)
        for (int64_t c = 0; c < e->channels; c++) {
            sums s = reduces ? reduce(b, e, c, 0, length) : (sums){0, 0, 0};
            plane to_dx = finish_sums(b, e, c, s);
            if (writes) write(b, e, c, 0, length, to_dx);
        }
        return;
    }
    sums partial[2][e->threads];
    plane to_dx[2];
#pragma omp parallel num_threads(e->threads)
    {
        int team = omp_get_num_threads(), me = omp_get_thread_num();
        int64_t from = part_begin(length, GROUP, me, team);
        int64_t to = part_begin(length, GROUP, me + 1, team);
        for (int64_t c = 0; c < e->channels; c++) {
            /* Two rows in turn: nobody is a whole channel ahead of a barrier. */
            partial[c % 2][me] = reduces ? reduce(b, e, c, from, to) : (sums){0, 0, 0};
#pragma omp barrier
            if (me == 0) {
                sums all = {0, 0, 0};
                for (int t = 0; t < team; t++) {
                    all.g += partial[c % 2][t].g;
                    all.gh += partial[c % 2][t].gh;
                    all.h += partial[c % 2][t].h;
                }
                to_dx[c % 2] = finish_sums(b, e, c, all);
            }
#pragma omp barrier
            if (writes) write(b, e, c, from, to, to_dx[c % 2]);
        }
    }
}
