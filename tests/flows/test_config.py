"""A configuration is right before anything runs, and a wrong one says what, where and how to mend it."""

import pytest

from flows.config import ConfigError, PipelineConfig, load_config, presets, setting_names
from flows.engine import until_step
from flows.retrain import retrain_steps


@pytest.mark.parametrize("name", ["smoke", "mini", "mini-long", "paper", "finetune"])
def test_every_shipped_preset_is_valid_and_named(name):
    assert name in presets()
    assert load_config(name).preset == name


def test_paper_is_the_published_model():
    paper = load_config("paper")
    assert (paper.model.preset, paper.model.hidden_state, paper.model.size_px) == ("official", "pre_norm", 1024)
    assert paper.refresh.executor == "ray" and paper.export.derived_from_release


def test_overrides_take_yaml_values_at_any_depth_and_in_lists():
    config = load_config(
        "mini", ["train.t2i.steps=7", "train.edit.datasets=[edit, sft]", "refresh.photos.enabled=false", "gates.0.max_drop=0.5"]
    )
    assert config.train.t2i.steps == 7
    assert config.train.edit.datasets == ("edit", "sft")
    assert config.refresh.photos.enabled is False
    assert config.gates[0].max_drop == 0.5


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.t2i.stepz=3", "unknown setting 'train.t2i.stepz' in --set 'train.t2i.stepz=3'; did you mean 'train.t2i.steps'?"),
        ("fault_share=0", "unknown setting 'fault_share' in --set 'fault_share=0'; did you mean 'refresh.scenes.fault_share'?"),
        ("train.t2i.steps=-3", "setting 'train.t2i.steps' in --set 'train.t2i.steps=-3': input should be greater than 0, not -3"),
        ("seed", "--set 'seed' is not of the form name.of.setting=value"),
        ("seed.x=1", "'seed' is a single value in this preset and has no 'x'"),
        ("gates.9.max_drop=1", "must be the index of one of 9 list items"),
        ("gates=[{after: evaluate_nothing, metric: a/b, min: 1}]", "no step with gates 'evaluate_nothing'"),
        ("gates=[{after: evaluate_t2i, metric: a/b, compared_to: evaluate_sft, max_drop: 1}]", "'evaluate_sft' must come before"),
        ("gates=[{after: evaluate_t2i, metric: a/b}]", "a gate needs 'min'"),
        ("train.t2i.tasks.generate=0.5", "must sum to 1"),
        ("train={t2i: null, edit: null, joint: null, sft: null, refl: null, dmd2: null}", "every stage is null"),
        ("train={t2i: null, edit: null, joint: null, sft: null, refl: {steps: 1}, dmd2: null}", "name one in start.checkpoint"),
        ("train.sft=null", "gates: 'evaluate_refl' is compared with 'evaluate_sft', whose stage is null"),
        ("train.t2i.lora.rnk=4", "did you mean 'train.t2i.lora.rank'?"),
    ],
)
def test_a_wrong_override_is_one_sentence_saying_where(override, sentence):
    with pytest.raises(ConfigError) as error:
        load_config("mini", [override])
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_wrong_key_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: mine\nsead: 1\n")
    with pytest.raises(ConfigError, match="unknown setting 'sead' in mine.yaml; did you mean 'seed'"):
        load_config(str(file))


