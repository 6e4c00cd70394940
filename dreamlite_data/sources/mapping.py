"""Named column mappings: data files that say which column of a data set is the source image, the instruction, the edit type and so on.
Adding a data set means adding a YAML file; what turns rows into records by it is `mapped.py`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import yaml
from pydantic import Field, ValidationError, field_validator

from dreamlite_data.strict_settings import StrictSettings

UNROLLED = ("item", "turn", "previous")
"""Columns that unrolling adds to a row."""
READER_VERSION = 1
"""Raised when the same mapping and file give other records than before; part of every unit's digest."""

PACKAGED = "mappings"
Column = tuple[str, ...]
"""Alternatives, the first that a row holds counts. Each is a column name, a path into one ('data.prompt', 'files[id=final].url',
'prompts[0]', 'prompts[longest]'), or '=text' for a constant; a last '?' says that a file may lack them all."""

_STEP = re.compile(r"\.(?P<name>[^.\[\]]+)|\[(?P<pick>[^\]]+)\]")


class MappingError(ValueError):
    """A mapping cannot be read, or does not fit a file; the message says which column and what was probably meant."""


class MaskColumn(StrictSettings):
    """A mask image and what marks the edited region in it."""

    column: Column
    marks: Literal["white", "black", "transparent"] = "white"

    _as_column = field_validator("column", mode="before")(lambda value: _column(value))


class SampleFiles(StrictSettings):
    """A folder per sample: `shared` (JSON) holds what all its rows have in common, `rows` (JSON lines) a row each, and `images` are
    file names with {column} in them, under the column name they are mapped by."""

    shared: str | None = None
    rows: str | None = None
    images: dict[str, str]


class Mapping(StrictSettings):
    """One data set. Fields that hold a column take a name or a list of alternatives (see `Column`)."""

    name: str
    origin: str | None = None
    licence: str | None = None
    layouts: tuple[Literal["parquet", "huggingface", "jsonl", "webdataset", "sample_folders"], ...]
    task: Literal["generate", "edit", "preference"]
    samples: SampleFiles | None = None
    unroll: str | None = None
    """A column with a list: each item becomes a row, with `turn` (from 1) and `previous` beside its fields (or its value as `item`)."""
    key: Column = ()
    images: dict[Literal["image", "source", "target", "left", "right"], Column]
    mask: MaskColumn | None = None
    instruction: Column = ()
    forms: dict[str, Column] = Field(default_factory=dict)
    inverse_instruction: Column = ()
    """Words for the way back: each row then gives a second record with source and target exchanged."""
    edit_type: Column = ()
    edit_types: dict[str, str] = Field(default_factory=dict)
    """The provider's label -> another, for labels that say nothing as they are; what labels mean is the taxonomy's business."""
    session: Column = ()
    turn: Column = ()
    caption: Column = ()
    captions: dict[Literal["source", "target"], Column] = Field(default_factory=dict)
    url: Column = ()
    licence_column: Column = ()
    origin_column: Column = ()
    """Appended to `origin`: the set that a collection took the row from."""
    scores: dict[str, Column] = Field(default_factory=dict)
    canary: Column = ()
    preference: dict[
        Literal["vote", "left_model", "right_model", "left_follow", "right_follow", "left_quality", "right_quality"], Column
    ] = Field(default_factory=dict)
    votes: dict[str, Literal["left", "right", "tie"]] = Field(default_factory=dict)

    @field_validator(
        "key", "instruction", "inverse_instruction", "edit_type", "session", "turn", "caption", "url", "licence_column", "origin_column",
        "canary", mode="before",
    )  # fmt: skip
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        return _column(value)

    @field_validator("images", "forms", "captions", "scores", "preference", mode="before")
    @classmethod
    def _named_columns(cls, value: Any) -> Any:
        return {name: _column(column) for name, column in value.items()} if isinstance(value, dict) else value

    @field_validator("scores", mode="before")
    @classmethod
    def _scores_by_column_name(cls, value: Any) -> Any:
        return {name.rstrip("?"): name for name in value} if isinstance(value, list) else value

    def columns(self) -> Iterator[tuple[str, Column]]:
        """(field, column) of everything that is mapped."""
        for field, value in self:
            if field in ("layouts",) or not value:
                continue
            if isinstance(value, MaskColumn):
                yield "mask", value.column
            elif isinstance(value, dict) and field not in ("edit_types", "votes"):
                yield from ((f"{field}.{name}", column) for name, column in value.items())
            elif isinstance(value, tuple):
                yield field, value


