"""The paper's table 6 beside ours: SCNN on a training step of ResNet-50.

The paper's simulator is not public, so this says "consistent with", and names every baseline:
forward over the design's own dense run, the input gradient (which is all of backward that the paper
simulated) over a dense run with every slot full. A training step has a weight gradient as well: it
and the whole step stand beside them, over the design's own dense run. Convolutions only, as in the
paper's ResNet-50.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import mean
from typing import Any

import torch
from torch import nn

from swatfx.accelerators.options import SimulationOptions
from swatfx.compiled import SwatModule, all_plans
from swatfx.costs import PASSES, LayerCycles, simulate
from swatfx.errors import InputError
from swatfx.pipeline import compile as compile_model
from swatfx.policy import swat_u
from swatfx.tables import Page, Table

# sparsity -> (forward, backward) speedup, table 6.
PAPER = {0.8: (3.3, 3.4), 0.9: (5.6, 6.3)}
BASELINES = (
    "forward, weight gradient and step over the design's own dense run; input gradient, as a"
    " stride-1 convolution of the dilated dense output gradient, over a dense run with every slot"
    " full"
)


@dataclass(frozen=True)
class Row:
    """One line: speedups over the named baselines, mean of the mask seeds.

    `backward` is the paper's: the input gradient alone. `weight_gradient` and `step` (all three
    products) are over the design's own dense run; None where it simulates no weight gradient.
    """

    accelerator: str
    sparsity: float
    forward: float
    backward: float
    backward_over_own_dense: float
    forward_over_tile: float
    weight_gradient: float | None
    step: float | None
    paper_forward: float | None
    paper_backward: float | None
    masks: str

    @property
    def consistent(self) -> bool | None:
        """Whether both figures are within 5% of the paper's; None where it gives none."""
        if self.paper_forward is None or self.paper_backward is None:
            return None
        pairs = ((self.forward, self.paper_forward), (self.backward, self.paper_backward))
        return all(abs(ours / paper - 1) <= 0.05 for ours, paper in pairs)


def table6(
    model: nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    accelerators: Sequence[str] = ("scnn", "bit-tactical"),
    *,
    sparsities: Sequence[float] = tuple(PAPER),
    seeds: int = 3,
    tick: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Table 6 on drawn masks, half the activations zero.

    Args:
        model: the network; on the meta device nothing of it is computed.
        example_inputs: one sample.
        accelerators: designs to put beside each other.
        sparsities: of SWAT-U, first layer dense.
        seeds: mask seeds to average over.
        tick: called after each layer and accelerator.
    """
    rows = []
    for sparsity in sparsities:
        gm = compile_model(model, swat_u(sparsity))
        layers = _convolutions(gm)
        runs: dict[str, list[Speedups]] = {name: [] for name in accelerators}
        masks = ""
        for seed in range(seeds):
            options = SimulationOptions(seed=seed, draw_weights=True)
            found = simulate(gm, example_inputs, list(accelerators), options=options, tick=tick)
            for name in accelerators:
                runs[name].append(_speedups(found.rows, name, layers))
            masks = f"{found.rows[0].masks.split(', ', 1)[-1]}; weights drawn; {seeds} seeds"
        for name in accelerators:
            rows.append(_row(name, sparsity, runs[name], masks))
    return rows


def table6_trained(
    gm: SwatModule,
    batch: tuple[torch.Tensor, ...],
    sparsity: float,
    accelerators: Sequence[str] = ("scnn", "bit-tactical"),
    *,
    samples: int = 1,
    tick: Callable[[], object] = lambda: None,
) -> list[Row]:
    """The same on trained weights and the activations of a real batch."""
    options = SimulationOptions(samples=samples)
    found = simulate(gm, batch, list(accelerators), options=options, tick=tick)
    layers = _convolutions(gm)
    masks = f"trained weights, activations of {found.samples} real samples"
    return [
        _row(name, sparsity, [_speedups(found.rows, name, layers)], masks) for name in accelerators
    ]


def _convolutions(gm: SwatModule) -> set[str]:
    names = {name for name, plan in all_plans(gm).items() if plan.kind.startswith("conv")}
    if not names:
        raise InputError("table 6 wants a network with convolutions")
    return names


@dataclass(frozen=True)
class Speedups:
    """Those of one simulation, as in `Row`."""

    forward: float
    backward: float
    backward_over_own_dense: float
    forward_over_tile: float
    weight_gradient: float | None
    step: float | None


def _speedups(rows: Sequence[LayerCycles], name: str, layers: set[str]) -> Speedups:
    def total(stages: Sequence[str], field: str) -> float:
        return sum(
            float(getattr(r, field))
            for r in rows
            if r.accelerator == name and r.stage in stages and r.layer in layers
        )

    def over(field: str, *stages: str) -> float:
        return total(stages, field) / total(stages, "cycles")

    own = "own_dense_cycles"
    whole = total(["weight_gradient"], "cycles") > 0
    return Speedups(
        forward=over(own, "forward"),
        backward=over("full_slot_cycles", "input_gradient"),
        backward_over_own_dense=over(own, "input_gradient"),
        forward_over_tile=over("dense_cycles", "forward"),
        weight_gradient=over(own, "weight_gradient") if whole else None,
        step=over(own, *PASSES) if whole else None,
    )


def _row(name: str, sparsity: float, runs: Sequence[Speedups], masks: str) -> Row:
    paper = PAPER.get(sparsity, (None, None))
    means: dict[str, Any] = {}
    for field in fields(Speedups):
        values = [value for run in runs if (value := getattr(run, field.name)) is not None]
        means[field.name] = mean(values) if values else None
    return Row(
        accelerator=name,
        sparsity=sparsity,
        paper_forward=paper[0],
        paper_backward=paper[1],
        masks=masks,
        **means,
    )


def page(rows: Sequence[Row], model: str) -> Page:
    """The table, with what it is over and what it is made from."""
    lines = [
        (
            row.accelerator,
            f"{row.sparsity:.0%}",
            _times(row.forward),
            "-" if row.paper_forward is None else f"{row.paper_forward}x",
            _times(row.backward),
            "-" if row.paper_backward is None else f"{row.paper_backward}x",
            _times(row.weight_gradient),
            _times(row.step),
            _times(row.backward_over_own_dense),
            _times(row.forward_over_tile),
            {True: "yes", False: "no", None: ""}[row.consistent],
        )
        for row in rows
    ]
    heads = (
        "accelerator",
        "sparsity",
        "forward",
        "paper",
        "input gradient",
        "paper's backward",
        "weight gradient",
        "whole step",
        "input gradient / own dense",
        "forward / dense tile",
        "within 5%",
    )
    notes = [
        f"model: {model}, SWAT-U, first layer dense, convolutions only",
        f"masks: {rows[0].masks}",
        "the paper's backward is the input gradient alone; a step has the weight gradient, too",
        f"baselines: {BASELINES}",
        "the paper's simulator is not public: SCNN is consistent with its table, no more than that",
    ]
    table = [asdict(row) | {"consistent": row.consistent} for row in rows]
    named = {name: [row[name] for row in table] for name in table[0]}
    shown: tuple[Table | str, ...] = (Table(heads, tuple(lines)), *notes)
    return Page(shown, Table.of(named), {"model": model, "rows": table})


def _times(speedup: float | None) -> str:
    return "-" if speedup is None else f"{speedup:.2f}x"
