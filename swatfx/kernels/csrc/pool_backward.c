/* Backward of max pooling: each input gathers from the windows that see it, by rising output, so
 * that threads share nothing and sums come out as torch's do.
 *
 * Stands on no other .c file.
 */
#include "exports.h"
#include "pool.h"

/* Puts a part's elements where they belong in a row. */
static void join_part(const pooling *p, const elem *from, int64_t part, elem *row) {
    int64_t inner = p->inner, step = p->stride[1] * inner, shift;
    places in = steps_inside(p, part, part_length(p) / inner, &shift);
    elem *to = row + shift * inner;
    if (inner == 1 && step == 2) {
        for (int64_t i = in.first; i < in.end; i++) to[2 * i] = from[i];
        return;
    }
    for (int64_t i = in.first; i < in.end; i++) {
        for (int64_t l = 0; l < inner; l++) to[i * step + l] = from[i * inner + l];
    }
}

/* The windows that see a position: `from[at]` to `from[at + 1]` of the pairs, by rising output. */
typedef struct {
    int64_t *from, *out, *place;
} seen_by;

static seen_by windows_of(const pooling *p, int axis) {
    int64_t extent = axis ? p->width : p->height, outs = axis ? p->out_width : p->out_height;
    size_t pairs = (size_t)(outs * p->kernel[axis] + 1);
    seen_by s = {malloc((size_t)(extent + 1) * sizeof(int64_t)), malloc(pairs * sizeof(int64_t)),
                 malloc(pairs * sizeof(int64_t))};
    int64_t found = 0;
    for (int64_t at = 0; at < extent; at++) {
        int64_t reach = (p->kernel[axis] - 1) * p->dilation[axis], v = at + p->padding[axis];
        s.from[at] = found;
        for (int64_t out = div_up(v - reach, p->stride[axis]); out < outs; out++) {
            int64_t apart = v - out * p->stride[axis];
            if (apart < 0) break;
            if (apart % p->dilation[axis]) continue;
            s.out[found] = out;
            s.place[found++] = apart / p->dilation[axis];
        }
    }
    s.from[extent] = found;
    return s;
}

static void let_go(seen_by s) {
    free(s.from);
    free(s.out);
    free(s.place);
}

/* Where the windows that see a row have their gradients and winners, and their place times the
 * kernel's width. */
typedef struct {
    int64_t count;
    const elem *grad[MOST_CELLS];
    const uint8_t *winner[MOST_CELLS];
    int place[MOST_CELLS];
} seen_rows;

INLINE wide gather(const seen_rows *rows, const seen_by *columns, int64_t column, int64_t inner,
                   int64_t i, const int count) {
    wide sum = splat(0);
    for (int64_t a = 0; a < rows->count; a++) {
        for (int64_t b = columns->from[column]; b < columns->from[column + 1]; b++) {
            int64_t at = columns->out[b] * inner + i;
            int cell = rows->place[a] + (int)columns->place[b];
            if (count == LANES) {
                mask won = bytes_equal(rows->winner[a] + at, cell);
                sum = add_where(won, sum, get(rows->grad[a] + at));
            } else {
                uint8_t winner[LANES] = {0};
                memcpy(winner, rows->winner[a] + at, (size_t)count);
                wide g = get_part(rows->grad[a] + at, count, 0);
                sum = add_where(bytes_equal(winner, cell), sum, g);
            }
        }
    }
    return sum;
}

static void gather_row(const pooling *p, const elem *grad, const uint8_t *index, int64_t row,
                       const seen_by *down, const seen_by *columns, elem *dx, int past) {
    int64_t inner = p->inner, first = down->from[row], outs = p->out_width * inner;
    seen_rows rows;
    rows.count = down->from[row + 1] - first;
    for (int64_t a = 0; a < rows.count; a++) {
        rows.grad[a] = grad + down->out[first + a] * outs;
        rows.winner[a] = index + down->out[first + a] * outs;
        rows.place[a] = (int)(down->place[first + a] * p->kernel[1]);
    }
    for (int64_t column = 0; column < p->width; column++) {
        elem *to = dx + column * inner;
        int64_t i = 0;
        for (; i + LANES <= inner; i += LANES) {
            put_result(to + i, gather(&rows, columns, column, inner, i, LANES), LANES, past);
        }
        if (i < inner) {
            int left = (int)(inner - i);
            put_part(to + i, gather(&rows, columns, column, inner, i, left), left);
        }
    }
}

/* The same with vectors along the row. `room` holds a part, and then for each row of windows that
 * sees this one its gradients and places, with as much room on both sides as a part is long. */
static void gather_parted(const pooling *p, const elem *grad, const uint8_t *index, int64_t row,
                          const seen_by *rows, elem *room, elem *dx) {
    int64_t length = part_length(p), outs = p->out_width * p->inner, stride = p->stride[1];
    int64_t first = rows->from[row], count = rows->from[row + 1] - first, space = 3 * length + LANES;
    elem *part = room, *g = room + length + LANES;
    uint8_t *winner = (uint8_t *)(g + p->kernel[0] * space);
    for (int64_t a = 0; a < count; a++) {
        elem *to = g + a * space;
        memset(to, 0, (size_t)space * sizeof *to);
        memcpy(to + length, grad + rows->out[first + a] * outs, (size_t)outs * sizeof *to);
        memcpy(winner + a * space + length, index + rows->out[first + a] * outs, (size_t)outs);
    }
    memset(dx, 0, (size_t)(p->width * p->inner) * sizeof *dx); /* columns that no window sees */
    for (int64_t q = 0; q < stride; q++) {
        for (int64_t i = 0; i < length; i += LANES) {
            wide sum = splat(0);
            for (int64_t a = 0; a < count; a++) {
                int64_t place = rows->place[first + a] * p->kernel[1];
                /* From the rightmost place, which is that of the leftmost window. */
                for (int64_t j = p->kernel[1] - 1; j >= 0; j--) {
                    int64_t column = j * p->dilation[1];
                    if (column % stride != q) continue;
                    int64_t at = a * space + length + i - column / stride * p->inner;
                    mask won = bytes_equal(winner + at, (int)(place + j));
                    sum = add_where(won, sum, get(g + at));
                }
            }
            put(part + i, sum);
        }
        join_part(p, part, q, dx);
    }
}

void TYPED(swatfx_max_pool_backward)(const elem *grad, const uint8_t *index, elem *dx,
                                     const int64_t *sizes, int threads) {
    pooling p;
    memcpy(&p, sizes, sizeof p);
    int64_t row = p.width * p.inner, rows = p.planes * p.height;
    int64_t plane = p.out_height * p.out_width * p.inner, length = part_length(&p);
    size_t room = (size_t)(length + LANES) * sizeof(elem);
    room += (size_t)(p.kernel[0] * (3 * length + LANES)) * (sizeof(elem) + 1);
    int past = outgrows_cache(rows * row) && on_line(dx) && p.inner % LANES == 0;
    seen_by down = windows_of(&p, 0), across = windows_of(&p, 1);
#pragma omp parallel num_threads(threads) if (rows * row > 1 << 12)
    {
        elem *scratch = along_row(&p) ? calloc(room, 1) : NULL;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            int64_t from = r / p.height * plane;
            if (scratch) {
                gather_parted(&p, grad + from, index + from, r % p.height, &down, scratch,
                              dx + r * row);
            } else {
                gather_row(&p, grad + from, index + from, r % p.height, &down, &across,
                           dx + r * row, past);
            }
        }
        settle();
        free(scratch);
    }
    let_go(down);
    let_go(across);
}
