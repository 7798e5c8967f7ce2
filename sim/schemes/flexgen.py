"""FlexGen: weights and KV placed by percentages over GPU, host and disk, moved layer by layer one layer ahead."""

from __future__ import annotations

from typing import Any, ClassVar

from sim.core.graph import SETUP, Graph
from sim.describe.model import FP16_BYTES
from sim.devices.drive import file_read_bandwidth, write_bandwidth
from sim.devices.limits import Bandwidth
from sim.result import Residency
from sim.schemes.base import GB, GpuScheme, link_bandwidth

KV_GRAIN = 0.1
"""Placement percentages are set in steps of ten, as FlexGen's users do."""
USABLE_SHARE = 0.9
"""Share of GPU memory planned for; the rest is allocator fragmentation (SIM-GPU-USABLE)."""


class FlexgenSsd(GpuScheme):
    """KV on drives, weights in GPU memory as far as they fit and in host memory beyond."""

    name: ClassVar[str] = "flexgen-ssd"
    needs: ClassVar[tuple[str, ...]] = ("gpu", "host", "gpu_link", "ssd")
    eager_scores: ClassVar[bool] = True
    kv_gpu_share = 0.0

    def place(self) -> None:
        """As much KV as fits beside the weights stays on the GPU; weights that do not fit go to the host."""
        free = self.gpu_capacity_gb * USABLE_SHARE * GB - self._working_bytes()
        self.weights_host_share = min(1.0, max(0.0, 1 - free / self.model.weight_bytes))
        left = free - self.model.weight_bytes
        steps = int(max(left, 0.0) / self._kv_bytes() / KV_GRAIN + 1e-9)
        self.kv_gpu_share = min(1.0, steps * KV_GRAIN)
        super().place()

    def _kv_bytes(self) -> float:
        return self.workload.batch * self.workload.total_tokens * self.model.kv_bytes_per_token

    def _working_bytes(self) -> float:
        """Prefill activations and two layers of KV in flight."""
        w, m = self.workload, self.model
        in_flight = 2 * w.batch * w.total_tokens * m.kv_bytes_per_token_layer
        return max(self.workspace_bytes(w.batch, w.input_tokens), in_flight)

    def residency(self) -> list[Residency]:
        host, ssd = self.machine.part("host", self.name), self.machine.part("ssd", self.name)
        weights, kv = self.model.weight_bytes, self._kv_bytes()
        on_gpu = (1 - self.weights_host_share) * weights + self.kv_gpu_share * kv + self._working_bytes()
        return [
            Residency(
                tier="GPU memory", used_gb=on_gpu / GB, capacity_gb=self.gpu_capacity_gb * USABLE_SHARE
            ),
            Residency(
                tier="host memory",
                used_gb=self.weights_host_share * weights / GB,
                capacity_gb=host.dram_gb - host.reserved_gb,
            ),
            Residency(
                tier="drives",
                used_gb=(1 - self.kv_gpu_share) * kv / GB,
                capacity_gb=ssd.capacity_gb * self.machine.ssd_count,
            ),
        ]

    def connect(self) -> None:
        machine, host = self.machine, self.machine.part("host", self.name)
        ssd, link = machine.part("ssd", self.name), machine.ssd_link
        assert link is not None
        self._pipe("pcie to gpu", link_bandwidth("pcie to gpu", machine.gpu_link))
        self._pipe("pcie from gpu", link_bandwidth("pcie from gpu", machine.gpu_link))
        self._pipe(
            "host dram", Bandwidth("host dram", {"dram streaming": host.dram_gb_per_s * host.stream_share})
        )
        self._pipe("ssd read", self._read_bandwidth())
        self._pipe("ssd write", write_bandwidth(ssd, link, machine.ssd_count))

    def _read_bandwidth(self) -> Bandwidth:
        machine, ssd, link = self.machine, self.machine.part("ssd", self.name), self.machine.ssd_link
        assert link is not None
        return file_read_bandwidth(ssd, link, self.tuning.page_cache_us_per_io, machine.ssd_count)

    def prefill(self, graph: Graph, layers: int) -> None:
        self.prefill_layers(graph, layers)

    def store_prefill(self, graph: Graph, qkv: int) -> None:
        w = self.workload
        size = (1 - self.kv_gpu_share) * w.batch * w.input_tokens * self.model.kv_bytes_per_token_layer
        graph.move("store kv", "kv access", ("pcie from gpu", "host dram", "ssd write"), size, [qkv])

    def kv_read_bytes(self, context: int) -> float:
        """Bytes of one layer's KV that come from drives in a step."""
        kv = self.workload.batch * context * self.model.kv_bytes_per_token_layer
        return (1 - self.kv_gpu_share) * kv

    def decode(self, graph: Graph, context: int, layers: int) -> None:
        w, m = self.workload, self.model
        before, after = self.layer_kernels(w.batch)
        attention = self.attention_decode_s(context)
        new_kv = (1 - self.kv_gpu_share) * w.batch * m.kv_bytes_per_token_layer
        done: list[int] = []
        loads: list[int] = []
        for layer in range(layers):
            graph.layer = layer
            # Two buffers: a layer's KV may load while the layer before it computes.
            path = ("ssd read", "host dram", "pcie to gpu")
            loads.append(
                graph.move(
                    "load kv", "kv access", path, self.kv_read_bytes(context), loads[-1:] + done[-2:-1]
                )
            )
            ready = [self.framework(graph, done[-1:]), *self.fetch_weights(graph, done)]
            qkv = graph.work("qkv", before[1], "gpu", before[0], ready)
            scored = graph.work("attention", "compute", "gpu", attention, [qkv, loads[-1]])
            graph.move("store kv", "kv access", ("pcie from gpu", "host dram", "ssd write"), new_kv, [qkv])
            done.append(graph.work("o, ffn", after[1], "gpu", after[0], [scored]))
        graph.layer = SETUP
        self.finish(graph, done)

    def flash_written_per_token(self) -> float:
        w = self.workload
        per_token = FP16_BYTES * 2 * self.model.kv_heads * self.model.head_size * self.model.layers
        return (1 - self.kv_gpu_share) * per_token * w.total_tokens / w.output_tokens

    def policy(self) -> dict[str, Any]:
        return {
            "weights_gpu_percent": round(100 * (1 - self.weights_host_share), 1),
            "kv_gpu_percent": round(100 * self.kv_gpu_share, 1),
            "kv_disk_percent": round(100 * (1 - self.kv_gpu_share), 1),
            "overlap": "next layer's KV and weights load while a layer computes",
        }
