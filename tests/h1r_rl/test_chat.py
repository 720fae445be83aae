"""Prompt ids of SFT are those of generation; template and end tokens come from the folder."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from h1r_rl.data.chat import end_token_id, end_token_ids, load_tokenizer, make_prompt, response_ids
from h1r_rl.data.sources import Problem
from h1r_rl.errors import DataError
from h1r_rl.hybrid.tiny import build_tokenizer

USER = {"role": "user", "content": "7+8"}
PROBLEM = Problem("p", (USER,), "math", "5")
ANSWER = "<think>7+8=5</think>\\boxed{5}"


@pytest.fixture()
def folder(tmp_path):
    build_tokenizer(max_position=512).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [258]}))
    return tmp_path / "m"


def test_prompt_and_response_make_the_templates_own_conversation(folder):
    """An independent path: the template rendering the finished conversation."""
    tokenizer = load_tokenizer(folder)
    prompt = make_prompt(tokenizer, PROBLEM, system_prompt=None, pass_index=2)
    ids = [*prompt.token_ids, *response_ids(tokenizer, ANSWER)]
    whole = tokenizer.apply_chat_template(
        [USER, {"role": "assistant", "content": ANSWER}], return_dict=False
    )
    assert ids + tokenizer.encode("\n", add_special_tokens=False) == whole
    assert prompt.token_ids.tolist() == tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, return_dict=False
    )
    assert (prompt.key, prompt.question, prompt.ground_truth) == ("p/2", "7+8", "5")


def test_end_token_is_the_one_the_template_writes(folder):
    """A folder whose settings name another token first, as real ones do."""
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_ids_to_tokens(end_token_id(tokenizer)) == "<|im_end|>"
    assert end_token_ids(tokenizer) == (258, end_token_id(tokenizer))


def test_end_token_is_one_the_engine_stops_at(folder):
    """The template's turn end is no end token of this folder: training must not teach it."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|end_of_text|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert end_token_ids(tokenizer) == (258,)
    assert response_ids(tokenizer, "x")[-1] == 258


def test_system_prompt(folder):
    tokenizer = load_tokenizer(folder)

    def text(messages, system_prompt):
        problem = Problem("p", messages, "math", "5")
        return tokenizer.decode(
            make_prompt(tokenizer, problem, system_prompt=system_prompt).token_ids
        )

    assert text((USER,), "Think.").startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>u")
    own = ({"role": "system", "content": "Mine."}, USER)
    assert "Mine." in text(own, "Think.") and "Think." not in text(own, "Think.")
    assert text((USER,), None).startswith("<|im_start|>system\nYou are H1R, ")  # the template's own


def test_tokenizer_without_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    with pytest.raises(DataError, match="chat template, found none"):
        load_tokenizer(folder)


def test_missing_tokenizer_is_refused(folder, tmp_path):
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(DataError, match="expected a tokenizer"):
        load_tokenizer(folder)
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
