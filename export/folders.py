"""Whole folders that take the place of others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def replace_folder(target: Path, work: Path) -> None:
    """Move a whole folder to a place; the one that was there comes back if that fails.

    Raises:
        OSError: the place refuses.
    """
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    try:
        work.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
