"""Exact top-k selection over a stream of scores."""
