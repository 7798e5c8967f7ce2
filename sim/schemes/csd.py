"""Decode attention and KV on computational drives, the rest on the GPU (InstInfer / InstAttention).

Per layer and step: the GPU sends q, k and v to the drives peer to peer, every drive attends over the KV of its heads
(or sequences), and the outputs return. New k and v wait in the drive's memory until a group of tokens fills a page, and
are then programmed in the background.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from golden.spec.storage import CHANNELS_PER_PAGE, HEAD_SIZES
from sim.core.graph import SETUP, Graph
from sim.describe.base import ConfigError
from sim.describe.devices import Csd
from sim.describe.model import FP16_BYTES
from sim.devices.csd import AttentionUnit, KvReads, attention_unit
from sim.devices.drive import write_bandwidth
from sim.devices.flash import program_load, read_limits
from sim.devices.flash_pages import scattered, stream
from sim.devices.flash_reads import even_read_s, scattered_read_s
from sim.devices.limits import Bandwidth
from sim.devices.storage_unit import Selection
from sim.result import Residency
from sim.schemes.base import GB, GpuScheme

SELECTION_PAGES = 40_000
"""Pages that drawing small selections repeatedly may cost at page fidelity."""
CHANNEL_COPY = 1.5
"""K is stored twice (token- and channel-oriented), V once."""


class CsdDense(GpuScheme):
    """Dense attention over all KV groups on flash."""

    name: ClassVar[str] = "csd-dense"
    needs: ClassVar[tuple[str, ...]] = ("gpu", "gpu_link", "csd")
    stored_copies: ClassVar[float] = 1.0
    sparse: ClassVar[bool] = False

    def place(self) -> None:
        self._check_peer_to_peer()
        split = self.model.kv_heads if self.machine.csd_partition == "heads" else self.workload.batch
        if split % self.machine.csd_count:
            fits = max(n for n in range(1, self.machine.csd_count + 1) if split % n == 0)
            raise ConfigError(
                f"scheme {self.name}: {split} {self.machine.csd_partition} of {self.model.name} do not divide over "
                f"{self.machine.csd_count} drives; {fits} would"
            )
        super().place()

    def _check_peer_to_peer(self) -> None:
        if not (self.csd.p2p and self.machine.p2p):
            who = f"drive {self.csd.name}" if not self.csd.p2p else f"machine {self.machine.name}"
            raise ConfigError(
                f"scheme {self.name} moves KV between GPU and drive peer to peer, and {who} has p2p = false"
            )

    @property
    def csd(self) -> Csd:
        """The drive."""
        return self.machine.part("csd", self.name)

    @property
    def unit(self) -> AttentionUnit:
        """The attention unit of each drive."""
        return attention_unit(self.csd, self.sparse)

    @property
    def group_tokens(self) -> int:
        """Tokens of one head whose K (or V) fill a flash page."""
        return max(1, self.csd.page_bytes // (FP16_BYTES * self.model.head_size))

    def residency(self) -> list[Residency]:
        w, m, count = self.workload, self.model, self.machine.csd_count
        # Prefill goes in slices of whole sequences: two layers' KV on their way out, hidden states in and out.
        tokens = min(w.batch * w.input_tokens, max(self.slice_tokens, w.input_tokens))
        in_flight = tokens * (2 * m.kv_bytes_per_token_layer + 2 * m.hidden * FP16_BYTES)
        on_gpu = m.weight_bytes + self.workspace_bytes(1, min(tokens, self.slice_tokens)) + in_flight
        kv = w.batch * w.total_tokens * m.kv_bytes_per_token * self.stored_copies
        tails = w.batch * m.kv_bytes_per_token * self.group_tokens
        capacity = self.csd.capacity_gb * count
        return [
            Residency(tier="GPU memory", used_gb=on_gpu / GB, capacity_gb=self.gpu_capacity_gb),
            Residency(tier="computational drives", used_gb=kv / GB, capacity_gb=capacity),
            Residency(tier="drive buffers", used_gb=tails / GB, capacity_gb=self.csd.buffer_gb * count),
        ]

    def connect(self) -> None:
        machine, csd, count = self.machine, self.csd, self.machine.csd_count
        link = machine.csd_link
        assert link is not None
        drives = {"drive links": link.payload_gb_per_s * count}
        if machine.drive_uplink:
            drives["drive uplink"] = machine.drive_uplink.payload_gb_per_s
        self.connect_gpu()
        self._pipe("to drives", Bandwidth("to drives", drives))
        self._pipe("from drives", Bandwidth("from drives", drives))
        self._pipe("csd flash", self.flash_bandwidth())
        self._pipe("csd program", write_bandwidth(csd, link, count))

    def flash_bandwidth(self) -> Bandwidth:
        """Aggregate flash read rate of all drives as the unit sees it."""
        limits = {**read_limits(self.csd).limits, **self.unit.stream_limits()}
        return Bandwidth("csd flash", {k: v * self.machine.csd_count for k, v in limits.items()})

    def prefill(self, graph: Graph, layers: int) -> None:
        self.prefill_layers(graph, layers)

    def store_prefill(self, graph: Graph, qkv: int) -> None:
        w = self.workload
        size = w.batch * w.input_tokens * self.model.kv_bytes_per_token_layer * self.stored_copies
        graph.move("store kv", "kv access", ("pcie from gpu", "to drives", "csd program"), size, [qkv])

    def page_seconds(self, pipe: str, size_bytes: float) -> float | None:
        if pipe != "csd flash":
            return None
        filters = min(self.unit.stream_limits().values(), default=math.inf) * 1e9 * self.machine.csd_count
        return max(self._pages_s(math.ceil(size_bytes / self.csd.page_bytes)), size_bytes / filters)

    def _pages_s(self, pages: int) -> float:
        """Seconds of the page engine for `pages` pages over all drives."""
        return stream(self.csd, math.ceil(pages / self.machine.csd_count)).seconds

    def read_s(self, pages: float) -> float:
        """Seconds of a read of `pages` pages over all drives, nothing else on them; dense reads are striped evenly."""
        return even_read_s(self.csd, pages, self.machine.csd_count)

    def reads(self, context: int) -> KvReads:
        """What one layer's attention reads and computes over all drives in a step."""
        w, m = self.workload, self.model
        groups = context // self.group_tokens
        size = w.batch * m.kv_heads * groups * 2.0 * self.csd.page_bytes
        scores = float(w.batch * m.heads * (context + 1))
        return KvReads(
            size, commands=w.batch * m.kv_heads, dot_flops=4 * scores * m.head_size, softmax_values=scores
        )

    def decode(self, graph: Graph, context: int, layers: int) -> None:
        w, m = self.workload, self.model
        before, after = self.layer_kernels(w.batch)
        qkv_bytes = w.batch * (m.heads + 2 * m.kv_heads) * m.head_size * FP16_BYTES
        out_bytes = w.batch * m.heads * m.head_size * FP16_BYTES
        done: list[int] = []
        for layer in range(layers):
            graph.layer = layer
            ready = [self.framework(graph, done[-1:])]
            qkv = graph.work("qkv", before[1], "gpu", before[0], ready)
            path = ("pcie from gpu", "to drives")
            sent = graph.move("q, k, v", "transfer", path, qkv_bytes, [qkv], latency_s=self._command_s())
            attended = self.attend(graph, context, sent)
            back = graph.move("outputs", "transfer", ("from drives", "pcie to gpu"), out_bytes, attended)
            new_kv = w.batch * m.kv_bytes_per_token_layer * self.stored_copies
            graph.move("append kv", "kv access", ("csd program",), new_kv, [sent])
            load = new_kv * program_load(self.csd)
            graph.move("programs on the dies", "kv access", ("csd flash",), load, [sent], counted=False)
            done.append(self.close_layer(graph, after, [back]))
        graph.layer = SETUP
        self.finish(graph, done)

    def _command_s(self) -> float:
        """Submission of one `attend` per drive, in turn, and the link's latency."""
        link = self.machine.csd_link
        assert link is not None
        return (self.machine.csd_count * self.csd.command_host_us + link.latency_us) * 1e-6

    def attend(self, graph: Graph, context: int, sent: int) -> list[int]:
        """Flash reads and the unit's work of one layer; returns what the outputs wait for."""
        reads, unit = self.reads(context), self.unit
        size = reads.size_bytes
        cap = size / self.read_s(size / self.csd.page_bytes) if size else math.inf
        read = graph.move("read kv", "kv access", ("csd flash",), size, [sent], cap)
        count = self.machine.csd_count
        done = [read]
        if ordered := unit.reading_seconds(reads, count):
            done.append(graph.work("read in order", "kv access", "csd reads", ordered, [sent]))
        if beside := unit.overlapped_seconds(reads, count):
            done.append(graph.work("softmax", "csd compute", "csd softmax", beside, [sent]))
        after = [sent] if unit.streams else done
        return [*done, graph.work("attend", "csd compute", "csd unit", unit.seconds(reads, count), after)]

    def flash_written_per_token(self) -> float:
        w = self.workload
        return self.model.kv_bytes_per_token * self.stored_copies * w.total_tokens / w.output_tokens

    def provenance(self) -> list[dict[str, Any]]:
        return self.unit.provenance()

    def policy(self) -> dict[str, Any]:
        return {
            "drives": self.machine.csd_count,
            "partition": self.machine.csd_partition,
            "tokens_per_page": self.group_tokens,
            "engine": self.csd.engine,
            "overlap": "KV of a prefill layer is written while the next computes; appends flush in the background",
        }


