"""What a forward changes beside its result stays Python's: the module that does it stays eager."""

import copy
import itertools
import random
from collections import defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import swatfx
from tests.nets.compare import DENSITY_1

torch.set_num_threads(1)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
COUNT = 0
LOG: list[int] = []


class Meter:
    def __init__(self) -> None:
        self.count = 0

    def update(self) -> int:
        self.count += 1
        return self.count


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Base(nn.Module):
    """Two layers; a subclass changes something between them."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("shift", torch.zeros(4))
        self.nested: dict[str, Any] = {"n": {"calls": 0, "list": [[]]}}
        self.queue: deque[int] = deque(maxlen=3)
        self.seen: set[int] = set()
        self.sums: defaultdict[str, int] = defaultdict(int)
        self.meter, self.slotted = Meter(), Slotted()
        self.array = np.zeros(2)
        self.counter = itertools.count(1)
        self.rng, self.generator = random.Random(0), torch.Generator().manual_seed(0)
        self.np_rng = np.random.default_rng(0)
        self.plain = torch.zeros(())
        self.free = [torch.ones(4, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        factor = self.change(x)
        return self.b(x) * (1 if factor is None else factor)

    def change(self, x: Tensor) -> Any:
        raise NotImplementedError


class SetsData(Base):
    def change(self, x: Tensor) -> Any:
        self.b.weight.data = self.b.weight.data.clamp(-0.01, 0.01)


class SetsDataByName(Base):
    def change(self, x: Tensor) -> Any:
        setattr(self.b.weight, "data", self.b.weight.data * 0.5)  # noqa: B010


class SetsDataOfInput(Base):
    def change(self, x: Tensor) -> Any:
        x.data = x.data * 2


class SetsDataOfAttribute(Base):
    def change(self, x: Tensor) -> Any:
        x.data.data = x.data * 2


class SetsBufferData(Base):
    def change(self, x: Tensor) -> Any:
        self.shift.data = self.shift + 1  # type: ignore[has-type]
        return self.shift


class SetsRequiresGrad(Base):
    def change(self, x: Tensor) -> Any:
        self.b.weight.requires_grad = False


class SetsGrad(Base):
    def change(self, x: Tensor) -> Any:
        self.b.bias.grad = None


class SetsOwnAttribute(Base):
    def change(self, x: Tensor) -> Any:
        self.b.weight.steps = getattr(self.b.weight, "steps", 0)  # type: ignore[union-attr]


class DeletesGrad(Base):
    def change(self, x: Tensor) -> Any:
        del self.b.weight.grad


class FreezesAll(Base):
    def change(self, x: Tensor) -> Any:
        for p in self.b.parameters():
            p.requires_grad = False


class ClampsAll(Base):
    def change(self, x: Tensor) -> Any:
        for p in self.parameters():
            p.data.clamp_(-0.1, 0.1)


class ClampsAllWithoutGrad(Base):
    def change(self, x: Tensor) -> Any:
        for p in self.b.parameters():
            p.detach().mul_(0.5)


class SumsAll(Base):
    def change(self, x: Tensor) -> Any:
        return sum(p.square().sum() for p in self.parameters())


class UsesFreeTensor(Base):
    def change(self, x: Tensor) -> Any:
        return self.free[0] * 2


class ReplacesParameter(Base):
    def change(self, x: Tensor) -> Any:
        self.b.weight = nn.Parameter(torch.eye(4))


class SetsBuffer(Base):
    def change(self, x: Tensor) -> Any:
        self.shift = self.shift + 1
        return self.shift


class CountsDeep(Base):
    def change(self, x: Tensor) -> Any:
        self.nested["n"]["calls"] += 1
        return self.nested["n"]["calls"]


class AppendsDeep(Base):
    def change(self, x: Tensor) -> Any:
        self.nested["n"]["list"][0].append(1)
        return len(self.nested["n"]["list"][0])


class Queues(Base):
    def change(self, x: Tensor) -> Any:
        self.queue.append(len(self.queue) + 1)
        return sum(self.queue)


class Collects(Base):
    def change(self, x: Tensor) -> Any:
        self.seen.add(len(self.seen))
        return len(self.seen)


class Defaults(Base):
    def change(self, x: Tensor) -> Any:
        self.sums["x"] += 1
        return self.sums["x"]


class Meters(Base):
    def change(self, x: Tensor) -> Any:
        return self.meter.update()


class Slots(Base):
    def change(self, x: Tensor) -> Any:
        self.slotted.count += 1
        return self.slotted.count


class CountsInNumpy(Base):
    def change(self, x: Tensor) -> Any:
        self.array += 1
        return float(self.array[0])


class DrawsOfItsOwn(Base):
    def change(self, x: Tensor) -> Any:
        return self.rng.random()


class DrawsFromGenerator(Base):
    def change(self, x: Tensor) -> Any:
        return torch.rand(4, generator=self.generator)


class DrawsFromNumpy(Base):
    def change(self, x: Tensor) -> Any:
        return float(self.np_rng.random())


class CountsInTensor(Base):
    def change(self, x: Tensor) -> Any:
        self.plain.add_(1)
        return self.plain * 1


class Accumulates(Base):
    def change(self, x: Tensor) -> Any:
        total = torch.zeros(4)
        total += x.sum(0)
        return total


class FillsRows(Base):
    def change(self, x: Tensor) -> Any:
        rows = torch.zeros(2, 4)
        rows[0] = x[0]
        return rows.sum()


class CountsGlobally(Base):
    def change(self, x: Tensor) -> Any:
        global COUNT
        COUNT += 1
        return COUNT


class LogsGlobally(Base):
    def change(self, x: Tensor) -> Any:
        LOG.append(1)
        return len(LOG)


class CountsInClass(Base):
    def change(self, x: Tensor) -> Any:
        CountsInClass.calls += 1
        return CountsInClass.calls


KINDS = [kind for kind in Base.__subclasses__()]


def _reset() -> None:
    global COUNT
    COUNT = 0
    LOG.clear()
    CountsInClass.calls = 0


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_forward_changes_is_changed_at_every_call(kind: type[Base], inside: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 4), kind()) if inside else kind()
    ref = copy.deepcopy(model)
    before = {n: (t.clone(), t.requires_grad) for n, t in ref.state_dict(keep_vars=True).items()}
    _reset()
    gm = swatfx.compile(model, DENSITY_1)
    assert set(gm.eager) == {"1" if inside else ""}, gm.eager
    assert (COUNT, LOG, CountsInClass.calls) == (0, [], 0)
    for name, tensor in model.state_dict(keep_vars=True).items():  # compiling changed nothing
        assert torch.equal(tensor, before[name][0]) and tensor.requires_grad == before[name][1]
    results = []
    for net in (ref, gm):
        _reset()
        outputs = []
        for _ in range(3):
            y = net(X)
            y.sum().backward()
            outputs.append(y.detach())
        grads = {n: p.grad for n, p in net.named_parameters()}
        results.append((outputs, grads))
    for y, want in zip(results[1][0], results[0][0], strict=True):
        torch.testing.assert_close(y, want)
    for name, want in results[0][1].items():
        got = results[1][1][name]
        assert (got is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(got, want)


class Free(nn.Module):
    """Asks its weights what they are, and writes into tensors of the graph: no harm in either."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        width = max(p.shape[-1] for p in self.parameters())
        device = next(self.parameters()).device
        mask = torch.zeros(width, device=device)
        mask[1] = 1
        y = self.a(x).mul_(2)
        y += mask
        self.total.add_(y.detach().sum(0))
        return y


def test_what_a_graph_repeats_is_traced() -> None:
    model = Free()
    gm = swatfx.compile(copy.deepcopy(model), DENSITY_1)
    assert not gm.eager
    for _ in range(2):
        torch.testing.assert_close(gm(X), model(X))
    torch.testing.assert_close(gm.total, model.total)


class Reads(dict[str, Any]):
    """A dict that makes something anew whenever it is read, as registries of activations do."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()

    def keys(self) -> Any:
        raise AssertionError("compiling read a user's dict")


REGISTRY = Reads(relu=nn.ReLU)


class UsesRegistry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.registry = Reads(tanh=nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        return self.registry["tanh"](REGISTRY["relu"](self.fc(x)))


def test_registries_are_left_alone() -> None:
    model = UsesRegistry()
    gm = swatfx.compile(model, DENSITY_1)
    torch.testing.assert_close(gm(X), model(X))
    assert dict.__getitem__(REGISTRY, "relu") is nn.ReLU
    assert isinstance(REGISTRY["relu"], nn.ReLU)
