/* Whole tensors to and from codes: one row, by groups, as swatfx/ops/codes.py has it.
 *
 * Stands on no other .c file.
 */
#include "codes.h"
#include "exports.h"

static void encode_group(const elem *x, uint8_t *codes, header_of_codes grids, int64_t begin,
                         int64_t end, const int width, uint32_t seed) {
    wide low = splat(INFINITY), high = splat(-INFINITY);
    int64_t group = begin / GROUP;
    for (int64_t i = begin; i < end; i += LANES) {
        wide v = get_some(x + i, (int)min64(LANES, end - i), get_one(x + i));
        low = least(low, v);
        high = most(high, v);
    }
    plain_grid(grids, group, lane_min(low), lane_max(high), width);
    encoder how = encoder_of(splat(grids.base[group]), splat(grids.step[group]), splat(0), splat(1), seed);
    for (int64_t i = begin; i < end; i += LANES) {
        int count = (int)min64(LANES, end - i);
        mask over = first_lanes(LANES);
        put_codes(codes, i, encode(&how, get_some(x + i, count, 0), over, i, 0, width), count, width);
    }
}

static void decode_group(const uint8_t *codes, elem *x, header_of_codes grids, int64_t begin,
                         int64_t end, const int width) {
    int64_t group = begin / GROUP;
    decoder how = {splat(grids.base[group]), splat(grids.step[group]), splat(grids.first[group])};
    for (int64_t i = begin; i < end; i += LANES) {
        int count = (int)min64(LANES, end - i);
        put_some(x + i, decode(&how, get_codes(codes, i, count, width)), count);
    }
}

void TYPED(swatfx_encode)(const elem *x, uint8_t *codes, float *header, int64_t n, int width,
                          uint32_t seed, int threads) {
    header_of_codes grids = header_at(header, 1, n);
    /* The last piece is or-ed. */
    if (width == 4 && n % LANES) memset(codes + n / LANES * LANES / 2, 0, (size_t)(n % LANES + 1) / 2);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t begin = 0; begin < n; begin += GROUP) {
        int64_t end = min64(n, begin + GROUP);
        if (width == 8) {
            encode_group(x, codes, grids, begin, end, 8, seed);
        } else {
            encode_group(x, codes, grids, begin, end, 4, seed);
        }
    }
}

void TYPED(swatfx_decode)(const uint8_t *codes, const float *header, elem *x, int64_t n, int width,
                          int threads) {
    header_of_codes grids = header_at((float *)header, 1, n);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t begin = 0; begin < n; begin += GROUP) {
        int64_t end = min64(n, begin + GROUP);
        if (width == 8) {
            decode_group(codes, x, grids, begin, end, 8);
        } else {
            decode_group(codes, x, grids, begin, end, 4);
        }
    }
}
