"""The exchanges of the chats that `glm-edge-nano` is pre-trained on: each maker returns a question and its reply."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from data.embedded import words
from data.embedded.sentences import capital, chinese_sentence, draw_word, english_sentence, story, with_article

Turn = tuple[str, str]

_ENGLISH_POOLS = (words.ANIMALS, words.FRUITS, words.VEGETABLES, words.OBJECTS, words.COLOURS, words.ADJECTIVES)
ENGLISH_WORDS = sorted({*words.ENGLISH_EXTRA, *(pair[1] for pool in _ENGLISH_POOLS for pair in pool)})


def some_words(rng: Random, count: int) -> list[str]:
    """Return `count` different common Chinese words."""
    found: list[str] = []
    while len(found) < count:
        word = draw_word(rng)
        if word not in found:
            found.append(word)
    return found


def some_english_words(rng: Random, count: int) -> list[str]:
    """Return `count` different English words."""
    return rng.sample(ENGLISH_WORDS, count)


def _gibberish(rng: Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(rng.randint(3, 7)))


def _join_chinese(items: list[str]) -> str:
    return items[0] if len(items) == 1 else "、".join(items[:-1]) + "和" + items[-1]


def _join_english(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _quoted_copy(rng: Random) -> Turn:
    kind = rng.random()
    if kind < 0.45:
        text = "".join(some_words(rng, rng.randint(1, 5)))
    elif kind < 0.6:
        text = chinese_sentence(rng)
    elif kind < 0.75:
        text = " ".join(some_english_words(rng, rng.randint(1, 5)))
    elif kind < 0.85:
        text = english_sentence(rng)
    else:
        text = _gibberish(rng)
    asks = (
        "请重复：{}",
        "跟我说：{}",
        "照着写一遍：{}",
        "请把下面的话再说一遍：{}",
        "Repeat after me: {}",
        "Say this again: {}",
        "Copy: {}",
    )
    return rng.choice(asks).format(text), text


def _copied_list(rng: Random) -> Turn:
    count = rng.randint(2, 6)
    if rng.random() < 0.7:
        items = some_words(rng, count)
        mark = rng.choice((" ", "，", "/", "、", "\n", "；", "|"))
        ask = rng.choice(("把这些词用顿号连起来：{}", "请把这些词写成一句：{}", "列出这些词：{}"))
        replies = {"把": "、".join(items), "请": f"这里有{_join_chinese(items)}。", "列": "\n".join(items)}
        return ask.format(mark.join(items)), replies[ask[0]]
    items = some_english_words(rng, count)
    ask = rng.choice(("Join these words: {}", "Put these words in a sentence: {}", "List these words: {}"))
    replies = {"J": ", ".join(items), "P": f"Here we have {_join_english(items)}.", "L": "\n".join(items)}
    return ask.format(rng.choice((" ", "/", "; ")).join(items)), replies[ask[0]]


def _pick_from_list(rng: Random) -> Turn:
    ordinals = (("第一", "first"), ("第二", "second"), ("第三", "third"), ("最后一", "last"))
    index = rng.randrange(4)
    position = index if index < 3 else -1
    if rng.random() < 0.7:
        items = some_words(rng, rng.randint(3, 5))
        return (
            f"“{'、'.join(items)}”里{ordinals[index][0]}个词是什么？",
            f"{ordinals[index][0]}个词是“{items[position]}”。",
        )
    items = some_english_words(rng, rng.randint(3, 5))
    return (
        f"Which word is the {ordinals[index][1]} one: {', '.join(items)}?",
        f"The {ordinals[index][1]} word is {items[position]}.",
    )


def _word_lookup(rng: Random) -> Turn:
    keys = rng.sample([name[0] for name in words.NAMES], 3)
    values = [draw_word(rng) for _ in keys]
    index = rng.randrange(3)
    stated = "，".join(f"{key}写的是{value}" for key, value in zip(keys, values, strict=True))
    return f"{stated}。{keys[index]}写的是什么？", f"{keys[index]}写的是{values[index]}。"


def _make_sentence(rng: Random) -> Turn:
    person, place = rng.choice(words.PEOPLE + words.NAMES)[0], rng.choice(words.PLACES)[0]
    first, second, third = some_words(rng, 3)
    if rng.random() < 0.4:
        return f"用“{first}”造句。", rng.choice(
            (f"{person}在{place}说起了{first}。", f"我们今天学习了“{first}”。", f"说到{first}，{person}有很多话要说。")
        )
    if rng.random() < 0.5:
        return f"用“{first}”和“{second}”写一句话。", f"{person}先说到{first}，又说到{second}。"
    return (
        f"用“{first}”“{second}”“{third}”写一段话。",
        f"今天在{place}，大家谈到了{first}。{person}说，{second}也很重要。最后，我们还说了说{third}。",
    )


def _describe(rng: Random) -> Turn:
    thing = rng.choice(words.OBJECTS + words.ANIMALS + words.CLOTHES)
    colour, adjective, place = rng.choice(words.COLOURS), rng.choice(words.ADJECTIVES), rng.choice(words.PLACES)
    if rng.random() < 0.65:
        return (
            f"请说说你看到的{colour[0]}的{thing[0]}，它在{place[0]}，很{adjective[0]}。",
            f"我在{place[0]}看到了{thing[0]}。它是{colour[0]}的，看起来很{adjective[0]}。",
        )
    return (
        f"Tell me about the {colour[1]} {thing[1]} in {place[1]}. It is {adjective[1]}.",
        f"I saw the {thing[1]} in {place[1]}. It is {colour[1]} and looks {adjective[1]}.",
    )


def _arithmetic(rng: Random) -> Turn:
    left, right = rng.randint(0, 12), rng.randint(0, 12)
    if rng.random() < 0.5:
        left, right = max(left, right), min(left, right)
        sign, chinese, english, result = "-", "减", "minus", left - right
    else:
        sign, chinese, english, result = "+", "加", "plus", left + right
    form = rng.randrange(3)
    if form == 0:
        return f"{left}{chinese}{right}等于多少？", f"{left}{chinese}{right}等于{result}。"
    if form == 1:
        return f"What is {left} {english} {right}?", f"{left} {english} {right} is {result}."
    return f"{left}{sign}{right}=", f"{left}{sign}{right}={result}"


def _opposite(rng: Random) -> Turn:
    left, right, english_left, english_right = rng.choice(words.OPPOSITES)
    if rng.random() < 0.5:
        left, right, english_left, english_right = right, left, english_right, english_left
    if rng.random() < 0.6:
        return rng.choice((f"“{left}”的反义词是什么？", f"{left}的相反是什么？")), f"“{left}”的反义词是“{right}”。"
    return f"What is the opposite of {english_left}?", f"The opposite of {english_left} is {english_right}."


def _colour(rng: Random) -> Turn:
    thing, colour, english_thing, english_colour = rng.choice(words.COLOUR_OF)
    if rng.random() < 0.6:
        return rng.choice((f"{thing}是什么颜色的？", f"{thing}什么颜色？")), f"{thing}是{colour}的。"
    return f"What colour is {english_thing}?", f"{capital(english_thing)} is {english_colour}."


def _translation(rng: Random) -> Turn:
    pools = (
        words.ANIMALS,
        words.FRUITS,
        words.VEGETABLES,
        words.FOODS,
        words.OBJECTS,
        words.COLOURS,
        words.CLOTHES,
        words.WEEKDAYS,
    )
    chinese, english = rng.choice(rng.choice(pools))
    if rng.random() < 0.5:
        return f"“{chinese}”用英语怎么说？", f"“{chinese}”的英语是 {english}。"
    return f"What is {english} in Chinese?", f"The Chinese for {english} is {chinese}."


def _category(rng: Random) -> Turn:
    kinds = (
        ("动物", words.ANIMALS),
        ("水果", words.FRUITS),
        ("蔬菜", words.VEGETABLES),
        ("颜色", words.COLOURS),
        ("运动", words.SPORTS),
    )
    name, pool = rng.choice(kinds)
    if rng.random() < 0.5:
        member = rng.choice(pool)[0]
        return f"{member}是{name}吗？", f"是的，{member}是一种{name}。"
    count = rng.randint(2, 4)
    return f"说出{count}种{name}。", f"{_join_chinese([pair[0] for pair in rng.sample(pool, count)])}。"


def _calendar(rng: Random) -> Turn:
    days, step = rng.choice((words.WEEKDAYS, words.MONTHS)), rng.choice((1, -1))
    index = rng.randrange(len(days))
    other = days[(index + step) % len(days)]
    if rng.random() < 0.6:
        where = "后面" if step == 1 else "前面"
        return f"{days[index][0]}{where}是什么？", f"{days[index][0]}{where}是{other[0]}。"
    where = "after" if step == 1 else "before"
    return f"What comes {where} {days[index][1]}?", f"{other[1]} comes {where} {days[index][1]}."


def _ordering(rng: Random) -> Turn:
    numbers = rng.sample(range(1, 30), rng.randint(3, 5))
    down = rng.random() < 0.4
    shown, ordered = "、".join(map(str, numbers)), "、".join(map(str, sorted(numbers, reverse=down)))
    return f"把这些数从{'大到小' if down else '小到大'}排好：{shown}", ordered


def _definition(rng: Random) -> Turn:
    name, meaning = rng.choice(words.DEFINITIONS)
    return (f"What is {name}?" if name.isascii() else rng.choice((f"什么是{name}？", f"{name}是什么？"))), meaning


def _job(rng: Random) -> Turn:
    job, work, english_job, english_work = rng.choice(words.JOBS)
    if rng.random() < 0.6:
        return f"{job}是做什么的？", f"{job}的工作是{work}。"
    return f"What does a {english_job} do?", f"A {english_job} {english_work}."


def _health(rng: Random) -> Turn:
    illness, advice, english_illness, english_advice = rng.choice(words.ILLNESSES)
    if rng.random() < 0.6:
        return f"我{illness}，怎么办？", f"别担心，{advice}。"
    return f"I {english_illness}. What should I do?", f"Do not worry. You should {english_advice}."


def _weather(rng: Random) -> Turn:
    city, weather = rng.choice(words.CITIES), rng.choice(words.WEATHER)
    if rng.random() < 0.6:
        return f"{city[0]}今天{weather[0]}，要注意什么？", f"{city[0]}今天{weather[0]}，{weather[1]}。"
    return f"It is {weather[2]} in {city[1]}. What should I do?", f"It is {weather[2]}, so please {weather[3]}."


def _story(rng: Random) -> Turn:
    animal, place = rng.choice(words.ANIMALS), rng.choice(words.PLACES)
    chinese, english = story(rng, animal, place)
    if rng.random() < 0.65:
        return f"讲一个关于{animal[0]}的小故事，地点是{place[0]}。", chinese
    return f"Tell me a short story about {with_article(animal[1])} and {place[1]}.", english


def _plans(rng: Random) -> Turn:
    time, place, city = rng.choice(words.DAY_TIMES), rng.choice(words.PLACES), rng.choice(words.CITIES)
    food, vehicle = rng.choice(words.FOODS), rng.choice(words.VEHICLES)
    if rng.random() < 0.65:
        return rng.choice(
            (
                (
                    f"{time[0]}去{city[0]}玩，有什么建议？",
                    f"可以坐{vehicle[0]}去{city[0]}，先去{place[0]}看看，再吃一点{food[0]}。",
                ),
                (
                    f"{time[0]}想吃{food[0]}，好吗？",
                    f"好的，{time[0]}吃{food[0]}，再喝一杯{rng.choice(words.DRINKS)[0]}。",
                ),
                (f"怎么去{place[0]}？", f"去{place[0]}可以坐{vehicle[0]}，也可以走路。"),
            )
        )
    return f"I want to visit {city[1]} {time[1]}.", f"You can go to {city[1]} by {vehicle[1]} and eat {food[1]} there."


def _greeting(rng: Random) -> Turn:
    return rng.choice(
        (
            ("你好", "你好！有什么可以帮你的吗？"),
            ("你好！", "你好！很高兴见到你。"),
            ("早上好", "早上好！今天过得怎么样？"),
            ("谢谢你", "不客气，随时都可以问我。"),
            ("再见", "再见，祝你一切顺利！"),
            ("你是谁？", "我是一个小小的语言模型，可以和你聊天。"),
            ("你叫什么名字？", "我叫小边，是一个很小的模型。"),
            ("你会做什么？", "我可以聊天、算简单的数、重复你说的话。"),
            ("hi", "Hi! How can I help you?"),
            ("Hello", "Hello! How can I help you?"),
            ("Good morning", "Good morning! How are you today?"),
            ("Thank you", "You are welcome. Ask me any time."),
            ("Who are you?", "I am a very small language model."),
            ("Goodbye", "Goodbye, have a nice day!"),
        )
    )


def remembered_name(rng: Random) -> list[Turn]:
    """Return two exchanges, of which the second asks for what the first has told."""
    name, city, sport = rng.choice(words.NAMES)[0], rng.choice(words.CITIES)[0], rng.choice(words.SPORTS)[0]
    word = draw_word(rng)
    asked = rng.choice(
        (
            ("我叫什么？", f"你叫{name}。"),
            ("我住在哪里？", f"你住在{city}。"),
            ("我喜欢什么？", f"你喜欢{sport}和{word}。"),
        )
    )
    return [(f"我叫{name}，住在{city}，喜欢{sport}和{word}。", f"你好，{name}！很高兴认识你。"), asked]


# maker and how often it is drawn, in relation to the others
EXCHANGES: tuple[tuple[Callable[[Random], Turn], int], ...] = (
    (_quoted_copy, 16), (_copied_list, 10), (_pick_from_list, 6), (_word_lookup, 5), (_make_sentence, 9),
    (_describe, 5), (_arithmetic, 6), (_opposite, 4), (_colour, 3), (_translation, 5), (_category, 4), (_calendar, 3),
    (_ordering, 2), (_definition, 4), (_job, 3), (_health, 3), (_weather, 4), (_story, 5), (_plans, 5), (_greeting, 3),
)  # fmt: skip
