"""A key changes exactly when the bytes could: spec, inputs, seed, code of a helper; never exec settings or looks."""

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel

from flows.key import PACKAGES, SourceTree, canonical_json, difference, digest, spec_of
from flows.step import Step, StepRecord, StepResult


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project with the three packages: a step's module, a helper two imports away, a policy, a stranger."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "dreamlite_data/refresh.py").write_text(
        "from dreamlite_data import middle, lake, settings\n\n\ndef run():\n    from . import late\n    return middle.twice(late.ONE), f'{lake}.sql'\n"
    )
    (tmp_path / "dreamlite_data/middle.py").write_text("from dreamlite_data.deep import double as twice\n")
    (tmp_path / "dreamlite_data/deep.py").write_text('"""Doc."""\n\n\ndef double(x):\n    """Twice."""\n    return 2 * x\n')
    (tmp_path / "dreamlite_data/late.py").write_text("ONE = 1\n")
    (tmp_path / "dreamlite_data/keep.sql").write_text("-- keep the sharp\n-- @rule sharp margin\nSELECT *\nFROM op_quality WHERE sharpness > 1\n")
    (tmp_path / "dreamlite_data/rules.json").write_text("{}")
    (tmp_path / "dreamlite_data/lake.py").write_text("RETRIES = 3\n")
    (tmp_path / "dreamlite_data/settings.py").write_text("THRESHOLD = 1\n")
    (tmp_path / "trainers/loop.py").write_text("STEPS = 3\n")
    return tmp_path


def key(root: Path, **changes) -> str:
    step = Step(**{"name": "quality", "run": lambda ctx: StepResult(), "code": ("dreamlite_data.refresh",), "spec": {"a": 1}, **changes})
    return digest(step.parts({}, SourceTree(root)))


def test_closure_follows_imports_through_helpers_and_functions(tree):
    assert SourceTree(tree).closure(["dreamlite_data.refresh"]) == [
        "dreamlite_data",
        "dreamlite_data.deep",
        "dreamlite_data.late",
        "dreamlite_data.middle",
        "dreamlite_data.refresh",
    ]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("dreamlite_data/deep.py", "def double(x):\n    return 3 * x\n"),
        ("dreamlite_data/late.py", "ONE = 2\n"),
        ("dreamlite_data/__init__.py", "FLAG = True\n"),
        ("dreamlite_data/keep.sql", "-- @rule sharp margin\nSELECT * FROM op_quality WHERE sharpness > 2\n"),
        ("dreamlite_data/keep.sql", "-- @rule sharp\nSELECT * FROM op_quality WHERE sharpness > 1\n"),
    ],
)
def test_a_change_in_anything_the_step_uses_changes_the_key(tree, file, text):
    before = key(tree)
    (tree / file).write_text(text)
    assert key(tree) != before


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("dreamlite_data/deep.py", '"""Other words."""\n# a comment\ndef double( x ):\n    """Same."""\n\n    return (2 * x)\n'),
        ("dreamlite_data/keep.sql", "-- another remark\n-- @rule sharp margin\nSELECT *   FROM op_quality\nWHERE sharpness > 1\n"),
        ("trainers/loop.py", "STEPS = 4\n"),
        ("dreamlite_data/lake.py", "RETRIES = 4\n"),
        ("dreamlite_data/settings.py", "THRESHOLD = 2\n"),
        ("dreamlite_data/rules.json", "[]"),
        ("dreamlite_data/unused.py", "X = 1\n"),
    ],
)
def test_looks_plumbing_and_strangers_do_not_change_the_key(tree, file, text):
    before = key(tree)
    (tree / file).write_text(text)
    assert key(tree) == before


def test_alone_counts_the_module_but_not_its_imports(tree):
    (tree / "trainers/stages.py").write_text("from trainers import loop\n")
    before = key(tree, alone=("trainers.stages",))
    (tree / "trainers/loop.py").write_text("STEPS = 4\n")
    assert key(tree, alone=("trainers.stages",)) == before
    (tree / "trainers/stages.py").write_text("from trainers import loop\nEXTRA = 1\n")
    assert key(tree, alone=("trainers.stages",)) != before


def test_naming_code_that_is_not_there_is_refused(tree):
    with pytest.raises(ValueError, match="dreamlite_data.nowhere"):
        key(tree, code=("dreamlite_data.nowhere",))


