"""Write the demo data: attribute lists to short advertising texts, in the conversation format of the fine-tuning guide.

    python data/make_demo.py [--seed 11] [--out data/demo]

The committed files come from the default seed. Each attribute has one usual wording and one rarer one; the text names
the attributes in the order of the list, opens by type and closes by the first attribute. A tenth of the rows are
English, a tenth have a system turn, and 15 in 100 go on for one or two turns that ask for a shorter text or for another
colour or style. No set of attributes of dev or test occurs in another file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import typer

ROWS = {"dev": 60, "test": 60, "train": 2000}
ENGLISH_SHARE, SYSTEM_SHARE, MORE_TURNS_SHARE = 0.10, 0.10, 0.15
USUAL_WORDING_SHARE = 0.85

Wordings = tuple[str, str]
Attribute = tuple[str, str]
Combination = frozenset[Attribute]


@dataclass(frozen=True)
class Language:
    """All wordings of one language.

    Attributes:
        type_key: the key that names the kind of goods; always the first attribute.
        types: kind of goods to (how the text calls it, the opening phrase).
        clauses: key, then value, to the usual and the rarer wording.
        closings: key of the first attribute after the type to the usual and the rarer closing.
        comma, stop: the punctuation between clauses and after a sentence.
        shorter: the request for a shorter text.
        changes: key to the request for another value, with one `{}`.
        systems: the system turns.
    """

    type_key: str
    types: Mapping[str, tuple[str, str]]
    clauses: Mapping[str, Mapping[str, Wordings]]
    closings: Mapping[str, Wordings]
    comma: str
    stop: str
    shorter: str
    changes: Mapping[str, str]
    systems: Sequence[str]


CHINESE = Language(
    type_key="类型",
    types={
        "裤": ("这条裤子", "剪裁利落"),
        "裙": ("这条裙子", "线条流畅"),
        "衬衫": ("这件衬衫", "做工精致"),
        "卫衣": ("这件卫衣", "上身轻松"),
        "毛衣": ("这件毛衣", "手感柔软"),
        "外套": ("这件外套", "轮廓有型"),
        "T恤": ("这件T恤", "简单有范"),
        "马甲": ("这件马甲", "搭配灵活"),
    },
    clauses={
        "材质": {
            "牛仔布": ("选用牛仔布，厚实又耐磨", "牛仔布越洗越有味道"),
            "棉": ("选用棉料，亲肤又透气", "棉料吸汗不闷热"),
            "麻": ("选用麻料，清爽又凉快", "麻料自带天然纹理"),
            "真丝": ("选用真丝，光泽细腻动人", "真丝贴在身上像水一样"),
            "羊毛": ("选用羊毛，保暖又不扎人", "羊毛锁住每一分温度"),
            "雪纺": ("选用雪纺，轻盈又飘逸", "雪纺走动时随风摆动"),
            "皮": ("选用皮料，质感高级耐用", "皮料越用越有光彩"),
            "针织": ("选用针织，弹力舒适自在", "针织让身体没有束缚"),
        },
        "颜色": {
            "白色": ("白色干净清爽，十分百搭", "白色看上去一尘不染"),
            "黑色": ("黑色沉稳大气，不挑肤色", "黑色永远不会出错"),
            "红色": ("红色热烈明亮，气色更好", "红色一眼就让人记住"),
            "蓝色": ("蓝色清新安静，像晴朗的天", "蓝色带来海边的凉意"),
            "绿色": ("绿色充满生机，很有活力", "绿色好像初春的树叶"),
            "粉色": ("粉色温柔甜蜜，减龄效果好", "粉色藏着少女的心事"),
            "灰色": ("灰色低调耐看，容易搭配", "灰色有一种安静的力量"),
            "卡其色": ("卡其色温暖自然，显得有品位", "卡其色带着秋天的气息"),
        },
        "风格": {
            "休闲": ("休闲的设计让人放松", "休闲的样子没有距离感"),
            "复古": ("复古的设计充满故事感", "复古的样子好像老电影"),
            "简约": ("简约的设计不多一分装饰", "简约的样子胜过繁复"),
            "运动": ("运动的设计活动更自如", "运动的样子精神十足"),
            "文艺": ("文艺的设计透出书卷气", "文艺的样子像一首小诗"),
            "通勤": ("通勤的设计得体又干练", "通勤的样子让人信任"),
            "甜美": ("甜美的设计可爱动人", "甜美的样子让人微笑"),
            "街头": ("街头的设计个性十足", "街头的样子酷劲满满"),
        },
        "图案": {
            "条纹": ("条纹图案拉长身形", "条纹图案排列整齐"),
            "格子": ("格子图案经典不过时", "格子图案很有学院味"),
            "碎花": ("碎花图案浪漫清新", "碎花图案好像小花园"),
            "字母": ("字母图案增添趣味", "字母图案写出态度"),
            "刺绣": ("刺绣图案针脚精美", "刺绣图案出自巧手"),
            "波点": ("波点图案俏皮活泼", "波点图案跳动有节奏"),
        },
        "版型": {
            "宽松": ("宽松的版型遮肉显瘦", "宽松的版型自由自在"),
            "修身": ("修身的版型勾勒曲线", "修身的版型凸显身材"),
            "直筒": ("直筒的版型修饰比例", "直筒的版型干脆挺拔"),
            "收腰": ("收腰的版型提高腰线", "收腰的版型更显腰细"),
        },
        "季节": {
            "春季": ("春季出门穿它刚刚好", "春季的风也变得温柔"),
            "夏季": ("夏季使用一点也不热", "夏季的阳光与它很配"),
            "秋季": ("秋季搭配起来有层次", "秋季的落叶与它很配"),
            "冬季": ("冬季使用温暖又安心", "冬季的冷风也不用怕"),
        },
    },
    closings={
        "材质": ("好料子值得拥有", "摸一下就会喜欢"),
        "颜色": ("让你在人群中更出众", "每天都有好心情"),
        "风格": ("轻松展现自己的品味", "穿出自己的味道"),
        "图案": ("细节之处见用心", "越看越让人喜欢"),
        "版型": ("什么身材都能驾驭", "照镜子时更有自信"),
        "季节": ("是这个时候的好选择", "快把它带回家吧"),
    },
    comma="，",
    stop="。",
    shorter="再短一点",
    changes={"颜色": "换成{}", "风格": "换一个风格：{}"},
    systems=("你是一位服装文案写手。", "请根据属性写一段广告文案。", "你为网店写商品介绍，文字要生动。"),
)

ENGLISH = Language(
    type_key="Type",
    types={
        "Pants": ("This pair of pants", "has a clean cut"),
        "Skirt": ("This skirt", "has a smooth line"),
        "Shirt": ("This shirt", "is finely made"),
        "Sweater": ("This sweater", "feels soft"),
        "Coat": ("This coat", "keeps its shape"),
    },
    clauses={
        "Material": {
            "Denim": ("the denim is thick and strong", "the denim gets better with time"),
            "Cotton": ("the cotton is kind to the skin", "the cotton lets the body breathe"),
            "Silk": ("the silk shines softly", "the silk flows like water"),
            "Wool": ("the wool keeps you warm", "the wool holds the heat"),
        },
        "Color": {
            "White": ("the white looks clean and fresh", "the white goes with everything"),
            "Black": ("the black looks calm and strong", "the black is never wrong"),
            "Red": ("the red looks bright and lively", "the red is easy to remember"),
            "Blue": ("the blue looks like a clear sky", "the blue brings the sea to mind"),
        },
        "Style": {
            "Casual": ("the casual design lets you relax", "the casual look is easy to like"),
            "Classic": ("the classic design never gets old", "the classic look tells a story"),
            "Simple": ("the simple design has nothing extra", "the simple look says enough"),
            "Sport": ("the sport design moves with you", "the sport look is full of energy"),
        },
        "Fit": {
            "Loose": ("the loose fit gives you room", "the loose fit feels free"),
            "Slim": ("the slim fit shows your shape", "the slim fit looks sharp"),
        },
    },
    closings={
        "Material": ("You will love to touch it", "Good cloth is worth it"),
        "Color": ("You will stand out in the crowd", "It makes every day bright"),
        "Style": ("It shows your own taste", "Wear it your way"),
        "Fit": ("It suits every body", "You will feel sure of yourself"),
    },
    comma=", and ",
    stop=". ",
    shorter="Make it shorter",
    changes={"Color": "Change the color to {}", "Style": "Change the style to {}"},
    systems=("You write advertisements for a clothes shop.", "Write a short advertisement from the attributes."),
)


@dataclass(frozen=True)
class Draft:
    """One advertisement before it is put into words.

    Attributes:
        kind: the value of the type key.
        attributes: the other (key, value) pairs in the order of the list, two to four of them.
        rarer: for each attribute, then the closing, whether the rarer wording is used.
    """

    kind: str
    attributes: tuple[Attribute, ...]
    rarer: tuple[bool, ...]


def draw(rng: Random, language: Language, count: int) -> Draft:
    """Draw a type, `count` attributes of different keys and their wordings."""
    keys = rng.sample(sorted(language.clauses), count)
    attributes = tuple((key, rng.choice(sorted(language.clauses[key]))) for key in keys)
    rarer = tuple(rng.random() > USUAL_WORDING_SHARE for _ in range(count + 1))
    return Draft(rng.choice(sorted(language.types)), attributes, rarer)


def combination(language: Language, draft: Draft) -> Combination:
    """Return the set of the draft's (key, value) pairs, the type among them."""
    return frozenset({(language.type_key, draft.kind), *draft.attributes})


