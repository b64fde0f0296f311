"""Fine-tune a GLM-Edge chat model on your conversations.

\b
One process (a GPU, or the CPU for the embedded model):
    python finetune.py data/demo glm-edge-nano configs/demo.yaml

\b
Eight GPUs of one machine:
    OMP_NUM_THREADS=1 torchrun --standalone --nnodes=1 --nproc_per_node=8 \\
        finetune.py data/AdvertiseGen/ THUDM/glm-edge-4b-chat configs/lora.yaml

\b
Continue from the newest checkpoint, or from checkpoint 600:
    python finetune.py data/demo glm-edge-nano configs/demo.yaml yes
    python finetune.py data/demo glm-edge-nano configs/demo.yaml 600
"""

import typer

from glm_edge_ft import cli
from glm_edge_ft.preflight import RunRequest

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
def main(
    data_dir: cli.DataDir,
    model: cli.Model,
    config: cli.Config,
    resume: cli.Resume = None,
    overrides: cli.Overrides = None,
    check: cli.Check = False,
    preview: cli.Preview = None,
    json_path: cli.JsonPath = None,
) -> None:
    """Hand the command line to the recipe."""
    request = RunRequest(data_dir, model, config, resume, tuple(overrides or ()), check, preview, json_path)
    cli.execute(request)


if __name__ == "__main__":
    app()
