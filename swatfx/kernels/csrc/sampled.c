/* The weight gradient at some of its places: a product of dense tensors, sampled.
 *
 * What a held mask leaves open is a list of places a filter. Where forward adds a weight's multiple of a shifted
 * input plane to the filter's output, the gradient of that weight is the dot product of the same plane with
 * the output's gradient. So tile, halo, scratch and offsets are forward's; a filter's part of the output gradient
 * is brought together once, and the filter's places run over it.
 *
 * Tiles are dealt out in parts, which are as many whatever the number of threads, and so are sums: each part
 * has its own, and they are added in order.
 *
 * Stands on dots.c, plan.c, rows.c and scratch.c.
 */
#include "dots.h"
#include "exports.h"
#include "plan.h"
#include "rows.h"
#include "scratch.h"

enum { MOST_PARTS = 16, MOST_SUMS = 1 << 23 };

/* Where a tile lies; the last ones of a row, column or batch may be smaller. */
typedef struct {
    int64_t image, stacks, y0, x0, rows, columns;
} position;

static position tile_position(const conv_problem *p, const plan *at, int64_t image0, int64_t images, int64_t tile) {
    const int64_t tiles_x = ceil_div(p->grid_width, at->tile_cols), tiles_y = ceil_div(p->grid_height, at->tile_rows);
    position t = {.x0 = tile % tiles_x * at->tile_cols, .y0 = tile / tiles_x % tiles_y * at->tile_rows};
    const int64_t first = tile / (tiles_x * tiles_y) * at->stack;
    t.image = image0 + first * at->lanes;
    t.stacks = min64(at->stack, images / at->lanes - first);
    t.rows = min64(at->tile_rows, p->grid_height - t.y0);
    t.columns = min64(at->tile_cols, p->grid_width - t.x0);
    return t;
}

/* The output gradient of one filter under a tile, `plane` its first element: where it lies, if in one run. */
static void place_gradient(const conv_problem *p, const plan *at, const position *t, const elem *plane, elem *buffer,
                           dots_at *to) {
    const int64_t line = p->out_width * p->batch;
    const elem *from = plane + t->y0 * line + t->x0 * p->batch + t->image;
    to->grad_row = t->columns * at->lanes;
    to->grad_stack = t->rows * to->grad_row;
    if (p->batch == at->lanes && (t->rows == 1 || t->columns == p->out_width)) {
        to->grad = from;
        return;
    }
    to->grad = buffer;
    for (int64_t s = 0; s < t->stacks; s++, from += at->lanes)
        for (int64_t r = 0; r < t->rows; r++)
            for (int64_t c = 0; c < t->columns; c++, buffer += at->lanes)
                memcpy(buffer, from + r * line + c * p->batch, at->lanes * sizeof(elem));
}

static int64_t tile_count(const conv_problem *p, const plan *at, int64_t images) {
    return ceil_div(images / at->lanes, at->stack) * ceil_div(p->grid_height, at->tile_rows) *
           ceil_div(p->grid_width, at->tile_cols);
}

/* What a thread works with. Returns whether there is no memory. */
static int make_room(const plan *at, int64_t held, elem **scratch, elem **buffer) {
    const int64_t gradient = at->stack * at->tile_rows * at->tile_cols * at->lanes;
    *scratch = aligned_alloc(64, ceil_div(max64(1, held) * sizeof(elem), 64) * 64);
    *buffer = aligned_alloc(64, ceil_div(gradient * sizeof(elem), 64) * 64);
    return !*scratch || !*buffer;
}

/* One tile's part of the sums of filters [o0, o1), which begin at that of the first block's first place. */
static void run_tile(const conv_problem *p, const plan *at, const sparse_rows *w, const elem *in, const elem *grad,
                     const position *t, int64_t o0, int64_t o1, elem *scratch, elem *buffer, float *sums) {
    dots_at tile = {.stacks = t->stacks, .rows = t->rows, .length = t->columns * at->lanes};
    tile.in_row = p->step_y * at->row;
    tile.in_stack = at->plane / at->stack;
    for (int64_t b = 0; b < at->blocks; b++) {
        const int64_t k = b * at->block, channels = min64(at->block, p->channels - k);
        const elem *planes = in + k * p->height * p->width * p->batch;
        tile.in = at->in_place ? planes + t->x0 * LANES : scratch;
        for (int64_t s = 0; s < t->stacks && !at->in_place; s++)
            TYPED(copy_tile)(p, at, planes, t->image + s * at->lanes, t->y0, t->x0, channels, scratch + s * tile.in_stack);
        for (int64_t o = o0; o < o1; o++) {
            const int64_t begin = w->begin[b * p->rows + o], count = w->begin[b * p->rows + o + 1] - begin;
            if (!count) continue;
            place_gradient(p, at, t, grad + o * p->out_height * p->out_width * p->batch, buffer, &tile);
            TYPED(add_dots)(w->offset + begin, count, tile, sums + begin);
        }
    }
}

