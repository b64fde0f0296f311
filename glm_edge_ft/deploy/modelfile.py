"""How a GGUF file is started: llama.cpp's command line, and the Modelfile that Ollama makes a model of.

llama.cpp renders the chat template that the file holds. Ollama has templates of its own kind (Go), so the checkpoint's
is derived from a few rendered turns, and left out where it is more than text around contents.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_edge_ft.data.template import ChatTemplate, TemplateRefusal

_CONTENTS = {"system": "Juniper", "user": "Kestrel", "assistant": "Marigold"}
# Names of transformers' generation settings, in Ollama's Modelfile and on llama.cpp's command line.
_SAMPLING = {
    "temperature": ("temperature", "--temp"),
    "top_k": ("top_k", "--top-k"),
    "top_p": ("top_p", "--top-p"),
    "min_p": ("min_p", "--min-p"),
    "typical_p": ("typical_p", "--typical"),
    "repetition_penalty": ("repeat_penalty", "--repeat-penalty"),
    "repeat_last_n": ("repeat_last_n", "--repeat-last-n"),
}
# What transformers samples with where a run leaves it open; the runtimes have other defaults.
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
_OF_EVALUATION = ("do_sample", "max_new_tokens", "max_time", "use_cache")


@dataclass(frozen=True)
class PromptFormat:
    """A chat template as text around contents.

    Attributes:
        leading: text before the first turn.
        around: text before and after the content of each role that is rendered.
        reply: text before a reply, with what the model has been trained to begin every reply with.
    """

    leading: str
    around: Mapping[str, tuple[str, str]]
    reply: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt for the reply to these messages."""
        texts = [self.leading]
        for message in messages:
            if message["role"] in self.around:
                before, after = self.around[message["role"]]
                texts += [before, message["content"], after]
        return "".join([*texts, self.reply])

    def as_jinja_template(self) -> str:
        """Return a Jinja template that renders the same from contents that are strings or lists of text parts.

        llama.cpp puts images into the text itself, and ends with an error on a template that takes lists alone and
        leaves system turns out, as that of the vision models does.
        """
        content = (
            "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
            "{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}"
        )
        branches = [
            f"{{%- {'if' if index == 0 else 'elif'} message['role'] == '{role}' -%}}"
            f"{_quoted(before)}{content}{_quoted(after)}"
            for index, (role, (before, after)) in enumerate(self.around.items())
        ]
        turns = f"{{%- for message in messages -%}}{''.join(branches)}{{%- endif -%}}{{%- endfor -%}}"
        return f"{_quoted(self.leading)}{turns}{{%- if add_generation_prompt -%}}{_quoted(self.reply)}{{%- endif -%}}"

    def as_go_template(self) -> str:
        """Return Ollama's form of it."""
        branches = [
            f'{{{{ {"if" if index == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for index, (role, (before, after)) in enumerate(self.around.items())
        ]
        return f"{self.leading}{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{self.reply}"


def _quoted(text: str) -> str:
    """Return an expression of Jinja for a text."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def derive_prompt_format(template: ChatTemplate) -> PromptFormat | None:
    """Return a chat template as text around contents, or None where it is more than that."""
    system, user, reply = ({"role": role, "content": text} for role, text in _CONTENTS.items())
    conversation = [system, user, reply, user]
    try:
        leading, asked = template.render([]), template.render([user])
        turn = asked.removeprefix(leading)
        around = {"user": _split(turn, "user")}
        around["assistant"] = _split(template.render([user, reply]).removeprefix(asked), "assistant")
        with_system = template.render([system, user]).removeprefix(leading).removesuffix(turn)
        if _CONTENTS["system"] in with_system:
            around = {"system": _split(with_system, "system"), **around}
        generation = template.render([user], add_generation_prompt=True).removeprefix(asked)
        expected = template.render(conversation, add_generation_prompt=True)
    except (TemplateRefusal, ValueError):
        return None
    header = around["assistant"][0]
    derived = PromptFormat(leading, around, header if header.startswith(generation) else generation)
    written = "".join([leading, *(part for pair in around.values() for part in pair), derived.reply])
    if not derived.render(conversation).startswith(expected) or "{{" in written or '"""' in written:
        return None
    return derived


def _split(text: str, role: str) -> tuple[str, str]:
    """Return what is before and after the content of a role. Raises ValueError where it is not there once."""
    before, after = text.split(_CONTENTS[role])
    return before, after


def build_modelfile(
    paths: Sequence[Path],
    prompt_format: PromptFormat | None,
    stops: Sequence[str],
    context_length: int,
    generation: Mapping[str, Any],
) -> str:
    """Return the Modelfile for GGUF files beside it: the language part, then a vision part if there is one.

    Without `prompt_format` Ollama looks for a template that it knows. `stops` end a reply.
    """
    lines = [f"FROM ./{path.name}" for path in paths]
    if prompt_format is not None:
        lines.append(f'TEMPLATE """{prompt_format.as_go_template()}"""')
    lines += [f'PARAMETER stop "{token}"' for token in stops]
    lines.append(f"PARAMETER num_ctx {context_length}")
    lines += [f"PARAMETER {_SAMPLING[key][0]} {value}" for key, value in sampling_settings(generation).items()]
    return "\n".join(lines) + "\n"


def sampling_settings(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a run's evaluation chose tokens, by transformers' names, greedily as a temperature of 0.

    transformers penalizes repetitions of the whole text, the runtimes those of its last `repeat_last_n`; -1: all.
    """
    given = {key: generation[key] for key in _SAMPLING if generation.get(key) is not None}
    penalty = given.pop("repetition_penalty", 1)
    repetition = {"repetition_penalty": penalty} | ({"repeat_last_n": -1} if penalty != 1 else {})
    return {**(_DEFAULTS | given if generation.get("do_sample") else {"temperature": 0}), **repetition}


def unsupported_settings(generation: Mapping[str, Any]) -> list[str]:
    """Return the settings of a run by which neither a Modelfile nor the command line can choose tokens."""
    kept = (*_SAMPLING, *_OF_EVALUATION)
    return sorted(key for key, value in generation.items() if key not in kept and value not in (None, False, 0, 1))


def ollama_name(stem: str) -> str:
    """Return a file's name as a name that Ollama takes (its `types/model/name.go`).

    Up to 80 ASCII letters, digits, `_`, `-` and `.`, the first of them a letter, a digit or `_`.
    """
    return re.sub(r"[^a-z0-9_.]+", "-", stem.lower()).lstrip("-.")[:80].rstrip("-.") or "model"


def llama_cpp_command(paths: Sequence[Path], generation: Mapping[str, Any]) -> str:
    """Return the line that runs GGUF files with llama.cpp: a language part, and a vision part if there is one."""
    options = []
    for key, value in sampling_settings(generation).items():
        if (key, value) != ("repetition_penalty", 1):  # what llama.cpp does anyway
            options += [_SAMPLING[key][1], str(value)]
    out, *vision = map(str, paths)
    if not vision:
        return shlex.join(["llama-cli", "-m", out, "--jinja", *options])
    line = shlex.join(["llama-mtmd-cli", "-m", out, "--mmproj", *vision, "--jinja", *options])
    return f"{line} --image IMAGE -p QUESTION"
