"""Fixtures: machines of chosen shapes, and the real model cut to two layers."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

from golden.loaders import Checkpoint, load
from tests.sw_stack.machines import MakeMachine, make_machine

torch.set_num_threads(1)


@pytest.fixture
def machine(tmp_path: Path) -> MakeMachine:
    """machine(model, engine, weights, kv, context, chunk)."""
    return partial(make_machine, tmp_path)


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    return load()


@pytest.fixture(scope="session")
def two_layers(smollm2: Checkpoint) -> Checkpoint:
    """The real model's first two layers, embedding and head."""
    return dataclasses.replace(smollm2, config=dataclasses.replace(smollm2.config, layers=2))
