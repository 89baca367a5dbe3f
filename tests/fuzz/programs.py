"""Random straight-line code on names of tensors, and writes into them: what each name sees later.

Masks keep everything, so eager is what a compiled program has to equal: its values in float64, its
dtypes and shapes in the precision that is asked for.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swatfx
from tests.fuzz.checking import said
from tests.fuzz.tensors import draw

# `v` is an earlier name, `w` another; `p` and `q` are the input. All values have its shape.
NAMES = (
    "{v}", "n.same({v})", "n.drop({v})", "{v}.detach()", "{v}.view({v}.shape)",
    "{v}.reshape({v}.shape[0], -1).view({v}.shape)", "{v}.transpose(2, 3)",
    "{v}.permute(0, 1, 3, 2).transpose(3, 2)", "{v}.to({v}.dtype)", "{v}.contiguous()",
    "{v}.flatten(2).unflatten(2, (8, 8))", "{v}[:]", "[{v}, 0][0]", "dict(a={v})['a']",
    "{v}.unsqueeze(0).squeeze(0)", "{v}.narrow(1, 0, 16)", "{v}.expand(-1, 16, -1, -1)",
    "torch.flatten({v}, 1).view({v}.shape)", "n.hands_on({v})", "n.hands_on_eager({v})",
    "n.twice({v})[1]", "n.twice_eager({v})[0]", "n.in_list({v})[0]", "n.shifts({v})",
    "n.shifts_eager({v})", "n.keeps({v})", "n.looked_at({v})",
    "({v}.chunk(2, 1) + {w}.chunk(2, 1))[2].repeat(1, 2, 1, 1)", "(n.in_list({v}) * 2)[1]",
    "(n.in_list({v}) + n.in_list({w}))[1]", "(n.twice_eager({v}) + n.twice({w}))[2]",
    "n.other_name({v})", "n.before({v})",
)  # fmt: skip
VALUES = (
    "n.norm({v})", "n.wide({v})", "n.thin({v})", "n.line({v})", "n.layer_norm({v})", "{v} * 0.5",
    "torch.relu({v})", "F.relu({v})", "F.max_pool2d({v}, 3, 1, 1)", "F.gelu({v})", "{v} + {w}",
    "n.norm({v}).transpose(2, 3)", "torch.cat([{v}, {w}], 1)[:, ::2] * 1", "torch.sigmoid({v})",
    "{v}.clone()", "torch.zeros_like({v})", "torch.where({v} > 0, {v}, {w})", "n.around({v})",
    "n.around_eager({v})", "n.relu({v})", "F.leaky_relu({v}, 0.1, 1)", "n.seen({v})",
    "n.wide({v}).contiguous(memory_format=torch.channels_last) * 1", "{v}.to(torch.bfloat16)",
    "F.dropout({v}, 0.0, True, True)", "F.relu(n.norm({v}) + {w})", "n.relu(n.norm({v}))",
    "n.block({v})", "n.block_checkpointed({v})", "n.halves_written({v})",
    "{v} * n.norm.running_var.view(1, -1, 1, 1)", "{v} + n.norm.num_batches_tracked",
    "F.batch_norm({v}, n.norm.running_mean, n.norm.running_var, n.scale.view(-1), None, True)",
    "F.relu(F.batch_norm({v}, None, None, None, n.norm.bias, True))",
    "F.relu(n.norm({v}) + n.seen({w}))", "F.relu(n.norm({v}) + n.hands_on_eager({w}))",
)  # fmt: skip
WRITES = (
    "{v} += 1.0", "{v} *= 0.7", "{v} -= {w}.mean()", "{v} += {w}", "{v} -= 0.3 * {w}.detach()",
    "{v} /= 2", "{v} += n.norm({w})", "{v} += n.layer_norm({w})", "{v} += n.scale",
    "{v} *= n.buffer", "{v}.add_(0.1)", "{v}.mul_({w}.detach().sigmoid())", "n.relu({v})",
    "F.relu({v}, inplace=1)", "F.relu({v}, True)", "F.leaky_relu({v}, inplace=True)",
    "z = {v}[:, :4]; z *= 0.5", "z = {v}.view({v}.shape); z += 0.1", "z = {v}[:, 1]; z -= 0.2",
    "z = {v}.flatten(1); z += 0.25", "z = {v}.reshape(-1); z *= 0.9",
    "z = {v}.transpose(1, 2); z += n.scale.view(1, 16, 1)", "z = {v}.unbind(0)[0]; z += 0.5",
    "a, b = {v}[:, :8], {v}[:, 8:]; a += b; b -= 0.5", "z = n.buffer; z *= 0.99",
    "z = torch.chunk({v}, 2, 1); z += ({w},); z[2].mul_(0.9)", "n.kept_eager({v})",
    "z = n.in_list({v}); z += n.in_list({w}); y = z[1]; y += 0.5", "n.shifts({v})",
    "n.shifts_eager({v})", "torch.add({v}, 1.0, out={v}.detach())", "q += 1.0", "p *= 0.5",
    "z = {v}[0][None]; z += {v}[:1]", "{v}[:, 0].zero_()",
)  # fmt: skip


@dataclass(frozen=True)
class ProgramCase:
    """A program, and how it runs.

    Attributes:
        seed: of parameters and inputs.
        lines: of the program; `v0` is what the first layer made.
        results: the names that it returns, by way of a layer and as they are.
        batch: images.
        kernels: as in `swatfx.compile`.
        training: whether gradients are asked for.
        autocast: whether under bfloat16 autocast; then values are compared roughly.
        packs: whether activations are packed (all of them, by a sparsity that drops none), so that
            norms, ReLUs and pools keep less.
    """

    seed: int = 0
    lines: tuple[str, ...] = ()
    results: tuple[str, ...] = ("v0",)
    batch: int = 16
    kernels: str = "sparse"
    training: bool = True
    autocast: bool = False
    packs: bool = False

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> ProgramCase:
        """Read what `to_json` wrote."""
        return ProgramCase(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})

    def source(self) -> str:
        """The program as a function of the network and a tensor."""
        end = ", ".join(f"{name} * 1" for name in self.results)
        lines = ["v0 = h", *self.lines, f"return n.wide({self.results[0]}), {end}"]
        return "def program(n, h, p, q):\n    " + "\n    ".join(lines) + "\n"


def random_program(seed: int, number: int) -> ProgramCase:
    """Case `number`."""
    rng = random.Random(f"program {seed} {number}")
    names, lines = ["v0", "v0", "p", "q"], []
    for i in range(rng.randint(3, 11)):
        v, w = rng.choice(names), rng.choice(names)
        what = rng.choice((NAMES, VALUES, WRITES, WRITES))
        line = rng.choice(what).format(v=v, w=w)
        if what is not WRITES:
            names.append(f"v{i + 1}")
            line = f"{names[-1]} = {line}"
        lines.append(line)
    return ProgramCase(
        seed=rng.randrange(1 << 30),
        lines=tuple(lines),
        results=tuple(dict.fromkeys(rng.choices(names, k=rng.randint(1, 4)))),
        batch=rng.choice([1, 2, 15, 16, 16, 17]),
        kernels=rng.choice(["sparse", "sparse", "dense"]),
        training=rng.random() < 0.5,
        autocast=rng.random() < 0.1,
        packs=rng.random() < 0.6,
    )


def smaller_programs(case: ProgramCase) -> list[ProgramCase]:
    """Cases with a line or an option less."""
    found = [
        replace(case, lines=case.lines[:i] + case.lines[i + 1 :]) for i in range(len(case.lines))
    ]
    found += [replace(case, results=(name,)) for name in case.results if len(case.results) > 1]
    for name in ("autocast", "batch", "training", "packs"):
        plain = getattr(ProgramCase(), name)
        if getattr(case, name) != plain:
            found.append(replace(case, **{name: plain}))
    return found


class _Does(nn.Module):
    """A part that tracing can follow, or (`eager`) cannot."""

    def __init__(self, run: Callable[[Any, Tensor], Any], eager: bool = False) -> None:
        super().__init__()
        self.run, self.eager = run, eager
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.held: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        if self.eager and x.sum() > 1e30:
            return self.conv(x)
        return self.run(self, x)


def _shift(part: Any, x: Tensor) -> Tensor:
    x += 0.5
    return x


def _around(part: Any, x: Tensor) -> Tensor:
    y = part.conv(x)
    kept = y
    y += x
    y *= 0.5
    return kept


def _keep(part: Any, x: Tensor) -> Tensor:
    part.held.append(x)
    return x * 1.0


def _change(part: Any, x: Tensor) -> Tensor:
    """Writes into what the call before was given."""
    for tensor in part.held[-1:]:
        tensor.detach().mul_(0.5)
    part.held.append(x)
    return x


class _Block(nn.Module):
    """A norm, an addition and a ReLU, which are one call where activations are packed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += x
        return F.relu(y)


