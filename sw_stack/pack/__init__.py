"""From a checkpoint to memory images: streams of words per channel, the memory map, the manifest.

- `stream`: one matrix as the words of each channel, and back
- `memory_map`: where every tensor, KV head and table lies
- `image`: writes and opens a directory of images with its manifest
"""
