"""A machine: which devices, how many, and the links that join them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from sim.describe.base import ConfigError, Count, Described, assumed, build, did_you_mean, listed, load
from sim.describe.devices import Csd, Fpga, Gpu, Host, Link, Ssd

PARTS: dict[str, type[Described]] = {
    "gpu": Gpu,
    "host": Host,
    "gpu_link": Link,
    "ssd": Ssd,
    "csd": Csd,
    "drive_uplink": Link,
    "fpga": Fpga,
    "fpga_link": Link,
}


class Topology(Described):
    """How many of each device a machine has, and what may talk to what: the same in the file and in the machine."""

    gpu_count: Count = assumed(1, "machine description")
    ssd_count: Count = assumed(1, "machine description")
    csd_count: Count = assumed(1, "machine description")
    p2p: bool = assumed(True, "machine description")
    gpu_parallel: Literal["tensor", "layers"] = assumed("tensor", "machine description")
    csd_partition: Literal["heads", "sequences"] = assumed(
        "heads", "InstInfer: heads split evenly over drives"
    )


class MachineFile(Topology):
    """The TOML face of a machine: names of presets, counts and topology."""

    kind: ClassVar[str] = "machine"
    gpu: str | None = None
    host: str | None = None
    gpu_link: str | None = None
    ssd: str | None = None
    csd: str | None = None
    drive_uplink: str | None = None
    fpga: str | None = None
    fpga_link: str | None = None
    unsourced: ClassVar[frozenset[str]] = Described.unsourced | PARTS.keys()


class Machine(Topology):
    """A machine with its devices resolved. `drive_uplink` is shared by all drives; None means one link each."""

    kind: ClassVar[str] = "machine"
    gpu: Gpu | None = None
    host: Host | None = None
    gpu_link: Link | None = None
    ssd: Ssd | None = None
    csd: Csd | None = None
    ssd_link: Link | None = None
    csd_link: Link | None = None
    drive_uplink: Link | None = None
    fpga: Fpga | None = None
    fpga_link: Link | None = None

    def part(self, name: str, scheme: str) -> Any:
        """The device `name`, or ConfigError saying which scheme needs it."""
        device = getattr(self, name)
        if device is None:
            with_one = ", ".join(n for n in listed("machine") if getattr(load_machine(n), name) is not None)
            raise ConfigError(
                f"scheme {scheme} needs a {name}, and machine {self.name} has none; with one: {with_one}"
            )
        return device

    def devices(self) -> list[Described]:
        """Devices present, in a fixed order."""
        names = (
            "gpu",
            "gpu_link",
            "host",
            "ssd",
            "ssd_link",
            "csd",
            "csd_link",
            "drive_uplink",
            "fpga",
            "fpga_link",
        )
        return [d for n in names if (d := getattr(self, n)) is not None]


def load_machine(ref: str | Path | Machine, overrides: Mapping[str, Any] | None = None) -> Machine:
    """A machine by preset name or file, with `overrides` such as {"csd.channels": 16, "csd_count": 4, "gpu": "t4"}."""
    if isinstance(ref, Machine):
        return _with_fields(ref, overrides or {})
    fields = load(MachineFile, ref)
    top = {k: v for k, v in (overrides or {}).items() if "." not in k}
    fields = fields.replaced(**top) if top else fields
    machine = _resolve(fields)
    return _with_fields(machine, {k: v for k, v in (overrides or {}).items() if "." in k})


def _resolve(file: MachineFile) -> Machine:
    parts: dict[str, Any] = {
        n: load(cls, ref) for n, cls in PARTS.items() if (ref := getattr(file, n)) is not None
    }
    for drive in ("ssd", "csd"):
        if drive in parts:
            parts[f"{drive}_link"] = load(Link, parts[drive].link)
    counts = {n: getattr(file, n) for n in Topology.model_fields if n not in Described.model_fields}
    described = {"name": file.name, "description": file.description, "source": file.source}
    return build(Machine, {**described, **parts, **counts}, f"machine {file.name}")


def _with_fields(machine: Machine, overrides: Mapping[str, Any]) -> Machine:
    for path, value in overrides.items():
        part, _, field = path.rpartition(".")
        device = getattr(machine, part, None) if part else machine
        if not isinstance(device, Described) or (not part and field in PARTS):
            known = [n for n in type(machine).model_fields if n not in Described.model_fields]
            raise ConfigError(
                f"override {path}: machine {machine.name} has no device {part or field!r}{did_you_mean(part, known)}"
            )
        changed = device.replaced(**{field: value})
        machine = machine.model_copy(update={part: changed}) if part else cast(Machine, changed)
    return machine
