"""A checkpoint's tokenizer as a GGUF file holds it, and the proof that llama.cpp will split text in the same way.

llama.cpp knows split patterns by name alone. GLM-Edge's is known under two names that differ in one thing: under `glm4`
a word that is a token as a whole is taken as it is, under `chatglm-bpe` it is merged step by step like any other.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

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


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        tokens: the text of every id of the embeddings; ordinary ones in the byte-level alphabet.
        types: of each token, as `gguf.TokenType`: normal, control, user-defined, or unused where no token has the id.
        merges: pairs with a space between, the first to be merged first.
        pre_tokenizer: llama.cpp's name for the split pattern and the way of merging.
        special_ids: `eos`, `eot`, `eom` (each ends a reply), `unk` and `pad`, where there are such.
        unstopped: tokens that end a reply in training and for which a GGUF file has no place.
        chat_template: as the checkpoint has it; of a vision model one that renders the same and suits llama.cpp.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre_tokenizer: str
    special_ids: dict[str, int]
    unstopped: list[str]
    chat_template: str


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """Return the tokenizer's content for a GGUF file.

    Raises UserError for a tokenizer that llama.cpp would not follow: another split pattern, a normalizer, no byte-level
    BPE, or more tokens than the model has embeddings for.
    """
    where = f"MODEL {checkpoint.location.name}"
    backend: Tokenizer = checkpoint.tokenizer.backend_tokenizer
    content: dict[str, Any] = json.loads(backend.to_str())
    _check_model(where, content)
    _check_pre_tokenizer(where, backend)
    tokens, types = _tokens(where, checkpoint)
    special_ids, unstopped = _special_ids(checkpoint)
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]],
        pre_tokenizer=_name_pre_tokenizer(backend, content),
        special_ids=special_ids,
        unstopped=unstopped,
        chat_template=checkpoint.tokenizer.get_chat_template(),
    )


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write the tokenizer's keys."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, token_id in vocabulary.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(vocabulary.chat_template)


def _check_model(where: str, content: dict[str, Any]) -> None:
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not content["pre_tokenizer"]:
        what = f"its tokenizer is no byte-level BPE ({model['type']})"
        raise UserError.single(where, what, _OUTSIDE)
    added = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    if added:
        what = f"its tokenizer has {', '.join(f'{key} {model[key]!r}' for key in added)}, which llama.cpp leaves out"
        raise UserError.single(where, what, _OUTSIDE)
    if content["normalizer"] is not None:
        what = f"its tokenizer changes text before it splits it ({content['normalizer']['type']}); llama.cpp does not"
        raise UserError.single(where, what, _OUTSIDE)


def _check_pre_tokenizer(where: str, backend: Tokenizer) -> None:
    for as_made in (False, True):  # the text itself first: it reads better in the message
        own, known = (_pieces(one, as_made) for one in (backend.pre_tokenizer, _glm4()))
        if own != known:
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, known, strict=False))
            start = len(list(same))
            shown = (" + ".join(map(repr, pieces[start : start + 3])) for pieces in (own, known))
            what = "its tokenizer splits text in another way than llama.cpp's glm4: {} instead of {}".format(*shown)
            raise UserError.single(where, what, _OUTSIDE)


def _pieces(pre_tokenizer: PreTokenizer, as_made: bool) -> list[str]:
    """Return the pieces of the probe: as the tokenizer goes on with them, or the text that each was made of."""
    return [made if as_made else _PROBE[start:end] for made, (start, end) in pre_tokenizer.pre_tokenize_str(_PROBE)]


def _glm4() -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(GLM4_PATTERN), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _name_pre_tokenizer(backend: Tokenizer, content: dict[str, Any]) -> str:
    """Return `glm4` where taking whole words that are tokens is what the tokenizer does, or makes no difference."""
    model = content["model"]
    if model.get("ignore_merges"):
        return "glm4"
    merged_alike = all([piece.value for piece in backend.model.tokenize(token)] == [token] for token in model["vocab"])
    return "glm4" if merged_alike else "chatglm-bpe"


def _tokens(where: str, checkpoint: Checkpoint) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    tokenizer, size = checkpoint.tokenizer, checkpoint.config.vocab_size
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        what = (
            f"its tokenizer has a token {by_id[max(by_id)]!r} with the id {max(by_id)}, and embeddings for {size} ids"
        )
        raise UserError.single(where, what, "take tokenizer and weights from one download")
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for token_id in range(size):
        text = by_id.get(token_id)
        tokens.append(f"[PAD{token_id}]" if text is None else text)
        if text is None:
            types.append(TokenType.UNUSED)
        elif token_id not in added:
            types.append(TokenType.NORMAL)
        else:
            types.append(TokenType.CONTROL if added[token_id].special else TokenType.USER_DEFINED)
    return tokens, [int(kind) for kind in types]


def _special_ids(checkpoint: Checkpoint) -> tuple[dict[str, int], list[str]]:
    """Return the special ids by their name in a GGUF file, and the stop tokens that are left over."""
    tokenizer = checkpoint.tokenizer
    stops = list(checkpoint.stop_ids)
    user = tokenizer.get_vocab().get("<|user|>")
    if user in stops:  # the usual end of a reply of GLM-Edge
        stops.insert(0, stops.pop(stops.index(user)))
    eos: int | None = tokenizer.eos_token_id
    if eos in stops:
        stops.insert(0, stops.pop(stops.index(eos)))
    names = ("eos", "eot", "eom")
    special = dict(zip(names, stops, strict=False))
    if special:
        special["unk"] = special["eos"]
    if tokenizer.pad_token_id is not None:
        special["pad"] = tokenizer.pad_token_id
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    return special, [by_id[token_id] for token_id in stops[len(names) :]]
