"""Every form of adapter that a config may ask for: the model that was trained is the one that is kept, or exit code 2.

For each form the loss of the trained model in memory, of its folder under plain PEFT, of `load_adapter` (chat and
evaluate), of the merged folder and of the GGUF file (f32) are one number, and a run that is resumed ends with the same
bits. The forms are held against the installed PEFT: a field or a way to begin that it learns fails here until it is
classed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftModel, PrefixTuningConfig, PromptLearningConfig
from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from glm_edge_ft.checks.preflight import inspect_structure
from glm_edge_ft.config import load_config
from glm_edge_ft.data.dataset import build_dataset
from glm_edge_ft.data.encoding import ConversationEncoder
from glm_edge_ft.deploy.export_gguf import export_gguf
from glm_edge_ft.deploy.merge import PROMPT_TYPES, merge
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.loading import build_meta_model, load_weights, locate_model, read_checkpoint
from glm_edge_ft.model.saved_folder import load_adapter
from tests.conftest import TokenizerMaker
from tests.deploy.conftest import command
from tests.deploy.gguf_files import model_key, read_gguf
from tests.launch import launch, start
from tests.model_folders import tiny_config
from tests.runs import assert_same_bits, do_run, metrics, write_chat_data, write_config

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
PREFIX: dict[str, Any] = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}
EMBEDDINGS = ["embed_tokens", "lm_head"]
BLOCKS = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj", "k_proj", "v_proj"], "nblocks": 2}

# (base model, what is laid over LORA); by default those of several keys at once, the others are slow
KEPT: dict[str, tuple[str, dict[str, Any]]] = {
    "begin true": ("plain", {"init_lora_weights": True, "lora_dropout": 0.1}),
    "begin false": ("plain", {"init_lora_weights": False}),
    "begin gaussian": ("plain", {"init_lora_weights": "gaussian", "target_modules": "all-linear"}),
    "begin orthogonal": ("plain", {"init_lora_weights": "orthogonal"}),
    "begin mica": ("plain", {"init_lora_weights": "mica"}),
    "dora": ("plain", {"use_dora": True}),
    "rslora": ("plain", {"use_rslora": True}),
    "patterns": ("plain", {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 4}}),
    "layers": ("plain", {"layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["q_proj"]}),
    "velora": ("plain", {"velora_config": {"num_groups": 8}}),
    "bdlora": ("plain", {"use_bdlora": BLOCKS}),
    "parameters": ("plain", {"target_parameters": ["mlp.down_proj.weight"], "target_modules": ["q_proj"]}),
    "tokens": ("plain", {"trainable_token_indices": [300, 301]}),
    "tokens of the head": ("plain", {"trainable_token_indices": {"lm_head": [300, 301]}}),
    "head": ("plain", {"target_modules": ["lm_head", "q_proj"]}),
    "embeddings": ("plain", {"target_modules": EMBEDDINGS}),
    "whole modules": ("plain", {"modules_to_save": [*EMBEDDINGS, "input_layernorm"]}),
    "biases": ("biased", {"bias": "all"}),
    "biases of the targets": ("biased", {"bias": "lora_only", "use_dora": True}),
    "a bias of its own": ("biased", {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}),
    "tied, embeddings tied": ("tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied, head tied": ("tied", {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}),
    "tied, embeddings": ("tied", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "tied, both": ("tied", {"target_modules": [*EMBEDDINGS, "q_proj"]}),
    "tied, whole modules tied": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, whole modules": ("tied", {"modules_to_save": EMBEDDINGS}),
    "tied, whole head": ("tied", {"modules_to_save": ["lm_head"]}),
    "tied, tokens": ("tied", {"trainable_token_indices": {"embed_tokens": [300, 301]}}),
    "tied, tokens tied": ("tied", {"trainable_token_indices": [300, 301], "ensure_weight_tying": True}),
    "four bits": ("plain", {"target_modules": ["q_proj", "gate_up_proj"], "quantization": "nf4"}),
    "prefix": ("plain", PREFIX),
    "prefix from zero": ("plain", PREFIX | {"init_weights": "zero"}),
    "prefix with projection": ("plain", PREFIX | {"prefix_projection": True, "encoder_hidden_size": 8}),
}
BY_DEFAULT = (
    "begin gaussian",
    "begin mica",
    "dora",
    "layers",
    "velora",
    "bdlora",
    "parameters",
    "tokens",
    "whole modules",
    "a bias of its own",
    "tied, embeddings tied",
    "tied, both",
    "tied, whole modules tied",
    "tied, tokens",
    "prefix with projection",
)

REFUSED: dict[str, dict[str, Any]] = {
    "init_lora_weights: pissa": {"init_lora_weights": "pissa"},
    "init_lora_weights: pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights: olora": {"init_lora_weights": "olora"},
    "init_lora_weights: corda": {"init_lora_weights": "corda"},
    "init_lora_weights: eva": {"init_lora_weights": "eva"},
    "init_lora_weights: loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "kasa_config": {"kasa_config": {"beta": 0.001}},
    "monteclora_config": {"monteclora_config": {"num_samples": 2}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [300]},
    "arrow_config": {"arrow_config": {"top_k": 1}},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "lora_bias": {"lora_bias": True},  # on layers without a bias
    "megatron_config": {"megatron_config": {"hidden_size": 64}},
}

# Fields that make no other form of adapter.
FACTS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
FACTS |= {"inference_mode", "runtime_config"}
SIZES = {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}  # those of the model or none
OF_OTHERS = {"eva_config", "corda_config", "lora_ga_config", "megatron_core"}  # read beside a key that is refused
OF_OTHER_LAYERS = {"fan_in_fan_out", "use_qalora", "qalora_group_size"}  # no layer of these models


def test_every_field_and_way_to_begin_of_peft_is_classed() -> None:
    """K8: what a new PEFT brings is tried here, or refused, before it slips in."""
    walked = [settings for _, settings in KEPT.values()] + list(REFUSED.values()) + [LORA]
    classed = {key for settings in walked for key in settings} | FACTS | SIZES | OF_OTHERS | OF_OTHER_LAYERS
    for config in (LoraConfig, PrefixTuningConfig):
        assert {field.name for field in dataclasses.fields(config)} <= classed
    hint: Any = get_type_hints(LoraConfig)["init_lora_weights"]
    ways = {way for part in get_args(hint) for way in get_args(part)}
    tried = {str(settings["init_lora_weights"]) for settings in walked if "init_lora_weights" in settings}
    assert {way.replace("[number of iters]", "4") for way in ways} <= tried
    prompts = {
        str(kind.value)
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if issubclass(config, PromptLearningConfig)
    }
    assert prompts <= set(PROMPT_TYPES)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: TokenizerMaker) -> Iterator[Path]:
    """Return a folder with models (`plain`, `tied`, `biased`) and `data`."""
    folder = tmp_path_factory.mktemp("forms")
    tokenizer = make_tokenizer("glm")
    ids = tokenizer.get_vocab()
    stops = [ids[token] for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    for name in ("plain", "tied", "biased"):
        config: Any = tiny_config(len(tokenizer), stops[0], stops)
        config.tie_word_embeddings, config.attention_bias = name == "tied", name == "biased"
        torch.manual_seed(0)
        model = GlmForCausalLM(config)
        for key, values in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(values, std=0.1)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_chat_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM_EDGE_FT_CACHE", str(folder / "cache"))
        yield folder


def loss_of(model: Any, place: Path) -> float:
    """Return the loss per supervised token of the test rows, one after another, by the logits alone."""
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(place / "plain")
    stops = frozenset(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"]))
    rows, _ = build_dataset([place / "data/test.jsonl"], ConversationEncoder(tokenizer, stops, 256, 64))
    total, count = 0.0, 0
    for number in range(len(rows)):
        ids, labels = (torch.as_tensor(rows[number][key]).long() for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model.eval()(input_ids=ids[None]).logits[0, -len(ids) :].float()
        total += float(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    return total / count


def read_gguf_model(path: Path, base: Path) -> GlmForCausalLM:
    """Return a model of PyTorch's with the numbers of a GGUF file."""
    config: Any = GlmConfig.from_pretrained(base)
    weights = {model_key(name): values for name, values in read_gguf(path).tensors.items()}
    config.tie_word_embeddings = "lm_head.weight" not in weights
    model = GlmForCausalLM(config)
    missing, surplus = model.load_state_dict(weights, strict=False)
    assert (set(missing) <= {"lm_head.weight"}, surplus) == (True, [])
    return model


