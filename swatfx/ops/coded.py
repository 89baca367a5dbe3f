"""What else than norms keeps codes for backward, and how: the table `RULES`, and the ops it needs.

`norm_saves="int8"` or "int4" keeps codes (`swatfx.ops.codes`) in place of tensors also here:

- of a function of one element its derivative, so that backward is one product;
- of a layer norm its normalised input;
- of a product those operands that are as large as it.

Values are eager's. With "int4" gradients are right in the mean, but for the layer norm's input
gradient, which multiplies the normalised input by a sum that it is in: of n elements, by 1/n.

Another function of one element is a rule more:

    RULES["mish"] = Rule((F.mish,), (nn.Mish,), derivative=my_derivative_of_mish)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swatfx.errors import InputError
from swatfx.ops.codes import decode_flat, encode_flat, encode_lines, flat_bytes, line_bytes
from swatfx.ops.features_norm import features_norm, features_norm_backward
from swatfx.ops.saved import in_layout, new_in_layout, no_double_backward, not_a_view, once_only
from swatfx.tensors import layouts

aten = torch.ops.aten


@dataclass(frozen=True)
class Rule:
    """How calls of one function are kept.

    Attributes:
        functions: whose calls they are.
        modules: modules whose calls they are, likewise.
        derivative: of a function of one element, f'(x) for x; None for other rules.
        options: arguments beside the input, and attributes of the modules, and what they must be.
    """

    functions: tuple[Callable[..., Any], ...]
    modules: tuple[type[nn.Module], ...] = ()
    derivative: Callable[[Tensor], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def of_elements(self, x: Tensor) -> Tensor:
        """The function of one element, of each of `x`."""
        y: Tensor = self.functions[0](x, **self.options)
        return y


LAYER_NORM, MULTIPLY = "layer_norm", "multiply"
RULES: dict[str, Rule] = {
    "gelu": Rule(
        (F.gelu,),
        (nn.GELU,),
        lambda x: aten.gelu_backward(torch.ones_like(x), x),
        {"approximate": "none"},
    ),
    "gelu_tanh": Rule(
        (F.gelu,),
        (nn.GELU,),
        lambda x: aten.gelu_backward(torch.ones_like(x), x, approximate="tanh"),
        {"approximate": "tanh"},
    ),
    "silu": Rule((F.silu,), (nn.SiLU,), lambda x: aten.silu_backward(x.new_ones(()), x)),
    "hardswish": Rule(
        (F.hardswish,), (nn.Hardswish,), lambda x: aten.hardswish_backward(x.new_ones(()), x)
    ),
    LAYER_NORM: Rule((F.layer_norm,), (nn.LayerNorm,)),
    MULTIPLY: Rule((operator.mul, torch.mul)),
}


def _codes(x: Tensor, saves: str) -> Tensor:
    """Of `x`, in the order of its layout."""
    return encode_flat(layouts.flat_view(x, layouts.elementwise_layout_of(x)), saves)


def _decoded(code: Tensor, shape: Sequence[int], layout: str, saves: str, like: Tensor) -> Tensor:
    elements = torch.Size(shape).numel()
    if code.dtype is not torch.uint8 or code.shape != (flat_bytes(elements, saves),):
        raise InputError(
            "backward got other bytes than its forward kept",
            value=f"{code.numel()} bytes for {tuple(shape)}",
            remedy="pass on what forward returned and saved as it is",
        )
    return layouts.from_flat(decode_flat(code, elements, saves, like.dtype), shape, layout)


# ---- Functions of one element --------------------------------------------------------------------


def elementwise_reference(x: Tensor, rule: str, saves: str) -> tuple[Tensor, Tensor]:
    """`RULES[rule]` of `x`, and the codes of its derivative.

    Args:
        x: any shape.
        rule: a name in `RULES`, of a rule with a derivative.
        saves: "int8" or "int4".

    Returns:
        y: as in eager, of x's layout.
        code: uint8 [bytes], in the order of x's layout.
    """
    chosen = RULES[rule]
    assert chosen.derivative is not None
    y = layouts.of_each(chosen.of_elements, x)
    derivative = layouts.of_each(chosen.derivative, x)
    derivative = in_layout(derivative, layouts.elementwise_layout_of(x))
    return not_a_view(y), _codes(derivative, saves)


elementwise = torch.library.custom_op("swatfx::elementwise", elementwise_reference, mutates_args=())


@elementwise.register_fake
def _(x: Tensor, rule: str, saves: str) -> tuple[Tensor, Tensor]:
    chosen = RULES[rule]
    y = chosen.functions[0](x, **chosen.options)
    return y, x.new_empty(flat_bytes(x.numel(), saves), dtype=torch.uint8)


def elementwise_backward_reference(grad: Tensor, code: Tensor, layout: str, saves: str) -> Tensor:
    """Gradient of `swatfx::elementwise`: `grad` times the derivative; in `layout`."""
    return in_layout(grad * _decoded(code, grad.shape, layout, saves, grad), layout)


elementwise_backward = torch.library.custom_op(
    "swatfx::elementwise_backward", elementwise_backward_reference, mutates_args=()
)


@elementwise_backward.register_fake
def _(grad: Tensor, code: Tensor, layout: str, saves: str) -> Tensor:
    return new_in_layout(grad.shape, layout, grad)


def _setup_elementwise(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = layouts.elementwise_layout_of(inputs[0]), inputs[2]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _elementwise_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    (found,) = once_only(elementwise_backward(grad, *ctx.saved_tensors, *ctx.options))
    return found, None, None


elementwise.register_autograd(_elementwise_backward, setup_context=_setup_elementwise)
elementwise_backward.register_autograd(no_double_backward)


# ---- Layer norm ----------------------------------------------------------------------------------


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    eps: float,
    saves: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`F.layer_norm(x, shape, weight, bias, eps)`, and what backward wants.

    Args:
        x: in any memory order; a matrix's features may lie outermost, and lie so in y then.
        weight: of `shape`, or None; of x's dtype, or float32.
        bias: likewise.
        shape: what is normalised.
        eps: added to the variance.
        saves: "int8" or "int4".

    Returns:
        y: as in eager.
        rstd: of every row, float32 or wider; in the order in which they lie.
        code: uint8 [bytes], the normalised input in its memory order.
    """
    if _norm_layout(x, shape) != layouts.ROW_MAJOR:
        y, _, rstd = features_norm(x, weight, bias, eps)
        seen = features_norm(x, None, None, eps)[0]
        return y, rstd, encode_flat(layouts.flat_view(seen, _norm_layout(x, shape)), saves)
    x = x.contiguous()
    y, mean, rstd = aten.native_layer_norm(x, list(shape), weight, bias, eps)
    return y, rstd, encode_flat((x - mean).mul_(rstd).to(x.dtype).view(-1), saves)


