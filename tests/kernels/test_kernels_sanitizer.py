"""Every compiled kernel under the address and undefined-behaviour sanitizers: minutes."""

from __future__ import annotations

import pathlib
import re
import sys

import pytest

from tests.nets.kernel_builds import build, python, sanitizer_libraries
from tests.nets.places import ROOT

pytestmark = pytest.mark.slow
SANITIZE = [
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]
TARGETS = {"native": ["-march=native", "-mprefer-vector-width=512"], "generic": []}
DRIVER = ["-m", "tests.nets.sanitized_calls"]
MALFORMED = ["-m", "tests.nets.malformed_calls"]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python's own, mostly
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_NUM_THREADS": "2",
}


def need_asan() -> str:
    """What to preload; skips the test where it is not installed."""
    paths = sanitizer_libraries()
    if not sys.platform.startswith("linux") or paths is None:
        pytest.skip("no libasan")
    return " ".join(paths)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_to_report(tmp_path: pathlib.Path, target: str) -> None:
    preload = need_asan()
    library = build(tmp_path, *SANITIZE, *TARGETS[target])
    result = python(*DRIVER, kernels=library, LD_PRELOAD=preload, **OPTIONS)
    assert result.returncode == 0, result.stderr[-8000:]
    assert "runtime error" not in result.stderr and "Sanitizer" not in result.stderr
    assert set(result.stdout.split()) == exported(library)
    wrong = python(*MALFORMED, "20", kernels=library, LD_PRELOAD=preload, **OPTIONS)
    assert wrong.returncode == 0, wrong.stdout[-4000:] + wrong.stderr[-8000:]
    assert "runtime error" not in wrong.stderr and "Sanitizer" not in wrong.stderr
    seen = python(*DRIVER, "overrun", kernels=library, LD_PRELOAD=preload, **OPTIONS)
    assert "heap-buffer-overflow" in seen.stderr  # else nobody was watching


def exported(library: pathlib.Path) -> set[str]:
    """Names of the functions that `library` exports for ops to call."""
    text = (ROOT / "swatfx/kernels/csrc/exports.h").read_text()
    found = set(re.findall(r"^EXPORT\s[^(]*?(?:TYPED\()?(\w+)[()]", text, re.MULTILINE))
    found -= {"swatfx_sources", "swatfx_runs_here"}  # asked once, by whoever loads the library
    # Each TYPED one is two, where there is a file of it in bf16/.
    symbols = library.read_bytes()
    typed = {f"{name}_bf16" for name in found}
    return found | {name for name in typed if f"\0{name}\0".encode() in symbols}
