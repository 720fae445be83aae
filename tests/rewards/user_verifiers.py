"""Verifiers as a user would write them, good and bad; imported by path in the killable process."""

from __future__ import annotations

import os
import signal
import time

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Prompt, Verdict


def word_count(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    share = min(1.0, len(text.split()) / int(prompt.ground_truth))
    return Verdict(share, {"accuracy": float(share == 1.0), "share": share}, "counted")


def sees_everything(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    same = prompt.token_ids.tolist() == [0, 1, 2, 3] and options.timeout_s == 1.0
    return Verdict(float(same), {}, text)


def raises(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    raise ValueError("no such unit")


def returns_a_number(prompt: Prompt, text: str, options: RewardConfig) -> float:
    return 1.0


def returns_nan(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    return Verdict(float("nan"))


def has_no_verdict(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    return Verdict(None, {}, "undecided")


def hangs(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    time.sleep(600)
    raise AssertionError


def eats_memory(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    return Verdict(float(len(bytearray(1 << 33))))


def exits(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    raise SystemExit(0)


def vanishes(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    os._exit(0)


def is_killed_once(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    if not os.path.exists(prompt.ground_truth):
        open(prompt.ground_truth, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return Verdict(1.0, {}, "second try")


def prints(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    print("hello" * 1000)
    os.system("echo hello")
    return Verdict(1.0, {}, "fine")
