/* Every function that Python calls, and its contract: the one place that says what a caller owes.
 *
 * C checks nothing but what it says here that it checks. The Python files named below check the rest, with
 * fitting.py for what they share, and leave to plain torch whatever does not fit.
 *
 * For every function, unless it says otherwise:
 * - Pointers are to the host's memory, of the dtype of their type; `void *x` with `bytes` is float32 where
 *   `bytes` is 4, and bfloat16 or float16 where it is 2. No other `bytes` is defined.
 * - `elem` is float in a function of the name that stands here; there is one more of each TYPED name with
 *   _bf16 behind it, where it is bfloat16 (elem.h). "Floats" of such tensors are elements then.
 * - Tensors are dense: element i of n is x[i], in whatever order of dimensions. [a][b] is row-major.
 * - A pointer is aligned to its element and no more, which torch sees to. Results aligned to 64 bytes may be
 *   written past the caches: faster, the same values.
 * - A pointer is not NULL unless it says "or NULL". One to nothing (n = 0, count = 0) may be anything.
 * - Results are written whole, whatever they held; they overlap no input and no other result.
 * - Sizes and counts are at least 1, or at least 0 where it says so. The product of all sizes of a tensor is
 *   its number of elements, whose bytes an int64_t counts.
 * - `threads` is at least 1: the most that are used; torch's own number. Some functions keep that many
 *   records on the stack. Other threads may call at the same time, on results of their own.
 * - Callers allocate all that a pointer leads to, and keep it, unchanged, until the function returns. C keeps
 *   no pointer and no memory between calls: what a function allocates, it frees.
 * - NaN and infinity are values like others. Whatever breaks a rule here is undefined behaviour: reads and
 *   writes outside of tensors. What only makes wrong values says so.
 *
 * Bits: element i is bit i mod 8 of byte i div 8, in ceil(n / 8) bytes. A packed tensor (tensors/bits.py) is
 * the bits of its n elements, zeros up to a multiple of 8 bytes (`header` bytes: ceil(n / 64) * 8), and
 * behind them the values of those that are set, in order.
 */
#ifndef SWATFX_EXPORTS_H
#define SWATFX_EXPORTS_H

#include "elem.h"
#include "problems.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* ---- Which library this is: library.py ---- */

/* Digest of the sources that it was built from (sources.py), "" if nobody said. Static: not to be freed. */
EXPORT const char *swatfx_sources(void);
/* Whether the processor has the instructions that it was built for, of those that torch does not name. */
EXPORT int swatfx_runs_here(void);

/* ---- Products with sparse weights or activations: conv.py, linear.py ----
 *
 * Where they return NO_MEMORY or DOES_NOT_FIT and not 0, the result is undefined.
 */

/* in: [groups * channels][height][width][batch]; out: [groups * rows][out_height][out_width][batch], of
 * which only the positions of the grid are written: phases of an input gradient fill it in turn. weight: a
 * filter's channels * weight_taps floats (rows * weight_taps if rows are channels) lie together in some
 * order, filters one behind the other; weight_channel and tap.weight stay within a filter, and no two taps
 * of a channel are the same float. bias: [groups * rows] or NULL. Weights count that are not zero, and
 * whose magnitude is not below `threshold`: NaN does, and a threshold of NaN is above nothing.
 *
 * Grid positions lie within the result: (grid_height - 1) * step_out_y + at_y < out_height, and likewise x.
 * 0 <= taps <= MAX_TAPS; at_y, at_x >= 0. Taps may read outside the input, by up to 2^27 (fitting.py limits
 * paddings and dilations to 2^20, kernels to 64 by 64). A filter has at most 2^31 - 1 weights.
 *
 * Vectors are written past the caches if there is one tap, a result of more than 2^22 floats that is
 * aligned to 64 bytes, and a batch that is a multiple of 16.
 *
 * made: what sparse_conv_rows wrote for an equal problem and the same weight and threshold, in the library
 * and dtype that run now, or NULL; if it is there, weight may be NULL. Values are the same with it.
 *
 * Checked by: fitting.convolution and problems.py for convolutions, linear.py for linear layers, which are
 * pointwise convolutions; kept_rows.py `made`. Returns 0, NO_MEMORY, or DOES_NOT_FIT
 * where a tile with its halo is too large for a scratch buffer, which C finds out. */
