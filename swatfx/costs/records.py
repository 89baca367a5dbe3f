"""What a report holds: a record a layer, totals, and how they are told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from swatfx.costs.simulation import Simulation
from swatfx.ops.norm import EXACT
from swatfx.tables import Shown, Table

PAPER = "paper"


@dataclass(frozen=True)
class LayerRecord:
    """One layer's row; MACs and bytes are summed over its calls.

    `skipped` says why it is dense, `kernels` which ones a layer that is not runs: as in LayerPlan.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_density: float
    activation_density: float
    realised_weight_density: float | None
    realised_activation_density: float | None
    weight_selector: str
    activation_selector: str
    parameters: int
    dense_forward_macs: int
    sparse_forward_macs: int
    dense_input_gradient_macs: int
    sparse_input_gradient_macs: int
    dense_weight_gradient_macs: int
    sparse_weight_gradient_macs: int
    inference_macs: int
    dense_saved_bytes: int
    sparse_saved_bytes: int
    skipped: str | None
    kernels: str


@dataclass(frozen=True)
class OtherRecord:
    """Bytes kept for backward by what is no layer: a norm, a ReLU, a pool, a module left to eager.

    A norm's are those of the addition and the ReLU behind it as well, where they are one.
    """

    name: str
    kind: str
    dense_saved_bytes: int
    sparse_saved_bytes: int


@dataclass(frozen=True)
class Report(Shown):
    """Layers, totals, and what was left to eager Python.

    Saved bytes are those of the distinct storages that autograd keeps, parameters and buffers
    excluded: what `torch.autograd.graph.saved_tensors_hooks` see in a training forward. A storage
    that several keep is on the account of the first layer among them, or else of the first; the
    records of `layers` and `others` add up to the totals.

    Attributes:
        layers: one record a layer, in graph order.
        totals: fractions of 1, MACs, bytes, and the Top-K overhead line where it was asked for.
        others: what else keeps bytes, in graph order.
        norm_saves: what batch norms keep, as given to `compile`.
        value_dtype: what packed values are stored as, likewise.
        eager: path -> why symbolic tracing left the module there to Python.
        policy: the policy's name.
        accounting: "paper", "torch" or "exact".
        simulation: simulated cycles, where accelerators were asked for.
        predicted: what the chosen kernels are predicted to take beside other choices; "" where the
            model was compiled without example inputs.
    """

    layers: tuple[LayerRecord, ...]
    totals: Mapping[str, Any]
    others: tuple[OtherRecord, ...] = ()
    eager: Mapping[str, str] = field(default_factory=dict)
    policy: str = ""
    accounting: str = "paper"
    norm_saves: str = "exact"
    value_dtype: str | None = None
    simulation: Simulation | None = None
    predicted: str = ""

    def data(self) -> dict[str, Any]:
        """By the attributes' names."""
        return asdict(self)

    def records(self) -> Table:
        """A row a layer, all fields, shapes as 64x3x7x7."""
        names = [f.name for f in fields(LayerRecord)]
        return Table.of({n: [_cell(getattr(row, n)) for row in self.layers] for n in names})

    def blocks(self) -> list[Table | str]:
        """Layers, totals, other ops, what is eager, and the simulation."""
        columns: dict[str, list[str]] = {
            "layer": [layer.name for layer in self.layers],
            "weight": [_cell(layer.weight_shape) for layer in self.layers],
            "input": [_cell(layer.input_shape) for layer in self.layers],
            "weight %": [_percent(layer.weight_density) for layer in self.layers],
            "act %": [_percent(layer.activation_density) for layer in self.layers],
            "act % seen": [_percent(layer.realised_activation_density) for layer in self.layers],
            "MACs": [_engineering(_dense(layer)) for layer in self.layers],
            "MACs -%": [_reduction(_sparse(layer), _dense(layer)) for layer in self.layers],
            "bytes kept": [_engineering(layer.dense_saved_bytes) for layer in self.layers],
            "sparse": [_engineering(layer.sparse_saved_bytes) for layer in self.layers],
            "dense because": [layer.skipped or "" for layer in self.layers],
            "kernels": [layer.kernels for layer in self.layers],
        }
        shown = {name: cells for name, cells in columns.items() if any(cells)}
        return [
            Table.of(shown),
            *_summary(self),
            *filter(None, [self.predicted]),
            *([self._others()] if self.others else []),
            *(f"eager: {path or 'the root module'}: {why}" for path, why in self.eager.items()),
            *(() if self.simulation is None else self.simulation.blocks()),
        ]

    def _others(self) -> Table:
        kinds: dict[str, list[OtherRecord]] = {}
        for record in self.others:
            kinds.setdefault(record.kind, []).append(record)
        rows = [
            (
                kind,
                len(records),
                _engineering(sum(r.dense_saved_bytes for r in records)),
                _engineering(sum(r.sparse_saved_bytes for r in records)),
            )
            for kind, records in kinds.items()
        ]
        return Table(("other ops", "count", "bytes kept", "sparse"), tuple(rows))


