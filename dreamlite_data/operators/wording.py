"""Words of edit instructions: colours and how often each is drawn, articles and plurals, and what a text says of side and number.
Guards compare the latter with the picture, so that "on the left" or "three" can be caught when wrong."""

from __future__ import annotations

import re
from collections.abc import Collection

from dreamlite_data.operators.draw import draw_bits, pick

COMMON_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (210, 40, 45), "green": (45, 160, 65), "blue": (50, 90, 215), "yellow": (240, 215, 50), "orange": (240, 135, 35),
    "purple": (140, 55, 180), "pink": (245, 145, 185), "brown": (120, 75, 40), "black": (35, 35, 38), "white": (240, 240, 240),
}  # fmt: skip
RARE_COLOURS: dict[str, tuple[int, int, int]] = {
    "cyan": (60, 210, 225), "crimson": (165, 20, 50), "olive": (125, 125, 35), "lavender": (190, 170, 230),
    "navy": (30, 40, 105), "teal": (20, 125, 130), "gold": (212, 170, 55), "magenta": (215, 45, 160), "lime": (165, 225, 45),
    "salmon": (245, 140, 115),
}  # fmt: skip
COLOURS = {**COMMON_COLOURS, **RARE_COLOURS}
SAID_COLOURS = {**COLOURS, "grey": (128, 128, 128), "gray": (128, 128, 128)}
"""Those that are read in instructions; grey is never drawn."""
_ANY_COLOUR = "|".join(sorted(SAID_COLOURS, key=len, reverse=True))
COMMON_SHARE = 0.8
"""Common colours are drawn four times in five, as in AnyEdit (arXiv 2411.15738)."""

SIDES = {"left": ("left",), "right": ("right",), "top": ("top", "upper"), "bottom": ("bottom", "lower")}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_IRREGULAR = {"mouse": "mice", "goose": "geese", "child": "children", "foot": "feet", "sheep": "sheep", "fish": "fish", "leaf": "leaves",
              "knife": "knives", "wolf": "wolves"}  # fmt: skip


def draw_colour(*parts: object, without: Collection[str] = ()) -> str:
    """The name of a colour, common ones four times in five; never one of `without`."""
    pool = COMMON_COLOURS if draw_bits("rarity", *parts) / 2**64 < COMMON_SHARE else RARE_COLOURS
    return pick([name for name in pool if name not in without], "colour", *parts)


def with_article(noun_phrase: str) -> str:
    """"a star", "an orange star"."""
    return f"{'an' if noun_phrase[:1].lower() in 'aeiou' else 'a'} {noun_phrase}"


def plural(noun_phrase: str) -> str:
    """The plural of an English noun phrase, by its last word."""
    before, _, word = noun_phrase.rpartition(" ")
    if word in _IRREGULAR:
        many = _IRREGULAR[word]
    elif re.search(r"(s|x|z|ch|sh)$", word):
        many = f"{word}es"
    elif re.search(r"[^aeiou]y$", word):
        many = f"{word[:-1]}ies"
    else:
        many = f"{word}s"
    return f"{before} {many}".strip()


_SIDE = re.compile(r"\b(?:in|on|at) the (?:very |far )?(top|upper|bottom|lower)?[ -]?(left|right)?(?: corner| side| half| edge)?\b(?! of (?!the (?:picture|image|photo)))")


def said_sides(text: str) -> set[str]:
    """The sides of the picture that `text` names as a place: {'left'}, {'top', 'right'}, or none. "to the left", a
    direction, and "on the left of the cup", a relation, are no places."""
    found: set[str] = set()
    for match in _SIDE.finditer(text.lower()):
        words = {word for word in match.groups() if word}
        found |= {side for side, names in SIDES.items() if words & set(names)}
    return set() if {"left", "right"} <= found or {"top", "bottom"} <= found else found


def said_difference(text: str) -> int | None:
    """How many things shall come or go, where `text` says so: "add two more", "from one to three", "remove one of the".
    None where it does not."""
    words = text.lower()
    number = rf"({'|'.join(NUMBERS[1:])}|[1-9])"
    span = re.search(rf"\bfrom {number} to {number}\b", words)
    if span:
        return abs(_number(span[1]) - _number(span[2]))
    match = re.search(rf"\badd {number} more\b", words) or re.search(rf"\bremove {number} of the\b", words)
    return _number(match[1]) if match else None


def _number(word: str) -> int:
    return int(word) if word.isdigit() else NUMBERS.index(word)


def said_colour(text: str) -> str | None:
    """The colour that an instruction asks for: the last one that it names; None where it names none."""
    found = re.findall(rf"\b({_ANY_COLOUR})\b", text.lower())
    return found[-1] if found else None


