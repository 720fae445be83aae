"""The learner on real Ray and DeepSpeed: two ranks with uneven micro-batches make the step that
one device makes of the whole batch, at every ZeRO stage; what it sends, saves and exports is
bit-equal to what it holds; what goes wrong ends in an error, not in a hang."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from h1r_rl.broadcast import Communicator
from h1r_rl.config.schema import (
    AlgorithmConfig,
    LearnerConfig,
    LoraConfig,
    OptimizerConfig,
    TinyModelConfig,
    WeightsConfig,
)
from h1r_rl.errors import WeightTransferError
from h1r_rl.grpo.build_batch import (
    advantages_by_group,
    build_micro_batch,
    plan_sft_batch,
    plan_train_batch,
)
from h1r_rl.grpo.policy_loss import policy_loss, sft_loss
from h1r_rl.hybrid.engine_values import compute_as_engine
from h1r_rl.hybrid.load import load_policy
from h1r_rl.hybrid.lora import adapted_layers, add_adapters, checkpoint_parameters
from h1r_rl.hybrid.tiny import build_tiny_model
from h1r_rl.records import Completion, Group, Prompt, Sample, Verdict, VersionSpan
from h1r_rl.weight_manifest import checksum
from learners.deepspeed_engine import PolicyLogprobs
from learners.learner_group import LearnerGroup
from learners.train_step import _loss_inputs, batch_tensors

OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3, warmup_steps=0, weight_decay=0.1, gradient_clip=0.05
)
ALGORITHM = AlgorithmConfig(positive_ce=0.1)
DEADLINE_S = 6.0
SMALL = TinyModelConfig(
    hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64,
    mamba_heads=4, mamba_head_dim=16, mamba_d_state=16, mamba_chunk_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster(ray_cluster):
    """The session's Ray: shutting it down here would take the shared engine with it."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(SMALL, folder, seed=3)
    return folder


async def start(
    model_folder: Path, *, zero_stage: int, sft: bool = False, engine_dtype: str = "float32",
    lora: LoraConfig | None = None,
) -> LearnerGroup:  # fmt: skip
    return await LearnerGroup.start(
        LearnerConfig(ranks=2, num_cpus=0.5, zero_stage=zero_stage, logprob_chunk_tokens=16),
        OPTIMIZER,
        total_steps=10,
        model_folder=str(model_folder),
        algorithm=None if sft else ALGORITHM,
        temperature=0.9,
        max_response_tokens=32,
        weights=WeightsConfig(bucket_mib=1, deadline_s=DEADLINE_S),
        seed=0,
        start_timeout_s=150,
        engine_dtype=engine_dtype,
        lora=lora,
    )


