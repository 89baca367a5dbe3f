/* Convolution with sparse weights on tensors in the layout (channel, y, x, image).
 *
 * Forward, and each phase of the input gradient, are the same sum: every nonzero weight of an output row
 * adds its multiple of a shifted input plane. An input tile with its halo is copied into a scratch buffer
 * that stays in the second-level cache (padding, stride and batch tail are settled by the copy), and the
 * nonzeros of all output rows run over it.
 *
 * Stands on plan.c, rows.c, scratch.c, tile.c and tile_bf16.c.
 */
#include "exports.h"
#include "plan.h"
#include "rows.h"
#include "scratch.h"
#include "tile.h"

/* Where a tile's vectors do not lie in the result as they do in registers: by way of a buffer. */
static void move_columns(const conv_problem *p, const plan *at, elem *buffer, elem *out, int64_t rows,
                         int64_t cols, int to_buffer) {
    const int64_t line = at->flat ? at->line : at->kernel_vectors * LANES;
    const int64_t out_row = p->step_out_y * p->out_width * p->batch, out_col = p->step_out_x * p->batch;
    const int64_t bytes = at->lanes * sizeof(elem);
    const int joined = out_col == at->lanes; /* columns follow each other in the result, as in the buffer */
    const int64_t runs = joined ? 1 : cols, size = (joined ? cols : 1) * bytes;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < runs; c++) {
            elem *in_buffer = buffer + r * line + c * at->lanes, *in_out = out + r * out_row + c * out_col;
            memcpy(to_buffer ? in_buffer : in_out, to_buffer ? in_out : in_buffer, size);
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
    const elem *from;
    int64_t planes, lines, stride; /* runs of LANES elements in a plane; elements between planes */
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

/* Vectors that a call for a group takes, of so many in a row; of bfloat16 an even number, as registers do. */
static int64_t group_cols(int64_t vectors) {
    const int64_t most = ceil_div(vectors, ceil_div(vectors, MAX_GROUP_COLS));
    return HALF ? min64(MAX_GROUP_COLS, (most + 1) / 2 * 2) : most;
}

/* How a tile's rows and columns lie in the result. */
typedef struct {
    int64_t height, width, vectors;
    int64_t line, row, col, plane; /* elements: row 0's first column; between rows, vectors and planes */
    int one_column, direct, stream;
} placement;

static placement place(const conv_problem *p, const plan *at, const elem *out, int64_t image, int64_t y0, int64_t x0) {
    placement t = {.height = min64(at->tile_rows, p->grid_height - y0), .width = min64(at->tile_cols, p->grid_width - x0)};
    t.vectors = ceil_div(t.width * at->lanes, LANES);
    t.row = p->step_out_y * p->out_width * p->batch;
    t.plane = p->out_height * p->out_width * p->batch;
    t.line = image + (y0 * p->step_out_y + p->at_y) * p->out_width * p->batch + (x0 * p->step_out_x + p->at_x) * p->batch;
    /* A vector of the tile is one column of the result; or the columns of a row are one run of it. */
    t.one_column = at->lanes == LANES;
    t.col = t.one_column ? p->step_out_x * p->batch : LANES;
    t.direct = t.one_column || (!at->flat && p->step_out_x == 1 && p->batch == at->lanes && t.width * at->lanes % LANES == 0);
    /* Each column of the result begins at a whole vector where the batch is one or several. */
    const int aligned = p->batch % LANES == 0 && (uintptr_t)out % sizeof(vec) == 0;
    t.stream = t.one_column && at->blocks == 1 && streams(p) && aligned;
    /* A line holds two columns of bfloat16, which have to begin one. */
    if (HALF) t.stream = t.stream && t.col == LANES && t.line % (2 * LANES) == 0 && t.row % (2 * LANES) == 0 &&
                         t.plane % (2 * LANES) == 0;
    return t;
}

/* What a thread works with. */
typedef struct {
    elem *scratch, *buffer;
    float *sums; /* of bfloat16, where channels come in blocks: [row][sums_rows][kernel_vectors], else NULL */
} room;

/* Rows of the result over one scratch. */
typedef struct {
    const sparse_rows *w;
    const float *bias;
    const elem *held;
    const room *own;
    elem *out;
    placement t;
    int64_t in_row;            /* elements between rows of the scratch that a tile reads */
    int64_t line, sums_plane;  /* floats of a row of a tile's sums, and of a row of the result's */
    int64_t base, o0;          /* cell of row 0, and the first row */
    int first, last, finite;   /* whether these are the first and the last channels; whether all that is read is */
} pass;

/* GROUP rows that share the pattern `e`, a row of the tile and a few vectors at a time. */
static void run_group(const pass *c, nonzeros e, const int64_t members[GROUP]) {
    const int64_t most = group_cols(c->t.vectors);
#if defined(SWATFX_BF16)
    shared_nonzeros_bf16 shared = {.offset = e.offset, .count = e.count, .goes_on = !c->first, .stays = !c->last};
#else
    shared_nonzeros shared = {.offset = e.offset, .count = e.count};
#endif
    for (int64_t g = 0; g < GROUP; g++) {
        shared.value[g] = c->w->value + c->w->begin[c->base + members[g]];
        shared.out[g] = c->out + members[g] * c->t.plane + c->t.line;
        shared.start[g] = c->bias ? c->bias[members[g]] : 0;
#if defined(SWATFX_BF16)
        shared.sums[g] = c->own->sums ? c->own->sums + (members[g] - c->o0) * c->sums_plane : NULL;
#endif
    }
    for (int64_t y = 0; y < c->t.height; y++)
        for (int64_t v = 0; v < c->t.vectors; v += most) {
            const elem *in = c->held + y * c->in_row + v * LANES;
            const int64_t cols = min64(most, c->t.vectors - v), to = y * c->t.row + v * c->t.col;
#if defined(SWATFX_BF16)
            group_kernel_bf16(cols, c->finite)(&shared, in, to, c->t.col, y * c->line + v * LANES);
#else
            group_kernel(cols)(&shared, in, to, c->t.col, c->first);
#endif
        }
}

/* One row of the result, a tile at a time. */
static void run_row(const pass *c, const conv_problem *p, const plan *at, nonzeros e, int64_t o) {
    const placement *t = &c->t;
    const float start = c->bias ? c->bias[o] : 0;
    elem *to = c->out + o * t->plane + t->line;
#if defined(SWATFX_BF16)
    float *sums = c->own->sums ? c->own->sums + (o - c->o0) * c->sums_plane : NULL;
#endif
    for (int64_t y = 0; y < t->height; y += at->kernel_rows, to += at->kernel_rows * t->row) {
        const int64_t rows = min64(at->kernel_rows, t->height - y), in_call = at->flat ? 1 : rows;
        const int64_t vectors = at->flat ? flat_vectors(at, rows) : t->vectors;
#if defined(SWATFX_BF16)
        float *at_sums = sums ? sums + (at->flat ? y / at->kernel_rows : y) * c->line : NULL;
        tile_at_bf16 tile = {c->held + y * c->in_row, c->in_row, to, t->row, t->col, t->stream,
                             c->first ? NULL : at_sums, c->last ? NULL : at_sums, c->line};
        if (!t->direct) tile.out = c->own->buffer, tile.out_row = c->line, tile.out_col = LANES;
        tile_kernel_bf16(in_call, vectors, c->finite)(e, tile, start);
        if (!t->direct && c->last) move_columns(p, at, c->own->buffer, to, rows, t->width, 0);
#else
        tile_at tile = {c->held + y * c->in_row, c->in_row, to, t->row, t->col, t->stream};
        if (!t->direct) {
            tile.out = c->own->buffer, tile.out_row = c->line, tile.out_col = LANES;
            if (!c->first) move_columns(p, at, c->own->buffer, to, rows, t->width, 1);
        }
        tile_kernel(in_call, vectors)(e, tile, c->first, start);
        if (!t->direct) move_columns(p, at, c->own->buffer, to, rows, t->width, 0);
#endif
    }
}

/* All output rows [o0, o1) over one scratch; `block` tells which channels it holds. */
static void run_tile(const conv_problem *p, const plan *at, const sparse_rows *w, const float *bias,
                     const elem *held, const room *own, elem *out, int64_t image, int64_t y0, int64_t x0,
                     int64_t o0, int64_t o1, int64_t block, upcoming next, int finite) {
    const int64_t line = at->kernel_vectors * LANES;
    const pass c = {w, bias, held, own, out, place(p, at, out, image, y0, x0), p->step_y * at->row, line,
                    sums_rows(at) * line, block * p->rows, o0, block == 0, block + 1 == at->blocks, finite};
    /* Sums of bfloat16 become a result with the last channels, also where these add nothing. */
    const int writes = c.first || (HALF && c.last);
    int64_t members[GROUP], group_end = o0;
    for (int64_t o = o0; o < o1; o++) {
        fetch(&next, o - o0, o1 - o0);
        const int64_t cell = c.base + o;
        const nonzeros e = {w->offset + w->begin[cell], w->value + w->begin[cell], row_count(w, cell)};
        if (e.count ? o < group_end : !writes) continue; /* done with its group; nothing to do */
        if (e.count && c.t.direct && find_group(w, c.base, o, o1, members)) {
            run_group(&c, e, members);
            group_end = members[GROUP - 1] + 1;
        } else {
            run_row(&c, p, at, e, o);
        }
    }
}

/* All that a tile reads: the scratch, or planes of the input where they lie. */
static int reads_finite(const conv_problem *p, const plan *at, const elem *held, int64_t x0, int64_t channels) {
    if (!at->in_place) return all_finite(held, channels * at->plane);
    const int64_t columns = min64(at->tile_cols, p->width - x0);
    for (int64_t k = 0; k < channels; k++)
        if (!all_finite(held + k * at->plane, columns * LANES)) return 0;
    return 1;
}

/* What is copied after block `b` of the tile at column x0, where it is a pointwise product's one row. */
static upcoming after(const conv_problem *p, const plan *at, const elem *in, int64_t x0, int64_t b) {
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

/* For `rows` rows of the result at a time. */
static room make_room(const plan *at, int64_t rows, int *failed) {
    /* Vectors of a ragged last column reach past the scratch: never used, but read. */
    const int64_t held = at->in_place ? 0 : at->block * at->plane, whole = held + MAX_TILE * LANES;
    const int64_t sums = HALF && at->blocks > 1 ? rows * sums_rows(at) * at->kernel_vectors * LANES : 0;
    const room own = {aligned_alloc(64, ceil_div(whole, 2 * LANES) * 2 * LANES * sizeof(elem)),
                      aligned_alloc(64, ceil_div(MAX_TILE, 2) * 2 * LANES * sizeof(elem)),
                      sums ? aligned_alloc(64, sums * sizeof(float)) : NULL};
    *failed |= !own.scratch || !own.buffer || (sums && !own.sums);
    if (!*failed) memset(own.scratch + held, 0, MAX_TILE * LANES * sizeof(elem));
    return own;
}

static void free_room(room *own) {
    free(own->scratch);
    free(own->buffer);
    free(own->sums);
}

/* Weights, or the rows that were made of them: those of the next group. */
typedef struct {
    const float *weight;
    float threshold;
    const char **made; /* or NULL */
} source;

static int does_fit(const plan *at) { return at->in_place || at->block * at->plane <= MAX_SCRATCH; }

static sparse_rows group_rows(const conv_problem *p, const plan *at, source from, int64_t g) {
    return build_rows(p, at, from.weight + g * p->weight_group, from.threshold, HALF);
}

/* Where groups are one plane each, these are dealt out: one alone is little work. */
static int run_planes(const conv_problem *all, const elem *in, source from, const float *bias, elem *out,
                      int64_t image0, int64_t images, int64_t lanes) {
    conv_problem alone = *all;
    const conv_problem *p = &alone;
    alone.threads = 1; /* a plane is one thread's */
    const plan at = make_plan(p, lanes, HALF);
    if (!at.in_place && at.plane > MAX_SCRATCH) return DOES_NOT_FIT;
    const int64_t tiles_y = ceil_div(p->grid_height, at.tile_rows), tiles_x = ceil_div(p->grid_width, at.tile_cols);
    int failed = 0;
#pragma omp parallel num_threads((int)all->threads) reduction(| : failed)
    {
        room own = make_room(&at, 1, &failed);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < p->groups; g++) {
            if (failed) continue;
            const elem *plane = in + g * p->height * p->width * p->batch;
            elem *to = out + g * p->out_height * p->out_width * p->batch;
            int32_t offset[MAX_TAPS];
            float value[MAX_TAPS];
            int64_t begin[2] = {0, build_row(p, &at, from.weight + g * p->weight_group, from.threshold, HALF, offset, value)};
            const sparse_rows w = {.begin = begin, .offset = offset, .value = value};
            for (int64_t tile = 0; tile < images / lanes * tiles_y * tiles_x; tile++) {
                const int64_t x0 = tile % tiles_x * at.tile_cols, y0 = tile / tiles_x % tiles_y * at.tile_rows;
                const int64_t image = image0 + tile / (tiles_x * tiles_y) * lanes;
                const elem *read = at.in_place ? plane + x0 * LANES : own.scratch;
                if (!at.in_place && begin[1]) TYPED(copy_tile)(p, &at, plane, image, y0, x0, 1, own.scratch);
                const int finite = !begin[1] || reads_finite(p, &at, read, x0, 1);
                run_tile(p, &at, &w, bias ? bias + g : NULL, read, &own, to, image, y0, x0, 0, 1, 0, (upcoming){0},
                         finite);
            }
        }
        free_room(&own);
    }
    return failed ? NO_MEMORY : 0;
}

static int run_lanes(const conv_problem *p, const elem *in, source weights, const float *bias, elem *out,
                     int64_t image0, int64_t images, int64_t lanes) {
    const plan at = make_plan(p, lanes, HALF);
    if (!does_fit(&at)) return DOES_NOT_FIT;
    int failed = 0;
    for (int64_t g = 0; g < p->groups; g++) {
        sparse_rows w = weights.made ? made_rows(weights.made, at.blocks * p->rows) : group_rows(p, &at, weights, g);
        if (!w.begin) return NO_MEMORY;
        const elem *from = in + g * p->channels * p->height * p->width * p->batch;
        elem *to = out + g * p->rows * p->out_height * p->out_width * p->batch;
        const float *start = bias ? bias + g * p->rows : NULL;
        const int64_t tiles_y = ceil_div(p->grid_height, at.tile_rows);
        const int64_t tiles_x = ceil_div(p->grid_width, at.tile_cols);
        const int64_t tiles = images / lanes * tiles_y * tiles_x;
        const int64_t shares = share_rows(p, tiles);
#pragma omp parallel num_threads((int)p->threads) reduction(| : failed)
        {
            room own = make_room(&at, ceil_div(p->rows, shares), &failed);
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
                    const elem *planes = from + k * p->height * p->width * p->batch;
                    if (!at.in_place) TYPED(copy_tile)(p, &at, planes, image, y0, x0, channels, own.scratch);
                    const elem *read = at.in_place ? planes + x0 * LANES : own.scratch;
                    const int finite = reads_finite(p, &at, read, x0, channels);
                    run_tile(p, &at, &w, start, read, &own, to, image, y0, x0, o0, o1, b,
                             after(p, &at, from, x0, b), finite);
                }
            }
            free_room(&own);
        }
        if (!weights.made) free_rows(&w);
        if (failed) return NO_MEMORY;
    }
    return 0;
}