def _norm_layout(x: Tensor, shape: Sequence[int]) -> str:
    """In which a layer norm goes through `x`: its own where features lie outermost."""
    if len(shape) != 1 or x.dtype not in (torch.float32, torch.bfloat16):
        return layouts.ROW_MAJOR
    layout = layouts.elementwise_layout_of(x)
    return layout if layout in layouts.FEATURES_OUTERMOST else layouts.ROW_MAJOR


layer_norm = torch.library.custom_op(
    "swatfx::layer_norm",
    layer_norm_reference,
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, SymInt[] shape, float eps, str saves)"
    " -> (Tensor, Tensor, Tensor)",
)


@layer_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    eps: float,
    saves: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if _norm_layout(x, shape) != layouts.ROW_MAJOR:
        y, _, rstd = features_norm(x, weight, bias, eps)
    else:
        y, _, rstd = aten.native_layer_norm(x.contiguous(), list(shape), weight, bias, eps)
    return y, rstd, x.new_empty(flat_bytes(x.numel(), saves), dtype=torch.uint8)


def layer_norm_backward_reference(
    grad: Tensor,
    rstd: Tensor,
    code: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    saves: str,
    layout: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `swatfx::layer_norm` for x, weight and bias; those not wanted: empty.

    `layout` is that of forward's input, and of its gradient.
    """
    grad = in_layout(grad, layout)
    seen = _decoded(code, grad.shape, layout, saves, grad)
    mean, one = torch.zeros_like(rstd), torch.ones_like(rstd)  # what is normalised has these
    if layout != layouts.ROW_MAJOR:
        dx, dweight, dbias = features_norm_backward(grad, seen, mean, one, weight, list(wants))
        if wants[0]:
            layouts.flat_view(dx, layout).view(grad.shape[-1], -1).mul_(rstd)
        return dx, dweight, dbias
    found = aten.native_layer_norm_backward(
        grad, seen, list(shape), mean, one, weight, bias, list(wants)
    )
    dx, dweight, dbias = (grad.new_empty(0) if g is None else g for g in found)
    return (dx * rstd).to(grad.dtype) if wants[0] else dx, dweight, dbias


layer_norm_backward = torch.library.custom_op(
    "swatfx::layer_norm_backward",
    layer_norm_backward_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor rstd, Tensor code, Tensor? weight, Tensor? bias, SymInt[] shape,"
    " str saves, str layout, bool[] wants) -> (Tensor, Tensor, Tensor)",
)


@layer_norm_backward.register_fake
def _(
    grad: Tensor,
    rstd: Tensor,
    code: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    saves: str,
    layout: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    first = new_in_layout(grad.shape, layout, grad) if wants[0] else grad.new_empty(0)
    second, third = (
        torch.empty_like(owner) if wanted and owner is not None else grad.new_empty(0)
        for owner, wanted in zip((weight, bias), wants[1:], strict=True)
    )
    return first, second, third


def _setup_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.shape, _, ctx.saves = inputs
    ctx.layout = _norm_layout(x, ctx.shape)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], weight, bias)


def _layer_norm_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    wants = list(ctx.needs_input_grad[:3])
    told = (ctx.shape, ctx.saves, ctx.layout, wants)
    grads = once_only(*layer_norm_backward(grad, *ctx.saved_tensors, *told))
    return (*(g if want else None for g, want in zip(grads, wants, strict=True)), None, None, None)


layer_norm.register_autograd(_layer_norm_backward, setup_context=_setup_layer_norm)
layer_norm_backward.register_autograd(no_double_backward)


# ---- Products of elements ------------------------------------------------------------------------


def multiply_reference(
    a: Tensor, b: Tensor, saves: str, wants: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """`a * b`, and the codes of those operands that are as large as it.

    Args:
        a: any shape.
        b: that a may be multiplied with; of a's dtype.
        saves: "int8" or "int4".
        wants: gradients of a and b: what only one of them needs is not coded for the other.

    Returns:
        y: the product.
        code: uint8 [bytes], of a and then of b, in the order of each one's layout, each up to a
            whole number of cache lines.
    """
    y = a * b
    kept = _coded(a, b, wants, y.numel())
    parts = [
        encode_lines(layouts.flat_view(x, layouts.layout_of(x)), saves)
        for x in kept
        if x is not None
    ]
    return y, torch.cat(parts) if parts else a.new_empty(0, dtype=torch.uint8)


def _coded(
    a: Tensor, b: Tensor, wants: Sequence[bool], elements: int
) -> tuple[Tensor | None, Tensor | None]:
    """The operands, each where its codes are kept: the gradient of the other wants it."""
    first = a if wants[1] and a.numel() == elements else None
    second = b if wants[0] and b.numel() == elements else None
    return first, second


multiply = torch.library.custom_op(
    "swatfx::multiply",
    multiply_reference,
    mutates_args=(),
    schema="(Tensor a, Tensor b, str saves, bool[] wants) -> (Tensor, Tensor)",
)


@multiply.register_fake
def _(a: Tensor, b: Tensor, saves: str, wants: Sequence[bool]) -> tuple[Tensor, Tensor]:
    y = a * b
    kept = [x for x in _coded(a, b, wants, y.numel()) if x is not None]
    size = sum(line_bytes(x.numel(), saves) for x in kept)
    return y, a.new_empty(size, dtype=torch.uint8)


def multiply_backward_reference(
    grad: Tensor,
    code: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    shapes: Sequence[int],
    split: int,
    orders: str,
    saves: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of `swatfx::multiply` for a and b; those not wanted: empty.

    Args:
        grad: of the product.
        code: as forward returned it.
        a: the operand, where it is kept as it is.
        b: likewise.
        shapes: of a, and then of b.
        split: dimensions of a.
        orders: layouts of a and b, a space between them.
        saves: as forward was told; so is wants.
        wants: likewise.
    """
    sizes = shapes[:split], shapes[split:]
    seen: list[Tensor | None] = [a, b]
    for i, layout in enumerate(orders.split()):
        if wants[1 - i] and seen[i] is None:
            elements = torch.Size(sizes[i]).numel()
            own = code[: flat_bytes(elements, saves)]
            seen[i] = _decoded(own, sizes[i], layout, saves, grad)
            code = code[line_bytes(elements, saves) :]
    found = []
    for wanted, other, size in zip(wants, reversed(seen), sizes, strict=True):
        if wanted and other is not None:
            found.append((grad * other).sum_to_size(tuple(size)))
        else:
            found.append(grad.new_empty(0))
    return found[0], found[1]


multiply_backward = torch.library.custom_op(
    "swatfx::multiply_backward",
    multiply_backward_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor code, Tensor? a, Tensor? b, SymInt[] shapes, SymInt split,"
    " str orders, str saves, bool[] wants) -> (Tensor, Tensor)",
)


@multiply_backward.register_fake
def _(
    grad: Tensor, code: Tensor, a: Tensor | None, b: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    shapes, split, orders, _, wants = rest
    sizes = shapes[:split], shapes[split:]
    seen = [
        layouts.empty(size, layout, dtype=grad.dtype, device=grad.device) if x is None else x
        for x, size, layout in zip((a, b), sizes, orders.split(), strict=True)
    ]
    first, second = (
        (grad * other).sum_to_size(tuple(size)) if wanted else grad.new_empty(0)
        for wanted, other, size in zip(wants, reversed(seen), sizes, strict=True)
    )
    return first, second


def _setup_multiply(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, ctx.saves, ctx.wants = inputs
    y, code = output
    coded = _coded(a, b, ctx.wants, y.numel())
    ctx.shapes, ctx.split = (*a.shape, *b.shape), a.dim()
    ctx.orders = f"{layouts.layout_of(a)} {layouts.layout_of(b)}"
    ctx.mark_non_differentiable(code)
    ctx.set_materialize_grads(False)
    whole = (
        x if wanted and y is None else None
        for x, y, wanted in zip((a, b), coded, reversed(ctx.wants), strict=True)
    )
    ctx.save_for_backward(code, *whole)


def _multiply_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    told = (ctx.shapes, ctx.split, ctx.orders, ctx.saves, ctx.wants)
    grads = once_only(*multiply_backward(grad, *ctx.saved_tensors, *told))
    return (*(g if want else None for g, want in zip(grads, ctx.wants, strict=True)), None, None)


multiply.register_autograd(_multiply_backward, setup_context=_setup_multiply)
multiply_backward.register_autograd(no_double_backward)
