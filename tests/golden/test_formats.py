"""Weight and KV formats: exact value sets, exact GGUF import, packing inverses, refusals."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden import ops
from golden.formats import import_gguf_block, quantise_weight
from golden.formats.packing import (
    pack_fields,
    pack_kv,
    pack_weight,
    sparse24_codes,
    unpack_fields,
    unpack_kv,
    unpack_weight,
)
from golden.formats.weights import QuantisedWeight, fitting_group, magnitude_mask24, with_group
from golden.spec import KVStrataError
from golden.spec.formats import KV_FORMATS, W2, W2S24, W4, W8, WEIGHT_FORMATS

formats = st.sampled_from(sorted(WEIGHT_FORMATS))


def gaussian(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(formats, st.sampled_from([32, 64, 128]), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_pack_and_unpack_are_inverse_and_bits_are_counted(name, group, rows, groups, seed):
    fmt = WEIGHT_FORMATS[name]
    if fmt.sparse24 and group == 32:
        return
    q = quantise_weight(gaussian(rows, group * groups, seed), with_group(fmt, group))
    image = pack_weight(q)
    back = unpack_weight(image, q.format)
    assert image.size == q.packed_bytes
    assert q.packed_bytes * 8 / (rows * group * groups) == q.format.bits_per_weight
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    assert (q.minimum is None) == (back.minimum is None)
    assert q.minimum is None or torch.equal(q.minimum, back.minimum)
    assert q.kept is None or torch.equal(q.kept, back.kept)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_codes_are_the_formats_exact_value_set(name):
    fmt = WEIGHT_FORMATS[name]
    codes = set(quantise_weight(gaussian(64, 1024), fmt).codes.flatten().tolist())
    expected = {
        "w8": set(range(-127, 128)), "w4": set(range(16)), "w2": set(range(4)), "w2s24": {-3, -1, 0, 1, 3}
    }[name]  # fmt: skip
    assert codes == expected


def test_two_of_every_four_are_kept_and_are_the_largest():
    w = gaussian(16, 256)
    q = quantise_weight(w, W2S24)
    assert (q.kept.view(16, -1, 4).sum(-1) == 2).all()
    assert ((q.codes != 0) == q.kept).all()
    quads, kept = w.abs().view(-1, 4), q.kept.view(-1, 4)
    assert (torch.where(kept, quads, torch.inf).amin(-1) >= torch.where(kept, 0, quads).amax(-1)).all()
    assert magnitude_mask24(torch.ones(1, 4)).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("fmt", [W8, W4, W2])
def test_nearest_code_is_nearest(fmt):
    """No other code of the same group comes closer to any weight."""
    w = gaussian(32, 256).double()
    q = quantise_weight(w, fmt)
    step = q.scale.repeat_interleave(fmt.group, 1)
    error = (q.dequantise() - w).abs()
    for neighbour in (q.codes.double() - 1, q.codes.double() + 1):
        legal = (neighbour >= fmt.code_min) & (neighbour <= fmt.code_max)
        other = (q.dequantise() + (neighbour - q.codes) * step - w).abs()
        assert (error <= other + 1e-9)[legal].all()


def test_error_falls_with_bits():
    w = gaussian(64, 512).double()
    errors = [(quantise_weight(w, f).dequantise() - w).square().mean().item() for f in (W2S24, W2, W4, W8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[2] > 30 * errors[3]


def test_smaller_groups_are_closer():
    w = gaussian(64, 512).double()
    errors = [
        (quantise_weight(w, with_group(W4, g)).dequantise() - w).square().mean().item() for g in (32, 64, 128)
    ]
    assert errors == sorted(errors)


@pytest.mark.parametrize(("kind", "name"), [("Q4_1", "w4"), ("Q8_0", "w8")])
def test_gguf_blocks_are_imported_without_requantising(kind, name):
    """gguf's own quantiser and dequantiser are the oracle; a swapped nibble or order breaks equality."""
    w = gaussian(6, 96, 5).numpy()
    raw = gguf.quants.quantize(w, getattr(gguf.GGMLQuantizationType, kind))
    q = import_gguf_block(raw, kind, W4, W8)
    assert q.format.name == name
    expected = gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, kind))
    assert np.array_equal(q.dequantise().float().numpy(), expected)
    assert torch.equal(unpack_weight(pack_weight(q), q.format).codes, q.codes)


