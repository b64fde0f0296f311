"""Several processes whose rows differ in what makes loops long: supervised tokens, images, lengths of replies.

What takes part in a collective must go round equally often on all of them, or they wait for one another without end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard
from tokenizers import Tokenizer
from torch.utils.data import BatchSampler
from transformers import Seq2SeqTrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from glm_edge_ft.checks.arguments import check_batches
from glm_edge_ft.errors import UserError
from tests.collective_ranks import KINDS
from tests.launch import REPOSITORY, ZERO_2, ZERO_3, launch, start, start_script
from tests.runs import LORA, PREFIX, do_run, losses, metrics, weights, write_jsonl
from tests.vision_folders import draw, image_part, save_vision_folder, text_part, turns, write_vision_data

pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")

MODES: dict[str, dict[str, Any]] = {"ddp": {}, "zero2": {"deepspeed": ZERO_2}, "zero3": {"deepspeed": ZERO_3}}
ALL = [(mode, kind) for mode in MODES for kind in KINDS]
FEW = [("zero3", "lora"), ("zero3", "full"), ("zero3", "vision-full"), ("ddp", "saved-head"), ("ddp", "full")]


@pytest.mark.parametrize("cases", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
def test_ranks_with_other_numbers_of_supervised_tokens_learn_the_same(
    tmp_path: Path, cases: list[tuple[str, str]]
) -> None:
    """K1, K2: around the size of a chunk of the loss, and none at all; an image on one of them alone.

    Loss, evaluated loss and each gradient equal those of one process that has both rows. Under ZeRO-3 the replies, too.
    """
    found = tmp_path / "found.json"
    run = start_script(
        REPOSITORY / "tests" / "collective_ranks.py",
        [str(found), json.dumps(cases)],
        tmp_path / "log",
        processes=2,
        environment={"PYTHONPATH": str(REPOSITORY)},
    )
    run.end()
    numbers = json.loads(found.read_text(encoding="utf-8"))
    assert len(numbers) == 5 * len(cases) + 2 * [mode for mode, _ in cases].count("zero3")
    assert {case: far for case, far in numbers.items() if not max(far.values()) < 1e-5} == {}


def test_processes_get_as_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K1: two processes (made up) refuse what gives them other numbers of batches; one process takes all."""
    five, two_ranks = BatchSampler(range(5), 1, drop_last=False), range(2)
    uneven = [list(BatchSamplerShard(five, 2, rank, even_batches=False)) for rank in two_ranks]
    assert [len(batches) for batches in uneven] == [3, 2]
    for setting in ({"even_batches": False}, {"dispatch_batches": True}):
        args: Any = Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, accelerator_config=setting)
        check_batches(args, padding_free=False)
        with monkeypatch.context() as patch:
            patch.setattr(args.distributed_state, "num_processes", 2)
            with pytest.raises(UserError, match=f"accelerator_config: {next(iter(setting))}"):
                check_batches(args, padding_free=False)
            args.accelerator_config = AcceleratorConfig()
            check_batches(args, padding_free=False)


# ---- the scripts on the embedded models ----

SETTINGS: dict[str, Any] = {
    **{"max_steps": 2, "learning_rate": 1e-4, "train_sampling_strategy": "sequential", "save_steps": 2},
    **{"val": "dev.jsonl", "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    **{"per_device_eval_batch_size": 1, "top": {"max_input_length": 1024, "max_output_length": 1024}},
}
# The best checkpoint is chosen by the scores of replies, whose lengths differ; each rank has to know them.
REPLIES: dict[str, Any] = {
    **{"predict_with_generate": True, "generation_config": {"max_new_tokens": 24}},
    **{"load_best_model_at_end": True, "metric_for_best_model": "rouge-l"},
}
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"peft": {**LORA, "lora_dropout": 0.0}, **REPLIES},
    "full": {"peft": None},
    "head": {"peft": {**LORA, "lora_dropout": 0.0, "target_modules": ["q_proj", "lm_head"]}},
    "prefix": {"peft": PREFIX, **REPLIES},
    "vision": {"peft": {**LORA, "lora_dropout": 0.0}, **REPLIES},
    "vision-full": {"peft": None},
}
BY_DEFAULT = {("lora", "zero3")}


