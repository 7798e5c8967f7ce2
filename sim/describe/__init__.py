"""Typed descriptions of machines, models and workloads, loaded from TOML with a source per value."""
