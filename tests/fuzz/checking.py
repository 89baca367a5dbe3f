"""One random layer: compiled by swatfx, step by step against the oracle."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import swatfx
from tests.fuzz.building import LayerModel, fill, twin
from tests.fuzz.cases import LayerCase
from tests.fuzz.comparing import compare
from tests.fuzz.plain import NOW, Layer, Moment
from tests.fuzz.tensors import draw, laid_out, seen, stored_shape
from tests.fuzz.watching import Watching

TIE = 2e-6  # a decision nearer than this to a tie may fall either way in single precision
VALUES = {"bf16": torch.bfloat16, None: None}


def check_layer(case: LayerCase) -> list[str]:
    """What is wrong with swatfx on this case; nothing, if all is well."""
    for attempt in range(5):
        checked = _Checked(replace(case, seed=case.seed + 104729 * attempt))
        with trusted(case):
            problems = checked.run()
        # Which data are too near a tie the oracle alone decides: others are drawn then.
        if not problems or checked.margin > TIE:
            return problems
    return [f"after five draws of data: {problem}" for problem in problems]


@contextlib.contextmanager
def trusted(case: LayerCase) -> Iterator[None]:
    """Where torch's 3d convolutions can be trusted, and small ones in bfloat16: without oneDNN.

    Its own, in version 2.14, read and write past their memory for some strides and paddings, or
    leave parts of a weight gradient unwritten, also in plain eager code: wrong gradients, NaN, or
    the end of the process.
    """
    before = torch._C._get_mkldnn_enabled()
    small = any(k > n for k, n in zip(case.kernel, case.size, strict=False))
    trusted = case.kind != "conv3d" and not (small and case.dtype == "autocast")
    torch._C._set_mkldnn_enabled(before and trusted)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


class _Checked:
    def __init__(self, case: LayerCase) -> None:
        self.case = case
        self.margin = float("inf")
        self.dtype = torch.float64 if case.dtype == "float64" else torch.float32
        self.autocast = torch.bfloat16 if case.dtype == "autocast" else None
        precision = self.autocast or self.dtype
        self.precision = torch.float64 if precision is torch.float64 else precision
        inexact = case.after == "hardswish_" or case.method.name == "dst" or self.autocast
        self.exact = case.grid and not inexact
        method = case.method
        drawn = "random" in (method.weight_selector, method.activation_selector)
        self.watched = case.stem or drawn or method.name == "static"

    def run(self) -> list[str]:
        case = self.case
        torch.set_num_threads(case.threads)
        self.model = LayerModel(case).at(case.input_shape(0)).to(self.dtype)
        fill(self.model, case.seed, case.grid, self.dtype)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] not in case.frozen)
        eager = copy.deepcopy(self.model)
        options = {"kernels": case.kernels, "value_dtype": case.value_dtype}
        try:
            self.gm = swatfx.compile(self.model, case.method.text(), **options)
        except Exception as error:
            return [f"compile raised {said(error)}"]
        dense = ("layer",) if case.transposed else ()
        self.plain = twin(self.model, case.method, VALUES[case.value_dtype], dense)
        self._learn()
        self.iteration = 0
        for step, what in enumerate(case.steps):
            if step:
                fill(self.model, case.seed + 7919 * step, case.grid, self.dtype)
                named = dict(self.model.named_parameters())
                with torch.no_grad():
                    for name, parameter in self.plain.named_parameters():
                        parameter.copy_(named[name])
            problems = self._step(step, what, eager)
            if problems is None:
                return []
            if problems:
                return [f"{what} {step}: {problem}" for problem in problems]
        return []

    def _learn(self) -> None:
        """Thresholds that are learned become numbers that leave some weights out."""
        self.learned: dict[str, nn.Parameter] = {}
        if self.case.method.name != "dst":
            return
        for name, layer in self.plain.named_modules():
            if isinstance(layer, Layer):
                key = f"swat.{name}.weight_threshold.threshold"
                t = dict(self.gm.named_parameters()).get(key)
                if t is None:  # another layer's weight, and so its thresholds
                    layer.learned = self.learned_of
                    continue
                with torch.no_grad():
                    t.copy_(draw(t.shape, self.case.seed + 5, False, t.dtype).abs() * 0.3)
                layer.learned = self.learned_of = (
                    t.detach().double().requires_grad_(t.requires_grad)
                )
                self.learned[name] = t

    def _step(self, step: int, what: str, eager: nn.Module) -> list[str] | None:
        """What is wrong; None if eager refuses the input, too, and all is well."""
        case, training = self.case, what != "eval"
        shape = case.input_shape(step)
        wants = what == "train"
        stored = draw(
            stored_shape(shape, case.order, case.seed), case.seed + step, case.grid, self.dtype
        )
        stored.requires_grad_(wants and "input" not in case.frozen)
        x = stored if case.inside else seen(stored, shape, case.order, case.seed)
        self.gm.train(training)
        watching = Watching() if self.watched else contextlib.nullcontext()
        grad = torch.set_grad_enabled(wants)
        cast = torch.autocast("cpu", torch.bfloat16, enabled=self.autocast is not None)
        try:
            with grad, cast, watching:
                outputs = self.gm(x)
        except Exception as error:
            return same_error(error, eager, x.detach(), cast)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        moment = Moment(
            self.iteration,
            training,
            iter(watching.calls) if isinstance(watching, Watching) else None,
            self.autocast,
        )
        wide = stored.detach().double().requires_grad_(stored.requires_grad)
        try:
            with NOW.at(moment), torch.set_grad_enabled(wants):
                right = self.plain(
                    wide if case.inside else seen(wide, shape, case.order, case.seed)
                )
        except (RuntimeError, ValueError) as error:
            return _refused(error, eager, x.detach(), cast)
        if not self.exact:  # else a tie is one on both sides
            self.margin = min(self.margin, moment.margin)
        right = right if isinstance(right, tuple) else (right,)
        self.iteration += training
        got: dict[str, Tensor | None] = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        want: dict[str, Tensor | None] = {f"output {i}": y.detach() for i, y in enumerate(right)}
        problems = list(moment.problems)
        if [y.dtype for y in outputs] != [self.autocast or self.dtype] * len(outputs):
            problems.append(f"output is {outputs[0].dtype}")
        if moment.error > 1e-4:
            problems.append(f"the input of a layer is off by {moment.error:.2g}")
        if wants and any(y.requires_grad for y in outputs):
            grads = [
                laid_out(
                    draw(y.shape, case.seed + 11 + i, case.grid, y.dtype),
                    case.grad_order,
                    case.seed,
                )
                for i, y in enumerate(outputs)
            ]
            got |= self._gradients(outputs, grads, stored, self.gm, self.learned)
            with NOW.at(moment):
                want |= self._gradients(right, [g.double() for g in grads], wide, self.plain, None)
        else:
            grads = []
        magnitudes = functools.partial(self._magnitudes, step, moment, watching, grads, stored)
        return problems + compare(
            got, want, functools.cache(magnitudes), self.precision, self.exact
        )

    def _gradients(
        self,
        outputs: tuple[Tensor, ...],
        grads: list[Tensor],
        x: Tensor,
        model: nn.Module,
        learned: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor | None]:
        """Name -> gradient of the input and of every parameter that wants one."""
        if learned is None:
            layers = {n: m for n, m in model.named_modules() if isinstance(m, Layer)}
            learned = {n: layers[n].learned for n in self.learned}
        leaves = {n: p for n, p in model.named_parameters() if not n.startswith("swat.")}
        leaves |= {f"{name}'s thresholds": t for name, t in learned.items()}
        leaves |= {"input": x}
        leaves = {n: t for n, t in leaves.items() if t.requires_grad}
        found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
        return {f"gradient of {n}": g for n, g in zip(leaves, found, strict=True)}

    def _magnitudes(
        self, step: int, moment: Moment, watching: Any, grads: list[Tensor], stored: Tensor
    ) -> dict[str, float]:
        case = self.case
        calls = iter(watching.calls) if isinstance(watching, Watching) else None
        absolute = replace(moment, absolute=True, calls=calls, problems=[])
        wide = stored.detach().double().requires_grad_(stored.requires_grad)
        with NOW.at(absolute), torch.set_grad_enabled(bool(grads)):
            shape = case.input_shape(step)
            right = self.plain(wide if case.inside else seen(wide, shape, case.order, case.seed))
            right = right if isinstance(right, tuple) else (right,)
            found = {f"output {i}": y.detach() for i, y in enumerate(right)}
            if grads:
                found |= self._gradients(right, [g.double() for g in grads], wide, self.plain, None)
        return {n: float(t.abs().max()) for n, t in found.items() if t is not None and t.numel()}


def same_error(error: Exception, eager: nn.Module, x: Tensor, cast: Any) -> list[str] | None:
    try:
        with torch.no_grad(), cast:
            eager(x)
    except Exception as right:
        if isinstance(error, (type(right), swatfx.SwatError)):
            return None
        return [f"raised {said(error)}, eager {said(right)}"]
    return [f"raised {said(error)}, eager did not"]


def _refused(error: Exception, eager: nn.Module, x: Tensor, cast: Any) -> list[str] | None:
    """What to say where the oracle raised and swatfx did not; None if eager does not, either."""
    try:
        with torch.no_grad(), cast:
            eager(x)
    except Exception as right:
        return [f"gave a result where eager says {said(right)}"]
    return None  # transposed convolutions: single and double precision differ in what they refuse


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
