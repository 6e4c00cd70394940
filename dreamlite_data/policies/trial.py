"""Try a policy on what has been measured, without writing anything, and lay its verdicts beside those of the current version.
A trial can then be committed: its kept rows become the next version, and its rules hold in every later refresh."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from dreamlite_data.lake import Lake
from dreamlite_data.policies.committed import check_sql, committed_policies, store
from dreamlite_data.policies.curate import CurationError, drawn_from, freeze, judge, surprises
from dreamlite_data.policies.policy import QUOTA_PARAMETERS, Policy, PolicyError, Rule, parameters_of, read_policy
from dreamlite_data.policies.quota import check_rows, given_quotas
from dreamlite_data.settings import PolicySettings, RefreshSettings

DATASET_NAME = r"[a-z][a-z0-9_]*"


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a policy would do. `judged` is every candidate with its verdict, as `judge` gives it; `outcome` (rule, rows that
    reached it, rows it rejected); `warnings` the rules that a commit would refuse. `entering` and `leaving` are the rows by which
    the kept ones differ from the current version: row_id, and the rule and margin that keep them out on the other side."""

    name: str
    policy: Policy
    text: str
    parameters: dict[str, Any]
    overrides: dict[str, Any]
    judged: pa.Table
    outcome: list[tuple[Rule, int, int]]
    warnings: list[str]
    version: int | None
    entering: pa.Table
    leaving: pa.Table
    funnel: list[dict[str, Any]]
    """rule, rows_in, rejected, rows_out, and the same three of the current version (None where it has no such rule)."""

    @property
    def kept(self) -> int:
        """Rows that would make the dataset."""
        return pc.sum(pc.equal(self.judged["verdict"], "keep")).as_py() or 0


def try_policy(lake: Lake, file: Path, name: str | None = None, overrides: Mapping[str, Any] | None = None) -> Trial:
    """Judge the lake's candidates by the policy in `file` against the dataset `name` (the file's own name by default).
    `overrides` replace $parameters of the last refresh. Raises PolicyError where file, name, parameter or SQL is wrong."""
    name = name or file.stem
    policy, text = _read(file, name)
    parameters, given = _parameters(lake, policy, dict(overrides or {}), str(file))
    check_sql(lake, policy, parameters, str(file))
    judged, outcome = judge(lake, policy, parameters)
    warnings = surprises(policy, outcome, len(judged), parameters)
    version = _newest(lake, name)
    entering, leaving = _differences(lake, name, version, judged)
    funnel = _funnel(lake, name, outcome)
    trial = Trial(name, policy, text, parameters, given, judged, outcome, warnings, version, entering, leaving, funnel)
    if not trial.kept and "*" not in parameters.get("allow_unanimous", ()):
        warnings.append(f"{file}: no row of {len(judged):,} candidates stays")
    return trial


def commit_policy(lake: Lake, file: Path, name: str, overrides: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Trial]:
    """Make the trial's rows the next version of `name` and put the policy in force for later refreshes. Rows and rules that the
    newest version has already make none. Raises PolicyError, or CurationError where a rule is unanimous and not allowed to be."""
    with lake.exclusive("refresh"):
        trial = try_policy(lake, file, name, overrides)
        if trial.warnings:
            raise CurationError("; ".join(trial.warnings))
        parents = [(parent, trial.parameters[f"{parent}_version"]) for parent in drawn_from(trial.policy)]
        made = freeze(lake, trial.policy, trial.judged, trial.parameters, parents)
        digest = trial.policy.digest(trial.parameters)
        held = committed_policies(lake).get(name)
        if held is None or (held.text, held.parameters) != (trial.text, trial.overrides):
            store(lake, name, trial.text, digest, trial.overrides, made["version"])
        return made, trial


def reset_policy(lake: Lake, name: str) -> None:
    """Take the committed policy of `name` out of force: the next refresh uses the packaged one again, or none where the
    package has none. Versions stay. Raises PolicyError where nothing was committed."""
    held = committed_policies(lake)
    if name not in held:
        raise PolicyError(f"no committed policy is in force for {name!r}; there are {', '.join(held) or 'none'}")
    store(lake, name, None, None, {}, None)


# --- reading what is asked -------------------------------------------------------------------------------------------


def _read(file: Path, name: str) -> tuple[Policy, str]:
    if not re.fullmatch(DATASET_NAME, name):
        raise PolicyError(f"a dataset cannot be called {name!r}: lower-case letters, digits and underscores, a letter first (--dataset)")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"the policy file {file} cannot be read: {error}") from None
    return read_policy(name, text, str(file)), text


def last_parameters(lake: Lake) -> dict[str, Any]:
    """The $parameters of the newest refresh: of the newest tracked run, else the defaults over every source in the lake."""
    from dreamlite_data.refresh import policy_parameters

    runs = lake.query("SELECT config_json FROM runs WHERE config_json LIKE '%\"refresh\"%' ORDER BY started_at DESC LIMIT 1").to_pylist()
    config = json.loads(runs[0]["config_json"]) if runs else {}
    try:
        settings = RefreshSettings.model_validate(config.get("refresh", {}))
    except ValidationError as error:
        raise PolicyError(f"the settings of the newest run in {lake.root} are of another version of this package: {error}") from None
    parameters = policy_parameters(lake, settings, config.get("seed", 0))
    return parameters if runs else parameters | _stored_origin(lake)


