"""The pre-training corpus of `glm-edge-nano`: generated general sentences and short chats, Chinese and English.

Everything follows from one seed. A document is either plain text or a chat; the themes are everyday ones (weather,
food, family, school, health, arithmetic, opposites, colours, time, translation) and many small exercises in copying,
listing and ordering words, because that is what a small model needs most to follow a prompt. The corpus holds no
attribute lists and no advertising: those are the demo task, which must stay unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from data.embedded.exchanges import EXCHANGES, Turn, remembered_name, some_english_words, some_words
from data.embedded.sentences import draw_characters, paragraph
from data.embedded.words import SYSTEM_PROMPTS


@dataclass(frozen=True)
class Document:
    """One document of the corpus: plain text or a chat.

    Attributes:
        text: plain text; empty for a chat.
        messages: the turns of a chat; empty for plain text.
    """

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()


def copying_drill(rng: Random) -> str:
    """Return a random sequence of characters or words that is written two to four times.

    Only looking back helps to predict the later times, and every everyday character occurs in some of them.
    """
    kind = rng.random()
    if kind < 0.4:
        text = draw_characters(rng, rng.randint(2, 16))
    elif kind < 0.7:
        text = rng.choice(("", "，", " ")).join(some_words(rng, rng.randint(2, 7)))
    else:
        text = " ".join(some_english_words(rng, rng.randint(2, 7)))
    return rng.choice(("\n", "。", "；", " ")).join([text] * rng.randint(2, 4))


def _turns(rng: Random) -> list[Turn]:
    makers = [maker for maker, _ in EXCHANGES]
    weights = [weight for _, weight in EXCHANGES]
    if rng.random() < 0.05:
        return remembered_name(rng)
    count = rng.choices((1, 2, 3), weights=(70, 20, 10))[0]
    turns = [maker(rng) for maker in rng.choices(makers, weights=weights, k=count)]
    if rng.random() < 0.1:
        again = rng.choice(("请再说一遍", "你刚才说什么？", "Say it again, please."))
        turns.append((again, turns[-1][1]))
    return turns


def chat(rng: Random) -> tuple[dict[str, str], ...]:
    """Return the messages of one chat of one to four exchanges, a third of them with a system turn."""
    messages: list[dict[str, str]] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for question, reply in _turns(rng):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return tuple(messages)


def generate_corpus(seed: int, count: int) -> Iterator[Document]:
    """Yield `count` documents: a tenth copying drills, a quarter plain text, the rest chats; one seed, one corpus."""
    rng = Random(seed)
    for _ in range(count):
        kind = rng.random()
        if kind < 0.1:
            yield Document(text=copying_drill(rng))
        elif kind < 0.35:
            yield Document(text=paragraph(rng))
        else:
            yield Document(messages=chat(rng))
