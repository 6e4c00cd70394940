"""Truth sets for verification: edits that are right, and the same spoilt in known ways; precision and recall of the rules on them.
Composites, small-world scenes and exact operations give any number of cases with no human in between."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from dreamlite_data import scenes
from dreamlite_data.operators import composite, exact
from dreamlite_data.operators.change import LEAST_CHANGE, Pixels, changed_pixels
from dreamlite_data.operators.cutouts import CutOutError, CutOuts, DrawnCutOuts
from dreamlite_data.operators.draw import generator, pick
from dreamlite_data.operators.safety import require_extra
from dreamlite_data.operators.text import read_words
from dreamlite_data.operators.verify import scene_mask
from dreamlite_data.operators.verify_cases import Case, shuffled_blocks, through_jpeg, truth_photos
from dreamlite_data.operators.verify_given import object_in_target, text_measures
from dreamlite_data.operators.verify_measures import Measures, measure_triplet
from dreamlite_data.operators.verify_rules import Rules, load_rules
from dreamlite_data.operators.verify_truth_photos import style_truth, text_truth
from dreamlite_data.operators.wording import draw_colour
from dreamlite_data.shares import Share
from dreamlite_data.taxonomy import load_taxonomy

# --- composites ------------------------------------------------------------------------------------------------------


def composite_truth(photos: Iterable[tuple[str, Pixels]], cutouts: CutOuts, jpeg_quality: int | None = 92) -> Iterator[Case]:
    """Each operation on each photo, right and spoilt: nothing done, done to the wrong thing, in the wrong place, with the wrong
    colour or number, or right but with changes elsewhere. Targets pass through JPEG, as those of real sets do."""
    for image_id, photo in photos:
        for operation, compose in composite.OPERATIONS.items():
            drawn = composite.draw_things(operation, image_id, cutouts, companion=True)
            if drawn.companion is None:
                continue
            plan = compose(drawn)
            form = pick(plan.forms, "truth wording", operation, image_id)
            try:
                source, target = (composite.paste(photo, things, cutouts) for things in (plan.before, plan.after))
                mask = composite.covered(photo.shape, plan.changed, cutouts)
                if changed_pixels(source, target).mean() < LEAST_CHANGE:
                    continue
                spoilt = list(_spoilt(photo, plan, drawn, source, target, mask, cutouts))
            except CutOutError:
                continue
            for fault, pixels in [("", target), *spoilt]:
                kept = through_jpeg(pixels, jpeg_quality) if jpeg_quality else pixels
                yield Case("composite", operation, form.text, source, kept, fault, mask)


def _spoilt(
    photo: Pixels, plan: composite.Composition, drawn: composite.Drawn, source: Pixels, target: Pixels, mask: np.ndarray, cutouts: CutOuts
) -> Iterator[tuple[str, Pixels]]:
    yield "no_op", source
    yield "spill", _spill(target, mask, drawn.seed)
    wrong = _wrong_object(plan, drawn)
    if wrong is not None:
        yield "wrong_object", composite.paste(photo, wrong, cutouts)
    if plan.operation in ("add", "move"):
        moved = tuple(
            dataclasses.replace(thing, cell=drawn.cells[4]) if thing not in plan.before else thing for thing in plan.after
        )  # fmt: skip
        yield "wrong_place", composite.paste(photo, moved, cutouts)
    if plan.operation == "recolour":
        named = str(plan.after[-1].tint)
        near = composite.similar_colours(named) | composite.similar_colours(drawn.thing.colour)
        other = dataclasses.replace(plan.after[-1], tint=draw_colour("wrong colour", drawn.seed, without=near))
        yield "wrong_value", composite.paste(photo, (*plan.after[:-1], other), cutouts)
    if plan.operation == "count":
        had, wanted = (sum(thing.item == drawn.thing for thing in things) for things in (plan.before, plan.after))
        number = next(n for n in (wanted + 1, wanted - 1) if n not in (had, 0))
        things = [drawn.pasted(drawn.thing, place) for place in range(number)]
        yield "wrong_value", composite.paste(photo, (*drawn.around(), *things), cutouts)


def _wrong_object(plan: composite.Composition, drawn: composite.Drawn) -> tuple[composite.Pasted, ...] | None:
    """The things of the target had the edit been done to the companion, or with another thing, instead."""
    companion, thing = drawn.around()[0], drawn.pasted(drawn.thing, 0)
    if plan.operation == "add":
        return (companion, drawn.pasted(drawn.other, 0))
    if plan.operation == "remove":
        return (thing,)
    if plan.operation == "replace":
        return (thing, dataclasses.replace(companion, item=drawn.other))
    if plan.operation == "move":
        return (thing, dataclasses.replace(companion, cell=plan.after[-1].cell))
    if plan.operation == "resize":
        before, after = plan.before[-1], plan.after[-1]
        return (before, dataclasses.replace(companion, size=composite.SMALL if after.size < before.size else composite.LARGE))
    if plan.operation == "recolour":
        return (thing, dataclasses.replace(companion, tint=plan.after[-1].tint))
    return None


def _spill(target: Pixels, mask: np.ndarray, seed: str) -> Pixels:
    """The right target with a change outside the mask: a colour cast over everything, a blur over everything, or a foreign
    patch as large as a cell."""
    way = pick(("cast", "blur", "patch"), "spill", seed)
    rng = generator("spill", seed)
    if way == "cast":
        other = target * rng.permutation(np.array([1.18, 1.0, 0.82], np.float32))
    elif way == "blur":
        other = ndimage.gaussian_filter(target.astype(np.float32), (1.8, 1.8, 0))
    else:
        side = target.shape[0] // 4
        other = target.astype(np.float32)
        free = [(y, x) for y in range(0, target.shape[0] - side, 8) for x in range(0, target.shape[1] - side, 8)
                if mask[y : y + side, x : x + side].mean() < 0.1]  # fmt: skip
        top, left = free[int(rng.integers(len(free)))] if free else (0, 0)
        other[top : top + side, left : left + side] = 255 - other[top : top + side, left : left + side]
    spilt = np.clip(np.rint(other), 0, 255).astype(np.uint8)
    return np.where(mask[..., None], target, spilt)


# --- scenes and exact operations -------------------------------------------------------------------------------------


def scene_truth(count: int, seed: int) -> Iterator[Case]:
    """Small-world edits, right and spoilt: nothing done, another edit of the same kind done, or all else redrawn too."""
    for number in range(count):
        rng = generator("truth scene", seed, number)
        scene = scenes.sample_scene(rng)
        edit = scenes.sample_edit(scene, rng)
        wanted = scenes.apply_edit(scene, edit)
        words, source = scenes.instruction(edit, scene, rng), scenes.render(scene)
        targets = {"": scenes.render(wanted), "no_op": source, "over_edit": scenes.render(_other(scene, wanted, rng))}
        other = scenes.apply_edit(scene, scenes.sample_edit(scene, rng, edit.kind))
        if other.key() != wanted.key():
            targets["wrong_value"] = scenes.render(other)
        reading = _reading(source)
        mask = scene_mask(reading, words)
        for fault, target in targets.items():
            seen = {"object_in_target": object_in_target(words, reading, _reading(target))}
            yield Case("scenes", edit.kind, words, source, target, fault, mask, seen)


def _reading(pixels: Pixels) -> str | None:
    scene = scenes.read_scene(pixels).scene
    return scene.to_json() if scene else None


def _other(scene: scenes.Scene, wanted: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    while True:
        other = scenes.sample_scene(rng)
        if other.key() not in (scene.key(), wanted.key()) and (other.background, other.style) != (wanted.background, wanted.style):
            return other


def exact_truth(photos: Iterable[tuple[str, Pixels]]) -> Iterator[Case]:
    """Exact operations, right and spoilt: nothing done, the opposite done (of a motion: another one), or another operation on top
    that destroys the picture."""
    opposite = {"brighten": "darken", "darken": "brighten", "more_contrast": "less_contrast", "less_contrast": "more_contrast",
                "more_saturation": "less_saturation", "less_saturation": "more_saturation", "warm": "cool", "cool": "warm",
                "blur": "sharpen", "sharpen": "blur", "mirror": "flip", "flip": "mirror", "upside_down": "flip"}  # fmt: skip
    for image_id, photo in photos:
        for name, operation in exact.OPERATIONS.items():
            target = operation(photo, image_id)
            if not operation.fits(photo) or changed_pixels(photo, target).mean() < LEAST_CHANGE:
                continue
            words = pick(operation.forms(operation.words, image_id), "truth wording", name, image_id)[1]
            targets = {"": target, "no_op": photo, "over_edit": shuffled_blocks(target, image_id)}
            if name in opposite:
                targets["wrong_value"] = exact.OPERATIONS[opposite[name]](photo, image_id)
            if name in ("turn", "zoom"):
                targets["wrong_value"] = operation.apply(photo, _elsewhere(operation.amounts(image_id)))
            for fault, pixels in targets.items():
                yield Case("exact", operation.words.edit_type, words, photo, pixels, fault)


def _elsewhere(amounts: dict[str, Any]) -> dict[str, Any]:
    """The amounts of a turn the other way round, or of a zoom to the opposite corner."""
    others = {"clockwise": "anticlockwise", "anticlockwise": "clockwise", "top left": "bottom right", "bottom right": "top left",
              "top right": "bottom left", "bottom left": "top right", "middle": "top left"}  # fmt: skip
    return {name: others.get(value, value) if isinstance(value, str) else value for name, value in amounts.items()}


# --- the report ------------------------------------------------------------------------------------------------------


def verify_report(
    seed: int = 1, photos: int = 40, scene_edits: int = 400, cutouts: CutOuts | None = None, masks: bool = True, rules: Rules | None = None,
    ocr: bool = False,
) -> list[dict[str, Any]]:
    """Precision and recall of the packaged rules per edit type on truth sets that `seed` draws, with 95 % Wilson intervals.

    One row per (origin, edit_type), with fault 'all': true, passed (of the true), recall, recall_low, recall_high, false,
    missed (of the false), precision, precision_low, precision_high; and one per fault: false, missed, caught, caught_low,
    caught_high. `not_evaluated` names the conditions that no measure was there for, `undecided` counts right edits left so.
    `masks=False` withholds the masks, as with sets that bring none; `ocr` reads the words of text edits (extra 'ocr').
    """
    cutouts = cutouts or DrawnCutOuts()
    cases: list[Callable[[], Iterable[Case]]] = [
        lambda: composite_truth(truth_photos(photos, seed), cutouts),
        lambda: scene_truth(scene_edits, seed),
        lambda: exact_truth(truth_photos(max(1, photos // 2), seed)),
        lambda: style_truth(truth_photos(max(1, photos // 2), seed)),
        lambda: (with_words_read if ocr else iter)(text_truth(truth_photos(max(1, photos // 4), seed))),
    ]
    return report_of((case for part in cases for case in part()), masks, rules)


def report_of(cases: Iterable[Case], masks: bool = True, rules: Rules | None = None) -> list[dict[str, Any]]:
    """`verify_report` of given cases."""
    rules = rules or load_rules()
    counts: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0, 0]))
    absent: dict[tuple[str, str], set[str]] = defaultdict(set)
    for case in cases:
        kind = load_taxonomy().edit_type(case.edit_type, case.origin)
        mask = case.mask if masks else None
        measures = measure_triplet(case.source, case.target, case.instruction, mask, rules.measures(kind)) | case.given
        found = rules.judge(kind, measures)
        cell = counts[case.origin, case.edit_type][case.fault]
        cell[0] += 1
        cell[1] += found.verdict == "pass"
        cell[2] += found.verdict == "not_evaluated"
        absent[case.origin, case.edit_type] |= set(found.not_evaluated)
    rows = []
    for (origin, edit_type), faults in sorted(counts.items()):
        true, passed, undecided = faults.get("", [0, 0, 0])
        spoilt = {fault: found for fault, found in sorted(faults.items()) if fault}
        false, missed = (sum(found[index] for found in spoilt.values()) for index in (0, 1))
        head = {"origin": origin, "edit_type": edit_type}
        rows.append({
            **head, "fault": "all", "true": true, "passed": passed, "false": false, "missed": missed,
            **Share(passed, true).columns("recall"), **Share(passed, passed + missed).columns("precision"),
            "undecided": undecided, "not_evaluated": sorted(absent[origin, edit_type]),
        })  # fmt: skip
        rows += [
            {**head, "fault": fault, "false": found[0], "missed": found[1], **Share(found[0] - found[1], found[0]).columns("caught")}
            for fault, found in spoilt.items()
        ]
    return rows


def with_words_read(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases with the words that the reader of `text` finds in both pictures. Raises MissingExtra without the extra 'ocr'."""
    require_extra("rapidocr", "ocr", "the truth set of text edits")
    known: dict[bytes, tuple[list[str], float]] = {}
    for case in cases:
        seen = []
        for pixels in (case.source, case.target):
            key = pixels.tobytes()
            if key not in known:
                known[key] = read_words(pixels)
            seen.append(known[key])
        (before, was), (after, is_now) = seen
        yield dataclasses.replace(case, given=case.given | text_measures(case.instruction, before, after, was, is_now))


def spread(cases: Iterable[Case], names: Sequence[str], masks: bool = True) -> dict[str, dict[str, dict[str, tuple[float, ...]]]]:
    """What the thresholds were read from: per type and fault the quantiles (0.01, 0.05, 0.5, 0.95, 0.99) of each measure."""
    found: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for case in cases:
        measures: Measures = measure_triplet(case.source, case.target, case.instruction, case.mask if masks else None) | case.given
        kind = str(load_taxonomy().edit_type(case.edit_type, case.origin))
        for name in names:
            value = measures.get(name)
            if value is not None and not np.isnan(value):
                found[kind][name][case.fault].append(value)
    quantiles = (0.01, 0.05, 0.5, 0.95, 0.99)
    return {
        kind: {name: {fault: tuple(np.quantile(values, quantiles)) for fault, values in sorted(faults.items())} for name, faults in measures.items()}
        for kind, measures in sorted(found.items())
    }
