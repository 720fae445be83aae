"""Every line of the self-test passes on a sound pair and fails on the fault it is there for."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster import selftest_lines as lines
from cluster.selftest_export import export_round_trip
from cluster.selftest_learner import LocalLearner
from cluster.selftest_lines import Trace
from h1r_rl.config.schema import GRPOConfig, LearnerConfig, RolloutConfig, TinyModelConfig
from h1r_rl.errors import RunFailed
from h1r_rl.grpo.tripwires import Tripwires
from h1r_rl.hybrid import boundaries
from h1r_rl.hybrid.computed_values import computed_values
from h1r_rl.hybrid.tiny import build_tiny_model

FORMATS = runpy.run_path(str(Path(__file__).parents[1] / "hybrid_formats.py"))
LIMIT = 1e-5
TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shake_model):
    path = tmp_path_factory.mktemp("selftest") / "tiny"
    build_tiny_model(
        TinyModelConfig(
            hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64,
            mamba_heads=4, mamba_head_dim=16, mamba_d_state=16, mamba_rms_norm=True,
        ),
        path, seed=0,
    )  # fmt: skip
    shake_model(path, path, seed=1, head_scale=20.0)
    return path


@pytest.fixture
def learner(folder):
    return local(folder)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def local(folder, **settings) -> LocalLearner:
    plain = dict(engine_dtype="float32", autocast="none", device="cpu", trust_remote_code=False)
    return LocalLearner(folder, **(plain | settings))


class PlainEngine:
    """transformers' own generation with a fault put in: the Engine of `selftest_lines`."""

    def __init__(self, folder, fault: str = "") -> None:
        self.side = local(folder)
        self.model: Any = self.side.model
        self.fault = fault
        self.stale: dict[bytes, dict[str, torch.Tensor]] = {}
        if fault == "no_ssm_multipliers":
            for layer in self.model.model.layers:
                layer.mamba.mup_vector.fill_(1.0)
        self._load(dict(self.model.named_parameters()))

    def _load(self, sent: dict[str, torch.Tensor], first: bool = True) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                values = sent[name]
                if self.fault == "bf16_A_log" and name.endswith("A_log"):
                    values = values.bfloat16().float()
                if self.fault == "layer_not_updated" and ".layers.1." in name and not first:
                    continue
                if self.fault == "reload_loses_D" and name.endswith(".D") and not first:
                    values = torch.ones_like(values)
                parameter.copy_(values)

    async def score(self, ids):
        return self.side.logprobs([ids])[0]

    async def sample(self, prompt, samples, temperature, tokens):
        with torch.no_grad():
            rows = torch.from_numpy(prompt.astype(np.int64)).expand(samples, -1)
            torch.manual_seed(0)
            how = dict(do_sample=True, temperature=temperature, top_k=0)
            made = self.model.generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=tokens,
                eos_token_id=None, **(how if temperature else dict(do_sample=False)),
            )  # fmt: skip
        used = temperature or 1.0
        if self.fault == "temperature":
            used = 1.05 * used
        if self.fault == "stale_prefix":
            now = {k: v.clone() for k, v in self.model.state_dict().items()}
            old = self.stale.setdefault(prompt.tobytes(), now)
            self.model.load_state_dict(old)
            found = [self.side.logprobs([ids], used)[0] for ids in made.numpy().astype(np.int32)]
            self.model.load_state_dict(now)
        else:
            found = [self.side.logprobs([ids], used)[0] for ids in made.numpy().astype(np.int32)]
        return [
            Trace(ids.astype(np.int32), logprobs[-tokens:], temperature)
            for ids, logprobs in zip(made.numpy(), found, strict=True)
        ]

    async def push(self, model):
        self._load(dict(model.named_parameters()), first=False)

    async def cached_tokens(self):
        return 32.0

    async def block_tokens(self):
        return 16

    async def held_tensors(self):
        values = computed_values(self.model, lambda: self.side.logprobs([np.arange(8)]))
        held = {name: ("float32", tensor.tolist()) for name, tensor in values.items()}
        return held | {"mixer.0.ssm_state": ("float32", [])}


