"""Memory masters of the engine: AXI4 towards HBM pseudo-channels, exact at any latency. docs/memory.md explains."""
