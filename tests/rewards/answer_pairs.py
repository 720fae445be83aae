"""The agreement table's pairs: handwritten ones from `answer_pairs.tsv`, and generated families.

Run as a script it prints our false positives and negatives beside bare math-verify's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import isqrt
from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    category: str
    equal: bool
    truth: str
    answer: str  # what stands inside the box


def pairs() -> list[Pair]:
    return [*handwritten(), *generated()]


def handwritten() -> list[Pair]:
    lines = Path(__file__).with_name("answer_pairs.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [Pair(category, sign == "=", truth, answer) for category, sign, truth, answer in rows]


def generated(seed: int = 0, rounds: int = 18) -> list[Pair]:
    """Equal and unequal by construction: values are made first, spellings afterwards."""
    rng = random.Random(seed)
    families = (_fractions, _decimals, _radicals, _intervals, _sets, _tuples, _matrices, _percents,
                _polynomials)
    return [pair for _ in range(rounds) for family in families for pair in family(rng)]


def _fractions(rng: random.Random) -> Iterator[Pair]:
    value = Fraction(rng.randint(-60, 60) or 7, rng.randint(2, 40))
    k = rng.randint(2, 5)
    truth = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    yield Pair("fraction*", True, truth, f"{value.numerator * k}/{value.denominator * k}")
    other = f"\\dfrac{{{value.numerator + 1}}}{{{value.denominator}}}"
    yield Pair("fraction*", False, truth, other)


def _decimals(rng: random.Random) -> Iterator[Pair]:
    thousandths = rng.randint(-99_999, 99_999)
    truth = f"{thousandths / 1000:.3f}"
    yield Pair("decimal*", True, truth, f"\\frac{{{thousandths}}}{{1000}}")
    yield Pair("decimal*", False, truth, f"{(thousandths + rng.choice((-1, 1, 10))) / 1000:.3f}")


def _radicals(rng: random.Random) -> Iterator[Pair]:
    outside, inside = rng.randint(2, 9), rng.choice((2, 3, 5, 6, 7, 10))
    truth = f"{outside}\\sqrt{{{inside}}}"
    wrong = outside * outside * inside + 1
    wrong += isqrt(wrong) ** 2 == wrong
    yield Pair("radical*", True, truth, f"\\sqrt{{{outside * outside * inside}}}")
    yield Pair("radical*", False, truth, f"\\sqrt{{{wrong}}}")


def _intervals(rng: random.Random) -> Iterator[Pair]:
    low = rng.randint(-20, 20)
    high = low + rng.randint(1, 9)
    left, right = rng.choice("(["), rng.choice(")]")
    other = ")" if right == "]" else "]"
    relations = {"(": "<", "[": "\\le ", ")": "<", "]": "\\le "}
    truth = f"{left}{low},{high}{right}"
    yield Pair("interval*", True, truth, f"{low}{relations[left]}x{relations[right]}{high}")
    yield Pair("interval*", False, truth, f"{left}{low},{high}{other}")


def _sets(rng: random.Random) -> Iterator[Pair]:
    values = rng.sample(range(-30, 30), 3)
    shuffled = rng.sample(values, 3)
    changed = [*shuffled[:2], shuffled[2] + 61]
    truth = "\\{" + ", ".join(map(str, values)) + "\\}"
    yield Pair("set*", True, truth, ",".join(map(str, shuffled)))
    yield Pair("set*", False, truth, "\\{" + ", ".join(map(str, changed)) + "\\}")


def _tuples(rng: random.Random) -> Iterator[Pair]:
    a, b, c = rng.sample(range(-30, 30), 3)
    truth = f"({a},{b},{c})"
    yield Pair("tuple*", True, truth, f"\\left({2 * a}/2, {b}, {c}.0\\right)")
    yield Pair("tuple*", False, truth, f"({b},{a},{c})")


def _matrices(rng: random.Random) -> Iterator[Pair]:
    a, b, c, d = (rng.randint(-9, 9) for _ in range(4))

    def matrix(kind: str, *rows: str) -> str:
        return f"\\begin{{{kind}}}" + " \\\\ ".join(rows) + f"\\end{{{kind}}}"

    truth = matrix("pmatrix", f"{a}&{b}", f"{c}&{d}")
    yield Pair("matrix*", True, truth, matrix("bmatrix", f"{a} & {2 * b}/2", f"{c} & {d}"))
    yield Pair("matrix*", False, truth, matrix("bmatrix", f"{a} & {b}", f"{c} & {d + 1}"))


def _percents(rng: random.Random) -> Iterator[Pair]:
    value = rng.randint(2, 99)
    yield Pair("percent*", True, f"{value}\\%", f"{value / 100:.2f}")
    yield Pair("percent*", False, f"{value}\\%", f"{(value + 1) / 100:.2f}")


def _polynomials(rng: random.Random) -> Iterator[Pair]:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    truth = f"x^2+{a + b}x+{a * b}"
    yield Pair("expression*", True, truth, f"(x+{a})(x+{b})")
    yield Pair("expression*", False, truth, f"(x+{a})(x+{b + 1})")


def bare_math_verify(truth: str, answer: str) -> bool:
    """The package as its own documentation calls it."""
    from math_verify import parse, verify

    gold = parse(f"${truth}$", parsing_timeout=None)
    return verify(gold, parse(f"\\boxed{{{answer}}}", parsing_timeout=None), timeout_seconds=None)


def ours(truth: str, answer: str) -> bool:
    """What the `math` verifier says of a completion whose box holds `answer`."""
    import numpy as np

    from h1r_rl.config.schema import RewardConfig
    from h1r_rl.records import Prompt
    from rewards.math_verifier import verify

    prompt = Prompt("pair", 0, np.zeros(0, np.int32), "", "math", truth)
    text = f"<think>so</think>The answer is $\\boxed{{{answer}}}$."
    return verify(prompt, text, RewardConfig()).score == 1.0


def errors(judge: Callable[[str, str], bool], table: list[Pair]) -> list[Pair]:
    return [pair for pair in table if judge(pair.truth, pair.answer) != pair.equal]


def main() -> None:
    table = pairs()
    found = {"ours": errors(ours, table), "math-verify": errors(bare_math_verify, table)}
    print(f"{len(table)} pairs, {sum(p.equal for p in table)} equal; false positives + negatives")
    print(f"{'category':<14}{'pairs':>7}" + "".join(f"{name:>16}" for name in found))
    for category, count in Counter(p.category for p in table).items():
        cells = []
        for wrong in found.values():
            here = [p for p in wrong if p.category == category]
            positives = sum(not p.equal for p in here)
            cells.append(f"{positives} + {len(here) - positives}")
        print(f"{category:<14}{count:>7}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
