"""Everything that can be known before the weights are read, cheapest first.

`check_inputs` needs the standard library and the config's parser alone: config, data folder, MODEL and RESUME are
checked within a second. `prepare` reads the tokenizer, checks adapter and precision against the real model's structure,
and encodes the data. Each collects all errors before it raises.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.arguments import build_generation_config, build_training_arguments, check_batches
from glm_edge_ft.checks.memory import estimate_states
from glm_edge_ft.checks.processes import Processes, plan_processes
from glm_edge_ft.checks.resume import compare_with_checkpoint
from glm_edge_ft.checks.trial import check_generation, check_ids, check_training_parts, vocabulary_of
from glm_edge_ft.checks.vision import check_features, check_images, check_kind_of_model, image_settings
from glm_edge_ft.config import ConfigError, RunConfig, check_data_files, load_config
from glm_edge_ft.config.deepspeed import read_deepspeed
from glm_edge_ft.console import show_notice
from glm_edge_ft.distributed import check_launcher, is_local_main_process, is_main_process, launch, poll
from glm_edge_ft.errors import Problem, ProblemList, UserError
from glm_edge_ft.files import can_be_made, expand_home
from glm_edge_ft.model.checkpoint import ModelLocation
from glm_edge_ft.model.loading import locate_model
from glm_edge_ft.model.quantization import is_installed, not_installed
from glm_edge_ft.run import Plan, Prepared, RunRequest
from glm_edge_ft.training.checkpoints import RUN_RECORD, ResumePlan, find_checkpoints, resolve_resume

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from glm_edge_ft.data.dataset import EncodedDataset
    from glm_edge_ft.data.encoding import ConversationEncoder
    from glm_edge_ft.data.image_check import ImageCheck
    from glm_edge_ft.data.placeholders import ImageSettings
    from glm_edge_ft.model.checkpoint import Checkpoint
    from glm_edge_ft.model.memory import ModelSize

SPLITS = ("train", "val", "test")


def check_inputs(request: RunRequest) -> Plan:
    """Check the command line and every file that it names. Raises UserError with all that is wrong."""
    problems = ProblemList()
    problems.problems += [*check_launcher(), *_check_json_path(request)]
    location = config = data_config = output_dir = None
    with problems.collect():
        location = locate_model(request.model)
    try:
        config = load_config(request.config, request.overrides)
        data_config, output_dir = config.data_config, expand_home(config.training_args["output_dir"])
        problems.problems += _check_installed(config)
    except UserError as error:
        problems.extend(error)
        if isinstance(error, ConfigError):  # what its errors leave readable is checked in the same go
            data_config, output_dir = error.data_config, error.output_dir
    problems.problems += check_data_files(data_config, request.data_dir)
    resume = ResumePlan(None)
    if output_dir is not None:
        problems.problems += _check_output_dir(output_dir, request.data_dir, location)
        with problems.collect():
            resume = resolve_resume(request.resume, output_dir)
    problems.raise_if_any()
    assert location is not None and config is not None and output_dir is not None  # each has its problem otherwise
    for notice in config.notices:
        show_notice(notice)
    data = config.data_config
    named = zip(SPLITS, (data.train_file, data.val_file, data.test_file), strict=True)
    files = {split: request.data_dir / expand_home(name) for split, name in named if name is not None}
    return Plan(request, config, location, resume, output_dir, files)


def _check_installed(config: RunConfig) -> list[Problem]:
    problems = []
    if config.training_args.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        what = "is set, but DeepSpeed is not installed"
        problems.append(Problem("training_args.deepspeed", what, "pip install deepspeed==0.19.8"))
    if config.quantization is not None and not is_installed():
        problems.append(not_installed("quantization", f"is {config.quantization}"))
    return problems


def _check_json_path(request: RunRequest) -> list[Problem]:
    path = request.json_path
    if path is None:
        return []
    if bool(request.check) == (request.preview is not None):
        return [Problem("--json", "goes with either --check or --preview", "give one of them, or leave --json out")]
    if path.is_dir():
        return [Problem(f"--json {path}", "is a folder", "name a file, e.g. report.json")]
    if not can_be_made(path.absolute().parent):
        return [Problem(f"--json {path}", "cannot be written there", "name a file in a folder of yours")]
    return []


def _check_output_dir(output_dir: Path, data_dir: Path, location: ModelLocation | None) -> list[Problem]:
    """Refuse an output folder that cannot be made, or in which a run would overwrite what is not its own."""
    target, what, fix = output_dir.resolve(), "", "name another folder"
    model = Path(location.source).resolve() if location is not None and location.is_local else None
    if output_dir.exists() and not output_dir.is_dir():
        what, fix = "is a file", "name a folder"
    elif not can_be_made(target):
        what, fix = "cannot be made or written to", "name a folder of yours"
    elif target == data_dir.resolve():
        what, fix = "is DATA_DIR", "name a folder of its own"
    elif location is not None and model is not None and target in (model, *model.parents):
        what = f"holds MODEL {location.name}, which the run would move or write over"
    elif (
        any(output_dir.glob("*model*.safetensors"))
        and not (output_dir / RUN_RECORD).is_file()
        and not find_checkpoints(output_dir)
    ):
        what = "holds a model that no run of this toolkit left there"
    return [Problem("training_args.output_dir", f"{output_dir} {what}", fix)] if what else []


def prepare(plan: Plan) -> Prepared:
    """Read tokenizer and config of the model, check adapter and precision, encode the data; read no weights.

    Raises UserError with all that is wrong, up to 20 rows of each data file among it.
    """
    from glm_edge_ft.data.encoding import ConversationEncoder
    from glm_edge_ft.model.loading import load_image_processor, read_checkpoint
    from glm_edge_ft.model.precision import choose_precision, detect_hardware

    config, takes_images, problems = plan.config, plan.request.takes_images, ProblemList()
    precision = checkpoint = None
    with problems.collect():
        precision = choose_precision(config.training_args, config.peft_config is not None, detect_hardware())
    with problems.collect():
        found = read_checkpoint(plan.location)
        check_kind_of_model(found, config, takes_images)
        checkpoint = found
    if checkpoint is None:  # nothing further can be checked without it
        problems.raise_if_any()
        raise AssertionError("a checkpoint that cannot be used has its problem")
    keeps_vision = checkpoint.is_vision and (config.freezeV or not takes_images)
    images = image_settings(checkpoint, config, takes_images)
    structure = _check_model(plan, checkpoint, images, keeps_vision, problems)
    encoder = image_processor = training_arguments = generation_config = None
    with problems.collect():
        budgets = config.max_input_length, config.max_output_length
        encoder = ConversationEncoder(checkpoint.tokenizer, frozenset(checkpoint.stop_ids), *budgets, images)
    if takes_images:
        with problems.collect():
            image_processor = load_image_processor(plan.location)
    with problems.collect():
        generation_config = build_generation_config(config, checkpoint)
        check_generation(config.generation_config, generation_config, vocabulary_of(checkpoint))
    if precision is not None:
        with problems.collect():
            training_arguments = build_training_arguments(plan, precision)
            check_batches(training_arguments, config.padding_free)
    datasets, image_check = _read_data(plan, encoder, checkpoint, problems)
    if training_arguments is not None:
        with problems.collect():
            rows = len(datasets["train"]) if "train" in datasets else None
            check_training_parts(training_arguments, config.training_args, rows)
    if structure is not None and "train" in datasets and plan.resume.path is not None:
        refused, notices = compare_with_checkpoint(
            plan, datasets["train"].fingerprint, structure.adapter, structure.size.trained, processes_of(plan)
        )
        problems.problems += refused
        for notice in notices:
            show_notice(notice)
    problems.raise_if_any()
    assert precision is not None and encoder is not None and structure is not None  # each has its problem otherwise
    assert training_arguments is not None and generation_config is not None
    return Prepared(
        plan=plan,
        checkpoint=checkpoint,
        precision=precision,
        encoder=encoder,
        datasets=datasets,
        parameters=(structure.size.trained, structure.size.parameters),
        quantized=structure.size.quantized,
        memory=estimate_states(structure.size, precision, training_arguments, checkpoint),
        training_arguments=training_arguments,
        generation_config=generation_config,
        keeps_vision=keeps_vision,
        image_processor=image_processor,
        image_check=image_check,
    )


def _check_model(
    plan: Plan, checkpoint: Checkpoint, images: ImageSettings | None, keeps_vision: bool, problems: ProblemList
) -> Structure | None:
    """Check adapter, weight files and image features against the model's structure; None where it does not fit."""
    from glm_edge_ft.model.loading import build_meta_model, check_weights
    from glm_edge_ft.model.packed_attention import check_packing
    from glm_edge_ft.model.quantization import check_quantized_checkpoint

    config, meta_model = plan.config, None
    with problems.collect():
        meta_model = build_meta_model(checkpoint)
    if meta_model is None:
        return None
    with problems.collect():
        check_weights(checkpoint)
    with problems.collect():
        if config.padding_free:
            check_packing(meta_model)
    with problems.collect():
        if images is not None and images.max_images > 0:
            check_features(meta_model, checkpoint, images)
    with problems.collect():
        check_quantized_checkpoint(checkpoint, config.quantization, plan.trains and config.peft_config is None)
    with problems.collect():
        return inspect_structure(config, meta_model, keeps_vision)
    return None