def test_the_real_model_is_held_exactly(smollm2):
    kinds = {value.format.name for value in smollm2.tensors.values() if isinstance(value, QuantisedWeight)}
    assert kinds == {"w4", "w8"}
    assert isinstance(smollm2.tensor("embed"), QuantisedWeight)
    assert sum(isinstance(v, QuantisedWeight) for v in smollm2.tensors.values()) == 211


@given(st.sampled_from([2, 4, 7, 8]), st.integers(1, 4), st.integers(0, 9999))
def test_fields_round_trip(bits, octets, seed):
    fields = np.random.default_rng(seed).integers(0, 1 << bits, (3, 8 * octets))
    packed = pack_fields(fields, bits)
    assert packed.shape == (3, octets * bits)
    assert np.array_equal(unpack_fields(packed, bits), fields)


def test_field_zero_is_in_the_low_bits():
    assert pack_fields(np.array([1, 2, 3, 4]), 4).tolist() == [0x21, 0x43]
    assert pack_fields(np.array([1, 2, 3, 0]), 2).tolist() == [0b00111001]
    assert pack_fields(np.array([0x7F] + [0] * 7), 7).tolist() == [0x7F, 0, 0, 0, 0, 0, 0]


@settings(deadline=None)
@given(st.sampled_from(["kv4", "kv8"]), st.integers(0, 999))
def test_kv_vectors_round_trip(name, seed):
    fmt = KV_FORMATS[name]
    x = ops.to_q16(gaussian(5, 64, seed) * 10)
    kv = ops.quantise_kv(x, fmt.bits)
    image = pack_kv(kv, fmt)
    assert image.shape == (5, fmt.bytes_per_vector(64))
    assert all(torch.equal(a, b) for a, b in zip(unpack_kv(image, fmt), kv))
    error = (ops.dequantise_kv(kv) - ops.from_q16(x)).abs()
    assert (error <= kv.scale[:, None] * 0.51 + 0.02).all()


def good() -> QuantisedWeight:
    return quantise_weight(gaussian(4, 128), W4)


def test_bad_weights_are_named():
    with pytest.raises(
        KVStrataError, match="inner dimension must divide by the group size 32 of w4, got 100"
    ):
        quantise_weight(gaussian(2, 100), W4)
    with pytest.raises(KVStrataError, match="inner dimension must divide by a group of .* got 100"):
        fitting_group(W4, 100)
    with pytest.raises(KVStrataError, match=r"group size of w2s24 must be one of \(64, 128\), got 32"):
        quantise_weight(gaussian(2, 128), with_group(W2S24, 32))
    with pytest.raises(KVStrataError, match="must be a matrix"):
        quantise_weight(torch.ones(4), W4)
    bad = gaussian(2, 64)
    bad[1, 3] = torch.nan
    with pytest.raises(KVStrataError, match="must be finite before it becomes w8, got NaN or infinity"):
        quantise_weight(bad, W8)
    with pytest.raises(KVStrataError, match="row's sum of .weight. must stay below 66052"):
        quantise_weight(torch.full((1, 128), 600.0), W8)
    mask = torch.tensor([[True, True, True, False] * 32])
    with pytest.raises(KVStrataError, match="must keep exactly two of every four weights, got 3"):
        quantise_weight(gaussian(1, 128), W2S24, mask)


