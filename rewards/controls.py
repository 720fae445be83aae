"""Control experiments: rewards that carry no information about the answer.

`format_only` and `constant` are applied where verdicts are made (`combine`); shuffling needs a
whole step's groups, so the run loop calls it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def shuffle_scores(
    scores: Sequence[NDArray[np.float64]], rng: np.random.Generator
) -> list[NDArray[np.float64]]:
    """The step's scores dealt out anew over all its samples; each group keeps its size.

    NaN (no verdict) stays where it is: the number of scored samples of a group does not change.
    """
    lengths = [len(group) for group in scores]
    flat = np.concatenate([np.asarray(group, dtype=np.float64) for group in scores])
    scored = np.flatnonzero(~np.isnan(flat))
    flat[scored] = flat[rng.permutation(scored)]
    return [part.copy() for part in np.split(flat, np.cumsum(lengths)[:-1])]
