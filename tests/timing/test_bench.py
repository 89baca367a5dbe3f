"""`swatfx.bench`: what it measures, that it adds up, and that it leaves the user's model alone."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx import kernels
from swatfx.errors import InputError, UnknownNameError
from swatfx.timing import BenchResult
from tests.nets.runners import check_spread, numbers
from tests.nets.saving_nets import kept_by
from tests.nets.small_nets import EagerMiddle, Residual
from tests.nets.timed_nets import Reader, with_inputs

pytestmark = pytest.mark.usefixtures("spare_time")

QUICK = {"rounds": 2, "seconds": 1e-3}
POLICY = "swat-u:0.9,period=1000"


def quick(model: nn.Module, inputs: object, policy: str = POLICY, **options: object) -> BenchResult:
    return swatfx.bench(model, inputs, policy, **(QUICK | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def residual() -> BenchResult:
    torch.manual_seed(0)
    return quick(Residual(), torch.randn(4, 3, 8, 8))


def test_forms(residual: BenchResult) -> None:
    dense = [f"{d} {f}, eager" for d in ("fp32", "bf16") for f in ("NCHW", "channels_last")]
    names = [*dense, "fp32 swat-u:0.9", "bf16 swat-u:0.9"]
    assert [form.name for form in residual.forms] == names
    assert residual.unavailable == {} and residual.rounds == 2
    assert residual.fastest_dense in dense and residual.layers_beside == residual.fastest_dense
    assert residual.fastest in names[4:] and residual.verdict.startswith(residual.fastest)
    medians = {form.name: form.seconds["median"] for form in residual.forms}
    assert residual.fastest_dense == min(dense, key=lambda name: medians[name])
    for form in residual.forms:
        check_spread(dict(form.seconds))
        check_spread(dict(form.speedup))
        if form.name == residual.fastest_dense:
            assert form.speedup["minimum"] == form.speedup["maximum"] == 1
        assert bool(form.policy) == ("swat" in form.name)


def test_kept_bytes_are_those_of_the_form() -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(4, 3, 8, 8)
    found = {form.name: form for form in quick(model, x).forms}
    for name, form in found.items():
        if form.policy:  # thresholds of earlier steps: not to the byte
            assert form.saved_bytes == pytest.approx(form.predicted_saved_bytes, rel=0.1)
            assert form.saved_bytes < found[f"{form.dtype} NCHW, eager"].saved_bytes
            continue
        twin = copy.deepcopy(model).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=form.dtype == "bf16"):
            assert form.saved_bytes == kept_by(lambda m=twin: m(x), twin), name  # type: ignore[misc]
        slack = 0.01 if form.dtype == "bf16" else 0
        assert form.saved_bytes == pytest.approx(form.predicted_saved_bytes, rel=slack)


def test_layers_and_the_rest_add_up(residual: BenchResult) -> None:
    x = torch.empty(4, 3, 8, 8, device="meta")
    dtype = next(form.dtype for form in residual.forms if form.name == residual.fastest)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):  # chooses kernels
        gm = swatfx.compile(Residual(), POLICY, example_inputs=(x,))
    known = swatfx.report(gm, x)
    assert [row.name for row in residual.layers] == [row.name for row in known.layers]
    for row, told in zip(residual.layers, known.layers, strict=True):
        assert (row.kind, row.weight_shape) == (told.kind, told.weight_shape)
        assert row.kernels == ("sparse" if told.kernels == "sparse" else "dense")
        assert bool(row.why) == (row.kernels == "dense")
        for parts in (
            (row.seconds, row.forward_seconds, row.backward_seconds),
            (row.dense_seconds, row.dense_forward_seconds, row.dense_backward_seconds),
        ):
            assert all(part is not None and part > 0 for part in parts)
            assert parts[0] == parts[1] + parts[2]  # type: ignore[operator]
    assert residual.layers[0].why == "first layer"
    assert [row.name for row in residual.rest] == [
        "all other ops, forward",
        "all other ops, backward",
        "the optimizer's step",
    ]
    shares = [row.share for row in (*residual.layers, *residual.rest)]
    assert all(share is not None and 0 <= share < 1 for share in shares)
    # Layers are watched in other steps than the whole, so they may take longer than it did.
    assert 0.95 < sum(share or 0 for share in shares) < 2


def test_what_it_is_shown_as(residual: BenchResult) -> None:
    text = residual.to_text()
    assert text.splitlines()[-1] == residual.verdict
    for said in (
        "fastest dense",
        "conv2d",
        "the whole step",
        "every 1000 steps, in none",
        "4x3x8x8",
    ):
        assert said in text or said == "conv2d"
    data = json.loads(residual.to_json())
    assert {"machine", "versions", "allocator", "forms", "layers", "rest", "verdict"} <= set(data)
    assert data["machine"]["threads"] == 1 and data["versions"]["torch"]
    assert data["period"] == 1000 and data["loss"].startswith("cross entropy")
    assert all(math.isfinite(number) for number in numbers(data))
    assert residual.to_csv().count("\n") == 1 + len(residual.layers) + len(residual.rest)
    for form in ("markdown", "html", "latex"):
        assert "block1.conv1" in residual.render(form).replace("\\_", "_")


def test_the_users_model_and_random_state_stay_as_they_are() -> None:
    model, x = Residual(dropout=0.5).eval(), torch.randn(4, 3, 8, 8, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    image, state = x.detach().clone(), torch.get_rng_state()
    with torch.no_grad():
        quick(model, x, dtypes=["fp32"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters()) and x.grad is None
    assert torch.equal(x, image) and model.stem.weight.is_contiguous()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_integer_inputs_by_name_and_attention() -> None:
    found = quick(*with_inputs(), dtypes=["fp32"])
    assert [form.name for form in found.forms] == ["fp32, eager", "fp32 swat-u:0.9"]
    assert found.inputs == ("4x6 int64", "4x6 float32")
    rows = {row.name: row for row in found.layers}
    for name in ("attention.in_proj_weight", "attention.out_proj", "wide", "head"):
        assert rows[name].seconds and rows[name].dense_seconds, name


def test_eager_code_is_watched_as_well() -> None:
    found = quick(EagerMiddle(), torch.randn(4, 3, 8, 8), dtypes=["fp32"])
    assert all(row.seconds and row.dense_seconds for row in found.layers if row.weight_shape)


class Tells(nn.Module):
    """Returns its own loss, or a sequence."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own, self.first, self.last = own, nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> object:
        y = self.last(torch.relu(self.first(x)))
        return {"loss": y.abs().mean(), "y": y} if self.own else (y, [y.detach(), None])


