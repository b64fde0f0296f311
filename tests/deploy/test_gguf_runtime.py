"""llama.cpp itself loads the files: the same ids, logits and answers as transformers'.

The runtime is built from source, which takes minutes: `pip install llama-cpp-python==0.3.36`, then `-m slow`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm_edge_ft import recipe
from glm_edge_ft.deploy.export_gguf import export_gguf
from glm_edge_ft.deploy.merge import merge
from glm_edge_ft.run import RunRequest
from tests.conftest import TokenizerMaker
from tests.deploy.conftest import ROOT, command
from tests.model_folders import save_model_folder
from tests.runs import predictions

pytestmark = pytest.mark.slow

TEXTS = {
    "chinese": "今天天气很好，我们去公园散步吧。你喜欢什么颜色的裤子？“引号”、《书名》……——",
    "traditional": "這件襯衫的質地柔軟，適合春天穿著。",
    "mixed": "我想在apple工作1314151天～ iPhone15手机12,345.67元 第3.5章",
    "english": "It's we'll they'd I'VE don't; O'Connor's naïve café, “quotes” and 1,234.50 dollars (approx.)",
    "code": "def f(x: int) -> str:\n    return f\"{x!r}\"  # comment\n\n\nif __name__ == '__main__':\n\tprint(f(3))\n",
    "json": '{"a": [1, 22, 333, 4444, 55555], "b": null, "c": "\\n\\t"}\r\n',
    "emoji": "🙂🙂 👨\u200d👩\u200d👧 🇩🇪 👍🏽 ✅ 🦙🦙 😶\u200d🌫️",
    "spaces": " a  b   c    \n \n\n  \t\t x \u3000 y\u00a0z \r\n\r\n end   ",
    "line breaks": "\n\n\n\n a\n\n b\n",
    "digits": "1 12 123 1234 12345 123456 1234567 ３４５ Ⅷ ½ ²",
    "scripts": "नमस्ते ไทย עברית العربية 한국어 ひらがな カタカナ Ελληνικά Кириллица e\u0301",
    "special": "<|user|>\nHi<|assistant|>\nHello<|endoftext|><|observation|>[MASK][gMASK]<sop><eop><|begin_of_image|>",
    "almost special": "<|user |> <| user|> <user> [mask] <|USER|> <|im_end|> <|user|",
}
ALPHABET = "aZ1９ \n\t\r\u3000今天。，'’.-_🙂<|>éß\u0301"


@pytest.fixture(scope="module")
def runtime() -> Any:
    """Return llama.cpp's package."""
    return pytest.importorskip("llama_cpp", reason="llama.cpp is not here: pip install llama-cpp-python==0.3.36")


def load(runtime: Any, path: Path) -> Any:
    """Return the model of a GGUF file, which keeps the logits of every position.

    Keys and values are kept in f32; by default the runtime keeps them in f16, whatever the weights are.
    """
    exact = {"type_k": runtime.GGML_TYPE_F32, "type_v": runtime.GGML_TYPE_F32}
    return runtime.Llama(str(path), n_ctx=1024, logits_all=True, verbose=False, n_threads=1, **exact)


def ids_of(llama: Any, text: str) -> list[int]:
    """Return the ids of a text in which special tokens are meant."""
    return list(llama.tokenize(text.encode(), add_bos=False, special=True))


def greedy(runtime: Any, llama: Any, prompt: str, length: int) -> list[int]:
    """Return the likeliest ids after a prompt, until one that ends a reply."""
    vocabulary = runtime.llama_model_get_vocab(llama.model)
    llama.reset()
    llama.eval(ids_of(llama, prompt))
    reply: list[int] = []
    while len(reply) < length:
        token = int(llama.scores[llama.n_tokens - 1].argmax())
        if runtime.llama_vocab_is_eog(vocabulary, token):
            break
        reply.append(token)
        llama.eval([token])
    return reply


