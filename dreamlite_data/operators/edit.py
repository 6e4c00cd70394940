"""Make edit triplets: the instructor says what to ask for, the editor does it, this operator keeps what came of it.
A route is such a pair; rejected tries are kept too, as negatives, with their reason."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from dreamlite_data import schema
from dreamlite_data.images import decode_stored, encode_png
from dreamlite_data.operators.base import by_row
from dreamlite_data.operators.caption import Picture
from dreamlite_data.operators.change import LEAST_CHANGE, changed_pixels, encode_mask
from dreamlite_data.operators.draw import pick, shuffled
from dreamlite_data.operators.exact import OPERATIONS, Operation, Pixels, Words
from dreamlite_data.operators.ingest import edit_id
from dreamlite_data.operators.ingest_rows import instruction_id
from dreamlite_data.responses import CallFailed
from dreamlite_data.taxonomy import load_taxonomy


@dataclasses.dataclass(frozen=True)
class Form:
    """One wording of an instruction: `form` is 'short' or 'long', `prompt_id` names the template or prompt it came from."""

    form: str
    text: str
    prompt_id: str


@dataclasses.dataclass(frozen=True)
class Request:
    """What an instructor asks for. `instruction` is the wording that stands in the triplet and one of `forms`; `plan` is
    what the editor needs beyond the words."""

    edit_type: str
    instruction: str
    forms: tuple[Form, ...]
    plan: Any = None


@dataclasses.dataclass(frozen=True)
class Try:
    """One triplet made for a request. None for `source` or `target` is the subject image itself; `mask`, bool [H, W], is
    where the edit belongs, where the route knows; `relation` is '' or 'inverse' (of the try before it); `reject_reason`
    says why it is a negative; `parts` are the cut-outs in the pictures."""

    request: Request
    target: Pixels | None
    source: Pixels | None = None
    mask: np.ndarray | None = None
    relation: str = ""
    reject_reason: str | None = None
    parts: tuple[str, ...] = ()


class Instructor(Protocol):
    """Says what to ask for, in order of preference. `digest` names weights or data behind it. One with a model has a method
    `prepare(pictures, wanted)`, as may an editor: it is called with all pictures of a task before the first of them. `wanted` are
    the only types (level1/level2) that will be taken of a picture, where a plan says so; with several pictures, those of each."""

    name: str
    digest: str

    def requests(self, pixels: Pixels, image_id: str, wanted: Sequence[str] = ()) -> Iterable[Request]: ...


class Editor(Protocol):
    """Makes pictures for a request; no try at all where it cannot follow."""

    name: str
    digest: str

    def tries(self, pixels: Pixels, image_id: str, request: Request) -> list[Try]: ...


def said(edit_type: str, forms: list[Form], *parts: object, plan: Any = None) -> Request:
    """A request whose instruction is drawn from `forms` by `parts`."""
    return Request(edit_type, pick(forms, "wording", *parts).text, tuple(forms), plan)


class ExactInstructor:
    """Draws from the exact operations that fit the picture, by the image's own id."""

    name = "exact"
    digest = "templates"

    def requests(self, pixels: Pixels, image_id: str, wanted: Sequence[str] = ()) -> Iterable[Request]:
        for operation in shuffled(list(OPERATIONS.values()), "exact", image_id):
            if operation.fits(pixels):
                yield exact_request(operation, operation.words, image_id)


def exact_request(operation: Operation, words: Words, image_id: str) -> Request:
    """`words` of an operation as a request, with every wording as a form."""
    forms = [Form(*form) for form in operation.forms(words, image_id)]
    return said(words.edit_type, forms, operation.name, image_id, plan=operation)


class ExactEditor:
    """Does an exact operation, pixel by pixel; `inverse` adds the way back where it is exact."""

    name = "exact"

    def __init__(self, inverse: bool = False) -> None:
        self.inverse = inverse
        self.digest = "with inverse" if inverse else "forward"

    def tries(self, pixels: Pixels, image_id: str, request: Request) -> list[Try]:
        operation: Operation = request.plan
        target = operation(pixels, image_id)
        if changed_pixels(pixels, target).mean() < LEAST_CHANGE:
            return []
        found = [Try(request, target)]
        if self.inverse and operation.inverse is not None and operation.can_be_undone(pixels, image_id):
            found.append(Try(exact_request(operation, operation.inverse, image_id), None, source=target, relation="inverse"))
        return found


