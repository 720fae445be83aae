"""The learner's step against a bare PyTorch loop, and two ZeRO-2 ranks against one.

Everything runs on one thread a process. Best of interleaved repeats; the second ratio is divided by
what the same machine gives two processes of plain matrix products over one, measured in between.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from learners.learner_group import CPU_ENV

sys.path.insert(0, str(Path(__file__).parent))
from results_file import metric, write_results  # noqa: E402

REPEATS = 5
DOCUMENTS = 48
MICRO_BATCH_TOKENS = 2048
CLIP = 1.0
DEADLINE_S = 300.0


def make_model(folder: Path) -> None:
    from h1r_rl.config.schema import TinyModelConfig
    from h1r_rl.hybrid.tiny import build_tiny_model

    config = TinyModelConfig(
        hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64,
        intermediate_size=768, mamba_heads=8, mamba_head_dim=64, mamba_d_state=64,
    )  # fmt: skip
    build_tiny_model(config, folder, seed=0)


def make_plan(ranks: int) -> tuple[Any, dict[tuple[int, int], Any]]:
    """SFT traces of log-normal lengths, and the plan that shares them out."""
    from h1r_rl.grpo.build_batch import plan_sft_batch
    from h1r_rl.records import Completion, Group, Prompt, Sample, Verdict, VersionSpan

    rng = np.random.default_rng(0)
    groups, completions = [], {}
    for d in range(DOCUMENTS):
        length = int(np.clip(rng.lognormal(5.0, 0.7), 16, 1500))
        ids = rng.integers(0, 256, length, dtype=np.int32)
        spans = (VersionSpan("0", 0, length),)
        completions[d, 0] = Completion(
            0, ids, np.zeros(length, np.float32), spans, "stop", "", "sft"
        )
        prompt = Prompt(f"p{d:03d}", 0, rng.integers(0, 256, 24, dtype=np.int32), "", "m", "")
        groups.append(Group(prompt, (Sample(0, length, "stop", spans, Verdict(1.0), None, 0),), 0))
    plan = plan_sft_batch(
        groups, ranks=ranks, micro_batch_tokens=MICRO_BATCH_TOKENS, learner_version=0
    )
    return plan, completions


def bare_step(model: Any, adam: Any, batches: list, targets: int) -> None:
    """What one would write without us: packed forward, cross-entropy over whole logits."""
    import torch

    from h1r_rl.hybrid.load import output_head
    from h1r_rl.hybrid.packed_forward import hidden_states

    weight, multiplier = output_head(model)
    for ids, starts, positions in batches:
        hidden = hidden_states(model, ids, starts)[positions - 1]
        logits = hidden @ weight.T * multiplier
        loss = torch.nn.functional.cross_entropy(logits, ids[positions], reduction="sum")
        (loss / targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    adam.step()
    adam.zero_grad()


def worker(pipe: Any, folder: str, rank: int, ranks: int, port: int) -> None:
    """Answers each name that it is sent with the seconds that the work of that name took."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks),
        LOCAL_RANK="0", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import deepspeed
    import torch

    from h1r_rl.config.schema import LearnerConfig, OptimizerConfig
    from h1r_rl.grpo.build_batch import build_micro_batch
    from h1r_rl.hybrid.load import load_policy
    from learners.deepspeed_engine import PolicyLogprobs, apply_gradients, build_engine
    from learners.train_step import batch_tensors, run_plan

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as LearnerActor
    deepspeed.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)
    optimizer = OptimizerConfig(learning_rate=1e-4, warmup_steps=0, gradient_clip=CLIP)
    plan, completions = make_plan(ranks)

    def engine(zero_stage: int) -> Any:
        policy = PolicyLogprobs(load_policy(folder), temperature=1.0, chunk_tokens=1024)
        return build_engine(policy, LearnerConfig(ranks=ranks, zero_stage=zero_stage), optimizer)

    def learner_step(engine: Any) -> None:
        run_plan(
            engine, plan, completions, algorithm=None, reference=None, max_response_tokens=1500
        )
        apply_gradients(engine)

    sharded = engine(2)
    work: dict[str, Any] = {"zero2": lambda: learner_step(sharded)}
    square = torch.randn(512, 512)
    work["matmul"] = lambda: [square @ square for _ in range(150)]
    if ranks == 1:
        plain, model = engine(0), load_policy(folder).train()
        adam = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=optimizer.betas)
        batches = [
            batch_tensors(build_micro_batch(plan, documents, completions, None), "cpu")
            for documents in plan.ranks[0]
        ]
        work["learner"] = lambda: learner_step(plain)
        work["bare"] = lambda: bare_step(model, adam, batches, plan.num_target_tokens)
    pipe.send(plan.num_target_tokens)
    while (name := pipe.recv()) is not None:
        started = time.perf_counter()
        work[name]()
        pipe.send(time.perf_counter() - started)


def start(folder: Path, ranks: int) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    os.environ.update(CPU_ENV, OMP_NUM_THREADS="1")  # a rank's own; the bare loop has it too
    context = multiprocessing.get_context("spawn")
    pipes = []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        arguments = (theirs, str(folder), rank, ranks, port)
        context.Process(target=worker, args=arguments, daemon=True).start()
        pipes.append(ours)
    return pipes


def answer(pipe: Any) -> float:
    if not pipe.poll(DEADLINE_S):
        raise TimeoutError("a benchmark process gave no answer")
    return pipe.recv()


def timed(pipes: list[Any], name: str) -> float:
    """Seconds until the last of them is done."""
    for pipe in pipes:
        pipe.send(name)
    return max(answer(pipe) for pipe in pipes)


def main() -> None:
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as parent:
        make_model(Path(parent) / "model")
        alone, pair = (start(Path(parent) / "model", ranks) for ranks in (1, 2))
        tokens = [answer(pipe) for pipe in (*alone, *pair)][0]
        for turn in range(REPEATS + 1):
            for key, pipes, name in (
                ("learner", alone, "learner"),
                ("bare", alone, "bare"),
                ("one", alone, "zero2"),
                ("two", pair, "zero2"),
                ("matmul one", alone, "matmul"),
                ("matmul two", pair, "matmul"),
            ):
                seconds = timed(pipes, name)
                if turn:  # the first one warms up
                    best[key] = min(best.get(key, seconds), seconds)
        for pipe in (*alone, *pair):
            pipe.send(None)
    efficiency = best["bare"] / best["learner"]
    speedup = best["one"] / best["two"]
    ceiling = 2 * best["matmul one"] / best["matmul two"]
    write_results(
        "learner",
        [
            metric("learner_efficiency", efficiency, "ratio", ">= 0.95", efficiency >= 0.95,
                   f"{tokens / best['learner']:.0f} target tokens/s over "
                   f"{tokens / best['bare']:.0f}; same packed model, clip and AdamW, one thread"),
            metric("zero2_scaling", speedup / ceiling, "ratio", ">= 0.85",
                   speedup / ceiling >= 0.85,
                   f"two ranks {speedup:.2f} times one; two processes of matrix products "
                   f"{ceiling:.2f} times one"),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
