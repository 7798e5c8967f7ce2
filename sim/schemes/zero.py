"""DeepSpeed ZeRO-Inference: weights and KV in host memory, both streaming through the GPU every step."""

from __future__ import annotations

from typing import Any, ClassVar

from sim.core.graph import SETUP, Graph
from sim.describe.devices import Host
from sim.describe.model import FP16_BYTES
from sim.devices.drive import io_latency_us, write_bandwidth
from sim.devices.limits import Bandwidth
from sim.result import Residency
from sim.schemes.base import GB, GpuScheme

STORE_PATH = ("pcie from gpu", "pageable copy", "host dram")


class ZeroInference(GpuScheme):
    """Weights are pinned and prefetched; KV is pageable, so its copies are staged, when the layer needs them.

    Frameworks that concatenate the cache rewrite all of it every step (SIM-ZERO-CAT), blocking until it is stored.
    Where host memory is exceeded, KV swaps: a cyclic scan under LRU misses on every page, so all of it goes out and
    comes back through swap read-ahead, every step.
    """

    name: ClassVar[str] = "zero-inference"
    needs: ClassVar[tuple[str, ...]] = ("gpu", "host", "gpu_link")
    weights_host_share = 1.0

    @property
    def host(self) -> Host:
        """The host."""
        return self.machine.part("host", self.name)

    def _host_bytes(self) -> float:
        w = self.workload
        kv = w.batch * w.total_tokens * self.model.kv_bytes_per_token
        return self.tuning.host_weight_copies * self.model.weight_bytes + kv

    @property
    def _memory_gb(self) -> float:
        return self.host.dram_gb - self.host.reserved_gb

    @property
    def swaps(self) -> bool:
        """Whether weights and KV exceed host memory."""
        return self._host_bytes() / GB > self._memory_gb

    def residency(self) -> list[Residency]:
        w, m = self.workload, self.model
        tokens = min(w.batch * w.input_tokens, self.slice_tokens)
        in_flight = (
            2 * m.layer_weights * FP16_BYTES + 2 * w.batch * w.total_tokens * m.kv_bytes_per_token_layer
        )
        on_gpu = (in_flight + self.workspace_bytes(1, tokens)) / GB
        held = self._host_bytes() / GB
        swap = self.machine.ssd.capacity_gb if self.machine.ssd else 0.0
        return [
            Residency(tier="GPU memory", used_gb=on_gpu, capacity_gb=self.gpu_capacity_gb),
            Residency(tier="host memory and swap", used_gb=held, capacity_gb=self._memory_gb + swap),
        ]

    def connect(self) -> None:
        host = self.host
        self.connect_gpu()
        streaming = {"dram streaming": host.dram_gb_per_s * host.stream_share}
        self._pipe("host dram", Bandwidth("host dram", streaming))
        staging = {"staging by one thread": host.pageable_copy_gb_per_s}
        self._pipe("pageable copy", Bandwidth("pageable copy", staging))
        if self.swaps:
            ssd, link = self.machine.part("ssd", self.name), self.machine.ssd_link
            assert link is not None
            kib = host.swap_cluster_kib
            window_us = io_latency_us(ssd, link, kib) + host.swap_fault_us
            self._pipe("swap in", Bandwidth("swap in", {"swap read-ahead": kib * 1.024 / window_us}))
            drive = write_bandwidth(ssd, link)
            reclaim = {**drive.limits, "kernel reclaim": host.swap_out_gb_per_s}
            self._pipe("swap out", Bandwidth("swap out", reclaim))

    def prefill(self, graph: Graph, layers: int) -> None:
        self.prefill_layers(graph, layers)

    def store_prefill(self, graph: Graph, qkv: int) -> None:
        w = self.workload
        size = w.batch * w.input_tokens * self.model.kv_bytes_per_token_layer
        path = STORE_PATH + (("swap out",) if self.swaps else ())
        graph.move("store kv", "kv access", path, size, [qkv])

    def decode(self, graph: Graph, context: int, layers: int) -> None:
        w, m = self.workload, self.model
        before, after = self.layer_kernels(w.batch)
        kv = w.batch * context * m.kv_bytes_per_token_layer
        new_kv = w.batch * m.kv_bytes_per_token_layer
        attention = self.attention_decode_s(context)
        done: list[int] = []
        for layer in range(layers):
            graph.layer = layer
            ready = [self.framework(graph, done[-1:]), *self.fetch_weights(graph, done)]
            fetched = self._fetch_kv(graph, kv, done[-1:])
            qkv = graph.work("qkv", before[1], "gpu", before[0], ready)
            scored = graph.work("attention", "compute", "gpu", attention, [qkv, fetched])
            # The cache is concatenated, so the whole of it is a new tensor that goes back to the host.
            stored = graph.move("store kv", "kv access", STORE_PATH, kv + new_kv, [scored])
            done.append(self.close_layer(graph, after, [scored, stored]))
        graph.layer = SETUP
        self.finish(graph, done)

    def _fetch_kv(self, graph: Graph, size: float, after: list[int]) -> int:
        if self.swaps:
            after = [graph.move("evict", "kv access", ("swap out", "host dram"), size, after)]
            after = [graph.move("swap in", "kv access", ("swap in", "host dram"), size, after)]
        return graph.move("load kv", "kv access", ("host dram", "pageable copy", "pcie to gpu"), size, after)

    def policy(self) -> dict[str, Any]:
        return {"weights": "host, pinned, one layer ahead", "kv": "host, pageable", "swapping": self.swaps}
