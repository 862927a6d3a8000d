"""Doors for people who come from other tools: their words in, a config out."""
