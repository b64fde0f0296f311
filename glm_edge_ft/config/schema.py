"""What the installed libraries accept in a config, read from their source without importing them.

Importing transformers or peft loads torch, which takes seconds; a misspelt key must show at once. The dataclasses of
`Seq2SeqTrainingArguments`, `LoraConfig` and `PrefixTuningConfig` and the attributes of `GenerationConfig` are therefore
read with `ast`. `tests/config/test_schema.py` compares the result with the real classes, so an upgrade cannot drift.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from glm_edge_ft.errors import UserError

Kind = Literal["null", "bool", "int", "float", "text", "list", "mapping", "section", "choice", "any"]
PEFT_TYPES = ("LORA", "PREFIX_TUNING")

_BUILT_IN: dict[str, Kind] = {
    "None": "null",
    "bool": "bool",
    "int": "int",
    "float": "float",
    "str": "text",
    "Path": "text",
    "list": "list",
    "List": "list",
    "tuple": "list",
    "dict": "mapping",
    "Dict": "mapping",
    "Any": "any",
}


# texts that GenerationConfig checks only when it is built; the tests build it with each of them
_GENERATION_CHOICES: Mapping[str, tuple[str, ...]] = {
    "early_stopping": ("never",),
    "cache_implementation": (
        *("static", "offloaded_static"),
        # deprecated names of the static caches
        *("sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
        *("dynamic", "offloaded", "quantized"),
    ),
}


# documented with tuples as keys, which YAML and JSON cannot write; the library takes this form as well
_GENERATION_TYPES: Mapping[str, str] = {"sequence_bias": "list[list[Any]]"}


@dataclass(frozen=True)
class TypeOption:
    """One way to write a value.

    Attributes:
        kind: what the value is in YAML.
        items: for a list, what each item may be; empty means anything.
        choices: for a choice, the values that exist.
        fields: for a section, its keys.
    """

    kind: Kind
    items: tuple[TypeOption, ...] = ()
    choices: tuple[str | bool, ...] = ()
    fields: tuple[Field, ...] = ()


@dataclass(frozen=True)
class Field:
    """One key of a section.

    Attributes:
        name: the key.
        annotation: its type as the source writes it.
        options: what may be written, empty when no YAML value fits.
        default: the default as the source writes it; None when the key must be given.
    """

    name: str
    annotation: str
    options: tuple[TypeOption, ...]
    default: str | None

    @property
    def choices(self) -> tuple[str | bool, ...]:
        """The values of an enumerated key, those inside a list of them included; empty for other keys."""
        return tuple(value for option in self.options for inner in (option, *option.items) for value in inner.choices)


def make_field(name: str, annotation: str, default: str | None) -> Field:
    """Describe one key of this project's own by a type annotation, such as `int | None`."""
    return Field(name, annotation, _options(_expression(annotation), {}), default)


@cache
def training_fields() -> dict[str, Field]:
    """Return every field of `Seq2SeqTrainingArguments` by name.

    Raises:
        UserError: transformers is not installed.
    """
    modules = ("training_args.py", "training_args_seq2seq.py", "trainer_utils.py", "debug_utils.py")
    classes = _classes("transformers", modules)
    fields = {
        field.name: field
        for name in ("TrainingArguments", "Seq2SeqTrainingArguments")
        for field in _class_fields(classes[name], classes)
    }
    of_accelerate = _classes("transformers", ("trainer_pt_utils.py",))["AcceleratorConfig"]
    section = TypeOption("section", fields=tuple(_class_fields(of_accelerate, classes)))
    options = (section, *(option for option in fields["accelerator_config"].options if option.kind != "mapping"))
    return {**fields, "accelerator_config": replace(fields["accelerator_config"], options=options)}


@cache
def peft_fields(peft_type: str) -> dict[str, Field]:
    """Return every field of the PEFT config class for `LORA` or `PREFIX_TUNING` by name.

    Raises:
        UserError: peft is not installed.
    """
    tuner, names = {
        "LORA": ("lora", ("PeftConfigMixin", "PeftConfig", "LoraConfig")),
        "PREFIX_TUNING": (
            "prefix_tuning",
            ("PeftConfigMixin", "PeftConfig", "PromptLearningConfig", "PrefixTuningConfig"),
        ),
    }[peft_type]
    classes = _classes("peft", ("config.py", "utils/peft_types.py", f"tuners/{tuner}/config.py"))
    return {field.name: field for name in names for field in _class_fields(classes[name], classes)}


@cache
def generation_fields() -> dict[str, Field]:
    """Return every attribute that `GenerationConfig` takes from its keyword arguments, by name.

    The class has no annotations: the names are those its constructor pops, the types those its docstring states.
    Bookkeeping that transformers writes itself (leading underscore, `transformers_version`) is left out.

    Raises:
        UserError: transformers is not installed.
    """
    config = _classes("transformers", ("generation/configuration_utils.py",))["GenerationConfig"]
    documented = dict(
        re.findall(r"^ {8}(\w+):? *\((.+?)\)+: *$", ast.get_docstring(config, clean=False) or "", flags=re.MULTILINE)
    )
    names = [
        node.args[0].value
        for node in ast.walk(next(part for part in config.body if getattr(part, "name", "") == "__init__"))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "kwargs.pop"
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    ]
    fields = {}
    for name in names:
        if not name.startswith("_") and name != "transformers_version":
            annotation = _GENERATION_TYPES.get(name) or _documented_type(documented.get(name, "Any"))
            options = (*_options(_expression(annotation), {}), TypeOption("null"))
            if name in _GENERATION_CHOICES:
                options = _without_free_text((*options, TypeOption("choice", choices=_GENERATION_CHOICES[name])))
            fields[name] = Field(name, annotation, options, "None")
    return fields