@pytest.mark.parametrize("own", [True, False])
def test_losses_by_what_is_returned(own: bool) -> None:
    found = quick(Tells(own), torch.randn(4, 3, 8), dtypes=["bf16"])
    text = "the loss that the model returns" if own else "the mean of the squares"
    assert found.loss.startswith(text) and text in found.to_text()


def test_a_loss_of_ones_own() -> None:
    seen = []

    def loss(output: Tensor) -> Tensor:
        seen.append(output.shape)
        return output.square().sum()

    found = quick(Residual(), torch.randn(4, 3, 8, 8), loss=loss, dtypes=["fp32"])
    assert set(seen) == {(4, 10)} and found.loss == "your own loss"


@pytest.mark.parametrize(
    ("policy", "period", "said"),
    [
        ("dense", None, "no layer is sparse"),
        ("swat-u:0.9", 1, "refreshed at every step"),
        ("swat-u:0.9,period=2", 2, "every 2 steps, in some"),
        ("rigl:0.9", 1, "refreshed at every step"),
    ],
)
def test_policies(policy: str, period: int | None, said: str) -> None:
    found = quick(Residual(), torch.randn(4, 3, 8, 8), policy, dtypes=["fp32"])
    assert found.period == period and any(said in note for note in found.notes)
    assert found.fastest == f"fp32 {policy.partition(',')[0]}"


def test_without_kernels_it_says_so() -> None:
    with kernels.reference_only():
        found = quick(Residual(), torch.randn(4, 3, 8, 8), dtypes=["fp32"])
    assert any("no compiled kernels" in note for note in found.notes)
    assert "no compiled kernels" in {row.why for row in found.layers}
    assert found.machine["swatfx_kernels"] == "reference"


