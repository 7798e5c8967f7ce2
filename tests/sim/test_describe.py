"""Descriptions: every preset loads, and every violation is one sentence with rule, offender and value."""

import json
from pathlib import Path

import pytest

from golden.spec.engine import ENGINE_CONFIGS
from sim.describe.base import ConfigError, build, listed, load
from sim.describe.devices import Csd, Fpga, Gpu, Host, Link, Ssd
from sim.describe.machine import load_machine
from sim.describe.model import Model, load_model
from sim.describe.workload import Workload

CLASSES = {"gpu": Gpu, "host": Host, "link": Link, "ssd": Ssd, "csd": Csd, "fpga": Fpga, "model": Model}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_preset_loads_with_a_source_per_value(kind):
    assert listed(kind)
    for name in listed(kind):
        rows = load(CLASSES[kind], name).provenance()
        assert rows
        assert all(row["source"] for row in rows), name


@pytest.mark.parametrize("name", listed("machine"))
def test_every_machine_resolves(name):
    assert load_machine(name).devices()


def written(tmp_path, kind, name, **changes):
    text = (Path("sim/presets") / kind / f"{name}.toml").read_text()
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / f"{name}.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "hbm_gb_per_s = 768.0",
            "hbm_gbps = 6144.0",
            r"unknown field hbm_gbps = 6144.0 \(did you mean hbm_gb_per_s\?\).*by 8",
        ),
        (
            "hbm_gb_per_s = 768.0",
            "hbm_gb_per_s = -1.0",
            r"gpu a6000: field hbm_gb_per_s: .*greater than 0, got -1.0",
        ),
        ("hbm_gb_per_s = 768.0\n", "", r"field hbm_gb_per_s is required and missing"),
        ("hbm_gb_per_s = 768.0", "hbm_gb_per_s = 61440.0", r"below 20000 \(is it in Gb/s\?\), got 61440.0"),
        ("sm_count = 84", "sm_count = 8.5", r"field sm_count: .*got 8.5"),
        ("tdp_w = 300.0", "tdp_w = 20.0", r"idle_w must be below tdp_w = 20.0, got 25.0"),
        ('sm_count = "NVIDIA', 'sm_cuont = "NVIDIA', r"value sm_count = 84 has no entry in \[source\]"),
        ("[source]", "[source", r"is not valid TOML"),
    ],
)
def test_a_broken_gpu_is_one_sentence(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(Gpu, written(tmp_path, "gpu", "a6000", x=(old, new)))
    assert "\n" not in str(caught.value)


def test_plausibility_of_a_drive_names_the_unit(tmp_path):
    path = written(tmp_path, "csd", "instcsd", x=("channel_gb_per_s = 1.4", "channel_gb_per_s = 1400.0"))
    with pytest.raises(
        ConfigError, match=r"channel_gb_per_s must be below 10 \(is it in Gb/s or MB/s\?\), got 1400.0"
    ):
        load(Csd, path)


def test_unknown_names_come_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"unknown gpu preset 'a600'.*did you mean a6000"):
        load(Gpu, "a600")
    with pytest.raises(ConfigError, match="has no device 'gpus'"):
        load_machine("reference", {"gpus.tdp_w": 1})
    with pytest.raises(ConfigError, match=r"unknown field tpd_w = 1.*did you mean tdp_w"):
        load_machine("reference", {"gpu.tpd_w": 1})


def test_an_override_is_traced_to_the_user():
    machine = load_machine("reference", {"csd.channels": 16, "csd_count": 4})
    assert (machine.csd.channels, machine.csd_count) == (16, 4)
    row = next(r for r in machine.csd.provenance() if r["field"] == "channels")
    assert row["source"] == "set by the user"