/* Adds the parts of each filter's places, in order, and writes them where they belong. */
static void write_result(const conv_problem *p, const plan *at, const sparse_rows *w, const float *sums, int64_t parts,
                         float *out, int first) {
    const int64_t cells = at->blocks * p->rows, places = w->begin[cells], size = p->channels * p->weight_taps;
#pragma omp parallel for num_threads((int)p->threads) schedule(static)
    for (int64_t o = 0; o < p->rows; o++) {
        float *filter = out + o * size;
        if (first) memset(filter, 0, size * sizeof(float));
        for (int64_t b = 0; b < at->blocks; b++)
            for (int64_t i = w->begin[b * p->rows + o]; i < w->begin[b * p->rows + o + 1]; i++) {
                float sum = filter[w->place[i]];
                for (int64_t part = 0; part < parts; part++) sum += sums[part * places + i];
                filter[w->place[i]] = sum;
            }
    }
}

/* Images [image0, image0 + images), `lanes` of them a block, where groups are one plane each: these are dealt
 * out, since one alone is little work. */
static int run_planes(const conv_problem *p, const uint8_t *open, const elem *in, const elem *grad, float *out,
                      int64_t image0, int64_t images, int64_t lanes) {
    const plan at = make_sampled_plan(p, lanes, HALF);
    const int64_t held = at.in_place ? 0 : at.plane, tiles = tile_count(p, &at, images);
    if (held > MAX_SCRATCH) return DOES_NOT_FIT;
    int failed = 0;
#pragma omp parallel num_threads((int)p->threads) reduction(| : failed)
    {
        elem *scratch, *buffer;
        failed |= make_room(&at, held, &scratch, &buffer);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < p->groups; g++) {
            if (failed) continue;
            const elem *from = in + g * p->height * p->width * p->batch;
            const elem *grads = grad + g * p->out_height * p->out_width * p->batch;
            int32_t offset[MAX_TAPS], place[MAX_TAPS];
            float sums[MAX_TAPS] = {0}, *filter = out + g * p->weight_group;
            int64_t begin[2] = {0, build_row_of_places(p, &at, open, g * p->weight_group, offset, place)};
            const sparse_rows w = {.begin = begin, .offset = offset};
            for (int64_t tile = 0; tile < tiles; tile++) {
                const position t = tile_position(p, &at, image0, images, tile);
                run_tile(p, &at, &w, from, grads, &t, 0, 1, scratch, buffer, sums);
            }
            if (image0 == 0) memset(filter, 0, p->weight_taps * sizeof(float));
            for (int64_t i = 0; i < begin[1]; i++) filter[place[i]] += sums[i];
        }
        free(scratch);
        free(buffer);
    }
    return failed ? NO_MEMORY : 0;
}

/* Images [image0, image0 + images), `lanes` of them a block, of all groups. */
static int run_lanes(const conv_problem *p, const uint8_t *open, const elem *in, const elem *grad, float *out,
                     int64_t image0, int64_t images, int64_t lanes) {
    const plan at = make_sampled_plan(p, lanes, HALF);
    const int64_t held = at.in_place ? 0 : at.block * at.plane, tiles = tile_count(p, &at, images);
    if (held > MAX_SCRATCH) return DOES_NOT_FIT;
    int failed = 0;
    for (int64_t g = 0; g < p->groups && !failed; g++) {
        sparse_rows w = build_places(p, &at, open, g * p->weight_group);
        if (!w.begin) return NO_MEMORY;
        const elem *from = in + g * p->channels * p->height * p->width * p->batch;
        const elem *grads = grad + g * p->rows * p->out_height * p->out_width * p->batch;
        const int64_t places = w.begin[at.blocks * p->rows];
        const int64_t parts = max64(1, min64(min64(tiles, MOST_PARTS), MOST_SUMS / max64(1, places)));
        /* Few parts: their filters are shared out, too, and each share copies its tiles again. */
        const int64_t shares = max64(1, min64(p->rows, ceil_div(p->threads, parts)));
        float *sums = calloc(max64(1, parts * places), sizeof(float));
        failed |= !sums;
#pragma omp parallel num_threads((int)p->threads) reduction(| : failed)
        {
            elem *scratch, *buffer;
            failed |= make_room(&at, held, &scratch, &buffer);
#pragma omp for schedule(dynamic)
            for (int64_t unit = 0; unit < parts * shares; unit++) {
                const int64_t share = unit % shares, part = unit / shares;
                const int64_t o0 = p->rows * share / shares, o1 = p->rows * (share + 1) / shares;
                for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts && !failed; tile++) {
                    const position t = tile_position(p, &at, image0, images, tile);
                    run_tile(p, &at, &w, from, grads, &t, o0, o1, scratch, buffer, sums + part * places);
                }
            }
            free(scratch);
            free(buffer);
        }
        if (!failed) write_result(p, &at, &w, sums, parts, out + g * p->weight_group, image0 == 0);
        free(sums);
        free_rows(&w);
    }
    return failed ? NO_MEMORY : 0;
}

int TYPED(sampled_weight_gradient)(const conv_problem *p, const uint8_t *open, const elem *in, const elem *grad,
                                   float *out) {
    const int64_t whole = p->batch < LANES ? p->batch : p->batch / LANES * LANES;
    const int64_t lanes = min64(whole, LANES), rest = p->batch - whole;
    int (*const run)(const conv_problem *, const uint8_t *, const elem *, const elem *, float *, int64_t, int64_t,
                     int64_t) = p->groups > 1 && p->channels == 1 && p->rows == 1 ? run_planes : run_lanes;
    const int failed = run(p, open, in, grad, out, 0, whole, lanes);
    if (failed || !rest) return failed;
    return run(p, open, in, grad, out, whole, rest, rest);
}
