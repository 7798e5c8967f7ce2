"""The FPGA engine and its HBM: bytes per format from the spec, rates with the limit that binds, measured cycles.

A decoder layer of the RTL engine takes the time of its weights at the memory's rate and what `measured.fit_layer`
found beside that: cycles per word of cached keys and values, per KV head appended, per hidden element and once.
Published engines are the bare rate.
"""

from __future__ import annotations

from typing import Any

from golden.spec.formats import KV_FORMATS, WEIGHT_FORMATS
from sim import measured
from sim.describe.devices import Fpga
from sim.describe.model import Model
from sim.devices import hbm
from sim.devices.limits import Bandwidth

MATRIX_BLOCKS = ("mv_core",)
"""Calibration tables that describe single matrix-vector products."""


def weight_bits(fpga: Fpga) -> float:
    """Stored bits per weight of the decoder layers, scales included."""
    return fpga.weight_bits or WEIGHT_FORMATS[fpga.weight_format].bits_per_weight


def layer_bytes(fpga: Fpga, model: Model, tokens: int) -> float:
    """Weight bytes of one layer that a step of `tokens` tokens reads."""
    return (model.attention_weights + model.active_ffn_weights(tokens)) * weight_bits(fpga) / 8


def head_bytes(fpga: Fpga, model: Model) -> float:
    """Bytes of the LM head."""
    return model.head_weights * WEIGHT_FORMATS[fpga.head_format].bits_per_weight / 8


def kv_bytes_per_token_layer(fpga: Fpga, model: Model) -> float:
    """Bytes of K and V of one token in one layer."""
    if fpga.kv_bits:
        return 2 * model.kv_heads * model.head_size * fpga.kv_bits / 8
    return 2.0 * model.kv_heads * KV_FORMATS[fpga.kv_format].bytes_per_vector(model.head_size)


def attended_tokens(fpga: Fpga, context: int) -> int:
    """Tokens that attention reads: all, or sinks and window."""
    return min(context, fpga.sink_tokens + fpga.window_tokens) if fpga.window_tokens else context


def stored_bytes(fpga: Fpga, model: Model) -> float:
    """All weights in HBM: layers, LM head, and the embedding where it is a table of its own."""
    heads = head_bytes(fpga, model) * (1 if model.tied_embeddings else 2)
    return model.layers * model.layer_weights * weight_bits(fpga) / 8 + heads


def memory_bandwidth(fpga: Fpga) -> Bandwidth:
    """HBM rate as the engine can take it."""
    limits = {
        **hbm.read_limits(fpga).limits,
        "hbm share reached on the board": fpga.hbm_gb_per_s * fpga.hbm_share,
        "hbm ports at the engine clock": fpga.port_bytes_per_cycle * fpga.clock_mhz / 1e3,
    }
    return Bandwidth("hbm", limits)


def kept_share(fpga: Fpga) -> float:
    """Multiplications per weight: half for 2:4 weights, whose pruned positions cost nothing."""
    return 0.5 if WEIGHT_FORMATS[fpga.weight_format].sparse24 else 1.0


def macs_per_s(fpga: Fpga) -> float:
    """Sustained multiply-accumulates per second of matrix-matrix products."""
    return fpga.macs_per_cycle * fpga.clock_mhz * 1e6 * fpga.mac_share


def stream_s(fpga: Fpga, size_bytes: float) -> float:
    """Time of a layer's operands at the memory's rate."""
    return size_bytes / memory_bandwidth(fpga).bytes_per_s


def product_s(fpga: Fpga, size_bytes: float) -> float:
    """Time of a product that stands alone, such as the LM head: by its measured cycles on the RTL engine."""
    bound_s = stream_s(fpga, size_bytes)
    if fpga.engine == "published":
        return bound_s
    # The share of the bound is taken from the measured configuration (SIM-RTL-SCALE).
    hz = fpga.clock_mhz * 1e6
    return measured.fit(MATRIX_BLOCKS).cycles(bound_s * hz, 1) / hz


def attention_s(fpga: Fpga, model: Model, tokens: float) -> float:
    """Least time of one layer's scores, softmax and mixing over `tokens` cached tokens of all sequences together."""
    if fpga.engine == "published":
        return 0.0
    per = measured.fit_layer(fpga.weight_format).per
    terms = measured.cached_token_terms(model.heads, model.kv_heads, model.head_size)
    each = sum(per[term] * amount for term, amount in terms.items())
    return tokens * each / (fpga.clock_mhz * 1e6)


def beside_weights_s(fpga: Fpga, model: Model, batch: int) -> float:
    """What else a layer takes that no stream hides: vector work and appends of `batch` tokens, and its start."""
    if fpga.engine == "published":
        return 0.0
    per = measured.fit_layer(fpga.weight_format).per
    each = per["kv_heads"] * model.kv_heads + per["hidden"] * model.hidden
    return (batch * each + per["layer"]) / (fpga.clock_mhz * 1e6)


def provenance(fpga: Fpga) -> list[dict[str, Any]]:
    """Where the engine's cycles come from."""
    if fpga.engine == "published":
        return []
    return [
        measured.fit_layer(fpga.weight_format).provenance(),
        measured.fit(MATRIX_BLOCKS).provenance(),
    ]
