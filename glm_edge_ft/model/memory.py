"""The memory that a run needs: an estimate for each process, on its GPU (or CPU) and in the machine's memory.

P counts all parameters, T the trained ones, n the processes; c is the bytes of the dtype in which DeepSpeed keeps the
model: 2 under bf16 and fp16, else 4; f is what a float32 copy takes besides: 4 under bf16 and fp16, else 0. AdamW keeps
two float32 states of each trained parameter: 8 T.

Without DeepSpeed (`model/precision.py`): frozen weights are in 16 bits or float32, or in 4 bits with their scales;
trained ones, their gradients and AdamW's states in float32. On several processes DDP averages gradients in a second
copy (torch.nn.parallel.DistributedDataParallel, `gradient_as_bucket_view=False`): 4 T.

With DeepSpeed 0.19.8 all weights are in the dtype of the run, without autocast. Each process has a share T/n of the
trained ones in float32 as well, and AdamW's states of it (Rajbhandari et al., "ZeRO: Memory Optimizations Toward
Training Trillion Parameter Models", section 3; `runtime/zero/stage_1_and_2.py` and `stage3.py`):

    stage                   1           2               3
    weights               c P         c P           c P/n, and what is gathered: c min(P, stage3_max_live_parameters)
    float32 weights     4 T/n       4 T/n         4 T/n
    AdamW               8 T/n       8 T/n         8 T/n
    gradients             c T       c T/n         c T/n
    when it steps   (c + f) T/n   (c + f) T/n   (c + f) min(T/n, sub_group_size): gradients in a row, then in float32
    buffers         twice `reduce_bucket_size` where communication overlaps, else once; c each

`offload_optimizer` moves float32 weights, states and gradients, in float32 too, to the machine's memory; stage 2 keeps
a copy of the share in c there as well, and on both sides a buffer for the largest gradient. `offload_param` (stage 3)
moves the share of the weights too. On CPUs gloo gathers the weights of stages 1 and 2 into a copy, c T, when it steps.

Activations, logits and the gradients that come while activations go: `model/activations.py`. Not counted: CUDA's
context and libraries, buffers of NCCL, gaps between allocations, the program itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glm_edge_ft.config.deepspeed import AUTO, find
from glm_edge_ft.model.meta_model import MetaLinear4bit

if TYPE_CHECKING:
    from glm_edge_ft.model.activations import StepTrace

BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT32 = 4
ADAMW_BYTES = 8
# DeepSpeed's defaults (`runtime/zero/config.py`).
DEFAULT_BUCKET = 500_000_000
DEFAULT_LIVE = 1_000_000_000
DEFAULT_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, its adapter's included.

    Attributes:
        parameters, trained: number of all, and of the trained ones.
        largest: number of those in the largest trained tensor.
        quantized: number of those in 4 bits.
        quantized_bytes: what these take, scales included.
    """

    parameters: int
    trained: int
    largest: int = 0
    quantized: int = 0
    quantized_bytes: int = 0


@dataclass(frozen=True)
class Sharding:
    """How the processes of a run share model and optimizer.

    Attributes:
        stage: of ZeRO; None without DeepSpeed.
        processes: number of processes.
        offload_optimizer, offload_weights: whether these are in the machine's memory.
        buffers: numbers in DeepSpeed's communication buffers.
        live, sub_group: most numbers that stage 3 keeps gathered, and that it updates at once.
        gathers_copy: whether weights are gathered into a copy, as gloo does.
    """

    stage: int | None = None
    processes: int = 1
    offload_optimizer: bool = False
    offload_weights: bool = False
    buffers: int = 0
    live: int = DEFAULT_LIVE
    sub_group: int = DEFAULT_SUB_GROUP
    gathers_copy: bool = False


@dataclass(frozen=True)
class HostMemory:
    """Bytes in the machine's memory that offloading takes, for each process."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        """Bytes altogether."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs on its GPU, or without one in the machine's memory.

    Attributes:
        weights: of the model, frozen and trained; under ZeRO-3 the share.
        gradients: of the trained parameters, at most.
        optimizer: its states, and the float32 copy of the trained weights that DeepSpeed keeps.
        buffers: for communication, and under ZeRO-3 what is gathered of the weights.
        activations: what the forward pass keeps for the backward pass; None where it was not traced.
        total: the most that is in use at any time; not the sum, since gradients come while activations go.
        host: what offloading takes besides.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int | None
    total: int
    host: HostMemory = HostMemory()


def estimate_memory(
    size: ModelSize,
    dtype: str,
    sharding: Sharding = Sharding(),
    trace: StepTrace | None = None,
    accumulates: bool = False,
    state_bytes: int = ADAMW_BYTES,
) -> MemoryEstimate:
    """Return what one process needs.

    Args:
        size: parameter counts.
        dtype: of the frozen weights, with DeepSpeed of all weights.
        sharding: how the processes share.
        trace: a step of this model in these dtypes; None: without activations.
        accumulates: whether a step takes several batches, so that gradients are there from the beginning.
        state_bytes: see `optimizer_state_bytes`.
    """
    width, kept = BYTES_PER_WEIGHT[dtype], trace.kept if trace else None
    if sharding.stage is not None:
        return _estimate_deepspeed(size, width, sharding, trace, accumulates, state_bytes)
    frozen = size.parameters - size.trained - size.quantized
    weights = frozen * width + size.quantized_bytes + size.trained * FLOAT32
    gradients = size.trained * FLOAT32
    optimizer = size.trained * state_bytes
    buffers = gradients if sharding.processes > 1 else 0
    step = max(gradients, trace.peak(FLOAT32, gradients if accumulates else 0) if trace else 0)
    return MemoryEstimate(weights, gradients, optimizer, buffers, kept, weights + optimizer + buffers + step)


