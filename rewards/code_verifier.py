"""Code: the last Python block of a completion against the problem's tests, in the sandbox.

Invariant: grading happens here, outside the jail: a program sees inputs and never an expected
answer, and nothing it can forge (exit codes, printed markers, patched comparisons) decides. A
failure of the sandbox raises, which the judge turns into a verdict without a score; a program's
own failure is a wrong answer with a reason:

    no_answer, too_long                   nothing to run
    wrong, runtime_error                  an answer differs; the program failed
    timeout, memory, output_limit         it met a limit
    bad_ground_truth:<code>               no score: the problem cannot be judged

The tests and their form: `rewards.code_ground_truth`.
"""

from __future__ import annotations

import atexit
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from h1r_rl.config.schema import CodeConfig, HttpSandboxConfig, RewardConfig
from h1r_rl.records import Prompt, Verdict
from rewards.code_compare import same_output, same_value
from rewards.code_ground_truth import BadGroundTruth, CodeProblem, parse, reach_the_function
from rewards.code_text import (
    MAX_CODE_CHARS,
    answer_part,
    block_or_body,
    completed,
    last_block,
    prompt_code,
    prompt_imports,
    with_body,
)
from rewards.sandbox.codec import CodecError
from rewards.sandbox.executor import Executor, JailExecutor
from rewards.sandbox.http_executor import NEEDS_NAMESPACES, HttpExecutor
from rewards.sandbox.jobs import SandboxLost
from rewards.sandbox.limits import Limits

PASSED = "correct"
TOO_LARGE = "arguments_too_large"

_jails: list[JailExecutor] = []  # as `_executor` made them


