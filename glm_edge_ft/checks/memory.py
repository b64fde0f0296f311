"""Does the run fit? The estimate of `model/memory.py` for a run that is about to start, beside what the machine has."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft import IGNORE_INDEX
from glm_edge_ft.checks.arguments import tokens_per_pass
from glm_edge_ft.distributed import launch
from glm_edge_ft.files import format_bytes

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments

    from glm_edge_ft.model.activations import BatchShape, StepFormats, StepTrace
    from glm_edge_ft.model.checkpoint import Checkpoint
    from glm_edge_ft.model.memory import HostMemory, MemoryEstimate, ModelSize
    from glm_edge_ft.model.precision import Precision
    from glm_edge_ft.run import Prepared

USABLE_OF_GPU = 0.9  # the rest is for CUDA's context, communication and gaps between allocations; not measured

NOTHING_TO_LOWER = "take a smaller model, or a machine with more memory"


@dataclass(frozen=True)
class RunMemory:
    """The estimate of a whole step beside what the machine has.

    Attributes:
        estimate: for each process.
        batch: the batch that it is made for, the largest that the training data can give.
        on_gpu: whether the run is on GPUs.
        processes: number of processes on this machine.
        device_bytes: memory of the GPU; without one, of the machine.
        host_bytes: memory of the machine.
        program_bytes: what this process takes of the machine's memory now, before any weight was read.
        failure: why activations could not be estimated; else None.
    """

    estimate: MemoryEstimate
    batch: BatchShape
    on_gpu: bool
    processes: int
    device_bytes: int
    host_bytes: int
    program_bytes: int
    failure: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the run fits into what the machine has."""
        program = self.processes * (self.program_bytes + self.estimate.host.total)
        if self.on_gpu:
            return self.estimate.total <= USABLE_OF_GPU * self.device_bytes and program <= self.host_bytes
        return self.processes * self.estimate.total + program <= self.host_bytes


def estimate_states(
    size: ModelSize, precision: Precision, args: Seq2SeqTrainingArguments, checkpoint: Checkpoint
) -> MemoryEstimate:
    """Return the estimate without activations, which takes no time."""
    return _estimate(size, precision, args, checkpoint, None)


def _estimate(
    size: ModelSize,
    precision: Precision,
    args: Seq2SeqTrainingArguments,
    checkpoint: Checkpoint,
    trace: StepTrace | None,
) -> MemoryEstimate:
    from glm_edge_ft.model.memory import estimate_memory, optimizer_state_bytes, read_sharding

    settings: Any = args.deepspeed or None
    hidden_size = getattr(checkpoint.config, "hidden_size", 0)
    sharding = read_sharding(settings, args.world_size, hidden_size, on_gpu=not args.use_cpu)
    dtype = precision.weights if settings is None else _computing_dtype(precision)
    state_bytes = optimizer_state_bytes(str(getattr(args.optim, "value", args.optim)))
    return estimate_memory(size, dtype, sharding, trace, args.gradient_accumulation_steps > 1, state_bytes)


def _computing_dtype(precision: Precision) -> str:
    return "bfloat16" if precision.bf16 else "float16" if precision.fp16 else "float32"


def look_at_memory(prepared: Prepared) -> RunMemory:
    """Trace a step with the largest batch of the training data, and ask the machine what it has.

    A model whose step cannot be traced gets the estimate without activations, and the reason.
    """
    import psutil
    import torch

    from glm_edge_ft.model.adapters import wrap_meta_model
    from glm_edge_ft.model.loading import build_meta_model
    from glm_edge_ft.model.memory import measure_size
    from glm_edge_ft.model.quantized_twin import quantize_twin

    args = prepared.training_arguments
    batch, trace, failure = largest_batch(prepared), None, None
    with _whole_models(args):
        twin = build_meta_model(prepared.checkpoint)
        quantize_twin(twin, prepared.plan.config.quantization)
        model = wrap_meta_model(prepared.plan.config.peft_config, twin, prepared.keeps_vision)
        size = measure_size(model)
        try:
            trace = _trace(prepared, model, batch)
        except Exception as error:  # whatever the model's code does on tensors without content, the run may be fine
            failure = (str(error).strip().splitlines() or [type(error).__name__])[0]
    on_gpu = torch.cuda.is_available() and not args.use_cpu
    host_bytes = _machine_memory()
    return RunMemory(
        estimate=_estimate(size, prepared.precision, args, prepared.checkpoint, trace),
        batch=batch,
        on_gpu=on_gpu,
        processes=launch().local_world_size,
        device_bytes=torch.cuda.get_device_properties(args.device).total_memory if on_gpu else host_bytes,
        host_bytes=host_bytes,
        program_bytes=psutil.Process().memory_info().rss,
        failure=failure,
    )


