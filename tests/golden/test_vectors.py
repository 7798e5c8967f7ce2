"""Vector files: round trip, refusal of another version or a changed byte, operands of a real run."""

import json

import numpy as np
import pytest
import torch

from golden import ops, vectors
from golden.exact_decoder import ExactDecoder
from golden.spec import KVStrataError
from golden.vectors import flatten, read_vectors, write_vectors


def test_round_trip_keeps_bits_and_dtypes(tmp_path):
    arrays = {"a": np.arange(-5, 5, dtype=np.int8), "h": np.array([1.5, -0.0, np.inf], np.float16)}
    path = write_vectors(tmp_path / "sub" / "v.npz", arrays, "test", "make vectors", "ab" * 32)
    header, back = read_vectors(path)
    assert (header.generator, header.source_sha256) == ("test", "ab" * 32)
    assert all(np.array_equal(back[k].view(np.uint8), arrays[k].view(np.uint8)) for k in arrays)
    assert [p.name for p in path.parent.iterdir()] == ["v.npz"]


def test_another_version_a_changed_array_and_damage_are_refused(tmp_path, monkeypatch):
    path = write_vectors(tmp_path / "v.npz", {"a": np.arange(4)}, "test", "make vectors-mv")
    monkeypatch.setattr(vectors, "SPEC_VERSION", "999")
    with pytest.raises(KVStrataError, match=r"must be of spec version 999, .* has 1: run make vectors-mv\."):
        read_vectors(path)
    monkeypatch.undo()
    with np.load(path) as file:
        header = json.loads(file["header"].tobytes())
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), a=np.array([0, 1, 2, 4]))
    with pytest.raises(KVStrataError, match=r"must match its hash, .* run make vectors-mv"):
        read_vectors(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(KVStrataError, match=r"must be complete, .* is damaged: run make vectors"):
        read_vectors(path)
    with pytest.raises(KVStrataError, match=r"must exist, got .*absent\.npz: run make vectors"):
        read_vectors(tmp_path / "absent.npz")


def test_only_exact_kinds_are_written(tmp_path):
    with pytest.raises(KVStrataError, match="must hold integers or binary16, got float32 in x"):
        write_vectors(tmp_path / "v.npz", {"x": np.zeros(2, np.float32)}, "test", "make vectors")
    assert not list(tmp_path.iterdir())


def test_operands_of_a_run_recompute_from_the_file_alone(tiny, tmp_path):
    decoder, seen = ExactDecoder(tiny), {}
    decoder.probe = lambda layer, name, operands: seen.setdefault((layer, name), flatten(operands))
    decoder.forward([1, 2, 3], decoder.new_cache())
    _, got = read_vectors(write_vectors(tmp_path / "v.npz", seen[0, "linear.gate"], "t", "make vectors"))
    group = got["weight.codes"].shape[1] // got["weight.scale"].shape[1]
    weight = got["weight.codes"] * np.repeat(got["weight.scale"], group, 1) + np.repeat(
        got["weight.minimum"], group, 1
    )
    assert np.array_equal(got["a8.codes"] @ weight.T, got["acc"])
    y = ops.scale_accumulator(*(torch.from_numpy(got[k]) for k in ("acc", "a8.mantissa", "a8.exponent")))
    assert np.array_equal(y.numpy(), got["y"])
    attention = seen[1, "attention"]
    assert attention["k.codes"].dtype == np.int64
    assert {"q", "k.codes", "k.scale", "k.minimum", "v.codes", "live", "y"} <= set(attention)
