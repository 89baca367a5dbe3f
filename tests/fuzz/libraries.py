"""Kernels that a run can ask for: the instruction sets of this machine, and its own builds."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import torch

from swatfx import kernels
from tests.nets.kernel_builds import build, sanitizer_libraries

ALL = ("avx512bf16", "avx512", "avx2", "generic", "reference")
SANITIZE = (
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
)


def here() -> list[str]:
    """Names of `ALL` that run on this machine, best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    first = {"AVX512": 1, "AVX2": 2}.get(capability, 3)
    return [*(n for n in ALL[:1] if kernels.instruction_set() == n), *ALL[first:]]


@contextlib.contextmanager
def environment(name: str, sanitized: bool) -> Iterator[dict[str, str]]:
    """Environment variables under which workers run on the kernels called `name`.

    "generic" and sanitized kernels are built for it, in a folder that goes away.
    """
    if name == "reference" or not (sanitized or name == "generic"):
        yield {"SWATFX_KERNELS": name}
        return
    flags: list[str] = []
    if name.startswith("avx512"):
        flags += ["-march=x86-64-v4", "-mprefer-vector-width=512"]
    flags += {"avx512bf16": ["-mavx512bf16"], "avx2": ["-march=x86-64-v3"]}.get(name, [])
    found: dict[str, str] = {}
    if sanitized:
        flags += SANITIZE
        libraries = sanitizer_libraries()
        if libraries is None:
            raise SystemExit("the address sanitizer's library is not installed")
        found = {
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        }
    else:
        flags += ["-O3"]
    with tempfile.TemporaryDirectory() as folder:
        yield {**found, "SWATFX_KERNELS": str(build(pathlib.Path(folder), *flags))}
