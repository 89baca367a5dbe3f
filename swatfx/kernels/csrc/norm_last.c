/* Batch normalisation where channels lie side by side: a matrix of `runs` rows by `channels` columns,
 * a multiple of sixteen.
 *
 * Threads divide the rows. No output can be had before all rows were seen, so the input is read twice.
 * A block of rows is done by sixteen columns at a time, so that what belongs to their channels stays
 * in registers; the block after it is fetched meanwhile. Both fit into the nearest cache.
 *
 * Stands on norm_channel.c.
 */
#include "norm_backward.h"

#include <math.h>

/* Threads' shares are multiples of ROWS, of which so many are added up in single precision. */
enum { ROWS = 32, BLOCK_FLOATS = 2048 };

/* Sixteen elements in bfloat16 are half a line. Past the caches no processor keeps many such open until
 * their other half comes: with more, a third of the speed is left. */
enum { OPEN_LINES = 8 };

static inline int64_t rows_to_write(int past, int results) {
    return HALF && past ? OPEN_LINES / results : ROWS;
}

/* Rows of a block: a power of two. */
static inline int64_t block_rows(const extent *e) {
    int64_t n = 2;
    while (n < ROWS && 2 * n * e->channels <= BLOCK_FLOATS) n *= 2;
    return n;
}

/* Do a statement for every block: at most `most` rows [r, end) of a thread's share, channels from c on. */
#define EACH_BLOCK(e, me, team, most, ...)                                                          \
    do {                                                                                            \
        int64_t share_end = part_begin((e)->runs, ROWS, (me) + 1, team);                            \
        int64_t many = min64(block_rows(e), most);                                                  \
        for (int64_t r = part_begin((e)->runs, ROWS, me, team), end; r < share_end; r = end) {      \
            end = min64(share_end, r + many);                                                       \
            for (int64_t c = 0; c < (e)->channels; c += LANES) {                                    \
                __VA_ARGS__;                                                                        \
            }                                                                                       \
        }                                                                                           \
    } while (0)

/* Do a statement for every row of a block: `at` is where its sixteen elements begin. */
#define EACH_ROW(e, r, end, c, ...)                                                                 \
    for (int64_t at = (r) * (e)->channels + (c); at < (end) * (e)->channels;                        \
         at += (e)->channels) {                                                                     \
        __VA_ARGS__;                                                                                \
    }

/* Sums of sixteen channels, on their way to double precision. */
static inline void keep_sums(float *narrow, double *to, wide v, int is_last_block) {
    put(narrow, v);
    if (!is_last_block) return;
    for (int l = 0; l < LANES; l++) to[l] += narrow[l];
    put(narrow, splat(0));
}

static inline int ends_sums(const extent *e, int64_t end) {
    return end % ROWS == 0 || end == e->runs;
}

/* A thread's sums of a channel's elements, taken relative to `origin`, the mean of its first block; and
 * the ends of each group of codes that it meets, from `group` on: low and high in turn. */
typedef struct {
    double *sum, *square;
    float *origin, *narrow_sum, *narrow_square, *ends;
    int64_t begin, end, group; /* of its rows */
} tally;

static tally new_tally(const extent *e, int me, int team) {
    int64_t n = e->channels, begin = part_begin(e->runs, ROWS, me, team);
    int64_t end = part_begin(e->runs, ROWS, me + 1, team), group = begin / GROUP;
    int64_t groups = end > begin ? groups_of(end) - group : 0;
    double *room = calloc((size_t)n, 2 * sizeof(double) + (size_t)(3 + 2 * groups) * sizeof(float));
    float *floats = (float *)(room + 2 * n);
    return (tally){.sum = room,
                   .square = room + n,
                   .origin = floats,
                   .narrow_sum = floats + n,
                   .narrow_square = floats + 2 * n,
                   .ends = floats + 3 * n,
                   .begin = begin,
                   .end = end,
                   .group = group};
}

/* Where the ends of the group of row r are, of all channels. */
static float *ends_at(const tally *t, const extent *e, int64_t r) {
    return t->ends + (r / GROUP - t->group) * 2 * e->channels;
}