def export(model: Path | str, out: Path, kind: str = "f32") -> Path:
    """Export and return the file."""
    export_gguf(str(model), out, kind=kind)
    return out


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: TokenizerMaker) -> Path:
    """Return a folder in the layout of the released models: heads together as wide as the hidden states."""
    return save_model_folder(tmp_path_factory.mktemp("square"), make_tokenizer("glm-newline"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of the first half of the demonstration, with its predictions on the test file."""
    folder = tmp_path_factory.mktemp("tuned")
    settings = {"max_steps": 120, "eval_strategy": "no", "eval_on_start": False, "output_dir": folder / "demo"}
    overrides = tuple(f"training_args.{key}={value}".replace("False", "false") for key, value in settings.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM_EDGE_FT_CACHE", str(folder / "cache"))
        request = RunRequest(ROOT / "data/demo", "glm-edge-nano", ROOT / "configs/demo.yaml", None, overrides)
        recipe.run(request)
    return folder / "demo"


@pytest.mark.parametrize("kind", ["nano", "square"])
def test_texts_get_the_same_ids(kind: str, runtime: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """R7: texts of every sort, and 3,000 random ones."""
    folder: Path = request.getfixturevalue(kind)
    llama, tokenizer = load(runtime, export(folder, tmp_path / "a.gguf")), AutoTokenizer.from_pretrained(folder)
    chance = random.Random(0)
    texts = [*TEXTS.values(), *("".join(chance.choices(ALPHABET, k=chance.randint(1, 30))) for _ in range(3000))]
    for text in texts:
        assert ids_of(llama, text) == tokenizer(text, add_special_tokens=False)["input_ids"], repr(text)


@pytest.mark.parametrize("kind", ["nano", "square"])
def test_every_position_has_the_same_likeliest_token(
    kind: str, runtime: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """R7: f32, every position of every text; logits within 0.001, of a range of some 20."""
    folder: Path = request.getfixturevalue(kind)
    llama = load(runtime, export(folder, tmp_path / "a.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for text in TEXTS.values():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        llama.reset()
        llama.eval(ids)
        found = torch.from_numpy(llama.scores[: len(ids)].copy())
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
        assert torch.equal(found.argmax(-1), expected.argmax(-1)), repr(text)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_the_template_in_the_file_renders_the_same_prompt(runtime: Any, nano: Path, tmp_path: Path) -> None:
    """R7: system and several turns, by the runtime's own renderer."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    llama, tokenizer = load(runtime, export(nano, tmp_path / "a.gguf")), AutoTokenizer.from_pretrained(nano)
    messages: Any = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello\n\nyou"},
        {"role": "assistant", "content": "你好"},
        {"role": "user", "content": "And?"},
    ]
    render = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], eos_token="", bos_token="")
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render(messages=messages).prompt == expected


def test_the_runtime_stops_where_training_ends_a_reply(runtime: Any, nano: Path, tmp_path: Path) -> None:
    """R7: all three stop tokens of the model, and none of its other special tokens."""
    llama, tokenizer = load(runtime, export(nano, tmp_path / "a.gguf")), AutoTokenizer.from_pretrained(nano)
    vocabulary = runtime.llama_model_get_vocab(llama.model)
    stops = {token for token in range(len(tokenizer)) if runtime.llama_vocab_is_eog(vocabulary, token)}
    assert set(tokenizer.convert_ids_to_tokens(sorted(stops))) == {"<|endoftext|>", "<|user|>", "<|observation|>"}


def answers(runtime: Any, path: Path, tokenizer: Any, rows: list[dict[str, Any]]) -> list[str]:
    """Return the runtime's greedy answers to the prompts of a run's predictions."""
    llama = load(runtime, path)
    replies = (greedy(runtime, llama, row["prompt"], 128) for row in rows)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).removeprefix("\n") for ids in replies]


def test_adapter_merged_folder_and_file_give_the_same_answers(runtime: Any, tuned: Path, tmp_path: Path) -> None:
    """R7, E5: all first turns of the demonstration's test file, in f32; with `chat --prompt` for three of them."""
    rows = [row for row in predictions(tuned, "test-120") if row["turn"] == 1]
    said = [row["prediction"] for row in rows]
    merge(str(tuned), tmp_path / "merged", dtype="float32")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert answers(runtime, export(tuned, tmp_path / "adapter.gguf"), tokenizer, rows) == said
    export(tmp_path / "merged", tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").stat().st_size == (tmp_path / "adapter.gguf").stat().st_size
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for row in rows:
        inputs = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=128, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert str(tokenizer.decode(new, skip_special_tokens=True)).removeprefix("\n") == row["prediction"]
    for row in [row for row in rows if "<|system|>" not in row["prompt"]][:3]:
        question = row["prompt"].removeprefix("<|user|>\n").removesuffix("<|assistant|>")
        for model_name in (tuned, tmp_path / "merged"):
            done = command("chat", str(model_name), "--prompt", question, "--max-new-tokens", "128")
            assert done.stdout == row["prediction"] + "\n"


@pytest.mark.parametrize(("kind", "least"), [("f16", 0.9), ("bf16", 0.9), ("q8_0", 0.6)])
def test_most_answers_survive_rounding(kind: str, least: float, runtime: Any, tuned: Path, tmp_path: Path) -> None:
    """R7: whole answers that are the same, letter by letter, after the file's rounding."""
    rows = [row for row in predictions(tuned, "test-120") if row["turn"] == 1]
    found = answers(runtime, export(tuned, tmp_path / "a.gguf", kind), AutoTokenizer.from_pretrained(tuned), rows)
    same = sum(answer == row["prediction"] for answer, row in zip(found, rows, strict=True))
    print(f"{kind}: {same} of {len(rows)} answers are the same")
    assert same >= least * len(rows)