def verify(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    """The verdict on one completion; starts this process's sandbox at the first call."""
    try:
        problem = parse(prompt.ground_truth)
    except BadGroundTruth as error:
        return Verdict(None, {}, f"bad_ground_truth:{error}")
    code = _code(problem, text)
    if code is None:
        return _verdict(options.code, [], "no_answer")
    if len(code) > MAX_CODE_CHARS:
        return _verdict(options.code, [], "too_long")
    executor = executor_for(options)
    if problem.kind == "check":
        return _checked(executor, problem, prompt, code, options.code)
    try:
        reasons = list(_run_tests(executor, problem, prompt, code, options.code))
    except CodecError:  # raised here for arguments alone, before a program runs
        return Verdict(None, {}, f"bad_ground_truth:{TOO_LARGE}")
    failures = [reason for reason in reasons if reason != PASSED]
    return _verdict(options.code, reasons, failures[0] if failures else PASSED)


def check_ground_truth(ground_truth: str, options: RewardConfig | None = None) -> str | None:
    """Why a problem cannot be judged, or not where `options` have programs run; or None."""
    try:
        problem = parse(ground_truth)
    except BadGroundTruth as error:
        return str(error)
    if problem.kind == "check" and options and isinstance(options.sandbox, HttpSandboxConfig):
        return NEEDS_NAMESPACES
    return None if reach_the_function(problem) else TOO_LARGE


def executor_for(options: RewardConfig) -> Executor:
    """This process's sandbox, shared by all that ask with the same settings."""
    code = options.code
    return _executor(options.sandbox, code.memory_mib, code.file_mib, code.processes)


def take_kills() -> dict[str, int]:
    """Zygotes of this process lost and replaced since the last call, as "sandbox"."""
    number = sum(executor.take_replaced() for executor in _jails)
    return {"sandbox": number} if number else {}


def ensure_sandbox(options: RewardConfig) -> None:
    """Run a trivial program; ConfigError says what the kernel or the service refuses."""
    outcome = executor_for(options).script("print(6 * 7)", b"", limits_of(options.code))
    if outcome.stdout.strip() != b"42":
        raise SandboxLost(f"a trivial program gave {outcome}")


def limits_of(code: CodeConfig) -> Limits:
    return Limits(
        cpu_s=code.cpu_s,
        wall_s=code.wall_s,
        memory_bytes=code.memory_mib << 20,
        output_bytes=code.output_mib << 20,
        file_bytes=code.file_mib << 20,
        processes=code.processes,
    )


@cache
def _executor(
    sandbox: str | HttpSandboxConfig, memory_mib: int, file_mib: int, processes: int
) -> Executor:
    if isinstance(sandbox, HttpSandboxConfig):
        return HttpExecutor(sandbox.urls)
    largest = Limits(
        memory_bytes=memory_mib << 20, file_bytes=file_mib << 20, processes=processes
    )
    executor = JailExecutor(sandbox == "namespaces", largest)
    atexit.register(executor.close)
    _jails.append(executor)
    return executor


def _code(problem: CodeProblem, text: str) -> str | None:
    answer = answer_part(text)
    if answer is None:
        return None
    if problem.kind == "check":
        return block_or_body(answer, problem.entry_point)
    return last_block(answer)


def _run_tests(
    executor: Executor, problem: CodeProblem, prompt: Prompt, code: str, options: CodeConfig
) -> Iterator[str]:
    """A reason for each test, up to the first failure where all must pass.

    A test has its own limits or, where that is less, what the earlier ones left of `total_s`.
    """
    end, cpu_left = time.monotonic() + options.total_s, options.total_s
    imports = prompt_imports(prompt.question)
    for given, expected in _subset(problem.tests, prompt.key, options.max_tests):
        wall_left = end - time.monotonic()
        if min(wall_left, cpu_left) <= 0:
            reason = "timeout"
        else:
            limits = _at_most(limits_of(options), wall_left, cpu_left)
            if problem.kind == "script":
                outcome = executor.script(code, given.encode(), limits, imports)
                right = same_output(outcome.stdout, expected, problem.tolerance)
            else:
                outcome = executor.call(code, problem.entry_point, given, limits, imports)
                right = same_value(outcome.value, expected, problem.tolerance)
            cpu_left -= outcome.cpu_s
            reason = _reason(outcome.state, right)
        yield reason
        if reason != PASSED and options.score == "all":
            return


def _at_most(limits: Limits, wall_s: float, cpu_s: float) -> Limits:
    return replace(limits, wall_s=min(limits.wall_s, wall_s), cpu_s=min(limits.cpu_s, cpu_s))


def _subset(tests: tuple, key: str, most: int | None) -> list:
    """The same tests for every sample of a group, others on the next pass over the data."""
    if most is None or len(tests) <= most:
        return list(tests)
    return random.Random(key).sample(tests, most)


def _checked(
    executor: Executor, problem: CodeProblem, prompt: Prompt, code: str, options: CodeConfig
) -> Verdict:
    stub = problem.helpers
    if stub is None:
        stub = prompt_code(prompt.question, problem.entry_point)
    test = {"helpers": with_body(stub), "test": problem.check, "entry_point": problem.entry_point}
    source = completed(stub, code, problem.entry_point)
    limits = _at_most(limits_of(options), options.total_s, options.total_s)
    state, reason = executor.check(source, test, limits)
    if state == "unsupported":
        return Verdict(None, {}, f"bad_ground_truth:{reason}")
    reason = {"passed": PASSED, "failed": "wrong"}.get(state, state)
    return _verdict(options, [reason], reason)


def _reason(state: str, right: bool) -> str:
    if state != "finished":
        return state
    return PASSED if right else "wrong"


def _verdict(options: CodeConfig, reasons: list[str], reason: str) -> Verdict:
    accuracy = float(reason == PASSED)
    if options.score == "all":
        return Verdict(accuracy, {"accuracy": accuracy}, reason)
    share = sum(r == PASSED for r in reasons) / len(reasons) if reasons else 0.0
    return Verdict(share, {"accuracy": accuracy, "tests_passed": share}, reason)
