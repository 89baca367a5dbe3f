"""Learned thresholds outside the graph: optimizers, checkpoints, reports, exports."""

from __future__ import annotations

import pathlib

import pytest
import torch
from torch import nn

import swatfx
from swatfx.compiled.learned import add_parameters, learned_thresholds, parameters_to_add
from swatfx.errors import AttachError
from swatfx.exporting.plain import inference_module
from tests.nets.learned_nets import POLICY, compiled, densities, fit, mean_threshold, moved
from tests.nets.small_nets import Residual, assert_same, batches, plain, sgd, snapshot

# ---- Optimizers and checkpoints ------------------------------------------------------------------


def test_an_optimizer_made_before_compile_gets_a_group() -> None:
    torch.manual_seed(0)
    model = plain()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("weight")]
    groups = [{"params": weights, "lr": 0.3, "weight_decay": 0.1}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    gm = swatfx.compile(model, POLICY)
    missing = parameters_to_add(gm, optimizer)
    assert [id(p) for p in missing] == [id(m.threshold) for m in learned_thresholds(gm)]
    add_parameters(gm, optimizer)
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 3, 3]
    added = optimizer.param_groups[-1]
    assert (added["lr"], added["momentum"], added["weight_decay"]) == (0.3, 0.9, 0.0)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert not parameters_to_add(gm, optimizer)
    add_parameters(gm, optimizer)
    assert len(optimizer.param_groups) == 3
    fit(gm, optimizer, batches(1))
    assert mean_threshold(gm) > 0


def test_an_optimizer_made_after_compile_has_them() -> None:
    gm = compiled()
    optimizer = torch.optim.AdamW(gm.parameters())
    assert parameters_to_add(gm, optimizer) == []
    add_parameters(gm, optimizer)
    assert [len(g["params"]) for g in optimizer.param_groups] == [9]


def test_schedulers_come_later() -> None:
    model = plain()
    optimizer = sgd(model, lr=torch.tensor(0.1))
    gm = swatfx.compile(model, POLICY)
    other = sgd(model)
    torch.optim.lr_scheduler.StepLR(other, 1)
    with pytest.raises(AttachError, match="before the learning-rate scheduler"):
        add_parameters(gm, other)
    assert len(other.param_groups) == 1
    add_parameters(gm, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("made", ["before", "after"])
def test_resume_is_bit_for_bit(kind: str, made: str, tmp_path: pathlib.Path) -> None:
    def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
        if kind == "sgd":
            return sgd(module, weight_decay=1e-3)
        return torch.optim.AdamW(module.parameters(), lr=1e-2)

    torch.manual_seed(0)
    model = Residual(dropout=0.2)
    optimizer = optimizer_of(model)
    gm = swatfx.compile(model, POLICY)
    if made == "after":
        optimizer = optimizer_of(gm)
    add_parameters(gm, optimizer)
    fit(gm, optimizer, batches(3))
    path = tmp_path / "a.ckpt"
    swatfx.save(gm, path, optimizer=optimizer)
    state = torch.get_rng_state()
    losses = fit(gm, optimizer, batches(3, seed=1))

    torch.manual_seed(5)
    fresh = Residual(dropout=0.2)
    second = optimizer_of(fresh)
    resumed = swatfx.load(path, fresh)
    saved = torch.load(path, weights_only=True)["optimizer"]
    add_parameters(resumed, second, [len(g["params"]) for g in saved["param_groups"]])
    second.load_state_dict(saved)
    torch.set_rng_state(state)
    assert fit(resumed, second, batches(3, seed=1)) == losses
    assert_same(snapshot(resumed), snapshot(gm))
    assert max(densities(gm)) < 1


def test_a_checkpoint_without_thresholds_adds_none() -> None:
    model = plain()
    optimizer = sgd(model)
    gm = swatfx.compile(model, POLICY)
    for sizes in ([6], [6, 4], [7]):
        add_parameters(gm, optimizer, sizes)
        assert [len(g["params"]) for g in optimizer.param_groups] == [6]


# ---- Reports and exports -------------------------------------------------------------------------


def test_report_counts_what_is_kept_now() -> None:
    gm = moved()
    x = batches(1)[0]
    result = swatfx.report(gm, (x,))
    planned = swatfx.report(gm, (torch.empty(4, 3, 8, 8, device="meta"),))
    assert result.totals["saved_bytes"] == planned.totals["saved_bytes"]
    for record, density in zip(result.layers, densities(gm), strict=True):
        assert record.weight_density == record.realised_weight_density == density
        share = record.sparse_forward_macs / record.dense_forward_macs
        assert share == pytest.approx(density, abs=0.01)
        assert record.weight_selector == "learned"


def test_inference_module_is_plain() -> None:
    gm = moved(Residual).eval()
    x = batches(1)[0]
    plain_module = inference_module(gm)
    assert torch.equal(plain_module(x), gm(x))
    assert not [n for n, _ in plain_module.named_parameters() if n.startswith("swat.")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_pt2(tmp_path: pathlib.Path) -> None:
    gm = moved()
    x = batches(1)[0]
    swatfx.export(gm, tmp_path / "a.pt2", (x,))
    program = torch.export.load(tmp_path / "a.pt2")
    torch.testing.assert_close(program.module()(x), gm.eval()(x))
    shapes = [tuple(v.shape) for v in program.state_dict.values()]
    assert (8, 1, 1, 1) not in shapes


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_training_graph_exports(tmp_path: pathlib.Path) -> None:
    gm = moved()
    x = batches(1)[0]
    swatfx.export(gm, tmp_path / "a.pt2", (x,), training=True)
    program = torch.export.load(tmp_path / "a.pt2")
    assert torch.equal(program.module()(x), gm(x))


def test_safetensors(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("safetensors")
    gm = moved()
    x = batches(1)[0]
    swatfx.export(gm, tmp_path / "a.safetensors")
    model = plain()
    model.load_state_dict(swatfx.load_sparse(tmp_path / "a.safetensors"), strict=True)
    assert torch.equal(model.eval()(x), gm.eval()(x))
