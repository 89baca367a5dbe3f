"""The file of sparse weights, `.safetensors`: written from a compiled model, read into a plain one.

Its layout is told in swatfx/exporting/README.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from swatfx.arguments import PATH, checked, instance, optional
from swatfx.compiled import SwatModule, private_copy, read_dense, sparse_layers
from swatfx.errors import ExportError
from swatfx.exporting.archives import need
from swatfx.exporting.program import first_line
from swatfx.files.atomic import write_atomically
from swatfx.tensors import bits
from swatfx.training import refresh

_FORMAT = "swatfx-sparse"  # of a .safetensors file
_Module = TypeVar("_Module", bound=nn.Module)


def write_weights(gm: SwatModule, path: Path) -> None:
    """Write every weight, sparse ones packed."""
    need("safetensors", "safetensors")
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
    need("safetensors", "safetensors")
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
    first = first_line(error)
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"