def attribute_list(language: Language, draft: Draft) -> str:
    """Return the prompt, such as `类型#裤*材质#牛仔布*风格#休闲`."""
    return "*".join(f"{key}#{value}" for key, value in ((language.type_key, draft.kind), *draft.attributes))


def advertisement(language: Language, draft: Draft, shorter: bool = False) -> str:
    """Return the text: opening and first clause, the other clauses in twos, the closing.

    The shorter one leaves the middle out.
    """
    name, opening = language.types[draft.kind]
    clauses = [
        language.clauses[key][value][rare] for (key, value), rare in zip(draft.attributes, draft.rarer, strict=False)
    ]
    closing = language.closings[draft.attributes[0][0]][draft.rarer[-1]]
    joined = name + (" " if name.isascii() else "") + opening
    sentences = [joined + language.comma + clauses[0]]
    if not shorter:
        rest = clauses[1:]
        sentences += [language.comma.join(rest[start : start + 2]) for start in range(0, len(rest), 2)]
    sentences.append(closing)
    return "".join(sentence[0].upper() + sentence[1:] + language.stop for sentence in sentences).strip()


def changed(rng: Random, language: Language, draft: Draft) -> tuple[str, Draft] | None:
    """Return a request for another colour or style and the draft that answers it; None where the draft has neither."""
    places = [index for index, (key, _) in enumerate(draft.attributes) if key in language.changes]
    if not places:
        return None
    place = rng.choice(places)
    key, old = draft.attributes[place]
    value = rng.choice(sorted(set(language.clauses[key]) - {old}))
    attributes = (*draft.attributes[:place], (key, value), *draft.attributes[place + 1 :])
    rarer = (*draft.rarer[:place], False, *draft.rarer[place + 1 :])
    return language.changes[key].format(value), Draft(draft.kind, attributes, rarer)


