"""Do the checkpoints fit on the disk? An estimate of what a run will write, beside the free space."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from glm_edge_ft.files import format_bytes, free_bytes
from glm_edge_ft.run import rows_per_step
from glm_edge_ft.training.checkpoints import read_step

if TYPE_CHECKING:
    from glm_edge_ft.run import Prepared

SMALL_FILES = 100_000  # bytes of configs, states, random state; the tokenizer is measured


@dataclass(frozen=True)
class DiskNeed:
    """What a run will write, in bytes.

    Attributes:
        checkpoint: of one checkpoint: weights, optimizer states, tokenizer.
        checkpoints: most of them at one time, the one that is being written included.
        final: of the final model.
        free: what is free in the output folder's place now.
        limit: `save_total_limit`.
    """

    checkpoint: int
    checkpoints: int
    final: int
    free: int
    limit: int | None

    @property
    def total(self) -> int:
        """Bytes altogether."""
        return self.checkpoint * self.checkpoints + self.final


def estimate_disk(prepared: Prepared) -> DiskNeed:
    """Estimate what the rest of the run writes, and ask the disk what it has."""
    args, tokenizer = prepared.training_arguments, prepared.checkpoint.folder / "tokenizer.json"
    trained, parameters = prepared.parameters
    saved = parameters if prepared.plan.config.peft_config is None else trained
    weights = saved * (2 if args.deepspeed and (args.bf16 or args.fp16) else 4)  # else they are saved in float32
    states = prepared.memory.optimizer * (args.world_size if args.deepspeed else 1)
    final = weights + SMALL_FILES + (tokenizer.stat().st_size if tokenizer.is_file() else 0)
    limit = args.save_total_limit if args.save_total_limit and args.save_total_limit > 0 else None
    count = count_checkpoints(prepared)
    if limit is not None:
        count = min(count, limit + 1 + int(bool(args.load_best_model_at_end and limit == 1)))
    checkpoint = final + (0 if args.save_only_model else states)
    return DiskNeed(checkpoint, count, final, free_bytes(prepared.plan.output_dir), limit)


def count_checkpoints(prepared: Prepared) -> int:
    """Return how many checkpoints the run will write from where it starts."""
    args, resumed = prepared.training_arguments, prepared.plan.resume.path
    steps_per_epoch = max(1, -(-len(prepared.datasets["train"]) // rows_per_step(args)))
    steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * steps_per_epoch)
    first = read_step(resumed) if resumed is not None else 0
    strategy = getattr(args.save_strategy, "value", str(args.save_strategy))
    if strategy == "no" or first >= steps:
        return 0
    if strategy == "steps":
        every = max(1, int(args.save_steps if args.save_steps >= 1 else args.save_steps * steps))
        return max(1, steps // every - first // every)
    return max(1, -(-(steps - first) // steps_per_epoch))


def describe_disk(need: DiskNeed) -> str:
    """Return one line: what the run writes, and what is free."""
    count = "1 checkpoint" if need.checkpoints == 1 else f"{need.checkpoints:,} checkpoints"
    return (
        f"disk: about {format_bytes(need.total)} ({count} of {format_bytes(need.checkpoint)} at a time, and the final "
        f"model); {format_bytes(need.free)} are free"
    )


def advise_on_disk(need: DiskNeed) -> str | None:
    """Return what to change where the checkpoints do not fit; None where they do."""
    if need.total <= need.free:
        return None
    fitting = int((need.free - need.final) // need.checkpoint) - 1
    way = "make room, or name another training_args.output_dir"
    if fitting >= 1:
        way = f"training_args.save_total_limit {need.limit or 'null'} -> {fitting}, or make room"
    return f"disk: about {format_bytes(need.total)} are more than the {format_bytes(need.free)} that are free: {way}"


def disk_facts(need: DiskNeed) -> dict[str, Any]:
    """Return the estimate for JSON, in bytes."""
    return {**asdict(need), "total": need.total, "fits": need.total <= need.free}
