"""Memory images: every bit where the spec says, round trips, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden.exact_decoder import engine_weight
from golden.formats.weights import quantise_weight, with_group
from golden.spec import KVStrataError
from golden.spec.engine import (
    SMALL,
    SPARSE_STEP,
    STEP,
    TINY,
    U280,
    W8_OFFSET,
    WORD_BITS,
    EngineConfig,
    crumb,
    weight_stream,
)
from golden.spec.formats import WEIGHT_FORMATS
from sw_stack.pack.image import Image, pack_checkpoint, stored_fields
from sw_stack.pack.memory_map import MemoryMap
from sw_stack.pack.stream import operands, pack_matrix, unpack_matrix
from tests.sw_stack.machines import SHAPE, MakeMachine, random_checkpoint

FORMATS = [("w8", 32), ("w4", 32), ("w4", 64), ("w2", 64), ("w2", 128), ("w2s24", 128), ("w2s24", 64)]
CONFIGS = [TINY, SMALL, U280]


def quantised(name: str, group: int, rows: int, inner: int, seed: int):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inner, generator=rng)
    return quantise_weight(weight, with_group(WEIGHT_FORMATS[name], group))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize(("name", "group"), FORMATS)
def test_a_matrix_survives_the_image(config: EngineConfig, name: str, group: int) -> None:
    weight = quantised(name, group, 2 * config.lanes + 3, 384, seed=3)
    stream = weight_stream(name, group)
    words = pack_matrix(config, stream, stored_fields(weight))
    back = unpack_matrix(config, stream, words, 384 // stream.codes.step)
    n = weight.shape[0]
    np.testing.assert_array_equal(operands(stream, back)[:n], weight.codes.numpy())
    np.testing.assert_array_equal(back.scale[:n].view(np.float16), weight.scale.numpy().astype(np.float16))
    if weight.minimum is not None:
        np.testing.assert_array_equal(back.minimum[:n].view(np.float16), weight.minimum.numpy())
    assert (operands(stream, back)[n:] == 0).all() or stream.codes.step == SPARSE_STEP
    assert (back.scale[n:] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    config=st.sampled_from(CONFIGS), form=st.sampled_from(FORMATS), row=st.integers(0, 300), data=st.data()
)
def test_every_code_bit_is_where_the_spec_puts_it(config: EngineConfig, form, row: int, data) -> None:
    """Element by element against `crumb`: step, lane, plane, and words between scale and pattern words."""
    name, group = form
    stream = weight_stream(name, group)
    weight = quantised(name, group, row + 1, 256, seed=row)
    fields = stored_fields(weight)
    position = data.draw(st.integers(0, fields.codes.shape[1] - 1))
    steps = fields.codes.shape[1] // STEP
    words = pack_matrix(config, stream, fields)
    per_block = stream.words_per_block(config, steps)
    block, lane = divmod(row, config.lanes)
    channel = lane // config.lanes_per_channel
    code_words = [w for w, kind in enumerate(sequence(config, stream, steps)) if kind == "code"]
    value = 0
    for plane in range(stream.codes.bits // 2):
        bit = crumb(config, stream.codes.bits, position // STEP, lane, position % STEP, plane)
        word = words[channel, block * per_block + code_words[bit // WORD_BITS]]
        value |= (int(word[bit % WORD_BITS // 8]) >> bit % 8 & 3) << (2 * plane)
    stored = int(fields.codes[row, position])
    assert value == stored
    if stream.offset:
        assert stored == int(weight.codes[row, position]) + W8_OFFSET


def sequence(config: EngineConfig, stream, steps: int) -> list[str]:
    """The three rules of StreamFormat's docstring, literally."""
    kinds: list[str] = []
    for i in range(steps):
        if stream.scaled and i % stream.scale_period(config) == 0:
            kinds.append("scale")
        if stream.codes.name == "S24" and i % stream.pattern_period(config) == 0:
            kinds += ["pattern"] * 3
        if i % stream.steps_per_word(config) == 0:
            kinds += ["code"] * stream.words_per_step(config)
    assert len(kinds) == stream.words_per_block(config, steps)
    return kinds


