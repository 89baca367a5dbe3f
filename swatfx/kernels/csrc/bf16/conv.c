#define SWATFX_BF16
#include "../conv.c"
