"""OPT: the loader and the float decoder against transformers, the engine form against both."""

import dataclasses
import json

import pytest
import torch

from golden.compression import Recipe, compress
from golden.config import DecoderConfig
from golden.engine_form import engine_form
from golden.exact_decoder import ExactDecoder
from golden.float_decoder import FloatDecoder
from golden.loaders import load
from golden.loaders.safetensors import config_from_json
from golden.spec import KVStrataError

IDS = [5, 9, 2, 44, 7, 7, 90, 13]


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """A random OPT in which every bias and norm weight matters, its folder, and transformers' logits."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(3)
    config = OPTConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, ffn_dim=128, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64, dropout=0.0,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(torch.randn_like(x) * (0.5 if x.ndim == 1 else 0.125))
            if "layer_norm" in name and name.endswith("weight"):
                x += 1
        logits = model(torch.tensor([IDS])).logits[0]
    folder = tmp_path_factory.mktemp("opt")
    model.save_pretrained(folder)
    return folder, load(folder), logits


def run(decoder, cut=3):
    """Logits of IDS, the first `cut` in one step and the others one by one."""
    cache = decoder.new_cache()
    parts = [IDS[:cut], *([i] for i in IDS[cut:])]
    return decoder.real_logits(torch.cat([decoder.forward(part, cache) for part in parts]))


def test_transformers_agrees(opt):
    _, checkpoint, expected = opt
    assert (run(FloatDecoder(checkpoint)) - expected).abs().max() < 1e-4


def test_the_engine_form_is_the_same_function(opt):
    _, checkpoint, expected = opt
    form = engine_form(checkpoint)
    assert form.config == dataclasses.replace(checkpoint.config, norm="rms")
    assert engine_form(form) is form
    assert (run(FloatDecoder(form)) - expected).abs().max() < 1e-4
    # Everything that is written to the residual stream has no mean.
    hidden = FloatDecoder(form).hidden(IDS, FloatDecoder(form).new_cache())
    assert (hidden.mean(-1).abs() < 1e-5).all()
    assert hidden.std() > 0.1


@pytest.mark.parametrize("dropped", ["positions", "norm_bias", "layers.1.q_bias", "layers.0.o_bias", "layers.1.up_bias",
                                     "layers.0.down_bias"])  # fmt: skip
def test_every_part_of_the_engine_form_matters(opt, dropped):
    _, checkpoint, expected = opt
    form = engine_form(checkpoint)
    changed = {**form.tensors, dropped: torch.zeros_like(form.tensors[dropped])}
    assert (run(FloatDecoder(dataclasses.replace(form, tensors=changed))) - expected).abs().max() > 1e-2


def test_integers_stay_close_to_transformers(opt):
    """w8 and KV8: what the residual stream's mean costs in integers is included, no LayerNorm takes it out again."""
    _, checkpoint, expected = opt
    decoder = ExactDecoder(checkpoint, "w8", "kv8")
    got = run(decoder)
    assert (got - expected).square().mean().sqrt() < 0.03 * expected.std()
    assert torch.equal(run(decoder, cut=1), got)
    hidden = decoder.hidden(IDS, decoder.new_cache()).double()
    assert (hidden.mean(-1).abs() / hidden.square().mean(-1).sqrt()).max() < 2**-7


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"do_layer_norm_before": False}, "an OPT model must have do_layer_norm_before True, got False"),
        ({"activation_function": "gelu"}, "an OPT model must have activation_function relu, got gelu"),
        ({"word_embed_proj_dim": 32}, "an OPT model must have word_embed_proj_dim 64, got 32"),
    ],
)
def test_other_shapes_are_refused(opt, change, text):
    raw = json.loads((opt[0] / "config.json").read_text())
    with pytest.raises(KVStrataError, match=text):
        config_from_json(raw | change, "here")


def test_missing_sizes_and_wrong_names_are_refused(opt):
    folder, checkpoint, _ = opt
    raw = json.loads((folder / "config.json").read_text())
    del raw["ffn_dim"]
    with pytest.raises(KVStrataError, match="config.json must give ffn_dim, missing in here"):
        config_from_json(raw, "here")
    with pytest.raises(KVStrataError, match="a model's activation must be one of silu, relu, got gelu"):
        dataclasses.replace(checkpoint.config, activation="gelu")
    rotating = dataclasses.replace(
        checkpoint, config=dataclasses.replace(checkpoint.config, positions="rope")
    )
    with pytest.raises(KVStrataError, match="LayerNorm goes with biases, learned positions and relu"):
        engine_form(rotating)


def test_ready_made_weights_are_of_the_engine_form(opt):
    _, checkpoint, _ = opt
    with pytest.raises(KVStrataError, match="ready-made weights are those of the engine form with its head"):
        ExactDecoder(checkpoint, compress(checkpoint, Recipe("w8")))
    form = engine_form(checkpoint)
    got, plain = (ExactDecoder(form, w) for w in (compress(form, Recipe("w8")), "w8"))
    assert torch.equal(run(got), run(plain))


def test_llama_shapes_are_their_own_engine_form(tiny):
    assert isinstance(tiny.config, DecoderConfig)
    assert engine_form(tiny) is tiny
