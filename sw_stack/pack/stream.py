"""A matrix as the engine's channels stream it, and back (docs/engine.md, section 2).

Letters: B row blocks, C channels, l lanes per channel, s steps, P bit planes of a code. Everything is array
operations over whole matrices; `golden.spec.engine.crumb` and `KVLayout` are the element-wise truth that tests
hold it against.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from golden.spec import KVStrataError
from golden.spec.engine import STEP, W8_OFFSET, WORD_BYTES, Codes, EngineConfig, StreamFormat
from golden.spec.formats import SPARSE24_PATTERNS

QUADS = STEP // 2
"""Quads of four original weights in a 2:4 step."""


@dataclass(frozen=True)
class Fields:
    """What a matrix stores: unsigned codes uint8 [N, K'] (K' = K, or K / 2 kept ones for 2:4), fp16 bits uint16
    [N, groups] of scale and minimum, pattern uint8 [N, K / 4] for 2:4."""

    codes: np.ndarray
    scale: np.ndarray | None = None
    minimum: np.ndarray | None = None
    pattern: np.ndarray | None = None


def matrix_words(config: EngineConfig, stream: StreamFormat, rows: int, inner: int) -> int:
    """Words per channel of an [rows, inner] matrix."""
    return -(-rows // config.lanes) * stream.words_per_block(config, steps_of(stream, inner))


def steps_of(stream: StreamFormat, inner: int) -> int:
    """Steps of a row; KVStrataError when the width does not divide."""
    if inner % stream.codes.step:
        raise KVStrataError(
            f"an inner width must be a multiple of {stream.codes.step} for this stream; got {inner}"
        )
    return inner // stream.codes.step


@cache
def word_order(
    config: EngineConfig, stream: StreamFormat, steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions in a row block's word sequence of its scale words, pattern words and code words."""
    scales, patterns, codes = [], [], []
    at = 0
    for step in range(steps):
        if stream.scaled and step % stream.scale_period(config) == 0:
            scales.append(at)
            at += 1
        if stream.codes is Codes.S24 and step % stream.pattern_period(config) == 0:
            patterns += [at, at + 1, at + 2]
            at += 3
        if step % stream.steps_per_word(config) == 0:
            count = stream.words_per_step(config)
            codes += list(range(at, at + count))
            at += count
    return np.array(scales, int), np.array(patterns, int), np.array(codes, int)