/* One plane a group: what is made of such weights is made as they are used. */
static int is_planes(const conv_problem *p) { return p->groups > 1 && p->channels == 1 && p->rows == 1; }

/* Images that fill vectors, as far as there are so many; what remains is a run of its own. */
static int64_t whole_images(const conv_problem *p) { return p->batch < LANES ? p->batch : p->batch / LANES * LANES; }

int TYPED(sparse_conv)(const conv_problem *p, const elem *in, const float *weight, const float *bias, elem *out,
                       float threshold, const void *made) {
    const int64_t whole = whole_images(p), lanes = min64(whole, LANES), rest = p->batch - whole;
    const char *next = made;
    const source from = {weight, threshold, made ? &next : NULL};
    int (*const run)(const conv_problem *, const elem *, source, const float *, elem *, int64_t, int64_t, int64_t) =
        is_planes(p) ? run_planes : run_lanes;
    const int failed = run(p, in, from, bias, out, 0, whole, lanes);
    if (failed || !rest) return failed;
    return run(p, in, from, bias, out, whole, rest, rest);
}

int64_t TYPED(sparse_conv_rows)(const conv_problem *p, const float *weight, float threshold, void *to, int64_t bytes) {
    const int64_t whole = whole_images(p), parts[] = {min64(whole, LANES), p->batch - whole};
    int64_t used = 0;
    if (is_planes(p)) return 0;
    for (int i = 0; i < 2 && parts[i]; i++) {
        const plan at = make_plan(p, parts[i], HALF);
        if (!does_fit(&at)) return 0;
        for (int64_t g = 0; g < p->groups; g++) {
            sparse_rows w = group_rows(p, &at, (source){weight, threshold, NULL}, g);
            if (!w.begin) return -NO_MEMORY;
            used += lay_rows(&w, at.blocks * p->rows, (char *)to + used, bytes - used);
            free_rows(&w);
        }
    }
    return used;
}
