"""Any combination of weights, KV representation and policy at a level: which decoder computes it.

Level `float`: formats and policy in float arithmetic (without any of them: the reference). Level `exact`: integers or
stated-order binary16, to the bit; the engine as RTL has it where it can (golden.exact_decoder), its integers extended
(golden.policy_decoder), or for the representation `float` the in-storage unit's binary16 (golden.storage).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from golden.config import DecoderConfig
from golden.decoder import Decoder
from golden.exact_decoder import ExactDecoder
from golden.float_decoder import FloatDecoder
from golden.formats.kv import KiviCodec, codec
from golden.formats.weights import QuantisedWeight
from golden.lambda_window import LambdaWindow
from golden.loaders.checkpoint import Checkpoint
from golden.policies import Dense, KVPolicy, Lambda, Sparq
from golden.policy_decoder import PolicyDecoder
from golden.spec import KVStrataError
from golden.spec.formats import ATTN_TILE, KV_FORMATS
from golden.storage.policy_decoder import StoragePolicyDecoder

LEVELS = ("float", "exact")
Weights = Mapping[str, Tensor | QuantisedWeight]


def decoder_class(level: str, kv: str, policy: KVPolicy, offset: bool = False) -> type[Decoder]:
    """What computes a representation and a policy at a level; `offset`: keys lose a K offset first."""
    if level not in LEVELS:
        raise KVStrataError(f"a level must be {' or '.join(LEVELS)}, got {level}.")
    if level == "float":
        return FloatDecoder
    if not codec(kv).bits:
        return StoragePolicyDecoder
    sinks = policy.costs.sinks if isinstance(policy, Lambda) else 0
    on_rtl = isinstance(policy, Dense) or (isinstance(policy, Lambda) and policy.positions == "limit")
    fits = sinks <= ATTN_TILE and not (offset and sinks) and not isinstance(codec(kv), KiviCodec)
    return ExactDecoder if on_rtl and fits else PolicyDecoder


def check_policy(policy: KVPolicy, config: DecoderConfig) -> None:
    """Raises KVStrataError for a policy that contradicts the model it is to run on."""
    costs = policy.costs
    if (costs.head_size, costs.group) != (config.head_size, config.group):
        raise KVStrataError(
            f"a policy must be of the model's head size and group, {config.head_size} and {config.group}, "
            f"got {costs.head_size} and {costs.group}."
        )
    if isinstance(policy, Sparq) and policy.costs.tokens > config.context:
        raise KVStrataError(
            f"k must be at most the model's context of {config.context} tokens, got {policy.costs.tokens}."
        )


def build(
    checkpoint: Checkpoint,
    level: str,
    weights: str | Weights,
    kv: str = "float",
    policy: KVPolicy | None = None,
    activations: str = "float",
    k_offset: Tensor | None = None,
) -> Decoder:
    """A decoder of a combination. weights: a format's name at the exact level, or tensors by name as
    golden.compression makes them; activations count at the float level alone (the exact one is a8)."""
    c = checkpoint.config
    policy = policy or Dense(c.head_size, c.group)
    chosen = decoder_class(level, kv, policy, k_offset is not None)
    if issubclass(chosen, FloatDecoder):
        if isinstance(weights, str):
            raise KVStrataError(f"weights of the float level must be tensors by name, got {weights}.")
        decoder: Decoder = chosen(checkpoint, torch.float32, weights, activations)
    else:
        assert issubclass(chosen, ExactDecoder)
        decoder = chosen(checkpoint, weights if isinstance(weights, str) else codes_of(weights))
    set_attention(decoder, kv, policy, k_offset)
    return decoder


def codes_of(weights: Weights) -> dict[str, QuantisedWeight]:
    """The weights, if all of them are codes; KVStrataError names the first that is not."""
    for name, w in weights.items():
        if not isinstance(w, QuantisedWeight):
            raise KVStrataError(f"the exact level computes with quantised weights, got floats in {name}.")
    return {name: w for name, w in weights.items() if isinstance(w, QuantisedWeight)}


def set_attention(decoder: Decoder, kv: str, policy: KVPolicy, k_offset: Tensor | None = None) -> None:
    """Give a decoder of the right class another representation, policy and K offset; caches of before are void."""
    check_policy(policy, decoder.config)
    if isinstance(decoder, (FloatDecoder, PolicyDecoder)):
        decoder.policy, decoder.codec = policy, codec(kv)
    elif isinstance(decoder, StoragePolicyDecoder):
        decoder.policy = policy
    elif isinstance(decoder, ExactDecoder):
        decoder.kv_format, decoder.window = KV_FORMATS[kv], engine_window(policy)
    if isinstance(decoder, (FloatDecoder, ExactDecoder)):
        decoder.k_offset = k_offset


def engine_window(policy: KVPolicy) -> LambdaWindow | None:
    """The engine's Lambda window of a policy that it has; None for dense attention."""
    if not isinstance(policy, Lambda):
        return None
    return LambdaWindow(policy.costs.sinks, policy.costs.window, limit=policy.limit)
