"""A matrix product of real operands on the Verilated matrix unit, with its cycles and its bandwidth bound."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from golden.spec import KVStrataError
from golden.spec.engine import (
    STEP,
    W8_OFFSET,
    EngineConfig,
    StreamFormat,
    beats_bound,
    weight_stream,
)
from golden.spec.formats import ACC_PRESHIFT, SPARSE24_PATTERNS, WeightFormat
from sw_stack.pack.stream import Fields, pack_matrix, steps_of, stream_fields
from sw_stack.rtl.core import CoreJob, CoreResult, group_sides, run_core


@dataclass(frozen=True)
class MatvecResult:
    """Outputs int32 [M, N] in Q16 and the measured run."""

    outputs: np.ndarray
    cycles: int
    """From the operation's acceptance to its last output in the vector buffer."""
    beats: int
    """Words that each channel delivered."""
    bound_cycles: int
    """Cycles that the words or the multipliers need, whichever is more."""
    beat_fraction: float
    core: CoreResult


def weight_fields(
    codes: np.ndarray, scales: np.ndarray, minima: np.ndarray | None, fmt: WeightFormat
) -> Fields:
    """Stored fields of codes [N, K] (0 where a 2:4 weight is dropped) with scale and minimum [N, groups]."""
    scale = scales.astype(np.float16).view(np.uint16)
    minimum = None if minima is None else minima.astype(np.float16).view(np.uint16)
    if not fmt.sparse24:
        return Fields(
            (codes.astype(np.int16) + (W8_OFFSET if fmt.bits == 8 else 0)).astype(np.uint8), scale, minimum
        )
    quads = codes.reshape(len(codes), -1, 4)
    mask = quads != 0
    if (mask.sum(-1) != 2).any():
        raise KVStrataError("a 2:4 weight keeps exactly two of every four, and this one does not")
    pattern_of = np.zeros(16, np.uint8)
    for index, (a, b) in enumerate(SPARSE24_PATTERNS):
        pattern_of[1 << a | 1 << b] = index
    pattern = pattern_of[(mask << np.arange(4)).sum(-1)]
    kept = np.take_along_axis(quads, np.array(SPARSE24_PATTERNS)[pattern], -1)
    return Fields(((kept + 3) // 2).astype(np.uint8).reshape(len(codes), -1), scale, minimum, pattern)


def random_codes(random: np.random.Generator, fmt: WeightFormat, rows: int, inner: int) -> np.ndarray:
    """Legal codes int8 [rows, inner] of a format: every value alike, two of every four kept where it is 2:4."""
    if not fmt.sparse24:
        return random.integers(fmt.code_min, fmt.code_max + 1, (rows, inner)).astype(np.int8)
    kept = np.argsort(random.random((rows, inner // 4, 4)), -1) < 2
    return (kept * random.choice([-3, -1, 1, 3], kept.shape)).reshape(rows, inner).astype(np.int8)


def matrix_operation(
    config: EngineConfig, stream: StreamFormat, rows: int, inner: int, vectors: int
) -> dict[str, int]:
    """MATRIX fields of a weight product: activations from A8 word 0, outputs from VB word 0, scales from entry 0."""
    return {
        **stream_fields(stream),
        "blocks": -(-rows // config.lanes),
        "steps": steps_of(stream, inner),
        "vectors": vectors,
        "stride": act_words(inner),
        "dst_stride": output_words(config, rows),
    }


def act_words(inner: int) -> int:
    """A8 words of an activation vector."""
    return -(-inner // (2 * STEP))


def output_words(config: EngineConfig, rows: int) -> int:
    """VB words of an output vector, whole row blocks."""
    return -(-rows // config.lanes) * config.lanes // config.vector_lanes


def activation_groups(config: EngineConfig, codes: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """A8 writes of vectors int8 [M, K], one after the other from word 0."""
    vectors, inner = codes.shape
    words = act_words(inner)
    if vectors * words > config.act_words:
        raise KVStrataError(
            f"{vectors} vectors of {inner} activations need {vectors * words} words of the activation buffer, "
            f"which has {config.act_words}"
        )
    padded = np.zeros((vectors, words * 2 * STEP), np.int8)
    padded[:, :inner] = codes
    groups = padded.reshape(-1, STEP)
    return [(0, groups, group_sides(groups))]


def run_matvec(
    codes: np.ndarray,
    scales: np.ndarray,
    minima: np.ndarray | None,
    a_codes: np.ndarray,
    a_scale: tuple[np.ndarray | int, np.ndarray | int],
    fmt: WeightFormat,
    config: EngineConfig,
    *,
    gap: int = 0,
    seed: int = 1,
) -> MatvecResult:
    """`y = W a` on the Verilated matrix unit, docs/formats.md section 4.

    codes: int8 [N, K] multiplier operands (2:4: 0 where dropped); scales, minima: fp16 values [N, K / group];
    a_codes: int8 [K] or [M, K], M at most `config.tokens`; a_scale: mantissa and exponent, scalars or [M].
    `gap`/256 is the chance that a channel withholds its next word another cycle: never changes the outputs.

    Raises KVStrataError for shapes that do not divide or do not fit the engine's buffers.
    """
    a_codes = np.atleast_2d(a_codes)
    vectors, inner = a_codes.shape
    rows = len(codes)
    if codes.shape[1] != inner:
        raise KVStrataError(f"weights of width {codes.shape[1]} need as many activations, not {inner}")
    if not 1 <= vectors <= config.tokens:
        raise KVStrataError(
            f"the {config.name} engine passes 1 to {config.tokens} vectors at once, not {vectors}"
        )
    stream = weight_stream(fmt.name, inner // scales.shape[1])
    mantissa, exponent = (np.broadcast_to(np.asarray(part), vectors) for part in a_scale)
    words = output_words(config, rows)
    job = CoreJob(
        replace(config),
        pack_matrix(config, stream, weight_fields(codes, scales, minima, fmt)),
        [matrix_operation(config, stream, rows, inner, vectors)],
        np.zeros((vectors * words, config.vector_lanes), np.int32),
        activation_groups(config, a_codes),
        {v: (ACC_PRESHIFT, int(mantissa[v]), -int(exponent[v])) for v in range(vectors)},
        gap=gap,
        seed=seed,
    )
    run = run_core(job)
    if run.error:
        raise KVStrataError(f"the matrix unit reported error {run.error}")
    outputs = run.vector_buffer.reshape(vectors, -1)[:, :rows]
    bound = beats_bound(config, stream, rows, steps_of(stream, inner), vectors)
    return MatvecResult(outputs, run.cycles, run.words, bound, run.beat_fraction, run)
