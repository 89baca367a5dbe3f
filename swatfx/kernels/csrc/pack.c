/* Top-K on activations: threshold search, bitmask and packed values. */
#include "common.h"
