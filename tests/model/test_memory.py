"""The estimate of memory against real training steps, and its formulas against hand-made numbers."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM

from glm_edge_ft.config.deepspeed import complete_deepspeed, read_deepspeed
from glm_edge_ft.model.activations import StepTrace, trace_step
from glm_edge_ft.model.adapters import wrap_meta_model
from glm_edge_ft.model.memory import (
    HostMemory,
    ModelSize,
    Sharding,
    estimate_memory,
    measure_size,
    optimizer_state_bytes,
    read_sharding,
)
from glm_edge_ft.training.loss import install_supervised_loss
from tests.conftest import TokenizerMaker
from tests.model.measure_memory import CASES, FLOAT32, build_model
from tests.model.measure_sharing import BATCH
from tests.model_folders import tiny_config

ROOT = Path(__file__).resolve().parents[2]
# DeepSpeed file → processes
SHARED = {
    "none": 1,
    "ds_zero_2.json": 2,
    "ds_zero_3.json": 2,
    "ds_zero_2_offload.json": 2,
    "ds_zero_3_offload.json": 2,
}
SECONDS = 480  # one of these runs takes thirty; at first use DeepSpeed compiles its AdamW for the CPU as well
# Each large tensor has pages of its own, which go back to the system as it is freed.
MEASURED_BY_PAGES = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
QUICK = ("full", "lora, checkpointing", "lora, 16 bit")
THOROUGH = tuple(name for name in CASES if name not in QUICK)
needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process is read, and set back, through /proc"
)


@functools.cache
def measured(names: tuple[str, ...]) -> dict[str, int]:
    """Return the measured peaks of cases, in bytes."""
    command = [sys.executable, "-m", "tests.model.measure_memory", *names]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | MEASURED_BY_PAGES, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@needs_proc
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in THOROUGH)])
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(name: str) -> None:
    """Two steps of AdamW on real models, against the estimate that never sees a weight."""
    peaks = measured(QUICK if name in QUICK else THOROUGH)
    settings, batch, formats, checkpointing = CASES[name]
    with torch.device("meta"):
        model: Any = wrap_meta_model(settings, build_model(name, formats), keep_vision=name == "vision kept")
    size = measure_size(model)
    trace = trace_step(model, batch, formats, install_supervised_loss, {} if checkpointing else None)
    dtype = str(formats.frozen).removeprefix("torch.")
    assert estimate_memory(size, dtype, trace=trace).total == pytest.approx(peaks[name], rel=0.25)


# ---- the formulas ----

SIZE = ModelSize(parameters=1000, trained=100, largest=40)
TRACE = StepTrace(kept=500, moments=((0, 800), (60, 300), (100, 50)))


def test_gradients_come_while_activations_go() -> None:
    """The peak is where both together are most; gradients that are there from the beginning add to the first moment."""
    assert TRACE.peak(4) == max(800, 300 + 240, 50 + 400)
    assert TRACE.peak(20) == 50 + 2000
    assert TRACE.peak(4, held=400) == 800 + 400


def test_one_process_keeps_frozen_weights_in_16_bit_and_the_rest_in_float32() -> None:
    """900 weights of 2 bytes, 100 of 4, as many gradients, two states each; the step's peak is that of its passes."""
    estimate = estimate_memory(SIZE, "bfloat16", trace=TRACE)
    assert (estimate.weights, estimate.gradients, estimate.optimizer, estimate.buffers) == (2200, 400, 800, 0)
    assert (estimate.activations, estimate.total) == (500, 2200 + 800 + 800)
    assert estimate_memory(SIZE, "bfloat16", trace=TRACE, accumulates=True).total == 2200 + 800 + 1200


def test_averaging_gradients_takes_a_second_copy_of_them() -> None:
    """DDP averages in buffers of its own."""
    assert estimate_memory(SIZE, "bfloat16", Sharding(processes=8), TRACE).total == 2200 + 800 + 400 + 800


@pytest.mark.parametrize(
    ("sharding", "parts", "total", "host"),
    [
        (Sharding(1, 4, buffers=10), (2000, 200, 300, 20), 2520 + 800, HostMemory()),
        (Sharding(2, 4, buffers=10), (2000, 50, 300, 20), 2370 + 800, HostMemory()),
        (Sharding(3, 4, buffers=10, live=600), (500, 50, 300, 1220), 870 + 1200 + 800, HostMemory()),
        (Sharding(2, 4, True, buffers=10), (2000, 0, 0, 100), 2100 + 800, HostMemory(0, 180, 350)),
        (Sharding(3, 4, True, True, buffers=10), (0, 0, 0, 2020), 2020 + 800, HostMemory(500, 150, 300)),
        (Sharding(3, 1), (2000, 200, 1200, 0), 3400 + 800, HostMemory()),
    ],
    ids=["1", "2", "3", "2 offload", "3 offload", "3 alone"],
)
def test_zero_shares_what_its_stage_says(
    sharding: Sharding, parts: tuple[int, ...], total: int, host: HostMemory
) -> None:
    """All weights in 2 bytes; of 25 trained ones of 100, float32 weights and two states: 12 bytes each."""
    estimate = estimate_memory(SIZE, "bfloat16", sharding, TRACE)
    assert (estimate.weights, estimate.gradients, estimate.optimizer, estimate.buffers) == parts
    assert (estimate.total, estimate.host) == (total, host)


