#define SWATFX_BF16
#include "../elementwise.c"
