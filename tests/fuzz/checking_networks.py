"""One random network: compiled by swatfx, step by step against the oracle."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import swatfx
from tests.fuzz.assembling import Part, network
from tests.fuzz.building import twin
from tests.fuzz.checking import TIE, VALUES, said, same_error
from tests.fuzz.networks import NetworkCase
from tests.fuzz.plain import NOW, Layer, Moment, apart
from tests.fuzz.rounding import kept_in_bytes, rounded_anywhere
from tests.fuzz.tensors import draw, laid_out
from tests.fuzz.watching import Watching

# What is allowed over the exact result: units of what rounding to single precision may do, of the
# largest value, and of what rounding to a byte may do where norms keep a byte an element.
NOISE, NEAR, COARSE = 20.0, 1e-5, 5.0
BYTES = 0.02  # of the largest: what else than batch norms keeps in bytes adds to it
FORWARD = 1e-4  # of layer inputs, in units of their root mean square


Found = dict[str, Tensor | None]
Noise = Callable[[], dict[str, float]]


def check_network(case: NetworkCase) -> list[str]:
    """What is wrong with swatfx on this case; nothing, if all is well."""
    problems: list[str] = []
    for attempt in range(5):
        checked = _Checked(replace(case, seed=case.seed + 104729 * attempt))
        problems = checked.run()
        # Near ties, and where single precision itself goes astray, other data are drawn.
        if not problems or not checked.undecided:
            return problems
    return [f"after five draws of data: {problem}" for problem in problems]


def fill_network(model: nn.Module, seed: int) -> None:
    """New parameters, in place, that keep the size of activations."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            scale = 1.5 / math.sqrt(max(math.prod(p.shape[1:]), 1)) if p.dim() > 1 else 1.0
            p.copy_(draw(p.shape, seed + 31 * i, False, p.dtype) * scale)


