"""The machine's name, published peak and memory, without asking a framework."""

import ctypes
import platform
import sys
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
# Options of glibc's mallopt.
MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -4, -1, -8


def peak_resident() -> int:
    """Return the highest resident set of this process, in bytes."""
    # Windows has no such module.
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def processor_name() -> str:
    """Return the processor's model, or its architecture where the system does not say."""
    return read_cpuinfo("model name") or platform.machine()


def instruction_sets() -> str:
    """Return the processor's instruction sets, or nothing where the system does not say."""
    return read_cpuinfo("flags") or read_cpuinfo("Features")


def read_cpuinfo(field: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def share_heap() -> None:
    """Let all threads allocate from one heap; glibc only, and before threads are started."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(ARENA_MAX, 1)


def keep_heap() -> None:
    """Never return memory to the system; glibc only.

    Memory that is allocated again and again is then not cleared page by page each time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
