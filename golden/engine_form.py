"""A checkpoint as the engine computes it: LayerNorm and most biases taken out beforehand, by identities.

The engine has RMSNorm. Where a model has LayerNorm (OPT), every vector that a norm sees is the residual stream, so its
mean is taken out where the stream is written: from the embedding rows, the positions, and over the rows of `o` and
`down` and their biases. A vector of mean zero has the LayerNorm of its RMSNorm (SliceGPT, arXiv 2401.15024, section
3). The biases that remain are then gathered:

- of a norm: `W (x * w + b) = W (x * w) + W b` joins the bias of each product behind it (the final norm keeps its own);
- of k, without RoPE: it adds the same to all scores of a query, which softmax does not notice;
- of v: the weights of attention sum to one, so `W_o b_v` joins the bias of o.

With RoPE the bias of k would turn with the position: no such model is known, and it is refused.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from golden.formats.weights import QuantisedWeight
from golden.loaders.checkpoint import Checkpoint
from golden.spec import KVStrataError

BIASED = ("q", "o", "up", "down")
"""Products of a layer that keep a bias in the engine form."""


def engine_form(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself if its norms are RMSNorm without biases, else the same function in that form (float32).

    Tensors as in `Checkpoint`, with biases of `BIASED` and of the final norm alone; a tied head becomes a tensor of its
    own, since the embedding loses its mean. KVStrataError for biases with RoPE or a gate.
    """
    config = checkpoint.config
    if config.norm == "rms":
        return checkpoint
    if config.rotates or config.gated or not config.biases:
        raise KVStrataError(
            "LayerNorm goes with biases, learned positions and relu (OPT); "
            f"got positions {config.positions}, activation {config.activation} in {checkpoint.source}."
        )
    found: dict[str, Tensor | QuantisedWeight] = {
        "head": checkpoint.tensor(checkpoint.head_name),
        "embed": _centred(_double(checkpoint, "embed"), 1).float(),
        "positions": _centred(_double(checkpoint, "positions"), 1).float(),
        "norm": checkpoint.tensor("norm"),
        "norm_bias": checkpoint.tensor("norm_bias"),
    }
    for layer in range(config.layers):
        found |= _layer(checkpoint, f"layers.{layer}.", config.group)
    return replace(checkpoint, config=replace(config, norm="rms"), tensors=found).check()


def _layer(checkpoint: Checkpoint, at: str, group: int) -> dict[str, Tensor]:
    w = {
        n: _double(checkpoint, at + n) for n in (*checkpoint.config.linear_shapes(), "attn_norm", "ffn_norm")
    }
    b = {n: _double(checkpoint, f"{at}{n}_bias") for n in w}
    head_size = checkpoint.config.head_size
    values = (w["v"] @ b["attn_norm"] + b["v"]).view(-1, 1, head_size).expand(-1, group, -1).flatten()
    biases = {
        "q": b["q"] + w["q"] @ b["attn_norm"],
        "o": _centred(b["o"] + w["o"] @ values, 0),
        "up": b["up"] + w["up"] @ b["ffn_norm"],
        "down": _centred(b["down"], 0),
    }
    w["o"], w["down"] = _centred(w["o"], 0), _centred(w["down"], 0)
    return {at + n: x.float() for n, x in w.items()} | {f"{at}{n}_bias": x.float() for n, x in biases.items()}


def _double(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.float32(name).double()


def _centred(x: Tensor, axis: int) -> Tensor:
    return x - torch.mean(x, axis, keepdim=True)
