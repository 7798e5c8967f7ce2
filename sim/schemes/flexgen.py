"""FlexGen: weights and KV placed by percentages over GPU, host and disk, moved layer by layer one layer ahead."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from sim.core.graph import SETUP, Graph
from sim.describe.base import ConfigError
from sim.describe.devices import Link, Ssd
from sim.describe.model import FP16_BYTES
from sim.devices.drive import file_read_bandwidth, io_latency_us, write_bandwidth
from sim.devices.flash import first_page_us
from sim.devices.flash_pages import stream
from sim.devices.limits import Bandwidth
from sim.result import Residency
from sim.schemes.base import GB, GpuScheme, link_bandwidth

KV_GRAIN = 0.1
"""Placement percentages are set in steps of ten, as FlexGen's users do."""
USABLE_SHARE = 0.9
"""Share of GPU memory planned for; the rest is allocator fragmentation (SIM-GPU-USABLE)."""


class FlexgenSsd(GpuScheme):
    """KV on drives, weights in GPU memory as far as they fit and in host memory beyond.

    `tuning.weights_gpu_percent` and `tuning.kv_gpu_percent` set the percentages by hand (sim.policy searches them);
    left out, as much as fits stays on the GPU, weights first. `tuning.gpu_batches` is the block: a layer computes the
    batch in that many parts, so that weights are fetched once for all of them and working memory is that of one.
    """

    name: ClassVar[str] = "flexgen-ssd"
    needs: ClassVar[tuple[str, ...]] = ("gpu", "host", "gpu_link", "ssd")
    eager_scores: ClassVar[bool] = True
    kv_gpu_share = 0.0
    kv_path: ClassVar[tuple[str, ...]] = ("ssd read", "host dram", "pcie to gpu")
    store_path: ClassVar[tuple[str, ...]] = ("pcie from gpu", "host dram", "ssd write")
    kv_tier: ClassVar[str] = "drives"

    def plan(self) -> list[Residency]:
        """Percentages: the user's, or as much on the GPU as fits beside the working set."""
        free = self.gpu_capacity_gb * USABLE_SHARE * GB - self._working_bytes()
        weights, kv = self.tuning.weights_gpu_percent, self.tuning.kv_gpu_percent
        fitting = min(1.0, max(0.0, free / self.model.weight_bytes))
        self.weights_host_share = 1 - (fitting if weights is None else weights / 100)
        left = free - (1 - self.weights_host_share) * self.model.weight_bytes
        steps = int(max(left, 0.0) / self._kv_bytes() / KV_GRAIN + 1e-9)
        self.kv_gpu_share = min(1.0, steps * KV_GRAIN) if kv is None else kv / 100
        return self.residency()

    def _kv_bytes(self) -> float:
        return self.workload.batch * self.workload.total_tokens * self.model.kv_bytes_per_token

    def _working_bytes(self) -> float:
        """Prefill activations, or two layers of KV in flight, whichever is more."""
        w, m = self.workload, self.model
        part = -(-w.batch // self.tuning.gpu_batches)
        in_flight = 2 * part * w.total_tokens * m.kv_bytes_per_token_layer
        hidden = 2 * w.batch * w.input_tokens * m.hidden * FP16_BYTES if self.tuning.gpu_batches > 1 else 0
        return max(self.workspace_bytes(part, w.input_tokens), in_flight) + hidden

    def residency(self) -> list[Residency]:
        host = self.machine.part("host", self.name)
        weights, kv = self.model.weight_bytes, self._kv_bytes()
        on_gpu = (1 - self.weights_host_share) * weights + self.kv_gpu_share * kv + self._working_bytes()
        rest = (1 - self.kv_gpu_share) * kv
        in_host = self.weights_host_share * weights + (rest if self.kv_tier == "host memory" else 0.0)
        tiers = [("GPU memory", on_gpu, self.gpu_capacity_gb * USABLE_SHARE)]
        tiers.append(("host memory", in_host, host.dram_gb - host.reserved_gb))
        if self.kv_tier == "drives":
            drives = self.machine.part("ssd", self.name).capacity_gb * self.machine.ssd_count
            tiers.append(("drives", rest, drives))
        return [
            Residency(tier=name, used_gb=used / GB, capacity_gb=capacity) for name, used, capacity in tiers
        ]

    def connect(self) -> None:
        machine, host = self.machine, self.machine.part("host", self.name)
        for way in ("pcie to gpu", "pcie from gpu"):
            self._pipe(way, link_bandwidth(way, machine.gpu_link))
        streaming = {"dram streaming": host.dram_gb_per_s * host.stream_share}
        self._pipe("host dram", Bandwidth("host dram", streaming))
        if self.kv_tier == "drives":
            assert machine.ssd is not None
            assert machine.ssd_link is not None
            uplink = machine.drive_uplink
            self._pipe("ssd read", self.read_bandwidth(machine.ssd, machine.ssd_link).under(uplink))
            write = write_bandwidth(machine.ssd, machine.ssd_link, machine.ssd_count)
            self._pipe("ssd write", write.under(uplink))

    def read_bandwidth(self, ssd: Ssd, link: Link) -> Bandwidth:
        """KV files are memory-mapped: the page cache reads ahead one window at a time."""
        return file_read_bandwidth(ssd, link, self.page_cache_us, self.machine.ssd_count)

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
        return size_bytes / window * window_s

    def prefill(self, graph: Graph, layers: int) -> None:
        self.prefill_layers(graph, layers)

    def store_prefill(self, graph: Graph, qkv: int) -> None:
        w = self.workload
        size = (1 - self.kv_gpu_share) * w.batch * w.input_tokens * self.model.kv_bytes_per_token_layer
        graph.move("store kv", "kv access", self.store_path, size, [qkv])

    def kv_read_bytes(self, context: int) -> float:
        """Bytes of one layer's KV that come from outside the GPU in a step."""
        kv = self.workload.batch * context * self.model.kv_bytes_per_token_layer
        return (1 - self.kv_gpu_share) * kv

    def attention_s(self, batch: float, context: int) -> float:
        """Seconds of one layer's attention on the GPU for `batch` sequences."""
        return self.attention_of(round(batch), context)

    def decode(self, graph: Graph, context: int, layers: int) -> None:
        w, m, parts = self.workload, self.model, self.tuning.gpu_batches
        part = max(1, round(w.batch / parts))
        before, after = self.layer_kernels(part)
        attention, size = self.attention_s(part, context), self.kv_read_bytes(context) / parts
        new_kv = (1 - self.kv_gpu_share) * w.batch * m.kv_bytes_per_token_layer / parts
        done: list[int] = []
        loads: list[int] = []
        for layer in range(layers):
            graph.layer = layer
            weights = self.fetch_weights(graph, done[parts - 1 :: parts])
            for _ in range(parts):
                # Two buffers: one part's KV may load while the part before it computes.
                loads.append(graph.move("load kv", "kv access", self.kv_path, size, loads[-1:] + done[-2:-1]))
                ready = [self.framework(graph, done[-1:]), *weights]
                qkv = graph.work("qkv", before[1], "gpu", before[0], ready)
                scored = graph.work("attention", "compute", "gpu", attention, [qkv, loads[-1]])
                graph.move("store kv", "kv access", self.store_path, new_kv, [qkv])
                done.append(graph.work("o, ffn", after[1], "gpu", after[0], [scored]))
        graph.layer = SETUP
        self.finish(graph, done)

    def flash_written_per_token(self) -> float:
        w = self.workload
        on_drives = 1 - self.kv_gpu_share if self.kv_tier == "drives" else 0.0
        return on_drives * self.model.kv_bytes_per_token * w.total_tokens / w.output_tokens

    def policy(self) -> dict[str, Any]:
        return {
            "weights_gpu_percent": round(100 * (1 - self.weights_host_share), 1),
            "weights_host_percent": round(100 * self.weights_host_share, 1),
            "kv_gpu_percent": round(100 * self.kv_gpu_share, 1),
            f"kv_{self.kv_tier.split()[0]}_percent": round(100 * (1 - self.kv_gpu_share), 1),
            "activations_gpu_percent": 100.0,
            "gpu_batches": self.tuning.gpu_batches,
            "overlap": "next layer's KV and weights load while a layer computes",
        }


class FlexgenDram(FlexgenSsd):
    """KV in host memory, in pinned buffers. With `tuning.cpu_attention` the CPU attends to it where it lies, and only
    q, k, v and outputs cross the link."""

    name: ClassVar[str] = "flexgen-dram"
    needs: ClassVar[tuple[str, ...]] = ("gpu", "host", "gpu_link")
    kv_path: ClassVar[tuple[str, ...]] = ("host dram", "pcie to gpu")
    store_path: ClassVar[tuple[str, ...]] = ("pcie from gpu", "host dram")
    kv_tier: ClassVar[str] = "host memory"

    def decode(self, graph: Graph, context: int, layers: int) -> None:
        if not self.tuning.cpu_attention:
            super().decode(graph, context, layers)
            return
        w, m = self.workload, self.model
        before, after = self.layer_kernels(w.batch)
        share = 1 - self.kv_gpu_share
        on_gpu = self.kv_gpu_share * self.attention_decode_s(context)
        sent_bytes = share * w.batch * (m.heads + 2 * m.kv_heads) * m.head_size * FP16_BYTES
        out_bytes = share * w.batch * m.heads * m.head_size * FP16_BYTES
        done: list[int] = []
        for layer in range(layers):
            graph.layer = layer
            ready = [self.framework(graph, done[-1:]), *self.fetch_weights(graph, done)]
            qkv = graph.work("qkv", before[1], "gpu", before[0], ready)
            sent = graph.move("q, k, v", "transfer", ("pcie from gpu",), sent_bytes, [qkv])
            attended = graph.work("cpu attention", "kv access", "cpu", self._cpu_attention_s(context), [sent])
            back = graph.move("outputs", "transfer", ("pcie to gpu",), out_bytes, [attended])
            scored = graph.work("attention", "compute", "gpu", on_gpu, [qkv])
            done.append(graph.work("o, ffn", after[1], "gpu", after[0], [scored, back]))
        graph.layer = SETUP
        self.finish(graph, done)

    def _cpu_attention_s(self, context: int) -> float:
        """One layer on the CPU: streaming KV from DRAM, or its multiply-adds, whichever is longer."""
        host, m = self.machine.part("host", self.name), self.model
        flops = 4 * (1 - self.kv_gpu_share) * self.workload.batch * context * m.heads * m.head_size
        return max(self.kv_read_bytes(context) / self.pipes["host dram"], flops / (host.cpu_gflops * 1e9))


class FlexgenGds(FlexgenSsd):
    """GPUDirect Storage: drives write GPU memory peer to peer. Reads stay synchronous, one window outstanding; the
    library's work takes the place of the page cache's."""

    name: ClassVar[str] = "flexgen-gds"
    kv_path: ClassVar[tuple[str, ...]] = ("ssd read", "pcie to gpu")
    store_path: ClassVar[tuple[str, ...]] = ("pcie from gpu", "ssd write")

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

    def _sparse_share(self) -> float:
        """Elements read of K and V: (S r + 2 k dh) / (2 S dh), at most all."""
        return min(1.0, self.workload.sparsity * 1.5)

    def numerics(self) -> str:
        channels = max(1, round(self.workload.sparsity * self.model.head_size))
        return f"float/float/float/sparq:{channels},{self.workload.sparsity:g}"

    def kv_read_bytes(self, context: int) -> float:
        return super().kv_read_bytes(context) * self._sparse_share()

    def attention_s(self, batch: float, context: int) -> float:
        return self.attention_of(round(batch), context * self._sparse_share())
