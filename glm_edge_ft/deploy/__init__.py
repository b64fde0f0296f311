"""After training: chat with a model, evaluate it, merge its adapter, export it as GGUF."""
