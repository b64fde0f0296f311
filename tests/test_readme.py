"""What the READMEs of all folders say holds: commands, keys, links, examples, messages, outputs."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import finetune
import finetune_vision
from data import make_demo, make_demo_vision
from data.embedded import train_chat, train_vision
from glm_edge_ft import __main__ as tool
from glm_edge_ft import recipe
from glm_edge_ft.config import load_config
from glm_edge_ft.console import show_problems
from glm_edge_ft.data.conversation import parse_conversation
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.errors import UserError
from glm_edge_ft.run import RunRequest
from tests.conftest import TokenizerMaker
from tests.documents import (
    DATA,
    DEPLOY,
    DOCUMENTS,
    ENGLISH,
    FOLDERS,
    ROOT,
    TEXTS,
    TRANSLATED,
    blocks,
    codes,
    commands,
    prose,
    table_rows,
)
from tests.model_folders import save_model_folder
from tests.vision_folders import draw

TWO_COMMANDS = (
    "pip install -r requirements.txt && python finetune.py data/demo glm-edge-nano configs/demo.yaml",
    "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest",
)
OF_THE_READER = {  # stand for the reader's own data
    *("data/AdvertiseGen/", "data/CogVLM-311K/", "data/ads/", "data/ads/train.jsonl", "data/ads/dev.jsonl"),
    *("data/mine/train.jsonl", "data/pictures/train.jsonl"),
}
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
each_translation = pytest.mark.parametrize("pair", TRANSLATED, ids=FOLDERS)


# ---- the documents beside one another, and what they name ----


@pytest.mark.parametrize("path", TRANSLATED[0], ids=("en", "zh"))
def test_the_first_page_is_short_and_has_both_commands(path: Path) -> None:
    """A newcomer copies these two lines."""
    assert len(TEXTS[path].splitlines()) <= 200
    assert [line for line in commands(path) if line in TWO_COMMANDS] == list(TWO_COMMANDS)


@each_translation
def test_both_languages_hold_the_same_blocks_keys_and_messages(pair: tuple[Path, Path]) -> None:
    """Commands, code, examples and outputs are equal, and so is the code in the first column of tables."""
    assert blocks(pair[0]) == blocks(pair[1]) != []
    first, second = ([re.findall(r"`([^`]+)`", row[0]) for row in table_rows(path)] for path in pair)
    assert first == second


def slugs(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as the usual renderers spell them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    """A link names a file of the repository, and after `#` a heading of it."""
    for link in re.findall(r"\]\(([^)]+)\)", prose(path)):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_file(), link
        assert not anchor or anchor in slugs(target), link


@each_document
def test_paths_that_are_mentioned_exist(path: Path) -> None:
    """Whatever begins like a file or folder of the repository is one, seen from its root or from the document."""
    words = [*codes(path), *(word for line in commands(path) for word in shlex.split(line))]
    tops = re.compile(r"(?:configs|data|glm_edge_ft|tests|docs|\.ci)/\S*|[\w/]+\.(?:py|md)")
    paths = {word for word in words if tops.fullmatch(word)} - OF_THE_READER
    assert [word for word in paths if not (ROOT / word).exists() and not (path.parent / word).exists()] == []


def is_unknown(key: str) -> bool:
    """Return whether a config refuses a dotted key as unknown, whichever kind of adapter it has."""
    for config in ("lora", "prefix"):
        try:
            load_config(ROOT / "configs" / f"{config}.yaml", [f"{key}=null"])
        except UserError as error:
            if not any(f"`{key.rpartition('.')[2]}`" in problem.what for problem in error.problems):
                return False
        else:
            return False
    return True


def test_config_keys_that_are_mentioned_exist() -> None:
    """Each dotted key is one that a config may hold, and each `KEY=VALUE` loads beside a shipped config."""
    named = {code for path in DOCUMENTS for code in codes(path)}
    section = r"(?:training_args|data_config|peft_config)\.[\w.]+"
    keys = {code for code in named if re.fullmatch(section, code)}
    assert len(keys) > 30
    assert {key for key in keys if is_unknown(key)} == set()
    assert is_unknown("training_args.learning_rat")
    for setting in (code for code in named if re.fullmatch(rf"{section}=\S+", code)):
        key, _, value = setting.partition("=")
        config: Any = load_config(ROOT / "configs" / "lora.yaml", [setting]).resolved()
        for part in key.split("."):
            config = config[part]
        assert config == yaml.safe_load(value) or key == "training_args.deepspeed", setting


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


def test_messages_of_the_tables_are_in_the_code() -> None:
    """Who searches a README for a message finds it as the program writes it."""
    texts, found = source_texts(), 0
    for path in ENGLISH:
        for lines in re.findall(
            r"^\| message \| what to do \|\n\|---\|---\|\n((?:^\|.*\|\n)+)", TEXTS[path], flags=re.M
        ):
            for message in re.findall(r"^\| `([^`]+)`", lines, flags=re.MULTILINE):
                found += 1
                assert [part for part in message.split("…") if part not in texts] == [], message
    assert found > 30


# ---- commands ----

SCRIPTS = {"finetune.py": finetune.app, "finetune_vision.py": finetune_vision.app}
MAKERS = {
    "python data/make_demo.py ": make_demo.main,
    "python data/make_demo_vision.py ": make_demo_vision.main,
    "python -m data.embedded.train_chat ": train_chat.main,
    "python -m data.embedded.train_vision ": train_vision.main,
}
TOOL = "python -m glm_edge_ft "
(WHOLE_WAY,) = (block.splitlines() for block in blocks(DEPLOY, "bash") if "--from advertisegen" in block)
TOOL_COMMANDS = [
    line.removeprefix(TOOL) for line in commands(*ENGLISH) if line.startswith(TOOL) and line not in WHOLE_WAY
]


def parse(app: typer.Typer, name: str, arguments: str) -> dict[str, Any]:
    """Return what the real command makes of its arguments."""
    return dict(typer.main.get_command(app).make_context(name, shlex.split(arguments)).params)


def test_every_line_of_the_bash_blocks_is_a_command() -> None:
    """Each command parses its arguments, and CONFIG loads with its `--set` options."""
    for line in commands(*ENGLISH):
        script = re.search(r"(finetune(?:_vision)?\.py) (?!DATA_DIR)(.*)", line)
        if script:
            parsed = parse(SCRIPTS[script[1]], *script.groups())
            load_config(ROOT / parsed["config"], parsed["overrides"] or ())
            assert (ROOT / parsed["data_dir"]).is_dir() or f"{parsed['data_dir']}/" in OF_THE_READER
        elif maker := next((start for start in MAKERS if line.startswith(start)), None):
            app = typer.Typer()
            app.command()(MAKERS[maker])  # type: ignore[type-var]
            parse(app, maker, line.removeprefix(maker))
        else:
            assert re.match(
                r"pip install |python -m (pytest|glm_edge_ft|tests\.bench\.\w+)|python finetune\S* DATA", line
            )


def test_every_command_and_argument_is_shown() -> None:
    """Each command of the tool has a line, and the synopsis names all that the scripts take, and nothing else."""
    assert {line.split()[0] for line in TOOL_COMMANDS} == {command.name for command in tool.app.registered_commands}
    lines = [line for line in commands(ROOT / "README.md") if "[RESUME]" in line]
    for (script, app), synopsis in zip(SCRIPTS.items(), lines, strict=True):
        assert f"python {script} " in synopsis
        options = {name for parameter in typer.main.get_command(app).params for name in parameter.opts}
        assert set(re.findall(r"--\w+", synopsis)) == {name for name in options if name[:2] == "--"} - {"--help"}


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
    talk = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    (folder / "llava.json").write_text(json.dumps([{"image": "a.png", "conversations": talk}]), encoding="utf-8")
    draw(folder / "coco/train2017/a.png", 1)
    return folder


@pytest.mark.parametrize("line", TOOL_COMMANDS)
def test_commands_before_and_after_training_do_what_they_say(
    line: str, demonstrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R7, E5: each line, on what short runs of the demonstrations left; a conversation is ended at once."""
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
        assert [row.split()[0] for row in done.stdout.splitlines()[2 : len(arguments)]] == arguments[2:]
    elif arguments[0] == "report":
        page = "output/compare.html" if "--out" in arguments else "output/demo/report.html"
        assert (demonstrations / page).read_text(encoding="utf-8").startswith("<!doctype html>")
    elif arguments[0] == "merge":
        assert (demonstrations / arguments[2] / "model.safetensors").is_file()
    elif arguments[0] == "export-gguf":
        assert (demonstrations / arguments[2]).read_bytes()[:4] == b"GGUF"
    elif arguments[0] == "convert":
        assert done.stdout.startswith(f"{arguments[2]}: 1 conversations")
        assert "not there" not in done.stdout


