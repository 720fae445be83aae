"""One process that is a whole learner, for what needs torch.distributed and no second rank."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it where the group is there already


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory) -> None:
    """A default process group of one; it lives as long as the session, as DeepSpeed keeps it."""
    import deepspeed
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as LearnerActor: no compiler
    store = tmp_path_factory.mktemp("rank") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


@pytest.fixture(scope="module")
def one_learner(one_rank):
    """What DeepSpeed's engine wants beside it, while one module runs: Ray must not inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        yield
