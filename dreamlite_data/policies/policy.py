"""Read a policy file: one SELECT of candidates, named rules over its columns, and perhaps a SELECT of types that quotas cap.
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
QUOTA = "quota"
"""The rule that a '-- @quota' block stands for, after all others."""
QUOTA_PARAMETERS = ("quotas", "quota_rows")
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
    """A policy file, read. `quota` is the SELECT of row_id, level1, level2 and perhaps score by which $quotas, where they are set, cap
    the rows of each edit type (policies.quota)."""

    dataset: str
    candidates: str
    rules: tuple[Rule, ...]
    quota: str | None = None

    def active(self, parameters: dict[str, Any]) -> list[Rule]:
        """The rules that hold with these parameters: `when=name` switches a rule off where the parameter is false."""
        return [rule for rule in self.rules if rule.when is None or parameters[rule.when]]

    def caps(self, parameters: dict[str, Any]) -> bool:
        """Whether quotas cap the rows: there are some, and the file says what type a row is of."""
        return self.quota is not None and bool(parameters.get("quotas"))

    def stages(self, parameters: dict[str, Any]) -> list[Rule]:
        """The active rules and, where quotas cap, the one that stands for them: what a funnel shows and a version records."""
        said = f"place in its type, of its share in $quotas of $quota_rows, by: {self.quota}"
        return self.active(parameters) + ([Rule(QUOTA, said, allow="any")] if self.caps(parameters) else [])

    def parameters(self) -> set[str]:
        """Names of the $parameters in any block of candidates or rules."""
        return parameters_of(self.candidates).union(*(parameters_of(rule.body) for rule in self.rules))

    def read(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Those of `parameters` that any block in force reads, sorted by name."""
        names = self.parameters() | (parameters_of(str(self.quota)) | set(QUOTA_PARAMETERS) if self.caps(parameters) else set())
        return {name: parameters.get(name) if name in QUOTA_PARAMETERS else parameters[name] for name in sorted(names)}

    def digest(self, parameters: dict[str, Any]) -> str:
        """sha256 of the rules, of quotas that cap, and of every parameter that they or the rules' switches read."""
        switches = {rule.when: parameters[rule.when] for rule in self.rules if rule.when}
        values = switches | self.read(parameters)
        content = [self.candidates, [dataclasses.astuple(rule) for rule in self.rules], {name: values[name] for name in sorted(values)}]
        content += [self.quota] if self.caps(parameters) else []
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
    quota: str | None = None
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
        elif kind == "quota" and not words:
            if quota is not None:
                raise PolicyError(f"{where}: there are two '-- @quota' blocks; one says the type of every row")
            quota = body
        else:
            raise PolicyError(
                f"{where}: '{mark.group(0)}' is neither '-- @candidates' nor '-- @rule <name> [margin] [when=] [allow=]' nor '-- @quota'"
            )
    if candidates is None or not rules:
        raise PolicyError(f"{where} needs one '-- @candidates' block and at least one '-- @rule <name>' block")
    names = [rule.name for rule in rules]
    if len(set(names)) < len(names):
        raise PolicyError(f"{where}: two rules share a name among {', '.join(names)}")
    if QUOTA in names:
        raise PolicyError(f"{where}: a rule cannot be called '{QUOTA}', the reason of rows over their quota: choose another name")
    return Policy(dataset, candidates, tuple(rules), quota)


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
