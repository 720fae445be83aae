"""Code problems of the usual shapes: canonical solutions pass, mutants do not."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest

from h1r_rl.config.schema import CodeConfig, RewardConfig
from h1r_rl.records import Prompt, Verdict
from rewards.code_compare import same_output
from rewards.code_ground_truth import BadGroundTruth, parse
from rewards.code_text import block_or_body
from rewards.code_verifier import _subset, check_ground_truth, executor_for, verify
from rewards.judge import Judge
from rewards.sandbox.jobs import Outcome
from rewards.sandbox.limits import Limits

CODE = CodeConfig(cpu_s=4, wall_s=20, total_s=60, memory_mib=256)


@pytest.fixture(scope="module")
def options(namespaces):
    return RewardConfig(code=CODE)


def judged(options, truth: dict, text: str, question: str = "q", key: str = "p") -> Verdict:
    ids = np.arange(2, dtype=np.int32)
    return verify(Prompt(key, 0, ids, question, "code", json.dumps(truth)), text, options)


def fenced(code: str) -> str:
    return f"<think>let me see</think>\nHere:\n```python\n{code}\n```\nThis runs in O(n)."


SUM = {"tests": [{"input": "3\n1 2 3\n", "output": "6\n"}, {"input": "1\n-5\n", "output": "-5\n"}]}
PRIMES = {
    "tests": [
        {"input": "10\n", "output": "2 3 5 7\n"},
        {"input": "2\n", "output": "2\n"},
        {"input": "1\n", "output": "\n"},
    ]
}
TWO_SUM = {
    "fn_name": "twoSum",
    "tests": [
        {"input": "[2,7,11,15]\n9", "output": "[0,1]"},
        {"input": "[3,2,4]\n6", "output": "[1,2]"},
        {"input": "[3,3]\n6", "output": "[0,1]"},
    ],
}
COUNTS = {
    "fn_name": "counts",
    "tests": [
        {"input": '"abca"', "output": '{"a": 2, "b": 1, "c": 1}'},
        {"input": '""', "output": "{}"},
    ],
}
# (truth, canonical, mutants)
LIVE_CODE_BENCH = {
    "sum": (
        SUM,
        "input()\nprint(sum(map(int, input().split())))",
        ["input()\nprint(sum(map(int, input().split())) + 1)", "print(6)", "print(sum([1,2,3]))",
         "input()\nprint(sum(map(abs, map(int, input().split()))))", "pass", "import this"],
    ),
    "primes": (
        PRIMES,
        "n = int(input())\nprint(*[p for p in range(2, n + 1) if all(p % d for d in range(2, p))])",
        ["n = int(input())\nprint(*[p for p in range(2, n) if all(p % d for d in range(2, p))])",
         "n = int(input())\nprint(*[p for p in range(1, n + 1) if pow(2, p, p) == 2])",
         "print('2 3 5 7')", "print(2, 3, 5, 7, sep='\\n')"],
    ),
    "two_sum": (
        TWO_SUM,
        "class Solution:\n    def twoSum(self, nums, target):\n        seen = {}\n"
        "        for i, n in enumerate(nums):\n            if target - n in seen:\n"
        "                return [seen[target - n], i]\n            seen[n] = i",
        ["class Solution:\n    def twoSum(self, nums, target):\n        return [0, 1]",
         "class Solution:\n    def twoSum(self, nums, target):\n        return '[0,1]'",
         "class Solution:\n    def twoSum(self, nums, target): pass",
         "class Solution:\n    def two_sum(self, nums, target): pass",
         "def twoSum(nums, target):\n    for i in range(len(nums)):\n"
         "        for j in range(len(nums)):\n            if nums[i] + nums[j] == target:\n"
         "                return [i, j]"],
    ),
    "counts": (
        COUNTS,
        "from collections import Counter\ndef counts(s): return dict(Counter(s))",
        ["def counts(s): return {c: 1 for c in s}",
         "def counts(s): return {'a': 2, 'b': 1, 'c': 1}",
         "def counts(s): return list(s)", "counts = 3"],
    ),
}

INCREMENT = '''def incr_list(l: list):
    """Return list with elements incremented by 1.
    >>> incr_list([1, 2, 3])
    [2, 3, 4]
    """
'''
INCREMENT_CHECK = {
    "check": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([]) == []\n"
    "    assert candidate([3, 2, 1]) == [4, 3, 2]\n    assert candidate([5]) == [6]\n",
    "entry_point": "incr_list",
}
ZEROS = '''import math


def poly(xs: list, x: float):
    """
    Evaluates polynomial with coefficients xs at point x.
    """
    return sum([coeff * math.pow(x, i) for i, coeff in enumerate(xs)])


def find_zero(xs: list):
    """ xs are coefficients of a polynomial; find one x such that poly(xs, x) = 0.
    """
'''
ZEROS_CHECK = {  # the shape of HumanEval/32: the test calls a helper of the prompt
    "check": "import copy, random\n\ndef check(candidate):\n    rng = random.Random(42)\n"
    "    for _ in range(8):\n        a, b = rng.randint(-10, 10), rng.randint(1, 10)\n"
    "        coeffs = [a, b]\n        solution = candidate(copy.deepcopy(coeffs))\n"
    "        assert math.fabs(poly(coeffs, solution)) < 1e-4\n",
    "entry_point": "find_zero",
}
SHIFT = '''def encode_shift(s: str):
    """
    returns encoded string by shifting every character by 5 in the alphabet.
    """
    return "".join([chr(((ord(ch) + 5 - ord("a")) % 26) + ord("a")) for ch in s])


def decode_shift(s: str):
    """
    takes as input string encoded with encode_shift function. Returns decoded string.
    """
'''
SHIFT_CHECK = {  # HumanEval/50
    "check": "def check(candidate):\n    for word in ('abcxyz', '', 'hello'):\n"
    "        assert candidate(encode_shift(word)) == word\n",
    "entry_point": "decode_shift",
}
# (prompt, truth, bodies that pass, bodies that fail)
HUMAN_EVAL = {
    "increment": (
        INCREMENT, INCREMENT_CHECK,
        ["    return [x + 1 for x in l]\n", "    result = []\n    for x in l:\n"
         "        result.append(x + 1)\n    return result"],
        ["    return [x + 2 for x in l]", "    return l", "    return (x + 1 for x in l)",
         "    pass",
         "return [x + 1 for x in l]", "    import sys\n    sys.exit(0)", ""],
    ),
    "find_zero": (
        ZEROS, ZEROS_CHECK,
        ["    lo, hi = -1e3, 1e3\n    for _ in range(200):\n        mid = (lo + hi) / 2\n"
         "        lo, hi = (mid, hi) if poly(xs, mid) * poly(xs, hi) <= 0 else (lo, mid)\n"
         "    return lo\n", "    return -xs[0] / xs[1]\n"],
        ["    return 0.0", "    return -xs[0]", "    return float('nan')", "    return 'x'"],
    ),
    "decode_shift": (
        SHIFT, SHIFT_CHECK,
        ['    return "".join(chr((ord(c) - 5 - ord("a")) % 26 + ord("a")) for c in s)\n'],
        ["    return s", '    return "".join(chr(ord(c) - 5) for c in s)',
         "    global encode_shift\n    encode_shift = lambda s: s\n    return s"],
    ),
}


@pytest.mark.parametrize("name", LIVE_CODE_BENCH)
def test_live_code_bench_shapes(name, options):
    truth, canonical, mutants = LIVE_CODE_BENCH[name]
    assert check_ground_truth(json.dumps(truth)) is None
    assert judged(options, truth, fenced(canonical)) == Verdict(1.0, {"accuracy": 1.0}, "correct")
    for mutant in mutants:
        if name == "two_sum" and mutant.startswith("def twoSum"):
            assert judged(options, truth, fenced(mutant)).score == 0.0  # [0, 0] for 2 * 3 = 6
            continue
        verdict = judged(options, truth, fenced(mutant))
        assert verdict.score == 0.0 and verdict.reason in ("wrong", "runtime_error"), mutant


@pytest.mark.parametrize("name", HUMAN_EVAL)
def test_human_eval_shapes(name, options):
    prompt, truth, right, wrong = HUMAN_EVAL[name]
    asked = f"Complete this function.\n```python\n{prompt}```\n"
    entry = truth["entry_point"]
    signature = next(line for line in prompt.splitlines() if line.startswith(f"def {entry}"))
    for body in right:
        whole = f"{signature}\n{body}"
        for question in (prompt, asked):
            assert judged(options, truth, body, question).score == 1.0
            assert judged(options, truth, fenced(whole), question).score == 1.0
        assert judged(options, truth, fenced(prompt + body), prompt).score == 1.0
    for body in wrong:
        assert judged(options, truth, body, prompt).score == 0.0, body
        assert judged(options, truth, fenced(f"{signature}\n{body}"), prompt).score == 0.0, body


def test_helpers_come_from_the_prompt_never_from_the_completion(options):
    """A completion that redefines the test's helper changes its own copy only."""
    forged = 'def encode_shift(s):\n    return s\n\ndef decode_shift(s):\n    return s'
    assert judged(options, SHIFT_CHECK, fenced(forged), SHIFT).score == 0.0
    explicit = SHIFT_CHECK | {"helpers": SHIFT}
    right = 'def decode_shift(s):\n    return "".join(chr((ord(c) - 102) % 26 + 97) for c in s)'
    assert judged(options, explicit, fenced(right), "prose").score == 1.0
    assert judged(options, explicit, fenced(forged), "prose").score == 0.0


