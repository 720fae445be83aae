"""One real vLLM engine: the rollout service over the bare engine, what a weight update costs the
generations that are running, and whether prefix caching helps a hybrid.

Service and bare engine are the same engine with the same prompts and sampling, in turn: bare is
AsyncLLM called in the actor's own process, the service is the pool called from the driver.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
REPEATS = 3
GROUP = 8
CONTEXTS = {64: 32, 4096: 8}  # tokens of context: generations that live through the update
DECODED = 4096  # room of a generation, more than it comes to
BUCKET = 4 * 2**20


def models(folder: Path) -> dict[str, Path]:
    """Random weights: 0.4 M and 24 M parameters, whose answers mostly run to their limit."""
    from h1r_rl.config.schema import TinyModelConfig
    from h1r_rl.hybrid.tiny import build_tiny_model

    sizes = {
        "small": TinyModelConfig(max_position=16384),
        "20m": TinyModelConfig(
            hidden_size=512, num_layers=5, num_heads=8, num_kv_heads=4, head_dim=64,
            intermediate_size=1536, mamba_heads=16, mamba_head_dim=64, mamba_d_state=64,
            max_position=1024,
        ),
    }  # fmt: skip
    for name, config in sizes.items():
        build_tiny_model(config, folder / name, seed=0)
    return {name: folder / name for name in sizes}


def measured_actor() -> Any:
    """The real rollout actor, and what only a benchmark asks of it."""
    import ray

    from actors.rollout_actor import RolloutActor

    class Measured(RolloutActor.__ray_metadata__.modified_class):
        def _request(self, max_tokens: int, ignore_eos: bool) -> Any:
            from vllm import SamplingParams
            from vllm.sampling_params import RequestOutputKind

            return SamplingParams(
                temperature=1.0, max_tokens=max_tokens, logprobs=0, ignore_eos=ignore_eos,
                detokenize=False, flat_logprobs=True,
                stop_token_ids=[] if ignore_eos else self._stop_ids,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip

        async def _bare(self, ids: list[int], max_tokens: int, ignore_eos: bool = False) -> int:
            from vllm.inputs import TokensPrompt

            name = f"bare-{time.monotonic_ns()}-{np.random.random()}"
            prompt, final = TokensPrompt(prompt_token_ids=ids), None
            request = self._request(max_tokens, ignore_eos)
            async for output in self._engine.generate(prompt, request, name):
                final = output
            return len(final.outputs[0].token_ids)

        async def bare(self, prompts: list[list[int]], max_tokens: int) -> float:
            """Tokens/s of GROUP samples a prompt, straight from the engine."""
            started = time.perf_counter()
            counts = await asyncio.gather(
                *(self._bare(ids, max_tokens) for ids in prompts for _ in range(GROUP))
            )
            return sum(counts) / (time.perf_counter() - started)

        async def busy(self, context: int, count: int) -> None:
            """Begin `count` generations behind `context` tokens of their own; returns once all
            decode."""
            rng = np.random.default_rng(0)
            before = self._stats["tokens"]
            self._running = [
                asyncio.create_task(
                    self._bare(rng.integers(0, 250, context).tolist(), DECODED, ignore_eos=True)
                )
                for _ in range(count)
            ]
            while (  # noqa: ASYNC110 - vLLM's own numbers
                self._stats["running"] < count or self._stats["tokens"] < before + 3 * count
            ):
                await asyncio.sleep(0.02)
            self._trace: list[tuple[float, float]] = []
            self._tracing = asyncio.create_task(self._trace_tokens())

        async def _trace_tokens(self) -> None:
            while True:
                self._trace.append((time.perf_counter(), self._stats["tokens"]))
                await asyncio.sleep(0.01)

        async def idle(self) -> list[tuple[float, float]]:
            """End what was begun; (time, tokens so far) of it."""
            self._tracing.cancel()
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            return self._trace

        async def running_state(self, state: str) -> None:
            self._config = self._config.model_copy(update={"running_state": state})

    return ray.remote(max_concurrency=1000)(Measured)


async def started(folder: Path, **settings: Any) -> Any:
    from actors.rollout_pool import RolloutPool
    from h1r_rl.config.schema import RolloutConfig, WeightsConfig

    config = RolloutConfig(
        max_response_tokens=64, dtype="float32", enforce_eager=True, max_num_seqs=256,
        **({"max_model_len": 256, "kv_cache_gib": 0.5} | settings),
    )  # fmt: skip
    return await RolloutPool.start(
        config, WeightsConfig(), model_folder=str(folder), seed=0, initial_version="0",
        run_name="bench", start_timeout_s=300,
    )  # fmt: skip


def prompts(count: int, length: int, seed: int) -> list[Any]:
    from h1r_rl.records import Prompt

    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 250, (count, length)).astype(np.int32)
    return [Prompt(f"p{seed}-{i}", 0, row, "", "math", "1") for i, row in enumerate(ids)]


async def served(pool: Any, asked: list[Any], max_tokens: int) -> float:
    """Tokens/s through the service."""
    from h1r_rl.interfaces import Sampling

    async def one(prompt: Any) -> int:
        stream = pool.generate(prompt, range(GROUP), Sampling(1.0, max_tokens))
        return sum([sum(part.lengths) async for part in stream])

    started = time.perf_counter()
    counts = await asyncio.gather(*(one(prompt) for prompt in asked))
    return sum(counts) / (time.perf_counter() - started)


def actor_of(pool: Any) -> Any:
    (member,) = pool._engines.members.values()
    return member.actor


async def service_efficiency(pool: Any, count: int) -> tuple[float, str]:
    best = {"bare": 0.0, "service": 0.0}
    await served(pool, prompts(8, 32, 99), 16)
    for repeat in range(REPEATS):
        asked = prompts(count, 32, repeat)
        plain = [p.token_ids.tolist() for p in asked]
        bare = await asyncio.wait_for(actor_of(pool).bare.remote(plain, 64), 300)
        best["bare"] = max(best["bare"], bare)
        best["service"] = max(best["service"], await served(pool, asked, 64))
    note = (
        f"{count} groups of {GROUP}: {best['service']:.0f} tok/s through the pool, "
        f"{best['bare']:.0f} straight from the same engine"
    )
    return best["service"] / best["bare"], note


class Sender:
    """The learner's side of a transfer, with the model that the engine has."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        from learners.weight_sender import manifest_of

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        self._manifest = manifest_of(self._model, BUCKET)
        self._epoch = 0

    async def push(self, pool: Any, version: str) -> None:
        from h1r_rl.broadcast import Communicator, open_store
        from h1r_rl.weight_manifest import TransferEpoch, assign_ranks
        from learners.weight_sender import send_weights

        store = open_store()
        offsets, size = assign_ranks(pool.members())
        self._epoch += 1
        epoch = TransferEpoch(self._epoch, "gloo", "127.0.0.1", store.port, size, offsets, 60.0)
        communicator, _ = await asyncio.gather(
            asyncio.to_thread(Communicator, epoch, 0), pool.join_epoch(epoch)
        )
        await pool.begin_receive(self._manifest)
        await asyncio.to_thread(
            send_weights, self._model, self._manifest, communicator, sharded=False
        )
        await pool.commit(version)
        communicator.close()


