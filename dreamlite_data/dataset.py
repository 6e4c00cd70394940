"""Read curated datasets: an immutable version's rows, and the bytes of the images they name.
This is the whole hand-over from the lake to trainers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import pyarrow as pa

from dreamlite_data.lake import Lake, LakeError
from dreamlite_data.operators.base import fetch


class DatasetError(LakeError):
    """A dataset version is not there, or lacks what a reader needs."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One version. `rows` has row_id, task ('generate' or 'edit'), image_id (the target), source_image_id, text, edit_type,
    edited_fraction, edit_mask (8 x 8 bytes, share of changed pixels per cell as 0..255), weight, split ('train',
    'heldout', or as the settings name them), sorted by row_id; what a task does not have is null."""

    name: str
    version: int
    digest: str
    rows: pa.Table

    def __len__(self) -> int:
        return len(self.rows)

    def require(self, columns: Iterable[str], task: str | None = None) -> Dataset:
        """This dataset, if it has the columns and, in every row (of `task`), a value in them; else DatasetError."""
        rows = self.rows if task is None else self.rows.filter(pa.compute.equal(self.rows["task"], task))
        of_task = f" of task {task}" if task else ""
        if not len(rows):
            raise DatasetError(f"dataset {self.name}@{self.version} has no rows{of_task}: choose another dataset, or loosen its policy")
        for column in columns:
            if column not in rows.column_names:
                raise DatasetError(
                    f"dataset {self.name}@{self.version} has no column {column!r}; it has {', '.join(rows.column_names)}"
                )
            empty = rows[column].null_count
            if empty:
                raise DatasetError(
                    f"dataset {self.name}@{self.version}: {empty} of {len(rows)} rows{of_task} have no {column}. "
                    "Choose a dataset whose rows carry it, or measure it and curate again"
                )
        return self

    def split(self, name: str) -> pa.Table:
        """The rows of one split. Raises DatasetError, with the splits that there are, where it has none."""
        rows = self.rows.filter(pa.compute.equal(self.rows["split"], name))
        if not len(rows):
            counts = pa.compute.value_counts(self.rows["split"]).to_pylist()
            said = ", ".join(f"{item['values']} ({item['counts']:,})" for item in sorted(counts, key=lambda item: str(item["values"])))
            raise DatasetError(f"dataset {self.name}@{self.version} has no rows in split {name!r}; its splits are {said or 'none: it is empty'}")
        return rows


def open_dataset(lake: Lake, name: str, version: int | None = None) -> Dataset:
    """Open a version of a curated dataset, the newest without `version`. Raises DatasetError with what there is."""
    version, digest = find_version(lake, name, version)
    rows = lake.query(
        "SELECT * EXCLUDE (name, version) FROM dataset_rows WHERE name = $name AND version = $version ORDER BY row_id",
        {"name": name, "version": version},
    )
    return Dataset(name, version, digest, rows)


def find_version(lake: Lake, name: str, version: int | None = None) -> tuple[int, str]:
    """(number, digest of its rows) of a version, the newest without `version`. Raises DatasetError with what there is."""
    known = lake.query("SELECT name, version, digest FROM datasets ORDER BY name, version").to_pylist()
    of_name = [row for row in known if row["name"] == name]
    if not of_name:
        names = sorted({row["name"] for row in known})
        raise DatasetError(f"the lake at {lake.root} has no dataset {name!r}; it has {', '.join(names) or 'none: run `dreamlite refresh`'}")
    if version is None:
        version = of_name[-1]["version"]
    found = [row for row in of_name if row["version"] == int(version)]
    if not found:
        raise DatasetError(f"dataset {name!r} has no version {version}; it has {', '.join(str(row['version']) for row in of_name)}")
    return int(version), found[0]["digest"]


def image_places(lake: Lake, ids: pa.Array | Sequence[str]) -> dict[str, tuple[str, int]]:
    """{image id: (file, row)} of those of `ids` that are stored; what `fetch` reads from."""
    found = lake.query(
        "SELECT image_id, filename, file_row_number FROM images SEMI JOIN wanted ON wanted.id = images.image_id",
        wanted=pa.table({"id": ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())}),
    )
    columns = (found[name].to_pylist() for name in ("image_id", "filename", "file_row_number"))
    return {image_id: (file, row) for image_id, file, row in zip(*columns, strict=True)}


def read_images(lake: Lake, ids: Sequence[str]) -> dict[str, bytes]:
    """Encoded bytes (PNG, JPEG or WebP, clean RGB) of each image id. Raises DatasetError for ids that are not stored."""
    wanted = sorted({image_id for image_id in ids if image_id is not None})
    if not wanted:
        return {}
    places = image_places(lake, wanted)
    lost = [image_id for image_id in wanted if image_id not in places]
    if lost:
        raise DatasetError(f"{len(lost)} of {len(wanted)} images are not in the lake at {lake.root}; the first is {lost[0]}")
    return dict(zip(wanted, fetch(places, wanted), strict=True))
