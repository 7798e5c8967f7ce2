"""A real layer of SmolLM2 on the in-storage unit: its KV cache on the flash model, dense and SparF, growing context."""

import numpy as np
import pytest
import torch

from golden.float_decoder import FloatDecoder
from golden.llama import english_text, load_model
from golden.spec.storage import Status
from golden.storage import attention
from golden.storage.layout import Geometry
from sw_stack.rtl.storage import Cache, Job, UnitConfig, run

pytestmark = [pytest.mark.rtl, pytest.mark.slow]
UNIT = UnitConfig(channels=2, lanes=3, max_tokens=1024)
LAYER, CONTEXT = 10, 700
STEPS = (1, 2, 15, 16, 17, 31, 33, 64, 100, 128, 250, 256, 257, 400, 512, 600, 699, 700)


@pytest.fixture(scope="module")
def layer():
    """q [Hkv, G, T, dh], k and v [Hkv, T, dh] as float16."""
    checkpoint = load_model()
    decoder, queries, taken = FloatDecoder(checkpoint), [], {}

    def probe(number, operator, operands):
        if number == LAYER and operator == "attention":
            heads = operands["heads"]
            queries.append(heads.q)  # a prompt goes through in pieces; k and v are those of all tokens so far
            taken.update(k=heads.k, v=heads.v)

    decoder.probe = probe
    ids = checkpoint.tokenizer.encode(english_text().text)[:CONTEXT]
    with torch.no_grad():
        decoder.forward(torch.tensor(ids), decoder.new_cache(), last_only=True)
    taken["q"] = torch.cat(queries, 2)
    assert taken["q"].shape[2] == taken["k"].shape[1] == CONTEXT
    return {name: x.half().numpy() for name, x in taken.items()}


@pytest.mark.parametrize("mode", ["dense", "sparf"])
def test_growing_context_is_exact(layer, mode):
    q, k, v = layer["q"], layer["k"], layer["v"]
    cache = Cache(k.shape[2], m=8, geometry=Geometry(channels=2))
    jobs, expected = [], []
    for head in range(len(k)):
        cache.add(0, head, k[head], v[head])
    for tokens in STEPS:
        for head in range(len(k)):
            now = np.ascontiguousarray(q[head, :, tokens - 1])
            here_k, here_v = k[head, :tokens], v[head, :tokens]
            if mode == "dense":
                jobs.append(Job(0, head, now, tokens))
                expected.append(attention.dense(now, here_k, here_v))
                continue
            mean = here_v.mean(0, dtype=np.float32).astype(np.float16)
            top, window = -(-tokens // 8), min(8, -(-tokens // 8))
            jobs.append(Job(0, head, now, tokens, 16, top, window, mean))
            expected.append(attention.sparf(now, here_k, here_v, mean, r=16, top=top, window=window).output)
    result = run(cache, jobs, UNIT, read_ns=5000)
    for number, want in enumerate(expected):
        done = result.completions[number]
        assert done.status == Status.OK
        np.testing.assert_array_equal(
            done.output.view(np.uint16), want.view(np.uint16), err_msg=f"{jobs[number].tokens} tokens"
        )
