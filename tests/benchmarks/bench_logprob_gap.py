"""How far engine and learner are apart when nothing is wrong, and when something is.

    python tests/benchmarks/bench_logprob_gap.py            all four engines, then the table
    python tests/benchmarks/bench_logprob_gap.py TRACES float32 bfloat16     one engine's traces

Traces of 2,048 tokens, sampled by vLLM at three temperatures, with the log-probabilities of its
recurrent decode and of its chunked scan over the finished trace; the learner's forward pass gives
the third. `GAP_FLOOR` and `SLIP_FLOOR` in h1r_rl/grpo/tripwires.py follow the table (tests say so).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from results_file import metric, write_results

TEMPERATURES = (0.6, 1.0, 1.3)
TRACES = 2  # a temperature
PROMPT, LENGTH = 64, 2048
DTYPES = ("float32", "bfloat16")
LAYERS = 6
WRONG_TEMPERATURE = "temperature_0.95"
HELD = {  # below a bfloat16 pair's noise; see test_guard_on_real_engine
    "bf16_A_log": "the values that the engine holds",
    "layer_not_updated": "the engine's count of what was loaded",
}


def build(folder: Path) -> None:
    """A tiny Falcon-H1 with room for the traces, no tensor at its initial value, and logits far
    from uniform."""
    import torch

    from h1r_rl.config.schema import TinyModelConfig
    from h1r_rl.hybrid.load import load_policy
    from h1r_rl.hybrid.tiny import build_tiny_model

    config = TinyModelConfig(num_layers=LAYERS, max_position=LENGTH + 256, mamba_rms_norm=True)
    build_tiny_model(config, folder, seed=0)
    model: Any = load_policy(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
        model.get_output_embeddings().weight.mul_(20.0)
    model.save_pretrained(folder)


def sample_traces(file: Path, folder: Path, dtype: str, ssm_dtype: str) -> None:
    """ids [temperature, trace, LENGTH]; decode, scan [temperature, trace, LENGTH - PROMPT]."""
    from unittest import mock

    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.platforms.cpu import CpuPlatform

    from actors.engine_args import engine_args
    from h1r_rl.config.schema import RolloutConfig, WeightsConfig

    rollout = RolloutConfig.model_validate(
        {
            "max_response_tokens": LENGTH - PROMPT, "max_model_len": LENGTH + 8, "dtype": dtype,
            "mamba_ssm_cache_dtype": ssm_dtype, "kv_cache_gib": 1.0, "enforce_eager": True,
        }
    )  # fmt: skip
    args = engine_args(
        rollout, WeightsConfig(), model_folder=str(folder), seed=0, trust_remote_code=False
    )
    settle = CpuPlatform.check_and_update_config

    def keep_state_dtype(config: Any) -> None:
        """On a CPU with AVX-512 BF16 vLLM resets a hybrid's SSM state to float32, and only warns.
        Its kernels are to be those of the machine all the same."""
        with mock.patch("torch.cpu._is_avx512_bf16_supported", lambda: False):
            settle(config)

    with mock.patch.object(
        CpuPlatform, "check_and_update_config", staticmethod(keep_state_dtype)
    ):
        engine = LLM(**args | {"max_logprobs": -1, "skip_tokenizer_init": True})
    rng = np.random.default_rng(0)
    asked, settings = [], []
    for temperature in TEMPERATURES:
        for _ in range(TRACES):
            asked.append(rng.integers(0, 250, PROMPT).tolist())
            settings.append(
                SamplingParams(
                    temperature=temperature, max_tokens=LENGTH - PROMPT, ignore_eos=True,
                    logprobs=0, detokenize=False,
                )
            )  # fmt: skip
    outputs = engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in asked], settings)
    ids, decode, scan = [], [], []
    for number, (prompt, output) in enumerate(zip(asked, outputs, strict=True)):
        answer = output.outputs[0]
        ids.append([*prompt, *answer.token_ids])
        pairs = zip(answer.logprobs or [], answer.token_ids, strict=True)
        decode.append([entry[token].logprob for entry, token in pairs])
        scan.append(_scan_logprobs(engine, ids[-1], TEMPERATURES[number // TRACES]))
    found = {"ids": ids, "decode": decode, "scan": scan}
    shape = (len(TEMPERATURES), TRACES, -1)
    np.savez(file, **{name: np.array(rows).reshape(shape) for name, rows in found.items()})


def _scan_logprobs(engine: Any, ids: list[int], temperature: float) -> np.ndarray:
    """The whole distributions of one prefill, at a temperature (vLLM gives a prompt's at 1)."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    settings = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    (output,) = engine.generate([TokensPrompt(prompt_token_ids=ids)], settings)
    values = []
    for token, entry in list(zip(ids, output.prompt_logprobs or [], strict=True))[PROMPT:]:
        raw = np.array([e.logprob for e in entry.values()]) / temperature
        peak = raw.max()
        values.append(entry[token].logprob / temperature - peak - np.log(np.exp(raw - peak).sum()))
    return np.array(values)


def learner_logprobs(
    folder: Path, ids: np.ndarray, dtype: str, autocast: str, temperature: float, fault: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and entropies [traces x (LENGTH - PROMPT)], all traces packed into one row,
    as training does it."""
    import torch

    from h1r_rl.hybrid.engine_values import compute_as_engine
    from h1r_rl.hybrid.load import load_policy
    from learners.deepspeed_engine import PolicyLogprobs

    model: Any = load_policy(folder)
    with torch.no_grad():
        if fault is not None:
            fault(model)
        policy = PolicyLogprobs(
            model, temperature=temperature, chunk_tokens=1024, engine_dtype=dtype
        ).train()
        compute_as_engine(model, dtype, autocast=autocast == dtype)
        rows = torch.from_numpy(ids.reshape(-1).astype(np.int64))
        starts = torch.arange(0, len(rows) + 1, LENGTH)
        places = torch.arange(len(rows)).unflatten(0, (-1, LENGTH))[:, PROMPT:].flatten()
        bf16 = torch.autocast("cpu", torch.bfloat16) if autocast == "bfloat16" else nullcontext()
        with bf16:
            logprobs, entropies = policy(rows, starts, places)
    return logprobs.numpy(), entropies.numpy()


def slip(found: tuple[np.ndarray, np.ndarray], engine: np.ndarray) -> float:
    from h1r_rl.hybrid.logprob_gap import slip_terms, temperature_slip

    logprobs, entropies = (values.astype(np.float64) for values in found)
    terms = slip_terms(logprobs - engine, logprobs, entropies)
    return temperature_slip(*(float(values.sum()) for values in terms))[0]


def faults() -> dict[str, Any]:
    """What a wrong engine would hold, put into the learner instead: the gap is the same."""
    import torch

    def coarse_a_log(model: Any) -> None:
        for layer in model.model.layers:
            layer.mamba.A_log.copy_(layer.mamba.A_log.bfloat16())

    def no_ssm_multipliers(model: Any) -> None:
        for layer in model.model.layers:
            layer.mamba.mup_vector.fill_(1.0)

    def layer_not_updated(model: Any) -> None:  # as far away as a step at 1e-4 moves every weight
        for parameter in model.model.layers[LAYERS // 2].parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.add_(1e-4 * signs)

    generator = torch.Generator().manual_seed(0)
    return {
        "bf16_A_log": coarse_a_log,
        "no_ssm_multipliers": no_ssm_multipliers,
        "layer_not_updated": layer_not_updated,
    }


def entries_of(folder: Path, file: Path, dtype: str, ssm_dtype: str) -> list[dict[str, Any]]:
    """Rows of the table for one engine: against its learners (a bfloat16 engine's may compute in
    bfloat16 or, with the engine's values, in float32), and against itself."""
    from h1r_rl.hybrid.logprob_gap import gap

    traces = np.load(file)
    rows = []
    for place, temperature in enumerate(TEMPERATURES):
        decode, scan = traces["decode"][place].ravel(), traces["scan"][place].ravel()
        pairs = [("scan_against_decode", "engine", gap(scan, decode), None)]
        for autocast in ("none", "bfloat16")[: 1 + (dtype == "bfloat16")]:
            ours = learner_logprobs(folder, traces["ids"][place], dtype, autocast, temperature)
            learner = "bfloat16" if autocast == "bfloat16" else "float32"
            pairs += [
                (path, learner, gap(ours[0], theirs), slip(ours, theirs))
                for path, theirs in (("decode", decode), ("scan", scan))
            ]
        rows += [
            {
                "engine": dtype, "ssm": ssm_dtype, "learner": learner, "path": path,
                "temperature": temperature, "mean": float(f"{g.mean:.4g}"),
                "max": float(f"{g.max:.4g}"), "kl": float(f"{g.kl:.4g}"),
                "temperature_slip": None if slope is None else float(f"{slope:.3g}"),
            }
            for path, learner, g, slope in pairs
        ]  # fmt: skip
    return rows


def fault_rows(folder: Path, file: Path, dtype: str) -> dict[str, float]:
    """Mean gap of a decode at temperature 1 under each fault, in the usual pairing of dtypes; of a
    wrong temperature, the slope that it is known by."""
    from h1r_rl.hybrid.logprob_gap import gap

    traces = np.load(file)
    place = TEMPERATURES.index(1.0)
    ids, decode = traces["ids"][place], traces["decode"][place].ravel()
    autocast = "bfloat16" if dtype == "bfloat16" else "none"
    found = {
        name: gap(learner_logprobs(folder, ids, dtype, autocast, 1.0, fault)[0], decode).mean
        for name, fault in faults().items()
    }
    found[WRONG_TEMPERATURE] = slip(learner_logprobs(folder, ids, dtype, autocast, 0.95), decode)
    return found


def pairing(row: dict[str, Any]) -> tuple[str, ...]:
    return row["engine"], row["ssm"], row["learner"], row["path"]


def metrics_of(table: list[dict[str, Any]], broken: dict[str, dict[str, float]]) -> list[Any]:
    """A row for each pairing: the worst temperature's mean, the rest in its note."""
    from h1r_rl.grpo.tripwires import GAP_FLOOR, SLIP_STOP, STOP_FACTOR

    rows = []
    for key in dict.fromkeys(map(pairing, table)):
        found = [row for row in table if pairing(row) == key]
        engine, ssm, learner, path = key
        note = "; ".join(
            f"T {r['temperature']}: mean {r['mean']:.2g}, max {r['max']:.2g}, KL {r['kl']:.2g}"
            for r in found
        )
        pair = path if learner == "engine" else f"learner_{learner}_{path}"
        name = f"logprob_gap_{engine}_ssm_{ssm}_{pair}"
        rows.append(metric(name, max(r["mean"] for r in found), "nats", "reported", None, note))
    slopes = [abs(row["temperature_slip"]) for row in table if row["path"] == "decode"]
    rows.append(
        metric("temperature_slip", max(slopes), "share", "reported", None,
               "1 - the learner's temperature over the engine's, by its slope; the largest decode")
    )  # fmt: skip
    for dtype, found in broken.items():
        limit = STOP_FACTOR * GAP_FLOOR[dtype, "float32"]
        for name, value in found.items():
            what, unit, bound = f"logprob_gap_{dtype}_with_{name}", "nats", limit
            note = "mean of a decode at T 1 under the fault; the guard stops there"
            if dtype == "bfloat16" and name in HELD:
                note = f"mean of a decode at T 1 under the fault; what stops the run: {HELD[name]}"
            if name == WRONG_TEMPERATURE:
                what, unit, bound = f"temperature_slip_{dtype}_with_{name}", "share", SLIP_STOP
                note = "slope of a decode sampled at T 1; the guard stops there"
            rows.append(metric(what, value, unit, f"> {bound:.2g}", value > bound, note))
    return rows


def main() -> None:
    table: list[dict[str, Any]] = []
    broken: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        build(folder)
        for dtype in DTYPES:
            for ssm_dtype in DTYPES:
                file = Path(os.environ.get("TRACES", parent)) / f"{dtype}-{ssm_dtype}.npz"
                if not file.exists():
                    subprocess.run(
                        [sys.executable, __file__, str(file), str(folder), dtype, ssm_dtype],
                        check=True,
                        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | _engine_env(),
                    )
                table += entries_of(folder, file, dtype, ssm_dtype)
                if ssm_dtype == "float32":
                    broken[dtype] = fault_rows(folder, file, dtype)
    write_results("logprob_gap", metrics_of(table, broken), table=table)


def _engine_env() -> dict[str, str]:
    from actors.engine_args import engine_env
    from h1r_rl.config.schema import RolloutConfig

    return engine_env(RolloutConfig(max_response_tokens=LENGTH, max_model_len=LENGTH, threads=2))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sample_traces(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        main()
