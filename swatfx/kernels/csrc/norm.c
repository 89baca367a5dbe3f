/* Batch normalisation, forward and backward: chooses between the form for channels that are made of
 * runs and the form for channels that lie side by side.
 *
 * Stands on norm_runs.c, norm_runs_backward.c and norm_last.c.
 */
#include "exports.h"
#include "norm_backward.h"

void TYPED(swatfx_norm)(const elem *x, const elem *residual, const float *weight,
                        const float *bias, const float *running_mean, const float *running_var,
                        elem *y, float *mean, float *invstd, float *new_mean, float *new_var,
                        uint8_t *bits, uint8_t *codes, float *header, int64_t channels,
                        int64_t runs, int64_t length, int64_t run_step, int64_t channel_step,
                        double momentum, double eps, int training, int relu, int width,
                        uint32_t seed, int threads) {
    extent e = {channels, runs, length, run_step, channel_step, threads};
    forward f = {x,      residual, weight,  bias, running_mean, running_var, y,        mean,
                 invstd, new_mean, new_var, bits, codes,        header,      momentum, eps,
                 training, relu,   width,   0,    seed};
    f.past = outgrows_cache(channels * runs * length);
    if (is_last(&e)) {
        norm_last(&f, &e);
    } else {
        norm_runs(&f, &e);
    }
}

void TYPED(swatfx_norm_backward)(const elem *grad, const elem *x, const float *weight,
                                 const float *bias, const float *mean, const float *invstd,
                                 const uint8_t *bits, const uint8_t *codes, const float *header,
                                 elem *dx, elem *dresidual, float *dweight, float *dbias,
                                 int64_t channels, int64_t runs, int64_t length,
                                 int64_t run_step, int64_t channel_step, int training, int relu,
                                 int width, int threads) {
    extent e = {channels, runs, length, run_step, channel_step, threads};
    enum mask_from masks = !relu ? ALL : bits ? BITS : codes ? CODES : SIGN;
    backward b = {grad,   x,  weight,    bias,    mean,  invstd,   bits, codes,
                  header, dx, dresidual, dweight, dbias, training, width, 0, masks};
    b.past = outgrows_cache(channels * runs * length);
    if (is_last(&e)) {
        norm_last_backward(&b, &e);
    } else {
        norm_runs_backward(&b, &e);
    }
}
