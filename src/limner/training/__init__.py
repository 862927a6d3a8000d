"""A training run: setup, stream, loop, monitoring, result."""
