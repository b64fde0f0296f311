"""Chatting with a model: what it says is what its evaluation had of it, and what ends a reply, a turn, a chat."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.deploy.chat import COMMANDS, ChatSession, chat, converse
from glm_edge_ft.deploy.evaluate import evaluate
from glm_edge_ft.deploy.source import (
    default_settings,
    find_source,
    load_model,
    open_checkpoint,
    prepare_inference,
    run_settings,
)
from glm_edge_ft.errors import UserError
from tests.deploy.conftest import KINDS, ROOT, TURNS, command
from tests.runs import predictions
from tests.vision_folders import draw

Pieces = list[str]
Typed = Callable[..., tuple[str, str]]
IMAGE_FIRST = re.compile(re.escape("<|user|>\\n<|begin_of_image|>"))


def open_session(name: Path, **options: Any) -> ChatSession:
    """Return a chat with a model, opened as the command does."""
    source = find_source(str(name))
    checkpoint = open_checkpoint(source)
    config = run_settings(source) or default_settings()
    images = checkpoint.is_vision
    prepared = prepare_inference(source, config, takes_images=images, output_dir=Path("output"), data_files={})
    return ChatSession(prepared, load_model(prepared), **options)


def ignore(_: str) -> None:
    """Show nothing."""


def answer(capsys: pytest.CaptureFixture[str], model: Path | str, prompt: str, **options: Any) -> str:
    """Return what `chat --prompt` prints on stdout."""
    capsys.readouterr()
    chat(str(model), prompt=prompt, **options)
    return capsys.readouterr().out


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Return a function that converses over bytes or a text on stdin, and returns what was printed on both streams."""

    def type_in(session: ChatSession, given: bytes | str) -> tuple[str, str]:
        content = given if isinstance(given, bytes) else given.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        capsys.readouterr()
        converse(session)
        printed = capsys.readouterr()
        return printed.out, printed.err

    return type_in


