"""nn.MultiheadAttention, torch.nn's transformer stacks and shifted windows: linear layers all."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import SwinTransformer3d

import swatfx
from swatfx.errors import InputError
from tests.nets.compare import (
    DENSITY_1,
    HALF,
    assert_matches_at_density_1,
    assert_same,
    seeded,
    skipped,
    train_step,
)

torch.set_num_threads(1)
L, S, N, E = 5, 7, 2, 8


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse_names(gm: Any, *args: Any) -> set[str]:
    reasons = skipped(gm, *args)
    assert set(reasons.values()) == {None}, reasons
    return set(reasons)


class Attend(nn.Module):
    """Calls attention as self-attention, with one memory, or with three different tensors."""

    def __init__(self, how: str, *, trace: bool = True, **options: Any) -> None:
        super().__init__()
        self.how, self.trace = how, trace
        self.call: dict[str, Any] = {}
        self.attn = nn.MultiheadAttention(E, 2, **options)

    def forward(self, x: Tensor, memory: Tensor, value: Tensor) -> Any:
        if not self.trace and x.shape[0] < 1:
            return x  # control flow on a shape: stays eager
        rest = {"self": (x, x), "memory": (memory, memory), "three": (memory, value)}[self.how]
        return self.attn(x, *rest, **self.call)


def attention_inputs(batch_first: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x, memory, value = rand(L, N, E), rand(S, N, E, seed=1), rand(S, N, E, seed=2)
    if batch_first:
        return x.transpose(0, 1), memory.transpose(0, 1), value.transpose(0, 1)
    return x, memory, value


@pytest.mark.parametrize("how", ["self", "memory", "three"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "dropout": 0.4}, {"bias": False}])
def test_attention(how: str, weights: bool, options: dict[str, Any]) -> None:
    model = Attend(how, **options)
    model.call = {"need_weights": weights}
    args = attention_inputs("batch_first" in options)
    gm = assert_matches_at_density_1(model, *args)
    assert not gm.eager
    count = {"self": 1, "memory": 2, "three": 3}[how]
    assert len(sparse_names(gm, *args)) == count + 1


@pytest.mark.parametrize(
    "options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 4}]
)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("trace", [False, True])
def test_attention_with_odd_options(options: dict[str, Any], weights: bool, trace: bool) -> None:
    model = Attend("three", trace=trace, **options)
    model.call = {"need_weights": weights}
    args = [rand(L, N, E), rand(S, N, options.get("kdim", E)), rand(S, N, options.get("vdim", E))]
    sparse_names(assert_matches_at_density_1_closely(model, *args), *args)


def assert_matches_at_density_1_closely(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """As its namesake, up to rounding: one projection of all rows is not three, bit for bit."""
    gm = swatfx.compile(model, DENSITY_1)
    for training in (True, False):
        model.train(training)
        gm.train(training)
        torch.testing.assert_close(seeded(gm, args, kwargs), seeded(model, args, kwargs))
    return gm


@pytest.mark.parametrize("how", ["self", "memory", "three"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_below_eager_code_is_one_packed_layer(how: str, batch_first: bool) -> None:
    model = Attend(how, trace=False, batch_first=batch_first)
    args = attention_inputs(batch_first)
    match = assert_matches_at_density_1 if how == "self" else assert_matches_at_density_1_closely
    gm = match(model, *args)
    assert gm.eager[""] == "untraceable: control flow on a tensor"
    assert sparse_names(gm, *args) == {"attn.in_proj_weight", "attn.out_proj"}
    train_step(swatfx.compile(model, HALF), *args)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("batch", [(), (1,)])
def test_attention_with_masks_and_without_a_batch(trace: bool, batch: tuple[int, ...]) -> None:
    model = Attend("self", trace=trace)
    x = rand(L, *batch, E)
    padding = torch.tensor([False, False, True, False, False])
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    for call in (
        {"need_weights": False},
        {"average_attn_weights": False},
        {"key_padding_mask": padding.expand(*batch, L), "attn_mask": causal.isinf()},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": causal.isinf(), "need_weights": False},
        {"attn_mask": causal.expand(2, L, L)},
    ):
        model.call = call
        # Without a batch, torch.nn projects self-attention in three parts: bits may differ.
        match = assert_matches_at_density_1 if batch else assert_matches_at_density_1_closely
        match(model, x, x, x)


class Subclass(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(E, E)
        self.attn = Subclass(E, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.fc(x)
        return self.attn(x, x, x)[0]


def test_attention_that_stays_eager_is_listed_as_dense() -> None:
    gm = assert_matches_at_density_1(Holder(), rand(L, N, E))
    reasons = skipped(gm, rand(L, N, E))
    assert reasons["fc"] is None
    for name in ("attn.in_proj_weight", "attn.out_proj"):
        assert "untraceable" in str(reasons[name]), reasons


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(E, 2, 16, **({"batch_first": True} | options))


LAYER = {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"}


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_first": True, "activation": "gelu"}, {"batch_first": False, "bias": False}],
)
def test_encoder_layer_as_the_model(options: dict[str, Any]) -> None:
    x = rand(N, L, E)
    gm = assert_matches_at_density_1(encoder_layer(**options), x)
    assert not gm.eager and sparse_names(gm, x) == LAYER
    causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1 if options == {} else 0])
    if options == {}:
        padding = torch.tensor([[False] * L, [False] * 3 + [True] * 2])
        assert_matches_at_density_1(
            encoder_layer(), x, src_mask=causal.isinf(), src_key_padding_mask=padding
        )


class Guarded(nn.Module):
    """Control flow on a shape around any module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *rest: Tensor, **options: Any) -> Any:
        return self.inner(x, *rest, **options) if x.shape[0] > 0 else x


