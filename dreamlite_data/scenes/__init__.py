"""The small world: coloured shapes whose truth is known exactly.
A scene can be drawn, described, edited by instruction, and read back out of any image."""

from dreamlite_data.scenes.agreement import edit_agreement, scene_agreement
from dreamlite_data.scenes.edits import (
    EDIT_KINDS,
    Edit,
    apply_edit,
    describe_difference,
    instruction,
    sample_edit,
)
from dreamlite_data.scenes.language import caption, parse_caption
from dreamlite_data.scenes.render import render
from dreamlite_data.scenes.scene import (
    BACKGROUNDS,
    CANVAS_PX,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    SceneObject,
    sample_scene,
)
from dreamlite_data.scenes.verifier import Reading, edit_matches, matches, read_scene

__all__ = [
    "BACKGROUNDS",
    "CANVAS_PX",
    "COLOURS",
    "EDIT_KINDS",
    "POSITIONS",
    "SHAPES",
    "SIZES",
    "STYLES",
    "Edit",
    "Reading",
    "Scene",
    "SceneObject",
    "apply_edit",
    "caption",
    "describe_difference",
    "edit_agreement",
    "edit_matches",
    "instruction",
    "matches",
    "parse_caption",
    "read_scene",
    "render",
    "sample_edit",
    "sample_scene",
    "scene_agreement",
]
