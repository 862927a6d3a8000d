"""The base model: find it or fetch it, check it, and identify it by its bytes."""
