"""Write the vision demo: small pictures with short questions and answers, in the format of the fine-tuning guide.

    python data/make_demo_vision.py [--seed 23] [--out data/demo_vision]

The committed files come from the default seed. Each picture has one to three coloured shapes, each in one of its nine
parts, or a house with trees by day or night, and belongs to one row alone. Questions ask for colours, shapes, places
and numbers; the answers are a word or two, spread evenly, and never told by an earlier turn, so that guessing does not
help. A fifth of the rows are English, a tenth have no picture. Most training rows have several questions, since each
teaches more of the same picture at hardly any cost; of dev and test a third have. A few rows put the text before the
picture, show the picture in the second turn, write plain strings for lists of parts, or begin with a system turn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.embedded.picture_exchanges import CHINESE, ENGLISH, side_of
from data.embedded.pictures import Item, Picture, draw, random_scene, random_shapes

ROWS = {"dev": 80, "test": 80, "train": 1400}
QUESTIONS_IN_A_HUNDRED = {  # rows with so many of them
    "train": {1: 10, 2: 25, 3: 35, 4: 30},
    "dev": {1: 66, 2: 22, 3: 12},
    "test": {1: 66, 2: 22, 3: 12},
}
TEXT_SHARE, SCENE_SHARE, JPEG_SHARE = 0.10, 0.30, 0.10
SIDES = (128, 160, 192)
SHAPES_IN_A_HUNDRED = {1: 80, 2: 16, 3: 4}  # pictures of shapes with so many of them

Exchange = tuple[str, str]
Message = dict[str, Any]
Language = str

TEXT_ONLY: dict[Language, tuple[Exchange, ...]] = {
    "zh": (
        *(("晴天的天空是什么颜色的？", "蓝色"), ("草是什么颜色的？", "绿色"), ("香蕉是什么颜色的？", "黄色")),
        *(("一加一等于几？", "二"), ("左的反义词是什么？", "右")),
    ),
    "en": (
        *(("What color is grass?", "Green"), ("What color is a banana?", "Yellow")),
        *(("What is one plus one?", "Two"), ("What is the opposite of left?", "Right")),
    ),
}
SYSTEM_TURN = "请用最短的话回答。"


# ---- questions ------------------------------------------------------------------------------------------------------


def alone(picture: Picture, item: Item) -> tuple[bool, bool]:
    """Return whether no other item has the item's kind, and whether no other has its colour."""
    others = [other for other in picture.items if other is not item]
    return all(other.kind != item.kind for other in others), all(other.colour != item.colour for other in others)


def shape_questions(picture: Picture, language: Language, rng: Random) -> list[tuple[str, Exchange]]:
    """Return every question that has one answer in a picture of shapes, each with the kind of its answer."""
    words = CHINESE if language == "zh" else ENGLISH
    is_chinese = language == "zh"
    number = words.numbers[len(picture.items)]
    ask = ("图里有几个图形？", "一共有几个图形？") if is_chinese else ("How many shapes are there?",)
    found = [("number", (rng.choice(ask), answer(number)))]
    for item in picture.items:
        colour, kind, zone = words.colours[item.colour], words.kinds[item.kind], words.zones[item.zone]
        by_kind, by_colour = alone(picture, item)
        if by_kind:
            ask = (f"{kind}是什么颜色的？", f"{kind}是什么颜色？") if is_chinese else (f"What color is the {kind}?",)
            found.append(("colour", (rng.choice(ask), answer(colour))))
            ask = (f"{kind}在哪里？", f"{kind}在什么位置？") if is_chinese else (f"Where is the {kind}?",)
            found.append(("zone", (rng.choice(ask), answer(zone))))
        if by_colour:
            ask = (
                (f"{colour}的是什么形状？", f"{colour}的图形是什么形状的？")
                if is_chinese
                else (f"What shape is {colour}?",)
            )
            found.append(("kind", (rng.choice(ask), answer(kind))))
            ask = (f"{colour}的图形在哪里？",) if is_chinese else (f"Where is the {colour} shape?",)
            found.append(("zone", (rng.choice(ask), answer(zone))))
        ask = (f"{zone}的图形是什么颜色的？",) if is_chinese else (f"What color is the shape at the {zone}?",)
        found.append(("colour", (rng.choice(ask), answer(colour))))
        ask = (f"{zone}的图形是什么形状的？",) if is_chinese else (f"What shape is at the {zone}?",)
        found.append(("kind", (rng.choice(ask), answer(kind))))
    return found


def scene_questions(picture: Picture, language: Language, rng: Random) -> list[tuple[str, Exchange]]:
    """Return the questions about a scene, each with the kind of its answer."""
    words = CHINESE if language == "zh" else ENGLISH
    is_chinese = language == "zh"
    house = next(item for item in picture.items if item.kind == "house")
    body = next(item for item in picture.items if item.kind in {"sun", "moon"})
    name = words.kinds[body.kind]
    ask_colour = ("房子是什么颜色的？", "房子是什么颜色？") if is_chinese else ("What color is the house?",)
    return [
        *[("colour", (rng.choice(ask_colour), answer(words.colours[house.colour])))] * 2,
        (
            "zone",
            (f"{name}在哪一边？" if is_chinese else f"Where is the {name}?", answer(words.zones[side_of(body)])),
        ),
        (
            "zone",
            ("房子在哪一边？" if is_chinese else "Where is the house?", answer(words.zones[side_of(house)])),
        ),
        (
            "time",
            (
                "现在是白天还是晚上？" if is_chinese else "Is it day or night?",
                answer(words.times[picture.time]),
            ),
        ),
    ]