def _blocked(config: EngineConfig, values: np.ndarray, fill: int) -> np.ndarray:
    """[N, ...] padded to whole row blocks: [B, C, l, ...]."""
    blocks = -(-len(values) // config.lanes)
    shape = (blocks * config.lanes, *values.shape[1:])
    if shape[0] != len(values):
        padded = np.full(shape, fill, values.dtype)
        padded[: len(values)] = values
        values = padded
    return values.reshape(blocks, config.channels, config.lanes_per_channel, *values.shape[1:])


def pack_matrix(config: EngineConfig, stream: StreamFormat, fields: Fields) -> np.ndarray:
    """uint8 [C, words, 64]: each channel's words of the whole matrix, row block after row block."""
    steps = fields.codes.shape[1] // STEP
    fill = W8_OFFSET if stream.offset else 0
    blocks = -(-len(fields.codes) // config.lanes)
    words = np.zeros((config.channels, blocks, stream.words_per_block(config, steps), WORD_BYTES), np.uint8)
    scale_at, pattern_at, code_at = word_order(config, stream, steps)
    words[:, :, code_at] = _code_words(config, stream, _blocked(config, fields.codes, fill), len(code_at))
    if stream.scaled:
        words[:, :, scale_at] = _scale_words(config, stream, fields, len(scale_at))
    if stream.codes is Codes.S24:
        assert fields.pattern is not None
        words[:, :, pattern_at] = _pattern_words(config, _blocked(config, fields.pattern, 0), len(pattern_at))
    return words.reshape(config.channels, -1, WORD_BYTES)


def _code_words(config: EngineConfig, stream: StreamFormat, codes: np.ndarray, count: int) -> np.ndarray:
    """[C, B, count, 64] of codes [B, C, l, K']: crumbs ordered step, plane, lane, position."""
    blocks, channels, lanes, width = codes.shape
    steps, planes = width // STEP, stream.codes.bits // 2
    split = codes.reshape(blocks, channels, lanes, steps, STEP // 4, 4)
    out = np.zeros((channels, blocks, count * WORD_BYTES), np.uint8)
    view = out[..., : steps * planes * lanes * STEP // 4]
    view = view.reshape(channels, blocks, steps, planes, lanes, STEP // 4)
    for plane in range(planes):
        crumbs = (split >> (2 * plane)) & 3
        packed = crumbs[..., 0] | crumbs[..., 1] << 2 | crumbs[..., 2] << 4 | crumbs[..., 3] << 6
        view[:, :, :, plane] = packed.transpose(1, 0, 3, 2, 4)
    return out.reshape(channels, blocks, count, WORD_BYTES)


def _scale_words(config: EngineConfig, stream: StreamFormat, fields: Fields, count: int) -> np.ndarray:
    """[C, B, count, 64] of fp16 pairs or scales, ordered group, lane."""
    assert fields.scale is not None
    parts = [fields.scale] + ([fields.minimum] if fields.minimum is not None else [])
    records = np.stack(parts, -1)  # [N, groups, 1 or 2]
    per_word = stream.scale_groups_per_word(config)
    padded = np.zeros((len(records), count * per_word, len(parts)), np.uint16)
    padded[:, : records.shape[1]] = records
    blocked = _blocked(config, padded, 0)  # [B, C, l, groups, parts]
    ordered = np.ascontiguousarray(blocked.transpose(1, 0, 3, 2, 4))
    return ordered.view(np.uint8).reshape(config.channels, len(blocked), count, WORD_BYTES)


def _pattern_words(config: EngineConfig, pattern: np.ndarray, count: int) -> np.ndarray:
    """[C, B, count, 64] of patterns [B, C, l, K / 4]: three bit planes per period, ordered step, lane, quad."""
    blocks, channels, lanes, quads = pattern.shape
    steps, periods = quads // QUADS, count // 3
    padded = np.zeros(
        (blocks, channels, lanes, periods * (WORD_BYTES * 8 // (lanes * QUADS)), QUADS), np.uint8
    )
    padded[:, :, :, :steps] = pattern.reshape(blocks, channels, lanes, steps, QUADS)
    flat = padded.transpose(1, 0, 3, 2, 4).reshape(channels, blocks, periods, WORD_BYTES * 8)
    planes = np.stack([(flat >> j) & 1 for j in range(3)], 3)
    return np.packbits(planes, axis=-1, bitorder="little").reshape(channels, blocks, count, WORD_BYTES)


def unpack_matrix(config: EngineConfig, stream: StreamFormat, words: np.ndarray, steps: int) -> Fields:
    """Inverse of `pack_matrix` for whole row blocks: words uint8 [C, n, 64] -> fields of B * lanes rows.

    Group counts are those of whole scale words' worth cut to `steps`.
    """
    per_block = stream.words_per_block(config, steps)
    blocks = words.shape[1] // per_block
    by_block = words.reshape(config.channels, blocks, per_block, WORD_BYTES)
    scale_at, pattern_at, code_at = word_order(config, stream, steps)
    lanes, planes = config.lanes_per_channel, stream.codes.bits // 2
    raw = np.ascontiguousarray(by_block[:, :, code_at]).reshape(config.channels, blocks, -1)
    raw = raw[..., : steps * planes * lanes * STEP // 4]
    raw = raw.reshape(config.channels, blocks, steps, planes, lanes, STEP // 4)
    crumbs = (raw[..., None] >> (2 * np.arange(4, dtype=np.uint8))) & 3
    codes = np.zeros((config.channels, blocks, steps, lanes, STEP // 4, 4), np.uint8)
    for plane in range(planes):
        codes |= crumbs[:, :, :, plane] << (2 * plane)
    rows = blocks * config.lanes
    codes = codes.transpose(1, 0, 3, 2, 4, 5).reshape(rows, steps * STEP)
    scale = minimum = pattern = None
    if stream.scaled:
        groups = -(-steps // stream.group_steps)
        parts = 2 if stream.minimum else 1
        records = np.ascontiguousarray(by_block[:, :, scale_at]).view(np.uint16)
        records = records.reshape(config.channels, blocks, -1, lanes, parts).transpose(1, 0, 3, 2, 4)
        records = records.reshape(rows, -1, parts)[:, :groups]
        scale = records[..., 0]
        minimum = records[..., 1] if stream.minimum else None
    if stream.codes is Codes.S24:
        bits = np.unpackbits(by_block[:, :, pattern_at], axis=-1, bitorder="little")
        bits = bits.reshape(config.channels, blocks, -1, 3, WORD_BYTES * 8)
        flat = bits[..., 0, :] | bits[..., 1, :] << 1 | bits[..., 2, :] << 2
        flat = flat.reshape(config.channels, blocks, -1, lanes, QUADS)[:, :, :steps]
        pattern = flat.transpose(1, 0, 3, 2, 4).reshape(rows, steps * QUADS)
    return Fields(codes, scale, minimum, pattern)


_POSITIONS = np.array(SPARSE24_PATTERNS)


def operands(stream: StreamFormat, fields: Fields) -> np.ndarray:
    """Multiplier operands int16 [N, K] of stored fields; KVStrataError for an illegal 2:4 pattern."""
    codes = fields.codes.astype(np.int16)
    if stream.codes is not Codes.S24:
        return codes - W8_OFFSET if stream.offset else codes
    assert fields.pattern is not None
    if (fields.pattern >= len(_POSITIONS)).any():
        raise KVStrataError(f"a 2:4 pattern must be 0 to 5; got {int(fields.pattern.max())}")
    dense = np.zeros((*fields.pattern.shape, 4), np.int16)
    kept = (2 * codes - 3).reshape(*fields.pattern.shape, 2)
    np.put_along_axis(dense, _POSITIONS[fields.pattern], kept, -1)
    return dense.reshape(len(codes), -1)


def stream_fields(stream: StreamFormat) -> dict[str, int]:
    """Fields of a MATRIX instruction that say how its words are read."""
    return {
        "codes": int(stream.codes),
        "scaled": int(stream.scaled),
        "minimum": int(stream.minimum),
        "offset": int(stream.offset),
        "group_steps": stream.group_steps,
    }
