"""What a run yields: a typed result with every metric of docs/metrics.md, serialisable to JSON and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from golden.spec import SPEC_VERSION


class Residency(BaseModel):
    """Peak bytes held in a tier against its capacity."""

    model_config = ConfigDict(frozen=True)
    tier: str
    used_gb: float
    capacity_gb: float


class Span(BaseModel):
    """One task of the timeline: seconds from the start of its phase."""

    model_config = ConfigDict(frozen=True)
    phase: str
    resource: str
    name: str
    category: str
    layer: int
    start_s: float
    end_s: float


class RunResult(BaseModel):
    """One scheme on one machine: docs/metrics.md defines each field."""

    model_config = ConfigDict(frozen=True)
    spec_version: str = SPEC_VERSION
    machine: str
    model: str
    scheme: str
    fidelity: str
    batch: int
    input_tokens: int
    output_tokens: int
    tokens_per_s: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    time_to_first_token_s: float
    time_per_output_token_s: float
    bottleneck: str
    breakdown: dict[str, float]
    """Share of decode time by category; sums to 1."""
    breakdown_s: dict[str, float]
    """Seconds of the mean decode step by category."""
    prefill_breakdown: dict[str, float]
    utilisation: dict[str, float]
    """Busy share of each resource over the decode phase."""
    bytes_per_token: dict[str, float]
    """Bytes over each pipe per generated token, decode phase."""
    residency: list[Residency]
    bandwidths: list[dict[str, Any]]
    energy_j_per_token: float
    energy_breakdown_j: dict[str, float]
    energy_uncertainty: float
    cost_usd_per_million_tokens: float
    flash_write_amplification: float
    flash_lifetime_years: float | None
    flash_reclaim_s: float
    """Erasing the batch's blocks after it has finished, while the drive is idle."""
    policy: dict[str, Any]
    numerics: str
    """weights/activations/kv/policy in the words of docs/accuracy.md; sim.accuracy looks it up."""
    assumptions: list[dict[str, Any]]
    timeline: list[Span]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return self.model_dump()

    def row(self) -> dict[str, Any]:
        """Flat record for tables, stores and plots: scalars only."""
        data = self.model_dump(exclude={"timeline", "assumptions", "residency", "bandwidths", "policy"})
        flat: dict[str, Any] = {}
        for key, value in data.items():
            if isinstance(value, dict):
                flat.update({f"{key}.{name}": item for name, item in value.items()})
            else:
                flat[key] = value
        return flat

    def write(self, path: Path) -> None:
        """Write JSON to `path` through a temporary name."""
        temporary = path.with_suffix(path.suffix + ".part")
        temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        os.replace(temporary, path)
