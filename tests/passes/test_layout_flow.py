"""The graph's memory order: what is converted where, and that nothing else changes."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from passes.choose_kernels import choose_kernels
from swatfx import kernels
from swatfx.compiled.module import SwatModule
from swatfx.compiled.parts import all_parts
from swatfx.passing import Context
from swatfx.policy import as_policy
from swatfx.tensors import layouts
from tests.nets.kernel_nets import (
    NETS,
    Island,
    assert_equal_training,
    block,
    chain,
    chosen,
    conversions,
    ending,
    pair,
    residual,
)
from tests.nets.places import GOLDEN
from tests.nets.small_nets import batches, loss_of

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
IN, OUT = layouts.BATCH_INNERMOST, layouts.ROW_MAJOR


@pytest.mark.parametrize("batch", [1, 3, 16, 17, 32])
@pytest.mark.parametrize("name", NETS)
def test_training_equals_dense_kernels(name: str, batch: int) -> None:
    sparse, dense = pair(NETS[name])
    data = batches(3, batch, seed=batch)
    assert_equal_training(sparse, dense, data)
    assert_equal_training(sparse.eval(), dense.eval(), data[:1])
    with torch.no_grad():
        assert_equal_training(sparse, dense, data[1:], backward=False)
        assert_equal_training(sparse.train(), dense.train(), data[1:], backward=False)


@pytest.mark.parametrize("name", [name for name in NETS if name != "islands"])  # it views
def test_channels_last_input(name: str) -> None:
    sparse, dense = pair(NETS[name])
    data = [x.contiguous(memory_format=torch.channels_last) for x in batches(2, 16)]
    assert_equal_training(sparse, dense, data)


@pytest.mark.parametrize("batch", [5, 16])
@pytest.mark.parametrize("name", NETS)
def test_training_equals_dense_kernels_element_by_element(name: str, batch: int) -> None:
    """With all activations kept, none can be another."""
    sparse, dense = pair(NETS[name], "swat-u:0.8,activation_sparsity=0.0,period=4")
    assert_equal_training(sparse, dense, batches(3, batch))


@pytest.mark.parametrize("name", ["chain", "residual", "dilated"])
def test_channels_last_model(name: str) -> None:
    sparse, dense = (gm.to(memory_format=torch.channels_last) for gm in pair(NETS[name]))
    assert_equal_training(sparse, dense, batches(2, 16))


@pytest.mark.parametrize("policy", ["swat-u:0.8,first_dense=False", "swat-erk:0.9,period=2"])
@pytest.mark.parametrize("name", ["chain", "residual", "conv1d"])
def test_other_policies(name: str, policy: str) -> None:
    assert_equal_training(*pair(NETS[name], policy), batches(3, 16))


def test_options_go_with_the_layout() -> None:
    """Selectors and where-strings whose kernels read the layout's order."""
    for options in (
        "weight_selector=filter",
        "weight_selector=channel",
        "forward_activation=True",
        "update='active'",
        "gradient_sparsity=0.5",
        "activation_selector=chw",
        "activation_selector=hw",
    ):
        sparse, dense = pair(residual, f"swat-u:0.7,{options}")
        assert "sparse" in chosen(sparse).values(), options
        assert_equal_training(sparse, dense, batches(2, 16))


