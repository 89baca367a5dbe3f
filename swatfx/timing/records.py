"""What a bench holds: forms of a step, layers, a verdict, and how they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from swatfx.tables import Shown, Table

_NAMED = 5  # layers that lose, in the verdict
_LITTLE = 0.005  # of a step: a layer that loses less is not worth naming

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class FormRecord:
    """One form of the step.

    Attributes:
        name: as people read it.
        dtype: "fp32", or "bf16" for autocast to it.
        layout: "NCHW", "channels_last", or "" where no tensor is an image.
        compiled: by torch.compile.
        policy: what it is made sparse by; "" is dense.
        seconds: spread of a step.
        speedup: spread of the fastest dense form's seconds over these, round by round.
        saved_bytes: of the distinct storages that autograd keeps in the model's forward, parameters
            and buffers excluded, as saved-tensor hooks see them.
        predicted_saved_bytes: the same by `swatfx.report`, at the policy's densities; None where no
            sparse form of this dtype ran, or torch.compile decides.
    """

    name: str
    dtype: str
    layout: str
    compiled: bool
    policy: str
    seconds: Numbers
    speedup: Numbers
    saved_bytes: int
    predicted_saved_bytes: int | None


@dataclass(frozen=True)
class LayerTime:
    """Medians of one layer within the step, or of a part that is no layer's; None: not seen.

    Attributes:
        name: of the layer; of other parts what they are.
        kind: as in a report, such as "conv2d"; "" of other parts.
        weight_shape: () of other parts.
        seconds: forward and backward of the layer in the sparse form, with thresholds and packing.
        forward_seconds: of forward alone.
        backward_seconds: of backward alone.
        dense_seconds: forward and backward of the layer in the dense form.
        dense_forward_seconds: of forward alone.
        dense_backward_seconds: of backward alone.
        share: of the sparse form's step.
        kernels: "sparse" or "dense"; "" of other parts.
        why: why it is dense, or None.
    """

    name: str
    kind: str = ""
    weight_shape: tuple[int, ...] = ()
    seconds: float | None = None
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    dense_seconds: float | None = None
    dense_forward_seconds: float | None = None
    dense_backward_seconds: float | None = None
    share: float | None = None
    kernels: str = ""
    why: str | None = None

    @property
    def lost(self) -> float:
        """Seconds that it takes longer than dense; 0 where one of them is not known."""
        if self.seconds is None or self.dense_seconds is None:
            return 0.0
        return self.seconds - self.dense_seconds


@dataclass(frozen=True)
class BenchResult(Shown):
    """Dense forms of a training step beside sparse ones, measured side by side.

    Attributes:
        model: its name.
        inputs: the shape and dtype of each.
        period: steps between two refreshes of the thresholds; None where nothing is sparse.
        rounds: in which the forms took turns.
        steps_a_round: of each form, whose mean is that round's.
        forms: dense ones, then sparse ones.
        unavailable: form -> why it could not run.
        fastest_dense: the strongest rival's name.
        fastest: that of the fastest sparse form.
        layers: one a layer, of `fastest` beside `layers_beside`.
        rest: what of the step is no layer's; with the layers it adds up.
        layers_beside: the dense form whose layers were timed: the fastest one in eager Python.
        verdict: one sentence.
        policy: as it was asked for.
        loss: what it is.
        notes: what a reader of the figures has to know.
        date: of the measurement, as YYYY-MM-DD.
        machine: what they were measured on.
        versions: of the packages that matter.
        allocator: settings of glibc's allocator, or None.
    """

    model: str
    inputs: tuple[str, ...]
    period: int | None
    rounds: int
    steps_a_round: int
    forms: tuple[FormRecord, ...]
    unavailable: Mapping[str, str]
    fastest_dense: str
    fastest: str
    layers: tuple[LayerTime, ...]
    rest: tuple[LayerTime, ...]
    layers_beside: str
    verdict: str
    policy: str = ""
    loss: str = ""
    notes: tuple[str, ...] = ()
    date: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    allocator: str | None = None

    def data(self) -> dict[str, Any]:
        """By the attributes' names."""
        return asdict(self)

    def records(self) -> Table:
        """A row a layer, then other parts, all fields; shapes as 64x3x7x7."""
        names = [f.name for f in fields(LayerTime)]
        rows = [*self.layers, *self.rest]
        return Table.of({name: [_cell(getattr(row, name)) for row in rows] for name in names})

    def blocks(self) -> list[Table | str]:
        """Forms, layers, notes and the verdict."""
        return [
            f"a training step of {self.model}, {' '.join(self.inputs)}, {self.policy}",
            self._forms(),
            *(f"left out: {name}: {why}" for name, why in self.unavailable.items()),
            self._layers(),
            *self.notes,
            self.verdict,
        ]

    def _forms(self) -> Table:
        columns = {
            "form": [form.name for form in self.forms],
            "ms [min, max]": [_spread(form.seconds, 1e3) for form in self.forms],
            "speed-up [min, max]": [
                "fastest dense" if form.name == self.fastest_dense else _spread(form.speedup)
                for form in self.forms
            ],
            "kept MB": [_megabytes(form.saved_bytes) for form in self.forms],
            "predicted MB": [_megabytes(form.predicted_saved_bytes) for form in self.forms],
        }
        return Table.of(columns)

    def _layers(self) -> Table:
        parts = [*self.layers, *self.rest]
        whole = LayerTime(
            "the whole step",
            seconds=sum(part.seconds or 0 for part in parts),
            dense_seconds=sum(part.dense_seconds or 0 for part in parts),
            share=1.0,
        )
        rows = [*parts, whole]
        columns = {
            "layer": [row.name for row in rows],
            "weight": [_cell(row.weight_shape) for row in rows],
            "ms": [_milliseconds(row.seconds) for row in rows],
            "dense ms": [_milliseconds(row.dense_seconds) for row in rows],
            "speed-up": [_speedup(row) for row in rows],
            "share %": ["" if row.share is None else f"{100 * row.share:.1f}" for row in rows],
            "kernels": [row.kernels for row in rows],
            "dense because": [row.why or "" for row in rows],
        }
        shown = {name: cells for name, cells in columns.items() if any(cells)}
        return Table.of(shown, f"{self.fastest} beside {self.layers_beside}")


