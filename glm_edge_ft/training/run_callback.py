"""What the trainer does at the hooks that transformers has for callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from transformers import TrainerCallback, TrainerControl, TrainerState

from glm_edge_ft.training.termination import Terminated


class RunCallback(TrainerCallback):
    """Orders the rows of each epoch, takes over a checkpoint, and ends the run at SIGTERM.

    At SIGTERM the run ends after its step, with a whole checkpoint. An evaluation that is due is left out; the
    checkpoint's TrainerControl says so, and a resumed run begins with it.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer  # a GlmEdgeTrainer, whose module imports this one
        self.is_stopping = self.owes_evaluation = self.begins_with_evaluation = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Replace what the loaded state has from the earlier run: intervals by the config's, paths by today's."""
        state.compute_steps(args, state.max_steps)
        self.trainer.last_saved_step = state.global_step  # of the checkpoint, or 0
        self.trainer.find_best_checkpoint()
        if state.global_step > 0:  # a kill may have come between a new checkpoint and the removal of an old one
            self.trainer.remove_old_checkpoints()
        stored: Any = state.stateful_callbacks  # its annotation is that of the constructor's argument
        was_due = stored.get("TrainerControl", {}).get("args", {}).get("should_evaluate", False)
        self.begins_with_evaluation = was_due and args.eval_strategy != "no" and self.trainer.eval_dataset is not None

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell the sampler the epoch, which accelerate does for one process only; make up for an evaluation."""
        if self.trainer.epoch_sampler is not None:
            self.trainer.epoch_sampler.set_epoch(int(state.epoch or 0))
        if self.begins_with_evaluation:
            self.begins_with_evaluation = False
            control.should_evaluate = True
            model = self.trainer.model_wrapped
            self.trainer._maybe_log_save_evaluate(self.trainer._tr_loss, None, model, None, 0.0, None, 0.0)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let the trainer save and not evaluate, where any process was asked to end."""
        if self.trainer.termination.poll_stop():
            ends_epoch = state.epoch is not None and state.epoch == int(state.epoch)
            self.owes_evaluation = control.should_evaluate or (args.eval_strategy == "epoch" and ends_epoch)
            self.is_stopping = True
            control.should_evaluate, control.should_save, args.save_only_model = False, True, False

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the run after the checkpoint that `on_step_end` asked for."""
        if self.is_stopping:
            self.raise_terminated()

    def raise_terminated(self) -> NoReturn:
        """Say after which step SIGTERM ended training, and how it goes on."""
        state, folder = self.trainer.state, Path(self.trainer.args.output_dir)
        if state.global_step == 0:
            raise Terminated("by SIGTERM before the first step; there was nothing to save")
        raise Terminated(
            f"by SIGTERM after step {state.global_step} of {state.max_steps}; "
            f"{folder / f'checkpoint-{state.global_step}'} is whole and the same command with `yes` as RESUME goes on "
            "from it"
        )