def processes_of(plan: Plan) -> Processes:
    """Return how the run shares its work among processes."""
    deepspeed = plan.config.training_args.get("deepspeed")
    return plan_processes(launch().world_size, read_deepspeed(deepspeed) if deepspeed else None)


def _read_data(
    plan: Plan, encoder: ConversationEncoder | None, checkpoint: Checkpoint, problems: ProblemList
) -> tuple[dict[str, EncodedDataset], ImageCheck | None]:
    """Encode the data files and open their images; a preview shows rows alone, and opens none."""
    datasets: dict[str, EncodedDataset] = {}
    if encoder is None:
        return datasets, None
    opens_images = plan.request.takes_images and plan.request.preview is None
    limit = getattr(checkpoint.config, "max_position_embeddings", None)
    for split, path in plan.data_files.items():
        with problems.collect():
            datasets[split] = _encode(path, encoder, plan.config, opens_images)
            check_ids(datasets[split], checkpoint)
            longest = int(datasets[split].lengths.max())
            if limit is not None and longest > limit:
                what = f"its longest row has {longest} tokens, the model takes {limit}"
                fix = f"lower max_input_length and max_output_length until they add up to at most {limit}"
                raise UserError.single(str(path), what, fix)
    image_check = None
    if opens_images:
        with problems.collect():
            datasets, image_check = check_images(datasets, plan.config)
    return datasets, image_check


