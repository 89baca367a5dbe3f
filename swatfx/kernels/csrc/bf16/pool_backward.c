#define SWATFX_BF16
#include "../pool_backward.c"
