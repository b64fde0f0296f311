"""A run of `finetune.py` whose steps are profiled: `step_profile_process.py FIRST LAST DATA_DIR MODEL CONFIG`.

Prints a line of JSON: seconds of the steps from FIRST to LAST, and of each kind of operation.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections import defaultdict
from functools import partial
from typing import Any

from glm_edge_ft import recipe
from glm_edge_ft.recipe import RunRequest
from tests.bench.measure import ROOT

# the beginnings of operations' names, by kind; what none of them names is "other"
KINDS = {
    "attention": ("aten::_scaled_dot_product",),
    "random numbers of dropout": ("aten::random_", "aten::ge"),
    "log-softmax of the loss": ("aten::_log_softmax",),
    "sums, products and functions of single elements": (
        *("aten::mul", "aten::add", "aten::div", "aten::silu", "aten::pow", "aten::rsqrt", "aten::sum", "aten::mean"),
        *("aten::neg", "aten::sub", "aten::sigmoid"),
    ),
    "copies and fills": ("aten::copy_", "aten::fill_", "aten::cat", "aten::index", "aten::_index"),
}
LARGE, LORA = "matrix products of the model", "matrix products of LoRA"
LORA_SIDE = 8  # the rank
# by operation, where the shapes of the two matrices stand among those of its inputs
FACTORS = {"aten::mm": slice(0, 2), "aten::addmm_": slice(1, 3)}
train = recipe.run


def kind_of(event: Any) -> str:
    """Return the kind of an operation; LoRA's products are those with a side of `LORA_SIDE` at most."""
    if event.name in FACTORS:
        sides = (size for shape in event.input_shapes[FACTORS[event.name]] for size in shape)
        return LORA if min(sides) <= LORA_SIDE else LARGE
    return next((kind for kind, starts in KINDS.items() if event.name.startswith(starts)), "other")


def seconds_by_kind(events: Any) -> tuple[dict[str, float], float]:
    """Return the seconds of each kind of operation, and the FLOP of the model's matrix products."""
    seconds: dict[str, float] = defaultdict(float)
    flop = 0
    for event in events:
        kind = kind_of(event)
        seconds[kind] += event.self_cpu_time_total / 1e6
        if kind == LARGE:
            (rows, inner), (_, columns) = event.input_shapes[FACTORS[event.name]]
            flop += 2 * rows * inner * columns
    return dict(seconds), flop


def run(first: int, last: int, request: RunRequest) -> None:
    """Run the recipe with a Trainer that profiles; torch is imported when the script would, not before."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import Trainer, TrainerCallback

    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    inner_loop = Trainer._inner_training_loop

    class Profiling(TrainerCallback):
        start = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == first - 1:
                profiler.__enter__()
                self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == last:
                wall = time.perf_counter() - self.start
                profiler.__exit__(None, None, None)
                seconds, flop = seconds_by_kind(profiler.events())
                print("RESULT " + json.dumps({"wall": wall, "seconds": seconds, "flop": flop}), flush=True)

    def profiled_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(Profiling())
        return inner_loop(self, *args, **kwargs)

    Trainer._inner_training_loop = profiled_loop  # type: ignore[method-assign]
    train(request)


if __name__ == "__main__":
    recipe.run = partial(run, int(sys.argv[1]), int(sys.argv[2]))
    sys.argv = ["finetune.py", *sys.argv[3:]]
    runpy.run_path(str(ROOT / "finetune.py"), run_name="__main__")