def _encode(path: Path, encoder: ConversationEncoder, config: RunConfig, opens_images: bool) -> EncodedDataset:
    from glm_edge_ft.data.dataset import build_dataset, dataset_folder, open_if_whole
    from glm_edge_ft.data.image_check import ImageCheck

    if not is_local_main_process():
        folder = dataset_folder([path], encoder)
        return poll(lambda: open_if_whole(folder))
    progress = is_main_process()
    check = ImageCheck(config.on_bad_image, progress).problems_of if opens_images else None
    dataset, notices = build_dataset(
        [path], encoder, config.data_config.num_proc, progress=progress, find_bad_images=check
    )
    for notice in notices:
        show_notice(notice)
    return dataset


@dataclass(frozen=True)
class Structure:
    """What is known of the model's structure without its weights.

    Attributes:
        size: parameter counts, the adapter's included.
        adapter: PEFT's config of the adapter as a dict, or None for full fine-tuning.
    """

    size: ModelSize
    adapter: dict[str, Any] | None


def inspect_structure(config: RunConfig, meta_model: PreTrainedModel, keeps_vision: bool) -> Structure:
    """Put the adapter on a copy of `meta_model`. Raises UserError if it does not fit, or is not saved as trained."""
    from glm_edge_ft.checks.adapter_trial import check_is_kept
    from glm_edge_ft.model.adapters import wrap_meta_model
    from glm_edge_ft.model.memory import measure_size
    from glm_edge_ft.model.meta_model import quantize_meta_model

    model, settings = copy.deepcopy(meta_model), config.peft_config
    quantize_meta_model(model, config.quantization)
    wrapped: Any = wrap_meta_model(settings, model, keeps_vision)
    if settings is None:
        return Structure(measure_size(wrapped), None)
    check_is_kept(settings, wrapped)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    if settings.get("bias", "none") != "none" and not any(name.endswith(".bias") for name in trained):
        show_notice("peft_config.bias has no effect: the layers that it means have none")
    if settings.get("ensure_weight_tying") and not meta_model.config.get_text_config().tie_word_embeddings:
        show_notice("peft_config.ensure_weight_tying has no effect: this model's embeddings and head are not tied")
    return Structure(measure_size(wrapped), wrapped.peft_config["default"].to_dict())
