"""Before and after training: convert data; talk to a model, measure it, show its run, merge it, ship it.

\b
    python -m glm_edge_ft convert alpaca.json data/mine/train.jsonl --from alpaca
    python -m glm_edge_ft chat output/demo
    python -m glm_edge_ft evaluate data/demo/test.jsonl glm-edge-nano output/demo
    python -m glm_edge_ft report output/demo
    python -m glm_edge_ft merge output/demo output/merged
    python -m glm_edge_ft export-gguf output/demo output/demo.gguf
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from glm_edge_ft.cli import Overrides, argument, option, run_command
from glm_edge_ft.console import show
from glm_edge_ft.data.convert import convert_file
from glm_edge_ft.data.convert_formats import FORMATS
from glm_edge_ft.deploy.chat import chat
from glm_edge_ft.deploy.evaluate import evaluate
from glm_edge_ft.deploy.export_gguf import TYPES, export_gguf
from glm_edge_ft.deploy.merge import Format, merge
from glm_edge_ft.distributed import check_launcher, unset_launcher_variables
from glm_edge_ft.files import expand_home
from glm_edge_ft.report import report

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    add_completion=False, rich_markup_mode=None, no_args_is_help=True, context_settings=HELP, help=__doc__
)

SOURCE = (
    "Output folder of a run, one of its checkpoints such as output/demo/checkpoint-240, an adapter's or a model's "
    "folder, a hub id, or an embedded model: glm-edge-nano, glm-edge-v-nano."
)
BASE = "The model below an adapter, where it is not the one that the adapter names, e.g. --base glm-edge-nano."
Source = Annotated[str, argument("MODEL_OR_CHECKPOINT", SOURCE)]
Base = Annotated[str | None, option("--base", "MODEL", BASE)]


def path_argument(metavar: str, text: str) -> Any:
    """Return an argument that is a path."""
    return argument(metavar, text, parser=expand_home)


def path_option(flag: str, metavar: str, text: str, show_default: bool = False) -> Any:
    """Return an option that is a path."""
    return option(flag, metavar, text, show_default, parser=expand_home)


@app.callback()
def main() -> None:
    """Work as one process, also where some of a launcher's variables were left in the environment."""
    if check_launcher():
        unset_launcher_variables()


@app.command("chat")
def chat_command(
    model: Source,
    base: Base = None,
    image: Annotated[str | None, option("--image", "PATH", "An image beside the first question.")] = None,
    system: Annotated[str | None, option("--system", "TEXT", "A system turn before all others.")] = None,
    prompt: Annotated[
        str | None, option("--prompt", "TEXT", "Print the answer to this one question, and nothing else, and end.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        option("--max-new-tokens", "N", "Longest reply, in tokens; the run's own, or 512, by default.", min=1),
    ] = None,
    temperature: Annotated[
        float | None, option("--temperature", "T", "Sample, with this temperature; 0: no sampling.", min=0.0)
    ] = None,
    top_p: Annotated[
        float | None, option("--top-p", "P", "Sample, from the likeliest tokens of this share.", min=1e-6, max=1.0)
    ] = None,
    top_k: Annotated[
        int | None, option("--top-k", "K", "Sample, from this many of the likeliest tokens.", min=1)
    ] = None,
    repetition_penalty: Annotated[
        float | None, option("--repetition-penalty", "X", "Above 1, repeat less, e.g. 1.1.", min=1e-6)
    ] = None,
    seed: Annotated[int | None, option("--seed", "N", "Makes sampled replies repeatable.")] = None,
) -> None:
    """Chat with a model, with or without an adapter on it.

    \b
    A conversation, ended by /quit:
        python -m glm_edge_ft chat output/demo
    One answer for a script:
        python -m glm_edge_ft chat output/demo/checkpoint-120 --prompt "Hello"
    About an image:
        python -m glm_edge_ft chat output/demo_vision --image dog.jpg

    A run's model answers with the generation settings of its run, any other greedily, unless options say otherwise.
    """
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
    }
    generation = {name: value for name, value in given.items() if value is not None}
    run_command(lambda: chat(model, base, image, system, prompt, generation, seed))


