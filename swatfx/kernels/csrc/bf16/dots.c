#define SWATFX_BF16
#include "../dots.c"
