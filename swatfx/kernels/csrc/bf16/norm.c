#define SWATFX_BF16
#include "../norm.c"
