"""Where everything lies: matrices and KV in the weight channels, tables and records in auxiliary memory.

A map follows from sizes alone (model shape, engine configuration, formats, context), so the packer, the compiler
and the runtime compute the same one and a manifest only has to prove that the bytes agree with it. Channel addresses
are 64-byte words, the same in every channel; auxiliary addresses are bytes. docs/memory-map.md draws it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property

from golden.config import DecoderConfig
from golden.engine_form import BIASED
from golden.formats.weights import fitting_group
from golden.spec import SPEC_VERSION, KVStrataError
from golden.spec.engine import STEP, WORD_BYTES, EngineConfig, KVLayout, StreamFormat, weight_stream
from golden.spec.formats import ATTN_TILE, KV_FORMATS, W8, WEIGHT_FORMATS, KVFormat, WeightFormat
from golden.spec.memory import CHANNEL_BYTES
from sw_stack.pack.ring import KVRing
from sw_stack.pack.stream import matrix_words

PROGRAM_BYTES = 1 << 20
"""Room for instructions at the start of auxiliary memory."""
PAGE_BYTES = 4096
"""Regions start on AXI burst boundaries."""
CHUNK_TOKENS = 16
"""Most tokens of one prefill pass, whose inputs have room in auxiliary memory."""
PRODUCTS = ("k", "v", "q", "o", "gate", "up", "down")
"""A layer's matrices in the order in which they stream, as far as the model has them. k and v come first, so that they
are quantised and appended while q is computed."""


@dataclass(frozen=True)
class Matrix:
    """One product's weights, the tensor `name`: `rows` rows, `inner` wide."""

    name: str
    rows: int
    inner: int
    format: WeightFormat
    base: int
    """First word in every channel."""
    words: int
    """Words per channel."""

    @property
    def stream(self) -> StreamFormat:
        """How the array reads it."""
        return weight_stream(self.format.name, self.format.group)


@dataclass(frozen=True)
class Region:
    """A range of auxiliary bytes of `count` records, `stride` bytes apart."""

    name: str
    base: int
    stride: int
    count: int

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.base + self.stride * self.count

    def at(self, index: int) -> int:
        """Address of record `index`; KVStrataError outside the region."""
        if not 0 <= index < self.count:
            raise KVStrataError(f"region {self.name} has {self.count} records; got index {index}")
        return self.base + self.stride * index


