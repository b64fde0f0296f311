"""The training loop: loss, trainer, evaluation, metrics, checkpoints."""
