/* Max pooling that keeps a byte an output: the winner's place in its window, counted row by row.
 *
 * Stands on no other .c file.
 */
#include "exports.h"
#include "pool.h"

#include <math.h>

/* Windows whose running maxima are kept at once: each waits for itself at every cell. */
enum { MANY = 4 };

enum { A_LINE = 64 / sizeof(elem) };

/* What no window chooses: minus infinity. */
#if defined(SWATFX_BF16)
#define OUTSIDE 0xff80
#else
#define OUTSIDE (-INFINITY)
#endif

static void part_row(const pooling *p, const elem *row, elem *parted) {
    int64_t length = part_length(p), inner = p->inner, step = p->stride[1] * inner, shift;
    for (int64_t part = 0; part < p->stride[1]; part++) {
        places in = steps_inside(p, part, length / inner, &shift);
        elem *to = parted + part * length;
        for (int64_t i = 0; i < in.first * inner; i++) to[i] = OUTSIDE;
        for (int64_t i = in.end * inner; i < length; i++) to[i] = OUTSIDE;
        const elem *from = row + shift * inner;
        if (step == inner) {
            memcpy(to + in.first * inner, from + in.first * inner,
                   (size_t)((in.end - in.first) * inner) * sizeof *to);
        } else if (step == 2) {
            for (int64_t i = in.first; i < in.end; i++) to[i] = from[2 * i];
        } else {
            for (int64_t i = in.first; i < in.end; i++) {
                for (int64_t l = 0; l < inner; l++) to[i * inner + l] = from[i * step + l];
            }
        }
    }
}

/* Where a window's cells lie: (i, j) at i * row + cell[j]; the rows and columns inside the image. */
typedef struct {
    const int64_t *cell;
    int64_t row, kernel_width;
    places rows, columns;
} window;

/* The greatest of `count` times `many` windows' cells, the first of them where none is greater than
 * -infinity: that of `columns`, or as `first` says. Vectors of windows are x_step and y_step apart. */
INLINE void best_of(const window *w, const elem *x, int64_t x_step, const float *first, elem *y,
                    uint8_t *index, int64_t y_step, const int count, const int many, int past) {
    wide best[MANY], winner[MANY];
    float start = (float)(w->rows.first * w->kernel_width + w->columns.first);
    for (int m = 0; m < many; m++) {
        best[m] = splat(-INFINITY);
        winner[m] = splat(start);
        if (first) winner[m] = add(winner[m], get_some(first + m * y_step, count, 0));
    }
    for (int64_t i = w->rows.first; i < w->rows.end; i++) {
        for (int64_t j = w->columns.first; j < w->columns.end; j++) {
            const elem *at = x + i * w->row + w->cell[j];
            wide place = splat((float)(i * w->kernel_width + j));
            for (int m = 0; m < many; m++) {
                wide v = get_some(at + m * x_step, count, 0);
                mask wins = beats(v, best[m]);
                best[m] = choose(wins, v, best[m]);
                winner[m] = choose(wins, place, winner[m]);
            }
        }
    }
    for (int m = 0; m < many; m++) {
        put_result(y + m * y_step, best[m], count, past);
        if (index) put_some_bytes(index + m * y_step, winner[m], count);
    }
}

/* `length` windows side by side, with their cells side by side. */
static void best_along(const window *w, const elem *x, const float *first, elem *y,
                       uint8_t *index, int64_t length, int past) {
    int64_t i = 0;
    for (; i + MANY * LANES <= length; i += MANY * LANES) {
        best_of(w, x + i, LANES, first ? first + i : NULL, y + i, index ? index + i : NULL, LANES,
                LANES, MANY, past);
    }
    for (; i < length; i += LANES) {
        const float *start = first ? first + i : NULL;
        uint8_t *at = index ? index + i : NULL;
        if (i + LANES <= length) {
            best_of(w, x + i, LANES, start, y + i, at, LANES, LANES, 1, past);
        } else {
            best_of(w, x + i, LANES, start, y + i, at, LANES, (int)(length - i), 1, 0);
        }
    }
}

/* What all rows of outputs have in common. */
typedef struct {
    pooling p;
    int64_t cell[MOST_CELLS];
    places *columns; /* of each output */
    float *first;    /* columns.first of each element of a row, if vectors lie along the row */
    int past;
} plan;

/* What the next row of outputs will read anew, below what `many` windows of this one read. Columns in
 * such an order are none that a processor fetches ahead by itself. Inlined, or it would be dropped. */