@pytest.mark.parametrize(
    "question",
    [
        "Complete the function below, with care.\n\n" + SHIFT,
        f"Complete it:\n```python\n{SHIFT}```\nSo:\n```python\n>>> decode_shift('fgh')\n```",
        f"Complete it:\n```\n{SHIFT}```\nIt prints\n```text\nabc\n```\n",
        "# by Caesar\nFIVE = 5\n\n" + SHIFT.replace("+ 5", "+ FIVE"),
        "from string import ascii_lowercase\n\n\n" + SHIFT,
    ],
    ids=["prose", "example_block", "output_block", "constant", "import"],
)
def test_where_a_prompts_code_stands(question, options):
    body = '    return "".join(chr((ord(c) - 5 - ord("a")) % 26 + ord("a")) for c in s)\n'
    assert judged(options, SHIFT_CHECK, body, question).score == 1.0
    assert judged(options, SHIFT_CHECK, "    return s\n", question).score == 0.0


BODY = "    return [x + 1 for x in l]\n"
WHOLE = "def incr_list(l):\n" + BODY


@pytest.mark.parametrize(
    "text",
    [
        BODY + "```\n",
        BODY + "```\nThis adds one.\n```\n[2, 3]\n```\n",
        BODY + "~~~",
        BODY + "```\n\nFor example:\n```python\nincr_list([1])\n```\n",
        "    # like ```x```\n" + BODY,
        "    '''Example:\n```\nincr_list([1])\n```\nSo it goes.\n    '''\n" + BODY,
        BODY + "\nThis returns the list with one added to each.\n",
        BODY + "\n**Note** that it is new.\n- It is short.\n1. Really.",
        "    n = 1\n" + BODY + "\nThe time is O(n).",
        "    return plus(l)\n\n# a helper\n@staticmethod\ndef plus(l):\n" + BODY + "\nDone.",
        WHOLE + "```\nIt works.",
        WHOLE + "\nprint(incr_list([\n]))\n\nIt works.",
        "<think>x</think>\n" + BODY + "```",
        "Here:\n```python\n" + WHOLE + "```\nAnd a test:\n```\nincr_list([1])\n```",
        "1. So:\n   ```python\n" + "".join(f"   {line}\n" for line in WHOLE.split("\n")) + "   ```",
    ],
)
def test_where_a_body_ends(text, options):
    assert judged(options, INCREMENT_CHECK, text, INCREMENT).score == 1.0
    mutant = text.replace("x + 1", "x + 2")
    assert judged(options, INCREMENT_CHECK, mutant, INCREMENT).score == 0.0


