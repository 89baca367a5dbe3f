/* The dense weight gradient from a sparse activation.
 *
 * Turned round so that the tile kernel serves: a nonzero activation of channel c adds its multiple of the
 * output gradient, filters innermost, at each kernel position that it meets; a tile is the gradient of
 * one channel's weights, (kernel positions) x (a block of filters), held in registers over all the
 * nonzeros of a strip of image rows. The output gradient of the strip is transposed into a scratch
 * buffer, with its halo. Each part of the result belongs to one thread and is summed in one order,
 * whatever the number of threads.
 *
 * Stands on lists.c, plan.c, tile.c and tile_bf16.c.
 */
#include "exports.h"
#include "lists.h"
#include "plan.h"
#include "tile.h"
#include "transpose.h"

static void find_phases(phase *out, int64_t kernel, int64_t step, int64_t dilation, int64_t *before, int64_t *after) {
    *before = *after = 0;
    for (int64_t r = 0; r < step; r++) out[r].count = 0;
    /* Backwards, so that neighbouring positions meet neighbouring outputs in ascending order. */
    for (int64_t k = kernel - 1; k >= 0; k--)
        for (int64_t r = 0; r < step; r++) {
            if ((r - k * dilation) % step) continue;
            const int64_t shift = (r - k * dilation) / step;
            out[r].tap[out[r].count] = k;
            out[r].shift[out[r].count++] = shift;
            *before = max64(*before, -shift);
            *after = max64(*after, shift);
        }
}

static cut make_cut(const wgrad_problem *p) {
    cut at = {0};
    int64_t below, right;
    find_phases(at.y, p->kernel_y, p->step_y, p->dilation_y, &at.above, &below);
    find_phases(at.x, p->kernel_x, p->step_x, p->dilation_x, &at.left, &right);
    int64_t most_y = 0, most_x = 0;
    for (int64_t r = 0; r < p->step_y; r++) most_y = max64(most_y, at.y[r].count);
    for (int64_t r = 0; r < p->step_x; r++) most_x = max64(most_x, at.x[r].count);
    const int64_t vectors = ceil_div(p->filters, LANES), taps = min64(MAX_TILE_ROWS, most_y) * most_x;
    /* More filters at a time make a scratch of few positions, and lists too short; fewer read lists too often. A
     * pointwise product in bfloat16 has short tiles of twice as many, which stay closer. */
    const int is_short = HALF && taps == 1;
    int64_t wide = max64(1, min64(min64(vectors, is_short ? 8 : 4), MAX_TILE / max64(1, min64(taps, MAX_TILE))));
    if (HALF && wide == 3) wide = 2; /* a register holds two */
    /* The same width in every block; few blocks are as many for each thread. */
    int64_t blocks = ceil_div(vectors, wide);
    if (blocks > 1 && blocks < 4 * p->threads) blocks = min64(vectors, ceil_div(blocks, p->threads) * p->threads);
    wide = ceil_div(vectors, blocks);

    const int64_t lanes = min64(LANES, p->batch);
    at.columns = (p->width - 1 + p->pad_x) / p->step_x + 1 + at.left + right;
    const int64_t budget = cache_bytes() * 3 / (is_short ? 8 : 4) / (int64_t)sizeof(elem);
    at.filters = wide * LANES;
    const int64_t row = lanes * at.columns * at.filters;
    int64_t strip = p->step_y;
    while (strip < p->height && (2 * strip / p->step_y + 1 + at.above + below) * row <= budget) strip *= 2;
    at.strip_rows = min64(strip, p->height);
    at.strips = ceil_div(p->height, at.strip_rows);
    at.rows = (at.strip_rows - 1 + p->step_y - 1) / p->step_y + 1 + at.above + below;
    return at;
}

/* Planes lie far apart: has a row of sixteen of them on its way, each straight on. */
static inline void fetch_rows(const elem *from, int64_t plane, int64_t width, int64_t batch) {
    for (int64_t i = 0; i < LANES; i++)
        for (int64_t x = 0; x < width; x++) __builtin_prefetch(from + i * plane + x * batch, 0, 3);
}