def _stored_origin(lake: Lake) -> dict[str, Any]:
    """Sources, seed and what else is no setting of a policy, as the newest dataset version read them; without one, every source
    that the lake has."""
    stored = lake.query(
        "SELECT r.parameters FROM policy_rules r JOIN datasets d ON d.name = r.dataset AND d.version = r.version "
        "ORDER BY d.snapshot, r.dataset"
    )["parameters"].to_pylist()
    known = [json.loads(text) for text in stored]
    sources = lake.query("SELECT DISTINCT source FROM current_ingest ORDER BY source")["source"].to_pylist()
    read = {name: value for values in known for name, value in values.items() if not name.endswith("_version")}
    return {"sources": sources, "seed": "0"} | {name: value for name, value in read.items() if name not in PolicySettings.model_fields}


def _parameters(lake: Lake, policy: Policy, overrides: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    parameters = last_parameters(lake)
    versions = {f"{parent}_version": _newest(lake, parent) for parent in drawn_from(policy)}
    lost = [name.removesuffix("_version") for name, version in versions.items() if version is None]
    if lost:
        raise PolicyError(f"{where} draws from {', '.join(lost)}, of which the lake has no version")
    known = {*_names(policy), "allow_unanimous"}
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it reads {', '.join(sorted(known))}"
            raise PolicyError(f"--set {name}: {where} reads no such parameter; {hint}")
    given = {**overrides, **_checked({name: value for name, value in overrides.items() if name in PolicySettings.model_fields})}
    if given.get("quotas"):
        given["quotas"] = given_quotas(given).as_parameter()  # as a mix means today: a committed policy must not follow a later taxonomy
    check_rows(given.get("quota_rows"))
    merged = {**parameters, **given, **{name: version for name, version in versions.items() if name not in given}}
    unset = sorted(_names(policy) - merged.keys())
    if unset:
        raise PolicyError(f"{where} reads ${', $'.join(unset)}, which no setting provides: give it with --set {unset[0]}=VALUE")
    return merged, given


def _names(policy: Policy) -> set[str]:
    """Parameters in the SQL, those that switch a rule, and those of quotas."""
    of_quota = {*QUOTA_PARAMETERS, *parameters_of(policy.quota)} if policy.quota is not None else set()
    return policy.parameters() | {rule.when for rule in policy.rules if rule.when} | of_quota


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    try:
        settings = PolicySettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise PolicyError(f"--set {first['loc'][0]}={first['input']}: {first['msg'].lower()}") from None
    return {name: getattr(settings, name) for name in values}


# --- comparing with the current version ------------------------------------------------------------------------------


def _newest(lake: Lake, name: str) -> int | None:
    return lake.query("SELECT max(version) AS version FROM datasets WHERE name = $name", {"name": name})["version"][0].as_py()


def _differences(lake: Lake, name: str, version: int | None, judged: pa.Table) -> tuple[pa.Table, pa.Table]:
    values = {"name": name, "version": version}
    narrow = judged.select(["row_id", "verdict", "first_rule", "margin"])
    now = "SELECT row_id FROM dataset_rows WHERE name = $name AND version = $version"
    entering = lake.query(
        "SELECT j.row_id, coalesce(d.first_rule, 'not offered before') AS rule, d.margin FROM judged j "
        f"LEFT JOIN (SELECT * FROM decisions WHERE dataset = $name AND version = $version) d ON d.row_id = j.row_id "
        f"WHERE j.verdict = 'keep' AND j.row_id NOT IN ({now}) ORDER BY d.margin DESC NULLS LAST, j.row_id",
        values,
        judged=narrow,
    )
    leaving = lake.query(
        f"SELECT o.row_id, coalesce(j.first_rule, 'not offered now') AS rule, j.margin FROM ({now}) o "
        "LEFT JOIN judged j ON j.row_id = o.row_id WHERE coalesce(j.verdict, 'drop') = 'drop' "
        "ORDER BY j.margin DESC NULLS LAST, o.row_id",
        values,
        judged=narrow,
    )
    return entering, leaving


def _funnel(lake: Lake, name: str, outcome: list[tuple[Rule, int, int]]) -> list[dict[str, Any]]:
    before = {
        row["rule"]: row
        for row in lake.query("SELECT rule, rows_in, rejected, rows_out FROM funnel WHERE dataset = $name", {"name": name}).to_pylist()
    }
    rows = [
        {"rule": rule.name, "rows_in": reached, "rejected": rejected, "rows_out": reached - rejected} for rule, reached, rejected in outcome
    ]
    rows += [
        {"rule": rule, "rows_in": None, "rejected": None, "rows_out": None} for rule in before if rule not in {r["rule"] for r in rows}
    ]
    return [
        {**row, **{f"current_{part}": before.get(row["rule"], {}).get(part) for part in ("rows_in", "rejected", "rows_out")}}
        for row in rows
    ]
