"""A decoder layer of any shape with random weights and a full KV cache: golden device, RTL and prediction alike.

Weights and cache are drawn in their stored form, so that a Llama-2-7B-shaped layer costs a second and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from golden.config import DecoderConfig
from golden.formats.weights import QuantisedWeight, fitting_group
from golden.spec.engine import WORD_BYTES, EngineConfig, Op
from golden.spec.formats import VEC_FRAC, W8, WEIGHT_FORMATS, WeightFormat
from golden.spec.memory import MemoryModel
from sw_stack.compile.decoder import Programs, compile_model
from sw_stack.compile.memory import MemoryTiming
from sw_stack.compile.program import Program, step_registers
from sw_stack.compile.schedule import schedule
from sw_stack.device.protocol import EngineDevice, RunResult
from sw_stack.pack.image import Image, channel_file, pack_model
from sw_stack.pack.memory_map import MemoryMap
from sw_stack.rtl.matvec import random_codes


def llama_2_7b(layers: int = 1, vocab: int = 64, context: int = 1024) -> DecoderConfig:
    """The published shape, with as many layers, words and slots as a run needs."""
    return DecoderConfig(
        "llama-2-7b", layers, hidden=4096, heads=32, kv_heads=32, head_size=128, ffn=11008, vocab=vocab,
        context=context, rope_base=10000.0, norm_eps=1e-5,
    )  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """An image with a full cache, and its programs."""

    image: Image
    programs: Programs

    @property
    def map(self) -> MemoryMap:
        """Where everything lies."""
        return self.image.map

    @property
    def registers(self) -> dict[int, int]:
        """Of the decode step that fills the context."""
        return _registers(self.map, self.map.context - 1)

    @property
    def channel_words(self) -> int:
        """Words that the step's LOADs read from every channel."""
        return loaded_words(self.programs.programs["decode"], self.registers)

    def step(self, device: EngineDevice, hidden: np.ndarray) -> tuple[np.ndarray, RunResult]:
        """One token with the residual stream int32 Q16 [hidden] in and out."""
        result = self.run(device, "decode", self.map.context - 1, hidden[None])
        return np.asarray(device.read_vb(0, self.map.model.hidden)), result

    def run(self, device: EngineDevice, name: str, slot: int, hidden: np.ndarray) -> RunResult:
        """Program `name`, `decode` or `prefill`, over the tokens from `slot` on: int32 Q16 [tokens, hidden]."""
        program = self.programs.programs[name]
        device.write_aux(program.base, program.encoded())
        device.write_aux(self.map.regions["input"].at(0), hidden.astype("<i4").view(np.uint8).ravel())
        return device.run(program.word, _registers(self.map, slot, len(hidden)))


def random_layer(
    folder: Path, model: DecoderConfig, engine: EngineConfig, weights: str, seed: int = 1, chunk: int = 1
) -> Layer:
    """Draw, pack and compile, with a prefill of `chunk` tokens if several; KV4, the model's whole context in use."""
    rng = np.random.default_rng(seed)
    memory_map = MemoryMap(model, engine, weights, "kv4", model.context)

    def draw(name: str) -> QuantisedWeight:
        matrix = memory_map.matrices[name]
        fmt = fitting_group(W8, model.hidden) if name == "head" else WEIGHT_FORMATS[weights]
        return _random_weight(rng, matrix.rows, matrix.inner, fitting_group(fmt, matrix.inner))

    image = pack_model(folder, memory_map, draw, lambda _: torch.ones(model.hidden), "0" * 64)
    _fill_cache(image, rng)
    return Layer(image, compile_model(memory_map, image.norm_exponents, chunk))


def random_hidden(model: DecoderConfig, seed: int = 2) -> np.ndarray:
    """A residual stream of unit size in Q16."""
    return (np.random.default_rng(seed).standard_normal(model.hidden) * (1 << VEC_FRAC)).astype(np.int32)


