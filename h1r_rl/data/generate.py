"""The tiny task: expressions such as `7+8*3-4*2`, evaluated left to right modulo m.

With `code_fraction` a share of the SFT and RL rows are the code problems of `generate_code`, and a
held-out set of them is a split of its own.

Invariant: the files are a pure function of (config, seed), the same on every platform, and no
expression is in two splits. Step by step the task is easy, at once it is nearly impossible, and the
traces show both manners: so a model trained on them has something for RL to select.
"""

from __future__ import annotations

import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from h1r_rl.config.schema import DataConfig, GenerateDataConfig
from h1r_rl.data.draw import pick
from h1r_rl.data.generate_code import code_rows
from h1r_rl.errors import ConfigError

OPERATORS = "+-*"
DIGITS = range(1, 10)  # 0 would make most products trivial

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("response", pa.string()),  # null where the split is not for SFT
        ("verifier", pa.string()),
        ("ground_truth", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Operators sit between operands: Problem((7, 8, 3), "+*") is 7+8*3, which is 5 modulo 10."""

    operands: tuple[int, ...]
    operators: str

    @property
    def expression(self) -> str:
        rest = zip(self.operators, self.operands[1:], strict=True)
        return str(self.operands[0]) + "".join(f"{sign}{operand}" for sign, operand in rest)

    def results(self, modulus: int) -> list[int]:
        """The value after each left-to-right step, e.g. [5, 5] for 7+8*3 modulo 10."""
        results: list[int] = []
        value = self.operands[0]
        for sign, operand in zip(self.operators, self.operands[1:], strict=True):
            value = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
            value %= modulus
            results.append(value)
        return results

    def answer(self, modulus: int) -> int:
        return self.results(modulus)[-1]


def generate_into(data: DataConfig, folder: Path, *, seed: int) -> DataConfig:
    """Write sft.parquet, rl.parquet, evaluation.parquet and, where there are code problems,
    evaluation_code.parquet; return `data` naming those files.

    Files that are there are left: they are the same bytes, or another run's, whose folder this is
    not. Without `data.generate` nothing is written and `data` comes back as it is.
    """
    if data.generate is None:
        return data
    splits = ["sft", "rl", "evaluation", *(["evaluation_code"] * bool(data.generate.code_fraction))]
    files = {split: folder / f"{split}.parquet" for split in splits}
    if not all(file.is_file() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for split, table in generate_splits(data.generate, seed=seed).items():
            _write_atomically(table, files[split])
    return data.model_copy(
        update={"generate": None, **{split: (file,) for split, file in files.items()}}
    )


def generate_splits(config: GenerateDataConfig, *, seed: int) -> dict[str, pa.Table]:
    """The splits as tables of `SCHEMA`, disjoint by expression."""
    sizes = {
        "sft": config.sft_problems,
        "rl": config.rl_problems,
        "evaluation": config.evaluation_problems,
    }
    code: dict[str, list[dict[str, Any]]] = {}
    if config.code_fraction:
        code_sizes = {s: round(config.code_fraction * sizes[s]) for s in ("sft", "rl")}
        sizes |= {split: sizes[split] - size for split, size in code_sizes.items()}
        code_sizes["evaluation_code"] = config.evaluation_code_problems
        code = code_rows(config, code_sizes, seed=seed)
    problems = draw_problems(config, sum(sizes.values()), seed=seed)
    tables: dict[str, pa.Table] = {}
    start = 0
    for split, size in sizes.items():
        chosen = problems[start : start + size]
        start += size
        # A stream of its own: changing the share of worked traces changes no problem.
        style = random.Random(f"{seed}/{split}/style")
        rows = [
            {
                "prompt_id": f"{split}-{index:06d}",
                "messages": [{"role": "user", "content": problem.expression}],
                "response": sft_trace(problem, config, style) if split == "sft" else None,
                "verifier": "math",
                "ground_truth": str(problem.answer(config.modulus)),
            }
            for index, problem in enumerate(chosen)
        ]
        tables[split] = pa.Table.from_pylist(rows + code.pop(split, []), schema=SCHEMA)
    return tables | {s: pa.Table.from_pylist(rows, schema=SCHEMA) for s, rows in code.items()}


def draw_problems(config: GenerateDataConfig, count: int, *, seed: int) -> list[Problem]:
    """`count` different expressions, their lengths uniform over min_operands..max_operands."""
    lengths = range(config.min_operands, config.max_operands + 1)
    available = sum(len(DIGITS) ** n * len(OPERATORS) ** (n - 1) for n in lengths)
    if count > available // 2:
        raise ConfigError(
            f"data.generate asks for {count} different problems of {lengths[0]} to {lengths[-1]} "
            f"operands; {available} exist and at most half may be used; raise max_operands or "
            "lower the number of problems"
        )
    rng = random.Random(f"{seed}/problems")  # Python fixes this stream over versions and platforms
    seen: dict[Problem, None] = {}
    while len(seen) < count:
        length = pick(rng, lengths)
        operands = tuple(pick(rng, DIGITS) for _ in range(length))
        operators = "".join(OPERATORS[pick(rng, range(3))] for _ in range(length - 1))
        seen.setdefault(Problem(operands, operators))
    problems = list(seen)
    # Short lengths may run out during drawing; splits cut from a shuffled list still look alike.
    for last in range(count - 1, 0, -1):
        other = pick(rng, range(last + 1))
        problems[last], problems[other] = problems[other], problems[last]
    return problems


def sft_trace(problem: Problem, config: GenerateDataConfig, style: random.Random) -> str:
    """A correct trace: worked step by step, or guessed at once, with or without a think block.

    A guess is a thought too, `<think>=2</think>\\boxed{2}`: the block's form says nothing of the
    manner, and a reward for form alone teaches no arithmetic. Its first token is always the same:
    were it the digit, greedy decoding would work things out wherever no single guess is likely.

    A worked trace is a running calculation, `7+8=5*3=5-4=1*2=2` for `7+8*3-4*2`: it goes on from
    its last result with the problem's next operator and operand, so what the next token depends on
    is close by. Written as `7+8=5,5*3=5,...` the same steps take a model this small far longer.
    """
    worked = style.random() < config.worked_fraction
    formatted = style.random() >= config.unformatted_fraction
    answer = problem.answer(config.modulus)
    boxed = f"\\boxed{{{answer}}}"
    if not worked:
        return f"<think>={answer}</think>{boxed}" if formatted else boxed
    terms = zip(
        problem.operators, problem.operands[1:], problem.results(config.modulus), strict=True
    )
    steps = str(problem.operands[0]) + "".join(
        f"{sign}{term}={value}" for sign, term, value in terms
    )
    return f"<think>{steps}</think>{boxed}" if formatted else f"{steps}{boxed}"


def _write_atomically(table: Any, file: Path) -> None:
    handle, draft = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    os.close(handle)
    try:
        pq.write_table(table, draft)
        os.chmod(draft, 0o644)  # mkstemp makes it private
        os.replace(draft, file)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