def answer(text: str) -> str:
    """Return a short answer; in English it begins with a capital letter.

    The vision template writes a backslash and the letter n before a reply, and the tokenizer would melt that n with a
    small letter.
    """
    return text.capitalize()


# ---- rows -----------------------------------------------------------------------------------------------------------


def some_questions(found: Sequence[tuple[str, Exchange]], count: int, rng: Random) -> list[Exchange]:
    """Return up to `count` questions, every kind of answer as likely as any other, no answer told by earlier turns."""
    # the answers to these are guessed half of the time, where all others are not asked for
    rare = {kind for kind, often in (("time", 0.1), ("number", 0.35)) if rng.random() > often}
    kinds = sorted({kind for kind, _ in found} - rare)
    chosen: dict[str, str] = {}
    for _ in range(20 * count):
        if len(chosen) == count:
            break
        kind = rng.choice(kinds)
        question, reply = rng.choice([exchange for of_kind, exchange in found if of_kind == kind])
        told = " ".join([*chosen, *chosen.values()]).lower()
        if reply.lower() not in told:
            chosen[question] = reply
    return list(chosen.items())


def draw_from(weights: Mapping[int, int], rng: Random) -> int:
    """Return a key, each as likely as its weight says."""
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def text_part(text: str) -> Message:
    """Return a text part."""
    return {"type": "text", "text": text}


def messages_of(exchanges: Sequence[Exchange], image: str | None, rng: Random) -> list[Message]:
    """Return the messages of a row; the image stands in the first turn, mostly before the question."""
    messages: list[Message] = []
    for index, (question, reply) in enumerate(exchanges):
        parts = [text_part(question)]
        if image is not None and index == 0:
            place = 0 if rng.random() < 0.95 else 1
            parts.insert(place, {"type": "image", "image": image})
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": [text_part(reply)]}]
    return messages


def as_strings(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with a plain string for every list that is one text part."""
    return [
        {
            "role": message["role"],
            "content": message["content"][0]["text"]
            if len(message["content"]) == 1 and message["content"][0]["type"] == "text"
            else message["content"],
        }
        for message in messages
    ]


def make_row(name: str, number: int, rng: Random, write: Callable[[str, Picture], str]) -> list[Message]:
    """Return the messages of one row; `write` draws the picture into a file and returns its path."""
    language = "en" if number % 5 == number // 10 % 5 else "zh"  # a fifth, of the rows without a picture, too
    if number % round(1 / TEXT_SHARE) == 9:
        messages = messages_of(rng.sample(TEXT_ONLY[language], rng.choice((1, 1, 2))), None, rng)
        return as_strings(messages) if rng.random() < 0.3 else messages
    if rng.random() < SCENE_SHARE:
        picture = random_scene(rng)
        found = scene_questions(picture, language, rng)
    else:
        picture = random_shapes(rng, draw_from(SHAPES_IN_A_HUNDRED, rng))
        found = shape_questions(picture, language, rng)
    exchanges = some_questions(found, draw_from(QUESTIONS_IN_A_HUNDRED[name], rng), rng)
    messages = messages_of(exchanges, write(f"{name}_{number:04}", picture), rng)
    if rng.random() < 0.05:  # the picture comes in the second turn
        replies = {reply for _, reply in exchanges}
        others = [
            exchange
            for exchange in TEXT_ONLY[language]
            if not any(reply.lower() in " ".join(exchange).lower() for reply in replies)
        ]
        messages = messages_of([rng.choice(others)], None, rng) + messages
    if rng.random() < 0.03:
        messages = as_strings(messages)
    if name == "train" and number % 400 == 1:
        messages = [{"role": "system", "content": [text_part(SYSTEM_TURN)]}, *messages]
    return messages


def write_picture(picture: Picture, folder: Path, name: str, rng: Random) -> str:
    """Write a picture as PNG with a palette, or now and then as JPEG; returns its path inside the data folder."""
    image = draw(picture, rng.choice(SIDES))
    if rng.random() < JPEG_SHARE:
        path = f"images/{name}.jpg"
        image.save(folder / path, quality=85)
    else:
        path = f"images/{name}.png"
        image.quantize(24, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(folder / path, optimize=True)
    return path


def main(
    *,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path(__file__).parent / "demo_vision",
    seed: Annotated[int, typer.Option(help="Everything follows from it.")] = 23,
) -> None:
    """Write the three files and the pictures."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rng = Random(seed)
    for name, count in ROWS.items():
        with (out / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for number in range(count):
                messages = make_row(name, number, rng, lambda stem, picture: write_picture(picture, out, stem, rng))
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
