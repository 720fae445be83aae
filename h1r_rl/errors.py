"""Errors that a user can act on.

Every message says what was expected, what was found (value and place) and what to do. The command
line prints these without a traceback; anything else is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """A mistake in what the user gave us. The command line ends with exit code 2."""


class ConfigError(UserError):
    """The run's YAML, an override or a combination of settings cannot be honoured."""


class DataError(UserError):
    """A data file, column, row or model folder is not what the run needs."""


class RunFailed(Exception):
    """The run cannot go on; the message names the cause. Exit code 1, MLflow status FAILED."""


class RolloutLost(Exception):
    """A rollout actor or its engine died, or missed a deadline, with requests in flight.

    The samples it had not delivered yet are re-issued under the same slot; they are never samples.
    `planned`: it was asked to leave, so no prompt of its is to blame.
    """

    def __init__(self, actor: str, cause: str, *, planned: bool = False) -> None:
        super().__init__(f"{actor} was lost: {cause}")
        self.actor = actor
        self.cause = cause
        self.planned = planned


class WeightTransferError(Exception):
    """A weight transfer did not complete on every member before its deadline.

    `members` names who is dirty (received a part and serves nothing until a full re-send).
    """

    def __init__(self, message: str, members: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.members = members
