"""Second link: the captured operands through Verilated RTL, compared element by element with the golden model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golden.spec import KVStrataError

if TYPE_CHECKING:
    import numpy as np

PRODUCTS = {"linear.k": "w4", "linear.o": "w4", "linear.down": "w4", "linear.head": "w8"}
"""Captured matrix products by weight format."""
ENGINE = "small"
DENSE_ARRAYS = ("q", "k", "v", "y")


def first_difference(got: np.ndarray, wanted: np.ndarray) -> str | None:
    """None if every element is equal, else where the first one differs and by what: the report's wording."""
    import numpy as np

    if got.shape != wanted.shape:
        return f"shape {got.shape} instead of {wanted.shape}"
    differing = np.argwhere(got != wanted)
    if not len(differing):
        return None
    at = tuple(int(i) for i in differing[0])
    return f"element {list(at)}: RTL {got[at]}, golden {wanted[at]} ({len(differing)} of {got.size} differ)"


def check(
    operands: Path, engine: str = ENGINE, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """A row per product and head: name, shape, elements, bit_exact, first_difference, cycles, bound_cycles.

    `operands` is what `sw_stack.chain.language` captured. Raises `KVStrataError` if it is missing or incomplete.
    """
    stored = _load(operands)
    rows = []
    for name, weight_format in PRODUCTS.items():
        progress(f"{name} ({weight_format}) on the engine core")
        part = {key.split("/")[1]: value for key, value in stored.items() if key.startswith(f"{name}/")}
        rows.append(_product_row(name, weight_format, engine, part))
    progress("one attention head on the in-storage kernel")
    from golden.storage.attention import dense

    rows.append(_head_row(stored, dense(*(stored[f"head/{name}"] for name in "qkv"))))
    return rows


def check_vectors(
    paths: Sequence[Path], engine: str = ENGINE, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """The same rows for vector files of `make vectors`: matrix products and dense heads.

    Raises `KVStrataError` for a file that is damaged or of another spec version, or of an operator that has no RTL run
    of its own (those are held to the same golden operators by the block tests).
    """
    from golden.vectors import read_vectors

    rows = []
    for path in paths:
        progress(f"{path.name} on the RTL")
        stored = read_vectors(path)[1]
        if set(DENSE_ARRAYS) == set(stored):
            rows.append(_head_row({f"head/{name}": stored[name] for name in "qkv"}, stored["y"]))
        elif path.name.startswith("product-"):
            rows.append(_vector_product(path, engine, stored))
        else:
            raise KVStrataError(
                f"vector files with an RTL run of their own are product-* and storage-dense-*, not {path.name}"
            )
        rows[-1]["name"] += f" ({path.name})"
    return rows


def _vector_product(path: Path, engine: str, stored: Mapping[str, np.ndarray]) -> dict[str, Any]:
    minimum = stored.get("weight.minimum")
    part = {
        "codes": stored["weight.codes"],
        "scale": stored["weight.scale"] / 2**24,
        "a_codes": stored["a8.codes"],
        "a_mantissa": stored["a8.mantissa"],
        "a_exponent": stored["a8.exponent"],
        "y": stored["y"],
    } | ({} if minimum is None else {"minimum": minimum / 2**24})
    return _product_row("product", path.name.split("-")[1], engine, part)


def _load(operands: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        stored = load_file(operands)
    except (OSError, SafetensorError) as error:
        raise KVStrataError(
            f"captured operands are a safetensors file, but {operands} is not ({error})"
        ) from error
    wanted = [f"{name}/y" for name in PRODUCTS] + ["head/q", "head/k", "head/v"]
    if missing := [name for name in wanted if name not in stored]:
        raise KVStrataError(f"{operands} lacks the tensor {missing[0]}: run make sim to capture it again")
    return stored


def _product_row(
    name: str, weight_format: str, engine: str, part: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    import numpy as np

    from golden.spec.engine import ENGINE_CONFIGS
    from golden.spec.formats import WEIGHT_FORMATS
    from sw_stack.rtl.matvec import run_matvec

    run = run_matvec(
        part["codes"],
        part["scale"],
        part.get("minimum"),
        part["a_codes"].astype(np.int8),
        (part["a_mantissa"], part["a_exponent"]),
        WEIGHT_FORMATS[weight_format],
        ENGINE_CONFIGS[engine],
    )
    difference = first_difference(run.outputs.reshape(part["y"].shape), part["y"].astype(np.int32))
    rows, inner = part["codes"].shape
    return {
        "name": f"engine matrix unit ({engine}), {name}",
        "shape": f"{rows} x {inner} {weight_format}",
        "elements": run.outputs.size,
        "bit_exact": difference is None,
        "first_difference": difference,
        "cycles": run.cycles,
        "bound_cycles": run.bound_cycles,
    }


def _head_row(stored: Mapping[str, np.ndarray], wanted: np.ndarray) -> dict[str, Any]:
    import numpy as np

    from sw_stack.rtl.attention import run_head

    q, k, v = (stored[f"head/{name}"] for name in "qkv")
    run = run_head(q, k, v)
    difference = first_difference(run.output.view(np.uint16), wanted.view(np.uint16))
    return {
        "name": "in-storage attention kernel, one KV head",
        "shape": f"{len(q)} queries, {k.shape[0]} tokens x {k.shape[1]}",
        "elements": q.size,
        "bit_exact": difference is None,
        "first_difference": difference,
        "cycles": run.cycles,
        "bound_cycles": run.bound_cycles,
    }
