"""The matrix unit under Verilator against plain integers: every format, mode, stall pattern, and its closed form."""

import numpy as np
import pytest

from golden.spec import KVStrataError
from golden.spec.engine import TINY, Codes, EngineConfig, StreamFormat, value_stream, weight_stream
from golden.spec.formats import SPARSE24_PATTERNS, WEIGHT_FORMATS
from hw.engine import matrix
from hw.engine.lane import Lane, Multipliers
from hw.timing import Product, matrix_cycles
from sw_stack.pack.stream import Fields, pack_matrix
from sw_stack.rtl.core import CoreJob, core_program, run_core
from sw_stack.rtl.matvec import act_words, output_words, run_matvec

pytestmark = pytest.mark.rtl

GROUPS = {"w8": 32, "w4": 32, "w2": 64, "w2s24": 128}


def random_codes(rng, name, rows, inner):
    fmt = WEIGHT_FORMATS[name]
    if not fmt.sparse24:
        return rng.integers(fmt.code_min, fmt.code_max + 1, (rows, inner))
    patterns = np.array(SPARSE24_PATTERNS)[rng.integers(0, 6, (rows, inner // 4))]
    mask = np.zeros((rows, inner // 4, 4), bool)
    np.put_along_axis(mask, patterns, True, -1)
    return (rng.choice([-3, -1, 1, 3], mask.shape) * mask).reshape(rows, inner)


def random_halves(rng, shape, spread):
    return (rng.standard_normal(shape) * 10 ** rng.uniform(-spread, 0, shape)).astype(np.float16)


def int24(halves):
    return (halves.astype(np.float64) * 2**24).astype(np.int64)


def rounded(value, shift):
    return (value + (1 << (shift - 1))) >> shift if shift else value


def saturated(value):
    return max(-(2**31), min(2**31 - 1, value))


def reference(codes, scales, minima, acts, mantissa, exponent):
    """docs/formats.md section 4, number by number."""
    group = codes.shape[1] // scales.shape[1]
    weights = codes.astype(np.int64) * np.repeat(int24(scales), group, 1)
    if minima is not None:
        weights = weights + np.repeat(int24(minima), group, 1)
    acc = acts.astype(np.int64) @ weights.T
    return np.array(
        [
            [saturated(rounded(rounded(int(a), 8) * int(m), -int(e))) for a in row]
            for row, m, e in zip(acc, mantissa, exponent)
        ]
    )


def operands(rng, name, rows, inner, vectors, group):
    fmt = WEIGHT_FORMATS[name]
    return {
        "codes": random_codes(rng, name, rows, inner),
        "scales": random_halves(rng, (rows, inner // group), 5),
        "minima": random_halves(rng, (rows, inner // group), 3) if fmt.asymmetric else None,
        "acts": rng.integers(-127, 128, (vectors, inner)),
        "mantissa": rng.integers(32768, 65536, vectors),
        "exponent": -rng.integers(6, 38, vectors),
    }


def run(name, o, **options):
    scale = (o["mantissa"], o["exponent"])
    return run_matvec(
        o["codes"], o["scales"], o["minima"], o["acts"], scale, WEIGHT_FORMATS[name], TINY, **options
    )


class DeviceLane(Lane):
    """A lane as it is synthesised, not as it is simulated."""

    def __init__(self, vectors):
        super().__init__(vectors, Multipliers.SCALE_IN_DSP)


@pytest.fixture(
    params=[Lane, pytest.param(DeviceLane, marks=pytest.mark.slow)],
    ids=["simulated lanes", "lanes of the device"],
)
def lanes(request, monkeypatch):
    """Both forms of a lane; programs are built anew for each."""
    core_program.cache_clear()
    monkeypatch.setattr(matrix, "Lane", request.param)
    yield
    core_program.cache_clear()


@pytest.mark.parametrize("gap", [0, 90, 230])
@pytest.mark.parametrize("name", list(WEIGHT_FORMATS))
def test_products_are_exact_whatever_the_channels_do(name, gap):
    rng = np.random.default_rng(gap)
    for rows, inner, vectors in ((13, 128, 1), (40, 640, 3), (8, 256, 16)):
        group = GROUPS[name] if inner % GROUPS[name] == 0 else 64
        o = operands(rng, name, rows, inner, vectors, group)
        result = run(name, o, gap=gap, seed=rows)
        assert np.array_equal(result.outputs, reference(**o)), (name, rows, inner, vectors)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize(("name", "group"), [("w8", 128), ("w4", 64), ("w4", 128), ("w2", 32), ("w2s24", 64)])
def test_other_group_sizes(name, group):
    o = operands(np.random.default_rng(group), name, 24, 384, 2, group)
    assert np.array_equal(run(name, o).outputs, reference(**o))


def test_the_largest_accumulators_saturate_like_the_format():
    o = operands(np.random.default_rng(4), "w8", 16, 256, 2, 32)
    o["codes"][:], o["acts"][:] = 127, -127
    o["scales"][:] = np.float16(2.0)
    o["exponent"][:] = -6
    result = run("w8", o).outputs
    assert np.array_equal(result, reference(**o))
    assert (result == -(2**31)).all()


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("bits", [4, 8])
def test_value_products_rescale_tile_by_tile_for_several_heads(bits):
    """Rows are head elements; each vector has its own codes, shift, decay and addend per tile."""
    rng = np.random.default_rng(bits)
    rows, tiles, vectors = 16, 5, 3
    codes = rng.integers(0, 1 << bits, (rows, tiles * 32))
    p = rng.integers(0, 128, (vectors, tiles, 32))
    addend = rng.integers(-(1 << 40), 1 << 40, (vectors, tiles))
    shift, decay = (
        rng.integers(0, 12, (vectors, tiles)),
        rng.choice([0, 1, 7, 20, 40, 50, 63], (vectors, tiles)),
    )
    sides = (addend & ((1 << 52) - 1)) | shift << 52 | decay << 58
    table = {v: (int(rng.integers(0, 9)), int(rng.integers(32768, 65536)), 23) for v in range(vectors)}
    words = act_words(tiles * 32)
    padded = np.zeros((vectors, words * 2, 32), np.int8)
    padded[:, :tiles] = p
    padded_sides = np.zeros((vectors, words * 2), np.uint64)
    padded_sides[:, :tiles] = sides.astype(np.uint64)
    stream = value_stream(bits)
    job = CoreJob(
        TINY,
        pack_matrix(TINY, stream, Fields(codes.astype(np.uint8))),
        [{"codes": int(stream.codes), "values": 1, "group_steps": 1, "blocks": 2, "steps": tiles, "vectors": vectors,
          "stride": words, "dst_stride": output_words(TINY, rows)}],
        np.zeros((vectors * output_words(TINY, rows), 8), np.int32),
        [(0, padded.reshape(-1, 32), padded_sides.reshape(-1))],
        table,
    )  # fmt: skip
    got = run_core(job).vector_buffer.reshape(vectors, -1)
    for v in range(vectors):
        for r in range(rows):
            acc = 0
            for t in range(tiles):
                dot = int((p[v, t] * codes[r, 32 * t : 32 * t + 32]).sum())
                acc = (acc >> int(decay[v, t])) + (dot << int(shift[v, t])) + int(addend[v, t])
            pre, mult, post = table[v]
            assert got[v, r] == saturated(rounded(rounded(acc, pre) * mult, post)), (v, r)


def test_accumulate_adds_the_residual_with_saturation():
    rng = np.random.default_rng(6)
    o = operands(rng, "w4", 16, 128, 2, 32)
    stream = weight_stream("w4", 32)
    from sw_stack.rtl.matvec import activation_groups, matrix_operation, weight_fields

    residual = rng.integers(-(2**31), 2**31, (2 * output_words(TINY, 16), 8)).astype(np.int32)
    job = CoreJob(
        TINY,
        pack_matrix(TINY, stream, weight_fields(o["codes"], o["scales"], o["minima"], WEIGHT_FORMATS["w4"])),
        [{**matrix_operation(TINY, stream, 16, 128, 2), "accumulate": 1}],
        residual,
        activation_groups(TINY, o["acts"]),
        {v: (8, int(o["mantissa"][v]), -int(o["exponent"][v])) for v in range(2)},
    )
    expected = reference(**o) + residual.reshape(2, -1)
    assert np.array_equal(run_core(job).vector_buffer.reshape(2, -1), np.clip(expected, -(2**31), 2**31 - 1))


def test_a_turn_exchanges_groups_of_every_row_block():
    """As keys are read whose slots lie turned: each turn once, two row blocks, two vectors."""
    config = EngineConfig("four turns", 2, 8, 4, 16, 64, 256, 64, 64)
    rng = np.random.default_rng(7)
    o = operands(rng, "w4", 32, 64, 2, 32)
    stream = weight_stream("w4", 32)
    from sw_stack.rtl.matvec import activation_groups, matrix_operation, weight_fields

    words = pack_matrix(
        config, stream, weight_fields(o["codes"], o["scales"], o["minima"], WEIGHT_FORMATS["w4"])
    )
    operation, size = matrix_operation(config, stream, 32, 64, 2), 2 * output_words(config, 32)
    job = CoreJob(
        config,
        np.concatenate([words] * config.turns, 1),
        [{**operation, "turn": turn, "dst": turn * size} for turn in range(config.turns)],
        np.zeros((config.turns * size, 4), np.int32),
        activation_groups(config, o["acts"]),
        {v: (8, int(o["mantissa"][v]), -int(o["exponent"][v])) for v in range(2)},
    )
    got = run_core(job).vector_buffer.reshape(config.turns, 2, 2, 4, 4)
    expected = reference(**o).reshape(2, 2, 4, 4)
    assert config.turns == 4
    for turn in range(config.turns):
        for group in range(4):
            assert np.array_equal(got[turn, :, :, group], expected[:, :, group ^ turn]), (turn, group)


def test_an_illegal_pattern_stops_the_unit():
    stream = weight_stream("w2s24", 64)
    fields = Fields(
        np.zeros((8, 64), np.uint8), np.ones((8, 2), np.uint16), None, np.full((8, 32), 6, np.uint8)
    )
    operation = {
        "codes": int(Codes.S24),
        "scaled": 1,
        "group_steps": 1,
        "blocks": 1,
        "steps": 2,
        "vectors": 1,
    }
    job = CoreJob(TINY, pack_matrix(TINY, stream, fields), [operation], np.zeros((4, 8), np.int32))
    assert run_core(job).error == 6


@pytest.mark.parametrize("name", list(WEIGHT_FORMATS))
@pytest.mark.parametrize(
    ("rows", "inner", "vectors"),
    [(8, 128, 1), (64, 256, 1), (64, 512, 3), (128, 128, 16), (40, 640, 1), (16, 1024, 1), (64, 256, 5)],
)
def test_cycles_equal_the_closed_form(name, rows, inner, vectors):
    """Every format, short and long row blocks, one and several vectors: decoder, array or drain at their limits."""
    o = operands(np.random.default_rng(1), name, rows, inner, vectors, GROUPS[name])
    stream = weight_stream(name, GROUPS[name])
    product = Product(stream, -(-rows // TINY.lanes), inner // stream.codes.step, vectors)
    assert run(name, o).cycles == matrix_cycles(TINY, product)


def test_bad_shapes_are_refused_with_a_sentence():
    o = operands(np.random.default_rng(1), "w4", 8, 64, 1, 32)
    with pytest.raises(KVStrataError, match="passes 1 to 16 vectors at once, not 17"):
        run("w4", {**o, "acts": np.zeros((17, 64), np.int8), "mantissa": [1] * 17, "exponent": [-9] * 17})
    with pytest.raises(KVStrataError, match="weights of width 64 need as many activations, not 96"):
        run("w4", {**o, "acts": np.zeros((1, 96), np.int8)})
    with pytest.raises(KVStrataError, match="multiple of 32 up to 128, not 16"):
        run("w4", {**o, "scales": np.ones((8, 4), np.float16)})
    assert StreamFormat(Codes.U4, True, True, False, 1) == weight_stream("w4", 32)
