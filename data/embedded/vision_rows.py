"""Rows and batches that train the language part of `glm-edge-v-nano`: pictures with questions, and chats of text.

Questions about one picture share its vectors and do not see one another, so that a picture costs its length once and
no reply can be copied from another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from random import Random
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from data.embedded import layout, vision_layout
from data.embedded.corpus import generate_corpus
from data.embedded.picture_exchanges import picture_exchanges
from data.embedded.pictures import CELLS_PER_SIDE, Item, Picture, label_cells
from data.embedded.vision_tower import SIDES, random_picture

IGNORED = -100
VECTORS = CELLS_PER_SIDE**2 + 2  # of a picture: its cells, a begin and an end
TEXT_ROW_EVERY = 8
MAXIMUM_TEXT = 300  # tokens of a text-only row
ENGLISH_SHARE = 0.35


@dataclass(frozen=True)
class View:
    """A picture as the model gets it.

    Attributes:
        picture: what is drawn.
        side: its pixels a side before it is enlarged.
        vectors: what tower and adapter made of it, `(578, hidden)`; None: not computed yet.
    """

    picture: Picture
    side: int
    vectors: torch.Tensor | None = None


@dataclass(frozen=True)
class Exchange:
    """A question or two with replies, as tokens.

    Attributes:
        ids: what follows the picture, or the whole row where there is none.
        labels: the same where an assistant turn or its stop token is, else -100.
    """

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Row:
    """A picture and what is asked of it, in exchanges that do not know of one another; or one chat of text.

    Attributes:
        opening: tokens up to the end of the picture; none in a chat of text.
        exchanges: they all continue the opening and do not see one another.
        view: what the placeholders of the opening stand for.
    """

    opening: list[int]
    exchanges: list[Exchange]
    view: View | None = None


@dataclass(frozen=True)
class Batch:
    """Rows side by side, `(rows, longest)` each.

    Attributes:
        ids: tokens, padded on the right.
        labels: what is to be learned, else -100.
        positions: of the tokens in a conversation of opening and exchange alone.
        exchange: number of the exchange, from 1; 0 in the opening, -1 in padding.
        cells: for each row with a picture the indices of its vectors that are kept.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    exchange: torch.Tensor
    cells: list[torch.Tensor]


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], opening: str = ""
) -> tuple[list[int], list[int]]:
    """Return ids and labels of question and reply pairs.

    Prompt and reply are tokenized apart, as in generation: together, the letter n that ends the prompt of a reply could
    melt with an English reply.

    Args:
        tokenizer: with the vision template.
        turns: questions and replies.
        opening: what the rendered text begins with and the ids leave out.
    """
    ids: list[int] = []
    labels: list[int] = []
    messages: list[dict[str, Any]] = []
    rendered = opening
    for index, (question, reply) in enumerate(turns):
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        asked = tokenizer.encode(prompt[len(rendered) :], add_special_tokens=False)
        said = tokenizer.encode(whole[len(prompt) :] + layout.TURN_END_TOKEN, add_special_tokens=False)
        opened = index > 0  # the stop token of the last reply opens this turn
        ids += [*asked[opened:], *said]
        labels += [IGNORED] * len(asked[opened:]) + said
        rendered = whole
    return ids, labels


def encode_picture(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[tuple[str, str]]], view: View
) -> Row:
    """Return the row of a picture and what is said about it; the picture opens each conversation."""
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
    before = str(tokenizer.apply_chat_template(messages, tokenize=False)).removesuffix("\\n")
    placeholder = layout.token_id(tokenizer, vision_layout.IMAGE_TOKEN)
    opening = [*tokenizer.encode(before, add_special_tokens=False), *[placeholder] * VECTORS]
    return Row(opening, [Exchange(*encode_turns(tokenizer, turns, before)) for turns in conversations], view)


def random_views(rng: Random) -> Iterator[View]:
    """Yield pictures without end, each another one."""
    while True:
        yield View(random_picture(rng), rng.choice(SIDES))