@app.command("evaluate")
def evaluate_command(
    data_file: Annotated[Path, path_argument("DATA_FILE", "Conversations, e.g. data/demo/test.jsonl.")],
    models: Annotated[list[str], argument("MODEL_OR_CHECKPOINT...", f"One or more, for a table. {SOURCE}")],
    config: Annotated[
        Path | None,
        path_option("--config", "YAML", "Settings to measure with; otherwise those of the first run among the models."),
    ] = None,
    overrides: Overrides = None,
    base: Base = None,
    out: Annotated[
        Path, path_option("--out", "DIR", "Where metrics.jsonl and predictions/ go.", show_default=True)
    ] = Path("output/evaluate"),
) -> None:
    """Measure models on a data file: loss, ROUGE, BLEU and exact match, as a run's own evaluation does.

    \b
    Before and after, side by side:
        python -m glm_edge_ft evaluate data/demo/test.jsonl glm-edge-nano output/demo
    Two checkpoints, with larger batches:
        python -m glm_edge_ft evaluate data/demo/dev.jsonl output/demo/checkpoint-120 output/demo/checkpoint-240 \\
            --set training_args.per_device_eval_batch_size=64
    """
    run_command(lambda: evaluate(data_file, tuple(models), out, config, tuple(overrides or ()), base))


@app.command("report")
def report_command(
    output_dirs: Annotated[list[Path], path_argument("OUTPUT_DIR...", "Output folders of runs, e.g. output/demo.")],
    out: Annotated[
        Path | None, path_option("--out", "PAGE.html", "The page; report.html in the first folder by default.")
    ] = None,
    language: Annotated[
        str, typer.Option("--language", metavar="en|zh|both", help="Of the labels; both: with a switch on the page.")
    ] = "both",
) -> None:
    """Show runs to a colleague: one HTML page with curves, scores, config, data and predictions, to open or to send.

    \b
    One run, also while it is going on:
        python -m glm_edge_ft report output/demo
    Two runs over one another, and what differs in their configs:
        python -m glm_edge_ft report output/lora output/sft --out compare.html
    """
    run_command(lambda: report(output_dirs, out, language))


@app.command("merge")
def merge_command(
    checkpoint: Annotated[str, argument("CHECKPOINT", "Folder of a LoRA adapter: a run's output, or a checkpoint.")],
    out_dir: Annotated[Path, path_argument("OUT_DIR", "Where the merged model goes: a new folder.")],
    base: Base = None,
    dtype: Annotated[
        Format | None, option("--dtype", "FORMAT", "float32, bfloat16 or float16; the base model's if not given.")
    ] = None,
    max_shard_size: Annotated[
        str, option("--max-shard-size", "SIZE", "Largest size of one weight file.", True)
    ] = "5GB",
) -> None:
    """Merge a LoRA adapter into its base model: a folder that loads like the base model, with nothing of PEFT in it.

    \b
    In the base model's number format:
        python -m glm_edge_ft merge output/demo output/merged
    A checkpoint, in full precision:
        python -m glm_edge_ft merge output/demo/checkpoint-120 output/merged-120 --dtype float32
    """
    run_command(lambda: merge(checkpoint, out_dir, base, dtype, max_shard_size))


@app.command("export-gguf")
def export_gguf_command(
    model: Source,
    out: Annotated[Path, path_argument("OUT.gguf", "The new file; nothing is written over.")],
    kind: Annotated[
        str, option("--type", "|".join(TYPES), "Number format of the matrices: f32 is exact, q8_0 the smallest.", True)
    ] = "f16",
    base: Base = None,
) -> None:
    """Write a model as one GGUF file for llama.cpp and Ollama, tokenizer and chat template inside, adapter merged.

    \b
    For a laptop:
        python -m glm_edge_ft export-gguf output/demo output/demo.gguf
    For a phone, half as large:
        python -m glm_edge_ft export-gguf output/demo output/demo-q8.gguf --type q8_0
    """
    run_command(lambda: export_gguf(model, out, base, kind))


@app.command("convert")
def convert_command(
    source: Annotated[Path, path_argument("INPUT", "A .json, .jsonl or .parquet file.")],
    target: Annotated[Path, path_argument("OUT.jsonl", "The new file; nothing is written over.")],
    form: Annotated[str, typer.Option("--from", metavar="FORMAT", help=f"One of {', '.join(FORMATS)}.")],
    images: Annotated[
        Path | None, path_option("--images", "DIR", "Where the paths of images start; INPUT's folder by default.")
    ] = None,
) -> None:
    """Turn another tool's data file into conversations to train on, and say which rows could not be converted.

    \b
    Instructions and outputs:
        python -m glm_edge_ft convert alpaca.json data/mine/train.jsonl --from alpaca
    Questions about images, which are in a folder of their own:
        python -m glm_edge_ft convert llava.json data/pictures/train.jsonl --from llava --images coco/train2017
    """
    run_command(lambda: show("\n".join(convert_file(source, target, form, images).lines(target))))


if __name__ == "__main__":
    app(prog_name="python -m glm_edge_ft")
