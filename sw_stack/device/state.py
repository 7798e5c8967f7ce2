"""Architectural state of the engine in the golden device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from golden.spec.engine import STEP, EngineConfig
from sw_stack.pack.image import Image


class Loaded(NamedTuple):
    """Words that LOAD asked for and MATRIX has not taken: [start, start + words) of every channel."""

    start: int
    words: int


class KVRecord(NamedTuple):
    """One quantised K or V vector: codes uint8[dh], fp16 bits of scale and minimum."""

    codes: np.ndarray
    scale: int
    minimum: int


@dataclass
class EngineState:
    """Memories and streams. `vb` holds Q16 integers, `act` int8 codes per group of 32 with their sidecars
    (addend, shift, decay), `table` output scales (pre, mult, post)."""

    config: EngineConfig
    channels: np.ndarray
    """uint8 [channels, words, 64]."""
    aux: np.ndarray
    constant_words: int
    """Channel words below this never change: what is decoded from them is kept."""
    vb: np.ndarray = field(init=False)
    act: np.ndarray = field(init=False)
    sides: np.ndarray = field(init=False)
    table: np.ndarray = field(init=False)
    loaded: deque[Loaded] = field(default_factory=deque)
    records: deque[KVRecord] = field(default_factory=deque)
    fresh: tuple[int, ...] | None = None
    """(dst, vectors, stride, count) of the last vector instruction, which `fresh` refers to."""
    counted: int = 0
    """Groups of codes that counted QUANTs wrote and no product that follows has taken."""
    decoded: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        c = self.config
        self.vb = np.zeros(c.vb_words * c.vector_lanes, np.int64)
        self.act = np.zeros((c.act_words * 2, STEP), np.int8)
        self.sides = np.zeros((c.act_words * 2, 3), np.int64)
        self.table = np.zeros((c.table_entries, 3), np.int64)

    @classmethod
    def from_image(cls, image: Image) -> EngineState:
        """State after loading an image directory; channels are private copies on write."""
        config = image.map.engine
        channels = np.stack([image.channel(c) for c in range(config.channels)])
        return cls(config, channels, image.aux(), image.map.weight_words)

    def start_run(self) -> None:
        """Drop what an aborted run may have left in the streams."""
        self.loaded.clear()
        self.records.clear()
        self.fresh = None
        self.counted = 0
