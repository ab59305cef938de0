"""What a device could compute at best: the base of the model FLOPs utilisation (MFU)."""

import resource
import time
from dataclasses import dataclass

import torch

# Dense peak in FLOP/s of one device, from NVIDIA's data sheets: (name contains, bfloat16, float32 without
# TF32). The first match counts, so special forms come before the plain name. Of TPUs from Google's pages: v2
# and v3 have two devices a chip, and float32 is not stated.
DATA_SHEET = (
    ("H200 NVL", 835e12, 60e12),
    ("H200", 989.5e12, 67e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100", 989.5e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("GB200", 2500e12, 80e12),
    ("B200", 2250e12, 75e12),
    ("TPU v2", 22.5e12, 0),
    ("TPU v3", 61.5e12, 0),
    ("TPU v4", 275e12, 0),
)


MEASURE_SECONDS = 0.5


@dataclass(frozen=True)
class PeakFlops:
    per_second: float  # FLOP/s of one device
    source: str  # how it is known, for the log


def peak_flops(device: torch.device, dtype: torch.dtype) -> PeakFlops:
    """The device's peak in `dtype`: that of the data sheet, else of a matrix product timed here (0.5 s).

    On a busy machine the timed figure comes out low and every MFU against it high.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = data_sheet_peak(name, dtype)
        if known is not None:
            return PeakFlops(known, f"data sheet of {name}, dense {_short(dtype)}")
    return _measured(device, dtype)


def data_sheet_peak(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of the device called `name`; None where the table has no figure."""
    column = {torch.bfloat16: 1, torch.float32: 2}.get(dtype)
    for row in DATA_SHEET:
        if column and row[0] in name:
            return float(row[column]) or None
    return None


def peak_memory_bytes(device: torch.device) -> float:
    """The most memory this process has held so far: of the device's allocator, or on a CPU of the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _measured(device: torch.device, dtype: torch.dtype) -> PeakFlops:
    size = 2048 if device.type == "cpu" else 8192
    a, b = torch.rand(2, size, size, device=device, dtype=dtype)
    best_seconds = float("inf")
    end = time.perf_counter() + MEASURE_SECONDS
    while time.perf_counter() < end:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best_seconds = min(best_seconds, time.perf_counter() - start)
    threads = f" on {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return PeakFlops(2 * size**3 / best_seconds, f"measured, {_short(dtype)} matmul {size}^3{threads}")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
