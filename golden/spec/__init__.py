"""The one contract between golden models, hardware, system model and software stack.

Standard library only, so that everyone may import it. Sections:

- `golden.spec.formats`: number formats and integer arithmetic constants (docs/formats.md)
- `golden.spec.engine`: instruction set, registers and weight image of the engine
- `golden.spec.storage`: flash pages, page descriptors and NVMe fields of the in-storage unit

Nobody else defines a field width.
"""

SPEC_VERSION = "1"
"""Stamped into every file that one stage hands to another; a reader refuses any other."""


class KVStrataError(Exception):
    """A user-facing error: one sentence with the rule, the offender and the value received.

    The command line prints the message alone and exits non-zero; nothing half-written stays behind.
    """
