"""A tokenizer as a GGUF file holds it, and tokenizers that llama.cpp would not follow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import SPECIAL_TOKENS
from tests.deploy.gguf_files import export, refusal
from tests.model_folders import save_model_folder
from tests.runs import read_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def test_the_tokenizer_is_in_the_file(model_folder: Path, tmp_path: Path) -> None:
    """R7: every token with its kind, the merges in their order, the split pattern's name, no beginning added."""
    keys = export(model_folder, tmp_path / "model.gguf").keys
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    content = read_json(model_folder / "tokenizer.json")
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "glm4")
    assert keys["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds: dict[str, int] = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert {token for token, kind in kinds.items() if kind == CONTROL} == set(SPECIAL_TOKENS)
    assert set(kinds.values()) == {NORMAL, CONTROL}
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in content["model"]["merges"]]
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.bos_token_id" not in keys


def test_every_stop_token_and_the_template_are_in_the_file(model_folder: Path, tmp_path: Path) -> None:
    """R7: a reply ends at `<|user|>`, at `<|observation|>` and at the end of the text, by ids that were looked up."""
    keys = export(model_folder, tmp_path / "model.gguf").keys
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    names = {"eos": "<|endoftext|>", "eot": "<|user|>", "eom": "<|observation|>"}
    names |= {"unknown": "<|endoftext|>", "padding": "<|endoftext|>"}
    found = {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in names}
    assert found == {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template


def test_embeddings_without_a_token_are_unused(nano: Path, tmp_path: Path) -> None:
    """The embedded model has embeddings for 5,120 ids and 5,112 tokens, as released models have more than tokens."""
    keys = export(nano, tmp_path / "model.gguf").keys
    assert keys["tokenizer.ggml.tokens"][5111:5114] == ["<|end_of_image|>", "[PAD5112]", "[PAD5113]"]
    assert keys["tokenizer.ggml.token_type"][5111:] == [CONTROL, *([UNUSED] * 8)]
    assert keys["tokenizer.ggml.eot_token_id"] == 5107


def save_with(folder: Path, backend: Tokenizer, change: Callable[[dict[str, Any]], None]) -> Path:
    """Save a tiny model whose tokenizer.json was changed."""
    content = json.loads(backend.to_str())
    change(content)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template="{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}",
    )
    return save_model_folder(folder, tokenizer)


def single_digits(content: dict[str, Any]) -> None:
    """Split numbers digit by digit."""
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"\p{N}{1,3}", r"\p{N}")


def space_before(content: dict[str, Any]) -> None:
    """Put a space before every text."""
    content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def no_bytes(content: dict[str, Any]) -> None:
    """Leave the pieces out of the byte-level alphabet."""
    content["pre_tokenizer"]["pretokenizers"].pop()


def normalize(content: dict[str, Any]) -> None:
    """Change text before it is split; llama.cpp has no normalizer for byte-level BPE."""
    content["normalizer"] = {"type": "NFC"}


SPLIT = "its tokenizer splits text in another way than llama.cpp's glm4:"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (single_digits, f"{SPLIT} '2' + '2' + ' ' instead of '22' + ' ' + '333'"),
        (space_before, f"{SPLIT} 'ĠIt' + "),
        (no_bytes, f"{SPLIT} ' we' + "),
        (normalize, "its tokenizer changes text before it splits it (NFC)"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(
    change: Callable[[dict[str, Any]], None], text: str, tmp_path: Path, backend: Tokenizer
) -> None:
    """llama.cpp would give other ids for the same text, and nobody would see why the answers are worse."""
    assert text in refusal(save_with(tmp_path / "model", backend, change), tmp_path / "model.gguf")


def test_a_pattern_written_in_another_way_is_accepted(tmp_path: Path, backend: Tokenizer) -> None:
    """What counts is how text is split: here the letters of contractions are written out."""

    def written_out(content: dict[str, Any]) -> None:
        pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        old, new = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
        assert old in pattern["Regex"]
        pattern["Regex"] = pattern["Regex"].replace(old, new)

    keys = export(save_with(tmp_path / "model", backend, written_out), tmp_path / "model.gguf").keys
    assert keys["tokenizer.ggml.pre"] == "glm4"


def test_whole_words_are_taken_only_where_the_tokenizer_does(tmp_path: Path, backend: Tokenizer) -> None:
    """A token that no merge leads to: `glm4` would take it, the tokenizer does so only with `ignore_merges`."""

    def unreachable(ignore_merges: bool) -> Callable[[dict[str, Any]], None]:
        def change(content: dict[str, Any]) -> None:
            vocab, merges = content["model"]["vocab"], content["model"]["merges"]
            first, second = merges.pop()
            vocab["qzx"] = vocab.pop(first + second)  # the last token that was learned, so that no other needs it
            content["model"]["ignore_merges"] = ignore_merges

        return change

    for ignore_merges, name in ((False, "chatglm-bpe"), (True, "glm4")):
        folder = save_with(tmp_path / name, backend, unreachable(ignore_merges))
        assert export(folder, tmp_path / f"{name}.gguf").keys["tokenizer.ggml.pre"] == name


def test_tokens_that_were_added_as_words_are_not_control(tmp_path: Path, backend: Tokenizer) -> None:
    """They are text that a user may write."""
    backend = Tokenizer.from_str(backend.to_str())
    backend.add_tokens([AddedToken("GLM-Edge", special=False)])
    folder = save_with(tmp_path / "model", backend, lambda content: None)
    keys = export(folder, tmp_path / "model.gguf").keys
    assert keys["tokenizer.ggml.token_type"][keys["tokenizer.ggml.tokens"].index("GLM-Edge")] == USER_DEFINED
