"""From a model id to a model that is ready to train: loading, adapters, the embedded models."""
