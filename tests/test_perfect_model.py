"""A model that has learned its rows by heart gets 100: what is supervised is what an evaluation compares with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.conftest import TokenizerMaker
from tests.foreign import save_chatml_folder, tool_row, turn, write_rows
from tests.model_folders import save_model_folder
from tests.runs import do_run, metrics, read_jsonl
from tests.vision_folders import draw, image_part, save_vision_folder, text_part, turns

LONG = "how are you, my friend? " * 20  # more tokens than max_output_length
KEPT = 80

PLAIN: dict[str, dict[str, Any]] = {
    "plain": turns("hello there", "my friend"),
    "turns": turns("how are you", "I am fine", "and today?", "fine too", "the time?", "it is now"),
    "system": {"messages": [turn("system", "be kind"), *turns("who is here?", "the user")["messages"]]},
    "spaces": turns("spaces", "  my   friend \t "),
    "line breaks around": turns("around", "\n\n the time\n\n"),
    "line breaks inside": turns("inside", "first\nsecond\n\n\nthird\r\nfourth", "again", "\n- a\n- b"),
    "other scripts": turns("今天天气", "今天天气很好。🙂👩‍👧 e\u0301"),
    "cut": turns("a long one", LONG),
    "cut within": turns("two long ones", "short", "now the long one", LONG.upper()),
    "not learned": {"messages": [*turns("one", "two")["messages"][:1], turn("assistant", "three", loss=False),
                                 *turns("four", "five")["messages"]]},
    "markers": turns("markers", "it writes <|system|> and <|im_start|> and <think>"),
    "a stop": turns("a stop", "before <|user|> and <|im_end|> after"),
}  # fmt: skip
RENDERED: dict[str, dict[str, Any]] = {
    "tool calls": tool_row(),
    "reasoning": {"messages": [turn("user", "why?"), turn("assistant", "So.", reasoning_content="It is\nso.")]},
    "reasoning then a line break": {
        "messages": [turn("user", "and how?"), turn("assistant", "\nThus.", reasoning_content="thus")]
    },
}


def learn_by_heart(output: Path, model: Path, data: Path, *, images: bool = False, **training: Any) -> dict[str, Any]:
    """Train on the rows until they are known, and return the last metrics and the predictions that miss."""
    settings = {
        "max_steps": 240,
        "save_steps": 10_000,
        "save_strategy": "no",
        "logging_steps": 120,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 32,
        "predict_with_generate": True,
        "generation_config": {},
        **training,
    }
    top = {"max_input_length": 1024, "max_output_length": KEPT}
    do_run(output, data, model, peft=None, test="train.jsonl", top=top, takes_images=images, **settings)
    (file,) = (output / "predictions").glob("test-*.jsonl")
    lines = read_jsonl(file)
    missed = [(line["reference"], line["prediction"]) for line in lines if line["prediction"] != line["reference"]]
    return {**metrics(output)[-1], "missed": missed, "references": [line["reference"] for line in lines]}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep encoded data out of the user's cache."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "template", ["glm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("glm-newline", "glm-literal"))]
)
def test_glm_scores_100(tmp_path: Path, make_tokenizer: TokenizerMaker, template: str) -> None:
    """Rows of every kind, on templates of GLM-Edge's family."""
    model = save_model_folder(tmp_path / "model", make_tokenizer(template))
    found = learn_by_heart(tmp_path / "run", model, write_rows(tmp_path / "data", [*PLAIN.values()], "train.jsonl"))
    assert found["missed"] == []
    assert found["test_exact-match"] == 100


@pytest.mark.usefixtures("cache")
def test_chatml_scores_100_with_tool_calls_and_reasoning(tmp_path: Path) -> None:
    """Rows of every kind, those that GLM-Edge's template does not render among them, on another family's model."""
    rows = write_rows(tmp_path / "data", [*PLAIN.values(), *RENDERED.values()], "train.jsonl")
    found = learn_by_heart(tmp_path / "run", save_chatml_folder(tmp_path / "model"), rows, max_steps=320)
    assert found["missed"] == []
    assert found["test_exact-match"] == 100
    assert (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>' in found["references"][-6]
    )
    assert found["references"][-2:] == ["<think>\nIt is\nso.\n</think>\n\nSo.", "<think>\nthus\n</think>\n\n\nThus."]


@pytest.mark.usefixtures("cache")
def test_vision_scores_100(tmp_path: Path, backend: Tokenizer) -> None:
    """Rows with a picture, of several turns, without one, and with a reply that is cut."""
    picture = image_part(draw(tmp_path / "data" / "a.png", 1).name)
    question = text_part("what is the colour?")
    rows = [
        turns([picture, question], "green"),
        turns([question, picture], [text_part(" two "), text_part("parts\n")], "and now?", "\nstill"),
        turns("how are you?", "I am fine"),
        turns("and then?", "look", [picture, text_part("what is it?")], LONG),
    ]
    write_rows(tmp_path / "data", rows, "train.jsonl")
    model = save_vision_folder(tmp_path / "model", backend)
    found = learn_by_heart(tmp_path / "run", model, tmp_path / "data", images=True)
    assert found["missed"] == []
    assert found["test_exact-match"] == 100
