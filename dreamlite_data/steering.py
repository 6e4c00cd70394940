"""Plan on the driver which edits are drawn from the pictures that have no plan yet, given what the lake holds by now.
The plan is committed before any of it is carried out, so a run that was cut off carries on with the same draws."""

from __future__ import annotations

import warnings
from collections import Counter

from dreamlite_data import schema
from dreamlite_data.lake import Lake
from dreamlite_data.operators.base import op_version, stamp
from dreamlite_data.operators.edit_plan import EditPlan
from dreamlite_data.operators.edit_routes import PLANNED_ROUTES, photo_subjects, route_measurement
from dreamlite_data.operators.run import make_current, pending
from dreamlite_data.settings import RefreshSettings
from dreamlite_data.taxonomy import EditType, load_taxonomy


def plan_edits(lake: Lake, settings: RefreshSettings) -> dict[str, int | str]:
    """Give every picture without a plan one. Returns rows and failed, and as `cannot` the quotas that no active route makes."""
    plan = EditPlan.of(settings)
    version = op_version(plan)
    images = pending(lake, photo_subjects(settings), plan.table, version)["image_id"].to_pylist()
    answer: dict[str, int | str] = {"rows": len(images), "failed": 0}
    cannot = plan.cannot()
    if cannot:
        answer["cannot"] = ", ".join(cannot)
    if images:
        if cannot:
            warnings.warn(f"no route that is on makes edits for the quotas {', '.join(cannot)}: the others share the draws", stacklevel=2)
        rows = plan(images, held_types(lake, settings, version))
        lake.append({plan.table: stamp(plan.table, schema.rows_table(plan.table, rows), version)})
    make_current(lake, plan.name, version, plan.config())
    return answer


def held_types(lake: Lake, settings: RefreshSettings, version: str) -> Counter[EditType]:
    """Triplets of each type that a plan of this version starts from: those of sources and pairs that no check found wrong, those that
    routes made by this plan, and those that it holds and that were not made yet."""
    held: Counter[EditType] = Counter()
    given = lake.query(
        "SELECT t.level1, t.level2, count(*) AS n FROM edit_types t JOIN triplets r ON r.row_id = t.row_id "
        "WHERE r.route NOT IN ('exact', 'composite', 'model') AND NOT r.rejected AND coalesce(r.triplet_verdict, '') <> 'fail' "
        "AND NOT coalesce(r.in_language AND NOT r.matches, false) GROUP BY ALL"
    )
    for row in given.to_pylist():
        held[EditType(row["level1"], row["level2"])] += row["n"]
    taxonomy = load_taxonomy()
    for route, name in PLANNED_ROUTES.items():
        if not lake.query(f"SELECT count(*) AS n FROM op_edit_plan WHERE op_version = $v AND len({route}) > 0", {"v": version})["n"][0].as_py():
            continue
        values = {"plan": version, "route": op_version(route_measurement(lake, settings, name).make())}
        made = lake.query(
            "SELECT e.edit_type, count(*) AS n FROM (SELECT DISTINCT unnest(edit_ids) AS edit_id FROM op_edit WHERE op_version = $route) o "
            "JOIN edits e ON e.edit_id = o.edit_id WHERE NOT coalesce(e.rejected, false) GROUP BY ALL",
            {"route": values["route"]},
        )
        for row in made.to_pylist():
            held[taxonomy.edit_type(row["edit_type"], route)] += row["n"]
        planned = lake.query(
            f"SELECT kind, count(*) AS n FROM (SELECT unnest(p.{route}) AS kind FROM op_edit_plan p ANTI JOIN "
            "(SELECT subject_id FROM op_edit WHERE op_version = $route) o ON o.subject_id = p.subject_id WHERE p.op_version = $plan) GROUP BY ALL",
            values,
        )
        for row in planned.to_pylist():
            level1, _, level2 = row["kind"].partition("/")
            held[EditType(level1, level2)] += row["n"]
    return held
