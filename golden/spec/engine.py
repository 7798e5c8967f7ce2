"""The engine's contract: configurations, memory images, instruction set and registers.

docs/engine.md is the prose and the pictures. Everything a packer, a compiler, a driver or an RTL block needs to
agree on is a value in this file. Words are 64 bytes (one AXI beat of a channel) unless a name says otherwise; a
"VB word" is `vector_lanes` Q16 elements of the vector buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from . import KVStrataError

WORD_BYTES = 64
"""One beat of every memory port: a 512-bit AXI4 data bus."""
WORD_BITS = 8 * WORD_BYTES
STEP = 32
"""Multiplier positions of a lane: inner elements per dense step, kept weights per 2:4 step."""
SPARSE_STEP = 64
"""Original inner elements per 2:4 step."""
W8_OFFSET = 128
"""W8 codes are stored plus this, so that every stored field is unsigned; the array subtracts it again."""
VB_BANKS = 4
"""The vector buffer's equal banks, chosen by the top two address bits; each does one read and one write a cycle."""
SIDE_BITS = 64
"""Sidecar of a 32-element activation group."""
TURN_BITS = 4
"""Field `turn` of APPEND_K and MATRIX."""


@dataclass(frozen=True)
class EngineConfig:
    """Size of an engine. The same source elaborates for each; only these numbers differ."""

    name: str
    channels: int
    """Weight channels: one 64-byte AXI port each, feeding `lanes_per_channel` lanes."""
    lanes_per_channel: int
    """Output rows computed side by side from one channel; even, because two rows share a multiplier."""
    vector_lanes: int
    """Elements per VB word, and outputs drained per cycle."""
    tokens: int
    """Activation vectors that pass while a weight step is held (accumulators per lane and bank)."""
    act_words: int
    """64-byte words of the A8 activation buffer."""
    vb_words: int
    """VB words of the vector buffer, all banks."""
    table_entries: int
    """Entries of the output scale table."""
    fifo_words: int
    """Prefetch FIFO of each channel, in 64-byte words."""
    clock_mhz: float = 225.0

    def __post_init__(self) -> None:
        if self.lanes_per_channel % 2 or not 2 <= self.lanes_per_channel <= 8:
            raise ValueError(f"lanes_per_channel must be 2, 4, 6 or 8, not {self.lanes_per_channel}")
        if WORD_BITS % (self.lanes_per_channel * STEP * 2):
            raise ValueError(
                f"lanes_per_channel must divide a word of W2 codes, not {self.lanes_per_channel}"
            )
        if self.lanes % self.vector_lanes:
            raise ValueError(f"lanes ({self.lanes}) must be a multiple of vector_lanes ({self.vector_lanes})")
        if STEP % self.vector_lanes:
            raise ValueError(f"vector_lanes must divide {STEP}, not {self.vector_lanes}")

    @property
    def lanes(self) -> int:
        """Output rows computed side by side: one row block."""
        return self.channels * self.lanes_per_channel

    @property
    def turns(self) -> int:
        """Orders of a row block's groups of `vector_lanes` rows: with turn t, group g is at group g XOR t's place."""
        groups = self.lanes // self.vector_lanes
        return min(groups & -groups, 1 << TURN_BITS)

    @property
    def macs_per_cycle(self) -> int:
        """Multiply-accumulates per cycle at full rate (kept weights for 2:4)."""
        return self.lanes * STEP

    @property
    def port_bytes_per_cycle(self) -> int:
        """Bytes per cycle of all weight channels."""
        return self.channels * WORD_BYTES


TINY = EngineConfig("tiny", 2, 4, 8, 16, 256, 2048, 64, 64)
"""8 lanes, 256 MAC/cycle, 128 byte/cycle: unit tests in seconds."""
SMALL = EngineConfig("small", 16, 2, 16, 16, 2048, 16384, 64, 128)
"""32 lanes, 1,024 MAC/cycle, 1,024 byte/cycle: W4 is bound by the multipliers, not by memory."""
U280 = EngineConfig("u280", 32, 8, 16, 16, 8192, 65536, 128, 1024)
"""256 lanes, 8,192 MAC/cycle, 2,048 byte/cycle at 225 MHz (32 HBM pseudo-channels, 2:1 width conversion outside)."""
ENGINE_CONFIGS: dict[str, EngineConfig] = {c.name: c for c in (TINY, SMALL, U280)}