@pytest.mark.parametrize(
    "changes", [{"spec": {"a": 2}}, {"spec": {"a": 1, "b": None}}, {"seed": 1}, {"name": "caption"}, {"external": lambda: {"folder": "x"}}]
)
def test_spec_seed_name_and_outside_content_change_the_key(tree, changes):
    assert key(tree, **changes) != key(tree)


class Inner(BaseModel):
    steps: int = 3
    device: str = "cpu"


class Settings(BaseModel):
    EXEC_FIELDS: ClassVar = frozenset({"shard_target_mb"})

    inner: Inner = Inner()
    threshold: float = 0.5
    workers: int = 1
    executor: str = "local"
    shard_target_mb: int = 16


def test_exec_settings_never_reach_the_spec_and_every_other_does():
    base = spec_of(Settings())
    moved = Settings(workers=9, executor="ray", shard_target_mb=1, inner=Inner(device="cuda"))
    assert canonical_json(spec_of(moved)) == canonical_json(base)
    assert spec_of(Settings(inner=Inner(steps=4))) != base
    assert spec_of(Settings(threshold=0.6)) != base


def test_an_input_counts_by_the_item_that_is_read(tmp_path, tree):
    def record(**digests: str) -> StepRecord:
        return StepRecord("curate", "k", "r", 0.0, tmp_path, {}, {}, digests, {})

    step = Step("t2i", lambda ctx: StepResult(), code=("trainers.loop",), inputs=("curate:t2i",))
    sources = SourceTree(tree)
    base = digest(step.parts({"curate": record(t2i="1", edit="1")}, sources))
    assert digest(step.parts({"curate": record(t2i="1", edit="2")}, sources)) == base
    assert digest(step.parts({"curate": record(t2i="2", edit="1")}, sources)) != base


def test_difference_names_the_part():
    old = {"spec": {"a": 1, "b": {"c": 2}}, "code": {"x": "1"}}
    new = {"spec": {"a": 1, "b": {"c": 3}}, "code": {"x": "1", "y": "2"}}
    assert difference(old, new) == [("code.y", None, "2"), ("spec.b.c", 2, 3)]


def test_canonical_json_refuses_what_has_no_stable_text():
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})
    with pytest.raises(TypeError, match="plain JSON"):
        canonical_json({"a": object()})


def code_of(step_name: str) -> set[str]:
    """What the real step's key sees of the real source tree."""
    from flows.config import load_config
    from flows.retrain import retrain_steps

    step = next(step for step in retrain_steps(load_config("smoke")) if step.name == step_name)
    return set(SourceTree().digests(step.code, step.alone))


def test_the_real_keys_see_policies_views_and_prompts():
    assert {"dreamlite_data/policies/t2i.sql", "dreamlite_data/views.sql", "dreamlite_data.policies.curate"} <= code_of("curate")
    assert "dreamlite_data/rewards/data/hpsv3.json" in code_of("score")


def test_a_recipe_is_in_the_key_of_its_stages_only():
    assert "trainers.recipes.dmd2" in code_of("dmd2")
    for stage in ("t2i", "edit", "joint", "sft"):
        seen = code_of(stage)
        assert "trainers.recipes.supervised" in seen and "trainers.loop" in seen
        assert not {"trainers.recipes.dmd2", "trainers.recipes.refl", "dreamlite_data.policies.curate"} & seen
    assert "dreamlite_data.rewards.model" in code_of("refl")
    assert "trainers.export.runner" in code_of("evaluate_export")


def test_every_setting_whose_declaration_is_in_no_key_is_in_the_spec_of_a_step():
    """Otherwise a changed default would be taken for an old result."""
    from flows.config import load_config
    from flows.retrain import retrain_steps

    config = load_config("smoke", ["components.source=train"])
    said = canonical_json([step.spec for step in retrain_steps(config)])
    refresh = config.refresh
    groups = [config.components, config.model, config.judging, config.export]
    groups += [refresh.scenes, refresh.photos, refresh.ingest, refresh.policy]
    groups += [getattr(config.train, stage) for stage in type(config.train).model_fields]
    for group in groups:
        assert canonical_json(spec_of(group)) in said, type(group).__name__
