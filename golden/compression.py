"""Compression of a checkpoint: 2:4 pruning, rounding with or without error compensation, calibrated on real text.

Letters: N output rows, K inner dimension, G group. The Hessian of a matrix is H = sum x x^T over its calibration
inputs x [K] (Frantar et al., GPTQ and SparseGPT; Sun et al., Wanda: only its diagonal). Layers are compressed one after
the other, as those authors do: the inputs of a layer come through the compressed layers before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from golden.float_decoder import FloatDecoder
from golden.formats.weights import (
    QuantisedWeight,
    check_mask24,
    check_matrix,
    fitting_group,
    group_scales,
    legal_groups,
    magnitude_mask24,
    mask24,
    nearest_codes,
    quantise_weight,
)
from golden.loaders.checkpoint import Checkpoint
from golden.ops import to_q16
from golden.spec import KVStrataError
from golden.spec.formats import W8, WEIGHT_FORMATS, WeightFormat

PRUNERS = ("none", "magnitude", "wanda", "sparsegpt")
ROUNDINGS = ("nearest", "gptq")
DAMPING = 0.01
"""Share of the mean diagonal added to a Hessian, as GPTQ's authors do."""
BLOCK = 128
"""Columns compensated at once where the format has no groups."""
SHARED_INPUT = {"k": "q", "v": "q", "gate": "up"}
"""Matrices that read the same vector share a Hessian."""


