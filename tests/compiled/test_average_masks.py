"""Averages of models (SWA, EMA): weights are averaged, masks and all else below `swat` is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import swatfx
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.errors import InputError
from tests.nets.held_masks import POLICIES, TIMES, TOTAL
from tests.nets.small_nets import Residual, batches, sgd, train

AVERAGES: dict[str, dict[str, Any]] = {
    "swa": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.6)},
    "own": {"avg_fn": lambda mine, new, n: 0.7 * mine + 0.3 * new},
}
NAMES = ["rigl", "set", "snfs", "static", "swat-u", "swat-m", "swat-frozen"]
OTHERS = {**POLICIES, "swat-u": swatfx.swat_u(0.8, period=3)}


class Outer(nn.Module):
    """A compiled model inside of another module, with a layer of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.own = nn.Linear(10, 10)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.inner(x))


def compiled(name: str, nested: bool) -> tuple[nn.Module, nn.Module, SwatModule]:
    """(module that trains, the dense one that shares its weights, the compiled model in it)."""
    torch.manual_seed(0)
    dense: nn.Module = Residual()
    inner = swatfx.compile(dense, OTHERS[name])
    outer: nn.Module = inner
    if nested:
        outer = Outer(inner)
        head, dense = outer.own, Outer(dense)
        dense.own = head
    return outer, dense, inner


def trained(
    name: str, nested: bool, averages: Callable[[nn.Module, nn.Module], list[Callable[[], Any]]]
) -> tuple[nn.Module, SwatModule]:
    """Train, and call what `averages` of (compiled, dense) gives after every step."""
    model, dense, inner = compiled(name, nested)
    optimizer = sgd(model)
    swatfx.attach(model, optimizer, **TIMES)
    updates = averages(model, dense)
    for x in batches(TOTAL):
        train(model, optimizer, [x])
        if not nested:  # batch norm's own buffers: of the mirror, the same tensors
            dense.train()
        for update in updates:
            update()
    return model, inner


def with_source_buffers(model: nn.Module, average: nn.Module) -> nn.Module:
    """A copy of `model`, with its buffers below `swat`, and weights and norms of `average`."""
    twin = copy.deepcopy(model)
    state = dict(twin.state_dict())
    tensors = {**dict(average.named_parameters()), **dict(average.named_buffers())}
    twin.load_state_dict({n: v if ".swat." in f".{n}" else tensors[n] for n, v in state.items()})
    return twin.eval()


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("use_buffers", [False, True], ids=["weights", "buffers"])
@pytest.mark.parametrize("average", list(AVERAGES))
@pytest.mark.parametrize("name", NAMES)
def test_an_average_computes_with_the_masks_of_its_source(
    name: str, average: str, use_buffers: bool, nested: bool
) -> None:
    made: list[AveragedModel] = []

    def averages(model: nn.Module, dense: nn.Module) -> list[Callable[[], Any]]:
        pairs = [(model, AveragedModel(model, use_buffers=use_buffers, **AVERAGES[average]))]
        pairs += [(dense, AveragedModel(dense, use_buffers=use_buffers, **AVERAGES[average]))]
        made.extend(twin for _, twin in pairs)
        return [lambda m=m, a=a: a.update_parameters(m) for m, a in pairs]

    model, inner = trained(name, nested, averages)
    mine, plain = made
    mine.eval()
    expected = with_source_buffers(model, plain.module)
    x = batches(1, seed=7)[0]
    with torch.no_grad():
        assert torch.equal(mine(x), expected(x))
        model.eval()
        assert not torch.equal(mine(x), model(x))  # it is an average
    own = [m for m in mine.modules() if isinstance(m, SwatModule)][0]
    buffers = dict(inner.swat.named_buffers())
    for key, buffer in own.swat.named_buffers():
        assert torch.equal(buffer, buffers[key]), key
    masks = {layer.plan.weight: layer.keep() for layer in sparse_layers(inner)}
    state = swatfx.dense_state_dict(mine.module)
    reference = dict(plain.module.named_parameters())
    for key, mask in masks.items():
        weight = reference[f"inner.{key}" if nested else key]
        held = name not in ("swat-u", "swat-m")
        wanted = weight * mask if held else weight
        assert torch.equal(state[f"inner.{key}" if nested else key], wanted), key


