"""Builds of the C kernels that no installation has, and processes that run on them."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.nets.places import ROOT

SOURCES = sorted(ROOT.glob("swatfx/kernels/csrc/**/*.c"))
# As in setup.py, but for what optimises.
FLAGS = ["-std=gnu11", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]


def need_gcc() -> str:
    """Path of gcc; skips the test where there is none."""
    gcc = shutil.which("gcc")
    if gcc is None or sys.platform == "win32":
        pytest.skip("no gcc")
    return gcc


def sanitizer_libraries() -> list[str] | None:
    """What has to be loaded before Python; None if it is not installed.

    Gcc's address sanitizer, and the library whose exceptions it watches, which torch throws.
    """
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [need_gcc(), f"-print-file-name={name}"]
        paths.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    return paths if all(map(os.path.isabs, paths)) else None


def build(folder: pathlib.Path, *flags: str) -> pathlib.Path:
    """A library of all kernels in `folder`."""
    path = folder / "kernels.so"
    command = [need_gcc(), *FLAGS, *flags, "-fPIC", "-shared", *map(str, SOURCES)]
    result = subprocess.run(
        [*command, "-o", str(path), "-lm"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return path


def python(
    *args: str, kernels: str | os.PathLike[str] | None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python on `args` with SWATFX_KERNELS set to `kernels`, or unset."""
    variables = {k: v for k, v in os.environ.items() if k != "SWATFX_KERNELS"}
    if kernels is not None:
        variables["SWATFX_KERNELS"] = str(kernels)
    variables["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *args]
    return subprocess.run(
        command, env={**variables, **environment}, capture_output=True, text=True, cwd=ROOT
    )


def assert_passes_on(kernels: str | os.PathLike[str], tests: Sequence[str]) -> None:
    """Run tests in a process of its own on other kernels; fail if they do, or if they skip."""
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    options += ["-o", "addopts=--strict-markers -m 'not slow'"]
    result = python("-m", "pytest", *options, "-rs", *tests, kernels=kernels)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout and "no compiled kernels" not in result.stdout
