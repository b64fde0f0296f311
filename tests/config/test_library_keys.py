"""The snapshot of the libraries' keys equals their real classes, and the tables name keys that exist."""

from __future__ import annotations

from glm_edge_ft.config.keys import PEFT_TYPES, key_table, library_keys, section_rules
from glm_edge_ft.config.settings import TOP_KEYS
from tests import write_config_snapshot


def test_the_snapshot_is_that_of_the_installed_libraries() -> None:
    """C4: after an upgrade `python -m tests.write_config_snapshot` writes it anew."""
    assert write_config_snapshot.SNAPSHOT.read_text(encoding="utf-8") == write_config_snapshot.text()


def test_every_key_can_be_written_but_objects() -> None:
    """C4: a type that is not understood would refuse every value; only Python objects may do so."""
    sections = ("training_args", "generation_config", *PEFT_TYPES)
    unwritable = {
        name for section in sections for name, key in library_keys(section).items() if key.type in (None, type(None))
    }
    assert unwritable == {"parallelism_config", "compile_config"}


def test_enumerations_and_services_are_those_of_the_classes() -> None:
    """C4, E6: some of each, by name."""
    training = library_keys("training_args")
    assert training["eval_strategy"].choices == ["no", "steps", "epoch"]
    assert training["save_strategy"].choices == ["no", "steps", "epoch", "best"]
    assert training["debug"].choices == ["underflow_overflow", "tpu_metrics_debug"]
    assert {"passive", "warning"} <= set(training["log_level"].choices)
    assert "CAUSAL_LM" in library_keys("LORA")["task_type"].choices
    assert library_keys("generation_config")["early_stopping"].choices == ["never"]
    assert {"tensorboard", "wandb", "all", "none"} <= set(training["report_to"].choices)


def test_the_table_names_keys_that_exist() -> None:
    """C2, C5: no name is left over from another release, and each old name leads to one of today."""
    training = library_keys("training_args")
    assert section_rules("training_args").keys() <= training.keys()
    assert section_rules("generation_config").keys() <= library_keys("generation_config").keys()
    assert section_rules("peft_config").keys() <= library_keys("LORA").keys() | library_keys("PREFIX_TUNING").keys()
    old = key_table()["old"]["training_args"]
    assert {
        new if isinstance(new, str) else new["now"] for new in old.values() if isinstance(new, str) or "now" in new
    } <= (training.keys())
    # both are declared as deprecated aliases in transformers 5
    assert old.keys() & training.keys() == {"gradient_checkpointing", "gradient_checkpointing_kwargs"}


def test_every_own_key_has_a_description() -> None:
    """C1: the reference of the keys is made of them."""
    assert all(key.description for key in TOP_KEYS.values())
