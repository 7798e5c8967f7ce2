"""The FPGA engine and its HBM: bytes per format from the spec, rates with the limit that binds, measured cycles."""

from __future__ import annotations

from golden.spec.formats import KV_FORMATS, WEIGHT_FORMATS
from sim import measured
from sim.describe.devices import Fpga
from sim.describe.model import Model
from sim.devices import hbm
from sim.devices.limits import Bandwidth

MATRIX_BLOCKS = ("engine_layer", "engine", "mv_core")
"""Calibration tables that describe matrix-vector products, the most complete first."""
LAYER_BLOCK = MATRIX_BLOCKS[0]
"""Its rows are whole decoder layers in decode, so its fixed cycles are paid once per layer, not per product."""
PRODUCTS_PER_LAYER = 4
"""Matrix products of a layer that start separately: q-k-v, o, gate-up, down."""


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


def stream_s(fpga: Fpga, size_bytes: float, commands: int, layers: int = 0) -> float:
    """Time to stream operands through the engine: measured cycles for the RTL engine, the bare rate otherwise.

    `commands` products or heads start in it, and `layers` decoder layers end with it: what is paid per product or per
    layer depends on what was measured.
    """
    bound_s = size_bytes / memory_bandwidth(fpga).bytes_per_s
    if fpga.engine == "published":
        return bound_s
    # The share of the bound is taken from the measured configuration (SIM-RTL-SCALE).
    hz, found = fpga.clock_mhz * 1e6, measured.fit(MATRIX_BLOCKS)
    return found.cycles(bound_s * hz, layers if found.block == LAYER_BLOCK else commands) / hz
