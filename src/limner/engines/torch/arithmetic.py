"""Which kernels PyTorch computes with on CUDA: float32 as it is or in TF32, and repeatable ones."""

import os

import torch

from limner.errors import InputError

# The two workspaces with which products in cuBLAS are repeatable (its manual, "Results
# Reproducibility"); PyTorch reads the variable when a process first multiplies.
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")


def set_precision_of_float32(tf32: bool) -> None:
    """Let products and convolutions of float32 be computed in TF32, or not.

    PyTorch itself begins with TF32 in convolutions and without it in products.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def choose_kernels(device: torch.device, deterministic: bool) -> None:
    """Let only kernels run that leave the same bits each time, or any.

    On a CPU, with one number of threads, all do.
    """
    repeatable = deterministic and device.type == "cuda"
    torch.use_deterministic_algorithms(repeatable)
    torch.backends.cudnn.deterministic = repeatable
    # Nothing here reads memory that was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def prepare_cublas() -> None:
    """Choose a repeatable workspace, before the first product of this process.

    Raises:
        InputError: where the environment has chosen another.
    """
    chosen = os.environ.setdefault(WORKSPACE_VARIABLE, REPEATABLE_WORKSPACES[0])
    if chosen not in REPEATABLE_WORKSPACES:
        raise InputError(
            f"engine.deterministic: {WORKSPACE_VARIABLE} is {chosen!r}, with which products in "
            f"cuBLAS are not repeatable. Unset it, or set {' or '.join(REPEATABLE_WORKSPACES)}."
        )
