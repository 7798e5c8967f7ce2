"""A random decoder small enough for many forward passes, and SmolLM2 loaded once."""

import os

import pytest
import torch

from golden.config import DecoderConfig
from golden.loaders import Checkpoint, load

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker per core: more threads than that only wait for each other.
    torch.set_num_threads(1)

TINY = DecoderConfig("tiny", layers=2, hidden=64, heads=4, kv_heads=2, head_size=16, ffn=128, vocab=96,
                   context=256, rope_base=10000.0, norm_eps=1e-5)  # fmt: skip


def random_checkpoint(seed: int = 1, config: DecoderConfig = TINY) -> Checkpoint:
    """Gaussian weights whose products keep unit size."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    tensors = {"embed": draw(config.vocab, config.hidden), "norm": 1 + 0.1 * draw(config.hidden)}
    for i in range(config.layers):
        for name, (n, k) in config.linear_shapes().items():
            tensors[f"layers.{i}.{name}"] = draw(n, k) / k**0.5
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"layers.{i}.{name}"] = 1 + 0.1 * draw(config.hidden)
    return Checkpoint(config, tensors, None, "random", "0" * 64).check()


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    return random_checkpoint()


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    return load()
