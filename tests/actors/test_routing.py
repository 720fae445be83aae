"""The pool's bookkeeping and the pure functions, without an engine."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from actors.completions import to_completion
from actors.engine_args import engine_args, engine_env
from actors.engine_process import EngineStart, Member
from actors.rollout_pool import RolloutPool
from actors.sampling_guard import refuse_foreign_logits_processors, rl_sampling
from h1r_rl.config.schema import RolloutConfig, WeightsConfig
from h1r_rl.errors import ConfigError, RunFailed, WeightTransferError
from h1r_rl.interfaces import Sampling
from h1r_rl.records import Prompt
from h1r_rl.weight_manifest import ParameterSpec, WeightManifest

CONFIG = RolloutConfig(max_response_tokens=8, max_model_len=16, tensor_parallel=2)


class StubMethod:
    def __init__(self, answer) -> None:
        self.answer, self.calls = answer, []

    def remote(self, *args):
        self.calls.append(args)
        return self._reply()

    async def _reply(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def _pool(monkeypatch, **methods) -> RolloutPool:
    """Three engines; each method has one answer an engine."""
    monkeypatch.setattr("actors.engines.kill_actor", lambda actor: None)
    config = CONFIG.model_copy(update={"actors": 3, "max_replacements": 0})
    pool = RolloutPool(config, WeightsConfig(), EngineStart("m", 0, "0", "r", 1.0, False))
    for i in range(3):
        actor = SimpleNamespace(**{name: StubMethod(a[i]) for name, a in methods.items()})
        pool._engines.members[f"rollout-{i}"] = Member(actor, "0", ready=True)
    pool._in_epoch = list(pool._engines.members)
    return pool


async def test_groups_go_to_the_least_loaded_engine_with_the_newest_weights(monkeypatch):
    pool = _pool(monkeypatch)
    engines = pool._engines
    first, second, third = engines.members.values()
    engines.owe(first, 8)
    engines.owe(second, 4)
    assert (await engines.serving())[0] == "rollout-2"
    engines.version = first.version = second.version = "1"
    assert (await engines.serving())[0] == "rollout-1"
    assert pool.behind() == ["rollout-2"]
    second.leaving = first.leaving = True
    waiting = asyncio.create_task(engines.serving())  # none serves, one will
    await asyncio.sleep(0.01)
    assert not waiting.done()
    third.version = "1"
    engines.changed.give()
    assert (await asyncio.wait_for(waiting, 1))[0] == "rollout-2"
    third.leaving = True
    with pytest.raises(RunFailed, match="no rollout engine is left"):
        await engines.serving()
    assert pool.members() == {"rollout-0": 2, "rollout-1": 2, "rollout-2": 2}


async def test_an_engine_that_starts_is_no_member_yet(monkeypatch):
    pool = _pool(monkeypatch)
    pool._engines.members["rollout-1"].ready = False
    assert list(pool.members()) == ["rollout-0", "rollout-2"]
    assert pool.num_engines() == 3


async def test_a_failed_transfer_keeps_its_engine_and_a_failed_commit_does_not(monkeypatch):
    bad = WeightTransferError("checksum of x", ("rollout-1",))
    pool = _pool(monkeypatch, staged=[None, bad, None], commit=[0.1, 0.1, RuntimeError("boom")])
    with pytest.raises(WeightTransferError, match="rollout-1: checksum of x.*rollout-2: boom") as e:
        await pool.commit("4")
    assert e.value.members == ("rollout-1", "rollout-2")
    assert list(pool.members()) == ["rollout-0", "rollout-1"]
    assert pool.lost() == {"rollout-2": "boom"}
    assert pool.behind() == ["rollout-1"]
    assert not pool._engines.members["rollout-1"].actor.commit.calls


async def test_when_nobody_received_nobody_is_behind(monkeypatch):
    bad = WeightTransferError("lost the learner")
    pool = _pool(monkeypatch, staged=[bad] * 3, commit=[0.1] * 3)
    with pytest.raises(WeightTransferError, match="rollout-0.*rollout-1.*rollout-2"):
        await pool.commit("4")
    assert len(pool.members()) == 3 and not pool.behind()


async def test_engines_lost_between_staging_and_commit_end_the_transfer_not_the_run(monkeypatch):
    """A restart in that moment; the sender then tries again with whoever comes."""
    pool = _pool(monkeypatch, staged=[None] * 3, commit=[0.1] * 3)

    class Restarted(StubMethod):
        async def _reply(self):
            for name in list(pool.members()):
                pool.give_up([name], RuntimeError("restarted on request"))

    pool._engines.members["rollout-2"].actor.staged = Restarted(None)
    with pytest.raises(WeightTransferError, match="version 4 .* lost before they committed"):
        await pool.commit("4")
    assert pool.newest() == "0" and not pool._engines.in_transfer


async def test_a_leaver_stays_for_the_transfer_under_way(monkeypatch):
    """Its communicator's other members would lose theirs with it."""
    closed = []

    async def close_actors(actors):
        closed.extend(actors)

    monkeypatch.setattr("actors.engines.close_actors", close_actors)
    pool = _pool(monkeypatch, begin_receive=[None] * 3)
    await pool.begin_receive(WeightManifest((ParameterSpec("w", (1,), "float32"),), 64))
    scaling = asyncio.create_task(pool.scale(1))
    await asyncio.sleep(0.05)
    assert not scaling.done() and not closed and len(pool.members()) == 3
    pool._engines.owe(pool._engines.members["rollout-0"], 9)
    assert (await pool._engines.serving())[0] == "rollout-0"  # a leaver takes nothing more
    pool.end_transfer()
    await asyncio.wait_for(scaling, 5)
    assert len(closed) == 2 and list(pool.members()) == ["rollout-0"]


