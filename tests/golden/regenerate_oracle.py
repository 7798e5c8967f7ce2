"""Freezes transformers' logits of SmolLM2 into tests/golden/data/smollm2_oracle.json (make oracle)."""

import json
import pathlib

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as version
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from golden.loaders import smollm2_path
from golden.loaders.checkpoint import file_sha256

TEXT = (
    "<|im_start|>user\nIn 1969, 3 people flew to the Moon; why?<|im_end|>\n<|im_start|>assistant\nThe Apollo"
)
VOCABULARY = list(range(0, 49152, 1536)) + [1, 2, 198, 260, 284, 288]


def transformers_model(path: pathlib.Path):
    """transformers' Llama with transformers' own reading of the GGUF (its names, permutation, dequantisation)."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(tensors, strict=False)
    assert left.missing_keys == ["lm_head.weight"], left
    assert not left.unexpected_keys, left
    model.tie_weights()
    return model.eval()


def main() -> None:
    """Run the independent model once and write its logits at a few vocabulary entries."""
    path = smollm2_path()
    model = transformers_model(path)
    tokens = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(TEXT)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    oracle = {
        "magic": "kvstrata-oracle-1",
        "generator": f"transformers {version}, float32",
        "model_sha256": file_sha256(path),
        "text": TEXT,
        "tokens": tokens,
        "vocabulary": VOCABULARY,
        "argmax": logits.argmax(-1).tolist(),
        "logits": [[round(v, 5) for v in row] for row in logits[:, VOCABULARY].tolist()],
    }
    target = pathlib.Path(__file__).parent / "data" / "smollm2_oracle.json"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(oracle, indent=None, separators=(",", ":")) + "\n")
    temporary.replace(target)


if __name__ == "__main__":
    main()
