"""Hugging Face folders of every hybrid family in and out: loaded, trained a step, exported with the
learner's bits, and loaded again by transformers as it is."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from h1r_rl.hybrid.load import load_policy
from learners.deepspeed_engine import PolicyLogprobs
from learners.export import export_folder
from learners.model_card import front_matter
from learners.weight_sender import manifest_of

pytestmark = pytest.mark.usefixtures("one_rank")
FORMATS = runpy.run_path(str(Path(__file__).parents[1] / "hybrid_formats.py"))
LENGTHS = (1, 17, 5, 9)
TEMPERATURE = 0.8


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 250, (sum(LENGTHS),), generator=generator)
    starts = torch.tensor((0, *LENGTHS)).cumsum(0)
    positions = torch.tensor([i for i in range(len(ids)) if i not in starts.tolist()])
    return ids, starts, positions


def logprobs_one_by_one(model, ids, starts, positions) -> torch.Tensor:
    """transformers' own model and logits, a document at a time."""
    found = torch.zeros(len(ids), dtype=torch.float64)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if end - start > 1:
            logits = model(ids[None, start:end], use_cache=False).logits[0].double() / TEMPERATURE
            chosen = logits.log_softmax(-1)[:-1].gather(1, ids[start + 1 : end, None])
            found[start + 1 : end] = chosen.squeeze(1)
    return found[positions]


@pytest.mark.parametrize("name", FORMATS["MODELS"])
def test_folder_in_a_step_and_folder_out(name, tmp_path):
    source, target = tmp_path / "base", tmp_path / "trained"
    FORMATS["write_folder"](name, source)
    policy = PolicyLogprobs(load_policy(source), temperature=TEMPERATURE, chunk_tokens=8)
    named = dict(policy.model.named_parameters())
    before = {n: p.detach().clone() for n, p in named.items()}
    adam = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    given = batch()
    (-policy(*given)[0].mean()).backward()
    adam.step()
    still = [n for n, p in named.items() if torch.equal(p, before[n])]
    assert not still  # every parameter is in the graph of the packed pass

    export_folder(policy.model, source, target, sharded=False)
    model = FORMATS["transformers_model"](target)
    again = dict(model.named_parameters())
    assert again.keys() == named.keys()
    assert all(torch.equal(again[n], p) for n, p in named.items())
    with torch.no_grad():
        ours, theirs = policy(*given)[0], logprobs_one_by_one(model, *given)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-5)
    sent = {spec.name for spec in manifest_of(policy.model, 2**20).parameters}
    on_disk = load_file(target / "model.safetensors")
    assert len(sent) == len(on_disk) == len(named)
    assert set(load_file(source / "model.safetensors")) == set(on_disk)


def test_export_keeps_what_lay_beside_the_weights(tmp_path):
    source, target, last = (tmp_path / n for n in ("base", "trained", "again"))
    FORMATS["write_folder"]("0.5B", source)
    model = load_policy(source)
    export_folder(model, source, target, sharded=False)
    export_folder(model, target, last, sharded=False)
    for folder in (target, last):
        assert (folder / "notes.json").read_text() == "{}"
        assert (folder / "LICENSE").is_file()
        assert (folder / "BASE_MODEL_CARD.md").read_text().endswith("# A base model\n")
        card = front_matter(folder)
        assert (card["base_model"], card["license"]) == ("base", "mit")
        assert AutoTokenizer.from_pretrained(folder).chat_template


def test_remote_code_only_when_asked(tmp_path, monkeypatch):
    """A folder that brings its own model class: refused, and run only on the explicit word."""
    import json

    FORMATS["write_folder"]("0.5B", tmp_path / "base")
    config_file = tmp_path / "base" / "config.json"
    config = json.loads(config_file.read_text())
    config |= {
        "model_type": "elsewhere",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    config_file.write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "base" / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nraise RuntimeError('own code')\n"
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(Exception, match="trust_remote_code"):
        load_policy(tmp_path / "base")
    assert not ran.exists()
    with pytest.raises(Exception, match="own code"):
        load_policy(tmp_path / "base", trust_remote_code=True)
    assert ran.exists()
