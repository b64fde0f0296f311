"""How a GGUF file is started: llama.cpp's command line, and the Modelfile that Ollama makes a model of.

llama.cpp renders the chat template that the file holds. Ollama has templates of its own kind (Go), so the checkpoint's
is read off a few rendered turns, and left out where it is more than text around contents.
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
class Turns:
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

        llama.cpp puts pictures into the text itself, and ends with an error on a template that takes lists alone and
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


def read_turns(template: ChatTemplate) -> Turns | None:
    """Return a chat template as text around contents, or None where it is more than that."""
    user, reply = ({"role": role, "content": _CONTENTS[role]} for role in ("user", "assistant"))
    system = {"role": "system", "content": _CONTENTS["system"]}
    try:
        leading = template.render([])
        asked = template.render([user])
        around = {"user": _split(asked.removeprefix(leading), "user")}
        answered = template.render([user, reply])
        around["assistant"] = _split(answered.removeprefix(asked), "assistant")
        with_system = template.render([system, user]).removeprefix(leading).removesuffix(asked.removeprefix(leading))
        if _CONTENTS["system"] in with_system:
            around = {"system": _split(with_system, "system"), **around}
        generation = template.render([user], add_generation_prompt=True).removeprefix(asked)
        talk = [system, user, reply, user]
        expected = template.render(talk, add_generation_prompt=True)
    except (TemplateRefusal, ValueError):
        return None
    header = around["assistant"][0]
    turns = Turns(leading, around, header if header.startswith(generation) else generation)
    written = "".join([leading, *(part for pair in around.values() for part in pair), turns.reply])
    if not turns.render(talk).startswith(expected) or "{{" in written or '"""' in written:
        return None
    return turns


def _split(text: str, role: str) -> tuple[str, str]:
    """Return what is before and after the content of a role. Raises ValueError where it is not there once."""
    before, after = text.split(_CONTENTS[role])
    return before, after


def modelfile(files: Sequence[Path], turns: Turns | None, stops: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Return the Modelfile for files that lie beside it.

    Args:
        files: the language part, then a vision part if there is one.
        turns: the chat template; without it Ollama looks for one that it knows.
        stops: texts that end a reply.
        settings: those of `sampling`, with `num_ctx`.
    """
    lines = [f"FROM ./{file.name}" for file in files]
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.as_go_template()}"""')
    lines += [f'PARAMETER stop "{text}"' for text in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a run's evaluation chose tokens, by transformers' names: greedily is a temperature of 0.

    All that the runtimes would fill in otherwise is there. transformers penalizes repetitions of the whole text, the
    runtimes those of its last `repeat_last_n` tokens; -1: of all.
    """
    given = {key: generation[key] for key in _SAMPLING if generation.get(key) is not None}
    penalty = given.pop("repetition_penalty", 1)
    repetition = {"repetition_penalty": penalty} | ({"repeat_last_n": -1} if penalty != 1 else {})
    return {**(_DEFAULTS | given if generation.get("do_sample") else {"temperature": 0}), **repetition}


def without_counterpart(generation: Mapping[str, Any]) -> list[str]:
    """Return the settings of a run by which neither a Modelfile nor the command line can choose tokens."""
    kept = (*_SAMPLING, *_OF_EVALUATION)
    return sorted(key for key, value in generation.items() if key not in kept and value not in (None, False, 0, 1))


def ollama_name(stem: str) -> str:
    """Return a file's name as a name that Ollama takes (its `types/model/name.go`).

    Up to 80 ASCII letters, digits, `_`, `-` and `.`, the first of them a letter, a digit or `_`.
    """
    return re.sub(r"[^a-z0-9_.]+", "-", stem.lower()).lstrip("-.")[:80].rstrip("-.") or "model"


def for_ollama(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of `sampling` by the names of a Modelfile."""
    return {_SAMPLING[key][0]: value for key, value in chosen.items()}


def llama_command(out: Path, vision_part: Path | None, chosen: Mapping[str, Any]) -> str:
    """Return the line that talks to the file with llama.cpp."""
    own = {"repetition_penalty": 1}  # what llama.cpp does anyway
    options = [
        word for key, value in chosen.items() if own.get(key) != value for word in (_SAMPLING[key][1], str(value))
    ]
    if vision_part is None:
        return shlex.join(["llama-cli", "-m", str(out), "--jinja", *options])
    line = shlex.join(["llama-mtmd-cli", "-m", str(out), "--mmproj", str(vision_part), "--jinja", *options])
    return f"{line} --image PICTURE -p QUESTION"
