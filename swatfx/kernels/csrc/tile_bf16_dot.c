/* The tiles of tile_bf16.c by the processor's own dot product of two pairs of bfloat16, in the library that was built for it:
 * the weight and zero for elements at even places, zero and the weight for those at odd ones. A product with
 * that zero is not zero where the other element is infinite or NaN, so inputs have to be finite.
 *
 * Stands on no other .c file.
 */
#include "tile.h"

#if defined(__AVX512BF16__)
#define SWATFX_DOT
#include "tile_bf16.c"
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