def _machine_memory() -> int:
    """Return the machine's memory, or what the container of this process may use of it (cgroup v2), in bytes."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


@contextmanager
def _whole_models(args: Seq2SeqTrainingArguments) -> Iterator[None]:
    """Keep transformers from building models in shares, which it does once ZeRO-3 stands in the training arguments."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            parsed: Any = args  # the attribute is there with DeepSpeed alone
            set_hf_deepspeed_config(parsed.hf_deepspeed_config)


def _trace(prepared: Prepared, model: Any, batch: BatchShape) -> StepTrace:
    from glm_edge_ft.model.activations import trace_step
    from glm_edge_ft.training.loss import install_supervised_loss

    args = prepared.training_arguments
    kwargs: Any = args.activation_checkpointing_kwargs
    settings = dict(kwargs or {}) if args.activation_checkpointing else None
    formats = step_formats(prepared.precision, bool(args.deepspeed), not args.use_cpu)
    parsed: Any = args  # the attribute is there with DeepSpeed alone
    shares_weights = bool(args.deepspeed) and parsed.hf_deepspeed_config.is_zero3()
    install_loss = functools.partial(install_supervised_loss, ahead=not shares_weights)
    return trace_step(model, batch, formats, install_loss, settings)


def step_formats(precision: Precision, deepspeed: bool, on_gpu: bool) -> StepFormats:
    """Return the formats of a step: DeepSpeed keeps all weights in the format of the run and does not autocast."""
    import torch

    from glm_edge_ft.model.activations import StepFormats

    computing = getattr(torch, _computing_dtype(precision))
    if deepspeed:
        return StepFormats(computing, computing, None, on_gpu)
    autocast = computing if precision.bf16 or precision.fp16 else None
    return StepFormats(getattr(torch, precision.weights), torch.float32, autocast, on_gpu)


def largest_batch(prepared: Prepared) -> BatchShape:
    """Return what goes through the model at once of the longest training rows; batches by length come close to it."""
    import numpy as np

    from glm_edge_ft.model.activations import BatchShape
    from glm_edge_ft.model.glm_edge_v_config import siglip_config
    from glm_edge_ft.training.micro_batches import plan_parts

    train, config, args = prepared.datasets["train"], prepared.checkpoint.config, prepared.training_arguments
    lengths, packed = train.lengths, prepared.plan.config.padding_free
    rows = [int(row) for row in np.argsort(lengths)[-args.per_device_train_batch_size :]]
    limit = tokens_per_pass(prepared.plan.config, args)
    if limit is not None:
        parts = plan_parts(lengths[rows].tolist(), limit, padded=not packed)
        rows = [rows[number] for number in parts[0]]
    supervised = sum(int((train[row]["labels"][1:] != IGNORE_INDEX).sum()) for row in rows)
    pictures = sum(len(train.images(row)) for row in rows) if prepared.image_processor and train.has_images else 0
    shape = None
    if pictures:
        tower: Any = siglip_config(config)  # type: ignore[arg-type]  # a model that takes images has this config
        shape = (pictures, int(tower.num_channels), int(tower.image_size), int(tower.image_size))
    together = int(lengths[rows].sum()) if packed else None
    return BatchShape(len(rows), int(lengths[rows].max()), supervised, shape, together)


