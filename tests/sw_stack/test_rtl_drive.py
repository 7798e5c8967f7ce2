"""The in-storage unit's RTL behind firmware, maps and flash: outputs equal to the golden unit's, and whole text."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from golden.loaders import Checkpoint
from golden.ops import argmax_lowest
from golden.spec import KVStrataError
from golden.spec.storage import PPN
from golden.storage.attention import exact, mean_value, sparf
from golden.storage.decoder import HybridDecoder, Sparsity, Split, StorageDecoder
from golden.storage.fp import to_fp16
from sw_stack.drive.attention import HeadPages, Job
from sw_stack.drive.driver import Selection, open_drive
from sw_stack.drive.flash import Geometry
from sw_stack.drive.ftl import FtlOptions
from sw_stack.drive.rtl_unit import RtlUnit, physical_page
from sw_stack.drive.shape import TaskShape
from sw_stack.rtl.storage import UnitConfig
from sw_stack.runtime.machine import Setup, open_session
from sw_stack.runtime.session import Session
from tests.sw_stack.test_rtl_text import predicted

CONFIG = UnitConfig(channels=2, lanes=3, max_tokens=1024)
SHAPE = TaskShape(layers=1, q_heads=6, kv_heads=2, head_size=64, channels_per_page=8, max_tokens=1024)
GEOMETRY = Geometry(channels=2, dies_per_channel=2, blocks_per_die=32, pages_per_block=16)


def test_physical_pages_are_distinct() -> None:
    """Every page of the FTL's array has its own number at the flash interface, on the FTL's channel."""
    numbers = {physical_page(ppn, GEOMETRY) for ppn in range(GEOMETRY.pages)}
    assert len(numbers) == GEOMETRY.pages
    for ppn in range(0, GEOMETRY.pages, 37):
        fields = PPN.unpack(physical_page(ppn, GEOMETRY))
        assert fields["channel"] == GEOMETRY.channel_of(np.array([ppn]))[0]
        assert fields["page"] == ppn % GEOMETRY.pages_per_block


@pytest.mark.slow
@pytest.mark.rtl
def test_the_rtl_answers_from_the_maps_as_the_golden_unit_does() -> None:
    """Tails and whole segments; dense and sparse, bit for bit."""
    random = np.random.default_rng(5)
    unit = RtlUnit(CONFIG)
    drives = [open_drive(GEOMETRY, FtlOptions(), unit=u)[0] for u in (unit, None)]
    for driver in drives:
        driver.config(0, SHAPE, 2)
    held = [0, 0]
    for step, new in enumerate((5, 40, 19, 200, 1, 63, 256, 30)):
        batch = step % 3 % 2
        k, v = (random.standard_normal((2, new, 64)).astype(np.float16) for _ in range(2))
        held[batch] += new
        q = random.standard_normal((1, 6, 64)).astype(np.float16)
        tokens = held[batch] - (step == 4) * 7
        top = min(16, tokens)
        for selection in (None, Selection(8, top, min(4, top))):
            answers = []
            for driver in drives:
                if selection is None:
                    driver.append(0, batch, 0, k, v)
                answers.append(driver.attend(0, batch, 0, q, selection, tokens, partial=True))
            assert not answers[0].errors
            assert not answers[1].errors
            got, expected = (a.outputs.view(np.uint16) for a in answers)
            assert np.array_equal(got, expected), f"step {step}, {tokens} tokens, {selection}"
            for state in ("maximum", "sum"):
                got, expected = (getattr(a, state) for a in answers)
                assert np.array_equal(got, expected), f"{state} of step {step}, {selection}"
    assert len(unit.cycles) == 8 * 2 * 2


SMALL_DRIVE = Geometry(channels=2, dies_per_channel=2, blocks_per_die=3, pages_per_block=8)
CHURN = ((0, 300, 1), (1, 37, None), (2, 21, 1), (0, 9, 2), (1, 50, None), (2, 90, 0), (0, 130, 1), (1, 61, 2),
         (2, 18, None), (0, 70, 0), (1, 45, None), (2, 33, 1), (0, 100, None))  # fmt: skip
"""(sequence that grows and attends, by how many tokens, sequence that is given up afterwards)."""


@pytest.mark.slow
@pytest.mark.rtl
def test_the_rtl_attends_while_buffers_spill_and_blocks_are_reclaimed() -> None:
    """DRAM for fewer buffers than there are sequences, flash for less than is written: every answer is that of golden
    attention over a plain list of the tokens, whatever the firmware moved meanwhile."""
    random = np.random.default_rng(11)
    driver, controller = open_drive(SMALL_DRIVE, FtlOptions(dram_bytes=24_000), unit=RtlUnit(CONFIG))
    driver.config(0, SHAPE, 3)
    held = [np.zeros((2, 2, 0, 64), np.float16) for _ in range(3)]
    for grows, new, gives_up in CHURN:
        kv = random.standard_normal((2, 2, new, 64)).astype(np.float16)
        driver.append(0, grows, 0, *kv)
        held[grows] = np.concatenate([held[grows], kv], 2)
        q = random.standard_normal((1, 6, 64)).astype(np.float16)
        tokens = held[grows].shape[2]
        for selection in (None, Selection(8, min(16, tokens), 4)):
            answer = driver.attend(0, grows, 0, q, selection)
            assert not answer.errors
            expected = np.concatenate([_golden(q[0], *held[grows], h, selection) for h in range(2)])
            assert np.array_equal(answer.outputs[0].view(np.uint16), expected.view(np.uint16)), (
                grows,
                tokens,
            )
        if gives_up is not None:
            driver.reclaim(0, gives_up, 1)
            held[gives_up] = held[gives_up][:, :, :0]
    work, erased = controller.ftl.counters, controller.ftl.allocator.counters
    assert work.spilled_pages > 0
    assert work.transposed_pages > 0
    assert erased.foreground_erases + erased.idle_erases > 0


def _golden(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, head: int, selection: Selection | None
) -> np.ndarray:
    """float16 [G, dh] of one KV head's queries over k and v [Hkv, S, dh]."""
    queries, k, v = q[3 * head : 3 * head + 3], keys[head], values[head]
    if selection is None:
        return to_fp16(exact(queries, k, v, np.ones(len(k), bool))[0])
    s = selection
    return sparf(queries, k, v, mean_value(v), r=s.r, top=s.k, window=s.window).output


