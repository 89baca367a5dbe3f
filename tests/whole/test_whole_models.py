"""Whole models where the sparse kernels really run: batch 16, kernels="sparse"."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from tests.nets.compare import loss_of
from tests.nets.torchvision_nets import CLASSIFIERS, create, fast

torch.set_num_threads(1)
ALL_DENSE = swatfx.swat_u(0.0, first_dense=False)
TIMM = [
    "resnet10t", "resnet26d", "resnetv2_50", "seresnet50", "ecaresnet26t", "skresnet18",
    "resnest14d", "res2net50_26w_4s", "resnext26ts", "regnetx_002", "regnety_002", "regnetz_b16",
    "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mnasnet_small",
    "efficientnet_b0", "efficientnet_lite0", "efficientnetv2_rw_t", "tf_efficientnetv2_b0",
    "fbnetc_100", "fbnetv3_b", "spnasnet_100", "hardcorenas_a", "tinynet_e", "lcnet_035",
    "ghostnet_050", "ghostnetv2_100", "mixnet_s", "semnasnet_075", "rexnet_100", "densenet121",
    "dla34", "dla46_c", "vovnet39a", "ese_vovnet19b_dw", "cspresnet50", "cspdarknet53",
    "darknet17", "gernet_s", "repvgg_a0", "repghostnet_050", "hrnet_w18_small", "selecsls42",
    "nf_regnet_b0", "dm_nfnet_f0", "eca_nfnet_l0", "vgg11", "vgg11_bn", "convnext_atto",
    "convnextv2_atto", "edgenext_xx_small", "inception_next_atto", "starnet_s1", "fasternet_t0",
    "mobileone_s0", "hgnetv2_b0", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "pit_ti_224",
]  # fmt: skip
IN_PLACE: dict[str, Any] = {
    "relu": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(inplace=True),
    "hardswish": nn.Hardswish(inplace=True),
    "hardsigmoid": nn.Hardsigmoid(inplace=True),
    "hardtanh": nn.Hardtanh(inplace=True),
    "silu": nn.SiLU(inplace=True),
    "mish": nn.Mish(inplace=True),
    "elu": nn.ELU(inplace=True),
    "selu": nn.SELU(inplace=True),
    "celu": nn.CELU(inplace=True),
    "leaky_relu": nn.LeakyReLU(0.1, inplace=True),
    "rrelu": nn.RReLU(0.2, 0.2, inplace=True),
    "threshold": nn.Threshold(0.1, 0.2, inplace=True),
    "dropout": nn.Dropout(0.0, inplace=True),
}
LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(24, 24), (16, 24)),
    "linear of rows": (lambda: nn.Linear(24, 24), (16, 5, 24)),
    "conv1d": (lambda: nn.Conv1d(24, 24, 3, padding=1), (16, 24, 9)),
    "conv2d": (lambda: nn.Conv2d(24, 24, 3, padding=1), (16, 24, 5, 6)),
    "pointwise": (lambda: nn.Conv2d(24, 24, 1, bias=False), (16, 24, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(24, 24, 3, padding=1, groups=24), (16, 24, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(24, 24, 1), (16, 24, 2, 3, 4)),
}


def assert_near(got: Tensor | None, want: Tensor | None, scale: float, what: str) -> None:
    """Equal but for the rounding of sums, of which `scale` is the size."""
    assert (got is None) == (want is None), what
    if got is not None and want is not None:
        error = float((got.detach().double() - want.detach()).abs().max())
        assert error <= 1e-4 * max(scale, float(want.abs().max()), 1e-6), f"{what}: {error:.2g}"


def assert_near_eager(model: nn.Module, x: Tensor) -> None:
    """At density 1 on sparse kernels, values and gradients are those of plain double precision."""
    gm = swatfx.compile(copy.deepcopy(model), ALL_DENSE, kernels="sparse")
    wide = copy.deepcopy(model).double()
    got, want = gm(x), wide(x.double())
    assert_near(got, want.detach(), 0.0, "output")
    loss_of(got).backward()
    want.square().mean().backward()
    mine = {name: p.grad for name, p in gm.named_parameters() if not name.startswith("swat.")}
    grads = {name: p.grad for name, p in wide.named_parameters()}
    largest = max(float(g.abs().max()) for g in grads.values() if g is not None)
    for name, grad in grads.items():
        assert_near(mine[name], grad, largest, name)


def assert_trains(model: nn.Module, x: Tensor) -> None:
    """A step at 90% sparsity, on sparse kernels where they can run; then an evaluation."""
    gm = swatfx.compile(model, swatfx.swat_u(0.9), kernels="sparse")
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-4)
    loss = loss_of(gm(x))
    loss.backward()
    assert loss.isfinite()
    grads = [p.grad for p in gm.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)
    optimizer.step()
    with torch.no_grad():
        assert loss_of_values(gm.eval()(x)).isfinite()


def loss_of_values(y: Any) -> Tensor:
    return y.square().mean() if isinstance(y, Tensor) else y[0].square().mean()


@pytest.mark.parametrize("activation", IN_PLACE)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_in_place_activation_behind_every_layer(layer: str, activation: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    step = copy.deepcopy(IN_PLACE[activation])
    model = nn.Sequential(build(), step, build(), copy.deepcopy(step))
    x = torch.randn(shape)
    assert_near_eager(model, x)
    assert_trains(model, x)


@pytest.mark.parametrize("name", fast(CLASSIFIERS, {"mobilenet_v3_small", "squeezenet1_1"}))
def test_every_classifier_trains_on_sparse_kernels(name: str) -> None:
    side = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 224}.get(name, 64)
    side = 224 if name.startswith("vit") else side
    torch.manual_seed(0)
    assert_trains(create(name), torch.randn(16, 3, side, side))


@pytest.mark.parametrize("name", fast(TIMM, {"lcnet_035"}))
def test_timm_trains_on_sparse_kernels(name: str) -> None:
    timm = pytest.importorskip("timm")
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    size = 224 if name.startswith(("vit", "deit", "pit")) else 64
    assert_trains(model, torch.randn(16, 3, size, size))
