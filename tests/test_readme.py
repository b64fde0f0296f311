"""What both READMEs say is so: paths, commands, config keys and defaults, messages, outputs, and code that runs."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Seq2SeqTrainingArguments
from typer.testing import CliRunner

import finetune
import finetune_vision
from glm_edge_ft import __main__ as tool
from glm_edge_ft import recipe
from glm_edge_ft.checks.memory import step_formats
from glm_edge_ft.config import load_config
from glm_edge_ft.config.names import DATA_FIELDS, OLD_TOP_NAMES, OLD_TRAINING_NAMES, TOP_FIELDS, Renamed, Retired
from glm_edge_ft.config.rules import METRICS
from glm_edge_ft.config.schema import PEFT_TYPES, generation_fields, peft_fields, training_fields
from glm_edge_ft.console import show_problems
from glm_edge_ft.data.conversation import parse_conversation
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.deploy.export_gguf import TYPES
from glm_edge_ft.deploy.gguf_vision import plan_vision_tensors
from glm_edge_ft.deploy.gguf_weights import plan_tensors
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.activations import BatchShape, trace_step
from glm_edge_ft.model.adapters import build_peft_config, wrap_meta_model
from glm_edge_ft.model.memory import estimate_memory, measure_size
from glm_edge_ft.model.precision import Precision
from glm_edge_ft.run import RunRequest
from glm_edge_ft.training.checkpoints import resolve_resume
from glm_edge_ft.training.loss import install_supervised_loss
from tests.bench.memory_table import LENGTH, MODELS, build_released_model, estimate_row, format_table
from tests.conftest import TokenizerMaker
from tests.model_folders import save_model_folder, tiny_model
from tests.runs import do_run
from tests.vision_folders import draw, image_part, save_vision_folder, text_part, turns

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("README.md", "README_zh.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
USERS_FOLDERS = {"data/AdvertiseGen/", "data/CogVLM-311K/", "data/ads/"}  # stand for the reader's own data
USERS_FILES = {"data/mine/train.jsonl", "data/pictures/train.jsonl", "data/ads/train.jsonl", "data/ads/dev.jsonl"}
TWO_COMMANDS = (
    "pip install -r requirements.txt && python finetune.py data/demo glm-edge-nano configs/demo.yaml",
    "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest",
)
each_readme = pytest.mark.parametrize("name", NAMES)


def blocks(name: str, language: str) -> list[str]:
    """Return the contents of the fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[name], flags=re.MULTILINE | re.DOTALL)


def prose(name: str) -> str:
    """Return a README without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)


def command_lines(name: str) -> list[str]:
    """Return every line of the bash blocks."""
    return [line for block in blocks(name, "bash") for line in block.splitlines()]


def inline_codes(name: str) -> list[str]:
    """Return what stands between single backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", prose(name))


def table(name: str, first_key: str) -> list[list[str]]:
    """Return the cells of the table whose first row holds `first_key` in its first cell."""
    for lines in re.findall(r"(?:^\|.*\|\n)+", prose(name), flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.splitlines()]
        if first_key in rows[2][0]:
            return rows[2:]
    raise AssertionError(f"{name} has no table that begins with {first_key}")


def key_table(name: str) -> dict[str, str]:
    """Return key → what holds if it is left out."""
    return {row[0].strip("`"): row[2] for row in table(name, "data_config.train_file")}


def headings(name: str) -> list[str]:
    """Return the second-level headings."""
    return re.findall(r"^## (.+)$", prose(name), flags=re.MULTILINE)


# ---- the two files beside one another ----


@each_readme
def test_both_commands_stand_there_literally(name: str) -> None:
    """A newcomer copies these two lines."""
    assert [line for line in command_lines(name) if line in TWO_COMMANDS] == list(TWO_COMMANDS)


def test_both_files_have_the_same_sections() -> None:
    """Eleven sections, numbered alike."""
    numbers = {name: [heading.split(".")[0] for heading in headings(name)] for name in NAMES}
    assert numbers["README.md"] == numbers["README_zh.md"] == [str(number) for number in range(1, 12)]


