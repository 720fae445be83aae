"""Engine against learner while a run goes on, asked outside the batch.

Invariant: both sides are asked while they hold the same version: after a transfer has been
delivered and before the optimizer's next step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from h1r_rl.errors import RunFailed

ROUNDING = 1e-5  # of a tensor's largest value: an exponential on another device, never a bf16 A_log


async def probe_gap(weights: Any, learner: Any) -> dict[str, float]:
    """Mean |difference of log-probabilities| on one fixed prompt, of the worst engine. There is
    such a number in every step, also where each answer has older weights in its past."""
    answers = await weights.probe_engines()
    if not answers:
        return {}
    own = await learner.score(weights.probe_ids)
    return {"probe_gap": max(float(np.abs(theirs - own).mean()) for theirs in answers.values())}


async def values_agree(step: int, rollouts: Any, learner: Any, tensor_parallel: int) -> None:
    """A, D, dt_bias, convolution, norms and multiplier vectors are one value on both sides, or
    RunFailed. Beside a bfloat16 engine a rounded A_log or a norm that did not arrive is lost in the
    noise of log-probabilities; here it is not. Asked of the weights as loaded and of those that the
    first transfer brought; of later transfers each engine counts what it loads, and the guard reads
    their log-probabilities. Ranks of an engine hold parts: not compared."""
    if tensor_parallel > 1:
        return
    own, wrong = await learner.computed_values(), {}
    for engine, held in (await rollouts.ask_worker("held_tensors")).items():
        if not own.keys() & held.keys():
            raise RunFailed(
                f"step {step}: expected tensors that {engine} and the learner both name, found "
                f"none among {len(held)} and {len(own)}: nothing says that they compute with the "
                "same values. A layer class of this model is unknown to actors/engine_tensors.py "
                "or h1r_rl/hybrid/computed_values.py"
            )
        wrong |= {f"{engine}: {name}": gap for name, gap in _differences(own, held).items()}
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name])
        raise RunFailed(
            f"step {step}: engine and learner compute with other values: {len(wrong)} tensors "
            f"differ, the most {worst} by {wrong[worst]:.3g}. The engine rounded what the learner "
            "did not, lost a multiplier, or did not get an update: docs/tripwires/logprob_gap.md"
        )


def _differences(
    own: dict[str, np.ndarray], held: dict[str, tuple[str, list[float]]]
) -> dict[str, float]:
    """Largest difference of the tensors that differ by more than rounding."""
    found = {}
    for name in own.keys() & held.keys():
        values, theirs = own[name], np.array(held[name][1], dtype=np.float32)
        if len(values) != len(theirs):
            continue  # the engine pads
        gap = float(np.abs(values - theirs).max(initial=0.0))
        if not gap <= ROUNDING * float(np.abs(values).max(initial=0.0)):
            found[name] = gap
    return found