@pytest.mark.parametrize("option", [{"norm_saves": "int8"}, {"value_dtype": "bf16"}])
def test_options_that_save_less(option: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = residual()
    twin = copy.deepcopy(model)
    one = swatfx.compile(model, "swat-u:0.8", kernels="sparse", **option)
    other = swatfx.compile(twin, "swat-u:0.8", kernels="dense", **option)
    x = batches(1, 16)[0]
    for gm in (one, other):
        loss_of(gm(x)).backward()
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        # Codes may fall on either side of a rounding.
        error = float((p.grad - q.grad).norm() / q.grad.norm())
        assert error < 0.02, (name, error)


def test_one_conversion_where_the_layout_begins() -> None:
    """The stem's result, before its norm: the norm and the ReLU run in the layout as well."""
    assert conversions(pair(chain)[0]) == [("_0_0", IN)]
    assert conversions(pair(residual)[0]) == [("_0_0", IN)]


def test_no_conversion_without_sparse_kernels() -> None:
    sparse, dense = pair(chain, "saw:0.8")
    assert conversions(sparse) == conversions(dense) == []
    assert "layout" not in sparse.code


def test_first_layer_sparse_converts_the_input() -> None:
    gm = pair(chain, "swat-u:0.8,first_dense=False")[0]
    assert conversions(gm) == [("input_1", IN)]


def test_pack_and_threshold_read_what_the_convolution_reads() -> None:
    gm = pair(lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)))[0]
    found = [node for node in gm.graph.nodes if node.name == "_0_laid_out"]
    assert {str(user) for user in found[0].users} == {"_1", "layer_1_kept", "layer_1_a_t"}
    assert [str(user) for user in found[0].args[0].users] == ["_0_laid_out"]


def test_who_reads_strides_sees_row_major_order() -> None:
    gm = pair(ending)[0]
    assert conversions(gm) == [("_0_0", IN), ("_3", OUT)]
    y = gm(batches(1, 16)[0])
    assert y.is_contiguous() and y.view(-1).shape == (16 * 16 * 64,)
    islands = conversions(pair(NETS["islands"])[0])
    assert islands[:2] == [("stem_0", IN), ("before_2", OUT)]


@dataclasses.dataclass
class Results:
    """What a model of somebody else's may return."""

    h: Tensor


class Returns(nn.Module):
    """Gives the result of a sparse convolution in a container."""

    def __init__(self, container: Callable[..., Any]) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1))
        self.container = container

    def forward(self, x: Tensor) -> Any:
        return self.container(h=self.convs(x))


@pytest.mark.parametrize("container", [dict, OrderedDict, Results])
def test_results_in_a_container_are_row_major(container: Callable[..., Any]) -> None:
    gm = pair(lambda: Returns(container))[0]
    assert conversions(gm)[-1][1] == OUT
    found = gm(batches(1, 16)[0])
    h = found.h if isinstance(found, Results) else found["h"]
    assert type(found) is container and h.is_contiguous()


def test_layers_behind_a_linear_layer_are_left_alone() -> None:
    """What a linear layer gives is row-major, and nobody converts it."""
    gm = pair(lambda: nn.Sequential(block(3, 16), block(16, 16), nn.Flatten(), nn.Linear(1024, 8)))
    assert conversions(gm[0]) == [("_0_0", IN)]


class Twice(nn.Module):
    """The dense stem's result is read by two sparse layers and by the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.a = nn.Conv2d(16, 16, 3)
        self.b = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.a(x).mean((2, 3)) + self.b(x).mean((2, 3)) + x.mean((2, 3))


def test_one_conversion_for_all_readers() -> None:
    sparse, dense = pair(Twice)
    assert [c for c in conversions(sparse) if c[1] == IN] == [("stem", IN)]
    means = [n for n in sparse.graph.nodes if n.target == "mean"]
    assert str(means[-1].args[0]) == "stem"
    assert_equal_training(sparse, dense, batches(2, 17))


class WrittenBetween(nn.Module):
    """Two sparse layers read one tensor, written into in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.a = nn.Conv2d(16, 16, 1)
        self.b = nn.Conv2d(16, 16, 1)
        self.c = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.a(x)
        x.add_(1)
        z = self.b(x)
        F.relu(x, inplace=True)
        return self.c(x) + y * z


def test_each_reader_sees_what_was_there_when_it_read() -> None:
    """Legal since neither keeps the whole of what it reads."""
    sparse, dense = pair(WrittenBetween)
    assert_equal_training(sparse, dense, batches(3, 16))