async def judged(engine, learner, rng) -> dict[str, lines.Line]:
    """The lines that need an engine, in the command's order."""
    traces = await lines.sampled(engine, learner, rng, TOKENS)
    found = [
        await lines.logprob_floor(engine, learner, traces, LIMIT),
        await lines.tensor_values(engine, learner),
        lines.multipliers_alive(learner, traces),
        await lines.identical_reload(engine, learner, rng, TOKENS),
        await lines.stale_prefix(engine, learner, rng, LIMIT, 512),
    ]
    return {line.name: line for line in found}


@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        ("", set()),
        ("bf16_A_log", {"scan/decode floor", "tensor values", "stale prefix after an update"}),
        (
            "no_ssm_multipliers",
            {"scan/decode floor", "tensor values", "multipliers alive",
             "stale prefix after an update"},
        ),
        ("temperature", {"scan/decode floor", "stale prefix after an update"}),
        ("layer_not_updated", {"stale prefix after an update"}),
        ("stale_prefix", {"stale prefix after an update"}),
        ("reload_loses_D", {"identical-weights reload", "stale prefix after an update"}),
    ],
)  # fmt: skip
async def test_a_fault_fails_its_lines_and_no_others(folder, learner, rng, fault, failing):
    before = {n: p.clone() for n, p in learner.model.named_parameters()}
    found = await judged(PlainEngine(folder, fault), learner, rng)
    assert {name for name, line in found.items() if line.passed is False} == failing, found
    assert all(line.passed is not None for line in found.values())
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    "fault", ["bf16_A_log", "no_ssm_multipliers", "temperature", "layer_not_updated"]
)
async def test_each_fault_stops_a_run(folder, learner, rng, fault):
    """The guard itself, on the gap that it would be given."""
    rollout = RolloutConfig(max_response_tokens=8, max_model_len=16, dtype="float32")
    wires = Tripwires(GRPOConfig(steps=1), rollout, LearnerConfig())
    for engine in (PlainEngine(folder), PlainEngine(folder, fault)):
        await engine.push(learner.model)
        if fault == "layer_not_updated":
            learner.shake(seed=2, size=1e-3)
            await engine.push(learner.model)
        found = lines.decode_gap(learner, await lines.sampled(engine, learner, rng, TOKENS))
        if engine.fault:
            with pytest.raises(RunFailed, match="engine and learner disagree"):
                wires.before_update(1, {"logprob_gap": found.mean})
        else:
            wires.before_update(0, {"logprob_gap": found.mean})
            assert wires.after_step(0, {})["tripwire/logprob_gap"] == 0.0


def test_packing_leak(learner, rng, monkeypatch):
    assert lines.packing_leak(learner, rng).passed
    module = boundaries._modeling_module(learner.model)
    ours = {name: getattr(module, name) for name in ("causal_conv1d_fn", "mamba2_chunk_scan")}
    for name, original in zip(ours, module.h1r_originals, strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, original)
            assert lines.packing_leak(learner, rng).passed  # seen: rows are padded, not packed
            believed = tuple((ours | {name: original}).values())
            patch.setattr(module, "h1r_replacements", believed)
            assert lines.packing_leak(learner, rng).passed is False


def test_a_small_leak_is_one_in_bfloat16_too(folder, rng, monkeypatch):
    """Rows of one shape give the same bits whatever the dtype, on a CPU."""
    coarse = local(folder, engine_dtype="bfloat16", autocast="bfloat16")
    assert lines.packing_leak(coarse, rng).passed
    hidden = coarse.hidden

    def leaking(documents):
        """Each document's states moved by the row's first token, by up to a thousandth."""
        found = hidden(documents)
        size = max(float(h.abs().max()) for h in found)
        return [h + 1e-3 * size * float(documents[0][0]) / coarse.vocabulary for h in found]

    monkeypatch.setattr(coarse, "hidden", leaking)
    line = lines.packing_leak(coarse, rng)
    assert line.passed is False and "limit 0)" in line.figures


@pytest.fixture(scope="module", params=["falcon-2-rms-tied", "granite-1-tied", "nemotron-1"])
def family_folder(request, tmp_path_factory):
    """One of each family: transformers stores the last two under other names than it holds."""
    path = tmp_path_factory.mktemp("families") / request.param
    FORMATS["write_folder"](request.param, path)
    return path


