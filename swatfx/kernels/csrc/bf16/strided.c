#define SWATFX_BF16
#include "../strided.c"
