/* Batch normalisation, forward and backward: chooses between the form for channels that are made of
 * runs and the form for channels that lie side by side.
 *
 * Stands on norm_runs.c, norm_runs_backward.c and norm_last.c.
 */
#include <string.h>

#include "exports.h"
#include "norm_backward.h"

void TYPED(swatfx_norm)(const void *problem) {
    norm_problem p;
    memcpy(&p, problem, sizeof p);
    extent e = {p.channels, p.runs, p.length, p.run_step, p.channel_step, (int)p.threads};
    forward f = {p.x, p.residual, p.weight, p.bias, p.running_mean, p.running_var, p.y, p.mean,
                 p.invstd, p.new_mean, p.new_var, p.bits, p.codes, p.header, p.momentum, p.eps,
                 (int)p.training, (int)p.relu, (int)p.width, 0, (uint32_t)p.seed};
    f.past = outgrows_cache(p.channels * p.runs * p.length);
    if (is_last(&e)) {
        norm_last(&f, &e);
    } else {
        norm_runs(&f, &e);
    }
}

void TYPED(swatfx_norm_backward)(const void *problem) {
    norm_backward_problem p;
    memcpy(&p, problem, sizeof p);
    extent e = {p.channels, p.runs, p.length, p.run_step, p.channel_step, (int)p.threads};
    enum mask_from masks = !p.relu ? ALL : p.bits ? BITS : p.codes ? CODES : SIGN;
    backward b = {p.grad, p.x, p.weight, p.bias, p.mean, p.invstd, p.bits, p.codes, p.header, p.dx,
                  p.dresidual, p.dweight, p.dbias, (int)p.training, (int)p.width, 0, masks};
    b.past = outgrows_cache(p.channels * p.runs * p.length);
    if (is_last(&e)) {
        norm_last_backward(&b, &e);
    } else {
        norm_runs_backward(&b, &e);
    }
}