IDS = [1, 9690, 198, 2683, 359, 253, 5356]


def layers_of(model: Checkpoint, layers: int) -> Checkpoint:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, layers=layers))


@pytest.mark.slow
@pytest.mark.rtl
@pytest.mark.parametrize(("layers", "sparsity"), [(30, None), (4, Sparsity(ratio=4))], ids=["dense", "sparf"])
def test_text_with_attention_in_storage_on_rtl(
    smollm2: Checkpoint, layers: int, sparsity: Sparsity | None
) -> None:
    """The engine's RTL projects, the drive's RTL attends; logits and hidden state equal to the golden decoder's."""
    model = layers_of(smollm2, layers)
    setup = Setup("small", "rtl", "csd", context=64, sparsity=sparsity, memory="2")
    _writes_what_golden_writes(model, setup, StorageDecoder(model, "w4", sparsity))


@pytest.mark.slow
@pytest.mark.rtl
@pytest.mark.parametrize(("layers", "sparsity"), [(30, None), (4, Sparsity(ratio=2))], ids=["dense", "sparf"])
def test_text_shared_by_engine_and_drive_on_rtl(
    smollm2: Checkpoint, layers: int, sparsity: Sparsity | None
) -> None:
    """Sinks and window on the engine's RTL, older tokens on the drive's, merged by the host."""
    model, split = layers_of(smollm2, layers), Split(sinks=2, window=3)
    setup = Setup("small", "rtl", "engine+csd", context=64, sparsity=sparsity, split=split, memory="20")
    session = _writes_what_golden_writes(model, setup, HybridDecoder(model, split, sparsity=sparsity))
    measured = [result.cycles for _, result in session.runs]
    for m, p in zip(measured, predicted(session, setup.memory), strict=True):
        assert abs(p / m - 1) <= 0.02, f"{p} predicted, {m} measured"


def _writes_what_golden_writes(model: Checkpoint, setup: Setup, golden: StorageDecoder) -> Session:
    session, cache, ids = open_session(model, setup), golden.new_cache(), IDS
    try:
        for _ in range(3):
            session.runs.clear()
            logits = session.forward(ids)
            expected, hidden = _observed(golden, cache, ids)
            assert torch.equal(session.hidden(1)[0], hidden)
            assert torch.equal(logits, expected)
            ids = [int(argmax_lowest(logits))]
    finally:
        session.device.close()
    return session


def _observed(golden: StorageDecoder, cache: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last token, and the residual stream that the last layer leaves."""
    hidden = []

    def probe(layer: int, operator: str, operands: dict[str, Any]) -> None:
        if operator == "residual.ffn":
            hidden.append(operands["sum"])

    golden.probe = probe
    logits = golden.forward(ids, cache, last_only=True)[0]
    return logits, hidden[-1][-1]


def test_a_drive_has_the_units_channels() -> None:
    driver, controller = open_drive(Geometry(4, 2, 16, 16))
    driver.config(0, SHAPE, 1)
    k = np.zeros((2, 1, 64), np.float16)
    driver.append(0, 0, 0, k, k)
    with pytest.raises(KVStrataError, match="the unit has 2 flash channels; got a drive of 4"):
        RtlUnit(CONFIG).attend(Job(k[0].repeat(3, 0), 1), HeadPages(controller.ftl, 0, 0, 0, 0))