class Edit:
    """Operator over photos: makes `count` accepted triplets of each or, by a `plan` (its op_version), one of each type in the row's
    `wanted`. Pictures become images, triplets rows of `edits`, their wordings rows of `instructions`, known masks rows of `edit_masks`,
    cut-outs in them rows of `edit_parts`."""

    version = 2
    table = "op_edit"
    schema = schema.OPERATORS["op_edit"]

    def __init__(
        self, count: int, instructor: Instructor | None = None, editor: Editor | None = None, name: str = "edit", gpus: float = 0.0,
        plan: str = "",
    ) -> None:  # fmt: skip
        self.count, self.instructor, self.editor = count, instructor or ExactInstructor(), editor or ExactEditor()
        self.name, self.resources = name, {"num_cpus": 1.0} | ({"num_gpus": gpus} if gpus else {})
        self.plan, self.reads = plan, ("image_id", "bytes", *(["wanted"] if plan else []))
        self._rows: dict[str, dict[str, dict[str, Any]]] = {}

    def config(self) -> dict[str, Any]:
        return {
            "count": self.count, "instructor": self.instructor.name, "editor": self.editor.name,
            "instructor_digest": self.instructor.digest, "editor_digest": self.editor.digest, **({"plan": self.plan} if self.plan else {}),
        }  # fmt: skip

    def __call__(self, rows: pa.Table) -> pa.Table:
        self._rows = {name: {} for name in ("images", "edits", "instructions", "edit_masks", "edit_parts")}
        pictures = [Picture(row["image_id"], row["bytes"]) for row in rows.select(["image_id", "bytes"]).to_pylist()]
        wanted = rows["wanted"].to_pylist() if self.plan else [[] for _ in pictures]
        for part in (self.instructor, self.editor):
            if hasattr(part, "prepare"):
                part.prepare(pictures, wanted)  # a model that is not there is the user's mistake, not a bad row: it must end the run
        return by_row(self._one, rows, "image_id", self.schema)

    def _one(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._made(decode_stored(row["bytes"]), row["image_id"], row["wanted"] if self.plan else ())
        except CallFailed as failure:
            return {"error": str(failure)[:500], "retry": failure.transient}

    def _made(self, pixels: Pixels, image_id: str, wanted: Sequence[str]) -> dict[str, Any]:
        made: list[str] = []
        accepted = 0
        if self.plan:
            requests = list(self.instructor.requests(pixels, image_id, wanted))
            for kind in wanted:
                accepted += self._first_of_kind(kind, requests, pixels, image_id, made)
        else:
            for request in self.instructor.requests(pixels, image_id):
                if accepted == self.count:
                    break
                accepted += self._make(request, pixels, image_id, made)
        return {"edits": accepted, "edit_ids": sorted(set(made))}

    def _first_of_kind(self, kind: str, requests: list[Request], pixels: Pixels, image_id: str, made: list[str]) -> int:
        """Follow the first request of a type that comes to something; it, and those that did not, are then used up."""
        for request in [one for one in requests if str(load_taxonomy().edit_type(one.edit_type, self.editor.name)) == kind]:
            requests.remove(request)
            if accepted := self._make(request, pixels, image_id, made):
                return accepted
        return 0

    def _make(self, request: Request, pixels: Pixels, image_id: str, made: list[str]) -> int:
        """Store the tries for a request, add their ids to `made`; returns how many are accepted and no way back."""
        parent, accepted = None, 0
        for attempt in self.editor.tries(pixels, image_id, request):
            parent = self._store(attempt, image_id, parent)
            made.append(parent)
            accepted += attempt.reject_reason is None and attempt.relation == ""
        return accepted

    def _store(self, attempt: Try, image_id: str, before: str | None) -> str:
        source_id = image_id if attempt.source is None else self._image(attempt.source)
        target_id = image_id if attempt.target is None else self._image(attempt.target)
        identity = edit_id(source_id, target_id, attempt.request.instruction)
        self._rows["edits"].setdefault(identity, {
            "edit_id": identity, "source_image_id": source_id, "target_image_id": target_id,
            "instruction": attempt.request.instruction, "edit_type": attempt.request.edit_type, "route": self.editor.name,
            "parent_edit_id": before if attempt.relation else None, "relation": attempt.relation,
            "rejected": attempt.reject_reason is not None, "reject_reason": attempt.reject_reason,
        })  # fmt: skip
        for row in instruction_rows(identity, attempt.request.forms, self.instructor.name):
            self._rows["instructions"].setdefault(row["instruction_id"], row)
        if attempt.mask is not None:
            self._rows["edit_masks"].setdefault(identity, {
                "edit_id": identity, "mask_png": encode_mask(attempt.mask), "mask_fraction": float(attempt.mask.mean()), "origin": self.editor.name,
            })  # fmt: skip
        if attempt.parts:
            self._rows["edit_parts"].setdefault(identity, {"edit_id": identity, "cutout_ids": list(attempt.parts)})
        return identity

    def _image(self, pixels: Pixels) -> str:
        payload = encode_png(pixels)
        identity = hashlib.sha256(payload).hexdigest()
        self._rows["images"].setdefault(identity, {
            "image_id": identity, "bytes": payload, "mime": "image/png", "width": pixels.shape[1], "height": pixels.shape[0],
            "size_bytes": len(payload),
        })  # fmt: skip
        return identity

    def side_tables(self, rows: pa.Table, answer: pa.Table) -> dict[str, pa.Table]:
        """The pictures, triplets, wordings and masks of the call just made."""
        return {name: schema.rows_table(name, [found[key] for key in sorted(found)]) for name, found in self._rows.items()}


def instruction_rows(identity: str, forms: Iterable[Form], instructor: str) -> list[dict[str, Any]]:
    """Rows of `instructions` for one triplet."""
    return [
        {"instruction_id": instruction_id(identity, form.form, form.text), "edit_id": identity,
         "form": form.form, "text": form.text, "instructor": instructor, "prompt_id": form.prompt_id}
        for form in forms
    ]  # fmt: skip
