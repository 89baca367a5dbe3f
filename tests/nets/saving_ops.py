"""What tests of the ops that save less share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swatfx.tensors import layouts


def leaf(shape: tuple[int, ...], layout: str = "row_major", **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    x = torch.randn(shape, generator=generator, dtype=options.get("dtype", torch.float32))
    return layouts.as_layout(x, layout).detach().requires_grad_()


def saved_by(run: Callable[[], Any], *without: Tensor | None) -> list[Tensor]:
    """Distinct storages that autograd keeps, but for those of `without`."""
    known = {t.untyped_storage()._cdata for t in without if t is not None}
    seen: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in known:
            seen[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        run()
    return list(seen.values())