def test_published_parameter_counts_and_kv_sizes():
    opt, llama = load_model("opt-13b"), load_model("llama-2-7b")
    assert opt.kv_bytes_per_token == 819_200
    assert opt.parameters == pytest.approx(12.85e9, rel=0.002)
    assert llama.layers * llama.layer_weights == 6_476_005_376
    assert llama.head_weights == 131_072_000
    assert load_model("mixtral-8x7b").parameters == pytest.approx(46.7e9, rel=0.005)
    assert load_model("smollm2-135m").parameters == pytest.approx(134.5e6, rel=0.005)


def test_a_config_json_gives_the_preset_shape(tmp_path):
    config = {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert load_model(path).parameters == load_model("llama-2-7b").parameters
    path.write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(ConfigError, match="caches? keys and values per head, got 'mamba'"):
        load_model(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        load_model(path)


def test_heads_must_divide_into_groups():
    bad = {**load_model("llama-2-7b").model_dump(), "kv_heads": 5}
    with pytest.raises(ConfigError, match="heads must be a multiple of kv_heads = 5, got 32"):
        build(Model, bad, "model")


def test_workload_refuses_nonsense():
    with pytest.raises(ConfigError, match="field batch: .*greater than or equal to 1, got 0"):
        build(Workload, {"batch": 0}, "workload")
    with pytest.raises(ConfigError, match="unknown field bach = 4"):
        build(Workload, {"bach": 4}, "workload")


def test_link_payload_matches_the_usual_figures():
    assert load(Link, "pcie4-x16").payload_gb_per_s == pytest.approx(26, rel=0.03)
    assert load(Link, "pcie3-x16").payload_gb_per_s == pytest.approx(13, rel=0.03)
    assert 6.5 <= load(Link, "pcie4-x4").payload_gb_per_s <= 7.0


@pytest.mark.parametrize(("preset", "config"), [("u280", "u280"), ("vhk158", "u280"), ("kv260", "small")])
def test_engines_of_this_repository_have_the_width_that_the_spec_builds(preset, config):
    fpga, built = load(Fpga, preset), ENGINE_CONFIGS[config]
    assert fpga.macs_per_cycle == built.macs_per_cycle
    assert fpga.port_bytes_per_cycle == 64 * built.channels


@pytest.mark.parametrize(
    ("config", "parameters", "kv_heads"),
    [
        # Published sizes, of Qwen2.5-7B, Qwen3-8B, Gemma-7B, GPT-2 XL, Falcon-7B, Phi-2 and Mixtral-8x7B.
        ({"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28,
          "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064}, 7.62e9, 4),
        ({"model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32,
          "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936}, 8.19e9, 8),
        ({"model_type": "gemma", "num_hidden_layers": 28, "hidden_size": 3072, "num_attention_heads": 16,
          "num_key_value_heads": 16, "head_dim": 256, "intermediate_size": 24576, "vocab_size": 256000,
          "tie_word_embeddings": True}, 8.54e9, 16),
        ({"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25, "n_positions": 1024,
          "vocab_size": 50257}, 1.56e9, 25),
        ({"model_type": "falcon", "num_hidden_layers": 32, "hidden_size": 4544, "num_attention_heads": 71,
          "multi_query": True, "vocab_size": 65024, "tie_word_embeddings": True}, 6.92e9, 1),
        ({"model_type": "phi", "num_hidden_layers": 32, "hidden_size": 2560, "num_attention_heads": 32,
          "intermediate_size": 10240, "vocab_size": 51200}, 2.78e9, 32),
        ({"model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
          "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
          "vocab_size": 32000}, 46.7e9, 8),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)  # fmt: skip
def test_configs_of_many_families_give_their_published_size(tmp_path, config, parameters, kv_heads):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    model = load_model(path)
    assert model.parameters == pytest.approx(parameters, rel=0.01)
    assert model.kv_heads == kv_heads


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"model_type": "llama", "hidden_size": 64}',
            "num_hidden_layers or n_layer .*is required and missing",
        ),
        ('{"model_type": "deepseek_v3", "kv_lora_rank": 512}', "keys and values per head, got 'deepseek_v3'"),
        ("[1]", "must hold a JSON object, got list"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_config_that_is_no_such_decoder_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_model(path)