def make_groups(seed: int, *, logprob: float = -5.58, samples: int = 2) -> list[Group]:
    """Groups of uneven lengths; `logprob` near that of a fresh model, so that ratios are sane."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(5):
        lengths = rng.integers(1, 30, samples)
        completions = [
            Completion(
                i, rng.integers(0, 256, n, dtype=np.int32),
                (logprob + 0.1 * rng.standard_normal(n)).astype(np.float32),
                (VersionSpan("0", 0, int(n)),), "stop", "", "rollout-0",
            )
            for i, n in enumerate(lengths)
        ]  # fmt: skip
        ref = ray.put(completions)
        prompt = Prompt(f"p{g}", 0, rng.integers(0, 256, 4 + g, dtype=np.int32), "", "math", "1")
        members = tuple(
            Sample(i, len(c.token_ids), "stop", c.version_spans, Verdict(float(i % 2)), ref, i)
            for i, c in enumerate(completions)
        )
        groups.append(Group(prompt, members, 0))
    return groups


def make_plan(groups, *, ranks: int, micro_batch_tokens: int, sft: bool = False):
    if sft:
        return plan_sft_batch(
            groups, ranks=ranks, micro_batch_tokens=micro_batch_tokens, learner_version=0
        )
    return plan_train_batch(
        groups, ALGORITHM, ranks=ranks, micro_batch_tokens=micro_batch_tokens,
        learner_version=0, max_staleness=0,
    )  # fmt: skip


def reference_steps(
    model_folder: Path, batches, *, sft: bool, engine_dtype: str = "float32", lora=None
):
    """(weights, losses, norms) of the same steps in plain torch, the whole batch at once."""
    model = load_policy(model_folder)
    if lora is not None:
        add_adapters(model, lora, seed=0)
    policy = PolicyLogprobs(
        model, temperature=0.9, chunk_tokens=10**6, engine_dtype=engine_dtype
    )  # fmt: skip
    compute_as_engine(model, engine_dtype, autocast=False)
    exempt = ("A_log", "dt_bias", ".D", "bias", "norm")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim > 1 and not n.endswith(exempt)]
    rest = [p for n, p in named if not (p.ndim > 1 and not n.endswith(exempt))]
    adam = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-3, betas=OPTIMIZER.betas, eps=1e-8,
    )  # fmt: skip
    losses, norms = [], []
    for groups in batches:
        plan = make_plan(groups, ranks=1, micro_batch_tokens=10**6, sft=sft)
        completions = {
            (d.group, d.sample): ray.get(
                plan.groups[d.group].samples[d.sample].completions_ref, timeout=60
            )[d.sample]
            for d in plan.ranks[0][0]
        }
        advantages = None if sft else advantages_by_group(plan, ALGORITHM)
        batch = build_micro_batch(plan, plan.ranks[0][0], completions, advantages)
        if sft:
            loss, _ = sft_loss(policy(*batch_tensors(batch, "cpu"))[0], plan.num_target_tokens)
        else:
            inputs = _loss_inputs(policy, batch, ALGORITHM, None, "cpu", 0)
            loss, _ = policy_loss(inputs, ALGORITHM, plan, max_response_tokens=32)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        losses.append(loss.item())
        adam.step()
        adam.zero_grad()
    merged = {name: layer.merged() for name, layer in adapted_layers(model).items()}
    held = {n: p.detach() for n, p in checkpoint_parameters(model).items()}
    return held | merged, losses, norms


async def exported(learner: LearnerGroup, folder: Path) -> dict[str, torch.Tensor]:
    await learner.export(str(folder))
    return load_file(folder / "model.safetensors")


def receive(epoch, manifest) -> dict[str, bytes]:
    """An engine's side, in the terms of the wire alone."""
    communicator = Communicator(epoch, rank=1)
    received, sums = {}, []
    for bucket in manifest.buckets():
        flat = torch.zeros(sum(spec.num_bytes for spec in bucket), dtype=torch.uint8)
        communicator.broadcast(flat)
        offset = 0
        for spec in bucket:
            data = flat[offset : offset + spec.num_bytes].numpy()
            received[spec.name], offset = data.tobytes(), offset + spec.num_bytes
            sums.append(checksum(data))
    sent = torch.zeros(len(sums), dtype=torch.int64)
    communicator.broadcast(sent)
    communicator.close()
    assert sent.tolist() == sums
    return received


def assert_same_update(found, expected, start) -> None:
    """Adam turns rounding of a vanishing gradient into a whole step, so updates are compared as
    vectors; a wrong weight of any document moves this far beyond the bound."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        step = (value - start[name]).norm()
        assert (found[name] - value).norm() <= 2e-2 * step + 1e-7, name


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
async def test_life_of_a_learner(cluster, model_folder, tmp_path, zero_stage):
    first = load_file(model_folder / "model.safetensors")
    batches = [make_groups(2, samples=3), make_groups(6, samples=4)]
    weights, losses, norms = reference_steps(model_folder, batches, sft=False)
    learner = await start(model_folder, zero_stage=zero_stage)
    try:
        for i, groups in enumerate(batches):
            plan = make_plan(groups, ranks=2, micro_batch_tokens=50)
            # Three micro-batches a rank and then five, of uneven lengths, the last one empty.
            assert [len(rank) for rank in plan.ranks] == [[3, 3], [5, 5]][i]
            metrics = await learner.forward_backward(plan)
            if i == 0:  # between them, as in the run loop: gradients stay what they are
                await _scores_at_temperature_one(learner, model_folder)
            result = await learner.optimizer_step()
            assert result.version == i + 1 and not result.skipped
            assert metrics["loss"] == pytest.approx(losses[i], rel=1e-4, abs=1e-6)
            assert result.metrics["grad_norm"] == pytest.approx(norms[i], rel=1e-3)
        held = await exported(learner, tmp_path / "after")
        assert_same_update(held, weights, first)

        await _sends_what_it_holds(learner, held)
        if zero_stage in (0, 3):  # ZeRO 1 and 2 send as 0 does
            await _survives_a_silent_engine(learner, held)
        await _skips_a_broken_step(learner, held, tmp_path)
        await _continues_from_its_checkpoint(learner, held, tmp_path)
        await _holds_its_share(learner, zero_stage, sum(v.numel() for v in held.values()))
        for aggregation in ("token_mean", "sequence_mean", "constant"):
            algorithm = AlgorithmConfig(aggregation=aggregation, positive_ce=0.1)
            folder = tmp_path / "restored"
            await _every_gradient_is_the_whole_batchs(learner, folder, algorithm)
            await learner.load_checkpoint(str(tmp_path / "checkpoints"))
    finally:
        await learner.close()


async def on_every_rank(learner, call) -> list:
    return await asyncio.gather(
        *(
            actor.__ray_call__.options(concurrency_group="compute").remote(call)
            for actor in learner._actors
        )
    )


def first_moments(rank) -> dict[str, np.ndarray]:
    """Adam's averages of gradients, whole, by parameter."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine, found = rank._engine, {}
    if engine.zero_optimization_stage() in (1, 2):  # a loaded checkpoint has cut its links to them
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, p in engine.module.model.named_parameters():
        if engine.zero_optimization_stage():
            found[name] = safe_get_full_optimizer_state(p, "exp_avg").numpy().copy()
        else:
            found[name] = engine.optimizer.state[p]["exp_avg"].numpy().copy()
    return found


