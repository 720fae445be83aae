"""One completion to one verdict: the verifier under its deadline, its failures as reason codes.

Invariant: `verdict` never raises for anything a prompt, a completion or a verifier does, and
never turns a failure of ours into a wrong answer:

    the verifier was still running at the deadline      0, "timeout"
    it exhausted its memory limit                       0, "memory"
    it raised                                           no score, "verifier_error:<type>"
    its process died: once                              tried again in a fresh one
    twice, by itself, of a built-in verifier            0, "crash" (the text does that)
    twice otherwise                                     no score, "worker_lost"
"""

from __future__ import annotations

import logging
from collections import Counter

from h1r_rl.config.schema import RewardConfig
from h1r_rl.errors import DataError
from h1r_rl.records import Completion, Prompt, Verdict
from rewards.combine import combine, pruned
from rewards.deadline_worker import DeadlineExceeded, DeadlineWorker, FunctionFailed, ProcessDied
from rewards.registry import Verifier, checked, find, prompt_fields, resolve, take_kills
from rewards.verdicts import wrong

logger = logging.getLogger(__name__)


class Judge:
    """Owns one killable process. Not thread-safe."""

    def __init__(self, config: RewardConfig, max_response_tokens: int) -> None:
        self._config = config
        self._options = config.model_dump_json()
        self._max_response_tokens = max_response_tokens
        self._child = DeadlineWorker(config.memory_mib)
        self._kills: Counter[str] = Counter()

    def verdict(self, prompt: Prompt, completion: Completion) -> Verdict:
        """The verifier's verdict combined with penalties and control."""
        if completion.finish_reason == "pruned":
            verified = pruned(self._config)
        else:
            verified = self.verify(prompt, completion.text)
        return combine(self._config, verified, completion, self._max_response_tokens)

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """The verifier's own verdict on a text."""
        try:
            verifier = find(prompt.verifier)
            if verifier.place == "worker":
                return checked(resolve(verifier, verifier.function)(prompt, text, self._config))
            if verifier.quick is not None:
                verdict = resolve(verifier, verifier.quick)(prompt, text, self._config)
                if verdict is not None:
                    return verdict
            return self._verify_in_child(verifier, prompt, text)
        except MemoryError:
            return wrong("memory")
        except DataError as error:
            logger.error("%s: %s", prompt.key, error)
            return Verdict(None, {}, "unknown_verifier")
        except Exception as error:
            kind = error.kind if isinstance(error, FunctionFailed) else type(error).__name__
            logger.warning("%s: verifier %s raised %s", prompt.key, prompt.verifier, error)
            return Verdict(None, {}, f"verifier_error:{kind}")

    def take_kills(self) -> dict[str, int]:
        """Verifier processes lost since the last call, by reason: "deadline", "died", and this
        process's sandboxes: "sandbox"."""
        kills, self._kills = self._kills + take_kills(), Counter()
        return dict(kills)

    def close(self) -> None:
        self._child.close()

    def _verify_in_child(self, verifier: Verifier, prompt: Prompt, text: str) -> Verdict:
        arguments = [prompt.verifier, prompt_fields(prompt), text, self._options]
        for attempt in (1, 2):
            try:
                reply = self._child.call(
                    "rewards.registry:run_in_child",
                    arguments,
                    self._config.timeout_s,
                    load=verifier.module,
                )
                return Verdict(**reply)
            except DeadlineExceeded:
                self._kills["deadline"] += 1
                return wrong("timeout")
            except FunctionFailed as error:
                if error.kind == "MemoryError":
                    return wrong("memory")
                raise
            except ProcessDied as death:
                self._kills["died"] += 1
                logger.warning("%s: %s (attempt %d)", prompt.key, death, attempt)
                texts_doing = death.by_itself and verifier.built_in
        return wrong("crash") if texts_doing else Verdict(None, {}, "worker_lost")
