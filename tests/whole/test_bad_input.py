"""Bad input: an error that names the layer, the value and the remedy, and nothing changed."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import swatfx
from swatfx import selectors
from swatfx.compiled.module import SwatModule
from swatfx.costs.simulation import simulate
from swatfx.errors import InputError, PassError, PolicyError, SwatError, UnknownNameError
from tests.nets.small_nets import (
    EagerMiddle,
    Residual,
    TwoInputs,
    assert_same,
    batches,
    plain,
    sgd,
    snapshot,
    train,
)


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, float("nan"), float("inf"), "0.5", True])
@pytest.mark.parametrize("make", [swatfx.swat_u, swatfx.swat_erk, swatfx.swat_m, swatfx.meprop])
def test_sparsity_outside_its_range(make: Callable[..., Any], sparsity: Any) -> None:
    with pytest.raises(PolicyError, match=r"sparsity must be a number in \[0, 1\).*got") as caught:
        make(sparsity)
    assert "0.9 keeps a tenth" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_sparsity": 1.0}, r"activation_sparsity must be.*got 1\.0"),
        ({"period": 0}, r"period must be a whole number.*got 0.*period=1"),
        ({"period": 2.5}, r"period must be a whole number.*2\.5"),
        ({"redistribute_every": -1}, "redistribute_every"),
        ({"update": "some"}, "'all' or 'active'.*some"),
        ({"first_dense": "no"}, r"first_dense must be true or false.*no"),
        ({"global_threshold": 1}, r"global_threshold must be true or false"),
    ],
)
def test_fields_that_take_other_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        swatfx.swat_u(0.9, **options)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("swat-v:0.9", UnknownNameError, r"unknown policy.*'swat-v'.*did you mean.*swat-"),
        ("swat-u", PolicyError, r'wants a sparsity.*"swat-u:0\.9"'),
        ("swat-u:nine", PolicyError, r"number in \[0, 1\).*nine"),
        ("swat-u:1.0", PolicyError, r"number in \[0, 1\)"),
        ("swat-u:0.9,perod=3", UnknownNameError, r"policy field.*perod.*did you mean period"),
        ("swat-u:0.9,period", PolicyError, "policy field .period. is given no value"),
        ("swat-u:0.9,period=often", PolicyError, "period.*often"),
        ("swat-u:0.9,first_dense=maybe", PolicyError, "first_dense must be true or false.*maybe"),
        ("dense:0.5", PolicyError, "takes no sparsity"),
        ("swat-erk:0.9,distribution=er", PolicyError, "does not take this.*distribution"),
        ("", UnknownNameError, "unknown policy"),
    ],
)
def test_policy_strings(text: str, error: type[SwatError], message: str) -> None:
    with pytest.raises(error, match=message):
        swatfx.compile(plain(), text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_selector": "chanel"}, UnknownNameError, "selector.*chanel.*did you mean channel"),
        ({"activation_selector": "nhcw"}, UnknownNameError, "did you mean nchw"),
        ({"distribution": "erq"}, UnknownNameError, "distribution.*erq.*did you mean er"),
        ({"activation_selector": "filter"}, PolicyError, "weights only.*filter.*nchw"),
        ({"weight_selector": "2:4"}, PolicyError, r"layer '2'.*2/4.*sparsity 0\.9.*sparsity 0\.5"),
        (
            {"global_threshold": True, "activation_selector": "chw"},
            PolicyError,
            "one threshold a tensor.*chw.*nchw",
        ),
    ],
)
def test_policies_that_do_not_fit(
    options: dict[str, Any], error: type[SwatError], message: str
) -> None:
    model = plain()
    before, keys = snapshot(model), list(model.state_dict())
    with pytest.raises(error, match=message):
        swatfx.compile(model, swatfx.swat_u(0.9, **options))
    assert_same(snapshot(model), before)
    assert list(model.state_dict()) == keys


def test_pattern_that_matches_nothing() -> None:
    with pytest.raises(PolicyError, match=r"matches no layer.*'conv\*'.*layers are called 0, 2, 5"):
        swatfx.compile(plain(), swatfx.per_layer({"2": "swat-u:0.5", "conv*": "swat-u:0.9"}))


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.BatchNorm2d(3), nn.Identity()])
def test_nothing_to_sparsify(model: nn.Module) -> None:
    with pytest.raises(InputError, match=r"nothing to sparsify.*no conv or linear.*'dense'"):
        swatfx.compile(model, "swat-u:0.9")
    swatfx.compile(model, "dense")


def test_only_a_first_layer_to_sparsify() -> None:
    with pytest.raises(InputError, match=r"nothing to sparsify.*first layer.*first_dense=False"):
        swatfx.compile(nn.Sequential(nn.Linear(3, 3)), "swat-u:0.9")


def test_what_is_no_model() -> None:
    gm = swatfx.compile(plain(), "swat-u:0.9")
    cases: list[tuple[Any, Any, str]] = [
        (gm, "swat-u:0.9", "compiled already"),
        (lambda x: x, "swat-u:0.9", "wants a torch.nn.Module.*function"),
        (nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), "swat-u:0.9", "layer '0'.*lazy"),
        (plain(), 0.9, r"swatfx\.Policy or a string.*0\.9"),
        (nn.ModuleDict({"swat": nn.Linear(2, 2)}), "swat-u:0.9", "child named 'swat'.*rename"),
    ]
    for model, policy, message in cases:
        with pytest.raises(SwatError, match=message):
            swatfx.compile(model, policy)
    with pytest.raises(InputError, match="too many positional arguments.*2 by position"):
        x = torch.zeros(1, 3, 8, 8)
        swatfx.compile(Residual(), "swat-u:0.9", example_inputs=(x, x))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), [4, 8], torch.Size([7])])
def test_a_shape_is_no_example_input(shape: Any, tmp_path: pathlib.Path) -> None:
    gm = swatfx.compile(plain(), "swat-u:0.9")
    calls: list[Callable[[], Any]] = [
        lambda: swatfx.report(gm, shape),
        lambda: swatfx.export(gm, tmp_path / "a.pt2", shape),
        lambda: swatfx.compile(plain(), "swat-u:0.9", example_inputs=shape),
        lambda: swatfx.compare(plain, ["dense"], shape),
        lambda: simulate(gm, shape, ["ideal"]),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"a shape.*torch\.empty") as said:
            call()
        assert repr(shape) in str(said.value)
    assert not list(tmp_path.iterdir())


class Holder(nn.Module):
    """A part, by this name, and a layer of its own."""

    def __init__(self, name: str, part: nn.Module) -> None:
        super().__init__()
        self.add_module(name, part)
        self.name = name
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.get_submodule(self.name)(x))
        return result


def _compiled_part() -> SwatModule:
    return swatfx.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "swat-u:0.5")


def _distributed(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module)


def _torch_compiled(module: nn.Module) -> nn.Module:
    wrapped = torch.compile(module, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


@pytest.fixture
def one_rank() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "DistributedDataParallel": (_distributed, "module"),
    "OptimizedModule": (_torch_compiled, "_orig_mod"),
    "AveragedModel": (AveragedModel, "module"),
}


def _refused(model: nn.Module, message: str) -> None:
    before, children = snapshot(model), dict(model.named_modules())
    with pytest.raises(InputError, match=message):
        swatfx.compile(model, "swat-u:0.9")
    assert_same(snapshot(model), before)
    assert dict(model.named_modules()) == children


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.usefixtures("one_rank")
def test_a_compiled_part_is_refused_by_name_in_whatever_wrapper(name: str) -> None:
    wrap, child = WRAPPERS[name]
    _refused(wrap(_compiled_part()), f"^the model is compiled already .*{name}.*made from")
    remedy = r"whole model once.*swatfx\.per_layer"
    inside = rf"'body\.{child}': is compiled already, inside {name}\. .*{remedy}"
    _refused(Holder("body", wrap(_compiled_part())), inside)


@pytest.mark.usefixtures("one_rank")
def test_a_compiled_part_is_refused_by_name() -> None:
    remedy = r"whole model once.*swatfx\.per_layer"
    _refused(Holder("body", _compiled_part()), rf"'body': is compiled already\. .*{remedy}")
    _refused(Holder("module", _compiled_part()), r"'module': is compiled already\. ")
    twice = _distributed(_torch_compiled(_compiled_part()))
    inside = r"'body\.module\._orig_mod': is compiled already, inside DistributedDataParallel\. "
    _refused(Holder("body", twice), inside)
    parts = nn.ModuleList([_compiled_part(), _compiled_part()])
    _refused(Holder("parts", parts), r"'parts\.0': is compiled already, and likewise parts\.1\. ")


def test_plain_modules_are_not_compiled_models() -> None:
    calls: list[Callable[[nn.Module], Any]] = [
        lambda m: swatfx.report(m, _meta(1, 3, 8, 8)),
        lambda m: swatfx.save(m, "never"),
        lambda m: swatfx.attach(m, sgd(m)),
        swatfx.refresh,
        swatfx.dense_state_dict,
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"not a compiled model.*Sequential.*swatfx\.compile"):
            call(plain())


def test_report_wants_inputs_that_fit() -> None:
    gm = swatfx.compile(Residual(), "swat-u:0.9")
    before = snapshot(gm)
    with pytest.raises(InputError, match=r"wants example inputs.*torch\.empty"):
        swatfx.report(gm)
    for make in (_meta, torch.zeros):
        with pytest.raises(InputError, match=r"layer 'stem'.*do not fit.*\(2, 4, 8, 8\).*check"):
            swatfx.report(gm, make(2, 4, 8, 8))
        with pytest.raises(InputError, match="arguments"):
            swatfx.report(gm, (make(2, 3, 8, 8), make(1)))
        with pytest.raises(InputError, match="example inputs are a tensor"):
            swatfx.report(gm, ())
    with pytest.raises(InputError, match="accounting.*'rough'"):
        swatfx.report(gm, _meta(2, 3, 8, 8), accounting="rough")
    with pytest.raises(InputError, match=r"activation_floor.*1\.0"):
        swatfx.report(gm, _meta(2, 3, 8, 8), activation_floor=1.0)
    assert_same(snapshot(gm), before)


def test_report_names_the_layer_in_the_middle() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3))
    gm = swatfx.compile(net, "swat-u:0.9")
    with pytest.raises(InputError, match=r"layer '3'.*\(1, 144\)"):
        swatfx.report(gm, _meta(1, 3, 8, 8))
    gm = swatfx.compile(TwoInputs(), "swat-u:0.9")
    with pytest.raises(InputError, match=r"layer 'vector'"):
        swatfx.report(gm, (_meta(1, 3, 8, 8), _meta(1, 6)))


def test_data_dependent_models_want_real_inputs_to_report() -> None:
    gm = swatfx.compile(EagerMiddle(), "swat-u:0.9")
    with pytest.raises(InputError, match="real inputs, not meta"):
        swatfx.report(gm, _meta(1, 3, 8, 8))
    assert swatfx.report(gm, torch.randn(1, 3, 8, 8)).layers


def test_wrong_shapes_while_training_are_eagers_error() -> None:
    gm = swatfx.compile(plain(), "swat-u:0.9")
    with pytest.raises(RuntimeError, match="channels"):
        gm(torch.zeros(2, 4, 8, 8))


def test_nan_weights() -> None:
    model = plain()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layer '2'.*NaN in the weight.*1 NaN of 576.*\w"):
        swatfx.compile(model, "swat-u:0.9")


def test_nan_on_refresh_changes_no_threshold() -> None:
    gm = swatfx.compile(plain(), swatfx.swat_u(0.9, first_dense=False))
    with torch.no_grad():
        gm.get_parameter("0.weight").mul_(2)
        gm.get_parameter("5.weight")[0, 0] = float("nan")
    before = snapshot(gm)
    with pytest.raises(InputError, match="layer '5'.*NaN"):
        swatfx.refresh(gm)
    with pytest.raises(InputError, match="layer '5'.*NaN"):
        swatfx.export(gm, "never.pt2", torch.zeros(2, 3, 8, 8))
    for name, value in snapshot(gm).items():
        assert torch.equal(value.nan_to_num(9.0), before[name].nan_to_num(9.0)), name


@pytest.mark.parametrize("policy", ["swat-u:0.9", "swat-u:0.9,activation_selector=chw"])
def test_nan_activations_name_the_layer(policy: str) -> None:
    gm = swatfx.compile(plain(), policy)
    optimizer = sgd(gm)
    train(gm, optimizer, batches(1))
    weights = snapshot(gm)
    with torch.no_grad():
        bad = batches(1)[0]
        bad[0, 0, 0, 0] = float("nan")
    optimizer.zero_grad()
    with pytest.raises(InputError, match=r"layer '2'.*NaN in the input activation.*learning rate"):
        gm(bad)
    for name, p in gm.named_parameters():
        assert torch.equal(p, weights[name]) and p.grad is None
    train(gm, optimizer, batches(1))  # and training can go on


def test_nan_between_refreshes_reaches_the_loss_and_infinity_is_kept() -> None:
    gm = swatfx.compile(plain(), "swat-u:0.9,period=2")
    gm(batches(1)[0])
    bad = batches(1)[0]
    bad[0, 0, 0, 0] = float("nan")
    assert gm(bad).isnan().any()
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    gm = swatfx.compile(net, "swat-u:0.8")
    rows = torch.randn(4, 8)
    rows[0, 0] = float("inf")
    gm(rows).sum().backward()  # a GradScaler will skip this step
    assert not torch.isfinite(net[2].weight.grad).all()


def test_complex_tensors() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.complex64) for _ in range(2)))
    with pytest.raises(InputError, match=r"layer '1'.*complex weight.*complex64.*per_layer"):
        swatfx.compile(model, "swat-u:0.9")

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.complex(self.a(x), x))

    gm = swatfx.compile(Cast(), "swat-u:0.9")
    with pytest.raises(InputError, match=r"layer 'b'.*complex input activation.*per_layer"):
        gm(torch.randn(2, 4))


def test_failing_pass_is_named() -> None:
    def break_things(gm: SwatModule, ctx: Any) -> Any:
        raise ZeroDivisionError("by zero\nsecond line")

    with pytest.raises(PassError, match="pass break_things: ZeroDivisionError: by zero") as caught:
        swatfx.compile(plain(), "swat-u:0.9", passes=[break_things])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_every_error_is_one_line() -> None:
    for make in (
        lambda: selectors.get("nchww"),
        lambda: swatfx.compile(plain(), "swat-u:0.9,weight_selector=3:2"),
        lambda: swatfx.swat_u(2),
        lambda: swatfx.compile(nn.ReLU(), "swat-u:0.5"),
        lambda: swatfx.report(swatfx.compile(plain(), "swat-u:0.5"), torch.zeros(1, 4, 8, 8)),
        lambda: swatfx.compile(plain(), "swat-u:0.5")(torch.full((1, 3, 8, 8), float("nan"))),
    ):
        with pytest.raises(SwatError) as caught:
            make()
        assert "\n" not in str(caught.value) and not str(caught.value).startswith(("'", '"'))


def test_errors_are_also_the_builtin_kind() -> None:
    for make, kind in (
        (lambda: swatfx.swat_u(2), ValueError),
        (lambda: selectors.get("x"), KeyError),
        (lambda: swatfx.save(swatfx.compile(plain(), "dense"), "/nonexistent/a"), RuntimeError),
    ):
        with pytest.raises(kind):
            make()


_OWN_NAMES = ["parts", "eager", "meta", "graph", "code", "recompile", "attachment", "pass_records"]


class _Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.first = nn.Linear(8, 8)
        self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        second = self._modules[self.name]
        assert second is not None
        result: Tensor = second(torch.relu(self.first(x)))
        return result


@pytest.mark.parametrize("name", _OWN_NAMES)
def test_a_name_that_a_compiled_model_has_itself(name: str) -> None:
    with pytest.raises(InputError, match=f"named '{name}'"):
        swatfx.compile(_Named(name), "swat-u:0.5")


@pytest.mark.parametrize("name", [*_OWN_NAMES, "ways", "swat"])
def test_a_buffer_of_such_a_name(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.register_buffer(name, torch.ones(8))
    with pytest.raises(InputError, match=f"named '{name}'"):
        swatfx.compile(model, "swat-u:0.5")


@pytest.mark.parametrize("name", _OWN_NAMES)
def test_below_the_root_such_names_are_as_good_as_any(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_Named(name))
    gm = swatfx.compile(model, "swat-u:0")
    x = torch.randn(4, 8)
    assert torch.equal(gm(x), model(x))
    gm(x).sum().backward()
    assert all(p.grad is not None for p in gm.parameters())
