"""The tiny code task: one-line programs over standard input, judged by running them.

A prompt such as `n+3*2` asks for a program that reads n and applies the steps *from left to right*.
Python multiplies first, so copying the expression is usually wrong; it takes brackets:

    n+3*2    hasty     <think>0</think> and a block with  print(int(input())+3*2)     wrong
             careful   <think>1</think> and a block with  print((int(input())+3)*2)   right

Why this task: writing the program is copying, which a model of 0.4 M parameters learns in a few
hundred steps beside the arithmetic; how many brackets open must be known before the first operand
is written, so the thought settles it: the hasty trace thinks "0" and copies, the careful one counts
first. Both have the same form and nearly the same length (at most 39 tokens), so neither a reward
for form nor one for length can tell them apart: only running the program does, and that is what RL
has to select by. One problem in about eight needs no bracket, so haste is not always wrong.

Invariant: rows are a pure function of (config, seed), no expression is in two splits, and a
program passes the tests if and only if it computes the right function of the form a*n + b: two
such functions that agree at two points are the same.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import cycle, islice, product
from typing import Any

from h1r_rl.config.schema import GenerateDataConfig
from h1r_rl.data.draw import pick
from h1r_rl.errors import ConfigError

OPERATORS = "+-*"
OPERANDS = range(1, 10)
PLAIN_SHARE = 8  # of the problems that need no bracket one in so many is used
POINTS = range(-9, 10)


@dataclass(frozen=True, slots=True)
class CodeTask:
    """Steps applied to n: CodeTask((3, 2), "+*") is n+3*2, the function (n + 3) * 2."""

    operands: tuple[int, ...]
    operators: str

    @property
    def expression(self) -> str:
        return "n" + self._copied()

    def value(self, n: int) -> int:
        for sign, operand in zip(self.operators, self.operands, strict=True):
            n = {"+": n + operand, "-": n - operand, "*": n * operand}[sign]
        return n

    @property
    def brackets(self) -> int:
        """How many pairs Python needs: one for each product with an unbracketed sum before it."""
        count, sums = 0, False
        for sign in self.operators:
            count += sign == "*" and sums
            sums = sign != "*"
        return count

    def program(self, careful: bool) -> str:
        """The line as either manner writes it."""
        if not careful:
            return f"print(int(input()){self._copied()})"
        text, sums = "int(input())", False
        for sign, operand in zip(self.operators, self.operands, strict=True):
            text = f"({text})" if sign == "*" and sums else text
            text += f"{sign}{operand}"
            sums = sign != "*"
        return f"print({text})"

    def _copied(self) -> str:
        pairs = zip(self.operators, self.operands, strict=True)
        return "".join(f"{sign}{operand}" for sign, operand in pairs)


def code_rows(config: GenerateDataConfig, sizes: dict[str, int], *, seed: int) -> dict[str, list]:
    """Rows of `generate.SCHEMA` for each split, so many each; `sft` rows have a response."""
    apart = sum(size for split, size in sizes.items() if split != "sft")
    distinct = min(sizes["sft"] + apart, most_tasks(config))
    tasks = draw_tasks(config, max(distinct, apart + 1), seed=seed)
    others = iter(tasks[:apart])
    # Traces may come back to an expression, in either manner; the other splits never do.
    parts = {"sft": cycle(tasks[apart:])}
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, size in sizes.items():
        # Streams of their own: another share of careful traces changes no problem.
        style = random.Random(f"{seed}/{split}/code-style")
        points = random.Random(f"{seed}/{split}/code-points")
        rows[split] = [
            {
                "prompt_id": f"{split}-code-{index:06d}",
                "messages": [{"role": "user", "content": task.expression}],
                "response": code_trace(task, config, style) if split == "sft" else None,
                "verifier": "code",
                "ground_truth": ground_truth(task, points),
            }
            for index, task in enumerate(islice(parts.get(split, others), size))
        ]
    return rows


def draw_tasks(config: GenerateDataConfig, count: int, *, seed: int) -> list[CodeTask]:
    """`count` different ones of `code_steps` steps each."""
    if count > most_tasks(config):
        raise ConfigError(
            f"data.generate asks for {count} different code problems of {config.code_steps} steps, "
            f"at most {most_tasks(config)} can be had; raise code_steps, or lower code_fraction or "
            "the number of RL problems"
        )
    rng = random.Random(f"{seed}/code")  # Python fixes this stream over versions and platforms
    seen: dict[CodeTask, None] = {}
    while len(seen) < count:
        operands = tuple(pick(rng, OPERANDS) for _ in range(config.code_steps))
        operators = "".join(OPERATORS[pick(rng, range(3))] for _ in range(config.code_steps))
        task = CodeTask(operands, operators)
        if task.brackets or sum(operands) % PLAIN_SHARE == 0:
            seen.setdefault(task)
    return list(seen)


def most_tasks(config: GenerateDataConfig) -> int:
    """Nine in ten of those that need a bracket: the last would take long to draw."""
    operators = product(OPERATORS, repeat=config.code_steps)
    kinds = sum(CodeTask((), "".join(signs)).brackets > 0 for signs in operators)
    return kinds * len(OPERANDS) ** config.code_steps * 9 // 10


def code_trace(task: CodeTask, config: GenerateDataConfig, style: random.Random) -> str:
    """A trace in one manner or the other: its count of brackets, then its program."""
    careful = style.random() < config.code_careful_fraction
    count = task.brackets if careful else 0
    return f"<think>{count}</think>```\n{task.program(careful)}\n```"


def ground_truth(task: CodeTask, points: random.Random) -> str:
    """Two inputs with their outputs, in the verifier's own JSON."""
    first = pick(points, POINTS)
    second = pick(points, [n for n in POINTS if n != first])
    tests = [{"input": f"{n}\n", "output": f"{task.value(n)}\n"} for n in (first, second)]
    return json.dumps({"tests": tests})
