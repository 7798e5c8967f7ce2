"""A decoder as programs: decode, prefill and head, or the pieces of a placement whose attention is elsewhere.

One stream serves every sequence length: what grows with the context (slots, tiles, row blocks, addresses of the
new token) comes from scalar registers (`program.R`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from golden.spec import KVStrataError
from sw_stack.compile.builder import Instruction
from sw_stack.compile.emitter import Exponents
from sw_stack.compile.head import head_program
from sw_stack.compile.layers import LayerEmitter, Layers
from sw_stack.compile.program import Program
from sw_stack.pack.memory_map import CHUNK_TOKENS, PROGRAM_BYTES, MemoryMap


@dataclass(frozen=True)
class Programs:
    """The programs of a model behind each other in the program region: one pass per chunk size, and the head."""

    map: MemoryMap
    programs: dict[str, Program]
    chunk: int
    """Tokens of a full prefill pass."""

    @property
    def size_bytes(self) -> int:
        """Instruction bytes in all."""
        return sum(p.size_bytes for p in self.programs.values())


def _cut(
    memory_map: MemoryMap,
    norms: Exponents,
    tokens: int,
    name: str,
    begin: Callable[[LayerEmitter, int], None],
) -> Programs:
    """Programs `{name}{i}` that end layer i - 1 (from `mixed` in memory) and begin layer i; the residual stream stays
    on chip between them. And the head."""
    streams: dict[str, tuple[int, list[Instruction]]] = {}
    for i in range(memory_map.model.layers + 1):
        emitter = LayerEmitter(memory_map, norms, tokens)
        if i:
            mixed = memory_map.regions["mixed"]
            width = memory_map.model.heads * memory_map.model.head_size
            emitter.read(f"layer {i - 1} attention output", mixed, emitter.at.mixed, width)
            emitter.after_attention(i - 1)
        else:
            emitter.read_inputs()
        if i < memory_map.model.layers:
            if i:
                emitter.read_rope()
            begin(emitter, i)
        streams[f"{name}{i}"] = (tokens, emitter.builder.finish())
    streams["head"] = (0, head_program(memory_map, norms, tokens))
    return placed(memory_map, streams, tokens)


def compile_split(memory_map: MemoryMap, norms: Exponents, tokens: int = 1) -> Programs:
    """Programs for attention elsewhere: `split{i}` leaves q, k and v of layer i, rotated, in memory."""

    def begin(emitter: LayerEmitter, layer: int) -> None:
        emitter.before_attention(layer)
        emitter.write_qkv(layer)

    return _cut(memory_map, norms, tokens, "split", begin)


def compile_shares(memory_map: MemoryMap, norms: Exponents) -> Programs:
    """Programs for attention split between engine and drive, over a map with the split's ring: `share{i}` leaves q, k
    and v of layer i in memory, and the engine's share of its attention."""
    return _cut(memory_map, norms, 1, "share", LayerEmitter.share)


def check_fits(memory_map: MemoryMap) -> None:
    """KVStrataError when not even one token at a time, of a batch one of each sequence, fits the chip's buffers: to
    know before a model is packed."""
    LayerEmitter(memory_map, (), memory_map.sequences, together=int(memory_map.sequences > 1))


def _compile_ring(memory_map: MemoryMap, norms: Exponents) -> Programs:
    """One token at a time through a Lambda window's ring; `sinks` is `decode` for the tokens that are sinks."""
    streams = {"decode": (1, Layers(memory_map, norms, 1).build())}
    if memory_map.sink_slots:
        streams["sinks"] = (1, Layers(memory_map, norms, 1, sinks=True).build())
    streams["head"] = (0, head_program(memory_map, norms, 1))
    return placed(memory_map, streams, 1)


def compile_model(memory_map: MemoryMap, norms: Exponents, chunk: int | None = None) -> Programs:
    """Decode, prefill and head programs; over a Lambda window's ring decode alone, since each token takes the place of
    another.

    The prefill chunk is the greatest power of two up to the engine's tokens whose programs fit the chip and the
    program region, unless `chunk` fixes it. KVStrataError when not even one token at a time fits.
    """
    if memory_map.ring is not None:
        return _compile_ring(memory_map, norms)
    decode = Layers(memory_map, norms, 1).build()
    candidates = [chunk] if chunk else [2**i for i in range(CHUNK_TOKENS.bit_length() - 1, -1, -1)]
    error: KVStrataError | None = None
    for tokens in candidates:
        if tokens > memory_map.engine.tokens and chunk is None:
            continue
        try:
            streams = {"decode": (1, decode)}
            if tokens > 1:
                streams["prefill"] = (tokens, Layers(memory_map, norms, tokens).build())
            streams["head"] = (0, head_program(memory_map, norms, tokens))
            return placed(memory_map, streams, tokens)
        except KVStrataError as refused:
            error = refused
    assert error is not None
    raise error


def placed(memory_map: MemoryMap, streams: dict[str, tuple[int, list[Instruction]]], chunk: int) -> Programs:
    """Streams, with their tokens, behind each other in the program region; KVStrataError when it is too small."""
    programs: dict[str, Program] = {}
    base = memory_map.regions["program"].base
    for name, (tokens, instructions) in streams.items():
        programs[name] = Program(name, tokens, base, tuple(instructions))
        base += -(-programs[name].size_bytes // 64) * 64
    if base > PROGRAM_BYTES:
        raise KVStrataError(f"instructions have {PROGRAM_BYTES} bytes; passes of {chunk} tokens take {base}")
    return Programs(memory_map, programs, chunk)
