"""Read a policy file: one SELECT of candidates, then named rules over its columns.
A rule is a predicate, or with `margin` a number that passes from zero up and says by how much."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from importlib import resources
from typing import Any

_BLOCK = re.compile(r"^-- @(\w+)[ \t]*(.*)$", re.MULTILINE)
_PARAMETER = re.compile(r"\$([a-z_]\w*)")
ALLOW = ("pass_all", "reject_all", "any")
REQUIRED_COLUMNS = (
    "row_id", "task", "image_id", "source_image_id", "text", "edit_type", "edited_fraction", "edit_mask", "weight",
)  # fmt: skip


class PolicyError(ValueError):
    """A policy file does not say what it must; the message names file, block and remedy."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One named condition. `allow` names the unanimous outcome that is no surprise ('' none)."""

    name: str
    body: str
    margin: bool = False
    when: str | None = None
    allow: str = ""


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy file, read."""

    dataset: str
    candidates: str
    rules: tuple[Rule, ...]

    def active(self, parameters: dict[str, Any]) -> list[Rule]:
        """The rules that hold with these parameters: `when=name` switches a rule off where the parameter is false."""
        return [rule for rule in self.rules if rule.when is None or parameters[rule.when]]

    def parameters(self) -> set[str]:
        """Names of the $parameters in any block."""
        return parameters_of(self.candidates).union(*(parameters_of(rule.body) for rule in self.rules))

    def digest(self, parameters: dict[str, Any]) -> str:
        """sha256 of the rules and of every parameter that they or their switches read."""
        used = self.parameters() | {rule.when for rule in self.rules if rule.when}
        content = [self.candidates, [dataclasses.astuple(rule) for rule in self.rules], {name: parameters[name] for name in sorted(used)}]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parameters_of(sql: str) -> set[str]:
    """Names of the $parameters in a piece of SQL."""
    return set(_PARAMETER.findall(sql))


def read_policy(dataset: str, text: str | None = None, where: str | None = None) -> Policy:
    """The policy of `dataset` from the packaged SQL files, or from `text`, which `where` names in errors. Raises PolicyError."""
    where = where or f"policies/{dataset}.sql"
    if text is None:
        text = resources.files("dreamlite_data.policies").joinpath(f"{dataset}.sql").read_text(encoding="utf-8")
    marks = list(_BLOCK.finditer(text))
    candidates: str | None = None
    rules: list[Rule] = []
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        body = text[mark.end() : following.start() if following else len(text)].strip().rstrip(";").strip()
        kind, words = mark.group(1), mark.group(2).split()
        if not body:
            raise PolicyError(f"{where}: the block '{mark.group(0)}' is empty")
        if kind == "candidates":
            candidates = body
        elif kind == "rule" and words:
            rules.append(_rule(where, words, body))
        else:
            raise PolicyError(f"{where}: '{mark.group(0)}' is neither '-- @candidates' nor '-- @rule <name> [margin] [when=] [allow=]'")
    if candidates is None or not rules:
        raise PolicyError(f"{where} needs one '-- @candidates' block and at least one '-- @rule <name>' block")
    names = [rule.name for rule in rules]
    if len(set(names)) < len(names):
        raise PolicyError(f"{where}: two rules share a name among {', '.join(names)}")
    return Policy(dataset, candidates, tuple(rules))


def _rule(where: str, words: list[str], body: str) -> Rule:
    name, *options = words
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        raise PolicyError(f"{where}: a rule cannot be called {name!r}: lower-case letters, digits and underscores, no digit first")
    fields: dict[str, Any] = {"name": name, "body": body}
    for option in options:
        key, _, value = option.partition("=")
        if key == "margin" and not value:
            fields["margin"] = True
        elif key == "when" and value:
            fields["when"] = value
        elif key == "allow" and value in ALLOW:
            fields["allow"] = value
        else:
            raise PolicyError(f"{where}: rule {name} has the option {option!r}; known are margin, when=<parameter>, allow={'|'.join(ALLOW)}")
    return Rule(**fields)
