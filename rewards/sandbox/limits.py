"""What one program may use; both sides of the jail's wall read this."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """One program's share.

    Example: Limits(cpu_s=4, wall_s=8, memory_bytes=1 << 29) for an ordinary test.
    """

    cpu_s: float = 4.0  # of each process, rounded up to whole seconds
    wall_s: float = 8.0  # of the program as a whole
    memory_bytes: int = 512 << 20  # address space of each process
    output_bytes: int = 4 << 20  # standard output; standard error keeps its last ERROR_BYTES
    file_bytes: int = 16 << 20  # all files together, and each
    processes: int = 16  # processes and threads beside the first
    open_files: int = 64


ERROR_BYTES = 4096
