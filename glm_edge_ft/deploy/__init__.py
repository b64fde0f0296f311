"""After training: talk to a model, measure it, merge its adapter."""
