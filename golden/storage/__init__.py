"""Exact models of the in-storage attention unit (docs/formats-storage.md)."""
