"""The whole decoder on an FPGA card, quantised weights and KV in HBM: AccLLM, FlightLLM, this repository's engine."""

from __future__ import annotations

from typing import Any, ClassVar

from sim.core.graph import SETUP, Graph
from sim.describe.devices import Fpga
from sim.devices import fpga as engine
from sim.result import Residency
from sim.schemes.base import GB, Scheme


class FpgaEngine(Scheme):
    """Engine and HBM of one card. Matrix products stream weights once per step for the whole batch."""

    name: ClassVar[str] = "fpga"
    needs: ClassVar[tuple[str, ...]] = ("fpga",)

    @property
    def fpga(self) -> Fpga:
        """The card."""
        return self.machine.part("fpga", self.name)

    def kept_tokens(self) -> int:
        """Cached tokens per sequence at its end."""
        return engine.attended_tokens(self.fpga, self.workload.total_tokens)

    def residency(self) -> list[Residency]:
        m, fpga = self.model, self.fpga
        kv = self.workload.batch * self.kept_tokens() * m.layers * engine.kv_bytes_per_token_layer(fpga, m)
        used = engine.stored_bytes(fpga, m) + kv
        return [Residency(tier="FPGA HBM", used_gb=used / GB, capacity_gb=fpga.hbm_gb)]

    def connect(self) -> None:
        self._pipe("hbm", engine.memory_bandwidth(self.fpga))

    def prefill(self, graph: Graph, layers: int) -> None:
        w, m, fpga = self.workload, self.model, self.fpga
        tokens = w.batch * w.input_tokens
        weights = self._layer_macs(tokens)
        attended = engine.attended_tokens(fpga, w.input_tokens)
        pairs = attended * (w.input_tokens - attended / 2) * w.batch
        done: list[int] = []
        for layer in range(layers):
            graph.layer = layer
            size = engine.layer_bytes(fpga, m, tokens)
            read = graph.move("weights", "weight access", ("hbm",), size, done[-1:])
            linear = graph.work(
                "matrix products", "compute", "engine", weights / engine.macs_per_s(fpga), done[-1:]
            )
            scores = 2 * pairs * m.heads * m.head_size / engine.macs_per_s(fpga)
            done.append(graph.work("attention", "compute", "engine", scores, [read, linear]))
        graph.layer = SETUP
        self._head(graph, done)

    def decode(self, graph: Graph, context: int, layers: int) -> None:
        w, m, fpga = self.workload, self.model, self.fpga
        macs = self._layer_macs(w.batch)
        done = [graph.work("token in", "framework", "host", fpga.host_us_per_token * 1e-6)]
        # Attention sits between the q-k-v product and the rest of the layer.
        share = m.hidden * m.head_size * (m.heads + 2 * m.kv_heads) / m.layer_weights
        size = engine.layer_bytes(fpga, m, w.batch)
        for layer in range(layers):
            graph.layer = layer
            qkv = self._stream(graph, "q, k, v", "weight access", share * size, share * macs, done)
            scored = self.attend(graph, context, qkv)
            rest = (1 - share) * size, (1 - share) * macs
            done = self._stream(graph, "o, ffn", "weight access", *rest, scored)
            if beside := engine.beside_weights_s(fpga, m, w.batch):
                done = [graph.work("norms, rotation, append", "vector work", "engine", beside, done)]
        graph.layer = SETUP
        self._head(graph, done)

    def attend(self, graph: Graph, context: int, after: list[int]) -> list[int]:
        """Attention of one layer over the cached tokens in HBM; returns what the next product waits for."""
        w, m, fpga = self.workload, self.model, self.fpga
        tokens = engine.attended_tokens(fpga, context)
        size = w.batch * tokens * engine.kv_bytes_per_token_layer(fpga, m)
        pairs = 2 * w.batch * tokens * m.heads * m.head_size
        least = engine.attention_s(fpga, m, w.batch * tokens)
        return self._stream(graph, "cached k, v", "kv access", size, pairs, after, least, "vector work")

    def _layer_macs(self, tokens: int) -> float:
        m = self.model
        return (
            (m.attention_weights + m.experts_per_token * m.ffn_weights)
            * tokens
            * engine.kept_share(self.fpga)
        )

    def _stream(
        self,
        graph: Graph,
        name: str,
        category: str,
        size: float,
        macs: float,
        after: list[int],
        least_s: float = 0.0,
        least_kind: str = "weight access",
    ) -> list[int]:
        """Operands from HBM and the engine's work on them, at the same time; the later one ends it."""
        seconds = engine.stream_s(self.fpga, size)
        for other, kind in ((macs / engine.macs_per_s(self.fpga), "compute"), (least_s, least_kind)):
            if other > seconds:
                seconds, category = other, kind
        graph.move(name, category, ("hbm",), size, after)
        return [graph.work(name, category, "engine", seconds, after)]

    def _head(self, graph: Graph, done: list[int]) -> None:
        m, fpga, batch = self.model, self.fpga, self.workload.batch
        size = engine.head_bytes(fpga, m)
        least = engine.product_s(fpga, size)
        self._stream(graph, "lm head", "weight access", size, m.head_weights * batch, done[-1:], least)

    def provenance(self) -> list[dict[str, Any]]:
        return engine.provenance(self.fpga)

    def numerics(self) -> str:
        fpga = self.fpga
        window = f"lambda-limit:{fpga.sink_tokens}+{fpga.window_tokens}" if fpga.window_tokens else "dense"
        return f"{fpga.weight_format}/a8/{fpga.kv_format}/{window}"

    def policy(self) -> dict[str, Any]:
        fpga = self.fpga
        return {
            "engine": fpga.engine,
            "weight_bits": engine.weight_bits(fpga),
            "kv_format": fpga.kv_format,
            "sink_tokens": fpga.sink_tokens,
            "window_tokens": fpga.window_tokens,
        }
