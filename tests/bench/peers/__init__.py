"""Peers on the workload: each script runs in a virtual environment of its own and imports nothing of this project."""