@pytest.mark.parametrize("text", ["```\n" + BODY, "```python\n" + WHOLE, "I cannot say.", "\n \n"])
def test_no_body(text, options):
    assert judged(options, INCREMENT_CHECK, text, INCREMENT).reason == "no_answer"


def test_a_fence_within_the_prompts_docstring_is_no_block_of_the_prompt(options):
    prompt = INCREMENT.replace("    >>> incr", "    ```python\n    >>> incr").replace(
        "[2, 3, 4]\n", "[2, 3, 4]\n    ```\n"
    )
    assert prompt != INCREMENT
    assert judged(options, INCREMENT_CHECK, BODY, prompt).score == 1.0


def test_hostile_text_costs_linear_time():
    started = time.monotonic()
    for unit in ("if :# ", "a, ", "```x\n", "'''\n", "~~~~\n```\n", "for in ", " ", "1. ", "```"):
        text = unit * ((1 << 18) // len(unit))
        block_or_body(text, "f")
        block_or_body("    " + text, "f")
    assert time.monotonic() - started < 60  # what is not linear takes far longer


@pytest.mark.parametrize(
    "stub",
    [
        "def add(a, b):\n",
        "def add(a, b):",
        "def add(a, b):  # of two\n    # The sum.\n",
        "import math\n\ndef add(\n    a: int,\n    b: int,\n) -> int:\n",
        "Complete this:\n```python\ndef add(a, b):\n```\n",
    ],
)
def test_a_prompt_that_stops_at_the_functions_head(stub, options):
    truth = {"check": "assert add(1, 2) == 3\nassert add(2, 2) == 4", "entry_point": "add"}
    for body, score in (("return a + b", 1.0), ("return 3", 0.0)):
        assert judged(options, truth, fenced(f"def add(a, b):\n    {body}"), stub).score == score
        assert judged(options, truth, f"\n    {body}\n", stub).score == score


def test_asserts_by_name(options):
    truth = {"check": "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'", "entry_point": "add"}
    assert judged(options, truth, fenced("def add(a, b): return a + b")).score == 1.0
    assert judged(options, truth, fenced("add = lambda a, b: a + b")).score == 1.0
    assert judged(options, truth, fenced("def add(a, b): return 3")).score == 0.0


def test_values_arrive_as_they_left(options):
    check = """
def check(candidate):
    for value in (None, True, False, 0, -1, 2**70, -2**70, 1.5, float("inf"), 1j, "é", b"\\0", [],
                  [1, [2]], (), (1, (2,)), {}, {"a": {1: None}}, set(), {1, "x"}, [(1, {2: {3}})]):
        got = candidate(value)
        assert got == value and type(got) is type(value)
    assert candidate(float("nan")) != candidate(float("nan"))
    assert candidate(x=3) == 3
    try:
        candidate()
        assert False
    except TypeError:
        pass
    try:
        candidate("key")["nothing"]
        assert False
    except TypeError:
        pass
"""
    truth = {"check": check, "entry_point": "same"}
    assert judged(options, truth, fenced("def same(x): return x")).score == 1.0
    assert judged(options, truth, fenced("def same(x): return list(x)")).score == 0.0


def test_subclasses_arrive_as_what_they_hold(options):
    code = """
from collections import Counter, OrderedDict, namedtuple
from enum import IntEnum
E = IntEnum("E", "A B")
P = namedtuple("P", "x y")
class S(str):
    __eq__ = lambda self, other: True
    __hash__ = str.__hash__
def f(x): return [Counter("aa"), OrderedDict(a=[E.A]), P(1, E.B), {E.B}, S("x"), True]
"""
    check = (
        "def check(candidate):\n    got = candidate(0)\n"
        "    assert got == [{'a': 2}, {'a': [1]}, (1, 2), {2}, 'x', True]\n"
        "    assert [type(v) for v in got] == [dict, dict, tuple, set, str, bool]\n"
        "    assert got[4] != 'y'\n"
    )
    assert judged(options, {"check": check, "entry_point": "f"}, fenced(code)).score == 1.0


def test_exceptions_that_tests_expect(options):
    check = (
        "def check(candidate):\n    try:\n        candidate(-1)\n    except ValueError as error:\n"
        "        assert 'negative' in str(error)\n    else:\n        assert False\n"
    )
    truth = {"check": check, "entry_point": "root"}
    right = "def root(x):\n    if x < 0: raise ValueError('negative')\n    return x ** 0.5"
    assert judged(options, truth, fenced(right)).score == 1.0
    assert judged(options, truth, fenced(right.replace("ValueError", "KeyError"))).score == 0.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("```python\nprint(1)\n```\n```python\nprint(6)\n```", 1.0),
        ("```python\nprint(6)\n```\n```python\nprint(1)\n```", 0.0),
        ("```python\nprint(6)\n```\nOutput:\n```\n6\n```", 1.0),
        ("```py\nprint(6)\n```", 1.0),
        ("```Python3\nprint(6)\n```", 1.0),
        ("```\nprint(6)\n```", 1.0),
        ("1.\n  ```python\nprint(6)\n  ```", 1.0),
        ("```python title=x\nprint(6)\n```", 1.0),
        ("```cpp\nint main() {}\n```", 0.0),
        ("```python\nprint(6)", 0.0),
        ("print(6)", 0.0),
        ("", 0.0),
        ("<think>```python\nprint(6)\n```", 0.0),
        ("<think>```python\nprint(6)\n```</think> no code", 0.0),
        ("<think>```python\nprint(1)\n```</think>\n```python\nprint(6)\n```", 1.0),
        ("<think>\n```python\nprint(6)\n```\n", 0.0),
        ("<think>\n```python\nprint(6)\n```\n</think> no code", 0.0),
        ("1. Do:\n   ```python\n   print(6)\n   ```", 1.0),
        ("- so\n    - do\n\n      ```python\n      if 1:\n        print(6)\n      ```", 1.0),
        ("\t```python\n\tif 1:\n\t\tprint(6)\n\t```", 1.0),
        ("1. ```python\n   print(6)\n   ```", 1.0),
        ("~~~python\nprint(6)\n~~~", 1.0),
        ("```{python}\nprint(6)\n```", 1.0),
        ("```{.python .numberLines}\nprint(6)\n```", 1.0),
        ("```python:main.py\nprint(6)\n```", 1.0),
        ("````python\nx = '''\n```\n'''\nprint(6)\n````", 1.0),
        ("```python\nx = '''\n~~~\n    ```\n    ```sh\n'''\nprint(6)\n```", 1.0),
        ("```{r}\nprint(6)\n```", 0.0),
        ("```pythonic\nprint(6)\n```", 0.0),
        ("~~~python\nprint(6)\n```", 0.0),
        ("````python\nprint(6)\n```", 0.0),
    ],
)
def test_which_block_counts(text, score, options):
    truth = {"tests": [{"input": "", "output": "6"}]}
    verdict = judged(options, truth, text)
    assert verdict.score == score
    if "print" not in text or score == 0.0 and "print(1)" not in text:
        assert verdict.reason == "no_answer"


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("6", "6\n", True), ("6 \n\n", "6", True), ("6\n7", "6 7", False), ("6 7", "6\n7", False),
        ("6.0", "6", True), ("0.50", ".5", True), ("1e3", "1000", True), ("+5", "5", True),
        ("YES", "yes", False), ("1000000007", "1000000008", False), ("nan", "nan", True),
        ("12345678901234567891", "12345678901234567890", False), ("0.3333333", "0.3333334", False),
        ("a  b", "a b", True), ("", "", True), ("", "0", False), ("inf", "1e999", False),
        ("1_0", "10", False), ("11", "0011", False), ("0011", "0011", True), ("00", "0", False),
        ("-0", "0", True), ("9:5", "09:05", False), ("٣", "3", False), ("6\r", "6", True),
    ],
)
def test_output_comparison(printed, expected, same, options):
    truth = {"tests": [{"input": "", "output": expected}]}
    verdict = judged(options, truth, fenced(f"import sys\nsys.stdout.write({printed!r})"))
    assert verdict.score == float(same)


