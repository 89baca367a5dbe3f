"""Which layers run sparse kernels, why the others do not, and where that can be seen."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import swatfx
from passes.choose_kernels import LEAST_FILTERS, MOST_DENSE
from swatfx import kernels
from swatfx.compiled.module import SwatModule
from swatfx.policy import Policy
from tests.nets.kernel_nets import (
    Dilated,
    Functional,
    Islands,
    OneDimensional,
    Separable,
    ThreeDimensional,
    assert_equal_training,
    block,
    chain,
    chosen,
    conversions,
    pair,
    parametrized,
    residual,
)
from tests.nets.places import ROOT
from tests.nets.small_nets import Residual, batches, loss_of, plain, sgd, snapshot

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
SPARSE = "sparse"


def choices(
    build: Callable[[], nn.Module], policy: str | Policy = "swat-u:0.8", kernels: str = "auto"
) -> dict[str, str]:
    return chosen(swatfx.compile(build(), policy, kernels=kernels))


def test_a_chain_of_convolutions_runs_sparse() -> None:
    """The first takes no part; 10 filters are too few for a linear layer."""
    found = choices(chain)
    assert found == {
        "1.0": SPARSE,
        "3.0": SPARSE,
        "4": SPARSE,
        "8": "dense: too few outputs (10)",
    }


def test_layers_that_share_an_input_run_alike() -> None:
    assert set(choices(residual).values()) == {SPARSE, "dense: too few outputs (10)"}
    net = nn.Sequential(block(3, 16), _Fork(), nn.Conv2d(32, 16, 1))
    assert choices(lambda: net, "swat-u:0.8") == {
        "1.wide": "dense: shares its input with 1.narrow, which is",
        "1.narrow": "dense: too few filters (8)",
        "1.apart": SPARSE,
        "2": SPARSE,
    }


class _Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(16, 24, 1)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.apart = nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.apart(torch.cat([self.wide(x), self.narrow(x)], 1))


def test_groups_are_counted_one_by_one() -> None:
    found = choices(Separable)
    assert set(found.values()) == {SPARSE, "dense: too few outputs (10)"}
    assert found["depthwise.0"] == SPARSE  # one filter a group, and it is the only one
    few = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, groups=16))
    assert choices(lambda: few) == {"1": "dense: too few filters a group (2)"}
    assert choices(lambda: few, kernels="sparse") == {"1": SPARSE}


def test_what_no_sparse_kernel_can_run() -> None:
    found = choices(Dilated, kernels="sparse")
    assert found == {
        "dilated.0": SPARSE,
        "reflect": "dense: reflect padding",
        "uneven": SPARSE,
        "same": "dense: uneven padding",
    }
    assert choices(ThreeDimensional) == {"b": "dense: 3d convolution"}
    assert choices(OneDimensional) == {"b": SPARSE, "c": SPARSE}
    large = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 17), nn.Conv2d(16, 16, (1, 65)))
    assert set(choices(lambda: large, kernels="sparse").values()) == {"dense: kernel too large"}
    strided = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1, stride=17))
    assert choices(lambda: strided, kernels="sparse") == {"1": "dense: stride too large"}


def test_densities_decide() -> None:
    assert set(choices(chain, "swat-u:0.69").values()) == {
        f"dense: weight density 0.31 is above {MOST_DENSE}"
    }
    assert choices(chain, "swat-u:0.7")["1.0"] == SPARSE
    assert choices(chain, "swat-u:0.9,activation_sparsity=0.5")["1.0"] == (
        f"dense: activation density 0.5 is above {MOST_DENSE}"
    )
    assert choices(chain, "swat-u:0.5", kernels="sparse")["1.0"] == SPARSE


def test_methods_that_are_not_sparse_in_every_product_run_dense() -> None:
    only_forward = Policy("only-forward", 0.9, backward_weight=False, first_dense=True)
    held = {"hold_from_epoch": 0}
    for policy, reason in (
        ("saw:0.9", "SAW runs forward on dense weights"),
        ("meprop:0.9", "meProp runs forward on dense weights"),
        (only_forward, "only-forward takes input gradients from dense weights"),
        ("snfs:0.9", "masks of SNFS need dense weight gradients"),
        ("dst", "DST leaves activations dense, and so weight gradients"),
        ("swat-u:0.9,backward_activation=False", "swat-u leaves activations dense, and so weight"),
        (swatfx.per_layer({"*": "snfs:0.9"}, default="swat-u:0.9"), "masks of SNFS need dense"),
        (Policy("mine", 0.9, backward_activation=False, **held), "mine leaves activations dense"),
    ):
        found = choices(chain, policy, kernels="sparse")
        assert all(kind.startswith(f"dense: {reason}") for kind in found.values()), (policy, found)
    active = Policy("mine", 0.9, backward_activation=False, update="active", **held)
    for policy in (
        "swat-u:0.9,forward_activation=True",
        "swat-u:0.9,gradient_sparsity=0.5",
        *("rigl:0.9", "set:0.9", "static:0.9", "dsr:0.9", active),
    ):
        assert choices(chain, policy)["1.0"] == SPARSE


def test_a_mixture_of_densities() -> None:
    """ERK keeps small layers dense and large ones sparse; so do rules for each layer."""
    found = choices(residual, "swat-erk:0.8")
    gm = swatfx.compile(residual(), "swat-erk:0.8")
    plans = {layer.plan.name: layer.plan for layer in swatfx.compiled.layers.sparse_layers(gm)}
    sparse = {name for name, kind in found.items() if kind == SPARSE}
    assert sparse and sparse < set(found)
    for name, kind in found.items():
        density = plans[name].weight_density.value
        assert (density <= MOST_DENSE) or kind.startswith("dense"), (name, density, kind)
    rules = swatfx.per_layer({"1.0": "swat-u:0.9"}, default="swat-u:0.5")
    assert choices(chain, rules) == {
        "1.0": "dense: most convolutions run dense",
        "3.0": f"dense: weight density 0.5 is above {MOST_DENSE}",
        "4": f"dense: weight density 0.5 is above {MOST_DENSE}",
        "8": f"dense: weight density 0.5 is above {MOST_DENSE}",
    }


def test_half_of_the_convolutions_are_enough() -> None:
    net = nn.Sequential(block(3, 16), block(16, 16), block(16, LEAST_FILTERS - 1))
    assert list(choices(lambda: net).values()) == [SPARSE, "dense: too few filters (15)"]
    net.append(block(LEAST_FILTERS - 1, 8))
    found = choices(lambda: net)
    assert found["1.0"] == "dense: most convolutions run dense"
    assert choices(lambda: net, kernels="sparse")["3.0"] == SPARSE


def test_dense_is_dense() -> None:
    gm = swatfx.compile(chain(), "swat-u:0.9", kernels="dense")
    assert set(chosen(gm).values()) == {"dense: asked for"}
    assert "layout" not in gm.code and not conversions(gm)


def test_weights_from_elsewhere() -> None:
    assert set(choices(Functional).values()) == {SPARSE}
    assert set(choices(parametrized).values()) == {SPARSE}
    assert set(choices(Islands).values()) == {SPARSE}


@pytest.mark.parametrize("build", [chain, Functional, parametrized])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_dense(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    found = choices(lambda: build().to(dtype))
    why = f"dense: weights are {name}, sparse kernels float32 and bfloat16"
    assert set(found.values()) == {why}


@pytest.mark.parametrize("build", [chain, Functional, parametrized])
def test_bfloat16_runs_sparse(build: Callable[[], nn.Module]) -> None:
    assert SPARSE in choices(lambda: build().bfloat16()).values()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_converted_later_still_runs(dtype: torch.dtype) -> None:
    sparse, dense = (gm.to(dtype) for gm in pair(residual))
    x = batches(1, 16)[0].to(dtype)
    one, other = sparse(x), dense(x)
    assert one.dtype == dtype
    tolerance = 1e-9 if dtype is torch.float64 else 0.1
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    loss_of(one).backward()


@pytest.mark.parametrize("build", [chain, residual, Separable, Functional, OneDimensional])
def test_a_model_on_meta_is_told_as_on_this_cpu(build: Callable[[], nn.Module]) -> None:
    """Its shapes are known, its device is not: kernels are those of the CPU, for whoever loads."""
    with torch.device("meta"):
        model = build()
    assert choices(lambda: model) == choices(build)
    images = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    x = torch.empty(16, 3, *((8, 8) if images else (8,)), device="meta")
    one = swatfx.report(swatfx.compile(model, "swat-u:0.8"), x)
    other = swatfx.report(swatfx.compile(build(), "swat-u:0.8"), x)
    assert one.totals == other.totals and one.others == other.others
    assert [layer.kernels for layer in one.layers] == [layer.kernels for layer in other.layers]


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), "mps"])
@pytest.mark.parametrize("meta", [False, True])
def test_report_for_another_device(device: str | torch.device, meta: bool) -> None:
    """Nothing of the model changes, and there need be no such device here."""
    with torch.device("meta" if meta else "cpu"):
        model = chain()
    gm = swatfx.compile(model, "swat-u:0.8")
    before = chosen(gm)
    x = torch.empty(16, 3, 8, 8, device="meta")
    there = [layer.kernels for layer in swatfx.report(gm, x, device=device).layers]
    kind = torch.device(device).type
    assert there == ["", *[f"dense: GPUs run reference kernels ({kind})"] * 4]
    here = [layer.kernels for layer in swatfx.report(gm, x, device="cpu").layers]
    assert here == [layer.kernels for layer in swatfx.report(gm, x).layers]
    assert chosen(gm) == before and set(before.values()) == {SPARSE, "dense: too few outputs (10)"}


def test_report_for_no_device() -> None:
    gm = swatfx.compile(chain(), "swat-u:0.8")
    with pytest.raises(swatfx.errors.InputError, match="unknown device"):
        swatfx.report(gm, torch.empty(16, 3, 8, 8, device="meta"), device="gpu7")


def test_passes_tell_why() -> None:
    gm = swatfx.compile(Separable(), "swat-u:0.8")
    notes = next(r.notes for r in gm.__dict__["pass_records"] if r.name == "choose_kernels")
    assert any(note.startswith("dense: too few outputs") for note in notes), notes


def test_choosing_leaves_spectral_norm_alone() -> None:
    """Looking at a computed weight in training would move its power iteration on."""
    model = parametrized()
    before = snapshot(model)
    swatfx.compile(model, "swat-u:0.8")
    assert all(torch.equal(before[name], value) for name, value in snapshot(model).items())


def test_densities_that_move() -> None:
    """SWAT-M's densities wander; the choice stays, and so do the values."""
    gms = pair(residual, "swat-m:0.8,redistribute_every=1", kernels="auto")
    assert SPARSE in chosen(gms[0]).values()
    losses = []
    for gm in gms:
        optimizer = sgd(gm)
        swatfx.attach(gm, optimizer)
        for x in batches(3, 16):
            optimizer.zero_grad()
            loss = loss_of(gm(x))
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    densities = {
        layer.weight_density.value for layer in swatfx.compiled.layers.sparse_layers(gms[0])
    }
    assert len(densities) > 2
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_unknown_kernels() -> None:
    with pytest.raises(swatfx.errors.InputError, match="'auto', 'sparse' or 'dense'"):
        swatfx.compile(chain(), "swat-u:0.9", kernels="fast")


