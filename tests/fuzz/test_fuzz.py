"""The fuzzer: a slice of what it draws holds, what is wrong is seen and made small."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from passes.reading.aliasing import Versions
from swatfx import kernels
from tests.fuzz.building import product
from tests.fuzz.cases import LayerCase, random_layer
from tests.fuzz.checking import check_layer
from tests.fuzz.kinds import KINDS
from tests.fuzz.methods import Method, count, spread
from tests.fuzz.networks import random_network
from tests.fuzz.plain import threshold
from tests.fuzz.programs import ProgramCase, check_program
from tests.fuzz.running import Worker
from tests.fuzz.shrinking import shrink, symptom
from tests.fuzz.tensors import ORDERS, draw, seen, stored_shape
from tests.nets.kernel_builds import build
from tests.nets.places import ROOT

CONV = LayerCase(
    kind="conv1d", batch=16, inputs=8, outputs=8, size=(9,), kernel=(3,), stride=(1,),
    padding=(1,), dilation=(1,), kernels="sparse", grid=True,
)  # fmt: skip


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_slice_of_layers_and_networks_holds(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "found.json"
    amount = ("--layers", "100", "--networks", "14", "--programs", "40")
    result = fuzz(*amount, "--seed", "1", "--json", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = json.loads(file.read_text())
    assert [found[kind] for kind in ("layers", "networks", "programs")] == [100, 14, 40]
    assert found["failures"] == []


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["auto", "avx2", "generic", "reference"])
def test_many_layers_and_networks_hold(isa: str) -> None:
    amount = ("--layers", "1500", "--networks", "150", "--programs", "300")
    result = fuzz(*amount, "--seed", "2", "--isa", isa)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_layers_under_sanitizers() -> None:
    result = fuzz("--layers", "400", "--networks", "40", "--seed", "3", "--sanitize")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_case_depends_on_its_number_alone_and_survives_json(kind: str) -> None:
    for number in range(60):
        case = KINDS[kind].draw(5, number)
        assert case == KINDS[kind].draw(5, number)
        assert KINDS[kind].read(json.loads(json.dumps(case.to_json()))) == case
    assert KINDS[kind].draw(5, 0) != KINDS[kind].draw(6, 0)


def test_every_kind_of_case_is_drawn() -> None:
    layers = [random_layer(0, i) for i in range(2000)]
    assert {c.kind for c in layers} == {"linear", "conv1d", "conv2d", "conv3d"}
    assert {c.order for c in layers} == set(ORDERS)
    assert {None, 0, 1, 15, 16, 17, 31, 32, 33} <= {c.batch for c in layers}
    assert {c.method.name for c in layers} >= {"swat-u", "saw", "meprop", "dst", "static"}
    assert {c.pad_mode for c in layers} == {"zeros", "reflect", "circular", "replicate"}
    assert any(c.transposed for c in layers) and any(c.groups == c.inputs > 1 for c in layers)
    names = {op.name for i in range(300) for op in random_network(0, i).ops}
    assert {"attention", "checkpoint", "checkpoint_reentrant", "eager", "upconv", "cat"} <= names


def test_a_wrong_gradient_is_seen_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight gradient in a thousand off by one is enough."""
    module = sys.modules["swatfx.ops.conv"]
    real = module._unpacked

    def off(*args: object, **kwargs: object) -> torch.Tensor:
        x = real(*args, **kwargs).clone()
        x[(0,) * x.dim()].add_(1)
        return x

    assert check_layer(replace(CONV, kernels="dense")) == []
    monkeypatch.setattr(module, "_unpacked", off)
    case = replace(CONV, kernels="dense", order="permuted", stem=True, threads=2)
    problems = check_layer(case)
    assert any("gradient of layer.weight off" in problem for problem in problems)
    small = shrink(case, symptom(problems), KINDS["layer"].smaller, check_layer)
    assert check_layer(small) and small.batch == 1 and small.inputs == small.outputs == 1
    assert (small.order, small.stem, small.threads) == ("contiguous", False, 1)


def test_a_lost_write_is_seen_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels.available():
        pytest.skip("no compiled kernels")
    lines = ("v1 = n.same(v0)", "v2 = n.norm(v1)", "z = v0.flatten(1); z += 0.25", "v4 = v1 * 1")
    case = ProgramCase(lines=(*lines, "v5 = n.thin(v1)"), results=("v5", "v2"), training=False)
    assert check_program(case) == []
    monkeypatch.setattr(Versions, "is_contested", lambda self, tensor: False)
    said = symptom(check_program(case))
    assert said
    small = shrink(case, said, KINDS["program"].smaller, check_program)
    assert len(small.lines) == 3 and small.results == ("v5",)


def test_an_input_that_eager_refuses_is_no_failure() -> None:
    assert check_layer(replace(CONV, size=(1,), padding=(0,))) == []
    assert check_layer(replace(CONV, misfit=1)) == []


def test_a_case_that_kills_its_process_is_a_failure(tmp_path: pathlib.Path) -> None:
    deadly = tmp_path / "deadly.c"
    exported = '__attribute__((visibility("default")))'
    body = "int sparse_conv(void) { abort(); }"
    text = f"#include <stdlib.h>\n#undef sparse_conv\n{exported} {body}\n"
    deadly.write_text(text)
    library = build(tmp_path, "-O0", "-Dsparse_conv=sparse_conv_that_works", str(deadly))
    worker = Worker({"SWATFX_KERNELS": str(library)})
    try:
        for _ in range(2):  # another process takes the dead one's place
            assert symptom(worker.check("layer", CONV)) == "died"
            assert worker.check("layer", replace(CONV, kernels="dense")) == []
    finally:
        worker.close()


def test_thresholds_and_counts_by_hand() -> None:
    x = torch.tensor([3.0, -1.0, 2.0, -5.0]).double()
    assert threshold(x.abs(), Method(sparsity=0.5).rules([(4,)], None)[0].weight_density) == 3
    assert [count(spread([(10, 100)], 0.95, False)[0], n) for n in (1000, 1, 0)] == [50, 1, 0]
    assert spread([(2, 2), (100, 100)], 0.9, True)[0] == 1.0


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_views_of_the_shape(order: str) -> None:
    shape = (3, 4, 5, 6)
    stored = draw(stored_shape(shape, order, 1), 0, True, torch.float32)
    view = seen(stored, shape, order, 1)
    assert view.shape == shape and view.data_ptr() >= stored.data_ptr()
    assert view.is_contiguous() == (order == "contiguous")


def test_the_oracles_product_is_torchs() -> None:
    for mode, padding in (("zeros", 2), ("reflect", 1), ("circular", "same"), ("zeros", "same")):
        layer = torch.nn.Conv1d(3, 4, 4, 1, padding, 2, bias=False, padding_mode=mode).double()
        op, _ = product(layer)
        x = torch.randn(2, 3, 11).double()
        torch.testing.assert_close(op(x, layer.weight), layer(x))


def test_inputs_of_one_long_strided_dimension_are_told_apart() -> None:
    case = replace(CONV, batch=None, inputs=1, outputs=1, size=(2,), order="sliced")
    assert check_layer(case) == []