@dataclass(frozen=True)
class Recipe:
    """How to compress the layers' matrices; embedding and head always are w8.

    format: `w8`, `w4`, `w2`, `w2s24`, or `float` (pruning alone); group: 0 takes the format's default;
    prune: 2:4 mask by `magnitude`, `wanda` or `sparsegpt` (`none` in dense formats); rounding: `nearest` or `gptq`.
    """

    format: str = "w4"
    group: int = 0
    prune: str = "none"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        """Refuse what contradicts."""
        for field, legal in (
            ("prune", PRUNERS),
            ("rounding", ROUNDINGS),
            ("format", (*WEIGHT_FORMATS, "float")),
        ):
            if getattr(self, field) not in legal:
                raise KVStrataError(f"{field} must be one of {', '.join(legal)}, got {getattr(self, field)}.")
        groups = () if self.format == "float" else legal_groups(WEIGHT_FORMATS[self.format])
        if self.group and self.group not in groups:
            raise KVStrataError(
                f"the group size of {self.format} must be one of {groups or 'none'}, got {self.group}."
            )
        sparse = self.format == "w2s24"
        if sparse and self.prune == "none":
            raise KVStrataError("w2s24 needs a pruning method (magnitude, wanda, sparsegpt), got none.")
        if not sparse and self.format != "float" and self.prune != "none":
            raise KVStrataError(f"{self.format} is dense and cannot hold a 2:4 mask, got prune {self.prune}.")

    @property
    def name(self) -> str:
        """Short name for tables: the format first, then how its codes were found."""
        parts = [self.format + (f"-g{self.group}" if self.group else "")]
        parts += [self.prune] if self.prune != "none" else []
        parts += ["gptq"] if self.rounding == "gptq" else []
        return " ".join(parts)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe of a name as tables write it: `w4`, `w4-g64 gptq`, `w2s24 sparsegpt gptq`, `float wanda`."""
        words = text.split() or [""]
        fmt, _, group = words[0].partition("-g")
        options: dict[str, str] = {}
        for word in words[1:]:
            options["rounding" if word in ROUNDINGS else "prune"] = word
        if (
            (group and not group.isdecimal())
            or ("-g" in words[0] and not group)
            or len(options) < len(words) - 1
        ):
            raise KVStrataError(
                f"weights must be a format with -gGROUP, pruning and rounding at most, got {text}."
            )
        return cls(fmt, int(group or 0), **options)

    @property
    def needs_calibration(self) -> bool:
        """Whether Hessians are needed."""
        return self.prune in {"wanda", "sparsegpt"} or self.rounding == "gptq"

    def weight_format(self, k: int) -> WeightFormat | None:
        """The format at inner dimension k, or None for float."""
        if self.format == "float":
            return None
        fmt = WEIGHT_FORMATS[self.format]
        if self.group:
            fmt = WeightFormat(fmt.name, fmt.bits, self.group, fmt.asymmetric, fmt.sparse24)
        return fitting_group(fmt, k)


class Calibration:
    """Calibration text on its way through a model whose layers are replaced one after the other.

    windows: token ids [T] of independent sequences.
    """

    def __init__(self, checkpoint: Checkpoint, windows: Iterable[Tensor]) -> None:
        self._decoder = FloatDecoder(checkpoint)
        self._batch = [(window, self._decoder.new_cache()) for window in windows]
        if not self._batch:
            raise KVStrataError("calibration needs at least one window of tokens, got none.")
        positions = torch.cat([torch.arange(len(window)) for window, _ in self._batch])
        self._x = self._decoder.embed(torch.cat([window for window, _ in self._batch]), positions)

    def hessians(self, layer: int) -> dict[str, Tensor]:
        """Hessians [K, K] (float64) of a layer by canonical name of the first matrix that reads each input."""
        found: dict[str, Tensor] = {}

        def collect(at: int, operator: str, operands: dict[str, Any]) -> None:
            name = operator.removeprefix("linear.")
            if operator.startswith("linear.") and name not in SHARED_INPUT:
                x = operands["x"].double()
                found[f"layers.{at}.{name}"] = x.T @ x

        self._decoder.probe = collect
        self._decoder.layer(layer, self._x, self._batch)
        self._decoder.probe = None
        return found

    def replace(self, layer: int, weights: Mapping[str, Tensor | QuantisedWeight]) -> None:
        """Go on behind a layer with its matrices as compressed."""
        for name, w in weights.items():
            dense = w.dequantise() if isinstance(w, QuantisedWeight) else w
            self._decoder.tensors[name] = dense.to(self._x.dtype)
        self._x = self._decoder.layer(layer, self._x, self._batch)


def calibrate_k_offset(checkpoint: Checkpoint, windows: Iterable[Tensor]) -> Tensor:
    """K offset of the engine, int64 q16 [layers, Hkv, dh]: mean of the rotated keys over windows of token ids [T].

    Softmax does not notice a constant vector taken from every key; the codes then need not spend their range on it.
    """
    decoder = FloatDecoder(checkpoint)
    means: list[list[Tensor]] = [[] for _ in range(checkpoint.config.layers)]
    ends: list[int] = []

    def collect(layer: int, operator: str, operands: dict[str, Any]) -> None:
        # The last step of a window sees all of its keys.
        if operator == "attention" and int(operands["heads"].positions[-1]) + 1 == ends[-1]:
            means[layer].append(operands["heads"].k.double().mean(1))

    decoder.probe = collect
    for window in windows:
        ends.append(len(window))
        decoder.hidden(window, decoder.new_cache())
    if not ends:
        raise KVStrataError("calibration needs at least one window of tokens, got none.")
    return to_q16(torch.stack([torch.stack(m).mean(0) for m in means]))


def hessian_of(hessians: dict[str, Tensor], name: str) -> Tensor:
    """The Hessian of a matrix by canonical name."""
    prefix, _, last = name.rpartition(".")
    key = f"{prefix}.{SHARED_INPUT.get(last, last)}"
    if key not in hessians:
        raise KVStrataError(f"calibration must cover {name}, got no inputs for {key}.")
    return hessians[key]


def wanda_mask24(weight: Tensor, hessian: Tensor) -> Tensor:
    """2:4 mask bool [N, K] by |w| times the norm of its input."""
    return mask24(weight.abs() * hessian.diagonal().sqrt())


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped inverse Hessian [K, K]."""
    diagonal = hessian.diagonal()
    damp = DAMPING * diagonal.mean().clamp(min=1e-8)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian + torch.eye(len(hessian)) * damp))
    return torch.linalg.cholesky(inverse, upper=True)


def compensate(
    weight: Tensor,
    hessian: Tensor,
    fmt: WeightFormat | None,
    kept: Tensor | None = None,
    prune24: bool = False,
) -> Tensor | QuantisedWeight:
    """Round (and prune) [N, K] column by column, moving each column's error to those not yet done.

    fmt None prunes alone and returns a float64 matrix. kept: a fixed 2:4 mask; prune24: choose the mask on the way
    (SparseGPT: least w**2 / diag(H^-1)**2 of every four, decided per block before its first column is rounded).
    Group scales are set when the group is reached, from the weights as corrected by then.
    """
    work = weight.double().clone()
    factor = _inverse_factor(hessian.double())
    n, k = work.shape
    block = fmt.group if fmt else min(BLOCK, k)
    mask = torch.ones(n, k, dtype=torch.bool) if kept is None else kept.clone()
    codes = torch.zeros(n, k, dtype=torch.int8)
    scales, minima = [], []
    for start in range(0, k, block):
        end = min(start + block, k)
        part = slice(start, end)
        if prune24:
            mask[:, part] = mask24(work[:, part].square() / factor.diagonal()[part].square())
        if fmt:
            scale, minimum = group_scales(work[:, part], fmt, mask[:, part] if fmt.sparse24 else None)
            scales.append(scale)
            minima.append(minimum)
        errors = torch.zeros(n, end - start, dtype=torch.float64)
        for j in range(start, end):
            column = work[:, j]
            value = column * mask[:, j]
            if fmt:
                code = nearest_codes(value, scale, minimum, fmt) * (mask[:, j] if fmt.sparse24 else 1)
                codes[:, j] = code.to(torch.int8)
                value = code * scale if minimum is None else code * scale + minimum
            error = (column - value) / factor[j, j]
            errors[:, j - start] = error
            work[:, j:end] -= error[:, None] * factor[j, j:end]
            work[:, j] = value
        work[:, end:] -= errors @ factor[part, end:]
    if fmt is None:
        return work
    minimum_all = None if minima[0] is None else torch.stack([m for m in minima if m is not None], 1)
    sparse_mask = mask if fmt.sparse24 else None
    return QuantisedWeight(fmt, codes, torch.stack(scales, 1), minimum_all, sparse_mask).check()


