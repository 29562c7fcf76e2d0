"""Starting processes that never outlive the one that started them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
# PR_SET_PDEATHSIG (1) makes the kernel kill the process with its parent, even if that one gets SIGKILL. It is set in a
# fresh process that then becomes the wanted one: code between fork and exec (`preexec_fn`) can deadlock a process that
# has threads. The setting outlives exec. The parent may die before it is made, hence the look at getppid.


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` for a process that ends with this one, and with the thread that calls this (on Linux).

    Args:
        command: an absolute path, and arguments.
        options: of `subprocess.Popen`.
    """
    return subprocess.Popen(  # noqa: S603 - commands of this package, not of a user
        [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *command], **options
    )
