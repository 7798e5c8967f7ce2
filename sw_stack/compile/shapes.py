"""Shapes without weights: a Hugging Face config.json is enough to compile and to predict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from golden.config import DecoderConfig
from golden.loaders.safetensors import config_from_json
from golden.spec import KVStrataError

NOMINAL_NORM = (10, 1)
"""(f, En) that stands in for a norm weight when only instruction counts and cycles are asked for."""


def read_config(path: str | Path) -> DecoderConfig:
    """Shape of a decoder's engine form, from config.json. KVStrataError for what is no JSON, no Llama or OPT, or not
    complete."""
    try:
        stored = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise KVStrataError(f"a model configuration is a JSON file; {path} is not") from error
    return replace(config_from_json(stored, str(path)), norm="rms")


def nominal_norms(model: DecoderConfig) -> tuple[tuple[int, int], ...]:
    """Stand-ins for every norm of a model."""
    return (NOMINAL_NORM,) * (2 * model.layers + 1)
