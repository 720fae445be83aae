"""Language mixing: which letters count, and what the penalty costs."""

from __future__ import annotations

import time

import numpy as np
import pytest
from pydantic import ValidationError

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Completion, Verdict, VersionSpan
from rewards.combine import combine
from rewards.language import foreign_share, language_kept

ENGLISH = "so the sum of both is even"  # 20 letters


@pytest.mark.parametrize(
    ("text", "scripts", "share"),
    [
        (ENGLISH, ["LATIN"], 0.0),
        (ENGLISH, ["CYRILLIC"], 1.0),
        ("naïve Çédille Straße ﬁn", ["LATIN"], 0.0),
        ("ｆｕｌｌ ｗｉｄｔｈ", ["LATIN"], 0.0),
        ("abcd 和数", ["LATIN"], 1 / 3),
        ("和数 は 偶数", ["CJK"], 1 / 5),
        ("和数 は 偶数", ["CJK", "HIRAGANA"], 0.0),
        ("сумма abcde", ["LATIN"], 1 / 2),
        ("합은 짝수", ["HANGUL"], 0.0),
        ("", ["LATIN"], 0.0),
        ("1 + 2 = 3 → ∑ ≤ 4, 五", ["LATIN"], 1.0),
        ("12 + 34 = 46!", ["LATIN"], 0.0),
        # no language: mathematics, code, tags, LaTeX's words
        (f"{ENGLISH} $和$ and $$数\n数$$", ["LATIN"], 0.0),
        (rf"{ENGLISH} \(和\) \[数 \text{{偶}}\]", ["LATIN"], 0.0),
        (f"{ENGLISH}\n```python\n# 和数\n```\nend", ["LATIN"], 0.0),
        (f"{ENGLISH} `和`", ["LATIN"], 0.0),
        (f"{ENGLISH}\n```python\n# 和数 cut off", ["LATIN"], 0.0),
        (r"<think>和</think> \boxed{5} \frac", ["CJK"], 0.0),
        ("the angle θ is π and Δ too, 𝑥 ∈ ℝ", ["LATIN"], 0.0),
        ("abcde λόγος", ["LATIN"], 1 / 2),
        # a lone delimiter hides nothing
        ("it costs $5\n和数 ab", ["LATIN"], 2 / 11),
        ("it costs $5 和数 ab", ["LATIN"], 2 / 11),
        (r"ab \( 和数", ["LATIN"], 1 / 2),
        ("don`t\n和数 ab", ["LATIN"], 2 / 8),
    ],
)
def test_share_of_letters_in_other_scripts(text, scripts, share):
    assert foreign_share(text, scripts) == pytest.approx(share)


def test_up_to_the_tolerance_nothing_is_lost():
    text = "a" * 98 + "和数"
    assert language_kept(text, ["LATIN"], 0.02) == 1.0
    assert language_kept(text + "和", ["LATIN"], 0.02) == pytest.approx(98 / 101)
    assert language_kept(text, ["LATIN"], 0.0) == pytest.approx(0.98)


@pytest.mark.parametrize(
    "text", ["$" * 3_000_000, "\\(" * 1_500_000, "`和" * 1_500_000, "和" * 10**7]
)
def test_a_hostile_text_costs_a_bounded_time(text):
    started = time.process_time()
    foreign_share(text, ["LATIN"])
    assert time.process_time() - started < 10


def completion(text: str) -> Completion:
    ids = np.zeros(4, np.int32)
    return Completion(0, ids, np.zeros(4, np.float32), (VersionSpan("0", 0, 4),), "stop", text, "e")


def test_it_is_a_part_with_a_weight():
    config = RewardConfig(language_scripts=("LATIN",), language_weight=0.5)
    right = Verdict(1.0, {"accuracy": 1.0}, "correct")
    kept = combine(config, right, completion(ENGLISH), 100)
    assert (kept.score, kept.parts["language"]) == (1.0, 1.0)
    mixed = combine(config, right, completion("abcd 和数"), 100)
    assert mixed.parts["language"] == pytest.approx(2 / 3)
    assert mixed.score == pytest.approx(1.0 - 0.5 / 3)
    lost = combine(config, Verdict(None, {}, "worker_lost"), completion("和数"), 100)
    assert (lost.score, lost.parts["language"]) == (None, 0.0)


def test_without_scripts_there_is_no_such_part():
    verdict = combine(RewardConfig(), Verdict(1.0), completion("和数"), 100)
    assert (verdict.score, "language" in verdict.parts) == (1.0, False)


def test_an_unknown_script_is_refused_with_the_known_ones():
    with pytest.raises(ValidationError, match="HIRAGANA"):
        RewardConfig.model_validate({"language_scripts": ["ENGLISH"]})