def _summary(result: Report) -> list[str]:
    t = result.totals
    options = f", norms keep {result.norm_saves}" if result.norm_saves != EXACT else ""
    if result.value_dtype is not None:
        options += f", packed values are {result.value_dtype}"
    return [
        f"policy {result.policy}, {result.accounting} accounting{options}",
        f"training MACs    -{t['training_mac_reduction']:.1%}",
        f"inference MACs   -{t['inference_mac_reduction']:.1%}",
        *_activation_lines(t),
        *_assumption(result),
        _kept_line(t),
        *([t["topk_overhead"]] if "topk_overhead" in t else []),
    ]


def _activation_lines(t: Mapping[str, Any]) -> list[str]:
    """The paper's measure of activations, which says nothing of bytes, told as that."""
    weights = f"weight sparsity   {t['weight_sparsity']:.1%}"
    if not t["conv_input_elements"]:
        norms = "norms alone" if t["norm_input_elements"] else "none here"
        return [
            f"activations      not counted: the paper counts conv and BN inputs, {norms}",
            weights,
        ]
    floor = t["activation_floor"]
    natural = f"; {floor:.0%} natural zeros assumed, stored all the same" if floor else ""
    whole = t["first_layer_counted"]
    first = "; the first layer's, which is kept whole, as the paper counts it" if whole else ""
    return [
        f"activations      -{t['activation_reduction']:.1%} of the elements of conv and BN inputs"
        f" (the paper's count; bytes are told below{natural})",
        weights,
        f"activation sparsity {t['activation_sparsity']:.1%} (conv inputs{first})",
    ]


def _assumption(result: Report) -> list[str]:
    """What the paper's accounting takes of activations that no method sparsifies."""
    assumed = result.totals["assumed_activation_density"]
    if result.accounting != "paper" or assumed is None:
        return []
    return [
        f"weight gradients of {result.policy} are counted with {1 - assumed:.0%} of the activations"
        " zero, as the paper's tables do; none are dropped"
    ]


def _kept_line(t: Mapping[str, Any]) -> str:
    """Bytes that training really keeps, and where they do not follow the elements, why."""
    saved, dense = t["saved_bytes"], t["dense_saved_bytes"]
    change = f"{saved / dense - 1:+.1%}" if dense else "nothing is trained"
    line = (
        f"kept for backward by the whole graph: {_engineering(saved)}B,"
        f" dense {_engineering(dense)}B ({change}), parameters not counted"
    )
    if saved > dense and t["activation_reduction"] > 0:
        line += (
            "; more than dense although activations are dropped: a bit an element and the kept"
            " values cost more here than they replace, or other ops keep the same tensors whole"
        )
    elif saved == dense and t["activation_reduction"] > 0 and dense:
        line += "; as much as dense: what is counted as dropped is kept all the same"
    return line


def _dense(layer: LayerRecord) -> int:
    return (
        layer.dense_forward_macs
        + layer.dense_input_gradient_macs
        + layer.dense_weight_gradient_macs
    )


def _sparse(layer: LayerRecord) -> int:
    return (
        layer.sparse_forward_macs
        + layer.sparse_input_gradient_macs
        + layer.sparse_weight_gradient_macs
    )


def fraction(sparse: int, dense: int) -> float:
    """What of `dense` is saved; 0 where there is nothing to save."""
    return 1 - sparse / dense if dense else 0.0


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return "" if value is None else str(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _reduction(sparse: int, dense: int) -> str:
    return f"{100 * fraction(sparse, dense):.1f}"


def _engineering(value: float) -> str:
    if value < 1000:
        return f"{value:.0f}"
    power = min(int(math.log10(value)) // 3, 5)
    return f"{value / 1000**power:.3g}{' kMGTP'[power]}"