def verdict_on(
    fastest: str,
    dense: str,
    speedup: Numbers,
    layers: Sequence[LayerTime],
    rest: Sequence[LayerTime],
) -> str:
    """One sentence: whether to train so.

    It is called faster or slower where the middle half of the rounds are.

    Args:
        fastest: the fastest sparse form.
        dense: the fastest dense one.
        speedup: spread of the dense form's seconds over the sparse one's.
        layers: of the sparse one beside a dense one.
        rest: what is no layer's.
    """
    times = speedup["median"]
    if speedup["lower_quartile"] > 1:
        return f"{fastest} trains {times:.2f} times as fast as the fastest dense form ({dense})"
    if speedup["upper_quartile"] >= 1:
        span = f"{times:.2f} times as fast, {speedup['minimum']:.2f} to {speedup['maximum']:.2f}"
        return (
            f"{fastest} is as fast as the fastest dense form ({dense}) within the spread ({span})"
        )
    text = f"{fastest} takes {1 / times:.2f} times as long as the fastest dense form ({dense})"
    return f"{text}: stay dense; {_losers(layers, rest)}"


def _losers(layers: Sequence[LayerTime], rest: Sequence[LayerTime]) -> str:
    """Which layers take longer than dense, most time first."""
    step = sum(part.seconds or 0 for part in (*layers, *rest))
    losers = sorted((row for row in layers if row.lost > _LITTLE * step), key=lambda row: -row.lost)
    between = sum(row.lost for row in rest)
    other = f"what lies between the layers takes {_figure(1e3 * between)} ms more"
    if not losers:
        return f"no layer loses much, {other}" if between > 0 else "no layer loses much"
    named = ", ".join(row.name for row in losers[:_NAMED])
    if len(losers) > _NAMED:
        named += f" and {len(losers) - _NAMED} more"
    text = f"the layer{'s that lose are' if len(losers) > 1 else ' that loses is'} {named}"
    return f"{text}, and {other}" if between > sum(row.lost for row in losers) else text


def _spread(values: Numbers, scale: float = 1.0) -> str:
    median, low, high = (values[k] * scale for k in ("median", "minimum", "maximum"))
    return f"{_figure(median)} [{_figure(low)}, {_figure(high)}]"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.4g}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else _figure(1e3 * seconds)


def _speedup(row: LayerTime) -> str:
    return f"{row.dense_seconds / row.seconds:.2f}" if row.dense_seconds and row.seconds else ""


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return "" if value is None else str(value)