def _random_weight(rng: np.random.Generator, rows: int, inner: int, fmt: WeightFormat) -> QuantisedWeight:
    """Products of unit size with unit activations."""
    scale = rng.uniform(0.5, 1.5, (rows, inner // fmt.group)) / (
        inner**0.5 * (fmt.code_max - fmt.code_min) / 4
    )
    scale = torch.from_numpy(scale.astype(np.float16).astype(np.float64))
    codes = torch.from_numpy(random_codes(rng, fmt, rows, inner))
    minimum = (-scale * ((fmt.code_max + fmt.code_min) // 2)).half().double() if fmt.asymmetric else None
    return QuantisedWeight(fmt, codes, scale, minimum, codes != 0 if fmt.sparse24 else None)


def _fill_cache(image: Image, rng: np.random.Generator) -> None:
    """Random codes in every KV word; scale records of unit-sized keys and values."""
    memory_map, layout = image.map, image.map.kv_layout
    start, end = memory_map.weight_words * WORD_BYTES, memory_map.channel_words * WORD_BYTES
    keys = range(memory_map.key_base(0, 0), memory_map.value_base(0, 0), layout.key_block_words)
    lanes = memory_map.engine.lanes_per_channel
    for channel in range(memory_map.engine.channels):
        file = np.memmap(image.directory / channel_file(channel), np.uint8, "r+")
        file[start:end] = rng.integers(0, 256, end - start, dtype=np.uint8)
        for word in keys:
            file[word * WORD_BYTES :][: 4 * lanes] = _records(rng, lanes)
        file.flush()
    aux = np.memmap(image.directory / "aux.bin", np.uint8, "r+")
    scales = memory_map.regions["value_scales"]
    aux[scales.base : scales.end] = _records(rng, (scales.end - scales.base) // 4)
    aux.flush()


def _records(rng: np.random.Generator, count: int) -> np.ndarray:
    """(scale, minimum) pairs as bytes."""
    scale = rng.uniform(0.1, 0.4, count)
    return np.stack([scale, -7.5 * scale], -1).astype("<f2").view(np.uint8).reshape(-1)


# --- what the bytes and the schedule say
def loaded_words(program: Program, registers: dict[int, int]) -> int:
    """Words per channel that a program's LOADs read."""
    total = 0
    for instruction in program.instructions:
        if instruction.op is Op.LOAD:
            count = instruction.values["count"] + registers.get(instruction.values.get("count_reg", 0), 0)
            total += count * instruction.values["runs"]
    return total


def _registers(memory_map: MemoryMap, slot: int, tokens: int = 1) -> dict[int, int]:
    return {int(r): v for r, v in step_registers(memory_map, slot, tokens).items()}


@dataclass(frozen=True)
class Predicted:
    """A decode step by the recurrences that the RTL is held to."""

    layer_cycles: int
    layer_words: int
    token_cycles: int

    @property
    def bound_ratio(self) -> float:
        """Cycles of a layer over the cycles in which the channels' ports could deliver its words."""
        return self.layer_cycles / self.layer_words


def predict(
    engine: EngineConfig, weights: str, model: DecoderConfig, model_layers: int, memory: MemoryModel
) -> Predicted:
    """Decode at the end of the context: a layer is what the second one adds; then all layers and the head."""
    timing, cycles, words = MemoryTiming.of(memory), [], []
    for layers in (1, 2):
        memory_map = MemoryMap(
            DecoderConfig(**{**vars(model), "layers": layers}), engine, weights, "kv4", model.context
        )
        programs = compile_model(memory_map, ((0, 1 << 20),) * (2 * layers + 1), 1)
        registers = _registers(memory_map, memory_map.context - 1)
        decode = programs.programs["decode"]
        cycles.append(schedule(decode, engine, registers, timing).cycles)
        words.append(loaded_words(decode, registers))
    head = schedule(programs.programs["head"], engine, registers, timing).cycles
    layer = cycles[1] - cycles[0]
    return Predicted(layer, words[1] - words[0], cycles[0] + (model_layers - 1) * layer + head)
