"""Networks by name: the paper's exact variants, shapes, traceability and errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swatfx import models
from swatfx.errors import UnknownNameError

# name, parameters, convolutions, convolutions with a bias
PAPER = [
    ("cifar/vgg16", 33_646_666, 13, 13),
    ("cifar/wrn-16-8", 10_961_370, 16, 0),
    ("cifar/wrn-28-10", 36_479_194, 28, 0),
    ("cifar/densenet121", 6_956_298, 120, 0),
    ("cifar/resnet18", 11_178_762, 20, 20),
    ("cifar/resnet50", 23_547_402, 53, 53),
    ("cifar/resnet101", 42_565_642, 104, 104),
    ("resnet50", 25_557_032, 53, 0),
    ("wide_resnet50_2", 68_883_240, 53, 0),
    # not in the paper; counted by hand
    ("cifar/resnet20", 272_474, 21, 0),
    ("cifar/resnet32", 466_906, 33, 0),
    ("cifar/resnet32x2", 1_860_522, 33, 0),
    ("digits/cnn", 65_834, 4, 0),
]
OWN = [row[0] for row in PAPER if "/" in row[0]]


def _meta(name: str, num_classes: int | None = None) -> nn.Module:
    """Build a network on the meta device: shapes without memory or arithmetic."""
    with torch.device("meta"):
        return models.create(name, num_classes=num_classes)


def _inputs(name: str, batch: int, device: str) -> torch.Tensor:
    return torch.randn(batch, *models.default_input_shape(name), device=device)


def _convs(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(("name", "parameters", "convolutions", "biased"), PAPER)
def test_counts(name: str, parameters: int, convolutions: int, biased: int) -> None:
    model = _meta(name)
    convs = _convs(model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(convs) == convolutions
    assert sum(conv.bias is not None for conv in convs) == biased


@pytest.mark.parametrize("name", OWN)
def test_traces_and_keeps_the_output_shape(name: str) -> None:
    model = _meta(name)
    traced = torch.fx.symbolic_trace(model)
    x = _inputs(name, 2, "meta")
    assert model(x).shape == traced(x).shape == (2, 10)
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    kinds = nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.ReLU | nn.Dropout
    # each leaf is a node of its own, called once
    assert {path for path, module in model.named_modules() if isinstance(module, kinds)} <= called
    assert len(called) == sum(node.op == "call_module" for node in traced.graph.nodes)


@pytest.mark.parametrize("name", ["cifar/resnet20", "digits/cnn"])
def test_traced_network_equals_the_original_in_both_modes(name: str) -> None:
    torch.manual_seed(0)
    model = models.create(name)
    traced = torch.fx.symbolic_trace(model)
    x = _inputs(name, 2, "cpu")
    for training in (True, False):
        assert torch.equal(model.train(training)(x), traced.train(training)(x))


def test_dropout_of_a_traced_network_follows_eval() -> None:
    torch.manual_seed(0)
    traced = torch.fx.symbolic_trace(models.create("cifar/vgg16")).eval()
    x = _inputs("cifar/vgg16", 1, "cpu")
    assert torch.equal(traced(x), traced(x))


@pytest.mark.parametrize(("name", "rate"), [("cifar/vgg16", 0.5), ("cifar/wrn-16-8", 0.3)])
def test_dropout_rate(name: str, rate: float) -> None:
    def rates(model: nn.Module) -> set[float]:
        return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}

    with torch.device("meta"):
        assert rates(models.create(name)) == {rate}
        assert rates(models.create(name, dropout=0.0)) == {0.0}


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = models.create("digits/cnn")
    logits = model(_inputs("digits/cnn", 4, "cpu"))
    torch.autograd.backward(nn.functional.cross_entropy(logits, torch.arange(4)))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_convolutions_start_at_he_normal() -> None:
    torch.manual_seed(0)
    model = models.create("cifar/resnet18")
    for conv in _convs(model):
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        assert conv.bias is not None
        assert not conv.bias.any()


def test_wide_resnet_shortcut_reads_the_rectified_input() -> None:
    graph = torch.fx.symbolic_trace(_meta("cifar/wrn-16-8")).graph
    read = {n.target: n.args[0] for n in graph.nodes if n.op == "call_module"}
    for layer in ("layer1", "layer2", "layer3"):
        shortcut, first = read[f"{layer}.0.shortcut"], read[f"{layer}.0.conv1"]
        assert shortcut is first
        assert isinstance(shortcut, torch.fx.Node)
        assert shortcut.target == f"{layer}.0.relu1"


@pytest.mark.parametrize("name", [*OWN, "squeezenet1_1", "resnet18"])
def test_num_classes_changes_the_classifier_only(name: str) -> None:
    before = {key: value.shape for key, value in _meta(name).state_dict().items()}
    after = {key: value.shape for key, value in _meta(name, 100).state_dict().items()}
    assert before.keys() == after.keys()
    changed = [key for key in before if before[key] != after[key]]
    assert changed == list(before)[-2:]
    assert all(after[key][0] == 100 and after[key][1:] == before[key][1:] for key in changed)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_torchvision_classifiers(name: str) -> None:
    model = _meta(name)
    assert model.eval()(_inputs(name, 2, "meta")).shape == (2, 1000)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_warn_by_default_are_built_in_silence(
    name: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = _meta(name)
    assert not recwarn.list
    assert model.eval()(_inputs(name, 2, "meta")).shape == (2, 1000)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_pretrained_weights_remain_the_callers_choice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def ask(*args: object, **kwargs: object) -> None:
        raise Asked

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", ask)
    with pytest.raises(Asked):
        models.create(name, weights="DEFAULT")


def test_segmentation_downloads_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"download of {args}")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    name = "lraspp_mobilenet_v3_large"
    model = _meta(name, 5)
    side = models.default_input_shape(name)[1]
    assert model.eval()(_inputs(name, 1, "meta"))["out"].shape == (1, 5, side, side)


def test_names() -> None:
    listed = models.names()
    assert set(listed[: len(OWN)]) == set(OWN)
    assert {"resnet50", "wide_resnet50_2", "vit_b_16"} <= set(listed)
    assert len(set(listed)) == len(listed)
    assert "fcn_resnet50" not in listed
    listed.clear()
    assert models.names()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, (3, 32, 32)) for name in OWN if name.startswith("cifar/")),
        ("digits/cnn", (1, 8, 8)),
        ("inception_v3", (3, 299, 299)),
        ("resnet50", (3, 224, 224)),
        ("fcn_resnet50", (3, 224, 224)),
    ],
)
def test_default_input_shape(name: str, shape: tuple[int, ...]) -> None:
    assert models.default_input_shape(name) == shape


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("cifar/resnet19", "cifar/resnet18"),
        ("resnet5O", "resnet50"),
        ("cifar/vgg-16", "cifar/vgg16"),
    ],
)
def test_unknown_name_is_an_error_with_the_nearest_names(wrong: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        models.create(wrong)
    assert wrong in str(caught.value)
    assert nearest in str(caught.value)
    with pytest.raises(UnknownNameError):
        models.default_input_shape(wrong)


def test_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="drop_rate"):
        models.create("cifar/resnet20", drop_rate=0.1)