static void tally_block(const elem *x, const extent *e, const tally *t, int64_t r, int64_t end,
                        int64_t c) {
    int64_t ahead = (end - r) * e->channels;
    float *lows = ends_at(t, e, r) + c, *highs = lows + e->channels;
    if (r == t->begin) {
        wide all = splat(0);
        EACH_ROW(e, r, end, c, all = add(all, get(x + at)));
        put(t->origin + c, mul(all, splat(1 / (float)(end - r))));
    }
    if (r == t->begin || r % GROUP == 0) {
        put(lows, splat(INFINITY));
        put(highs, splat(-INFINITY));
    }
    wide s = get(t->narrow_sum + c), q = get(t->narrow_square + c);
    wide origin = get(t->origin + c), low = get(lows), high = get(highs);
    EACH_ROW(e, r, end, c, {
        wide v = get(x + at), d = sub(v, origin);
        __builtin_prefetch(x + at + ahead, 0, 3);
        low = least(low, v);
        high = most(high, v);
        s = add(s, d);
        q = multiply_add(d, d, q);
    });
    put(lows, low);
    put(highs, high);
    keep_sums(t->narrow_sum + c, t->sum + c, s, ends_sums(e, end));
    keep_sums(t->narrow_square + c, t->square + c, q, ends_sums(e, end));
}

static moments moments_of(const tally *t, int64_t c) {
    double count = (double)(t->end - t->begin), mean = count ? t->sum[c] / count : 0;
    return (moments){count, t->origin[c] + mean, t->square[c] - t->sum[c] * mean};
}

static void choose_grids(const forward *f, const extent *e, const tally *t, int team, int64_t c) {
    for (int64_t group = 0; group < groups_of(e->runs); group++) {
        float low = INFINITY, high = -INFINITY;
        for (int i = 0; i < team; i++) {
            if (t[i].begin >= min64(e->runs, (group + 1) * GROUP) || t[i].end <= group * GROUP) continue;
            const float *ends = ends_at(&t[i], e, group * GROUP) + c;
            low = ends[0] < low ? ends[0] : low;
            high = ends[e->channels] > high ? ends[e->channels] : high;
        }
        choose_grid(f, e, c, group, low, high);
    }
}

INLINE mask upwards(const float *weight, int64_t c) {
    return at_least(weight ? get(weight + c) : splat(1), splat(0));
}

/* What a channel's sums say; `lines`: scales, and shifts behind them. */
static void finish_forward(const forward *f, const extent *e, const tally *t, int team, int64_t c,
                           float *lines) {
    moments all = {0, 0, 0};
    for (int i = 0; i < team && t; i++) all = combine_moments(all, moments_of(&t[i], c));
    finish_moments(f, c, all);
    affine line = affine_of(f->mean[c], f->invstd[c], f->weight ? f->weight[c] : 1,
                            f->bias ? f->bias[c] : 0);
    lines[c] = line.scale;
    lines[e->channels + c] = line.shift;
    if (f->codes) choose_grids(f, e, t, team, c);
}

INLINE void write_block(const forward *f, const extent *e, const float *lines, int64_t r,
                        int64_t end, int64_t c, const int residual, const int relu, const int bits,
                        const int width) {
    int64_t n = e->channels, ahead = (end - r) * n;
    writer how = {.scale = get(lines + c), .shift = get(lines + n + c), .up = upwards(f->weight, c)};
    if (width) {
        header_of_codes grids = header_at(f->header, n, e->runs);
        int64_t at = r / GROUP * n + c;
        how.mean = get(f->mean + c);
        how.grid = encoder_of(get(grids.base + at), get(grids.step + at), get_bytes(grids.first + at),
                              divide(splat(1), get(f->invstd + c)), f->seed);
    }
    int past = f->past && on_line(f->y);
    EACH_ROW(e, r, end, c, {
        __builtin_prefetch(f->x + at + ahead, 0, 3);
        if (residual) __builtin_prefetch(f->residual + at + ahead, 0, 3);
        write_output(f, &how, at, LANES, past, residual, relu, bits, width);
    });
}

void norm_last(const forward *f, const extent *e) {
    float *lines = malloc((size_t)e->channels * 2 * sizeof *lines);
    int reduces = f->training || f->codes;
    tally t[e->threads];
#pragma omp parallel num_threads(e->threads)
    {
        int team = omp_get_num_threads(), me = omp_get_thread_num();
        if (reduces) {
            t[me] = new_tally(e, me, team);
            EACH_BLOCK(e, me, team, ROWS, tally_block(f->x, e, &t[me], r, end, c));
        }
#pragma omp barrier
#pragma omp for
        for (int64_t c = 0; c < e->channels; c++) {
            finish_forward(f, e, reduces ? t : NULL, team, c, lines);
        }
#define WRITE(...)                                                                                  \
    EACH_BLOCK(e, me, team, most, write_block(f, e, lines, r, end, c, __VA_ARGS__))
        int64_t most = rows_to_write(f->past, 1);
        EACH_OUTPUT(f, WRITE);
        settle();
        if (reduces) free(t[me].sum);
    }
    free(lines);
}

/* ---- Backward ---- */