class WrittenThrough(WrittenBetween):
    """What an activation in place writes is read by its old name."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(x, inplace=True)
        z = self.b(self.a(y)) + x
        z = F.hardtanh(z, -1.0, 1.0)
        w = z.relu_()
        return self.c(w) * z


def test_writing_in_place_is_seen_by_all() -> None:
    sparse, dense = pair(WrittenThrough)
    assert [c for c in conversions(sparse) if c[0] == "stem"] == []
    assert_equal_training(sparse, dense, batches(3, 16))


class EagerWriter(nn.Module):
    """Eager code that overwrites what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > -1e9).all()):
            x.mul_(2)
        return self.conv(x)


class EagerWrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.a = nn.Conv2d(16, 16, 1)
        self.writer = EagerWriter()
        self.b = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.stem(x))
        z = self.writer(y)
        return self.b(y) + z


def test_what_eager_code_writes_is_seen() -> None:
    sparse, dense = pair(EagerWrites)
    assert ("a", OUT) in conversions(sparse)
    assert_equal_training(sparse, dense, batches(3, 16))


class Numbers(nn.Module):
    """Additions and products of numbers and of small tensors, before and after sparse layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.a = nn.Conv2d(16, 16, 1)
        self.gain = nn.Parameter(torch.ones(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        count = x.size(0) * 2 + x.shape[1]
        y = self.stem(x) * count * (self.gain * 2) + x.mean() * 1
        return self.a(y / count) / (count + 1) * y.mean((2, 3))[:, :, None, None]


def test_numbers_and_vectors_are_no_activations() -> None:
    assert_equal_training(*pair(Numbers), batches(2, 16))


def test_unbatched_input() -> None:
    sparse, dense = pair(ending)
    with torch.no_grad():
        x = torch.randn(3, 8, 8)
        net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        twin = copy.deepcopy(net)
        one = swatfx.compile(net, "swat-u:0.8", kernels="sparse")
        other = swatfx.compile(twin, "swat-u:0.8", kernels="dense")
        torch.testing.assert_close(one(x), other(x))


def test_empty_batch() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten())
    gm = swatfx.compile(net, "swat-u:0.8", kernels="sparse")
    y = gm(torch.empty(0, 3, 8, 8))
    y.sum().backward()
    assert y.shape == (0, 256) and not any(p.grad.any() for p in net.parameters())


def test_layers_run_in_the_layout() -> None:
    """From the first sparse layer on every 4d tensor lies in it; nothing is converted after."""
    sparse = pair(residual)[0]
    seen: dict[str, str] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            y = super().run_node(n)
            if isinstance(y, Tensor) and y.dim() == 4 and n.op != "get_attr":
                seen[n.name] = layouts.layout_of(y)
            return y

    x = batches(1, 16)[0]
    Watch(sparse).run(x)
    names = list(seen)
    begin = names.index("_0_0_laid_out")
    assert set(map(seen.get, names[:begin])) == {OUT}
    assert {name for name in names[begin:] if seen[name] != IN} <= {"_3"}  # the global pool
    with torch.profiler.profile(record_shapes=True) as profile:
        loss_of(sparse(x)).backward()
    events = [e.input_shapes[0] for e in profile.events() if e.name == "swatfx::to_layout"]
    converted = [shape for shape in events if len(shape) == 4]
    # Into the layout, the global pool's gradient into it, and the stem's out of it.
    assert converted == [[16, 16, 8, 8], [16, 32, 4, 4], [16, 16, 8, 8]]


def test_second_run_changes_nothing() -> None:
    ctx = Context(as_policy("swat-u:0.8"))
    for name in NETS:
        gm = pair(NETS[name])[0]
        before = {path: part.code for path, part in all_parts(gm)}
        result = choose_kernels(gm, ctx)
        assert not result.modified
        assert {path: part.code for path, part in all_parts(gm)} == before


def test_golden_graph() -> None:
    """To write the file anew: SWATFX_GOLDEN=1 pytest tests/passes/test_layout_flow.py -k golden."""
    import os

    code = pair(NETS["overwritten"])[0].code.strip() + "\n"
    code = "\n".join(line.rstrip() for line in code.splitlines()) + "\n"
    path = GOLDEN / "overwritten_sparse.txt"
    if os.environ.get("SWATFX_GOLDEN"):
        path.write_text(code)
    assert code == path.read_text()


def test_deep_copy_trains_alike() -> None:
    sparse, dense = pair(residual)
    twin = copy.deepcopy(sparse)
    assert twin.code == sparse.code and chosen(twin) == chosen(sparse)
    assert_equal_training(twin, dense, batches(2, 16))


@pytest.mark.parametrize("net", [residual, Island])
def test_state_dict_keys_are_those_of_dense_kernels(net: type[nn.Module]) -> None:
    sparse, dense = pair(net)
    assert list(sparse.state_dict()) == list(dense.state_dict())
    assert isinstance(sparse, SwatModule)


def _written_other(how: str) -> Callable[[Tensor], Tensor]:
    """Writes into another form of `y`; returns `y`."""

    def run(y: Tensor) -> Tensor:
        SHARED[how](y).mul_(0.5)
        return y

    return run


def _written_first(how: str) -> Callable[[Tensor], Tensor]:
    """Writes into `y`; returns another form of it."""

    def run(y: Tensor) -> Tensor:
        other = SHARED[how](y)
        y.mul_(0.5)
        return other

    return run


SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda y: y.contiguous(),
    "flat": lambda y: y.reshape(-1),
    "flatten": lambda y: torch.flatten(y),
    "flatten method": lambda y: y.flatten(0, 1),
    "module": nn.Flatten(0, 1),
    "ravel": lambda y: y.ravel(),
    "merged": lambda y: torch.reshape(y, (y.size(0) * y.size(1), -1)),
    "view": lambda y: y.view(-1),
    "pairs": lambda y: y.view(y.size(0) // 2, -1),
    "permuted": lambda y: y.permute(1, 2, 3, 0).contiguous(),
    "last": lambda y: y.contiguous(memory_format=torch.channels_last),
}


class Sharing(nn.Module):
    """Two convolutions, then what a caller may do with their result."""

    def __init__(self, run: Callable[[Tensor], Tensor], norm: bool) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.norm = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()) if norm else nn.Identity()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.norm(self.conv(self.stem(x))) * 1.0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("write", [_written_other, _written_first])
@pytest.mark.parametrize("how", SHARED)
def test_who_sees_a_write_is_as_in_eager(
    how: str, write: Callable[[str], Callable[[Tensor], Tensor]], norm: bool
) -> None:
    """A view or a copy: in eager that is decided by row-major order."""
    torch.manual_seed(0)
    model = Sharing(write(how), norm)
    plain = copy.deepcopy(model).double()
    gm = swatfx.compile(model, "swat-u:0.8,activation_sparsity=0.0")
    with torch.no_grad():
        weight = plain.conv.weight
        kept = weight.numel() - weight.numel() * 8 // 10
        weight.mul_(weight.abs() >= weight.abs().flatten().topk(kept).values[-1])
    x = torch.randn(16, 3, 8, 8)
    got, want = gm(x), plain(x.double())
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)
    got.sin().sum().backward()
    want.sin().sum().backward()
    for name, p in model.named_parameters():
        expected = dict(plain.named_parameters())[name].grad
        torch.testing.assert_close(p.grad.double(), expected, atol=1e-3, rtol=1e-3)


def test_a_layer_whose_result_is_shared_says_why_it_is_dense() -> None:
    gm = swatfx.compile(Sharing(_written_other("flat"), False), "swat-u:0.8")
    assert (
        "written in place"
        in swatfx.report(gm, (torch.empty(16, 3, 8, 8, device="meta"),)).to_json()
    )
    quiet = swatfx.compile(Sharing(SHARED["flat"], False), "swat-u:0.8")
    assert chosen(quiet)["conv"] == "sparse"
