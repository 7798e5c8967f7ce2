"""A bandwidth and why it is no higher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sim.describe.devices import Link


@dataclass(frozen=True)
class Bandwidth:
    """The least of several named limits, all in GB/s. `binding` names the one that binds."""

    what: str
    limits: dict[str, float]

    @property
    def binding(self) -> str:
        """Name of the least limit."""
        return min(self.limits, key=lambda name: self.limits[name])

    @property
    def gb_per_s(self) -> float:
        """The bandwidth."""
        return self.limits[self.binding]

    @property
    def bytes_per_s(self) -> float:
        """The bandwidth in bytes per second."""
        return self.gb_per_s * 1e9

    def under(self, uplink: Link | None) -> Bandwidth:
        """The same bandwidth behind an uplink that all of it shares."""
        if uplink is None:
            return self
        return Bandwidth(self.what, {**self.limits, f"shared uplink {uplink.name}": uplink.payload_gb_per_s})

    def to_dict(self) -> dict[str, Any]:
        """Row for reports."""
        return {"what": self.what, "gb_per_s": self.gb_per_s, "binding": self.binding, "limits": self.limits}
