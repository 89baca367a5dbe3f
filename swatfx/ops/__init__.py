"""The operators that a compiled graph is made of, in the namespace `torch.ops.swatfx`.

One family a file: schema, fake, autograd, autocast and the reference kernel in plain torch, which
is the definition. Importing this package registers them all.
"""

from swatfx.ops.conv import conv, conv_backward
from swatfx.ops.flops import register_flops
from swatfx.ops.linear import linear, linear_backward
from swatfx.ops.pack import pack
from swatfx.ops.state import refresh, step

register_flops()

__all__ = ["conv", "conv_backward", "linear", "linear_backward", "pack", "refresh", "step"]