EXPORT int TYPED(sparse_conv)(const conv_problem *p, const elem *in, const float *weight,
    const float *bias, elem *out, float threshold, const void *made);

/* What sparse_conv makes of a weight each time, to be made once. p, weight, threshold: as of sparse_conv. to:
 * `bytes` of them, aligned to 8, or NULL where there are none.
 *
 * Checked by: kept_rows.py. Returns the bytes that it takes, of which all are written if there is room for
 * them, else an undefined part; 0 where there is nothing to be made once; -NO_MEMORY. */
EXPORT int64_t TYPED(sparse_conv_rows)(const conv_problem *p, const float *weight, float threshold, void *to,
    int64_t bytes);

/* The weight gradient where a bit of `open` is set. p and in: as those of a sparse_conv that is a forward
 * convolution of row-major weights: rows are filters, grid_height is out_height and grid_width out_width,
 * step_out_y and step_out_x are 1, at_y and at_x 0. open: bits of the weights. grad: [groups *
 * rows][out_height][out_width][batch]. out: of the weights' shape, row-major; zero where no bit is set,
 * whatever stands in `in` and `grad`.
 *
 * Sums do not depend on `threads`. Checked by: as sparse_conv, pack.py the bits. Returns what that does. */
EXPORT int TYPED(sampled_weight_gradient)(const conv_problem *p, const uint8_t *open, const elem *in,
    const elem *grad, float *out);

/* packed: of [groups * channels][height][width][batch] in that order, aligned to 4 bytes, `header` as said
 * above and `values` values, float or bfloat16, behind it; values >= 0, and bits behind the last element do
 * not count. grad: [groups * filters][out_height][out_width][batch]. out: the weight gradient, every float
 * of [groups * filters][channels][kernel_y][kernel_x] at the four strides that the problem tells.
 *
 * Steps are at most MAX_STRIDE, kernels at most MAX_KERNEL by MAX_KERNEL; paddings at least 0, and with
 * dilations at most 2^20. out_height and out_width are what the convolution makes of the others.
 *
 * Checked by: fitting.convolution, fitting.packed_values (that the bytes behind the header are `values`
 * whole values, aligned to 8). Returns 0, NO_MEMORY, or DOES_NOT_FIT where a strip of the gradient is too
 * large, or where the bits that are set are not `values`: C counts them before it reads values. */
EXPORT int TYPED(sparse_weight_gradient)(const wgrad_problem *p, const uint8_t *packed, int64_t header,
    int64_t values, const elem *grad, float *out);

/* The same for a linear layer. packed: of [rows][inputs], aligned or not; grad: [rows][outputs]; out:
 * [outputs][inputs]. Checked by: linear.py, fitting.packed_values. Returns 0, NO_MEMORY, or DOES_NOT_FIT
 * where the bits that are set are not `values`. */
EXPORT int TYPED(sparse_linear_weight_gradient)(const linear_problem *p, const uint8_t *packed, int64_t
    header, int64_t values, const elem *grad, float *out);

/* out[plane][y][x] = in[plane][y * step_y][x * step_x], each a run of `batch` floats.
 * in: [planes][height][width][batch]; out: [planes][ceil(height / step_y)][ceil(width / step_x)][batch].
 * Sizes are those of a convolution that fitting.convolution let through. */
EXPORT void TYPED(take_strided)(const elem *in, elem *out, int64_t planes, int64_t height, int64_t
    width, int64_t step_y, int64_t step_x, int64_t batch, int threads);

/* Inverse of take_strided, whose sizes it takes: `in` is what that wrote; zero where nothing was taken. */
EXPORT void TYPED(put_strided)(const elem *in, elem *out, int64_t planes, int64_t height, int64_t width,
    int64_t step_y, int64_t step_x, int64_t batch, int threads);

