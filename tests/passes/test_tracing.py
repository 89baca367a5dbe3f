"""Ordinary models: every way in which a layer can be called, and what calls take and return."""

import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from swatfx.compiled.module import SwatModule
from swatfx.errors import InputError
from tests.nets.compare import DENSITY_1, HALF, assert_matches_at_density_1, skipped, train_step

torch.set_num_threads(1)


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(3))


def all_sparse(gm: SwatModule, *args: Any, layers: int) -> None:
    reasons = skipped(gm, *args)
    assert len(reasons) == layers and set(reasons.values()) == {None}, reasons


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9)),
        (nn.Conv1d(4, 6, 4, padding="same", bias=False), (2, 4, 9)),
        (nn.Conv2d(4, 8, 3, stride=2, dilation=2, groups=2), (2, 4, 9, 9)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), (2, 4, 9, 9)),
        (nn.Conv2d(4, 4, (1, 3), padding=(0, 1), padding_mode="replicate"), (2, 4, 9, 9)),
        (nn.Conv2d(4, 4, 3, padding="valid"), (4, 9, 9)),
        (nn.Conv3d(2, 4, 3, padding=1, stride=(1, 2, 2)), (2, 2, 4, 6, 6)),
        (nn.Linear(5, 3), (5,)),
        (nn.Linear(5, 3, bias=False), (2, 3, 4, 5)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_every_kind_of_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    gm = assert_matches_at_density_1(layer, image(*shape))
    all_sparse(gm, image(*shape), layers=1)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.b = nn.Parameter(torch.randn(5, 4))
        self.c = nn.Parameter(torch.randn(4, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.a, None, padding="same").relu().mean((-2, -1))
        return torch.conv1d(F.linear(x, self.b)[..., None], weight=self.c, bias=None, stride=1)


def test_functional_calls() -> None:
    gm = assert_matches_at_density_1(Functional(), image())
    all_sparse(gm, image(), layers=3)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv(x)).relu().mean((-2, -1))
        return self.tied(self.fc(x))


def test_a_module_used_twice_and_a_shared_weight_are_one_layer_each() -> None:
    gm = assert_matches_at_density_1(Twice(), image())
    all_sparse(gm, image(), layers=2)
    train_step(swatfx.compile(Twice(), HALF), image())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)).tanh())


def test_embedding_tied_to_a_linear() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    gm = assert_matches_at_density_1(Tied(), tokens)
    all_sparse(gm, tokens, layers=2)
    assert gm.head.weight is gm.embed.weight  # type: ignore[union-attr]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"0": nn.Conv2d(3, 4, 1), "forth": nn.ReLU()})
        self.add_module("0", nn.Conv2d(4, 4, 1))
        self.add_module("1st", nn.Conv2d(4, 4, 1))
        self.add_module("thresholds", nn.Conv2d(4, 4, 1))
        # Without a bias, whose gradient before a norm is nothing but rounding.
        self.stages = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)])
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stem.values():
            x = layer(x)
        for name in ("0", "1st", "thresholds"):
            x = getattr(self, name)(x)
        features = [x]
        for conv, norm in self.stages:  # type: ignore[misc]
            features.append(norm(conv(torch.cat(features[-1:], 1))) + features[-1])
        return torch.stack(features).sum(0)


def test_nested_containers_and_odd_names() -> None:
    gm = assert_matches_at_density_1(Nested(), image())
    assert not gm.eager
    all_sparse(gm, image(), layers=6)
    assert {"0", "1st", "thresholds", "stem.0"} <= set(skipped(gm, image()))


def test_a_child_named_after_a_keyword() -> None:
    model = nn.Sequential(OrderedDict([("class", nn.Linear(3, 3)), ("in", nn.Linear(3, 3))]))
    gm = assert_matches_at_density_1(model, image(2, 3))
    assert gm.eager == {"": "untraceable: a module below is named after a Python keyword"}
    all_sparse(gm, image(2, 3), layers=2)


class Out(NamedTuple):
    y: Tensor
    extra: Any


class Outputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(3, 4)

    def forward(self, batch: Any, second: Tensor) -> Any:
        a, b = self.a(batch["x"]), self.b(second)
        return {
            "dict": {"a": a, "b": {"c": b}},
            "ordered": OrderedDict([("b", b), ("a", a)]),
            "list": [a, [b, 3]],
            "tuple": (a, None, b),
            "named": Out(a, {"b": b}),
        }[self.kind]


@pytest.mark.parametrize("kind", ["dict", "ordered", "list", "tuple", "named"])
def test_outputs_keep_their_type_and_two_inputs_have_two_first_layers(kind: str) -> None:
    args = ({"x": image(2, 3)}, image(2, 3))
    gm = assert_matches_at_density_1(Outputs(kind), *args)
    assert not gm.eager
    with pytest.raises(InputError, match="first layer"):
        swatfx.compile(Outputs(kind), swatfx.swat_u(0.5))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
        x = self.fc(x) * scale
        return x if mask is None else x * mask


def test_every_call_of_optional_arguments_is_right() -> None:
    x, mask = image(2, 3), torch.tensor([[1.0, 0.0, 1.0]])
    model = Optional()
    for example in (None, (x, mask), {"x": x, "scale": 3.0}):
        for args, kwargs in [
            ((x,), {}),
            ((x, None), {}),
            ((x, mask), {}),
            ((), {"mask": mask, "x": x}),
            ((x,), {"scale": 3.0}),
            ((x, mask), {"scale": 2}),
        ]:
            gm = assert_matches_at_density_1(model, *args, example_inputs=example, **kwargs)
            assert not gm.eager
    assert gm.ways is not None
    assert [str(pattern) for pattern, _ in gm.ways.graphs] == [
        "(x, mask=None, scale=2.0)",
        "(x, mask, scale=2.0)",
        "(x, scale, mask=None)",
        "(x, mask, scale)",
    ]
    with pytest.raises(InputError, match="no call of forward.*multiple|too many"):
        swatfx.compile(model, DENSITY_1, example_inputs=(x, mask, 1, 2))
    with pytest.raises(TypeError, match="missing"):
        gm(mask=mask)


class Variadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, *xs: Tensor, shift: float = 0.0, **options: Any) -> Tensor:
        total = self.fc(xs[0]) + shift
        for x in xs[1:]:
            total = total + self.fc(x)
        return total


def test_variadic_arguments() -> None:
    x, y = image(2, 3), image(2, 3) + 1
    gm = assert_matches_at_density_1(Variadic(), x, y)
    assert "variadic" in gm.eager[""] and "fc" in gm.parts
    assert gm(x, y, x, shift=1.0).shape == (2, 3)  # eager: takes whatever the model takes
    gm = assert_matches_at_density_1(Variadic(), x, y, example_inputs=(x, y))
    assert not gm.eager
    for args, kwargs in [((x,), {}), ((x, y, x), {"shift": 1.0}), ((x, y), {"other": 1})]:
        assert_matches_at_density_1(Variadic(), *args, example_inputs=(x, y), **kwargs)


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, *, gate: Tensor) -> Tensor:
        return self.fc(x) * gate


def test_keyword_only_input() -> None:
    gm = assert_matches_at_density_1(KeywordOnly(), image(2, 3), gate=torch.ones(3))
    assert not gm.eager


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.5)
        return x * keep


class Stochastic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.path = DropPath()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.path(self.drop(self.conv(x))).mean((-2, -1))
        return F.dropout(self.fc(x), 0.3, self.training)


def test_dropout_and_drop_path_follow_the_mode() -> None:
    gm = assert_matches_at_density_1(Stochastic(), image())
    all_sparse(gm, image(), layers=2)
    frozen = swatfx.compile(Stochastic(), DENSITY_1).train()
    frozen.drop.eval()  # a flag of one module alone
    frozen.path.eval()
    torch.manual_seed(0)
    first = frozen.drop(image())
    assert torch.equal(first, image())


def test_the_model_keeps_working_and_deepcopy_and_double_do_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    before = model(image())
    gm = swatfx.compile(model.eval(), HALF)
    gm.train()
    assert not any(m.training for m in model.modules())
    assert torch.equal(model(image()), before)
    twin = copy.deepcopy(gm)
    loss = train_step(gm, image())
    assert torch.equal(train_step(twin, image()), loss)
    assert twin.get_parameter("0.weight") is not gm.get_parameter("0.weight")
    wide = copy.deepcopy(gm).to(torch.float64)
    assert train_step(wide, image().double()).dtype == torch.float32  # loss_of is in float32
    assert wide(image().double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).to(dtype)
    assert_matches_at_density_1(model, image().to(dtype), rtol=0.1)


def test_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    gm = swatfx.compile(model, swatfx.swat_u(0.5))
    found = swatfx.report(gm, [torch.empty(2, 3, 8, 8, device="meta")])
    assert [(layer.name, layer.skipped) for layer in found.layers] == [
        ("0", "first layer"),
        ("2", None),
    ]


@pytest.mark.filterwarnings("ignore:Complex modules", "ignore:.*torch.jit.script. is deprecated")
def test_errors_name_the_trouble() -> None:
    swat = nn.Sequential(OrderedDict(swat=nn.Linear(2, 2)))
    with pytest.raises(InputError, match="child named 'swat'"):
        swatfx.compile(swat, DENSITY_1)
    with pytest.raises(InputError, match="nothing to sparsify"):
        swatfx.compile(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), HALF)
    with pytest.raises(InputError, match="layer '0'.*lazy"):
        swatfx.compile(nn.Sequential(nn.LazyLinear(3)), HALF)
    with pytest.raises(InputError, match="layer '1'.*complex"):
        swatfx.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(torch.complex64)), HALF)
    with pytest.raises(InputError, match="TorchScript"):
        swatfx.compile(torch.jit.script(nn.Linear(2, 2)), HALF)
    with pytest.raises(InputError, match="wrapped already"):
        swatfx.compile(torch.compile(nn.Linear(2, 2), backend="eager"), HALF)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="compiled already"):
        swatfx.compile(swatfx.compile(nn.Linear(2, 2), HALF), HALF)


def test_frozen_layers_and_no_grad_save_and_pack_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model.requires_grad_(False)
    gm = swatfx.compile(model, HALF).train()
    report = swatfx.report(gm, [torch.randn(2, 4)])
    assert [layer.sparse_saved_bytes for layer in report.layers] == [0, 0]
    packed = []
    for module in gm.swat.modules():
        if type(module).__name__ == "Pack":
            module.register_forward_hook(lambda m, a, out: packed.append(out))
    gm(torch.randn(2, 4))
    model.requires_grad_(True)
    with torch.no_grad():
        gm(torch.randn(2, 4))
    assert packed == [None] * 4
    gm(torch.randn(2, 4))
    assert all(isinstance(x, Tensor) for x in packed[4:])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3), (2, 3, 8)),
        (nn.Conv1d(3, 3, 3, groups=3), (3, 8)),
        (nn.Conv2d(3, 4, 3), (3, 8, 8)),
        (nn.Conv2d(3, 4, 3), (0, 3, 8, 8)),
        (nn.Linear(4, 4), (2, 3, 4)),
    ],
)
def test_outputs_may_be_written_into(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    assert_matches_at_density_1(model, image(*shape))
    transposed = image(4, 3, 2).transpose(0, 2)
    assert_matches_at_density_1(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), transposed)
