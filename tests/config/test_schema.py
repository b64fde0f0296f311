"""The schema read from the libraries' source equals their real classes, so that an upgrade cannot drift in silence."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

import pytest

from glm_edge_ft.config.schema import (
    Field,
    generation_fields,
    peft_fields,
    reporting_integrations,
    training_fields,
)


def real_fields(real_class: Any) -> dict[str, bool]:
    """Return name → whether a value must be given, of the fields that a dataclass's constructor takes."""
    missing = dataclasses.MISSING
    return {
        field.name: field.default is missing and field.default_factory is missing
        for field in dataclasses.fields(real_class)
        if field.init
    }


def read_fields(fields: dict[str, Field]) -> dict[str, bool]:
    """Return the same of a schema."""
    return {name: field.default is None for name, field in fields.items()}


def test_training_arguments_equal_the_real_class() -> None:
    """C4: every field of Seq2SeqTrainingArguments is known, and no other."""
    from transformers import Seq2SeqTrainingArguments

    assert read_fields(training_fields()) == real_fields(Seq2SeqTrainingArguments)


@pytest.mark.parametrize("peft_type", ["LORA", "PREFIX_TUNING"])
def test_peft_fields_equal_the_real_class(peft_type: str) -> None:
    """C4: every field of LoraConfig and PrefixTuningConfig is known, and no other."""
    from peft import LoraConfig, PrefixTuningConfig

    real = {"LORA": LoraConfig, "PREFIX_TUNING": PrefixTuningConfig}[peft_type]
    assert read_fields(peft_fields(peft_type)) == real_fields(real)


def test_generation_fields_equal_the_real_attributes() -> None:
    """C5: every attribute of GenerationConfig is known, and no other."""
    from transformers import GenerationConfig

    bookkeeping = {"transformers_version", "_from_model_config"}
    assert set(generation_fields()) == vars(GenerationConfig()).keys() - bookkeeping


def test_training_annotations_equal_the_real_ones() -> None:
    """C4: the types are those that the class declares."""
    from transformers import Seq2SeqTrainingArguments

    kinds = {bool: ["bool"], int: ["int"], float: ["float"]}
    for field in dataclasses.fields(Seq2SeqTrainingArguments):
        if field.type in kinds:
            assert [option.kind for option in training_fields()[field.name].options] == kinds[field.type], field.name


def test_choices_equal_the_real_enumerations() -> None:
    """C4: the values of enumerated fields are those of the real enumerations."""
    from peft import TaskType
    from transformers.debug_utils import DebugOption
    from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames, trainer_log_levels

    real: dict[str, type[Enum]] = {
        "eval_strategy": IntervalStrategy,
        "logging_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "hub_strategy": HubStrategy,
        "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
        "debug": DebugOption,
    }
    for name, enumeration in real.items():
        assert training_fields()[name].choices == tuple(member.value for member in enumeration), name
    assert training_fields()["log_level"].choices == tuple(trainer_log_levels)
    assert peft_fields("LORA")["task_type"].choices == tuple(member.value for member in TaskType)


def test_listed_choices_equal_the_real_metadata() -> None:
    """C4: choices that a field lists in its metadata are read from there."""
    from transformers import Seq2SeqTrainingArguments

    for field in dataclasses.fields(Seq2SeqTrainingArguments):
        if "choices" in field.metadata:
            assert training_fields()[field.name].choices == tuple(field.metadata["choices"]), field.name


def test_reporting_services_equal_the_real_ones() -> None:
    """E6: the services of report_to are the library's."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert reporting_integrations() == (*INTEGRATION_TO_CALLBACK, "all", "none")


def test_generation_choices_equal_the_real_ones() -> None:
    """C5: the texts that GenerationConfig checks by itself are the library's."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

    assert generation_fields()["cache_implementation"].choices == tuple(ALL_CACHE_IMPLEMENTATIONS)
    assert generation_fields()["early_stopping"].choices == ("never",)
    assert GenerationConfig(early_stopping="never").early_stopping == "never"
    with pytest.raises(ValueError, match="never"):
        GenerationConfig(early_stopping="sometimes")


def test_every_field_can_be_written_but_objects() -> None:
    """C4: a type that is not understood would refuse every value; only Python objects may do so."""
    sections = (training_fields(), peft_fields("LORA"), peft_fields("PREFIX_TUNING"), generation_fields())
    unwritable = {
        name
        for fields in sections
        for name, field in fields.items()
        if all(option.kind == "null" for option in field.options)
    }
    assert unwritable == {"parallelism_config", "compile_config"}
