"""Solutions as LiveCodeBench grades them: names that its preamble gives need no import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from h1r_rl.config.schema import CodeConfig, RewardConfig
from h1r_rl.records import Prompt
from rewards.code_text import prompt_imports
from rewards.code_verifier import verify

ROOT = Path(__file__).parents[2]
OPTIONS = RewardConfig(code=CodeConfig(cpu_s=8, wall_s=30, total_s=60, memory_mib=512))
STARTER = (
    "Solve it.\n```python\nfrom fractions import (\n    Fraction,\n    Fraction as F,\n)\n"
    "import no_such_module\nimport decimal as d\n\nclass Solution:\n"
    "    def f(self, a: List[int]) -> int:\n```\n"
)

# The preamble itself, as its authors write it.
PREAMBLE = (
    "from string import *\nfrom re import *\nfrom datetime import *\nfrom collections import *\n"
    "from heapq import *\nfrom bisect import *\nfrom copy import *\nfrom math import *\n"
    "from random import *\nfrom statistics import *\nfrom itertools import *\n"
    "from functools import *\nfrom operator import *\nfrom io import *\nfrom sys import *\n"
    "from json import *\nfrom builtins import *\nfrom typing import *\nimport string\nimport re\n"
    "import datetime\nimport collections\nimport heapq\nimport bisect\nimport copy\nimport math\n"
    "import random\nimport statistics\nimport itertools\nimport functools\nimport operator\n"
    "import io\nimport sys\nimport json\n"
)


def score(code: str, truth: dict, question: str = "q") -> float | None:
    ids = np.zeros(0, np.int32)
    prompt = Prompt("p", 0, ids, question, "code", json.dumps(truth))
    return verify(prompt, f"```python\n{code}\n```", OPTIONS).score


def call(code: str, output: str, question: str = "q") -> float | None:
    truth = {"fn_name": "f", "tests": [{"input": "[3, 1, 3]", "output": output}]}
    return score(code, truth, question)


def script(code: str, output: str, question: str = "q") -> float | None:
    return score(code, {"tests": [{"input": "3 1 3\n", "output": output}]}, question)


SOLUTION = """class Solution:
    def f(self, a: List[int]) -> Optional[Dict[int, int]]:
        heapq.heapify(a)
        return {k: v for k, v in Counter(a).items() if gcd(k, 9) == k} | defaultdict(int)"""


def test_a_solution_with_annotations(namespaces):
    assert call(SOLUTION, '{"3": 2, "1": 1}') == 1.0
    assert call(SOLUTION.replace("== k", "!= k"), '{"3": 2, "1": 1}') == 0.0


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print(max(Counter(map(int, stdin.readline().split())).items()))", "(3, 2)"),
        ("print(len(sys.stdin.read()), isqrt(17), deque([1], maxlen=3)[0])", "6 4 1"),
        ("print(bisect.bisect_left([1, 2], 2), reduce(add, [1, 2]), json.dumps([1]))", "1 3 [1]"),
        ("print(pow(2, 3, 5), datetime.date(2024, 2, 29).day, timedelta(days=1).days)", "3 29 1"),
        ("print(1)\nexit()\nprint(2)", "1"),
        ("print(1)\nif 1: quit()\nprint(2)", "1"),
        ("from __future__ import annotations\ndef g(x: Nowhere): return 7\nprint(g(1))", "7"),
        ("def f(n): return n and 1 + f(n - 1)\nprint(f(20000))", "20000"),
        ("@cache\ndef f(n): return n and 1 + f(n - 1)\nprint(f(20000))", "20000"),
        ("import sys\nprint(sys._getframe().f_lineno)", "2"),
        ("Counter = 5\nprint(Counter)", "5"),
        ("print('List' in globals(), 'random' in sys.modules)", "False False"),
        ("print(mean([1, 3]), random.Random(5).random() < 1)", "2 True"),
    ],
)
def test_scripts_use_them_too(code, output, namespaces):
    assert script(code, output) == 1.0


def test_what_the_prompt_imports(namespaces):
    assert prompt_imports(STARTER) == (
        "from fractions import (\n    Fraction,\n    Fraction as F,\n)", "import no_such_module",
        "import decimal as d",
    )
    assert prompt_imports("Import it.\nimport math as m\nfrom there on\nfrom a import b, c") == (
        "import math as m", "from a import b, c",
    )
    uses = "class Solution:\n    def f(self, a): return int(F(6, 2)) + int(d.Decimal(4))"
    assert call(uses, "7", STARTER) == 1.0
    assert call(uses, "7") == 0.0
    assert script("print(F(6, 2) + 4)", "7", STARTER) == 1.0
    assert script("print(F(6, 2) + 4)", "7") == 0.0


def test_a_name_that_nobody_gives_is_an_error(namespaces):
    assert script("print(np.sum([7]))", "7") == 0.0
    assert script("print(7)\nnowhere", "7") == 0.0


def test_a_prompts_own_test_gives_no_names(namespaces):
    """HumanEval's grader gives none: its prompts import what they need."""
    truth = {"check": "def check(f):\n    assert f(16) == 4\n", "entry_point": "f"}
    assert score("def f(x): return isqrt(x)", truth) == 0.0
    prompt = "from math import isqrt\ndef f(x):\n    'Root.'\n"
    assert score("def f(x): return isqrt(x)", truth, prompt) == 1.0


def test_names_are_those_of_the_preamble():
    """In a process of its own, as both change the interpreter."""
    source = f"""
import builtins, json, sys
sys.path.insert(0, {str(ROOT)!r})
from rewards.sandbox.usual_names import prepare
there, here = {{}}, {{}}
exec({PREAMBLE!r}, there)
names = [name for name in there if not name.startswith("_") and not hasattr(builtins, name)]
prepare(here, compile("\\n".join(names), "x", "exec"), ())
print(len(names), [n for n in names if n not in here or here[n] is not there[n]])
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", source], capture_output=True, text=True, timeout=60
    )
    count, _, differing = done.stdout.strip().partition(" ")
    assert (differing, done.stderr) == ("[]", "") and int(count) > 400
