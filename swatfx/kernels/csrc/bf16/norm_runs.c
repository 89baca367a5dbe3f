#define SWATFX_BF16
#include "../norm_runs.c"
