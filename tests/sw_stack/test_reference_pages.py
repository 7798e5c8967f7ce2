"""The reference pages say what the spec says, field by field."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.spec.engine import COMMON_FIELDS, FIELDS, Op
from golden.spec.nvme import CQE_FIELDS, SQE_FIELDS, Opcode, Status
from sw_stack.compile.program import R
from sw_stack.drive.errors import BY_STATUS

DOCS = Path(__file__).parents[2] / "docs"


def listed(fields: tuple[tuple[str, int], ...]) -> str:
    return " · ".join(f"`{name}` {width}" for name, width in fields)


@pytest.mark.parametrize("op", Op, ids=lambda op: op.name)
def test_every_instruction_is_on_its_page(op: Op) -> None:
    assert f"| {int(op):#04x} | {op.name} | {listed(FIELDS[op])} |" in (DOCS / "isa.md").read_text()


def test_common_fields_and_registers_are_on_the_page() -> None:
    page = (DOCS / "isa.md").read_text()
    assert listed(COMMON_FIELDS) in page
    for register in R:
        assert register is R.ZERO or f"{int(register)} {register.name}" in page


@pytest.mark.parametrize("opcode", Opcode, ids=lambda op: op.name)
def test_every_command_is_on_its_page(opcode: Opcode) -> None:
    page = (DOCS / "nvme.md").read_text()
    section = page.split(f"### {opcode.name.lower()} ({int(opcode):#04x})")[1].split("###")[0]
    for name, f in SQE_FIELDS[opcode].items():
        assert f"| {f.dword} | {f.lsb + f.width - 1}:{f.lsb} | `{name}` |" in section


def test_completions_and_statuses_are_on_the_page() -> None:
    page = (DOCS / "nvme.md").read_text()
    for name, f in CQE_FIELDS.items():
        assert f"| {f.dword} | {f.lsb + f.width - 1}:{f.lsb} | `{name}` |" in page
    for status in Status:
        exception = BY_STATUS[status].__name__ if status in BY_STATUS else "-"
        assert f"| {int(status):#05x} | {status.name} | {exception} |" in page
