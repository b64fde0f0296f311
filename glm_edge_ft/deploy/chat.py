"""`python -m glm_edge_ft chat`: talk to a model, or put one question to it.

Its prompts are encoded as in training and evaluation, and a run's model answers with the run's generation settings, so
that it says here what `predictions/` has of it.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.environment import quiet_libraries
from glm_edge_ft.config import RunConfig
from glm_edge_ft.console import is_unicode, show_notice
from glm_edge_ft.deploy.opening import load_model, open_checkpoint, prepare_use
from glm_edge_ft.deploy.settings import default_settings, settings_of_run
from glm_edge_ft.deploy.source import Source, find_source
from glm_edge_ft.deploy.talk import Talk, find_picture, is_dropped_file
from glm_edge_ft.errors import UserError

if TYPE_CHECKING:
    from glm_edge_ft.model.checkpoint import Checkpoint

_SAMPLING = ("temperature", "top_p", "top_k")
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", flags=re.DOTALL | re.IGNORECASE)
COMMANDS = "/image PATH shows a picture, /clear begins anew, /quit or Ctrl-D ends, Ctrl-C stops a reply"


@dataclass(frozen=True)
class ChatRequest:
    """One command line, as given; `generation` holds the options that were given, by the name that transformers has."""

    model: str
    base: str | None = None
    image: str | None = None
    system: str | None = None
    prompt: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None


def chat(request: ChatRequest) -> None:
    """Answer `--prompt` on stdout, or talk until `/quit` or the end of the input.

    Raises UserError for everything of the command line that cannot be used.
    """
    if request.prompt is None and sys.stdin is None:
        raise UserError.single("stdin", "is closed, so that no question comes", "ask with --prompt")
    source = find_source(request.model, request.base)
    settings = settings_of_run(source) or default_settings()
    quiet_libraries()
    checkpoint = open_checkpoint(source)
    config = _with_options(settings, request.generation)
    config = replace(config, max_input_length=_room_for_prompt(source, config, checkpoint))
    prepared = prepare_use(source, config, takes_images=checkpoint.is_vision, output_dir=Path("output"), data_files={})
    if request.system is not None and "system" not in prepared.encoder.reply_format.rendered_roles:
        show_notice("--system has no effect: the model's chat template leaves system turns out")
    if request.image is not None:
        find_picture(prepared, request.image)  # before the weights take their time
    talk = Talk(prepared, load_model(prepared), request.system)
    if request.image is not None:
        talk.attach(request.image)
    if request.seed is not None:
        import torch

        torch.manual_seed(request.seed)
    if request.prompt is None:
        converse(talk)
    else:
        talk.ask(request.prompt, _write)
        _write("\n")


def _with_options(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """Lay the command line's options over the run's: sampling where they speak of it, and greedy at temperature 0."""
    generation = {**config.generation_config, **options}
    if options.get("temperature") == 0:
        generation = {key: value for key, value in generation.items() if key not in _SAMPLING} | {"do_sample": False}
    elif any(key in options for key in _SAMPLING):
        generation["do_sample"] = True
    return replace(config, generation_config=generation)


def _room_for_prompt(source: Source, config: RunConfig, checkpoint: Checkpoint) -> int:
    """Return how many tokens a talk may have: all positions of the model but those of prefix and reply."""
    positions = getattr(checkpoint.config, "max_position_embeddings", None) or sys.maxsize
    reply = config.generation_config.get("max_new_tokens") or config.max_output_length
    room = int(positions - reply - (source.adapter.prefix_tokens if source.adapter else 0))
    if room < 1:
        what = f"is {reply}, which leaves no room for a question: the model has {positions} positions"
        raise UserError.single("--max-new-tokens", what, "give a smaller number")
    return room


def converse(talk: Talk) -> None:
    """Answer what comes on stdin, line by line, until `/quit` or its end.

    Raises UserError where stdin cannot be read.
    """
    is_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (arrow keys and history)
        print(f"{talk.prepared.plan.request.model}: {COMMANDS}", file=sys.stderr)
    was_interrupted = False
    while True:
        try:
            line = input("> " if is_terminal else "").removeprefix("\ufeff").strip()
        except OSError as error:
            raise UserError.single("stdin", f"cannot be read: {error.strerror}", "ask with --prompt") from None
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            if was_interrupted:
                return
            was_interrupted = True
            print("\n(once more, or /quit, ends the talk)", file=sys.stderr)
            continue
        was_interrupted = False
        command = _COMMAND.fullmatch(line)
        if command is not None and command[1].lower() in ("quit", "exit"):
            return
        if line:
            with _shown_mistakes():
                _answer(talk, line, command)


def _answer(talk: Talk, line: str, command: re.Match[str] | None) -> None:
    name, argument = (command[1].lower(), command[2]) if command else (None, None)
    if not is_unicode(line) or "\0" in line:
        what = "the line is not UTF-8 text, and is left out"
        raise UserError.single("stdin", what, "set the terminal to UTF-8, or convert the file (iconv -t UTF-8)")
    if name is None and talk.prepared.encoder.takes_images and is_dropped_file(line):
        name, argument = "image", line
    if name is None:
        talk.ask(line, _write)
        _write("\n")
    elif name == "image" and argument:
        talk.attach(argument)
        print(f"{talk.image} goes with the next question", file=sys.stderr)
    elif name == "clear":
        talk.clear()
    else:
        print(COMMANDS, file=sys.stderr)


@contextlib.contextmanager
def _shown_mistakes() -> Any:
    """Show the mistakes of one turn and go on with the talk."""
    try:
        yield
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)


def _write(text: str) -> None:
    print(text, end="", flush=True)
