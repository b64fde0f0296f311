"""The Seq2SeqTrainer of this project.

It differs from its parent in six places, each for a reason that its method states: the order of training rows, what
an evaluation is, how checkpoints and the final model are written, what happens on a loss that is not finite, what
SIGTERM does, and what a resumed run takes over.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Seq2SeqTrainer, StoppingCriteriaList, TrainerState
from transformers.integrations.deepspeed import deepspeed_init, is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from glm_edge_ft import IGNORE_INDEX
from glm_edge_ft.errors import RunStopped
from glm_edge_ft.training.checkpoints import (
    FINAL_FOLDER,
    PREDICTIONS_FOLDER,
    RANDOM_STATE_PREFIX,
    STATE_FILE,
    publish,
    publish_final_model,
    remove_old_checkpoints,
    remove_unfinished,
    staging_folder,
)
from glm_edge_ft.training.evaluation import RankWorkload, StopOnTermination, generate_and_score, start_loader_process
from glm_edge_ft.training.micro_batches import split_batch
from glm_edge_ft.training.replies import GenerationContext
from glm_edge_ft.training.sampling import LengthGroupedEpochSampler, plan_batches
from glm_edge_ft.training.termination import Terminated, Termination
from glm_edge_ft.training.weights import (
    has_projection,
    load_encoder,
    load_sharded_weights,
    prefix_from_state_dict,
    save_encoder,
)

_NOT_BIT_EXACT = "the run goes on from it, but dropout will differ from the uninterrupted run"


class NonFiniteLossError(RunStopped):
    """The loss of a batch, or the gradient of a step, is NaN or infinite."""


class ImageFeatureSource(Protocol):
    """What adds to a batch what the loader's processes leave out, and may keep it for later batches."""

    def add_image_features(self, batch: Mapping[str, Any]) -> dict[str, Any]: ...
    def remove(self) -> None: ...


