"""The union taxonomy of edit types: what a label of any set means, and how much of each type is wanted.
The mapping is data (taxonomy.yaml), versioned, and stands in the lake too, so that SQL can group by it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from dreamlite_data import schema

if TYPE_CHECKING:
    from dreamlite_data.lake import Lake

ANY = "any"
UNMAPPED = "unmapped"


class TaxonomyError(ValueError):
    """taxonomy.yaml does not say what it must; the message names the entry."""


@dataclasses.dataclass(frozen=True, order=True)
class EditType:
    """A place in the taxonomy; `unmapped/unmapped` is one too."""

    level1: str
    level2: str

    def __str__(self) -> str:
        return f"{self.level1}/{self.level2}"


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """The file, read. `labels` is keyed by (origin, label), `shares` by (mix, category): the share of all triplets wanted
    and the level1 names that belong there."""

    version: int
    digest: str
    levels: dict[str, tuple[str, ...]]
    labels: dict[tuple[str, str], EditType]
    shares: dict[tuple[str, str], tuple[float, tuple[str, ...]]]

    def edit_type(self, label: str | None, origin: str | None = None) -> EditType:
        """What `label` means when it comes from the data set, source or route `origin`; unmapped where nobody knows."""
        word, place = normalise(label), normalise(origin)
        named = [name for name, known in self.labels if known == word and name != ANY and place.startswith(name)]
        for name in (max(named, key=len, default=None), ANY):
            found = self.labels.get((name, word)) if name else None
            if found is not None:
                return found
        return EditType(UNMAPPED, UNMAPPED)

    def __contains__(self, kind: EditType) -> bool:
        return kind.level2 in self.levels.get(kind.level1, ())


def normalise(label: str | None) -> str:
    """A label or origin in lower case with every run of other characters as one underscore, as the view edit_types does."""
    return re.sub(r"[^a-z0-9]+", "_", (label or "").lower()).strip("_")


@functools.cache
def load_taxonomy() -> Taxonomy:
    """The packaged taxonomy. Raises TaxonomyError."""
    return read_taxonomy(resources.files("dreamlite_data").joinpath("taxonomy.yaml").read_text(encoding="utf-8"))


def read_taxonomy(text: str) -> Taxonomy:
    """Read and check a taxonomy: every label leads to a declared type, every level1 has one category a mix."""
    data = yaml.safe_load(text)
    levels = {level1: tuple(names) for level1, names in data["levels"].items()}
    labels: dict[tuple[str, str], EditType] = {}
    for origin, entries in data["labels"].items():
        for label, path in entries.items():
            level1, _, level2 = str(path).partition("/")
            if level2 not in levels.get(level1, ()):
                raise TaxonomyError(f"taxonomy.yaml: {origin}.{label} leads to {path!r}, which is not among the levels")
            if label != normalise(label):
                raise TaxonomyError(f"taxonomy.yaml: write {origin}.{label} as {normalise(label)!r}, the form in which labels are compared")
            labels[origin, label] = EditType(level1, level2)
    labels |= _for_any_origin(levels, labels)
    shares: dict[tuple[str, str], tuple[float, tuple[str, ...]]] = {}
    for mix, categories in data["mixes"].items():
        members = [level1 for entry in categories.values() for level1 in entry["level1"]]
        if sorted(members) != sorted(levels):
            raise TaxonomyError(f"taxonomy.yaml: the mix {mix} must name each level1 once; it names {', '.join(members)}")
        total = sum(entry["rows"] for entry in categories.values())
        shares |= {(mix, name): (entry["rows"] / total, tuple(entry["level1"])) for name, entry in categories.items()}
    return Taxonomy(int(data["version"]), hashlib.sha256(text.encode()).hexdigest()[:12], levels, labels, shares)


def _for_any_origin(levels: dict[str, tuple[str, ...]], labels: dict[tuple[str, str], EditType]) -> dict[tuple[str, str], EditType]:
    """What a label means where its origin says nothing: its own path, the name of a level2 that only one level1 has, or
    what all origins that know it agree on. What `any` says itself stands."""
    readings: dict[str, set[EditType]] = {}
    for level1, names in levels.items():
        for level2 in names:
            readings.setdefault(level2, set()).add(EditType(level1, level2))
            readings[normalise(f"{level1}/{level2}")] = {EditType(level1, level2)}
    for (_, label), kind in labels.items():
        readings.setdefault(label, set()).add(kind)
    return {
        (ANY, label): next(iter(kinds)) for label, kinds in readings.items() if len(kinds) == 1 and (ANY, label) not in labels
    }


def record_taxonomy(lake: Lake) -> bool:
    """Put the taxonomy into the tables `taxonomy` and `edit_quotas` of the lake where another version stands there.
    Returns whether anything was written."""
    taxonomy = load_taxonomy()
    stored = lake.query("SELECT DISTINCT digest FROM taxonomy")["digest"].to_pylist()
    if stored == [taxonomy.digest]:
        return False
    tables = {name: schema.rows_table(name, rows) for name, rows in _rows(taxonomy).items()}

    def body(connection: Any) -> None:
        for name, rows in tables.items():
            connection.execute(f"DELETE FROM {name}")
            connection.register("taxonomy_rows", rows)
            connection.execute(f"INSERT INTO {name} BY NAME SELECT * FROM taxonomy_rows")
            connection.unregister("taxonomy_rows")

    lake.write(body)
    return True


def _rows(taxonomy: Taxonomy) -> dict[str, list[dict[str, Any]]]:
    stamp = {"version": taxonomy.version, "digest": taxonomy.digest}
    return {
        "taxonomy": [
            {"origin": origin, "label": label, "level1": kind.level1, "level2": kind.level2, **stamp}
            for (origin, label), kind in sorted(taxonomy.labels.items())
        ],
        "edit_quotas": [
            {"mix": mix, "category": category, "level1": level1, "share": share, **stamp}
            for (mix, category), (share, members) in sorted(taxonomy.shares.items())
            for level1 in members
        ],
    }
