"""The versions of what a run computes with."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "deepspeed", "bitsandbytes")


def read_versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that are installed, by name."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