class CsdSparf(CsdDense):
    """SparF: r = sparsity * dh channels score all tokens, then the k = sparsity * S best are attended exactly.

    Pages are skipped whole where they hold nothing selected. Which pages those are depends on how selections cluster:
    a token page is read unless all of its `token_clusters_per_page` independent draws miss (SIM-SPARF-LOCALITY), a
    channel page unless none of its channels is marked.
    """

    name: ClassVar[str] = "csd-sparf"
    stored_copies: ClassVar[float] = CHANNEL_COPY
    sparse: ClassVar[bool] = True

    @property
    def marked_channels(self) -> int:
        """r."""
        return max(1, round(self.workload.sparsity * self.model.head_size))

    def _pages_s(self, pages: int) -> float:
        # Every layer and step draws anew: few pages vary much, so several selections are averaged.
        draws = max(1, min(8, SELECTION_PAGES // pages))
        runs = [scattered(self.csd, pages, self.machine.csd_count, seed) for seed in range(draws)]
        return sum(r.seconds for r in runs) / draws

    def read_s(self, pages: float) -> float:
        return scattered_read_s(self.csd, pages, self.machine.csd_count)

    def numerics(self) -> str:
        return f"float/float/float/sparf:{self.marked_channels},{self.workload.sparsity:g}"

    def page_shares(self) -> tuple[float, float]:
        """(channel pages, token pages) read, as shares of all of their kind."""
        dh, csd = self.model.head_size, self.csd
        missed = math.comb(dh - csd.channels_per_page, self.marked_channels) / math.comb(
            dh, self.marked_channels
        )
        return 1 - missed, 1 - (1 - self.workload.sparsity) ** csd.token_clusters_per_page

    def reads(self, context: int) -> KvReads:
        dense, s = super().reads(context), self.workload.sparsity
        channels, tokens = self.page_shares()
        scores = float(self.workload.batch * self.model.heads * (context + 1))
        dots = scores * (2 * self.marked_channels + 4 * s * self.model.head_size)
        size = dense.size_bytes / 2 * (channels + 2 * tokens)
        on_flash = float(context // self.group_tokens * self.group_tokens)
        return KvReads(size, dense.commands, dots, scores * (1 + s), on_flash, self._selection(tokens))

    def _selection(self, page_share: float) -> Selection:
        """For the unit, which takes heads of 64 or 128 and 2, 4 or 8 channels to a page: the next size up."""
        m, head_size = self.model, next((n for n in HEAD_SIZES if n >= self.model.head_size), HEAD_SIZES[-1])
        marked = max(1, round(self.workload.sparsity * head_size))
        per_page = min(CHANNELS_PER_PAGE, key=lambda n: abs(n - self.csd.channels_per_page))
        queries = max(1, m.heads // m.kv_heads)
        return Selection(head_size, marked, per_page, self.workload.sparsity, page_share, queries)

    def policy(self) -> dict[str, Any]:
        channels, tokens = self.page_shares()
        return {**super().policy(), "channel_page_share": channels, "token_page_share": tokens}