def test_long_tokens_are_compared_as_text():
    """Millions of digits cost time to read as a number: so long an answer counts as written."""
    assert same_output(b"1." + b"0" * 300, "1")
    assert not same_output(b"0" * 400 + b"1", "1")
    assert same_output(b"7" * (4 << 20), "7" * (4 << 20), 1e-6)
    assert not same_output(b"7" * (4 << 20), "7" * (4 << 20) + ".0", 1e-6)


def test_tolerance(options):
    truth = {"tests": [{"input": "", "output": "0.3333333"}]}
    code = fenced("print(1 / 3)")
    assert judged(options, truth, code).score == 0.0
    assert judged(options, truth | {"tolerance": 1e-6}, code).score == 1.0
    call = {"fn_name": "f", "tests": [{"input": "3", "output": "[0.3333333, 2]"}]}
    code = fenced("def f(x): return (1 / x, 2.0)")
    assert judged(options, call, code).score == 0.0
    assert judged(options, call | {"tolerance": 1e-6}, code).score == 1.0
    assert judged(options, call | {"tolerance": 1e-9}, code).score == 0.0


@pytest.mark.parametrize(
    ("returned", "expected", "same"),
    [
        ("True", "true", True), ("True", "false", False), ("1", "true", True), ("2", "true", False),
        ("'True'", "true", False), ("None", "null", True), ("0", "null", False),
        ("False", "null", False), ("''", "null", False), ("[]", "null", False),
        ("float('nan')", "NaN", True), ("[float('nan')]", "[NaN]", True), ("None", "NaN", False),
        ("0.0", "NaN", False), ("float('nan')", "0", False), ("float('inf')", "Infinity", True),
        ("float('-inf')", "Infinity", False), ("2.0", "2", True), ("-0.0", "0", True),
        ("0.1 + 0.2", "0.3", False), ("'2'", "2", False), ("2 + 0j", "2", True),
        ("(1, [2])", "[1, [2]]", True), ("{1, 2}", "[1, 2]", False), ("[1]", "[1, 1]", False),
        ("{1: 'a', None: 2}", '{"1": "a", "null": 2}', True), ("{1: 'a'}", '{"2": "a"}', False),
        ("{1: 0, '1': 0}", '{"1": 0}', False), ("{(1,): 0}", '{"(1,)": 0}', False),
        ("{10 ** 5000: 0}", '{"1": 0}', False), ("[]", "{}", False), ("{}", "[]", False),
        ("b'a'", '"a"', False), ("2 ** 64", "18446744073709551616", True),
        ("2 ** 53 + 1", "9007199254740992.0", False), ("1 << 5_000_000", "1e400", False),
    ],
)
def test_value_comparison(returned, expected, same, options):
    truth = {"fn_name": "f", "tests": [{"input": "", "output": expected}]}
    assert judged(options, truth, fenced(f"def f(): return {returned}")).score == float(same)