def test_bad_codes_and_images_are_named():
    q = good()
    q.codes[0, 0] = 16
    with pytest.raises(KVStrataError, match=r"w4 codes must lie in 0\.\.15, got 0\.\.16"):
        q.check()
    q = good()
    q.scale[1, 1] = torch.inf
    with pytest.raises(KVStrataError, match="a scale of w4 must be finite"):
        q.check()
    q = good()
    q.scale[2, 1] = 0
    q.codes[2, 40] = 3
    with pytest.raises(
        KVStrataError, match="w4 must not be zero where codes are not, got 0 in row 2, group 1"
    ):
        q.check()
    with pytest.raises(
        KVStrataError, match="a weight must not vanish in w8, .* got a greatest .weight. of 1e-09"
    ):
        quantise_weight(torch.full((2, 32), 1e-9), W8)
    image = pack_kv(ops.quantise_kv(ops.to_q16(gaussian(2, 64)), 4), KV_FORMATS["kv4"])
    image[1, -3] = 0x7C
    with pytest.raises(KVStrataError, match="a scale of kv4 must be finite, got NaN or infinity"):
        unpack_kv(image, KV_FORMATS["kv4"])
    with pytest.raises(
        KVStrataError, match=r"image must be codes and 4 bytes behind them, got shape \(2, 4\)"
    ):
        unpack_kv(image[:, -4:], KV_FORMATS["kv4"])
    with pytest.raises(KVStrataError, match=r"must be \[N, K/G, 20\] bytes, got shape \(1, 1, 19\)"):
        unpack_weight(np.zeros((1, 1, 19), np.uint8), W4)
    with pytest.raises(KVStrataError, match="2:4 pattern must be 0 to 5, got 7"):
        sparse24_codes(np.array([7], np.uint8))
    with pytest.raises(KVStrataError, match=r"must fit 4 bits, got 0\.\.16"):
        pack_fields(np.array([0, 16]), 4)
    raw = np.zeros((1, 34), np.uint8)
    raw[0, 5] = 0x80
    with pytest.raises(KVStrataError, match=r"w8 codes must lie in -127\.\.127, got -128\.\.0"):
        import_gguf_block(raw, "Q8_0", W4, W8)
    raw = np.zeros((1, 20), np.uint8)
    raw[0, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    with pytest.raises(KVStrataError, match="a scale of w4 must be finite"):
        import_gguf_block(raw, "Q4_1", W4, W8)


def test_codes_under_a_scale_of_zero_are_imported_as_zero():
    """GGUF writers round a tiny scale to zero and keep the codes; the values stay what they were."""
    for kind, size in (("Q4_1", 20), ("Q8_0", 34)):
        raw = np.full((2, size), 0x11, np.uint8)
        raw[0, :2] = 0
        q = import_gguf_block(raw, kind, W4, W8)
        expected = gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, kind))
        assert np.array_equal(q.dequantise().float().numpy(), expected)
        assert not q.codes[0].any()


def test_zeros_and_constants_have_a_scale_of_zero():
    for fmt in (W8, W4, W2, W2S24):
        zero = quantise_weight(torch.zeros(2, 128), fmt)
        assert not zero.dequantise().any()
        assert unpack_weight(pack_weight(zero), zero.format).check() is not None
    assert (quantise_weight(torch.full((2, 128), 0.5), W4).dequantise() == 0.5).all()


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=4, max_size=4), st.lists(st.integers(0, 3), min_size=8, max_size=8)
)
def test_sparse_fields_decode_by_the_page(patterns, codes):
    fields = np.array(
        [p | codes[2 * i] << 3 | codes[2 * i + 1] << 5 for i, p in enumerate(patterns)], np.uint8
    )
    values, kept = sparse24_codes(fields)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    expected = np.zeros((4, 4), int)
    for i, p in enumerate(patterns):
        for slot, position in enumerate(pairs[p]):
            expected[i, position] = 2 * codes[2 * i + slot] - 3
    assert values.reshape(4, 4).tolist() == expected.tolist()
    assert (kept == (values != 0)).all()
