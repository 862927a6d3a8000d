"""Encoded pictures and captions: encode, keep, read back."""
