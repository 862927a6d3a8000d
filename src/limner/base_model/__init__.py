"""The base model: found or fetched, checked, known by its bytes."""
