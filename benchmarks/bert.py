"""BERT as `swatfx bench` takes it: a model with random weights, one batch of sentences, a loss.

    swatfx bench benchmarks.bert:base --policy swat-u:0.9

Wants the library transformers; downloads nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, TOKENS = 8, 128


def base(layers: int = 12) -> tuple[nn.Module, dict[str, Tensor], Callable[[Any], Tensor]]:
    """BERT-base with two classes, 8 sentences of 128 tokens, all of them seen, and their loss."""
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=layers)
    model = transformers.BertForSequenceClassification(config)
    labels = torch.randint(2, (BATCH,))
    inputs = {
        "input_ids": torch.randint(config.vocab_size, (BATCH, TOKENS)),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
    }
    return model, inputs, lambda output: F.cross_entropy(output.logits, labels)