/* ---- Thresholds: topk.py ----
 *
 * A key is a float's bits without the sign: keys order as magnitudes do, and NaN is above infinity. NaN
 * begins at 0x7f800001 in float32, 0x7c01 in float16, 0x7f81 in bfloat16 (groups.py). Counts are 32 bits a
 * lane: below 2^33 elements. Memory order is groups.py's: `rankable` and `matrices` check dtypes and
 * density.
 */

/* The largest key of x[n]; -1 if n = 0. */
EXPORT int32_t swatfx_greatest(const void *x, int bytes, int64_t n, int threads);

/* A step of the search over ranks: for the keys of x[n] whose bits above shift + width are `prefix`, how
 * many have which `width` bits from `shift` on; added to counts[1 << width], which the caller has set to
 * begin with. n >= 0; 1 <= width <= 11; shift >= 0; shift + width <= 31; prefix >= 0. */
EXPORT void swatfx_count_digit(
    const void *x, int64_t n, int32_t prefix, int shift, int width, int64_t *counts, int threads
);

/* The k-th largest magnitude of every group of x[blocks][rows][columns], a column of a block a group, into
 * out[blocks][columns], of x's dtype. 1 <= k <= rows; columns < 2^31. `deviations` >= 0 says how wide an
 * interval is searched first, in standard deviations: for speed alone.
 * Returns the largest key of x, which tells whether there is NaN; -2 if there is no memory: `out` is then
 * undefined. */
EXPORT int32_t swatfx_kth(
    const void *x, int bytes, int64_t blocks, int64_t rows, int64_t columns, int64_t k,
    double deviations, void *out, int threads
);

/* ---- Packing and masks: pack.py ----
 *
 * Values are moved, never computed with. `nan` is where keys of x's dtype begin to be NaN, as said above;
 * an element is kept if its key is not below the threshold's. A threshold that is negative or NaN keeps
 * all. Masks of uint64_t are bits as said above, in whole words. */

/* Where one thread staged how many values: room between the two halves of packing. */
typedef struct {
    int64_t from, count;
} staging;

/* First half of packing x[n], which is [blocks][rows][columns] in memory, a column of a block a group:
 * writes the bits of the elements that are not below their group's threshold, and not zero, into
 * mask[ceil(n / 64)], zeros behind the last, and stages their values in staged[n], of x's dtype, each
 * thread its part; parts[threads] says where. thresholds: [blocks][columns], of x's dtype. rows * columns
 * divides n. Returns how many are kept; -1 if there is no memory: the three results are then undefined.
 * What of `staged` holds no value is not written, or undefined. Checked by: groups.py, pack.py. */
EXPORT int64_t swatfx_pack_top(
    const void *x, int bytes, int64_t n, const void *thresholds, int32_t nan, int64_t rows,
    int64_t columns, uint64_t *mask, void *staged, staging *parts, int threads
);

/* Second half: brings together in values[], which has room for as many as were counted, what the first half
 * left in `staged` and `parts`, with the same `bytes` and `threads`. `values` needs no alignment. */
EXPORT void swatfx_pack_join(
    const void *staged, int bytes, const staging *parts, void *values, int threads
);

/* Writes the elements of x[n] whose bit is set in mask[ceil(n / 64)] to values[count]; bits behind the last
 * do not count; n, count >= 0. x is read only. Returns how many bits are set, or -1 if there is no memory:
 * unless that is `count`, nothing was written. */
EXPORT int64_t swatfx_gather(
    void *x, int bytes, int64_t n, const uint64_t *mask, void *values, int64_t count, int threads
);

/* The inverse, from values[count], which are read only, into x[n]; zero where the bit is not set. Returns
 * the same: unless that is `count`, x was not written. Checked by: fitting.packed_values, alignment too. */
EXPORT int64_t swatfx_scatter(
    void *x, int bytes, int64_t n, const uint64_t *mask, void *values, int64_t count, int threads
);

/* mask[n], bytes of 0 or 1, to bits[ceil(n / 8)]; bits behind the last are zero; n >= 0. Returns how many
 * are set. Other bytes make wrong bits and a wrong count: torch's bools are 0 and 1 unless somebody
 * reinterprets bytes as bools, which nobody checks. */
EXPORT int64_t swatfx_bits_of_mask(const uint8_t *mask, int64_t n, uint8_t *bits, int threads);