/* The output gradient of a strip: filters [f0, f0 + at->filters), images of a block, zero outside. */
static void fill_scratch(const wgrad_problem *p, const cut *at, const elem *grad, int64_t f0, int64_t block,
                         int64_t strip, elem *scratch) {
    const int64_t lanes = min64(LANES, p->batch), image = block * LANES, images = min64(lanes, p->batch - image);
    const int64_t plane = p->out_height * p->out_width * p->batch, top = strip_top(p, at, strip);
    const int64_t line = at->columns * at->filters;
    for (int64_t r = 0; r < at->rows; r++) {
        const int64_t y = top + r;
        elem *row = scratch + r * lanes * line;
        if (y < 0 || y >= p->out_height) {
            memset(row, 0, lanes * line * sizeof(elem));
            continue;
        }
        /* Filters outside, so that few planes are read at a time, each straight on. */
        for (int64_t f = 0; f < at->filters; f += LANES) {
            const int64_t filters = min64(LANES, p->filters - f0 - f);
            const elem *from = grad + (f0 + f) * plane + y * p->out_width * p->batch + image;
            if (f + LANES < at->filters) fetch_rows(from + LANES * plane, plane, p->out_width, p->batch);
            for (int64_t c = 0; c < at->columns; c++) {
                const int64_t x = c - at->left;
                elem *to = row + c * at->filters + f;
                if (x < 0 || x >= p->out_width) {
                    for (int64_t n = 0; n < lanes; n++) memset(to + n * line, 0, LANES * sizeof(elem));
                } else if (filters == LANES && images == LANES) {
                    const elem *rows[LANES];
                    for (int i = 0; i < LANES; i++) rows[i] = from + i * plane + x * p->batch;
                    transpose_elements(rows, to, line);
                } else {
                    for (int64_t n = 0; n < lanes; n++)
                        for (int64_t i = 0; i < LANES; i++)
                            to[n * line + i] = i < filters && n < images ? from[i * plane + x * p->batch + n] : 0;
                }
            }
        }
    }
}

/* Adds one strip to the sums [channel][phase's positions][filter] of channels [c0, c1). */
static void run_strip(const wgrad_problem *p, const cut *at, const lists *l, const elem *scratch, float *sums,
                      int64_t group, int64_t c0, int64_t c1, int64_t block, int64_t strip, int first, int finite) {
    const int64_t all = p->groups * p->channels, wide = at->filters / LANES;
    const int64_t line = min64(LANES, p->batch) * at->columns * at->filters;
    int64_t position = 0;
    for (int64_t ph = 0; ph < p->step_y * p->step_x; ph++) {
        const phase *py = &at->y[ph / p->step_x], *px = &at->x[ph % p->step_x];
        const int64_t count = py->count * px->count;
        if (!count) continue;
        /* Positions of a row that lie side by side in the scratch are one run of vectors. */
        const int64_t gap_x = px->count > 1 ? px->shift[1] - px->shift[0] : 1;
        const int64_t gap_y = py->count > 1 ? py->shift[1] - py->shift[0] : 1;
        const int64_t run = gap_x == 1 ? min64(px->count, MAX_TILE / wide) : 1;
        const int64_t rows = min64(min64(MAX_TILE_ROWS, py->count), rows_of_tile(run * wide, HALF));
        for (int64_t c = c0; c < c1; c++) {
            const int64_t where = cell(p, at, block, strip, ph, group * p->channels + c, all);
            const nonzeros e = {l->offset + l->begin[where], l->value + l->begin[where], l->count[where]};
            if (!e.count && !first) continue;
            float *to = sums + ((c - c0) * p->kernel_y * p->kernel_x + position) * at->filters;
            for (int64_t i = 0; i < py->count; i += rows)
                for (int64_t j = 0; j < px->count; j += run) {
                    const int64_t high = min64(rows, py->count - i), vectors = min64(run, px->count - j) * wide;
                    const elem *in = scratch + py->shift[i] * line + px->shift[j] * at->filters;
                    float *out = to + (i * px->count + j) * at->filters;
                    const int64_t out_row = px->count * at->filters;
#if defined(SWATFX_BF16)
                    const tile_at_bf16 tile = {in, gap_y * line, NULL, 0, 0, 0, first ? NULL : out, out, out_row};
                    tile_kernel_bf16(high, vectors, finite)(e, tile, 0);
#else
                    const tile_at tile = {in, gap_y * line, out, out_row, LANES, 0};
                    tile_kernel(high, vectors)(e, tile, first, 0);
                    (void)finite;
#endif
                }
        }
        position += count;
    }
}

