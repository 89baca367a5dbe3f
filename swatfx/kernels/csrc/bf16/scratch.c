#define SWATFX_BF16
#include "../scratch.c"
