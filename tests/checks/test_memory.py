"""What `--check` says of memory: the largest batch, what the machine has, what to lower where that is too little."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tokenizers import Tokenizer
from transformers.integrations import is_deepspeed_zero3_enabled

from glm_edge_ft import recipe
from glm_edge_ft.checks.memory import RunMemory, advise, describe_memory, estimate_run_memory
from glm_edge_ft.checks.preflight import check_inputs, prepare
from glm_edge_ft.model.activations import BatchShape
from glm_edge_ft.run import Prepared, RunRequest
from tests.conftest import TokenizerMaker
from tests.model_folders import save_model_folder
from tests.runs import LORA, write_jsonl
from tests.vision_folders import PLACEHOLDERS, SIDE, save_vision_folder, write_vision_data

GIGABYTE = 10**9


@pytest.fixture
def chat(tmp_path: Path, make_tokenizer: TokenizerMaker, monkeypatch: pytest.MonkeyPatch) -> RunRequest:
    """Return a check of full fine-tuning on three rows, of which the third is short, in batches of two."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    save_model_folder(tmp_path / "model", make_tokenizer("glm"))
    replies = ("I am fine. " * 40, "I am fine and you are fine. " * 20, "fine")
    rows = [
        {"messages": [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": reply}]}
        for reply in replies
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    config = tmp_path / "run.yaml"
    settings = {"output_dir": str(tmp_path / "output"), "per_device_train_batch_size": 2, "max_steps": 2}
    content = {"data_config": {"train_file": "train.jsonl"}, "max_output_length": 1024, "training_args": settings}
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    return RunRequest(tmp_path, str(tmp_path / "model"), config, check=True, json_path=tmp_path / "check.json")


def with_lora(request: RunRequest, **training: Any) -> Prepared:
    """Return the request with a LORA adapter and other training arguments, prepared."""
    content = yaml.safe_load(request.config.read_text(encoding="utf-8"))
    content["peft_config"] = LORA
    content["training_args"] |= training
    request.config.write_text(yaml.safe_dump(content), encoding="utf-8")
    return prepare(check_inputs(request))


def test_check_prints_and_writes_the_peak_of_the_largest_batch(
    chat: RunRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two longest rows make it; their supervised tokens are counted, and the machine's memory is named."""
    train = prepare(check_inputs(chat)).datasets["train"]
    recipe.run(chat)
    assert chat.json_path is not None
    written = json.loads(chat.json_path.read_text(encoding="utf-8"))["model"]["memory_bytes"]
    longest = sorted(range(3), key=lambda row: int(train.lengths[row]))[1:]
    supervised = sum(int((train[row]["labels"] != -100).sum()) for row in longest)
    shape = {"rows": 2, "length": train.lengths.max(), "supervised": supervised, "images": None, "packed": None}
    assert written["batch"] == shape
    assert 0 < written["host_bytes"] == written["device_bytes"] <= psutil.virtual_memory().total
    assert written["total"] > written["weights"] + written["optimizer"] + written["gradients"]
    assert written["fits"] is True
    out = capsys.readouterr()
    assert f"peak: about {written['total'] / 1e6:,.1f} MB of the machine's memory for each process" in out.out
    assert f"in a step of 2 x {train.lengths.max():,} tokens" in out.out
    assert "memory:" not in out.err


def test_packed_rows_are_estimated_without_padding(chat: RunRequest) -> None:
    """`padding_free: true`: as many tokens as the rows have, so less than the padded batch of the same rows."""

    def look(packed: bool) -> tuple[RunMemory, Prepared]:
        content = yaml.safe_load(chat.config.read_text(encoding="utf-8"))
        content["training_args"]["per_device_train_batch_size"] = 3
        chat.config.write_text(yaml.safe_dump(content | {"padding_free": packed}), encoding="utf-8")
        prepared = prepare(check_inputs(chat))
        return estimate_run_memory(prepared), prepared

    (padded, _), (packed, prepared) = look(False), look(True)
    lengths = prepared.datasets["train"].lengths
    assert (padded.batch.rows, padded.batch.length, padded.batch.packed) == (3, lengths.max(), None)
    assert dataclasses.replace(packed.batch, packed=None) == padded.batch
    assert packed.batch.packed == lengths.sum() < 3 * lengths.max()
    assert packed.failure is None
    assert packed.estimate.activations is not None
    assert padded.estimate.activations is not None
    assert packed.estimate.activations < padded.estimate.activations
    assert f"in a step of 3 rows of {lengths.sum():,} tokens together" in describe_memory(packed)


def test_a_vision_batch_counts_its_images(tmp_path: Path, backend: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """I6: with the tower kept, an image costs its vectors alone; trained, its layers keep theirs."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    save_vision_folder(tmp_path / "model", backend)
    write_vision_data(tmp_path / "data")
    config = tmp_path / "run.yaml"
    kept = []
    for keep in (True, False):
        content = {
            "data_config": {"train_file": "train.jsonl"},
            "max_input_length": 128,
            "freezeV": keep,
            "training_args": {"output_dir": str(tmp_path / "output"), "per_device_train_batch_size": 64},
        }
        config.write_text(yaml.safe_dump(content), encoding="utf-8")
        request = RunRequest(tmp_path / "data", str(tmp_path / "model"), config, check=True, takes_images=True)
        memory = estimate_run_memory(prepare(check_inputs(request)))
        assert memory.failure is None
        assert memory.batch.images is not None
        assert memory.batch.images[1:] == (3, SIDE, SIDE)
        assert memory.batch.length > PLACEHOLDERS
        kept.append(memory.estimate.activations)
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[0] < kept[1]


def shrunk(memory: RunMemory, **changes: Any) -> RunMemory:
    """Return the same run on another machine."""
    return dataclasses.replace(memory, batch=dataclasses.replace(memory.batch, length=2048), **changes)


def test_a_run_that_does_not_fit_is_told_what_to_lower(chat: RunRequest) -> None:
    """One notice with the ways out in order, cheapest first; the run is not refused."""
    prepared = prepare(check_inputs(chat))
    memory = shrunk(estimate_run_memory(prepared), host_bytes=10**6)
    (notice,) = advise(memory, prepared)
    need = f"{memory.estimate.total / 1e6:,.1f} MB"
    assert notice == (
        f"memory: about {need} a process are more than fit. In this order: "
        "max_tokens_per_pass: 2048 (the same result); "
        "training_args.activation_checkpointing: true; "
        "max_input_length and max_output_length, the longest row has 2,048 tokens; "
        "a LORA adapter, configs/lora.yaml"
    )


def test_on_a_gpu_deepspeed_is_a_way_out(chat: RunRequest) -> None:
    """What was done already is not advised again; a tenth of the GPU stays free."""
    prepared = with_lora(chat, per_device_train_batch_size=1, activation_checkpointing=True)
    memory = estimate_run_memory(prepared)
    total = memory.estimate.total
    gpu = dataclasses.replace(memory, on_gpu=True, device_bytes=total)
    (notice,) = advise(gpu, prepared)
    assert notice.endswith("In this order: training_args.deepspeed: ds_zero_2_offload.json")
    assert advise(dataclasses.replace(gpu, device_bytes=int(total / 0.9) + 1), prepared) == []


def test_processes_of_one_machine_share_its_memory(chat: RunRequest) -> None:
    """Without GPUs each of them takes its own."""
    memory = estimate_run_memory(prepare(check_inputs(chat)))
    need = memory.estimate.total + memory.program_bytes
    assert dataclasses.replace(memory, processes=2, host_bytes=2 * need).fits
    assert not dataclasses.replace(memory, processes=2, host_bytes=2 * need - 1).fits
    assert describe_memory(dataclasses.replace(memory, processes=2)).endswith("in the machine for 2 processes")


def test_a_model_that_cannot_be_traced_is_said_to_be_estimated_in_part(chat: RunRequest) -> None:
    """The reason is named, and the check goes on."""
    prepared = prepare(check_inputs(chat))
    memory = estimate_run_memory(prepared)
    assert memory.batch == BatchShape(2, memory.batch.length, memory.batch.supervised)
    (notice,) = advise(dataclasses.replace(memory, failure="no such operator"), prepared)
    assert notice == "memory: the activations of this model cannot be estimated (no such operator)"


def test_zero_3_shares_weights_in_the_estimate(chat: RunRequest) -> None:
    """With the whole of transformers set to ZeRO-3, the trace still sees a whole model, and leaves it so set."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    file = Path(__file__).resolve().parents[2] / "configs" / "ds_zero_3_offload.json"
    prepared = with_lora(chat, deepspeed=str(file))
    memory = estimate_run_memory(prepared)
    assert memory.failure is None
    assert memory.estimate.host.weights == 4 * prepared.parameters[1]
    assert memory.estimate.weights == 0
    assert is_deepspeed_zero3_enabled()