@pytest.mark.parametrize("language", ["bash", "python", "json", "jsonl", "yaml", "text"])
def test_both_files_hold_the_same_blocks(language: str) -> None:
    """Commands, code, examples and outputs are the same in both languages."""
    assert blocks("README.md", language) != []
    assert blocks("README.md", language) == blocks("README_zh.md", language)


@pytest.mark.parametrize("first_key", ["data_config.train_file", "evaluation_strategy", "is neither a folder"])
def test_both_files_name_the_same_keys_and_messages(first_key: str) -> None:
    """The first column of the tables of keys, old names and messages is the same, code by code."""
    first, second = (
        [re.findall(r"`([^`]+)`", row[0]) for row in table(name, first_key)] for name in ("README.md", "README_zh.md")
    )
    assert first == second


@each_readme
def test_the_demo_table_has_its_place(name: str) -> None:
    """The table is filled between two marks."""
    for demo in ("demo", "demo-vision"):
        start, end = (TEXTS[name].index(f"<!-- {demo}-table:{mark} -->") for mark in ("start", "end"))
        assert TEXTS[name][start:end].count("\n") >= 8


# ---- paths ----


@each_readme
def test_links_lead_somewhere(name: str) -> None:
    """A link names a file of the repository, or a heading of the same page as the usual renderers spell it."""
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(name)}
    targets = re.findall(r"\]\(([^)]+)\)", prose(name))
    assert len(targets) > 10
    for target in targets:
        assert target[1:] in slugs if target.startswith("#") else (ROOT / target).is_file(), target


@each_readme
def test_paths_that_are_mentioned_exist(name: str) -> None:
    """Whatever begins like a file or folder of the repository is one."""
    words = [*inline_codes(name), *(word for line in command_lines(name) for word in shlex.split(line))]
    tops = re.compile(
        r"(?:configs|data|glm_edge_ft|tests|\.ci)/\S*|finetune(?:_vision)?\.py|(?:tests/)?requirements\.txt"
    )
    paths = {word for word in words if tops.fullmatch(word)}
    assert len(paths) > 10
    assert {path for path in paths if not (ROOT / path).exists()} == USERS_FOLDERS | USERS_FILES


# ---- commands ----


SCRIPTS = {"finetune.py": finetune.app, "finetune_vision.py": finetune_vision.app}


def script_commands(name: str) -> list[tuple[str, list[str]]]:
    """Return script and arguments of every command line but the synopsis."""
    commands = []
    for line in command_lines(name):
        script = re.search(r"finetune(?:_vision)?\.py", line)
        if script and "[RESUME]" not in line:
            commands.append((script[0], shlex.split(line[script.end() :])))
    return commands