@cache
def reporting_integrations() -> tuple[str, ...]:
    """Return the names that `report_to` takes: those of the installed transformers' integrations, `all` and `none`."""
    module = _module("transformers", "integrations/integration_utils.py")
    for node in module.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK"
            and isinstance(node.value, ast.Dict)
        ):
            return (*(str(ast.literal_eval(key)) for key in node.value.keys if key), "all", "none")
    return ()


def _package_folder(package: str) -> Path:
    # find_spec of a top-level name looks it up without running it; a dotted name would import its parent
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError.single(package, "this package is not installed", "run: pip install -r requirements.txt")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _module(package: str, relative: str) -> ast.Module:
    return ast.parse((_package_folder(package) / relative).read_text(encoding="utf-8"))


def _classes(package: str, modules: tuple[str, ...]) -> dict[str, ast.ClassDef]:
    return {
        node.name: node
        for relative in modules
        for node in _module(package, relative).body
        if isinstance(node, ast.ClassDef)
    }


def _class_fields(definition: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> Iterator[Field]:
    """Yield the dataclass fields that a class body itself declares and its constructor takes."""
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        annotation = ast.unparse(node.annotation)
        arguments: dict[str, ast.expr] = {}
        default = node.value
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith("field"):
            arguments = {keyword.arg: keyword.value for keyword in node.value.keywords if keyword.arg}
            default = arguments.get("default", arguments.get("default_factory"))
        if annotation.startswith("ClassVar") or ast.unparse(arguments.get("init", ast.Constant(True))) == "False":
            continue
        options = _options(node.annotation, classes)
        metadata = _metadata(arguments.get("metadata"))
        if "choices" in metadata:
            options = (TypeOption("choice", choices=_listed_choices(metadata["choices"])), *options)
        if "const" in metadata:  # the command-line form without a value means true
            options = (TypeOption("bool"), *options)
        text = None if default is None else ast.unparse(default)
        if text == "None":
            options = (*options, TypeOption("null"))
        yield Field(node.target.id, annotation, _without_free_text(options), text)


def _metadata(node: ast.expr | None) -> dict[str, ast.expr]:
    if not isinstance(node, ast.Dict):
        return {}
    return {str(ast.literal_eval(key)): value for key, value in zip(node.keys, node.values, strict=True) if key}


def _listed_choices(node: ast.expr) -> tuple[str, ...]:
    if isinstance(node, ast.List):
        return tuple(ast.literal_eval(node))
    # the one computed list: trainer_log_levels.keys(), which is the logging module's levels and one more
    for part in _module("transformers", "utils/logging.py").body:
        if (
            isinstance(part, ast.Assign)
            and ast.unparse(part.targets[0]) == "log_levels"
            and isinstance(part.value, ast.Dict)
        ):
            return (*(str(ast.literal_eval(key)) for key in part.value.keys if key), "passive")
    return ()


def _without_free_text(options: tuple[TypeOption, ...]) -> tuple[TypeOption, ...]:
    """Drop free text beside named choices: `IntervalStrategy | str` means one of the strategies, by its name."""
    named = any(isinstance(choice, str) for option in options for choice in option.choices)
    return tuple(option for option in options if not (named and option.kind == "text"))


def _expression(annotation: str) -> ast.expr:
    return ast.parse(annotation, mode="eval").body


def _documented_type(text: str) -> str:
    """Turn a docstring's type, such as "`int` or `list[int]`, *optional*", into an annotation."""
    kind = re.split(r", *\*optional|, *default", text)[0].replace("`", "")
    kind = re.sub(r"\btuple\(.*", "tuple", kind).replace(" or ", " | ")
    try:
        _expression(kind)
    except SyntaxError:
        return "Any"
    return kind


def _options(node: ast.expr, classes: Mapping[str, ast.ClassDef]) -> tuple[TypeOption, ...]:
    """Read a type annotation; a class that YAML cannot write, such as `GenerationConfig`, gives no option."""
    if isinstance(node, ast.BinOp):
        return _options(node.left, classes) + _options(node.right, classes)
    if isinstance(node, ast.Subscript):
        return _subscript_options(node, classes)
    name = ast.unparse(node).rpartition(".")[2]
    if name in _BUILT_IN:
        return (TypeOption(_BUILT_IN[name]),)
    definition = classes.get(name)
    if definition is None:
        return ()
    if any(ast.unparse(base).endswith("Enum") for base in definition.bases):
        return (TypeOption("choice", choices=_enum_values(definition)),)
    return (TypeOption("section", fields=tuple(_class_fields(definition, classes))),)


def _subscript_options(node: ast.Subscript, classes: Mapping[str, ast.ClassDef]) -> tuple[TypeOption, ...]:
    name = ast.unparse(node.value).rpartition(".")[2]
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        return (TypeOption("choice", choices=tuple(ast.literal_eval(part) for part in inner)),)
    if name in ("Optional", "Union"):
        options = tuple(option for part in inner for option in _options(part, classes))
        return (*options, TypeOption("null")) if name == "Optional" else options
    kind = _BUILT_IN.get(name)
    if kind == "list" and len(inner) == 1:
        return (TypeOption("list", items=_options(inner[0], classes)),)
    return (TypeOption(kind),) if kind else ()


def _enum_values(definition: ast.ClassDef) -> tuple[str, ...]:
    return tuple(
        str(ast.literal_eval(node.value))
        for node in definition.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    )
