"""The vector files of every block: stimulus and expected output from seeds, corners and a real run.

`python -m golden.vector_sets DIRECTORY` writes `<operator>-<origin>.npz` for every operator below (golden.vectors has
the file format). Operands of the engine are integers as docs/formats.md defines them, binary16 scales their int24
integers; those of the in-storage unit are described in golden.storage.vector_sets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golden import ops
from golden.attention import attend
from golden.exact_decoder import ExactDecoder
from golden.formats.weights import fitting_group, quantise_weight
from golden.lambda_window import LambdaWindow
from golden.loaders import load
from golden.loaders.checkpoint import Checkpoint
from golden.spec.formats import WEIGHT_FORMATS
from golden.storage import vector_sets as storage
from golden.vectors import flatten, write_vectors

REGENERATE = "python -m golden.vector_sets"
CORNERS = (
    0,
    1,
    -1,
    2,
    -2,
    127,
    -128,
    2**15 - 1,
    2**15,
    -(2**15),
    2**16,
    -(2**16),
    2**25 - 1,
    -(2**25),
    2**31 - 1,
    -(2**31),
)
ROWS, WIDTH, HEAD = 16, 128, 64
REAL_LAYER = 3
REAL_PROMPT = "The KV cache grows with every token, so the question is where to keep it."

Operands = dict[str, Any]


def seeded(seed: int) -> Tensor:
    """q16 vectors [ROWS, WIDTH] of sizes from one unit to saturation."""
    rng = np.random.default_rng(seed)
    sizes = 2.0 ** rng.uniform(0, 31, (ROWS, 1))
    return ops.sat(torch.from_numpy((rng.standard_normal((ROWS, WIDTH)) * sizes).round()).long(), 32)


def corners() -> Tensor:
    """q16 vectors [ROWS, WIDTH]: each corner alone, all alike, and every pair of neighbours."""
    rows = []
    for i, value in enumerate(CORNERS):
        row = torch.full((WIDTH,), value if i % 2 else 0)
        row[i % WIDTH] = value
        row[-1] = CORNERS[(i + 1) % len(CORNERS)]
        rows.append(row)
    return torch.stack(rows)


def operators(x: Tensor) -> Iterator[tuple[str, Operands]]:
    """Every operator on vectors x [ROWS, WIDTH]."""
    other = x.flip(0).roll(1, 1)
    a8 = ops.quantise_a8(x)
    yield "a8", {"x": x, "y": a8}
    norm = ops.prepare_norm(torch.linspace(0.25, 4, WIDTH), 1e-5)
    yield "rmsnorm", {"x": x, "weight": norm, "y": ops.rmsnorm(x, norm)}
    cos, sin = ops.rope_table(torch.arange(0, 512 * ROWS, 512), WIDTH, 1e5)
    yield "rope", {"x": x, "cos": cos, "sin": sin, "y": ops.rope(x, cos, sin)}
    for bits in (4, 8):
        yield f"kv{bits}", {"x": x, "y": ops.quantise_kv(x, bits)}
    yield "exp2", {"x": x.abs(), "y": ops.exp2_neg(x.abs())}
    yield "gate", {"gate": x, "up": other, "y": ops.gate_product(x, other)}
    yield "residual", {"x": x, "y": other, "sum": ops.residual(x, other)}
    yield from products(a8)
    yield from heads(x)


def products(a8: ops.A8) -> Iterator[tuple[str, Operands]]:
    """A matrix product of each weight format."""
    matrix = torch.from_numpy(np.random.default_rng(9).standard_normal((32, WIDTH)))
    for name, fmt in WEIGHT_FORMATS.items():
        weight = quantise_weight(matrix, fitting_group(fmt, WIDTH))
        acc = ops.accumulate(a8.codes, weight.integers())
        y = ops.scale_accumulator(acc, a8.mantissa, a8.exponent)
        yield f"product-{name}", {"a8": a8, "weight": weight, "acc": acc, "y": y}


def heads(x: Tensor) -> Iterator[tuple[str, Operands]]:
    """One KV head with two query heads over 48 slots, some of them dead."""
    q = x[:6].view(2, 3, WIDTH)[..., :HEAD] >> 6
    tokens = x.repeat(3, 1)
    live = torch.arange(48)[None, :] < torch.tensor([[1], [32], [45]])
    for bits in (4, 8):
        k, v = (
            ops.quantise_kv(t[None, :, part] >> 6, bits)
            for t, part in ((tokens, slice(0, HEAD)), (tokens, slice(HEAD, None)))
        )
        yield f"attention-kv{bits}", {"q": q, "k": k, "v": v, "live": live, "y": attend(q, k, v, live)}


def real(checkpoint: Checkpoint, layer: int = REAL_LAYER) -> Iterator[tuple[str, Operands]]:
    """Operands of one layer of a real run: the last decode step, dense and with a Lambda window."""
    assert checkpoint.tokenizer is not None
    ids = checkpoint.tokenizer.encode(REAL_PROMPT)
    decoder = ExactDecoder(checkpoint)
    for window, prefix in ((None, ""), (LambdaWindow(2, 8), "lambda-")):
        decoder.window, decoder.probe = window, None
        cache = decoder.new_cache()
        decoder.forward(ids[:-1], cache, last_only=True)
        seen: dict[str, Operands] = {}

        def keep(at: int, name: str, operands: Operands, seen: dict[str, Operands] = seen) -> None:
            if at == layer:
                seen[name] = operands

        decoder.probe = keep
        decoder.forward(ids[-1:], cache, last_only=True)
        wanted = seen if window is None else {"attention": seen["attention"]}
        if window is None:
            yield from storage.operators(*(x.numpy() for x in first_head(seen["attention"])))
        for name, operands in wanted.items():
            kept = {k: v for k, v in operands.items() if not isinstance(v, LambdaWindow)}
            yield prefix + name.replace(".", "-"), kept


def first_head(operands: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The first KV head's queries, keys and values of an attention step as the fp16 cache on flash holds them."""
    group = operands["q"].shape[0] // operands["k"].codes.shape[0]
    q, k, v = ops.from_q16(operands["q"][:group, -1]), *(ops.dequantise_kv(operands[x])[0] for x in "kv")
    return q.half(), k.half(), v.half()


def write_all(directory: Path, checkpoint: Checkpoint | None, seeds: int = 2) -> list[Path]:
    """Write every file; the real run is left out without a checkpoint."""
    origins = {"corners": (corners(), storage.corners())}
    origins |= {f"seed{seed}": (seeded(seed), storage.seeded(seed)) for seed in range(seeds)}
    sources: list[tuple[str, Iterator[tuple[str, Operands]], str]] = [
        (origin, chain(operators(vectors), storage.operators(*head)), "")
        for origin, (vectors, head) in origins.items()
    ]
    if checkpoint is not None:
        sources.append(("real", real(checkpoint), checkpoint.sha256))
    paths = []
    for origin, items, sha256 in sources:
        for name, operands in items:
            path = directory / f"{name}-{origin}.npz"
            paths.append(
                write_vectors(path, flatten(operands), f"golden.vector_sets {origin}", REGENERATE, sha256)
            )
    return paths


def main() -> None:
    """Write all files into the directory of the first argument (default build/vectors)."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "build/vectors")
    written = write_all(directory, load())
    sys.stdout.write(f"{len(written)} files in {directory}\n")


if __name__ == "__main__":
    main()