@pytest.mark.parametrize("kind", KINDS)
def test_one_answer_is_what_the_evaluation_predicted(
    kind: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """R7, T1: from the output folder and from a checkpoint, with a prefix too, and not what the base model says."""
    for row in predictions(runs[kind])[:2]:
        question = TURNS[row["line"] - 1][0]
        for folder in (runs[kind], runs[kind] / "checkpoint-6"):
            assert answer(capsys, folder, question) == row["prediction"] + "\n"
    assert {row["prediction"] for row in predictions(runs[kind])} - {""}


def test_an_adapter_changes_the_answer(
    runs: dict[str, Path], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base model below each adapter says something else."""
    base = answer(capsys, model_folder, TURNS[0][0], generation={"max_new_tokens": 8})
    assert base not in {answer(capsys, runs[kind], TURNS[0][0]) for kind in KINDS}


def test_a_talk_is_encoded_as_a_row_of_its_turns(runs: dict[str, Path]) -> None:
    """With the history that the file has, the replies are those of the evaluation at each turn."""
    talk = open_session(runs["lora"])
    rows = [row for row in predictions(runs["lora"]) if row["line"] == 4]
    assert [row["turn"] for row in rows] == [1, 3, 5, 7]
    for (question, reference), row in zip(TURNS, rows, strict=True):
        pieces: Pieces = []
        assert talk.ask(question, pieces.append) == "".join(pieces) == row["prediction"]
        talk.messages[-1]["content"] = reference  # the evaluation goes on from the true history


def test_the_history_is_cleared(runs: dict[str, Path]) -> None:
    """`/clear`: the next answer is the first one again, the system turn stays."""
    talk = open_session(runs["lora"], system="you are fine")
    first = talk.ask("how are you", ignore)
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    talk.ask("hello there", ignore)
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "you are fine"}]
    assert talk.ask("how are you", ignore) == first


@pytest.mark.slow  # how far the reply has come when the key is pressed depends on the machine
def test_ctrl_c_ends_the_reply_and_not_the_talk(runs: dict[str, Path]) -> None:
    """What was said stays in the history; a question without any reply does not."""
    talk = open_session(runs["lora"])
    whole = talk.ask(TURNS[0][0], ignore)
    talk.clear()
    pieces: Pieces = []

    def write(text: str) -> None:
        pieces.append(text)
        signal.raise_signal(signal.SIGINT)

    assert talk.ask(TURNS[0][0], write) == pieces[0]
    assert whole.startswith(pieces[0]) and whole != pieces[0]
    assert talk.messages[-1] == {"role": "assistant", "content": pieces[0]}
    kept, context = list(talk.messages), talk.context

    def stop_at_the_first_token(ids: Sequence[int]) -> str:
        signal.raise_signal(signal.SIGINT)
        return context.clean(ids)

    talk.context = replace(context, clean=stop_at_the_first_token)
    assert talk.ask(TURNS[1][0], write) == ""
    assert talk.messages == kept
    talk.context = context
    assert talk.ask(TURNS[1][0], ignore)


def test_the_talk_goes_on_after_a_mistake_and_ends_with_quit(runs: dict[str, Path]) -> None:
    """Commands, an unknown one, a picture for a chat model; stdout has the answers alone."""
    first = predictions(runs["lora"])[0]["prediction"]
    question = TURNS[0][0]
    given = f"{question}\n/image x.png\n/what\n/clear\n\n{question}\n/quit\n{question}\n"
    done = command("chat", str(runs["lora"]), given=given)
    assert (done.returncode, done.stdout) == (0, f"{first}\n{first}\n")
    assert "image x.png: " in done.stderr and "is a chat model and sees no images" in done.stderr
    assert COMMANDS in done.stderr


def test_the_end_of_the_input_ends_the_talk(vision_run: Path, typed: Typed) -> None:
    """The last line has no line break; `/image` takes a quoted path and shows the picture with the next question."""
    (row, *_) = (row for row in predictions(vision_run) if "images" in row and IMAGE_FIRST.match(row["prompt"]))
    out, _ = typed(open_session(vision_run), f'/image "{row["images"][0]}"\nwhat is the colour?')
    assert out == row["prediction"] + "\n"


def test_what_a_terminal_writes_of_a_dropped_file_is_understood(
    vision_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    """K29: quotes, backslashes, a URL, `~`, capitals, and no command at all; the picture goes with the question."""
    picture = draw(tmp_path / "it's my (new) 图.png", 1)
    draw(tmp_path / "my pic.png", 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    quoted, escaped = shlex.quote(str(picture)), re.sub(r"([ '()])", r"\\\1", str(picture))
    forms = [
        *(f"/image {form}" for form in (quoted, escaped, str(picture), picture.as_uri(), "my pic.png", "~/my pic.png")),
        *("/image my\\ pic.png ", "/image 'my pic.png'", '/Image "my pic.png"', "/IMAGE ~/my\\ pic.png"),
        *(quoted, f"{escaped} ", picture.as_uri(), str(picture)),
    ]
    talk = open_session(vision_run)
    for form in forms:
        _, err = typed(talk, f"/clear\n{form}\n")
        assert talk.image is not None, form
        assert Path(talk.image).samefile(picture if "new" in form else tmp_path / "my pic.png")
        assert err.count("\n") == 1


def test_a_line_that_names_no_file_is_one_line_and_the_talk_goes_on(vision_run: Path, typed: Typed) -> None:
    """K29: an open quote, a path without end, a NUL, bytes that are no text, a file of another encoding."""
    talk = open_session(vision_run)
    for line, said in (
        (b"/image 'my pic.png", "image 'my pic.png: there is no such file"),
        (b"/image " + b"a" * 5000, "File name too long"),
        (b"/image file:///none%20x.png", "no such file"),
        (b"/image ~nosuchuser/x.png", "image ~nosuchuser/x.png: there is no such file"),
        (b"/image a\0b.png", "not UTF-8 text"),
        (b"caf\xe9", "not UTF-8 text"),
        ("你好".encode("utf-16"), "not UTF-8 text"),
        (b"/what", COMMANDS),
    ):
        out, err = typed(talk, line)
        assert (out, said in err, len(err) < 6000) == ("", True, True), err
    assert talk.messages == []


def test_a_byte_order_mark_of_a_piped_file_is_no_text(runs: dict[str, Path], typed: Typed) -> None:
    """K29: the answer is that to the question without it."""
    out, _ = typed(open_session(runs["lora"]), b"\xef\xbb\xbf" + TURNS[0][0].encode())
    assert out == predictions(runs["lora"])[0]["prediction"] + "\n"


def test_arguments_that_are_no_text_and_a_closed_stdin_are_one_line(tmp_path: Path) -> None:
    """K29: nothing heavy is read for it; every command refuses such bytes, all of them at once."""
    bad = b"caf\xe9"
    commands: list[tuple[list[str | bytes], int]] = [
        (["chat", "glm-edge-nano", "--prompt", bad, "--system", b"\xff"], 2),
        (["evaluate", bad, bad, "--base", bad], 3),
        (["export-gguf", bad, b"out.gguf"], 1),
        (["convert", bad, b"new.jsonl", "--from", bad], 2),
    ]
    for arguments, count in commands:
        line: list[str | bytes] = [sys.executable, "-m", "glm_edge_ft", *arguments]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {count} problem"), done.stderr
        assert done.stderr.count("is not UTF-8") == count
    closed = f"{shlex.quote(sys.executable)} -m glm_edge_ft chat glm-edge-nano <&-"
    done = subprocess.run(closed, shell=True, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 1 problem in the input\nstdin: is closed")


def test_pictures_are_seen_as_in_the_evaluation(
    vision_run: Path, vision_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--image` beside `--prompt`; the picture stands before the question, as in the rows chosen here."""
    rows = [row for row in predictions(vision_run) if row["turn"] == 1 and IMAGE_FIRST.match(row["prompt"])]
    assert len(rows) == 2
    for row in rows:
        said = answer(capsys, vision_run, "what is the colour?", image=row["images"][0])
        assert said == row["prediction"] + "\n"


def test_what_is_no_picture_or_one_too_many_is_refused(vision_run: Path, tmp_path: Path) -> None:
    """I3, I4: a missing file, a text file, and a second picture in one talk; `/clear` makes room."""
    talk = open_session(vision_run)
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    picture = draw(tmp_path / "with space" / "图.png", 1)
    for path, what in ((tmp_path / "none.png", "there is no such file"), (tmp_path / "text.png", "is no image")):
        with pytest.raises(UserError, match=f"image {re.escape(str(path))}: .*{what}"):
            talk.attach(str(path))
    talk.attach(str(picture))
    talk.ask("what is the colour?", ignore)
    with pytest.raises(UserError, match=r"(?s)has 1 image already, and the model takes 1.*/clear"):
        talk.attach(str(picture))
    talk.clear()
    talk.attach(str(picture))


def test_a_picture_of_the_command_line_that_cannot_be_used_is_refused(
    model_folder: Path, vision_model: Path, tmp_path: Path
) -> None:
    """I3: `--image` beside a chat model, and one that is not there."""
    picture = draw(tmp_path / "1.png", 1)
    for model, path, what in (
        (model_folder, picture, "is a chat model and sees no images"),
        (vision_model, tmp_path / "none.png", "there is no such file"),
    ):
        with pytest.raises(UserError, match=f"image {re.escape(str(path))}: .*{what}"):
            chat(str(model), image=str(path), prompt="hi")


def test_a_question_that_cannot_be_encoded_leaves_the_talk_as_it_was(vision_run: Path) -> None:
    """The text of the placeholder would be taken for a piece of a picture."""
    talk = open_session(vision_run)
    with pytest.raises(UserError, match="image placeholder"):
        talk.ask("<|begin_of_image|>", ignore)
    assert talk.messages == []


def test_options_go_before_the_runs_settings(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A length, a seed that repeats, and temperature 0, which is greedy."""
    row = predictions(runs["lora"])[0]
    assert len(answer(capsys, runs["lora"], TURNS[0][0], generation={"max_new_tokens": 2})) < len(row["prediction"])
    sampled = {"generation": {"temperature": 5.0}, "seed": 3}
    assert answer(capsys, runs["lora"], TURNS[0][0], **sampled) == answer(capsys, runs["lora"], TURNS[0][0], **sampled)
    assert answer(capsys, runs["lora"], TURNS[0][0], **sampled) != row["prediction"] + "\n"
    assert answer(capsys, runs["lora"], TURNS[0][0], generation={"temperature": 0}) == row["prediction"] + "\n"


def test_beams_are_shown_when_they_are_done(
    runs: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers streams none; the answer is that of the evaluation with beams."""
    beams = ("training_args.generation_config.num_beams=2",)
    evaluate(data / "test.jsonl", (str(runs["prefix"]),), tmp_path / "out", None, beams)
    said = answer(capsys, runs["prefix"], TURNS[0][0], generation={"num_beams": 2})
    assert said == predictions(tmp_path / "out", "prefix")[0]["prediction"] + "\n"


def test_a_reply_as_long_as_the_model_is_refused(model_folder: Path) -> None:
    """No position would be left for a question."""
    with pytest.raises(UserError, match="--max-new-tokens: is 8192, which leaves no room"):
        chat(str(model_folder), prompt="hi", generation={"max_new_tokens": 8192})


def test_a_system_turn_that_the_template_drops_is_said(vision_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The template of the released vision models leaves it out."""
    chat(str(vision_run), prompt="hi", system="you are fine")
    assert "--system has no effect" in capsys.readouterr().err


def test_a_wrong_model_exits_with_2_and_says_so_at_once(tmp_path: Path) -> None:
    """No traceback, nothing on stdout, and nothing heavy imported for it."""
    done = command("chat", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: 1 problem in the input\nMODEL {tmp_path}: the folder holds neither")


def test_a_base_model_that_cannot_be_used_is_said_with_the_way_out(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R7: the base is a hub id that is not cached; and with `--base`, a model of another size."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = find_source(str(runs["lora"]))
    lost = type(source)(
        source.name, type(source.location)("THUDM/none", "THUDM/none", False, runs["lora"]), source.adapter
    )
    with pytest.raises(UserError, match=r"(?s)its base model THUDM/none cannot be used: .*--base MODEL"):
        open_checkpoint(lost)
    with pytest.raises(UserError, match=r"this adapter does not fit .*glm-edge-nano"):
        chat(str(runs["lora"]), base="glm-edge-nano", prompt="hi")


def test_help_is_light_and_names_what_there_is() -> None:
    """It answers at once because there is nothing to wait for."""
    done = command("chat", "--help")
    assert done.returncode == 0
    for text in (
        "MODEL_OR_CHECKPOINT",
        "--base",
        "--image",
        "--system",
        "--prompt",
        "--max-new-tokens",
        "--temperature",
    ):
        assert text in done.stdout
    program = (
        "import sys, glm_edge_ft.__main__; print(sorted({'torch', 'transformers', 'peft', 'PIL'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert shown.stdout == "[]\n"
