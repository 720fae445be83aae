"""Each mistake: one short error, exit code 2, nothing started and nothing overwritten."""

import json
import shutil
import signal
import socket
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import cli

RUN = Path(__file__).parents[2] / "cluster" / "runs" / "tiny-cpu.yaml"
ROWS = [
    {
        "prompt_id": f"p{i}",
        "messages": [{"role": "user", "content": f"{i}+1"}],
        "verifier": "math",
        "ground_truth": str(i + 1),
        "response": f"<think>{i + 1}</think>\\boxed{{{i + 1}}}",
    }
    for i in range(40)
]


@pytest.fixture
def h1r(tmp_path, monkeypatch, capsys):
    """(exit code, standard error, standard output) of `h1r COMMAND tiny-cpu.yaml …`."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def call(command: str, *overrides: str) -> tuple[int, str, str]:
        where = (f"output={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
        monkeypatch.setattr(sys, "argv", ["h1r", command, str(RUN), *where, *overrides])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.err, captured.out

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def files(folder: Path, **changes) -> list[str]:
    """Overrides that name own data files; `changes` replaces a split's rows."""
    overrides = ["data.generate=null"]
    for index, split in enumerate(("sft", "rl", "evaluation")):
        rows = changes.get(split, [r for i, r in enumerate(ROWS) if i % 3 == index])
        file = folder / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=changes.get("schema")), file)
        overrides.append(f"data.{split}=[{file}]")
    return overrides


def without(column: str) -> list[dict]:
    return [{k: v for k, v in row.items() if k != column} for row in ROWS[:5]]


