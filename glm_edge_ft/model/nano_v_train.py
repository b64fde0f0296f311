"""Train `glm-edge-v-nano` from `glm-edge-nano`: a tower that sees, a language part that speaks of what it sees.

    python -m glm_edge_ft.model.nano_v_train --out glm_edge_ft/model/embedded/glm-edge-v-nano --seed 7

Stage 1 (`nano_v_tower`) trains tower and adapter on what each cell of a picture shows. Stage 2 trains adapter and
language part, the tower frozen, on descriptions and questions (`nano_v_exchanges`), with text-only chats between.
The shipped folder is of a first version, whose stages were started one by one: this command's weights differ from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, GlmForCausalLM, PreTrainedTokenizerBase

from glm_edge_ft.model import nano, nano_v
from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM
from glm_edge_ft.model.nano_corpus import generate_corpus
from glm_edge_ft.model.nano_v_exchanges import picture_exchanges
from glm_edge_ft.model.nano_v_pictures import Picture, label_cells
from glm_edge_ft.model.nano_v_tower import SIDES, TowerStage, picture_pixels, random_picture, rate_factor, train_tower

IGNORED = -100
# Windows of a ninth of a picture first, since attention over a whole one is costly; then whole pictures.
TOWER_STAGES = (
    TowerStage(window=8, steps=700, batch_size=24, peak=0.01, crowded=0.85),
    TowerStage(window=24, steps=100, batch_size=6, peak=0.004, crowded=0.3),
)
TEXT_ROW_EVERY = 8
MAXIMUM_TEXT = 300  # tokens of a text-only row
ENGLISH_SHARE = 0.35


@dataclass(frozen=True)
class View:
    """A picture as the model gets it.

    Attributes:
        picture: what is drawn.
        side: its pixels a side before it is enlarged.
        vectors: what tower and adapter made of it, `(578, hidden)`; None: they are to be run.
    """

    picture: Picture
    side: int
    vectors: torch.Tensor | None = None


@dataclass(frozen=True)
class Row:
    """One conversation to learn from.

    Attributes:
        ids: its tokens.
        labels: the same where an assistant turn or its stop token is, else -100.
        view: what its placeholders stand for; None in a row of text.
    """

    ids: list[int]
    labels: list[int]
    view: View | None = None


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], has_image: bool
) -> tuple[list[int], list[int]]:
    """Return ids and labels of question and reply pairs; the image, if any, opens the first question.

    Prompt and reply are tokenized apart, as in generation: together, the letter n that ends the prompt of a reply could
    melt with an English reply.
    """
    ids: list[int] = []
    labels: list[int] = []
    messages: list[dict[str, Any]] = []
    rendered = ""
    for index, (question, reply) in enumerate(turns):
        image = [{"type": "image"}] if has_image and index == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        asked = tokenizer.encode(prompt[len(rendered) :], add_special_tokens=False)
        said = tokenizer.encode(whole[len(prompt) :] + nano.TURN_END_TOKEN, add_special_tokens=False)
        opened = index > 0  # the stop token of the last reply opens this turn
        ids += [*asked[opened:], *said]
        labels += [IGNORED] * len(asked[opened:]) + said
        rendered = whole
    return ids, labels


def random_views(rng: Random) -> Iterator[View]:
    """Yield pictures without end, each another one."""
    while True:
        yield View(random_picture(rng), rng.choice(SIDES))


@torch.no_grad()
def computed_views(model: GlmEdgeVForCausalLM, views: Iterator[View], size: int) -> list[View]:
    """Return the next `size` views with their vectors, so that the tower runs once for each of them."""
    computed: list[View] = []
    while len(computed) < size:
        drawn = list(islice(views, 8))
        pixels = torch.stack([picture_pixels(view.picture, view.side) for view in drawn])
        vectors = model.model.vision(pixels).bfloat16()
        computed += [replace(view, vectors=own) for view, own in zip(drawn, vectors, strict=True)]
    return computed


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
            yield Row(*encode_turns(tokenizer, turns, has_image=True), view)
        else:
            texts = [message["content"] for message in next(chats) if message["role"] != "system"]
            ids, labels = encode_turns(tokenizer, list(zip(texts[::2], texts[1::2], strict=True)), has_image=False)
            yield Row(ids[:MAXIMUM_TEXT], labels[:MAXIMUM_TEXT])


def collate(rows: Sequence[Row], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels, `(rows, longest)` each, padded on the right."""
    length = max(len(row.ids) for row in rows)
    ids = [row.ids + [pad_id] * (length - len(row.ids)) for row in rows]
    labels = [row.labels + [IGNORED] * (length - len(row.labels)) for row in rows]
    return torch.tensor(ids), torch.tensor(labels)


