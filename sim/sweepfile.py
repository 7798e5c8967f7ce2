"""Sweep files: which fields vary, how points are chosen, and what counts as better.

name = "drives"
machine = "reference"
scheme = ["csd-dense", "csd-sparf"]
model = "opt-13b"
method = "grid"                    # or "random", "search"
points = 100                       # for random and search
[workload]
batch = [16, 64]
[set]                              # grid values, or choices
csd_count = [1, 2, 4]
"csd.channels" = [4, 8, 16]
"framework.gpu_batches" = [1, 4]
[range]                            # random and search only: low and high
"csd.read_us" = [20.0, 90.0]
[objectives]
tokens_per_s = "max"
energy_j_per_token = "min"
accuracy_top1 = "max"              # with accuracy_table = "build/accuracy/accuracy.parquet" at the top
"""

from __future__ import annotations

import itertools
import random
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sim.accuracy import METRIC
from sim.describe.base import ConfigError, Count, Described, build, did_you_mean, listed, text_of
from sim.describe.devices import Link
from sim.describe.machine import PARTS, Topology
from sim.describe.workload import Tuning, Workload
from sim.schemes import SCHEMES

OBJECTIVES = (
    "tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s", "time_per_output_token_s", "energy_j_per_token",
    "cost_usd_per_million_tokens", "flash_lifetime_years", METRIC,
)  # fmt: skip
Point = dict[str, Any]
Direction = Literal["max", "min"]


class Sweep(Described):
    """A validated sweep file."""

    kind: ClassVar[str] = "sweep"
    machine: str | list[str] = "reference"
    model: str | list[str] = "opt-13b"
    scheme: str | list[str] = "csd-dense"
    fidelity: Literal["analytic", "flow", "page"] = "flow"
    method: Literal["grid", "random", "search"] = "grid"
    points: Count = 100
    seed: int = 0
    workload: dict[str, Any] = Field(default_factory=dict)
    set: dict[str, list[Any]] = Field(default_factory=dict)
    range: dict[str, tuple[float, float]] = Field(default_factory=dict)
    accuracy_table: str = ""
    objectives: dict[str, Direction] = {"tokens_per_s": "max"}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.range and self.method == "grid":
            raise ValueError(
                f"a grid takes lists under [set], not [range], got range of {', '.join(self.range)}"
            )
        for field, (low, high) in self.range.items():
            if low >= high:
                raise ValueError(f"range of {field} must go from low to high, got {low} to {high}")
        for name in self.schemes():
            if name not in SCHEMES:
                raise ValueError(f"unknown scheme {name!r}{did_you_mean(name, list(SCHEMES))}")
        for kind, names in (("machine", _listed(self.machine)), ("model", _listed(self.model))):
            for name in names:
                if not name.endswith((".toml", ".json")) and name not in listed(kind):
                    raise ValueError(f"unknown {kind} preset {name!r}{did_you_mean(name, listed(kind))}")
        for metric in self.objectives:
            if metric not in OBJECTIVES:
                raise ValueError(f"unknown objective {metric!r}{did_you_mean(metric, list(OBJECTIVES))}")
        if METRIC in self.objectives and not self.accuracy_table:
            raise ValueError(
                f"objective {METRIC} needs accuracy_table, the file that `make accuracy` writes, got none"
            )
        for path in (*self.set, *self.range):
            _check_path(path)
        for field in self.workload:
            if field not in Workload.model_fields:
                hint = did_you_mean(field, list(Workload.model_fields))
                raise ValueError(f"unknown field workload.{field}{hint}")
        return self

    def schemes(self) -> list[str]:
        """Schemes as a list."""
        return _listed(self.scheme)

    def axes(self) -> dict[str, list[Any]]:
        """Axis name -> values; names are machine, model, scheme, workload.field and device paths."""
        axes = {"machine": _listed(self.machine), "model": _listed(self.model), "scheme": self.schemes()}
        axes |= {f"workload.{k}": _listed(v) for k, v in self.workload.items()}
        return axes | self.set

    def listed_points(self) -> Iterator[Point]:
        """Points of a grid (row-major) or of a random sweep (seeded, the same on every machine)."""
        axes = self.axes()
        if self.method == "grid":
            for values in itertools.product(*axes.values()):
                yield dict(zip(axes, values))
            return
        rng = random.Random(self.seed)
        for _ in range(self.points):
            point = {name: values[int(rng.random() * len(values))] for name, values in axes.items()}
            yield point | {n: low + (high - low) * rng.random() for n, (low, high) in self.range.items()}


def _check_path(path: str) -> None:
    """Raise ValueError where no machine can have the field that `path` names."""
    part, _, field = path.rpartition(".")
    kinds: dict[str, type[Described]] = {
        **PARTS,
        "ssd_link": Link,
        "csd_link": Link,
        "framework": Tuning,
        "workload": Workload,
    }
    tops = [*PARTS, "framework", *(f for f in Topology.model_fields if f not in Described.model_fields)]
    known = list(kinds[part].model_fields) if part in kinds else tops if not part else list(kinds)
    if (field if part in kinds or not part else part) not in known:
        raise ValueError(f"unknown field {path}{did_you_mean(field if part in kinds else path, known)}")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def load_sweep(path: Path) -> Sweep:
    """Read and validate a sweep file; raises ConfigError."""
    try:
        data = tomllib.loads(text_of(path, "sweep file"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"sweep file {path} is not valid TOML: {error}") from None
    return build(Sweep, {"name": path.stem, **data}, f"sweep {path.name}")
