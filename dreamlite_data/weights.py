"""Name the weights of a model, given as a local folder or as a hub id, without loading them.
What was measured with a model is keyed by this name, so other weights under the same path are other results."""

from __future__ import annotations

from pathlib import Path

from dreamlite_data.sources.base import DigestCache


class WeightsError(ValueError):
    """The model cannot be named: it is not there, or not pinned."""


def weights_digest(model: str, revision: str | None, digests: DigestCache, setting: str) -> str:
    """sha256 over names and bytes of a local folder, or 'id@revision' of a hub model. `setting` is named in errors.

    Raises WeightsError for an empty or missing folder and for a hub id without revision, whose weights could change.
    """
    folder = Path(model)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            raise WeightsError(f"{setting}: the folder {model} is empty; put the model there or give another folder")
        return digests.of_files(folder, files)
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise WeightsError(f"{setting}: there is no folder {model}; give the folder of a model, or a hub id 'owner/name' with its revision")
    if not revision:
        raise WeightsError(
            f"{setting}: there is no folder {model}; to load it from the hub, also set its revision (a commit), for other weights under the "
            "same name would pass for these"
        )
    return f"{model}@{revision}"
