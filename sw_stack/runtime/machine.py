"""From a checkpoint to a session on a device: pack (or reuse an image), compile, open the device, place attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from golden import ops
from golden.engine_form import engine_form
from golden.exact_decoder import ExactDecoder, engine_weight
from golden.formats.weights import fitting_group
from golden.lambda_window import LambdaWindow
from golden.loaders.checkpoint import Checkpoint
from golden.spec import SPEC_VERSION, KVStrataError
from golden.spec.engine import ENGINE_CONFIGS
from golden.spec.formats import W8
from golden.spec.memory import MemoryModel
from golden.storage.decoder import Sparsity, Split
from hw.flow.cache import build_dir, content_key
from sw_stack.compile.batch import compile_batch
from sw_stack.compile.decoder import Programs, check_fits, compile_model, compile_shares, compile_split
from sw_stack.device.golden import GoldenDevice
from sw_stack.device.protocol import EngineDevice
from sw_stack.drive.attention import AttentionUnit
from sw_stack.drive.driver import Driver, open_drive
from sw_stack.drive.flash import Geometry
from sw_stack.drive.shape import TaskShape
from sw_stack.pack.image import Image, pack_checkpoint
from sw_stack.pack.memory_map import MemoryMap
from sw_stack.pack.ring import KVRing
from sw_stack.runtime.batch import BatchSession
from sw_stack.runtime.lockstep import Lockstep
from sw_stack.runtime.placement import PLACEMENTS, InStorage, WindowAndStorage
from sw_stack.runtime.session import Session, SharedSession, SplitSession

DEVICES = ("golden", "rtl", "timing")
CHANNELS_PER_PAGE = 8
RTL_FLASH_CHANNELS = 2
"""Flash channels of the simulated unit: results do not depend on them, build time does."""


@dataclass(frozen=True)
class Setup:
    """What a run is made of; KVStrataError for a name that is not known."""

    engine: str = "small"
    device: str = "golden"
    placement: str = "engine"
    weights: str = "w4"
    kv: str = "kv4"
    context: int = 512
    sparsity: Sparsity | None = None
    split: Split = Split()
    window: LambdaWindow | None = None
    """Lambda attention on the engine; None: dense."""
    memory: str = "hbm"
    """Memory of a device with time: hbm, random (up to 120 cycles, one transfer in five idle), or a fixed latency."""
    sequences: int = 1
    """Sequences that go through the engine together."""

    def __post_init__(self) -> None:
        memory_model(self.memory)
        if self.sequences > 1 and (self.placement != "engine" or self.window):
            raise KVStrataError(
                f"a batch needs placement engine and dense attention; got {self.sequences} sequences with placement "
                f"{self.placement!r}"
            )
        for value, known, what in (
            (self.engine, ENGINE_CONFIGS, "an engine"),
            (self.device, DEVICES, "a device"),
            (self.placement, PLACEMENTS, "a placement"),
        ):
            if value not in known:
                raise KVStrataError(f"{what} is one of {', '.join(known)}; got {value!r}")
        if self.sparsity and self.placement == "engine":
            raise KVStrataError(f"sparse attention needs placement csd or engine+csd; got {self.placement!r}")
        if self.window and self.placement != "engine":
            raise KVStrataError(f"a Lambda window needs placement engine; got {self.placement!r}")


def memory_model(name: str) -> MemoryModel:
    """A memory by the name that `Setup` takes; KVStrataError for another."""
    if name == "hbm":
        return MemoryModel()
    if name == "random":
        return MemoryModel("random", latency_cycles=120, stall_percent=20)
    if not name.isdecimal():
        raise KVStrataError(f"a memory is hbm, random or a fixed latency in cycles; got {name!r}")
    return MemoryModel("fixed", latency_cycles=int(name))


def memory_map(checkpoint: Checkpoint, setup: Setup) -> MemoryMap:
    """The map of a checkpoint's engine form under a setup."""
    ring = KVRing.of_lambda(setup.window) if setup.window else None
    if setup.placement == "engine+csd":
        ring = KVRing.of_split(setup.split)
    model, engine = replace(checkpoint.config, norm="rms"), ENGINE_CONFIGS[setup.engine]
    return MemoryMap(model, engine, setup.weights, setup.kv, setup.context, ring, setup.sequences)


def cached_image(
    checkpoint: Checkpoint, wanted: MemoryMap, progress: Callable[[str], None] = lambda _: None
) -> Image:
    """The image of a checkpoint in the build directory, packed when it is not there or not whole."""
    key = content_key(SPEC_VERSION, checkpoint.sha256, str(wanted.to_json()))
    folder = build_dir() / "images" / key
    if folder.is_dir():
        try:
            image = Image.open(folder)
            image.require(wanted)
            return image
        except KVStrataError:
            progress("packing again")
    return pack_checkpoint(folder, wanted, checkpoint, progress)


