"""Export: a compiled model as plain PyTorch, ONNX or sparse weights, or as its training graph."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from swatfx import meta
from swatfx.arguments import FLAG, INPUTS, PATH, checked, instance, optional
from swatfx.compiled import (
    HeldThreshold,
    SwatModule,
    private_copy,
    read_dense,
    sparse_layers,
    sparse_nodes,
    unwrap,
)
from swatfx.errors import ExportError, UnknownNameError
from swatfx.exporting.plain import inference_module
from swatfx.exporting.program import Example, exported
from swatfx.files.atomic import write_atomically
from swatfx.pipeline import TRACING
from swatfx.tensors import bits
from swatfx.training import refresh

_FORMAT = "swatfx-sparse"  # of a .safetensors file
_OPS = ("swatfx.conv.default", "swatfx.linear.default")
_Module = TypeVar("_Module", bound=nn.Module)


@checked(path=PATH, example_inputs=INPUTS, training=FLAG)
def export(
    gm: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
    *,
    dynamic_shapes: Any = None,
    training: bool = False,
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

    Raises:
        UnknownNameError: a suffix of no format.
        ExportError: a missing package, or a model that torch.export cannot follow.
        CheckpointError: the file cannot be written.
    """
    root = unwrap(gm)
    suffix = Path(path).suffix
    writers: dict[str, Callable[..., None]] = {
        ".pt2": _write_training if training else _write_pt2,
        ".onnx": _write_onnx,
        ".safetensors": _write_safetensors,
    }
    if suffix not in writers:
        raise UnknownNameError("export format", suffix or str(path), writers)
    if training and suffix != ".pt2":
        raise ExportError("a training graph is written as .pt2", value=str(path))
    example = Example()
    if suffix == ".safetensors":
        if dynamic_shapes is not None:
            raise ExportError("weights alone have no inputs", value="dynamic_shapes")
    elif example_inputs is None:
        raise ExportError(f"{suffix} wants example inputs", remedy="swatfx.export(gm, path, (x,))")
    else:
        example = Example.of(example_inputs, dynamic_shapes)
    with TRACING:  # torch's own exporter is for one thread
        writers[suffix](root, Path(path), example)


def _write_pt2(gm: SwatModule, path: Path, example: Example) -> None:
    _save_program(exported(inference_module(gm), example), path)


def _write_training(gm: SwatModule, path: Path, example: Example) -> None:
    twin = private_copy(gm)
    twin.swat.clock.optimizer_wanted_by = None
    for _, threshold in twin.swat.thresholds():
        if isinstance(threshold, HeldThreshold):
            threshold.let_through(False)  # of the step to come: nothing would close it again
    twin.train()
    with torch.enable_grad():
        program = exported(twin, example)
    annotate_exported(program, gm)
    _save_program(program, path)


def _save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    # By way of memory: torch's own writer ends the process where the disk is full.
    buffer = io.BytesIO()
    torch.export.save(program, buffer)

    def write(temporary: Path) -> None:
        temporary.write_bytes(buffer.getbuffer())

    write_atomically(path, write)


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


def _write_onnx(gm: SwatModule, path: Path, example: Example) -> None:
    _need("onnxscript", "onnx")
    exported_program = exported(inference_module(gm), example)
    try:
        program = torch.onnx.export(exported_program, dynamo=True, verbose=False)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(
            f"torch.onnx cannot export the model: {type(error).__name__}: {first}"
        ) from error
    assert program is not None  # with dynamo=True it returns what it would write
    write_atomically(path, lambda temporary: program.save(str(temporary)))


def _need(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"the package {package!r} is not installed", remedy=f"pip install swatfx[{extra}]"
        ) from error


