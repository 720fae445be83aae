"""What the driver can coordinate: 512 logical engines in 4 Ray actors, stub generation, finished
samples end to end through Ray, the real pool and the real buffer; and the driver's CPU a sample at
512 engines over that at 8."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
HOSTS, MANY, FEW = 4, 512, 8
GROUP, LENGTH = 16, 64
SECONDS = 20.0
GROUPS_IN_FLIGHT = 64  # the same work at either size: what differs is the number of engines


def host_class() -> Any:
    import ray

    from h1r_rl.records import Completion, GroupPart, VersionSpan

    @ray.remote(num_cpus=0, max_concurrency=1000)
    class Host:
        """Many engines that answer at once: a part a group, with arrays of real size."""

        async def start(self) -> None: ...

        async def close(self) -> None: ...

        async def generate(self, name: str, prompt: Any, indices: Any, sampling: Any) -> Any:
            span = (VersionSpan("0", 0, LENGTH),)
            n = len(indices)
            yield GroupPart(
                tuple(indices), (LENGTH,) * n, ("stop",) * n, (span,) * n, (1.0,) * n, name, 0.0
            )
            ids, logprobs = np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.float32)
            yield [Completion(i, ids, logprobs, span, "stop", "", name) for i in indices]

    return Host


def logical_engine(host: Any, name: str) -> SimpleNamespace:
    """A pool's view of one of the engines behind `host`."""

    class Generate:
        def options(self, **options: Any) -> Any:
            return SimpleNamespace(
                remote=lambda *args: host.generate.options(**options).remote(name, *args)
            )

    return SimpleNamespace(
        start=host.start, close=SimpleNamespace(remote=_nothing), generate=Generate()
    )


async def _nothing() -> None: ...


async def measure(engines: int, hosts: list[Any]) -> tuple[float, float]:
    """(samples/s, driver CPU seconds a sample) over SECONDS."""
    from actors import engines as module
    from actors.rollout_pool import RolloutPool
    from h1r_rl.config.schema import RolloutConfig, WeightsConfig
    from h1r_rl.grpo.group_buffer import GroupBuffer
    from h1r_rl.interfaces import Sampling
    from h1r_rl.records import Prompt

    def start_actor(name: str, index: int, *_: Any) -> tuple[Any, Any]:
        engine = logical_engine(hosts[index % len(hosts)], name)
        return engine, engine.start.remote()

    module.start_actor, module.kill_actor = start_actor, lambda actor: None
    module.close_actors = _no_close
    pool = await RolloutPool.start(
        RolloutConfig(max_response_tokens=LENGTH, max_model_len=128, actors=engines),
        WeightsConfig(), model_folder="", seed=0, initial_version="0", run_name="b",
        start_timeout_s=300,
    )  # fmt: skip
    buffer = GroupBuffer(prompts_per_step=GROUPS_IN_FLIGHT, max_staleness=0, max_backfill=8)
    numbers = itertools.count()
    done = 0
    end = time.perf_counter() + SECONDS

    async def one_after_another() -> None:
        nonlocal done
        while time.perf_counter() < end:
            prompt = Prompt(f"p{next(numbers)}", 0, np.zeros(16, np.int32), "", "math", "1")
            await buffer.admit(prompt.key, lambda: 0)
            async for part in pool.generate(prompt, range(GROUP), Sampling(1.0, LENGTH)):
                done += len(part.sample_indices)
            await buffer.release([prompt.key])

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(one_after_another() for _ in range(GROUPS_IN_FLIGHT)))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    await pool.close()
    return done / seconds, cpu / done


async def _no_close(actors: Any) -> None: ...


def main() -> None:
    import ray
    from results_file import metric, write_results

    ray.init(address="local", num_cpus=HOSTS, include_dashboard=False, log_to_driver=False)
    host = host_class()
    hosts = [host.remote() for _ in range(HOSTS)]
    measured = {n: asyncio.run(measure(n, hosts)) for n in (FEW, MANY)}
    ray.shutdown()
    rate = measured[MANY][0]
    flatness = measured[MANY][1] / measured[FEW][1]
    note = f"groups of {GROUP} in one message each; {measured[FEW][0]:.0f}/s at {FEW} engines"
    cpu = f"{measured[MANY][1] * 1e3:.2f} and {measured[FEW][1] * 1e3:.2f} ms CPU a sample"
    write_results(
        "rollouts_coordinator",
        [
            metric("coordinator_samples_s", rate, "1/s", ">= 1,000", rate >= 1000, note),
            metric("coordinator_flatness", flatness, "ratio", "0.8-1.2",
                   0.8 <= flatness <= 1.2, cpu),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
