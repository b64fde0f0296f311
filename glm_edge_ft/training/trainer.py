"""The Seq2SeqTrainer of this project.

It differs from its parent in the order of training rows, the evaluation, how checkpoints and the final model are
written, and in what it does on a loss that is not finite, on SIGTERM and when it resumes. `RunCallback` does what
transformers has hooks for; private methods of the parent that are overridden are listed in tests/test_private_hooks.py.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Seq2SeqTrainer, StoppingCriteriaList
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
from glm_edge_ft.training.replies import GenerationContext, ImageFeatureSource
from glm_edge_ft.training.run_callback import RunCallback
from glm_edge_ft.training.sampling import LengthGroupedEpochSampler, plan_batches
from glm_edge_ft.training.termination import Terminated, Termination
from glm_edge_ft.training.weights import has_projection, load_encoder, prefix_from_state_dict, save_encoder

_NOT_BIT_EXACT = "the run goes on from it, but dropout will differ from the uninterrupted run"


class NonFiniteLossError(RunStopped):
    """The loss of a batch, or the gradient of a step, is NaN or infinite."""


class GlmEdgeTrainer(Seq2SeqTrainer):
    """Trains on encoded conversations, evaluates by loss and by generated replies.

    Args:
        generation_context: how prompts are batched, continued and turned into text.
        on_nonfinite_loss: stop with NonFiniteLossError, or warn and leave out steps whose gradient is not finite.
        complete_saved_folder: adds to a folder that was just saved what other tools need in it.
        write_records: writes the records of the run into a checkpoint.
        termination: whether the run was asked to end; None: it never is.
        max_tokens_per_pass: most tokens that go through the model at once in training; None: the whole batch.
        images: adds to batches what loader processes leave out of images; None: batches are complete.
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
        self.generation_context, self._warn = generation_context, generation_context.warn
        self.on_nonfinite_loss = on_nonfinite_loss
        self.complete_saved_folder = complete_saved_folder
        self.write_records = write_records
        self.termination = termination or Termination()
        self.max_tokens_per_pass = max_tokens_per_pass
        self.images = images
        self.evaluation_collator = evaluation_collator or kwargs["data_collator"]
        self._tokens_since_log = 0  # tokens of this process without padding, for the throughput in the log
        self._clock_since_log = 0.0  # time.perf_counter() of the last training line, moved on by every pause since
        self._use_cache_as_released = bool(kwargs["model"].config.use_cache)
        base: Any = kwargs["model"].get_base_model() if isinstance(kwargs["model"], PeftModel) else kwargs["model"]
        self._count_images = getattr(base.get_decoder(), "count_images", None)
        self.epoch_sampler: LengthGroupedEpochSampler | None = None
        self._staging: Path | None = None
        self.last_saved_step = 0
        self._nonfinite = self._counted_batches = 0
        self._loss_sum, self._loss_tokens = torch.zeros(()), torch.zeros((), dtype=torch.long)
        super().__init__(**kwargs)
        # Old checkpoints are removed here: the parent would remove the newest one of a finished run for the best.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.run_callback = RunCallback(self)
        self.add_callback(self.run_callback)
        self.label_smoother = None  # the model's own loss smooths labels; the parent's would need all logits

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        group_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.epoch_sampler = LengthGroupedEpochSampler(dataset.lengths, group_size, seed)
        return self.epoch_sampler

    def get_train_dataloader(self) -> DataLoader:
        """Return the parent's loader, whose processes leave Ctrl-C to the main process."""
        loader = super().get_train_dataloader()
        loader.worker_init_fn = functools.partial(start_loader_process, loader.worker_init_fn)
        return loader

    # ---- the training step ----

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Add up the gradients of the parts of the batch; check that the loss is finite."""
        self._clock_since_log = self._clock_since_log or time.perf_counter()
        mask = inputs.get("attention_mask")
        self._tokens_since_log += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        parts = [self._prepare_inputs(inputs)]
        if self.max_tokens_per_pass is not None and num_items_in_batch is not None:
            parts = split_batch(parts[0], self.max_tokens_per_pass, self._count_images)
        loss = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts, start=1):
            with self.accelerator.no_sync(model) if number < len(parts) else nullcontext():
                loss = loss + super().training_step(model, self._without_mask(part), num_items_in_batch)
        if not torch.isfinite(loss):
            self._report_nonfinite(f"the loss of step {self.state.global_step + 1} is {float(loss)}")
        return loss

    def _without_mask(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Remove the mask of rows padded on the right: causal attention needs none, and is faster without.

        For a trained prefix PEFT needs the mask, to lengthen it.
        """
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            return inputs
        return {name: values for name, values in inputs.items() if name != "attention_mask"}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs(self.images.add_image_features(inputs) if self.images else inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the parent does; a training line also gets this process's tokens per second, without pauses."""
        if "loss" in logs and self._tokens_since_log:
            now = time.perf_counter()
            logs["tokens_per_second"] = round(self._tokens_since_log / (now - self._clock_since_log), 1)
            self._tokens_since_log, self._clock_since_log = 0, now
        super().log(logs, start_time)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Leave the time of the block out of the training throughput."""
        start = time.perf_counter()
        yield
        if self._clock_since_log:
            self._clock_since_log += time.perf_counter() - start

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients before the optimizer's step; check that it is finite.

        In fp16 it may be infinite: accelerate or DeepSpeed then skip the step and scale the loss down.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            self._report_nonfinite(f"the gradient of step {self.state.global_step + 1} is {float(norm)}")
            if not self.is_deepspeed_enabled:
                model.zero_grad()  # the optimizer skips weights without gradient; a step with NaN would ruin them
        return norm

    def _report_nonfinite(self, what: str) -> None:
        self._nonfinite += 1
        advice = "lower training_args.learning_rate and start afresh, or train in bf16 or fp32 instead of fp16"
        if self.on_nonfinite_loss == "stop":
            raise NonFiniteLossError(f"{what}: {advice}")
        self._warn(f"{what} ({self._nonfinite} so far): {advice}")

    # ---- being stopped by SIGTERM ----

    def save_missing_checkpoint(self) -> None:
        """Save a checkpoint of the current step, even if the config asks for none, unless there is one."""
        if self.last_saved_step != self.state.global_step:
            self.args.save_only_model = False
            self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    # ---- evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the parent does. SIGTERM breaks it off: during training a checkpoint is then saved."""
        try:
            with self._pause():
                return super().evaluate(*args, **kwargs)
        except Terminated:
            if self.is_in_train:
                self.save_missing_checkpoint()
                self.run_callback.raise_terminated()
            raise

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return batches of rows of similar length; all ranks get equally many, surplus ones are not counted."""
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

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[None, None, None]:
        """Add the batch's summed loss and its number of supervised tokens to the totals; compute no logits."""
        self.termination.stop_evaluation()
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

        The parent averages batch means, and for decoder-only models generates from rows that include the reference.
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
                    self.termination.stop_evaluation,
                )
                context = replace(self.generation_context, options={**self.generation_context.options, **breaks_off})
                name = f"{metric_key_prefix}-{self.state.global_step}.jsonl"
                predictions_file = Path(self.args.output_dir) / PREDICTIONS_FOLDER / name
                scores = generate_and_score(self.model, workload, context, predictions_file)
            if self.termination.poll_stop():  # the last replies may have been broken off
                raise Terminated("by SIGTERM in an evaluation")
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        metrics |= {
            key: value for key, value in (output.metrics or {}).items() if not key.endswith("_model_preparation_time")
        }
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=len(data))

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write the checkpoint under another name, complete it, then rename it (whole or invisible)."""
        self.control.should_evaluate |= self.run_callback.owes_evaluation  # kept in the state, see `RunCallback`
        with self._pause(), self._staging_folder() as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            output_dir = Path(self.args.output_dir)
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(output_dir / f"checkpoint-{self.state.best_global_step}")
            if self.args.should_save:
                staged = staging / f"checkpoint-{self.state.global_step}"
                self.state.save_to_json(str(staged / STATE_FILE))  # again, with the best checkpoint's final path
                self.write_records(staged)
                publish(staged, output_dir)
                self.remove_old_checkpoints()
        self.last_saved_step = self.state.global_step

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the parent does; without `output_dir` into the output folder, whole or not at all.

        Under ZeRO-3 all processes must call this; only rank 0 writes.
        """
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        with self._staging_folder() as staging:
            super().save_model(str(staging / FINAL_FOLDER), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_final_model(staging / FINAL_FOLDER, Path(self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @contextmanager
    def _staging_folder(self) -> Iterator[Path]:
        """Yield a folder to write into, in all processes at once; remove it where the block fails."""
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

    def remove_old_checkpoints(self) -> None:
        """Keep `save_total_limit` checkpoints."""
        if self.args.should_save:
            best_step = self.state.best_global_step
            remove_old_checkpoints(Path(self.args.output_dir), self.save_total_limit, best_step)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights or adapter, tokenizer and generation config, so that the folder loads, and stops, by itself."""
        folder = Path(output_dir or self.args.output_dir)
        self.model.config.use_cache = self._use_cache_as_released
        try:
            with prefix_from_state_dict(self.model, state_dict):
                super()._save(str(folder), state_dict)
            if self.args.should_save:
                if has_projection(self.model) and self._staging is not None:
                    save_encoder(self.model, state_dict, folder)
                (folder / "README.md").unlink(missing_ok=True)  # PEFT's card, a form with nothing filled in
                self.model.generation_config.save_pretrained(folder)  # PEFT saves none beside an adapter
                (folder / "training_args.bin").unlink()  # a pickle; run.json is the record of a run
                self.complete_saved_folder(folder)
        finally:
            self.model.config.use_cache = self.args.use_cache

    # ---- resuming ----

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

    def find_best_checkpoint(self) -> None:
        """Set the path of the best checkpoint; the state has the one at which it was written."""
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
            if not best.is_dir() and self.args.load_best_model_at_end:
                self.state.best_global_step = self.state.best_metric = None
                self._warn(f"{best}, the best checkpoint so far, is gone: the best of what follows counts")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random state; without a readable one the run goes on, with a notice that it is not bit-exact."""
        if checkpoint is not None and not list(Path(checkpoint).glob(f"{RANDOM_STATE_PREFIX}*")):
            self._warn(f"{checkpoint} holds no random state: {_NOT_BIT_EXACT}")
            return
        try:
            super()._load_rng_state(checkpoint)
        except Exception as error:  # torch.load raises whatever the broken bytes lead to
            reason = type(error).__name__
            self._warn(f"the random state in {checkpoint} cannot be read ({reason}): {_NOT_BIT_EXACT}")
