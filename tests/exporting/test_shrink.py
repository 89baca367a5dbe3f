"""Smaller networks: equal outputs, filters and channels gone, and why the others stay."""

from __future__ import annotations

import copy
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from swatfx.errors import ExportError, InputError
from swatfx.exporting import Shrunk
from tests.nets.small_nets import Residual, assert_same, plain, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*dynamic.*:UserWarning"),
]


class Attended(nn.Module):
    """A depthwise convolution, and channels weighed by what their means say."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 12, 1)
        self.norm = nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.squeeze = nn.Conv2d(12, 6, 1)
        self.excite = nn.Conv2d(6, 12, 1)
        self.narrow = nn.Conv2d(12, 8, 1, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(F.hardswish(self.norm(self.wide(x))))
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        out: Tensor = self.head(self.narrow(y).mean((2, 3)))
        return out


class Joined(nn.Module):
    """Concatenation, a split, padding of the tensor and of pools, and a view that flattens."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(3, 6, 1, bias=False)
        self.slope = nn.PReLU(14)
        self.left = nn.Conv2d(7, 8, 3)
        self.right = nn.Conv2d(7, 8, 3, bias=False)
        self.head = nn.Linear(8 * 4 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.slope(torch.cat([self.a(x), self.b(x)], 1))
        left, right = y.chunk(2, 1)
        left = F.avg_pool2d(self.left(F.pad(left, (1, 1, 1, 1))), 3, 2, 1)
        right = F.max_pool2d(self.right(F.pad(right, (1, 1, 1, 1), value=0.5)), 2)
        out: Tensor = self.head((left + right).flatten(1))
        return out


class Grouped(nn.Module):
    """Groups of several channels, a depthwise convolution that makes two of one, 1d."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 16, 1)
        self.grouped = nn.Conv1d(16, 12, 3, groups=4)
        self.doubled = nn.Conv1d(12, 24, 2, groups=12, bias=False)
        self.last = nn.Conv1d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.doubled(F.elu(self.grouped(self.first(x.flatten(2)).relu())))
        out: Tensor = self.last(y.relu()).mean(2)
        return out


class Permuted(nn.Module):
    """A ConvNeXt's block: channels last for linear layers, a scale for each, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        out: Tensor = self.head((x + self.scale * y).mean((2, 3)))
        return out


class TwoHeads(nn.Module):
    """A weight that two layers share, which read tensors that shrink otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.shared = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(self.one(x).relu()) * self.shared(self.two(x).relu())
        return y.mean((2, 3))


def stack() -> nn.Sequential:
    """Norms behind padded convolutions, so that empty filters are constants."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4)),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "residual": Residual,
    "attended": Attended,
    "joined": Joined,
    "grouped": Grouped,
    "permuted": Permuted,
    "two heads": TwoHeads,
    "stack": stack,
}


def compiled(build: Callable[[], nn.Module], policy: str) -> swatfx.compiled.SwatModule:
    """With statistics and biases that make no constant zero."""
    torch.manual_seed(0)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            nn.init.normal_(bias, 0.1, 0.3)
    gm = swatfx.compile(model, policy)
    return gm


def check(gm: swatfx.compiled.SwatModule, **options: int) -> Shrunk:
    before, mode = snapshot(gm), gm.training
    found = swatfx.shrink(gm, torch.randn(2, 3, 8, 8, dtype=torch.float64), **options)
    assert_same(snapshot(gm), before)
    assert gm.training == mode
    swatfx.refresh(gm)
    gm.eval()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8, dtype=torch.float64)
        with torch.no_grad():
            want, got = gm(x), found.module(x)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert (want[0] - want[1]).abs().max() > 1e-4  # the images can be told apart
    return found


@pytest.mark.parametrize(
    "selector",
    ["filter", "input-channel"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("filter-l2", "channel")],
)
@pytest.mark.parametrize("name", NETS)
def test_a_smaller_network_computes_the_same(name: str, selector: str) -> None:
    gm = compiled(NETS[name], f"swat-u:0.5,first_dense=False,weight_selector={selector}")
    found = check(gm)
    before, after = found.parameters
    assert after <= before
    kept = {path: tuple(p.shape) for path, p in found.module.named_parameters()}
    assert sum(torch.Size(shape).numel() for shape in kept.values()) <= after
    for layer in found.layers:
        assert layer.filters[1] <= layer.filters[0] and layer.inputs[1] <= layer.inputs[0]
        assert sum(layer.stays.values()) <= layer.filters[1]
    if selector != "channel":  # kernels of single channels, of which some leave none
        assert after < (0.95 if selector == "input-channel" else 0.85) * before


