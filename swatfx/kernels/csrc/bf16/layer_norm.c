#define SWATFX_BF16
#include "../layer_norm.c"
