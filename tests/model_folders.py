"""A GLM of some ten thousand weights in the layout of the released checkpoints, for tests that need a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast


def tiny_config(vocab_size: int, pad: int, stops: list[int], **widths: int) -> GlmConfig:
    """Return the config of GLM-Edge at small widths: full rotary, no attention bias, untied head unless asked."""
    tiny: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
    }
    return GlmConfig(
        vocab_size=vocab_size,
        **(tiny | widths),
        attention_bias=False,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=stops,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )


def tiny_model(vocab_size: int = 300, pad: int = 0, stops: tuple[int, ...] = (1, 2)) -> GlmForCausalLM:
    """Return a model whose weights are large enough that every prediction is decided by its context."""
    torch.manual_seed(0)
    model = GlmForCausalLM(tiny_config(vocab_size, pad, list(stops))).eval()
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


def save_model_folder(folder: Path, tokenizer: PreTrainedTokenizerFast, **widths: int) -> Path:
    """Save a freshly initialised tiny model with `tokenizer`; its stop tokens are those of the released models.

    Args:
        folder: where.
        tokenizer: its tokenizer.
        widths: as `tiny_config` takes them.
    """
    ids = tokenizer.get_vocab()
    stops = [ids[token] for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    torch.manual_seed(0)
    GlmForCausalLM(tiny_config(len(tokenizer), stops[0], stops, **widths)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
