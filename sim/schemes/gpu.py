"""Weights and KV in GPU memory: the reference wherever it fits."""

from __future__ import annotations

from typing import ClassVar

from sim.core.graph import SETUP, Graph
from sim.result import Residency
from sim.schemes.base import GB, GpuScheme


class GpuResident(GpuScheme):
    """Everything in HBM, fused attention, prefill in slices of a few sequences."""

    name: ClassVar[str] = "gpu-resident"
    needs: ClassVar[tuple[str, ...]] = ("gpu",)
    slice_tokens: ClassVar[int] = 16384
    """Tokens whose prefill activations are alive at once (SIM-GPU-SLICE)."""

    def residency(self) -> list[Residency]:
        w = self.workload
        tokens = min(w.batch * w.input_tokens, self.slice_tokens)
        kv = w.batch * w.total_tokens * self.model.kv_bytes_per_token
        used = self.model.weight_bytes + kv + self.workspace_bytes(1, tokens)
        return [Residency(tier="GPU memory", used_gb=used / GB, capacity_gb=self.gpu_capacity_gb)]

    def connect(self) -> None:
        pass

    def prefill(self, graph: Graph, layers: int) -> None:
        self.prefill_layers(graph, layers)

    def decode(self, graph: Graph, context: int, layers: int) -> None:
        before, after = self.layer_kernels(self.workload.batch)
        attention = self.attention_decode_s(context)
        done: list[int] = []
        dispatched: list[int] = []
        for layer in range(layers):
            graph.layer = layer
            # Launches run ahead of the device, so the framework only shows where kernels are shorter than it.
            dispatched.append(self.framework(graph, dispatched[-1:]))
            qkv = graph.work("qkv", before[1], "gpu", before[0], [dispatched[-1], *done[-1:]])
            scored = graph.work("attention", "kv access", "gpu", attention, [qkv])
            done.append(graph.work("o, ffn", after[1], "gpu", after[0], [scored]))
        graph.layer = SETUP
        self.finish(graph, done)