def test_fraction_of_tests(options):
    share = options.model_copy(update={"code": CODE.model_copy(update={"score": "fraction"})})
    tests = [{"input": f"{i}\n", "output": f"{i}\n"} for i in range(4)]
    code = fenced("n = int(input())\nprint(n if n != 2 else 0)")
    assert judged(options, {"tests": tests}, code).score == 0.0
    verdict = judged(share, {"tests": tests}, code)
    assert verdict == Verdict(0.75, {"accuracy": 0.0, "tests_passed": 0.75}, "wrong")
    assert judged(share, {"tests": tests}, fenced("print(input())")).parts["accuracy"] == 1.0
    assert judged(share, {"tests": tests}, "nothing") == Verdict(
        0.0, {"accuracy": 0.0, "tests_passed": 0.0}, "no_answer"
    )


def test_subset_of_tests(options):
    tests = tuple((str(i), str(i)) for i in range(100))
    chosen = _subset(tests, "p/0", 10)
    assert len(set(chosen)) == 10 and set(chosen) <= set(tests)
    assert chosen == _subset(tests, "p/0", 10)  # all samples of a group
    assert chosen != _subset(tests, "p/1", 10) and chosen != list(tests[:10])
    assert _subset(tests, "p/0", None) == _subset(tests, "p/0", 100) == list(tests)
    few = options.model_copy(update={"code": CODE.model_copy(update={"max_tests": 1})})
    tests = [{"input": f"{i}", "output": f"{i}"} for i in range(10)]
    scores = {
        judged(few, {"tests": tests}, fenced("n = input()\nprint(n if n == '3' else '')"), key=key)
        .score for key in map(str, range(30))
    }
    assert scores == {0.0, 1.0}


