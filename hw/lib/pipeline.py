"""Feed-forward pipelines: delays, fields that travel along, and reduction trees, all without reset.

What says that a value is meaningful is a valid bit of the block around; the values themselves start anywhere.
"""

from collections.abc import Callable

from amaranth import Module, Signal, Value

TREE_FAN_IN = 4
"""Operands combined per cycle in a reduction tree: two levels of logic between registers."""


class Pipe:
    """Registers of one pipeline in module `m`; `prefix` keeps their names apart."""

    def __init__(self, m: Module, prefix: str = ""):
        self._m, self._prefix = m, prefix

    def reg(self, value, name: str, cycles: int = 1):
        """`value` after `cycles` cycles, of the same shape (views stay views); synthesis may use shift registers."""
        shape = value.shape()
        for cycle in range(cycles):
            register = Signal(shape, name=f"{self._prefix}{name}_{cycle}", reset_less=True)
            self._m.d.sync += Value.cast(register).eq(Value.cast(value))
            value = register
        return value

    def tree(self, items: list, combine: Callable, name: str, fan_in: int = TREE_FAN_IN):
        """`items` reduced by the associative `combine`, `fan_in` per cycle, in `tree_cycles(len(items), fan_in)`."""
        level = 0
        while len(items) > 1:
            groups = [items[at : at + fan_in] for at in range(0, len(items), fan_in)]
            items = [
                self.reg(fold(group, combine), f"{name}_{level}_{index}")
                for index, group in enumerate(groups)
            ]
            level += 1
        return items[0]


def fold(items: list, combine: Callable):
    """`items` combined pairwise, as a balanced tree of logic."""
    while len(items) > 1:
        pairs = [combine(*items[at : at + 2]) for at in range(0, len(items) - 1, 2)]
        items = pairs + items[len(items) - len(items) % 2 :]
    return items[0]


def tree_cycles(count: int, fan_in: int = TREE_FAN_IN) -> int:
    """Cycles of `Pipe.tree` over `count` items."""
    cycles = 0
    while count > 1:
        count, cycles = -(-count // fan_in), cycles + 1
    return cycles
