"""`python -m glm_edge_ft chat`: a conversation with a model, or one answer.

Prompts are encoded as in training and evaluation, and a run's model answers with the run's generation settings, so that
its answers here are those in its `predictions/`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from glm_edge_ft.checks.environment import quiet_libraries
from glm_edge_ft.config import RunConfig
from glm_edge_ft.console import is_unicode, show_notice
from glm_edge_ft.deploy.source import (
    default_settings,
    find_source,
    load_model,
    open_checkpoint,
    prepare_inference,
    run_settings,
)
from glm_edge_ft.errors import UserError, shorten
from glm_edge_ft.files import expand_home
from glm_edge_ft.run import Prepared, build_generation_context

if TYPE_CHECKING:
    import torch

    from glm_edge_ft.data.template import ReplyFormat

_SAMPLING = ("temperature", "top_p", "top_k")
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", flags=re.DOTALL | re.IGNORECASE)
COMMANDS = "/image PATH shows an image, /clear begins anew, /quit or Ctrl-D ends, Ctrl-C stops a reply"

Message = dict[str, Any]


def chat(
    model: str,
    base: str | None = None,
    image: str | None = None,
    system: str | None = None,
    prompt: str | None = None,
    generation: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> None:
    """Answer `prompt` on stdout, or, without one, what comes on stdin until `/quit` or its end.

    Each argument is the option of its name; `generation` has those for sampling and length that were given, by the
    names of transformers.

    Raises UserError for everything of the command line that cannot be used.
    """
    if prompt is None and sys.stdin is None:
        raise UserError.single("stdin", "is closed, so that no question comes", "ask with --prompt")
    source = find_source(model, base)
    config = _with_options(run_settings(source) or default_settings(), generation or {})
    quiet_libraries()
    checkpoint = open_checkpoint(source)
    prefix_tokens = source.adapter.prefix_tokens if source.adapter else 0
    config = replace(config, max_input_length=_room_for_prompt(checkpoint.config, config, prefix_tokens))
    takes_images, output_dir = checkpoint.is_vision, Path("output")
    prepared = prepare_inference(source, config, takes_images=takes_images, output_dir=output_dir, data_files={})
    if system is not None and "system" not in prepared.encoder.reply_format.rendered_roles:
        show_notice("--system has no effect: the model's chat template leaves system turns out")
    found = None if image is None else find_image(prepared, image)  # before the weights are read
    session = ChatSession(prepared, load_model(prepared), system)
    session.image = found
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    if prompt is None:
        converse(session)
    else:
        _answer(session, prompt)


def _with_options(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """Lay the command line's options over the run's: sampling where they speak of it, and greedy at temperature 0."""
    generation = {**config.generation_config, **options}
    if options.get("temperature") == 0:
        generation = {key: value for key, value in generation.items() if key not in _SAMPLING} | {"do_sample": False}
    elif any(key in options for key in _SAMPLING):
        generation["do_sample"] = True
    return replace(config, generation_config=generation)


def _room_for_prompt(model: Any, config: RunConfig, prefix_tokens: int) -> int:
    """Return how many tokens a prompt may have: all positions of the model but those of prefix and reply."""
    positions = getattr(model, "max_position_embeddings", None) or sys.maxsize
    reply = config.generation_config.get("max_new_tokens") or config.max_output_length
    room = int(positions - reply - prefix_tokens)
    if room < 1:
        what = f"is {reply}, which leaves no room for a question: the model has {positions} positions"
        raise UserError.single("--max-new-tokens", what, "give a smaller number")
    return room


def converse(session: ChatSession) -> None:
    """Answer what comes on stdin, line by line, until `/quit` or its end. Raises UserError where it cannot be read."""
    if sys.stdin.isatty():
        print(f"{session.prepared.plan.request.model}: {COMMANDS}", file=sys.stderr)
    for line in _input_lines():
        match = _COMMAND.fullmatch(line)
        command, argument = (match[1].lower(), match[2]) if match else ("", None)
        if command in ("quit", "exit"):
            return
        try:
            if not is_unicode(line) or "\0" in line:
                fix = "set the terminal to UTF-8, or convert the file (iconv -t UTF-8)"
                raise UserError.single("stdin", "the line is not UTF-8 text, and is left out", fix)
            if not command and session.prepared.encoder.takes_images and is_dropped_file(line):
                command, argument = "image", line
            if not command:
                _answer(session, line)
            elif command == "image" and argument:
                session.attach(argument)
                print(f"{session.image} goes with the next question", file=sys.stderr)
            elif command == "clear":
                session.clear()
            else:
                print(COMMANDS, file=sys.stderr)
        except UserError as error:  # of this line alone
            for problem in error.problems:
                print(problem, file=sys.stderr)


def _input_lines() -> Iterator[str]:
    """Yield the lines of stdin that are not empty; Ctrl-C twice ends them too."""
    is_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (arrow keys and history)
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
            print("\n(once more, or /quit, ends the chat)", file=sys.stderr)
            continue
        was_interrupted = False
        if line:
            yield line


def _answer(session: ChatSession, question: str) -> None:
    session.ask(question, lambda text: print(text, end="", flush=True))
    print(flush=True)


def dropped_path(text: str) -> Path:
    """Return the absolute path that a text stands for: as it is typed, or as a terminal writes a file dropped on it.

    Terminals quote a path, escape its spaces by backslashes, or write a `file:` URL.
    """
    if os.path.isfile(expand_home(text)):  # noqa: PTH113  (False where a path is too long or has a NUL)
        return expand_home(text).absolute()
    with contextlib.suppress(ValueError):  # an open quote
        words = shlex.split(text) if os.sep == "/" else [text.strip('"')]
        text = words[0] if len(words) == 1 else text
    if text.lower().startswith("file:"):
        text = url2pathname(urlsplit(text).path)
    return expand_home(text).absolute()


def is_dropped_file(line: str) -> bool:
    """Return whether a line is nothing but a file that was dropped on the terminal, which writes its absolute path."""
    return line.startswith(("/", "'/", '"/', "file:")) and os.path.isfile(dropped_path(line))  # noqa: PTH113


def find_image(prepared: Prepared, path: str) -> str:
    """Return the absolute path of an image. Raises UserError for a chat model, and for a file that is no image."""
    from glm_edge_ft.data.images import load_image

    where, file = f"image {shorten(path)}", dropped_path(path)
    if not prepared.encoder.takes_images:
        what = f"{prepared.plan.request.model} is a chat model and sees no images"
        raise UserError.single(where, what, "use a GLM-Edge-V model")
    try:
        load_image(file)
    except UserError as error:
        raise UserError.single(where, error.problems[0].what, "give the path of an image") from None
    return str(file)


class ChatSession:
    """Keeps a conversation with a model (`source.load_model`) and answers in it; `system` is its system turn."""

    def __init__(self, prepared: Prepared, model: Any, system: str | None = None) -> None:
        self.prepared, self.model = prepared, model
        self.context = build_generation_context(prepared)
        self.system = system
        self.clear()

    def clear(self) -> None:
        """Forget all turns and images; the system turn stays."""
        self.messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.image: str | None = None

    def attach(self, path: str) -> None:
        """Put an image into the next question. Raises UserError for no image, or one too many for the model."""
        found, images = find_image(self.prepared, path), self.prepared.encoder.images
        count = sum(isinstance(message["content"], list) for message in self.messages)
        if images is not None and count >= images.max_images:
            what = f"the chat has {count} image already, and the model takes {images.max_images}"
            raise UserError.single(f"image {shorten(path)}", what, "/clear begins a new chat")
        self.image = found

    def ask(self, text: str, write: Callable[[str], None]) -> str:
        """Answer `text` and the attached image; `write` shows the reply piece by piece.

        Question and reply are kept in the history. Ctrl-C ends the reply: what there is of it is kept, and a question
        without any of it is forgotten. Raises UserError for a question that cannot be encoded, and forgets it.
        """
        question: Message = {"role": "user", "content": text}
        if self.image is not None:
            question["content"] = [{"type": "image", "image": self.image}, {"type": "text", "text": text}]
        inputs = self._encode([*self.messages, question])
        streamer = ReplyStreamer(self.context.clean, self.prepared.encoder.reply_format, write)
        is_whole = True
        try:
            self._generate(inputs, streamer)
        except KeyboardInterrupt:
            is_whole = False
        if streamer.shown or is_whole:
            self.messages += [question, {"role": "assistant", "content": streamer.shown}]
            self.image = None
        return streamer.shown

    def _encode(self, messages: list[Message]) -> dict[str, torch.Tensor]:
        from glm_edge_ft.data.prompts import encode_prompts
        from glm_edge_ft.data.rows import RawRow

        history = [{**message, "loss": False} if message["role"] == "assistant" else message for message in messages]
        row = RawRow("chat", len(messages), 1, {"messages": [*history, {"role": "assistant", "content": ""}]})
        (sample,) = encode_prompts(self.prepared.encoder, self.prepared.encoder.parse(row))
        if sample.prompt_tokens_cut:
            show_notice("the conversation is longer than the model takes: its oldest turns are left out")
        return self.context.collate([sample])

    def _generate(self, inputs: dict[str, torch.Tensor], streamer: ReplyStreamer) -> None:
        import torch

        arguments = self.prepared.training_arguments
        streams = (self.prepared.generation_config.num_beams or 1) == 1  # transformers does not stream beams
        options = {**self.context.options, **({"streamer": streamer} if streams else {})}
        dtype = torch.bfloat16 if arguments.bf16 else torch.float16
        # As in evaluation, which generates without autocast under an adapter.
        mixed = self.prepared.plan.location.adapter is None and (arguments.bf16 or arguments.fp16)
        inputs = {name: values.to(arguments.device) for name, values in inputs.items()}
        with torch.no_grad(), torch.autocast(arguments.device.type, dtype, enabled=mixed):
            new_tokens = self.context.generate(self.model, **inputs, **options)
        if not streams:
            streamer.ids = new_tokens[0].tolist()
            streamer.end()


class ReplyStreamer:
    """Gives a reply to `write` piece by piece, as a streamer of transformers' `generate`.

    Together the pieces are the text that `clean`, evaluation's own, makes of all token ids. What may still change is
    held back: a character whose bytes are not all there, the text that the template (`reply_format`) writes before a
    reply, and the beginning of what it writes after one.
    """

    def __init__(
        self, clean: Callable[[Sequence[int]], str], reply_format: ReplyFormat, write: Callable[[str], None]
    ) -> None:
        self.clean, self.reply_format, self.write = clean, reply_format, write
        self.ids: list[int] = []
        self.shown = ""
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, `(1, length)`, which is passed over, and then each new token, `(1,)`."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.ids += value.flatten().tolist()
        self._show(self._final_part(self.clean(self.ids)))

    def end(self) -> None:
        """Show what was held back."""
        self._show(self.clean(self.ids))

    def _final_part(self, text: str) -> str:
        if self.reply_format.prefix.startswith(text):
            return ""
        text = text.rstrip("\ufffd")  # what decoding makes of the first bytes of a character
        closing = "" if self.reply_format.closing_stops else self.reply_format.closing
        for length in range(min(len(closing) - 1, len(text)), 0, -1):
            if text.endswith(closing[:length]):
                return text[:-length]
        return text

    def _show(self, text: str) -> None:
        new = text[len(self.shown) :]
        if new:
            self.shown = text
            self.write(new)
