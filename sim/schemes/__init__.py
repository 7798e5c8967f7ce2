"""Schemes: where weights and KV live and who computes on them, as graphs of tasks on a machine's resources."""

from __future__ import annotations

from importlib import import_module

from sim.describe.base import ConfigError, did_you_mean
from sim.schemes.base import Scheme

SCHEMES: dict[str, tuple[str, str]] = {
    "gpu-resident": ("sim.schemes.gpu", "GpuResident"),
    "gpu-recompute": ("sim.schemes.gpu", "GpuRecompute"),
    "zero-inference": ("sim.schemes.zero", "ZeroInference"),
    "flexgen-dram": ("sim.schemes.flexgen", "FlexgenDram"),
    "flexgen-ssd": ("sim.schemes.flexgen", "FlexgenSsd"),
    "flexgen-gds": ("sim.schemes.flexgen", "FlexgenGds"),
    "flexgen-sparq": ("sim.schemes.flexgen", "FlexgenSparq"),
    "csd-dense": ("sim.schemes.csd", "CsdDense"),
    "csd-sparf": ("sim.schemes.csd", "CsdSparf"),
    "fpga": ("sim.schemes.fpga", "FpgaEngine"),
    "fpga+csd": ("sim.schemes.fpga_csd", "FpgaCsd"),
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
