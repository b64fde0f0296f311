"""Whole runs of finetune_vision.py on a tiny model, each against an exact expectation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoTokenizer, GlmConfig, GlmForCausalLM

from glm_edge_ft import recipe
from glm_edge_ft.data import collator
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.glm_edge_v import load_glm_edge_v
from glm_edge_ft.model.glm_edge_v_config import VISION_PREFIX
from glm_edge_ft.run import RunRequest
from tests.conftest import TokenizerMaker
from tests.model_folders import save_model_folder
from tests.runs import (
    LORA,
    PREFIX,
    assert_close,
    assert_same_bits,
    do_run,
    losses,
    metrics,
    weights,
    write_chat_data,
    write_jsonl,
)
from tests.vision_folders import (
    PLACEHOLDERS,
    draw,
    image_part,
    save_vision_folder,
    text_part,
    turns,
    write_vision_data,
)

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
Run = Callable[..., Path]
Row = dict[str, Any]
ADAPTERS = pytest.mark.parametrize("peft", [LORA, None, PREFIX], ids=["lora", "full", "prefix"])


@pytest.fixture
def run(tmp_path: Path, vision_model: Path, vision_data: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that does one vision run in this process and returns its output folder."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))

    def start(output: str = "output", model: Path = vision_model, data_dir: Path = vision_data, **options: Any) -> Path:
        return do_run(tmp_path / output, data_dir, model, **{"takes_images": True, **options})

    return start


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes training rows into a new data folder, with pictures 0 to 3 beside them."""

    def write(*written: Row) -> Path:
        folder = tmp_path / "rows"
        for number in range(4):
            draw(folder / f"{number}.png", number)
        return write_jsonl(folder / "train.jsonl", written).parent

    return write


def vision_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the saved weights of the vision part."""
    return {name: values for name, values in weights(folder).items() if name.startswith(VISION_PREFIX)}


# ---- training ----


@ADAPTERS
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    run: Run, peft: dict[str, Any] | None, freeze: bool
) -> None:
    """R3, T1, I6: 6 steps at once, over two epochs, against 4 and a resume to 6, with and without `freezeV`."""
    top = {"freezeV": freeze}
    whole = run("whole", peft=peft, top=top, save_steps=4)
    (whole.parent / "resumed").mkdir()
    (whole / "checkpoint-4").rename(whole.parent / "resumed" / "checkpoint-4")
    (whole.parent / "resumed" / "run.json").write_bytes((whole / "run.json").read_bytes())
    resumed = run("resumed", peft=peft, top=top, resume="yes")
    assert_same_bits(whole, resumed)
    assert losses(resumed)[6] == losses(whole)[6]


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_vision_part_keeps_every_bit(run: Run, vision_model: Path, freeze: bool) -> None:
    """I6: full fine-tuning, the strongest case; without `freezeV` tower and adapter are trained."""
    before, after = vision_weights(vision_model), vision_weights(run(peft=None, top={"freezeV": freeze}))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert moved == (set() if freeze else before.keys())


def test_thawing_the_vision_part_in_between_is_refused(run: Run) -> None:
    """R3: the optimizer's states belong to another set of weights."""
    run(peft=None, top={"freezeV": True}, max_steps=2)
    with pytest.raises(UserError, match=r"freezeV: False, but .*checkpoint-2 was trained with True"):
        run(peft=None, top={"freezeV": False}, resume="yes")