def write_replies(folder: Path, has_images: bool) -> Path:
    """Write rows whose replies need two chunks of the loss, and such that need one, in turn; return the folder."""
    for name, lengths in (("train", (849, 90, 3, 600)), ("dev", (700, 20, 3))):
        rows = []
        for number, length in enumerate(lengths):
            question, reply = f"how are you, number {number}?", "fine " * length
            if has_images and number % 2 == 0:
                picture = draw(folder / "images" / f"{name}-{number}.png", number).relative_to(folder)
                rows.append(turns([image_part(str(picture)), text_part(question)], reply))
            else:
                rows.append(turns(question, reply))
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def numbers_of(output: Path) -> list[dict[str, float]]:
    """Return losses, norms of gradients and scores of a run, line by line of its log."""
    names = ("loss", "grad_norm", "eval_loss", "eval_rouge-l", "eval_bleu-4")
    return [{name: line[name] for name in ("step", *names) if name in line} for line in metrics(output)]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param(kind, mode, marks=[] if (kind, mode) in BY_DEFAULT else [pytest.mark.slow])
        for kind in RUNS
        for mode in MODES
    ],
)
def test_replies_of_two_chunks_and_of_one_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str
) -> None:
    """K1: each rank has one row a step; in training, in evaluations, the one before training among them, in replies."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    has_images = kind.startswith("vision")
    data, model = write_replies(tmp_path / "data", has_images), "glm-edge-v-nano" if has_images else "glm-edge-nano"
    settings = {**SETTINGS, **RUNS[kind]}
    one = do_run(tmp_path / "one", data, model, per_device_train_batch_size=2, takes_images=has_images, **settings)
    settings |= {**MODES[mode], "script": "finetune_vision.py" if has_images else "finetune.py"}
    two = launch(tmp_path / mode, data, model, processes=2, per_device_train_batch_size=1, **settings)
    for expected, found in zip(numbers_of(one), numbers_of(two), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_rank_all_of_whose_rows_were_skipped_takes_part(
    tmp_path: Path, backend: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K2: all weights, the head among them; batches in parts, of which the ranks have different numbers."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    model, steps = save_vision_folder(tmp_path / "model", backend), 50
    settings: dict[str, Any] = {
        **{"peft": None, "max_steps": steps, "optim": "sgd", "learning_rate": 0.01, "save_strategy": "no"},
        **{"train_sampling_strategy": "sequential", "script": "finetune_vision.py", "ddp_timeout": 120},
        "top": {"on_bad_image": "skip", "cache_image_features": False, "max_tokens_per_pass": 64},
    }

    def train(name: str, processes: int) -> Path:
        data = write_vision_data(tmp_path / name / "data", train=4 * steps)
        own = {**settings, "per_device_train_batch_size": 4 // processes}
        run = start(tmp_path / name / "output", data, model, processes=processes, **own)
        run.wait_until(lambda: "attention: " in run.said(), "the end of the checks")
        for number in (4 * steps - 4, 4 * steps - 3):  # rank 0's rows of the last step; one of rank 1's is a text
            (data / "images" / f"{number}.png").unlink()
        assert run.end().count("its rows teach nothing") == 2
        return tmp_path / name / "output"

    one, two = train("one", 1), train("two", 2)
    for step, (loss, _, norm) in losses(one).items():
        assert losses(two)[step][::2] == pytest.approx((loss, norm), rel=1e-4), step
    before, after = weights(one), weights(two)
    largest = max(float(values.abs().max()) for values in before.values())
    assert max(float((after[name] - values).abs().max()) for name, values in before.items()) < 1e-5 * largest