def _write_safetensors(gm: SwatModule, path: Path, example: Example) -> None:
    _need("safetensors", "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    twin = private_copy(gm)
    refresh(twin)
    tensors: dict[str, Tensor] = {
        name: value.detach().contiguous()
        for name, value in gm.state_dict().items()
        if not name.startswith("swat.")
    }
    tensors = {name: value.clone() for name, value in tensors.items()}  # no two may share memory
    sparse: dict[str, dict[str, Any]] = {}
    for layer in sparse_layers(twin):
        if not layer.plan.rule.forward_weight:
            continue
        names = [n for n, v in gm.state_dict().items() if _same(v, layer.weight)]
        if not names:
            raise ExportError(
                "a computed (parametrized) weight has no name to be stored under",
                layer=layer.plan.name,
                remedy="export to .pt2, or remove the parametrization first",
            )
        for name in names:
            if read_dense(gm, name):
                raise ExportError(
                    f"other code reads {name!r} dense, and a state dict cannot hold both",
                    layer=layer.plan.name,
                    remedy="export to .pt2, or keep the layer dense with swatfx.per_layer",
                )
        weight = layer.weight.detach().contiguous().reshape(-1)
        keep = layer.keep_now().reshape(-1) & (weight != 0)
        for name in names:
            del tensors[name]
            tensors[f"{name}.bitmask"] = bits.mask_to_bits(keep)
            tensors[f"{name}.values"] = weight[keep].clone()
            sparse[name] = {"shape": list(layer.weight.shape)}
    about = json.dumps(sparse)
    metadata = {"format": _FORMAT, "sparse": about, "sha256": _digest(tensors, about)}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, str(temporary), metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomically(path, write)


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


@overload
def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]: ...
@overload
def load_sparse(path: str | os.PathLike[str], model: _Module) -> _Module: ...
@checked(path=PATH, model=optional(instance(nn.Module)))
def load_sparse(path: str | os.PathLike[str], model: nn.Module | None = None) -> Any:
    """Read what `export` wrote as `.safetensors`: dense tensors with zeros where Top-K was none.

    Args:
        path: the file. Its layout is told in swatfx/exporting/README.md.
        model: the original model, which takes the weights and is returned; without it a state
            dict is, which loads into that model with strict=True.

    Raises:
        ExportError: the file is damaged or not ours, or the model is another: it stays as it was.
    """
    state = _read_sparse(path)
    if model is None:
        return state
    own = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    other = sorted(
        name
        for name in shapes.keys() | state.keys()
        if name not in shapes or name not in state or shapes[name] != tuple(state[name].shape)
    )
    if other:
        raise ExportError(
            "the file is of another model: names or shapes differ",
            value=other[0] if len(other) == 1 else f"{other[0]} and {len(other) - 1} more",
            remedy="pass the model that was compiled, built with the same arguments",
        )
    model.load_state_dict(state)
    return model


def _read_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The dense state dict that a file holds."""
    _need("safetensors", "safetensors")
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own, undocumented
        raise ExportError(
            f"cannot read the file ({type(error).__name__})", value=str(path)
        ) from error
    if metadata.get("format") != _FORMAT:
        raise ExportError("not a file that swatfx.export wrote", value=str(path))
    try:
        # Files of versions before 2026-12 have no checksum.
        if "sha256" in metadata or set(metadata) != {"format", "sparse"}:
            if metadata["sha256"] != _digest(tensors, metadata["sparse"]):
                raise ValueError("its checksum is another")
        for name, about in json.loads(metadata["sparse"]).items():
            tensors[name] = _unpacked(tensors, name, tuple(about["shape"]))
    except Exception as error:  # whatever damage may lead to
        raise ExportError(
            f"the file is damaged ({_why(error)})",
            value=str(path),
            remedy="write it again with swatfx.export",
        ) from error
    return tensors


def _unpacked(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """The dense weight of bitmask and values, which leave `tensors`."""
    keep = bits.bits_to_mask(tensors.pop(f"{name}.bitmask"), torch.Size(shape).numel())
    values = tensors.pop(f"{name}.values")
    dense = values.new_zeros(keep.numel())
    dense[keep] = values
    return dense.view(shape)


def _digest(tensors: dict[str, Tensor], about: str) -> str:
    """SHA-256 of all that a file of sparse weights holds."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _why(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"