/* The inverse. Bits behind the last may be anything. pack.py checks the size. */
EXPORT void swatfx_mask_of_bits(const uint8_t *bits, int64_t n, uint8_t *mask, int threads);

/* out[n] = x where its key is not below that of the one threshold, else 0; both of x's dtype. */
EXPORT void swatfx_keep_top(
    const void *x, int bytes, int64_t n, const void *threshold, int32_t nan, void *out, int threads
);

/* out[n] = x where its bit is set in bits[ceil(n / 8)], else 0; bits behind the last may be anything. */
EXPORT void swatfx_keep_bits(
    const void *x, int bytes, int64_t n, const uint8_t *bits, void *out, int threads
);

/* out = x where the root mean square of its block is not below the threshold, else 0; both lie as the strides
 * say, which number each of the weight's elements once. Any size of blocks. */
EXPORT void swatfx_keep_blocks(const block_problem *p, const float *x, float threshold, float *out);

/* ---- ReLU and dropout: elementwise.py, which checks dtype, density and the size of bits ----
 *
 * n >= 0; the order of elements does not matter, if it is the same in all. bits: [ceil(n / 8)]. Bits that
 * are read may be anything behind the last; those that are written are zero there. */

/* y = x where not x <= 0 (NaN too), else 0; a bit says where. */
EXPORT void TYPED(swatfx_relu)(const elem *x, elem *y, uint8_t *bits, int64_t n, int threads);

/* dx = grad where the bit is set, else 0. */
EXPORT void TYPED(swatfx_relu_backward)(const elem *grad, const uint8_t *bits, elem *dx, int64_t n, int
    threads);

/* y comes as what was drawn, ones and zeros, and goes as x * scale or x * 0; a bit says which. `scale` is
 * an element's value. */
EXPORT void TYPED(swatfx_dropout)(const elem *x, elem *y, uint8_t *bits, float scale, int64_t n, int
    threads);

/* dx = grad * scale where the bit is set, else grad * 0, which is NaN where grad is infinite, as in torch.
 * */
EXPORT void TYPED(swatfx_dropout_backward)(const elem *grad, const uint8_t *bits, elem *dx, float scale,
    int64_t n, int threads);

/* ---- Layer norm, features outermost: layer_norm.py, which checks dtypes, density and sizes ----
 *
 * x, y, grad, dx: [features, columns]; weight, bias: [features] or NULL; mean, rstd: [columns]. features and
 * columns are at least 1, threads too. */

/* y = (x - mean) * rstd * weight + bias, of each column by itself; mean and rstd are written. */
EXPORT void TYPED(swatfx_layer_norm)(const elem *x, const float *weight, const float *bias, elem *y, float
    *mean, float *rstd, int64_t features, int64_t columns, double eps, int threads);

/* dx may be NULL: not wanted. dweight, dbias: [threads, features], what each thread adds to those gradients;
 * may be anything before. mean, rstd: as forward wrote them. */
EXPORT void TYPED(swatfx_layer_norm_backward)(const elem *grad, const elem *x, const float *weight, const
    float *mean, const float *rstd, elem *dx, double *dweight, double *dbias, int64_t features, int64_t
    columns, int threads);

/* ---- Memory orders: layout.py, which checks dtype and density ---- */

/* out[b * out_batch + j * out_row + i] = in[b * in_batch + i * in_row + j] for b < batch, i < rows, j <
 * cols, which are at least 0. No two of these are the same place in `out`, which is all that is written. */
EXPORT void TYPED(swatfx_transpose)(const elem *in, elem *out, int64_t batch, int64_t rows, int64_t
    cols, int64_t in_row, int64_t out_row, int64_t in_batch, int64_t out_batch, int threads);

/* ---- Batch normalisation, with an addition and a ReLU behind it: norm.py ----
 *
 * An activation has n = channels * runs * length elements, which the five sizes lay out, with no gap and no
 * overlap: element i of run r of channel c is at c * channel_step + r * run_step + i. Where length > 1 both
 * steps are multiples of length. If length = 1 and channel_step = 1, channels lie side by side: then there
 * are a multiple of 16, and run_step = channels. Of a layout, _Extent.of in norm.py makes such sizes.
 * Results of 16 MiB or more may be written past the caches, and those of the shape of the activation are
 * then aligned to 64 bytes, which torch's own allocations are. Parameters and statistics are floats, of
 * activations in bfloat16 too; what is computed is rounded once, when it is written.
 * Tables are small, and a process that has no memory for them crashes. */

