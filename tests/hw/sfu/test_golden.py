"""The vector unit against the golden operators: the same tensors through both, every element equal."""

import random

import pytest
import torch

from golden import attention, ops
from golden.spec.engine import TINY, Op
from tests.hw.sfu import reference as ref
from tests.hw.sfu.bench import Machine, instruction

A, B, DST = 0, 512, 1024
LANES = TINY.vector_lanes


def machine_with(a: torch.Tensor, b: torch.Tensor | None = None) -> Machine:
    """A [V, n] at word A and b [V or 1, n] at word B, vectors on whole words."""
    machine = Machine(TINY, seed=1, stall=0.1)
    for base, tensor in ((A, a), (B, b)):
        for v, row in enumerate([] if tensor is None else tensor.tolist()):
            machine.load(base + v * (a.shape[-1] // LANES), row)
    return machine


def words(machine: Machine, shape: torch.Size) -> torch.Tensor:
    return torch.tensor(machine.read(DST, shape.numel())).view(shape)


def common(x: torch.Tensor, shared_b: bool = False) -> dict:
    vectors, n = x.shape
    stride = n // LANES
    return {
        "addr": A,
        "addr_b": B,
        "count": n,
        "vectors": vectors,
        "stride": stride,
        "stride_b": 0 if shared_b else stride,
    }


def tensors(seed: int, vectors: int, n: int) -> torch.Tensor:
    rng = random.Random(seed)
    kinds = [rng.choice(ref.KINDS) for _ in range(vectors)]
    return torch.tensor([ref.vector(rng, n, kind) for kind in kinds])


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_norm_quantise_and_gate_equal_the_golden_operators(seed):
    x, u = tensors(seed, 4, 64), tensors(seed + 10, 4, 64)
    weight = torch.linspace(-2.0, 3.0, 64)
    norm = ops.prepare_norm(weight, 1e-5)
    machine = machine_with(x, norm.weight[None])
    fields = {"exponent": norm.exponent, "epsilon": norm.eps, "dst": DST, "dst_stride": 8}

    def check_norm():
        assert torch.equal(words(machine, x.shape), ops.rmsnorm(x, norm))

    def check_quant():
        a8 = ops.quantise_a8(x)
        codes = torch.tensor([machine.groups[2 * v + g]["codes"] for v in range(4) for g in range(2)]).view(
            4, 64
        )
        assert torch.equal(codes, a8.codes)
        entries = [(machine.table[v]["mult"], -machine.table[v]["post"]) for v in range(4)]
        assert entries == list(zip(a8.mantissa.tolist(), a8.exponent.tolist()))

    def load_gate():
        for v, row in enumerate(u.tolist()):
            machine.load(B + 8 * v, row)

    def check_gate():
        assert torch.equal(words(machine, x.shape), ops.gate_product(x, u))

    machine.run(
        [
            instruction(Op.NORM, **common(x, shared_b=True), **fields),
            check_norm,
            instruction(Op.QUANT, **common(x), dst=0, dst_stride=2),
            check_quant,
            load_gate,
            instruction(Op.GATE, **common(x), dst=DST, dst_stride=8),
            check_gate,
        ]
    )


def test_rotation_and_residual_equal_the_golden_operators():
    x = tensors(5, 6, 32)
    cos, sin = ops.rope_table(torch.tensor([777]), 32, 100_000.0)
    table = torch.stack((cos, sin), -1).flatten(-2)
    machine = machine_with(x, table)

    def check_rope():
        assert torch.equal(words(machine, x.shape), ops.rope(x[:, None], cos, sin)[:, 0])

    def check_add():
        assert torch.equal(words(machine, x.shape), ops.residual(x, x.roll(1, 0)))

    def load_add():
        for v, row in enumerate(x.roll(1, 0).tolist()):
            machine.load(B + 4 * v, row)

    out = {"dst": DST, "dst_stride": 4}
    machine.run(
        [
            instruction(Op.ROPE, **common(x, shared_b=True), **out),
            check_rope,
            load_add,
            instruction(Op.ADD, **common(x), **out),
            check_add,
        ]
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_kv_records_equal_the_golden_operators(bits):
    x = tensors(20 + bits, 6, 64)
    kv = ops.quantise_kv(x, bits)
    machine = machine_with(x)
    machine.run([instruction(Op.KVQUANT, **common(x), bits=bits)])
    codes = torch.tensor([record["codes"] for record in machine.kv]).view(6, 64)
    assert torch.equal(codes, kv.codes)
    for v in range(6):
        for record in machine.kv[8 * v : 8 * v + 8]:
            assert record["scale"] == ref.bits16(kv.scale[v].item())
            assert record["minimum"] == ref.bits16(kv.minimum[v].item())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_attention_over_the_matrix_units_contract_equals_the_golden_attention(seed):
    """Scores in, tiles out, the documented value product on them: outputs of golden.attention, every element."""
    rng = random.Random(seed)
    heads, slots, dh = 3, 75, 16
    padded = 96
    v = ops.quantise_kv(tensors(seed + 40, slots, dh).clamp(-(1 << 22), 1 << 22), 4)
    z = torch.tensor([[int(rng.gauss(0, 5 * 65536)) for _ in range(padded)] for _ in range(heads)])
    live = torch.zeros(1, padded, dtype=torch.bool)
    live[0, :4] = True
    live[0, 20:slots] = True
    one_head = attention.pad_slots(ops.KVCodes(v.codes[None], v.scale[None], v.minimum[None]), padded)
    partial = attention.attend_partial(z.view(1, heads, 1, padded), live, one_head)
    golden = attention.finish(partial).view(heads, dh)

    records = [ref.bits16(m.item()) << 16 | ref.bits16(s.item()) for s, m in zip(v.scale, v.minimum)]
    machine = machine_with(z)
    machine.load(B, [r - (1 << 32) if r >> 31 else r for r in records])
    fields = {"addr": A, "addr_b": B, "stride": padded // LANES, "vectors": heads, "count": slots}
    window = {"vec_group": heads, "sinks": 4, "low": 20, "high": slots}
    machine.run([instruction(Op.SOFTMAX, **fields, **window, dst=0, dst_stride=3, table=7)])
    codes = one_head.codes[0].tolist()
    for head in range(heads):
        tiles = [machine.groups[3 * head + tile] for tile in range(3)]
        assert ref.attention_output(tiles, machine.table[7 + head], codes) == golden[head].tolist()
