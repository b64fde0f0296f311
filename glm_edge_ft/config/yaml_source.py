"""A YAML file and `--set` options → plain values, each with the place where the user wrote it.

The file is composed into nodes, never constructed by a loader, so that every key keeps its line, a key given twice is
seen, no tag can run anything, and a plain scalar keeps the text it was written with (`save_strategy: no` is the word
"no" to a field that takes words, and false to one that takes true or false).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from glm_edge_ft.errors import Problem, UserError
from glm_edge_ft.files import did_you_mean

KeyPath = tuple[str | int, ...]
Problems = list[tuple[float, Problem]]
"""Each with its line; infinity for a `--set` option."""

_TAG = "tag:yaml.org,2002:"
_DEEPEST = 40
_MOST_NODES = 20_000  # aliases of aliases can blow a small file up to billions of nodes
_NESTED = "nested too deeply, or made far too large by aliases"


class PlainScalar(str):
    """The text of a number or a switch as it is written in YAML, with its `value`."""

    __slots__ = ("value",)
    value: bool | int | float

    def __new__(cls, text: str, value: float) -> PlainScalar:
        """Return the text, which knows its value."""
        scalar = super().__new__(cls, text)
        scalar.value = value
        return scalar


class Section(dict[str, Any]):
    """A mapping of a config, with the line of each key: infinity where `--set` wrote it, 0 where for a key inside."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, float] = {}

    def move(self, name: str, target: Section) -> None:
        """Move a key to another section, at the place where it was written."""
        target[name], target.lines[name] = self.pop(name), self.lines.pop(name)


def dotted(path: KeyPath) -> str:
    """Return a key path as `--set` takes it: `peft_config.target_modules[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


class _Loader(yaml.SafeLoader):
    """Composes nodes, reading fewer plain scalars as non-text: `5e-5` is a number, `2024-01-01` and `12:30` are not."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _name, _pattern, _first in (
    ("bool", r"(?i:yes|no|true|false|on|off)\Z", "yYnNtTfFoO"),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*\Z", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z", "-+.0123456789"),
    ("float", r"(?i:[-+]?\.inf|\.nan)\Z", "-+."),
    ("null", r"(?i:~|null|)\Z", "~nN"),
    ("merge", r"<<\Z", "<"),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), [*_first, ""])


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> tuple[Section, Problems]:
    """Read a configuration file and lay the `--set` options over it.

    Returns:
        The mapping at the top, and errors that did not keep the rest from being read.

    Raises:
        UserError: the file is missing, a folder, not UTF-8 text, not YAML, or not a mapping of keys; the problems of
            the `--set` options are listed with it.
    """
    problems: Problems = []
    options = []
    for text in overrides:
        with _noting(problems):
            options.append(_parse_override(text))
    try:
        values = _read_file(path, problems)
    except UserError as error:
        raise UserError([*error.problems, *(problem for _, problem in problems)]) from None
    for option in options:
        with _noting(problems):
            _apply_override(values, *option, problems)
    return values, problems


@contextmanager
def _noting(problems: Problems) -> Iterator[None]:
    """Note what is wrong with a `--set` option, and go on."""
    try:
        yield
    except UserError as error:
        problems += [(math.inf, problem) for problem in error.problems]


def _read_file(path: Path, problems: Problems) -> Section:
    node = _compose(_read_text(path), str(path))
    if node is None or node.tag == _TAG + "null":
        raise UserError.single(str(path), "the config file is empty", "start from one of the files in configs/")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        place = f"{path}:{node.start_mark.line + 1}"
        raise UserError.single(place, f"{kind} where keys are expected", "write `key: value` lines")
    values: Section = _Builder(problems, str(path)).build(node, ())
    return values


def _read_text(path: Path) -> str:
    where = str(path)
    try:
        if path.is_dir():
            raise UserError.single(where, "this is a folder, not a config file", f"write {path / 'lora.yaml'} or so")
        if not path.exists():
            names = sorted(found.name for found in path.parent.glob("*.y*ml"))[:10]
            raise UserError.single(
                where, "no such config file", f"{did_you_mean(path)}config files there: {', '.join(names) or 'none'}"
            )
        if not path.is_file() and not where.startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/")):
            raise UserError.single(where, "this is a pipe or a device, not a config file", "name a YAML file")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError.single(where, f"the config file cannot be read: {error}") from error
    if b"\0" in content:
        raise UserError.single(where, "this is not a text file", "name a YAML file, such as configs/lora.yaml")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        what = f"byte 0x{content[error.start]:02x} is not UTF-8"
        raise UserError.single(f"{where}:{line}", what, "save the file as UTF-8") from error


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        fix = "check indentation (spaces, no tabs), colons and quotes of this line and the one before"
        raise UserError.single(place, f"not valid YAML: {reason}", fix) from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        what = f"not valid YAML: the control character U+{error.character:04X}"
        raise UserError.single(f"{name}:{line}", what, "delete it") from error
    except RecursionError as error:
        raise UserError.single(name, f"nested more than {_DEEPEST} levels deep") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError.single(name, f"not valid YAML: {error}") from error


