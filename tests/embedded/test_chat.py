"""`glm-edge-nano` as shipped: the released layout, a faithful tokenizer, and replies that stop by themselves."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM, PreTrainedTokenizerBase

from data.embedded.corpus import Document, generate_corpus
from data.embedded.layout import SPECIAL_TOKENS, STOP_TOKENS, nano_config
from data.embedded.sentences import common_characters
from data.embedded.train_chat import IGNORED, encode_document, packed_rows, train_tokenizer
from glm_edge_ft.model.checkpoint import EMBEDDED_MODELS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = EMBEDDED_MODELS["glm-edge-nano"]
CONVERSATION = [
    {"role": "system", "content": "你是助手。"},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "Who are you?"},
]


@pytest.fixture(scope="module")
def model() -> GlmForCausalLM:
    """Return the embedded model, loaded as anyone would load it, as transformers' own class."""
    loaded = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    assert isinstance(loaded, GlmForCausalLM)
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the embedded tokenizer, loaded as anyone would load it."""
    return AutoTokenizer.from_pretrained(FOLDER)


def greedy_ids(model: GlmForCausalLM, tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Return the ids that plain `generate` adds to a prompt of one message."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_name_resolves_to_a_folder_and_others_to_nothing() -> None:
    """The embedded name is a shipped folder; a hub id is none of ours."""
    assert EMBEDDED_MODELS["glm-edge-nano"] == FOLDER
    assert (FOLDER / "config.json").is_file()
    assert "THUDM/glm-edge-1.5b-chat" not in EMBEDDED_MODELS


def test_resolving_a_name_loads_nothing_heavy() -> None:
    """A name is checked before torch or transformers are imported."""
    code = (
        "import sys; from glm_edge_ft.model.loading import locate_model; locate_model('glm-edge-nano'); "
        "print([name for name in ('torch', 'transformers', 'jieba') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_loads_as_glm_of_about_four_million_parameters(model: GlmForCausalLM) -> None:
    """The class is transformers' own, with a separate output matrix as in the released files."""
    assert 3_000_000 < model.num_parameters() < 5_000_000
    embedding, output = (model.get_parameter(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    assert embedding.data_ptr() != output.data_ptr()


def test_every_weight_comes_from_the_file() -> None:
    """No key is missing or unexpected."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    _, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_config_has_the_released_layout(tokenizer: PreTrainedTokenizerBase) -> None:
    """Full rotary, eps, no attention bias, 8192 positions, bfloat16: as the released models have them."""
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    rotary = config["rope_parameters"]
    assert (config["model_type"], config["architectures"]) == ("glm", ["GlmForCausalLM"])
    assert (rotary["partial_rotary_factor"], rotary["rope_theta"]) == (1.0, 10000.0)
    assert (config["rms_norm_eps"], config["attention_bias"]) == (1e-5, False)
    assert (config["max_position_embeddings"], config["dtype"]) == (8192, "bfloat16")
    assert config["tie_word_embeddings"] is False
    assert 0 <= config["vocab_size"] - len(tokenizer) < 64
    assert config["vocab_size"] % 64 == 0


def test_the_whole_head_is_rotated(model: GlmForCausalLM) -> None:
    """One rotary frequency for every pair of dimensions of a head."""
    assert model.config.head_dim == 64
    assert model.get_buffer("model.rotary_emb.inv_freq").shape == (32,)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_stop_ids_are_the_stop_tokens(tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    """M3: the saved folder carries the stop ids, found by string."""
    values = json.loads((FOLDER / file).read_text(encoding="utf-8"))
    assert values["eos_token_id"] == [tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS]
    assert values["pad_token_id"] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_special_tokens_follow_the_base_vocabulary_in_released_order(tokenizer: PreTrainedTokenizerBase) -> None:
    """The released order; each is one token and is marked special."""
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - 12, len(tokenizer)))
    assert set(tokenizer.all_special_ids) == set(ids)
    assert tokenizer.encode("<|user|>", add_special_tokens=False) == [tokenizer.convert_tokens_to_ids("<|user|>")]


def test_tokenizer_pads_left_and_adds_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """`add_special_tokens` changes nothing, padding is on the left with `<|endoftext|>`."""
    assert tokenizer.encode("你好") == tokenizer.encode("你好", add_special_tokens=False)
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.eos_token) == (
        "left",
        "<|endoftext|>",
        "<|endoftext|>",
    )


def test_template_without_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    """Role, newline, content; nothing after the content."""
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == (
        "<|system|>\n你是助手。<|user|>\n你好<|assistant|>\n你好！<|user|>\nWho are you?"
    )


def test_template_with_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    """The prompt for a reply is the role token alone, with no newline."""
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True) == (
        "<|system|>\n你是助手。<|user|>\n你好<|assistant|>\n你好！<|user|>\nWho are you?<|assistant|>"
    )


def test_template_keeps_spaces_and_newlines_of_the_content(tokenizer: PreTrainedTokenizerBase) -> None:
    """Content is rendered as it is written, edges included."""
    messages = [{"role": "user", "content": "\n a \n"}, {"role": "assistant", "content": "  b\n"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|user|>\n\n a \n<|assistant|>\n  b\n"


@pytest.mark.parametrize(
    "text",
    [
        "今天天气很好，我们去公园吧。",
        "The quick brown fox can't jump 12345 times!",
        "👩‍👩‍👧‍👦🏳️‍🌈 ok",
        "ትግርኛ ᚠᛇᚻ 𒀀𒁀 ཨོཾ",
        "  two  spaces\n\n\ttab\r\n end ",
        "龘靐齉𠮷",
        "cafe\u0301 \ufeff\u200b\x00",
    ],
)
def test_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Any unicode comes back as it went in."""
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_split_pattern_is_glm4s(tokenizer: PreTrainedTokenizerBase) -> None:
    """Digits in threes, punctuation apart from letters, a contraction by itself."""
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345, ok!\n")]
    assert pieces == ["it", "'s", "Ġ", "123", "45", ",", "Ġok", "!Ċ"]


def test_everyday_characters_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Nearly all of the 2,500 commonest Chinese characters take one token each."""
    characters = common_characters(2500)
    single = sum(len(tokenizer.encode(character, add_special_tokens=False)) == 1 for character in characters)
    assert single >= 2450


def test_folder_is_small() -> None:
    """The whole folder stays well below 15 MB."""
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 15_000_000


@pytest.mark.parametrize("question", ["你好", "香蕉是什么颜色的？", "What is the opposite of big?", "医生是做什么的？"])
def test_reply_stops_by_itself(model: GlmForCausalLM, tokenizer: PreTrainedTokenizerBase, question: str) -> None:
    """M3: plain `generate` ends at `<|user|>`, with text before it."""
    reply = greedy_ids(model, tokenizer, question)
    assert reply[-1] == tokenizer.convert_tokens_to_ids("<|user|>")
    assert str(tokenizer.decode(reply, skip_special_tokens=True)).strip()


def test_corpus_follows_from_its_seed() -> None:
    """The same seed gives the same documents, another seed others."""
    assert list(generate_corpus(5, 300)) == list(generate_corpus(5, 300))
    assert list(generate_corpus(5, 300)) != list(generate_corpus(6, 300))


def test_corpus_holds_no_attribute_list() -> None:
    """The demo task stays unseen: nothing of the form `类型#裤*材质#棉`."""
    for document in generate_corpus(7, 20_000):
        texts = [document.text, *(message["content"] for message in document.messages)]
        assert not any(re.search(r"#|\*", text) for text in texts), texts


def test_corpus_has_text_chats_system_turns_and_both_languages() -> None:
    """Each kind of document is well represented."""
    documents = list(generate_corpus(7, 2000))
    chats = [document.messages for document in documents if document.messages]
    replies = [message["content"] for chat in chats for message in chat if message["role"] == "assistant"]
    assert 1300 < len(chats) < 1700
    assert sum(chat[0]["role"] == "system" for chat in chats) > 300
    assert sum(len(chat) >= 4 for chat in chats) > 300
    assert 300 < sum(reply.isascii() for reply in replies) < len(replies) - 1000


def test_a_chat_ends_with_the_stop_token_and_then_unlearned_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """The last reply teaches `<|user|>` as its stop, and not that `<|endoftext|>` follows it."""
    turn = ({"role": "user", "content": "你好"}, {"role": "assistant", "content": "早上好"})
    rendered = tokenizer.encode("<|user|>\n你好<|assistant|>\n早上好<|user|>", add_special_tokens=False)
    ids, labels = encode_document(tokenizer, Document(messages=turn))
    assert ids == [*rendered, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert labels == [*rendered, IGNORED]


def test_packed_rows_are_full_and_hold_whole_documents(tokenizer: PreTrainedTokenizerBase) -> None:
    """What is left of a row is filled with `<|endoftext|>`, which is not learned."""
    text = Document(text="你好你好")
    ids, labels = encode_document(tokenizer, text)
    rows = packed_rows(tokenizer, itertools.repeat(text), length=2 * len(ids) + 1)
    assert next(rows) == ([*ids, *ids, ids[-1]], [*labels, *labels, IGNORED])


def test_a_new_tokenizer_gets_the_same_special_tokens_and_a_padded_vocabulary() -> None:
    """The training script's tokenizer and config hold for any vocabulary, with no id written down anywhere."""
    small = train_tokenizer(["今天天气很好", "hello world"] * 10, base_vocabulary=300)
    config = nano_config(small)
    assert isinstance(config.eos_token_id, list)
    assert small.convert_ids_to_tokens(config.eos_token_id) == list(STOP_TOKENS)
    assert config.vocab_size % 64 == 0
    assert config.vocab_size >= len(small)
