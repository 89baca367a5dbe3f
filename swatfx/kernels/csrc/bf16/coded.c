#define SWATFX_BF16
#include "../coded.c"
