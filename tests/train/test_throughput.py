"""Peak FLOP/s."""

import pytest
import torch

from openmoe.train.throughput import data_sheet_peak, peak_flops


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989.5e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA GB200", 2500e12, 80e12),
    ],
)
def test_data_sheet(name: str, bfloat16: float, float32: float) -> None:
    """Bugs: a sparse figure halves every MFU; a PCIe card or a GB200 matches its sister's row."""
    assert data_sheet_peak(name, torch.bfloat16) == bfloat16
    assert data_sheet_peak(name, torch.float32) == float32


def test_no_figure_for_other_cards_and_types() -> None:
    """Bug: float64 on an H100 is measured against the figure of another type."""
    assert data_sheet_peak("NVIDIA H100 PCIe", torch.float64) is None
    assert data_sheet_peak("Tesla T4", torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_peak(dtype: torch.dtype) -> None:
    """Bug: multiply-adds counted as one operation, or a time that is not that of the product."""
    peak = peak_flops(torch.device("cpu"), dtype)
    assert 1e9 < peak.per_second < 1e14
    assert "measured" in peak.source
    assert str(dtype).removeprefix("torch.") in peak.source