async def _every_gradient_is_the_whole_batchs(learner, folder, algorithm) -> None:
    """Tensor by tensor: Adam's update hides a tensor's scale, the norm hides where it comes from.
    What a step adds to Adam's averages is its clipped gradient."""
    groups, beta = make_groups(2, samples=3), OPTIMIZER.betas[0]
    model = load_policy(folder)
    loss_of(model, groups, algorithm).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.gradient_clip)

    def use(rank):
        rank._algorithm = algorithm

    await on_every_rank(learner, use)
    plan = make_plan(groups, ranks=2, micro_batch_tokens=50)
    assert [len(rank) for rank in plan.ranks] == [3, 3]
    before = (await on_every_rank(learner, first_moments))[0]
    await learner.forward_backward(plan)
    assert not (await learner.optimizer_step()).skipped
    after = (await on_every_rank(learner, first_moments))[0]
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert after.keys() == expected.keys()
    for name, gradient in expected.items():
        found = (after[name] - beta * before[name]) / (1 - beta)
        limit = 1e-3 * np.abs(gradient).max() + 1e-5 * np.abs(before[name]).max() + 1e-9
        np.testing.assert_allclose(found, gradient, rtol=0, atol=limit, err_msg=name)


def elements_held(rank) -> tuple[int, int]:
    """(of the optimizer's state, of parameters) in this rank's own memory."""
    engine = rank._engine
    states = engine.optimizer.state if hasattr(engine.optimizer, "state") else {}
    inner = getattr(engine.optimizer, "optimizer", None)
    states = inner.state if inner is not None else states
    moments = sum(s["exp_avg"].numel() for s in states.values() if "exp_avg" in s)
    kept = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    return moments, sum(p.numel() for p in kept)


async def _holds_its_share(learner, zero_stage: int, whole: int) -> None:
    share = whole if zero_stage == 0 else whole / 2
    for moments, parameters in await on_every_rank(learner, elements_held):
        assert moments == pytest.approx(share, rel=0.02)  # shards are padded to equal sizes
        assert parameters == pytest.approx(share if zero_stage == 3 else whole, rel=0.02)


def loss_of(model, groups, algorithm):
    """Of the whole batch in one forward pass, in plain torch."""
    policy = PolicyLogprobs(model, temperature=0.9, chunk_tokens=10**6)
    plan = make_plan(groups, ranks=1, micro_batch_tokens=10**6)
    completions = {
        (d.group, d.sample): ray.get(
            plan.groups[d.group].samples[d.sample].completions_ref, timeout=60
        )[d.sample]
        for d in plan.ranks[0][0]
    }
    advantages = advantages_by_group(plan, algorithm)
    batch = build_micro_batch(plan, plan.ranks[0][0], completions, advantages)
    inputs = _loss_inputs(policy, batch, algorithm, None, "cpu", 0)
    return policy_loss(inputs, algorithm, plan, max_response_tokens=32)[0]


async def _scores_at_temperature_one(learner, folder) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 21, dtype=np.int32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        tokens = torch.from_numpy(ids).long()
        logprobs = model(tokens[None], use_cache=False).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, tokens[1:, None]).squeeze(1)
    np.testing.assert_allclose(await learner.score(ids), expected, atol=1e-5)


async def _sends_what_it_holds(learner, held) -> None:
    manifest = await learner.weight_manifest()
    epoch = await learner.open_epoch(2, {"rollout-0": 1})
    receiving = asyncio.create_task(asyncio.to_thread(receive, epoch, manifest))
    await learner.join_epoch(epoch)
    # The next step's gradients are computed meanwhile.
    sent, _ = await asyncio.gather(
        learner.send(),
        learner.forward_backward(make_plan(make_groups(5), ranks=2, micro_batch_tokens=50)),
    )
    received = await receiving
    assert sent["bytes"] == sum(len(data) for data in received.values())
    assert received.keys() == held.keys()
    for name, value in held.items():
        assert received[name] == value.numpy().tobytes(), name


