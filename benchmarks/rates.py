"""The most that this machine does of what a sparse product is made of, measured by `rates.c`.

The probe is compiled when it is asked for, by the compiler that Python was built with or one of
the usual names, with the options of the swatfx library that runs: vectors are then as wide.
"""

from __future__ import annotations

import ctypes
import pathlib
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from swatfx import kernels

_SOURCE = pathlib.Path(__file__).with_name("rates.c")
_FLAGS = ("-O3", "-std=gnu11", "-fopenmp", "-shared", "-fPIC")
_WIDE = ("-march=x86-64-v4", "-mprefer-vector-width=512")
# As in setup.py: a library's instruction set -> what makes the compiler use it.
_TARGETS = {
    "avx2": ("-march=x86-64-v3",),
    "avx512": _WIDE,
    "avx512bf16": (*_WIDE, "-mavx512bf16"),
}
_FMA, _DOT, _LOAD = range(3)  # as in rates.c
_L1_BYTES = 2**14  # a thread; half of the smallest first-level cache
_L2_BYTES = 3 * 2**17  # what plan.c gives a tile's scratch of a cache of 1 MiB
_MEMORY_BYTES = 2**27
# Each burst is short, so that of many some are not interrupted: the best one counts.
_BURSTS = 60
_MEMORY_BURSTS = 6
_COMPILER_SECONDS = 60


class NoProbeError(Exception):
    """Why no rates could be measured, in one line."""


@dataclass(frozen=True)
class Rates:
    """What all threads together do at most in a second.

    Attributes:
        fma: products added to a sum in float32, each lane of a vector counted.
        dot: sums that a dot product of bfloat16 pairs adds to; None where there is none.
        l1: bytes loaded from the first-level cache.
        l2: likewise from the second level.
        memory: bytes read from memory.
    """

    fma: float
    dot: float | None
    l1: float
    l2: float
    memory: float

    def to_json(self) -> dict[str, float | None]:
        """A JSON-able dict."""
        return asdict(self)

    def products(self, dtype: str) -> float:
        """Products a second in "fp32" or "bf16": without a dot product these are widened."""
        return self.dot if dtype == "bf16" and self.dot is not None else self.fma


def measured_rates() -> Rates:
    """Rates of this process's number of threads.

    Raises:
        NoProbeError: swatfx runs no compiled kernels, or there is no C compiler that makes the
            probe.
    """
    if not kernels.available():
        raise NoProbeError("swatfx runs its reference kernels, which have other bounds")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rates.so"
        _compile(path)
        try:
            rate = ctypes.CDLL(str(path)).swatfx_rate
        except OSError as error:
            raise NoProbeError(f"the probe cannot be loaded: {error}") from None
    rate.restype = ctypes.c_double
    rate.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]

    def best(what: int, size: int, times: int, bursts: int = _BURSTS) -> float:
        threads = torch.get_num_threads()
        return max(float(rate(what, size, times, threads)) for _ in range(bursts))

    return _rates(best)


def _rates(best: Callable[..., float]) -> Rates:
    """From `best`: what, bytes a thread, times over, bursts -> the highest rate, or 0."""
    rates = Rates(
        fma=best(_FMA, 0, 200_000),
        dot=best(_DOT, 0, 200_000) or None,
        l1=best(_LOAD, _L1_BYTES, 20_000),
        l2=best(_LOAD, _L2_BYTES, 500),
        memory=best(_LOAD, _MEMORY_BYTES, 1, _MEMORY_BURSTS),
    )
    if 0 in (rates.fma, rates.l1, rates.l2, rates.memory):
        raise NoProbeError("the probe measured nothing: there may be too little memory for it")
    return rates


def _compile(path: pathlib.Path) -> None:
    own = shlex.split(sysconfig.get_config_var("CC") or "")[:1]
    compiler = next(filter(None, map(shutil.which, [*own, "cc", "gcc", "clang"])), None)
    if compiler is None:
        raise NoProbeError("there is no C compiler")
    flags = [*_FLAGS, *_TARGETS.get(kernels.instruction_set(), ())]
    words = [compiler, *flags, "-o", str(path), str(_SOURCE)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_COMPILER_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoProbeError(f"the C compiler does not run: {error}") from None
    if done.returncode:
        said = next(filter(None, done.stderr.splitlines()), "no message")
        raise NoProbeError(f"the C compiler fails: {said}")
