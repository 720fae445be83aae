"""Every setting of a run file, with its type, default and meaning, from the schema itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from h1r_rl.config.schema import RunConfig
from h1r_rl.errors import ConfigError


def settings_table(section: str) -> Any:
    """A rich table of the settings under `section` ("" for all, such as "grpo.optimizer")."""
    from rich.table import Table

    rows = [row for row in _rows(RunConfig, "") if not section or _under(row[0], section)]
    if not rows:
        raise ConfigError(
            f"expected a section of a run file, found '{section}'; "
            f"there are {', '.join(RunConfig.model_fields)}"
        )
    table = Table(show_lines=False)
    for column in ("setting", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "setting")
    for row in rows:
        table.add_row(*row)
    return table


def _under(name: str, section: str) -> bool:
    return name == section or name.startswith(section + ".")


def _rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        nested = [t for t in (field.annotation, *get_args(field.annotation)) if _is_section(t)]
        if nested:
            yield from _rows(nested[0], f"{prefix}{name}.")
            continue
        default = "required" if field.default is PydanticUndefined else str(field.default)
        yield f"{prefix}{name}", default, field.description or ""


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