class _Builder:
    """Turns the nodes of one file, or of a `--set` option without a file name, into values; notes problems."""

    def __init__(self, problems: Problems, file: str = "") -> None:
        self.problems = problems
        self.file = file
        self.nodes = 0
        self.open: list[yaml.Node] = []

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return the value of a node; an unusable one is noted and becomes None."""
        self.nodes += 1
        if node in self.open or len(self.open) > _DEEPEST or self.nodes > _MOST_NODES:
            raise UserError.single(self._place(node, path), _NESTED, "write it flat, without &name and *name")
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return [self.build(child, (*path, index)) for index, child in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode) and node.tag in _READERS:
                return _READERS[node.tag](node.value)
            what = f"the tag `{node.tag.replace(_TAG, '!!')[:60]}` is not allowed here"
        except (ValueError, KeyError):
            what = f"`{node.value[:40]}` cannot be read as {node.tag.removeprefix(_TAG)}"
        finally:
            self.open.pop()
        return self._refuse(node, path, what, "write a plain value")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> Section:
        section = Section()
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key_node.tag == _TAG + "merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            elif not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, path, "a list or mapping cannot be a key", "write the key as one word")
            elif key in section:
                what = f"`{key}` is given twice, in lines {section.lines[key]} and {line}"
                self._refuse(key_node, (*path, key), what, "keep one of them")
            else:
                section.lines[key] = line if self.file else math.inf
                section[key] = self.build(value_node, (*path, key))
        for base_node in merged:  # an earlier one wins over a later one, and what is written here over both
            base = self.build(base_node, path) if isinstance(base_node, yaml.MappingNode) else None
            if base is None:
                self._refuse(base_node, path, "`<<` takes an alias of a mapping", "write `<<: *name`")
                continue
            for key in [key for key in base if key not in section]:
                base.move(key, section)
        return section

    def _refuse(self, node: yaml.Node, path: KeyPath, what: str, fix: str) -> None:
        line = node.start_mark.line + 1 if self.file else math.inf
        self.problems.append((line, Problem(self._place(node, path), what, fix)))

    def _place(self, node: yaml.Node, path: KeyPath) -> str:
        if not self.file:
            return f"--set {dotted(path)}"
        place = f"{self.file}:{node.start_mark.line + 1}"
        return f"{place}: {dotted(path)}" if path else place


_BOOLEANS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
_READERS: dict[str, Callable[[str], Any]] = {
    _TAG + "str": str,
    _TAG + "merge": str,
    _TAG + "null": lambda _: None,
    _TAG + "bool": lambda text: PlainScalar(text, _BOOLEANS[text.lower()]),
    _TAG + "int": lambda text: PlainScalar(text, int(text)),
    _TAG + "float": lambda text: PlainScalar(text, float(re.sub(r"(?i)\.(inf|nan)\Z", r"\1", text))),
}


def _parse_override(text: str) -> tuple[tuple[str, ...], yaml.Node | None]:
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        fix = "write KEY=VALUE with no space around =, such as --set training_args.max_steps=20"
        raise UserError.single(f"--set {text}", "this is not KEY=VALUE", fix)
    return path, _compose(value, f"--set {dotted(path)}")


def _apply_override(values: Section, path: tuple[str, ...], node: yaml.Node | None, problems: Problems) -> None:
    target = values
    for depth, part in enumerate(path[:-1], start=1):
        if target.get(part) is None:
            target[part], target.lines[part] = Section(), 0
        if not isinstance(target[part], Section):
            section = dotted(path[:depth])
            what = f"`{section}` is a single value, so nothing can be set below it"
            raise UserError.single(f"--set {dotted(path)}", what, f"write --set {section}=VALUE")
        target = target[part]
    target.lines[path[-1]] = math.inf
    target[path[-1]] = None if node is None else _Builder(problems).build(node, path)
