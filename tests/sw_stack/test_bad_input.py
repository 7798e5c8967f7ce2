"""Bad input and failing devices from the command line: a typed exception and a sentence each; the rest works on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from golden.loaders import Checkpoint
from golden.spec import KVStrataError
from golden.spec.storage import PageKind
from golden.storage.decoder import StorageDecoder
from sw_stack.cli import app
from sw_stack.compile.decoder import compile_split
from sw_stack.device.golden import GoldenDevice
from sw_stack.device.protocol import DeviceTimeout
from sw_stack.drive.attention import GoldenUnit
from sw_stack.drive.controller import Controller
from sw_stack.drive.driver import open_drive
from sw_stack.drive.errors import DriveError, DriveFull, UnrecoveredRead
from sw_stack.drive.flash import FlashArray, Geometry
from sw_stack.drive.shape import TaskShape
from sw_stack.pack.image import Image
from sw_stack.runtime import machine as runtime
from sw_stack.runtime.generate import on_device
from sw_stack.runtime.placement import InStorage
from sw_stack.runtime.session import SplitSession
from tests.sw_stack.machines import SHAPE, MakeMachine, random_checkpoint

MODEL = dataclasses.replace(SHAPE, heads=2, kv_heads=1, head_size=64)
Generate = Callable[..., KVStrataError]


class Letters:
    """A tokenizer whose tokens are the bytes of a text."""

    eos_id = -1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def chat(self, prompt: str) -> str:
        return prompt


@pytest.fixture
def checkpoint() -> Checkpoint:
    return dataclasses.replace(random_checkpoint(MODEL), tokenizer=Letters())  # type: ignore[arg-type]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Checkpoint) -> Generate:
    """generate(*options): what `kvstrata generate` of a small model must end with."""
    monkeypatch.setattr("golden.llama.load_model", lambda _: checkpoint)
    monkeypatch.setenv("KVSTRATA_BUILD", str(tmp_path / "build"))

    def run(*options: str, prompt: str = "keys and values") -> KVStrataError:
        options = ("--device", "golden", "--context", "64", "--tokens", "2", *options)
        result = CliRunner().invoke(app, ["generate", "--prompt", prompt, *options])
        assert isinstance(result.exception, KVStrataError), result.output
        assert result.stdout == ""
        return result.exception

    return run


# --- images and sizes -------------------------------------------------------------------------------------
def test_images_that_do_not_serve(generate: Generate, machine: MakeMachine, checkpoint: Checkpoint) -> None:
    folder = machine(checkpoint, context=32).image.directory
    image = ("--image", str(folder))
    assert f"an image for context 64 is needed; {folder} was packed for 32" in str(generate(*image))
    same = (*image, "--context", "32")
    manifest = folder / "manifest.json"
    packed = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(packed) | {"source_sha256": "1" * 64}))
    assert "an image of the checkpoint 000000000000 is needed" in str(generate(*same))
    manifest.write_text(packed)
    channel = folder / "channel03.bin"
    channel.write_bytes(channel.read_bytes()[:-64])
    assert "channel03.bin of an image for this map has" in str(generate(*same))
    assert "an image directory holds a whole manifest.json" in str(generate("--image", str(folder.parent)))


def test_what_does_not_fit(
    generate: Generate, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def larger(**changes: int) -> Checkpoint:
        return dataclasses.replace(checkpoint, config=dataclasses.replace(MODEL, **changes))

    for model, context, sentence in (
        (
            larger(ffn=1 << 24),
            "64",
            "a channel holds 268435456 bytes; weights and a KV cache of 64 tokens take",
        ),
        (checkpoint, "100000", "the context must be 1 to the model's 128 tokens; got 100000"),
        (larger(context=1 << 17), "131072", "attention scores takes 32768 of 16384 words of the vb buffer"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("golden.llama.load_model", lambda _, model=model: model)
            assert sentence in str(generate("--context", context))
    too_long = "the context of 16 tokens; got 15 and 2"
    assert too_long in str(generate("--context", "16"))
    assert "fills its ring; got a window of 20 in a ring of 32" in str(
        generate("--policy", "lambda", "--window", "20")
    )


# --- devices that fail ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("sleep 9", "must answer a command within 0.2 s; 'set' is open"),
        ("exit 3", "simulation ended at 'set'"),
    ],
)
def test_an_engine_that_does_not_answer(
    generate: Generate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, sentence: str
) -> None:
    program = tmp_path / "mute"
    program.write_text(f"#!/bin/sh\nexec {script}\n" if "sleep" in script else f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr("sw_stack.rtl.engine.engine_program", lambda *_: program)
    monkeypatch.setattr("sw_stack.rtl.engine.ANSWER_SECONDS", 0.2)
    error = generate("--device", "rtl")
    assert isinstance(error, DeviceTimeout)
    assert sentence in str(error)


def test_a_device_that_computes_something_else(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(GoldenDevice):
        """One weight code of the second layer is another."""

        def __init__(self, image: Image) -> None:
            super().__init__(image)
            self.state.channels[2, image.map.matrices["layers.1.o"].base + 2, 7] ^= 0xFF

    monkeypatch.setattr(runtime, "GoldenDevice", Wrong)
    error = generate("--lockstep", prompt="abc")
    assert (
        "must compute the golden decoder's tensors; residual stream of layer 1 differs first at index"
        in str(error)
    )
    assert "lockstep needs placement engine, dense attention and one sequence; got placement 'csd'" in str(
        generate("--lockstep", "--placement", "csd")
    )
    assert "lockstep needs a device and one prompt; got golden and 2" in str(
        generate("--lockstep", "--also", "more")
    )


def test_lockstep_writes_what_the_device_alone_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    monkeypatch.setenv("KVSTRATA_BUILD", str(tmp_path / "build"))
    setup = runtime.Setup(context=64)
    beside, alone = (on_device(checkpoint, setup, "keys", 3, lockstep=both) for both in (True, False))
    beside.require_equal(alone)


def test_a_drive_that_does_not_answer(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Controller, "process", lambda self: 0)
    error = generate("--placement", "csd")
    assert isinstance(error, DeviceTimeout)
    assert "the drive must complete a command within 1000 polls" in str(error)


def test_a_completion_with_an_error_status(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise DriveError(0x1234)

    monkeypatch.setattr(GoldenUnit, "attend", fails)
    error = generate("--placement", "csd")
    assert type(error) is DriveError
    assert "the drive reported an internal error; got detail" in str(error)


def test_a_drive_that_fills_up(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "Geometry", lambda *_: Geometry(1, 1, 2, 1))
    error = generate("--placement", "csd", prompt="x" * 40)
    assert isinstance(error, DriveFull)
    assert "the drive has no erased block left" in str(error)


def test_a_page_that_cannot_be_read(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    read = FlashArray.read

    def failing(self: FlashArray, ppns: torch.Tensor) -> tuple:
        data, failed = read(self, ppns)
        return data, ~failed

    monkeypatch.setattr(FlashArray, "read", failing)
    error = generate("--placement", "engine+csd", "--window", "4", prompt="x" * 42)
    assert isinstance(error, UnrecoveredRead)
    assert "a page cannot be read and has no second copy" in str(error)


def test_other_sequences_and_the_devices_work_on(machine: MakeMachine) -> None:
    """Two sequences on one engine and one drive: a page of the second is lost, then its place is used again."""
    made = machine(MODEL, context=64)
    driver, controller = open_drive(Geometry(4, 2, 16, 32))
    driver.config(0, TaskShape(MODEL.layers, 2, 1, 64, 8, 64), 2)
    programs = compile_split(made.image.map, made.image.norm_exponents)
    device, golden = GoldenDevice(made.image), StorageDecoder(made.checkpoint)

    def sequence(batch: int) -> SplitSession:
        embedding = made.golden.matrices["embed"].weight
        return SplitSession(device, programs, embedding, placement=InStorage(driver, batch=batch))

    first, second, cache = sequence(0), sequence(1), golden.new_cache()
    ids = list(range(35))
    for session in (first, second):
        session.forward(ids)
    golden.forward(ids, cache, last_only=True)
    lost = controller.ftl.sequences[0, 1].map[PageKind.V_TOKEN, 1, 0, 0]
    controller.ftl.flash.unreadable[lost] = True
    with pytest.raises(UnrecoveredRead, match="a page cannot be read and has no second copy"):
        second.forward([7])
    assert torch.equal(first.forward([9]), golden.forward([9], cache)[0])
    driver.reclaim(0, batch=1, batches=1)
    again = golden.forward(ids[:9], golden.new_cache(), last_only=True)[0]
    assert torch.equal(sequence(1).forward(ids[:9]), again)
