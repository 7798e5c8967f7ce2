"""Bytes and operations of KV policies: the face that a simulator reads, and the selection record where faces meet.

Standard library only. The tensor face of the same policies is golden.policies; a test runs both and requires equal
byte counts. Letters: S cached tokens (the current one included), dh head size, r channels, k tokens, m channels per
page. Costs are per decode step, layer and KV head (its whole group of queries).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil

from golden.spec import KVStrataError
from golden.spec.storage import CHANNELS_PER_PAGE, ELEMENT_BYTES, PAGE_BYTES, tokens_per_channel_page


@dataclass(frozen=True)
class Selection:
    """What one step of one layer and KV head chose: the record both faces agree on.

    position: of the query; channels: marked channels, ascending (empty where a policy ranks none);
    tokens: attended tokens, ascending. `context` is position + 1.
    """

    position: int
    layer: int
    kv_head: int
    channels: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def context(self) -> int:
        """S: tokens that exist at this step."""
        return self.position + 1


@dataclass(frozen=True)
class StepCost:
    """Bytes read by purpose, bytes written, and multiply-accumulates of one step."""

    k_channel_bytes: int = 0
    k_token_bytes: int = 0
    v_token_bytes: int = 0
    v_bar_bytes: int = 0
    written_bytes: int = 0
    macs: int = 0

    @property
    def read_bytes(self) -> int:
        """All bytes read."""
        return self.k_channel_bytes + self.k_token_bytes + self.v_token_bytes + self.v_bar_bytes


@dataclass(frozen=True)
class Representation:
    """How a K or V vector of one head is stored: bits per element plus fixed bytes per vector (scale, minimum)."""

    name: str = "fp16"
    bits: int = 16
    vector_bytes: int = 0

    def vector(self, head_size: int) -> int:
        """Bytes of one vector."""
        return ceil(head_size * self.bits / 8) + self.vector_bytes


FP16 = Representation()
KV8_TOKENS = Representation("kv8", 8, 4)
KV4_TOKENS = Representation("kv4", 4, 4)


@dataclass(frozen=True)
class PolicyCosts(ABC):
    """Costs of a policy for one KV head.

    head_size dh; group: query heads that share the KV head; representation of stored vectors.
    """

    head_size: int
    group: int = 1
    representation: Representation = FP16

    @property
    @abstractmethod
    def name(self) -> str:
        """Name with parameters, for tables."""

    @abstractmethod
    def resident_bytes(self, context: int) -> int:
        """Bytes that stay stored at this context."""

    @abstractmethod
    def step(self, selection: Selection) -> StepCost:
        """Cost of the step that made this record."""

    @abstractmethod
    def expected(self, context: int) -> StepCost:
        """Cost at a context where it does not depend on the data (entries, not pages)."""

    @abstractmethod
    def dense_limit(self, context: int) -> PolicyCosts:
        """The same policy at the setting where it must equal dense attention up to this context."""

    @property
    def append_bytes(self) -> int:
        """Bytes written per new token."""
        return 2 * self.representation.vector(self.head_size)

    @property
    def rounds(self) -> int:
        """Dependent rounds of reading per step: a second round waits for the first one's scores."""
        return 1

    def _attention_macs(self, tokens: int) -> int:
        return 2 * self.group * tokens * self.head_size


@dataclass(frozen=True)
class DenseCosts(PolicyCosts):
    """Every token."""

    @property
    def name(self) -> str:
        """Name."""
        return "dense"

    def resident_bytes(self, context: int) -> int:
        """All tokens."""
        return context * self.append_bytes

    def step(self, selection: Selection) -> StepCost:
        """All tokens, whatever the record says of channels."""
        return self._tokens(len(selection.tokens))

    def expected(self, context: int) -> StepCost:
        """All tokens."""
        return self._tokens(context)

    def dense_limit(self, context: int) -> PolicyCosts:
        """Itself."""
        return self

    def _tokens(self, tokens: int) -> StepCost:
        vector = self.representation.vector(self.head_size)
        return StepCost(
            0, tokens * vector, tokens * vector, 0, self.append_bytes, self._attention_macs(tokens)
        )


@dataclass(frozen=True)
class LambdaCosts(DenseCosts):
    """Sinks and a window of recent tokens; what leaves the window is dropped for good."""

    sinks: int = 4
    window: int = 1024

    def __post_init__(self) -> None:
        """Refuse parameters that contradict."""
        if self.sinks < 0 or self.window < 1:
            raise KVStrataError(
                f"a Lambda policy needs sinks >= 0 and a window of at least 1, got {self.sinks} and {self.window}."
            )

    @property
    def name(self) -> str:
        """Name."""
        return f"lambda-{self.sinks}+{self.window}"

    def live(self, context: int) -> int:
        """Tokens attended at this context."""
        return min(context, self.window) + min(self.sinks, max(0, context - self.window))

    def resident_bytes(self, context: int) -> int:
        """Sinks and window; sinks are stored from the start, beside their copy in the window."""
        return (min(context, self.window) + min(self.sinks, context)) * self.append_bytes

    def expected(self, context: int) -> StepCost:
        """Live tokens."""
        return self._tokens(self.live(context))

    def dense_limit(self, context: int) -> PolicyCosts:
        """A window of the whole context."""
        return replace(self, window=max(context, 1))


def attended(context: int, ratio: float | Fraction, local: int, fixed: int = 0) -> int:
    """k: `fixed` tokens, or ceil(context * ratio) and no less than `local` or one; never more than there are. A ratio
    counts as the nearest fraction of a denominator up to 65,536, so that 0.1 of 70 tokens are 7."""
    exact = Fraction(ratio).limit_denominator(1 << 16)
    return min(context, fixed or max(1, local, ceil(context * exact)))