def test_total_time_is_bounded(options):
    hurried = CODE.model_copy(update={"total_s": 4.0, "score": "fraction", "wall_s": 300.0})
    config = options.model_copy(update={"code": hurried})
    tests = [{"input": "", "output": "1"}] * 50
    started = time.monotonic()
    code = fenced("import time\ntime.sleep(1)\nprint(1)")
    verdict = judged(config, {"tests": tests}, code)
    assert verdict.reason == "timeout" and 0 < verdict.score < 0.1
    for truth in ({"tests": tests[:1]}, INCREMENT_CHECK):  # a single one does not outlast it
        hangs = fenced("import time\ntime.sleep(200)\ndef incr_list(l): pass")
        assert judged(config, truth, hangs).reason == "timeout"
    assert time.monotonic() - started < 60


class Busy:
    """A sandbox whose programs use two CPU seconds each in no time."""

    def __init__(self) -> None:
        self.limits: list[Limits] = []

    def script(self, source, stdin, limits, imports=()):
        self.limits.append(limits)
        return Outcome("finished", b"1", cpu_s=2.0)

    def call(self, source, entry, arguments, limits, imports=()):
        self.limits.append(limits)
        return Outcome("finished", value=1, cpu_s=2.0)


@pytest.mark.parametrize("truth", [{}, {"fn_name": "f"}], ids=["script", "call"])
def test_total_cpu_time_is_bounded(truth, monkeypatch):
    busy = Busy()
    monkeypatch.setattr("rewards.code_verifier.executor_for", lambda options: busy)
    few = RewardConfig(code=CODE.model_copy(update={"total_s": 5.0, "score": "fraction"}))
    tests = {"tests": [{"input": "", "output": "1"}] * 10}
    verdict = judged(few, tests | truth, fenced("pass"))
    assert (verdict.score, verdict.reason) == (0.3, "timeout")
    assert [limits.cpu_s for limits in busy.limits] == [4.0, 3.0, 1.0]
    assert all(limits.wall_s <= 5.0 for limits in busy.limits)


