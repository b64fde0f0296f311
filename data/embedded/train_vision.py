"""Train `glm-edge-v-nano` from `glm-edge-nano`: a tower that sees, a language part that speaks of what it sees.

    python -m data.embedded.train_vision --out glm_edge_ft/model/embedded/glm-edge-v-nano --seed 7

Stage 1 (`vision_tower`) trains tower and adapter on what each cell of a picture shows. Stage 2 trains the language part
on descriptions and questions (`picture_exchanges`), with text-only chats between. The weights of the shipped folder
were made by these stages, some of them started by themselves with other seeds and pictures: this command's differ.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, GlmForCausalLM, PreTrainedTokenizerBase

from data.embedded import vision_layout
from data.embedded.picture_exchanges import picture_exchanges
from data.embedded.pictures import Picture
from data.embedded.vision_rows import IGNORED, Batch, Row, View, collages, collate, generate_rows, random_views
from data.embedded.vision_tower import (
    EMPTY_CLASSES,
    SIDES,
    TowerStage,
    picture_pixels,
    random_picture,
    rate_factor,
    train_tower,
    word_tables,
)
from glm_edge_ft.model.checkpoint import EMBEDDED_MODELS
from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM

# Windows of a ninth of a picture first, since attention over a whole one is costly; then whole pictures.
TOWER_STAGES = (
    TowerStage(window=8, steps=700, batch_size=24, peak=0.01, crowded=0.85),
    TowerStage(window=24, steps=100, batch_size=6, peak=0.004, crowded=0.3),
)


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


def embed(model: GlmEdgeVForCausalLM, rows: Sequence[Row], batch: Batch) -> torch.Tensor:
    """Return the input embeddings `(rows, longest, hidden)` with the kept vectors of pictures in their places."""
    known = [row.view.vectors for row in rows if row.view is not None and row.view.vectors is not None]
    embeddings = model.model.embed_tokens(batch.ids)
    is_placeholder = batch.ids.eq(model.model.placeholder_id).unsqueeze(-1)
    kept = torch.cat([vectors[cells] for vectors, cells in zip(known, batch.cells, strict=True)])
    return embeddings.masked_scatter(is_placeholder, kept.to(embeddings))


def supervised_loss(model: GlmEdgeVForCausalLM, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the mean loss of the supervised tokens; only their states reach the vocabulary.

    A token sees the opening of its row and what stands before it in its own exchange:

        opening     1
        opening     1 1
        exchange 1  1 1 1
        exchange 1  1 1 1 1
        exchange 2  1 1 . . 1
        exchange 2  1 1 . . 1 1

    Args:
        model: its text layers are run.
        embeddings: `(rows, longest, hidden)`.
        batch: what they stand for.
    """
    exchange = batch.exchange
    seen = exchange[:, None, :].eq(0) | exchange[:, :, None].eq(exchange[:, None, :])
    seen &= torch.ones(seen.shape[1:], dtype=torch.bool).tril()
    states = model.model(
        inputs_embeds=embeddings,
        position_ids=batch.positions,
        attention_mask=torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min)[:, None],
        use_cache=False,
    ).last_hidden_state
    targets = torch.full_like(batch.labels, IGNORED)
    targets[:, :-1] = batch.labels[:, 1:]
    chosen = targets != IGNORED
    return nn.functional.cross_entropy(model.lm_head(states[chosen]).float(), targets[chosen])


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
        whole_every: every so many steps a third of the rows is taken, with all of their cells. In the other steps the
            text layers get a small share of the empty cells.
        most_shapes: most shapes of a picture; scenes are taken in any case.
        collages: share of rows about a new picture of at most four shapes, put together from others.
    """

    steps: int
    batch_size: int
    peak: float
    whole_every: int
    most_shapes: int = 9
    collages: float = 0.0


LANGUAGE_STAGES = (
    LanguageStage(steps=600, batch_size=24, peak=0.01, whole_every=6),
    LanguageStage(steps=100, batch_size=24, peak=0.004, whole_every=1),
    LanguageStage(steps=300, batch_size=24, peak=0.01, whole_every=3, most_shapes=3),
    LanguageStage(steps=280, batch_size=24, peak=0.01, whole_every=4, collages=0.75),
)
EMPTY_SHARE = 0.05
PICTURES = 3000  # whose vectors are computed once and used again and again, with other questions
EXCHANGES = 8  # questions about a picture


def stage_views(rng: Random, pool: Sequence[View], stage: LanguageStage) -> Iterator[View]:
    """Yield what the rows of a stage are about, without end: pictures of the pool, and collages of them."""
    views = [view for view in pool if view.picture.time or len(view.picture.items) <= stage.most_shapes]
    new = collages(rng, pool, 4)
    while True:
        yield next(new) if rng.random() < stage.collages else rng.choice(views)


def train_language(
    model: GlmEdgeVForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int, stages: Sequence[LanguageStage]
) -> float:
    """Train the language part in place, tower and adapter frozen; return the mean loss of the last 50 steps."""
    rng = Random(seed)
    started = time.monotonic()
    recent: list[float] = []
    model.model.vision.requires_grad_(False)
    pool = computed_views(model, random_views(rng), PICTURES)
    for stage in stages:
        rows = generate_rows(tokenizer, stage_views(rng, pool, stage), rng, EXCHANGES)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizers = _optimizers(model, stage.peak)
        factor = partial(rate_factor, steps=stage.steps)
        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
        for step in range(stage.steps):
            is_whole = (step + 1) % stage.whole_every == 0
            drawn = list(islice(rows, stage.batch_size // 3 if is_whole else stage.batch_size))
            batch = collate(drawn, 1.0 if is_whole else EMPTY_SHARE)
            with torch.autocast("cpu", torch.bfloat16):
                loss = supervised_loss(model, embed(model, drawn, batch), batch)
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
    fields = json.dumps(vision_layout.PREPROCESSOR_FIELDS, indent=2)
    (folder / "preprocessor_config.json").write_text(fields + "\n", encoding="utf-8")


@torch.no_grad()
def seed_attention(model: GlmEdgeVForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a word of a question look, in the second text layer, at the cells whose vector holds that word.

    A vector is about the sum of the embeddings of what its cell shows (`word_loss`), so equal queries and keys do that:
    one key head compares kinds and colours, the other places. They lie in those dimensions of a head that the rotary
    embedding turns least, since question and cell are hundreds of tokens apart. To find this by training takes hundreds
    of steps more.
    """
    classes, colours, zones = word_tables(model, tokenizer)
    attention: Any = model.model.layers[1].self_attn
    width, sharing = attention.head_dim, attention.num_key_value_groups
    for number, tables in enumerate(((classes[EMPTY_CLASSES:], colours), (zones,))):
        basis = _directions(torch.cat([table - table.mean(0) for table in tables]))
        end = (number + 1) * width
        attention.k_proj.weight[end - len(basis) : end] = basis
        for head in range(number * sharing, (number + 1) * sharing):
            end = (head + 1) * width
            attention.q_proj.weight[end - len(basis) : end] = basis


