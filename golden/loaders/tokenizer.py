"""Byte-level BPE tokenizer with chat template, built from GGUF metadata or tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from golden.spec import KVStrataError

GGUF_CONTROL_TOKEN = 3


class ChatTokenizer:
    """Text to token ids and back, and a chat prompt in the model's own template.

    Parameters: the tokenizer, the chat template (Jinja, may be empty), ids of the end and begin tokens
    (None if the model has none), and whether a text starts with the begin token.
    """

    def __init__(
        self, tokenizer: Tokenizer, chat_template: str, eos_id: int | None, bos_id: int | None, add_bos: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template
        self.eos_id = eos_id
        self.bos_id = bos_id
        self._add_bos = add_bos

    def encode(self, text: str) -> list[int]:
        """Token ids; control tokens written in the text (such as <|im_end|>) become themselves."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if self._add_bos and self.bos_id is not None else ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def chat(self, prompt: str) -> str:
        """The prompt as one user message, rendered with the model's template up to the answer."""
        if not self._template:
            return prompt
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        special = {
            name: self._tokenizer.id_to_token(i)
            for name, i in (("bos_token", self.bos_id), ("eos_token", self.eos_id))
            if i is not None
        }
        return environment.from_string(self._template).render(
            messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, **special
        )


def tokenizer_from_gguf(metadata: dict[str, Any], source: str) -> ChatTokenizer:
    """The tokenizer of a GGUF file; KVStrataError for a kind other than byte-level BPE."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise KVStrataError(f"a GGUF tokenizer must be byte-level BPE (gpt2), got {kind} in {source}.")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # The "smollm" pre-tokenizer splits every digit off before the GPT-2 pattern.
    steps: list[pre_tokenizers.PreTokenizer] = [byte_level]
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    control = [t for t, kind_ in zip(tokens, kinds) if kind_ == GGUF_CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return ChatTokenizer(
        tokenizer,
        metadata.get("tokenizer.chat_template", ""),
        metadata.get("tokenizer.ggml.eos_token_id"),
        metadata.get("tokenizer.ggml.bos_token_id"),
        bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
    )


def tokenizer_from_folder(folder: Path) -> ChatTokenizer | None:
    """The tokenizer.json of a checkpoint folder, or None if it holds none."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    return ChatTokenizer(Tokenizer.from_file(str(path)), "", None, None, add_bos=False)
