"""The vector files recompute: seeds and corners by the page in plain integers, the real run by its own operands."""

import importlib.util
import pathlib
from fractions import Fraction

import numpy as np
import pytest
import torch

from golden import ops
from golden.attention import attend
from golden.ops import KVCodes
from golden.spec.formats import WEIGHT_FORMATS
from golden.vector_sets import write_all
from golden.vectors import read_vectors

_spec = importlib.util.spec_from_file_location("page", pathlib.Path(__file__).with_name("page.py"))
page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page)


@pytest.fixture(scope="module")
def files(tmp_path_factory, smollm2):
    paths = write_all(tmp_path_factory.mktemp("vectors"), smollm2, seeds=1)
    return {p.stem: read_vectors(p)[1] for p in paths}


@pytest.mark.parametrize("origin", ["corners", "seed0"])
def test_operators_recompute_by_the_page(files, origin):
    at = lambda name: files[f"{name}-{origin}"]  # noqa: E731
    for x, codes, sm, se in zip(
        *(at("a8")[k].tolist() for k in ("x", "y.codes", "y.mantissa", "y.exponent"))
    ):
        assert page.a8(x) == (codes, sm, se)
    norm = at("rmsnorm")
    for x, y in zip(norm["x"].tolist(), norm["y"].tolist()):
        assert (
            page.rmsnorm(
                x, norm["weight.weight"].tolist(), int(norm["weight.exponent"]), int(norm["weight.eps"])
            )
            == y
        )
    rope = at("rope")
    for x, c, s, y in zip(*(rope[k].tolist() for k in ("x", "cos", "sin", "y"))):
        assert page.rope(x, c, s) == y
    for bits in (4, 8):
        kv = at(f"kv{bits}")
        for x, codes, scale, minimum in zip(
            *(kv[k].tolist() for k in ("x", "y.codes", "y.scale", "y.minimum"))
        ):
            assert page.kv(x, bits) == (codes, Fraction(scale, 2**24), Fraction(minimum, 2**24))
    gate, exp2 = at("gate"), at("exp2")
    assert [
        page.gate(g, u) for g, u in zip(gate["gate"].flatten().tolist(), gate["up"].flatten().tolist())
    ] == (gate["y"].flatten().tolist())
    assert [page.exp2_neg(x) for x in exp2["x"].flatten().tolist()] == exp2["y"].flatten().tolist()


@pytest.mark.parametrize("origin", ["corners", "seed0"])
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_products_recompute_by_the_page(files, origin, name):
    v = files[f"product-{name}-{origin}"]
    group = v["weight.codes"].shape[1] // v["weight.scale"].shape[1]
    weight = v["weight.codes"].astype(np.int64) * np.repeat(v["weight.scale"], group, 1)
    if "weight.minimum" in v:
        weight += np.repeat(v["weight.minimum"], group, 1)
    for t in range(len(v["y"])):
        for n in (0, 7, 31):
            row = [Fraction(int(w), 2**24) for w in weight[n]]
            sm, se = int(v["a8.mantissa"][t]), int(v["a8.exponent"][t])
            assert page.product(v["a8.codes"][t].tolist(), sm, se, row) == v["y"][t, n]


@pytest.mark.parametrize("origin", ["corners", "seed0"])
@pytest.mark.parametrize("bits", [4, 8])
def test_attention_recomputes_by_the_page(files, origin, bits):
    v = files[f"attention-kv{bits}-{origin}"]
    cache = [
        [(codes, Fraction(s, 2**24), Fraction(m, 2**24)) for codes, s, m in zip(
            v[f"{x}.codes"][0].tolist(), v[f"{x}.scale"][0].tolist(), v[f"{x}.minimum"][0].tolist())]
        for x in "kv"
    ]  # fmt: skip
    for head in range(2):
        for t in range(3):
            expected = page.attention(v["q"][head, t].tolist(), *cache, v["live"][t].tolist())
            assert expected == v["y"][head, t].tolist()


@pytest.mark.parametrize("origin", ["seed0", "corners", "real"])
def test_the_in_storage_blocks_recompute_by_other_means(files, origin):
    at = lambda name: files[f"storage-{name}-{origin}"]  # noqa: E731
    product, total = at("mul"), at("add")
    native = torch.from_numpy(product["a"]).float() * torch.from_numpy(product["b"]).float()
    finite = native.isfinite().numpy() & (native != 0).numpy()
    assert np.array_equal(native.numpy()[finite].view(np.uint32), product["y"][finite])
    a, b = (torch.from_numpy(total[name].view(np.float32).copy()) for name in "ab")
    finite = (a + b).isfinite().numpy() & (a + b != 0).numpy()
    assert np.array_equal((a + b).numpy()[finite].view(np.uint32), total["y"][finite])
    topk = at("topk")
    keys, window, k = topk["keys"], int(topk["window"]), int(topk["k"])
    order = sorted(range(len(keys) - window), key=lambda i: (-keys[i], i))[: k - window]
    assert topk["y"].tolist() == sorted(order) + list(range(len(keys) - window, len(keys)))
    assert np.array_equal(at("sparf")["tokens"], topk["y"])
    if origin != "corners":
        dense = at("dense")
        q, key, value = (torch.from_numpy(dense[name]).double() for name in "qkv")
        wanted = torch.softmax(q @ key.T / q.shape[1] ** 0.5, -1) @ value
        assert (torch.from_numpy(dense["y"]).double() - wanted).abs().max() < 4e-3 * value.abs().max()


@pytest.mark.parametrize("kind", ["k-token", "v-token", "k-channel"])
def test_the_filter_passes_marked_entries_alone(files, kind):
    page, mask, m = (files[f"storage-filter-{kind}-seed0"][name] for name in ("page", "mask", "m"))
    passed, marked = files[f"storage-filter-{kind}-seed0"]["y"].reshape(-1), np.flatnonzero(mask)
    if kind == "v-token":
        groups = page.reshape(-1, 64, 16) * mask[: len(page) // 64].reshape(-1, 1, 16)
        assert np.array_equal(passed, groups[[g for g in range(len(groups)) if groups[g].any()]].reshape(-1))
    else:
        row = len(page) // int(m) if m else 64
        assert np.array_equal(passed, page.reshape(-1, row)[marked].reshape(-1))


def test_the_real_layer_recomputes_from_its_files(files):
    names = {n.removesuffix("-real") for n in files if n.endswith("-real")}
    assert {"linear-q", "linear-down", "norm-attn", "kv", "attention", "gate", "lambda-attention"} <= names
    down = files["linear-down-real"]
    y = ops.scale_accumulator(*(torch.from_numpy(down[k]) for k in ("acc", "a8.mantissa", "a8.exponent")))
    assert np.array_equal(y.numpy(), down["y"])
    v = {k: torch.from_numpy(x) for k, x in files["attention-real"].items()}
    half = lambda x: x.double() / 2**24  # noqa: E731
    k, values = (KVCodes(v[f"{x}.codes"], half(v[f"{x}.scale"]), half(v[f"{x}.minimum"])) for x in "kv")
    assert torch.equal(attend(v["q"], k, values, v["live"]), v["y"])
    assert not np.array_equal(files["lambda-attention-real"]["y"], files["attention-real"]["y"])