class _Checked:
    def __init__(self, case: NetworkCase) -> None:
        self.case = case
        self.undecided = False
        self.noise = 0.0

    def run(self) -> list[str]:
        case = self.case
        torch.set_num_threads(case.threads)
        self.model = network(case)
        fill_network(self.model, case.seed)
        eager = copy.deepcopy(self.model)
        options = {"kernels": case.kernels, "value_dtype": case.value_dtype}
        try:
            self.gm = swatfx.compile(
                self.model, case.method.text(), norm_saves=case.norm_saves, **options
            )
        except Exception as error:
            nothing = "nothing to sparsify" in str(error) and not self._takes_part()
            return [] if nothing else [f"compile raised {said(error)}"]
        self.plain = self._twin()
        for module in self.plain.modules():
            if isinstance(module, Part):
                module.checkpointed = False
        self.iteration = 0
        for step, what in enumerate(case.steps):
            if step:
                fill_network(self.model, case.seed + 7919 * step)
                self._follow()
            self.noise = 0.0
            problems = self._step(step, what, eager)
            if problems is None:
                return []
            if problems:
                return [f"{what} {step}: {problem}" for problem in problems]
        return []

    def _twin(self) -> nn.Module:
        case = self.case
        dense = ("steps.0",) if case.method.first_dense else ()
        return twin(self.model, case.method, VALUES[case.value_dtype], dense)

    def _takes_part(self) -> bool:
        """Whether any layer does, by the oracle's word."""
        return any(isinstance(module, Layer) for module in self._twin().modules())

    def _follow(self) -> None:
        """The oracle goes on from swatfx's parameters and running statistics."""
        mine = dict(self.gm.named_parameters()) | dict(self.gm.named_buffers())
        with torch.no_grad():
            for name, tensor in [*self.plain.named_parameters(), *self.plain.named_buffers()]:
                tensor.copy_(mine[name])

    def _step(self, step: int, what: str, eager: nn.Module) -> list[str] | None:
        case, training = self.case, what == "train"
        x = draw(case.shape, case.seed + step, False, torch.float32)
        x = laid_out(x, case.order, case.seed).requires_grad_(training)
        for model in (self.gm, self.plain, eager):
            model.train(training)
        before = {n: b.clone() for n, b in self.gm.named_buffers() if "running" in n}
        watching = Watching()
        try:
            with torch.set_grad_enabled(training), watching:
                outputs = _tuple(self.gm(x))
        except Exception as error:
            return same_error(error, eager, x.detach(), torch.no_grad())
        try:
            grads = self._output_gradients(outputs) if training else []
            got = _found(self.gm, x, outputs, grads)
            if not training and any(not torch.equal(t, got[n]) for n, t in before.items()):
                return ["evaluation changed a running statistic"]
        except Exception as error:
            return [f"backward raised {said(error)}"]
        single, rounding = copy.deepcopy(self.plain).float(), copy.deepcopy(self.plain)
        moment = Moment(self.iteration, training, iter(watching.calls))
        want = self._oracle(self.plain, x.detach().double(), grads, moment)
        self.iteration += training
        problems = list(moment.problems)

        @functools.cache
        def noise() -> dict[str, float]:
            # What plain PyTorch is off by may be nothing by luck: constants, in one memory order.
            forms: list[tuple[nn.Module, Tensor, AbstractContextManager[None]]]
            forms = [(single, x.detach(), nullcontext())]
            for seed in (0, None):
                forms.append((rounding, x.detach().double(), rounded_anywhere(rounding, seed)))
            found = []
            for model, given, context in forms:
                again = Moment(moment.iteration, training, iter(watching.calls))
                with context:
                    found.append(self._oracle(model, given, grads, again))
                pairs = zip(again.inputs, moment.inputs, strict=True)
                self.noise = max([self.noise, *(apart(a.double(), b) for a, b in pairs)])
            return _largest(found, want)

        @functools.cache
        def bytes_noise() -> dict[str, float]:
            found = []
            for seed in (*range(6), None):  # a channel's sum is one number: two draws may be lucky
                again = Moment(moment.iteration, training, iter(watching.calls))
                with kept_in_bytes(rounding, seed):
                    found.append(self._oracle(rounding, x.detach().double(), grads, again))
            return _largest(found, want)

        problems += self._differences(got, want, noise, bytes_noise)
        if moment.error > NEAR:
            noise()
            if moment.error > NOISE * self.noise:
                problems.append(f"the input of a layer is off by {moment.error:.2g}")
        if moment.error <= FORWARD:
            self.undecided = self.undecided or moment.margin < max(TIE, 4 * moment.error)
        return problems

    def _output_gradients(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [
            draw(y.shape, self.case.seed + 11 + i, False, y.dtype) for i, y in enumerate(outputs)
        ]

    def _oracle(
        self, plain: nn.Module, x: Tensor, grads: list[Tensor], moment: Moment
    ) -> dict[str, Tensor | None]:
        x.requires_grad_(bool(grads))
        with NOW.at(moment), torch.set_grad_enabled(bool(grads)):
            outputs = _tuple(plain(x))
            return _found(plain, x, outputs, [g.to(x.dtype) for g in grads])

    def _differences(
        self, got: Found, want: Found, noise: Noise, bytes_noise: Noise
    ) -> Iterator[str]:
        coarse = self.case.norm_saves == "int8"
        largest = {n: float(t.abs().max()) for n, t in want.items() if t is not None and t.numel()}

        def beside(name: str) -> list[float]:
            owner = name.rpartition(".")[0] + "."
            return [0.0, *(size for n, size in largest.items() if n.startswith(owner))]

        for name, right in want.items():
            mine = got.get(name)
            if mine is None or right is None:
                if (mine is None) != (right is None):
                    yield f"{name} is {'missing' if mine is None else 'there'}"
                continue
            if mine.shape != right.shape:
                yield f"{name} has shape {tuple(mine.shape)}, not {tuple(right.shape)}"
                continue
            if not right.numel():
                continue
            difference = mine.double() - right
            error, size = float(difference.abs().max()), float(right.abs().max())
            if name.startswith("gradient"):  # before a norm it is rounding only
                size = max(size, *beside(name))
            if error <= NEAR * size:
                continue
            if coarse and name.startswith("gradient"):
                if error <= max(BYTES * size, COARSE * bytes_noise()[name]):
                    continue
            if 1e-3 * size < noise()[name] and error < 0.1 * size:
                self.undecided = True  # single precision says nothing here
            if error <= NOISE * noise()[name]:
                continue
            count = int((difference.abs() > NEAR * size).sum())
            yield f"{name} off by {error / (size or 1):.2g} ({count} of {right.numel()})"


def _largest(found: Sequence[Found], want: Found) -> dict[str, float]:
    """By how much each result is off at most."""
    largest = {}
    for name, exact in want.items():
        if exact is not None and exact.numel():
            results = [t[name] for t in found]
            largest[name] = max(
                float((r.double() - exact).abs().max()) for r in results if r is not None
            )
    return largest


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _found(
    model: nn.Module, x: Tensor, outputs: tuple[Tensor, ...], grads: list[Tensor]
) -> dict[str, Tensor | None]:
    """Name -> output, gradient (if asked for) or running statistic."""
    found: dict[str, Tensor | None] = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    if grads:
        leaves = {n: p for n, p in model.named_parameters() if not n.startswith("swat.")}
        leaves["input"] = x
        for leaf in leaves.values():
            leaf.grad = None
        torch.autograd.backward(outputs, grads)
        for name, leaf in leaves.items():
            found[f"gradient of {name}"] = leaf.grad
            leaf.grad = None
    for name, buffer in model.named_buffers():
        if "running" in name:
            found[name] = buffer.detach().clone()
    return found
