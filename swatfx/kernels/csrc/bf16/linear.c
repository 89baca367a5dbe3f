#define SWATFX_BF16
#include "../linear.c"