async def update_cost(pool: Any, sender: Sender, state: str, context: int) -> tuple[float, float]:
    """(tokens lost to one update, seconds from its begin to the old rate): the tokens that the
    rate before would have made until the rate is back, less those that were made."""
    actor = actor_of(pool)
    await asyncio.wait_for(actor.running_state.remote(state), 30)
    await asyncio.wait_for(actor.busy.remote(context, CONTEXTS[context]), 300)
    await asyncio.sleep(2.0)
    began = time.perf_counter()  # one clock for all processes of a machine
    await sender.push(pool, str(time.time_ns()))
    await asyncio.sleep(4.0)
    trace = np.array(await asyncio.wait_for(actor.idle.remote(), 60))
    times, tokens = trace[:, 0], trace[:, 1]

    def made(start: float, stop: float) -> float:
        return float(np.interp(stop, times, tokens) - np.interp(start, times, tokens))

    rate = made(began - 1.5, began) / 1.5
    window = 0.5
    back = next(
        (t for t in np.arange(began + 0.05, times[-1] - window, 0.02)
         if made(t, t + window) >= 0.95 * rate * window and made(began, t) < rate * (t - began)),
        times[-1],
    )  # fmt: skip
    return rate * (back - began) - made(began, back), back - began


async def updates(pool: Any, folder: Path) -> list[tuple[str, float, str, str]]:
    sender, rows, slowest = Sender(folder), [], 0.0
    for context, count in CONTEXTS.items():
        costs: dict[str, list[tuple[float, float]]] = {"keep": [], "recompute": []}
        for _ in range(2):
            for state, found in costs.items():
                found.append(await update_cost(pool, sender, state, context))
        for state, found in costs.items():
            lost, seconds = min(found)
            slowest = max(slowest, seconds)
            note = (
                f"{count} generations behind {context} tokens; the old rate after {seconds:.2f} s"
            )
            rows.append((f"tokens_lost_{state}_{context}", max(lost, 0.0), "tokens", note))
    rows.append(("recovery_s", slowest, "s", "to the same tokens/s, the slowest of the four"))
    return rows


