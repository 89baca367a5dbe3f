#define SWATFX_BF16
#include "../norm_channel.c"