def is_asked(prediction: dict[str, Any], question: str, image: str | None) -> bool:
    """Return whether a predicted reply answers this question in a first turn, about this image or about none."""
    images = [Path(path).name for path in prediction.get("images", ())]
    return prediction["turn"] == 1 and question in prediction["prompt"] and images == ([image] if image else [])


def test_the_whole_way_from_a_file_to_a_phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R7: each line of the way in its turn, with two steps on the demonstration's first rows in that form."""
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
    options = [part for setting in short for part in ("--set", f"training_args.{setting}")]
    printed = ""
    for line in WHOLE_WAY:
        is_run = "finetune.py" in line
        arguments = shlex.split(line.partition("finetune.py " if is_run else TOOL)[2])
        done = CliRunner().invoke(finetune.app if is_run else tool.app, [*arguments, *(options if is_run else [])])
        assert done.exit_code == 0, f"{line}\n{done.output}"
        printed += done.stdout
    assert (tmp_path / "output/ads.gguf").read_bytes()[:4] == b"GGUF"
    shown = next(block for block in blocks(DEPLOY, "text") if "GGUF file" in block)
    for start in ("check passed", "merged model", "GGUF file", "llama.cpp:", "Ollama:"):
        (line,) = (line for line in shown.splitlines() if line.startswith(start))
        assert line in printed


