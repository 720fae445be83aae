"""The self-test's line on files: a model that is written as a run ends is the model that was read.

Invariant: files are compared under their stored names, models under their own, since transformers
stores Nemotron-H (and Granite's experts) under other names than it holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.selftest_learner import LocalLearner
from cluster.selftest_lines import Line
from h1r_rl.hybrid.load import load_policy
from h1r_rl.hybrid.multipliers import multiplier_values

EXPORT = "export round trip"
HEAD = "lm_head.weight"  # stored under this name by every family


def export_round_trip(learner: LocalLearner, source: Path, scratch: Path) -> Line:
    """Source and written files hold the same bits; what is held is what loads again."""
    folder = scratch / "exported"
    learner.export(source, folder)
    before, after = Stored(source), Stored(folder)
    may_lack = _copies(learner.model, before)
    wrong = (before.names ^ after.names) - may_lack
    for name in sorted(before.names & after.names):
        written = after.read(name)
        if not before.read(name).to(written.dtype).equal(written):
            wrong.add(name)
    again: Any = load_policy(folder, trust_remote_code=learner.trust_remote_code)
    held, loaded = learner.model.state_dict(), again.state_dict()
    wrong |= held.keys() ^ loaded.keys()
    wrong |= {n for n in held.keys() & loaded.keys() if not loaded[n].equal(held[n].cpu())}
    values, back = multiplier_values(learner.model.config), multiplier_values(again.config)
    wrong |= {name for name in values if back.get(name) != values[name]}
    figures = f"{len(after.names)} tensors written, {len(wrong)} differ (limit 0)"
    if wrong:
        figures += f": {', '.join(sorted(wrong)[:3])}"
    return Line(EXPORT, bool(after.names) and not wrong, figures)


class Stored:
    """The tensors of a folder's safetensors files, read one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)
        self.names = set(self._files)

    def read(self, name: str) -> Any:
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as tensors:
            return tensors.get_tensor(name)


def _copies(model: Any, stored: Stored) -> set[str]:
    """What a folder holds twice: the output embedding of a tied model, where it is the input's."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if head is not embedding or HEAD not in stored.names:
        return set()
    return {HEAD} if stored.read(HEAD).to(head.dtype).equal(head.detach().cpu()) else set()
