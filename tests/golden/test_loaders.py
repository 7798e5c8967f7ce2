"""Loaders: GGUF and safetensors agree, the tokenizer is the model's own, damaged files end in one sentence."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from golden.float_decoder import FloatDecoder
from golden.loaders import load, smollm2_path
from golden.loaders.safetensors import interleave
from golden.spec import KVStrataError

HF = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
      "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
      "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip
GGUF = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v",
        "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}  # fmt: skip


def half_split(weight, head_size):
    """The inverse of the loader's permutation, written the other way round: row by row."""
    rows = []
    for head in weight.split(head_size):
        rows += [head[0::2], head[1::2]]
    return torch.cat(rows)


def write_safetensors(folder, checkpoint, **changes):
    c = checkpoint.config
    tensors = {
        "model.embed_tokens.weight": checkpoint.tensors["embed"],
        "model.norm.weight": checkpoint.tensors["norm"],
    }
    for i in range(c.layers):
        for name, other in HF.items():
            w = checkpoint.tensors[f"layers.{i}.{name}"]
            w = half_split(w, c.head_size) if name in ("q", "k") else w
            tensors[f"model.layers.{i}.{other}.weight"] = w.contiguous()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": c.layers, "hidden_size": c.hidden,
              "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "intermediate_size": c.ffn,
              "vocab_size": c.vocab, "max_position_embeddings": c.context, "rms_norm_eps": c.norm_eps,
              "rope_theta": c.rope_base, "tie_word_embeddings": True} | changes  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gguf(path, checkpoint, architecture="llama", skip=(), extra=()):
    c, writer = checkpoint.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(c.layers)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.hidden)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    names = {"embed": "token_embd", "norm": "output_norm"}
    names |= {f"layers.{i}.{n}": f"blk.{i}.{g}" for i in range(c.layers) for n, g in GGUF.items()}
    for name, other in names.items():
        if name not in skip:
            writer.add_tensor(f"{other}.weight", checkpoint.tensors[name].numpy())
    for name in extra:
        writer.add_tensor(name, np.zeros(4, np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


def logits(checkpoint):
    decoder = FloatDecoder(checkpoint)
    return decoder.forward([5, 9, 2, 44], decoder.new_cache())


def test_gguf_and_safetensors_of_one_model_agree(tiny, tmp_path):
    a = load(write_gguf(tmp_path / "m.gguf", tiny))
    b = load(write_safetensors(tmp_path, tiny))
    assert a.config.head_size == b.config.head_size == tiny.config.head_size
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in tiny.tensors)
    assert torch.equal(logits(a), logits(tiny))
    assert torch.equal(logits(b), logits(tiny))


def test_transformers_agrees_on_the_safetensors(tiny, tmp_path):
    from transformers import LlamaForCausalLM

    write_safetensors(tmp_path, tiny)
    other = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = other(torch.tensor([[5, 9, 2, 44]])).logits[0]
    assert (logits(load(tmp_path)) - expected).abs().max() < 1e-4


def test_only_q_and_k_are_permuted(tiny):
    w = torch.arange(64.0).view(32, 2)
    assert interleave(w, "layers.0.v", tiny.config) is w
    assert interleave(w, "layers.0.q", tiny.config)[:4, 0].tolist() == [0, 16, 2, 18]


def test_tokenizer_is_the_models_own(smollm2):
    t = smollm2.tokenizer
    assert t.encode("In 1969, hi") == [788, 216, 33, 41, 38, 41, 28, 15876]  # digits stand alone
    assert t.encode("<|im_start|>") == [1]
    text = "def f(x):\n    return x**2  # naïve — ok 🙂"
    assert t.decode(t.encode(text)) == text
    chat = t.chat("Hi")
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert t.decode([15876, 2], skip_special=False).endswith("<|im_end|>")


def test_missing_and_unknown_paths_are_named(tmp_path):
    with pytest.raises(KVStrataError, match=r"a GGUF model must be an existing file, got .*none\.gguf"):
        load(tmp_path / "none.gguf")
    with pytest.raises(KVStrataError, match="a model must be an existing file or folder, got"):
        load(tmp_path / "none")
    (tmp_path / "m.bin").write_bytes(b"x")
    with pytest.raises(KVStrataError, match=r"must be a \.gguf file or a folder with config\.json"):
        load(tmp_path / "m.bin")
    with pytest.raises(KVStrataError, match=r"must hold \*\.safetensors, found none"):
        load(tmp_path)


@pytest.mark.parametrize("size", [0, 3, 20, 3000, 100_000, pytest.param(93_000_000, marks=pytest.mark.slow)])
def test_truncated_gguf_is_one_sentence(tmp_path, size):
    path = tmp_path / "cut.gguf"
    with smollm2_path().open("rb") as source:
        path.write_bytes(source.read(size))
    with pytest.raises(
        KVStrataError, match=r"a GGUF file must (start with the bytes GGUF|be complete), .*cut\.gguf"
    ):
        load(path)


def test_a_file_that_is_not_gguf_is_named(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(KVStrataError, match="must start with the bytes GGUF"):
        load(tmp_path / "m.gguf")


def test_odd_ggufs_are_named(tiny, tmp_path):
    with pytest.raises(KVStrataError, match=r"must hold the tensor layers\.1\.up, missing in a\.gguf"):
        load(write_gguf(tmp_path / "a.gguf", tiny, skip=["layers.1.up"]))
    with pytest.raises(KVStrataError, match=r"must hold Llama tensors alone, got blk\.0\.attn_q\.bias"):
        load(write_gguf(tmp_path / "b.gguf", tiny, extra=["blk.0.attn_q.bias"]))
    with pytest.raises(KVStrataError, match="must be of architecture llama, got gemma"):
        load(write_gguf(tmp_path / "c.gguf", tiny, architecture="gemma"))


def test_a_scale_that_is_not_finite_names_its_tensor(tmp_path):
    """The first block of one matrix of the real model, in its own file format: a scale, a minimum, 32 codes."""
    path = tmp_path / "odd.gguf"
    shutil.copy(smollm2_path(), path)
    [tensor] = [t for t in gguf.GGUFReader(path).tensors if t.name == "blk.3.ffn_up.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.data_offset)
        file.write(np.float16(np.inf).tobytes())
    with pytest.raises(
        KVStrataError, match=r"blk\.3\.ffn_up\.weight is not legal: a scale of w4 must be finite, got NaN"
    ):
        load(path)


def test_odd_folders_are_named(tiny, tmp_path):
    folder = write_safetensors(tmp_path, tiny, model_type="bloom")
    with pytest.raises(KVStrataError, match="must say model_type llama or opt, got bloom"):
        load(folder)
    write_safetensors(tmp_path, tiny, rope_scaling={"rope_type": "llama3"})
    with pytest.raises(KVStrataError, match="RoPE scaling must be none, got llama3"):
        load(folder)
    write_safetensors(tmp_path, tiny, num_attention_heads=3)
    with pytest.raises(KVStrataError, match="query heads must be a multiple of the KV heads, got 3 and 2"):
        load(folder)
    write_safetensors(tmp_path, tiny, intermediate_size=64)
    with pytest.raises(KVStrataError, match=r"layers\.0\.gate must have shape \(64, 64\), got \(128, 64\)"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(KVStrataError, match=r"config\.json must be JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(KVStrataError, match=r"must hold config\.json, missing"):
        load(folder)
    write_safetensors(tmp_path, tiny)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(KVStrataError, match="a safetensors file must be complete"):
        load(folder)
