"""The name of this machine's accelerators as the planner (`hardware.machine`) knows them, before an engine is built."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

# PCI vendor and device ids of Google's TPUs, from tpu_info 0.7 (device.py). Asking PCI takes no lock on the chips, as
# libtpu would.
_GOOGLE = "0x1ae0"
_TPUS = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "v7x"}

# As JAX counts them (tpu_info: devices_per_chip).
_DEVICES_PER_CHIP = {"v7x": 2}


def tpu_chips(visible: str | None = None, pci: Path = Path("/sys/bus/pci/devices")) -> str | None:
    """Generation and number of the TPU's devices, such as "v6e-4"; None if there are none, or none that is known.

    Args:
        visible: TPU_VISIBLE_CHIPS: the chips that this process may use, such as "0,1,2,3"; None: all.
    """
    found = Counter(_TPUS[device] for device in _google_devices(pci) if device in _TPUS)
    if len(found) != 1:
        return None
    generation, number = found.most_common(1)[0]
    if visible:
        number = min(number, len(visible.split(",")))
    return f"{generation}-{number * _DEVICES_PER_CHIP.get(generation, 1)}"


def _google_devices(pci: Path) -> list[str]:
    devices = []
    for folder in pci.glob("*"):
        try:
            if (folder / "vendor").read_text().strip() == _GOOGLE:
                devices.append((folder / "device").read_text().strip())
        except OSError:
            continue
    return devices


def gpu_chips(device_name: str, num_devices: int) -> str:
    """Kind and number of GPUs, such as "h100-1", from a name such as "NVIDIA H100 80GB HBM3"."""
    words = [word for word in device_name.lower().replace("-", " ").split() if word not in ("nvidia", "amd", "tesla")]
    return f"{words[0] if words else 'gpu'}-{num_devices}"