async def cached_rates(pool: Any) -> dict[int, float]:
    """Tokens/s of groups that share their prompt, by prompt length."""
    rates = {}
    for length in (32, 1024):
        await served(pool, prompts(2, length, 98), 16)
        found = [await served(pool, prompts(16, length, 10 + i), 32) for i in range(REPEATS)]
        rates[length] = max(found)
    return rates


async def measure(folders: dict[str, Path]) -> None:
    """Four engines, one after another; what is known so far is written after each part."""
    rows: list[tuple[str, float, str, str]] = []
    long = {"max_model_len": 2 * DECODED + 256, "kv_cache_gib": 1.0}
    pool = await started(folders["small"], **long)
    value, note = await service_efficiency(pool, 48)
    write([*rows, ("service_efficiency_small", value, "ratio", note)], rows)
    write(rows + await updates(pool, folders["small"]), rows)
    await pool.close()
    pool = await started(folders["small"], prefix_caching=False, **long)
    without = await cached_rates(pool)
    if (await pool.stats())["cached_tokens"]:
        raise SystemExit("expected no token from a cache that is off")
    await pool.close()
    pool = await started(folders["small"], prefix_caching=True, **long)
    with_cache = await cached_rates(pool)
    hits = (await pool.stats())["cached_tokens"]
    await pool.close()
    for length, rate in with_cache.items():
        note = (
            f"tokens/s with prefix caching over without, 16 groups of {GROUP} behind prompts of "
            f"{length} tokens; {hits:.0f} tokens came from the cache in all"
        )
        found = (f"prefix_caching_{length}", rate / without[length], "ratio", note)
        write([*rows, found], rows)
    pool = await started(folders["20m"])
    value, note = await service_efficiency(pool, 16)
    write([*rows, ("service_efficiency_20m", value, "ratio", note)], rows)
    await pool.close()


def write(found: list[tuple[str, float, str, str]], rows: list[Any]) -> None:
    from results_file import metric, write_results

    rows[:] = found
    efficient = {name for name, *_ in rows if name.startswith("service_efficiency")}
    write_results(
        "rollouts_engine",
        [
            metric(name, value, unit, ">= 0.95", value >= 0.95, note)
            if name in efficient
            else metric(name, value, unit, "reported", None, note)
            for name, value, unit, note in rows
        ],
    )


def main() -> None:
    import ray

    from actors import rollout_actor

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    rollout_actor.RolloutActor = measured_actor()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(models(Path(folder))))
    ray.shutdown()


if __name__ == "__main__":
    main()