def test_report_tells() -> None:
    report = swatfx.report(swatfx.compile(chain(), "swat-u:0.8"), batches(1)[0])
    assert [layer.kernels for layer in report.layers] == [
        "",  # the first layer takes no part
        *[SPARSE] * 3,
        "dense: too few outputs (10)",
    ]
    for text in (report.to_text(), report.to_markdown()):
        assert "kernels" in text and "too few outputs (10)" in text
    assert report.to_csv().splitlines()[0].endswith(",kernels")
    assert json.loads(report.to_json())["layers"][1]["kernels"] == SPARSE


def test_report_counts_alike_with_either() -> None:
    for build in (chain, residual, Separable):
        sparse, dense = pair(build)
        for inputs in (batches(1, 16)[0], torch.empty(16, 3, 8, 8, device="meta")):
            one, other = (swatfx.report(gm, inputs) for gm in (sparse, dense))
            for a, b in zip(one.layers, other.layers, strict=True):
                assert a.dense_saved_bytes == b.dense_saved_bytes, a.name
                assert a.sparse_forward_macs == b.sparse_forward_macs, a.name
                assert a.input_shape == b.input_shape, a.name
            assert one.totals["dense_saved_bytes"] == other.totals["dense_saved_bytes"]


def test_realised_density_is_read_in_the_order_of_the_layout() -> None:
    """Masks of stored activations, which simulated accelerators run on."""
    from passes.trace_shapes import observe_run

    sparse, dense = pair(residual)
    x = batches(1, 16)[0]
    masks = []
    for gm in (sparse, dense):
        run = observe_run(gm, (x,), as_dense=False)
        masks.append([seen.keep for nodes in run.nodes.values() for seen in nodes])
    kept = [(a, b) for a, b in zip(*map(_present, masks), strict=True)]
    assert len(kept) == 7 and all((a == b).double().mean() > 0.999 for a, b in kept)


