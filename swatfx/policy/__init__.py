"""Policy: what is sparse where. One frozen value answers one row of the paper's table 1.

A policy is data. The passes and the hooks of `swatfx.attach` read its fields; no method has a code
path of its own. `swat_u`, `rigl`, ... are constructors that fill the fields in, and
`parse("swat-u:0.9,period=1000")` is the same from a string.
"""

from swatfx.policy.fields import Policy
from swatfx.policy.rivals import (
    dsr,
    dst,
    gradual_magnitude,
    meprop,
    rigl,
    set_,
    snfs,
    soft_filter,
    ssc,
    static,
)
from swatfx.policy.swat import (
    dense,
    forward_activations,
    forward_weights,
    saw,
    swat_active_update,
    swat_er,
    swat_erk,
    swat_frozen,
    swat_m,
    swat_u,
)
from swatfx.policy.text import CONSTRUCTORS, as_policy, parse, per_layer

__all__ = [
    "CONSTRUCTORS",
    "Policy",
    "as_policy",
    "dense",
    "dsr",
    "dst",
    "forward_activations",
    "forward_weights",
    "gradual_magnitude",
    "meprop",
    "parse",
    "per_layer",
    "rigl",
    "saw",
    "set_",
    "snfs",
    "soft_filter",
    "ssc",
    "static",
    "swat_active_update",
    "swat_er",
    "swat_erk",
    "swat_frozen",
    "swat_m",
    "swat_u",
]
