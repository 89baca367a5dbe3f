"""Finds the compiled kernels that fit this machine, and calls them on tensors.

The environment variable SWATFX_KERNELS, read when they are first asked for, says which: "auto" (the
default) the best that run here; "avx512bf16", "avx512", "avx2" or "generic" those, if they run
here; a path with a slash in it that library file, whatever it was built for; "reference" none.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from swatfx.errors import InputError
from swatfx.kernels import sources
from swatfx.tensors import layouts

VARIABLE = "SWATFX_KERNELS"
REFERENCE = "reference"
# Best first; what torch says of the processor -> the libraries that run on it.
_RUNS_ON = {"AVX512": ("avx512bf16", "avx512", "avx2"), "AVX2": ("avx2",)}

_state = {"off": 0}
_lock = threading.RLock()
_loaded: list[tuple[str, ctypes.CDLL | None]] = []


def _library() -> tuple[str, ctypes.CDLL | None]:
    """(instruction set, library), looked for once a process, by the thread that asks first."""
    if not _loaded:
        with _lock:
            if not _loaded:
                _loaded.append(_found())
    return _loaded[0]


def _found() -> tuple[str, ctypes.CDLL | None]:
    """(instruction set, library); says why there is none."""
    asked = os.environ.get(VARIABLE, "auto")
    if asked == REFERENCE:
        return REFERENCE, None
    if os.sep in asked:
        files = {asked: asked}
    else:
        files = _built(asked)
    old = False
    for name, file in files.items():
        try:
            # After torch: both then share one OpenMP run-time and its threads.
            library = ctypes.CDLL(file)
        except OSError:
            continue
        if not _is_current(library):
            old = True
        elif library.swatfx_runs_here():
            return name, library
    remedy = "Install a C compiler with OpenMP and install swatfx again"
    if old:
        remedy = "They were built from other sources: install swatfx again"
    warnings.warn(
        "swatfx runs without its compiled kernels: same results, but no faster than dense."
        f" {remedy}" + ("" if asked == "auto" else f" (or unset {VARIABLE}={asked})"),
        RuntimeWarning,
        stacklevel=2,
    )
    return REFERENCE, None


def _is_current(library: ctypes.CDLL) -> bool:
    """Whether it was built from the sources that lie here, or by hand; another one would crash."""
    try:
        found = library.swatfx_sources
    except AttributeError:  # older than the question
        return False
    found.restype = ctypes.c_char_p
    return found() in (b"", sources.digest().encode())


def _built(asked: str) -> dict[str, str]:
    """Instruction set -> library file, best first, of those that run here and are `asked` for."""
    names = (*_RUNS_ON.get(torch.backends.cpu.get_cpu_capability(), ()), "generic")
    if asked != "auto":
        names = tuple(name for name in names if name == asked)
    specs = {name: importlib.util.find_spec(f"swatfx.kernels._{name}") for name in names}
    return {name: spec.origin for name, spec in specs.items() if spec and spec.origin}


def available() -> bool:
    """Whether compiled kernels are loaded and not switched off."""
    return _state["off"] == 0 and _library()[1] is not None


def instruction_set() -> str:
    """Name of the library that runs: as `VARIABLE` names it, a path, or "reference"."""
    return _library()[0] if available() else REFERENCE


@contextmanager
def reference_only() -> Iterator[None]:
    """Run the plain-torch kernels inside, in every thread."""
    with _lock:
        _state["off"] += 1
    try:
        yield
    finally:
        with _lock:
            _state["off"] -= 1


ELEMENTS = (torch.float32, torch.bfloat16)  # what typed functions read and write


def function(
    name: str, restype: Any = None, *, elements: torch.dtype = torch.float32
) -> Callable[..., Any]:
    """A C function by name. Pass tensors as `pointer(t)`, sizes as `size(n)`.

    Args:
        name: as in csrc/exports.h.
        restype: of its result.
        elements: of ELEMENTS, where the name is TYPED.
    """
    library = _library()[1]
    assert library is not None, "ask available() first"
    name += "_bf16" if elements is torch.bfloat16 else ""
    found: Callable[..., Any] = getattr(library, name)
    found.restype = restype  # type: ignore[attr-defined]
    return found


size = ctypes.c_int64
real = ctypes.c_float


def address(x: Tensor | None) -> int:
    """Of a tensor's first element; 0 for None.

    Raises:
        InputError: its storage was taken away or cut, as frameworks that shard parameters do.
    """
    if x is None:
        return 0
    count = x.numel()
    # Of no elements an offset says nothing: it may lie past the end, as that of an empty slice.
    end = x.storage_offset() + count if count else 0
    if x.untyped_storage().nbytes() < end * x.itemsize:
        raise InputError(
            "a tensor has more elements than its storage holds",
            value=tuple(x.shape),
            remedy="give its memory back before the forward or backward that reads it",
        )
    return x.data_ptr()


def made(x: Tensor | None) -> int:
    """`address`, of a tensor that the caller made just now: nobody can have cut its storage.

    To ask a tensor for its storage leaves a Python object behind, with which autograd holds the
    storage for shared: it then sums gradients into a third tensor, not in place.
    """
    return 0 if x is None else x.data_ptr()


def pointer(x: Tensor | None, past: int = 0) -> ctypes.c_void_p:
    """`address`, or `past` bytes behind it, as a C function takes it among its arguments."""
    return ctypes.c_void_p(address(x) + past)


def result(x: Tensor | None, past: int = 0) -> ctypes.c_void_p:
    """`made`, likewise."""
    return ctypes.c_void_p(made(x) + past)


def new(shape: Sequence[int], layout: str, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the host, in a layout of `swatfx.tensors.layouts`; no view."""
    sizes = tuple(shape)
    return torch.empty_strided(sizes, _strides(sizes, layout), dtype=dtype, device="cpu")


@functools.lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    return tuple(layouts.strides_of(shape, layout))


def threads() -> ctypes.c_int:
    """How many threads a kernel may use: torch's own number."""
    return ctypes.c_int(torch.get_num_threads())
