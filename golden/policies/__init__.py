"""KV policies: what is kept, selected and attended, in float arithmetic.

A policy is one object with two faces. This package is the tensor face; `policy.costs` (golden.spec.policies) is the
face in bytes and operations; a selection record per step, layer and KV head is where they meet.
"""

from golden.policies.base import Dense, Heads, KVPolicy, Selected
from golden.policies.lambda_window import Lambda
from golden.policies.sparq import Sparf, Sparq

__all__ = ["Dense", "Heads", "KVPolicy", "Lambda", "Selected", "Sparf", "Sparq"]
