"""torchvision's models: what share of their MACs is sparse, and whether they do what they did."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models as tv

import swatfx
from swatfx import models
from tests.nets.compare import (
    DENSITY_1,
    assert_matches_at_density_1,
    assert_same,
    loss_of,
    seeded,
    train_step,
)
from tests.nets.torchvision_nets import CLASSIFIERS, create, fast

torch.set_num_threads(1)
ONE_OF_EACH = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
    "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5",
    "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32", "wide_resnet50_2",
]  # fmt: skip
DETECTORS = tv.list_models(module=tv.detection)
SEGMENTERS = tv.list_models(module=tv.segmentation)


@contextmanager
def uninitialised() -> Iterator[None]:
    """Skip weight initialisation: what is counted does not depend on it."""
    kept = {name: getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_")}
    kept = {name: f for name, f in kept.items() if callable(f) and not name.startswith("_")}
    try:
        for name in kept:
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        for name, function in kept.items():
            setattr(nn.init, name, function)


def counted_macs(model: nn.Module, *args: Any) -> int:
    """Forward MACs of convolutions and linear layers, by torch's own count."""
    aten = torch.ops.aten
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args)
    flops: dict[Any, int] = counter.get_flop_counts()["Global"]
    return sum(flops.get(op, 0) for op in (aten.convolution, aten.addmm, aten.mm)) // 2


def sparse_share(model: nn.Module, *args: Any) -> float:
    """MACs of the sparse ops over MACs of all conv and linear layers but the dense first one."""
    total = counted_macs(model, *args)
    gm = swatfx.compile(model, swatfx.swat_u(0.9))
    rows = swatfx.report(gm, args).layers
    layers = [row for row in rows if row.kind.startswith(("conv", "linear"))]  # no bare products
    assert {layer.skipped for layer in layers} == {None, "first layer"}
    first = sum(layer.dense_forward_macs for layer in layers if layer.skipped)
    return sum(layer.dense_forward_macs for layer in layers if not layer.skipped) / (total - first)


@pytest.mark.parametrize(
    "name",
    [n if n in ONE_OF_EACH else pytest.param(n, marks=pytest.mark.slow) for n in CLASSIFIERS],
)
def test_at_least_95_percent_of_the_macs_are_sparse(name: str) -> None:
    with uninitialised():
        model = create(name).to("meta")
    x = torch.empty(2, *models.default_input_shape(name), device="meta")
    assert 0.95 <= sparse_share(model, x) <= 1.0


def tiny(name: str) -> tuple[nn.Module, int]:
    """A small relative of a family, and an image size for it."""
    classes: Any = {"num_classes": 10}
    builders: dict[str, Any] = {
        "convnext": lambda: tv.ConvNeXt(
            [tv.convnext.CNBlockConfig(8, 16, 2), tv.convnext.CNBlockConfig(16, None, 1)],
            stochastic_depth_prob=0.4,
            **classes,
        ),
        "densenet": lambda: tv.DenseNet(8, (2, 2), 16, drop_rate=0.2, **classes),
        "maxvit": lambda: tv.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 8, 0.4, **classes),
        "swin": lambda: tv.SwinTransformer(
            [4, 4], 16, [2, 2], [2, 4], [3, 3], stochastic_depth_prob=0.4, dropout=0.1, **classes
        ),
        "swin_v2": lambda: tv.SwinTransformer(
            [4, 4], 16, [2, 2], [2, 4], [3, 3], block=tv.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=tv.swin_transformer.PatchMergingV2, **classes,
        ),
        "vit": lambda: tv.VisionTransformer(32, 8, 2, 4, 32, 64, 0.2, 0.2, **classes),
    }  # fmt: skip
    if name in builders:
        return builders[name](), 32
    return create(name, num_classes=10), 64


