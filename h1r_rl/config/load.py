"""YAML plus `key=value` overrides to a checked `RunConfig`.

Invariant: whatever is wrong, the user sees one `ConfigError` with the place, what was found, and
the nearest valid name for a misspelt key; never a validation trace.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from h1r_rl.config.checks import check_run
from h1r_rl.config.schema import RewardConfig, RunConfig
from h1r_rl.errors import ConfigError
from h1r_rl.grpo.presets import apply_preset


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override (`grpo.steps=3`), apply the preset, validate, check across fields."""
    try:
        raw = yaml.load(path.read_text(), Loader=_NoDuplicates)
    except FileNotFoundError:
        raise ConfigError(f"expected a run file, but {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a run file, but {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return build_run(raw, source=str(path))


def build_run(raw: dict[str, Any], *, source: str) -> RunConfig:
    """Validate an already parsed mapping; `source` names it in errors."""
    if isinstance(raw.get("grpo"), dict):
        raw = raw | {"grpo": apply_preset(raw["grpo"])}
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(e) for e in error.errors())) from None
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
        raise ConfigError("; ".join(_explain(e) for e in errors)) from None


def dump_run(config: RunConfig) -> str:
    """The resolved run as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _NoDuplicates(yaml.SafeLoader):
    """A key given twice is a mistake, not a choice of the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
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
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': the value is not valid YAML") from None


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, name = error["loc"]
        close = difflib.get_close_matches(str(name), _fields_at(parents), n=1)
        hint = (
            f"did you mean '{close[0]}'?" if close else f"known: {', '.join(_fields_at(parents))}"
        )
        return f"unknown key '{place}'; {hint}"
    if error["type"] == "missing":
        return f"'{place}' is missing"
    return f"'{place}': {error['msg'].lower()}, found {error['input']!r}"


def _fields_at(location: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            continue
        nested = [t for t in _types_in(field.annotation) if issubclass(t, BaseModel)]
        if nested:
            model = nested[0]
    return list(model.model_fields)


def _types_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [t for argument in get_args(annotation) for t in _types_in(argument)]
