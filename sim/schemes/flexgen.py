"""FlexGen: weights and KV placed by percentages over GPU, host and disk, moved layer by layer one layer ahead."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from sim.core.graph import SETUP, Graph
from sim.describe.base import ConfigError
from sim.describe.devices import Link, Ssd
from sim.describe.model import FP16_BYTES, Model
from sim.devices.drive import file_read_bandwidth, io_latency_us, read_bandwidth, write_bandwidth
from sim.devices.flash import first_page_us
from sim.devices.flash_pages import stream
from sim.devices.limits import Bandwidth
from sim.result import Residency
from sim.schemes.base import GB, GpuScheme

KV_GRAIN = 0.1
"""Placement percentages are set in steps of ten, as FlexGen's users do."""
HOST_PATH = ("host dram", "pcie to gpu")
TO_HOST_PATH = ("pcie from gpu", "host dram")
USABLE_SHARE = 0.9
"""Share of GPU memory planned for; the rest is allocator fragmentation (SIM-GPU-USABLE)."""


@dataclass(frozen=True)
class Placement:
    """Shares of weights, KV or activations per tier; they sum to 1."""

    gpu: float
    host: float

    @property
    def disk(self) -> float:
        """What neither GPU nor host holds."""
        return max(0.0, 1.0 - self.gpu - self.host)

    @property
    def away(self) -> float:
        """What is not in GPU memory."""
        return 1.0 - self.gpu


