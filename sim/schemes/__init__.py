"""Schemes: where weights and KV live and who computes on them, as graphs of tasks on a machine's resources."""

from __future__ import annotations

from importlib import import_module

from sim.describe.base import ConfigError, did_you_mean
from sim.schemes.base import Scheme

SCHEMES: dict[str, tuple[str, str]] = {
    "gpu-resident": ("sim.schemes.gpu", "GpuResident"),
    "flexgen-ssd": ("sim.schemes.flexgen", "FlexgenSsd"),
    "csd-dense": ("sim.schemes.csd", "CsdDense"),
    "fpga": ("sim.schemes.fpga", "FpgaEngine"),
}
"""Name -> (module, class); modules load when used."""


def scheme_class(name: str) -> type[Scheme]:
    """The class of a scheme; raises ConfigError for an unknown name."""
    if name not in SCHEMES:
        raise ConfigError(
            f"unknown scheme {name!r}{did_you_mean(name, list(SCHEMES))}; known: {', '.join(sorted(SCHEMES))}"
        )
    module, attribute = SCHEMES[name]
    return getattr(import_module(module), attribute)
