"""Science answers judged by a language model over an OpenAI-compatible interface.

Invariant: a verdict is 1 or 0 only where the model gave one that can be read. Anything else, after
its retries and within `reward.judge.deadline_s`, has no score and a reason:

    judge_timeout, judge_unreachable      the deadline passed; nothing listens there
    judge_http_<status>                   the service refused, or failed to the end
    judge_unreadable, judge_cut_off       no completion in the reply, or no verdict in its last line

It runs in the reward worker itself, as its deadline is its own (`chat_client`). A worker asks one
question at a time: `reward.workers` is how many are asked at once.
"""

from __future__ import annotations

import os
import time

from h1r_rl.config.schema import JudgeConfig, RewardConfig
from h1r_rl.errors import ConfigError
from h1r_rl.records import Prompt, Verdict
from rewards.answer_text import MAX_ANSWER_CHARS, end_of_answer
from rewards.chat_client import ChatFailed, complete, pause
from rewards.judge_dialogue import dialogue, read_verdict
from rewards.verdicts import CORRECT, wrong


def verify(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    """1, 0 or no score. What stands after the thought is judged, its last 4,000 characters."""
    judge, key = ensure_judge(options)
    answer = end_of_answer(text).strip()
    if not answer:
        return wrong("no_answer")
    try:
        right = _ask(judge, key, prompt.question, prompt.ground_truth, answer)
    except ChatFailed as failure:
        return Verdict(None, {}, f"judge_{failure.code}")
    return CORRECT if right else wrong("wrong")


def check_ground_truth(ground_truth: str) -> str | None:
    """Why no answer could ever be right, or None."""
    if len(ground_truth) > MAX_ANSWER_CHARS:
        return "too_long"
    return None if ground_truth.strip() else "empty"


def ensure_judge(options: RewardConfig) -> tuple[JudgeConfig, str | None]:
    """The settings and the key; ConfigError where one of them is missing on this machine."""
    judge = options.judge
    if judge is None:
        raise ConfigError(
            "expected reward.judge for prompts of the verifier 'judge', found none; set "
            "reward.judge.url and reward.judge.model"
        )
    key = os.environ.get(judge.key_env) if judge.key_env else None
    if judge.key_env and not key:
        raise ConfigError(
            f"expected the judge's key in the environment variable {judge.key_env} "
            "(reward.judge.key_env) of every machine with reward workers, found it empty; export it"
        )
    return judge, key


def _ask(judge: JudgeConfig, key: str | None, question: str, truth: str, answer: str) -> bool:
    deadline = time.monotonic() + judge.deadline_s
    attempt = 0
    while True:
        asked = dialogue(judge.template, question, truth, answer)
        body = {
            "model": judge.model,
            "messages": asked.messages,
            "temperature": 0.0,
            "max_tokens": judge.max_tokens,
        }
        try:
            output = complete(judge.endpoint, body, key, judge.attempt_s, deadline)
            right = read_verdict(output, asked.nonce)
            if right is None:
                raise ChatFailed("unreadable")
            return right
        except ChatFailed as failure:
            if not failure.passing or attempt == judge.retries:
                raise
            pause(failure, attempt, judge.backoff_s, deadline)
            attempt += 1