async def _survives_a_silent_engine(learner, held) -> None:
    """One that never joins; one that joins and then receives nothing."""
    epoch = await learner.open_epoch(2, {"rollout-0": 1})
    started = time.monotonic()
    with pytest.raises(WeightTransferError):
        await learner.join_epoch(epoch)
    epoch = await learner.open_epoch(2, {"rollout-0": 1})
    silent, _ = await asyncio.gather(
        asyncio.to_thread(Communicator, epoch, 1), learner.join_epoch(epoch)
    )
    with pytest.raises(WeightTransferError, match="rollout-0"):
        await learner.send()
    assert time.monotonic() - started < 4 * DEADLINE_S
    silent.close()
    await _sends_what_it_holds(learner, held)


async def _skips_a_broken_step(learner, held, tmp_path) -> None:
    broken = make_plan(make_groups(7, logprob=float("nan")), ranks=2, micro_batch_tokens=50)
    await learner.forward_backward(broken)
    result = await learner.optimizer_step()
    assert result.skipped and result.version == 2
    after = await exported(learner, tmp_path / "skipped")
    assert all(torch.equal(after[name], value) for name, value in held.items())


async def _continues_from_its_checkpoint(learner, held, tmp_path) -> None:
    """Two steps from one checkpoint end in the same bits."""
    plan = make_plan(make_groups(9), ranks=2, micro_batch_tokens=50)
    await learner.save_checkpoint(str(tmp_path / "checkpoints"))
    ends = []
    for attempt in ("once", "again"):
        await learner.forward_backward(plan)
        assert (await learner.optimizer_step()).version == 3
        ends.append(await exported(learner, tmp_path / attempt))
        assert await learner.load_checkpoint(str(tmp_path / "checkpoints")) == 2
    assert any(not torch.equal(ends[0][name], value) for name, value in held.items())
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
    restored = await exported(learner, tmp_path / "restored")
    assert all(torch.equal(restored[name], value) for name, value in held.items())


async def test_sft_step_equals_one_device(cluster, model_folder, tmp_path):
    first = load_file(model_folder / "model.safetensors")
    batches = [make_groups(11, samples=1), make_groups(12, samples=1)]
    weights, losses, _ = reference_steps(model_folder, batches, sft=True)
    learner = await start(model_folder, zero_stage=0, sft=True)
    try:
        for i, groups in enumerate(batches):
            plan = make_plan(groups, ranks=2, micro_batch_tokens=30, sft=True)
            metrics = await learner.forward_backward(plan)
            await learner.optimizer_step()
            assert metrics["loss"] == pytest.approx(losses[i], rel=1e-4)
        held = await exported(learner, tmp_path / "sft")
        assert_same_update(held, weights, first)
        for name in ("tokenizer.json", "config.json", "generation_config.json"):
            assert (tmp_path / "sft" / name).is_file()
        model = load_policy(tmp_path / "sft")
        assert all(torch.equal(held[name], p) for name, p in model.named_parameters())
    finally:
        await learner.close()


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
async def test_a_step_with_the_values_of_a_bfloat16_engine(
    cluster, model_folder, tmp_path, zero_stage
):
    """Forward passes use rounded tensors, at every stage the same; what is held stays float32."""
    first, batches = load_file(model_folder / "model.safetensors"), [make_groups(1)]
    weights, losses, norms = reference_steps(
        model_folder, batches, sft=False, engine_dtype="bfloat16"
    )
    _, plain, _ = reference_steps(model_folder, batches, sft=False)
    learner = await start(model_folder, zero_stage=zero_stage, engine_dtype="bfloat16")
    try:
        plan = make_plan(batches[0], ranks=2, micro_batch_tokens=50)
        metrics = await learner.forward_backward(plan)
        result = await learner.optimizer_step()
        assert metrics["loss"] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)
        assert abs(losses[0] - plain[0]) > 10 * abs(metrics["loss"] - losses[0])
        assert result.metrics["grad_norm"] == pytest.approx(norms[0], rel=1e-3)
        held = await exported(learner, tmp_path / "after")
        assert_same_update(held, weights, first)
        assert not torch.equal(held["lm_head.weight"], held["lm_head.weight"].bfloat16().float())
    finally:
        await learner.close()