/* From [channel][phase's positions][filter] to where the weight's own strides say. */
static void write_result(const wgrad_problem *p, const cut *at, const float *sums, float *out, int64_t f0, int64_t c0,
                         int64_t c1) {
    const int64_t filters = min64(at->filters, p->filters - f0), taps = p->kernel_y * p->kernel_x;
    int64_t order[MAX_KERNEL * MAX_KERNEL];
    int64_t position = 0;
    for (int64_t ph = 0; ph < p->step_y * p->step_x; ph++) {
        const phase *py = &at->y[ph / p->step_x], *px = &at->x[ph % p->step_x];
        for (int64_t i = 0; i < py->count; i++)
            for (int64_t j = 0; j < px->count; j++)
                order[py->tap[i] * p->kernel_x + px->tap[j]] = position++;
    }
    /* Sixteen weights that lie together in the result, of sixteen filters, at a time: of one channel after another,
     * or, where channels are innermost, of one tap after another. */
    const int by_tap = p->weight_channel == 1 && taps > 1;
    const int together = taps == 1 ? p->weight_channel == 1
                                   : by_tap || (p->weight_x == 1 && p->weight_y == p->kernel_x && p->weight_channel == taps);
    const int64_t channels = c1 - c0, size = by_tap ? channels : channels * taps;
    for (int64_t turn = 0; turn < (by_tap ? taps : 1); turn++)
        for (int64_t j = 0; j < size; j += LANES)
            for (int64_t f = 0; f < filters; f += LANES) {
                const int64_t count = min64(LANES, size - j);
                const float *rows[LANES];
                float *to[LANES];
                for (int64_t i = 0; i < LANES; i++) {
                    const int64_t k = min64(j + i, size - 1), c = by_tap ? k : k / taps, t = by_tap ? turn : k % taps;
                    rows[i] = sums + (c * taps + order[t]) * at->filters + f;
                    to[i] = out + (f0 + f) * p->weight_filter + (c0 + c) * p->weight_channel +
                            t / p->kernel_x * p->weight_y + t % p->kernel_x * p->weight_x;
                }
                if (together && count == LANES && filters - f >= LANES) {
                    transpose16(rows, to[0], p->weight_filter);
                } else {
                    for (int64_t n = 0; n < min64(LANES, filters - f); n++)
                        for (int64_t i = 0; i < count; i++) to[i][n * p->weight_filter] = rows[i][n];
                }
            }
}

int TYPED(sparse_weight_gradient)(const wgrad_problem *p, const uint8_t *packed, int64_t header, int64_t values,
                                  const elem *grad, float *out) {
    const cut at = make_cut(p);
    if (at.rows * min64(LANES, p->batch) * at.columns * at.filters > MAX_SCRATCH) return DOES_NOT_FIT;
    lists l = build_lists(p, &at, packed, header, values);
    if (!l.begin) return l.failed;
    const int64_t blocks_f = ceil_div(p->filters, at.filters), taps = p->kernel_y * p->kernel_x;
    /* Few blocks of filters: share out the channels too; each share transposes the gradient again. */
    const int64_t units = p->groups * blocks_f;
    const int64_t shares = units >= p->threads ? 1 : min64(ceil_div(p->threads, units), p->channels);
    int failed = 0;
#pragma omp parallel num_threads((int)p->threads) reduction(| : failed)
    {
        const int64_t share_channels = ceil_div(p->channels, shares);
        const int64_t lanes = min64(LANES, p->batch);
        /* A register of the last filters reaches past them. */
        const int64_t positions = at.rows * lanes * at.columns, held = positions * at.filters;
        elem *scratch = aligned_alloc(64, (held + 2 * MAX_TILE * LANES) / 32 * 32 * sizeof(elem));
        float *sums = aligned_alloc(64, share_channels * taps * at.filters * sizeof(float));
        failed |= !scratch || !sums;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units * shares; unit++) {
            if (failed) continue;
            const int64_t share = unit % shares, f0 = unit / shares % blocks_f * at.filters;
            const int64_t group = unit / shares / blocks_f;
            const int64_t c0 = share * share_channels, c1 = min64(p->channels, c0 + share_channels);
            if (c0 >= c1) continue;
            const elem *from = grad + group * p->filters * p->out_height * p->out_width * p->batch;
            int first = 1;
            for (int64_t b = 0; b < l.blocks; b++)
                for (int64_t s = 0; s < at.strips; s++) {
                    fill_scratch(p, &at, from, f0, b, s, scratch);
                    run_strip(p, &at, &l, scratch, sums, group, c0, c1, b, s, first, all_finite(scratch, held));
                    first = 0;
                }
            write_result(p, &at, sums, out + group * p->filters * p->weight_filter, f0, c0, c1);
        }
        free(scratch);
        free(sums);
    }
    free_lists(&l);
    return failed ? NO_MEMORY : 0;
}
