"""A conversation with a model: the history, the pending image, and the next reply, encoded as in training."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from glm_edge_ft.console import show_notice
from glm_edge_ft.errors import UserError, shorten
from glm_edge_ft.files import expand_home
from glm_edge_ft.run import Prepared, build_generation_context

if TYPE_CHECKING:
    import torch

Message = dict[str, Any]


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


def find_picture(prepared: Prepared, path: str) -> str:
    """Return the absolute path of a picture for the model.

    Raises UserError when the model sees none, or when the file cannot be opened as one.
    """
    from glm_edge_ft.data.images import load_image

    where, file = f"image {shorten(path)}", dropped_path(path)
    if not prepared.encoder.takes_images:
        what = f"{prepared.plan.request.model} is a chat model and sees no images"
        raise UserError.single(where, what, "use a GLM-Edge-V model")
    try:
        load_image(file)
    except UserError as error:
        raise UserError.single(where, error.problems[0].what, "give the path of a picture") from None
    return str(file)


class Talk:
    """Keeps a conversation and answers in it.

    Args:
        prepared: encoder, generation config and device.
        model: with its adapter, on the device (`opening.load_model`).
        system: text of the system turn, or None.
    """

    def __init__(self, prepared: Prepared, model: Any, system: str | None = None) -> None:
        self.prepared, self.model = prepared, model
        self.tools = build_generation_context(prepared)
        self.system = system
        self.messages: list[Message] = []
        self.image: str | None = None
        self.clear()

    def clear(self) -> None:
        """Forget all turns and images; the system turn stays."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.image = None

    def attach(self, path: str) -> None:
        """Put an image into the next question.

        Raises UserError when the model takes none or no more of them, or when the file is no picture.
        """
        found, images = find_picture(self.prepared, path), self.prepared.encoder.images
        assert images is not None  # of a chat model the line above says so
        if self._image_count() >= images.max_images:
            what = f"the talk has {self._image_count()} image already, and the model takes {images.max_images}"
            raise UserError.single(f"image {shorten(path)}", what, "/clear begins a new talk")
        self.image = found

    def _image_count(self) -> int:
        parts = [
            part for message in self.messages if isinstance(message["content"], list) for part in message["content"]
        ]
        return sum(part["type"] == "image" for part in parts)

    def ask(self, text: str, write: Callable[[str], None]) -> str:
        """Answer `text`, together with the attached image, and keep both in the history.

        Ctrl-C ends the reply: what there is of it is kept, and a question without any of it is forgotten.

        Args:
            text: the user's turn.
            write: shows the reply piece by piece.

        Raises:
            UserError: the question cannot be encoded; the history is as before.
        """
        from glm_edge_ft.deploy.streaming import ReplyStreamer

        content = (
            text if self.image is None else [{"type": "image", "image": self.image}, {"type": "text", "text": text}]
        )
        question: Message = {"role": "user", "content": content}
        inputs = self._encode([*self.messages, question])
        streamer = ReplyStreamer(self.tools.clean, self.prepared.encoder.reply_format, write)
        is_whole = True
        try:
            self._generate(inputs, streamer)
        except KeyboardInterrupt:
            is_whole = False
        reply = streamer.shown
        if reply or is_whole:
            self.messages += [question, {"role": "assistant", "content": reply}]
            self.image = None
        return reply

    def _encode(self, messages: list[Message]) -> dict[str, torch.Tensor]:
        from glm_edge_ft.data.prompts import encode_prompts
        from glm_edge_ft.data.rows import RawRow

        history = [{**message, "loss": False} if message["role"] == "assistant" else message for message in messages]
        row = RawRow("chat", len(messages), 1, {"messages": [*history, {"role": "assistant", "content": ""}]})
        (sample,) = encode_prompts(self.prepared.encoder, self.prepared.encoder.parse(row))
        if sample.prompt_tokens_cut:
            show_notice("the talk is longer than the model takes: its oldest turns are left out")
        return self.tools.collate([sample])

    def _generate(self, inputs: dict[str, torch.Tensor], streamer: Any) -> None:
        import torch

        arguments = self.prepared.training_arguments
        inputs = {name: values.to(arguments.device) for name, values in inputs.items()}
        beams = (self.prepared.generation_config.num_beams or 1) > 1
        is_whole = (
            self.prepared.plan.location.adapter is None
        )  # under an adapter, evaluation generates without autocast
        format_ = torch.bfloat16 if arguments.bf16 else torch.float16
        mixed = is_whole and (arguments.bf16 or arguments.fp16)
        with torch.no_grad(), torch.autocast(arguments.device.type, format_, enabled=mixed):
            options = self.tools.options if beams else {**self.tools.options, "streamer": streamer}
            new_tokens = self.tools.generate(self.model, **inputs, **options)
        if beams:  # transformers streams none
            streamer.ids = new_tokens[0].tolist()
            streamer.end()