class _Halves(nn.Module):
    """Gives a tensor, and half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, y[:, :8]


class _Uses(nn.Module):
    """Python around a part that can be traced."""

    def __init__(self, part: nn.Module, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.run = part, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.part, x) if x.sum() < 1e30 else x


def _written_half(part: Any, x: Tensor) -> Tensor:
    whole, half = part(x)
    half += 1.0
    return whole


def _checkpointed(part: Any, x: Tensor) -> Tensor:
    return checkpoint(part, x, use_reentrant=False) if x.requires_grad else part(x)


def _name_before(part: Any, x: Tensor) -> Tensor:
    """What it was given at the call before, if anything."""
    part.held.append(x)
    return part.held[-2] if len(part.held) > 1 else x


class Network(nn.Module):
    """What a program may call."""

    def __init__(self, program: Callable[[Network, Tensor], Any]) -> None:
        super().__init__()
        self.program = program
        self.first, self.wide = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.thin, self.line = nn.Conv2d(16, 16, 1), nn.Linear(8, 8)
        self.norm, self.layer_norm = nn.BatchNorm2d(16), nn.LayerNorm(8)
        self.relu, self.same, self.drop = nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.0)
        self.register_buffer("buffer", torch.ones(16, 1, 1))
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        same = lambda part, x: x  # noqa: E731
        self.hands_on, self.hands_on_eager = _Does(same), _Does(same, True)
        self.twice, self.twice_eager = (_Does(lambda _, x: (x, x), eager) for eager in (0, 1))
        self.in_list = _Does(lambda _, x: [x], True)
        self.shifts, self.shifts_eager = _Does(_shift), _Does(_shift, True)
        self.around, self.around_eager = _Does(_around), _Does(_around, True)
        self.keeps, self.kept_eager = _Does(_keep, True), _Does(_change, True)
        self.seen, self.looked_at = nn.BatchNorm2d(16), nn.Identity()
        self.block = _Block()
        self.block_checkpointed = _Uses(_Block(), _checkpointed)
        self.halves_written = _Uses(_Halves(), _written_half)
        self.other_name, self.before = _Does(lambda _, x: x[:], True), _Does(_name_before, True)

    def watch(self) -> list[Tensor]:
        """What hooks hold on to, from now on."""
        held: list[Tensor] = []
        for module in (self.seen, self.looked_at):
            module.register_forward_hook(lambda _, args, result: held.append(result))
        return held

    def forward(self, p: Tensor, q: Tensor) -> Any:
        return self.program(self, self.first(p), p, q)


def check_program(case: ProgramCase) -> list[str]:
    """What is wrong with swatfx on this case; nothing, if all is well."""
    torch.set_num_threads(1)
    space: dict[str, Any] = {"torch": torch, "F": F}
    exec(case.source(), space)  # noqa: S102
    torch.manual_seed(case.seed)
    model = Network(space["program"]).train(case.training)
    x = draw((case.batch, 16, 8, 8), case.seed, False, torch.float32)
    try:
        want = _run(copy.deepcopy(model), x, case)
        exact = _run(copy.deepcopy(model).double(), x.double(), replace(case, autocast=False))
    except Exception:  # eager refuses: what ours does then is for other tests
        return []
    if not all(t.isfinite().all() for t in exact.values()):
        return []
    try:
        got = _run(model, x, case, compiled=True)
    except Exception as error:
        return [f"raised {said(error)}"]
    return list(_differences(case, got, want, exact))


def _run(model: Network, x: Tensor, case: ProgramCase, compiled: bool = False) -> dict[str, Tensor]:
    """All that can be told afterwards, of two calls."""
    held = model.watch()
    called: nn.Module = model
    if compiled:
        policy = f"swat-u:{'0.0000001' if case.packs else '0'},first_dense=False"
        called = swatfx.compile(model, policy, kernels=case.kernels)
        called.train(case.training)
    inside: AbstractContextManager[Any] = nullcontext()
    if case.autocast:
        inside = torch.autocast("cpu", torch.bfloat16)
    given = x.clone()
    found: dict[str, Tensor] = {}
    for call in range(2):
        with torch.set_grad_enabled(case.training), inside:
            results = called(given, given)
        found |= {f"result {i} of call {call}": y for i, y in enumerate(results)}
        if case.training:
            sum((y.double() if x.dtype is torch.float64 else y.float()).sin().sum()
                for y in results if y.requires_grad).backward()  # fmt: skip
    for name in ("keeps", "kept_eager", "before"):  # the compiled model has copies of these
        held += called.get_submodule(name).held
    found |= {f"kept {i}": t for i, t in enumerate(held)}
    found |= {
        f"gradient of {n}": p.grad for n, p in _own(called.named_parameters()) if p.grad is not None
    }
    found |= {n: b for n, b in _own(called.named_buffers()) if "tracked" not in n}
    return {name: t.detach().clone() for name, t in found.items()} | {"input": given}


def _own(named: Iterator[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(n, t) for n, t in named if not n.startswith("swat.")]


def _differences(
    case: ProgramCase, got: dict[str, Tensor], want: dict[str, Tensor], exact: dict[str, Tensor]
) -> Iterator[str]:
    for name, right in want.items():
        mine = got.get(name)
        if mine is None:
            yield f"{name} is missing"
        elif (mine.dtype, mine.shape) != (right.dtype, right.shape):
            yield f"{name} is {mine.dtype} {tuple(mine.shape)}, not {right.dtype} {right.shape}"
        elif right.numel():
            true = exact[name].double()
            error = float((mine.double() - true).abs().max())
            noise = float((right.double() - true).abs().max())
            size = max(float(true.abs().max()), 1.0)
            if case.autocast and name.startswith("gradient"):
                continue  # sums of what is rounded to bfloat16, which may be of nothing else
            share = 0.1 if case.autocast else 1e-5
            # Values near the middle between two bfloat16 may be rounded to either.
            narrow = any("bfloat16" in line for line in case.lines)
            if error > 20 * noise + size * (0.02 if narrow else share):
                yield f"{name} off by {error / size:.2g}"
