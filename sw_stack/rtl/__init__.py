"""Real operands through Verilated blocks: what the lockstep checks and benchmarks call."""
