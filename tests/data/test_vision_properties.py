"""Random conversations with images: whatever the budgets, no image is cut in two, and none is without its pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from glm_edge_ft.data.encoding import DroppedRow, EncodedRow
from glm_edge_ft.data.prompts import encode_prompts
from glm_edge_ft.data.rows import RawRow
from tests.data.vision import PLACEHOLDER, literal_template, released_template, vision_encoder, vision_tokenizer

COUNT = 4

texts = st.sampled_from(
    ["", "hello", " there", "how are you today", "你好", "\n", "\\n", "<|user|>", "<|end_of_image|>"]
)
text_parts = texts.map(lambda content: {"type": "text", "text": content})
image_parts = st.sampled_from(["a.png", "b.png", "c.png"]).map(lambda path: {"type": "image", "image": path})
contents = texts | st.lists(text_parts | image_parts, min_size=1, max_size=5)
turns = st.tuples(contents, texts | st.lists(text_parts, min_size=1, max_size=2)).map(
    lambda pair: [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
)
conversations = st.tuples(st.booleans(), st.lists(turns, min_size=1, max_size=3)).map(
    lambda pair: [{"role": "system", "content": "be kind"}] * pair[0] + [turn for both in pair[1] for turn in both]
)


def runs(ids: list[int], token: int) -> list[int]:
    """Return the lengths of the runs of a token."""
    text = "".join("@" if element == token else " " for element in ids)
    return [len(run) for run in text.split()]


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with every content as a list of parts."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]


def begins_with_a_line_break(message: dict[str, Any]) -> bool:
    """Say whether this is a reply whose first token could join the line break that ends its prompt."""
    text = "".join(part.get("text", "") for part in in_parts([message])[0]["content"])
    return message["role"] == "assistant" and text.startswith("\n")


def images_of(messages: list[dict[str, Any]]) -> list[str]:
    """Return the paths of all images."""
    return [part["image"] for message in in_parts(messages) for part in message["content"] if "image" in part]


@pytest.mark.parametrize("template", [released_template(COUNT), literal_template(COUNT)], ids=["real", "literal"])
def test_images_stay_whole(template: str, backend: Tokenizer) -> None:
    """I4, I5, M1: ids are the template's, budgets hold, and images and runs of placeholders are the same in number."""
    tokenizer = vision_tokenizer(backend, template)
    placeholder, stop = (tokenizer.get_vocab()[token] for token in (PLACEHOLDER, "<|user|>"))
    encoders = {
        (prompt, reply): vision_encoder(
            backend, template, count=COUNT, max_input_length=prompt, max_output_length=reply, max_images=99
        )
        for prompt in (10, 17, 30, 999)
        for reply in (2, 99)
    }

    @given(messages=conversations, budgets=st.sampled_from(sorted(encoders)))
    @settings(max_examples=400)
    def check(messages: list[dict[str, Any]], budgets: tuple[int, int]) -> None:
        encoder = encoders[budgets]
        conversation = encoder.parse(RawRow("train.jsonl", 1, 1, messages))
        row = encoder.encode(conversation)
        if isinstance(row, EncodedRow):
            ids = row.input_ids.tolist()
            assert len(ids) <= sum(budgets)
            assert all(run % COUNT == 0 for run in runs(ids, placeholder))
            assert ids.count(placeholder) == COUNT * len(row.images) == row.roles.image
            assert list(row.images) == images_of(messages)[: len(row.images)]
            assert not row.loss_mask[row.input_ids == placeholder].any()
            if row.prompt_tokens_cut == 0:
                whole = [*tokenizer.apply_chat_template(in_parts(messages), return_dict=False), stop]
                if not any(begins_with_a_line_break(message) for message in messages):
                    assert ids == whole[: len(ids)]
        else:
            assert isinstance(row, DroppedRow)
            assert budgets[0] < 999
        for sample in encode_prompts(encoder, conversation, Path("/data")):
            ids = sample.prompt_ids.tolist()
            assert len(ids) <= budgets[0]
            assert all(run % COUNT == 0 for run in runs(ids, placeholder))
            assert ids.count(placeholder) == COUNT * len(sample.images)
            history = images_of(messages[: sample.turn])
            assert [Path(path).name for path in sample.images] == history[len(history) - len(sample.images) :]

    check()
