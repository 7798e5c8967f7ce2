"""The register and the code agree: every id used is registered, every row is used, and defaults carry its value."""

import re
import tomllib
from pathlib import Path

from sim.describe import devices, workload
from sim.describe.base import Described

ROWS = {r["id"]: r for r in tomllib.loads(Path("docs/assumptions.d/sim.toml").read_text())["assumption"]}


def used_ids():
    files = [*Path("sim").rglob("*.toml"), *Path("sim").rglob("*.py")]
    return {i for f in files for i in re.findall(r"SIM-[0-9A-Z]+(?:-[0-9A-Z]+)*", f.read_text())}


def test_every_id_used_is_registered_and_every_row_is_used():
    assert used_ids() == set(ROWS)


def test_defaults_carry_the_registered_value():
    checked = 0
    for cls in (*vars(devices).values(), *vars(workload).values()):
        if not (isinstance(cls, type) and issubclass(cls, Described)):
            continue
        for field, info in cls.model_fields.items():
            extra = info.json_schema_extra or {}
            row = ROWS.get(extra.get("source", "")) if isinstance(extra, dict) else None
            if row and isinstance(row["value"], int | float | bool):
                assert row["value"] == info.default, (cls.__name__, field)
                checked += 1
    assert checked > 20
