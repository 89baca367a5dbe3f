"""Export: a compiled model as plain PyTorch, ONNX or sparse weights, or as its training graph."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from swatfx import meta
from swatfx.arguments import FLAG, INPUTS, PATH, checked
from swatfx.compiled import HeldThreshold, SwatModule, private_copy, sparse_nodes, unwrap
from swatfx.errors import ExportError, UnknownNameError
from swatfx.exporting.archives import save_program
from swatfx.exporting.freezing import freeze
from swatfx.exporting.names import rename_program
from swatfx.exporting.onnx_file import write_onnx
from swatfx.exporting.packing import VALUES, pack_module
from swatfx.exporting.plain import inference_module
from swatfx.exporting.program import Example, exported
from swatfx.exporting.shrinking import shrunk
from swatfx.exporting.sparse_file import write_weights
from swatfx.pipeline import TRACING

_OPS = ("swatfx.conv.default", "swatfx.linear.default")
_SUFFIXES = (".pt2", ".onnx", ".safetensors")


@dataclass(frozen=True)
class _Form:
    """How a program is written: see `export`."""

    kernels: bool = False
    shrink: bool = False
    packed: bool = False
    values: str = "exact"

    def check(self, suffix: str, training: bool) -> None:
        """Refuse what does not go together.

        Raises:
            UnknownNameError, ExportError: as `export` tells.
        """
        if self.values not in VALUES:
            raise UnknownNameError("form of values", str(self.values), VALUES)
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if training and suffix != ".pt2":
            raise ExportError("a training graph is written as .pt2", value=suffix)
        if training and given:
            raise ExportError("a training graph is written as it is", value=given[0])
        if self.kernels and suffix != ".pt2":
            raise ExportError("our kernels run in a .pt2 program", value=suffix)
        if self.kernels and self.shrink:
            raise ExportError(
                "a smaller network runs plain ops", value="kernels", remedy="choose one of them"
            )
        if suffix == ".safetensors" and given not in ([], ["packed"]):
            raise ExportError(
                "a file of weights has no graph, and exact values",
                value=given[0],
                remedy="write .pt2 or .onnx",
            )


@checked(
    path=PATH,
    example_inputs=INPUTS,
    training=FLAG,
    kernels=FLAG,
    shrink=FLAG,
    packed=FLAG,
)
def export(
    gm: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
    *,
    dynamic_shapes: Any = None,
    training: bool = False,
    kernels: bool = False,
    shrink: bool = False,
    packed: bool = False,
    values: str = "exact",
) -> None:
    """Write `gm` for use elsewhere; the suffix of `path` says how.

    `.pt2`: torch.export with exact Top-K weights and plain aten ops; loads without swatfx.
    `.onnx`: likewise for ONNX runtimes (extra `onnx`). `.safetensors`: every weight, sparse ones
    packed (extra `safetensors`); read it with `load_sparse`. What is written computes what
    `gm.eval()` computes after `swatfx.refresh(gm)`; `gm` itself and the example inputs are not
    changed.

    Args:
        gm: a compiled model.
        path: file to write; replaced in one move.
        example_inputs: positional inputs, or a dict of inputs by name; needed but for
            `.safetensors`.
        dynamic_shapes: which dimensions may differ from the example's, as torch.export takes it.
            None: dimension 0 of every input for which the model leaves it open.
        training: write the rewritten training graph itself (`.pt2` only): our ops with their
            metadata; it loads after `import swatfx`.
        kernels: write what `freeze` makes, our ops for our kernels (`.pt2` only); it loads after
            `import swatfx`, and runs fastest as `load_program` reads it.
        shrink: write the smaller network that `swatfx.shrink` makes.
        packed: store weights of which most are zero as bits and values. The file unpacks them by
            itself, in plain ops: ONNX Runtime when it loads it, a `.pt2` program at every call,
            unless `load_program` does.
        values: "exact", or weights of convolutions and linear layers rounded: "bf16", or "int8",
            127 steps each way a filter. They are computed with as before.

    Raises:
        UnknownNameError: a suffix of no format, or unknown `values`.
        ExportError: a missing package, options that do not go together, or a model that
            torch.export cannot follow.
        CheckpointError: the file cannot be written.
    """
    root = unwrap(gm)
    suffix = Path(path).suffix
    if suffix not in _SUFFIXES:
        raise UnknownNameError("export format", suffix or str(path), _SUFFIXES)
    form = _Form(kernels, shrink, packed, values)
    form.check(suffix, training)
    if suffix == ".safetensors":
        if dynamic_shapes is not None:
            raise ExportError("weights alone have no inputs", value="dynamic_shapes")
        write_weights(root, Path(path))
        return
    if example_inputs is None:
        raise ExportError(f"{suffix} wants example inputs", remedy="swatfx.export(gm, path, (x,))")
    example = Example.of(example_inputs, dynamic_shapes)
    with TRACING:  # torch's own exporter is for one thread
        if training:
            save_program(_training_program(root, example), Path(path))
        elif suffix == ".onnx":
            write_onnx(_program(root, example, form), Path(path), form.values, form.packed)
        else:
            _write_pt2(_program(root, example, form), Path(path), example, form)


def _program(gm: SwatModule, example: Example, form: _Form) -> torch.export.ExportedProgram:
    """In evaluation, with weights as they are, and names that a person finds again."""
    module: fx.GraphModule = freeze(gm).graph_module if form.kernels else inference_module(gm)
    if not form.shrink:
        return rename_program(exported(module, example))
    module = shrunk(module, example).module
    return rename_program(exported(module, example), module.graph)


def _write_pt2(
    program: torch.export.ExportedProgram, path: Path, example: Example, form: _Form
) -> None:
    stored_as = (form.values, form.packed)
    if stored_as != ("exact", False):
        module = pack_module(program, *stored_as)
        program = rename_program(exported(module, example), module.graph)
    save_program(program, path, small=form.packed)


def _training_program(gm: SwatModule, example: Example) -> torch.export.ExportedProgram:
    twin = private_copy(gm)
    twin.swat.clock.optimizer_wanted_by = None
    for _, threshold in twin.swat.thresholds():
        if isinstance(threshold, HeldThreshold):
            threshold.let_through(False)  # of the step to come: nothing would close it again
    twin.train()
    with torch.enable_grad():
        program = exported(twin, example)
    annotate_exported(program, gm)
    return program


def annotate_exported(program: torch.export.ExportedProgram, gm: SwatModule) -> None:
    """Put each layer's record on the exported op nodes, and on no other node.

    Raises:
        ExportError: the exported ops are not the plan's.
    """
    ours = [layer.node for layer in sparse_nodes(gm)]
    exported = [n for n in program.graph.nodes if str(n.target) in _OPS]
    if len(ours) != len(exported):
        raise ExportError(
            "the exported graph does not hold the plan's layers",
            value=f"{len(exported)} ops for {len(ours)} planned calls",
            remedy="a module that is called several times, or not at all, by eager code cannot be"
            " exported for training",
        )
    for node in program.graph.nodes:
        meta.erase(node)
    for node, source in zip(exported, ours, strict=True):
        meta.write(node, meta.read(source))