def split(form: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `peft_config`, and the keys of the config beside it."""
    settings = (LORA if "peft_type" not in form else {}) | form
    quantization = settings.pop("quantization", None)
    return settings, {} if quantization is None else {"quantization": quantization}


@pytest.mark.parametrize(
    "form", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in KEPT]
)
def test_the_model_that_was_trained_is_the_one_that_is_kept(form: str, place: Path, tmp_path: Path) -> None:
    """K8, K9, K10: one loss on all roads, and the same bits after resuming."""
    name, settings = KEPT[form]
    peft, top = split(settings)
    if top:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base, out, data = place / name, tmp_path / "out", place / "data"
    options: dict[str, Any] = {"peft": peft, "top": top, "test": "test.jsonl", "max_steps": 2, "save_steps": 1}
    options |= {"learning_rate": 2e-2, "predict_with_generate": False, "logging_steps": 2}
    do_run(out, data, base, **options)
    trained = next(line["test_loss"] for line in metrics(out) if "test_loss" in line)
    checkpoint = read_checkpoint(locate_model(str(base)))

    def fresh() -> Any:
        return load_weights(checkpoint, torch.float32, "nf4" if top else None)

    untrained = loss_of(fresh(), place)
    assert abs(trained - untrained) > 1e-3 * untrained
    found = {"plain PEFT": loss_of(PeftModel.from_pretrained(fresh(), out), place)}
    found["chat and evaluate"] = loss_of(load_adapter(fresh(), out), place)
    if peft["peft_type"] == "LORA":
        merge(str(out), tmp_path / "merged")
        found["merged"] = loss_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), place)
        export_gguf(str(out), tmp_path / "model.gguf", kind="f32")
        assert loss_of(read_gguf_model(tmp_path / "model.gguf", base), place) == pytest.approx(trained, rel=1e-3)
    assert found == pytest.approx(dict.fromkeys(found, trained), rel=1e-5)
    again = tmp_path / "again"
    shutil.copytree(out / "checkpoint-1", again / "checkpoint-1")
    do_run(again, data, base, resume="1", **options)
    assert_same_bits(out, again)


@pytest.mark.parametrize("form", REFUSED)
def test_a_form_that_is_not_kept_is_refused_before_weights_are_read(form: str, place: Path, tmp_path: Path) -> None:
    """K8, K11: with its key and what to write instead."""
    config = load_config(write_config(tmp_path / "out", peft=LORA | REFUSED[form]))
    meta = build_meta_model(read_checkpoint(locate_model(str(place / "plain"))))
    with pytest.raises(UserError) as caught:
        inspect_structure(config, meta, keeps_vision=False)
    (problem,) = caught.value.problems
    is_no_package = form == "megatron_config" or ("loftq" in form and importlib.util.find_spec("scipy") is None)
    assert problem.where == ("peft_config" if is_no_package else f"peft_config.{form.partition(':')[0]}")
    assert problem.fix or is_no_package


def test_a_run_says_so(place: Path, tmp_path: Path) -> None:
    """K8: the script itself, before it makes its output folder, and so before weights are read."""
    peft = LORA | {"init_lora_weights": "pissa_niter_4"}
    said = start(tmp_path / "out", place / "data", place / "plain", peft=peft).end(2)
    assert "peft_config.init_lora_weights: pissa_niter_4 changes the base model's weights" in said
    assert "-> write true, gaussian or orthogonal" in said
    assert not (tmp_path / "out").exists()


def write_opposed_data(folder: Path) -> Path:
    """Write rows for training and for evaluation with other replies: the more is learned, the worse the evaluation."""
    folder.mkdir()
    for name, reply in (("train", "hello my friend, I am fine"), ("dev", "我们去公园散步吧。今天天气很好")):
        row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": reply}]}
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_projection_is_resumed_and_its_best_is_loaded(place: Path, tmp_path: Path) -> None:
    """K9: the scripts; the best model is not the last, and both runs end with its bits."""
    data = write_opposed_data(tmp_path / "data")
    evaluates = {"val": "dev.jsonl", "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 4}
    evaluates |= {"load_best_model_at_end": True, "predict_with_generate": False, "learning_rate": 0.3}
    options: dict[str, Any] = {"peft": PREFIX | {"prefix_projection": True}, **evaluates}
    out = launch(tmp_path / "out", data, place / "plain", **options)
    losses = {line["step"]: line["eval_loss"] for line in metrics(out) if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best != 4
    assert_same_bits(out, out / f"checkpoint-{best}")
    again = tmp_path / "again"
    for step in {best, 2}:
        shutil.copytree(out / f"checkpoint-{step}", again / f"checkpoint-{step}")
    launch(again, data, place / "plain", resume="2", **options)
    assert_same_bits(out, again)
    assert_same_bits(out / "checkpoint-4", again / "checkpoint-4")


def test_a_checkpoint_without_the_projection_is_refused(place: Path, tmp_path: Path) -> None:
    """K9: as other tools write it, with the computed prefix alone."""
    options: dict[str, Any] = {"peft": PREFIX | {"prefix_projection": True}, "max_steps": 2, "save_steps": 1}
    out = do_run(tmp_path / "out", place / "data", place / "plain", **options)
    (out / "checkpoint-1/prefix_encoder.safetensors").unlink()
    (out / "checkpoint-1/manifest.json").unlink()
    with pytest.raises(UserError, match=r"^peft_config\.prefix_projection: .*without the projection"):
        do_run(out, place / "data", place / "plain", resume="1", **options)


def save_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """Save an adapter as PEFT's users do, with random matrices."""
    torch.manual_seed(1)
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 4} | settings
    model: Any = PeftModel(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**fields))
    for key, values in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(values)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_of_replicated_layers_is_refused_in_one_line(place: Path, tmp_path: Path) -> None:
    """K11: merge and export, before the weights are read; PEFT would add each copy's matrices to the same layer."""
    adapter = save_adapter(tmp_path / "adapter", place / "plain", layer_replication=[[0, 2], [1, 2]])
    done = command("merge", str(adapter), str(tmp_path / "merged"))
    assert done.returncode == 2
    assert f"\nMODEL {adapter}: its layer_replication makes a model of more layers" in done.stderr
    with pytest.raises(UserError, match="its layer_replication makes a model of more layers"):
        export_gguf(str(adapter), tmp_path / "model.gguf")
    expected = loss_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "plain"), adapter), place)
    assert loss_of(load_adapter(AutoModelForCausalLM.from_pretrained(place / "plain"), adapter), place) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "its init_lora_weights draws random numbers that are not saved"),
        ({"alora_invocation_tokens": [300]}, "PEFT cannot merge this adapter: aLoRA does not support"),
        ({"lora_bias": True, "init_lora_weights": False}, "PEFT cannot merge this adapter: Impossible to merge"),
    ],
)
def test_what_cannot_be_kept_of_other_tools_adapters_is_refused(
    settings: dict[str, Any], said: str, place: Path, tmp_path: Path
) -> None:
    """K8, K11: a merged model would be another than the adapter's."""
    adapter = save_adapter(tmp_path / "adapter", place / "plain", **settings)
    with pytest.raises(UserError, match=said):
        merge(str(adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("beginning", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["plain", "tied"])
def test_other_tools_adapters_that_change_the_base_model_are_merged_as_peft_loads_them(
    beginning: str, name: str, place: Path, tmp_path: Path
) -> None:
    """K8: also on the head of a model with tied embeddings, both of which they change."""
    targets = ["lm_head", "q_proj"]
    adapter = save_adapter(tmp_path / "adapter", place / name, init_lora_weights=beginning, target_modules=targets)
    merge(str(adapter), tmp_path / "merged")
    expected = loss_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / name), adapter), place)
    assert loss_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), place) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.slow
def test_the_commands_on_a_tied_model(place: Path, tmp_path: Path) -> None:
    """K10: matrices on the embeddings that the head shares: run, resume with the same config, merge, export."""
    peft = LORA | KEPT["tied, embeddings tied"][1]
    options: dict[str, Any] = {"peft": peft, "max_steps": 2, "save_steps": 1}
    out = launch(tmp_path / "out", place / "data", place / "tied", **options)
    again = tmp_path / "again"
    shutil.copytree(out / "checkpoint-1", again / "checkpoint-1")
    launch(again, place / "data", place / "tied", resume="yes", **options)
    assert_same_bits(out, again)
    for arguments in (
        ("merge", str(again), str(tmp_path / "m")),
        ("export-gguf", str(again), str(tmp_path / "m.gguf")),
    ):
        assert command(*arguments).returncode == 0
    assert json.loads((tmp_path / "m/config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is True