def test_engine_settings_that_decide_correctness():
    args = engine_args(
        CONFIG, WeightsConfig(backend="nccl"), model_folder="m", seed=3, trust_remote_code=False
    )
    assert args["logprobs_mode"] == "processed_logprobs"
    assert args["mamba_ssm_cache_dtype"] == "float32"
    assert args["generation_config"] == "vllm"
    assert args["enable_prefix_caching"] is True
    assert args["weight_transfer_config"] == {"backend": "h1r_nccl"}
    assert args["tensor_parallel_size"] == 2 and args["seed"] == 3
    assert engine_env(CONFIG)["OMP_NUM_THREADS"] == "1"
    gpu = CONFIG.model_copy(update={"num_gpus": 2.0})
    assert "OMP_NUM_THREADS" not in engine_env(gpu)


def test_what_breaks_the_ratio_is_refused(monkeypatch):
    assert rl_sampling(CONFIG).temperature == 1.0
    with pytest.raises(ConfigError, match=r"expected 1\.0, found 0\.95"):
        rl_sampling(CONFIG.model_copy(update={"top_p": 0.95}))
    refuse_foreign_logits_processors()
    point = SimpleNamespace(value="other.package:Processor")
    monkeypatch.setattr("actors.sampling_guard.entry_points", lambda group: [point])
    with pytest.raises(ConfigError, match="other.package:Processor"):
        refuse_foreign_logits_processors()


@pytest.mark.parametrize(
    "spans",
    [[("default", 0, 2)], [("3", 0, 1)], [("3", 0, 1), ("4", 0, 2)], []],
    ids=["foreign label", "uncovered", "overlapping", "none"],
)
def test_tokens_without_our_label_are_an_error(spans):
    output = finished([5, 6], [5, 6], spans)
    with pytest.raises(RuntimeError, match="expected our version labels over 2 tokens"):
        to_completion(output, 0, "rollout-0", None)


def finished(ids: list[int], scored: list[int], spans, finish_reason: str | None = "stop"):
    return SimpleNamespace(
        token_ids=ids,
        logprobs=SimpleNamespace(token_ids=scored, logprobs=[-float(t) for t in scored]),
        weight_versions=[SimpleNamespace(version=v, start=s, end=e) for v, s, e in spans],
        finish_reason=finish_reason,
    )


@pytest.mark.parametrize("scored", [[5], [5, 7], [5, 6, 6]])
def test_logprobs_of_other_tokens_are_an_error(scored):
    with pytest.raises(RuntimeError, match="expected one logprob, its own, of each of 2 tokens"):
        to_completion(finished([5, 6], scored, [("3", 0, 2)]), 0, "rollout-0", None)


@pytest.mark.parametrize("ending", ["stop", "length", "abort", None, "no output"])
async def test_an_abort_is_no_completion(ending):
    from actors.rollout_actor import RolloutActor

    answer = finished([5, 6], [5, 6], [("3", 0, 2)], ending)

    class Engine:
        async def generate(self, inputs, parameters, request_id):
            for _ in range(ending != "no output"):
                yield SimpleNamespace(outputs=[answer])

    config = CONFIG.model_copy(update={"prefix_caching": False})
    actor = RolloutActor.__ray_metadata__.modified_class("rollout-0", config, WeightsConfig(), "r")
    tokenizer = SimpleNamespace(decode=lambda ids, **_: str(ids))
    actor._engine, actor._tokenizer, actor._stop_ids = Engine(), tokenizer, []
    prompt = Prompt("p", 0, np.array([1], dtype=np.int32), "q", "math", "1")
    parts = actor.generate(prompt, [0], Sampling(1.0, 8))
    if ending in ("stop", "length"):
        assert [p async for p in parts][1][0].finish_reason == ending
    else:
        with pytest.raises(RuntimeError, match="the engine aborted request r/p/0/0/"):
            await anext(parts)