FEW = [f"data.generate.{split}_problems=50" for split in ("sft", "rl", "evaluation_code")]
MISTAKES = {
    "misspelt key": (["grpo.step=3"], "did you mean 'steps'"),
    "misspelt section": (["lerner.ranks=2"], "did you mean 'learner'"),
    "group of one": (["grpo.samples_per_prompt=1"], "greater than or equal to 2"),
    "top-p": (["rollout.top_p=0.9"], "ratio undefined"),
    "beyond the context": (["rollout.max_model_len=4096"], "max_position"),
    "trace beyond the context": (["sft.max_length=4096"], "sft.max_length"),
    "no room for a prompt": (["rollout.max_response_tokens=112"], "no room"),
    "two models": (["model.path=x"], "exactly one of"),
    "heads that do not divide": (["rollout.tensor_parallel=3"], "sizes that work"),
    "more ranks than samples": (["learner.ranks=1000"], "learner.ranks"),
    "a split without a file": (["data.generate=null", "data.rl=[no.parquet]"], "data.sft"),
    "no cpus left": (["rollout.actors=3", "cluster.num_cpus=2"], "are asked for"),
    "a name that is a path": (["name=../other"], "plain folder name"),
    "nothing to measure": (["evaluation.settings=[]"], "evaluation.settings"),
    "override without a value": (["grpo.steps"], "key=value"),
    "held-out prompts too long": (
        [*FEW, "rollout.max_model_len=65"],
        "data.evaluation: expected prompts of at most 1 tokens",
    ),
    "traces too long": (
        [*FEW, "sft.max_length=4"],
        "data.sft: expected prompts of at most 3 tokens",
    ),
    "GPUs that are not there": (["rollout.num_gpus=64"], "this machine has"),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_settings(h1r, tmp_path, command, mistake):
    overrides, word = MISTAKES[mistake]
    code, error, _ = h1r(command, *overrides)
    assert code == 2 and word in error, error
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert not list((tmp_path / "runs").glob("*"))


BAD_DATA = {
    "missing column": ({"rl": without("ground_truth")}, "column 'ground_truth'"),
    "empty split": (
        {"rl": [], "schema": pa.Table.from_pylist(ROWS).schema},
        "data.rl: expected rows, found none",
    ),
    "nothing to verify against": (
        {"rl": [row | {"ground_truth": "\\frac{1}{"} for row in ROWS[20:30]]},
        "expected at least one usable row",
    ),
    "too many without a usable ground truth": (
        {"rl": [*ROWS[20:24], ROWS[24] | {"ground_truth": "\\frac{1}{"}]},
        "found 1 of 5 (1 unparsable; the first: row 4 (p24): unparsable ground truth",
    ),
    "content that is no text": (
        {"rl": [row | {"messages": [{"role": "user", "content": 5}]} for row in ROWS[20:30]]},
        "10 content_not_text",
    ),
    "turns without a role": (
        {"rl": [row | {"messages": [{"content": "1"}]} for row in ROWS[20:30]]},
        "10 turn_without_role",
    ),
    "a verifier that is none": ({"rl": [row | {"verifier": 5} for row in ROWS[20:30]]}, "'5'"),
    "prompts too long": (
        {"rl": [row | {"messages": "7+" * 99 + row["prompt_id"]} for row in ROWS[20:30]]},
        "data.rl: expected prompts of at most 48 tokens, found none among 10 (shortest 216)",
    ),
    "a question in two splits": ({"rl": ROWS[:9]}, "expected disjoint splits"),
    "one id twice": ({"rl": [ROWS[1], ROWS[1] | {"messages": ROWS[4]["messages"]}]}, "p1"),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("mistake", BAD_DATA, ids=str)
def test_data(h1r, tmp_path, command, mistake):
    changes, words = BAD_DATA[mistake]
    code, error, _ = h1r(command, *files(tmp_path, **changes))
    assert code == 2 and words in error, error
    assert error.splitlines()[-1].startswith("error: ")
    assert not list((tmp_path / "runs").glob("*")), "a mended run may use the name"


BROKEN_FILES = {
    "junk.parquet": (b"this is no parquet", "cannot be read"),
    "void.parquet": (b"", "cannot be read"),
    "torn.parquet": (None, "cannot be read"),
    "junk.jsonl": (b"{oops\n", "cannot be read"),
    "bytes.jsonl": (b"\xff\xfe", "cannot be read"),
    "list.jsonl": (b"[1, 2]\n", "a JSON object a line"),
    "null.jsonl": (b"null\n", "a JSON object a line"),
    "void.jsonl": (b"\n", "expected rows, found none"),
    "table.csv": (b"a,b\n1,2\n", "expected .parquet files or .jsonl files"),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("name", BROKEN_FILES, ids=str)
def test_files_that_cannot_be_read(h1r, tmp_path, command, name):
    content, words = BROKEN_FILES[name]
    overrides = files(tmp_path)
    whole = (tmp_path / "rl.parquet").read_bytes()
    (tmp_path / name).write_bytes(whole[:-9] if content is None else content)
    code, error, _ = h1r(command, *overrides, f"data.rl=[{tmp_path / name}]")
    assert code == 2 and words in error and name in error, error
    assert error.count("\n") == 1 and error.startswith("error: data.rl: ")
    assert not (tmp_path / "runs").exists()


MISSING = {
    **{f"data.{s}": f"data.{s}=[no.parquet]" for s in ("sft", "rl", "evaluation")},
    "data.evaluation_code": "data.evaluation_code=[no.parquet]",
    "model.path": "model.path=no-model",
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("setting", MISSING, ids=str)
def test_a_missing_file_is_named(h1r, tmp_path, command, setting):
    more = ["model.tiny=null"] if setting == "model.path" else []
    code, error, _ = h1r(command, *files(tmp_path), *more, MISSING[setting])
    name = "" if setting == "model.path" else f"{setting}: "
    assert code == 2 and error.startswith(f"error: {name}expected "), error
    assert MISSING[setting].split("=")[1].strip("[]") in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_lines_that_leave_out_what_is_null(h1r, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "ground_truth"} for row in ROWS[1:2]]
    rows += ROWS[4::3]
    (tmp_path / "rl.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    code, error, out = h1r("check", *files(tmp_path), f"data.rl=[{tmp_path / 'rl.jsonl'}]")
    assert code == 0, error
    assert "data.rl: 12 problems, 1 left out: empty_ground_truth" in out


def test_a_row_without_a_usable_ground_truth_is_left_out_and_counted(h1r, tmp_path):
    rl = [*ROWS[1::3], ROWS[0] | {"prompt_id": "bad", "ground_truth": "\\frac{1}{"}]
    rl[-1] = rl[-1] | {"messages": [{"role": "user", "content": "bad"}]}
    code, error, out = h1r("check", *files(tmp_path, rl=rl))
    assert code == 0, error
    assert "data.rl: 13 problems, 1 left out: unparsable (the first: row 13 (bad): unpars" in out


def test_a_tokenizer_without_a_chat_template(h1r, tmp_path, tiny_model_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for command in ("check", "run"):
        code, error, _ = h1r(command, "model.tiny=null", f"model.path={folder}")
        assert code == 2 and "chat template" in error
        assert not (tmp_path / "runs").exists()


def put(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


BROKEN_MODELS = {
    "settings that are no JSON": (put("config.json", "{"), "expected JSON"),
    "settings that are a list": (put("config.json", "[]"), "expected a JSON object"),
    "another family": (put("config.json", '{"model_type": "llama"}'), "found 'llama'"),
    "weights that are torn": (put("model.safetensors", "x"), "expected whole safetensors"),
    "weights that are not there": (
        lambda folder: (folder / "model.safetensors").unlink(), "expected *.safetensors"
    ),
    "shards that are not there": (
        put("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}'), "gone"
    ),
    "a tokenizer that is torn": (put("tokenizer.json", "{}"), "expected a tokenizer"),
    "a template that is torn": (put("chat_template.jinja", "{{ messages["), "TemplateSyntaxError"),
    "a template for nobody": (put("chat_template.jinja", "hello"), "writes the user's text"),
    "generation settings torn": (put("generation_config.json", "{"), "generation_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("mistake", BROKEN_MODELS, ids=str)
def test_model_folders(h1r, tmp_path, tiny_model_folder, command, mistake):
    spoil, words = BROKEN_MODELS[mistake]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    spoil(folder)
    code, error, _ = h1r(command, "model.tiny=null", f"model.path={folder}")
    assert code == 2 and words in error and str(folder) in error, error
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "runs").exists()


def test_a_context_smaller_than_what_is_asked(h1r, tiny_model_folder):
    code, error, _ = h1r(
        "check", "model.tiny=null", f"model.path={tiny_model_folder}", "rollout.max_model_len=4096"
    )
    assert code == 2 and "beyond the model's context of 512 tokens" in error


def test_a_model_with_experts(h1r, tmp_path):
    settings = {"model_type": "granitemoehybrid", "num_local_experts": 64}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    code, error, _ = h1r("check", "model.tiny=null", f"model.path={tmp_path}")
    assert code == 2 and "experts are not carried yet" in error


def test_a_port_in_use(h1r, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for command in ("check", "run"):
            code, error, _ = h1r(command, *files(tmp_path), f"cluster.dashboard_port={port}")
            assert code == 2 and f"{port} is in use" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists() and not (tmp_path / "mlflow.db").exists()


def test_an_output_that_cannot_be_made(h1r):
    code, error, _ = h1r("run", "output=/proc/nowhere")
    assert code == 2 and "cannot be made" in error


@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_a_stage_alone_without_its_section(h1r, tmp_path, command):
    code, error, _ = h1r(command, f"{command}=null")
    assert code == 2 and f"a section '{command}'" in error
    assert not (tmp_path / "runs").exists()


def test_grpo_alone_before_sft(h1r, tmp_path):
    code, error, _ = h1r("grpo")
    assert code == 2 and "run `h1r sft` first" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["resolved.yaml", "state.json"])
def test_a_run_whose_own_files_are_torn(h1r, tmp_path, name):
    from cluster.pipeline import with_absolute_paths
    from cluster.run_folder import RunFolder
    from h1r_rl.config.load import load_run

    where = (f"output={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    folder = RunFolder.claim(with_absolute_paths(load_run(RUN, where)), resume=False)
    folder.release()
    (folder.path / name).write_text("{")
    code, error, _ = h1r("run", "--resume")
    assert code == 2 and str(folder.path / name) in error and "choose another name=" in error
    assert error.count("\n") == 1 and (folder.path / name).read_text() == "{"


def test_a_tracking_store_that_is_none(h1r, tmp_path):
    for uri in ("foo://x", f"sqlite:///{RUN}"):
        code, error, _ = h1r("run", *files(tmp_path), f"tracking.uri={uri}")
        assert code == 2 and error.splitlines()[-1].startswith("error: tracking.uri: expected")
        assert len(error.splitlines()[-1]) < 600
        assert not list((tmp_path / "runs").glob("*"))


def test_a_folder_with_something_else_in_it(h1r, tmp_path):
    folder = tmp_path / "runs" / "tiny-cpu"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    code, error, _ = h1r("run")
    assert code == 2 and "thesis.tex" in error
    assert [f.name for f in folder.iterdir()] == ["thesis.tex"]


def test_a_second_run_in_one_folder(h1r, tmp_path):
    folder = tmp_path / "runs" / "tiny-cpu"
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text("name: other\n")
    for extra in ((), ("--resume",)):
        code, error, _ = h1r("run", *extra)
        assert code == 2 and "choose another name=" in error
    assert (folder / "resolved.yaml").read_text() == "name: other\n"
    assert [f.name for f in folder.iterdir()] == ["resolved.yaml"]


def test_ctrl_c_is_told(h1r, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.check_data.check_files", interrupted)
    code, error, _ = h1r("check")
    assert (code, error) == (130, "stopped\n")
