"""Where cut-outs come from and what may be done with them, as rows of the lake: what is made with one stands under its licence too.
A licence that is corrected costs a few rows, and no picture is made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dreamlite_data import schema
from dreamlite_data.lake import Lake
from dreamlite_data.operators.cutouts import MAX_CAPTION_BYTES, CutOutError, DrawnCutOuts, png_files
from dreamlite_data.settings import CompositeSettings
from dreamlite_data.sources.base import DigestCache

DRAWN_LICENCE, DRAWN_ORIGIN = "CC0-1.0", "drawn"
"""Shapes that this package draws are nobody's, like the pictures of the small world."""
_STATED = ("licence", "origin", "url")


def record_cutouts(lake: Lake, settings: CompositeSettings, digests: DigestCache) -> int:
    """Bring the table `cutouts` up to date with the folder of the settings; returns how many rows were written. Raises CutOutError
    for a .json beside a cut-out that cannot be read."""
    fresh = schema.rows_table("cutouts", _of_folder(settings, digests) if settings.cutouts else _drawn())
    stale = lake.query(
        "SELECT count(*) AS n FROM ((FROM fresh EXCEPT SELECT * FROM cutouts) UNION ALL "
        "(SELECT c.* FROM cutouts c SEMI JOIN fresh f ON f.cutout_id = c.cutout_id EXCEPT FROM fresh))",
        fresh=fresh,
    )["n"][0].as_py()
    if not stale:
        return 0

    def body(connection: Any) -> None:
        connection.register("fresh", fresh)
        connection.execute("DELETE FROM cutouts WHERE cutout_id IN (SELECT cutout_id FROM fresh)")
        connection.execute("INSERT INTO cutouts BY NAME SELECT * FROM fresh")
        connection.unregister("fresh")

    lake.write(body)
    return len(fresh)


def _drawn() -> list[dict[str, Any]]:
    drawn = DrawnCutOuts()
    return [
        {"cutout_id": drawn.content_id(item), "name": item.name, "origin": DRAWN_ORIGIN, "licence": DRAWN_LICENCE} for item in drawn.items
    ]


def _of_folder(settings: CompositeSettings, digests: DigestCache) -> list[dict[str, Any]]:
    """One row per file. What a .json beside it says stands before what the settings say of the whole folder."""
    root = Path(str(settings.cutouts))
    whole = {"licence": settings.licence, "origin": settings.origin or root.resolve().name}
    rows = [
        {"cutout_id": digests.digest(file), "name": file.relative_to(root).as_posix(), **whole, **_beside(file)} for file in png_files(root)
    ]
    return [dict(row) for row in sorted({tuple(sorted(row.items(), key=str)) for row in rows}, key=str)]


def _beside(file: Path) -> dict[str, str]:
    sidecar = file.with_suffix(".json")
    if not sidecar.is_file():
        return {}
    try:
        if sidecar.stat().st_size > MAX_CAPTION_BYTES:
            raise ValueError(f"it is larger than {MAX_CAPTION_BYTES} bytes")
        fields = json.loads(sidecar.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:  # neither UTF-8 nor JSON is a ValueError too
        raise CutOutError(f"{sidecar}: {error}. It may say licence, origin and url of the cut-out beside it: correct it, or take it away") from None
    return {name: value.strip() for name in _STATED if isinstance(value := fields.get(name), str) and value.strip()}
