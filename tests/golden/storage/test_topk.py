"""argtopk against a plain-Python sort, its tie rule, and its refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden.spec import KVStrataError
from golden.storage.attention import channel_keys, largest
from golden.storage.topk import argtopk, select_tokens


def by_sorting(keys, k, window):
    n = len(keys)
    rank = sorted(range(n), key=lambda i: (i < n - window, -keys[i], i))
    return sorted(rank[:k])


@st.composite
def problems(draw):
    values = draw(st.sampled_from([(0, 0), (0, 1), (-3, 3), (-(2**31), 2**31 - 9)]))
    keys = draw(st.lists(st.integers(*values), min_size=1, max_size=80))
    k = draw(st.integers(0, len(keys)))
    return keys, k, draw(st.integers(0, k))


@given(problems())
@settings(max_examples=300, deadline=None)
def test_equals_a_sort_by_key_then_index(problem):
    keys, k, window = problem
    assert argtopk(torch.tensor(keys), k, window=window).tolist() == by_sorting(keys, k, window)


def test_lower_index_wins_among_equals():
    assert argtopk(torch.full((100,), 7), 3).tolist() == [0, 1, 2]
    assert argtopk(torch.tensor([5, 9, 5, 9, 5]), 3).tolist() == [0, 1, 3]


def test_window_is_kept_and_counts():
    assert argtopk(torch.tensor([9, 8, 7, -5, -6]), 3, window=2).tolist() == [0, 3, 4]


def test_scores_are_pooled_before_selection():
    scores = torch.tensor([[10, 0, 6], [0, 10, 6]], dtype=torch.int32)
    assert select_tokens(scores, 1).tolist() == [2]


@pytest.mark.parametrize(
    ("keys", "k", "window", "message"),
    [
        (torch.arange(4), 5, 0, r"k must lie in 0\.\.4, the number of candidates, not 5"),
        (torch.arange(4), -1, 0, "not -1"),
        (torch.arange(4), 2, 3, r"window must lie in 0\.\.2, the number of selected tokens, not 3"),
        (torch.zeros(4), 2, 0, "integers, not torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int32), 1, 0, r"one axis of integers, not torch.int32 \(2, 2\)"),
    ],
)
def test_bad_input_is_named(keys, k, window, message):
    with pytest.raises(KVStrataError, match=message):
        argtopk(keys, k, window=window)


def test_scores_of_the_wrong_type_are_named():
    with pytest.raises(KVStrataError, match=r"scores are \[G, S\] integers, not torch.float32"):
        select_tokens(torch.zeros(2, 64), 1)


def test_the_selection_inside_sparf_follows_the_plain_sort():
    """Keys of channels with infinities and NaN are ordered integers too."""
    rng = np.random.default_rng(3)
    q = rng.normal(size=(4, 64)).astype(np.float16)
    q[0, 5], q[-1, 9] = np.inf, np.nan
    for keys in (channel_keys(q), rng.integers(-3, 3, 200)):
        for k in (1, 30, len(keys)):
            assert largest(keys, k).tolist() == by_sorting(keys.tolist(), k, 0)
