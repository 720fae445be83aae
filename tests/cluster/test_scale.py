"""`h1r scale` and `h1r restart` against a live folder, and what they say when it is not one."""

import fcntl
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.scale import ControlFolder, Request
from h1r_rl.errors import ConfigError, RunFailed


@pytest.fixture
def live(tmp_path):
    """A run folder with its lock held, as by a run that is going on."""
    (tmp_path / "resolved.yaml").write_text("name: t\n")
    lock = (tmp_path / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield tmp_path
    lock.close()


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def answer(folder, *outcomes):
    """What the run would do: take the requests up and tell what came of them."""
    control, taken = ControlFolder(folder), []

    def run() -> None:
        end = time.monotonic() + 20
        while not taken and time.monotonic() < end:
            names, request = control.take()
            if names:
                taken.append(request)
                for outcome, text in outcomes:
                    control.tell(names, outcome, text)
            time.sleep(0.02)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, taken


def test_a_request_reaches_the_run_and_its_outcome_comes_back(live):
    thread, taken = answer(live, ("begun", "x"), ("done", "3 rollout actors, after 2.0 s"))
    done = call("scale", live, "--rollout-actors", 3, "--reward-workers", 2, "--wait", 20)
    thread.join(20)
    assert done.exit_code == 0 and "done: 3 rollout actors" in done.output
    assert taken == [Request(rollout_actors=3, reward_workers=2)]
    thread, taken = answer(live, ("done", "learner restarted"))
    assert call("restart", live, "--learner", "--wait", 20).exit_code == 0
    thread.join(20)
    assert taken == [Request(restart_learner=True)]


@pytest.mark.parametrize(
    "outcome, error", [("refused", ConfigError), ("failed", RunFailed)], ids=str
)
def test_what_could_not_be_done_is_an_error(live, outcome, error):
    thread, _ = answer(live, (outcome, "too few CPUs"))
    done = call("scale", live, "--rollout-actors", 9, "--wait", 20)
    thread.join(20)
    assert isinstance(done.exception, error) and "too few CPUs" in str(done.exception)


def test_a_run_that_is_busy_keeps_the_request(live):
    done = call("scale", live, "--rollout-actors", 3, "--wait", 0)
    assert done.exit_code == 0 and "takes 3 rollout actors up after its present step" in done.output
    assert ControlFolder(live).take()[1] == Request(rollout_actors=3)


def test_mistakes(live, tmp_path_factory):
    for words in (["scale", live], ["restart", live]):
        done = call(*words)
        assert isinstance(done.exception, ConfigError) and "nothing is asked" in str(done.exception)
    assert call("scale", live, "--rollout-actors", 0).exit_code == 2
    empty = tmp_path_factory.mktemp("empty")
    done = call("scale", empty, "--rollout-actors", 2)
    assert "expected a run's folder" in str(done.exception)
    (empty / "resolved.yaml").write_text("name: t\n")
    done = call("scale", empty, "--rollout-actors", 2)
    assert "expected a live run" in str(done.exception)
    done = call("scale", empty / "nowhere", "--rollout-actors", 2)
    assert isinstance(done.exception, ConfigError) and "found none in" in str(done.exception)


def test_a_run_past_its_grpo_stage_is_told_from_one_before_it(live):
    (live / "state.json").write_text('{"done": ["evaluate-base", "sft"]}')
    assert call("scale", live, "--rollout-actors", 2, "--wait", 0).exit_code == 0
    (live / "state.json").write_text('{"done": ["evaluate-base", "sft", "grpo"]}')
    for words in (["scale", live, "--rollout-actors", 2], ["restart", live, "--learner"]):
        done = call(*words)
        assert isinstance(done.exception, ConfigError) and "found it done" in str(done.exception)


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_dies_is_not_waited_for(live, monkeypatch, begun):
    monkeypatch.setattr("cluster.scale.RunFolder.is_live", lambda _, left=[1, 1, 0]: left.pop(0))
    thread, _ = answer(live, ("begun", "x")) if begun else (None, None)
    started = time.monotonic()
    done = call("scale", live, "--rollout-actors", 2, "--wait", 60)
    assert time.monotonic() - started < 20
    assert isinstance(done.exception, RunFailed) and "the run ended before" in str(done.exception)
    if thread:
        thread.join(20)


async def test_what_is_asked_before_the_grpo_stage_waits_for_it(tmp_path, monkeypatch):
    """Requests left from an earlier process of the run are gone when it is claimed, not later."""
    from cluster.grpo_build import build_run
    from cluster.pipeline import execute
    from cluster.run_folder import RunFolder
    from h1r_rl.config.load import load_run

    recipe = Path(__file__).parents[2] / "cluster" / "runs" / "tiny-cpu.yaml"
    config = load_run(recipe, [f"output={tmp_path}"])
    control = ControlFolder(config.folder)
    monkeypatch.setattr("cluster.pipeline._prepare", lambda *_: 1 / 0)
    for resume in (False, True):
        with pytest.raises(ZeroDivisionError):
            execute(config, resume=resume, only=None)
        asked = control.ask(Request(rollout_actors=2))

    async def nothing(*_):
        return {}

    services = SimpleNamespace(facts=nothing, weight_manifest=nothing, on_change=lambda _: None)
    prompts = SimpleNamespace(first=lambda: None)
    await build_run(config, RunFolder(config.folder), prompts, None, services, services, services)
    assert control.take() == ([asked], Request(rollout_actors=2))


@pytest.mark.parametrize("count", ['"3"', "0", "-1", "true", "2.5"])
def test_a_file_that_is_no_request_is_refused(tmp_path, count):
    control = ControlFolder(tmp_path)
    folder = tmp_path / "control"
    folder.mkdir()
    (folder / "request-1.json").write_text(f'{{"rollout_actors": {count}}}')
    (folder / "request-2.json").write_text('{"actors": 3}')
    (folder / "request-3.json").write_text("[1]")
    assert control.take() == ([], Request())
    for name in "123":
        outcome, text = control.outcome(name)
        assert outcome == "refused" and "is no request" in text


def test_requests_found_together_are_one(tmp_path):
    control = ControlFolder(tmp_path)
    for request in (Request(2, 3), Request(3), Request(restart_rollouts=True)):
        control.ask(request)
    names, request = control.take()
    assert len(names) == 3 and request == Request(3, 3, restart_rollouts=True)
    assert control.take() == ([], Request())
