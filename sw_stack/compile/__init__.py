"""From a memory map to instruction streams.

- `builder`: emits instructions with the regions they touch and derives the dependency tokens
- `decoder`: decode, prefill and head programs of a decoder
- `program`: encoded programs, registers of a step, size
- `disasm`: text of a program
"""