/* problem: a `norm_problem` of problems.h, and of the backward a `norm_backward_problem`, at any alignment.
 *
 * x: [n]; residual: [n] or NULL; weight, bias: [channels] or NULL, each; running_mean, running_var:
 * [channels], or both NULL in training. y: [n] = relu(norm(x) + residual). mean, invstd: [channels], of the
 * batch, or in eval mode of the running statistics. new_mean, new_var: [channels], in training the running
 * statistics moved on by `momentum`; NULL if there are none, or in eval mode not written. bits: [ceil(n /
 * 8)], where the ReLU let through, not y <= 0, or NULL. codes: [ceil(n * width / 8)], width being 8 or 4, and
 * header, the arrays that lie before them (swatfx/ops/codes.py; channels are rows), or both NULL. seed: of
 * what is drawn for codes of 4 bits.
 *
 * training, relu: 0 or 1. bits: only if relu; needed by backward if there are codes and a residual. In
 * training runs * length > 1: one element has no variance. eps and momentum may be any: they make values,
 * no addresses. Checked by: norm.py. */
EXPORT void TYPED(swatfx_norm)(const void *problem);

/* grad: [n]; x: [n] or NULL; weight, bias: as forward had them; mean, invstd: [channels], from forward;
 * bits, codes, header: as forward wrote them, or NULL. dx, dresidual: [n] or NULL if not wanted; dweight,
 * dbias: [channels] or NULL if not wanted.
 *
 * With relu, bits say where it let through; if NULL, codes do; if NULL too, the sign of y: then x is
 * given, weight and bias are forward's to the bit, and there was no residual. dx in training, and dweight,
 * need x or codes, and are wrong without; x is not read if there are codes. bits and codes may hold any
 * byte.
 *
 * `header` is aligned to 4 bytes. Checked by: norm.py, with is_complete in swatfx/ops/norm.py. */
EXPORT void TYPED(swatfx_norm_backward)(const void *problem);

/* ---- Whole tensors in codes: coded.py ----
 *
 * x: [n]; codes: [ceil(n * width / 8)], width being 8 or 4; header: the arrays that lie before them, of one
 * row (swatfx/ops/codes.py), aligned to 4 bytes; neither need be codes when they are read. seed: of what is
 * drawn for codes of 4 bits. Checked by: coded.py. */
EXPORT void TYPED(swatfx_encode)(const elem *x, uint8_t *codes, float *header, int64_t n, int width,
    uint32_t seed, int threads);
EXPORT void TYPED(swatfx_decode)(const uint8_t *codes, const float *header, elem *x, int64_t n, int
    width, int threads);

/* ---- Max pooling: pool.py ----
 *
 * sizes: a `pooling` of problems.h, its fields in their order, at any alignment. kernel, stride and
 * dilation are at least 1, paddings at least 0; kernel[0] * kernel[1] <= MOST_CELLS; out_height and
 * out_width are such that the last window begins before the image's end, padding included. pool.py checks
 * the kernel, and that no step is more than MOST_CELLS; torch, which is asked for the result's shape,
 * checks the rest. Tables and scratch of some rows: a process that has no memory for them crashes, or pools
 * wrongly. */

/* x: [planes][height][width][inner]; y: [planes][out_height][out_width][inner]; index: as y, of bytes: the
 * winner's place in its window, counted row by row; or NULL. */
EXPORT void TYPED(swatfx_max_pool)(const elem *x, elem *y, uint8_t *index, const int64_t *sizes, int
    threads);

/* grad, index: as y and index of swatfx_max_pool; dx: as x. Bytes that are no place let nothing through. */
EXPORT void TYPED(swatfx_max_pool_backward)(const elem *grad, const uint8_t *index, elem *dx, const
    int64_t *sizes, int threads);

#endif
