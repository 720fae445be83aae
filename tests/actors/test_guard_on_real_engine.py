"""A real engine that holds other than the learner's model trips the guard; a sound one does not.

Faults go in as weights: what arrives is what a faulty engine would compute with. A bfloat16 `A_log`
and, beside a bfloat16 engine, a layer that no update reaches do not show in log-probabilities (over
these 48 tokens of two layers the first moves the mean from 8e-7 to 2.4e-6; for more tokens and
layers see `results/logprob_gap.json`): the values that the engine holds and its count of what was
loaded show them, at any dtype.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.agreement import values_agree
from h1r_rl.config.schema import GRPOConfig, LearnerConfig, RolloutConfig
from h1r_rl.errors import RunFailed, WeightTransferError
from h1r_rl.grpo.tripwires import Tripwires, gap_bounds
from h1r_rl.hybrid.computed_values import computed_values, disagreements, tensors_read
from h1r_rl.hybrid.engine_values import compute_as_engine
from h1r_rl.hybrid.load import load_policy
from h1r_rl.hybrid.logprob_gap import gap, slip_terms, temperature_slip
from h1r_rl.interfaces import Sampling
from h1r_rl.weight_manifest import WeightManifest
from learners.deepspeed_engine import PolicyLogprobs


class Side:
    """A learner's forward pass, in this process."""

    def __init__(self, folder, dtype: str = "float32") -> None:
        self.model: Any = load_policy(folder)
        self._policy = PolicyLogprobs(
            self.model, temperature=1.0, chunk_tokens=256, engine_dtype=dtype
        ).train()
        self._bf16 = dtype == "bfloat16"
        compute_as_engine(self.model, dtype, autocast=self._bf16)

    @torch.no_grad()
    def logprobs(self, asked, completion) -> np.ndarray:
        """[2, N]: of the answer's tokens, and the entropy at each."""
        ids = np.concatenate([asked.token_ids, completion.token_ids]).astype(np.int64)
        rows, first = torch.from_numpy(ids), len(asked.token_ids)
        with torch.autocast("cpu", torch.bfloat16, self._bf16):
            found = self._policy(rows, torch.tensor([0, len(rows)]), torch.arange(first, len(rows)))
        return np.stack([values.numpy() for values in found])

    def values(self):
        return computed_values(self.model, self._pass)

    def dtypes(self) -> set[torch.dtype]:
        return {t.dtype for t in tensors_read(self.model, self._pass).values()}

    def _pass(self):
        with torch.autocast("cpu", torch.bfloat16, self._bf16):
            return self._policy(torch.arange(8), torch.tensor([0, 8]), torch.arange(1, 8))


async def measured(wire, pool, side: Side, temperature: float = 1.0) -> dict[str, float]:
    """The metrics that the guard reads, over 16 answers."""
    asked = wire.prompt(70)
    found = await wire.sample(pool, asked, 16, Sampling(temperature, 48))
    ours, entropy = np.concatenate([side.logprobs(asked, c) for c in found], axis=1)
    theirs = np.concatenate([c.logprobs for c in found])
    terms = slip_terms(ours - theirs, ours, entropy)
    slip, error = temperature_slip(*(float(values.sum()) for values in terms))
    return {
        "logprob_gap": gap(ours, theirs).mean,
        "temperature_slip": slip,
        "temperature_slip_error": error,
    }


def guard(rollout: RolloutConfig, learner: LearnerConfig | None = None) -> Tripwires:
    return Tripwires(GRPOConfig(steps=1), rollout, learner or LearnerConfig())


def no_ssm_multipliers(tensors, side):
    """W' with W' x m = W: the engine multiplies by m what it has been divided by."""
    for number, layer in enumerate(side.model.model.layers):
        vector = layer.mamba.mup_vector.flatten()[:, None]
        tensors[f"model.layers.{number}.mamba.in_proj.weight"] /= vector


