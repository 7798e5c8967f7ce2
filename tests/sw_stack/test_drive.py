"""Commands on the wire, queues, and whole drives: what was appended is what attention sees."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden.spec import KVStrataError
from golden.spec.nvme import SQE_FIELDS, AddressMap, LogicalAddress, Opcode, Status
from golden.spec.storage import PageKind
from golden.storage import layout
from golden.storage.attention import dense, mean_value, sparf
from sw_stack.device.protocol import DeviceTimeout
from sw_stack.drive import commands as c
from sw_stack.drive import shape as pages
from sw_stack.drive.driver import Driver, Selection, open_drive
from sw_stack.drive.errors import (
    BY_STATUS,
    AddressOutOfRange,
    ContextFull,
    DriveFull,
    InvalidCommand,
    InvalidField,
    NotConfigured,
    NotSequential,
    TopKRange,
    TransferError,
    Unmapped,
    UnrecoveredRead,
    from_status,
)
from sw_stack.drive.flash import FlashArray, Geometry
from sw_stack.drive.ftl import FtlOptions
from sw_stack.drive.queue import Doorbells, HostMemory, QueuePair
from sw_stack.drive.recovery import mount
from sw_stack.drive.shape import TaskShape

SHAPE = TaskShape(layers=2, q_heads=6, kv_heads=2, head_size=64, channels_per_page=8, max_tokens=1024)
SMALL_DRIVE = Geometry(channels=4, dies_per_channel=2, blocks_per_die=8, pages_per_block=32)


def vectors(rng: np.random.Generator, tokens: int) -> np.ndarray:
    return rng.standard_normal((SHAPE.kv_heads, tokens, SHAPE.head_size)).astype(np.float16)


# --- encodings ------------------------------------------------------------------------------------------
def any_command(cls: type[c.Command]) -> st.SearchStrategy[c.Command]:
    fields = SQE_FIELDS[cls.opcode].items()
    return st.builds(cls, **{name: st.integers(0, (1 << field.width) - 1) for name, field in fields})


COMMANDS = [any_command(cls) for cls in c.COMMANDS.values()]


@given(command=st.one_of(COMMANDS), cid=st.integers(0, 0xFFFF), prp=st.integers(0, 2**64 - 1))
def test_every_command_survives_its_64_bytes(command: c.Command, cid: int, prp: int) -> None:
    submission = c.Submission(command, cid, prp, prp ^ 0xFF)
    entry = c.encode(submission)
    assert len(entry) == 64
    assert c.decode(entry) == submission
    assert entry[0] == command.opcode


def test_read_and_write_keep_the_standard_opcodes_and_put_the_address_into_dword_10() -> None:
    entry = c.encode(c.Submission(c.Read(0x89ABCDEF, 3, 5), cid=7))
    assert (Opcode.READ, Opcode.WRITE) == (2, 1)
    assert entry[40:44] == bytes.fromhex("efcdab89")


def test_fields_of_a_command_do_not_overlap() -> None:
    for table in SQE_FIELDS.values():
        bits = [(f.dword, f.lsb + i) for f in table.values() for i in range(f.width)]
        assert len(bits) == len(set(bits))
        assert all(10 <= dword <= 15 and bit < 32 for dword, bit in bits)


@given(st.integers(0, 7), st.integers(0, 6), st.integers(0, 6), st.integers(0, 13), st.data())
def test_logical_addresses_survive_32_bits(
    batch: int, layer: int, head: int, group: int, data: st.DataObject
) -> None:
    widths = AddressMap(batch, layer, head, min(group, 29 - batch - layer - head))
    values = {n: data.draw(st.integers(0, (1 << b) - 1)) for n, b in widths.widths if n != "view"}
    address = LogicalAddress(data.draw(st.sampled_from(PageKind)), **values)
    assert widths.unpack(widths.pack(address)) == address


def test_addresses_that_do_not_fit_are_refused() -> None:
    with pytest.raises(KVStrataError, match="logical address field layer holds 3 bits; got 8"):
        AddressMap(2, 3, 4, 5).pack(LogicalAddress(PageKind.K_TOKEN, 0, 0, 8, 0, 0))
    with pytest.raises(KVStrataError, match="needs one for the task"):
        AddressMap(8, 8, 8, 8)
    with pytest.raises(KVStrataError, match="NVMe field tokens holds 32 bits; got -1"):
        c.encode(c.Submission(c.Append(0, -1), 0))
    assert AddressMap.for_shape(64, 40, 40, 128).task_bits == 5, "OPT-13B, 64 sequences of 2,048 tokens"


def test_statuses_are_exceptions_and_back() -> None:
    for status, cls in BY_STATUS.items():
        assert type(from_status(status, 5)) is cls
        assert from_status(status, 5).detail == 5
    assert set(BY_STATUS) | {0} == {int(s) for s in Status}
    assert "unknown status 0x7ff" in str(from_status(0x7FF, 0))


# --- transport ------------------------------------------------------------------------------------------
@given(offset=st.integers(0, 4095), size=st.integers(1, 3_000_000))
@settings(max_examples=40, deadline=None)
def test_prp_lists_describe_any_buffer(offset: int, size: int) -> None:
    memory = HostMemory(4 << 20)
    base = memory.allocate(size + 4096) + offset
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    memory.view(base, size)[:] = data
    prp1, prp2, _ = memory.prps(base, size)
    np.testing.assert_array_equal(memory.gather(prp1, prp2, size), data)
    memory.scatter(prp1, prp2, data[::-1].copy())
    np.testing.assert_array_equal(memory.view(base, size), data[::-1])


@given(st.lists(st.sampled_from(["submit", "serve", "poll"]), max_size=200), st.integers(2, 5))
def test_rings_keep_order_and_lose_nothing(actions: list[str], depth: int) -> None:
    queue = QueuePair(HostMemory(1 << 16), Doorbells(), 1, depth)
    sent, served, seen = [], [], []
    for action in actions:
        if action == "submit" and queue.free_entries:
            sent.append(len(sent) & 0xFFFF)
            queue.submit(c.encode(c.Submission(c.Append(0, 0), sent[-1])))
        elif action == "serve" and (entry := queue.fetch()):
            served.append(c.decode(entry).cid)
            queue.post(served[-1], 0, 0, 0)
        elif action == "poll" and (completion := queue.poll()):
            seen.append(completion.cid)
    assert served == sent[: len(served)]
    assert seen == served[: len(seen)]
    while completion := queue.poll():
        seen.append(completion.cid)
    assert seen == served


def test_a_full_ring_is_refused() -> None:
    queue = QueuePair(HostMemory(1 << 16), Doorbells(), 3, 2)
    queue.submit(bytes(64))
    with pytest.raises(KVStrataError, match="submission queue 3 is full"):
        queue.submit(bytes(64))


def test_a_drive_that_does_not_answer_is_a_timeout_and_works_on_later() -> None:
    driver, controller = open_drive(SMALL_DRIVE)
    driver.config(0, SHAPE, 4)
    driver._advance = lambda: None
    with pytest.raises(DeviceTimeout, match="must complete a command within 1000 polls"):
        driver.held(0, 0, 0)
    driver._advance = controller.process
    assert driver.held(0, 0, 0) == 0


def test_an_unknown_opcode_and_a_bad_pointer_come_back_as_errors() -> None:
    driver, controller = open_drive(SMALL_DRIVE)
    driver.config(0, SHAPE, 4)
    raw = bytearray(c.encode(c.Submission(c.Append(0, 0), 9)))
    raw[0] = 0x99
    driver._queue.submit(bytes(raw))
    controller.process()
    completion = driver._queue.poll()
    assert completion is not None
    assert completion.cid == 9
    assert isinstance(from_status(completion.status, completion.detail), InvalidCommand)
    driver._queue.submit(c.encode(c.Submission(c.Append(0, 5), 10, prp1=1 << 40)))
    controller.process()
    completion = driver._queue.poll()
    assert completion is not None
    assert isinstance(from_status(completion.status, completion.detail), TransferError)


# --- page layouts ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("m", [2, 4, 8])
def test_page_images_are_the_golden_layout(head_size: int, m: int) -> None:
    shape = TaskShape(1, 2, 2, head_size, m, 4096)
    x = np.random.default_rng(m).integers(
        0, 1 << 16, (2, 2 * shape.segment_tokens, head_size), dtype=np.uint16
    )
    for kind, mine, back in (
        (PageKind.K_TOKEN, pages.k_token_pages, pages.k_from_token_pages),
        (PageKind.V_TOKEN, pages.v_token_pages, pages.v_from_token_pages),
        (PageKind.K_CHANNEL, pages.k_channel_pages, pages.k_from_channel_pages),
    ):
        images = mine(shape, x)
        for head in range(2):
            np.testing.assert_array_equal(images[head].view(np.uint16), layout.pack(kind, x[head], m))
        np.testing.assert_array_equal(back(shape, images), x)


# --- whole drives ---------------------------------------------------------------------------------------
def filled(tokens: int, **kwargs: object) -> tuple[Driver, object, np.ndarray, np.ndarray]:
    """A drive holding one layer of one sequence, appended in uneven pieces, and its k and v."""
    driver, controller = open_drive(SMALL_DRIVE, **kwargs)  # type: ignore[arg-type]
    driver.config(0, SHAPE, 4)
    rng = np.random.default_rng(tokens)
    k, v = vectors(rng, tokens), vectors(rng, tokens)
    at = 0
    for size in [tokens // 2, 1, 3] + [1] * tokens:
        size = min(size, tokens - at)
        if size:
            at += size
            assert driver.append(0, 1, 0, k[:, at - size : at], v[:, at - size : at]) == at
    return driver, controller, k, v


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 300, 517])
def test_dense_attention_in_storage_equals_the_golden_unit(tokens: int) -> None:
    driver, _, k, v = filled(tokens)
    q = np.random.default_rng(1).standard_normal((1, 6, 64)).astype(np.float16)
    result = driver.attend(0, 1, 0, q)
    assert not result.errors
    for head in range(2):
        expected = dense(q[0, 3 * head : 3 * head + 3], k[head], v[head])
        np.testing.assert_array_equal(result.outputs[0, 3 * head : 3 * head + 3], expected)


@pytest.mark.parametrize(
    ("tokens", "r", "top", "window"), [(40, 8, 12, 4), (300, 16, 40, 8), (517, 4, 64, 0), (70, 64, 70, 70)]
)
def test_sparf_in_storage_equals_the_golden_unit_and_skips_pages(
    tokens: int, r: int, top: int, window: int
) -> None:
    driver, controller, k, v = filled(tokens)
    q = np.random.default_rng(2).standard_normal((1, 6, 64)).astype(np.float16)
    result = driver.attend(0, 1, 0, q, Selection(r, top, window))
    for head in range(2):
        mine = slice(3 * head, 3 * head + 3)
        expected = sparf(q[0, mine], k[head], v[head], mean_value(v[head]), r=r, top=top, window=window)
        np.testing.assert_array_equal(result.outputs[0, mine], expected.output)
    if tokens > 2 * SHAPE.segment_tokens and r < 16:
        every = 2 * (tokens // SHAPE.segment_tokens) * SHAPE.channel_groups
        assert 0 < controller.pages_read[PageKind.K_CHANNEL] < every  # type: ignore[attr-defined]


def test_partials_carry_the_softmax_state() -> None:
    """Two drives holding halves merge to the attention over the whole."""
    driver, _, k, v = filled(200)
    q = np.random.default_rng(3).standard_normal((1, 6, 64)).astype(np.float16)
    whole = driver.attend(0, 1, 0, q, partial=True)
    half = driver.attend(0, 1, 0, q, tokens=90, partial=True)
    z = np.einsum("hgd,htd->hgt", q[0].reshape(2, 3, 64).astype(float), k.astype(float)) / 8
    for result, n in ((whole, 200), (half, 90)):
        mass = result.sum[0] * 2.0 ** (result.maximum[0] - 40.0)
        np.testing.assert_allclose(mass, np.exp(z[..., :n]).sum(-1).ravel(), rtol=2e-3)


def test_prefill_by_page_writes_equals_appending() -> None:
    driver, _ = open_drive(SMALL_DRIVE)
    driver.config(0, SHAPE, 4)
    rng = np.random.default_rng(4)
    k, v = vectors(rng, 96), vectors(rng, 96)
    bits = [x.view(np.uint16) for x in (k, v)]
    driver.write_groups(0, 0, 0, PageKind.K_TOKEN, 0, pages.k_token_pages(SHAPE, bits[0]))
    held = driver.write_groups(0, 0, 0, PageKind.V_TOKEN, 0, pages.v_token_pages(SHAPE, bits[1]))
    assert held == driver.held(0, 0, 0) == 96
    read = driver.read_groups(0, 0, 0, PageKind.K_TOKEN, 1, 1, 1, 2)
    np.testing.assert_array_equal(pages.k_from_token_pages(SHAPE, read)[0], bits[0][1, 32:])
    q = rng.standard_normal((1, 6, 64)).astype(np.float16)
    np.testing.assert_array_equal(driver.attend(0, 0, 0, q).outputs[0, :3], dense(q[0, :3], k[0], v[0]))
    with pytest.raises(NotSequential, match="continue a sequence at its next token"):
        driver.write_groups(0, 0, 0, PageKind.K_TOKEN, 4, pages.k_token_pages(SHAPE, bits[0]))


def test_one_sequence_that_fails_does_not_harm_its_batch() -> None:
    driver, controller, k, v = filled(64)
    rng = np.random.default_rng(5)
    more = [(vectors(rng, 64), vectors(rng, 64)) for _ in range(2)]
    for batch, (mk, mv) in zip((0, 2), more):
        driver.append(0, batch, 0, mk, mv)
    sequence = controller.ftl.sequences[0, 1]  # type: ignore[attr-defined]
    controller.ftl.flash.unreadable[sequence.map[PageKind.V_TOKEN, 0, 1, 1]] = True  # type: ignore[attr-defined]
    q = rng.standard_normal((4, 6, 64)).astype(np.float16)
    result = driver.attend(0, 0, 0, q)
    assert set(result.errors) == {1, 3}
    assert isinstance(result.errors[1], UnrecoveredRead)
    assert isinstance(result.errors[3], Unmapped)
    for i, (mk, mv) in zip((0, 2), more):
        np.testing.assert_array_equal(result.outputs[i, :3], dense(q[i, :3], mk[0], mv[0]))
    assert (result.outputs[1] == 0).all()
    assert driver.append(0, 1, 0, k[:, :1], v[:, :1]) == 65, "the sequence itself can go on"


def test_a_drive_that_fills_up_mid_job_keeps_serving() -> None:
    driver, controller = open_drive(Geometry(2, 1, 4, 16))
    driver.config(0, SHAPE, 4)
    rng = np.random.default_rng(6)
    k, v = vectors(rng, 256), vectors(rng, 256)
    driver.append(0, 0, 0, k, v)

    def fill() -> None:
        for batch in range(1, 4):
            for _ in range(4):
                driver.append(0, batch, 0, k, v)

    with pytest.raises(DriveFull, match="the drive has no erased block left"):
        fill()
    q = rng.standard_normal((1, 6, 64)).astype(np.float16)
    np.testing.assert_array_equal(driver.attend(0, 0, 0, q).outputs[0, 3:], dense(q[0, 3:], k[1], v[1]))
    assert driver.reclaim(0, batch=1, batches=3) >= 0
    controller.process()


def test_refusals_name_the_field() -> None:
    driver, _, _, _ = filled(20)
    q = np.zeros((1, 6, 64), np.float16)
    assert isinstance(driver.attend(0, 1, 0, q, Selection(65, 4, 0)).errors[0], TopKRange)
    assert isinstance(driver.attend(0, 1, 0, q, Selection(8, 21, 0)).errors[0], TopKRange)
    with pytest.raises(ContextFull, match="exceeds the context .* got detail 0x00000414"):
        driver.append(0, 1, 0, *[np.zeros((2, 1024, 64), np.float16)] * 2)
    with pytest.raises(AddressOutOfRange):
        driver.read_groups(0, 1, 0, PageKind.K_TOKEN, 1, 2, 0, 1)
    with pytest.raises(Unmapped):
        driver.read_groups(0, 1, 0, PageKind.K_TOKEN, 0, 1, 0, 1)
    with pytest.raises(InvalidField):
        driver.config(1, TaskShape(2, 6, 2, 64, 8, 1 << 17), 4)
    driver.reclaim(0)
    with pytest.raises(KVStrataError, match="configure a task before using it; got task 0"):
        driver.attend(0, 1, 0, q)
    driver._shapes[0] = SHAPE
    with pytest.raises(NotConfigured, match="a task must be configured before it is used"):
        driver.append(0, 1, 0, q[:, :2], q[:, :2])


def test_after_a_power_loss_the_host_asks_and_appends_from_there() -> None:
    flash = FlashArray(SMALL_DRIVE)
    driver, controller = open_drive(flash=flash)
    one_layer = TaskShape(1, 6, 2, 64, 8, 1024)
    driver.config(0, one_layer, 4)
    rng = np.random.default_rng(7)
    k, v = vectors(rng, 75), vectors(rng, 75)
    driver.append(0, 0, 0, k, v)
    controller.ftl = mount(flash, FtlOptions())
    held = driver.held(0, 0, 0)
    assert held == 64
    driver.append(0, 0, 0, k[:, held:], v[:, held:])
    q = rng.standard_normal((1, 6, 64)).astype(np.float16)
    np.testing.assert_array_equal(driver.attend(0, 0, 0, q).outputs[0, :3], dense(q[0, :3], k[0], v[0]))
