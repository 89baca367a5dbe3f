"""Which library of compiled kernels runs, and that every one gives what the reference gives."""

from __future__ import annotations

import pathlib
import subprocess

import pytest
from torch.backends import cpu

from swatfx import kernels
from tests.nets.kernel_builds import assert_passes_on, build, need_gcc, python

ASK = """
import threading, warnings
import swatfx.kernels as kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    workers = [threading.Thread(target=kernels.available) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = kernels.available(), kernels.instruction_set()
    with kernels.reference_only():
        assert not kernels.available() and kernels.instruction_set() == "reference"
    assert found == (kernels.available(), kernels.instruction_set())
print(*found, len(caught))
for warning in caught:
    print(warning.category.__name__, warning.message)
"""
BEST = {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(cpu.get_cpu_capability(), ["generic"])
if kernels.instruction_set() == "avx512bf16":  # torch names no capability after it
    BEST = ["avx512bf16", *BEST]


def ask(value: str | None) -> list[str]:
    result = python("-c", ASK, kernels=value)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_reference() -> None:
    assert ask("reference") == ["False reference 0"]


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
def test_the_best_that_runs_here() -> None:
    assert ask(None) == ask("auto") == [f"True {BEST[0]} 0"]


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
@pytest.mark.parametrize("name", BEST)
def test_by_name(name: str) -> None:
    assert ask(name) == [f"True {name} 0"]


@pytest.mark.parametrize("value", ["nonsense", "AVX2", "", "/no/such/library.so", __file__])
def test_what_is_not_there_is_said_once(value: str) -> None:
    first, warning = ask(value)
    assert first == "False reference 1"
    assert warning.startswith("RuntimeWarning swatfx runs without its compiled kernels")
    assert warning.endswith(f"(or unset SWATFX_KERNELS={value})")


def test_nothing_is_said_until_a_kernel_is_asked_for() -> None:
    result = python("-W", "error", "-c", "import swatfx", kernels="nonsense")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("built_from", ['"of another version"', None])
def test_a_library_of_other_sources_is_not_called(
    built_from: str | None, tmp_path: pathlib.Path
) -> None:
    """As after an update that was not installed again: its structures may be others."""
    text = (
        "int unrelated;"
        if built_from is None
        else f"char *swatfx_sources() {{ return {built_from}; }}"
    )
    source, library = tmp_path / "old.c", tmp_path / "old.so"
    source.write_text(text)
    command = [need_gcc(), "-fPIC", "-shared", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    first, warning = ask(str(library))
    assert first == "False reference 1"
    assert "built from other sources: install swatfx again" in warning


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
def test_a_machine_that_can_less(tmp_path: pathlib.Path) -> None:
    """As torch itself: told to use less, it does, and so do the kernels."""
    script = "import swatfx.kernels as k; print(k.instruction_set())"
    if "avx2" in BEST:
        result = python("-c", script, kernels=None, ATEN_CPU_CAPABILITY="avx2")
        assert result.stdout.strip() == "avx2", result.stderr


TRAIN = """
import sys, torch
from tests.nets.kernel_nets import residual
from tests.nets.small_nets import batches, loss_of
import swatfx
torch.manual_seed(0)
model = residual()
gm = swatfx.compile(model, "swat-u:0.8", kernels="sparse")
optimizer = torch.optim.SGD(gm.parameters(), lr=0.05, momentum=0.9)
losses = []
for x in batches(4, 16):
    optimizer.zero_grad()
    loss = loss_of(gm(x))
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(*losses)
"""


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
@pytest.mark.parametrize("name", BEST)
def test_training_is_the_references(name: str) -> None:
    def losses(kernels: str) -> list[float]:
        result = python("-c", TRAIN, kernels=kernels)
        assert result.returncode == 0, result.stderr
        return [float(loss) for loss in result.stdout.split()]

    assert losses(name) == pytest.approx(losses("reference"), rel=1e-3)


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
@pytest.mark.parametrize("name", BEST[1:])
def test_the_lesser_library_is_the_reference(name: str) -> None:
    """What runs here by itself, the other files test."""
    assert_passes_on(name, ["tests/kernels/test_kernels_conv.py::test_kernel_equals_reference"])


@pytest.mark.slow
@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
@pytest.mark.parametrize("name", BEST[1:])
def test_all_of_the_lesser_library(name: str) -> None:
    tests = sorted(pathlib.Path(__file__).parent.glob("test_kernels_*.py"))
    heavy = ("library", "sanitizer", "training")
    assert_passes_on(name, [str(p) for p in tests if p.stem.rpartition("_")[2] not in heavy])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["-O3"], ["-O2", "-march=x86-64-v2"], ["-O0"]], ids=str)
def test_a_build_for_no_machine_in_particular(tmp_path: pathlib.Path, flags: list[str]) -> None:
    """What machines without AVX get, as far as gcc can build it here."""
    if any("x86" in flag for flag in flags) and BEST == ["generic"]:
        pytest.skip("another processor")
    library = build(tmp_path, *flags)
    tests = ["conv", "linear", "norm", "pool", "pack", "topk"]
    assert_passes_on(library, [f"tests/kernels/test_kernels_{part}.py" for part in tests])
