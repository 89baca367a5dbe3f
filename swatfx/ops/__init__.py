"""The operators that a compiled graph is made of, in the namespace `torch.ops.swatfx`.

One family a file: schema, fake, autograd, autocast and the reference kernel in plain torch, which
is the definition. Importing this package registers them all. README.md here is the method in plain
torch, and tells which op, kernel and pass each step of it became.
"""

from swatfx.ops.attention import attention, attention_backward
from swatfx.ops.coded import (
    elementwise,
    elementwise_backward,
    layer_norm,
    layer_norm_backward,
    multiply,
    multiply_backward,
)
from swatfx.ops.conv import conv, conv_backward
from swatfx.ops.current import current
from swatfx.ops.direct import register_direct
from swatfx.ops.dropout import dropout, dropout_backward
from swatfx.ops.features_norm import features_norm, features_norm_backward
from swatfx.ops.flops import register_flops
from swatfx.ops.layout import to_layout
from swatfx.ops.learned import learned_gradient
from swatfx.ops.linear import linear, linear_backward
from swatfx.ops.norm import batch_norm, batch_norm_backward
from swatfx.ops.pack import pack
from swatfx.ops.pool import avg_pool2d, avg_pool2d_backward, max_pool2d, max_pool2d_backward
from swatfx.ops.relu import relu, relu_backward
from swatfx.ops.state import refresh, refresh_call, step

register_flops()

__all__ = [
    "attention",
    "attention_backward",
    "avg_pool2d",
    "avg_pool2d_backward",
    "batch_norm",
    "batch_norm_backward",
    "conv",
    "conv_backward",
    "current",
    "dropout",
    "dropout_backward",
    "elementwise",
    "elementwise_backward",
    "features_norm",
    "features_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "learned_gradient",
    "linear",
    "linear_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "multiply",
    "multiply_backward",
    "pack",
    "refresh",
    "refresh_call",
    "relu",
    "relu_backward",
    "step",
    "to_layout",
]

for _name in __all__:
    register_direct(globals()[_name])