class UpdatedEngine:
    """vLLM's side of a commit and of requests: the first time one is asked it waits for ever, part
    of the way through its prompt; the second time it is answered."""

    def __init__(self, label: str) -> None:
        self.label, self.calls, self.salts = label, [], []
        self.output_processor = SimpleNamespace(request_states={})
        self.aborted = asyncio.Event()

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(f"pause, {mode}")

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, request) -> None:
        self.calls.append("load")

    async def finish_weight_update(self, *, weight_version: str) -> None: ...

    async def get_weight_version(self) -> str:
        return self.label

    async def abort(self, request_ids) -> None:
        self.calls.append(f"abort {len(request_ids)}")
        self.aborted.set()

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def generate(self, inputs, parameters, request_id):
        self.salts.append(inputs["cache_salt"])
        state = SimpleNamespace(external_req_id=request_id, is_prefilling=True)
        self.output_processor.request_states[request_id] = state
        reason = "stop"
        if len(self.salts) == 1:
            await self.aborted.wait()
            reason = "abort"
        yield SimpleNamespace(outputs=[finished([5, 6], [5, 6], [("1", 0, 2)], reason)])


def rollout_actor(engine, **settings):
    from actors.rollout_actor import RolloutActor

    config = CONFIG.model_copy(update={"prefix_caching": True, **settings})
    actor = RolloutActor.__ray_metadata__.modified_class("rollout-0", config, WeightsConfig(), "r")
    tokenizer = SimpleNamespace(decode=lambda ids, **_: str(ids))
    actor._engine, actor._tokenizer, actor._stop_ids, actor._version = engine, tokenizer, [], "0"
    return actor


async def test_a_request_without_a_token_is_asked_anew_under_the_new_version():
    engine = UpdatedEngine("1")
    actor = rollout_actor(engine, running_state="keep")
    scored = SimpleNamespace(external_req_id="r/p/0/score/1", is_prefilling=True)
    decoding = SimpleNamespace(external_req_id="r/q/0/0/1", is_prefilling=False)
    prompt = Prompt("p", 0, np.array([1], dtype=np.int32), "q", "math", "1")
    parts = actor.generate(prompt, [0], Sampling(1.0, 8))
    answer = asyncio.create_task(anext(parts))
    while not engine.salts:  # noqa: ASYNC110 - it is on its way to the engine
        await asyncio.sleep(0)
    engine.output_processor.request_states |= {"a": scored, "b": decoding}
    await actor.commit("1")
    assert (await answer).finish_reasons == ("stop",)
    assert engine.salts == ["0", "1"] and actor._totals["recalled"] == 1
    assert engine.calls == ["pause, keep", "load", "abort 1", "resume"]
    assert not actor._asked and not actor._recalled


@pytest.mark.parametrize(
    "settings", [{"running_state": "recompute"}, {"prefix_caching": False}], ids=str
)
async def test_nothing_is_taken_back_where_no_old_prefix_can_be_read(settings):
    engine = UpdatedEngine("1")
    await rollout_actor(engine, **settings).commit("1")
    assert engine.calls == ["pause, keep", "load", "resume"]


async def test_a_label_that_is_not_the_one_sent_is_an_error_and_nothing_is_resumed():
    engine = UpdatedEngine("default")
    with pytest.raises(RuntimeError, match="holds version 'default' after '1' was sent"):
        await rollout_actor(engine).commit("1")
    assert engine.calls == ["pause, keep", "load"]


def test_seeds_of_requests_are_an_option():
    """Off by default: vLLM samples seeded requests one by one in Python."""
    from actors.rollout_actor import RolloutActor

    seed_of = RolloutActor.__ray_metadata__.modified_class._request_seed

    def seed(run_seed: int, key: str, index: int, on: bool = True):
        config = CONFIG.model_copy(update={"request_seeds": on})
        actor = SimpleNamespace(_config=config, _run_seed=run_seed)
        return seed_of(actor, SimpleNamespace(key=key), index)

    assert not CONFIG.request_seeds and seed(0, "p/0", 0, on=False) is None
    cases = [(s, k, i) for s in (0, 1) for k in ("p/0", "p/1", "q/0") for i in range(3)]
    assert len({seed(*case) for case in cases}) == len(cases)
    assert seed(0, "p/0", 1) == seed(0, "p/0", 1)


@pytest.mark.parametrize("makes_tokens", [True, False])
async def test_a_long_answer_is_waited_for_while_its_engine_makes_tokens(monkeypatch, makes_tokens):
    pool = _pool(monkeypatch)
    pool._config = CONFIG.model_copy(update={"request_timeout_s": 0.1})
    tokens = itertools.count() if makes_tokens else itertools.repeat(7.0)

    async def stats(method, names):
        assert (method, names) == ("stats", ["rollout-0"])
        return {"rollout-0": {"tokens": float(next(tokens))}}

    async def stream():
        await asyncio.sleep(0.4)
        yield "part"

    monkeypatch.setattr(pool, "_each", stats)
    if makes_tokens:
        assert await pool._next("rollout-0", stream(), "a sample") == "part"
    else:
        with pytest.raises(TimeoutError, match="no token for 0.05 s"):
            await pool._next("rollout-0", stream(), "a sample")