# --- weight stream ----------------------------------------------------------------------------------
class Codes(IntEnum):
    """Code field of a weight stream."""

    U8 = 0
    U4 = 1
    U2 = 2
    S24 = 3

    @property
    def bits(self) -> int:
        """Stored bits per multiplier position, patterns apart."""
        return (8, 4, 2, 2)[self]

    @property
    def step(self) -> int:
        """Original inner elements per step."""
        return SPARSE_STEP if self is Codes.S24 else STEP


@dataclass(frozen=True)
class StreamFormat:
    """How a matrix lies in the channels.

    Every row block (`lanes` rows) starts afresh: for step i = 0, 1, ... of the block a channel's word stream holds
    1. if `scaled` and i % scale_period == 0: one scale word,
    2. if 2:4 and i % pattern_period == 0: three pattern words (bit planes 0, 1, 2),
    3. if i % steps_per_word == 0: one code word (or words_per_step words each step).
    """

    codes: Codes
    scaled: bool
    """fp16 scale per row and group in the stream (False for V, whose scale comes with the probabilities)."""
    minimum: bool
    """fp16 minimum beside each scale."""
    offset: bool
    """Stored codes are code + W8_OFFSET."""
    group_steps: int
    """Steps per scale group."""

    def words_per_step(self, config: EngineConfig) -> int:
        """Code words per step, at least 1."""
        return max(1, config.lanes_per_channel * STEP * self.codes.bits // WORD_BITS)

    def steps_per_word(self, config: EngineConfig) -> int:
        """Steps per code word, at least 1."""
        return max(1, WORD_BITS // (config.lanes_per_channel * STEP * self.codes.bits))

    def scale_groups_per_word(self, config: EngineConfig) -> int:
        """Groups whose scales (and minima) share a scale word."""
        return WORD_BYTES // (config.lanes_per_channel * (4 if self.minimum else 2))

    def scale_period(self, config: EngineConfig) -> int:
        """Steps between scale words."""
        return self.scale_groups_per_word(config) * self.group_steps

    def pattern_period(self, config: EngineConfig) -> int:
        """Steps between triples of pattern words of a 2:4 stream."""
        return WORD_BITS // (config.lanes_per_channel * (STEP // 2))

    def words_per_block(self, config: EngineConfig, steps: int) -> int:
        """Words per channel of a row block of `steps` steps."""
        words = -(-steps // self.steps_per_word(config)) * self.words_per_step(config)
        if self.scaled:
            words += -(-steps // self.scale_period(config))
        if self.codes is Codes.S24:
            words += 3 * -(-steps // self.pattern_period(config))
        return words


def weight_stream(name: str, group: int) -> StreamFormat:
    """Stream of weight format `name` (w8, w4, w2, w2s24) with `group` original weights per scale.

    Raises KVStrataError for a group that the array cannot scale.
    """
    table = {
        "w8": (Codes.U8, False, True),
        "w4": (Codes.U4, True, False),
        "w2": (Codes.U2, True, False),
        "w2s24": (Codes.S24, False, False),
    }
    if name not in table:
        raise KVStrataError(f"a weight stream is one of {sorted(table)}, not {name!r}")
    codes, minimum, offset = table[name]
    if group not in (32, 64, 128) or group % codes.step:
        raise KVStrataError(f"groups of {name} are a multiple of {codes.step} up to 128, not {group}")
    return StreamFormat(codes, True, minimum, offset, group // codes.step)


def key_stream(bits: int, head_size: int) -> StreamFormat:
    """Stream of cached keys: a row per slot, one scale and minimum per row."""
    return StreamFormat(_kv_codes(bits), True, True, False, _head_steps(head_size))


def value_stream(bits: int) -> StreamFormat:
    """Stream of cached values, transposed by tiles: a row per head element, a step per tile of 32 slots."""
    return StreamFormat(_kv_codes(bits), False, False, False, 1)


def _kv_codes(bits: int) -> Codes:
    if bits not in (4, 8):
        raise KVStrataError(f"the KV cache has 4 or 8 bits, not {bits}")
    return Codes.U4 if bits == 4 else Codes.U8


def _head_steps(head_size: int) -> int:
    if head_size % STEP or not STEP <= head_size <= 256:
        raise KVStrataError(f"a head is 32 to 256 elements in steps of 32, not {head_size}")
    return head_size // STEP


def crumb(config: EngineConfig, bits: int, step: int, lane: int, position: int, plane: int) -> int:
    """Bit address, in the code words of a row block's channel, of two bits of a field.

    Codes lie in planes of two bits, so that a field's low bits are at one place in every format: a step of `bits`-bit
    codes is `bits / 2` planes, plane 0 (the low bits) first, of `lanes_per_channel * 64` bits; lane l, position k is
    at bit `(l * 32 + k) * 2` of its plane. Planes follow each other and fill words from the low bits.
    """
    plane_bits = config.lanes_per_channel * STEP * 2
    return (step * bits // 2 + plane) * plane_bits + (lane % config.lanes_per_channel * STEP + position) * 2


# --- KV cache: where a slot's bytes are ---------------------------------------------------------------
@dataclass(frozen=True)
class KVLayout:
    """Address arithmetic of one layer and KV head (keys) or KV head group (values), in channel words.

    Keys: row block = slot // lanes, lane = slot % lanes XOR turn * vector_lanes; channel = lane // lanes_per_channel.
    Every head has a turn of its own as far as there are some, so that the new keys of all heads lie in many channels.
    Values: `heads_per_block` KV heads share a row block when a head is smaller than the array; row =
    (head % heads_per_block) * head_size + element. Blocks are `tile_capacity` tiles apart, so that tokens append.
    """

    config: EngineConfig
    bits: int
    head_size: int
    slots: int
    """Capacity in slots, a multiple of 32."""

    def turn(self, head: int) -> int:
        """Turn of a KV head's row blocks of keys."""
        return head % self.config.turns

    @property
    def key_block_words(self) -> int:
        """Words per channel of one row block of keys (scale word first, then codes)."""
        return key_stream(self.bits, self.head_size).words_per_block(self.config, self.head_size // STEP)

    @property
    def key_words(self) -> int:
        """Words per channel of the keys of one KV head."""
        return -(-self.slots // self.config.lanes) * self.key_block_words

    @property
    def heads_per_block(self) -> int:
        """KV heads side by side in a row block of values."""
        return max(1, self.config.lanes // self.head_size)

    @property
    def value_blocks(self) -> int:
        """Row blocks of values per head group."""
        return -(-self.heads_per_block * self.head_size // self.config.lanes)

    @property
    def value_block_words(self) -> int:
        """Words per channel between row blocks of values: the whole tile capacity."""
        return value_stream(self.bits).words_per_block(self.config, self.slots // STEP)

    @property
    def value_words(self) -> int:
        """Words per channel of the values of one head group."""
        return self.value_blocks * self.value_block_words

    @property
    def words_per_token(self) -> float:
        """Words per channel of a token's key and value of one KV head, of whole row blocks and tiles."""
        values = self.value_words / (self.heads_per_block * self.slots)
        return self.key_block_words / self.config.lanes + values

    def _key_lane(self, slot: int, turn: int) -> int:
        return slot % self.config.lanes ^ turn * self.config.vector_lanes

    def key_code_position(self, slot: int, element: int, plane: int, turn: int = 0) -> tuple[int, int, int]:
        """(channel, word, bit) of bits [2 * plane, 2 * plane + 1] of a key's code, word relative to the head's base.

        The 32 elements of a step and plane are 8 contiguous bytes.
        """
        lane = self._key_lane(slot, turn)
        bit = crumb(self.config, self.bits, element // STEP, lane, element % STEP, plane)
        word = slot // self.config.lanes * self.key_block_words + 1 + bit // WORD_BITS
        return lane // self.config.lanes_per_channel, word, bit % WORD_BITS

    def key_scale_position(self, slot: int, turn: int = 0) -> tuple[int, int, int]:
        """(channel, word, bit) of a key's 32-bit record: scale in the low half, minimum in the high half."""
        lane = self._key_lane(slot, turn)
        per_channel = self.config.lanes_per_channel
        return lane // per_channel, slot // self.config.lanes * self.key_block_words, lane % per_channel * 32

    def value_code_position(self, slot: int, row: int, plane: int) -> tuple[int, int, int]:
        """(channel, word, bit) of bits [2 * plane, 2 * plane + 1] of a value, word relative to the group's base."""
        lane = row % self.config.lanes
        bit = crumb(self.config, self.bits, slot // STEP, lane, slot % STEP, plane)
        word = row // self.config.lanes * self.value_block_words + bit // WORD_BITS
        return lane // self.config.lanes_per_channel, word, bit % WORD_BITS


# --- instructions -----------------------------------------------------------------------------------
class Unit(IntEnum):
    """Execution units; each has an in-order queue. The number is the bit in wait and signal masks."""

    LOAD = 0
    MATRIX = 1
    VECTOR = 2
    DMA = 3
    APPEND = 4


UNITS = len(Unit)
INSTRUCTION_BYTES = 32
INSTRUCTION_BITS = 8 * INSTRUCTION_BYTES
REGISTERS = 16
"""Scalar registers written by the host; register 0 reads as zero."""


class Op(IntEnum):
    """Opcodes; the upper nibble is the unit (0xF: the fetcher itself)."""

    LOAD = 0x00
    MATRIX = 0x10
    NORM = 0x20
    QUANT = 0x21
    ROPE = 0x22
    GATE = 0x23
    SOFTMAX = 0x24
    KVQUANT = 0x25
    ADD = 0x26
    READ = 0x30
    WRITE = 0x31
    APPEND_K = 0x40
    APPEND_V = 0x41
    HALT = 0xF0


COMMON_FIELDS: tuple[tuple[str, int], ...] = (
    ("op", 8),
    ("wait", UNITS),
    ("signal", UNITS),
    ("addr_reg", 4),
    ("count_reg", 4),
    ("reserved", 6),
)
"""Low 32 bits of every instruction, field 0 in the low bits.

`wait`: take one token from each named unit's counter towards this one before starting. `signal`: after completion
give one token to each named unit. `addr_reg`, `count_reg`: the register's value is added to `addr`, to `count`.
"""

_VECTOR: tuple[tuple[str, int], ...] = (
    ("addr", 20),  # first operand, VB word
    ("count", 16),  # elements per vector (SOFTMAX: slots)
    ("vectors", 8),
    ("stride", 16),  # VB words between vectors of the first operand
    ("addr_b", 20),  # second operand, VB word
    ("stride_b", 16),
    ("dst", 20),  # VB word, or A8 group of 32 for QUANT and SOFTMAX
    ("dst_stride", 16),
    ("table", 8),  # first scale table entry written
    (
        "fresh",
        1,
    ),  # NORM, QUANT, KVQUANT: the vector instruction before wrote exactly this operand, its extremes are
    # reused; ROPE, GATE, ADD: its result goes on where the one before ended its vectors, and their extremes join
)

FIELDS: dict[Op, tuple[tuple[str, int], ...]] = {
    Op.LOAD: (("addr", 32), ("count", 24), ("runs", 16), ("stride", 24)),
    Op.MATRIX: (
        ("codes", 2),
        ("scaled", 1),
        ("minimum", 1),
        ("offset", 1),
        ("values", 1),
        ("accumulate", 1),
        ("group_steps", 4),
        ("count", 16),  # row blocks (values: steps per row block)
        ("steps", 16),  # steps per row block (values: row blocks)
        ("vectors", 5),
        ("addr", 16),  # first activation vector, A8 word
        ("stride", 12),  # A8 words between activation vectors
        ("table", 8),  # scale table entry of vector 0
        ("dst", 20),  # VB word of output row 0 of vector 0
        ("dst_stride", 16),  # VB words between vectors
        ("vec_group", 5),  # values: vectors per KV head of the block; 0 = every row belongs to every vector
        ("vec_rows", 9),  # values: rows (head elements) per KV head
        ("follows", 1),  # one vector: take its codes as the QUANT that is `counted` writes them
        ("collect", 1),  # the results are one vector whose extremes a `fresh` NORM or QUANT finds
        ("joins", 1),  # with `collect`: they go on where the product before ended, and their extremes join
        ("turn", TURN_BITS),  # group g of `vector_lanes` results of a row block: rows of group g XOR turn
    ),
    Op.NORM: (*_VECTOR, ("exponent", 6), ("epsilon", 48)),
    Op.QUANT: (
        *_VECTOR,
        ("factor", 16),
        ("exponent", 6),
        ("rectify", 1),
        ("counted", 1),  # one vector: its groups are counted for the product that `follows`, and only for it
    ),
    Op.ROPE: _VECTOR,
    Op.GATE: _VECTOR,
    Op.SOFTMAX: (
        *_VECTOR,
        ("vec_group", 5),
        ("sinks", 12),
        ("low", 16),
        ("high", 16),
        ("sinks_reg", 4),  # register added to `sinks`: how many are live may grow
        ("export", 1),  # write each vector's softmax state (SOFTMAX_STATE)
        ("state", 20),  # VB word of vector 0's state; vector v's is `state + v`
    ),
    Op.KVQUANT: (*_VECTOR, ("bits", 4)),
    Op.ADD: _VECTOR,
    Op.READ: (("addr", 32), ("count", 16), ("vectors", 8), ("stride", 24), ("dst", 20), ("dst_stride", 16)),
    Op.WRITE: (("addr", 32), ("count", 16), ("vectors", 8), ("stride", 24), ("dst", 20), ("dst_stride", 16)),
    Op.APPEND_K: (
        ("addr", 16),
        ("count", 8),
        ("bits", 4),
        ("head_size", 9),
        ("base", 32),
        ("turn", TURN_BITS),  # of the head's row blocks, as in the products that read them
    ),
    Op.APPEND_V: (
        ("addr", 16),
        ("count", 8),
        ("bits", 4),
        ("head_size", 9),
        ("base", 32),
        ("block_words", 24),
        ("row", 9),
        ("scale_base", 32),
    ),
    Op.HALT: (("interrupt", 1),),
}
"""Fields after the common ones, field 0 in the low bits; the rest of the 256 bits is zero."""


SOFTMAX_STATE = ("maximum", "sum_low", "sum_high")
"""Elements 0 to 2 of an exported state word, 32 bits each: the running maximum M in whole log2 units (signed;
docs/formats.md section 8) and the sum l, unit 2^-(P_FRAC + L_EXTRA_FRAC), at most 48 bits. Without a live slot
M = SOFTMAX_EMPTY and l = 0. The other elements of the word keep what they held."""
SOFTMAX_EMPTY = -(1 << 20)
"""M before any live slot: below every score (they reach -2^15)."""


def fields(op: Op) -> tuple[tuple[str, int], ...]:
    """All fields of an instruction, low bits first."""
    return COMMON_FIELDS + FIELDS[op]


def encode(op: Op, **values: int) -> int:
    """A 256-bit instruction. Raises KVStrataError for an unknown field or a value that does not fit."""
    layout = fields(op)
    known = {name for name, _ in layout}
    for name in values:
        if name not in known or name in ("op", "reserved"):
            raise KVStrataError(f"{op.name} has no field {name!r}")
    word, position = 0, 0
    for name, width in layout:
        value = int(op) if name == "op" else values.get(name, 0)
        if not 0 <= value < 1 << width:
            raise KVStrataError(f"field {name} of {op.name} holds 0 to {(1 << width) - 1}, not {value}")
        word |= value << position
        position += width
    return word


def decode(word: int) -> tuple[Op, dict[str, int]]:
    """Opcode and fields of an instruction. Raises KVStrataError for an unknown opcode or a non-zero reserved bit."""
    try:
        op = Op(word & 0xFF)
    except ValueError:
        raise KVStrataError(f"no instruction has opcode {word & 0xFF:#04x}") from None
    values, position = {}, 0
    for name, width in fields(op):
        values[name] = word >> position & ((1 << width) - 1)
        position += width
    if word >> position or values.pop("reserved"):
        raise KVStrataError(f"reserved bits of {op.name} must be zero")
    values.pop("op")
    return op, values


# --- host registers ---------------------------------------------------------------------------------
class Reg(IntEnum):
    """Host register map, in 32-bit words."""

    CONTROL = 0  # bit 0 start, bit 1 abort, bit 2 clear interrupt
    STATUS = 1  # bits 0..3 State, bit 4 interrupt
    ERROR = 2  # Error code
    ERROR_PC = 3  # instruction index of the offender
    PROGRAM = 4  # auxiliary-memory word (64 bytes) of the first instruction
    WATCHDOG = 5  # cycles without progress before an error; 0 = off
    CYCLES = 6  # since start
    SCALAR = 16  # 16..31: scalar registers
    COUNTERS = 32  # 32..: performance counters, see Counter


class Counter(IntEnum):
    """Performance counters, one 32-bit word each from Reg.COUNTERS."""

    LOAD_BUSY = 0
    MATRIX_BUSY = 1
    VECTOR_BUSY = 2
    DMA_BUSY = 3
    APPEND_BUSY = 4
    LOAD_WAIT = 5
    MATRIX_WAIT = 6
    VECTOR_WAIT = 7
    DMA_WAIT = 8
    APPEND_WAIT = 9
    ARRAY_STEPS = 10
    ARRAY_NO_WEIGHTS = 11
    ARRAY_NO_BANK = 12
    WEIGHT_WORDS = 13
    AUX_READ_WORDS = 14
    AUX_WRITE_WORDS = 15
    INSTRUCTIONS = 16


class State(IntEnum):
    """Engine state in Reg.STATUS."""

    IDLE = 0
    RUNNING = 1
    DONE = 2
    STOPPED = 3


class Error(IntEnum):
    """Error code in Reg.ERROR."""

    NONE = 0
    ILLEGAL_INSTRUCTION = 1
    SHAPE = 2
    ADDRESS = 3
    BUS = 4
    WATCHDOG = 5
    PATTERN = 6
    ABORTED = 7


def beats_bound(config: EngineConfig, stream: StreamFormat, rows: int, steps: int, vectors: int = 1) -> int:
    """Cycles that the words or the multipliers of a product need, whichever is more."""
    blocks = -(-rows // config.lanes)
    return blocks * max(stream.words_per_block(config, steps), steps * vectors)