def test_calls_and_their_children_count_as_cpu_time(options):
    executor = executor_for(options)
    spin = "import os\ndef f(x):\n    for _ in range(2):\n        if os.fork() == 0:\n"
    spin += "            while True: pass\n        os.wait()\n    return x"
    outcome = executor.call(spin, "f", [7], Limits(cpu_s=1, wall_s=120))
    assert outcome.state == "timeout" and outcome.cpu_s >= 1
    outcome = executor.call("def f(x): return x", "f", [7], Limits(cpu_s=1, wall_s=120))
    assert (outcome.state, outcome.value) == ("finished", 7) and 0 < outcome.cpu_s < 1


def test_a_replaced_sandbox_is_counted(options):
    judge = Judge(options, 1)
    try:
        prompt = Prompt("p", 0, np.zeros(0, np.int32), "q", "code", json.dumps(SUM))
        code = fenced("input()\nprint(sum(map(int, input().split())))")
        assert judge.verify(prompt, code).score == 1.0
        judge.take_kills()
        os.kill(executor_for(options).pid, signal.SIGKILL)
        assert judge.verify(prompt, code).score == 1.0
        assert judge.take_kills() == {"sandbox": 1}
        assert judge.take_kills() == {}
    finally:
        judge.close()


BAD = {
    "not json": "not_json",
    "[]": "not_an_object",
    "{}": "no_tests",
    '{"tests": []}': "no_tests",
    '{"tests": [{"input": "1"}]}': "test_without_input_or_output",
    '{"tests": [{"input": 1, "output": "1"}]}': "test_without_input_or_output",
    '{"tests": [{"input": "", "output": ""}], "tolerance": "x"}': "bad_tolerance",
    '{"tests": [{"input": "", "output": ""}], "tolerance": NaN}': "bad_tolerance",
    '{"fn_name": "f", "tests": [{"input": "x y", "output": "1"}]}': "test_is_not_json",
    '{"fn_name": "f", "tests": [{"input": "1", "output": "one"}]}': "test_is_not_json",
    '{"fn_name": "f()", "tests": [{"input": "1", "output": "1"}]}': "no_function_name",
    '{"check": "def check(c): pass"}': "no_function_name",
    '{"check": "", "entry_point": "f"}': "check_without_source",
    '{"check": "def check(c:", "entry_point": "f"}': "check_does_not_compile",
    '{"check": "pass", "helpers": "(", "entry_point": "f"}': "check_does_not_compile",
    "[" * 100_000: "not_json",
    '{"tests": [{"input": "\\ud800", "output": ""}]}': "test_without_input_or_output",
}


