"""Random decoders of chosen shapes, packed and compiled for an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from golden.config import DecoderConfig
from golden.engine_form import engine_form
from golden.exact_decoder import ExactDecoder
from golden.loaders import Checkpoint
from golden.spec.engine import SMALL, EngineConfig
from sw_stack.compile.batch import compile_batch
from sw_stack.compile.decoder import Programs, compile_model
from sw_stack.device.golden import GoldenDevice
from sw_stack.device.protocol import EngineDevice
from sw_stack.pack.image import Image, pack_checkpoint
from sw_stack.pack.memory_map import MemoryMap
from sw_stack.pack.ring import KVRing
from sw_stack.runtime.batch import BatchSession
from sw_stack.runtime.session import Session

SHAPE = DecoderConfig("random", layers=2, hidden=128, heads=4, kv_heads=2, head_size=32, ffn=192, vocab=160,
                    context=128, rope_base=10000.0, norm_eps=1e-5)  # fmt: skip

OPT = DecoderConfig("opt", layers=2, hidden=128, heads=4, kv_heads=4, head_size=32, ffn=256, vocab=160, context=128,
                    rope_base=0.0, norm_eps=1e-5, norm="layer", positions="learned", activation="relu",
                    biases=True)  # fmt: skip


def random_checkpoint(config: DecoderConfig = SHAPE, seed: int = 1) -> Checkpoint:
    """Gaussian weights whose products keep unit size; learned positions and biases where the shape has them."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    tensors = {"embed": draw(config.vocab, config.hidden), "norm": 1 + 0.1 * draw(config.hidden)}
    for i in range(config.layers):
        for name, (n, k) in config.linear_shapes().items():
            tensors[f"layers.{i}.{name}"] = draw(n, k) / k**0.5
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"layers.{i}.{name}"] = 1 + 0.1 * draw(config.hidden)
    if not config.rotates:
        tensors["positions"] = draw(config.context, config.hidden)
    if config.biases:
        biased = [n for n in tensors if n not in ("embed", "positions")]
        tensors |= {f"{n}_bias": 0.5 * draw(tensors[n].shape[0]) for n in biased}
    return Checkpoint(config, tensors, None, "random", "0" * 64).check()


@dataclass
class Machine:
    """Everything from checkpoint to programs of one model on one engine."""

    checkpoint: Checkpoint
    golden: ExactDecoder
    image: Image
    programs: Programs

    def session(self, device: EngineDevice | None = None, seed: int | None = None) -> Session:
        """A new sequence, on a golden device unless another is given."""
        device = device or GoldenDevice(self.image, seed)
        return Session(device, self.programs, self.golden.matrices["embed"].weight, self.golden.positions)

    def batch(self, device: EngineDevice | None = None, seed: int | None = None) -> BatchSession:
        """As many new sequences as the map has."""
        device = device or GoldenDevice(self.image, seed)
        return BatchSession(
            device, self.programs, self.golden.matrices["embed"].weight, self.golden.positions
        )


MakeMachine = Callable[..., Machine]


def make_machine(
    folder: Path,
    model: Checkpoint | DecoderConfig = SHAPE,
    engine: EngineConfig = SMALL,
    weights: str = "w4",
    kv: str = "kv4",
    context: int = 64,
    chunk: int | None = None,
    ring: KVRing | None = None,
    sequences: int = 1,
) -> Machine:
    """Pack and compile a model in `folder`."""
    checkpoint = engine_form(model if isinstance(model, Checkpoint) else random_checkpoint(model))
    memory_map = MemoryMap(checkpoint.config, engine, weights, kv, context, ring, sequences)
    image = pack_checkpoint(folder / "image", memory_map, checkpoint)
    if sequences > 1:
        programs = compile_batch(memory_map, image.norm_exponents)
    else:
        programs = compile_model(memory_map, image.norm_exponents, chunk)
    return Machine(checkpoint, ExactDecoder(checkpoint, weights, kv), image, programs)