def collages(rng: Random, views: Sequence[View], most: int) -> Iterator[View]:
    """Yield new pictures of shapes without end, put together from the vectors of others: the tower need not run.

    An item is taken with the vectors of its cells, and keeps its place. From few pictures come more than could be
    learned by heart, which otherwise takes the place of looking.

    Args:
        rng: chooses.
        views: with their vectors; those of scenes are not used.
        most: most items of a picture.
    """
    shapes = [view for view in views if not view.picture.time]
    parts: dict[int, list[tuple[Item, torch.Tensor, torch.Tensor]]] = {zone: [] for zone in range(9)}
    for view in shapes:
        assert view.vectors is not None
        for item in view.picture.items:
            cells = torch.from_numpy(label_cells(replace(view.picture, items=(item,)))[:, 1] >= 0).nonzero()[:, 0]
            parts[item.zone].append((item, cells + 1, view.vectors[cells + 1]))
    while True:
        ground = rng.choice(shapes)
        assert ground.vectors is not None
        vectors = ground.vectors.clone()
        covered = torch.from_numpy(label_cells(ground.picture)[:, 1] >= 0)
        empty = (~covered).nonzero()[:, 0]
        vectors[1:-1][covered] = vectors[1:-1][empty[torch.randint(len(empty), (int(covered.sum()),))]]
        chosen = [rng.choice(parts[zone]) for zone in rng.sample(range(9), rng.randint(1, most))]
        for _, cells, own in chosen:
            vectors[cells] = own
        yield View(replace(ground.picture, items=tuple(item for item, _, _ in chosen)), ground.side, vectors)


def generate_rows(
    tokenizer: PreTrainedTokenizerBase, views: Iterator[View], rng: Random, exchanges: int
) -> Iterator[Row]:
    """Yield rows without end; every `TEXT_ROW_EVERY`th is a chat of text alone.

    Args:
        tokenizer: with the vision template.
        views: what the rows are about.
        rng: for questions and chats.
        exchanges: questions about a picture.
    """
    chats = (document.messages for document in generate_corpus(rng.randrange(10**6), 10**9) if document.messages)
    for number in count(1):
        if number % TEXT_ROW_EVERY:
            view = next(views)
            language = "en" if rng.random() < ENGLISH_SHARE else "zh"
            turns = picture_exchanges(view.picture, rng, exchanges, language)
            pairs = rng.randint(0, len(turns) // 4)
            conversations = [turns[2 * pair : 2 * pair + 2] for pair in range(pairs)]
            yield encode_picture(tokenizer, [*conversations, *([turn] for turn in turns[2 * pairs :])], view)
        else:
            texts = [message["content"] for message in next(chats) if message["role"] != "system"]
            ids, labels = encode_turns(tokenizer, list(zip(texts[::2], texts[1::2], strict=True)))
            yield Row([], [Exchange(ids[:MAXIMUM_TEXT], labels[:MAXIMUM_TEXT])])


def kept_cells(picture: Picture, share: float) -> torch.Tensor:
    """Return which of a picture's 578 vectors to keep, as indices: of empty cells the given share, all else.

    Attention over hundreds of cells learns slowly to find the few with an item; among fewer it learns that sooner.
    """
    has_item = torch.from_numpy(label_cells(picture)[:, 1] >= 0)
    kept = has_item | (torch.rand(len(has_item)) < share)
    return torch.cat([torch.tensor([0]), 1 + kept.nonzero()[:, 0], torch.tensor([VECTORS - 1])])


def collate(rows: Sequence[Row], empty_share: float) -> Batch:
    """Return the batch of some rows, of whose empty cells only a share is kept."""
    columns: list[tuple[list[int], ...]] = []
    cells = []
    for row in rows:
        places = list(range(len(row.opening)))
        if row.view is not None:
            kept = kept_cells(row.view.picture, empty_share)
            cells.append(kept)
            first = len(row.opening) - VECTORS
            places = places[:first] + (first + kept).tolist()
        row_ids = [row.opening[place] for place in places]
        row_labels, numbers = [IGNORED] * len(row_ids), [0] * len(row_ids)
        for number, own in enumerate(row.exchanges, start=1):
            row_ids += own.ids
            row_labels += own.labels
            places += range(len(row.opening), len(row.opening) + len(own.ids))
            numbers += [number] * len(own.ids)
        columns.append((row_ids, row_labels, places, numbers))
    ids, labels, positions, exchange = (
        nn.utils.rnn.pad_sequence([torch.tensor(column) for column in of_kind], batch_first=True, padding_value=padding)
        for of_kind, padding in zip(zip(*columns, strict=True), (0, IGNORED, 0, -1), strict=True)
    )
    return Batch(ids, labels, positions, exchange, cells)
