"""Calls, results and methods: whatever a caller does with the model, the compiled one does too."""

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from swatfx.errors import InputError
from tests.nets.compare import DENSITY_1, HALF, assert_matches_at_density_1, train_step

torch.set_num_threads(1)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
ROW = torch.tensor([1.0, 0.0, 1.0, 2.0])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)


class Keywords(Net):
    def forward(
        self,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        scale: float = 1.0,
        twice: bool = False,
    ) -> Any:
        y = self.b(self.a(ids)) * scale
        if twice:
            y = y * 2
        return y, None if labels is None else F.cross_entropy(y, labels)


class Masked(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None, mode: str = "plain") -> Tensor:
        y = self.b(self.a(x))
        if mode == "relu":
            y = y.relu()
        return y if mask is None else y * mask


class Below(nn.Module):
    """Eager code above a module with optional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Masked()

    def forward(self, x: Tensor, kind: int) -> Tensor:
        if kind == 0:
            return self.inner(x)
        return self.inner(x, ROW) if kind == 1 else self.inner(x, mask=ROW, mode="relu")


class Nest(Net):
    def forward(self, batch: Any) -> Any:
        x, mask = batch["x"], batch["more"][0]
        y = self.b(self.a(x))
        return y if mask is None else y * mask


class Gets(Net):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch.get("mask")
        y = self.b(self.a(batch["x"]))
        return y if mask is None else y * mask


class Anything(Net):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        x = args[0] if args else kwargs["x"]
        y = self.b(self.a(x))
        return y + kwargs["shift"] if "shift" in kwargs else y


KEYWORD_CALLS = [
    ((), {"ids": X}),
    ((X,), {}),
    ((X, torch.arange(4)), {}),
    ((X,), {"labels": torch.arange(4), "scale": 2.0}),
    ((), {"ids": X, "labels": None, "scale": 3}),
    ((X,), {"twice": True}),
]


@pytest.mark.parametrize("example", [None, (X, torch.arange(4)), {"ids": X, "scale": 2.0}])
@pytest.mark.parametrize("call", range(len(KEYWORD_CALLS)))
def test_optional_arguments(example: Any, call: int) -> None:
    args, kwargs = KEYWORD_CALLS[call]
    torch.manual_seed(0)
    assert_matches_at_density_1(Keywords(), *args, example_inputs=example, **kwargs)


def test_calls_of_every_kind_share_weights_thresholds_and_clock() -> None:
    torch.manual_seed(0)
    gm = swatfx.compile(Masked(), HALF)
    gm.train()
    calls = [{}, {"mask": ROW}, {"mode": "relu"}, {"mask": ROW, "mode": "relu"}]
    for count, kwargs in enumerate(calls, 1):
        gm(X, **kwargs)
        assert int(gm.swat.clock.iteration) == count
        layers = swatfx.report(gm, {"x": X, **kwargs}).layers
        assert [layer.realised_weight_density for layer in layers] == [0.5, 0.5]
        assert all(layer.sparse_forward_macs for layer in layers)
    weights = {n: p.detach().clone() for n, p in gm.named_parameters()}
    gm.eval()
    for kwargs in calls:
        y = X
        for name in ("a", "b"):
            w = weights[f"{name}.weight"]
            t = w.abs().flatten().kthvalue(w.numel() - w.numel() // 2 + 1).values
            y = F.linear(y, w * (w.abs() >= t), weights[f"{name}.bias"])
        y = y.relu() if "mode" in kwargs else y
        want = y * kwargs["mask"] if "mask" in kwargs else y
        torch.testing.assert_close(gm(X, **kwargs), want)
        torch.testing.assert_close(copy.deepcopy(gm)(X, **kwargs), want)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_optional_arguments_below_eager_code(kind: int) -> None:
    gm = assert_matches_at_density_1(Below(), X, kind)
    assert set(gm.eager) == {""} and "inner" in gm.parts
    train_step(swatfx.compile(Below(), HALF), X, kind)


@pytest.mark.parametrize("batch", [{"x": X, "more": [ROW]}, {"x": X, "more": (ROW, X)}])
def test_nests_of_tensors(batch: Any) -> None:
    gm = assert_matches_at_density_1(Nest(), batch)
    assert not gm.eager
    with pytest.raises(InputError, match="None"):
        gm({"x": X, "more": [None]})
    none = {"x": X, "more": [None]}
    assert_matches_at_density_1(Gets(), {"x": X, "mask": ROW})
    assert_matches_at_density_1(Gets(), {"x": X})
    gm = assert_matches_at_density_1(Nest(), none, example_inputs=(none,))


@pytest.mark.parametrize(
    ("args", "kwargs"), [((X,), {}), ((), {"x": X}), ((X,), {"shift": ROW}), ((X, X), {})]
)
def test_variadic_arguments_of_both_kinds(args: Any, kwargs: Any) -> None:
    for example in (None, (X,), {"x": X, "shift": ROW}):
        assert_matches_at_density_1(Anything(), *args, example_inputs=example, **kwargs)


def test_the_signature_is_the_models() -> None:
    for model in (Keywords(), Masked(), Nest(), Anything(), Below()):
        gm = swatfx.compile(model, DENSITY_1)
        assert inspect.signature(gm.forward) == inspect.signature(model.forward)
    with pytest.raises(TypeError, match="unexpected keyword"):
        swatfx.compile(Masked(), DENSITY_1)(X, masc=ROW)
    with pytest.raises(InputError, match="no call of forward"):
        swatfx.compile(Masked(), DENSITY_1, example_inputs={"masc": ROW})


@pytest.mark.parametrize("kwargs", [{}, {"mask": ROW}, {"mode": "relu"}])
def test_torch_compile_sees_one_graph_a_call(kwargs: Any) -> None:
    gm = swatfx.compile(Masked(), HALF).eval()
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X, **kwargs), gm(X, **kwargs))


# ---- results ----


class Record(OrderedDict[str, Any]):
    @property
    def logits(self) -> Tensor:
        return self["logits"]  # type: ignore[no-any-return]


class Tagged(list[Any]):
    def __init__(self, values: Any, tag: int) -> None:
        super().__init__(values)
        self.tag = tag


class Pair(tuple[Any, ...]):
    pass


@dataclass
class Data:
    y: Tensor
    count: int = 3


@dataclass(frozen=True, slots=True)
class Frozen:
    y: Tensor
    inner: Any = None


@dataclass
class Late:
    y: Tensor

    def __post_init__(self) -> None:
        self.extra = [self.y, 1]


RESULTS = {
    "record": lambda y: Record(logits=y),
    "tagged": lambda y: Tagged([y, {"a": Pair((y, 2))}], 7),
    "pair": lambda y: Pair((y,)),
    "data": lambda y: Data(y),
    "frozen": lambda y: Frozen(y, {"d": Data(y, 4)}),
    "late": lambda y: Late(y),
    "default": lambda y: defaultdict(list, {"a": [y]}),
    "none": lambda y: None,
    "nested none": lambda y: {"a": None, "b": (y, None)},
}


class Returns(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return RESULTS[self.kind](self.b(self.a(x)))


def _flat(value: Any) -> list[Any]:
    found = [type(value)]
    if isinstance(value, dict):
        found += [x for k, v in value.items() for x in (k, *_flat(v))]
    elif isinstance(value, (list, tuple)):
        found += [x for v in value for x in _flat(v)]
    names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
    if not isinstance(value, Tensor):
        found += [x for n in names for x in (n, *_flat(getattr(value, n)))]
    return [*found, value] if isinstance(value, (Tensor, int, type(None))) else found


@pytest.mark.parametrize("kind", RESULTS)
def test_results_keep_their_type(kind: str) -> None:
    model = Returns(kind)
    gm = swatfx.compile(copy.deepcopy(model), DENSITY_1)
    assert not gm.eager
    for _ in range(2):
        got, want = _flat(gm(X)), _flat(model(X))
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            if isinstance(a, Tensor):
                torch.testing.assert_close(a, b)
            else:
                assert a == b
    assert gm(X) is None or gm(X) is not gm(X)


# ---- methods and attributes ----


class Rich(nn.Module):
    version = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.config = {"width": 8}

    @property
    def width(self) -> int:
        return self.head.out_features

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(1)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset(self, classes: int) -> None:
        self.head = nn.Linear(8, classes)

    def train(self, mode: bool = True) -> "Rich":
        super().train(mode)
        self.norm.eval()
        return self

    @staticmethod
    def names() -> list[str]:
        return ["a"]

    def save(self, path: Path) -> None:
        torch.save(self.state_dict(), path)


def test_methods_and_attributes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Rich()
    gm = swatfx.compile(model, HALF)
    assert (gm.config, gm.width, gm.version, gm.names()) == ({"width": 8}, 4, 3, ["a"])
    assert gm.get_classifier() is gm.head
    assert not gm.train().norm.training and gm.a.training
    gm.eval()
    w = model.a.weight
    t = w.abs().flatten().kthvalue(w.numel() - w.numel() // 2 + 1).values
    hidden = F.linear(X, w * (w.abs() >= t), model.a.bias)
    torch.testing.assert_close(gm.features(X), copy.deepcopy(model.norm).eval()(hidden).relu())
    assert torch.equal(gm.predict(X), gm(X).argmax(1))
    gm.save(tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt")
    assert list(saved) == list(model.state_dict())
    assert torch.equal(saved["a.weight"], model.a.weight)
    gm.reset(9)
    assert gm.head.out_features == 9 and model.head.out_features == 4
    assert not hasattr(gm, "nothing")
    with pytest.raises(AttributeError, match="nothing"):
        gm.nothing  # noqa: B018


class Private(Net):
    def _hidden(self, x: Tensor) -> Tensor:
        return self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self._hidden(x))


def test_a_method_that_would_run_plain_layers_is_refused() -> None:
    gm = swatfx.compile(Private(), HALF)
    with pytest.raises(InputError, match="_hidden"):
        gm._hidden(X)


def test_hooks_on_the_root_see_every_call() -> None:
    seen: list[Any] = []
    model = Masked()
    model.register_forward_hook(lambda m, args, out: seen.append(len(args)))
    gm = swatfx.compile(model, HALF)
    gm.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True
    )
    gm(X)
    gm(X, mask=ROW)
    gm(X, mode="relu")
    assert seen == [[], 1, ["mask"], 1, ["mode"], 1]


# ---- the warning ----


def test_one_warning_tells_what_stays_eager() -> None:
    with pytest.warns(swatfx.SwatWarning) as caught:
        swatfx.compile(nn.Sequential(nn.Linear(8, 8), Below()), HALF, example_inputs=(X,))
    assert len(caught) == 1
    with pytest.warns(
        swatfx.SwatWarning, match=r"the model itself .* 2 of 2 layers \(100% of the MACs\)"
    ):
        swatfx.compile(Below(), HALF, example_inputs=(X, 0))
    with pytest.warns(swatfx.SwatWarning, match=r"100% of the weights.*control flow on a tensor"):
        swatfx.compile(Below(), HALF)


class Multiplying(nn.Module):
    """Multiplies by a matrix of its own, as what it holds does."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.rows = nn.Embedding(4, 8)
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.steps = nn.ModuleDict(parts)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.rows.weight[0], x, self.matrix) if x.sum() < 1e9 else x
        for step in self.steps.values():
            x = step(x)
            x = x if isinstance(x, Tensor) else x[0]
        result: Tensor = self.last(x)
        return result


