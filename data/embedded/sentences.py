"""Plain sentences of the pre-training corpus of `glm-edge-nano`, and the dictionary words that fill them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random

import jieba

from data.embedded import words

COMMON_WORD_FREQUENCY = 120
WORD_FLAGS = frozenset({"n", "v", "a", "vn", "s", "t", "an", "ad", "b", "d", "z"})
EVERYDAY_CHARACTERS = 3000
CHINESE_PUNCTUATION = "，。！？：；、“”‘’（）《》…—"
FIRST_CJK, LAST_CJK = "\u4e00", "\u9fff"


@dataclass(frozen=True)
class DictionaryWord:
    """A word of jieba's dictionary with its frequency and its part of speech."""

    text: str
    frequency: int
    flag: str


@lru_cache(maxsize=1)
def dictionary_words() -> tuple[DictionaryWord, ...]:
    """Return the words of jieba's dictionary that are all in CJK characters, most frequent first."""
    found: list[DictionaryWord] = []
    with jieba.get_dict_file() as file:
        for line in file:
            text, frequency, flag = line.decode("utf-8").split()
            if all(FIRST_CJK <= character <= LAST_CJK for character in text):
                found.append(DictionaryWord(text, int(frequency), flag))
    return tuple(sorted(found, key=lambda word: (-word.frequency, word.text)))


@lru_cache(maxsize=1)
def copy_words() -> tuple[str, ...]:
    """Return the common words of two to four characters that the copying exercises draw from, without names."""
    return tuple(
        word.text
        for word in dictionary_words()
        if word.flag in WORD_FLAGS and word.frequency >= COMMON_WORD_FREQUENCY and 2 <= len(word.text) <= 4
    )


@lru_cache(maxsize=4)
def common_characters(count: int) -> tuple[str, ...]:
    """Return the `count` most frequent characters of the dictionary, each word weighted by its frequency."""
    totals: dict[str, int] = {}
    for word in dictionary_words():
        for character in word.text:
            totals[character] = totals.get(character, 0) + word.frequency
    return tuple(sorted(totals, key=lambda character: (-totals[character], character))[:count])


def draw_word(rng: Random) -> str:
    """Return a common word, the most frequent ones far more often: half of the draws fall on the first 600 or so."""
    drawn = copy_words()
    return drawn[int(len(drawn) * rng.random() ** 5)]


def draw_characters(rng: Random, count: int) -> str:
    """Return `count` everyday characters in a row, the most frequent ones more often."""
    drawn = common_characters(EVERYDAY_CHARACTERS)
    return "".join(drawn[int(len(drawn) * rng.random() ** 3)] for _ in range(count))


