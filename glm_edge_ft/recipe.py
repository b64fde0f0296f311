"""The run, read from top to bottom: config, checks, data, model, training, evaluation, saving.

Supports: chat models with a prefix-consistent template, and GLM-Edge-V with images; LORA, PREFIX_TUNING and full
fine-tuning; one process, or the ranks that torchrun starts; resuming; evaluation by loss and by generated replies. Does
not support: streaming data, preference training, models whose weights are not safetensors.

Nothing heavy is imported before `check_inputs` has found the command line right.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from glm_edge_ft.checks.arguments import tokens_per_pass
from glm_edge_ft.checks.disk import advise_on_disk, estimate_disk
from glm_edge_ft.checks.environment import quiet_libraries, use_one_gpu
from glm_edge_ft.checks.machines import check_same_on_all_machines
from glm_edge_ft.checks.preflight import check_inputs, prepare, processes_of
from glm_edge_ft.checks.processes import write_processes
from glm_edge_ft.checks.summary import (
    build_run_record,
    describe_computation,
    describe_model,
    note_untested_versions,
    show_check,
    show_preview,
    write_run_record,
)
from glm_edge_ft.console import show, show_notice
from glm_edge_ft.distributed import barrier, close_control_group, explain_peer_failure, is_main_process
from glm_edge_ft.errors import RunStopped
from glm_edge_ft.failures import explain_failures
from glm_edge_ft.files import lock_folder, make_folder
from glm_edge_ft.run import (
    Plan,
    Prepared,
    RunRequest,
    build_collator,
    build_generation_context,
    complete_images,
    load_evaluations,
)
from glm_edge_ft.training.checkpoints import (
    CURVE_FILE,
    METRICS_FILE,
    PREDICTIONS_FOLDER,
    RUN_RECORD,
    how_to_go_on,
    remove_unfinished,
    set_aside,
    set_aside_earlier_run,
)
from glm_edge_ft.training.deepspeed import init_deepspeed, skip_deepspeed_import
from glm_edge_ft.training.termination import Terminated, Termination

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from glm_edge_ft.model.packed_attention import Attention
    from glm_edge_ft.training.replies import EvaluationData
    from glm_edge_ft.training.trainer import GlmEdgeTrainer


def run(request: RunRequest) -> None:
    """Do what the command line asks for.

    Raises:
        UserError: the input is wrong; nothing was trained and nothing written over.
        RunStopped: the run cannot go on, for a reason that its message gives.
    """
    with Termination() as termination:
        plan = check_inputs(request)
        quiet_libraries()
        if notice := note_untested_versions():
            show_notice(notice)
        if notice := use_one_gpu(plan.config.training_args):
            show_notice(notice)
        barrier(plan.config.training_args.get("ddp_timeout", 1800))
        prepared = prepare(plan)
        barrier()
        if request.check:
            show_check(prepared)
        if request.preview is not None:
            show_preview(prepared)
        if not request.check and request.preview is None:
            with explain_failures(prepared):
                train(prepared, termination)


def train(prepared: Prepared, termination: Termination) -> None:
    """Train, evaluate, predict and save, as the config says."""
    plan = prepared.plan
    evaluations = load_evaluations(prepared)
    for split, dataset in prepared.datasets.items():
        for remark in dataset.report.remarks():
            show_notice(f"{split}: {remark}")
    key = "training_args.output_dir"
    make_folder(plan.output_dir, key)
    with lock_folder(plan.output_dir, key) if is_main_process() else contextlib.nullcontext():
        rows = {split: [len(data), zlib.crc32(data.lengths.tobytes())] for split, data in prepared.datasets.items()}
        rows |= {f"prompts of {split}": [len(data.prompts)] for split, data in evaluations.items()}
        with explain_peer_failure(functools.partial(how_to_go_on, plan.output_dir, on_all_machines=True)):
            check_same_on_all_machines(plan.output_dir, plan.resume.path.name if plan.resume.path else None, rows)
            close_control_group()
            train_together(prepared, evaluations, termination)


def train_together(prepared: Prepared, evaluations: dict[str, EvaluationData], termination: Termination) -> None:
    """Read the weights and do what is left, all processes at the same pace from here on."""
    plan = prepared.plan
    if notice := advise_on_disk(estimate_disk(prepared)):
        show_notice(notice)
    record = build_run_record(prepared)

    def write_records(checkpoint: Path) -> None:
        write_processes(checkpoint, processes_of(plan))
        write_run_record(record, checkpoint)

    trainer = build_trainer(prepared, evaluations, termination, write_records)
    record["computed"], lines = describe_computation(trainer, attention_of(prepared).description)
    show(f"{describe_model(prepared)}\n{lines}")
    termination.defer(trainer.args.device)  # from here on SIGTERM may find something worth saving
    make_room(plan)  # not before all that can go wrong has gone right: an earlier run stays where it is until then
    write_run_record(record, plan.output_dir)
    try:
        train_and_evaluate(trainer, plan, evaluations)
    except Terminated:  # in all processes alike
        destroy_process_group(trainer)
        raise
    show_results(trainer, plan)
    destroy_process_group(trainer)
    if trainer.images is not None:
        trainer.images.remove()


def train_and_evaluate(trainer: GlmEdgeTrainer, plan: Plan, evaluations: Mapping[str, EvaluationData]) -> None:
    """Take the steps that are left, save the final model and evaluate it."""
    from glm_edge_ft.training.finished_run import final_step, has_steps_left, restore
    from glm_edge_ft.training.logs import forget_evaluations

    finished = plan.resume.path is not None and not has_steps_left(trainer, plan.resume.path)
    if finished:
        assert plan.resume.path is not None
        show_notice(f"{plan.resume.path} has all steps behind it: nothing is trained, evaluation follows")
        restore(trainer, plan.resume.path)
        forget_evaluations(plan.output_dir / METRICS_FILE, final_step(trainer))
    else:
        trainer.train(resume_from_checkpoint=str(plan.resume.path) if plan.resume.path else None)
        if trainer.state.global_step == 0:
            raise RunStopped("the run took no step: training_args and the training rows leave none to take")
    trainer.save_model()
    trainer.state.global_step = final_step(trainer)  # what follows is said of the model that is kept
    try:
        evaluate(trainer, evaluations, always=finished)
    except Terminated:
        if not finished and not trainer.args.load_best_model_at_end:
            trainer.save_missing_checkpoint()
        raise Terminated(
            f"by SIGTERM in the evaluation after training; the final model is in {plan.output_dir}, and the same "
            "command with `yes` as RESUME evaluates it"
        ) from None


def destroy_process_group(trainer: GlmEdgeTrainer) -> None:
    """End the process group; a rank that leaves it early can hang, or end with an abort."""
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def make_room(plan: Plan) -> None:
    """Move an earlier run out of the way of a fresh start, and checkpoints after the one that is resumed from."""
    if not is_main_process():
        return
    if plan.resume.notice:
        show_notice(plan.resume.notice)
    remove_unfinished(plan.output_dir)
    moved_to = (
        set_aside(plan.output_dir, plan.resume.path) if plan.resume.path else set_aside_earlier_run(plan.output_dir)
    )
    if moved_to is not None:
        show_notice(f"{plan.output_dir} held work of an earlier run; it was moved to {moved_to}")


def build_trainer(
    prepared: Prepared,
    evaluations: Mapping[str, EvaluationData],
    termination: Termination,
    write_records: Callable[[Path], None],
) -> GlmEdgeTrainer:
    """Read the weights, put the adapter on, and return the trainer with its data and its log.

    `write_records` writes the records of the run into a checkpoint.
    """
    import torch
    from transformers import PrinterCallback, ProgressCallback

    from glm_edge_ft.model.adapters import apply_adapter
    from glm_edge_ft.model.fast_layers import fuse_norms, skip_input_cast
    from glm_edge_ft.model.loading import load_weights
    from glm_edge_ft.model.packed_attention import use_attention
    from glm_edge_ft.model.saved_folder import complete_saved_folder
    from glm_edge_ft.training.logs import RunLog
    from glm_edge_ft.training.loss import install_supervised_loss
    from glm_edge_ft.training.trainer import GlmEdgeTrainer

    config, checkpoint, args = prepared.plan.config, prepared.checkpoint, prepared.training_arguments
    init_deepspeed() if args.deepspeed else skip_deepspeed_import()
    base = load_weights(checkpoint, getattr(torch, prepared.precision.weights), config.quantization, args.device)
    use_attention(base, attention_of(prepared))
    install_supervised_loss(base, label_smoothing=args.label_smoothing_factor)
    if not fuse_norms(base):
        show_notice("this model has no GlmRMSNorm layers: the faster paths for GLM layers are not used")
    torch.manual_seed(args.seed)  # the adapter's first values
    model = apply_adapter(base, config.peft_config, prepared.keeps_vision)
    if (args.bf16 or args.fp16) and not args.deepspeed:  # under DeepSpeed all weights are in 16 bit, without autocast
        skip_input_cast(model)
    images = complete_images(prepared, base)
    peft_type = config.peft_config["peft_type"] if config.peft_config else "full fine-tuning"
    title = f"{checkpoint.location.name}, {peft_type}"
    trainer = GlmEdgeTrainer(
        model=model,
        args=args,
        train_dataset=prepared.datasets["train"],
        eval_dataset=evaluations.get("val"),
        processing_class=checkpoint.tokenizer,
        data_collator=build_collator(prepared, "packed" if config.padding_free else "right", images),
        evaluation_collator=build_collator(prepared, "right", images),
        generation_context=build_generation_context(prepared, images),
        on_nonfinite_loss=config.on_nonfinite_loss,
        complete_saved_folder=functools.partial(complete_saved_folder, checkpoint),
        write_records=write_records,
        termination=termination,
        max_tokens_per_pass=tokens_per_pass(config, args),
        images=images,
        callbacks=[RunLog(prepared.plan.output_dir, title, show_notice)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def attention_of(prepared: Prepared) -> Attention:
    """Return how the run computes attention, as config and machine want it."""
    from glm_edge_ft.model.packed_attention import choose_attention

    device = prepared.training_arguments.device
    return choose_attention(prepared.plan.config.padding_free, device, prepared.precision, prepared.checkpoint.config)


def evaluate(trainer: GlmEdgeTrainer, evaluations: Mapping[str, EvaluationData], always: bool) -> None:
    """Evaluate the final model on `val`, unless training just did, and on `test`."""
    from glm_edge_ft.training.finished_run import best_or_last_evaluation, final_step

    wants_val = "val" in evaluations and trainer.args.eval_strategy != "no"
    last = best_or_last_evaluation(trainer)
    if wants_val and (always or last is None or last["step"] != final_step(trainer)):
        trainer.evaluate(evaluations["val"], metric_key_prefix="eval")
    if "test" in evaluations:
        trainer.evaluate(evaluations["test"], metric_key_prefix="test")


def show_results(trainer: GlmEdgeTrainer, plan: Plan) -> None:
    """Print the metrics before and after, and the names of what was written."""
    from glm_edge_ft.training.finished_run import best_or_last_evaluation
    from glm_edge_ft.training.logs import format_comparison

    table = format_comparison(trainer.state.log_history, best_or_last_evaluation(trainer))
    if table and trainer.args.eval_strategy != "no":
        show("\n" + table)
    folder = plan.output_dir
    names = {
        "final model": folder,
        "metrics": folder / METRICS_FILE,
        "curve": folder / CURVE_FILE,
        "predictions": folder / PREDICTIONS_FOLDER,
        "record of the run": folder / RUN_RECORD,
    }
    show("\n" + "\n".join(f"{label + ':':<19}{path}" for label, path in names.items() if path.exists()))