def tied() -> nn.Module:
    model = Multiplying()
    model.rows = nn.Embedding(8, 8)
    model.rows.weight = model.last.weight
    return model


# what is in the model; layers, their share of the weights, matrices that stay dense
SHARES: list[tuple[Callable[[], nn.Module], int, str, str]] = [
    (Multiplying, 1, "50%", "1 matrix that is .* stays dense"),
    (tied, 1, "50%", "1 matrix that is .* stays dense"),
    (lambda: Multiplying(b=Multiplying()), 2, "50%", "2 matrices that are .* stay dense"),
    (lambda: Multiplying(b=nn.LSTM(8, 8)), 1, "10%", "3 matrices that are .* stay dense"),
    (
        lambda: Multiplying(b=nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))),
        2,
        "67%",
        "1 matrix that is .* stays dense",
    ),
]


@pytest.mark.parametrize(("make", "layers", "share", "dense"), SHARES)
def test_the_share_counts_the_matrices_that_are_no_layers(
    make: Callable[[], nn.Module], layers: int, share: str, dense: str
) -> None:
    text = rf"{layers} of {layers} layers \({share} of the weights\).*; {dense}"
    with pytest.warns(swatfx.SwatWarning, match=text):
        swatfx.compile(make(), HALF)


def test_no_word_of_matrices_where_there_are_none() -> None:
    with pytest.warns(swatfx.SwatWarning) as caught:
        swatfx.compile(Below(), HALF)
    assert "matri" not in str(caught[0].message)


@pytest.mark.filterwarnings("error")
def test_no_warning_where_all_is_a_graph() -> None:
    swatfx.compile(Masked(), HALF)
