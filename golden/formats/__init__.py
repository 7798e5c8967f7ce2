"""Number formats as objects: the object that quantises is the one that counts bits and packs them."""

from golden.formats.weights import QuantisedWeight, import_gguf_block, quantise_weight

__all__ = ["QuantisedWeight", "import_gguf_block", "quantise_weight"]