# ---- examples and outputs ----


def test_example_rows_are_conversations() -> None:
    """D4: every example row is accepted, and supervised as its text says."""
    roles = frozenset({"system", "user", "assistant"})
    masks = []
    for block in blocks(DATA, "json"):
        parsed = parse_conversation(RawRow("x", 1, 1, json.loads(block)), roles, 1 if '"image"' in block else None)
        masks.append([message.supervised for message in parsed.messages])
    assert masks == [[False, True], [False, False, False, False, True], [False, True], [False, True, False, True]]
    assert blocks(ROOT / "README.md", "json") == blocks(DATA, "json")[:1]


def test_the_list_of_bad_rows_is_what_the_program_prints(
    tmp_path: Path, make_tokenizer: TokenizerMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """D2: the broken file gives exactly the output shown below it."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    model = save_model_folder(tmp_path / "model", make_tokenizer("glm"))
    (tmp_path / "train.jsonl").write_text(blocks(DATA, "jsonl")[0], encoding="utf-8")
    only_train = ("data_config.val_file=null", "data_config.test_file=null")
    with pytest.raises(UserError) as caught:
        recipe.run(RunRequest(tmp_path, str(model), ROOT / "configs" / "demo.yaml", None, only_train, True))
    capsys.readouterr()
    show_problems(caught.value.problems)
    assert capsys.readouterr().err == blocks(DATA, "text")[0]


@pytest.mark.parametrize(("option", "shown"), [({"check": True}, 1), ({"preview": 1}, 2)], ids=["check", "preview"])
def test_report_and_preview_of_the_demo_data_are_what_the_program_prints(
    option: dict[str, Any],
    shown: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first table of `--check`, and all of `--preview 1`; after a change of tokenizer or data, copy them anew."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    recipe.run(RunRequest(Path("data/demo"), "glm-edge-nano", Path("configs/demo.yaml"), **option))
    assert capsys.readouterr().out.partition("val: ")[0] == blocks(DATA, "text")[shown]
