"""Does the run fit? The estimate of `model/memory.py` for this run, beside what the machine has."""

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
from glm_edge_ft.errors import first_line
from glm_edge_ft.files import format_bytes

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments

    from glm_edge_ft.model.activations import BatchShape, StepFormats, StepTrace
    from glm_edge_ft.model.checkpoint import Checkpoint
    from glm_edge_ft.model.memory import MemoryEstimate, ModelSize
    from glm_edge_ft.model.precision import Precision
    from glm_edge_ft.run import Prepared

USABLE_OF_GPU = 0.9  # the rest is for CUDA's context, communication and gaps between allocations; not measured
NOTHING_TO_LOWER = "take a smaller model, or a machine with more memory"


@dataclass(frozen=True)
class RunMemory:
    """The estimate of a whole step beside what the machine has.

    Attributes:
        estimate: for each process.
        batch: the largest batch of the training data, for which the estimate is made.
        on_gpu: whether the run is on GPUs.
        processes: number of processes on this machine.
        device_bytes: memory of the GPU; without one, of the machine.
        host_bytes: memory of the machine.
        program_bytes: memory that this process takes now, without weights.
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
    def exceeds_gpu(self) -> bool:
        """Whether the run needs more memory than its GPUs have."""
        return self.on_gpu and self.estimate.total > USABLE_OF_GPU * self.device_bytes

    @property
    def fits(self) -> bool:
        """Whether the run fits into what the machine has."""
        on_host = self.program_bytes + self.estimate.host.total + (0 if self.on_gpu else self.estimate.total)
        return not self.exceeds_gpu and self.processes * on_host <= self.host_bytes


def estimate_states(
    size: ModelSize,
    precision: Precision,
    args: Seq2SeqTrainingArguments,
    checkpoint: Checkpoint,
    trace: StepTrace | None = None,
) -> MemoryEstimate:
    """Return the estimate of a run; without `trace`, which takes seconds to make, that of weights and states alone."""
    from glm_edge_ft.model.memory import estimate_memory, optimizer_state_bytes, read_sharding

    settings: Any = args.deepspeed or None
    hidden_size = getattr(checkpoint.config, "hidden_size", 0)
    sharding = read_sharding(settings, args.world_size, hidden_size, on_gpu=not args.use_cpu)
    dtype = precision.weights if settings is None else precision.compute
    state_bytes = optimizer_state_bytes(str(getattr(args.optim, "value", args.optim)))
    return estimate_memory(size, dtype, sharding, trace, args.gradient_accumulation_steps > 1, state_bytes)


def estimate_run_memory(prepared: Prepared) -> RunMemory:
    """Trace a step with the largest batch of the training data, and ask the machine what it has.

    A model whose step cannot be traced gets the estimate without activations, and the reason.
    """
    import psutil
    import torch

    from glm_edge_ft.model.adapters import wrap_meta_model
    from glm_edge_ft.model.loading import build_meta_model
    from glm_edge_ft.model.memory import measure_size
    from glm_edge_ft.model.meta_model import quantize_meta_model

    args, config = prepared.training_arguments, prepared.plan.config
    batch, trace, failure = largest_batch(prepared), None, None
    with _without_zero_3(args):
        meta_model = build_meta_model(prepared.checkpoint)
        quantize_meta_model(meta_model, config.quantization)
        model = wrap_meta_model(config.peft_config, meta_model, prepared.keeps_vision)
        size = measure_size(model)
        try:
            trace = _trace(prepared, model, batch)
        except Exception as error:  # whatever the model's code does with fake tensors, the run may be fine
            failure = first_line(error)
    on_gpu = torch.cuda.is_available() and not args.use_cpu
    limit = Path("/sys/fs/cgroup/memory.max")  # what the container of this process may use (cgroup v2)
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else ""
    host_bytes = min(psutil.virtual_memory().total, int(text) if text.isdigit() else 2**63)
    return RunMemory(
        estimate=estimate_states(size, prepared.precision, args, prepared.checkpoint, trace),
        batch=batch,
        on_gpu=on_gpu,
        processes=launch().local_world_size,
        device_bytes=torch.cuda.get_device_properties(args.device).total_memory if on_gpu else host_bytes,
        host_bytes=host_bytes,
        program_bytes=psutil.Process().memory_info().rss,
        failure=failure,
    )


@contextmanager
def _without_zero_3(args: Seq2SeqTrainingArguments) -> Iterator[None]:
    """Keep transformers from sharding models as they are built, as it does once the training arguments name ZeRO-3."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


def _trace(prepared: Prepared, model: Any, batch: BatchShape) -> StepTrace:
    from glm_edge_ft.model.activations import trace_step
    from glm_edge_ft.training.loss import install_supervised_loss

    args = prepared.training_arguments
    kwargs: Any = args.activation_checkpointing_kwargs
    checkpointing = dict(kwargs or {}) if args.activation_checkpointing else None
    formats = step_formats(prepared.precision, bool(args.deepspeed), not args.use_cpu)
    shares_weights = bool(args.deepspeed) and args.hf_deepspeed_config.is_zero3()
    install_loss = functools.partial(install_supervised_loss, gradients_in_forward=not shares_weights)
    return trace_step(model, batch, formats, install_loss, checkpointing)


