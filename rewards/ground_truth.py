"""Ground truths checked when data is loaded: one that cannot be parsed would score every sample 0.

Invariant: checks run in a killable process under a deadline; a hostile row costs its own deadline
and is reported, no other row is lost. Plain numbers, most of any data set, cost a regular
expression; equal rows are checked once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from h1r_rl.config.schema import RewardConfig
from h1r_rl.errors import DataError
from rewards.deadline_worker import DeadlineExceeded, DeadlineWorker, FunctionFailed, ProcessDied
from rewards.math_verifier import plainly_valid
from rewards.registry import find


class GroundTruths:
    """Owns the killable process; for many batches. Not thread-safe."""

    def __init__(self, config: RewardConfig | None = None) -> None:
        self._config = config or RewardConfig()
        self._options = self._config.model_dump_json()
        self._worker = DeadlineWorker(self._config.memory_mib)

    def __enter__(self) -> GroundTruths:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.close()

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[str | None]:
        """(verifier, ground truth) -> None, or the reason why nothing can be verified against it.

        DataError for a verifier that does not exist or cannot be imported: that is no row's fault.
        """
        for name in {verifier for verifier, _ in pairs}:
            _import(self._worker, name, self._config)
        reasons = {pair: self._reason(*pair) for pair in dict.fromkeys(pairs)}
        return [reasons[pair] for pair in pairs]

    def can_check(self, name: str) -> bool:
        """Whether `check` can be asked about this verifier's."""
        try:
            _import(self._worker, name, self._config)
        except DataError:
            return False
        return True

    def _reason(self, name: str, truth: str) -> str | None:
        if name == "math" and plainly_valid(truth):
            return None
        try:
            return self._worker.call(
                "rewards.registry:check_in_child",
                [name, truth, self._options],
                self._config.timeout_s,
                find(name).module,
            )
        except DeadlineExceeded:
            return "ground_truth_timeout"
        except ProcessDied:
            return "ground_truth_crashed_the_verifier"
        except FunctionFailed as error:
            return f"ground_truth_error:{error.kind}"


def check_ground_truths(
    pairs: Iterable[tuple[str, str]], config: RewardConfig | None = None
) -> list[str | None]:
    """`GroundTruths.check` once."""
    with GroundTruths(config) as truths:
        return truths.check(list(pairs))


def check_ground_truth(
    verifier: str, ground_truth: str, config: RewardConfig | None = None
) -> str | None:
    """The same for one row."""
    return check_ground_truths([(verifier, ground_truth)], config)[0]


def _import(worker: DeadlineWorker, name: str, config: RewardConfig) -> None:
    verifier = find(name)
    if verifier.built_in:
        return
    try:
        worker.call("rewards.registry:import_in_child", [name], config.timeout_s, verifier.module)
    except (FunctionFailed, DeadlineExceeded, ProcessDied) as error:
        raise DataError(
            f"expected verifier '{name}' to be a function that can be imported, found: {error}; "
            "correct the verifier column, or make the package importable in the run's environment"
        ) from error
