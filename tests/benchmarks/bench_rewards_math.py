"""Mathematics verdicts: the service (one pool worker, end to end through Ray) against math-verify
called bare in a loop on the same completions, interleaved repeats, best of each; and the memory of
that worker with its killable process over many verdicts.

Ordinary answers: the families of the agreement table, in completions of about 2,000 characters,
seven in ten plain numbers; half of them right. `--verdicts N` shortens the memory run.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import runpy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray
import results_file
from math_verify import parse, verify

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Completion, GroupPart, Prompt, VersionSpan
from rewards.pool import RewardPool

PAIRS = runpy.run_path(str(Path(__file__).parents[1] / "rewards" / "answer_pairs.py"))
GROUP = 16
REPEATS = 4
IDS = np.zeros(64, np.int32)
SPANS = (VersionSpan("0", 0, 64),)


def problems(
    count: int, seed: int, plain_share: float = 0.7, spelling: int = 0
) -> list[tuple[str, list[str]]]:
    """(ground truth, a group's completions). Another `spelling` is the same work for parsers, in
    strings that no cache has seen."""
    rng = random.Random(seed)
    filler = "Let us see: 7+8=15, so x^2 is what we want. " * 45
    pairs = PAIRS["generated"](seed, rounds=max(20, count // 8))
    algebra = list(zip(pairs[::2], pairs[1::2], strict=True))  # right and wrong, same ground truth
    rng.shuffle(algebra)
    made = []
    for index in range(count):
        if rng.random() < plain_share:
            truth = rng.randint(-10**6, 10**6)
            answers = [str(truth + rng.choice((0, 1))) for _ in range(GROUP)]
            made.append((str(truth), answers))
        else:
            right, wrong = algebra[index % len(algebra)]
            spelled = [blanks(k + GROUP * spelling) for k in range(GROUP)]
            answers = [(right, wrong)[k % 2].answer + spelled[k] for k in range(GROUP)]
            made.append((right.truth, answers))
    return [
        (truth, [f"<think>{filler}</think>The answer is $\\boxed{{{a}}}$." for a in answers])
        for truth, answers in made
    ]


def blanks(number: int) -> str:
    """LaTeX spaces that spell a number."""
    return "".join(("\\,", "\\;", "\\:", "\\!")[number >> shift & 3] for shift in (0, 2, 4))


def prompt(truth: str) -> Prompt:
    return Prompt("p", 0, IDS, "q", "math", truth)


def part(texts: list[str]) -> GroupPart:
    n = len(texts)
    logprobs = np.zeros(64, np.float32)
    bulk = [Completion(i, IDS, logprobs, SPANS, "stop", t, "e") for i, t in enumerate(texts)]
    spans, reasons = (SPANS,) * n, ("stop",) * n
    return GroupPart(
        tuple(range(n)), (64,) * n, reasons, spans, "e", 0.0, (0.0,) * n, ray.put(bulk)
    )


async def score_all(pool: RewardPool, groups: list[tuple[str, list[str]]]) -> list[float]:
    gate = asyncio.Semaphore(8)

    async def one(truth: str, texts: list[str]) -> list[float]:
        async with gate:
            return [v.score for v in await pool.score(prompt(truth), part(texts))]

    return [s for scores in await asyncio.gather(*(one(*g) for g in groups)) for s in scores]


def score_bare(groups: list[tuple[str, list[str]]]) -> list[float]:
    return [
        float(verify(parse(f"${truth}$"), parse(text))) for truth, texts in groups for text in texts
    ]


async def throughput(pool: RewardPool, count: int, plain_share: float) -> tuple[float, float]:
    """Verdicts a second, the pool's and math-verify's."""
    best = [float("inf"), float("inf")]
    for repeat in range(REPEATS):
        groups = problems(count, 0, plain_share, repeat)
        started = time.perf_counter()
        await score_all(pool, groups)
        best[0] = min(best[0], time.perf_counter() - started)
        started = time.perf_counter()
        score_bare(groups)
        best[1] = min(best[1], time.perf_counter() - started)
    return count * GROUP / best[0], count * GROUP / best[1]


def resident_bytes(pid: int) -> int:
    """Private memory of a process and of its children (the killable one)."""
    children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text().split("\n")
    own = sum(int(line.split()[1]) for line in fields if line.startswith("Private_")) * 1024
    return own + sum(resident_bytes(child) for child in children)


async def memory_growth(verdicts: int) -> tuple[float, int]:
    """Share by which the worker grows over `verdicts`, after a tenth as many to warm up."""
    pool = await RewardPool.start(RewardConfig(workers=1), max_response_tokens=100)
    try:
        pid = await asyncio.wait_for(pool._workers[0].handle.ready.remote(), 60)
        await score_all(pool, problems(verdicts // (10 * GROUP), seed=1))
        before = resident_bytes(pid)
        for start in range(0, verdicts, verdicts // 10):
            await score_all(pool, problems(verdicts // (10 * GROUP), seed=100 + start))
            print(f"{start + verdicts // 10} verdicts: {resident_bytes(pid) / before - 1:+.3f}")
        return resident_bytes(pid) / before - 1, before
    finally:
        await pool.close()


async def measure(verdicts: int) -> list[dict]:
    pool = await RewardPool.start(RewardConfig(workers=1), max_response_tokens=100)
    try:
        await score_all(pool, problems(4, seed=-1))  # start the killable process
        ordinary = await throughput(pool, 24, plain_share=0.7)
        algebra = await throughput(pool, 10, plain_share=0.0)
    finally:
        await pool.close()
    growth, before = await memory_growth(verdicts)
    table = PAIRS["pairs"]()
    ours, bare = (errors(PAIRS[name], table) for name in ("ours", "bare_math_verify"))
    rates = "{:.0f} against {:.0f} verdicts/s, one worker, through Ray, {}".format
    return [
        metric("math_throughput", ordinary[0] / ordinary[1], "ratio", ">= 0.8",
               rates(*ordinary, "seven in ten answers plain numbers")),
        metric("math_throughput_algebra", algebra[0] / algebra[1], "ratio", None,
               rates(*algebra, "no answer a plain integer")),
        metric("worker_memory_growth", growth, "share", "< 0.05",
               f"{verdicts} verdicts, worker and killable process, {before >> 20} MiB at first"),
        metric("agreement_false_positives", ours[0], "pairs", None,
               f"of {ours[2]} unequal ones; bare math-verify {bare[0]}"),
        metric("agreement_false_negatives", ours[1], "pairs", None,
               f"of {len(table) - ours[2]} equal ones; bare math-verify {bare[1]}"),
    ]


def errors(judge: Callable[[str, str], bool], table: list) -> tuple[int, int, int]:
    """False positives, false negatives, unequal pairs in the table."""
    wrong = PAIRS["errors"](judge, table)
    positives = sum(not pair.equal for pair in wrong)
    return positives, len(wrong) - positives, sum(not pair.equal for pair in table)


def metric(name: str, value: float, unit: str, target: str | None, note: str) -> dict:
    meets = None
    if target is not None:
        sign, bound = target.split()
        meets = value >= float(bound) if sign == ">=" else value < float(bound)
    return results_file.metric(name, value, unit, target or "reported", meets, note)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--verdicts", type=int, default=20_000)
    verdicts = arguments.parse_args().verdicts
    logging.disable(logging.WARNING)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        metrics = asyncio.run(measure(verdicts))
    finally:
        ray.shutdown()
    results_file.write_results("rewards_math", metrics)


if __name__ == "__main__":
    main()
