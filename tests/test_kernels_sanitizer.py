"""Every compiled kernel under the address and undefined-behaviour sanitizers: minutes."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from kernel_builds import SOURCES, build, need_gcc, python

pytestmark = pytest.mark.slow
SANITIZE = [
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]
TARGETS = {"native": ["-march=native", "-mprefer-vector-width=512"], "generic": []}
DRIVER = str(pathlib.Path(__file__).with_name("sanitized_calls.py"))
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python's own, mostly
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_NUM_THREADS": "2",
}


def need_asan() -> str:
    """Path of gcc's run-time library of the address sanitizer."""
    command = [need_gcc(), "-print-file-name=libasan.so"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not sys.platform.startswith("linux") or not os.path.isabs(path):
        pytest.skip("no libasan")
    return path


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_to_report(tmp_path: pathlib.Path, target: str) -> None:
    preload = need_asan()
    library = build(tmp_path, *SANITIZE, *TARGETS[target])
    result = python(DRIVER, kernels=library, LD_PRELOAD=preload, **OPTIONS)
    assert result.returncode == 0, result.stderr[-8000:]
    assert "runtime error" not in result.stderr and "Sanitizer" not in result.stderr
    assert set(result.stdout.split()) == exported()
    seen = python(DRIVER, "overrun", kernels=library, LD_PRELOAD=preload, **OPTIONS)
    assert "heap-buffer-overflow" in seen.stderr  # else nobody was watching


def exported() -> set[str]:
    """Names of the functions that a library exports."""
    folder = SOURCES[0].parent
    text = "\n".join(path.read_text() for path in [*folder.glob("*.c"), *folder.glob("*.h")])
    return set(re.findall(r"^EXPORT\s[^(]*?(\w+)\(", text, re.MULTILINE))
