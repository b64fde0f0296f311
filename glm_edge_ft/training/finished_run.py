"""A finished run: what it came to, and how a run that is resumed without steps left evaluates its model again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from transformers import TrainerState
from transformers.integrations.deepspeed import deepspeed_init, is_deepspeed_zero3_enabled

from glm_edge_ft.training.checkpoints import STATE_FILE
from glm_edge_ft.training.trainer import GlmEdgeTrainer
from glm_edge_ft.training.weights import load_sharded_weights


def has_steps_left(trainer: GlmEdgeTrainer, checkpoint: Path) -> bool:
    """Return whether training from `checkpoint` would take any step under today's config."""
    max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return bool(state["global_step"] < max_steps)


def restore(trainer: GlmEdgeTrainer, checkpoint: Path) -> None:
    """Load the weights and the state of a finished run's checkpoint, to evaluate it without training."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    trainer.state.is_local_process_zero = trainer.is_local_process_zero()  # rank 0 wrote the state of all
    trainer.state.is_world_process_zero = trainer.is_world_process_zero()
    trainer.find_best_checkpoint()
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    source = Path(best) if best is not None else checkpoint
    if is_deepspeed_zero3_enabled() and not isinstance(trainer.model, PeftModel):
        load_sharded_weights(trainer.model, source)
    else:
        trainer._load_from_checkpoint(str(source))
    if is_deepspeed_zero3_enabled():
        deepspeed_init(trainer, num_training_steps=0, inference=True)
        trainer.model_wrapped = trainer.deepspeed = trainer.accelerator.prepare(trainer.model)
    else:  # each process has the whole model; DeepSpeed evaluates only sharded ones
        trainer.is_deepspeed_enabled = False
    trainer.remove_old_checkpoints()


def final_step(trainer: GlmEdgeTrainer) -> int:
    """Return the step whose weights the model has after training: the best one's where the best is loaded."""
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return best or trainer.state.global_step


def best_or_last_evaluation(trainer: GlmEdgeTrainer) -> Mapping[str, float] | None:
    """Return the log event of the evaluation of the model that was kept, else of the last one, or None."""
    evaluations = [event for event in trainer.state.log_history if "eval_loss" in event]
    of_final_step = [event for event in evaluations if event["step"] == final_step(trainer)]
    return next(reversed(of_final_step or evaluations), None)
