"""Train `glm-edge-nano` from nothing: tokenizer, weights, and the folder that ships with the code.

The shipped folder was made on two CPU cores by

    python -m glm_edge_ft.model.nano_train --out glm_edge_ft/model/embedded/glm-edge-nano --seed 7

Each 50 steps it prints the mean loss since the last line (natural log, next token, all tokens), the learning rate and
the speed; at the end the greedy replies to a few prompts. The same seed on the same machine and versions writes the
same files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, GlmForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from glm_edge_ft.model import nano
from glm_edge_ft.model.nano_corpus import Document, generate_corpus
from glm_edge_ft.model.nano_sentences import common_characters, dictionary_words

BASE_VOCABULARY = 5100
TOKENIZER_DOCUMENTS = 20_000
TOKENIZER_CHARACTERS = 3000
CHARACTER_REPEATS = 600
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
    """Yield the texts that BPE learns from: the corpus, then characters and words of the dictionary, each by itself.

    The characters are repeated so that each everyday one becomes a token before longer words do.
    """
    for document in generate_corpus(seed, TOKENIZER_DOCUMENTS):
        yield document.text
        yield from (message["content"] for message in document.messages)
    for character in common_characters(TOKENIZER_CHARACTERS):
        yield from [character] * CHARACTER_REPEATS
    for word in dictionary_words()[:TOKENIZER_WORDS]:
        yield from [word.text] * max(1, round(math.sqrt(word.frequency) / 10))


def train_tokenizer(texts: Iterable[str], base_vocabulary: int = BASE_VOCABULARY) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE with GLM-4's split; the special tokens follow the `base_vocabulary` learned tokens.

    The whole byte alphabet is in the vocabulary, so that any text round-trips.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(nano.SPLIT_PATTERN), "isolated"),
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
        eos_token=nano.PAD_TOKEN,
        pad_token=nano.PAD_TOKEN,
        extra_special_tokens=list(nano.SPECIAL_TOKENS[1:]),
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=nano.CHAT_TEMPLATE,
    )


# ---- data -----------------------------------------------------------------------------------------------------------


def _encode(tokenizer: PreTrainedTokenizerBase, document: Document) -> tuple[list[int], list[int]]:
    """Return ids and labels of a document that ends with `<|endoftext|>`.

    A chat ends with `<|user|>` first, the token that stops a reply; that `<|endoftext|>` follows it is not taught.
    """
    end = nano.token_id(tokenizer, nano.PAD_TOKEN)
    if not document.messages:
        ids = [*tokenizer.encode(document.text, add_special_tokens=False), end]
        return ids, ids
    rendered = str(tokenizer.apply_chat_template(list(document.messages), tokenize=False))
    ids = tokenizer.encode(rendered + nano.TURN_END_TOKEN, add_special_tokens=False)
    return [*ids, end], [*ids, IGNORED]


def packed_rows(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], length: int = ROW_LENGTH
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (ids, labels) rows of exactly `length` tokens; each starts with a document and holds whole ones only.

    A document longer than a row is cut.
    """
    end = nano.token_id(tokenizer, nano.PAD_TOKEN)
    row_ids: list[int] = []
    row_labels: list[int] = []
    for document in documents:
        ids, labels = _encode(tokenizer, document)
        if row_ids and len(row_ids) + len(ids) > length:
            missing = length - len(row_ids)
            yield row_ids + [end] * missing, row_labels + [IGNORED] * missing
            row_ids, row_labels = [], []
        row_ids, row_labels = row_ids + ids[:length], row_labels + labels[:length]


# ---- training -------------------------------------------------------------------------------------------------------


def _learning_rate(step: int, steps: int, peak: float, warmup: int = 40) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def _optimizer(model: GlmForCausalLM) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def train_model(
    model: GlmForCausalLM, rows: Iterator[tuple[list[int], list[int]]], steps: int, batch_size: int, peak: float
) -> float:
    """Train `model` in place for `steps` batches of rows, each row seen once; return the last 50 steps' mean loss."""
    optimizer = _optimizer(model)
    model.train()
    recent: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        batch = list(islice(rows, batch_size))
        input_ids = torch.tensor([ids for ids, _ in batch])
        labels = torch.tensor([labels for _, labels in batch])
        rate = _learning_rate(step, steps, peak)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-49:], loss.item()]
        if (step + 1) % 50 == 0 or step + 1 == steps:
            speed = (step + 1) * batch_size * ROW_LENGTH / (time.monotonic() - started)
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}/{steps}  loss {mean:.4f}  lr {rate:.2e}  {speed:,.0f} tokens/s", flush=True)
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
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Rows of 256 tokens in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Its peak, after 40 steps of warm-up.")] = 3e-3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train the tokenizer and the model, and write the whole folder."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    started = time.monotonic()
    tokenizer = train_tokenizer(_tokenizer_texts(seed))
    model = GlmForCausalLM(nano.nano_config(tokenizer))
    print(
        f"{len(tokenizer):,} tokens, {model.num_parameters():,} parameters, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    documents = generate_corpus(seed + 1, steps * batch_size * ROW_LENGTH)  # more than the rows can hold; read lazily
    loss = train_model(model, packed_rows(tokenizer, documents), steps, batch_size, learning_rate)

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
