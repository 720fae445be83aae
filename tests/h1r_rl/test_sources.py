"""What a split yields is complete; what is not is refused or quarantined, and the user is told."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from h1r_rl.config.schema import DataConfig
from h1r_rl.data.sources import check_disjoint, load_problems
from h1r_rl.errors import DataError


def rows(count=4, prefix="p", **extra):
    return [
        {"prompt_id": f"{prefix}{i}", "messages": [{"role": "user", "content": f"{prefix}{i}+1"}],
         "response": f"<think></think>{i}", "ground_truth": str(i), **extra}
        for i in range(count)
    ]  # fmt: skip


def write(path, content):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def load(tmp_path, content, name="rl", suffix=".parquet", check=None, **columns):
    return load_files(
        tmp_path, [write(tmp_path / f"{name}{suffix}", content)], name, check, **columns
    )


def load_files(tmp_path, files, name="rl", check=None, **columns):
    return load_problems(
        files, DataConfig(**columns), split=name, cache=tmp_path / "run",
        need_response=name == "sft", check_ground_truths=check,
    )  # fmt: skip


def each(check):
    """A batch check from one of a single pair."""
    return lambda pairs: [check(*pair) for pair in pairs]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_come_back_whole(tmp_path, suffix):
    split = load(tmp_path, rows(verifier="choice"), suffix=suffix)
    assert len(split.rows) == 4 and not split.quarantined
    row = split.rows[2]
    assert (row.prompt_id, row.question, row.ground_truth) == ("p2", "p2+1", "2")
    assert row.verifier == "choice" and row.messages == ({"role": "user", "content": "p2+1"},)
    assert [r.prompt_id for r in split.rows] == ["p0", "p1", "p2", "p3"]
    assert [r.prompt_id for r in split.rows[1:3]] == ["p1", "p2"] and split.rows[-1] == split.rows[
        3
    ]
    assert not (tmp_path / "run" / "rl-quarantine.jsonl").exists()


def test_rows_are_memory_mapped_in_the_cache(tmp_path):
    table = load(tmp_path, rows()).rows._table
    files = [Path(entry["filename"]) for entry in table.cache_files]
    assert files and all(file.is_relative_to(tmp_path / "run") for file in files)


def test_column_mapping_plain_text_numbers_and_default_verifier(tmp_path):
    content = [{"uid": 7, "question": "1+1", "answer": 2, "noise": None}]
    split = load(
        tmp_path, content, id_column="uid", prompt_column="question", ground_truth_column="answer",
        default_verifier="choice",
    )  # fmt: skip
    row = split.rows[0]
    assert (row.prompt_id, row.ground_truth, row.verifier) == ("7", "2", "choice")
    assert row.messages == ({"role": "user", "content": "1+1"},)


def test_several_files_are_one_split(tmp_path):
    a, b = (write(tmp_path / f"{n}.parquet", rows(3, n)) for n in "ab")
    split = load_files(tmp_path, [a, b])
    assert [r.prompt_id for r in split.rows] == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_bad_rows_are_quarantined_with_reasons(tmp_path):
    content = rows(7)
    content[1]["messages"] = None
    content[2]["ground_truth"] = " "
    content[3]["messages"] = [{"role": "assistant", "content": "hm"}]
    content[4]["messages"] = [{"role": "user", "content": ""}]
    content[5]["ground_truth"] = "???"
    split = load(
        tmp_path, content, check=each(lambda _, truth: "unparsable" if "?" in truth else None)
    )
    assert [r.prompt_id for r in split.rows] == ["p0", "p6"]
    assert split.quarantined == {
        "empty_prompt": 2, "empty_ground_truth": 1, "last_turn_not_user": 1, "unparsable": 1,
    }  # fmt: skip
    lines = (tmp_path / "run" / "rl-quarantine.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert listed[0] == {"row": 1, "prompt_id": "p1", "reason": "empty_prompt"}
    assert [r["row"] for r in listed] == [1, 2, 3, 4, 5]


def test_sft_needs_answers_and_no_ground_truth(tmp_path):
    content = [{k: v for k, v in row.items() if k != "ground_truth"} for row in rows(3)]
    content[0]["response"] = None
    split = load(tmp_path, content, name="sft")
    assert split.quarantined == {"empty_response": 1}
    assert split.rows[0].response == "<think></think>1"


def test_stale_quarantine_file_goes(tmp_path):
    content = rows(3)
    content[0]["ground_truth"] = None
    load(tmp_path, content)
    file = tmp_path / "run" / "rl-quarantine.jsonl"
    assert file.exists()
    load(tmp_path, rows(3))
    assert not file.exists()


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_changed_file_is_read_anew(tmp_path, suffix):
    assert len(load(tmp_path, rows(3), suffix=suffix).rows) == 3
    assert len(load(tmp_path, rows(5), suffix=suffix).rows) == 5


def test_missing_file_names_the_near_one(tmp_path):
    write(tmp_path / "train.parquet", rows())
    with pytest.raises(DataError, match=r"data\.rl.*trian\.parquet.*did you mean train"):
        load_files(tmp_path, [tmp_path / "trian.parquet"])


def test_missing_column_lists_what_is_there(tmp_path):
    with pytest.raises(
        DataError, match=r"'ground_truths'.*\['prompt_id', 'messages'.*did you mean"
    ):
        load(tmp_path, rows(), ground_truth_column="ground_truths")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_empty_split(tmp_path, suffix):
    file = tmp_path / f"rl{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows(1)).slice(0, 0), file)
    else:
        file.write_text("")
    with pytest.raises(DataError, match="expected rows, found none"):
        load_files(tmp_path, [file])


def test_nothing_usable(tmp_path):
    content = rows(3)
    for row in content:
        row["ground_truth"] = "?"
    with pytest.raises(DataError, match="3 unparsable"):
        load(tmp_path, content, check=each(lambda *_: "unparsable"))


def test_duplicate_ids(tmp_path):
    with pytest.raises(DataError, match="'p1' is used more than once"):
        load(tmp_path, [*rows(3), rows(2)[1]])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("rl.csv", "a", "expected .parquet files"), ("rl.parquet", "junk", "cannot be read"),
     ("rl.jsonl", "{broken\n", "cannot be read")],
)  # fmt: skip
def test_unreadable_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_files(tmp_path, [tmp_path / name])


def test_splits_that_share_a_problem_are_refused(tmp_path):
    rl = load(tmp_path, rows(3, "a"))
    check_disjoint([rl, load(tmp_path, rows(3, "b"), name="evaluation")])
    leaked = load(tmp_path, [*rows(2, "b"), rows(2, "a")[1]], name="evaluation")
    with pytest.raises(DataError, match=r"'a1\+1' \(a1\) is in rl and in evaluation"):
        check_disjoint([rl, leaked])


def test_several_traces_of_one_problem_are_fine(tmp_path):
    content = rows(2)
    content[1]["messages"] = content[0]["messages"]
    check_disjoint([load(tmp_path, content, name="sft")])


def test_more_rows_than_a_batch(tmp_path):
    """Validation, iteration and single access agree over batch borders."""
    content = rows(2500)
    content[1700]["ground_truth"] = None
    split = load(tmp_path, content)
    expected = [f"p{i}" for i in range(2500) if i != 1700]
    assert [p.prompt_id for p in split.rows] == expected
    assert split.rows[1999].prompt_id == expected[1999]
