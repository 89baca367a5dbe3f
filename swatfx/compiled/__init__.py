"""What `swatfx.compile` returns: the module, its parts, what it remembers, its layers."""

from swatfx.compiled.changes import watch
from swatfx.compiled.clock import Clock, PartClock
from swatfx.compiled.coded import (
    Attention,
    Elementwise,
    Heads,
    LayerNorm,
    LayerNormOf,
    Multiply,
    scaled_dot_product_heads,
)
from swatfx.compiled.eager_attention import saving
from swatfx.compiled.held import HeldThreshold
from swatfx.compiled.layers import SparseLayer, all_plans, current, read_dense, sparse_layers
from swatfx.compiled.learned import LearnedThreshold
from swatfx.compiled.mirror import mirror, signature_of
from swatfx.compiled.module import EagerRoot, SwatModule, private_copy, unwrap
from swatfx.compiled.nodes import (
    CONV,
    LINEAR,
    LayerNode,
    Place,
    all_nodes,
    layer_nodes,
    nodes_of,
    sparse_nodes,
)
from swatfx.compiled.observing import observe
from swatfx.compiled.parts import FALLBACK, all_parts, is_root, join, relative
from swatfx.compiled.reaching import Reroute, codes, lends_layers
from swatfx.compiled.saves import (
    NORM,
    RESIDUAL,
    AvgPool2d,
    Bound,
    Dropout,
    MaxPool2d,
    Norm,
    NormOf,
    Relu,
    Saver,
)
from swatfx.compiled.state import (
    ActivationThreshold,
    CallThresholds,
    Pack,
    Threshold,
    WeightThreshold,
    initial_state,
)
from swatfx.compiled.swat_state import Example, LayerState, SwatState
from swatfx.compiled.ways import Arguments, Pattern, Ways, holds_none, label, split_inputs
from swatfx.compiled.weights import evaluate, evaluation_mode, weight_chain
from swatfx.compiled.wrappers import watch_wrappers

__all__ = [
    "ActivationThreshold",
    "Arguments",
    "Attention",
    "AvgPool2d",
    "Bound",
    "CONV",
    "CallThresholds",
    "Clock",
    "Dropout",
    "EagerRoot",
    "Elementwise",
    "Example",
    "FALLBACK",
    "Heads",
    "HeldThreshold",
    "LINEAR",
    "LayerNode",
    "LayerNorm",
    "LayerNormOf",
    "LayerState",
    "LearnedThreshold",
    "MaxPool2d",
    "Multiply",
    "NORM",
    "Norm",
    "NormOf",
    "Pack",
    "PartClock",
    "Pattern",
    "Place",
    "RESIDUAL",
    "Relu",
    "Reroute",
    "Saver",
    "SparseLayer",
    "SwatModule",
    "SwatState",
    "Threshold",
    "Ways",
    "WeightThreshold",
    "all_nodes",
    "all_parts",
    "all_plans",
    "codes",
    "current",
    "evaluate",
    "evaluation_mode",
    "holds_none",
    "initial_state",
    "is_root",
    "join",
    "label",
    "layer_nodes",
    "lends_layers",
    "mirror",
    "nodes_of",
    "observe",
    "private_copy",
    "read_dense",
    "relative",
    "saving",
    "scaled_dot_product_heads",
    "signature_of",
    "sparse_layers",
    "sparse_nodes",
    "split_inputs",
    "unwrap",
    "watch",
    "watch_wrappers",
    "weight_chain",
]