def step_formats(precision: Precision, deepspeed: bool, on_gpu: bool) -> StepFormats:
    """Return the dtypes of a step: DeepSpeed keeps all weights in the dtype of the run and does not autocast."""
    import torch

    from glm_edge_ft.model.activations import StepFormats

    compute = getattr(torch, precision.compute)
    if deepspeed:
        return StepFormats(compute, compute, None, on_gpu)
    autocast = compute if precision.bf16 or precision.fp16 else None
    return StepFormats(getattr(torch, precision.weights), torch.float32, autocast, on_gpu)


def largest_batch(prepared: Prepared) -> BatchShape:
    """Return what goes through the model at once of the longest training rows; batches by length come close to it."""
    import numpy as np

    from glm_edge_ft.model.activations import BatchShape
    from glm_edge_ft.model.glm_edge_v_config import siglip_config
    from glm_edge_ft.training.micro_batches import plan_parts

    train, args = prepared.datasets["train"], prepared.training_arguments
    lengths, packed = train.lengths, prepared.plan.config.padding_free
    rows = [int(row) for row in np.argsort(lengths)[-args.per_device_train_batch_size :]]
    limit = tokens_per_pass(prepared.plan.config, args)
    if limit is not None:
        rows = [rows[number] for number in plan_parts(lengths[rows].tolist(), limit, padded=not packed)[0]]
    supervised = sum(int((train[row]["labels"][1:] != IGNORE_INDEX).sum()) for row in rows)
    images = sum(len(train.images(row)) for row in rows) if prepared.image_processor and train.has_images else 0
    shape = None
    if images:
        tower: Any = siglip_config(prepared.checkpoint.config)  # type: ignore[arg-type]  # a vision model has this one
        shape = (images, int(tower.num_channels), int(tower.image_size), int(tower.image_size))
    together = int(lengths[rows].sum()) if packed else None
    return BatchShape(len(rows), int(lengths[rows].max()), supervised, shape, together)


def describe_memory(memory: RunMemory) -> str:
    """Return one line: what each process needs and what the machine has."""
    shape, host = memory.batch, memory.estimate.host.total
    batch = f"{shape.rows} x {shape.length:,} tokens"
    if shape.packed is not None:
        batch = f"{shape.rows} rows of {shape.packed:,} tokens together"
    if shape.images:
        batch += f" and {shape.images[0]} images"
    place, there = ("on its GPU", "on the GPU") if memory.on_gpu else ("of the machine's memory", "in the machine")
    besides = f" and {format_bytes(host)} of the machine's memory" if host else ""
    processes = f" for {memory.processes} processes" if memory.processes > 1 and not memory.on_gpu else ""
    return (
        f"peak: about {format_bytes(memory.estimate.total)} {place}{besides} for each process, in a step of {batch}; "
        f"there are {format_bytes(memory.device_bytes)} {there}{processes}"
    )


def advise(memory: RunMemory, prepared: Prepared) -> list[str]:
    """Return notices: that activations are not in the estimate, and what to lower where the run does not fit."""
    notices, host = [], memory.estimate.host.total
    if memory.failure is not None:
        notices.append(f"memory: the activations of this model cannot be estimated ({memory.failure})")
    if not memory.fits:
        what = f"about {format_bytes(memory.estimate.total)} a process are more than fit"
        if memory.on_gpu and not memory.exceeds_gpu:
            what = f"{memory.processes} x {format_bytes(host)} are more than the machine's memory holds"
        ways = (
            "; ".join(ways_to_save_memory(prepared, memory.batch, memory.on_gpu, offloads=host > 0)) or NOTHING_TO_LOWER
        )
        notices.append(f"memory: {what}. In this order: {ways}")
    return notices


def ways_to_save_memory(prepared: Prepared, batch: BatchShape, on_gpu: bool, offloads: bool) -> list[str]:
    """Return what can still be lowered in a run, cheapest first.

    Args:
        prepared: the run.
        batch: its largest batch.
        on_gpu: whether it is on GPUs.
        offloads: whether DeepSpeed keeps part of it in the machine's memory.
    """
    args, config = prepared.training_arguments, prepared.plan.config
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    is_prefix = (config.peft_config or {}).get("peft_type") == "PREFIX_TUNING"
    file = "ds_zero_3.json" if args.world_size > 1 else "ds_zero_2_offload.json"
    ways = {
        f"max_tokens_per_pass: {batch.length} (the same result)": batch.rows > 1 and not args.deepspeed,
        f"training_args.per_device_train_batch_size {size} -> 1 with gradient_accumulation_steps {steps * size} "
        "(the same result)": batch.rows > 1 and args.deepspeed,
        "training_args.activation_checkpointing: true": not args.activation_checkpointing and not is_prefix,
        f"max_input_length and max_output_length, the longest row has {batch.length:,} tokens": batch.length > 512,
        "a LORA adapter, configs/lora.yaml": config.peft_config is None,
        f"training_args.deepspeed: {file}": on_gpu and not args.deepspeed,
        "training_args.deepspeed: ds_zero_3_offload.json": on_gpu and args.deepspeed and not offloads,
    }
    return [way for way, is_open in ways.items() if is_open]


def memory_facts(estimate: MemoryEstimate) -> dict[str, Any]:
    """Return the estimate for JSON, in bytes for each process."""
    facts = asdict(estimate)
    facts["host"]["total"] = estimate.host.total
    return facts


def run_memory_facts(memory: RunMemory) -> dict[str, Any]:
    """Return the whole estimate and what the machine has for JSON, in bytes."""
    facts = asdict(memory)
    del facts["estimate"], facts["on_gpu"], facts["failure"]
    return {**memory_facts(memory.estimate), **facts, "fits": memory.fits}
