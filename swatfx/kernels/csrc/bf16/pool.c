#define SWATFX_BF16
#include "../pool.c"
