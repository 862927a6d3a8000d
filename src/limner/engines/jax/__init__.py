"""The JAX engine: pure functions over a checkpoint's own arrays, for TPU, GPU and CPU; no torch."""
