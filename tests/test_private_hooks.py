"""Private parts of libraries that the package uses: a list, and a guard against versions that change them.

Where a digest differs, read the new source, adapt the package, then write the new digest here:
`python -m tests.test_private_hooks` prints them all.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
from collections.abc import Iterator
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "glm_edge_ft"

# Functions that are overridden or called, and those whose order of steps the package relies on: the Trainer's loop, and
# what accelerate's `is_deepspeed_available` is replaced for. Each with the digest of its source.
FUNCTIONS = {
    "transformers.trainer:Trainer._get_train_sampler": "6843c2849303",
    "transformers.trainer:Trainer._prepare_inputs": "a94615042070",
    "transformers.trainer:Trainer._get_grad_norm": "8381188b35af",
    "transformers.trainer:Trainer._get_output_dir": "02fad06cc28a",
    "transformers.trainer:Trainer._save_checkpoint": "a33f7809321d",
    "transformers.trainer:Trainer._save": "8cc48b7a88e3",
    "transformers.trainer:Trainer._load_from_checkpoint": "f08d72963a1d",
    "transformers.trainer:Trainer._load_best_model": "35f2f6acf23b",
    "transformers.trainer:Trainer._load_rng_state": "392f9d2e55a7",
    "transformers.trainer:Trainer._maybe_log_save_evaluate": "77ec7e17199f",
    "transformers.trainer:Trainer._run_epoch": "0617d3f1c15e",
    "transformers.trainer:Trainer._inner_training_loop": "a6edc0d16028",
    "transformers.trainer:Trainer._init_training_state": "69b3901f376e",
    "transformers.trainer:Trainer._finalize_training": "8bcf12456ee0",
    "transformers.trainer:Trainer.training_step": "1316087d64bf",
    "transformers.trainer:Trainer.evaluation_loop": "484cb4ede778",
    "transformers.generation.utils:GenerationMixin._expand_inputs_for_generation": "bd0fa64677f8",
    "transformers.generation.utils:GenerationMixin._update_model_kwargs_for_generation": "b46ea984f928",
    "transformers.generation.utils:GenerationMixin._prepare_generation_config": "47c05d3f2d19",
    "transformers.generation.utils:GenerationMixin._prepare_special_tokens": "b90d2763212b",
    "transformers.generation.utils:GenerationMixin._get_logits_processor": "6ebbe4ab0604",
    "transformers.modeling_utils:PreTrainedModel._init_weights": "a1c13f5bdb51",
    "transformers.utils.chat_template_utils:_compile_jinja_template": "f7cde789a5ec",
    "accelerate.utils.other:extract_model_from_parallel": "0132598a5059",
}

# Attributes that are read or set, and modules; the tests of what uses them fail where one is gone.
ATTRIBUTES = {
    "_attn_implementation",
    "_buffers",
    "_cdata",
    "_is_stateful",
    "_keep_in_fp32_modules",
    "_model_mapping",
    "_n_gpu",
    "_name_or_path",
    "_new_shared",
    "_parameters",
    "_python_dispatch",
    "_pytree",
    "_subclasses",
    "_supports_attention_backend",
    "_tr_loss",
}


@cache
def trees() -> tuple[ast.Module, ...]:
    """Return the syntax trees of the package."""
    return tuple(ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py")))


def is_private(name: str) -> bool:
    """Return whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def names_defined() -> Iterator[str]:
    """Yield the private names that the package itself defines: functions, classes, variables, attributes of self."""
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node: ast.expr) -> bool:
    """Return whether an expression is the object itself, or its class."""
    return isinstance(node, ast.Name) and (node.id in {"self", "cls"} or node.id[0] == "_")


def names_of_libraries() -> set[str]:
    """Return the private names that the package takes from libraries, those that it overrides among them."""
    own, found = set(names_defined()), set()
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            calls_parent = ast.unparse(node.value) == "super()"
            found |= {node.attr} if calls_parent or node.attr not in own else set()
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(PACKAGE.name):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found |= {part for part in parts if is_private(part)}
    return found


def digest_of(place: str) -> str:
    """Return a digest of a function's source without its white space; `place` is `module:qualified.name`."""
    module, _, name = place.partition(":")
    function: Any = reduce(getattr, name.split("."), importlib.import_module(module))
    return hashlib.sha256("".join(inspect.getsource(inspect.unwrap(function)).split()).encode()).hexdigest()[:12]


def test_every_private_name_of_a_library_is_listed() -> None:
    """The list is complete, and has no attribute that is no longer used."""
    listed = {place.replace(":", ".").rpartition(".")[2] for place in FUNCTIONS} | ATTRIBUTES
    assert names_of_libraries() - listed == set()
    assert ATTRIBUTES - names_of_libraries() == set()


@pytest.mark.parametrize("place", FUNCTIONS)
def test_the_source_of_each_hook_is_the_one_that_was_read(place: str) -> None:
    """Another one may do more, or be called at another moment."""
    assert digest_of(place) == FUNCTIONS[place]


if __name__ == "__main__":
    for known in FUNCTIONS:
        print(f'    "{known}": "{digest_of(known)}",')
