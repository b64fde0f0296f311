"""This project's script in a process that is measured in slices: `train_process.py DATA_DIR MODEL CONFIG`."""

import runpy
import sys

from glm_edge_ft import recipe
from glm_edge_ft.recipe import RunRequest
from tests.bench.measure import ROOT

train = recipe.run


def run(request: RunRequest) -> None:
    """Run the recipe with a Trainer that waits; transformers is imported when the script would, not before."""
    from tests.bench.peers.start_line import hold_training

    hold_training()
    train(request)


if __name__ == "__main__":
    recipe.run = run
    sys.argv[0] = "finetune.py"
    runpy.run_path(str(ROOT / "finetune.py"), run_name="__main__")
