"""YAML plus `key=value` overrides to a checked `RunConfig`.

Invariant: whatever is wrong, the user sees one `ConfigError` with the place, what was found, and
the nearest valid name for a misspelt key; never a validation trace.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from h1r_rl.config.checks import check_run
from h1r_rl.config.schema import RewardConfig, RunConfig
from h1r_rl.errors import ConfigError
from h1r_rl.grpo.presets import apply_preset

SHOWN_CHARS = 100  # of what was found
PLAINLY = {  # pydantic's words for what is no mapping, list or path in YAML
    "model_type": "a section of settings",
    "tuple_type": "a list",
    "path_type": "a path",
    "too_short": "at least one entry",
}


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override (`grpo.steps=3`), apply the preset, validate, check across fields."""
    raw = _read(path)
    for override in overrides:
        _apply_override(raw, override)
    return build_run(raw, source=str(path))


def _read(path: Path) -> dict[str, Any]:
    advice = "; give a YAML file such as cluster/runs/tiny-cpu.yaml"
    try:
        raw = yaml.load(path.read_text(), Loader=_NoDuplicates)
    except FileNotFoundError:
        raise ConfigError(f"expected a run file, but {path} does not exist{advice}") from None
    except (OSError, UnicodeDecodeError) as error:
        why = _short(str(error))
        raise ConfigError(f"expected a run file, but it cannot be read ({why}){advice}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be a run file{advice}") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(f"{path}: expected a mapping of sections, found {found}{advice}")
    return raw


def build_run(raw: dict[str, Any], *, source: str) -> RunConfig:
    """Validate an already parsed mapping; `source` names it in errors."""
    if isinstance(raw.get("grpo"), dict):
        raw = raw | {"grpo": apply_preset(raw["grpo"])}
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explained(error.errors())}") from None
    check_run(config)
    return config


def load_reward(overrides: Sequence[str]) -> RewardConfig:
    """The reward section alone, from defaults and overrides such as `reward.timeout_s=2`."""
    raw: dict[str, Any] = {}
    for override in overrides:
        _apply_override(raw, override)
    if set(raw) - {"reward"}:
        raise ConfigError(
            f"expected settings of the reward section (reward.timeout_s=2), found '{min(raw)}'"
        )
    try:
        return RewardConfig.model_validate(raw.get("reward", {}))
    except ValidationError as error:
        errors = [e | {"loc": ("reward", *e["loc"])} for e in error.errors()]
        raise ConfigError(_explained(errors)) from None


def dump_run(config: RunConfig) -> str:
    """The resolved run as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _NoDuplicates(yaml.SafeLoader):
    """A key given twice is a mistake, not a choice of the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            if isinstance(key, Hashable):  # else PyYAML itself refuses it, with its place
                seen.add(key)
        return super().construct_mapping(node, deep)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"expected key=value (such as grpo.steps=3), found '{override}'")
    *sections, leaf = key.split(".")
    node = raw
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"override '{override}': {section} is not a section")
    try:
        node[leaf] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(
            f"override '{_short(override)}': the value is not valid YAML; put text in quotes"
        ) from None


def _explained(errors: Sequence[Any]) -> str:
    """All mistakes in one line; what only follows from a mistake further in is left out."""
    places = [error["loc"] for error in errors]
    lines = [
        _explain(error)
        for error in errors
        if not any(place != error["loc"] == place[: len(error["loc"])] for place in places)
    ]
    return "; ".join(dict.fromkeys(lines))


def _explain(error: Any) -> str:
    place, model, about = _whereabouts(error["loc"])
    known = list(model.model_fields)
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        close = difflib.get_close_matches(name.strip().lower(), known, n=1)
        close = close or sorted(p for p in _places(RunConfig) if p.rpartition(".")[2] == name)[:1]
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
        return f"unknown key '{'.'.join([*place, name])}'; {hint}"
    if error["type"] == "invalid_key":
        return f"unknown key {error['loc'][-1]}; known: {', '.join(known)}"
    where, hint = f"'{'.'.join(place)}'", f" ({about})" if about else ""
    if error["type"] == "missing":
        return f"{where} is missing; set it{hint}"
    said = (PLAINLY.get(error["type"]) or str(error["msg"])).removeprefix("Value error, ")
    if "found" not in said:  # a field's own check may have said it all
        said = f"expected {said.removeprefix('Input should be ')}"
        said += f", found {_short(repr(error['input']))}"
    return f"{where}: {said}; correct it{hint}"


def _whereabouts(location: Sequence[Any]) -> tuple[list[str], type[BaseModel], str]:
    """Keys on the way to a place (the branches of a union are none), the section that they lead
    into, and what the last one means."""
    model: type[BaseModel] = RunConfig
    place: list[str] = []
    about = ""
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            about = " ".join((field.description or "").split()).rstrip(".")
            nested = [t for t in _types_in(field.annotation) if issubclass(t, BaseModel)]
            model = nested[0] if nested else model
        if field is not None or isinstance(part, int):
            place.append(str(part))
    return place, model, about


def _places(model: type[BaseModel], place: str = "") -> Iterator[str]:
    """Every key below a section: "grpo", "grpo.steps", ..."""
    for name, field in model.model_fields.items():
        yield place + name
        for nested in _types_in(field.annotation):
            if issubclass(nested, BaseModel):
                yield from _places(nested, f"{place}{name}.")


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."


def _types_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [t for argument in get_args(annotation) for t in _types_in(argument)]
