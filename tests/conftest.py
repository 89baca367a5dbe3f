"""Fixtures that several files share; what one file alone needs stays in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from swatfx import kernels
from swatfx.kernels import library
from swatfx.runs.run import train_run
from tests.nets.kernel_nets import forbid_references


@pytest.fixture
def reference_kernels() -> Iterator[None]:
    """Plain PyTorch alone: the references define the ops, and compiled kernels round otherwise."""
    with kernels.reference_only():
        yield


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    """Undo what a test does to the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before a test, and nothing of it left behind."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def spare_time(threads_as_before: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where figures do not matter: spare the time that threads and a large heap would take."""
    torch.set_num_threads(1)
    monkeypatch.setattr("gc.collect", lambda *args: 0)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the policies that benchmarks.reproduce trains into a folder, one a run."""
    names: list[str] = []

    def run(config: Any) -> Any:
        if config.output_dir is not None:
            names.append(f"{config.policy.name} {config.seed}")
        return train_run(config)

    monkeypatch.setattr("benchmarks.reproduce.running.train_run", run)
    return names


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` fails at the first call, as where there is no C++ compiler."""

    def broken(*args: Any, **options: Any) -> Any:
        def call(*inputs: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)


@pytest.fixture
def no_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reference of a layer may run: it shares no code with what is asked for."""
    if not library.available():
        pytest.skip("no compiled kernels")

    forbid_references(monkeypatch)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def each_number_of_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once with one thread, once with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
