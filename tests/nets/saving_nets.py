"""Networks of every op that may save less, and pairs of them with and without the pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from passes.compress_saves import compress_saves
from swatfx import models, pipeline
from swatfx.compiled import saves
from swatfx.compiled.module import SwatModule
from swatfx.compiled.parts import all_parts
from tests.nets.small_nets import EagerMiddle, Residual, plain

torch.set_num_threads(1)


class Functions(nn.Module):
    """All as functions and methods, in every spelling. (N, 3, 8, 8) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(32, 10)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.shift = nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.scale, self.shift, self.training)

    def forward(self, x: Tensor) -> Tensor:
        first = self.norm(self.a(x)).relu()
        x = torch.relu(torch.add(self.norm(self.b(first)), first))
        x = F.relu(x.add(F.batch_norm(self.c(x), None, None, training=True)))
        y = F.batch_norm(self.d(x), self.mean, self.var, bias=self.shift, eps=0.1)
        y += x
        x = F.max_pool2d(F.relu_(y), 2, ceil_mode=True)
        x = F.avg_pool2d(x, (2, 2), padding=0)
        x = F.dropout(x.relu_(), 0.3, self.training)
        return self.fc(torch.dropout(x, 0.2, True).flatten(1))


def inplace() -> nn.Sequential:
    """As torchvision writes it."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.4, inplace=True),
        nn.Linear(32, 10),
    )


def odd_norms() -> nn.Sequential:
    """Every option of batch norm, in one, two and three dimensions."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Conv1d(4, 6, 3),
        nn.BatchNorm1d(6, momentum=0.7, eps=0.01),
        nn.Unflatten(2, (2, 31)),
        nn.Unflatten(3, (31, 1)),
        nn.Conv3d(6, 6, (1, 3, 1)),
        nn.BatchNorm3d(6, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(348, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, 10),
    )


class Preactivated(nn.Module):
    """Norms before convolutions, one tensor read by two, a norm called twice, a sum of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(8) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(F.relu(self.bn1(x)))
        z = self.conv2(self.bn2(y).relu() + x)
        z = F.relu(self.bn3(z) + self.bn3(y))
        return self.fc(z.mean((2, 3)))


class Shapes(nn.Module):
    """Sums of other shapes and dtypes than the norm's own: known only when they run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.next = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.relu(self.bn(x) + x.mean((2, 3), keepdim=True))
        return self.fc(F.relu(self.bn(self.next(x)) + x.double()).float().mean((2, 3)))


class Dropping(nn.Module):
    """Eager: autograd keeps tensors for results that are dropped; their memory is given anew."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            if float(x.detach().exp().sum()) < 0:
                return x
            (2 * x).sin().mean()
        return x.sigmoid()


class DeadBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.next = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.second = Dropping(), Dropping()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.next(self.first(self.conv(x))))
        return self.fc(self.second(x).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: plain(0.5),
    "residual": lambda: Residual(0.3),
    "functions": Functions,
    "inplace": inplace,
    "odd norms": odd_norms,
    "preactivated": Preactivated,
    "shapes": Shapes,
    "eager middle": EagerMiddle,
    "digits": lambda: models.create("digits/cnn"),
    "resnet20": lambda: models.create("cifar/resnet20"),
}
SIZES = {"digits": (8, 1, 8, 8), "resnet20": (2, 3, 32, 32)}
POLICY = "swat-u:0.9"


def inputs_of(name: str, count: int) -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(SIZES.get(name, (4, 3, 8, 8))) for _ in range(count)]


def pair(name: str, **options: Any) -> tuple[SwatModule, SwatModule]:
    """(with the pass, without it), of one network."""
    torch.manual_seed(0)
    model = NETS[name]()
    passes = [p for p in pipeline.default_passes() if p is not compress_saves]
    without = swatfx.compile(copy.deepcopy(model), POLICY, passes=passes)
    return swatfx.compile(model, POLICY, **options), without


def leaves(gm: SwatModule) -> dict[str, str]:
    """Node -> kind of the leaf it calls, in all graphs."""
    found = {}
    for _, part in all_parts(gm):
        for node in part.graph.nodes:
            if node.op == "call_module":
                module = part.get_submodule(str(node.target))
                if isinstance(module, saves.Saver):
                    found[node.name] = type(module).__name__
    return found


def seeded(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    y: Tensor = module(x)
    return y


def kept_by(run: Callable[[], Any], owner: nn.Module) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters and buffers excluded."""
    own = [t.untyped_storage() for t in (*owner.parameters(), *owner.buffers())]
    skipped = {storage._cdata for storage in own}
    seen: dict[int, torch.UntypedStorage] = {}  # held: a freed one's place is given away

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in skipped:
            seen[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        output = run()
    del output
    return sum(storage.nbytes() for storage in seen.values())