def _directions(vectors: torch.Tensor) -> torch.Tensor:
    """Return orthonormal vectors that span the given ones, at most 20: the least turned dimensions of a head."""
    _, sizes, directions = torch.linalg.svd(vectors, full_matrices=False)
    return directions[: min(20, int((sizes > 1e-3 * sizes[0]).sum()))]


@torch.no_grad()
def start_model(tokenizer: PreTrainedTokenizerBase) -> GlmEdgeVForCausalLM:
    """Return the untrained vision model with the embeddings and the output matrix of `glm-edge-nano`, float32.

    The layers between them start anew: those of `glm-edge-nano` look at near tokens, and hundreds of steps do not bring
    them to look at a picture that lies far back, while new ones look everywhere alike and find it soon.
    """
    text = GlmForCausalLM.from_pretrained(EMBEDDED_MODELS["glm-edge-nano"], dtype=torch.float32)
    model = GlmEdgeVForCausalLM(vision_layout.vision_nano_config(text.config, tokenizer))
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
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODELS["glm-edge-nano"])
    tokenizer.chat_template = vision_layout.VISION_CHAT_TEMPLATE
    model = start_model(tokenizer)
    print(f"{model.num_parameters():,} parameters", flush=True)
    train_tower(model, tokenizer, seed + 1, TOWER_STAGES)
    seed_attention(model, tokenizer)
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