def rewrite(folder, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def name_of_D(folder) -> str:
    return next(n for n in load_file(folder / "model.safetensors") if n.endswith(".D"))


def test_export_round_trip(family_folder, tmp_path):
    line = export_round_trip(local(family_folder), family_folder, tmp_path)
    assert line.passed, line.figures
    written = load_file(tmp_path / "exported" / "model.safetensors")
    assert line.figures == f"{len(written)} tensors written, 0 differ (limit 0)"


@pytest.mark.parametrize("fault", ["moved", "left out", "renamed"])
def test_an_export_that_is_not_the_source_fails(family_folder, tmp_path, monkeypatch, fault):
    learner, name = local(family_folder), name_of_D(family_folder)

    def broken(tensors):
        values = tensors.pop(name)
        if fault == "moved":
            values[0] += 1e-6
        if fault != "left out":
            tensors[name + "_" * (fault == "renamed")] = values

    def export(source, target):
        LocalLearner.export(learner, source, target)
        rewrite(target, broken)

    monkeypatch.setattr(learner, "export", export)
    line = export_round_trip(learner, family_folder, tmp_path)
    assert line.passed is False and name in line.figures


@pytest.mark.parametrize("family_folder", ["falcon-2-rms-tied", "granite-1-tied"], indirect=True)
def test_an_output_embedding_stored_beside_its_tie(family_folder, tmp_path):
    """Some folders hold it twice: the same values are none lost, other ones are."""
    source = shutil.copytree(family_folder, tmp_path / "source")
    learner = local(source)
    values = learner.model.get_input_embeddings().weight.detach().clone()
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": values}))
    assert export_round_trip(learner, source, tmp_path / "same").passed
    rewrite(source, lambda tensors: tensors["lm_head.weight"][0].add_(1.0))
    line = export_round_trip(learner, source, tmp_path / "other")
    assert line.passed is False and "lm_head.weight" in line.figures


def test_a_model_that_was_loaded_wrongly_does_not_pass_the_export(family_folder, tmp_path):
    learner = local(family_folder)
    name, A_log = next(p for p in learner.model.named_parameters() if p[0].endswith("A_log"))
    with torch.no_grad():
        A_log[0] += 1e-6
    line = export_round_trip(learner, family_folder, tmp_path)
    assert line.passed is False and name.rpartition("layers.")[2] in line.figures


async def test_a_multiplier_without_effect_is_dead(folder, learner, rng):
    engine = PlainEngine(folder)
    with torch.no_grad():
        for model in (learner.model, engine.model):
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
    traces = await lines.sampled(engine, learner, rng, TOKENS)
    line = lines.multipliers_alive(learner, traces)
    assert line.passed is False and "'key'" in line.figures and "'attention_out'" in line.figures


@pytest.mark.parametrize(("noise", "passed"), [(2.0, True), (1000.0, None)])
async def test_multipliers_below_the_noise_are_not_said_to_pass(
    folder, learner, rng, noise, passed
):
    traces = await lines.sampled(PlainEngine(folder), learner, rng, TOKENS)
    noisy = [
        Trace(t.ids, t.logprobs + noise * rng.standard_normal(TOKENS, np.float32), t.temperature)
        for t in traces
    ]
    assert "noise" not in lines.multipliers_alive(learner, traces).figures
    line = lines.multipliers_alive(learner, noisy)
    assert line.passed is passed and "below this dtype's noise" in line.figures, line
    assert ("share that the engine lacks" in line.figures) == bool(passed)
    if passed is None:  # a multiplier that is dead in the learner fails whatever the noise
        with torch.no_grad():
            for layer in learner.model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
        assert lines.multipliers_alive(learner, noisy).passed is False


async def test_lines_that_a_model_has_nothing_for(folder, learner, rng, monkeypatch):
    engine = PlainEngine(folder)
    monkeypatch.setattr(lines, "multiplier_values", lambda config: {})
    assert lines.multipliers_alive(learner, []).passed is None
    assert (await lines.stale_prefix(engine, learner, rng, LIMIT, 64)).passed is None
    monkeypatch.setattr(engine, "cached_tokens", lambda: _nothing())
    assert (await lines.stale_prefix(engine, learner, rng, LIMIT, 512)).passed is None


async def _nothing() -> float:
    return 0.0


def test_bad_folders_are_named(folder, tmp_path):
    from cluster.selftest import Options, selftest
    from h1r_rl.errors import DataError

    with pytest.raises(DataError, match="config.json"):
        selftest(Options(tmp_path), print)
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(DataError, match="safetensors"):
        selftest(Options(tmp_path), print)