@dataclass(frozen=True)
class MemoryMap:
    """The map of one model on one engine. `slots` is the context rounded up to whole attention tiles, or what a
    `ring` keeps of it."""

    model: DecoderConfig
    engine: EngineConfig
    weights: str
    kv: str
    context: int
    ring: KVRing | None = None
    sequences: int = 1
    """Sequences of a batch, each with a KV cache of its own; 1: no batch."""

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.weights, WEIGHT_FORMATS, "weight format"),
            (self.kv, KV_FORMATS, "KV format"),
        ):
            if value not in known:
                raise KVStrataError(f"a {what} is one of {sorted(known)}; got {value!r}")
        if not 1 <= self.context <= self.model.context:
            raise KVStrataError(
                f"the context must be 1 to the model's {self.model.context} tokens; got {self.context}"
            )
        most = min(self.engine.tokens, CHUNK_TOKENS)
        if not 1 <= self.sequences <= (1 if self.ring else most):
            raise KVStrataError(
                f"a batch has 1 to {most} sequences on {self.engine.name}, and 1 over a ring; got {self.sequences}"
            )
        if self.model.norm != "rms":
            raise KVStrataError(
                f"the engine has RMSNorm and runs a model's engine form; got norm {self.model.norm}"
            )
        if self.model.head_size % STEP or self.model.hidden % STEP or self.model.ffn % STEP:
            raise KVStrataError(
                f"widths must be multiples of {STEP}; got hidden {self.model.hidden}, ffn {self.model.ffn}, "
                f"head size {self.model.head_size}"
            )
        if self.channel_words * WORD_BYTES > CHANNEL_BYTES:
            raise KVStrataError(
                f"a channel holds {CHANNEL_BYTES} bytes; weights and a KV cache of {self.context} tokens take "
                f"{self.channel_words * WORD_BYTES} on {self.engine.channels} channels"
            )

    @property
    def slots(self) -> int:
        """Token slots of the KV cache."""
        return self.sink_slots + self._ring_slots

    @property
    def sink_slots(self) -> int:
        """Slots in front of the others that hold the sinks of a Lambda window again."""
        return self.ring.sink_slots if self.ring else 0

    @property
    def _ring_slots(self) -> int:
        return _tiles(self.ring.ring_slots(self.context) if self.ring else self.context)

    @property
    def rope_rows(self) -> int:
        """Rows of the RoPE table: a position each, up to a Lambda window's limit distance."""
        return _tiles(max(self.context, self.ring.limit + 1 if self.ring else 0))

    @property
    def kv_format(self) -> KVFormat:
        """The KV format."""
        return KV_FORMATS[self.kv]

    @cached_property
    def kv_layout(self) -> KVLayout:
        """Positions inside a KV region."""
        return KVLayout(self.engine, self.kv_format.bits, self.model.head_size, self.slots)

    # --- channels
    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Every product by name (`layers.{i}.{k,v,q,o,gate,up,down}`, `head`), in address order."""
        found: dict[str, Matrix] = {}
        base = 0
        for name, rows, inner, fmt in self._products():
            words = matrix_words(self.engine, weight_stream(fmt.name, fmt.group), rows, inner)
            found[name] = Matrix(name, rows, inner, fmt, base, words)
            base += words
        return found

    def _products(self) -> Iterator[tuple[str, int, int, WeightFormat]]:
        shapes = self.model.linear_shapes()
        for layer in range(self.model.layers):
            for name in (n for n in PRODUCTS if n in shapes):
                rows, inner = shapes[name]
                yield (
                    f"layers.{layer}.{name}",
                    rows,
                    inner,
                    fitting_group(WEIGHT_FORMATS[self.weights], inner),
                )
        yield "head", self.model.vocab, self.model.hidden, fitting_group(W8, self.model.hidden)

    @property
    def weight_words(self) -> int:
        """Words per channel of all weights."""
        last = list(self.matrices.values())[-1]
        return last.base + last.words

    @property
    def value_groups(self) -> int:
        """Groups of KV heads whose values share row blocks."""
        return -(-self.model.kv_heads // self.kv_layout.heads_per_block)

    @property
    def sink_key_words(self) -> int:
        """Words per channel of a KV head's sink keys: row blocks of their own, since other queries meet them."""
        return -(-self.sink_slots // self.engine.lanes) * self.kv_layout.key_block_words

    @property
    def key_words(self) -> int:
        """Words per channel of the keys of one KV head, the sinks' first."""
        return (
            self.sink_key_words + -(-self._ring_slots // self.engine.lanes) * self.kv_layout.key_block_words
        )

    @property
    def score_words(self) -> int:
        """VB words that the scores of one query take."""
        behind = self.sink_slots // self.engine.vector_lanes + self.row_words(self._ring_slots)
        return max(self.row_words(self.sink_slots), behind)

    @property
    def layer_kv_words(self) -> int:
        """Words per channel of one layer's KV cache."""
        layout = self.kv_layout
        return self.model.kv_heads * self.key_words + self.value_groups * layout.value_words

    def key_base(self, layer: int, head: int, sequence: int = 0) -> int:
        """Channel word of the keys of one KV head."""
        return self._kv_base(layer, sequence) + head * self.key_words

    def value_base(self, layer: int, group: int, sequence: int = 0) -> int:
        """Channel word of the values of one group of KV heads."""
        keys = self.model.kv_heads * self.key_words
        return self._kv_base(layer, sequence) + keys + group * self.kv_layout.value_words

    def _kv_base(self, layer: int, sequence: int) -> int:
        """One sequence's cache lies behind the other's, layer by layer."""
        return self.weight_words + (sequence * self.model.layers + layer) * self.layer_kv_words

    @property
    def channel_words(self) -> int:
        """Words of each channel's image, KV caches included."""
        return self.weight_words + self.sequences * self.model.layers * self.layer_kv_words

    # --- auxiliary memory
    @property
    def vb_word_bytes(self) -> int:
        """Bytes of a VB word in memory."""
        return 4 * self.engine.vector_lanes

    @cached_property
    def regions(self) -> dict[str, Region]:
        """Auxiliary regions by name, in address order."""
        m = self.model
        sizes = (
            ("program", PROGRAM_BYTES, 1),
            ("norms", 4 * m.hidden, 2 * m.layers + 1),
            *((f"{name}_bias", 4 * width, count) for name, width, count in self._biases()),
            ("zeros", 4 * m.group * m.head_size, 1),
            *((("rope", 4 * m.head_size, self.rope_rows),) if m.rotates else ()),
            ("value_scales", 4 * self.slots, self.sequences * m.layers * m.kv_heads),
            ("input", 4 * m.hidden, CHUNK_TOKENS),
            ("qkv", 4 * (m.heads + 2 * m.kv_heads) * m.head_size, CHUNK_TOKENS),
            ("mixed", 4 * m.heads * m.head_size, CHUNK_TOKENS),
            *((("states", self.vb_word_bytes, m.heads),) if self.ring and not self.ring.limit else ()),
            ("logits", 4 * m.vocab, self.sequences),
        )
        found: dict[str, Region] = {}
        base = 0
        for name, size, count in sizes:
            stride = -(-size // WORD_BYTES) * WORD_BYTES
            found[name] = Region(name, base, stride, count)
            base = -(-found[name].end // PAGE_BYTES) * PAGE_BYTES
        return found

    def _biases(self) -> Iterator[tuple[str, int, int]]:
        """(name, elements, records) of the biases of an engine form: a record per layer, one of the final norm."""
        if not self.model.biases:
            return
        shapes = self.model.linear_shapes()
        for name in BIASED:
            yield name, shapes[name][0], self.model.layers
        yield "norm", self.model.hidden, 1

    @property
    def aux_bytes(self) -> int:
        """Size of the auxiliary image."""
        return -(-self.regions["logits"].end // PAGE_BYTES) * PAGE_BYTES

    def value_scales(self, layer: int, head: int, sequence: int = 0) -> int:
        """Auxiliary address of slot 0's V scale record of one KV head."""
        row = (sequence * self.model.layers + layer) * self.model.kv_heads + head
        return self.regions["value_scales"].at(row)

    def row_words(self, rows: int) -> int:
        """VB words of a product of `rows` rows: whole row blocks, because the array drains those."""
        return -(-rows // self.engine.lanes) * self.engine.lanes // self.engine.vector_lanes

    # --- identity
    def to_json(self) -> dict[str, object]:
        """What a manifest stores to prove that an image was made for this map."""
        return {
            "spec_version": SPEC_VERSION,
            "model": asdict(self.model),
            "engine": asdict(self.engine),
            "weights": self.weights,
            "kv": self.kv,
            "context": self.context,
            "ring": asdict(self.ring) if self.ring else None,
            "sequences": self.sequences,
        }

    @classmethod
    def from_json(cls, stored: dict[str, object]) -> MemoryMap:
        """Inverse of `to_json`; KVStrataError for another spec version or fields that do not fit."""
        if stored.get("spec_version") != SPEC_VERSION:
            raise KVStrataError(
                f"an image is of spec version {SPEC_VERSION!r}; got {stored.get('spec_version')!r}: pack it again"
            )
        try:
            model = DecoderConfig(**stored["model"])  # type: ignore[arg-type]
            engine = EngineConfig(**stored["engine"])  # type: ignore[arg-type]
            ring = KVRing(**stored["ring"]) if stored.get("ring") else None  # type: ignore[arg-type]
            sizes = (stored["weights"], stored["kv"], stored["context"])
            return cls(model, engine, *sizes, ring, stored["sequences"])  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise KVStrataError(
                f"a manifest describes a model and an engine; got {json.dumps(stored)[:120]}"
            ) from error


def _tiles(slots: int) -> int:
    return -(-slots // ATTN_TILE) * ATTN_TILE