def compress_matrix(
    weight: Tensor, recipe: Recipe, hessian: Tensor | None = None
) -> Tensor | QuantisedWeight:
    """One matrix [N, K] by a recipe; hessian [K, K] where the recipe needs calibration."""
    fmt = recipe.weight_format(weight.shape[1])
    if fmt is not None:
        check_matrix(weight, fmt)
    if recipe.needs_calibration and hessian is None:
        raise KVStrataError(f"the recipe {recipe.name} needs calibration, got none.")
    weight = weight.double()
    if recipe.prune == "sparsegpt" and (recipe.rounding == "gptq" or fmt is None):
        assert hessian is not None
        return compensate(weight, hessian, fmt, prune24=True)
    if recipe.prune == "sparsegpt":
        assert hessian is not None
        pruned = compensate(weight, hessian, None, prune24=True)
        assert isinstance(pruned, Tensor)
        return quantise_weight(pruned, fmt, mask24(pruned.abs())) if fmt else pruned
    kept = None
    if recipe.prune == "wanda":
        assert hessian is not None
        kept = wanda_mask24(weight, hessian)
    elif recipe.prune == "magnitude":
        kept = magnitude_mask24(weight)
    if kept is not None:
        check_mask24(kept, weight)
    if recipe.rounding == "gptq":
        assert hessian is not None
        return compensate(weight, hessian, fmt, kept)
    if fmt is None:
        return weight if kept is None else weight * kept
    return quantise_weight(weight, fmt, kept)


def compress(
    checkpoint: Checkpoint, recipe: Recipe, windows: Iterable[Tensor] | None = None
) -> dict[str, Tensor | QuantisedWeight]:
    """Every matrix of a checkpoint by a recipe, calibrated on `windows` of token ids where it needs that. A tensor that
    the file already holds in the recipe's plain format is taken as it is; embedding and head are w8 (left in float by
    the `float` recipe)."""
    if recipe.needs_calibration and windows is None:
        raise KVStrataError(f"the recipe {recipe.name} needs calibration, got none.")
    text = Calibration(checkpoint, windows) if recipe.needs_calibration and windows is not None else None
    found: dict[str, Tensor | QuantisedWeight] = {}
    for layer in range(checkpoint.config.layers):
        hessians = text.hessians(layer) if text else {}
        done = {
            name: _compressed(checkpoint, recipe, name, hessians)
            for name in (f"layers.{layer}.{last}" for last in checkpoint.config.linear_shapes())
        }
        if text:
            text.replace(layer, done)
        found |= done
    if recipe.format != "float":
        for name in {"embed", checkpoint.head_name}:
            stored = checkpoint.tensor(name)
            found[name] = stored if isinstance(stored, QuantisedWeight) else quantise_weight(stored, W8)
    return found


def _compressed(
    checkpoint: Checkpoint, recipe: Recipe, name: str, hessians: dict[str, Tensor]
) -> Tensor | QuantisedWeight:
    stored = checkpoint.tensor(name)
    if isinstance(stored, QuantisedWeight) and stored.format == recipe.weight_format(stored.shape[1]):
        return stored
    hessian = hessian_of(hessians, name) if recipe.needs_calibration else None
    return compress_matrix(checkpoint.float32(name), recipe, hessian)


def bits_per_weight(weights: dict[str, Tensor | QuantisedWeight], float_bits: float = 16.0) -> float:
    """Mean storage of the layers' matrices, scales and minima included; float matrices count `float_bits`."""
    matrices = [w for name, w in weights.items() if name.startswith("layers.")]
    bits = sum(
        w.packed_bytes * 8 if isinstance(w, QuantisedWeight) else w.numel() * float_bits for w in matrices
    )
    return bits / sum(w.shape[0] * w.shape[1] for w in matrices)
