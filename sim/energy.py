"""Energy and cost of a run, each with its sources: device power between idle and full by utilisation, list prices.

Device powers are nameplate figures and list prices move, so both carry an uncertainty instead of digits: +-25% on
energy (SIM-ENERGY) and the price range in the presets' sources on cost.
"""

from __future__ import annotations

from collections.abc import Mapping

from sim.describe.machine import Machine

ENERGY_UNCERTAINTY = 0.25
YEARS_IN_SERVICE = 3.0
"""With the price of electricity: SIM-COST."""
ELECTRICITY_USD_PER_KWH = 0.12
HOURS_PER_YEAR = 8760
SERVERS_OF = {"gpu": ("gpu",), "fpga": ("engine", "hbm"), "ssd": ("ssd read", "ssd write")}
CSD_RESOURCES = ("csd flash", "csd unit", "csd program")


def powers_w(machine: Machine, used: Mapping[str, float], parts: tuple[str, ...]) -> dict[str, float]:
    """Mean power of each device that a scheme needs; `used` is the busy share of resources by name."""
    power: dict[str, float] = {}
    if "gpu" in parts and machine.gpu:
        g = machine.gpu
        power["gpu"] = machine.gpu_count * (g.idle_w + (g.tdp_w - g.idle_w) * used.get("gpu", 0.0))
    if machine.host and parts != ("fpga",):
        h = machine.host
        power["host"] = h.idle_w + (h.tdp_w - h.idle_w) * max(
            used.get("framework", 0.0), used.get("host dram", 0.0)
        )
    for name, resources in (("ssd", SERVERS_OF["ssd"]), ("csd", CSD_RESOURCES)):
        drive = getattr(machine, name)
        if name in parts and drive:
            busy = min(1.0, max(used.get(r, 0.0) for r in resources))
            count = getattr(machine, f"{name}_count")
            power[name] = count * (drive.idle_w + (drive.active_w - drive.idle_w) * busy)
    if "fpga" in parts and machine.fpga:
        f = machine.fpga
        logic = (
            f.lut_used / 1e3 * f.mw_per_klut_at_225mhz * 1e-3 * f.clock_mhz / 225 * used.get("engine", 0.0)
        )
        memory = used.get("hbm", 0.0) * f.hbm_gb_per_s * f.hbm_share * 8 * f.hbm_pj_per_bit * 1e-3
        power["fpga"] = f.static_w + logic + memory
    return power


def price_usd(machine: Machine, parts: tuple[str, ...]) -> float:
    """List price of the devices that a scheme needs."""
    total = machine.host.price_usd if machine.host else 0.0
    for name in ("gpu", "ssd", "csd", "fpga"):
        device = getattr(machine, name)
        if name in parts and device:
            total += device.price_usd * getattr(machine, f"{name}_count", 1)
    return total


def cost_usd_per_million(
    machine: Machine, parts: tuple[str, ...], watts: float, tokens_per_s: float
) -> float:
    """Purchase over its years in service plus electricity, per million generated tokens."""
    seconds = 1e6 / tokens_per_s
    capital = price_usd(machine, parts) * seconds / (YEARS_IN_SERVICE * HOURS_PER_YEAR * 3600)
    return capital + watts * seconds / 3.6e6 * ELECTRICITY_USD_PER_KWH
