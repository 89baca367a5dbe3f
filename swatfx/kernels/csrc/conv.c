/* Convolution with sparse weights on tensors in the layout (channel, y, x, image).
 *
 * Forward, and each phase of the input gradient, are the same sum: every nonzero weight of an output row
 * adds its multiple of a shifted input plane. An input tile with its halo is copied into a scratch buffer
 * that stays in the second-level cache (padding, stride and batch tail are settled by the copy), and the
 * nonzeros of all output rows run over it.
 *
 * Stands on plan.c, rows.c and tile.c.
 */
#include "exports.h"
#include "plan.h"
#include "rows.h"
#include "tile.h"

/* Columns [from, until) of an image row, a block of lanes each. */
static inline __attribute__((always_inline)) void copy_columns(
    float *to, const float *line, int64_t from, int64_t until, int64_t step, int64_t lanes) {
    for (int64_t c = from; c < until; c++) {
        if (lanes == LANES)
            store(to + c * LANES, load(line + c * step));
        else
            memcpy(to + c * lanes, line + c * step, lanes * sizeof(float));
    }
}

/* Channels [k0, k1) of the input under the tile at (y0, x0), zero where there is no input. */
static void fill_scratch(const conv_problem *p, const plan *at, const float *in, int64_t image, int64_t y0,
                         int64_t x0, int64_t channels, float *scratch) {
    const int64_t rows = at->plane / at->row, columns = at->line / at->lanes;
    const int64_t top = y0 * p->step_y + at->min_dy, left = x0 * p->step_x + at->min_dx;
    for (int64_t k = 0; k < channels; k++)
        for (int64_t r = 0; r < rows; r++) {
            float *to = scratch + k * at->plane + r * at->row;
            const int64_t y = top + r;
            if (y < 0 || y >= p->height) {
                memset(to, 0, at->row * sizeof(float));
                continue;
            }
            const float *line = in + ((k * p->height + y) * p->width) * p->batch + image;
            for (int64_t phase = 0; phase < p->step_x; phase++, to += at->line) {
                const int64_t x = left + phase;
                /* Columns c for which x + c * step lies within the input. */
                const int64_t from = x >= 0 ? 0 : min64(columns, ceil_div(-x, p->step_x));
                const int64_t until =
                    max64(from, min64(columns, p->width > x ? ceil_div(p->width - x, p->step_x) : 0));
                memset(to, 0, from * at->lanes * sizeof(float));
                const float *first = line + x * p->batch;
                if (k + 1 < channels) /* planes lie far apart: have the next one's row on its way */
                    for (int64_t c = from; c < until; c++)
                        __builtin_prefetch(first + p->height * p->width * p->batch + c * p->step_x * p->batch, 0, 2);
                if (p->step_x == 1 && p->batch == at->lanes)
                    memcpy(to + from * at->lanes, first + from * at->lanes,
                           (until - from) * at->lanes * sizeof(float));
                else if (at->lanes == LANES)
                    copy_columns(to, first, from, until, p->step_x * p->batch, LANES);
                else
                    copy_columns(to, first, from, until, p->step_x * p->batch, at->lanes);
                memset(to + until * at->lanes, 0, (columns - until) * at->lanes * sizeof(float));
            }
        }
}

/* Where a tile's vectors do not lie in the result as they do in registers: by way of a buffer. */
static void move_columns(const conv_problem *p, const plan *at, float *buffer, float *out, int64_t rows,
                         int64_t cols, int to_buffer) {
    const int64_t line = at->kernel_vectors * LANES;
    const int64_t out_row = p->step_out_y * p->out_width * p->batch, out_col = p->step_out_x * p->batch;
    const int64_t bytes = at->lanes * sizeof(float);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            float *in_buffer = buffer + r * line + c * at->lanes, *in_out = out + r * out_row + c * out_col;
            memcpy(to_buffer ? in_buffer : in_out, to_buffer ? in_out : in_buffer, bytes);
        }
}

/* Whether the result is better written around the caches: large, and hardly anything to compute. */
static int streams(const conv_problem *p) {
    const int64_t floats = p->groups * p->rows * p->out_height * p->out_width * p->batch;
    return p->taps == 1 && floats > 4 << 20;
}

/* Planes that will be copied next, fetched while the present tile is computed: a pointwise product does
 * too little with a tile to hide what it waits for memory. */
typedef struct {
    const float *from;
    int64_t planes, lines, stride; /* lines of LANES floats in a plane; floats between planes */
} upcoming;

static inline void fetch(const upcoming *next, int64_t share, int64_t shares) {
    const int64_t lines = next->planes * next->lines;
    const int64_t until = lines * (share + 1) / shares;
    int64_t line = lines * share / shares;
    int64_t plane = next->lines ? line / next->lines : 0, i = line - plane * next->lines;
    for (; line < until; line++) {
        __builtin_prefetch(next->from + plane * next->stride + i * LANES, 0, 2);
        if (++i == next->lines) i = 0, plane++;
    }
}