def capital(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """Return the English noun behind "a" or "an"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def chinese_sentence(rng: Random) -> str:
    """Return one general Chinese sentence."""
    choice = rng.choice
    person = choice(words.PEOPLE + words.NAMES)[0]
    other = choice(words.PEOPLE + words.NAMES)[0]
    time, place, city = choice(words.DAY_TIMES)[0], choice(words.PLACES)[0], choice(words.CITIES)[0]
    food, drink, fruit = choice(words.FOODS)[0], choice(words.DRINKS)[0], choice(words.FRUITS + words.VEGETABLES)[0]
    animal, thing = choice(words.ANIMALS)[0], choice(words.OBJECTS + words.CLOTHES)[0]
    adjective, feeling = choice(words.ADJECTIVES)[0], choice(words.FEELINGS)[0]
    colour, other_colour = (pair[0] for pair in rng.sample(words.COLOURS, 2))
    weather, sport, word = choice(words.WEATHER), choice(words.SPORTS)[0], draw_word(rng)
    frames = (
        f"{time}，{person}去{place}，觉得很{feeling}。",
        f"{person}喜欢吃{food}，也喜欢喝{drink}。",
        f"{city}{time}{weather[0]}，{weather[1]}。",
        f"{person}买了一个{colour}的{thing}，看起来很{adjective}。",
        f"{place}里有一只{adjective}的{animal}，{person}看了很久。",
        f"因为{weather[0]}，{person}没有去{place}，在家里吃{food}。",
        f"{person}和{other}一起去{city}旅行，坐的是{choice(words.VEHICLES)[0]}。",
        f"{person}每天{choice(('早上', '晚上'))}练习{sport}，身体很好。",
        f"桌子上放着{fruit}、{food}和{drink}。",
        f"{person}对{other}说：“{time}我们去{place}吧。”",
        f"这个{thing}是{colour}的，又{adjective}又{choice(words.ADJECTIVES)[0]}。",
        f"{person}在{place}等{other}，等了{rng.randint(2, 59)}分钟。",
        f"如果{time}{weather[0]}，{weather[1]}。",
        f"{person}养了{rng.randint(2, 9)}只{animal}，每天给它们吃东西。",
        f"{person}今天学习{choice(words.SUBJECTS)[0]}，老师讲了“{word}”这个词。",
        f"我在书上看到“{word}”，就去问{other}。",
        f"{other}说{person}的{thing}不见了，原来在{place}。",
        f"虽然{person}很{feeling}，但是还是去了{place}。",
        f"{thing}的颜色是{colour}，不是{other_colour}。",
        f"这件{colour}的{choice(words.CLOTHES)[0]}很{adjective}，{person}穿着去{place}。",
        f"人们常常谈到{word}，{person}也不例外。",
        f"关于{word}，{person}写了{rng.randint(2, 9)}页笔记。",
    )
    return choice(frames)


def english_sentence(rng: Random) -> str:
    """Return one general English sentence."""
    choice = rng.choice
    person = capital(choice(words.PEOPLE + words.NAMES)[1])
    other = choice(words.PEOPLE + words.NAMES)[1]
    time, place, city = choice(words.DAY_TIMES)[1], choice(words.PLACES)[1], choice(words.CITIES)[1]
    food, drink = choice(words.FOODS)[1], choice(words.DRINKS)[1]
    animal, thing = choice(words.ANIMALS)[1], choice(words.OBJECTS)[1]
    adjective, feeling = choice(words.ADJECTIVES)[1], choice(words.FEELINGS)[1]
    colour, other_colour = (pair[1] for pair in rng.sample(words.COLOURS, 2))
    weather = choice(words.WEATHER)
    frames = (
        f"{person} went to {place} {time} and felt {feeling}.",
        f"{person} likes {food} and {drink}.",
        f"It is {weather[2]} in {city} today, so {weather[3]}.",
        f"{person} bought {with_article(colour)} {thing}, and it looks {adjective}.",
        f"There is {with_article(adjective)} {animal} in {place}.",
        f"{person} travels to {city} with {other} by {choice(words.VEHICLES)[1]}.",
        f"{person} waited for {other} for {rng.randint(2, 59)} minutes.",
        f"The {thing} is {colour}, not {other_colour}.",
        f"{person} has {rng.randint(2, 9)} books about {choice(words.SUBJECTS)[1]}.",
        f"When it is {weather[2]}, {weather[3]}.",
        f"{person} plays {choice(words.SPORTS[:6])[1]} with {other} {time}.",
        f"The {adjective} {thing} was made in {city}.",
        f"{person} said the {animal} was very {adjective}.",
    )
    return choice(frames)


def paragraph(rng: Random) -> str:
    """Return a text of two to five sentences in one language."""
    count = rng.randint(2, 5)
    if rng.random() < 0.7:
        return "".join(chinese_sentence(rng) for _ in range(count))
    return " ".join(english_sentence(rng) for _ in range(count))


def story(rng: Random, animal: words.Pair, place: words.Pair) -> words.Pair:
    """Return a short story about an animal at a place, in both languages."""
    friend, name, food = rng.choice(words.ANIMALS), rng.choice(words.NAMES), rng.choice(words.FRUITS + words.FOODS)
    colour, feeling = rng.choice(words.COLOURS), rng.choice(words.FEELINGS)
    chinese = (
        f"从前，{place[0]}住着一只{colour[0]}的{animal[0]}，名字叫{name[0]}。有一天，{name[0]}遇到了一只{friend[0]}。"
        f"它们一起吃{food[0]}，成了好朋友。晚上回家的时候，{name[0]}觉得很{feeling[0]}。"
    )
    english = (
        f"Once there was {with_article(colour[1])} {animal[1]} near {place[1]}, and its name was {name[1]}. "
        f"One day {name[1]} met {with_article(friend[1])}. They ate {food[1]} together and became friends. "
        f"In the evening {name[1]} felt {feeling[1]}."
    )
    return chinese, english
