"""A workload for measurements: rows like AdvertiseGen's, and a small chat model of GLM-Edge's shape with its tokenizer.

    python -m tests.bench.workload FOLDER ROWS

writes `FOLDER/data/train.jsonl` (ROWS conversations of about 90 tokens), `FOLDER/data/dev.jsonl` (the first 64 of them)
and `FOLDER/model` (32.5M random weights, a vocabulary of 8,192 that is trained on the rows, GLM-Edge's special tokens
and chat template). The same arguments give the same bytes, so that runs and peers are compared on the same work.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data.embedded.layout import SPECIAL_TOKENS, STOP_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED = 7
DEV_ROWS = 64
VOCABULARY = 8192
CHAT_TEMPLATE = (
    "{% for item in messages %}"
    "{% if item['role'] == 'system' %}<|system|>\n{{ item['content'] }}"
    "{% elif item['role'] == 'user' %}<|user|>\n{{ item['content'] }}"
    "{% elif item['role'] == 'assistant' %}<|assistant|>\n{{ item['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ATTRIBUTES = {
    "类型": ["裤", "裙", "上衣", "衬衫", "外套", "毛衣"],
    "材质": ["牛仔布", "棉", "雪纺", "羊毛", "真丝", "蕾丝"],
    "风格": ["性感", "简约", "复古", "休闲", "通勤", "文艺"],
    "颜色": ["黑色", "白色", "红色", "蓝色", "米色", "灰色"],
    "图案": ["条纹", "格子", "碎花", "纯色", "刺绣", "印花"],
    "版型": ["宽松", "修身", "显瘦", "直筒", "高腰", "阔腿"],
}
CLAUSES = [
    "这款{类型}采用{材质}面料制作",
    "整体呈现出{风格}的气质",
    "{颜色}的配色清爽耐看",
    "{图案}的点缀让细节更加丰富",
    "{版型}的剪裁修饰身形",
    "触感柔软亲肤",
    "日常出门或者上班都很合适",
    "搭配一双小白鞋就很有精神",
    "做工细致走线平整",
    "穿着透气不闷热",
    "领口的设计衬托出优雅的颈部线条",
    "随意一穿便能轻松驾驭",
]
Row = dict[str, list[dict[str, str]]]


def make_row(generator: random.Random, turns: int = 1) -> Row:
    """Return a conversation: in each turn attributes of a garment, and an advertisement of 2 to 40 clauses."""
    messages = []
    for _ in range(turns):
        names = generator.sample(list(ATTRIBUTES), generator.randint(2, 6))
        values = {name: generator.choice(choices) for name, choices in ATTRIBUTES.items()}
        count = max(2, min(40, int(generator.lognormvariate(1.9, 0.6))))
        clauses = [generator.choice(CLAUSES).format(**values) for _ in range(count)]
        messages.append({"role": "user", "content": "*".join(f"{name}#{values[name]}" for name in names)})
        messages.append({"role": "assistant", "content": "，".join(clauses) + "。"})
    return {"messages": messages}


def make_rows(count: int, turns: int = 1) -> list[Row]:
    """Return `count` conversations of `turns` turns each; those of a smaller count are the first of a larger one."""
    generator = random.Random(SEED)
    return [make_row(generator, turns) for _ in range(count)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write conversations, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_tokenizer(rows: Sequence[Row]) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that is trained on the rows, with GLM-Edge's special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        max_token_length=6,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((message["content"] for row in rows for message in row["messages"]), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        padding_side="left",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return a `GlmForCausalLM` of 32.5M weights drawn with a fixed seed."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    stop_ids: Any = tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    config = GlmConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=False,
        tie_word_embeddings=False,
        pad_token_id=stop_ids[0],
        bos_token_id=None,
        max_position_embeddings=8192,
        eos_token_id=stop_ids,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )
    torch.manual_seed(0)
    return GlmForCausalLM(config)


def make_workload(folder: Path, rows: int) -> None:
    """Write data and model into a folder."""
    made = make_rows(rows)
    write_rows(folder / "data" / "train.jsonl", made)
    write_rows(folder / "data" / "dev.jsonl", made[:DEV_ROWS])
    tokenizer = make_tokenizer(made)
    make_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def main(
    folder: Annotated[Path, typer.Argument(help="Where data/ and model/ are written.")],
    rows: Annotated[int, typer.Argument(help="Conversations of the training data.")] = 2000,
) -> None:
    """Write a workload."""
    make_workload(folder, rows)


if __name__ == "__main__":
    typer.run(main)