def test_what_is_compiled_with_reaches_the_compiler() -> None:
    options = {"kernels": "dense"}
    found = quick(Residual(), torch.randn(4, 3, 8, 8), compile_options=options, dtypes=["fp32"])
    assert {row.why for row in found.layers} == {"first layer", "asked for"}


@pytest.mark.usefixtures("no_compiler")
def test_a_compiler_that_fails_is_named_and_left_out() -> None:
    found = quick(Residual(), torch.randn(4, 3, 8, 8), torch_compile=True, dtypes=["fp32"])
    why = "RuntimeError: no C++ compiler"
    names = ("fp32 NCHW, compiled", "fp32 channels_last, compiled")
    assert found.unavailable == dict.fromkeys(names, why)
    assert f"left out: {names[0]}: {why}" in found.to_text()
    assert not any("was not measured" in note for note in found.notes)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_torch_compile() -> None:
    found = quick(Residual(), torch.randn(4, 3, 8, 8), torch_compile=True)
    forms = {form.name: form for form in found.forms}
    assert len(forms) == 10 and found.unavailable == {}
    compiled = forms["bf16 channels_last, compiled"]
    assert compiled.compiled and compiled.saved_bytes and compiled.predicted_saved_bytes is None
    assert "compiled" not in found.layers_beside


def test_it_tells_what_it_does() -> None:
    told: list[str] = []
    quick(Residual(), torch.randn(4, 3, 8, 8), dtypes=["fp32"], tell=told.append)
    for line in (
        "preparing fp32 NCHW, eager",
        "round 1: fp32 swat-u:0.9",
        "round 2: fp32 channels_last, eager",
        "round 2: layers of fp32 swat-u:0.9",
    ):
        assert line in told


class Detached(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Uncopied(Residual):
    def __deepcopy__(self, memo: object) -> Uncopied:
        raise TypeError("no copies")


X = torch.zeros(4, 3, 8, 8)
BAD: dict[str, tuple[Callable[[], object], object, dict[str, object]]] = {
    "compiled already": (lambda: swatfx.compile(Residual(), "dense"), X, {}),
    "no parameter that trains": (lambda: Residual().requires_grad_(False), X, {}),
    "parameters without a shape": (lambda: nn.LazyConv2d(4, 3), X, {}),
    "steps are timed on CPUs": (lambda: Residual().to("meta"), X, {}),
    "does not run on the example inputs": (Residual, torch.zeros(4, 5, 8, 8), {}),
    "the loss fails": (Residual, X, {"loss": lambda output: output.no_such}),
    "one number that has a gradient": (Residual, X, {"loss": lambda output: output}),
    "no tensor that has a gradient": (Detached, X, {}),
    "cannot be copied": (Uncopied, X, {}),
    "example_inputs has to be": (Residual, "images", {}),
    "no dtype to measure": (Residual, X, {"dtypes": []}),
    "unknown dtype": (Residual, X, {"dtypes": ["fp16"]}),
    "rounds has to be": (Residual, X, {"rounds": 0}),
    "seconds has to be": (Residual, X, {"seconds": -1.0}),
    "unknown compile option": (Residual, X, {"compile_options": {"kernel": "dense"}}),
    "unknown policy": (Residual, X, {"policy": "swat"}),
    "model has to be": (lambda: "resnet50", X, {}),
}


@pytest.mark.parametrize("said", BAD)
def test_what_cannot_be_measured_is_refused(said: str) -> None:
    make, inputs, options = BAD[said]
    with pytest.raises((InputError, UnknownNameError), match=said):
        swatfx.bench(make(), inputs, **options)  # type: ignore[arg-type]


def test_a_step_that_never_runs_is_an_error() -> None:
    class Once(Reader):
        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                raise ValueError("only in fp32")
            return super().forward(ids, mask)

    ids = torch.zeros(2, 3, dtype=torch.long)
    found = quick(Once(), ids)
    assert found.unavailable["bf16, eager"] == "ValueError: only in fp32"
    with pytest.raises(InputError, match="no step of this model runs here: bf16, eager"):
        quick(Once(), ids, dtypes=["bf16"])
