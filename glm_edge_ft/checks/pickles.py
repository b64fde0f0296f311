"""The pickles in a checkpoint: what they would call when read, looked up without reading them.

Optimizer, schedule and random state are `torch.save` files, that is pickles. transformers reads them with torch's
restricted reader; DeepSpeed reads its own files in full, and such a pickle can run anything. So every file is examined
first, and a name that is not in the list ends the run. The list has whole names: with `deepspeed.runtime.engine` and a
dotted name, a pickle reaches what that module imports, such as `os.system`.
"""

from __future__ import annotations

from pathlib import Path

from glm_edge_ft.errors import Problem, first_line
from glm_edge_ft.training.checkpoints import RANDOM_STATE_PREFIX

_NAMES_OF_DEEPSPEED = {  # in the states of ZeRO 1 to 3, in fp32, bf16 and fp16, offloaded or not
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
_FIX = "continue only from checkpoints of your own runs; take another one, or start afresh (RESUME no)"


def check_pickles(checkpoint: Path) -> list[Problem]:
    """Return a problem for each pickle of `checkpoint` that is broken or names what is not known.

    The random state is left out: the restricted reader reads it, and a run continues without a readable one.
    """
    import torch

    problems = []
    for path in sorted(path for pattern in ("*.pt", "*.pth", "*.bin") for path in checkpoint.rglob(pattern)):
        if path.name.startswith(RANDOM_STATE_PREFIX):
            continue
        allowed = _NAMES_OF_DEEPSPEED if path.parent.match("global_step*") else set()
        try:
            unknown = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) - allowed)
        except Exception as error:  # broken bytes raise whatever they lead to
            problems.append(Problem(str(path), f"cannot be read: {first_line(error)}", _FIX))
            continue
        if unknown:
            what = f"is a pickle that would call {', '.join(unknown[:5])}: nothing of it was read"
            problems.append(Problem(str(path), what, _FIX))
    return problems
