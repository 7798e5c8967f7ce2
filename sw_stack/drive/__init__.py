"""Drive software: NVMe commands and queues on the host, the FTL firmware model inside the drive.

- `errors`: typed exceptions, and the status codes they travel as
- `commands`: typed commands and their 64-byte encoding (`golden.spec.nvme` owns the fields)
- `queue`: host memory with PRP lists, submission and completion rings with doorbells
- `flash`: the NAND array: program, read, erase, bad blocks, spare area, power loss
- `ftl`: maps, group buffers, striping, reclaim, recovery
- `controller`: fetches commands, drives the FTL and the attention unit, posts completions
- `driver`: the host's typed face: one method per command
"""
