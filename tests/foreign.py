"""A chat model of another family: ChatML turns, tool calls and reasoning, random weights, Qwen2's classes.

The template writes what Qwen's write, in our own words: tools into a system block, calls between `<tool_call>` tags,
what tools return into a user's turn, which neighbouring tool turns share. Reasoning stays in the turns before the last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from data.embedded import layout as nano
from tests.runs import write_jsonl

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")  # tokens of their own, and text all the same
SENTENCES = (
    "What is the weather in Paris? What time is it there? I call a tool and tell you what it returns.",
    "It is sunny in Paris, 21 degrees, and it is half past nine in London.",
    '{"name": "get_weather", "arguments": {"city": "Paris"}} {"name": "get_time", "arguments": {"city": "London"}}',
    "system user assistant tool functions You may call these: <tools></tools> <tool_response></tool_response>",
    "今天天气很好，我们去公园散步吧。",
)
TEMPLATE = r"""{%- set first = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools -%}
<|im_start|>system
{% if first %}{{ first }}

{% endif %}You may call these functions:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools><|im_end|>
{% elif first -%}
<|im_start|>system
{{ first }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|im_start|>user{%- endif -%}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}<|im_end|>
{% endif -%}
{%- elif message.role == 'assistant' -%}
<|im_start|>assistant
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
{{- '\n' if message.content or not loop.first -}}
{{- '<tool_call>\n' + (call.function or call) | tojson + '\n</tool_call>' -}}
{%- endfor -%}
<|im_end|>
{% elif message.role == 'user' or not loop.first -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of some 400 tokens with the template; `<|im_end|>` ends a text."""
    backend = Tokenizer(models.BPE())
    pieces = [
        pre_tokenizers.Split(Regex(nano.SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator((*SENTENCES, "\n\n", "\n\n\n") * 4, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def save_chatml_folder(folder: Path, embedding_std: float = 0.02) -> Path:
    """Save a freshly initialised Qwen2 of some ten thousand weights with its tokenizer; returns the folder.

    Args:
        folder: where.
        embedding_std: spread of the embeddings; an adapter beside small ones, which are also the head, learns little.
    """
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=embedding_std)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tool(name: str) -> dict[str, Any]:
    """Return the JSON schema of a function of one argument, a city, as OpenAI's format has it."""
    city = {"type": "object", "properties": {"city": {"type": "string", "default": None}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": f"calls {name}", "parameters": city}}


def call(name: str, city: str, number: int = 0) -> dict[str, Any]:
    """Return a call of such a function."""
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": {"city": city}}}


def turn(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    """Return a message."""
    return {"role": role, "content": content, **keys}


def tool_row() -> dict[str, Any]:
    """Return a row in which two tools are called at once and answer, and one more is called with some text before."""
    messages = [
        turn("user", "What is the weather in Paris, and the time in London?"),
        turn("assistant", None, tool_calls=[call("get_weather", "Paris", 0), call("get_time", "London", 1)]),
        turn("tool", "21 degrees, sunny", tool_call_id="call_0"),
        turn("tool", "half past nine", tool_call_id="call_1"),
        turn("assistant", "It is sunny in Paris, and it is half past nine in London."),
        turn("user", "And the weather there?"),
        turn("assistant", "I call a tool.", tool_calls=[call("get_weather", "London", 2)]),
        turn("tool", "rain", tool_call_id="call_2"),
        turn("assistant", "Rain."),
    ]
    return {"tools": [tool("get_weather"), tool("get_time")], "messages": messages}


def write_rows(folder: Path, rows: list[dict[str, Any]], *names: str) -> Path:
    """Write the rows into each of the files `names` of a folder; returns the folder."""
    for name in names:
        write_jsonl(folder / name, rows)
    return folder