@dataclass(frozen=True)
class Row:
    """One conversation, and every combination of attributes that one of its replies describes."""

    messages: tuple[dict[str, str], ...]
    combinations: frozenset[Combination]


def make_row(rng: Random, language: Language, system: bool, more_turns: bool) -> Row:
    """Return one conversation: perhaps a system turn, the list and its text, with `more_turns` one or two revisions."""
    draft = draw(rng, language, 2 if more_turns else rng.randint(2, 4))
    exchanges = [(attribute_list(language, draft), advertisement(language, draft))]
    combinations = {combination(language, draft)}
    if more_turns:
        change = changed(rng, language, draft)
        if change and rng.random() < 0.6:
            request, draft = change
            exchanges.append((request, advertisement(language, draft)))
            combinations.add(combination(language, draft))
        if len(exchanges) == 1 or rng.random() < 0.4:
            exchanges.append((language.shorter, advertisement(language, draft, shorter=True)))
    messages = [{"role": "system", "content": rng.choice(language.systems)}] if system else []
    for question, reply in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return Row(tuple(messages), frozenset(combinations))


def _flags(rng: Random, rows: int, share: float) -> list[bool]:
    flags = [index < round(rows * share) for index in range(rows)]
    rng.shuffle(flags)
    return flags


def make_split(rng: Random, rows: int, taken: set[Combination]) -> list[Row]:
    """Return `rows` conversations that describe no combination in `taken`; the shares of each kind are exact."""
    english, system, more_turns = (
        _flags(rng, rows, share) for share in (ENGLISH_SHARE, SYSTEM_SHARE, MORE_TURNS_SHARE)
    )
    split: list[Row] = []
    while len(split) < rows:
        index = len(split)
        row = make_row(rng, ENGLISH if english[index] else CHINESE, system[index], more_turns[index])
        if not row.combinations & taken:
            split.append(row)
    return split


def main(
    seed: Annotated[int, typer.Option(help="The same seed writes the same files.")] = 11,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path(__file__).parent / "demo",
) -> None:
    """Write train.jsonl, dev.jsonl and test.jsonl."""
    rng = Random(seed)
    out.mkdir(parents=True, exist_ok=True)
    taken: set[Combination] = set()
    for name, rows in ROWS.items():
        split = make_split(rng, rows, taken)
        taken.update(*(row.combinations for row in split))
        lines = [json.dumps({"messages": row.messages}, ensure_ascii=False) + "\n" for row in split]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    typer.run(main)
