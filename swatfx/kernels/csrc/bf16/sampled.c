#define SWATFX_BF16
#include "../sampled.c"