@pytest.mark.parametrize("truth", BAD, ids=[f"{r}-{i}" for i, r in enumerate(BAD.values())])
def test_bad_ground_truth_has_no_score(truth, options):
    assert check_ground_truth(truth) == BAD[truth]
    with pytest.raises(BadGroundTruth):
        parse(truth)
    prompt = Prompt("p", 0, np.arange(2, dtype=np.int32), "q", "code", truth)
    verdict = verify(prompt, fenced("print(1)"), options)
    assert verdict.score is None and verdict.reason == f"bad_ground_truth:{BAD[truth]}"


@pytest.mark.parametrize(
    "argument", [json.dumps("x" * (5 << 20)), "[" * 80 + "]" * 80], ids=["large", "deep"]
)
def test_arguments_that_cannot_be_passed_are_found_at_load(argument, options):
    truth = {"fn_name": "f", "tests": [{"input": argument, "output": "1"}]}
    assert check_ground_truth(json.dumps(truth)) == "arguments_too_large"
    verdict = judged(options, truth, fenced("def f(x): return 1"))
    assert verdict.score is None and verdict.reason == "bad_ground_truth:arguments_too_large"


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        ({"check": "def check(c): pass", "entry_point": "f"}, "test_calls_nothing"),
        ({"check": "def check(c): c(check)", "entry_point": "f"}, "arguments_not_plain"),
        ({"check": "def check(c): c(1)", "helpers": "import nothing", "entry_point": "f"},
         "helpers_fail"),
    ],
)
def test_tests_that_cannot_judge_have_no_score(truth, reason, options):
    verdict = judged(options, truth, fenced("def f(x): return x"))
    assert verdict.score is None and verdict.reason == f"bad_ground_truth:{reason}"
