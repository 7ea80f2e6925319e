"""Where compiled steps are kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ingestq.workers.startup.compile_cache import Mount, against_mount, compile_cache_warnings, mount_of

# As /proc/self/mountinfo has them (proc_pid_mountinfo(5)).
MOUNTS = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
22 21 0:20 / /tmp rw,nosuid shared:2 - tmpfs tmpfs rw
23 21 0:44 / /mnt/share rw master:1 - nfs4 10.0.0.2:/share rw,vers=4.1
24 23 8:16 / /mnt/share/disk rw - xfs /dev/sdb rw
25 21 0:45 / /mnt/a\040b rw - fuse.gcsfuse bucket rw
26 21 0:46 / /late rw - nfs a:/b rw
27 21 8:17 / /late rw - ext4 /dev/sdc rw
garbage
"""


@pytest.mark.parametrize(
    ("path", "mount"),
    [
        ("/var/lib/cache", Mount(point="/", file_system="ext4")),
        ("/", Mount(point="/", file_system="ext4")),
        ("/tmp", Mount(point="/tmp", file_system="tmpfs")),
        ("/tmpfoo", Mount(point="/", file_system="ext4")),
        ("/mnt/share/x", Mount(point="/mnt/share", file_system="nfs4")),
        ("/mnt/share/disk/x/y", Mount(point="/mnt/share/disk", file_system="xfs")),
        ("/mnt/a b/x", Mount(point="/mnt/a b", file_system="fuse.gcsfuse")),
        ("/late/x", Mount(point="/late", file_system="ext4")),
    ],
)
def test_a_folder_is_on_its_innermost_and_latest_mount(path: str, mount: Mount) -> None:
    assert mount_of(path, MOUNTS) == mount


def test_no_mounts_are_no_mount() -> None:
    assert mount_of("/x", "") is None


@pytest.mark.parametrize(
    ("file_system", "why"),
    [
        ("nfs4", "network mount"),
        ("cifs", "network mount"),
        ("9p", "network mount"),
        ("lustre", "network mount"),
        ("fuse.gcsfuse", "network mount"),
        ("tmpfs", "in memory"),
        ("overlay", "container"),
    ],
)
def test_mounts_that_are_not_persistent_local_disks_are_spoken_against(file_system: str, why: str) -> None:
    assert why in (against_mount(Mount(point="/p", file_system=file_system)) or "")


@pytest.mark.parametrize("file_system", ["ext4", "xfs", "btrfs", "zfs", "f2fs", "fuseblk"])
def test_local_disks_are_not(file_system: str) -> None:
    assert against_mount(Mount(point="/p", file_system=file_system)) is None


def test_a_warning_names_variable_folder_and_way_out(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"21 1 8:1 / / rw - ext4 /dev/root rw\n22 21 0:9 / {tmp_path} rw - nfs4 a:/b rw\n")

    (warning,) = compile_cache_warnings(str(tmp_path / "xla"), mounts)
    assert warning.startswith(f"VLLM_XLA_CACHE_PATH={tmp_path / 'xla'} is a network mount (nfs4 on {tmp_path})")
    assert "Set it to a folder on a persistent local disk" in warning


def test_a_link_is_followed_to_where_it_leads(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    (tmp_path / "share").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "share")
    mounts.write_text(f"21 1 8:1 / / rw - ext4 /dev/root rw\n22 21 0:9 / {tmp_path}/share rw - nfs a:/b rw\n")

    assert "network mount" in compile_cache_warnings(str(tmp_path / "link" / "xla"), mounts)[0]


def test_an_object_store_is_warned_about() -> None:
    (warning,) = compile_cache_warnings("gs://bucket/xla")

    assert "VLLM_XLA_CACHE_PATH=gs://bucket/xla is an object store" in warning


def test_a_local_folder_is_not_warned_about_even_if_mounts_can_not_be_read(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text("21 1 8:1 / / rw - ext4 /dev/root rw\n")

    assert compile_cache_warnings(str(tmp_path / "xla"), mounts) == []
    assert compile_cache_warnings(str(tmp_path / "xla"), tmp_path / "nowhere") == []


def test_a_folder_that_can_not_be_written_to_is_warned_about(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    (warning,) = compile_cache_warnings(str(tmp_path / "file" / "xla"), tmp_path / "nowhere")
    assert "can't be written to" in warning


def test_a_folder_that_can_not_be_looked_into_is_warned_about(tmp_path: Path) -> None:
    """/root/cache for another user, say: that the kernel won't tell what is there ended the worker."""
    locked = tmp_path / "locked"
    (locked / "in").mkdir(parents=True)
    locked.chmod(0)
    is_root = os.getuid() == 0
    try:
        if is_root:  # it may look into everything
            os.setresuid(65534, 65534, 0)
        (warning,) = compile_cache_warnings(str(locked / "in" / "xla"), tmp_path / "nowhere")
    finally:
        if is_root:
            os.setresuid(0, 0, 0)
        locked.chmod(0o700)

    assert "can't be written to" in warning