def _estimate_deepspeed(
    size: ModelSize, width: int, sharding: Sharding, trace: StepTrace | None, accumulates: bool, state_bytes: int
) -> MemoryEstimate:
    stage, processes = sharding.stage, sharding.processes
    share = math.ceil(size.trained / processes) if stage else size.trained
    unquantized = size.parameters - size.quantized  # stage 3 has none in 4 bits
    weights = width * (math.ceil(unquantized / processes) if stage == 3 else unquantized) + size.quantized_bytes
    optimizer = share * (FLOAT32 + state_bytes)
    gradients = width * (size.trained if stage in (0, 1) else share)
    copies = width + (FLOAT32 if width < FLOAT32 else 0)  # of gradients, while the optimizer steps
    step = copies * (min(share, sharding.sub_group) if stage == 3 else share)
    is_gathered = stage == 3 and (processes > 1 or sharding.offload_weights)
    gathered = width * min(size.parameters, sharding.live) if is_gathered else 0
    buffers = width * sharding.buffers
    host = HostMemory()
    if sharding.offload_optimizer:
        largest = width * size.largest if stage != 3 else 0
        copied = width * share if stage != 3 else 0
        held = width if stage == 3 or accumulates else 0  # stage 3's buffer of gradients, stage 2's sum of them
        host = HostMemory(0, share * (FLOAT32 + held) + largest, optimizer + copied)
        buffers += largest
        gradients = optimizer = step = 0
    if sharding.offload_weights:
        host = HostMemory(weights, host.gradients, host.optimizer)
        weights = 0
    gathers = sharding.gathers_copy and stage in (1, 2) and processes > 1
    updates = width * size.trained if gathers else 0  # when the gradients are gone
    passes = gathered + (trace.peak(0) if trace else 0)
    total = weights + optimizer + buffers + max(gradients + passes, gradients + step, updates)
    return MemoryEstimate(weights, gradients, optimizer, buffers + gathered, trace.kept if trace else None, total, host)


def optimizer_state_bytes(name: str) -> int:
    """Return the bytes of an optimizer's states for one trained number, by its name in `training_args.optim`.

    AdamW keeps two float32 states, two bytes in its 8-bit variants; Lion, RMSprop and Adagrad one state; SGD none,
    Adafactor next to none (a row and a column of each matrix). Others are taken to be like AdamW.
    """
    if name.startswith(("sgd", "adafactor")):
        return 0
    states = 1 if any(part in name for part in ("lion", "rmsprop", "adagrad")) else 2
    return states * (1 if "8bit" in name else FLOAT32)


def read_sharding(
    settings: Mapping[str, Any] | None, processes: int, hidden_size: int, on_gpu: bool = True
) -> Sharding:
    """Return what a checked DeepSpeed JSON, completed for the machine, means for memory.

    Args:
        settings: the JSON's content; None: no DeepSpeed.
        processes: number of processes of the run.
        hidden_size: of the model; its square is the size of buffers that the JSON leaves "auto".
        on_gpu: whether the processes run on GPUs, over NCCL, or on CPUs, over gloo.
    """
    if settings is None:
        return Sharding(processes=processes)
    zero = settings.get("zero_optimization") or {}

    def number(key: str, default: int) -> int:
        value = zero.get(key, default)
        return hidden_size**2 if value == AUTO else int(value)

    def is_offloaded(key: str) -> bool:
        return find(settings, f"zero_optimization.{key}.device") in ("cpu", "nvme")

    stage = int(zero.get("stage", 0))
    bucket = number("reduce_bucket_size", DEFAULT_BUCKET) if stage else 0
    return Sharding(
        stage=stage,
        processes=processes,
        offload_optimizer=is_offloaded("offload_optimizer"),
        offload_weights=is_offloaded("offload_param"),
        buffers=bucket * (2 if stage < 3 and zero.get("overlap_comm") else 1),
        live=number("stage3_max_live_parameters", DEFAULT_LIVE),
        sub_group=number("sub_group_size", DEFAULT_SUB_GROUP),
        gathers_copy=not on_gpu,
    )


def measure_size(model: Any) -> ModelSize:
    """Return the parameter counts of a model, wrapped by PEFT or not; on the meta device is enough."""
    weights = list(model.parameters())
    trained = [weight.numel() for weight in weights if weight.requires_grad]
    quantized = [layer for layer in model.modules() if isinstance(layer, MetaLinear4bit)]
    return ModelSize(
        parameters=sum(weight.numel() for weight in weights),
        trained=sum(trained),
        largest=max(trained, default=0),
        quantized=sum(layer.weight.numel() for layer in quantized),
        quantized_bytes=sum(layer.stored_bytes for layer in quantized),
    )
