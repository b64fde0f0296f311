"""The pickles in a checkpoint: what they would call when read, looked up without reading them.

Optimizer, schedule and random state are `torch.save` files, that is pickles. transformers reads them by torch's
restricted reader, which knows tensors and plain values alone; DeepSpeed reads its own in full, and a pickle that is
read in full can run anything. So every file is looked through before: a name that is not on the list ends the run.
The list has whole names. A module alone would not do: by `deepspeed.runtime.engine` and a dotted name, a pickle reaches
what that module imports, such as `os.system`.
"""

from __future__ import annotations

from pathlib import Path

from glm_edge_ft.errors import Problem
from glm_edge_ft.training.checkpoints import RANDOM_STATE_PREFIX

DEEPSPEED_FOLDERS = "global_step*"
_NAMES_OF_DEEPSPEED = {  # what the states of ZeRO 1 to 3 hold, in fp32, bf16 and fp16, offloaded or not
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
_FIX = "continue only from checkpoints of your own runs; take another one, or start afresh (RESUME no)"


def check_pickles(checkpoint: Path) -> list[Problem]:
    """Return what stands against reading the pickles of `checkpoint`: names that are not known, files that are broken.

    A random state is left out: the restricted reader reads it, and without a readable one a run goes on (R6).
    """
    problems = []
    files = [path for pattern in ("*.pt", "*.pth", "*.bin") for path in checkpoint.rglob(pattern)]
    for path in sorted(files):
        if not path.name.startswith(RANDOM_STATE_PREFIX):
            problems += _check_file(path, in_full=path.parent.match(DEEPSPEED_FOLDERS))
    return problems


def _check_file(path: Path, in_full: bool) -> list[Problem]:
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:  # broken bytes lead to whatever they lead to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [Problem(str(path), f"cannot be read: {reason}", _FIX)]
    unknown = sorted(name for name in names if not (in_full and name in _NAMES_OF_DEEPSPEED))
    if not unknown:
        return []
    return [Problem(str(path), f"is a pickle that would call {', '.join(unknown[:5])}: nothing of it was read", _FIX)]