def test_accumulated_batches_equal_one_large_batch(run: Run) -> None:
    """T3: 4 rows at once against 1 row four times, text and image rows mixed."""
    settings = {"peft": None, "train_sampling_strategy": "random", "max_steps": 2, "learning_rate": 1e-4}
    large = run("large", per_device_train_batch_size=4, **settings)
    small = run("small", per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    assert_close(large, small)


def test_loader_processes_decode_the_images_and_change_nothing(run: Run) -> None:
    """I1: pixels are made in the loader's processes."""
    here = run("here", val="dev.jsonl", eval_strategy="steps", eval_steps=6)
    there = run("there", val="dev.jsonl", eval_strategy="steps", eval_steps=6, dataloader_num_workers=2)
    assert_same_bits(here, there)
    lines = [(folder / "predictions" / "eval-6.jsonl").read_text(encoding="utf-8") for folder in (here, there)]
    assert lines[0] == lines[1]


def test_a_text_row_has_the_loss_of_the_language_model_alone(run: Run, rows: Callable[..., Path]) -> None:
    """I2: all rows are text; the first loss is that of a plain GLM with the same weights, on an independent path."""
    folder = rows(turns("hello there", "my friend"), turns("how are you?", [text_part("I am fine")]))
    output = run(data_dir=folder, max_steps=1, per_device_train_batch_size=2, peft=LORA | {"lora_dropout": 0.0})
    assert losses(output)[1][0] == pytest.approx(plain_glm_loss(output), rel=1e-5)


def plain_glm_loss(output: Path) -> float:
    """Return the mean loss per supervised token of the two text rows above, by transformers' own GLM."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    base = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    fields = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    vision = ("vision_config", "boi_token_id", "eoi_token_id", "architectures", "rope_theta", "partial_rotary_factor")
    model = GlmForCausalLM(GlmConfig(**{name: value for name, value in fields.items() if name not in vision})).eval()
    state = load_file(Path(base) / "model.safetensors")
    model.load_state_dict({name: values for name, values in state.items() if not name.startswith(VISION_PREFIX)})
    total, count = 0.0, 0
    for question, answer in (("hello there", "my friend"), ("how are you?", "I am fine")):
        prompt = tokenizer.encode(f"<|user|>\\n{question}\\n<|assistant|>\\n", add_special_tokens=False)
        ids = tokenizer.encode(f"<|user|>\\n{question}\\n<|assistant|>\\n{answer}\\n<|user|>", add_special_tokens=False)
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(len(prompt), len(ids)):
            total -= float(scores[position - 1, ids[position]])
            count += 1
    return total / count


def test_images_change_the_loss_of_their_rows(run: Run, rows: Callable[..., Path]) -> None:
    """I1: the same words with another picture are another loss: the pixels arrive."""
    found = []
    for number in (0, 1):
        row = turns([image_part(f"{number}.png"), text_part("what is the colour?")], "red")
        found.append(losses(run(f"run-{number}", data_dir=rows(row), max_steps=1))[1][0])
    assert found[0] != found[1]


def test_any_place_and_mixture_of_images_trains(
    run: Run, rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """I2, I4: text before the image, the image in turn 2, a system turn first (dropped, and said), text alone."""
    question = text_part("what is the colour?")
    system = turns([image_part("2.png"), question], "green")
    system["messages"].insert(0, {"role": "system", "content": "you are my friend"})
    folder = rows(
        turns([question, image_part("0.png")], "red"),
        turns("hello there", "my friend", [image_part("1.png"), question], "blue"),
        system,
        turns("how are you?", "I am fine"),
    )
    output = run(data_dir=folder, max_steps=3)
    assert all(loss < 20 for loss, *_ in losses(output).values())
    assert "system" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "fits"), [(1, False), (2, True)])
def test_several_images_need_the_config_to_say_so(run: Run, rows: Callable[..., Path], limit: int, fits: bool) -> None:
    """I4: one image is the released limit; beyond it the row is refused by name."""
    folder = rows(turns([image_part("0.png"), image_part("1.png"), text_part("hello")], "red"))
    if fits:
        assert losses(run(data_dir=folder, top={"max_images": limit}, max_steps=1))
        return
    with pytest.raises(UserError, match=r"train\.jsonl:1.*2 images"):
        run(data_dir=folder, top={"max_images": limit})


# ---- refusals before the weights are read ----


def test_a_chat_model_is_refused_by_the_vision_script(
    run: Run, tmp_path: Path, backend: Tokenizer, make_tokenizer: Any
) -> None:
    """Said plainly, with the script to use."""
    chat = save_model_folder(tmp_path / "chat", make_tokenizer("glm"))
    with pytest.raises(UserError, match=r"is a chat model .*\n.*use finetune\.py, or give a GLM-Edge-V model"):
        run(model=chat)


@ADAPTERS
def test_the_chat_script_trains_the_language_part_of_a_vision_model(
    run: Run,
    rows: Callable[..., Path],
    vision_model: Path,
    peft: dict[str, Any] | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """I6: with a notice; the vision part keeps every bit, and the folder is a whole vision checkpoint."""
    folder = rows(turns("hello there", "my friend"), turns([text_part("how are you?")], "I am fine"))
    output = run(data_dir=folder, takes_images=False, peft=peft, max_steps=2)
    said = capsys.readouterr().err
    assert "is a vision model: this script trains its language part on text" in said
    assert (output / "preprocessor_config.json").is_file()
    if peft is None:
        before, after = vision_weights(vision_model), vision_weights(output)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert load_glm_edge_v(output, torch.float32).config.tokens_per_image == PLACEHOLDERS
    elif peft is LORA:
        assert not any("vision" in name for name in weights(output))


def test_an_image_part_in_the_chat_script_is_refused(run: Run) -> None:
    """D4: a vision model changes nothing about it."""
    with pytest.raises(UserError, match=r"train\.jsonl:1.*image part in chat fine-tuning"):
        run(takes_images=False)


def test_bad_images_are_all_listed_before_the_weights_are_read(
    run: Run, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """I3: missing, empty, cut, HTML, a folder; a path with a space and Chinese characters is fine, from anywhere."""
    question = text_part("what is the colour?")
    names = ("缺 少.png", "empty.png", "cut.jpg", "page.jpg", "folder", "红 色/图片.png")
    folder = rows(*(turns([image_part(name), question], "red") for name in names))
    draw(folder / "红 色" / "图片.png", 3)
    whole = draw(folder / "whole.jpg", 1).read_bytes()
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<!DOCTYPE html><html></html>", encoding="utf-8")
    (folder / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        run(data_dir=folder)
    found = [(problem.where, problem.what.split(": ", 1)[1]) for problem in caught.value.problems]
    assert [where for where, _ in found] == [f"train.jsonl:{line}" for line in range(1, 6)]
    assert [what.split(":")[0] for _, what in found] == [
        "there is no such file",
        "the file is empty (0 bytes)",
        "the file is damaged or cut off",
        "this is a text (HTML, XML or SVG), not an image",
        "this is a folder, not an image",
    ]
    assert not (tmp_path / "output").exists()


def test_rows_with_bad_images_may_be_left_out(
    run: Run, rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """I3: `on_bad_image: skip` drops and counts them, in training and in evaluation."""
    question = text_part("what is the colour?")
    folder = rows(*(turns([image_part(name), question], "red") for name in ("0.png", "none.png", "1.png")))
    (folder / "dev.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    settings = {"val": "dev.jsonl", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    output = run(data_dir=folder, top={"on_bad_image": "skip"}, **settings)
    said = capsys.readouterr().err
    assert "train: 1 rows with bad images are left out (on_bad_image: skip)" in said
    assert "train: 1 rows dropped: train.jsonl:2: image" in said
    assert "val: 1 evaluation samples with bad images are left out" in said
    lines = (output / "predictions" / "eval-1.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in lines] == [1, 3]


def test_a_budget_below_one_image_is_refused_with_the_number(run: Run) -> None:
    """I5: 18 placeholders and 6 tokens of the turn; for the released models it is 584."""
    with pytest.raises(UserError, match=r"max_input_length: 20 tokens are too few: .* takes 24"):
        run(top={"max_input_length": 20})


def test_a_long_question_is_shortened_around_the_image(run: Run, rows: Callable[..., Path]) -> None:
    """I5: the run of placeholders stays whole; the step is taken, so their number is that of the vectors."""
    folder = rows(turns([image_part("0.png"), text_part("the weather is fine. " * 300)], "red"))
    assert losses(run(data_dir=folder, max_steps=1, top={"max_input_length": 64}))


def test_another_number_of_placeholders_than_of_vectors_is_refused(
    run: Run, tmp_path: Path, backend: Tokenizer, vision_model: Path
) -> None:
    """The number that the config states is held against template and model, with all three numbers."""
    with pytest.raises(UserError) as caught:
        run(top={"image_placeholder_tokens": 20})
    text = str(caught.value)
    assert f"image_placeholder_tokens: is 20, but MODEL {vision_model} makes 18 vectors of an image" in text
    assert "the chat template renders 18 times <|begin_of_image|> for an image, the model makes 20 vectors" in text


def test_mistakes_of_model_machine_and_data_are_all_listed(
    run: Run, rows: Callable[..., Path], tmp_path: Path, backend: Tokenizer
) -> None:
    """In one go: no image processor, a precision that no CPU has, a row without reply, a picture that is not there."""
    model = save_vision_folder(tmp_path / "model", backend)
    (model / "preprocessor_config.json").unlink()
    folder = rows(turns("hello there", "my friend"))
    (folder / "dev.jsonl").write_text(json.dumps(turns("hello there")), encoding="utf-8")
    (folder / "train.jsonl").write_text(json.dumps(turns([image_part("none.png")], "red")), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        run(model=model, data_dir=folder, val="dev.jsonl", fp16=True)
    places = [problem.where for problem in caught.value.problems]
    assert places == ["training_args.fp16", f"MODEL {model}", "dev.jsonl:1", "train.jsonl:1"]
    assert "its image processor cannot be used" in str(caught.value)


# ---- evaluation and saving ----


def test_every_image_is_decoded_once_in_an_evaluation(
    run: Run, vision_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E4: one sample a reply; the turns of a conversation share one decoding of their image."""
    decoded: Counter[str] = Counter()
    load_image = collator.load_image

    def counting(path: str) -> Any:
        decoded[Path(path).name] += 1
        return load_image(path)

    monkeypatch.setattr(collator, "load_image", counting)
    output = run(val="dev.jsonl", eval_strategy="steps", eval_steps=1, max_steps=1)
    lines = [json.loads(line) for line in (output / "predictions" / "eval-1.jsonl").read_text("utf-8").splitlines()]
    assert [(line["line"], line["turn"]) for line in lines] == [(1, 1), (2, 1), (3, 1), (3, 3), (4, 1)]
    assert [len(line.get("images", [])) for line in lines] == [1, 1, 1, 1, 0]
    assert lines[2]["prompt"] == "<|user|>\\n<|begin_of_image|>what is the colour?\\n<|assistant|>\\n"
    assert {name: count for name, count in decoded.items() if name in ("100.png", "101.png", "102.png")} == {
        "100.png": 1,  # for the loss; the replies are generated from the same vectors
        "101.png": 1,
        "102.png": 1,
    }


def test_evaluation_is_the_same_for_every_batch_size(run: Run) -> None:
    """E1: the same losses and replies."""
    found = []
    for size in (1, 2, 5):
        output = run(f"by-{size}", val="dev.jsonl", eval_strategy="steps", eval_steps=3, max_steps=3,
                     per_device_eval_batch_size=size)  # fmt: skip
        (line,) = (line for line in metrics(output) if "eval_loss" in line)
        replies = (output / "predictions" / "eval-3.jsonl").read_text(encoding="utf-8")
        found.append((line["eval_loss"], replies))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) == pytest.approx(found[2][0], rel=1e-5)
    assert found[0][1] == found[1][1] == found[2][1]


