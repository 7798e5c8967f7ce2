import gc

import pytest
from amaranth.hdl import Elaboratable


@pytest.fixture
def unfinished_blocks(monkeypatch):
    """Blocks whose construction is refused, or that are only connected, may stay unelaborated in this test."""
    monkeypatch.setattr(Elaboratable, "_MustUse__silence", True)
    yield
    gc.collect()
