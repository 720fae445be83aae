"""An exported card says what its source says about base model and licence, and no more."""

import pytest
import yaml

from learners.model_card import front_matter, model_card


def header(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def make(folder, card=None, licence=False):
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(card)
    if licence:
        (folder / "LICENSE").write_text("terms")
    return folder


def test_licence_of_the_sources_card(tmp_path):
    card = "---\nlicense: other\nlicense_name: falcon-llm-license\nlicense_link: L\n---\ntext"
    found = header(model_card(make(tmp_path / "base", card, licence=True), "falcon_h1"))
    assert found["license"] == "other" and found["license_name"] == "falcon-llm-license"
    assert found["license_link"] == "L" and found["base_model"] == "base"
    assert found["pipeline_tag"] == "text-generation" and "falcon_h1" in found["tags"]


@pytest.mark.parametrize("card", [None, "no header", "---\nnever: closed", "---\n: [\n---\n"])
def test_licence_file_else_unknown(tmp_path, card):
    with_file = header(model_card(make(tmp_path / "a", card, licence=True), "falcon_h1"))
    assert (with_file["license"], with_file["license_link"]) == ("other", "LICENSE")
    without = model_card(make(tmp_path / "b", card), "falcon_h1")
    assert header(without)["license"] == "unknown" and "Licence: unknown" in without


def test_base_model_survives_several_stages(tmp_path):
    first = model_card(make(tmp_path / "base", "---\nlicense: mit\n---\n"), "falcon_h1")
    second = model_card(make(tmp_path / "sft", first), "falcon_h1")
    assert header(second)["base_model"] == "base" and header(second)["license"] == "mit"
    stranger = make(tmp_path / "tuned", "---\nbase_model: someone/else\nlicense: mit\n---\n")
    assert header(model_card(stranger, "falcon_h1"))["base_model"] == "tuned"
    assert front_matter(tmp_path / "nowhere") == {}