class GlmEdgeTrainer(Seq2SeqTrainer):
    """Trains on encoded conversations, evaluates by loss and by generated replies.

    Args:
        generation_context: how prompts are batched, continued and turned into text.
        on_nonfinite_loss: stop with NonFiniteLossError, or warn and leave out the steps whose gradient is not finite.
        complete_saved_folder: adds to a folder that was just saved what other tools need in it.
        write_records: writes what is to be known of the run into a checkpoint.
        termination: whether the run was asked to end; None: it never will be.
        max_tokens_per_pass: most tokens that go through the model at once in training; None: the whole batch.
        images: completes batches by what the loader's processes leave out of images; None: batches are complete.
        evaluation_collator: makes the padded batches whose loss is evaluated; None: `data_collator` does.
        kwargs: those of Seq2SeqTrainer. `train_dataset` needs `lengths`; evaluation datasets are EvaluationData.
    """

    model: Any  # the parent's unions say less than what is known here
    args: Any

    def __init__(
        self,
        *,
        generation_context: GenerationContext,
        on_nonfinite_loss: Literal["stop", "warn"] = "stop",
        complete_saved_folder: Callable[[Path], None],
        write_records: Callable[[Path], None] = lambda folder: None,
        termination: Termination | None = None,
        max_tokens_per_pass: int | None = None,
        images: ImageFeatureSource | None = None,
        evaluation_collator: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.generation_context = generation_context
        self.on_nonfinite_loss = on_nonfinite_loss
        self.complete_saved_folder = complete_saved_folder
        self.write_records = write_records
        self.termination = termination or Termination()
        self.max_tokens_per_pass = max_tokens_per_pass
        self.images = images
        self.evaluation_collator = evaluation_collator or kwargs["data_collator"]
        self._tokens_since_log = 0  # real (non-pad) tokens of this process, for the throughput in the log
        self._clock_since_log = 0.0  # time.perf_counter() of the last training line, moved on by every pause since
        self._use_cache_as_released = bool(kwargs["model"].config.use_cache)
        self._epoch_sampler: LengthGroupedEpochSampler | None = None
        self._staging: Path | None = None
        self._last_saved_step = 0
        self._nonfinite = 0
        self._owes_evaluation = False
        self._counted_batches = 0
        self._loss_sum = torch.zeros(())
        self._loss_tokens = torch.zeros((), dtype=torch.long)
        super().__init__(**kwargs)
        self.label_smoother = None  # the model's own loss smooths labels; the parent's would need all logits

    # ---- order of training rows ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        group_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._epoch_sampler = LengthGroupedEpochSampler(dataset.lengths, group_size, seed)
        return self._epoch_sampler

    def get_train_dataloader(self) -> DataLoader:
        """Return the parent's loader, whose processes leave Ctrl-C to the main process."""
        loader = super().get_train_dataloader()
        loader.worker_init_fn = functools.partial(start_loader_process, loader.worker_init_fn)
        return loader

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]  # called with keywords alone
        if self._epoch_sampler is not None:
            self._epoch_sampler.set_epoch(kwargs["epoch"])
        if self._owes_evaluation:
            self._make_up_for_evaluation(kwargs["model"], kwargs["epoch"], kwargs["start_time"])
        super()._run_epoch(**kwargs)

    # ---- the training step ----

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Add up the batch's gradients, as the parent does, in parts; see to it that the loss is finite (M4)."""
        self._clock_since_log = self._clock_since_log or time.perf_counter()
        mask = inputs.get("attention_mask")
        self._tokens_since_log += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        loss = torch.zeros((), device=self.args.device)
        parts = self._parts_of(self._prepare_inputs(inputs), num_items_in_batch)
        *others, last = [self._without_mask(part) for part in parts]
        for part in others:
            with self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, part, num_items_in_batch)
        loss = loss + super().training_step(model, last, num_items_in_batch)
        if not torch.isfinite(loss):
            self._report_nonfinite(f"the loss of step {self.state.global_step + 1} is {float(loss)}")
        return loss

    def _parts_of(self, inputs: dict[str, Any], num_items_in_batch: Any) -> list[dict[str, Any]]:
        if self.max_tokens_per_pass is None or num_items_in_batch is None:
            return [inputs]
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return split_batch(inputs, self.max_tokens_per_pass, getattr(model.get_decoder(), "count_images", None))

    def _without_mask(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Leave out the mask of rows that are padded on the right: no token sees what stands to its right anyway.

        Attention then needs no matrix to look up who sees whom. A trained prefix stands to the left of all rows, and
        PEFT wants the mask to lengthen it.
        """
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            return inputs
        return {name: values for name, values in inputs.items() if name != "attention_mask"}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs(self.images.add_image_features(inputs) if self.images else inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the parent does; a training line also gets this process's real tokens per second, pauses left out."""
        if "loss" in logs and self._tokens_since_log:
            now = time.perf_counter()
            logs["tokens_per_second"] = round(self._tokens_since_log / (now - self._clock_since_log), 1)
            self._tokens_since_log, self._clock_since_log = 0, now
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save as the parent does, and keep the time of it out of the training throughput."""
        start = time.perf_counter()
        if self.termination.agreed():
            self._log_and_stop(*args, **kwargs)
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except Terminated:  # in the middle of the evaluation
            self._save_and_stop()
        now = time.perf_counter()
        self._clock_since_log = self._clock_since_log + now - start if self._tokens_since_log else now

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients before they are used; see to it that it is finite (M4).

        In fp16 it may be infinite: the step is then left out and the loss scaled down, by accelerate or DeepSpeed.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            self._report_nonfinite(f"the gradient of step {self.state.global_step + 1} is {float(norm)}")
            if not self.is_deepspeed_enabled:
                model.zero_grad()  # the optimizer passes over weights without gradient: a step with NaN would end them
        return norm

    def _report_nonfinite(self, what: str) -> None:
        self._nonfinite += 1
        advice = "lower training_args.learning_rate and start afresh, or train in bf16 or fp32 instead of fp16"
        if self.on_nonfinite_loss == "stop":
            raise NonFiniteLossError(f"{what}: {advice}")
        self.generation_context.warn(f"{what} ({self._nonfinite} so far): {advice}")

    # ---- being stopped by SIGTERM ----

    def _log_and_stop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """End after this step. An evaluation that is due is left out: the checkpoint says so, and resuming makes up."""
        is_due = self.control.should_evaluate
        self.control.should_evaluate = self.control.should_save = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.control.should_evaluate = is_due
        self._save_and_stop()

    def _save_and_stop(self) -> NoReturn:
        self.save_missing_checkpoint()
        step, folder = self.state.global_step, Path(self.args.output_dir)
        raise Terminated(
            f"by SIGTERM after step {step} of {self.state.max_steps}; {folder / f'checkpoint-{step}'} is whole and the "
            "same command with `yes` as RESUME goes on from it"
        )

    def save_missing_checkpoint(self) -> None:
        """Save a checkpoint of the step that was reached, also where the config asks for none, unless there is one."""
        if self._last_saved_step == self.state.global_step:
            return
        self.args.save_only_model = False
        self._save_checkpoint(self.model_wrapped, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _stop_evaluation_if_asked(self) -> None:
        if self.termination.agreed_before():
            raise Terminated("by SIGTERM in an evaluation")

    def _was_stopped_before_evaluation(self) -> bool:
        """Return whether the checkpoint that is resumed from says that an evaluation was due, and its log has none."""
        stored: Any = self.state.stateful_callbacks
        was_due = stored.get("TrainerControl", {}).get("args", {}).get("should_evaluate", False)
        log = [event for event in self.state.log_history if event["step"] == self.state.global_step]
        wants_evaluation = self.args.eval_strategy != "no" and self.eval_dataset is not None
        return was_due and wants_evaluation and not any("eval_loss" in event for event in log)

    def _make_up_for_evaluation(self, model: torch.nn.Module, epoch: float, start_time: float) -> None:
        """Do the evaluation that SIGTERM took from the step of the checkpoint."""
        self._owes_evaluation = False
        self.control.should_evaluate = True
        self._maybe_log_save_evaluate(self._tr_loss, None, model, None, epoch, None, start_time)
        self.control.should_evaluate = False

    # ---- evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return batches of rows of similar length for the loss; every rank gets as many, a surplus counts nowhere."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        mine, self._counted_batches = plan_batches(
            dataset.lengths, self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        )
        return DataLoader(
            dataset,
            batch_sampler=mine,
            collate_fn=self.evaluation_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=functools.partial(start_loader_process, None),
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # its own: an evaluation must not move the training's random state
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return what `get_eval_dataloader` returns."""
        return self.get_eval_dataloader(test_dataset)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **_: Any,
    ) -> tuple[None, None, None]:
        """Add the batch's summed loss and its number of supervised tokens to the totals; no logits are made."""
        self._stop_evaluation_if_asked()
        inputs = self._without_mask(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            mean = model(**inputs).loss.detach().float()
        count = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        if self._counted_batches > 0:
            self._counted_batches -= 1
            self._loss_sum = self._loss_sum.to(mean.device) + mean * count
            self._loss_tokens = self._loss_tokens.to(mean.device) + count
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the loss per supervised token over all rows and, with `predict_with_generate`, the scores of replies.

        The parent averages batch means, which depends on the batch size, and for decoder-only models generates from the
        whole row, reference included. Here the loss is a sum over all tokens divided by their number, and replies are
        generated from prompts that end at the assistant marker.
        """
        data: Any = dataloader.dataset
        self._loss_sum, self._loss_tokens = torch.zeros(()), torch.zeros((), dtype=torch.long)
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        totals = torch.stack([self._loss_sum.double(), self._loss_tokens.double()]).to(self.args.device)
        loss_sum, tokens = self.accelerator.reduce(totals, reduction="sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / tokens}
        if self.args.predict_with_generate and data.prompts:
            self.model.eval()
            breaks_off = {"stopping_criteria": StoppingCriteriaList([StopOnTermination(self.termination)])}
            with self.accelerator.autocast():  # as in training: parts of a 16-bit model may be in float32
                workload = RankWorkload(
                    data.prompts,
                    self.args.per_device_eval_batch_size,
                    self.args.device,
                    self.args.process_index,
                    self.args.world_size,
                    self._stop_evaluation_if_asked,
                )
                context = replace(self.generation_context, options={**self.generation_context.options, **breaks_off})
                predictions_file = self._predictions_file(metric_key_prefix)
                scores = generate_and_score(self.model, workload, context, predictions_file)
            if self.termination.agreed():  # the last replies may have been broken off
                raise Terminated("by SIGTERM in an evaluation")
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        metrics |= {
            key: value for key, value in (output.metrics or {}).items() if not key.endswith("_model_preparation_time")
        }
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=len(data))

    def _predictions_file(self, prefix: str) -> Path:
        return Path(self.args.output_dir) / PREDICTIONS_FOLDER / f"{prefix}-{self.state.global_step}.jsonl"

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write the checkpoint under another name, complete it, then rename it (whole or invisible)."""
        with self._empty_staging_folder() as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            self._publish_checkpoint(Path(self.args.output_dir), staging)
        self._last_saved_step = self.state.global_step

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the parent does; into the output folder, where none is named, whole or not at all.

        Under ZeRO-3 all processes must call this, to give their shares; rank 0 alone writes.
        """
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        with self._empty_staging_folder() as staging:
            super().save_model(str(staging / FINAL_FOLDER), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_final_model(staging / FINAL_FOLDER, Path(self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @contextmanager
    def _empty_staging_folder(self) -> Iterator[Path]:
        """Give all processes at once a folder to write into; where that fails, nothing of it stays."""
        output_dir = Path(self.args.output_dir)
        if self.args.should_save:
            remove_unfinished(output_dir)
        self.accelerator.wait_for_everyone()
        try:
            yield staging_folder(output_dir)
        except BaseException:
            if self.args.should_save:
                remove_unfinished(output_dir)  # on a full disk its room is needed
            raise
        self.accelerator.wait_for_everyone()

    def _publish_checkpoint(self, output_dir: Path, staging: Path) -> None:
        step = self.state.global_step
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(output_dir / f"checkpoint-{self.state.best_global_step}")
        if self.args.should_save:
            staged = staging / f"checkpoint-{step}"
            self.state.save_to_json(
                str(staged / STATE_FILE)
            )  # again: it now names the best checkpoint by its final path
            self.write_records(staged)
            publish(staged, output_dir)
            self._remove_old_checkpoints()

    def _remove_old_checkpoints(self) -> None:
        if self.args.should_save:
            output_dir = Path(self.args.output_dir)
            remove_old_checkpoints(output_dir, self.args.save_total_limit, self.state.best_global_step)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """End training as the parent does, which with a limit of one would remove the newest checkpoint for the best.

        A finished run is known by its newest checkpoint: without it `yes` would train the last steps again.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights or adapter, tokenizer and generation config, so that the folder loads, and stops, by itself."""
        folder = output_dir if output_dir is not None else self.args.output_dir
        self.model.config.use_cache = self._use_cache_as_released
        try:
            with prefix_from_state_dict(self.model, state_dict):
                super()._save(folder, state_dict)
            if self.args.should_save:
                if has_projection(self.model) and self._staging is not None:
                    save_encoder(self.model, state_dict, Path(folder))
                (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's card, a form with nothing filled in
                self.model.generation_config.save_pretrained(folder)  # PEFT saves none beside an adapter
                (Path(folder) / "training_args.bin").unlink()  # a pickle; run.json is the record of a run
                self.complete_saved_folder(Path(folder))
        finally:
            self.model.config.use_cache = self.args.use_cache

    # ---- resuming ----

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Take the counters from the checkpoint, the intervals of logging, saving, evaluating from the config."""
        progress = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        self._last_saved_step = self.state.global_step  # of the checkpoint, or 0
        self._find_best_again()
        if self._last_saved_step:  # a kill may have come between a new checkpoint and the removal of an old one
            self._remove_old_checkpoints()
        self._owes_evaluation = self._was_stopped_before_evaluation()
        return progress

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if has_projection(self.model):
            load_encoder(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if has_projection(self.model) and not self.is_deepspeed_enabled:
            load_encoder(self.model, Path(self.state.best_model_checkpoint or ""))
        else:
            super()._load_best_model()

    def _find_best_again(self) -> None:
        """Take the best checkpoint where it lies now: the state names it as it was called when it was written."""
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
            if not best.is_dir() and self.args.load_best_model_at_end:
                self.state.best_global_step = self.state.best_metric = None
                self.generation_context.warn(
                    f"{best}, the best checkpoint so far, is gone: the best of what follows counts"
                )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random state; without a readable one the run goes on and says that it is not bit-exact (R6)."""
        if checkpoint is not None and not list(Path(checkpoint).glob(f"{RANDOM_STATE_PREFIX}*")):
            self.generation_context.warn(f"{checkpoint} holds no random state: {_NOT_BIT_EXACT}")
            return
        try:
            super()._load_rng_state(checkpoint)
        except Exception as error:  # torch.load raises whatever the broken bytes lead to
            self.generation_context.warn(
                f"the random state in {checkpoint} cannot be read ({type(error).__name__}): {_NOT_BIT_EXACT}"
            )

    def has_steps_left(self, checkpoint: Path) -> bool:
        """Return whether training from `checkpoint` would take any step under today's config (R4)."""
        max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        return bool(state["global_step"] < max_steps)

    def restore(self, checkpoint: Path) -> None:
        """Load the weights and the state of a finished run's checkpoint, to evaluate it without training."""
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        self.state.is_local_process_zero = self.is_local_process_zero()  # rank 0 wrote the state of all
        self.state.is_world_process_zero = self.is_world_process_zero()
        self._find_best_again()
        best = self.state.best_model_checkpoint
        keeps_best = self.args.load_best_model_at_end and best is not None and Path(best).is_dir()
        source = Path(best) if keeps_best and best is not None else checkpoint
        if is_deepspeed_zero3_enabled() and not isinstance(self.model, PeftModel):
            load_sharded_weights(self.model, source)
        else:
            self._load_from_checkpoint(str(source))
        if is_deepspeed_zero3_enabled():
            deepspeed_init(self, num_training_steps=0, inference=True)
            self.model_wrapped = self.deepspeed = self.accelerator.prepare(self.model)
        else:  # each process holds the whole model; DeepSpeed evaluates none but shared ones
            self.is_deepspeed_enabled = False
        self._remove_old_checkpoints()

    def final_step(self) -> int:
        """Return the step whose weights the model holds after training: the best one's where the best is loaded."""
        if self.args.load_best_model_at_end and self.state.best_global_step:
            return self.state.best_global_step
        return self.state.global_step

    def best_or_last_evaluation(self) -> Mapping[str, float] | None:
        """Return the log event of the evaluation of the model that was kept, else of the last one, or None."""
        evaluations = [event for event in self.state.log_history if "eval_loss" in event]
        of_final_step = [event for event in evaluations if event["step"] == self.final_step()]
        candidates = of_final_step or evaluations
        return candidates[-1] if candidates else None