@pytest.mark.parametrize("below_eager", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_evaluation_never_bypasses_the_sparse_weights(below_eager: bool, wrapped: bool) -> None:
    """The fused kernel reads dense weights; at density 1/2 the outputs would differ a lot."""

    class Own(nn.TransformerEncoderLayer):
        def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(src, *args, **kwargs)

    layer = Own(E, 2, 16, 0.0, batch_first=True) if wrapped else encoder_layer(dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    x = rand(N, L, E)
    gm = swatfx.compile(Guarded(model) if below_eager else model, HALF)
    gm.train()
    trained = gm(x)
    gm.eval()
    with torch.no_grad():
        assert_same(gm(x), trained.detach())
        model.eval()
        assert float((model(x) - trained).abs().max()) > 0.01
    reasons = skipped(gm, x)
    assert len(reasons) == 8 and set(reasons.values()) == {None}, reasons


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("below_eager", [False, True])
@pytest.mark.parametrize("how", ["none", "causal", "hint", "padding", "both"])
def test_encoder_with_masks(below_eager: bool, how: str) -> None:
    model: nn.Module = nn.TransformerEncoder(encoder_layer(), 2, nn.LayerNorm(E))
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    padding = torch.tensor([[False] * L, [False] * 3 + [True] * 2])
    options: dict[str, Any] = {
        "none": {},
        "causal": {"mask": causal},
        "hint": {"mask": causal, "is_causal": True},
        "padding": {"src_key_padding_mask": padding},
        "both": {"mask": causal, "src_key_padding_mask": padding.float() * -1e9},
    }[how]
    model = Guarded(model) if below_eager else model
    x = rand(N, L, E)
    gm = assert_matches_at_density_1(model, x, **options)
    with torch.no_grad():  # the fused kernel of the original rounds differently
        model.eval()
        gm.eval()
        torch.testing.assert_close(gm(x, **options), model(x, **options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("below_eager", [False, True])
def test_encoder_and_decoder(below_eager: bool) -> None:
    model: nn.Module = nn.Transformer(E, 2, 1, 2, 16, batch_first=True)
    model = Guarded(model) if below_eager else model
    src, tgt = rand(N, S, E), rand(N, L, E, seed=1)
    gm = assert_matches_at_density_1_closely(model.eval(), src, tgt)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, -1] = True
    for options in (
        {"tgt_mask": mask, "tgt_is_causal": True},
        {"tgt_mask": mask, "memory_key_padding_mask": padding, "src_key_padding_mask": padding},
    ):
        gm.train()
        model.train()
        torch.manual_seed(0)
        expected = model(src, tgt, **options)
        torch.manual_seed(0)
        assert_same(gm(src, tgt, **options), expected)
    # 1 encoder layer: in, out, 2 linear. 2 decoder layers: in, out; q, kv, out; 2 linear.
    assert len(sparse_names(gm, src, tgt)) == 4 + 2 * 7
    with pytest.raises(InputError, match="batch sizes"):
        gm(src, tgt[:1])


def test_shifted_windows_of_a_video() -> None:
    model = SwinTransformer3d([2, 4, 4], E, [1, 2], [2, 4], [2, 3, 3], num_classes=5)
    x = rand(1, 3, 8, 20, 28)
    gm = assert_matches_at_density_1(model, x)
    assert not gm.eager and len(sparse_names(gm, x)) == 1 + 3 * 4 + 1 + 1


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize("side", [4, 7])
def test_shifted_windows(kind: Any, side: int) -> None:
    model = kind(E, [4, 4], [2, 2], 2, dropout=0.2, attention_dropout=0.2)
    x = rand(N, side, side + 2, E)
    gm = assert_matches_at_density_1(model, x)
    assert not gm.eager and {"qkv", "proj"} <= sparse_names(gm, x)
