"""Starting a zygote: a fresh interpreter with an empty environment, its ids mapped from outside.

Invariant: either the zygote stands behind all its walls and answers, or `start` raises ConfigError
saying what the kernel refused and what to enable; there is no weaker jail in between.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

from h1r_rl.errors import ConfigError
from rewards.sandbox.cgroups import Cgroup
from rewards.sandbox.codec import decode, encode
from rewards.sandbox.jail import INSIDE_ID
from rewards.sandbox.zygote import SOCKET

START_TIMEOUT_S = 60.0
ENVIRONMENT = {"HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}

_ADVICE = """\
Enable what is missing:
  Debian, Ubuntu  sysctl kernel.unprivileged_userns_clone=1 (older), and on Ubuntu 24.04
                  sysctl kernel.apparmor_restrict_unprivileged_userns=0 or an AppArmor profile
  RHEL            sysctl user.max_user_namespaces=15000
  Docker          --security-opt seccomp=<profile with clone, unshare, mount, mount_setattr,
                  pivot_root, setns> --security-opt apparmor=unconfined
  Kubernetes      securityContext.seccompProfile: Localhost with that profile, or Unconfined;
                  RuntimeDefault forbids namespaces
or set reward.sandbox to {http: URL} of a SandboxFusion-compatible service, or, only for code that
you trust, to none-i-trust-this-code. docs/sandbox.md tells more."""


def start(jailed: bool, cgroup: Cgroup | None = None) -> tuple[subprocess.Popen, socket.socket]:
    """The zygote's process and the socket that takes requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root = str(Path(__file__).resolve().parents[2])
    command = (
        f"import os, sys; os.dup2({theirs.fileno()}, {SOCKET}); sys.path.insert(0, {root!r}); "
        f"from rewards.sandbox.zygote import main; main({jailed})"
    )
    process = subprocess.Popen(
        [sys.executable, "-s", "-S", "-P", "-X", "utf8", "-c", command],
        pass_fds=(theirs.fileno(),), env=ENVIRONMENT, cwd="/", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )
    theirs.close()
    ours.settimeout(START_TIMEOUT_S)
    try:
        if cgroup is not None:
            cgroup.add(process.pid)
        _await_ready(process, ours)
    except BaseException:
        process.kill()
        process.wait(START_TIMEOUT_S)
        ours.close()
        raise
    return process, ours


def _await_ready(process: subprocess.Popen, channel: socket.socket) -> None:
    while True:
        message = channel.recv(65_536)
        if not message:
            errors = process.stderr.read().decode(errors="replace") if process.stderr else ""
            raise ConfigError(f"the sandbox did not start: {errors[-2000:] or 'no message'}")
        report = decode(message)
        if report["state"] == "ready":
            return
        if report["state"] == "refused":
            raise ConfigError(_refusal(report["error"], report["errno"]))
        _map_ids(process.pid)
        channel.send(encode({"state": "mapped"}))


def _map_ids(pid: int) -> None:
    """Root gives an id that owns nothing on the host, others have only their own to give."""
    uid, gid = _unused_ids() if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    if os.geteuid() != 0:
        Path(f"/proc/{pid}/setgroups").write_text("deny")
    Path(f"/proc/{pid}/gid_map").write_text(f"{INSIDE_ID} {gid} 1")
    Path(f"/proc/{pid}/uid_map").write_text(f"{INSIDE_ID} {uid} 1")


def _unused_ids() -> tuple[int, int]:
    """The highest ids of our own namespace, short of the kernel's special ones."""
    return _highest("/proc/self/uid_map"), _highest("/proc/self/gid_map")


def _highest(path: str) -> int:
    rows = [[int(part) for part in line.split()] for line in Path(path).read_text().splitlines()]
    return min(max(first + count - 1 for first, _, count in rows), 0xFFFF0000)


def _refusal(message: str, number: int) -> str:
    meaning = {
        errno.EPERM: "the kernel, a seccomp profile or AppArmor forbids it",
        errno.EACCES: "the kernel or AppArmor forbids it",
        errno.ENOSPC: "user.max_user_namespaces or a sibling of it is 0 or used up",
        errno.EUSERS: "user namespaces are nested too deep",
        errno.ENOSYS: "the kernel is older than 5.14",
        errno.EINVAL: "the kernel lacks a namespace type (CONFIG_USER_NS, PID_NS, NET_NS, IPC_NS)",
    }.get(number, "see the message")
    return (
        f"reward.sandbox: expected a kernel that gives untrusted code namespaces of its own, found "
        f"'{message}' ({meaning}).\n{_ADVICE}"
    )
