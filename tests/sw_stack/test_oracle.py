"""The whole model, packed and compiled, against another toolchain: transformers' own reading of the same file.

Packer, compiler and golden decoder share a loader, so that a mistake in it would be equal on both sides; these logits
do not come through it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from golden.exact_decoder import engine_weight
from golden.formats.weights import QuantisedWeight, fitting_group
from golden.loaders import Checkpoint
from golden.spec.engine import SMALL
from golden.spec.formats import W8
from sw_stack.compile.decoder import compile_model
from sw_stack.device.golden import GoldenDevice
from sw_stack.pack.image import Weights, checkpoint_weights, pack_model
from sw_stack.pack.memory_map import MemoryMap
from sw_stack.runtime.session import Session

ORACLE = json.loads((Path(__file__).parents[1] / "golden" / "data" / "smollm2_oracle.json").read_text())
AGREES = 0.95
"""Least correlation with the float logits that W4A8KV4 is held to (measured: 0.978)."""

pytestmark = pytest.mark.slow


def correlation(checkpoint: Checkpoint, folder: Path, weights: Weights | None = None) -> tuple[float, int]:
    """(correlation with the oracle's logits, top token) after the oracle's prompt, on the golden device."""
    memory_map = MemoryMap(checkpoint.config, SMALL, "w4", "kv4", 64)
    getter = weights or checkpoint_weights(checkpoint, memory_map)
    image = pack_model(folder / "image", memory_map, getter, checkpoint.float32, checkpoint.sha256)
    programs = compile_model(memory_map, image.norm_exponents)
    embedding = engine_weight(checkpoint, "embed", fitting_group(W8, checkpoint.config.hidden))
    logits = Session(GoldenDevice(image), programs, embedding).forward(ORACLE["tokens"]).double()
    chosen = logits[ORACLE["vocabulary"]].numpy()
    return float(np.corrcoef(chosen, ORACLE["logits"][-1])[0, 1]), int(logits.argmax())


def test_the_packed_model_agrees_with_transformers(smollm2: Checkpoint, tmp_path: Path) -> None:
    found, top = correlation(smollm2, tmp_path)
    assert found > AGREES
    assert top == ORACLE["argmax"][-1]


def test_a_scrambled_export_does_not(smollm2: Checkpoint, tmp_path: Path) -> None:
    """Rows of q in the pairing of another convention: the classic mistake of exporters."""
    right = checkpoint_weights(smollm2, MemoryMap(smollm2.config, SMALL, "w4", "kv4", 64))
    size = smollm2.config.head_size

    def scrambled(name: str) -> QuantisedWeight:
        weight = right(name)
        if not name.endswith(".q"):
            return weight
        order = torch.arange(weight.shape[0]).view(-1, size // 2, 2).transpose(1, 2).flatten()
        assert weight.minimum is not None
        return dataclasses.replace(
            weight, codes=weight.codes[order], scale=weight.scale[order], minimum=weight.minimum[order]
        )

    found, _ = correlation(smollm2, tmp_path, scrambled)
    assert found < AGREES
