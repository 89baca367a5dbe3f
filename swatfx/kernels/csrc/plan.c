/* Chooses tile, scratch and channel block; the measurements behind the numbers are of 3x3 and 1x1 layers.
 *
 * Stands on no other .c file.
 */
#include "plan.h"

#include "tile.h"

#include <unistd.h>

enum {
    CACHE_WAYS = 16,
    TILE_BYTES = 8192,
    LONG_LIST = 64, /* channels of a block that make a list worth an output gradient's copy */
};

int64_t cache_bytes(void) {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes > 0) return bytes;
#endif
    return 512 * 1024;
}

/* Whether each output position reads the one input position of its own, and all lie in one row. */
static int is_one_row(const conv_problem *p) {
    return p->taps == 1 && p->tap[0].dy == 0 && p->tap[0].dx == 0 && p->step_x == 1 && p->height == 1 &&
           p->grid_height == 1 && p->grid_width == p->width;
}

/* Whether a pointwise product can read its input where it lies: a tile of all channels has to fit the
 * second-level cache, also if planes are so far apart that they meet in few of its sets. */
static int fits_in_place(const conv_problem *p, const plan *at, int64_t column_bytes) {
    if (!is_one_row(p) || p->batch != LANES || at->lanes != LANES) return 0;
    const int64_t lines = ceil_div(at->kernel_cols * column_bytes, sizeof(vec));
    const int64_t sets = cache_bytes() / sizeof(vec) / CACHE_WAYS;
    int64_t spacing = p->width * column_bytes / (int64_t)sizeof(vec) % sets;
    for (int64_t a = sets, b = spacing; b;) spacing = b, b = a % b, a = spacing;
    const int64_t reached = spacing ? sets / spacing * min64(lines, spacing) : lines;
    return p->channels * lines <= reached * CACHE_WAYS && p->channels * p->width * LANES < INT32_MAX;
}

/* How far taps reach. */
static plan reach(const conv_problem *p, int64_t lanes) {
    plan at = {.lanes = lanes};
    int64_t max_dy = INT64_MIN, max_dx = INT64_MIN;
    at.min_dy = at.min_dx = INT64_MAX;
    for (int64_t t = 0; t < p->taps; t++) {
        at.min_dy = min64(at.min_dy, p->tap[t].dy), max_dy = max64(max_dy, p->tap[t].dy);
        at.min_dx = min64(at.min_dx, p->tap[t].dx), max_dx = max64(max_dx, p->tap[t].dx);
    }
    if (!p->taps) at.min_dy = at.min_dx = max_dy = max_dx = 0;
    at.halo_y = max_dy - at.min_dy;
    at.halo_x = max_dx - at.min_dx;
    return at;
}

/* Whole columns that fill whole runs of `elements`, where columns of so many lanes can: else `columns`. */
static int64_t whole_columns(int64_t columns, int64_t lanes, int64_t elements) {
    const int64_t unit = elements % lanes ? 1 : elements / lanes;
    return ceil_div(columns, unit) * unit;
}

/* What follows from the size of a tile. Lines begin at a cache line's, so that few vectors lie on two. */
static void measure(const conv_problem *p, plan *at, int64_t bytes) {
    const int64_t columns = ceil_div(at->halo_x + 1, p->step_x) + at->tile_cols;
    at->line = whole_columns(columns, at->lanes, (int64_t)sizeof(vec) / bytes) * at->lanes;
    if (at->flat) at->line = (at->halo_x + at->tile_cols) * at->lanes;
    at->row = at->line * p->step_x;
    at->plane = at->row * (at->halo_y + 1 + (at->tile_rows - 1) * p->step_y);
}

/* What follows from the rest. */
static void finish(const conv_problem *p, plan *at) {
    at->blocks = ceil_div(p->channels, at->block);
    for (int64_t t = 0; t < p->taps; t++) {
        const int64_t y = p->tap[t].dy - at->min_dy, x = p->tap[t].dx - at->min_dx;
        at->offset[t] = y * at->row + x % p->step_x * at->line + x / p->step_x * at->lanes;
    }
}

/* Few images, and narrow: a row fills no vectors, so that several rows are one run of them, if that takes less.
 * A call of the inner loop is worth a few vectors. */