def test_the_step_of_the_optimizer_can_be_the_peak() -> None:
    """With few activations, the gradients in a row and in float32 are: (2 + 4) bytes of 25."""
    assert estimate_memory(SIZE, "bfloat16", Sharding(2, 4), StepTrace(0, ((0, 10),))).total == 2350 + 150


def test_gloo_gathers_the_updated_weights_into_a_copy() -> None:
    """2 bytes of 100 trained weights, once the 50 bytes of gradients are gone; NCCL does without."""
    few = StepTrace(0, ((0, 10),))
    assert estimate_memory(SIZE, "bfloat16", Sharding(2, 4, True, gathers_copy=True), few).total == 2080 + 200
    assert estimate_memory(SIZE, "bfloat16", Sharding(2, 4, gathers_copy=True), few).total == 2300 + 200
    assert estimate_memory(SIZE, "bfloat16", Sharding(2, 1, gathers_copy=True), few).total == 3400 + 600


@pytest.mark.parametrize(
    ("name", "size"),
    [("adamw_torch_fused", 8), ("paged_adamw_8bit", 2), ("lion_32bit", 4), ("sgd", 0), ("adafactor", 0)],
)
def test_optimizers_differ_in_their_states(name: str, size: int) -> None:
    """Bytes of one trained number, under the names of `training_args.optim`."""
    assert optimizer_state_bytes(name) == size
    assert estimate_memory(SIZE, "bfloat16", state_bytes=size).optimizer == 100 * size


def test_a_deepspeed_file_is_read_for_what_it_means() -> None:
    """Buffers of the hidden size's square where the file says auto, two of them where communication overlaps."""
    zero = {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True, "offload_optimizer": {"device": "cpu"}}
    found = read_sharding({"zero_optimization": zero}, processes=8, hidden_size=16)
    assert found == Sharding(2, 8, offload_optimizer=True, buffers=512)
    zero = {"stage": 3, "reduce_bucket_size": 1e3, "stage3_max_live_parameters": 5, "offload_param": {"device": "none"}}
    assert read_sharding({"zero_optimization": zero}, 8, 16) == Sharding(3, 8, buffers=1000, live=5)
    assert read_sharding(None, 2, 16) == Sharding(processes=2)


# ---- several processes ----


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: TokenizerMaker) -> Path:
    """Return a model of 640 MB in float32, saved in 16 bit as the released ones are."""
    folder = tmp_path_factory.mktemp("sharing") / "model"
    widths = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "head_dim": 128,
    }
    config = tiny_config(8192, 0, [0], **widths)
    model: Any = GlmForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer("glm").save_pretrained(folder)
    return folder


def share(model_folder: Path, processes: int, file: str) -> list[dict[str, int]]:
    """Return the two peaks of each process."""
    output = model_folder.parent / f"{processes}-{file}"
    output.mkdir()
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={processes}", "-m")
    settings = "-" if file == "none" else str(ROOT / "configs" / file)
    command = [sys.executable, *(torchrun if processes > 1 else ("-m",)), "tests.model.measure_sharing"]
    environment = os.environ | MEASURED_BY_PAGES | {"DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        [*command, str(model_folder), settings, str(output)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        for member in [*psutil.Process(process.pid).children(recursive=True), process]:
            member.kill()  # torchrun's workers are in sessions of their own
        said, _ = process.communicate()
        pytest.fail(f"{file} did not end within {SECONDS} seconds:\n{said[-9000:]}")
    assert process.returncode == 0, said[-9000:]
    return [json.loads((output / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]


@pytest.fixture(scope="module")
def peaks(model_folder: Path) -> dict[str, list[dict[str, int]]]:
    """Return what one process takes, and each of two under ZeRO-2 and ZeRO-3."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    return {file: share(model_folder, processes, file) for file, processes in SHARED.items()}


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("file", SHARED)
def test_the_estimate_holds_for_each_process(
    file: str, peaks: dict[str, list[dict[str, int]]], model_folder: Path
) -> None:
    """Weights, gradients and optimizer states of each of two processes, and of one, within a quarter."""
    with torch.device("meta"):
        model = GlmForCausalLM(GlmConfig.from_pretrained(model_folder))
    size = measure_size(model)
    settings = None
    if file != "none":
        settings = complete_deepspeed(
            read_deepspeed(str(ROOT / "configs" / file)), has_gpu=False, bf16=False, fp16=False
        )
    trace = trace_step(model, BATCH, FLOAT32, install_supervised_loss)
    sharding = read_sharding(settings, len(peaks[file]), hidden_size=1024, on_gpu=False)
    estimate = estimate_memory(size, "float32", sharding, trace)
    need = estimate.total + estimate.host.total  # without GPUs both lie in the machine's memory
    assert [peak["training"] for peak in peaks[file]] == pytest.approx([need] * sharding.processes, rel=0.25)


@needs_proc
@pytest.mark.slow
def test_zero_3_reads_weights_in_shares(peaks: dict[str, list[dict[str, int]]]) -> None:
    """A model larger than one process's share can be loaded: no process ever holds it whole.

    The first process maps the weight files, whose pages count as long as it reads.
    """
    alone = peaks["none"][0]["loading"]
    first, second = (peak["loading"] for peak in peaks["ds_zero_3.json"])
    assert first < 0.75 * alone
    assert second < 0.5 * alone
