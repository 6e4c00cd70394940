"""How far the target of an edit fits its words, and its change the change of words, by the embeddings of one CLIP-class model.
Pictures were embedded before; here only words are, those of captions that are known of source and target."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from dreamlite_data import schema
from dreamlite_data.inference import worker_threads
from dreamlite_data.operators.embed import Tower


def similarity_subjects(embedded: str) -> str:
    """SQL for every triplet whose pictures have embeddings of the version `embedded`, with the words about each: the provider's
    first, then the scene reader's, then a captioner's. A caption that the small world knows to be wrong is none."""
    return f"""
WITH words AS (
    SELECT c.image_id, first(c.text ORDER BY c.style <> 'provider', c.style <> 'scene', c.caption_id) AS text
    FROM captions c LEFT JOIN current_verify_caption v ON v.subject_id = c.caption_id
    WHERE NOT coalesce(v.in_language AND NOT v.matches, false)
    GROUP BY c.image_id
)
SELECT e.edit_id, s.text AS source_text, t.text AS target_text, a.vector AS source_vector, b.vector AS target_vector
FROM edits e
JOIN op_embed a ON a.subject_id = e.source_image_id AND a.op_version = '{embedded}'
JOIN op_embed b ON b.subject_id = e.target_image_id AND b.op_version = '{embedded}'
LEFT JOIN words s ON s.image_id = e.source_image_id
LEFT JOIN words t ON t.image_id = e.target_image_id
"""


class EditSimilarity(Tower):
    """Operator over triplets. `clip_target` is the cosine of the target and its words; `clip_direction` that of the way from
    source to target in pictures and in words (Gal et al. 2021, as InstructPix2Pix filters); null where words or a way lack."""

    name = "edit_similarity"
    version = 1
    reads = ("edit_id", "source_text", "target_text", "source_vector", "target_vector")
    table = "op_edit_similarity"
    schema = schema.OPERATORS["op_edit_similarity"]

    def __call__(self, rows: pa.Table) -> pa.Table:
        with worker_threads():
            texts = {text for name in ("source_text", "target_text") for text in rows[name].to_pylist() if text}
            known = {text: self._embedded(text) for text in sorted(texts)} if texts else {}
        answers = []
        for row in rows.to_pylist():
            before, after = (known.get(row[name]) for name in ("source_text", "target_text"))
            source, target = (row[name] and np.asarray(row[name], np.float64) for name in ("source_vector", "target_vector"))
            if source is None or target is None:
                answers.append({"error": "a picture has no embedding"})
                continue
            answers.append({
                "clip_target": None if after is None else float(target @ after),
                "clip_direction": None if before is None or after is None else _cosine(target - source, after - before),
            })  # fmt: skip
        return self.answer(rows["edit_id"], answers)

    def _embedded(self, text: str) -> np.ndarray:
        return self.encoder().texts([text])[0].astype(np.float64)


def _cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    """None where one of both is no direction: two pictures, or two captions, that the model does not tell apart."""
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / length if length > 1e-6 else None