def test_broken_yaml_and_unknown_preset_are_said_plainly(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("a: [1,\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(str(file))
    with pytest.raises(ConfigError, match="no preset 'mini2'.*did you mean 'mini'"):
        load_config("mini2")


def test_a_file_says_what_is_other_than_in_the_preset_that_it_extends(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: mini\nseed: 5\ntrain: {edit: null, t2i: {steps: 9}}\ngates: []\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ntrain: {t2i: {batch: 4}, sft: {lora: {rank: 2}}}\n")
    mini, mine = load_config("mini"), load_config(str(tmp_path / "mine.yaml"), ["train.sft.steps=3"])
    assert (mine.preset, mine.seed, mine.gates, mine.train.edit) == ("mine", 5, [], None)
    assert (mine.train.t2i.steps, mine.train.t2i.batch) == (9, 4)
    assert mine.train.t2i.model_copy(update={"steps": mini.train.t2i.steps, "batch": mini.train.t2i.batch}) == mini.train.t2i
    assert (mine.train.sft.lora.rank, mine.train.sft.steps) == (2, 3) and mine.refresh == mini.refresh


def test_an_error_is_named_by_the_file_that_makes_it(tmp_path):
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text("extends: mini\ntrain: {t2i: {steps: -1}}\n")
    mine.write_text("extends: base.yaml\ntrain: {t2i: {bach: 4}}\n")
    with pytest.raises(ConfigError, match="unknown setting 'train.t2i.bach' in mine.yaml"):
        load_config(str(mine))
    mine.write_text("extends: base.yaml\n")
    with pytest.raises(ConfigError, match="setting 'train.t2i.steps' in base.yaml"):
        load_config(str(mine))
    base.write_text("extends: mine.yaml\n")
    with pytest.raises(ConfigError, match="extends itself: mine.yaml -> base.yaml -> mine.yaml"):
        load_config(str(mine))
    base.write_text("extends: minni\n")
    with pytest.raises(ConfigError, match="no preset 'minni', which base.yaml extends.*did you mean 'mini'"):
        load_config(str(mine))


def test_setting_names_are_the_ones_that_set_takes():
    names = set(setting_names())
    assert {"seed", "refresh.scenes.t2i_rows", "train.dmd2.steps", "exec.engine"} <= names
    assert set(PipelineConfig.model_fields) <= names


@pytest.mark.parametrize(("splits", "chosen", "judged"), [
    ("{}", None, "heldout"), ("{train: 0.9, test: 0.05, validation: 0.05}", None, "validation"), ("{train: 0.9, test: 0.1}", None, "test"),
    ("{train: 0.9, test: 0.05, validation: 0.05}", "test", "test"),
])  # fmt: skip
def test_stages_are_judged_on_a_split_that_the_datasets_have(splits, chosen, judged):
    config = load_config("mini", [f"refresh.policy.splits={splits}", *([f"evaluate.split={chosen}"] if chosen else [])])
    assert config.judging.split == judged
    for wrong in ("train", "heldout" if splits != "{}" else "test"):
        with pytest.raises(ConfigError, match=f"evaluate.split is '{wrong}': judge on a split of refresh.policy.splits beside train"):
            load_config("mini", [f"refresh.policy.splits={splits}", f"evaluate.split={wrong}"])


def planned(*overrides):
    """{step: the steps it reads} of a planned retrain."""
    return {step.name: step.parents for step in retrain_steps(load_config("mini", overrides))}


def test_a_stage_that_is_left_out_is_stepped_over():
    whole, direct = planned(), planned("train.edit=null")
    assert "edit" in whole["joint"] and "t2i" in whole["edit"]
    assert set(whole) - set(direct) == {"edit", "evaluate_edit"}
    assert "t2i" in direct["joint"], "joint starts from t2i: the ablation of the paper"
    short = planned("train.refl=null", "train.dmd2=null", "gates=[]")
    assert not {"refl", "dmd2", "export", "evaluate_export"} & set(short), "without a student there is nothing to export"


def test_a_given_checkpoint_is_where_the_first_stage_and_the_frozen_parts_come_from():
    steps = planned("start.checkpoint=weights", "train.t2i=null")
    assert steps["start"] == [] and "start" in steps["edit"] and steps["components"] == ["start"]
    assert "start" not in planned()
    config = load_config("mini", ["start.checkpoint=weights", "train={t2i: null, edit: null, joint: null, sft: null, refl: null, dmd2: {steps: 1}}", "gates=[]"])
    needed = [step.name for step in until_step(retrain_steps(config), "evaluate_dmd2")]
    assert "start" in needed and "dmd2" in needed


def test_a_curriculum_of_sizes_ends_at_the_size_of_the_model():
    paper = load_config("paper")
    assert [phase.size_px for phase in paper.train.t2i.size_phases] == [256, 512, 1024] and paper.model.aspect_buckets
    with pytest.raises(ConfigError, match="train.t2i.size_phases ends at 1024 px, but model.size_px is 512"):
        load_config("paper", ["model.size_px=512"])
    assert not load_config("mini").train.t2i.size_phases
    sizes = ["train.t2i.size_phases=[{size_px: 512, steps: 5}, {size_px: 1024, steps: 5}]", "train.t2i.steps=10"]
    with pytest.raises(ConfigError, match="ends at 1024 px, but model.size_px is 64"):
        load_config("mini", sizes)
    given = load_config("mini", [*sizes, "start.checkpoint=weights/base"])  # whose size is known when it is read
    assert given.train.t2i.size_phases[-1].size_px == 1024


@pytest.mark.parametrize(("names", "said"), [
    (("a", "a"), "two sources named 'a'"), (("photos_256",), "what rows of the pipeline's own are called"), (("exact",), "rename it"),
])  # fmt: skip
def test_sources_whose_rows_would_be_taken_for_others_are_refused(names, said):
    sources = ", ".join(f"{{name: {name}, kind: folder, path: p{number}}}" for number, name in enumerate(names))
    with pytest.raises(ConfigError, match=said):
        load_config("mini", [f"refresh.extra_sources=[{sources}]"])


def test_a_value_that_is_no_yaml_is_named():
    with pytest.raises(ConfigError, match="has no readable value"):
        load_config("mini", ["refresh.photos.max_px=[1"])


def test_a_network_is_not_described_beside_a_checkpoint_to_start_from():
    with pytest.raises(ConfigError, match="--set model.channels.*the network is that of start.checkpoint, weights/base; leave it out"):
        load_config("mini", ["start.checkpoint=weights/base", "model.channels=[32, 48]"])
    assert load_config("mini", ["model.channels=[32, 48]"]).model.channels == (32, 48)
