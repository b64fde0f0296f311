"""What `glm-edge-nano` is made of besides its weights: special tokens, chat template, config."""

from __future__ import annotations

from transformers import GlmConfig, PreTrainedTokenizerBase

# Order and spelling of the released checkpoints (glm-edge-1.5b-chat and its siblings); they follow the base vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
)  # fmt: skip
PAD_TOKEN = "<|endoftext|>"
TURN_END_TOKEN = "<|user|>"
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")

# The split of GLM-4's tokenizer; byte-level BPE merges never cross it.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# GLM-Edge chat: the role, a newline, the content; nothing closes a turn but the next role, and the prompt for a reply
# has no newline.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] in ['system', 'user', 'assistant'] -%}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)

VOCAB_MULTIPLE = 64


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of a token that the tokenizer is known to have."""
    return int(tokenizer.get_vocab()[token])


def nano_config(tokenizer: PreTrainedTokenizerBase) -> GlmConfig:
    """Return the configuration of `glm-edge-nano` for a tokenizer: about 4 million parameters in the released layout.

    The vocabulary is padded to a multiple of 64, as the released one is (59,258 tokens, 59,264 rows).
    """
    return GlmConfig(
        vocab_size=-(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=False,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        # transformers' own default for `glm` is 0.5, which would break the model without a word
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        pad_token_id=token_id(tokenizer, PAD_TOKEN),
        eos_token_id=[token_id(tokenizer, token) for token in STOP_TOKENS],
    )