def test_norms_are_measured_with_the_average_and_no_optimizer() -> None:
    made: list[AveragedModel] = []

    def averages(model: nn.Module, dense: nn.Module) -> list[Callable[[], Any]]:
        made.append(AveragedModel(model))
        return [lambda: made[0].update_parameters(model)]

    model, _ = trained("rigl", False, averages)
    data = batches(3)
    update_bn(data, made[0])
    twin = with_source_buffers(model, made[0].module)
    swatfx.attach(twin, sgd(twin), **TIMES)  # type: ignore[arg-type]
    update_bn(data, twin)
    for (key, a), b in zip(made[0].module.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), key
    assert not torch.equal(made[0].module.get_buffer("bn.running_mean"), torch.zeros(8))


def test_copies_of_averages_wrapped_sources_and_others_by_name() -> None:
    model, _, _ = compiled("rigl", False)
    optimizer = sgd(model)
    swatfx.attach(model, optimizer, **TIMES)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    twin = copy.deepcopy(average)
    wrapped = torch.compile(model, backend="eager")
    for x in batches(4):
        train(model, optimizer, [x])
        average.update_parameters(model)
        twin.update_parameters(wrapped)
    for (key, a), b in zip(average.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    before = {key: value.clone() for key, value in average.state_dict().items()}
    for other in (swatfx.compile(Residual(), "swat-u:0.8"), Residual()):
        with pytest.raises(InputError, match=r"average is of another compiled model.*made of"):
            average.update_parameters(other)
    assert all(torch.equal(value, before[key]) for key, value in average.state_dict().items())


class Ema(nn.Module):
    """A copy whose every tensor follows the model's, floats or not, as timm's second EMA does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> str:
        pairs = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        for mine, new in pairs:
            mine.copy_(0.6 * mine + 0.4 * new)
        return "done"


def timm_emas(model: nn.Module) -> dict[str, nn.Module]:
    timm = pytest.importorskip("timm.utils.model_ema")
    return {
        "v2": timm.ModelEmaV2(model, decay=0.6),
        "v3": timm.ModelEmaV3(model, decay=0.6),
        "v3 weights": timm.ModelEmaV3(model, decay=0.6, exclude_buffers=True),
    }


@pytest.mark.parametrize("kind", ["own", "v2", "v3", "v3 weights"])
@pytest.mark.parametrize("name", ["rigl", "set", "swat-u"])
def test_averages_of_others(name: str, kind: str) -> None:
    model, dense, inner = compiled(name, False)
    optimizer = sgd(model)
    swatfx.attach(model, optimizer, **TIMES)
    ema, plain = ((Ema(m) if kind == "own" else timm_emas(m)[kind]) for m in (model, dense))
    for x in batches(TOTAL):
        train(model, optimizer, [x])
        assert ema.update(model) == plain.update(dense)
    module = ema.get_submodule("module").eval()
    expected = with_source_buffers(model, plain.get_submodule("module"))
    x = batches(1, seed=7)[0]
    with torch.no_grad():
        assert torch.equal(module(x), expected(x))
    for key, buffer in module.get_submodule("swat").named_buffers():
        assert torch.equal(buffer, inner.swat.get_buffer(key)), key


def test_what_is_no_copy_is_left_alone() -> None:
    model, _, _ = compiled("static", False)

    class Student(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def update(self, teacher: nn.Module) -> None:
            """Looks at the teacher."""

    torch.manual_seed(1)
    teacher = swatfx.compile(Residual(), OTHERS["set"])
    student = Student(copy.deepcopy(model))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    student.update(teacher)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