def test_command_lines_are_understood_and_their_configs_load() -> None:
    """The real command parses each line; its CONFIG loads with its `--set` options."""
    commands = script_commands("README.md")
    assert len(commands) >= 15
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, arguments in commands:
        parsed = typer.main.get_command(SCRIPTS[script]).make_context(script, list(arguments)).params
        config = load_config(ROOT / parsed["config"], parsed["overrides"] or ())
        assert (ROOT / parsed["data_dir"]).is_dir() or f"{parsed['data_dir']}/" in USERS_FOLDERS
        if "training_args.learning_rate=2e-5" in arguments:
            assert config.training_args["learning_rate"] == 2e-5


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the beginning of the demonstrations' data and what short runs on it left in `output/`."""
    folder = tmp_path_factory.mktemp("demonstrations")
    for demo in ("demo", "demo_vision"):
        (folder / "data" / demo / "images").mkdir(parents=True)
        for split in ("train", "test"):
            lines = (ROOT / "data" / demo / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:2]
            (folder / "data" / demo / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            for image in re.findall(r'"images/[^"]+"', "".join(lines)):
                shutil.copy(ROOT / "data" / demo / json.loads(image), folder / "data" / demo / "images")
    steps = ("max_steps=2", "save_steps=1", "eval_strategy=no", "eval_on_start=false", "per_device_train_batch_size=1")
    overrides = (*(f"training_args.{setting}" for setting in steps), "data_config.val_file=null")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GLM_EDGE_FT_CACHE", str(folder / "cache"))
        for demo, model in (("demo", "glm-edge-nano"), ("demo_vision", "glm-edge-v-nano")):
            request = RunRequest(Path("data") / demo, model, ROOT / "configs" / f"{demo}.yaml", None, overrides)
            recipe.run(replace(request, takes_images=demo == "demo_vision"))
    (folder / "output/demo/checkpoint-1").rename(folder / "output/demo/checkpoint-120")  # the whole run's first
    alpaca = {"instruction": "Q", "input": "", "output": "A"}
    (folder / "alpaca.json").write_text(json.dumps([alpaca]), encoding="utf-8")
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    (folder / "llava.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]), encoding="utf-8")
    (folder / "coco" / "train2017").mkdir(parents=True)
    (picture,) = itertools.islice((folder / "data/demo_vision/images").iterdir(), 1)
    shutil.copy(picture, folder / "coco/train2017/a.png")
    return folder


TOOL = "python -m glm_edge_ft "
(WHOLE_WAY,) = (block.splitlines() for block in blocks("README.md", "bash") if "--from advertisegen" in block)
TOOL_COMMANDS = [
    line.removeprefix(TOOL) for line in command_lines("README.md") if line.startswith(TOOL) and line not in WHOLE_WAY
]


@pytest.mark.parametrize("line", TOOL_COMMANDS)
def test_commands_before_and_after_training_do_what_they_say(
    line: str, demonstrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R7, E5: each line of sections 3 and 8, on what short runs of the demonstrations left; a talk is ended at once."""
    monkeypatch.chdir(demonstrations)
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(demonstrations / "cache"))
    arguments = shlex.split(line)
    done = CliRunner().invoke(tool.app, arguments, input="/quit\n")
    assert done.exit_code == 0, done.output
    if "--prompt" in arguments:
        rows = (demonstrations / arguments[1] / "predictions/test-2.jsonl").read_text(encoding="utf-8").splitlines()
        image = Path(arguments[arguments.index("--image") + 1]).name if "--image" in arguments else None
        (row,) = (row for row in map(json.loads, rows) if is_asked(row, arguments[-1], image))
        assert done.stdout == row["prediction"] + "\n"
    elif arguments[0] == "evaluate":
        assert [row.split()[0] for row in done.stdout.splitlines()[2:5]] == arguments[2:]
        assert (demonstrations / "output/evaluate/predictions/demo-checkpoint-120.jsonl").is_file()
    elif arguments[0] == "report":
        page = "output/compare.html" if "--out" in arguments else "output/demo/report.html"
        assert done.stdout.startswith(f"report: {page} (")
        assert (demonstrations / page).read_text(encoding="utf-8").startswith("<!doctype html>")
    elif arguments[0] == "merge":
        assert (demonstrations / arguments[2] / "model.safetensors").is_file()
    elif arguments[0] == "export-gguf":
        assert (demonstrations / arguments[2]).read_bytes()[:4] == b"GGUF"
        assert done.stdout.startswith(f"GGUF file: {arguments[2]} (")
    elif arguments[0] == "convert":
        assert done.stdout.startswith(f"{arguments[2]}: 1 conversations")
        assert "not there" not in done.stdout


def is_asked(prediction: dict[str, Any], question: str, image: str | None) -> bool:
    """Return whether a predicted reply answers this question in a first turn, about this image or about none."""
    images = [Path(path).name for path in prediction.get("images", ())]
    return prediction["turn"] == 1 and question in prediction["prompt"] and images == ([image] if image else [])


def test_the_whole_way_from_a_file_to_a_phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R7: each line of section 8's path in its turn, with two steps on the demonstration's first rows in that form.

    What the last line prints is what the README shows of it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "AdvertiseGen").mkdir()
    for split in ("train", "dev"):
        lines = (ROOT / "data" / "demo" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        talks = [json.loads(line)["messages"] for line in lines]
        pairs = [(talk[0]["content"], talk[1]["content"]) for talk in talks if len(talk) == 2][:2]
        rows = [json.dumps({"content": content, "summary": summary}) for content, summary in pairs]
        (tmp_path / "AdvertiseGen" / f"{split}.json").write_text("\n".join(rows), encoding="utf-8")
    short = ("max_steps=2", "eval_strategy=no", "eval_on_start=false", "per_device_train_batch_size=1")
    printed = []
    for line in WHOLE_WAY:
        script, arguments = re.search(r"^python (-m glm_edge_ft|finetune\.py) (.*)", line).groups()  # type: ignore[union-attr]
        options = [part for setting in short for part in ("--set", f"training_args.{setting}")]
        is_run = script == "finetune.py"
        app = finetune.app if is_run else tool.app
        done = CliRunner().invoke(app, [*shlex.split(arguments), *(options if is_run else [])])
        assert done.exit_code == 0, f"{line}\n{done.output}"
        printed.append(done.stdout)
    assert (tmp_path / "output/ads.gguf").read_bytes()[:4] == b"GGUF"
    shown = "".join(blocks("README.md", "text"))
    for line in printed[-1].splitlines()[1:3]:
        assert f"{line}\n" in shown
    for text in printed[:2]:
        assert text.splitlines()[0].replace(": 2 ", ": N ") in re.sub(r": \d+ conv", ": N conv", shown)


def test_the_sizes_of_gguf_files_are_those_that_are_written() -> None:
    """The table of section 8, for the released geometry, from the tensors that an export would write."""
    from gguf import GGMLQuantizationType

    header = ("glm-edge-1.5b-chat", "glm-edge-4b-chat", "glm-edge-v-2b", "glm-edge-v-5b")
    rows = {}
    for row in re.findall(r"^\| `(f32|f16|bf16|q8_0)` \|(.*)\|$", prose("README.md"), flags=re.MULTILINE):
        rows[row[0]] = [cell.strip() for cell in row[1].split("|")][:4]
    assert list(rows) == list(TYPES)
    for index, name in enumerate(header):
        model = build_released_model(name)
        for kind, cells in rows.items():
            gguf_kind = GGMLQuantizationType[kind.upper()]
            plans = [plan(model, gguf_kind) for plan in (plan_tensors, plan_vision_tensors)]
            sizes = [sum(tensor.nbytes for tensor in planned) / 1e9 for planned in plans if planned]
            assert cells[index] == f"{' + '.join(f'{size:.2f}' for size in sizes)} GB"
            assert f"| `{kind}` | {' | '.join(cells)} |" in TEXTS["README_zh.md"]


def test_every_command_before_and_after_training_is_shown() -> None:
    """Sections 3 and 8 have a line for each."""
    assert {line.split()[0] for line in TOOL_COMMANDS} == {command.name for command in tool.app.registered_commands}


def test_the_synopsis_names_every_argument_and_option() -> None:
    """Section 4 shows all that the command takes, and nothing else."""
    lines = [line for line in command_lines("README.md") if "[RESUME]" in line]
    for (script, app), synopsis in zip(SCRIPTS.items(), lines, strict=True):
        assert f"python {script} " in synopsis
        parameters = typer.main.get_command(app).params
        options = {option for parameter in parameters for option in parameter.opts if option.startswith("--")}
        assert set(re.findall(r"--\w+", synopsis)) == options - {"--help"}
        words = re.findall(r"(?<![-=\w])\[?([A-Z_]{5,})\b(?!=)", synopsis)
        assert words == ["DATA_DIR", "MODEL", "CONFIG", "RESUME"]


@each_readme
def test_settings_in_the_prose_load(name: str) -> None:
    """A `KEY=VALUE` that a sentence recommends is accepted beside a shipped config."""
    settings = {code for code in inline_codes(name) if re.fullmatch(r"[a-z_]+\.[\w.]+=\S+", code)}
    assert len(settings) >= 3
    for setting in settings:
        key, _, value = setting.partition("=")
        config: Any = load_config(ROOT / "configs" / "lora.yaml", [setting]).resolved()
        for part in key.split("."):
            config = config[part]
        assert config == yaml.safe_load(value), setting


# ---- config keys ----


def known_keys() -> set[str]:
    """Return every key that a config may hold, as a dotted path."""
    peft = {key for peft_type in PEFT_TYPES for key in peft_fields(peft_type)}
    return {
        *TOP_FIELDS,
        *(f"data_config.{key}" for key in DATA_FIELDS),
        *(f"training_args.{key}" for key in training_fields()),
        *(f"training_args.generation_config.{key}" for key in generation_fields()),
        *(f"peft_config.{key}" for key in peft),
    }


def dotted_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every value of a config."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_keys_of_the_table_exist() -> None:
    """No key is told of that the config would refuse."""
    assert set(key_table("README.md")) <= known_keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_table_has_every_key_of_the_shipped_configs(path: Path) -> None:
    """A reader finds each key of a shipped file."""
    assert set(dotted_keys(yaml.safe_load(path.read_text(encoding="utf-8")))) <= set(key_table("README.md"))


def as_text(value: Any) -> str:
    """Write a value as the table does."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, set):
        return f"[{', '.join(sorted(value))}]"
    return value if isinstance(value, str) else json.dumps(value)


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return dotted key → the value that holds in a run whose config does not have it."""
    folder = tmp_path_factory.mktemp("defaults")
    path = folder / "least.yaml"
    least = f"data_config:\n  train_file: train.jsonl\ntraining_args:\n  output_dir: {folder}\n"
    path.write_text(least, encoding="utf-8")
    config = load_config(path)
    path.write_text(least.replace("train.jsonl\n", "train.jsonl\n  val_file: dev.jsonl\n"), encoding="utf-8")
    best = [f"training_args.{text}" for text in ("eval_strategy=epoch", "save_strategy=epoch")]
    keeps_best = load_config(path, [*best, "training_args.load_best_model_at_end=true"])
    training = vars(Seq2SeqTrainingArguments(**config.training_args, use_cpu=True))
    training["activation_checkpointing"] = bool(training["activation_checkpointing"])
    training["report_to"] = config.training_args["report_to"]  # the class turns none into an empty list
    training["metric_for_best_model"] = keeps_best.training_args["metric_for_best_model"]
    lora = vars(build_peft_config({"peft_type": "LORA"}, tiny_model()))
    prefix = build_peft_config({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, tiny_model())
    return {
        **{key: getattr(config, key) for key in TOP_FIELDS},
        **{f"data_config.{key}": getattr(config.data_config, key) for key in DATA_FIELDS},
        **{f"training_args.{key}": value for key, value in training.items()},
        **{f"peft_config.{key}": value for key, value in (vars(prefix) | lora).items()},
    }


@each_readme
def test_the_table_tells_the_real_defaults(name: str, defaults: dict[str, Any]) -> None:
    """Where the last column begins with a value, a config without the key has that value."""
    compared = 0
    for key, cell in key_table(name).items():
        literal = re.match(r"`([^`]+)`", cell)
        if literal is None:
            continue
        stated, real = literal[1], as_text(defaults[key])
        if key == "peft_config.target_modules":
            stated = f"[{', '.join(sorted(re.findall(r'[a-z]_proj', stated)))}]"
        is_number = isinstance(defaults[key], int | float) and not isinstance(defaults[key], bool)
        assert float(stated) == defaults[key] if is_number else stated == real, key
        compared += 1
    assert compared > 30


def test_old_names_are_those_that_the_config_reads() -> None:
    """C2: the table of old names is whole and right."""
    stated = {row[0].strip("`"): row[1].strip("`") for row in table("README.md", "evaluation_strategy")}
    assert stated == {old: new.new for old, new in OLD_TRAINING_NAMES.items() if isinstance(new, Renamed)}


@each_readme
def test_retired_names_are_really_retired(name: str) -> None:
    """C1, C2: the names that are said to do nothing any more are read with a notice."""
    (line,) = re.findall(r"^.*`combine`.*$", prose(name), flags=re.MULTILINE)
    names = re.findall(r"`([^`]+)`", line)
    assert len(names) == 4
    for old in names:
        assert isinstance({**OLD_TRAINING_NAMES, **OLD_TOP_NAMES}[old], Retired), old


@each_readme
def test_metric_names_are_those_that_exist(name: str) -> None:
    """C8: section 5 lists the metrics in the order of the code."""
    (line,) = re.findall(r"^.*`rouge-1`.*$", prose(name), flags=re.MULTILINE)
    assert tuple(re.findall(r"`([^`]+)`", line))[: len(METRICS)] == METRICS


def test_a_relative_deepspeed_path_starts_from_the_yaml_files_folder(tmp_path: Path) -> None:
    """C6: the YAML block of section 6 is read as the text says."""
    (block,) = blocks("README.md", "yaml")
    path = tmp_path / "run.yaml"
    head = "data_config:\n  train_file: train.jsonl\n"
    path.write_text(head + block + "  output_dir: ./output/x\n", encoding="utf-8")
    (tmp_path / "ds_zero_2.json").write_text("{}", encoding="utf-8")
    assert load_config(path).training_args["deepspeed"] == str((tmp_path / "ds_zero_2.json").resolve())


# ---- messages and outputs ----


def source_texts() -> str:
    """Return every string constant of the package but the docstrings, one a line."""
    texts: list[str] = []
    for path in sorted((ROOT / "glm_edge_ft").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                texts.append(node.value)
    return "\n".join(texts)


def test_messages_of_the_troubleshooting_table_are_in_the_code() -> None:
    """Who searches the README for a message finds it as the program writes it."""
    texts = source_texts()
    rows = table("README.md", "is neither a folder")
    assert len(rows) > 15
    for row in rows:
        message = re.findall(r"`([^`]+)`", row[0])[0]
        for part in message.split("…"):
            assert part in texts, message


def test_example_rows_are_conversations() -> None:
    """D4: every example of section 3 is accepted, with the reply that is left out left out."""
    rows = [json.loads(block) for block in blocks("README.md", "json")]
    roles = frozenset({"system", "user", "assistant"})
    pictures = [1 if '"image"' in json.dumps(row) else None for row in rows]
    parsed = [
        parse_conversation(RawRow("x", 1, 1, row), roles, most).messages
        for row, most in zip(rows, pictures, strict=True)
    ]
    assert pictures == [None, None, None, 1]
    assert [[message.supervised for message in messages] for messages in parsed] == [
        [False, True],
        [False, False, False, False, True],
        [False, True],
        [False, True, False, True],
    ]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: TokenizerMaker) -> Path:
    """Return the folder of a tiny model."""
    return save_model_folder(tmp_path_factory.mktemp("model"), make_tokenizer("glm"))


def test_the_list_of_bad_rows_is_what_the_program_prints(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """D2: the broken file of section 3 gives exactly the output shown below it."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.jsonl").write_text(blocks("README.md", "jsonl")[0], encoding="utf-8")
    only_train = ("data_config.val_file=null", "data_config.test_file=null")
    with pytest.raises(UserError) as caught:
        recipe.run(RunRequest(tmp_path, str(model_folder), ROOT / "configs" / "demo.yaml", None, only_train, True))
    capsys.readouterr()
    show_problems(caught.value.problems)
    assert capsys.readouterr().err == blocks("README.md", "text")[0]


def test_the_refused_checkpoint_number_is_what_the_program_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """R2: the example of section 7."""
    monkeypatch.chdir(tmp_path)
    for step in (2, 4, 6):
        folder = Path("output/demo") / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}), encoding="utf-8")
        (folder / "optimizer.pt").write_bytes(b"x")
        (folder / "scheduler.pt").write_bytes(b"x")
        save_file({"weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError) as caught:
        resolve_resume("99", Path("output/demo"))
    show_problems(caught.value.problems)
    (shown,) = (block for block in blocks("README.md", "text") if "RESUME 99" in block)
    assert capsys.readouterr().err == shown


def output_of(request: RunRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a request prints on stdout, run from the repository's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
        patch.chdir(ROOT)
        capsys.readouterr()
        recipe.run(request)
    return capsys.readouterr().out


def test_the_report_of_the_demo_data_is_what_the_program_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Section 3 shows the first table of `--check`; after a change of tokenizer or data, copy it anew."""
    request = RunRequest(Path("data/demo"), "glm-edge-nano", Path("configs/demo.yaml"), check=True)
    assert output_of(request, tmp_path, capsys).partition("val: ")[0] == blocks("README.md", "text")[1]


def test_the_previewed_row_is_what_the_program_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Section 3 shows the whole output of `--preview 1`; after a change of tokenizer or data, copy it anew."""
    request = RunRequest(Path("data/demo"), "glm-edge-nano", Path("configs/demo.yaml"), preview=1)
    assert output_of(request, tmp_path, capsys) == blocks("README.md", "text")[2]


@pytest.mark.parametrize(
    "model", [name if name == "glm-edge-1.5b-chat" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_the_memory_tables_are_what_the_command_prints(model: str) -> None:
    """Section 6: every number of a model's rows, in both languages."""
    printed = format_table(estimate_row(model, method) for method in ("LoRA", "full"))
    assert rows_of(printed, model) == rows_of(TEXTS["README.md"], model)
    assert rows_of(printed, model) == rows_of(TEXTS["README_zh.md"].replace("| 全参数 |", "| full |"), model)
    assert len(rows_of(printed, model)) == 4


def rows_of(text: str, model: str) -> list[str]:
    """Return the lines of Markdown tables that begin with a model's name."""
    return [line for line in text.splitlines() if line.startswith(f"| {model} |")]


def test_the_memory_of_prefix_tuning_is_the_estimate() -> None:
    """Section 6 names it for the smallest model, without activation checkpointing."""
    model = wrap_meta_model(
        load_config(ROOT / "configs/prefix.yaml").peft_config, build_released_model("glm-edge-1.5b-chat")
    )
    size = measure_size(model)
    formats = step_formats(Precision("bfloat16", bf16=True, fp16=False, reason=""), deepspeed=False, on_gpu=True)
    trace = trace_step(model, BatchShape(1, LENGTH, LENGTH - 1), formats, install_supervised_loss)
    need = f"{estimate_memory(size, 'bfloat16', trace=trace).total / 1e9:.1f} GB"
    assert f"the 1.5B model needs {need} on one GPU" in TEXTS["README.md"]
    assert f"1.5B 模型单卡需要 {need}" in TEXTS["README_zh.md"]


# ---- results: the code that loads them ----

ADAPTERS: dict[str, dict[str, Any] | None] = {
    "lora": {"peft_type": "LORA", "r": 4, "lora_alpha": 16},
    "sft": None,
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
}


QUESTION = "类型#裤*版型#宽松*颜色#黑色"


@pytest.fixture(scope="module", params=list(ADAPTERS))
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_folder: Path
) -> tuple[str, Path]:
    """Return the kind of fine-tuning and the output folder of a short run that ends with a prediction."""
    folder = tmp_path_factory.mktemp("trained")
    output = folder / "output"
    row = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "你喜欢什么颜色？"}]}
    (folder / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    config = {
        "data_config": dict.fromkeys(("train_file", "val_file", "test_file"), "rows.jsonl"),
        "training_args": {
            "output_dir": str(output),
            "max_steps": 4,
            "save_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "logging_steps": 1,
            "learning_rate": 3e-2,
            "disable_tqdm": True,
            "generation_config": {"max_new_tokens": 128},
        },
        "peft_config": ADAPTERS[request.param],
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM_EDGE_FT_CACHE", str(folder / "cache"))
        recipe.run(RunRequest(folder, str(model_folder), path))
    return request.param, output


def base_reply(model_folder: Path) -> str:
    """Return what the model answered before it was trained."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    messages = [{"role": "user", "content": QUESTION}]
    inputs: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def test_the_snippet_answers_as_the_evaluation_did(
    trained: tuple[str, Path], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R7, T1: the code of section 8 loads the output folder and replies as predictions/ says, not as the base model."""
    kind, output = trained
    (snippet,) = (block for block in blocks("README.md", "python") if f'"output/{kind}"' in block)
    assert QUESTION in snippet
    capsys.readouterr()
    exec(snippet.replace(f'"output/{kind}"', repr(str(output))), {})
    printed = capsys.readouterr().out.strip()
    (prediction,) = (output / "predictions" / "test-4.jsonl").read_text(encoding="utf-8").splitlines()
    assert printed == json.loads(prediction)["prediction"].strip()
    assert printed != base_reply(model_folder)


def test_the_output_folder_holds_what_section_8_lists(trained: tuple[str, Path]) -> None:
    """R7: every file of the table is there after a run, each kind of fine-tuning with its own; nothing else is."""
    kind, output = trained
    rows = [row for row in table("README.md", "adapter_model.safetensors") if "preprocessor_config" not in row[0]]
    adapter, model, *others = ([code.rstrip("/") for code in re.findall(r"`([^`]+)`", row[0])] for row in rows)
    names = (model if kind == "sft" else adapter) + [name for group in others for name in group if name != "earlier"]
    for name in names:
        assert (output / name.replace("N", "4")).exists(), name
    top = {name.split("/")[0].replace("N", "4") for name in names}
    assert {path.name for path in output.iterdir()} - {"README.md"} == top


def test_the_log_has_the_keys_that_section_8_names(trained: tuple[str, Path]) -> None:
    """The keys that the table gives for metrics.jsonl are in the file."""
    (cell,) = (row[1] for row in table("README.md", "adapter_model.safetensors") if "metrics.jsonl" in row[0])
    lines = (trained[1] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    assert {"train_runtime", *re.findall(r"`([^`]+)`", cell)} <= logged


def test_the_vision_snippet_answers_as_the_evaluation_did(
    tmp_path: Path, backend: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """R7: adapter, tokenizer and image processor of the output folder, and the base model that it names."""
    model = save_vision_folder(tmp_path / "model", backend)
    (snippet,) = (block for block in blocks("README.md", "python") if '"output/vision"' in block)
    (question,) = re.findall(r'"text": "([^"]+)"', snippet)
    row = turns([image_part("dog.png"), text_part(question)], "今天天气很好")
    picture = draw(tmp_path / "data" / "dog.png", 1)
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(row), encoding="utf-8")
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    settings: dict[str, Any] = {"generation_config": {"max_new_tokens": 128}, "learning_rate": 3e-2, "max_steps": 4}
    output = do_run(tmp_path / "output", tmp_path / "data", model, test="train.jsonl", takes_images=True, **settings)
    capsys.readouterr()
    exec(snippet.replace('"output/vision"', repr(str(output))).replace('"images/dog.jpg"', repr(str(picture))), {})
    (prediction,) = (output / "predictions" / "test-4.jsonl").read_text(encoding="utf-8").splitlines()
    printed = capsys.readouterr().out.strip()
    assert printed == json.loads(prediction)["prediction"].strip()
    assert printed
    assert {path.name for path in output.iterdir()} >= {"preprocessor_config.json", "adapter_config.json"}
