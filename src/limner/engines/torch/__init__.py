"""The PyTorch engine: one process of a run, its device, its models and the stock diffusers
pipeline."""
