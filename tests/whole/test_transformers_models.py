"""Tiny models of HF transformers, called by keyword with labels: values, gradients, a step."""

import copy
from typing import Any

import pytest
import torch

import swatfx
from tests.nets.saving_nets import kept_by

t = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
CLASSES = torch.tensor([0, 1])


def _ids() -> torch.Tensor:
    return torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def _images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def vit() -> Any:
    config = t.ViTConfig(**SIZES, **NO_DROPOUT, image_size=32, patch_size=8, num_labels=3)
    return t.ViTForImageClassification(config), {"pixel_values": _images(32), "labels": CLASSES}


def bert() -> Any:
    config = t.BertConfig(**SIZES, **NO_DROPOUT, vocab_size=50, num_labels=3)
    mask = torch.ones(2, 7, dtype=torch.long)
    inputs = {"input_ids": _ids(), "attention_mask": mask, "labels": CLASSES}
    return t.BertForSequenceClassification(config), inputs


def gpt2() -> Any:
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = t.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, **none)
    return t.GPT2LMHeadModel(config), {"input_ids": _ids(), "labels": _ids()}


def llama() -> Any:
    config = t.LlamaConfig(**SIZES, vocab_size=50, num_key_value_heads=2)
    return t.LlamaForCausalLM(config), {"input_ids": _ids(), "labels": _ids()}


def t5() -> Any:
    config = t.T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return t.T5ForConditionalGeneration(config), {"input_ids": _ids(), "labels": _ids()}


def whisper() -> Any:
    both = ("layers", "attention_heads", "ffn_dim")
    sizes = {
        f"{w}_{n}": v for w in ("encoder", "decoder") for n, v in zip(both, (2, 4, 64), strict=True)
    }
    config = t.WhisperConfig(
        vocab_size=50,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **sizes,
    )
    inputs = {"input_features": torch.randn(2, 8, 40), "labels": _ids()}
    return t.WhisperForConditionalGeneration(config), inputs


def convnext() -> Any:
    config = t.ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 2, 1], num_labels=3)
    return t.ConvNextForImageClassification(config), {
        "pixel_values": _images(64),
        "labels": CLASSES,
    }


def clip() -> Any:
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 32}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    config = t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    inputs = {"input_ids": _ids(), "pixel_values": _images(32), "return_loss": True}
    return t.CLIPModel(config), inputs


def mixtral() -> Any:
    config = t.MixtralConfig(**SIZES, vocab_size=50, num_key_value_heads=2, num_local_experts=4)
    return t.MixtralForCausalLM(config), {"input_ids": _ids(), "labels": _ids()}


def segformer() -> Any:
    config = t.SegformerConfig(
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=16,
        num_attention_heads=[1, 2, 2, 4],
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        num_labels=3,
        **NO_DROPOUT,
    )
    labels = torch.randint(0, 3, (2, 64, 64), generator=torch.Generator().manual_seed(1))
    inputs = {"pixel_values": _images(64), "labels": labels}
    return t.SegformerForSemanticSegmentation(config), inputs


MODELS = [vit, bert, gpt2, llama, t5, whisper, convnext, clip, mixtral, segformer]


@pytest.mark.parametrize("build", MODELS)
def test_same_values_and_gradients_at_density_1_and_a_sparse_step(build: Any) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    ref = copy.deepcopy(model)
    gm = swatfx.compile(model, "swat-u:0.0")
    for training in (True, False):
        ref.train(training)
        gm.train(training)
        results = []
        for net in (ref, gm):
            torch.manual_seed(1)
            results.append(net(**inputs))
        assert type(results[0]) is type(results[1])
        torch.testing.assert_close(results[1].loss, results[0].loss)
        if training:
            results[0].loss.backward()
            results[1].loss.backward()
    for (name, p), q in zip(ref.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            scale = float(p.grad.abs().max())
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7)
    sparse = swatfx.compile(ref, "swat-u:0.9").train()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01)
    optimizer.zero_grad()
    sparse(**inputs).loss.backward()
    optimizer.step()
    densities = [
        layer.realised_weight_density
        for layer in swatfx.report(sparse, inputs).layers
        if not layer.skipped
    ]
    assert densities and all(d is not None and d < 0.2 for d in densities)


def test_save_pretrained_writes_the_dense_model(tmp_path: Any) -> None:
    model, inputs = bert()
    gm = swatfx.compile(model, "swat-u:0.5")
    gm.save_pretrained(tmp_path)
    again = t.BertForSequenceClassification.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert gm.config.vocab_size == 50 and gm.device.type == "cpu"
    text, _ = gpt2()
    compiled = swatfx.compile(text.eval(), "swat-u:0.0")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    prompt = {"input_ids": _ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    assert torch.equal(compiled.generate(**prompt, **options), text.generate(**prompt, **options))


def test_the_warning_counts_products_that_are_no_layers() -> None:
    text = r"1 of 1 layers \(6% of the weights\) are below.*; 8 matrices that are .* stay dense"
    with pytest.warns(swatfx.SwatWarning, match=text):
        swatfx.compile(gpt2()[0], "swat-u:0.8")


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("saves", ["exact", "int8", "int4"])
def test_attention_of_bert_keeps_what_is_predicted(saves: str, half: bool) -> None:
    """With dropout and a padding mask; its attention is eager code to us."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64}
    model = t.BertForSequenceClassification(t.BertConfig(**sizes, vocab_size=50, num_labels=3))
    mask = torch.ones(4, 32, dtype=torch.long)
    mask[1:, 20:] = 0
    inputs = {"input_ids": torch.randint(1, 50, (4, 32)), "attention_mask": mask}
    gm = swatfx.compile(model, "swat-u:0.9", norm_saves=saves, example_inputs=inputs)
    plain = copy.deepcopy(gm)
    for part in (plain, *plain.parts.values()):
        part.__dict__["eager_attention"] = None
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        torch.manual_seed(3)
        report = swatfx.report(gm, inputs)
        twins = [copy.deepcopy(m).train() for m in (gm, plain)]
        sizes = []
        for twin in twins:
            torch.manual_seed(3)
            sizes.append(kept_by(lambda twin=twin: twin(**inputs).logits, twin))
        outputs = []
        for net in (gm.train(), plain.train()):
            torch.manual_seed(3)
            outputs.append(net(**inputs).logits)
    assert report.totals["saved_bytes"] == sizes[0]
    weights = 4 * 4 * 32 * 32  # of a layer; eager keeps them twice, and the noise
    assert sizes[1] - sizes[0] > 2 * weights * (2 if half else 4)
    assert torch.equal(*outputs)
