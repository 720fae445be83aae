"""README.md of an exported model: what it was made from, under which licence.

Invariant: nothing is claimed that the source folder does not say. A licence comes from the source's
card, else from a licence file beside it, else it is said to be unknown; the base model stays the
first one however many stages export one after another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
BASE_CARD = "BASE_MODEL_CARD.md"  # the source's own card, kept word for word
OURS = "h1r-rl"  # tag of a card that was written here
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
LICENCE_KEYS = ("license", "license_name", "license_link")


def model_card(source: Path, model_type: str) -> str:
    """The card of a model trained from the one in `source`; front matter as model hubs read it."""
    known = front_matter(source)
    ours = OURS in (known.get("tags") or ())
    base = known.get("base_model") if ours else None
    base = base or source.resolve().name
    header = {
        "base_model": base,
        **_licence(source, known),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [OURS, "reinforcement-learning", model_type],
    }
    said = header["license"]
    terms = {
        "unknown": "unknown: the base model's folder names none; ask its publisher before use",
        "other": f"the base model's: {header.get('license_link') or header.get('license_name')}",
    }.get(said, f"the base model's: {said}")
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# {source.resolve().name}, trained further\n\n"
        f"- Base model: {base}\n"
        f"- Licence: {terms}\n"
        f"- Trained with h1r-rl. Tokenizer, chat template and generation settings are the base's.\n"
    )


def front_matter(folder: Path) -> dict[str, Any]:
    """The YAML header of a folder's card; empty where there is none that can be read."""
    card = folder / CARD
    if not card.is_file():
        return {}
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return {}
    try:
        header = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError:
        return {}
    return header if isinstance(header, dict) else {}


def _licence(source: Path, known: dict[str, Any]) -> dict[str, Any]:
    if known.get("license"):
        return {key: known[key] for key in LICENCE_KEYS if known.get(key)}
    for name in LICENCE_FILES:
        if (source / name).is_file():
            return {"license": "other", "license_name": "base-model", "license_link": name}
    return {"license": "unknown"}
