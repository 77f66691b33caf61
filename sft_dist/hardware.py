"""What the hardware can do, as far as training asks. Free of torch."""

from __future__ import annotations

import platform
from pathlib import Path

# Dense bf16 peak in FLOP/s, from the vendors' data sheets (without sparsity). The first name that the
# device's name contains counts, so the longer names come first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "L40S": 362e12,
    "A40": 150e12,
    "A6000": 155e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device, or None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has bf16 instructions; without them bf16 is emulated and slower than fp32."""
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    try:
        words = set(cpuinfo.read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
