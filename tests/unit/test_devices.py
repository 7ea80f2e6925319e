"""The names of accelerators."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingestq.common.planner.hardware import machine
from ingestq.workers.startup.devices import gpu_chips, tpu_chips


def bus(folder: Path, *devices: tuple[str, str]) -> Path:
    """A PCI bus as /sys shows it."""
    for number, (vendor, device) in enumerate(devices):
        slot = folder / f"0000:00:{number:02x}.0"
        slot.mkdir()
        (slot / "vendor").write_text(f"{vendor}\n")
        (slot / "device").write_text(f"{device}\n")
    (folder / "broken").mkdir()
    return folder


V6E, V5E, V7X = ("0x1ae0", "0x006f"), ("0x1ae0", "0x0063"), ("0x1ae0", "0x0076")
NETWORK_CARD = ("0x1ae0", "0x0042")  # Google's gVNIC
OTHER = ("0x8086", "0x006f")


@pytest.mark.parametrize(
    ("devices", "visible", "chips"),
    [
        ([V6E] * 4 + [NETWORK_CARD, OTHER], None, "v6e-4"),
        ([V6E] * 8, "", "v6e-8"),
        ([V6E] * 8, "0,1,2,3", "v6e-4"),
        ([V5E], None, "v5e-1"),
        ([V7X] * 4, None, "v7x-8"),  # JAX counts two devices a chip
        ([NETWORK_CARD, OTHER], None, None),
        ([], None, None),
    ],
)
def test_tpus_are_known_by_their_pci_ids(
    tmp_path: Path, devices: list[tuple[str, str]], visible: str | None, chips: str | None
) -> None:
    assert tpu_chips(visible, bus(tmp_path, *devices)) == chips
    if chips:
        assert machine(chips).runtime == "tpu"


def test_a_machine_without_pci_has_no_tpus(tmp_path: Path) -> None:
    assert tpu_chips(None, tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("name", "chips"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-8"),
        ("NVIDIA A100-SXM4-80GB", "a100-8"),
        ("Tesla T4", "t4-8"),
        ("", "gpu-8"),
    ],
)
def test_gpus_are_known_by_their_names(name: str, chips: str) -> None:
    assert gpu_chips(name, 8) == chips