class FlexgenSsd(GpuScheme):
    """KV on drives, weights in GPU memory as far as they fit, then in host memory, then on drives.

    The six percentages of `tuning` place weights, KV and activations by hand over GPU and host, the drives holding
    the rest (sim.policy searches them); left out, as much as fits stays on the GPU, weights first.
    `tuning.gpu_batches` is the block: a layer computes the batch in that many parts, so that weights are fetched once
    for all of them and working memory is that of one. With `tuning.cpu_attention` the CPU attends to the KV that is not
    on the GPU, in host memory, and only q, k, v and outputs cross the link.
    """

    name: ClassVar[str] = "flexgen-ssd"
    needs: ClassVar[tuple[str, ...]] = ("gpu", "host", "gpu_link", "ssd")
    eager_scores: ClassVar[bool] = True
    weights = kv = activations = Placement(1.0, 0.0)
    disk_path: ClassVar[tuple[str, ...]] = ("ssd read", "host dram", "pcie to gpu")
    to_disk_path: ClassVar[tuple[str, ...]] = ("pcie from gpu", "host dram", "ssd write")
    kv_on_host: ClassVar[bool] = False
    """Whether host memory, not the drives, takes the KV that the GPU does not hold."""

    @property
    def has_disk(self) -> bool:
        """Whether the scheme uses drives at all."""
        return "ssd" in self.needs

    def place(self) -> None:
        if self.tuning.gpu_batches > self.workload.batch:
            raise ConfigError(
                f"scheme {self.name}: gpu_batches must be at most the batch of {self.workload.batch}, "
                f"got {self.tuning.gpu_batches}"
            )
        super().place()

    @property
    def parts(self) -> int:
        """Parts of a block."""
        return min(self.tuning.gpu_batches, self.workload.batch)

    def plan(self) -> list[Residency]:
        """Percentages: the user's, or as much on the GPU as fits beside the working set."""
        tuning, model = self.tuning, self.model
        self.activations = self._placed(
            "activations", tuning.activations_gpu_percent, tuning.activations_host_percent, 1.0
        )
        free = self.gpu_capacity_gb * USABLE_SHARE * GB - self._working_bytes()
        fitting = min(1.0, max(0.0, free / model.weight_bytes))
        in_host = self._host_capacity_gb * GB / model.weight_bytes if self.has_disk else 1.0
        self.weights = self._placed(
            "weights", tuning.weights_gpu_percent, tuning.weights_host_percent, fitting, in_host
        )
        if tuning.weights_gpu_percent is not None:
            self.weights = whole_tensors(model, self.weights)
        left = free - self.weights.gpu * model.weight_bytes
        steps = int(max(left, 0.0) / self._kv_bytes() / KV_GRAIN + 1e-9)
        self.kv = self._placed(
            "kv",
            tuning.kv_gpu_percent,
            tuning.kv_host_percent,
            min(1.0, steps * KV_GRAIN),
            float(self.kv_on_host),
        )
        self.weights_host_share = self.weights.host
        return self.residency()

    def _placed(
        self, what: str, gpu: float | None, host: float | None, on_gpu: float, in_host: float = 1.0
    ) -> Placement:
        """Percentages where given, else `on_gpu` and at most `in_host` of all; refused where they make no sense."""
        share = on_gpu if gpu is None else gpu / 100
        rest = min(in_host, 1 - share) if host is None else host / 100
        if share + rest > 1 + 1e-9:
            raise ConfigError(
                f"scheme {self.name}: {what} on GPU and host must sum to at most 100%, "
                f"got {100 * share:g} + {100 * rest:g}"
            )
        if not self.has_disk and share + rest < 1 - 1e-9:
            raise ConfigError(
                f"scheme {self.name} has no disk for the {100 * (1 - share - rest):g}% of {what} "
                "that GPU and host leave; flexgen-ssd has"
            )
        return Placement(share, rest)

    @property
    def _host_capacity_gb(self) -> float:
        host = self.machine.part("host", self.name)
        return host.dram_gb - host.reserved_gb

    def _kv_bytes(self) -> float:
        return self.workload.batch * self.workload.total_tokens * self.model.kv_bytes_per_token

    @property
    def part_sequences(self) -> int:
        """Sequences of one part of the block."""
        return -(-self.workload.batch // self.parts)

    def _hidden_bytes(self) -> float:
        """Hidden states of the whole block between two layers of the prefill."""
        w = self.workload
        return float(w.batch * w.input_tokens * self.model.hidden * FP16_BYTES)

    def _working_bytes(self) -> float:
        """Prefill activations, or two layers of KV in flight, whichever is more."""
        w, m, part = self.workload, self.model, self.part_sequences
        in_flight = 2 * part * w.total_tokens * m.kv_bytes_per_token_layer
        kept = 2 * self.activations.gpu * self._hidden_bytes() if self.parts > 1 else 0
        return max(self.workspace_bytes(part, w.input_tokens), in_flight) + kept

    def residency(self) -> list[Residency]:
        weights, kv, hidden = self.model.weight_bytes, self._kv_bytes(), 2 * self._hidden_bytes()
        on_gpu = self.weights.gpu * weights + self.kv.gpu * kv + self._working_bytes()
        in_host = self.weights.host * weights + self.kv.host * kv + self.activations.host * hidden
        tiers = [("GPU memory", on_gpu, self.gpu_capacity_gb * USABLE_SHARE)]
        tiers.append(("host memory", in_host, self._host_capacity_gb))
        if self.has_disk:
            on_disk = self.weights.disk * weights + self.kv.disk * kv + self.activations.disk * hidden
            drives = self.machine.part("ssd", self.name).capacity_gb * self.machine.ssd_count
            tiers.append(("drives", on_disk, drives))
        return [
            Residency(tier=name, used_gb=used / GB, capacity_gb=capacity) for name, used, capacity in tiers
        ]

    def connect(self) -> None:
        machine, host = self.machine, self.machine.part("host", self.name)
        self.connect_gpu()
        streaming = {"dram streaming": host.dram_gb_per_s * host.stream_share}
        self._pipe("host dram", Bandwidth("host dram", streaming))
        if self.has_disk:
            assert machine.ssd is not None
            assert machine.ssd_link is not None
            uplink = machine.drive_uplink
            self._pipe("ssd read", self.read_bandwidth(machine.ssd, machine.ssd_link).under(uplink))
            write = write_bandwidth(machine.ssd, machine.ssd_link, machine.ssd_count)
            self._pipe("ssd write", write.under(uplink))

    def read_bandwidth(self, ssd: Ssd, link: Link) -> Bandwidth:
        """KV files are memory-mapped: the page cache reads ahead one window at a time."""
        threads = self.tuning.disk_copy_threads
        return file_read_bandwidth(ssd, link, self.page_cache_us, self.machine.ssd_count, threads)

    @property
    def page_cache_us(self) -> float:
        """Kernel and copy time per read-ahead window."""
        return self.tuning.page_cache_us_per_io

    def page_seconds(self, pipe: str, size_bytes: float) -> float | None:
        """Read-ahead windows one after the other, each a burst of pages over idle channels."""
        ssd, link = self.machine.ssd, self.machine.ssd_link
        if pipe != "ssd read" or ssd is None or link is None:
            return None
        window = ssd.io_kib * 1024
        burst = stream(ssd, math.ceil(window / ssd.page_bytes)).seconds - first_page_us(ssd) * 1e-6
        window_s = io_latency_us(ssd, link) * 1e-6 + burst + self.page_cache_us * 1e-6
        windows_s = size_bytes / window * window_s / self.tuning.disk_copy_threads
        return max(windows_s, size_bytes / self._drives_bytes_per_s(ssd, link))

    def _drives_bytes_per_s(self, ssd: Ssd, link: Link) -> float:
        """What drives, links and uplink allow whatever reads them."""
        count, uplink = self.machine.ssd_count, self.machine.drive_uplink
        return read_bandwidth(ssd, link, count=count).under(uplink).bytes_per_s

    def _load(
        self, graph: Graph, what: tuple[str, str], where: Placement, size: float, after: Iterable[int]
    ) -> list[int]:
        """Bring the shares of `size` bytes that host and drives hold to the GPU; (name, category) in `what`."""
        after, tasks = list(after), []
        if where.host * size:
            tasks.append(graph.move(*what, HOST_PATH, where.host * size, after))
        if where.disk * size:
            tasks.append(graph.move(*what, self.disk_path, where.disk * size, after))
        return tasks

    def _store(
        self, graph: Graph, what: tuple[str, str], where: Placement, size: float, after: Iterable[int]
    ) -> None:
        """The way back of `_load`; nothing waits for it."""
        after = list(after)
        if where.host * size:
            graph.move(*what, TO_HOST_PATH, where.host * size, after)
        if where.disk * size:
            graph.move(*what, self.to_disk_path, where.disk * size, after)

    def fetch_weights(self, graph: Graph, done: list[int]) -> list[int]:
        """Weights of a layer that are not on the GPU, one layer ahead."""
        size = self.model.layer_weights * FP16_BYTES
        return self._load(graph, ("weights", "weight access"), self.weights, size, done[-2:-1])

    def prefill(self, graph: Graph, layers: int) -> None:
        w, parts, part = self.workload, self.parts, self.part_sequences
        tokens = part * w.input_tokens
        before, after = self.layer_kernels(tokens)
        attention = self.attention_prefill_of(part, w.input_tokens)
        kv = w.batch / parts * w.input_tokens * self.model.kv_bytes_per_token_layer
        hidden = self._hidden_bytes() / parts
        done: list[int] = []
        for layer in range(layers):
            graph.layer = layer
            weights = self.fetch_weights(graph, done[parts - 1 :: parts])
            for _ in range(parts):
                loaded = self._load(graph, ("activations", "transfer"), self.activations, hidden, done[-2:-1])
                ready = [self.framework(graph, done[-1:]), *weights, *loaded]
                qkv = graph.work("qkv", before[1], "gpu", before[0], ready)
                scored = graph.work("attention", "compute", "gpu", attention, [qkv])
                self._store(graph, ("store kv", "kv access"), self.kv, kv, [qkv])
                done.append(self.close_layer(graph, after, [scored], tokens))
                self._store(graph, ("activations", "transfer"), self.activations, hidden, done[-1:])
        graph.layer = SETUP
        self.finish(graph, done)

    def kv_share_read(self) -> float:
        """Share of the cached KV that a step reads."""
        return 1.0

    def decode(self, graph: Graph, context: int, layers: int) -> None:
        m, parts, part = self.model, self.parts, self.part_sequences
        sequences = self.workload.batch / parts
        before, after = self.layer_kernels(part)
        kv = sequences * context * m.kv_bytes_per_token_layer * self.kv_share_read()
        new_kv, hidden = sequences * m.kv_bytes_per_token_layer, sequences * m.hidden * FP16_BYTES
        attend = self._cpu_attends if self.tuning.cpu_attention and self.kv.away else self._gpu_attends
        done: list[int] = []
        loads: list[int] = []
        for layer in range(layers):
            graph.layer = layer
            weights = self.fetch_weights(graph, done[parts - 1 :: parts])
            for _ in range(parts):
                # Two buffers: one part's KV may load while the part before it computes.
                cached = self._load_kv(graph, kv, loads + done[-2:-1])
                loads = cached or loads
                loaded = self._load(graph, ("activations", "transfer"), self.activations, hidden, done[-2:-1])
                ready = [self.framework(graph, done[-1:]), *weights, *loaded]
                qkv = graph.work("qkv", before[1], "gpu", before[0], ready)
                scored = attend(graph, context, part, [qkv, *cached])
                self._store(graph, ("store kv", "kv access"), self.kv, new_kv, [qkv])
                done.append(self.close_layer(graph, after, scored, part))
                self._store(graph, ("activations", "transfer"), self.activations, hidden, done[-1:])
        graph.layer = SETUP
        self.finish(graph, done)

    def _load_kv(self, graph: Graph, size: float, after: list[int]) -> list[int]:
        """To the GPU; with attention on the CPU, what drives hold goes to host memory only."""
        what = ("load kv", "kv access")
        if not self.tuning.cpu_attention:
            return self._load(graph, what, self.kv, size, after)
        return (
            [graph.move(*what, ("ssd read", "host dram"), self.kv.disk * size, after)] if self.kv.disk else []
        )

    def _gpu_attends(self, graph: Graph, context: int, part: int, ready: list[int]) -> list[int]:
        seconds = self.attention_of(part, context * self.kv_share_read())
        return [graph.work("attention", "compute", "gpu", seconds, ready)]

    def _cpu_attends(self, graph: Graph, context: int, part: int, ready: list[int]) -> list[int]:
        """The GPU attends to its share beside the CPU, which converts the rest to fp32 in DRAM and multiplies."""
        m, share, tokens = self.model, self.kv.away, context * self.kv_share_read()
        host = self.machine.part("host", self.name)
        flops = 4 * share * part * tokens * m.heads * m.head_size
        streamed = share * part * tokens * m.kv_bytes_per_token_layer / self.pipes["host dram"]
        multiplied = flops / (1e9 * (self.tuning.cpu_attention_gflops or host.cpu_gflops))
        # FlexGen's source: fp16 is read and fp32 written first (1 + 2 times the cache), then fp32 is read.
        seconds = 3 * streamed + max(2 * streamed, multiplied)
        vectors = share * part * m.heads * m.head_size * FP16_BYTES
        sent = graph.move("q", "transfer", ("pcie from gpu",), vectors, ready)
        attended = graph.work("cpu attention", "kv access", "cpu", seconds, [sent])
        back = graph.move("outputs", "transfer", ("pcie to gpu",), vectors, [attended])
        if not self.kv.gpu:
            return [back]
        on_gpu = self.kv.gpu * self.attention_of(part, tokens)
        return [back, graph.work("attention", "compute", "gpu", on_gpu, ready)]

    def flash_written_per_token(self) -> float:
        w = self.workload
        return self.kv.disk * self.model.kv_bytes_per_token * w.total_tokens / w.output_tokens

    def policy(self) -> dict[str, Any]:
        placed = {"weights": self.weights, "kv": self.kv, "activations": self.activations}
        shares = {f"{what}_{t}_percent": p for what, where in placed.items() for t, p in _percent(where)}
        return {
            **shares,
            "gpu_batches": self.tuning.gpu_batches,
            "cpu_attention": self.tuning.cpu_attention,
            "overlap": "next layer's KV and weights load while a layer computes",
        }


def whole_tensors(model: Model, asked: Placement) -> Placement:
    """What percentages of weights come to: FlexGen places whole tensors, by where the middle of each falls when the
    tensors of a block (q, k, v, o; then the FFN's) are laid out over disk, host and GPU in that order."""
    head = model.hidden * model.head_size
    attention = [head * model.heads, head * model.kv_heads, head * model.kv_heads, head * model.heads]
    ffn = [model.experts * model.hidden * model.ffn] * (3 if model.gated else 2)
    held = {"disk": 0.0, "host": 0.0, "gpu": 0.0}
    for block in (attention, ffn):
        passed = 0.0
        for size in block:
            middle = (passed + size / 2) / sum(block)
            passed += size
            tier = "disk" if middle < asked.disk else "host" if middle < 1 - asked.gpu else "gpu"
            held[tier] += size
    total = sum(held.values())
    return Placement(held["gpu"] / total, held["host"] / total)


def _percent(where: Placement) -> list[tuple[str, float]]:
    return [(tier, round(100 * getattr(where, tier), 1)) for tier in ("gpu", "host", "disk")]


class FlexgenDram(FlexgenSsd):
    """KV in host memory, in pinned buffers."""

    name: ClassVar[str] = "flexgen-dram"
    needs: ClassVar[tuple[str, ...]] = ("gpu", "host", "gpu_link")
    kv_on_host: ClassVar[bool] = True


class FlexgenGds(FlexgenSsd):
    """GPUDirect Storage: drives write GPU memory peer to peer. Reads stay synchronous, one window outstanding; the
    library's work takes the place of the page cache's."""

    name: ClassVar[str] = "flexgen-gds"
    disk_path: ClassVar[tuple[str, ...]] = ("ssd read", "pcie to gpu")
    to_disk_path: ClassVar[tuple[str, ...]] = ("pcie from gpu", "ssd write")

    def place(self) -> None:
        if not self.machine.p2p:
            raise ConfigError(
                f"scheme {self.name} moves KV between GPU and drive peer to peer, "
                f"and machine {self.machine.name} has p2p = false"
            )
        super().place()

    @property
    def page_cache_us(self) -> float:
        return self.tuning.cufile_us_per_io


class FlexgenSparq(FlexgenSsd):
    """SparQ on FlexGen: r = sparsity * dh channels of every K, then K and V of the sparsity * S best tokens."""

    name: ClassVar[str] = "flexgen-sparq"

    def kv_share_read(self) -> float:
        """Elements read of K and V: (S r + 2 k dh) / (2 S dh), at most all."""
        return min(1.0, self.workload.sparsity * 1.5)

    def numerics(self) -> str:
        channels = max(1, round(self.workload.sparsity * self.model.head_size))
        return f"float/float/float/sparq:{channels},{self.workload.sparsity:g}"
