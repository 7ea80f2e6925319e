"""Whether the folder of compiled steps will still be there, and be fast, at the next start.

A start on TPU compiles every shape: some 24 minutes for a large model, seconds when the compiled steps are found
(VLLM_XLA_CACHE_PATH). That holds for a folder on a persistent local disk.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "glusterfs", "lustre", "gpfs", "beegfs", "afs", "fuse")
# What FUSE also serves from a local disk.
_LOCAL_FUSE = ("fuseblk", "fuse.fuse-overlayfs")
_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """Where a folder is."""

    # "/mnt/disks/cache"
    point: str
    # "ext4", "nfs4", "tmpfs", "fuse.gcsfuse", "overlay", ...
    file_system: str


def compile_cache_warnings(folder: str, mountinfo: Path = Path("/proc/self/mountinfo")) -> list[str]:
    """What speaks against a folder, each with the way out; nothing where that can't be found out.

    Args:
        folder: VLLM_XLA_CACHE_PATH; it need not exist.
    """
    if "://" in folder:
        return [_warning(folder, "is an object store, where compiled steps are not found again (marin#2318)")]
    path = os.path.realpath(folder)
    try:
        mount = mount_of(path, mountinfo.read_text(errors="replace"))
    except OSError:
        mount = None
    against = None if mount is None else against_mount(mount)
    warnings = [_warning(folder, against)] if against else []
    if not _is_writable(Path(path)):
        warnings.append(_warning(folder, "can't be written to by this user, so that every start compiles anew"))
    return warnings


def mount_of(path: str, mountinfo: str) -> Mount | None:
    """The innermost mount that an absolute path is on.

    Args:
        mountinfo: text of /proc/self/mountinfo (proc_pid_mountinfo(5)); a later mount hides an earlier one.
    """
    found: Mount | None = None
    for line in mountinfo.splitlines():
        mount, separator, file_system = line.partition(" - ")
        fields = mount.split()
        if not separator or len(fields) < 5 or not file_system:
            continue
        point = _unescaped(fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and (found is None or len(point) >= len(found.point)):
            found = Mount(point=point, file_system=file_system.split()[0])
    return found


def against_mount(mount: Mount) -> str | None:
    """Why compiled steps should not be kept there; None: nothing is known against it."""
    kind = mount.file_system
    if kind in _MEMORY:
        return f"is in memory ({kind} on {mount.point}), gone with the next boot"
    if kind.startswith(_NETWORK) and kind not in _LOCAL_FUSE:
        return f"is a network mount ({kind} on {mount.point}): slow, and compiled steps may not be found again"
    if kind == "overlay":
        return f"is in the container's own layer ({kind} on {mount.point}), gone when the container is made anew"
    return None


def _warning(folder: str, against: str) -> str:
    return (
        f"VLLM_XLA_CACHE_PATH={folder} {against}; a start without compiled steps takes some 24 minutes. "
        f"Set it to a folder on a persistent local disk"
    )


def _unescaped(field: str) -> str:
    """The kernel writes space, tab, newline and backslash as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _is_writable(path: Path) -> bool:
    """Whether the folder can be written to, or made."""
    # os.path's: Path.exists raises where a parent may not be looked into.
    existing = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
    return os.access(existing, os.W_OK | os.X_OK)
