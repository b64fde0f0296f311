"""A checkpoint's tokenizer as a GGUF file holds it, after a check that llama.cpp will split text in the same way.

llama.cpp knows split patterns by name alone. GLM-Edge's has two names that differ in one thing: under `glm4` a word
that is a token as a whole is taken as it is, under `chatglm-bpe` it is merged step by step like any other.
"""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

from glm_edge_ft.console import show_notice
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.checkpoint import Checkpoint

GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Every branch of the pattern, and the places where the patterns of other models part from it.
_PROBE = (
    "It's we'LL I'Ve don't THEY'D o'clock 1 22 333 4444 55555 3.14 1e5 x2y 今天天气很好，我们去公园！ "
    "今天2024年１２月 naïve e\u0301 Über_snake__case camelCase HTTPServer a-b--c ...!!!?\n\n\n  "
    "indent\r\n\ttab \t \n end  "
    "\u3000全角 \u00a0nbsp 🙂🙂 👨\u200d👩\u200d👧 🇩🇪 कि ไทย עברית عربي 한국어 ½ Ⅷ "
    "#include <x>\n    return {a[0]: 'b'};\n   "
)
_OUTSIDE = "use the tokenizer that the model came with; llama.cpp knows GLM-Edge's alone"


def add_vocabulary(writer: GGUFWriter, checkpoint: Checkpoint, chat_template: str) -> None:
    """Write the tokenizer's keys.

    Every id of the embeddings has its token, ordinary ones in the byte-level alphabet. A reply ends at `eos`, `eot` and
    `eom`; a notice names stop tokens beyond these three.

    Raises UserError for a tokenizer that llama.cpp would not follow: another split pattern, a normalizer, no byte-level
    BPE, or more tokens than the model has embeddings for.
    """
    where = f"MODEL {checkpoint.location.name}"
    backend: Tokenizer = checkpoint.tokenizer.backend_tokenizer
    content: dict[str, Any] = json.loads(backend.to_str())
    _check_model(where, content)
    _check_split(where, backend)
    tokens, types = _tokens(where, checkpoint)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name_pre_tokenizer(backend, content["model"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    stop_ids = _ordered_stop_ids(checkpoint)
    writers = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token_id in zip(writers, stop_ids, strict=False):
        add(token_id)
    if dropped := [tokens[token_id] for token_id in stop_ids[len(writers) :]]:
        show_notice(f"llama.cpp will not stop at {', '.join(dropped)}: a GGUF file has three stop tokens")
    if stop_ids:
        writer.add_unk_token_id(stop_ids[0])
    if checkpoint.tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(checkpoint.tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat_template)


def _check_model(where: str, content: dict[str, Any]) -> None:
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not content["pre_tokenizer"]:
        raise UserError.single(where, f"its tokenizer is no byte-level BPE ({model['type']})", _OUTSIDE)
    unknown = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    if unknown:
        what = f"its tokenizer has {', '.join(f'{key} {model[key]!r}' for key in unknown)}, which llama.cpp leaves out"
        raise UserError.single(where, what, _OUTSIDE)
    if content["normalizer"] is not None:
        what = f"its tokenizer changes text before it splits it ({content['normalizer']['type']}); llama.cpp does not"
        raise UserError.single(where, what, _OUTSIDE)


def _check_split(where: str, backend: Tokenizer) -> None:
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    glm4 = Sequence([Split(Regex(GLM4_PATTERN), "isolated"), byte_level])
    for in_bytes in (False, True):  # the text itself first: it reads better in the message
        own, known = _pieces(backend.pre_tokenizer, in_bytes), _pieces(glm4, in_bytes)
        if own != known:
            first = next((i for i, pair in enumerate(zip(own, known, strict=False)) if pair[0] != pair[1]), 0)
            shown = (" + ".join(map(repr, pieces[first : first + 3])) for pieces in (own, known))
            what = "its tokenizer splits text in another way than llama.cpp's glm4: {} instead of {}".format(*shown)
            raise UserError.single(where, what, _OUTSIDE)


def _pieces(pre_tokenizer: PreTokenizer, in_bytes: bool) -> list[str]:
    """Return the pieces of the probe: in the byte-level alphabet, or the text that each was made of."""
    return [made if in_bytes else _PROBE[start:end] for made, (start, end) in pre_tokenizer.pre_tokenize_str(_PROBE)]


def _name_pre_tokenizer(backend: Tokenizer, model: dict[str, Any]) -> str:
    """Return `glm4` where taking whole words that are tokens is what the tokenizer does, or makes no difference."""
    if model.get("ignore_merges"):
        return "glm4"
    merged_alike = all([piece.value for piece in backend.model.tokenize(token)] == [token] for token in model["vocab"])
    return "glm4" if merged_alike else "chatglm-bpe"


def _tokens(where: str, checkpoint: Checkpoint) -> tuple[list[str], list[int]]:
    """Return text and type of the token of each id."""
    size: int = checkpoint.config.vocab_size
    by_id = {token_id: token for token, token_id in checkpoint.tokenizer.get_vocab().items()}
    last = max(by_id)
    if last >= size:
        what = f"its tokenizer has a token {by_id[last]!r} with the id {last}, and embeddings for {size} ids"
        raise UserError.single(where, what, "take tokenizer and weights from one download")
    types = [TokenType.NORMAL if token_id in by_id else TokenType.UNUSED for token_id in range(size)]
    for token_id, token in checkpoint.tokenizer.added_tokens_decoder.items():
        types[token_id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    return [by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(size)], [int(kind) for kind in types]


def _ordered_stop_ids(checkpoint: Checkpoint) -> list[int]:
    """Return the tokens that end a reply: the tokenizer's eos first, then GLM-Edge's usual one, then all others."""
    tokenizer = checkpoint.tokenizer
    first = (tokenizer.eos_token_id, tokenizer.get_vocab().get("<|user|>"))
    stops = list(checkpoint.stop_ids)
    return [
        *(token_id for token_id in dict.fromkeys(first) if token_id in stops),
        *(t for t in stops if t not in first),
    ]