def always_recent(k: int, local: int) -> int:
    """The recent tokens among the k: `local` of them, 0: a quarter of k, at least the current token."""
    return min(k, local or max(1, k // 4))


@dataclass(frozen=True)
class SparqCosts(PolicyCosts):
    """r channels of all K rank the tokens, k tokens are attended, the rest is v-bar (SparQ, ICML 2024).

    k = `tokens` if given, else ceil(S * ratio), at least the local window, at most S. `local`: recent tokens that are
    always among the k, the current one included; 0 takes a quarter of k, at least the current token (SparQ's choice).
    """

    r: int = 16
    tokens: int = 0
    ratio: float = 0.125
    local: int = 0

    def __post_init__(self) -> None:
        """Refuse parameters that contradict."""
        if not 1 <= self.r <= self.head_size:
            raise KVStrataError(f"r must be 1 to the head size {self.head_size}, got {self.r}.")
        if self.tokens < 0 or not 0 < self.ratio <= 1:
            raise KVStrataError(
                f"k must be positive and its ratio in (0, 1], got {self.tokens} and {self.ratio}."
            )
        if self.local < 0:
            raise KVStrataError(f"the local window must not be negative, got {self.local}.")
        if self.tokens and self.local > self.tokens:
            raise KVStrataError(f"the local window must fit in k = {self.tokens} tokens, got {self.local}.")

    @property
    def name(self) -> str:
        """Name."""
        return f"sparq-r{self.r}-k{self.tokens or f'{self.ratio:g}S'}-w{self.local or 'k/4'}"

    def k(self, context: int) -> int:
        """Tokens attended at this context."""
        return attended(context, self.ratio, self.local, self.tokens)

    def window(self, context: int) -> int:
        """Recent tokens that are among the k whatever their scores."""
        return always_recent(self.k(context), self.local)

    @property
    def append_bytes(self) -> int:
        """K by token and by channel, V by token."""
        return 3 * self.representation.vector(self.head_size)

    @property
    def rounds(self) -> int:
        """Tokens are known only after the channels' scores."""
        return 2

    def resident_bytes(self, context: int) -> int:
        """K twice, V once, and v-bar."""
        return context * self.append_bytes + self.head_size * 2

    def step(self, selection: Selection) -> StepCost:
        """Entries, as in SparQ's published count S*r + 2*k*dh + v-bar."""
        return self._entries(selection.context, len(selection.channels), len(selection.tokens))

    def expected(self, context: int) -> StepCost:
        """Entries at this context."""
        return self._entries(context, self.r, self.k(context))

    def dense_limit(self, context: int) -> PolicyCosts:
        """k of the whole context."""
        return replace(self, tokens=0, ratio=1.0)

    def _entries(self, context: int, channels: int, tokens: int) -> StepCost:
        vector = self.representation.vector(self.head_size)
        channel_bytes = ceil(context * channels * self.representation.bits / 8)
        macs = self.group * context * channels + self._attention_macs(tokens)
        return StepCost(
            channel_bytes, tokens * vector, tokens * vector, 2 * self.head_size, self.append_bytes, macs
        )


@dataclass(frozen=True)
class SparfCosts(SparqCosts):
    """SparQ's selection on flash: whole pages of `page_tokens` tokens and of m channels are read (InstInfer).

    fp16. A token page holds page_tokens * dh elements (16 at dh 128; 32 at dh 64 fill 4 KiB); a channel page holds m
    channels of 2048 / m consecutive tokens.
    """

    m: int = 4

    def __post_init__(self) -> None:
        """Refuse parameters that contradict."""
        super().__post_init__()
        if self.m not in CHANNELS_PER_PAGE or self.head_size % self.m:
            raise KVStrataError(
                f"channels per page must be 2, 4 or 8 and divide the head size, got {self.m}."
            )
        if self.representation != FP16:
            raise KVStrataError(f"SparF stores fp16 on flash, got {self.representation.name}.")

    @property
    def name(self) -> str:
        """Name."""
        return f"sparf-r{self.r}-k{self.tokens or f'{self.ratio:g}S'}-w{self.local or 'k/4'}-m{self.m}"

    def entries(self, representation: Representation) -> SparqCosts:
        """The same selection over another device's cache, which holds codes and reads entries instead of pages."""
        return SparqCosts(
            self.head_size, self.group, representation, self.r, self.tokens, self.ratio, self.local
        )

    @property
    def page_tokens(self) -> int:
        """Tokens of a token-indexed page."""
        return PAGE_BYTES // (ELEMENT_BYTES * self.head_size)

    def step(self, selection: Selection) -> StepCost:
        """Pages that hold something selected, whole."""
        k_pages = len({t // self.page_tokens for t in selection.tokens})
        groups = len({c // self.m for c in selection.channels})
        entries = self._entries(selection.context, len(selection.channels), len(selection.tokens))
        return replace(
            entries,
            k_channel_bytes=groups * self.channel_blocks(selection.context) * PAGE_BYTES,
            k_token_bytes=k_pages * PAGE_BYTES,
            v_token_bytes=k_pages * PAGE_BYTES,
        )

    def channel_blocks(self, context: int) -> int:
        """Pages along tokens of one channel group."""
        return ceil(context / tokens_per_channel_page(self.m))

    def useful_fraction(self, selections: Iterable[Selection]) -> float:
        """Selected entries over entries of the pages read."""
        chosen, read = 0, 0
        for s in selections:
            entries, pages = self._entries(s.context, len(s.channels), len(s.tokens)), self.step(s)
            chosen += entries.read_bytes
            read += pages.read_bytes
        return chosen / read
