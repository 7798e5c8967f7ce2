import gc
import sys
from pathlib import Path

import pytest
from amaranth.hdl import Elaboratable

# The oracle beside these tests is imported by its full name, also where pytest runs as a bare command.
sys.path.insert(0, str(Path(__file__).parents[3]))


@pytest.fixture
def unfinished_blocks(monkeypatch):
    """Blocks whose construction is refused may stay unelaborated in this test."""
    monkeypatch.setattr(Elaboratable, "_MustUse__silence", True)
    yield
    gc.collect()
