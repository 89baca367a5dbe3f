#define SWATFX_BF16
#include "../norm_last.c"
