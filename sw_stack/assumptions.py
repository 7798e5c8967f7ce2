"""The register of assumptions: every choice where a paper is silent, with value, source, range and effect.

The register is kept as one TOML file per area in docs/assumptions.d/; docs/assumptions.md is generated from it.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from golden.spec import KVStrataError

HEADER = """# Assumptions

Where a paper or a data sheet is silent, the choice is ours and is listed here.
Generated from docs/assumptions.d/ by `make docs`.
"""


class Assumption(BaseModel):
    """One choice. `range` says what would also be plausible, `effect` what changes if the value does."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=r"^[A-Z]+-[0-9A-Za-z-]+$")
    name: str = Field(min_length=3)
    value: str | int | float | bool
    unit: str = ""
    source: str = Field(min_length=3)
    range: str
    effect: str = Field(min_length=3)


def load(directory: Path) -> list[Assumption]:
    """Every assumption under `directory`, ordered by id.

    Raises `KVStrataError` for a row that lacks a field, an unknown field or an id that is used twice.
    """
    rows: dict[str, Assumption] = {}
    for path in sorted(directory.glob("*.toml")):
        for row in tomllib.loads(path.read_text()).get("assumption", []):
            try:
                parsed = Assumption(**row)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise KVStrataError(
                    f"an assumption needs a valid {where}: {path.name} {row.get('id', '?')}: {first['msg']}"
                ) from error
            if parsed.id in rows:
                raise KVStrataError(f"assumption ids are unique, but {path.name} uses {parsed.id} again")
            rows[parsed.id] = parsed
    return [rows[key] for key in sorted(rows)]


def markdown(rows: Sequence[Assumption]) -> str:
    """The register as a Markdown page."""
    lines = [HEADER, "| id | what | value | source | range | effect |", "|---|---|---|---|---|---|"]
    for row in rows:
        value = f"{row.value} {row.unit}".strip()
        cells = (row.id, row.name, value, row.source, row.range, row.effect)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