@ADAPTERS
def test_the_saved_folder_is_used_by_itself(run: Run, vision_model: Path, peft: dict[str, Any] | None) -> None:
    """R7: adapter or model, tokenizer and image processor lie side by side, in the root and in each checkpoint."""
    output = run(peft=peft, max_steps=2)
    for folder in (output, output / "checkpoint-2"):
        assert AutoTokenizer.from_pretrained(folder).chat_template
        written = (folder / "preprocessor_config.json").read_text(encoding="utf-8")
        assert written == (vision_model / "preprocessor_config.json").read_text(encoding="utf-8")
        assert AutoImageProcessor.from_pretrained(folder, backend="pil").size == {"height": 112, "width": 112}
        if peft is None:
            assert load_glm_edge_v(folder, torch.float32)
        else:
            base = load_glm_edge_v(vision_model, torch.float32)
            assert PeftModel.from_pretrained(base, folder)


def test_the_code_that_auto_map_names_goes_with_the_model(run: Run, tmp_path: Path, backend: Tokenizer) -> None:
    """R7: this toolkit runs none of it, but tools of the release do."""
    model = save_vision_folder(tmp_path / "model", backend)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_glm.GlmForCausalLM"}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (model / "modeling_glm.py").write_text("raise RuntimeError('never run')\n", encoding="utf-8")
    output = run(model=model, peft=None, max_steps=1)
    assert (output / "modeling_glm.py").read_text(encoding="utf-8") == "raise RuntimeError('never run')\n"
    saved = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"] == config["auto_map"]
    assert saved["architectures"] == ["GlmForCausalLM"]