def _present(masks: list[Tensor | None]) -> list[Tensor]:
    return [mask for mask in masks if mask is not None]


# ---- Checkpoints and exports ----


def _trained() -> tuple[nn.Module, SwatModule, torch.optim.SGD]:
    torch.manual_seed(0)
    model = residual()
    gm = swatfx.compile(model, "swat-u:0.8,period=2", kernels="sparse")
    optimizer = sgd(gm)
    for x in batches(3, 16):
        optimizer.zero_grad()
        loss_of(gm(x)).backward()
        optimizer.step()
    return model, gm, optimizer


def test_checkpoint_round_trip(tmp_path: pathlib.Path) -> None:
    _, gm, optimizer = _trained()
    swatfx.save(gm, tmp_path / "a.ckpt", optimizer=optimizer)
    model = residual()
    twin = swatfx.load(tmp_path / "a.ckpt", model)
    assert chosen(twin) == chosen(gm) and twin.code == gm.code
    x = batches(1, 16, seed=3)[0]
    assert torch.equal(twin(x), gm(x))


def test_loading_where_no_kernels_are(tmp_path: pathlib.Path) -> None:
    """Here inside `reference_only`, and in a process of its own; either way values stay."""
    _, gm, _ = _trained()
    swatfx.save(gm, tmp_path / "a.ckpt")
    with kernels.reference_only():
        twin = swatfx.load(tmp_path / "a.ckpt", residual())
    assert set(chosen(twin).values()) == {"dense: no compiled kernels"}
    assert list(twin.state_dict()) == list(gm.state_dict())
    x = batches(1, 16, seed=3)[0]
    torch.save(x, tmp_path / "x.pt")
    script = """
import sys, torch, swatfx
from tests.nets.kernel_nets import chosen, residual
gm = swatfx.load(sys.argv[1] + "/a.ckpt", residual())
assert set(chosen(gm).values()) == {"dense: no compiled kernels"}, chosen(gm)
y = gm(torch.load(sys.argv[1] + "/x.pt"))
y.sum().backward()
torch.save(y.detach(), sys.argv[1] + "/y.pt")
swatfx.save(gm, sys.argv[1] + "/b.ckpt")
"""
    _run(script, str(tmp_path), SWATFX_KERNELS="reference")
    expected = gm(x)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-4)
    back = swatfx.load(tmp_path / "b.ckpt", residual())
    assert chosen(back) == chosen(gm)