static inline int64_t row_count(const sparse_rows *w, int64_t row) { return w->begin[row + 1] - w->begin[row]; }

/* GROUP rows from o on, empty ones passed over, that share a pattern: their numbers, or 0. */
static int find_group(const sparse_rows *w, int64_t base, int64_t o, int64_t end, int64_t members[GROUP]) {
    const int64_t count = row_count(w, base + o);
    const int32_t *pattern = w->offset + w->begin[base + o];
    int found = 0;
    for (; o < end && found < GROUP; o++) {
        const int64_t other = row_count(w, base + o);
        if (!other) continue;
        if (other != count || memcmp(pattern, w->offset + w->begin[base + o], count * sizeof(int32_t))) return 0;
        members[found++] = o;
    }
    return found == GROUP;
}

/* One row of a tile, a few vectors at a time. */
static void run_group(const shared_nonzeros *e, const float *in, int64_t at, int64_t out_col, int64_t vectors,
                      int first) {
    const int64_t calls = ceil_div(vectors, MAX_GROUP_COLS), most = ceil_div(vectors, calls);
    for (int64_t v = 0; v < vectors; v += most, in += most * LANES, at += most * out_col)
        group_kernel(min64(most, vectors - v))(e, in, at, out_col, first);
}

/* How a tile's rows and columns lie in the result. */
typedef struct {
    int64_t height, width, vectors;
    int64_t line, row, col, plane; /* floats: row 0's first column; between rows, vectors and planes */
    int one_column, direct, stream;
} placement;

static placement place(const conv_problem *p, const plan *at, const float *out, int64_t image, int64_t y0, int64_t x0) {
    placement t = {.height = min64(at->tile_rows, p->grid_height - y0), .width = min64(at->tile_cols, p->grid_width - x0)};
    t.vectors = ceil_div(t.width * at->lanes, LANES);
    t.row = p->step_out_y * p->out_width * p->batch;
    t.plane = p->out_height * p->out_width * p->batch;
    t.line = image + (y0 * p->step_out_y + p->at_y) * p->out_width * p->batch + (x0 * p->step_out_x + p->at_x) * p->batch;
    /* A vector of the tile is one column of the result; or the columns of a row are one run of it. */
    t.one_column = at->lanes == LANES;
    t.col = t.one_column ? p->step_out_x * p->batch : LANES;
    t.direct = t.one_column || (p->step_out_x == 1 && p->batch == at->lanes && t.width * at->lanes % LANES == 0);
    /* Each column of the result begins at a whole vector where the batch is one or several. */
    const int aligned = p->batch % LANES == 0 && (uintptr_t)out % sizeof(vec) == 0;
    t.stream = t.one_column && at->blocks == 1 && streams(p) && aligned;
    return t;
}

/* All output rows [o0, o1) over one scratch; `block` tells which channels it holds. */
static void run_tile(const conv_problem *p, const plan *at, const sparse_rows *w, const float *bias,
                     const float *scratch, float *buffer, float *out, int64_t image, int64_t y0, int64_t x0,
                     int64_t o0, int64_t o1, int64_t block, upcoming next) {
    const placement t = place(p, at, out, image, y0, x0);
    const int64_t line = at->kernel_vectors * LANES, in_row = p->step_y * at->row, base = block * p->rows;
    const int first = block == 0;
    int64_t members[GROUP], group_end = o0;
    for (int64_t o = o0; o < o1; o++) {
        fetch(&next, o - o0, o1 - o0);
        const nonzeros e = {w->offset + w->begin[base + o], w->value + w->begin[base + o], row_count(w, base + o)};
        if (e.count ? o < group_end : !first) continue; /* done with its group; nothing to add */
        float *to = out + o * t.plane + t.line;
        if (e.count && t.direct && find_group(w, base, o, o1, members)) {
            shared_nonzeros shared = {.offset = e.offset, .count = e.count};
            for (int64_t g = 0; g < GROUP; g++) {
                shared.value[g] = w->value + w->begin[base + members[g]];
                shared.out[g] = out + members[g] * t.plane + t.line;
                shared.start[g] = bias ? bias[members[g]] : 0;
            }
            for (int64_t y = 0; y < t.height; y++)
                run_group(&shared, scratch + y * in_row, y * t.row, t.col, t.vectors, first);
            group_end = members[GROUP - 1] + 1;
            continue;
        }
        for (int64_t y = 0; y < t.height; y += at->kernel_rows, to += at->kernel_rows * t.row) {
            const int64_t rows = min64(at->kernel_rows, t.height - y);
            tile_at tile = {scratch + y * in_row, in_row, to, t.row, t.col, t.stream};
            if (!t.direct) {
                tile.out = buffer, tile.out_row = line, tile.out_col = LANES;
                if (!first) move_columns(p, at, buffer, to, rows, t.width, 1);
            }
            tile_kernel(rows, t.vectors)(e, tile, first, bias ? bias[o] : 0);
            if (!t.direct) move_columns(p, at, buffer, to, rows, t.width, 0);
        }
    }
}

