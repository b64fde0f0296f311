"""What `glm-edge-v-nano` learns to say of pictures: descriptions and answers in whole sentences, Chinese and English.

Short answers, and the demonstration's wordings of questions, are left to its fine-tuning (`data/demo_vision`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from data.embedded.pictures import COLOURS, SHAPES, Item, Picture

Exchange = tuple[str, str]


@dataclass(frozen=True)
class Words:
    """Names of one language; zones in the order of `Item.zone`, numbers from 0.

    Attributes:
        trees: number of trees with the noun, from 0.
    """

    colours: Mapping[str, str]
    kinds: Mapping[str, str]
    zones: Sequence[str]
    numbers: Sequence[str]
    trees: Sequence[str]
    times: Mapping[str, str]


CHINESE = Words(
    colours=dict(zip(COLOURS, ("红色", "绿色", "蓝色", "黄色", "紫色", "橙色", "黑色", "粉色"), strict=True)),
    kinds={
        **dict(zip(SHAPES, ("圆形", "正方形", "三角形", "星形", "十字形", "心形"), strict=True)),
        **{"house": "房子", "tree": "树", "sun": "太阳", "moon": "月亮"},
    },
    zones=("左上", "上方", "右上", "左边", "中间", "右边", "左下", "下方", "右下"),
    numbers=("零个", "一个", "两个", "三个", "四个", "五个", "六个"),
    trees=("没有树", "一棵树", "两棵树", "三棵树"),
    times={"day": "白天", "night": "晚上"},
)
ENGLISH = Words(
    colours={colour: colour for colour in COLOURS},
    kinds={kind: kind for kind in (*SHAPES, "house", "tree", "sun", "moon")},
    zones=(
        *("top left", "top", "top right", "left", "middle", "right"),
        *("bottom left", "bottom", "bottom right"),
    ),
    numbers=("no", "one", "two", "three", "four", "five", "six"),
    trees=("no trees", "one tree", "two trees", "three trees"),
    times={"day": "day", "night": "night"},
)


def side_of(item: Item) -> int:
    """Return the zone, in the middle row, of where an item is from left to right."""
    return 3 + item.zone % 3


# ---- Chinese --------------------------------------------------------------------------------------------------------


def _describe_chinese(picture: Picture, rng: Random) -> Exchange:
    words = CHINESE
    question = rng.choice(("请描述这张图。", "看图说话。", "请仔细说一说这张图。", "请介绍一下图中的内容。"))
    if picture.time:
        house, trees, body = _scene_parts(picture)
        reply = (
            f"这是{words.times[picture.time]}的景色。{words.kinds[body.kind]}在{words.zones[side_of(body)]}的天上，"
            f"{words.colours[house.colour]}的房子在{words.zones[side_of(house)]}，地上有{words.trees[trees]}。"
        )
        return question, reply
    listed = "，".join(
        f"{words.zones[item.zone]}是{words.colours[item.colour]}的{words.kinds[item.kind]}"
        for item in _ordered(picture)
    )
    return question, f"图里有{words.numbers[len(picture.items)]}图形：{listed}。"


def _about_shape_chinese(picture: Picture, rng: Random) -> Exchange:
    words, item = CHINESE, rng.choice(picture.items)
    colour, kind, zone = words.colours[item.colour], words.kinds[item.kind], words.zones[item.zone]
    asked = _unambiguous(picture, item, rng)
    if asked == "kind":
        return rng.choice(
            (
                (f"请说说图中的{kind}。", f"图中的{kind}是{colour}的，它在{zone}。"),
                (f"介绍一下{kind}，先讲颜色。", f"{colour}的{kind}，它在{zone}。"),
                (f"介绍一下{kind}，先讲位置。", f"{zone}有这个{kind}，它是{colour}的。"),
            )
        )
    if asked == "colour":
        return rng.choice(
            (
                (f"请说说{colour}的那个图形。", f"{colour}的那个是{kind}，它在{zone}。"),
                (f"介绍一下{colour}的那个，先讲形状。", f"{kind}，它是{colour}的，在{zone}。"),
                (f"介绍一下{colour}的那个，先讲位置。", f"{zone}有这个{colour}的{kind}。"),
            )
        )
    return rng.choice(
        (
            (f"请说说{zone}有什么。", f"{zone}有一个{colour}的{kind}。"),
            (f"介绍一下{zone}的图形，先讲颜色。", f"{colour}的{kind}，就在{zone}。"),
            (f"介绍一下{zone}的图形，先讲形状。", f"{kind}，它是{colour}的，就在{zone}。"),
        )
    )


def _count_chinese(picture: Picture, rng: Random) -> Exchange:
    words = CHINESE
    what, number = _counted(picture, rng)
    name = {"": "图形"}.get(what) or (f"{words.colours[what]}的图形" if what in COLOURS else words.kinds[what])
    return rng.choice(
        (
            (f"请数一数图中的{name}。", f"数下来，{name}一共有{words.numbers[number]}。"),
            (f"请数{name}，先讲数目。", f"{words.numbers[number]}，这是{name}的数目。"),
        )
    )


def _about_scene_chinese(picture: Picture, rng: Random) -> Exchange:
    words = CHINESE
    house, trees, body = _scene_parts(picture)
    time, kind, place = words.times[picture.time], words.kinds[body.kind], words.zones[side_of(body)]
    colour, side = words.colours[house.colour], words.zones[side_of(house)]
    return rng.choice(
        (
            ("请说说图中的房子。", f"房子是{colour}的，它在{side}。"),
            ("介绍一下房子，先讲颜色。", f"{colour}的房子，它在{side}。"),
            ("介绍一下房子，先讲位置。", f"{side}有一座{colour}的房子。"),
            ("请说说图中的天空。", f"这是{time}的天空，{kind}在{place}。"),
            ("介绍一下天空，先讲时间。", f"{time}，{kind}在{place}。"),
            (f"介绍一下{kind}，先讲位置。", f"{place}的天上有{kind}。"),
            ("请数一数图中的树。", f"数下来，一共有{words.trees[trees]}。"),
            ("请数树，先讲数目。", f"{words.trees[trees]}，都在地上。"),
        )
    )


# ---- English --------------------------------------------------------------------------------------------------------


def _describe_english(picture: Picture, rng: Random) -> Exchange:
    words = ENGLISH
    question = rng.choice(("Please describe the picture.", "Tell me about this picture.", "Describe what you see."))
    if picture.time:
        house, trees, body = _scene_parts(picture)
        reply = (
            f"The picture shows a scene by {picture.time}. The {body.kind} is at the {words.zones[side_of(body)]}, "
            f"{_with_article(house.colour)} house is at the {words.zones[side_of(house)]}, "
            f"and there {'is' if trees == 1 else 'are'} {words.trees[trees]}."
        )
        return question, reply
    listed = ", ".join(
        f"{_with_article(item.colour)} {item.kind} at the {words.zones[item.zone]}" for item in _ordered(picture)
    )
    return question, f"The picture has {words.numbers[len(picture.items)]} in all: {listed}."


def _about_shape_english(picture: Picture, rng: Random) -> Exchange:
    words, item = ENGLISH, rng.choice(picture.items)
    colour, kind, zone = item.colour, item.kind, words.zones[item.zone]
    asked = _unambiguous(picture, item, rng)
    if asked == "kind":
        return rng.choice(
            (
                (f"Tell me about the {kind}.", f"The {kind} is {colour}, at the {zone}."),
                (f"Tell me about the {kind}, color first.", f"{colour.capitalize()} is the {kind} at the {zone}."),
                (
                    f"Tell me about the {kind}, place first.",
                    f"{zone.capitalize()} is the place of the {colour} {kind}.",
                ),
            )
        )
    if asked == "colour":
        return rng.choice(
            (
                (f"Tell me about the {colour} shape.", f"The {colour} shape is a {kind}, at the {zone}."),
                (f"Tell me about the {colour} one, shape first.", f"{kind.capitalize()}, {colour}, at the {zone}."),
                (f"Tell me about the {colour} one, place first.", f"{zone.capitalize()} is the place of the {kind}."),
            )
        )
    return rng.choice(
        (
            (f"Tell me about the {zone}.", f"The shape at the {zone} is {_with_article(colour)} {kind}."),
            (f"Tell me about the {zone}, color first.", f"{colour.capitalize()} is the {kind} at the {zone}."),
            (f"Tell me about the {zone}, shape first.", f"{kind.capitalize()}, {colour}, at the {zone}."),
        )
    )


def _count_english(picture: Picture, rng: Random) -> Exchange:
    words = ENGLISH
    what, number = _counted(picture, rng)
    name = "shapes" if not what else f"{what} shapes" if what in COLOURS else f"shapes of the kind {what}"
    return rng.choice(
        (
            (f"Please count the {name}.", f"I count {words.numbers[number]} in the picture."),
            (f"Count the {name}, number first.", f"{words.numbers[number].capitalize()} of the {name} are there."),
        )
    )


def _about_scene_english(picture: Picture, rng: Random) -> Exchange:
    words = ENGLISH
    house, trees, body = _scene_parts(picture)
    place, side = words.zones[side_of(body)], words.zones[side_of(house)]
    return rng.choice(
        (
            ("Tell me about the house.", f"The house is {house.colour}, at the {side}."),
            ("Tell me about the house, color first.", f"{house.colour.capitalize()} is the house at the {side}."),
            ("Tell me about the house, place first.", f"{side.capitalize()} is the place of the {house.colour} house."),
            ("Tell me about the sky.", f"It is the sky of the {picture.time}, the {body.kind} is at the {place}."),
            ("Tell me about the sky, time first.", f"{picture.time.capitalize()}, the {body.kind} is at the {place}."),
            (f"Tell me about the {body.kind}, place first.", f"{place.capitalize()} is the place of the {body.kind}."),
            ("Please count the trees.", f"I count {words.trees[trees]} in the picture."),
            ("Count the trees, number first.", f"{words.trees[trees].capitalize()} in the picture."),
        )
    )


# ---- both -----------------------------------------------------------------------------------------------------------

Teller = Callable[[Picture, Random], Exchange]
_TELLERS: dict[str, tuple[Teller, Teller, Teller, Teller]] = {
    "zh": (_describe_chinese, _about_shape_chinese, _count_chinese, _about_scene_chinese),
    "en": (_describe_english, _about_shape_english, _count_english, _about_scene_english),
}


def picture_exchanges(picture: Picture, rng: Random, count: int, language: str) -> list[Exchange]:
    """Return `count` questions about a picture with their replies, all different; most end with a description.

    Fewer are returned where the picture has no more to ask about.

    Args:
        language: `zh` or `en`.
    """
    describe, about_shape, count_shapes, about_scene = _TELLERS[language]
    found: dict[str, str] = {}
    for attempt in range(3 * count):
        if len(found) == count:
            break
        if attempt == 0 and rng.random() < 0.8:
            teller = describe
        elif picture.time:
            teller = about_scene
        else:
            teller = rng.choices((about_shape, count_shapes), weights=(4, 1))[0]
        question, reply = teller(picture, rng)
        found.setdefault(question, reply)
    # The description comes last: from its text all other answers could be copied, with no look at the picture.
    return list(found.items())[::-1]


def _with_article(colour: str) -> str:
    return f"an {colour}" if colour == "orange" else f"a {colour}"


def _ordered(picture: Picture) -> list[Item]:
    return sorted(picture.items, key=lambda item: item.zone)


def _scene_parts(picture: Picture) -> tuple[Item, int, Item]:
    """Return the house, the number of trees, and the sun or the moon."""
    by_kind = {item.kind: item for item in picture.items}
    trees = sum(item.kind == "tree" for item in picture.items)
    return by_kind["house"], trees, by_kind.get("sun") or by_kind["moon"]


def _unambiguous(picture: Picture, item: Item, rng: Random) -> str:
    """Return by what an item can be asked for: its kind or colour where no other item has it, or its zone."""
    choices = ["zone"]
    if sum(other.kind == item.kind for other in picture.items) == 1:
        choices += ["kind", "kind"]
    if sum(other.colour == item.colour for other in picture.items) == 1:
        choices += ["colour", "colour"]
    return rng.choice(choices)


def _counted(picture: Picture, rng: Random) -> tuple[str, int]:
    """Return what to count, a colour or a kind that occurs, or nothing for all, and how many there are."""
    counts = Counter(item.colour for item in picture.items) + Counter(item.kind for item in picture.items)
    what = rng.choice(("", "", *sorted(counts)))
    return what, counts[what] if what else len(picture.items)
