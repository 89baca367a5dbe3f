#define SWATFX_BF16
#include "../layout.c"