def describe_memory(memory: RunMemory) -> str:
    """Return one line: what each process needs and what the machine has."""
    estimate = memory.estimate
    place = "on its GPU" if memory.on_gpu else "of the machine's memory"
    batch = f"{memory.batch.rows} x {memory.batch.length:,} tokens"
    if memory.batch.packed is not None:
        batch = f"{memory.batch.rows} rows of {memory.batch.packed:,} tokens together"
    if memory.batch.images:
        batch += f" and {memory.batch.images[0]} images"
    host = estimate.host.total
    besides = f" and {format_bytes(host)} of the machine's memory" if host else ""
    size = f"{format_bytes(memory.device_bytes)} {'on the GPU' if memory.on_gpu else 'in the machine'}"
    processes = f" for {memory.processes} processes" if memory.processes > 1 and not memory.on_gpu else ""
    return (
        f"peak: about {format_bytes(estimate.total)} {place}{besides} for each process, in a step of {batch}; "
        f"there are {size}{processes}"
    )


def advise(memory: RunMemory, prepared: Prepared) -> list[str]:
    """Return what a user should know: that activations are not in the estimate, or what to lower if it is too much."""
    notices = []
    if memory.failure is not None:
        notices.append(f"memory: the activations of this model cannot be estimated ({memory.failure})")
    if memory.fits:
        return notices
    if not memory.on_gpu or memory.estimate.total > USABLE_OF_GPU * memory.device_bytes:
        what = f"about {format_bytes(memory.estimate.total)} a process are more than fit"
    else:
        what = (
            f"{memory.processes} x {format_bytes(memory.estimate.host.total)} are more than the machine's memory holds"
        )
    ways = (
        "; ".join(ways_out(prepared, memory.batch, memory.on_gpu, memory.estimate.host.total > 0))
        or "take a smaller model, or a machine with more memory"
    )
    return [*notices, f"memory: {what}. In this order: {ways}"]


def ways_out(prepared: Prepared, batch: BatchShape, on_gpu: bool, offloads: bool) -> list[str]:
    """Return what can still be lowered in a run, cheapest first.

    Args:
        prepared: the run.
        batch: its largest batch.
        on_gpu: whether it is on GPUs.
        offloads: whether DeepSpeed keeps part of it in the machine's memory.
    """
    args, config = prepared.training_arguments, prepared.plan.config
    ways = []
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if batch.rows > 1 and not args.deepspeed:
        ways.append(f"max_tokens_per_pass: {batch.length} (the same result)")
    elif batch.rows > 1:
        ways.append(
            f"training_args.per_device_train_batch_size {size} -> 1 with gradient_accumulation_steps {steps * size} "
            "(the same result)"
        )
    prefix = (config.peft_config or {}).get("peft_type") == "PREFIX_TUNING"
    if not args.activation_checkpointing and not prefix:
        ways.append("training_args.activation_checkpointing: true")
    if batch.length > 512:
        ways.append(f"max_input_length and max_output_length, the longest row has {batch.length:,} tokens")
    if config.peft_config is None:
        ways.append("a LORA adapter, configs/lora.yaml")
    if on_gpu and not args.deepspeed:
        file = "ds_zero_3.json" if args.world_size > 1 else "ds_zero_2_offload.json"
        ways.append(f"training_args.deepspeed: {file}")
    elif on_gpu and not offloads:
        ways.append("training_args.deepspeed: ds_zero_3_offload.json")
    return ways


def memory_facts(estimate: MemoryEstimate) -> dict[str, Any]:
    """Return the estimate for JSON, in bytes for each process."""
    host: HostMemory = estimate.host
    return {**asdict(estimate), "host": {**asdict(host), "total": host.total}}


def run_memory_facts(memory: RunMemory) -> dict[str, Any]:
    """Return the whole estimate and what the machine has for JSON, in bytes."""
    return {
        **memory_facts(memory.estimate),
        "batch": asdict(memory.batch),
        "processes": memory.processes,
        "device_bytes": memory.device_bytes,
        "host_bytes": memory.host_bytes,
        "program_bytes": memory.program_bytes,
        "fits": memory.fits,
    }