/* What is copied after block `b` of the tile at column x0, where it is a pointwise product's one row. */
static upcoming after(const conv_problem *p, const plan *at, const float *in, int64_t x0, int64_t b) {
    if (p->taps != 1 || p->height != 1 || at->lanes != LANES || p->batch != LANES) return (upcoming){0};
    if (++b == at->blocks) b = 0, x0 += at->tile_cols * p->threads; /* tiles are dealt out in order */
    if (x0 >= p->width) return (upcoming){0};
    const int64_t k = b * at->block, stride = p->width * LANES;
    return (upcoming){in + k * stride + x0 * LANES, min64(at->block, p->channels - k),
                      min64(at->tile_cols, p->width - x0), stride};
}

/* Few tiles: into how many shares each one's output rows are cut, lest threads wait for the last. */
static int64_t share_rows(const conv_problem *p, int64_t tiles) {
    const int64_t most = max64(1, min64(2 * p->threads, p->rows / 16));
    int64_t shares = 1;
    while (shares < most && tiles * shares < 8 * p->threads && tiles * shares % p->threads) shares++;
    return shares;
}

static int run_lanes(const conv_problem *p, const float *in, const float *weight, const float *bias,
                     float *out, float threshold, int64_t image0, int64_t images, int64_t lanes) {
    const plan at = make_plan(p, lanes);
    if (!at.in_place && at.block * at.plane > MAX_SCRATCH) return DOES_NOT_FIT;
    int failed = 0;
    for (int64_t g = 0; g < p->groups; g++) {
        sparse_rows w = build_rows(p, &at, weight + g * p->weight_group, threshold);
        if (!w.begin) return NO_MEMORY;
        const float *from = in + g * p->channels * p->height * p->width * p->batch;
        float *to = out + g * p->rows * p->out_height * p->out_width * p->batch;
        const float *start = bias ? bias + g * p->rows : NULL;
        const int64_t tiles_y = ceil_div(p->grid_height, at.tile_rows);
        const int64_t tiles_x = ceil_div(p->grid_width, at.tile_cols);
        const int64_t tiles = images / lanes * tiles_y * tiles_x;
        const int64_t shares = share_rows(p, tiles);
#pragma omp parallel num_threads((int)p->threads) reduction(| : failed)
        {
            /* Vectors of a ragged last column reach past the scratch: never used, but read. */
            const int64_t held = at.in_place ? 0 : at.block * at.plane, floats = held + MAX_TILE * LANES;
            float *scratch = aligned_alloc(64, ceil_div(floats, LANES) * LANES * sizeof(float));
            float *buffer = aligned_alloc(64, MAX_TILE * LANES * sizeof(float));
            failed |= !scratch || !buffer;
            if (!failed) memset(scratch + held, 0, MAX_TILE * LANES * sizeof(float));
#pragma omp for schedule(dynamic)
            for (int64_t unit = 0; unit < tiles * shares; unit++) {
                if (failed) continue;
                const int64_t share = unit % shares, tile = unit / shares;
                const int64_t x0 = tile % tiles_x * at.tile_cols;
                const int64_t y0 = tile / tiles_x % tiles_y * at.tile_rows;
                const int64_t image = image0 + tile / (tiles_x * tiles_y) * lanes;
                const int64_t o0 = p->rows * share / shares, o1 = p->rows * (share + 1) / shares;
                for (int64_t b = 0; b < at.blocks; b++) {
                    const int64_t k = b * at.block, channels = min64(at.block, p->channels - k);
                    const float *planes = from + k * p->height * p->width * p->batch;
                    if (!at.in_place) fill_scratch(p, &at, planes, image, y0, x0, channels, scratch);
                    const float *held_at = at.in_place ? planes + x0 * LANES : scratch;
                    run_tile(p, &at, &w, start, held_at, buffer, to, image, y0, x0, o0, o1, b,
                             after(p, &at, from, x0, b));
                }
            }
            free(scratch);
            free(buffer);
        }
        free_rows(&w);
        if (failed) return NO_MEMORY;
    }
    return 0;
}

int sparse_conv(const conv_problem *p, const float *in, const float *weight, const float *bias, float *out,
                float threshold) {
    const int64_t whole = p->batch < LANES ? p->batch : p->batch / LANES * LANES;
    const int64_t lanes = min64(whole, LANES), rest = p->batch - whole;
    const int failed = whole ? run_lanes(p, in, weight, bias, out, threshold, 0, whole, lanes) : 0;
    if (failed || !rest) return failed;
    return run_lanes(p, in, weight, bias, out, threshold, whole, rest, rest);
}
