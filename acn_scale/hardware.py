"""What devices can do, from their makers' data sheets: peak rates without sparsity, and memory."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # tools/plan.py answers --help without it
    import torch


@dataclass(frozen=True)
class Device:
    name: str  # a pattern for what the driver calls it, in small letters
    memory_gib: float
    peak: dict[str, float]  # floating-point operations per second of matrix products, by train.precision


def _device(name: str, gigabytes: float, half: float, full: float) -> Device:
    """Rates in 1e12 operations a second: of bf16 and fp16, and of fp32 as PyTorch does it by default, not TF32."""
    return Device(name, gigabytes * 1e9 / 2**30, {"bf16": half * 1e12, "fp16": half * 1e12, "fp32": full * 1e12})


DEVICES: dict[str, Device] = {
    "v100-16gb": _device("v100", 16, 125, 15.7),
    "v100-32gb": _device("v100", 32, 125, 15.7),
    "a100-40gb": _device("a100", 40, 312, 19.5),
    "a100-80gb": _device("a100", 80, 312, 19.5),
    "a10-24gb": _device("a10$", 24, 125, 31.2),
    "a10g-24gb": _device("a10g$", 24, 70, 31.5),
    "l4-24gb": _device("l4$", 24, 121, 30.3),
    "l40-48gb": _device("l40$", 48, 181, 90.5),
    "l40s-48gb": _device("l40s$", 48, 362, 91.6),
    "rtx3090-24gb": _device("3090$", 24, 71, 35.6),
    "rtx4090-24gb": _device("4090$", 24, 165, 82.6),
    "h100-80gb": _device("h100.* hbm3$", 80, 989, 66.9),
    "h100-pcie-80gb": _device("h100 pcie$", 80, 756, 51.2),
    "h100-nvl-94gb": _device("h100 nvl$", 94, 835, 60.0),
    "h200-141gb": _device("h200$", 141, 989, 66.9),
    "b200-180gb": _device("b200$", 180, 2250, 75.0),
}


def peak_rate(device: "torch.device", precision: str) -> float | None:
    """Operations per second at best of the device that this runs on; None where it is not in the table."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device).lower()
    # A slice of a GPU is none of them.
    fitting = [each for each in DEVICES.values() if re.search(rf"\b{each.name}", name) and " mig " not in name]
    return fitting[0].peak[precision] if fitting else None
