"""Train `glm-edge-nano` from nothing: tokenizer, weights, and the folder that ships with the code.

The shipped folder was made on one CPU core in 18 minutes (1,200 steps, final loss 1.3814, torch 2.13.0) by

    python -m data.embedded.train_chat --out glm_edge_ft/model/embedded/glm-edge-nano --seed 7

Each 50 steps it prints the mean loss since the last line (natural log, next token, all tokens) and the speed; at
the end the greedy replies to a few prompts. The same seed on the same machine and versions writes the same files.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, GlmForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data.embedded import layout
from data.embedded.corpus import Document, generate_corpus
from data.embedded.sentences import (
    CHINESE_PUNCTUATION,
    EVERYDAY_CHARACTERS,
    common_characters,
    dictionary_words,
)

BASE_VOCABULARY = 5100
TOKENIZER_DOCUMENTS = 20_000
CHARACTER_REPEATS = 1000
TOKENIZER_WORDS = 20_000
ROW_LENGTH = 256
IGNORED = -100
PROBES = (
    "你好",
    "香蕉是什么颜色的？",
    "请重复：今天天气很好",
    "3加4等于多少？",
    "Repeat after me: silver bridge",
    "讲一个关于猫的小故事，地点是公园。",
)


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def _tokenizer_texts(seed: int) -> Iterator[str]:
    """Yield the texts that BPE learns from: single characters and words, each by itself.

    No sentences, whose frames would become tokens. The characters are repeated so often that each everyday one is a
    token before words are.
    """
    for character in (*CHINESE_PUNCTUATION, *common_characters(EVERYDAY_CHARACTERS)):
        yield from [character] * CHARACTER_REPEATS
    counts: Counter[str] = Counter()
    for document in generate_corpus(seed, TOKENIZER_DOCUMENTS):
        for text in (document.text, *(message["content"] for message in document.messages)):
            counts.update(re.findall(r" ?[A-Za-z]+", text))
    for text, count in sorted(counts.items()):
        yield from [text] * (6 * round(math.sqrt(count)))
    for word in dictionary_words()[:TOKENIZER_WORDS]:
        yield from [word.text] * round(math.sqrt(word.frequency) / 4)


def train_tokenizer(texts: Iterable[str], base_vocabulary: int = BASE_VOCABULARY) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE with GLM-4's split; the special tokens follow the `base_vocabulary` learned tokens.

    The whole byte alphabet is in the vocabulary, so that any text round-trips.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(layout.SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=base_vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=layout.PAD_TOKEN,
        pad_token=layout.PAD_TOKEN,
        extra_special_tokens=list(layout.SPECIAL_TOKENS[1:]),
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=layout.CHAT_TEMPLATE,
    )


# ---- data -----------------------------------------------------------------------------------------------------------


def encode_document(tokenizer: PreTrainedTokenizerBase, document: Document) -> tuple[list[int], list[int]]:
    """Return the ids of a document, `<|endoftext|>` at the end, and its labels, -100 where nothing is to be learned.

    A chat ends with the `<|user|>` that stops a reply; that `<|endoftext|>` follows it is not learned.
    """
    end = layout.token_id(tokenizer, layout.PAD_TOKEN)
    if not document.messages:
        ids = [*tokenizer.encode(document.text, add_special_tokens=False), end]
        return ids, ids
    rendered = str(tokenizer.apply_chat_template(list(document.messages), tokenize=False))
    ids = tokenizer.encode(rendered + layout.TURN_END_TOKEN, add_special_tokens=False)
    return [*ids, end], [*ids, IGNORED]


def packed_rows(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], length: int = ROW_LENGTH
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (ids, labels) rows of exactly `length` tokens; each starts with a document and holds whole ones only.

    A document longer than a row is cut.
    """
    end = layout.token_id(tokenizer, layout.PAD_TOKEN)
    row_ids: list[int] = []
    row_labels: list[int] = []
    for document in documents:
        ids, labels = encode_document(tokenizer, document)
        if row_ids and len(row_ids) + len(ids) > length:
            missing = length - len(row_ids)
            yield row_ids + [end] * missing, row_labels + [IGNORED] * missing
            row_ids, row_labels = [], []
        row_ids, row_labels = row_ids + ids[:length], row_labels + labels[:length]


# ---- training -------------------------------------------------------------------------------------------------------


def _rate_factor(step: int, steps: int, warmup: int = 40) -> float:
    """Return the part of the peak learning rate at a step: it rises, stays, and falls from half way."""
    return min(1.0, (step + 1) / warmup, 0.02 + 2 * (steps - step) / steps)


def _optimizers(model: GlmForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW, at a third of its rate, for all other weights."""
    matrices = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and ".layers." in name]
    others = [weight for name, weight in model.named_parameters() if weight.dim() != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak / 3, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def train_model(
    model: GlmForCausalLM, rows: Iterator[tuple[list[int], list[int]]], steps: int, batch_size: int, peak: float
) -> float:
    """Train `model` in place for `steps` batches of rows, each row seen once; return the last 50 steps' mean loss."""
    optimizers = _optimizers(model, peak)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, steps)) for optimizer in optimizers
    ]
    model.train()
    recent: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        batch = list(islice(rows, batch_size))
        input_ids = torch.tensor([ids for ids, _ in batch])
        labels = torch.tensor([labels for _, labels in batch])
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        recent = [*recent[-49:], loss.item()]
        if (step + 1) % 50 == 0 or step + 1 == steps:
            speed = (step + 1) * batch_size * ROW_LENGTH / (time.monotonic() - started)
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}/{steps}  loss {mean:.4f}  {speed:,.0f} tokens/s", flush=True)
    return sum(recent) / len(recent)


@torch.no_grad()
def greedy_reply(model: GlmForCausalLM, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Return the model's greedy reply of at most 128 tokens to one user message, stop token included."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def main(
    *,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    seed: Annotated[int, typer.Option(help="Of the corpus, the weights' start and the order.")] = 7,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1200,
    batch_size: Annotated[int, typer.Option(help="Rows of 256 tokens in a step.")] = 8,
    learning_rate: Annotated[
        float, typer.Option(help="Of the layers, at its peak; a third of it for the rest.")
    ] = 0.01,
    threads: Annotated[int, typer.Option(help="CPU threads; the shipped folder was made with one.")] = 1,
) -> None:
    """Train the tokenizer and the model, and write the whole folder."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    started = time.monotonic()
    tokenizer = train_tokenizer(_tokenizer_texts(seed))
    model = GlmForCausalLM(layout.nano_config(tokenizer))
    print(
        f"{len(tokenizer):,} tokens, {model.num_parameters():,} parameters, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    enough = steps * batch_size * ROW_LENGTH  # more documents than the rows can hold; they are made as they are read
    rows = packed_rows(tokenizer, generate_corpus(seed + 1, enough))
    loss = train_model(model, rows, steps, batch_size, learning_rate)

    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    model.bfloat16()
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"final loss {loss:.4f}, {time.monotonic() - started:.0f} s, written to {out}")
    for question in PROBES:
        print(f"{question!r} -> {greedy_reply(model, tokenizer, question)!r}")


if __name__ == "__main__":
    typer.run(main)
