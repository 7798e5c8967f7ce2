"""One Verilog module for many instances.

Amaranth elaborates every instance of a component into a module of its own. An array of a hundred equal lanes is then
converted, compiled and simulated as a hundred different modules. `place` instead emits equal components once and
instantiates that module; in Amaranth's own simulator it adds the component as an ordinary submodule.
"""

from collections.abc import Callable
from typing import Any

from amaranth import ClockSignal, Instance, Module, ResetSignal, Value
from amaranth.lib import wiring


class SharedModules:
    """The platform of a conversion that shares modules: what has been placed, by module name.

    Modules are named by the caller; one name means one component, whoever places it.
    """

    def __init__(self) -> None:
        self.components: dict[str, wiring.Component] = {}


def place(
    m: Module, platform: Any, name: str, module: str, make: Callable[[], wiring.Component]
) -> wiring.PureInterface | wiring.Component:
    """Add an instance `name` of the component that `make` builds, shared under the name `module`.

    Returns what to connect to. The component must depend on its ports and on `module` alone, and use the `sync` domain.
    """
    if not isinstance(platform, SharedModules):
        component = make()
        m.submodules[name] = component
        return component
    if module not in platform.components:
        platform.components[module] = make()
    signature = platform.components[module].signature
    interface = signature.create(path=(name,))
    ports: dict[str, Any] = {"i_clk": ClockSignal(), "i_rst": ResetSignal()}
    for path, member, value in signature.flatten(interface):
        direction = "i" if member.flow is wiring.In else "o"
        ports[f"{direction}_{'__'.join(map(str, path))}"] = Value.cast(value)
    m.submodules[name] = Instance(module, **ports)
    return interface
