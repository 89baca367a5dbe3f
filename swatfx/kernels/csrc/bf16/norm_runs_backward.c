#define SWATFX_BF16
#include "../norm_runs_backward.c"
