"""Text of an instruction stream: index, opcode, fields that are not zero, registers and tokens by name."""

from __future__ import annotations

import numpy as np

from golden.spec import KVStrataError
from golden.spec.engine import INSTRUCTION_BYTES, Op, Unit, decode
from sw_stack.compile.program import R


def disassemble(stream: np.ndarray) -> list[str]:
    """One line per instruction of uint8 [n * 32], up to and with HALT.

    KVStrataError for a stream that is not whole instructions or holds an illegal one, with its index.
    """
    if len(stream) % INSTRUCTION_BYTES or not len(stream):
        raise KVStrataError(
            f"a program is whole instructions of {INSTRUCTION_BYTES} bytes; got {len(stream)} bytes"
        )
    lines = []
    for index, raw in enumerate(stream.reshape(-1, INSTRUCTION_BYTES)):
        try:
            op, fields = decode(int.from_bytes(raw.tobytes(), "little"))
        except KVStrataError as error:
            raise KVStrataError(f"instruction {index} is illegal: {error}") from error
        lines.append(line(index, op, fields))
        if op is Op.HALT:
            break
    return lines


def line(index: int, op: Op, fields: dict[str, int]) -> str:
    """`index OP field=value ... [addr+register] [wait UNIT] [signal UNIT]`."""
    words = [f"{index:6d}", f"{op.name:9s}"]
    tokens = {name: fields.pop(name) for name in ("wait", "signal")}
    registers = {name: fields.pop(f"{name}_reg") for name in ("addr", "count")}
    for name, value in fields.items():
        register = registers.get(name, 0)
        if value or register:
            shown = hex(value) if name.startswith(("addr", "base", "scale_base", "dst")) else str(value)
            words.append(f"{name}={shown}" + (f"+{R(register).name}" if register else ""))
    for name, mask in tokens.items():
        if mask:
            words.append(f"{name}={'|'.join(u.name for u in Unit if mask >> u & 1)}")
    return " ".join(words)
