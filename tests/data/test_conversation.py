"""Raw rows to conversations: what is accepted, what reaches the template, and what is refused by place."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge_ft.data.conversation import Conversation, parse_conversation
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.errors import UserError

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "yo"}
ROLES = frozenset({"system", "user", "assistant", "observation"})


def parse(value: Any) -> Conversation:
    """Parse a row that stands in line 3 of train.jsonl."""
    return parse_conversation(RawRow("train.jsonl", 3, 1, value), ROLES)


def refusal(value: Any) -> list[str]:
    """Return the problems of a row as text."""
    with pytest.raises(UserError) as caught:
        parse(value)
    return [str(problem) for problem in caught.value.problems]


def test_an_object_and_a_list_are_the_same_conversation() -> None:
    """D1: a row is an object with `messages`, or the list itself."""
    assert parse([USER, REPLY]) == parse({"messages": [USER, REPLY]})
    assert [(m.role, m.text, m.supervised) for m in parse([USER, REPLY]).messages] == [
        ("user", "hi", False),
        ("assistant", "yo", True),
    ]


def test_text_parts_are_the_string_that_they_stand_for() -> None:
    """D4: a string and a list of text parts give the same sample."""
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert parse([{"role": "user", "content": parts}, REPLY]) == parse([USER, REPLY])


def test_an_image_part_is_refused_with_the_way_out() -> None:
    """D4: images belong to the other script."""
    image = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "a.png"}]}
    assert refusal([image, REPLY]) == [
        "train.jsonl:3: messages[0].content[1]: an image part in chat fine-tuning\n"
        "    -> use finetune_vision.py with a GLM-Edge-V model for images"
    ]


IMAGE = {"type": "image", "image": "图 片/a b.jpg"}
TEXT = {"type": "text", "text": "what is it?"}


def vision(content: Any, max_images: int = 1, role: str = "user") -> Conversation:
    """Parse a row of one message and a reply for vision fine-tuning."""
    row = RawRow("train.jsonl", 3, 1, [{"role": role, "content": content}, REPLY])
    return parse_conversation(row, ROLES, max_images)


def vision_refusal(content: Any, max_images: int = 1, role: str = "user") -> str:
    """Return the problems of such a row as text."""
    with pytest.raises(UserError) as caught:
        vision(content, max_images, role)
    return str(caught.value)


@pytest.mark.parametrize("content", [[IMAGE, TEXT], [TEXT, IMAGE], [TEXT, IMAGE, TEXT]])
def test_an_image_may_stand_anywhere_among_the_text(content: list[dict[str, str]]) -> None:
    """I4: parts keep their order, and the template gets them as written."""
    message = vision(content).messages[0]
    assert message.fields == {"role": "user", "content": content}
    assert message.parts == content
    assert message.text == "what is it?" * content.count(TEXT)
    assert message.images == ["图 片/a b.jpg"]


def test_an_image_may_stand_in_a_later_turn() -> None:
    """I4: the second user message holds it."""
    row = RawRow("train.jsonl", 3, 1, [USER, REPLY, {"role": "user", "content": [IMAGE]}, REPLY])
    conversation = parse_conversation(row, ROLES, 1)
    assert [message.images for message in conversation.messages] == [[], [], ["图 片/a b.jpg"], []]
    assert conversation.images == ["图 片/a b.jpg"]


def test_a_string_is_one_text_part_in_vision_fine_tuning() -> None:
    """D4: a string and a list with that text give the same sample."""
    assert vision("what is it?") == vision([TEXT])
    assert vision("what is it?").messages[0].fields["content"] == [TEXT]
    assert vision([TEXT]).messages[1].fields["content"] == [{"type": "text", "text": "yo"}]


def test_text_parts_are_not_joined_in_vision_fine_tuning() -> None:
    """D4: the template sees as many pieces as were written."""
    message = vision([TEXT, {"type": "text", "text": ""}, TEXT]).messages[0]
    assert message.texts == ["what is it?", "", "what is it?"]


@pytest.mark.parametrize("role", ["assistant", "system", "observation"])
def test_only_users_show_images(role: str) -> None:
    """I4: an image in another turn is refused by place, never ignored."""
    assert vision_refusal([TEXT, IMAGE], role=role) == (
        f"train.jsonl:3: messages[0].content[1]: an image part in a message of the role '{role}'\n"
        "    -> put the image into a user message"
    )


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"image": ""}, "'image' must be the path of a file, it is a string: \"\"\n    -> save the image"),
        ({"image": " "}, "'image' must be the path of a file, it is a string: \" \""),
        ({"image": None}, "an image part without a path, and no image is named for it"),
        ({"image": {"path": "a"}}, '\'image\' must be the path of a file, it is an object: {"path": "a"}'),
        ({"url": "a.png"}, "key 'image' is missing; the keys are: 'type', 'url'\n    -> write {\"type\": \"image\","),
        ({"image": "a\0b"}, "'image' must be the path of a file, it is a string: \"a\\u0000b\""),
        ({"image": "HTTPS://x.org/a.png"}, 'it is a string: "HTTPS://x.org/a.png"\n    -> save the image'),
        ({"image": "data:image/png;base64," + "A" * 99}, 'it is a string: "data:image/png;base64,AAAA'),
        ({"type": "image_url", "image_url": {}}, "a part must have the type 'text' or 'image', this one"),
    ],
)
def test_what_is_no_image_path_is_refused_by_place(part: dict[str, Any], expected: str) -> None:
    """I4: an empty path, another kind of value, a URL, embedded bytes."""
    message = vision_refusal([{"type": "image", **part}])
    assert message.startswith("train.jsonl:3: messages[0].content[0]: ")
    assert expected in message


def test_more_images_than_the_limit_are_refused() -> None:
    """I4: the released models take one image in a conversation."""
    assert vision([IMAGE, IMAGE], max_images=2).images == ["图 片/a b.jpg"] * 2
    assert vision_refusal([IMAGE, IMAGE]).startswith(
        "train.jsonl:3: the conversation has 2 images, max_images is 1\n    -> split the conversation, or raise"
    )


def test_shortening_keeps_the_images() -> None:
    """I5: text goes from the end, piece by piece; images stay where they are."""
    message = vision([TEXT, IMAGE, TEXT, TEXT]).messages[0]
    assert message.shortened(14).fields["content"] == [TEXT, IMAGE, {"type": "text", "text": "wha"}]
    assert message.shortened(4).fields["content"] == [{"type": "text", "text": "what"}, IMAGE]
    assert (message.shortened(4).text, message.shortened(0).images) == ("what", ["图 片/a b.jpg"])


def test_further_keys_reach_the_template_as_written() -> None:
    """D3: tools in a system message keep their order, their nulls and nothing else; `loss` is taken out."""
    system = {"role": "system", "tools": [{"b": 1, "a": {"default": None}}], "content": "s", "metadata": ""}
    messages = parse([system, USER, {**REPLY, "loss": True}]).messages
    assert list(messages[0].fields.items()) == list(system.items())
    assert messages[2].fields == REPLY


def test_tools_of_the_row_are_kept_and_other_keys_counted() -> None:
    """D3: `tools` goes to the template, further keys of the row are only named."""
    conversation = parse({"id": 5, "messages": [USER, REPLY], "tools": [{"x": None}], "source": "web"})
    assert conversation.tools == ({"x": None},)
    assert conversation.ignored_keys == ("id", "source")


def test_a_reply_may_be_left_out_of_the_loss() -> None:
    """M1: `"loss": false` on an assistant turn; on other turns it says what is true anyway."""
    messages = parse([{**USER, "loss": False}, {**REPLY, "loss": False}, USER, REPLY]).messages
    assert [message.supervised for message in messages] == [False, False, False, True]


def test_empty_text_is_text() -> None:
    """D3: an empty string is a content like another."""
    assert parse([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]).messages[1].text == ""


@pytest.mark.parametrize("key", ["message", "conversations", "conversation"])
def test_names_near_messages_are_refused(key: str) -> None:
    """D2: a row with `message` for `messages`."""
    assert refusal({key: [USER, REPLY]}) == [
        f"train.jsonl:3: key 'messages' is missing; the keys are: '{key}'\n    -> did you mean 'messages' by '{key}'?"
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"mesages": []}, "did you mean 'messages' by 'mesages'?"),
        ({"text": "a"}, "train.jsonl:3: key 'messages' is missing; the keys are: 'text'"),
        ({}, "key 'messages' is missing; the keys are: none"),
        (USER, "a row holds a whole conversation: write {"),
        ({"from": "human", "value": "a"}, "`python -m glm_edge_ft convert` reads the formats of other tools"),
        ("text", 'a row must be an object or a list, this one is a string: "text"'),
        (None, "a row must be an object or a list, this one is null"),
        ({"messages": "a"}, 'a user and an assistant message, it is a string: "a"'),
        ({"messages": []}, "train.jsonl:3: 'messages' must be a list of at least a user and an assistant message"),
        ([], "train.jsonl:3: 'messages' must be a list of at least a user and an assistant message, it is a list: []"),
        ([USER], "train.jsonl:3: no assistant turn: there is nothing to learn"),
        (["a", REPLY], 'train.jsonl:3: messages[0]: a message must be an object, this one is a string: "a"'),
        ([{"from": "human", "value": "a"}, REPLY], "messages[0]: key 'role' is missing; the keys are: 'from', 'value'"),
        ([{"content": "a"}, REPLY], "messages[0]: key 'role' is missing; the keys are: 'content'"),
        ([{"role": 1, "content": "a"}, REPLY], "messages[0]: unknown role 1"),
        ([{"role": "human", "content": "a"}, REPLY], "unknown role 'human'\n    -> did you mean 'user'?"),
        ([{"role": "User", "content": "a"}, REPLY], "unknown role 'User'\n    -> did you mean 'user'?"),
        ([{"role": "asistant", "content": "a"}, REPLY], "'asistant'\n    -> did you mean 'assistant'?"),
        ([USER, {"role": "gpt", "content": "a"}], "unknown role 'gpt'\n    -> did you mean 'assistant'?"),
        ([USER, {"role": "bot", "content": "a"}], "unknown role 'bot'\n    -> did you mean 'assistant'?"),
        ([{"role": "xyz", "content": "a"}, REPLY], "-> write one of system, user, assistant, observation"),
        ([{"role": "tool", "content": "a"}, REPLY], "the model's chat template does not render the role 'tool'"),
        ([{"role": "user"}, REPLY], "messages[0]: key 'content' is missing; the keys are: 'role'"),
        ([{"role": "user", "content": None}, REPLY], "'content' must be a string or a list of parts, it is null"),
        ([{"role": "user", "content": 5}, REPLY], "'content' must be a string or a list of parts, it is a number: 5"),
        ([{"role": "user", "content": {}}, REPLY], "it is an object: {}"),
        ([{"role": "user", "content": []}, REPLY], "it is a list: []"),
        ([{"role": "user", "content": ["a"]}, REPLY], "content[0]: a part must have the type"),
        ([{"role": "user", "content": [{"type": "video"}]}, REPLY], "content[0]: a part must have the type"),
        ([{"role": "user", "content": [{"type": "text"}]}, REPLY], "content[0]: 'text' must be a string, it is null"),
        ([{**USER, "loss": True}, REPLY], "messages[0]: 'loss' says that a user message is learned"),
        ([USER, {**REPLY, "loss": "no"}], "messages[1]: 'loss' must be true or false"),
        ({"messages": [USER, REPLY], "tools": {"a": 1}}, "'tools' must be a list of objects, it is an object"),
        ({"messages": [USER, REPLY], "tools": "[]"}, "'tools' must be a list of objects, it is a string: \"[]\""),
    ],
)
def test_what_is_no_conversation_is_refused_by_place(row: Any, expected: str) -> None:
    """D2: each mistake names the line, the message and what to write."""
    messages = refusal(row)
    assert len(messages) == 1
    assert messages[0].startswith("train.jsonl:3: ")
    assert expected in messages[0]


def test_all_mistakes_of_a_row_are_listed() -> None:
    """D2: nobody should have to start ten times."""
    places = [text.split(": ")[1] for text in refusal([{"role": "human", "content": 1}, "x", {"content": "a"}])]
    assert places == ["messages[0]", "messages[0]", "messages[1]", "messages[2]"]


words = st.sampled_from(
    ["messages", "role", "content", "loss", "type", "text", "tools", "user", "assistant", "from", ""]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(words, children, max_size=4),
    max_leaves=12,
)


@given(value=anything)
@settings(max_examples=500)
def test_no_value_raises_anything_but_a_user_error(value: Any) -> None:
    """D2: a row is a conversation or a list of problems with its place, never a traceback."""
    try:
        conversation = parse(value)
    except UserError as error:
        assert error.problems
        assert all(problem.where.startswith("train.jsonl:3") for problem in error.problems)
    else:
        assert any(message.role == "assistant" for message in conversation.messages)