static void flatten(const conv_problem *p, plan *at, int64_t calls) {
    enum { CALL = 2 };
    if (at->lanes == LANES || p->step_y != 1 || p->step_x != 1 || p->grid_height == 1) return;
    plan flat = *at;
    flat.flat = 1;
    flat.tile_cols = flat.kernel_cols = p->grid_width;
    flat.line = (at->halo_x + p->grid_width) * at->lanes;
    int64_t rows = min64(p->grid_height, (MAX_TILE * LANES + at->halo_x * at->lanes) / flat.line);
    if (rows < 1) return;
    const int64_t flat_calls = ceil_div(p->grid_height, rows);
    rows = ceil_div(p->grid_height, flat_calls);
    flat.kernel_rows = flat.tile_rows = rows;
    flat.kernel_vectors = flat_vectors(&flat, rows);
    const int64_t plain = p->grid_height * at->kernel_vectors * calls + CALL * ceil_div(p->grid_height, at->kernel_rows) * calls;
    if (flat_calls * (flat.kernel_vectors + CALL) < plain) *at = flat;
}

plan make_plan(const conv_problem *p, int64_t lanes, int half) {
    const int64_t bytes = half ? 2 : 4; /* of an element */
    plan at = reach(p, lanes);
    /* As many whole columns as registers hold, the same number in every call of a row. */
    const int64_t most = MAX_TILE * LANES / lanes;
    const int64_t calls = ceil_div(p->grid_width, max64(1, most));
    at.kernel_cols = whole_columns(ceil_div(p->grid_width, calls), lanes, LANES);
    at.kernel_vectors = ceil_div(at.kernel_cols * lanes, LANES);
    at.kernel_rows = min64(min64(MAX_TILE_ROWS, p->grid_height), rows_of_tile(at.kernel_vectors, half));

    at.tile_cols = at.kernel_cols;
    at.tile_rows = at.kernel_rows;
    flatten(p, &at, calls);
    /* Fewer channels make lists too short to be worth loading and storing a tile for. */
    const int64_t least = p->taps > 1 ? 32 : 256;
    at.block = min64(p->channels, (p->taps > 1 ? 512 : 2048) / bytes);
    const int64_t budget = cache_bytes() * 3 / 8 / bytes; /* of more, pages that meet in its sets fall out */
    for (;;) {
        measure(p, &at, bytes);
        if (at.block * at.plane > budget && at.block > 16) {
            at.block = max64(16, ceil_div(at.block, 2));
            continue;
        }
        /* Taller, as long as every thread has tiles enough to share out evenly. */
        const int64_t taller = at.tile_rows + at.kernel_rows;
        const int64_t tiles = ceil_div(p->batch, lanes) * ceil_div(p->grid_height, taller) * calls;
        if (at.tile_rows >= p->grid_height || tiles < 4 * p->threads) break;
        const int64_t next = at.plane + at.row * p->step_y * at.kernel_rows;
        if (at.block * next <= budget)
            at.tile_rows = taller;
        else if (at.block > least && at.tile_rows < 4 * (at.halo_y + 1))
            at.block = max64(least, ceil_div(at.block, 2)); /* a low tile copies its halo too often */
        else
            break;
    }
    if (fits_in_place(p, &at, LANES * bytes)) {
        at.in_place = 1;
        at.block = p->channels;
        at.plane = p->width * LANES;
    }
    finish(p, &at);
    return at;
}

plan make_sampled_plan(const conv_problem *p, int64_t lanes, int half) {
    const int64_t bytes = half ? 2 : 4;
    plan at = reach(p, lanes);
    /* So many columns of the output gradient stay in the first-level cache beside what streams by. */
    const int64_t most = max64(1, TILE_BYTES / (lanes * bytes));
    at.tile_cols = ceil_div(p->grid_width, ceil_div(p->grid_width, most));
    at.tile_rows = min64(p->grid_height, max64(1, most / at.tile_cols));
    at.stack = min64(ceil_div(p->batch, lanes), max64(1, most / (at.tile_cols * at.tile_rows)));
    at.kernel_cols = at.tile_cols;
    at.block = p->channels;
    const int64_t budget = cache_bytes() * 5 / 8 / bytes;
    for (;;) {
        measure(p, &at, bytes);
        if (at.block * at.stack * at.plane <= budget) break;
        if (at.block > LONG_LIST)
            at.block = max64(LONG_LIST, ceil_div(at.block, 2));
        else if (at.stack > 1)
            at.stack /= 2;
        else if (at.tile_rows > 1)
            at.tile_rows = ceil_div(at.tile_rows, 2);
        else if (at.block > 16)
            at.block = max64(16, ceil_div(at.block, 2));
        else
            break;
    }
    at.plane *= at.stack;
    at.block = ceil_div(p->channels, ceil_div(p->channels, at.block));
    if (fits_in_place(p, &at, LANES * bytes)) {
        at.in_place = at.stack = 1;
        at.block = p->channels;
        at.plane = p->width * LANES;
    }
    finish(p, &at);
    return at;
}