def embed(model: GlmEdgeVForCausalLM, rows: Sequence[Row], input_ids: torch.Tensor) -> torch.Tensor:
    """Return the input embeddings `(rows, length, hidden)` with the pictures in their places."""
    views = [row.view for row in rows if row.view is not None]
    known = [view.vectors for view in views if view.vectors is not None]
    if len(known) < len(views):
        return model.model.merge_images(input_ids, torch.stack([picture_pixels(v.picture, v.side) for v in views]))
    embeddings = model.model.embed_tokens(input_ids)
    is_placeholder = input_ids.eq(model.model.placeholder_id).unsqueeze(-1)
    return embeddings.masked_scatter(is_placeholder, torch.stack(known).to(embeddings))


def supervised_loss(
    model: GlmEdgeVForCausalLM, embeddings: torch.Tensor, labels: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Return the mean loss of the supervised tokens; only their states reach the vocabulary.

    Args:
        model: its text layers are run.
        embeddings: `(rows, length, hidden)`.
        labels: `(rows, length)`, -100 where nothing is learned.
        kept: which tokens the text layers get, `(rows, length)`. The others are left out, and the positions of those
            that stay are kept, as if nothing attended to the others.
    """
    length = int(kept.sum(1).max())
    # the kept tokens of each row in their order, then as many others as make the rows equally long
    places = torch.argsort((~kept).int(), dim=1, stable=True)[:, :length]
    states = model.model(
        inputs_embeds=embeddings.gather(1, places[:, :, None].expand(-1, -1, embeddings.shape[2])),
        position_ids=places,
        attention_mask=torch.ones_like(places),  # without a mask, transformers takes each gap for another row's start
        use_cache=False,
    ).last_hidden_state
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    targets = targets.masked_fill(~kept, IGNORED).gather(1, places)
    chosen = targets != IGNORED
    return nn.functional.cross_entropy(model.lm_head(states[chosen]).float(), targets[chosen])


def kept_tokens(rows: Sequence[Row], input_ids: torch.Tensor, share: float, placeholder_id: int) -> torch.Tensor:
    """Return which tokens of a batch to keep, `(rows, length)`: of empty cells the given share, all else.

    Attention over hundreds of cells learns slowly to find the few with an item; among fewer it learns that sooner.
    """
    kept = torch.zeros_like(input_ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        kept[number, : len(row.ids)] = True
        if row.view is not None and share < 1.0:
            has_item = torch.from_numpy(label_cells(row.view.picture)[:, 1] >= 0)
            start = row.ids.index(placeholder_id) + 1  # after boi
            kept[number, start : start + len(has_item)] = has_item | (torch.rand(len(has_item)) < share)
    return kept


def _optimizers(model: GlmEdgeVForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the text layers and AdamW, at a quarter of its rate, for all else that trains."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = [weight for name, weight in trained if weight.dim() == 2 and name.startswith("model.layers.")]
    others = [weight for name, weight in trained if weight.dim() != 2 or not name.startswith("model.layers.")]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak / 4, betas=(0.9, 0.95), weight_decay=0.01),
    ]


@dataclass(frozen=True)
class LanguageStage:
    """Steps of the language part.

    Attributes:
        steps: optimizer steps.
        batch_size: rows in a step.
        peak: highest learning rate of the text layers.
        exchanges: questions about a picture.
        pool: number of pictures whose vectors are computed once and used again and again; 0: each row has a new
            picture, and the adapter learns too.
        most_items: most items of a picture of the pool.
        empty_share: share of the empty cells that the text layers get.
    """

    steps: int
    batch_size: int
    peak: float
    exchanges: int
    pool: int = 0
    most_items: int = 99
    empty_share: float = 1.0


LANGUAGE_STAGES = (
    LanguageStage(steps=200, batch_size=24, peak=0.01, exchanges=3, pool=400, most_items=1, empty_share=0.05),
    LanguageStage(steps=1100, batch_size=24, peak=0.01, exchanges=4, pool=3000, empty_share=0.05),
    LanguageStage(steps=200, batch_size=8, peak=0.004, exchanges=5),
)


def stage_views(model: GlmEdgeVForCausalLM, stage: LanguageStage, rng: Random) -> Iterator[View]:
    """Yield the pictures of a stage without end."""
    views = (view for view in random_views(rng) if len(view.picture.items) <= stage.most_items)
    if not stage.pool:
        return views
    pool = computed_views(model, views, stage.pool)
    return (rng.choice(pool) for _ in count())


def train_language(
    model: GlmEdgeVForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int, stages: Sequence[LanguageStage]
) -> float:
    """Train language part and adapter in place, the tower frozen; return the mean loss of the last 50 steps."""
    rng = Random(seed)
    started = time.monotonic()
    recent: list[float] = []
    for stage in stages:
        rows = generate_rows(tokenizer, stage_views(model, stage, rng), rng, stage.exchanges)
        model.model.vision.vit.requires_grad_(False)
        model.model.vision.adapter.requires_grad_(not stage.pool)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizers = _optimizers(model, stage.peak)
        factor = partial(rate_factor, steps=stage.steps)
        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
        for step in range(stage.steps):
            drawn = list(islice(rows, stage.batch_size))
            input_ids, labels = collate(drawn, int(model.config.pad_token_id or 0))
            kept = kept_tokens(drawn, input_ids, stage.empty_share, model.model.placeholder_id)
            with torch.autocast("cpu", torch.bfloat16):
                loss = supervised_loss(model, embed(model, drawn, input_ids), labels, kept)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
            recent = [*recent[-49:], loss.item()]
            if (step + 1) % 25 == 0 or step + 1 == stage.steps:
                mean = sum(recent[-25:]) / len(recent[-25:])
                seconds = time.monotonic() - started
                print(f"language {step + 1}/{stage.steps}  loss {mean:.4f}  {seconds:.0f} s", flush=True)
    model.requires_grad_(True)
    return sum(recent) / len(recent)


@torch.no_grad()
def greedy_reply(
    model: GlmEdgeVForCausalLM, tokenizer: PreTrainedTokenizerBase, picture: Picture | None, question: str
) -> str:
    """Return the model's greedy reply of at most 96 tokens to one question, stop token included."""
    image = [{"type": "image"}] if picture is not None else []
    messages: list[Any] = [{"role": "user", "content": [*image, {"type": "text", "text": question}]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs: Any = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    if picture is not None:
        inputs["pixel_values"] = picture_pixels(picture, SIDES[2])[None].to(model.dtype)
    output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def save(model: GlmEdgeVForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the whole folder in bfloat16, as the released checkpoints have it."""
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    model.bfloat16()
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fields = json.dumps(nano_v.PREPROCESSOR_FIELDS, indent=2)
    (folder / "preprocessor_config.json").write_text(fields + "\n", encoding="utf-8")


@torch.no_grad()
def start_model(tokenizer: PreTrainedTokenizerBase) -> GlmEdgeVForCausalLM:
    """Return the untrained vision model with the embeddings and the output matrix of `glm-edge-nano`, float32.

    The layers between them start anew: those of `glm-edge-nano` look at near tokens, and hundreds of steps do not bring
    them to look at a picture that lies far back, while new ones look everywhere alike and find it soon.
    """
    text = GlmForCausalLM.from_pretrained(nano.EMBEDDED_MODELS["glm-edge-nano"], dtype=torch.float32)
    model = GlmEdgeVForCausalLM(nano_v.nano_v_config(text.config, tokenizer))
    model.load_state_dict(text.state_dict(), strict=False)
    for weight in model.model.layers.parameters():
        if weight.dim() == 2:
            weight.normal_(0.0, text.config.initializer_range)
    return model


def main(
    *,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    seed: Annotated[int, typer.Option(help="Of the pictures, the texts, the weights' start and the order.")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads; the shipped folder was made with two.")] = 2,
) -> None:
    """Train the model and write the whole folder."""
    torch.set_flush_denormal(True)  # attention far from a patch is almost 0, where processors compute slowly
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(nano.EMBEDDED_MODELS["glm-edge-nano"])
    tokenizer.chat_template = nano_v.VISION_CHAT_TEMPLATE
    model = start_model(tokenizer)
    print(f"{model.num_parameters():,} parameters", flush=True)
    train_tower(model, tokenizer, seed + 1, TOWER_STAGES)
    loss = train_language(model, tokenizer, seed + 2, LANGUAGE_STAGES)
    save(model, tokenizer, out)
    print(f"final loss {loss:.4f}, {time.monotonic() - started:.0f} s, written to {out}")
    rng = Random(seed + 3)
    for _ in range(8):
        picture = random_picture(rng)
        for question, reply in picture_exchanges(picture, rng, 2, "zh"):
            print(f"{question!r} {reply!r}\n    -> {greedy_reply(model, tokenizer, picture, question)!r}")


if __name__ == "__main__":
    typer.run(main)