def _column(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def load(name: str) -> Mapping:
    """The packaged mapping `name`, or the one in the YAML file at that path. Raises MappingError."""
    if name.endswith((".yaml", ".yml")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MappingError(f"the mapping {name} cannot be read: {error}") from None
    else:
        folder = resources.files("dreamlite_data.sources").joinpath(PACKAGED)
        known = packaged()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise MappingError(f"there is no mapping {name!r}: {hint} Or give the path of a .yaml file")
        text = folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    try:
        return Mapping.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise MappingError(f"the mapping {name} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MappingError(f"the mapping {name}{f', {where}' if where else ''}: {first['msg'].removeprefix('Value error, ')}") from None


def packaged() -> list[str]:
    """Names of the mappings that come with the package."""
    folder = resources.files("dreamlite_data.sources").joinpath(PACKAGED)
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def check(mapping: Mapping, names: Iterable[str], where: str, inner: Iterable[str] = ()) -> None:
    """Refuse a mapping that names a column which a file with columns `names` lacks; `inner` are the fields of the items of an unrolled
    column. Raises MappingError with the nearest name."""
    have = list(names)
    if mapping.unroll is not None:
        _require(mapping, "unroll", (mapping.unroll,), have, where)
        have += [*inner, *UNROLLED]
    for field, column in mapping.columns():
        _require(mapping, field, column, have, where)


def check_schema(mapping: Mapping, schema: pa.Schema, where: str) -> None:
    """`check` against the columns of an Arrow schema."""
    inner: list[str] = []
    if mapping.unroll in schema.names:
        kind = schema.field(mapping.unroll).type
        item = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
        inner = [field.name for field in item] if item is not None and pa.types.is_struct(item) else []
    check(mapping, schema.names, where, inner)


def check_rows(mapping: Mapping, rows: list[dict[str, Any]], where: str) -> None:
    """`check` against the columns that any of the first rows of a file has."""
    items = [item for row in rows for item in (row.get(mapping.unroll) or ()) if isinstance(item, dict)] if mapping.unroll else []
    check(mapping, dict.fromkeys(name for row in rows for name in row), where, dict.fromkeys(name for item in items for name in item))


def needed(mapping: Mapping, names: Iterable[str]) -> list[str]:
    """Those of the columns `names` that the mapping reads, in their order."""
    wanted = {mapping.unroll} if mapping.unroll else set()
    for _, column in mapping.columns():
        wanted |= {name.rstrip("?") for name in column} | {top_level(name) for name in column}
    return [name for name in names if name in wanted]


def _require(mapping: Mapping, field: str, column: Column, have: list[str], where: str) -> None:
    if any(name.endswith("?") or name.startswith("=") for name in column):
        return
    if any(name in have or top_level(name) in have for name in column):
        return
    wanted = column[0] if len(column) == 1 else f"any of {', '.join(column)}"
    near = next((found[0] for name in column if (found := difflib.get_close_matches(top_level(name), have, n=1, cutoff=0.5))), None)
    hint = f"did you mean {near!r}?" if near else f"its columns are {', '.join(map(repr, have)) or 'none'}"
    raise MappingError(f"the mapping {mapping.name!r} takes {field} from column {wanted!r}, which {where} lacks: {hint}")


def top_level(name: str) -> str:
    """The column that a path starts in."""
    return re.split(r"[.\[]", name.rstrip("?"), maxsplit=1)[0]


def lookup(row: dict[str, Any], column: Column) -> Any:
    """The value of the first alternative that `row` holds; None where it holds none."""
    for name in column:
        if name.startswith("="):
            return name[1:]
        found = _follow(row, name.rstrip("?"))
        if found is not None:
            return found
    return None


def _follow(row: dict[str, Any], name: str) -> Any:
    if "{" in name:
        name = re.sub(r"\{(\w+)\}", lambda match: str(row.get(match.group(1), "")), name)
    if name in row:
        return row[name]
    first = top_level(name)
    value = row.get(first)
    for step in _STEP.finditer(name, len(first)):
        if value is None:
            return None
        value = _step(value, step)
    return value


def _step(value: Any, step: re.Match[str]) -> Any:
    if step["name"] is not None:
        return value.get(step["name"]) if isinstance(value, dict) else None
    if not isinstance(value, (list, tuple)):
        # A provider that has one wording writes it bare, one that has several writes a list: [0] of a bare value is itself.
        return value if step["pick"] in ("0", "-1", "longest", "shortest") else None
    pick = step["pick"]
    if pick in ("longest", "shortest"):
        texts = [item for item in value if isinstance(item, str)]
        return (max if pick == "longest" else min)(texts, key=len, default=None)
    if "=" in pick:
        field, _, wanted = pick.partition("=")
        return next((item for item in value if isinstance(item, dict) and str(item.get(field)) == wanted), None)
    index = int(pick) if re.fullmatch(r"-?\d+", pick) else len(value)
    return value[index] if -len(value) <= index < len(value) else None
