"""Ollama's Modelfile and llama.cpp's command line say what the checkpoint's own template and the run's settings say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.data.template import ChatTemplate
from glm_edge_ft.deploy.modelfile import (
    PromptFormat,
    build_modelfile,
    derive_prompt_format,
    llama_cpp_command,
    ollama_name,
    unsupported_settings,
)
from tests.conftest import TEMPLATES, TokenizerMaker

TALK = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello,\n\nyou"},
    {"role": "assistant", "content": "你好 {x}"},
    {"role": "user", "content": "And?"},
)


def turns_of(make_tokenizer: TokenizerMaker, template: str) -> tuple[ChatTemplate, PromptFormat | None]:
    """Return a template, and what was read off it."""
    chat_template = ChatTemplate(make_tokenizer(template))
    return chat_template, derive_prompt_format(chat_template)


def render_go(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Do what Ollama does with the few actions that are written: range, if, else if, eq, end."""
    head, body, tail = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    pattern = r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)'
    branches = dict(re.findall(pattern, body, re.DOTALL))
    texts = [branches.get(message["role"], "").replace("{{ .Content }}", message["content"]) for message in messages]
    return "".join([head, *texts, tail])


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_the_go_template_renders_what_the_checkpoint_renders(template: str, make_tokenizer: TokenizerMaker) -> None:
    """R7: system, several turns; a line break that every reply begins with stands before it already."""
    chat_template, turns = turns_of(make_tokenizer, template)
    assert turns is not None
    expected = chat_template.render(TALK, add_generation_prompt=True)
    begun = "\n" if template == "glm" else ""
    assert render_go(turns.as_go_template(), TALK) == expected + begun
    assert turns.render(TALK) == expected + begun


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_the_jinja_template_renders_what_the_checkpoint_renders(template: str, make_tokenizer: TokenizerMaker) -> None:
    """R7: what a vision model's file holds, from strings and from parts, a literal backslash and n included."""
    chat_template, turns = turns_of(make_tokenizer, template)
    assert turns is not None
    tokenizer = make_tokenizer(turns.as_jinja_template())
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TALK]
    expected = chat_template.render(TALK)
    prompt = chat_template.render(TALK, add_generation_prompt=True) + ("\n" if template == "glm" else "")
    both: list[Any] = [list(TALK), parts]
    for messages in both:
        assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt


def test_text_before_the_first_turn_is_written_once(make_tokenizer: TokenizerMaker) -> None:
    """GLM-4 begins a conversation with two tokens of its own."""
    chat_template, turns = turns_of(make_tokenizer, "[gMASK]<sop>" + TEMPLATES["glm-newline"])
    assert turns is not None
    assert render_go(turns.as_go_template(), TALK) == chat_template.render(TALK, add_generation_prompt=True)


def test_roles_that_the_template_leaves_out_are_left_out(make_tokenizer: TokenizerMaker) -> None:
    """The template of vision models drops system turns."""
    template = TEMPLATES["glm-literal"].replace("['system', ", "[")
    chat_template, turns = turns_of(make_tokenizer, template)
    assert turns is not None
    assert set(turns.around) == {"user", "assistant"}
    assert render_go(turns.as_go_template(), TALK) == chat_template.render(TALK, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        # the first user turn gets a text that later ones do not get
        "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.index0 == 1 %}first{% endif %}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        # a content that is rendered twice
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ m['content'] }}{% endfor %}",
        # text that is an action in Go
        "{% for m in messages %}{{ '{{' }}{{ m['role'] }}{{ m['content'] }}{% endfor %}",
    ],
    ids=["first", "twice", "action"],
)
def test_a_template_that_is_more_than_text_around_contents_is_left_out(
    template: str, make_tokenizer: TokenizerMaker
) -> None:
    """A wrong template would be worse than none."""
    assert turns_of(make_tokenizer, template)[1] is None


def test_the_modelfile_names_files_template_stops_and_settings(make_tokenizer: TokenizerMaker) -> None:
    """The whole text, for the template of the released chat models."""
    _, turns = turns_of(make_tokenizer, "glm-newline")
    text = build_modelfile([Path("out/a.gguf")], turns, ["<|endoftext|>", "<|user|>"], 8192, {})
    header = ('{{ if eq .Role "system" }}', '{{ else if eq .Role "user" }}', '{{ else if eq .Role "assistant" }}')
    roles = "".join(
        f"{action}<|{role}|>\n{{{{ .Content }}}}"
        for action, role in zip(header, ("system", "user", "assistant"), strict=True)
    )
    assert text == (
        "FROM ./a.gguf\n"
        f'TEMPLATE """{{{{ range .Messages }}}}{roles}{{{{ end }}}}{{{{ end }}}}<|assistant|>\n"""\n'
        'PARAMETER stop "<|endoftext|>"\n'
        'PARAMETER stop "<|user|>"\n'
        "PARAMETER num_ctx 8192\n"
        "PARAMETER temperature 0\n"
        "PARAMETER repeat_penalty 1\n"
    )


@pytest.mark.parametrize(
    ("generation", "ollama", "command"),
    [
        ({"max_new_tokens": 8}, {"temperature": 0, "repeat_penalty": 1}, "--temp 0"),
        ({"temperature": 0.9, "top_p": 0.5, "top_k": 5}, {"temperature": 0, "repeat_penalty": 1}, "--temp 0"),
        (
            {"do_sample": False, "repetition_penalty": 1.2},
            {"temperature": 0, "repeat_penalty": 1.2, "repeat_last_n": -1},
            "--temp 0 --repeat-penalty 1.2 --repeat-last-n -1",
        ),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "top_k": None},
            {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.1, "repeat_last_n": -1},
            "--temp 0.7 --top-k 50 --top-p 0.9 --min-p 0.0 --repeat-penalty 1.1 --repeat-last-n -1",
        ),
        (
            {"do_sample": True},
            {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1},
            "--temp 1.0 --top-k 50 --top-p 1.0 --min-p 0.0",
        ),
    ],
    ids=["greedy", "not sampled", "greedy with a penalty", "sampled", "sampled by defaults"],
)
def test_the_runs_own_way_to_choose_tokens_is_kept(
    generation: dict[str, Any], ollama: dict[str, Any], command: str
) -> None:
    """R7, K31: the device answers as the evaluation did, not by the runtime's own defaults."""
    lines = build_modelfile([], None, [], 64, generation).splitlines()
    assert lines == ["PARAMETER num_ctx 64", *(f"PARAMETER {name} {value}" for name, value in ollama.items())]
    line = llama_cpp_command([Path("a b.gguf")], generation)
    assert line == f"llama-cli -m 'a b.gguf' --jinja {command}"


def test_a_setting_that_the_runtimes_do_not_have_is_named() -> None:
    """Beams among others; what sampling carries, and values that change nothing, are not."""
    generation = {"num_beams": 4, "no_repeat_ngram_size": 0, "do_sample": True, "top_k": 7, "max_new_tokens": 8}
    assert unsupported_settings(generation) == ["num_beams"]


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("Demo-Q8_0", "demo-q8_0"),
        ("模型 V2 (最终)", "v2"),
        ("模型", "model"),
        (".hidden", "hidden"),
        ("-x", "x"),
        ("glm:edge/1.5b @home", "glm-edge-1.5b-home"),
        ("Größe É", "gr-e"),
        ("a" * 200, "a" * 80),
        ("...", "model"),
    ],
)
def test_a_model_gets_a_name_that_ollama_takes(stem: str, name: str) -> None:
    """K31: the pattern of Ollama's `types/model/name.go`, whatever the file is called."""
    assert ollama_name(stem) == name
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", name)
