"""Broken designs: a module again, with one place of its source changed, for tests that must then turn red."""

import inspect
import types


def mutant(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    """`module` executed anew with `new` instead of `old`, which must stand in its source exactly once."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    changed = types.ModuleType(module.__name__)
    exec(compile(source.replace(old, new), f"<{module.__name__}: {new}>", "exec"), changed.__dict__)
    return changed