def given_image(directory: Path, checkpoint: Checkpoint, wanted: MemoryMap) -> Image:
    """The image of a directory; KVStrataError when it is not of this checkpoint and map."""
    image = Image.open(directory)
    image.require(wanted)
    if image.source_sha256 != checkpoint.sha256:
        raise KVStrataError(
            f"an image of the checkpoint {checkpoint.sha256[:12]} is needed; {directory} was packed from "
            f"{image.source_sha256[:12]}"
        )
    return image


def programs(image: Image, setup: Setup) -> Programs:
    """Compiled for the placement, or for a batch."""
    build = {"engine": compile_model, "csd": compile_split, "engine+csd": compile_shares}[setup.placement]
    if setup.sequences > 1:
        build = compile_batch
    return build(image.map, image.norm_exponents)


def open_device(image: Image, setup: Setup) -> EngineDevice:
    """A device over an image."""
    if setup.device == "rtl":
        from sw_stack.device.rtl import RtlDevice

        return RtlDevice(image, memory_model(setup.memory))
    if setup.device == "timing":
        from sw_stack.compile.memory import MemoryTiming
        from sw_stack.device.timing import TimingDevice

        return TimingDevice(image, MemoryTiming.of(memory_model(setup.memory)))
    return GoldenDevice(image)


def open_drive_for(checkpoint: Checkpoint, setup: Setup) -> Driver:
    """A drive large enough for the context, with its task open."""
    c = checkpoint.config
    shape = TaskShape(c.layers, c.heads, c.kv_heads, c.head_size, CHANNELS_PER_PAGE, setup.context)
    pages = 2 * 3 * c.layers * c.kv_heads * shape.groups
    channels = RTL_FLASH_CHANNELS if setup.device == "rtl" else 8
    geometry = Geometry(channels, 2, max(4, -(-pages // (channels * 2 * 64))), 64)
    driver, _ = open_drive(geometry, unit=_unit(setup, c.group))
    driver.config(0, shape, 1)
    return driver


def _unit(setup: Setup, queries: int) -> AttentionUnit | None:
    """The unit behind the drive's firmware: the RTL for device rtl, else the drive's own golden one."""
    if setup.device != "rtl":
        return None
    from sw_stack.drive.rtl_unit import RtlUnit
    from sw_stack.rtl.storage import UnitConfig

    return RtlUnit(UnitConfig(RTL_FLASH_CHANNELS, queries, max(1024, 1 << (setup.context - 1).bit_length())))


def _image(
    checkpoint: Checkpoint, setup: Setup, progress: Callable[[str], None], directory: Path | None
) -> Image:
    wanted = memory_map(checkpoint, setup)
    check_fits(wanted)
    if directory:
        return given_image(directory, checkpoint, wanted)
    return cached_image(checkpoint, wanted, progress)


def open_lockstep(
    checkpoint: Checkpoint,
    setup: Setup,
    progress: Callable[[str], None] = lambda _: None,
    directory: Path | None = None,
) -> Lockstep:
    """A new sequence as `open_session` opens it, beside the golden decoder.

    KVStrataError for anything but one sequence with dense attention on the engine.
    """
    if setup.placement != "engine" or setup.window or setup.sequences > 1:
        raise KVStrataError(
            f"lockstep needs placement engine, dense attention and one sequence; got placement {setup.placement!r}, "
            f"{'a window' if setup.window else 'no window'}, {setup.sequences} sequences"
        )
    session = open_session(checkpoint, setup, progress, directory)
    image = _image(engine_form(checkpoint), setup, progress, directory)
    return Lockstep(session, ExactDecoder(checkpoint, setup.weights, setup.kv), image.norm_exponents)


def open_session(
    checkpoint: Checkpoint,
    setup: Setup,
    progress: Callable[[str], None] = lambda _: None,
    directory: Path | None = None,
) -> Session:
    """A new sequence (of a setup with several a `BatchSession`), ready for its first tokens, on the images of a
    `directory` (none: packed where needed).

    KVStrataError when the directory holds images of another model or for another setup.
    """
    checkpoint = engine_form(checkpoint)
    progress("packing")
    image = _image(checkpoint, setup, progress, directory)
    progress("compiling")
    compiled = programs(image, setup)
    progress(f"opening the {setup.device} device")
    device = open_device(image, setup)
    embedding = engine_weight(checkpoint, "embed", fitting_group(W8, checkpoint.config.hidden))
    positions = None if checkpoint.config.rotates else ops.to_q16(checkpoint.float32("positions"))
    if setup.sequences > 1:
        return BatchSession(device, compiled, embedding, positions)
    if setup.placement == "engine":
        return Session(device, compiled, embedding, positions)
    driver = open_drive_for(checkpoint, setup)
    if setup.placement == "csd":
        return SplitSession(
            device, compiled, embedding, positions, placement=InStorage(driver, setup.sparsity)
        )
    older = WindowAndStorage(driver, setup.split, setup.sparsity)
    return SharedSession(device, compiled, embedding, positions, older=older)