def test_an_image_holds_every_tensor_of_the_model(machine: MakeMachine) -> None:
    made = machine(weights="w4")
    image, memory_map = made.image, made.image.map
    channels = np.stack([image.channel(c) for c in range(SMALL.channels)])
    for matrix in memory_map.matrices.values():
        words = channels[:, matrix.base : matrix.base + matrix.words]
        fields = unpack_matrix(SMALL, matrix.stream, words, matrix.inner // matrix.stream.codes.step)
        name = made.checkpoint.head_name if matrix.name == "head" else matrix.name
        codes = engine_weight(made.checkpoint, name, matrix.format).codes.numpy()
        np.testing.assert_array_equal(operands(matrix.stream, fields)[: matrix.rows], codes)
    assert (channels[:, memory_map.weight_words :] == 0).all()


def test_regions_do_not_overlap() -> None:
    for engine in CONFIGS:
        memory_map = MemoryMap(SHAPE, engine, "w4", "kv8", 128)
        regions = sorted(memory_map.regions.values(), key=lambda r: r.base)
        assert all(a.end <= b.base for a, b in zip(regions, regions[1:]))
        ends = [(m.base, m.base + m.words) for m in memory_map.matrices.values()]
        for layer in range(SHAPE.layers):
            ends += [
                (
                    memory_map.key_base(layer, h),
                    memory_map.key_base(layer, h) + memory_map.kv_layout.key_words,
                )
                for h in range(SHAPE.kv_heads)
            ]
            ends += [
                (b := memory_map.value_base(layer, g), b + memory_map.kv_layout.value_words)
                for g in range(memory_map.value_groups)
            ]
        ends.sort()
        assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:]))
        assert ends[-1][1] == memory_map.channel_words


# --- refusals ------------------------------------------------------------------------------------------
def test_a_truncated_image_is_refused(machine: MakeMachine) -> None:
    image = machine().image
    path = image.directory / "channel03.bin"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(KVStrataError, match=r"channel03.bin of an image for this map has \d+ bytes; got \d+"):
        Image.open(image.directory)


def test_a_changed_byte_is_refused(machine: MakeMachine) -> None:
    image = machine().image
    path = image.directory / "channel00.bin"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(KVStrataError, match="channel00.bin must hash to what manifest.json says"):
        Image.open(image.directory)


def test_an_image_for_another_configuration_is_refused(machine: MakeMachine) -> None:
    made = machine()
    with pytest.raises(KVStrataError, match="an image for weights w8 is needed; .* was packed for w4"):
        made.image.require(dataclasses.replace(made.image.map, weights="w8"))
    with pytest.raises(KVStrataError, match="an image for engine .*tiny.* is needed"):
        made.image.require(dataclasses.replace(made.image.map, engine=TINY))


def test_an_image_of_another_spec_version_is_refused(machine: MakeMachine) -> None:
    manifest = machine().image.directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"spec_version": "1"', '"spec_version": "0"'))
    with pytest.raises(KVStrataError, match="an image is of spec version '1'; got '0': pack it again"):
        Image.open(manifest.parent)


def test_no_directory_is_left_when_packing_fails(tmp_path: Path) -> None:
    checkpoint = random_checkpoint()
    memory_map = MemoryMap(dataclasses.replace(SHAPE, hidden=256), SMALL, "w4", "kv4", 64)
    with pytest.raises(
        KVStrataError, match="layers.0.k must be \\d+ x 256 in w4 groups of 32; got \\d+ x 128"
    ):
        pack_checkpoint(tmp_path / "image", memory_map, checkpoint)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_is_refused() -> None:
    big = dataclasses.replace(SHAPE, layers=32, hidden=4096, heads=32, kv_heads=32, head_size=128, ffn=11008,
                              vocab=32000, context=1 << 17)  # fmt: skip
    with pytest.raises(
        KVStrataError, match="a channel holds 268435456 bytes; weights and a KV cache of 131072"
    ):
        MemoryMap(big, U280, "w4", "kv4", 1 << 17)
    with pytest.raises(KVStrataError, match="the context must be 1 to the model's 128 tokens; got 129"):
        MemoryMap(SHAPE, SMALL, "w4", "kv4", 129)
