"""Shared by the whole test session: one embedded Ray, one tiny model, one engine, one demo run."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from h1r_rl.config.schema import RolloutConfig, TinyModelConfig, WeightsConfig  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, shake_model) -> Path:
    """A tiny Falcon-H1, every parameter moved away from its initial value (a norm of ones or a D
    of ones would hide a tensor that was never loaded), with logits far from uniform."""
    from h1r_rl.hybrid.tiny import build_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(TinyModelConfig(), folder, seed=0)
    shake_model(folder, folder, seed=1, head_scale=40.0)
    return folder


def _shake(source: Path, target: Path, *, seed: int, head_scale: float = 1.0) -> None:
    """Every parameter of `source` times a random factor around 1, saved to `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + 0.2 * noise)
        model.get_output_embeddings().weight.mul_(head_scale)
    model.save_pretrained(target)
    if source != target:
        AutoTokenizer.from_pretrained(source).save_pretrained(target)


@pytest.fixture(scope="session")
def shake_model() -> Callable[..., None]:
    return _shake


@pytest.fixture(scope="session")
def rollout_config() -> RolloutConfig:
    return RolloutConfig(
        max_response_tokens=64,
        max_model_len=128,
        max_num_seqs=64,
        dtype="float32",
        kv_cache_gib=0.25,
        enforce_eager=True,
        request_timeout_s=60,
    )


@pytest.fixture(scope="session")
def weights_config() -> WeightsConfig:
    return WeightsConfig(deadline_s=20, bucket_mib=1)


@pytest.fixture(scope="session")
def rollout_pool(ray_cluster, tiny_model_folder, rollout_config, weights_config):
    """One engine for every test that only needs one, version "0" at first. A test that pushes
    weights leaves its own version behind."""
    from actors.rollout_pool import RolloutPool

    pool = asyncio.run(
        RolloutPool.start(
            rollout_config,
            weights_config,
            model_folder=str(tiny_model_folder),
            seed=0,
            initial_version="0",
            run_name="tests",
            start_timeout_s=200,
        )
    )
    yield pool
    asyncio.run(pool.close())


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The run folder that `make demo` leaves."""
    folder = ROOT / "runs" / "tiny-cpu"
    if not (folder / "result.json").exists():
        h1r = Path(sys.executable).with_name("h1r")
        run = ROOT / "cluster" / "runs" / "tiny-cpu.yaml"
        subprocess.run([h1r, "run", run, "--resume"], cwd=ROOT, check=True, timeout=1400)
    return folder