def test_filters_and_who_read_them_are_gone() -> None:
    found = check(compiled(stack, "swat-u:0.5,weight_selector=filter"))
    first, second, third, last = found.layers
    assert first.filters == (16, 16) and first.inputs == (3, 3)  # the first stays dense
    # Of eight constants, which the next convolution pads, one stands for all.
    assert second.filters == (16, 9)
    assert dict(second.stays) == {"a constant that 7 pads": 1}
    assert third.inputs == (16, second.filters[1])
    assert third.filters == (16, 8) and last.inputs == (64, 32)
    assert found.module.get_parameter("3.weight").shape == (second.filters[1], 16, 3, 3)


def test_unstructured_weights_stay() -> None:
    found = check(compiled(stack, "swat-u:0.5"))
    assert found.parameters[0] == found.parameters[1]
    assert all(one.filters[0] == one.filters[1] for one in found.layers)


def test_a_residual_keeps_what_the_other_branch_needs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 6, 1, bias=False)
            self.b = nn.Conv2d(3, 6, 1, bias=False)
            self.head = nn.Conv2d(6, 2, 1)
            with torch.no_grad():
                self.a.weight[:3] = self.b.weight[2:5] = 0

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.a(x) + self.b(x)).mean((2, 3))
            return out

    found = check(compiled(Sum, "dense"))
    a, b, head = found.layers
    assert a.filters == b.filters == (6, 5) and head.inputs == (6, 5)  # both lack the third
    assert dict(a.stays) == {"head reads it": 2} and dict(b.stays) == {"head reads it": 2}
    text = str(found)
    assert "6 -> 5" in text and "2: head reads it" in text and "all parameters" in text


def test_what_leaves_the_network_stays() -> None:
    found = check(compiled(lambda: nn.Sequential(*list(plain())[:4]), "dense"))
    gm = compiled(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1)),
        "swat-u:0.5,first_dense=False,weight_selector=filter",
    )
    found = check(gm)
    assert found.layers[0].filters == (8, 8)
    assert dict(found.layers[0].stays) == {"it leaves the network": 4}


@pytest.mark.parametrize("multiple", [2, 4, 16])
def test_filters_come_in_multiples(multiple: int) -> None:
    gm = compiled(stack, "swat-u:0.5,weight_selector=filter")
    for layer in check(gm, multiple=multiple).layers[:3]:
        assert layer.filters[1] % multiple == 0 or layer.filters[1] == layer.filters[0]


def test_it_is_plain_and_copies_and_exports(tmp_path: pathlib.Path) -> None:
    gm = compiled(Residual, "swat-u:0.5,weight_selector=filter")
    found = swatfx.shrink(gm, torch.randn(2, 3, 8, 8, dtype=torch.float64)).module
    assert not any("swatfx" in type(module).__module__ for module in found.modules())
    assert not any("swat" in str(node.target) for node in found.graph.nodes)
    assert all(not parameter.requires_grad for parameter in found.parameters())
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        want = found(x)
        assert torch.equal(copy.deepcopy(found)(x), want)
    torch.save((found, x, want), tmp_path / "a.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['swatfx'] = sys.modules['passes'] = None\n"
        f"module, x, want = torch.load({str(tmp_path / 'a.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(module(x), want)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    swatfx.export(gm, tmp_path / "a.pt2", x, shrink=True)
    got = torch.export.load(tmp_path / "a.pt2").module()(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_bad_calls_of_shrink_say_what_is_wrong() -> None:
    gm = compiled(plain, "swat-u:0.5")
    with pytest.raises(ExportError, match="wants example inputs"):
        swatfx.shrink(gm, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="multiple has to be"):
        swatfx.shrink(gm, torch.randn(1, 3, 8, 8), multiple=0)
    with pytest.raises(ExportError, match=r"torch\.export cannot follow"):
        swatfx.shrink(gm, torch.randn(1, 4, 8, 8, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"]
    + ["squeezenet1_1", "resnext50_32x4d", "efficientnet_b0", "convnext_tiny", "googlenet"],
)
def test_known_networks_shrink(name: str) -> None:
    gm = compiled(
        lambda: swatfx.models.create(name, num_classes=10), "swat-u:0.5,weight_selector=filter"
    )
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    found = swatfx.shrink(gm, x)
    swatfx.refresh(gm)
    with torch.no_grad():
        torch.testing.assert_close(found.module(x), gm.eval()(x), rtol=1e-9, atol=1e-9)
    assert found.parameters[1] < 0.9 * found.parameters[0]
