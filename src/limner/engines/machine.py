"""What a machine is called, what its maker promises of it, and how much memory this process has
taken; no framework is asked."""

import ctypes
import platform
from pathlib import Path

# Dense peaks in TFLOP/s: 16 bits, TF32, float32; from NVIDIA's data sheets of the H100, H200 and
# A100, where figures with sparsity are twice as high, and from Google's pages of its TPUs, which
# state no more than bfloat16.
PUBLISHED_PEAKS = {
    "NVIDIA H100 80GB HBM3": (989.4, 494.7, 66.9),
    "NVIDIA H100 PCIe": (756.0, 378.0, 51.0),
    "NVIDIA H200": (989.4, 494.7, 66.9),
    "NVIDIA A100-SXM4-40GB": (312.0, 156.0, 19.5),
    "NVIDIA A100-SXM4-80GB": (312.0, 156.0, 19.5),
    "NVIDIA A100 80GB PCIe": (312.0, 156.0, 19.5),
    "TPU v4": (275.0, 0.0, 0.0),
    "TPU v5 lite": (197.0, 0.0, 0.0),
    "TPU v5": (459.0, 0.0, 0.0),
    "TPU v6 lite": (918.0, 0.0, 0.0),
}


def peak_resident() -> int:
    """Highest resident set of this process, in bytes."""
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def processor_name() -> str:
    """The processor's name, where the system tells."""
    return read_cpuinfo("model name") or platform.machine()


def instruction_sets() -> str:
    """The sets of instructions that the processor has, where the system tells."""
    return read_cpuinfo("flags") or read_cpuinfo("Features")


def read_cpuinfo(what: str) -> str:
    """What the system says of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next(
        (
            line.partition(":")[2].strip()
            for line in lines
            if line.partition(":")[0].strip() == what
        ),
        "",
    )


MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -4, -1, -8  # of glibc's mallopt


def share_heap() -> None:
    """Let all threads take memory from one heap; where the C library is glibc, and before the
    threads are there."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(ARENA_MAX, 1)


def keep_heap() -> None:
    """Give no memory back to the system, and take none past the heap: what is asked for again and
    again is not cleared page by page each time."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