@pytest.mark.parametrize(
    "name",
    [
        "convnext", "densenet", "efficientnet_b0", "googlenet", "maxvit", "mnasnet0_5",
        "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
        "swin", "swin_v2", "vit",
    ],
)  # fmt: skip
def test_one_of_each_family_matches_at_density_1_and_trains(name: str) -> None:
    model, side = tiny(name)
    x = torch.randn(2, 3, side, side)
    gm = assert_matches_at_density_1(model, x, rtol=1e-2)
    assert set(gm.eager) == ({""} if name == "googlenet" else set())
    sparse = swatfx.compile(model, swatfx.swat_u(0.9))
    assert train_step(sparse, x).isfinite()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_matches_at_density_1_and_trains(name: str) -> None:
    options = {"image_size": 56 if name == "vit_h_14" else 64} if name.startswith("vit") else {}
    side = options.get("image_size") or {"inception_v3": 299, "maxvit_t": 224}.get(name, 64)
    with uninitialised():
        model = create(name, **options)
    with torch.no_grad():
        for p in model.parameters():  # in no time, and of a size that stays finite
            p.copy_(torch.rand(1).expand_as(p) * 0.02) if p.dim() < 2 else p.uniform_(-0.05, 0.05)
    x = torch.randn(2, 3, side, side)
    for traced_in_training in (True, False):
        model.train(traced_in_training)
        gm = swatfx.compile(model, DENSITY_1)
        for training in (True, False):
            gm.train(training)
            model.train(training)
            with torch.set_grad_enabled(not name.startswith(("vit", "regnet_y_128"))):
                expected = seeded(model, (x,), {})
                got = seeded(gm, (x,), {})
            if training or not name.startswith("vit"):
                assert_same(got, expected)
            del expected, got
    gm = swatfx.compile(model.train(), swatfx.swat_u(0.9))
    loss_of(gm(x)).backward()
    assert all(p.grad is not None for p in model.parameters())
    del gm, model
    gc.collect()


def detection_batch(name: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 20.0, 60.0, 46.0]])
    labels = torch.tensor([1, 1] if name.startswith("keypoint") else [1, 2])
    masks = [torch.ones(2, *image.shape[1:], dtype=torch.uint8) for image in images]
    points = torch.full((2, 17, 3), 20.0)
    keys = {"boxes": boxes, "labels": labels, "keypoints": points}
    return images, [keys | {"masks": mask} for mask in masks]


@pytest.mark.parametrize(
    "name",
    fast(DETECTORS, {"fasterrcnn_mobilenet_v3_large_320_fpn"}),
)
def test_detectors_through_the_fallback(name: str) -> None:
    size: Any = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    model = tv.get_model(name, weights=None, weights_backbone=None, **size)
    images, targets = detection_batch(name)
    keys = list(model.state_dict())
    for policy in (DENSITY_1, swatfx.swat_u(0.9)):
        gm = swatfx.compile(model, policy)
        assert "control flow on self.training" in gm.eager[""]
        assert [key for key in gm.state_dict() if not key.startswith("swat.")] == keys
        gm.train()
        losses = seeded(gm, (images, targets), {})
        if policy is DENSITY_1:
            assert_same(losses, seeded(model.train(), (images, targets), {}))
        loss_of(losses).backward()
        gm.eval()
        detections = seeded(gm, (images,), {})
        if policy is DENSITY_1:
            assert_same(detections, seeded(model.eval(), (images,), {}))
    layers = swatfx.report(gm, (images, targets)).layers
    reasons = {layer.skipped for layer in layers}
    assert reasons <= {None, "first layer", "transposed convolution"}
    assert sum(layer.skipped is None for layer in layers) >= len(layers) - 3
    first = [layer for layer in layers if layer.skipped == "first layer"]
    assert len(first) == 1 and first[0].name.startswith("backbone")


@pytest.mark.parametrize("name", fast(SEGMENTERS, {"lraspp_mobilenet_v3_large"}))
def test_segmentation(name: str) -> None:
    model = models.create(name)
    gm = assert_matches_at_density_1(model, torch.randn(2, 3, 64, 64), rtol=1e-2)
    assert not gm.eager
    assert sparse_share(model, torch.randn(2, 3, 64, 64)) >= 0.95


@pytest.mark.parametrize("name", ["resnet18", "swin", "vit"])
def test_one_graph_for_torch_compile(name: str) -> None:
    model, side = tiny(name)
    for module in model.modules():  # compiled code draws random numbers in another order
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    x = torch.randn(2, 3, side, side)
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        gm = swatfx.compile(copy.deepcopy(model), swatfx.swat_u(0.5)).train()
        step = torch.compile(gm, fullgraph=True, backend="aot_eager") if compiled else gm
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(step(x))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        runs.append([*losses, *gm.state_dict().values()])
    assert_same(runs[1], runs[0])
