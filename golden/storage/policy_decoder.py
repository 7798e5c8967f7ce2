"""The exact decoder with any KV policy over a binary16 cache (docs/formats-storage.md section 7).

The in-storage unit's arithmetic, extended where no RTL exists: SparQ's ranking, Lambda windows, a K offset, head sizes
and groups of queries beyond the unit's. What `golden.storage.decoder` can compute is computed to the same bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from golden.formats.weights import QuantisedWeight
from golden.loaders.checkpoint import Checkpoint
from golden.policies import Dense, KVPolicy, Lambda, Sparf, Sparq
from golden.storage.attention import Far, Softmax, mean_value, sparse
from golden.storage.decoder import StorageDecoder, StoredCache, half
from golden.storage.fp import F16, F32, mul, tree


class FarCache(StoredCache):
    """And what sinks are scored by once they have left the window, Q16 [sinks, Hkv, dh] per layer."""

    def __init__(self, layers: int, kv_heads: int, head_size: int) -> None:
        super().__init__(layers, kv_heads, head_size)
        self.sinks = list(self.k)


class StoragePolicyDecoder(StorageDecoder):
    """A policy of golden.policies (default: dense) over binary16 k and v; `k_offset` as ExactDecoder's."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: str | dict[str, QuantisedWeight] = "w4",
        policy: KVPolicy | None = None,
        k_offset: Tensor | None = None,
    ) -> None:
        super().__init__(checkpoint, weights)
        self.k_offset = k_offset
        self.policy = policy or Dense(self.config.head_size, self.config.group)

    def check_unit(self) -> None:
        """Nothing: no RTL bounds the shape."""

    def new_cache(self) -> FarCache:  # type: ignore[override]
        """An empty cache."""
        return FarCache(self.config.layers, self.config.kv_heads, self.config.head_size)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache: FarCache) -> Tensor:  # type: ignore[override]
        """Rotate, store, select, attend."""
        heads = self.by_head(q, k, v)
        turned = self.store(layer, heads, cache)
        keys, values = cache.k[layer], cache.v[layer]
        if isinstance(self.policy, Sparq):
            return self.token_by_token(layer, turned["q"], keys, values)
        if not isinstance(self.policy, Lambda):
            return self.attend(layer, turned["q"], keys, values)
        new = max(0, self.policy.costs.sinks - cache.length)
        sinks = heads["k"] if self.policy.sink_keys == "raw" else turned["k"]
        cache.sinks[layer] = torch.cat((cache.sinks[layer], sinks[:new]))
        positions = torch.arange(cache.length, len(keys))
        far = self._far(layer, heads["q"], turned["q"], cache.sinks[layer], positions)
        return self.attend_masked(turned["q"], keys, values, self.policy.live(positions, len(keys)), far)

    def _far(
        self, layer: int, raw: Tensor, turned: Tensor, sinks: Tensor, positions: Tensor
    ) -> list[Far] | None:
        """How the queries [T, Hq, dh] score sinks [n, Hkv, dh] outside their window, per KV head."""
        assert isinstance(self.policy, Lambda)
        if not len(sinks):
            return None
        group = self.config.group
        distance = torch.tensor([self.policy.sink_distance])
        queries = self.rotate(layer, "q", raw.transpose(0, 1), distance)
        outside = ~self.policy.in_window(positions, len(sinks)).numpy().repeat(group, 0)
        found = []
        for head in range(self.config.kv_heads):
            mine = slice(head * group, (head + 1) * group)
            q = half(queries[mine].transpose(0, 1).reshape(len(outside), -1))
            lost = self._lost(layer, head, half(turned[:, mine].reshape(len(outside), -1)))
            found.append(Far(q, half(sinks[:, head]), outside, lost))
        return found

    def _lost(self, layer: int, head: int, q: F16) -> F32:
        """What the K offset takes from every score of the queries [n, dh], so that sinks lose it too."""
        if self.k_offset is None:
            return np.zeros(len(q), np.float32)
        return tree(mul(q, half(self.k_offset[layer, head])[None]))

    def head(self, layer: int, q: Tensor, k: Tensor, v: Tensor, head: int) -> tuple[F16, Softmax]:
        """One step of SparQ or SparF of one KV head."""
        assert isinstance(self.policy, Sparq)
        group, costs = self.config.group, self.policy.costs
        queries, keys, values = half(q[head * group : (head + 1) * group]), half(k[:, head]), half(v[:, head])
        n = len(keys)
        trace = sparse(queries, keys, values, mean_value(values), r=costs.r, top=costs.k(n), window=costs.window(n),
                       shares=not isinstance(self.policy, Sparf))  # fmt: skip
        self.record(layer, head, n, trace)
        return trace.output, trace.state