INLINE void fetch_below(const pooling *p, const elem *x, int64_t many) {
    int64_t row = p->width * p->inner, reach = (p->kernel[0] - 1) * p->dilation[0] + 1;
    for (int64_t i = 0; i < p->stride[0]; i++) {
        const elem *at = x + (reach + i) * row;
        for (int64_t c = 0; c < many * p->stride[1] * p->inner; c += A_LINE) {
            __builtin_prefetch(at + c, 0, 3);
        }
    }
}

/* A row of outputs with vectors along `inner`. */
static void pool_inner(const plan *f, const elem *plane, int64_t out, elem *y, uint8_t *index) {
    const pooling *p = &f->p;
    int64_t inner = p->inner, row = p->width * inner, step = p->stride[1] * inner;
    window w = {f->cell, p->dilation[0] * row, p->kernel[1], inside(p, 0, out), {0, 0}};
    const elem *x = plane + (out * p->stride[0] - p->padding[0]) * row - p->padding[1] * inner;
    for (int64_t o = 0; o < p->out_width;) {
        int64_t many = 1;
        w.columns = f->columns[o];
        while (o + many < p->out_width && many < MANY && w.columns.first == 0 &&
               w.columns.end == p->kernel[1] && f->columns[o + many].end == p->kernel[1]) {
            many++;
        }
        if (inner == LANES && many == MANY) {
            best_of(&w, x + o * step, step, NULL, y + o * inner, index ? index + o * inner : NULL,
                    inner, LANES, MANY, f->past);
        } else {
            many = 1; /* room for vectors side by side, or a window at the edge */
            best_along(&w, x + o * step, NULL, y + o * inner, index ? index + o * inner : NULL,
                       inner, f->past);
        }
        fetch_below(p, x + o * step, many);
        o += many;
    }
}

/* A row of outputs with vectors along it; `parted` has room for kernel[0] rows. */
static void pool_parted(const plan *f, const elem *plane, int64_t out, elem *parted, elem *y,
                        uint8_t *index) {
    const pooling *p = &f->p;
    int64_t row = p->width * p->inner, size = part_length(p) * p->stride[1];
    int64_t origin = out * p->stride[0] - p->padding[0];
    window w = {f->cell, size, p->kernel[1], inside(p, 0, out), {0, p->kernel[1]}};
    for (int64_t i = w.rows.first; i < w.rows.end; i++) {
        part_row(p, plane + (origin + i * p->dilation[0]) * row, parted + i * size);
    }
    best_along(&w, parted, f->first, y, index, p->out_width * p->inner, 0);
}

void TYPED(swatfx_max_pool)(const elem *x, elem *y, uint8_t *index, const int64_t *sizes,
                            int threads) {
    plan f = {.first = NULL};
    pooling *p = &f.p;
    memcpy(p, sizes, sizeof *p);
    int64_t row = p->out_width * p->inner, rows = p->planes * p->out_height;
    int64_t plane = p->height * p->width * p->inner, length = part_length(p);
    f.past = outgrows_cache(rows * row) && on_line(y) && p->inner % LANES == 0;
    f.columns = malloc((size_t)p->out_width * sizeof *f.columns);
    for (int64_t o = 0; o < p->out_width; o++) f.columns[o] = inside(p, 1, o);
    for (int64_t j = 0; j < p->kernel[1]; j++) {
        int64_t column = j * p->dilation[1];
        f.cell[j] = column * p->inner;
        if (along_row(p)) {
            f.cell[j] = column % p->stride[1] * length + column / p->stride[1] * p->inner;
        }
    }
    if (along_row(p)) {
        f.first = malloc((size_t)row * sizeof *f.first);
        for (int64_t i = 0; i < row; i++) f.first[i] = (float)f.columns[i / p->inner].first;
    }
#pragma omp parallel num_threads(threads) if (rows * row > 1 << 12)
    {
        elem *parted = NULL;
        if (f.first) parted = malloc((size_t)(p->kernel[0] * length * p->stride[1]) * sizeof *parted);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const elem *from = x + r / p->out_height * plane;
            uint8_t *to = index ? index + r * row : NULL;
            if (parted) {
                pool_parted(&f, from, r % p->out_height, parted, y + r * row, to);
            } else {
                pool_inner(&f, from, r % p->out_height, y + r * row, to);
            }
        }
        settle();
        free(parted);
    }
    free(f.first);
    free(f.columns);
}
