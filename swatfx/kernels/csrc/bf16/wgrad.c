#define SWATFX_BF16
#include "../wgrad.c"
