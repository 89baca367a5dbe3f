/* The tiles of tile_bf16.c by the processor's own dot product of two pairs of bfloat16, where it has one:
 * the weight and zero for elements at even places, zero and the weight for those at odd ones. A product with
 * that zero is not zero where the other element is infinite or NaN, so inputs have to be finite.
 *
 * Stands on no other .c file.
 */
#include "tile.h"

#if defined(__AVX512F__) && defined(__x86_64__)
#define SWATFX_DOT
#define tile_kernel_dot all_tiles
#define group_kernel_dot all_groups
static tile_function_bf16 all_tiles(int64_t rows, int64_t cols);
static group_function_bf16 all_groups(int64_t cols);
#include "tile_bf16.c"
#undef tile_kernel_dot
#undef group_kernel_dot

static int has_dot(void) {
    static int known = -1;
    int has = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (has < 0) {
        has = __builtin_cpu_supports("avx512bf16") != 0;
        __atomic_store_n(&known, has, __ATOMIC_RELAXED);
    }
    return has;
}

tile_function_bf16 tile_kernel_dot(int64_t rows, int64_t cols) { return has_dot() ? all_tiles(rows, cols) : NULL; }

group_function_bf16 group_kernel_dot(int64_t cols) { return has_dot() ? all_groups(cols) : NULL; }
#else
tile_function_bf16 tile_kernel_dot(int64_t rows, int64_t cols) {
    (void)rows, (void)cols;
    return NULL;
}

group_function_bf16 group_kernel_dot(int64_t cols) {
    (void)cols;
    return NULL;
}
#endif
