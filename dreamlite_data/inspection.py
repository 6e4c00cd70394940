"""The measurements of a refresh that need a model or an extra package: safety, text, further captions, embeddings, similarity.
Each is off until the settings ask for it, says so, and does then only what is pending."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from dreamlite_data.chat.backends import chat_weights
from dreamlite_data.executors import Executor
from dreamlite_data.lake import Lake
from dreamlite_data.operators.base import op_version
from dreamlite_data.operators.describe import Describe
from dreamlite_data.operators.embed import Embed, Similarity
from dreamlite_data.operators.run import Measurement, measure_pending, switch_off, withdraw_passing_failures
from dreamlite_data.operators.safety import Safety, require_extra
from dreamlite_data.operators.text import Text
from dreamlite_data.responses import responses_folder
from dreamlite_data.settings import RefreshSettings
from dreamlite_data.sources.digests import DigestCache, file_digests
from dreamlite_data.weights import weights_digest

INSPECTIONS = ("safety", "text", "describe", "embed", "similarity")
"""In the order in which they run; similarity compares what describe wrote with what embed saw."""

ALL_IMAGES = "SELECT image_id FROM images"
CAPTIONED_IMAGES = "SELECT DISTINCT image_id FROM current_ingest WHERE task = 'generate' AND error IS NULL AND image_id IS NOT NULL"
"""An edit's images are described by its instruction: captions of them would be paid for and never read."""


def require_installed(settings: RefreshSettings) -> None:
    """Raise MissingExtra before any work where the settings ask for a measurement whose package is not installed."""
    if settings.safety.nsfw:
        require_extra("nudenet", "nsfw", "safety.nsfw")
    if settings.text.ocr:
        require_extra("rapidocr", "ocr", "text.ocr")


def inspect(lake: Lake, settings: RefreshSettings, executor: Executor, name: str) -> dict[str, int | str]:
    """Run one of INSPECTIONS over its pending rows. Returns {'rows', 'failed'}, or {'off': why} where it is not asked for."""
    runs: dict[str, Callable[[Lake, RefreshSettings, Executor, DigestCache], dict[str, int | str]]] = {
        "safety": _safety, "text": _text, "describe": _describe, "embed": _embed, "similarity": _similarity,
    }  # fmt: skip
    digests = file_digests(lake.files)
    answer = runs[name](lake, settings, executor, digests)
    digests.save()
    return answer


def _safety(lake: Lake, settings: RefreshSettings, executor: Executor, digests: DigestCache) -> dict[str, int | str]:
    wanted = settings.safety
    if not (wanted.nsfw or wanted.faces or wanted.watermark):
        return {"off": "refresh.safety asks for nothing"}
    weights = weights_digest(wanted.watermark, None, digests, "refresh.safety.watermark") if wanted.watermark else ""
    return _measure(lake, settings, executor, Measurement(functools.partial(Safety, wanted, weights), ALL_IMAGES, {"bytes": "image_id"}))


def _text(lake: Lake, settings: RefreshSettings, executor: Executor, digests: DigestCache) -> dict[str, int | str]:
    if not settings.text.ocr:
        return {"off": "refresh.text.ocr is false"}
    return _measure(lake, settings, executor, Measurement(Text, ALL_IMAGES, {"bytes": "image_id"}))


def _embed(lake: Lake, settings: RefreshSettings, executor: Executor, digests: DigestCache) -> dict[str, int | str]:
    if settings.embed.model is None:
        return {"off": "refresh.embed.model is null"}
    return _measure(lake, settings, executor, Measurement(embed_operator(Embed, settings, digests), ALL_IMAGES, {"bytes": "image_id"}))


def _similarity(lake: Lake, settings: RefreshSettings, executor: Executor, digests: DigestCache) -> dict[str, int | str]:
    if settings.embed.model is None:
        return {"off": "refresh.embed.model is null"}
    embedded = op_version(embed_operator(Embed, settings, digests)())
    subjects = (
        "SELECT c.caption_id, c.text, e.vector FROM captions c "
        f"JOIN op_embed e ON e.subject_id = c.image_id AND e.op_version = '{embedded}'"
    )
    return _measure(lake, settings, executor, Measurement(embed_operator(Similarity, settings, digests), subjects))


def embed_operator(operator: Callable[..., Any], settings: RefreshSettings, digests: DigestCache) -> Callable[[], Any]:
    """What builds an operator of the embedding model that the settings name. Raises WeightsError."""
    embed = settings.embed
    weights = weights_digest(embed.model, embed.revision, digests, "refresh.embed.model")
    return functools.partial(operator, embed.model, weights, embed.revision, embed.batch_images, embed.num_gpus)


def _describe(lake: Lake, settings: RefreshSettings, executor: Executor, digests: DigestCache) -> dict[str, int | str]:
    makes = list(_describers(lake, settings, digests))
    used = {make().name for make in makes}
    switch_off(lake, lambda name: name.startswith("describe_") and name not in used)  # a replaced captioner writes no captions any more
    if not makes:
        return {"off": "refresh.captions names no styles"}
    total = {"rows": 0, "failed": 0}
    for make in makes:
        withdraw_passing_failures(lake, "op_describe", op_version(make()))
        counts = _measure(lake, settings, executor, Measurement(make, CAPTIONED_IMAGES, {"bytes": "image_id"}))
        total = {name: total[name] + counts[name] for name in total}
    return total


def _describers(lake: Lake, settings: RefreshSettings, digests: DigestCache) -> Iterator[Callable[[], Describe]]:
    for number, backend in enumerate(settings.captions):
        weights = chat_weights(backend, digests, f"refresh.captions.{number}")
        for style in backend.styles:
            yield functools.partial(Describe, backend, style, weights, responses_folder(lake.files))


def _measure(lake: Lake, settings: RefreshSettings, executor: Executor, measurement: Measurement) -> dict[str, int]:
    return measure_pending(lake, measurement, executor, settings.ingest.rows_per_task)
