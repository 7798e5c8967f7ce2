"""A batch on the engine: one token of each of B sequences per step.

The sequences' tokens are the vectors of one product, so every weight streams once for all of them; attention is one
sequence's at a time, from a cache of its own. A step is a chain of programs on the same buffers: `batch{i}` ends layer
i - 1 and begins layer i for all, `attend{i}.{s}` rotates, stores and attends for sequence s with its registers.
A sequence without a token takes no part: its attention is not run, and its vectors are never looked at.
"""

from __future__ import annotations

from golden.spec import KVStrataError
from golden.spec.engine import Op
from sw_stack.compile.builder import Instruction
from sw_stack.compile.decoder import Programs, placed
from sw_stack.compile.emitter import Exponents
from sw_stack.compile.head import head_program
from sw_stack.compile.layers import LayerEmitter
from sw_stack.compile.program import R
from sw_stack.pack.memory_map import MemoryMap


class BatchEmitter(LayerEmitter):
    """Shared halves of a layer over all sequences' vectors, and attention of one."""

    def __init__(self, memory_map: MemoryMap, norms: Exponents) -> None:
        super().__init__(memory_map, norms, memory_map.sequences, together=1)

    def begin(self, layer: int) -> None:
        """Norm, q, k and v of every sequence."""
        self._enter(layer)
        self._key_product(layer)
        self._value(layer)
        self._query_product(layer, range(self.model.kv_heads))

    def attend(self, layer: int, sequence: int) -> None:
        """Rotation, cache and attention of one sequence."""
        heads = range(self.model.kv_heads)
        self.sequence, self.rows = sequence, range(sequence, sequence + 1)
        self._read_row()
        self._append(layer, "v", heads)
        self._turn_key(layer)
        self._append(layer, "k", heads)
        self._read_value_scales(layer, heads)
        self._turn(heads, f"layer {layer} q")
        self._attention(layer, sequence, 1)

    def read_rope(self) -> None:
        """Positions differ: each sequence reads its own row when it attends."""

    def _read_row(self) -> None:
        if not self.model.rotates:
            return
        rope, row = self.at.rope, self.sequence
        self.builder.emit(
            Op.READ, "rope row", writes=[rope.span(first=row, count=1)], addr=self.map.regions["rope"].base,
            addr_reg=R.ROPE_BYTES, count=self.head_words, vectors=1, dst=rope.at(row),
        )  # fmt: skip

    def _append(self, layer: int, kind: str, heads: range) -> None:
        block = self.at.k if kind == "k" else self.at.v
        self._kv_quantise(layer, kind, block, heads.start, len(heads), self.head_words, self.sequence)
        for head in heads:
            self._append_head(layer, kind, head)

    def _slots(self, token: int) -> dict[str, int]:
        """The sequence's own slots: where its vector lies says nothing about its position."""
        return super()._slots(0)


def compile_batch(memory_map: MemoryMap, norms: Exponents) -> Programs:
    """Programs of a step of all sequences of the map, and `head`, whose logits are those of every sequence.

    KVStrataError for a map of one sequence, and when the programs or the vectors do not fit.
    """
    sequences, layers = memory_map.sequences, memory_map.model.layers
    if sequences < 2:
        raise KVStrataError(f"a batch has at least 2 sequences; got {sequences}")
    streams: dict[str, tuple[int, list[Instruction]]] = {}
    for i in range(layers + 1):
        emitter = BatchEmitter(memory_map, norms)
        if i:
            emitter.after_attention(i - 1)
        else:
            emitter.read_inputs()
        if i < layers:
            emitter.begin(i)
        streams[f"batch{i}"] = (sequences, emitter.builder.finish())
        for s in range(sequences if i < layers else 0):
            emitter = BatchEmitter(memory_map, norms)
            emitter.attend(i, s)
            streams[f"attend{i}.{s}"] = (1, emitter.builder.finish())
    streams["head"] = (0, head_program(memory_map, norms, sequences, sequences))
    return placed(memory_map, streams, 1)
