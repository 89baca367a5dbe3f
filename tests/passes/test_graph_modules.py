"""fx GraphModules in a model: traced like any module, copied whole, edits of them refused."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.feature_extraction import create_feature_extractor

import swatfx
from swatfx.errors import ChangedModelError, InputError
from tests.nets.compare import HALF, assert_matches_at_density_1, assert_same

torch.set_num_threads(1)
X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))


class Trunk(nn.Module):
    """Two convolutions and what moves in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


class Dropping(Trunk):
    """fx has one graph of it for training, another for evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training) * 1.5


class Whole(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Extracted(Whole):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)["f"].mean((2, 3)))


class Eager(Whole):
    """Nothing below can be one graph with it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if isinstance(x, Tensor) else x


def extractor(trunk: nn.Module, node: str) -> nn.Module:
    return create_feature_extractor(trunk, {node: "f"})


def resnet() -> nn.Module:
    model = Extracted(extractor(torchvision.models.resnet18(), "layer2"))
    model.head = nn.Linear(128, 5)
    return model


def nested() -> fx.GraphModule:
    outer = fx.symbolic_trace(nn.Sequential(nn.Identity(), Trunk()))
    outer.add_module("0", fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1))))
    return outer


TRACED: dict[str, Callable[[], nn.Module]] = {
    "feature extractor": resnet,
    "traced part": lambda: Whole(fx.symbolic_trace(Trunk())),
    "one in another": lambda: Whole(nested()),
    "the model itself": lambda: fx.symbolic_trace(Whole(Trunk())),
}
EAGER: dict[str, Callable[[], nn.Module]] = {
    "below an eager model": lambda: Eager(fx.symbolic_trace(Trunk())),
    "two graphs": lambda: Extracted(extractor(Dropping(), "mul")),
    "two graphs, the model itself": lambda: extractor(Dropping(), "mul"),
}
EVERY = TRACED | EAGER


def outputs(model: nn.Module) -> list[Tensor]:
    """In training and in evaluation, with the same random numbers."""
    found = []
    for training in (True, False):
        model.train(training)
        torch.manual_seed(1)
        with torch.no_grad():
            result = model(X)
        found.append(result["f"] if isinstance(result, dict) else result)
    return found


@pytest.mark.parametrize("name", TRACED)
def test_its_layers_are_in_the_one_graph(name: str) -> None:
    gm = swatfx.compile(TRACED[name](), HALF)
    assert not gm.eager and not gm.parts
    layers = [n for n, m in gm.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    called = {row.name for row in swatfx.report(gm, (X,)).layers if not row.skipped}
    assert called == set(layers) and len(layers) > 2


@pytest.mark.parametrize("name", EVERY)
def test_outputs_and_gradients_are_the_models_at_sparsity_0(name: str) -> None:
    torch.manual_seed(0)
    assert_matches_at_density_1(EVERY[name](), X)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.filterwarnings("ignore::swatfx.SwatWarning")
def test_copies_and_averages_do_what_the_compiled_model_does(name: str) -> None:
    gm = swatfx.compile(EVERY[name](), HALF)
    copies = [copy.deepcopy(gm), copy.deepcopy(copy.deepcopy(gm))]
    average = AveragedModel(gm)
    average.update_parameters(gm)
    expected = outputs(gm)
    for twin in (*copies, average):
        assert_same(outputs(twin), expected)
    assert list(copies[0].state_dict()) == list(gm.state_dict())
    before = [p.detach().clone() for p in gm.parameters()]
    copies[0].train()
    sum(v.sum() for v in torch.utils._pytree.tree_leaves(copies[0](X))).backward()
    torch.optim.SGD(copies[0].parameters(), lr=1.0).step()
    assert all(torch.equal(p, q) for p, q in zip(before, gm.parameters(), strict=True))
    assert not torch.equal(outputs(copies[0])[1], outputs(gm)[1])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.filterwarnings("ignore::swatfx.SwatWarning")
def test_it_is_exported(name: str, tmp_path: Path) -> None:
    gm = swatfx.compile(EVERY[name](), HALF)
    expected = outputs(gm)[1]
    swatfx.export(gm, tmp_path / "m.pt2", (X,))
    result = torch.export.load(tmp_path / "m.pt2").module()(X)
    result = result["f"] if isinstance(result, dict) else result
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    swatfx.export(gm, tmp_path / "m.safetensors", (X,))
    assert safetensors.torch.load_file(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.filterwarnings("ignore::swatfx.SwatWarning")
def test_torch_compile_runs_it(name: str) -> None:
    gm = swatfx.compile(EAGER[name](), HALF)
    expected = outputs(copy.deepcopy(gm))
    assert_same(outputs(torch.compile(gm, backend="eager")), expected)
    torch._dynamo.reset()


def test_compiling_leaves_the_models_own_graph_alone() -> None:
    model = Whole(fx.symbolic_trace(Trunk()))
    body, expected = model.body, outputs(copy.deepcopy(model))
    assert isinstance(body, fx.GraphModule)
    graph, forward = body.graph, type(body).forward
    gm = swatfx.compile(model, HALF)
    assert body.graph is graph and graph.owning_module is body and type(body).forward is forward
    assert_same(outputs(model), expected)
    assert gm.body is not body and type(gm.body) is not type(body)


def test_a_graph_that_was_edited_since_is_refused_by_name() -> None:
    gm = swatfx.compile(Whole(fx.symbolic_trace(Trunk())), HALF)
    twin = copy.deepcopy(gm)
    body = twin.body
    assert isinstance(body, fx.GraphModule)
    relu = next(n for n in body.graph.nodes if n.target == "relu")
    relu.target = "sigmoid"
    body.recompile()
    with pytest.raises(ChangedModelError, match=r"body.*fx graph has changed"):
        twin(X)
    gm(X)


def test_another_graph_module_in_its_place_is_refused() -> None:
    gm = swatfx.compile(Whole(fx.symbolic_trace(Trunk())), HALF)
    gm.body = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 5)))
    with pytest.raises(ChangedModelError, match="body"):
        gm(X)


def test_a_shallow_copy_is_refused() -> None:
    gm = swatfx.compile(Trunk(), HALF)
    with pytest.raises(InputError, match="copy.deepcopy"):
        copy.copy(gm)