def _run(script: str, *args: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_compiled_for_sparse_kernels_and_run_without() -> None:
    sparse, dense = pair(residual)
    with kernels.reference_only():
        assert_equal_training(sparse, dense, batches(2, 16))


@pytest.mark.parametrize("build", [Residual, residual, Separable])
def test_exported_inference_needs_no_layout(
    build: Callable[[], nn.Module], tmp_path: pathlib.Path
) -> None:
    gm = swatfx.compile(build(), "swat-u:0.8", kernels="sparse")
    x = batches(1, 16)[0]
    for y in batches(2, 16, seed=5):
        gm(y)
    swatfx.export(gm, tmp_path / "a.pt2", x)
    program = torch.export.load(tmp_path / "a.pt2")
    assert not any("swatfx" in str(node.target) for node in program.graph.nodes)
    swatfx.refresh(gm)
    with torch.no_grad():
        for size in (1, 16, 5):
            data = batches(1, size, seed=7)[0]
            torch.testing.assert_close(
                program.module()(data), gm.eval()(data), rtol=1e-4, atol=1e-5
            )


def test_exported_training_graph(tmp_path: pathlib.Path) -> None:
    gm = swatfx.compile(residual(), "swat-u:0.8", kernels="sparse")
    twin = copy.deepcopy(gm)
    x = batches(1, 16)[0]
    swatfx.export(gm, tmp_path / "a.pt2", x, training=True)
    program = torch.export.load(tmp_path / "a.pt2")
    module = program.module()
    for data in (x, batches(1, 7)[0]):
        torch.testing.assert_close(module(data), twin(data), rtol=1e-4, atol=1e-5)


def test_small_networks_stay_dense() -> None:
    """Eight filters: what most small tests compile."""
    found = choices(lambda: plain())
    assert all(kind.startswith("dense: ") for kind in found.values()) and found


class Moded(nn.Module):
    """Python decides by mode: several graphs, and parts below, call the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        self.last = nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(x)) if self.training else self.last(self.block(x)) * 1


def test_the_note_counts_layers_not_calls() -> None:
    gm = swatfx.compile(Moded(), "swat-u:0.9,first_dense=False")
    notes = [note for record in gm.pass_records for note in record.notes]
    assert "3 of 3 layers run sparse kernels" in notes
