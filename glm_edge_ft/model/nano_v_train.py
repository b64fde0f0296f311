"""Train `glm-edge-v-nano` from `glm-edge-nano`: a tower that sees, a language part that speaks of what it sees.

    python -m glm_edge_ft.model.nano_v_train --out glm_edge_ft/model/embedded/glm-edge-v-nano --seed 7

Stage 1 (`nano_v_tower`) trains tower and adapter on what each cell of a picture shows. Stage 2 trains adapter and
language part, the tower frozen, on descriptions and questions (`nano_v_exchanges`), with text-only chats between.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from glm_edge_ft.model.nano_v_pictures import Picture
from glm_edge_ft.model.nano_v_tower import SIDES, TowerStage, picture_pixels, random_picture, train_tower

IGNORED = -100
# Windows of a ninth of a picture first, since attention over a whole one is costly; then whole pictures.
TOWER_STAGES = (
    TowerStage(window=8, steps=700, batch_size=24, peak=0.01, crowded=0.85),
    TowerStage(window=24, steps=100, batch_size=6, peak=0.004, crowded=0.3),
)
EXCHANGES = 6  # about one picture; each image costs 578 tokens, a question with its reply about 30
TEXT_ROW_EVERY = 8
MAXIMUM_TEXT = 300  # tokens of a text-only row
ENGLISH_SHARE = 0.35


@dataclass(frozen=True)
class Row:
    """One conversation to learn from.

    Attributes:
        ids: its tokens.
        labels: the same where an assistant turn or its stop token is, else -100.
        picture: what its placeholders stand for; None in a row of text.
        side: the picture's pixels a side before it is enlarged.
    """

    ids: list[int]
    labels: list[int]
    picture: Picture | None = None
    side: int = 0


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


def generate_rows(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[Row]:
    """Yield rows without end; every `TEXT_ROW_EVERY`th is a chat of text alone."""
    rng = Random(seed)
    chats = (document.messages for document in generate_corpus(seed, 10**9) if document.messages)
    number = 0
    while True:
        number += 1
        if number % TEXT_ROW_EVERY:
            picture = random_picture(rng)
            language = "en" if rng.random() < ENGLISH_SHARE else "zh"
            turns = picture_exchanges(picture, rng, EXCHANGES, language)
            yield Row(*encode_turns(tokenizer, turns, has_image=True), picture, rng.choice(SIDES))
        else:
            texts = [message["content"] for message in next(chats) if message["role"] != "system"]
            ids, labels = encode_turns(tokenizer, list(zip(texts[::2], texts[1::2], strict=True)), has_image=False)
            yield Row(ids[:MAXIMUM_TEXT], labels[:MAXIMUM_TEXT])


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """Return ids and labels `(rows, longest)`, padded on the right, and the pixels of the pictures."""
    length = max(len(row.ids) for row in rows)
    ids = [row.ids + [pad_id] * (length - len(row.ids)) for row in rows]
    labels = [row.labels + [IGNORED] * (length - len(row.labels)) for row in rows]
    pixels = [picture_pixels(row.picture, row.side) for row in rows if row.picture is not None]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": torch.stack(pixels)}


def supervised_loss(model: GlmEdgeVForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean loss of the supervised tokens; only their states reach the vocabulary."""
    states = model.model(
        input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], use_cache=False
    ).last_hidden_state
    targets = batch["labels"][:, 1:]
    chosen = targets != IGNORED
    return nn.functional.cross_entropy(model.lm_head(states[:, :-1][chosen]).float(), targets[chosen])


def _optimizers(model: GlmEdgeVForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the text layers and AdamW, at a quarter of its rate, for all else that trains."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = [weight for name, weight in trained if weight.dim() == 2 and name.startswith("model.layers.")]
    others = [weight for name, weight in trained if weight.dim() != 2 or not name.startswith("model.layers.")]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak / 4, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def _rate_factor(step: int, steps: int, warmup: int = 20) -> float:
    """Return the part of the peak learning rate at a step: it rises, stays, and falls from half way."""
    return min(1.0, (step + 1) / warmup, 0.02 + 2 * (steps - step) / steps)


def train_language(model: GlmEdgeVForCausalLM, rows: Iterator[Row], steps: int, batch_size: int, peak: float) -> float:
    """Train adapter and language part in place, the tower frozen; return the mean loss of the last 50 steps."""
    model.model.vision.vit.requires_grad_(False)
    optimizers = _optimizers(model, peak)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, steps)) for optimizer in optimizers
    ]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    pad_id = int(model.config.pad_token_id or 0)
    recent: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        batch = collate([next(rows) for _ in range(batch_size)], pad_id)
        with torch.autocast("cpu", torch.bfloat16):
            loss = supervised_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        recent = [*recent[-49:], loss.item()]
        if (step + 1) % 25 == 0 or step + 1 == steps:
            mean = sum(recent[-25:]) / len(recent[-25:])
            print(f"language {step + 1}/{steps}  loss {mean:.4f}  {time.monotonic() - started:.0f} s", flush=True)
    model.model.vision.vit.requires_grad_(True)
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


def start_model(tokenizer: PreTrainedTokenizerBase) -> GlmEdgeVForCausalLM:
    """Return the untrained vision model around the weights of `glm-edge-nano`, float32."""
    text = GlmForCausalLM.from_pretrained(nano.EMBEDDED_MODELS["glm-edge-nano"], dtype=torch.float32)
    model = GlmEdgeVForCausalLM(nano_v.nano_v_config(text.config, tokenizer))
    model.load_state_dict(text.state_dict(), strict=False)
    return model


def main(
    *,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    seed: Annotated[int, typer.Option(help="Of the pictures, the texts, the weights' start and the order.")] = 7,
    language_steps: Annotated[int, typer.Option(help="Steps of stage 2.")] = 600,
    batch_size: Annotated[int, typer.Option(help="Rows in a step of stage 2.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of the text layers, at its peak, in stage 2.")] = 0.005,
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
    train_tower(model, seed + 1, TOWER_STAGES)
    rows = generate_rows(tokenizer, seed + 2)
    loss = train_language(model, rows, language_steps, batch_size, learning_rate)
    save(model, tokenizer, out)
    print(f"final loss {loss:.4f}, {time.monotonic() - started:.0f} s, written to {out}")
    rng = Random(seed + 3)
    for _ in range(8):
        picture = random_picture(rng)
        for question, reply in picture_exchanges(picture, rng, 2, "zh"):
            print(f"{question!r} {reply!r}\n    -> {greedy_reply(model, tokenizer, picture, question)!r}")


if __name__ == "__main__":
    typer.run(main)
