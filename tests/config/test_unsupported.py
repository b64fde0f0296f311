"""Settings that transformers takes and this toolkit does not use are told of before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.files import load, notices, refused


@pytest.mark.parametrize(
    "written",
    [
        "stop_strings: ['。']",
        "token_healing: true",
        "prompt_lookup_num_tokens: 3",
        "assistant_early_exit: 2",
        "num_assistant_tokens: 5",
        "num_assistant_tokens_schedule: constant",
        "assistant_confidence_threshold: 0.4",
        "use_mtp: true",
        "prefill_chunk_size: 64",
        "return_dict_in_generate: true",
        "output_scores: true",
        "output_logits: true",
        "output_attentions: true",
        "output_hidden_states: true",
        "cache_implementation: static",
        "cache_implementation: quantized",
        "compile_config: {mode: default}",
        "num_beam_groups: 2",
        "diversity_penalty: 0.5",
        "dola_layers: low",
        "constraints: [1]",
        "force_words_ids: [[3]]",
        "penalty_alpha: 0.6",
        "low_memory: true",
        "min_length: 5",
        "max_length: 64",
        "eos_token_id: 2",
        "pad_token_id: 0",
        "bos_token_id: 1",
    ],
)
def test_generation_key_that_cannot_work_is_refused(tmp_path: Path, written: str) -> None:
    """C5: what would fail, or do nothing, at the first evaluation is one problem at start, with its line."""
    (problem,) = refused(tmp_path, f"generation_config:\n  {written}")
    assert problem.where == f"run.yaml:7: training_args.generation_config.{written.partition(':')[0]}"
    assert problem.fix.startswith(("leave it out", "write m"))


@pytest.mark.parametrize(
    ("written", "what", "fix"),
    [
        ("generation_config: {max_length: 64}", "counts the prompt too", "write max_new_tokens instead"),
        ("generation_config: {stop_strings: END}", "`END`: stop_strings needs a tokenizer", "leave it out; stop ids"),
        (
            "generation_num_beams: 4",
            "`4`: generation_num_beams has no effect here",
            "write generation_config.num_beams",
        ),
        ("generation_max_length: 64", "has no effect here", "write generation_config.max_new_tokens"),
        ("fsdp: true", "fsdp is not supported by this toolkit", "leave it out; use deepspeed"),
        ("fsdp: full_shard", "fsdp is not supported by this toolkit", "leave it out; use deepspeed"),
        ("fsdp_config: {min_num_params: 9}", "is not supported by this toolkit", "leave it out; use deepspeed"),
        ("use_liger_kernel: true", "would take the place of this toolkit's own loss", "leave it out"),
    ],
)
def test_key_without_support_is_refused_with_what_to_write(tmp_path: Path, written: str, what: str, fix: str) -> None:
    """C5, C8: one problem with the key, the reason, and the key that has the effect here."""
    (problem,) = refused(tmp_path, written)
    assert problem.where.startswith(f"run.yaml:6: training_args.{written.partition(':')[0]}")
    assert what in problem.what
    assert problem.fix.startswith(fix)


def test_max_length_beside_max_new_tokens_has_no_effect(tmp_path: Path) -> None:
    """C5: max_new_tokens wins, said in a notice."""
    config = load(tmp_path, "generation_config: {max_length: 64, max_new_tokens: 8}")
    assert config.generation_config == {"max_new_tokens": 8}
    assert notices(config) == [
        "run.yaml:6: training_args.generation_config.max_length: "
        "has no effect here; max_new_tokens decides the length of a reply"
    ]


@pytest.mark.parametrize(
    "written",
    [
        "{num_beams: 4}",
        "{do_sample: true, temperature: 0.7, top_p: 0.9, top_k: 20}",
        "{do_sample: true, num_beams: 2}",
        "{cache_implementation: dynamic, num_beam_groups: 1, penalty_alpha: 0, diversity_penalty: 0.0}",
        "{return_dict_in_generate: false, output_scores: false, stop_strings: null, min_length: 0}",
        "{repetition_penalty: 1.1, no_repeat_ngram_size: 3, watermarking_config: {bias: 2.0}}",
    ],
)
def test_supported_ways_to_generate_are_accepted(tmp_path: Path, written: str) -> None:
    """C5: greedy, sampling, beams, both; a key that switches an unsupported mode off is harmless."""
    assert load(tmp_path, f"generation_config: {written}").notices == ()


def test_fsdp_beside_deepspeed_is_refused_once(tmp_path: Path) -> None:
    """C8: the two together are one problem, and deepspeed stays."""
    (tmp_path / "zero.json").write_text("{}", encoding="utf-8")
    assert [problem.where for problem in refused(tmp_path, "deepspeed: zero.json\nfsdp: full_shard")] == [
        "run.yaml:7: training_args.fsdp"
    ]


@pytest.mark.parametrize("written", ["fsdp: ''", "fsdp: false", "use_liger_kernel: false"])
def test_switched_off_is_accepted(tmp_path: Path, written: str) -> None:
    """C4: a key that is off asks for nothing."""
    assert load(tmp_path, written).notices == ()


@pytest.mark.parametrize(
    "written",
    [
        "sortish_sampler: true",
        "batch_eval_metrics: true",
        "include_for_metrics: [inputs]",
        "eval_accumulation_steps: 2",
        "prediction_loss_only: true",
    ],
)
def test_setting_without_effect_gets_a_notice(tmp_path: Path, written: str) -> None:
    """C2: accepted, but the user learns that nothing follows from it."""
    (notice,) = notices(load(tmp_path, written))
    assert notice.startswith(f"run.yaml:6: training_args.{written.partition(':')[0]}: has no effect here; ")
