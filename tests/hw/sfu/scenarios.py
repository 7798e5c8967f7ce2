"""Random vector instructions with their expected effects, from the plain-integer oracle."""

from __future__ import annotations

from golden.spec.engine import Op
from tests.hw.sfu import reference as ref
from tests.hw.sfu.bench import Machine, instruction

A, B, DST, STATE = 0, 512, 1024, 1536
"""Word addresses of the operands, the result and exported softmax states: the banks of `tiny`."""


def half_words(rng, n: int) -> tuple[list[int], list[float], list[float]]:
    """V records of n slots: packed elements, scales, minima; as KVQUANT makes them."""
    packed, scales, minima = [], [], []
    for _ in range(n):
        minimum, scale = ref.kv_scale(
            ref.vector(rng, 32, rng.choice(["ordinary", "wide", "zero", "extreme"])), 4
        )
        word = ref.bits16(minimum) << 16 | ref.bits16(scale)
        packed.append(word - (1 << 32) if word >> 31 else word)
        scales.append(scale)
        minima.append(minimum)
    return packed, scales, minima


def _signed32(value: int) -> int:
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low


class Case:
    """One instruction: `prepare` fills the machine, `check` compares what it left."""

    def __init__(self, op: Op, rng, lanes: int):
        self.op, self.rng, self.lanes = op, rng, lanes
        self.vectors = rng.choice([1, 1, 2, 3, 5])
        self.count = rng.choice([lanes, 32, 64, 40, 33, 96, 2])
        if op in (Op.KVQUANT,):
            self.count = rng.choice([32, 64, 96])
        if op is Op.ROPE:
            self.count &= ~1
        if op is Op.SOFTMAX:
            self.count = rng.choice([1, 31, 32, 33, 64, 130])
        self.words = -(-self.count // lanes)
        self.stride = self.words + rng.choice([0, 1, 3])
        self.shared_b = rng.random() < 0.5
        self.fields: dict[str, int] = {}
        kind = rng.choice(ref.KINDS)
        self.x = [ref.vector(rng, self.count, kind) for _ in range(self.vectors)]
        self.y = [ref.vector(rng, self.count, rng.choice(ref.KINDS)) for _ in range(self.vectors)]

    def prepare(self, machine: Machine) -> dict:
        rng = self.rng
        for v in range(self.vectors):
            machine.load(A + v * self.stride, self.x[v])
        getattr(self, f"_prepare_{self.op.name.lower()}")()
        stride_b = 0 if self.shared_b else self.stride
        for v in range(1 if self.shared_b else self.vectors):
            machine.load(B + v * stride_b, self.y[v])
        # What lies behind the last element must not matter, nor be overwritten; a result may replace its operand.
        self.dst = A if rng.random() < 0.25 else DST
        self.before = machine.read(STATE if self.op is Op.SOFTMAX else self.dst, 600)
        self.table = rng.randint(0, machine.config.table_entries - self.vectors)
        self.group = rng.randint(0, 100)
        self.group_stride = -(-self.count // 32) + rng.choice([0, 2])
        grouped = self.op in (Op.QUANT, Op.SOFTMAX)
        return instruction(
            self.op,
            addr=A,
            count=self.count,
            vectors=self.vectors,
            stride=self.stride,
            addr_b=B,
            stride_b=stride_b,
            dst=self.group if grouped else self.dst,
            dst_stride=self.group_stride if grouped else self.stride,
            table=self.table,
            **self.fields,
        )

    def b(self, v: int) -> list[int]:
        return self.y[0 if self.shared_b else v]

    def _prepare_add(self):
        pass

    _prepare_gate = _prepare_add

    def _prepare_rope(self):
        choices = [16384, -16384, 0]
        self.y = [
            [self.rng.choice([*choices, self.rng.randint(-16384, 16384)]) for _ in row] for row in self.y
        ]

    def _prepare_norm(self):
        self.y = [[self.rng.randint(-32768, 32767) for _ in row] for row in self.y]
        self.fields = {
            "exponent": self.rng.randint(-6, 30),
            "epsilon": self.rng.choice([0, 1, 24739, self.rng.randint(0, 1 << 36)]),
        }

    def _prepare_quant(self):
        factor, exponent = self.rng.choice([(0, 0), (47274, 18), (33427, 18)])
        self.fields = {"factor": factor, "exponent": exponent, "rectify": self.rng.choice([0, 0, 1])}

    def _prepare_kvquant(self):
        self.fields = {"bits": self.rng.choice([4, 8])}

    def _prepare_softmax(self):
        self.records = [half_words(self.rng, self.count) for _ in range(self.vectors)]
        self.y = [packed for packed, _, _ in self.records]
        low = self.rng.randint(-40, self.count)
        self.fields = {
            "vec_group": self.rng.randint(1, 3),
            "sinks": self.rng.choice([0, 0, 4, 33]),
            "low": low,
            "high": self.rng.choice([max(0, low), low + 40, self.count, 65535 - 300]),
            "export": self.rng.randint(0, 1),
            "state": STATE,
        }

    # --- expectations ---------------------------------------------------------------------------------
    def check(self, machine: Machine) -> None:
        getattr(self, f"_check_{self.op.name.lower()}", self._check_words)(machine)

    def result(self, v: int) -> list[int]:
        x, b = self.x[v], self.b(v)
        if self.op is Op.ADD:
            return [ref.add(p, q) for p, q in zip(x, b)]
        if self.op is Op.GATE:
            return [ref.gate(p, q) for p, q in zip(x, b)]
        if self.op is Op.ROPE:
            return ref.rope(x, b)
        return ref.rmsnorm(x, b, self.fields["exponent"], self.fields["epsilon"])

    def _check_words(self, machine):
        want = list(self.before)
        for v in range(self.vectors):
            at = v * self.stride * self.lanes
            want[at : at + self.count] = self.result(v)
        got = machine.read(self.dst, len(self.before))
        for k, (g, w) in enumerate(zip(got, want)):
            assert g == w, f"{self.op.name}: element {k} of {self.vectors} x {self.count}, {self.fields}"

    def _check_quant(self, machine):
        for v in range(self.vectors):
            x = [max(e, 0) for e in self.x[v]] if self.fields["rectify"] else self.x[v]
            codes, sm, se = ref.a8(x)
            codes = codes + [0] * (-len(codes) % 32)
            for g in range(len(codes) // 32):
                part = codes[32 * g : 32 * g + 32]
                want = {"codes": part, "addend": sum(part), "shift": 0, "decay": 0}
                at = self.group + v * self.group_stride + g
                assert machine.groups.pop(at) == want, f"QUANT: group {g} of vector {v}"
            entry = {"pre": 8, "mult": sm, "post": -se}
            if self.fields["factor"]:
                entry |= {
                    "mult": ref.rs(sm * self.fields["factor"], 16),
                    "post": -se - 16 + self.fields["exponent"],
                }
            assert machine.table[self.table + v] == entry, f"QUANT: scale of vector {v}"
        assert not machine.groups, "QUANT: a group outside the instruction was written"

    def _check_kvquant(self, machine):
        for v in range(self.vectors):
            codes, minimum, scale = ref.kv(self.x[v], self.fields["bits"])
            got, last = [], []
            for _ in range(self.words):
                record = machine.kv.pop(0)
                assert (record["scale"], record["minimum"]) == (ref.bits16(scale), ref.bits16(minimum)), (
                    f"KVQUANT: record of vector {v}"
                )
                got += record["codes"]
                last.append(record["last"])
            assert got == codes, f"KVQUANT: codes of vector {v}"
            assert last == [0] * (self.words - 1) + [1]
        assert not machine.kv

    def _check_softmax(self, machine):
        f, pad = self.fields, -self.count % 32
        for v in range(self.vectors):
            token = v // f["vec_group"]
            live = [
                int(s < f["sinks"] or f["low"] + token <= s < f["high"] + token) for s in range(self.count)
            ] + [0] * pad
            zeros = [0] * pad
            _, scales, minima = self.records[0 if self.shared_b else v]
            tiles, final, state = ref.softmax(self.x[v] + zeros, live, scales + zeros, minima + zeros)
            for g, want in enumerate(tiles):
                at = self.group + v * self.group_stride + g
                assert machine.groups.pop(at) == want, f"SOFTMAX: tile {g} of vector {v}"
            assert machine.table[self.table + v] == final, f"SOFTMAX: scale of vector {v}"
            if f["export"]:
                at = v * self.lanes
                self.before[at : at + 3] = [state[0], _signed32(state[1]), state[1] >> 32]
        assert machine.read(STATE, len(self.before)) == self.before, "SOFTMAX: states, and nothing else in VB"
        assert not machine.groups