def test_check_counts_image_tokens_apart(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """9 of the 12 training rows have an image of 18 tokens; nothing is trained."""
    run(check=True)
    text = capsys.readouterr().out
    assert any(line.split()[:2] == ["image", str(9 * PLACEHOLDERS)] for line in text.splitlines()), text
    assert "check passed" in text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("takes_images", [False, True], ids=["finetune", "finetune_vision"])
def test_both_scripts_take_every_shipped_config(
    tmp_path: Path, vision_model: Path, make_tokenizer: TokenizerMaker, path: Path, takes_images: bool
) -> None:
    """C1: all checks of a run pass, each script with a model and data of its own; nothing is trained."""
    model = vision_model if takes_images else save_model_folder(tmp_path / "chat", make_tokenizer("glm"))
    data = (write_vision_data if takes_images else write_chat_data)(tmp_path / "data")
    report, output = tmp_path / "report.json", tmp_path / "output"
    overrides = (f"training_args.output_dir={output}", "training_args.dataloader_num_workers=0")
    recipe.run(RunRequest(data, str(model), path, None, overrides, True, None, report, takes_images))
    rows = len((data / "train.jsonl").read_text(encoding="utf-8").splitlines())
    assert json.loads(report.read_text(encoding="utf-8"))["data"]["train"]["rows"] == rows
    assert not output.exists()
