"""The PyTorch engine: one process of a run, its device, its models and stock pipelines."""

import os

# On busy cores, OpenMP threads that spin while they wait cost more than they save. PyTorch reads
# this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
