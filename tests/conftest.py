"""Shared parts of the tests: a small true tokenizer and the chat templates that the encoding must hold for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# The models of the tests are so small that a second thread only waits, and on a busy machine it waits long. Set before
# torch is imported, here and in the processes that the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.embedded import layout as nano
from glm_edge_ft.data.encoding import ConversationEncoder

# No example fails for being slow on a busy machine, and each run tries the same ones; `--hypothesis-profile=explore`
# tries others.
_NOT_TIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
settings.register_profile("repeatable", _NOT_TIMED, derandomize=True)
settings.register_profile("explore", _NOT_TIMED)
settings.load_profile("repeatable")

SPECIAL_TOKENS = (*nano.SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>")
SENTENCES = (
    "hello there my friend, how are you today? I am fine and you are fine.",
    "what is the weather like in the city of Beijing, and what is the time now?",
    "the user is here\n\nthe user asks\n\n\nuser and assistant\n\nassistant it is,  and",
    "今天天气很好，我们去公园散步吧。你喜欢什么颜色的裤子？这条裤子很舒服。",
)

_GLM = (
    "{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant', 'observation'] %}"
    "<|{{ message['role'] }}|>{{ NEWLINE }}{{ message['content'] }}{{ CLOSING }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ PROMPT }}{% endif %}"
)


def _glm(newline: str, closing: str, prompt: str) -> str:
    texts = {"NEWLINE": newline, "CLOSING": closing, "PROMPT": prompt}
    return "".join(f"{{% set {name} = {json.dumps(text)} %}}" for name, text in texts.items()) + _GLM


TEMPLATES = {
    "glm": _glm("\n", "", ""),
    "glm-newline": _glm("\n", "", "\n"),
    "glm-literal": _glm("\\n", "\\n", "\\n"),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    ),
}
STOP_TOKENS = {
    "chatml": ("<|endoftext|>", "<|im_end|>"),
    "glm": ("<|endoftext|>", "<|user|>", "<|observation|>"),
}

LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TokenizerMaker = Callable[[str], PreTrainedTokenizerFast]
EncoderMaker = Callable[..., ConversationEncoder]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run all tests in several processes, a file in each; what is asked for by name or by `-m` runs in this one."""
    is_whole = not config.getoption("-m") and config.args_source != pytest.Config.ArgsSource.ARGS
    return min(os.cpu_count() or 1, 4) if is_whole else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests, and those that break things by the thousand, out unless `-m` says otherwise.

    Files whose tests start whole runs come first, the longest of them at the head: processes that share the files then
    end together.
    """
    if not config.getoption("-m"):
        later = {item for item in items if _is_on_demand(item)}
        config.hook.pytest_deselected(items=list(later))
        items[:] = [item for item in items if item not in later]
    items.sort(
        key=lambda item: (item.path.name != "test_finetune_vision.py", item.path.parent != Path(__file__).parent)
    )


def _is_on_demand(item: pytest.Item) -> bool:
    fault = item.get_closest_marker("fault")
    is_long_fault = fault is not None and not fault.kwargs.get("by_default")
    return is_long_fault or item.get_closest_marker("slow") is not None


@pytest.fixture(autouse=True)
def leave_no_process_group() -> Iterator[None]:
    """End the process group that a run with a DeepSpeed file starts in this process, and forget its variables."""
    before = {name: os.environ.get(name) for name in LAUNCH_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        from accelerate.state import AcceleratorState

        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    """A byte-level BPE tokenizer with GLM-4's split pattern, GLM-Edge's special tokens and trimmed offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(nano.SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer(backend: Tokenizer) -> TokenizerMaker:
    """Return a function from the name of a template, or a template's text, to a tokenizer that has it."""

    def make(template: str) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            chat_template=TEMPLATES.get(template, template),
        )

    return make


@pytest.fixture(scope="session")
def make_encoder(make_tokenizer: TokenizerMaker) -> EncoderMaker:
    """Return a function from a template and the two budgets to an encoder with that template's stop tokens."""

    def make(template: str = "glm", max_input_length: int = 4096, max_output_length: int = 4096) -> ConversationEncoder:
        tokenizer = make_tokenizer(template)
        stop_tokens = STOP_TOKENS["chatml" if template == "chatml" or "<|im_start|>" in template else "glm"]
        stop_ids = [tokenizer.get_vocab()[token] for token in stop_tokens]
        return ConversationEncoder(tokenizer, stop_ids, max_input_length, max_output_length)

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes values one a line and returns the file."""
    from tests.runs import write_jsonl

    def write(rows: Iterable[Any], name: str = "train.jsonl") -> Path:
        return write_jsonl(tmp_path / name, rows)

    return write


@pytest.fixture
def chat_folder(tmp_path: Path, make_tokenizer: TokenizerMaker, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a tiny chat model in `model`, its data in `data`, and a cache of its own."""
    from tests.model_folders import save_model_folder
    from tests.runs import write_chat_data

    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    save_model_folder(tmp_path / "model", make_tokenizer("glm"))
    write_chat_data(tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory: pytest.TempPathFactory, backend: Tokenizer) -> Path:
    """Return the folder of a tiny vision model; no test writes into it."""
    from tests.vision_folders import save_vision_folder

    return save_vision_folder(tmp_path_factory.mktemp("vision-model"), backend)


@pytest.fixture(scope="session")
def vision_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of rows with an image, text rows, and rows of two turns; no test writes into it."""
    from tests.vision_folders import write_vision_data

    return write_vision_data(tmp_path_factory.mktemp("vision-data"))
