"""An endless order over the rows of a split, a new shuffle for each pass.

Invariant: the order is a pure function of (rows, seed, pass), so a position of a few numbers is
all that a restart needs.
"""

from __future__ import annotations

import numpy as np

from h1r_rl.errors import DataError


class ShuffledRows:
    """`next()` gives (pass, row) for ever; every row once a pass."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self._num_rows = num_rows
        self._seed = seed
        self._pass = 0
        self._offset = 0
        self._order = self._shuffle()

    def next(self) -> tuple[int, int]:
        if self._offset == self._num_rows:
            self._pass += 1
            self._offset = 0
            self._order = self._shuffle()
        row = int(self._order[self._offset])
        self._offset += 1
        return self._pass, row

    def position(self) -> dict[str, int]:
        """JSON-able; `restore` of an equal order goes on from here."""
        return {
            "pass": self._pass,
            "offset": self._offset,
            "rows": self._num_rows,
            "seed": self._seed,
        }

    def restore(self, position: dict[str, int]) -> None:
        for key, mine in (("rows", self._num_rows), ("seed", self._seed)):
            if position[key] != mine:
                raise DataError(
                    f"data position: expected one over {key} = {mine}, found {position[key]}; "
                    "resume with the files and the seed that the run started with"
                )
        self._pass = position["pass"]
        self._offset = position["offset"]
        self._order = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        return np.random.default_rng((self._seed, self._pass)).permutation(self._num_rows)