def layer_not_updated(tensors, side):
    """The learner has stepped at 1e-4; one layer's part of it never arrived."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in side.model.named_parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.add_(1e-4 * signs)
            if ".layers.1." not in name:
                tensors[name] = parameter.clone()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [no_ssm_multipliers, layer_not_updated])
async def test_an_engine_with_other_weights_stops_the_run(
    wire, rollout_pool, rollout_config, tiny_model_folder, fault
):
    sender, side = wire.Sender(tiny_model_folder), Side(tiny_model_folder)
    sound = dict(sender.tensors)
    await wire.push(rollout_pool, sender, "100")
    wires = guard(rollout_config)
    wires.before_update(0, await measured(wire, rollout_pool, side))
    assert wires.after_step(0, {})["tripwire/logprob_gap"] == 0.0
    sender.tensors = {name: values.clone() for name, values in sound.items()}
    fault(sender.tensors, side)
    try:
        await wire.push(rollout_pool, sender, "101")
        with pytest.raises(RunFailed, match="engine and learner disagree"):
            wires.before_update(1, await measured(wire, rollout_pool, side))
    finally:
        sender.tensors = sound
        await wire.push(rollout_pool, sender, "102")


@pytest.mark.slow
async def test_an_engine_at_another_temperature_stops_the_run(
    wire, rollout_pool, rollout_config, tiny_model_folder
):
    side, wires = Side(tiny_model_folder), guard(rollout_config)
    wires.before_update(0, await measured(wire, rollout_pool, side))
    with pytest.raises(RunFailed, match="engine and learner disagree"):
        wires.before_update(1, await measured(wire, rollout_pool, side, temperature=1.02))


KEPT = ("A", "ssm_state")  # float32 whatever the engine's dtype


def dtypes_are(held, dtype: str) -> None:
    for name, (found, _) in held.items():
        expected = "float32" if name.rpartition(".")[2] in KEPT else dtype
        assert found == expected, f"{name} is {found}"


@pytest.mark.slow
async def test_float32_tensors_are_those_of_the_learner(wire, rollout_pool, tiny_model_folder):
    await wire.push(rollout_pool, wire.Sender(tiny_model_folder), "110")
    ((_, held),) = (await rollout_pool.ask_worker("held_tensors")).items()
    side = Side(tiny_model_folder)
    values = side.values()
    found = disagreements(values, held)
    assert found.keys() == values.keys()  # nothing that only one side knows of
    assert set(found.values()) == {0.0}, found
    dtypes_are(held, "float32")
    assert side.dtypes() == {torch.float32}


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_bfloat16_engine_and_its_learner_compute_with_one_value(
    ray_cluster, wire, tiny_model_folder, shake_model, rollout_config, weights_config, tmp_path
):
    """As loaded, and as sent: the wire carries float32, the engine rounds, the learner too."""
    from actors.rollout_pool import RolloutPool

    shake_model(tiny_model_folder, tmp_path / "next", seed=5)
    config = rollout_config.model_copy(update={"dtype": "bfloat16"})
    pool = await RolloutPool.start(
        config, weights_config.model_copy(update={"deadline_s": 60}),
        model_folder=str(tiny_model_folder), seed=0, initial_version="0", run_name="values",
        start_timeout_s=400,
    )  # fmt: skip
    try:
        learner, wires = LearnerConfig(autocast="bfloat16"), None
        for version, folder in (("0", tiny_model_folder), ("1", tmp_path / "next")):
            if version != "0":
                await wire.push(pool, wire.Sender(folder), version, deadline_s=60)
            side = Side(folder, "bfloat16")
            ((_, held),) = (await pool.ask_worker("held_tensors")).items()
            dtypes_are(held, "bfloat16")
            assert side.dtypes() == {torch.float32}  # holding what the engine rounded to
            assert set(disagreements(side.values(), held).values()) == {0.0}
            apart = disagreements(Side(folder).values(), held)  # a learner that does not round
            assert all(apart[f"mixer.0.{n}"] > 0 for n in ("D", "dt_bias", "conv1d.weight"))
            assert apart["mixer.0.A"] == 0
            wires = guard(config, learner)
            wires.before_update(0, await measured(wire, pool, side))
            assert wires.after_step(0, {})["tripwire/logprob_gap"] == 0.0
        hotter = await measured(wire, pool, side, temperature=1 / 0.95)
        assert hotter["logprob_gap"] < gap_bounds(GRPOConfig(steps=1), config, learner)[1]
        with pytest.raises(RunFailed, match="learner's temperature 0.9"):
            wires.before_update(1, hotter)
        await a_rounded_a_log_stops_the_run(wire, pool, tmp_path / "next", side)
        await a_layer_that_never_arrives_is_refused(wire, pool, tmp_path / "next")
    finally:
        await pool.close()


async def a_rounded_a_log_stops_the_run(wire, pool, folder, side):
    async def own():
        return {name: values.numpy() for name, values in side.values().items()}

    learner = SimpleNamespace(computed_values=own)
    await values_agree(1, pool, learner, tensor_parallel=1)
    sender = wire.Sender(folder)
    for name, values in sender.tensors.items():
        if name.endswith("A_log"):
            sender.tensors[name] = values.bfloat16().float()
    await wire.push(pool, sender, "2", deadline_s=60)
    with pytest.raises(RunFailed, match=r"2 tensors differ, the most rollout-0: mixer.\d.A by"):
        await values_agree(2, pool, learner, tensor_parallel=1)


async def a_layer_that_never_arrives_is_refused(wire, pool, folder):
    sender = wire.Sender(folder)
    kept = [spec for spec in sender.manifest.parameters if ".layers.1." not in spec.name]
    sender.manifest = WeightManifest(tuple(kept), sender.manifest.bucket_bytes)
    with pytest.raises(WeightTransferError, match=r"leave model.layers.1.\S+ .*as it was"):
        await wire.push(pool, sender, "3", deadline_s=60)
