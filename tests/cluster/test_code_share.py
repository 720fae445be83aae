"""Where the kernel refuses namespaces a run goes on without code problems, and says so."""

from __future__ import annotations

import pytest

from cluster.code_share import notes_of, without_refused_code
from cluster.run_folder import RunFolder
from h1r_rl.config.load import build_run
from h1r_rl.errors import ConfigError

RUN = {
    "name": "t",
    "model": {"tiny": {}},
    "data": {"generate": {"code_fraction": 0.25}},
    "rollout": {"max_response_tokens": 32, "max_model_len": 96},
}


@pytest.fixture()
def refused(monkeypatch):
    """A kernel that says no, as the sandbox reports it."""
    asked = []

    def start(*_: object) -> None:
        asked.append(True)
        raise ConfigError("reward.sandbox: expected namespaces, found 'EPERM'.\nEnable them")

    monkeypatch.setattr("rewards.sandbox.executor.JailExecutor._start", start)
    return asked


def run(tmp_path, **sections):
    folder = RunFolder(tmp_path)
    return build_run(RUN | sections, source="test"), folder


def test_the_share_is_left_out_once_and_for_all(tmp_path, refused, capsys):
    config, folder = run(tmp_path)
    changed = without_refused_code(config, folder)
    assert changed.data.generate.code_fraction == 0
    assert "EPERM" in capsys.readouterr().err
    (note,) = notes_of(folder)
    assert "without the share of code problems" in note and "docs/sandbox.md" in note
    assert "\n" not in note
    assert without_refused_code(config, folder).data.generate.code_fraction == 0
    assert len(refused) == 1  # a resumed run keeps the data that it began with


def test_it_stays_where_code_is_judged_elsewhere_or_trusted(tmp_path, refused):
    for reward in ({"sandbox": {"http": "http://host"}}, {"sandbox": "none-i-trust-this-code"}):
        config, folder = run(tmp_path / reward["sandbox"].__class__.__name__, reward=reward)
        folder.path.mkdir()
        assert without_refused_code(config, folder) == config and not notes_of(folder)
    assert not refused


def test_a_run_without_code_asks_nothing(tmp_path, refused):
    config, folder = run(tmp_path, data={"generate": {}})
    assert without_refused_code(config, folder) is config and not refused


def test_a_kernel_that_allows_it_keeps_the_share(tmp_path, monkeypatch):
    monkeypatch.setattr("rewards.sandbox.executor.JailExecutor._start", lambda self: None)
    monkeypatch.setattr("rewards.sandbox.executor.JailExecutor.close", lambda self: None)
    config, folder = run(tmp_path)
    assert without_refused_code(config, folder) == config and not notes_of(folder)