_DIRECTIONS: tuple[tuple[str, str, int], ...] = (
    ("brightness", r"brighter|brighten|brightness of the whole picture to 1\d\d%|increase the exposure|underexposed|brightness back", 1),
    ("brightness", r"darker|darken|brightness down|reduce the exposure|overexposed|extra light away", -1),
    ("contrast", r"(?:raise|increase|more|boost) (?:the |its )?contrast|contrast (?:stronger|back)|looks flat:", 1),
    ("contrast", r"(?:lower|reduce|less) (?:the )?contrast|contrast softer", -1),
    ("saturation", r"more vivid|boost the colou?rs|more saturat|raise the saturation|faded|colou?rise|add natural colou?rs", 1),
    ("saturation", r"paler|tone the colou?rs down|less saturat|lower the saturation|black and white|remove all colou?rs", -1),
    ("warmth", r"warmer|warm up|warm tones", 1),
    ("warmth", r"cooler|colder|cool,? ", -1),
    ("sharpness", r"sharpen|crisper|remove the blur|out of focus:", 1),
    ("sharpness", r"^blur|blurry$|put it out of focus|even blur", -1),
)


def said_direction(text: str) -> tuple[str, int] | None:
    """Which quantity of the whole picture an instruction wants more (1) or less (-1) of; None where it names none or
    several. Questions of tone only: "a brighter red" is not asked here."""
    words = text.lower()
    # "add colours to this black and white photo" describes the source by the words that ask for the opposite.
    words = re.sub(r"(?:this|the) (?:dark|flat|blurry|black and white) (?:photo|picture)", "it", words)
    found = {(name, sign) for name, pattern, sign in _DIRECTIONS if re.search(pattern, words)}
    return next(iter(found)) if len(found) == 1 else None


# --- things, places and words that an instruction names --------------------------------------------------------------

_THING = re.compile(rf"\bthe (?:\w+ )?({_ANY_COLOUR}) (?!and\b|with\b|of\b|in\b|on\b|at\b|to\b|again\b|or\b|but\b)\w")
_BACKGROUND = re.compile(rf"\b(?:background(?: colou?r)?(?: to| into)?|colou?r of the background to) (?:(?:a|plain|solid|pure) )*({_ANY_COLOUR})\W*$")
_DESTINATION = re.compile(r"\bto(?:wards)? the (top|upper|bottom|lower)?[ -]?(left|right|middle|cent(?:er|re))?\b")
_QUOTED = r"[\"“”«»]([^\"“”«»]{1,60})[\"“”«»]"
_TEXT_FORMS = (
    ("replace", re.compile(rf"(?:replace|change|turn|rewrite).*?{_QUOTED}.*?\b(?:with|to|into|by)\b.*?{_QUOTED}", re.IGNORECASE)),
    ("replace", re.compile(rf"{_QUOTED} (?:should (?:say|read|be)|becomes) {_QUOTED}", re.IGNORECASE)),
    ("remove", re.compile(rf"\b(?:remove|delete|erase|take away)\b.*?{_QUOTED}", re.IGNORECASE)),
    ("add", re.compile(rf"\b(?:add|write|put|insert|print)\b.*?{_QUOTED}", re.IGNORECASE)),
)


def said_thing_colour(text: str) -> str | None:
    """The colour of the thing that an instruction is about, where it names it by one: "the red star", "the three red stars".
    None where it does not; "make the star red" says what the star shall become, and not what it is."""
    found = _THING.search(text.lower())
    return found[1] if found else None


def said_background_colour(text: str) -> str | None:
    """The colour that the background shall have: "make the background grey". A "blue sky" is no colour of a background."""
    found = _BACKGROUND.search(text.lower())
    return found[1] if found else None


def said_destination(text: str) -> set[str]:
    """Where something shall go: {'left'}, {'top', 'right'}, {'middle'}, or none. The last place that is named."""
    found = [{word for word in match.groups() if word} for match in _DESTINATION.finditer(text.lower())]
    words = next((words for words in reversed(found) if words), set())
    sides = {side for side, names in SIDES.items() if words & set(names)}
    return sides or ({"middle"} if words else set())


def said_texts(text: str) -> tuple[str | None, str | None]:
    """(the words that stand in the picture before, those that shall stand in it after) of an edit of text, as it quotes
    them: ("SALE", "OPEN"), ("SALE", None) where they are removed, (None, "OPEN") where they are added."""
    for kind, form in _TEXT_FORMS:
        match = form.search(text)
        if match is not None:
            words = [part.strip() for part in match.groups()]
            return (words[0], words[1]) if kind == "replace" else (words[0], None) if kind == "remove" else (None, words[0])
    return None, None