INLINE reader reader_at(const backward *b, const extent *e, const float *lines, int64_t r, int64_t c) {
    int64_t n = e->channels;
    reader how = {.scale = get(lines + c),
                  .shift = get(lines + n + c),
                  .mean = get(b->mean + c),
                  .up = upwards(b->weight, c)};
    if (b->codes) {
        header_of_codes grids = header_at((float *)b->header, n, e->runs);
        int64_t at = r / GROUP * n + c;
        how.grid = (decoder){get(grids.base + at), get(grids.step + at), get_bytes(grids.first + at)};
    }
    return how;
}

INLINE void fetch_gradient(const backward *b, int64_t at, const enum source from_what) {
    __builtin_prefetch(b->grad + at, 0, 3);
    if (from_what == X) __builtin_prefetch(b->x + at, 0, 3);
    if (from_what == BYTE) __builtin_prefetch(b->codes + at, 0, 3);
    if (from_what == HALF_BYTE) __builtin_prefetch(b->codes + at / 2, 0, 3);
}

/* `sum` holds n doubles of g, of gh and of h, and as many floats for what is on its way there. */
INLINE void sum_block(const backward *b, const extent *e, const float *lines, double *sum,
                      int64_t r, int64_t end, int64_t c, const enum mask_from masks,
                      const enum source from_what) {
    int64_t n = e->channels, ahead = (end - r) * n;
    float *narrow = (float *)(sum + 3 * n);
    reader how = reader_at(b, e, lines, r, c);
    wide g = get(narrow + c), gh = get(narrow + n + c), h_sum = get(narrow + 2 * n + c);
    EACH_ROW(e, r, end, c, {
        wide h, found = read_gradient(b, &how, at, LANES, &h, masks, from_what);
        fetch_gradient(b, at + ahead, from_what);
        g = add(g, found);
        gh = multiply_add(found, h, gh);
        if (is_coded(from_what)) h_sum = add(h_sum, h);
    });
    keep_sums(narrow + c, sum + c, g, ends_sums(e, end));
    keep_sums(narrow + n + c, sum + n + c, gh, ends_sums(e, end));
    if (is_coded(from_what)) keep_sums(narrow + 2 * n + c, sum + 2 * n + c, h_sum, ends_sums(e, end));
}

INLINE void gradient_block(const backward *b, const extent *e, const float *lines,
                           const float *planes, int64_t r, int64_t end, int64_t c,
                           const enum mask_from masks, const enum source from_what) {
    int64_t n = e->channels, ahead = (end - r) * n;
    reader how = reader_at(b, e, lines, r, c);
    wide of_g = get(planes + c), of_h = get(planes + n + c), rest = get(planes + 2 * n + c);
    int past = b->past && on_line(b->dx) && on_line(b->dresidual);
    EACH_ROW(e, r, end, c, {
        fetch_gradient(b, at + ahead, from_what);
        write_gradient(b, &how, of_g, of_h, rest, at, LANES, past, masks, from_what);
    });
}

void norm_last_backward(const backward *b, const extent *e) {
    int64_t n = e->channels;
    float *lines = malloc((size_t)n * 5 * sizeof *lines), *planes = lines + 2 * n;
    double *sum[e->threads];
    for (int64_t c = 0; c < n; c++) {
        affine line = affine_of(b->mean[c], b->invstd[c], b->weight ? b->weight[c] : 1,
                                b->bias ? b->bias[c] : 0);
        lines[c] = line.scale;
        lines[n + c] = line.shift;
    }
#pragma omp parallel num_threads(e->threads)
    {
        int team = omp_get_num_threads(), me = omp_get_thread_num();
        sum[me] = calloc((size_t)n, 3 * sizeof(double) + 3 * sizeof(float));
        if (wants_sums(b)) {
#define SUM(...) EACH_BLOCK(e, me, team, ROWS, sum_block(b, e, lines, sum[me], r, end, c, __VA_ARGS__))
            EACH_WAY(b, SUM)
        }
#pragma omp barrier
#pragma omp for
        for (int64_t c = 0; c < n; c++) {
            sums all = {0, 0, 0};
            for (int i = 0; i < team; i++) {
                all.g += sum[i][c];
                all.gh += sum[i][n + c];
                all.h += sum[i][2 * n + c];
            }
            plane p = finish_sums(b, e, c, all);
            planes[c] = p.a;
            planes[n + c] = p.b;
            planes[2 * n + c] = p.c;
        }
        if (b->dx || b->dresidual) {
#define WRITE_BACK(...)                                                                             \
    EACH_BLOCK(e, me, team, most, gradient_block(b, e, lines, planes, r, end, c, __VA_ARGS__))
            int64_t most = rows_to_write(b->past, b->dx && b->dresidual ? 2 : 1);
            EACH_WAY(b, WRITE_BACK)
        }
        settle();
        free(sum[me]);
    }
    free(lines);
}
