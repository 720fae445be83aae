"""Whether this kernel gives us namespaces at all, asked without our own code: a sandbox that is
broken fails its tests, and only one that cannot be had skips them."""

from __future__ import annotations

import subprocess
import sys

import pytest

_ASK = """
import ctypes, os, sys
flags = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000  # user, mount, pid, net
sys.exit(0 if ctypes.CDLL(None).unshare(flags) == 0 else 1)
"""


@pytest.fixture(scope="session")
def namespaces() -> None:
    if subprocess.run([sys.executable, "-c", _ASK], timeout=60).returncode:
        pytest.skip("this kernel gives this user no namespaces")
