"""What `dreamlite plan` says of compute: anchored in the published figures of the network, and consistent with itself.
No GPU, no weights, no data."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.config import load_config
from trainers.compute import Cluster, Network, disk_rows, flops_per_sample, forwards_per_sample, memory_rows, work_rows
from trainers.lora import add_lora
from trainers.model import OFFICIAL_PARAMETERS, build_unet, unet_config
from trainers.network_cost import adapter_parameters, forward_flops
from trainers.settings import DMD2Settings, LoraSettings, ModelSettings, SupervisedSettings

STAGES = ("t2i", "edit", "joint", "sft", "refl", "dmd2")


@pytest.fixture(scope="module")
def paper():
    return load_config("paper")


@pytest.fixture(scope="module")
def network(paper) -> Network:
    return Network(unet_config(paper.model, 2048, 32), 256)


@pytest.fixture(scope="module")
def stages(paper) -> dict:
    """At one size, 256 px, which is counted in seconds."""
    found = {name: getattr(paper.train, name) for name in STAGES}
    return {name: settings.model_copy(update={"size_phases": ()}) if "size_phases" in type(settings).model_fields else settings for name, settings in found.items()}


@pytest.mark.parametrize(("side", "tflop"), [(32, 0.158), (64, 0.640), (128, 2.822)])
def test_a_forward_pass_of_the_official_network_costs_what_was_published(paper, side: int, tflop: float) -> None:
    assert forward_flops(unet_config(paper.model, 2048, side), side) / 1e12 == pytest.approx(tflop, rel=2e-3)


def test_where_a_network_was_loaded_from_does_not_change_its_cost(paper) -> None:
    config = unet_config(paper.model, 2048, 32)
    assert forward_flops(config | {"_name_or_path": Path("a checkpoint")}, 32) == forward_flops(config, 32)


def test_memory_of_the_official_network(network: Network, stages: dict) -> None:
    cost = network.unet()
    assert cost.parameters == OFFICIAL_PARAMETERS
    # trainers.md 7.1: 0.64 and 0.05 GiB a sample at 256 px, without and with gradient checkpointing.
    assert cost.activation_bytes / 2**30 == pytest.approx(0.6, abs=0.05)
    assert cost.checkpointed_bytes < 0.2 * cost.activation_bytes
    rows = {row["stage"]: row for row in memory_rows(stages, network, Cluster())}
    parameters_gb = OFFICIAL_PARAMETERS / 1e9
    held = {part: rows["t2i"][f"{part}_gb"] / parameters_gb for part in ("weights", "gradients", "optimizer", "ema", "frozen", "rewards")}
    assert held == pytest.approx({"weights": 4, "gradients": 8, "optimizer": 8, "ema": 4, "frozen": 0, "rewards": 0})
    assert rows["dmd2"]["optimizer_gb"] == pytest.approx(16 * parameters_gb), "the student and the fake score"
    assert rows["refl"]["rewards_gb"] == pytest.approx(31.0)
    sharded = {row["stage"]: row for row in memory_rows(stages, network, Cluster(count=8), shard_rewards=True)}
    assert sharded["refl"]["rewards_gb"] == pytest.approx(31.0 / 8)
    assert Cluster.of("l4", 1, 0.28).gpu == "L4", "and not the L40S, whose name begins alike"
    small = {row["stage"]: row["fits"] for row in memory_rows(stages, network, Cluster.of("l4", 1, 0.28))}
    assert rows["t2i"]["fits"] == "yes" and small["refl"].startswith("no")


def test_an_adapter_is_planned_as_what_it_trains(network: Network) -> None:
    whole = DMD2Settings(steps=1, batch=1)
    adapted = whole.model_copy(update={"lora": LoraSettings(rank=4, target_modules=("to_q",))})
    unet = build_unet(ModelSettings(), 64, 8)
    add_lora(unet, adapted.lora, 0)
    own = adapter_parameters(unet.config, adapted.lora)
    assert own == sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    small = Network(unet.config, 64)
    (memory,) = memory_rows({"dmd2": adapted}, small, Cluster())
    (disk,) = [row["gb"] for row in disk_rows({"dmd2": adapted}, small, {"generate": 0, "edit": 0}, None) if "resume" in row["what"]]
    assert {part: memory[f"{part}_gb"] * 1e9 / own for part in ("weights", "gradients", "optimizer", "ema")} == pytest.approx(
        {"weights": 2 * 4, "gradients": 2 * 4, "optimizer": 2 * 8, "ema": 4}
    )
    assert memory["frozen_gb"] * 1e9 == 4 * small.unet().parameters, "student, fake score and teacher share it"
    assert disk * 1e9 == pytest.approx(2 * own * (2 * 12 + 4))
    assert forwards_per_sample(adapted, 8) == forwards_per_sample(whole, 8) - 1 - whole.fake_steps


def test_passes_of_a_sample_follow_from_the_algorithms() -> None:
    supervised = SupervisedSettings(tasks={"generate": 1.0}, datasets=("t2i",), steps=1)
    assert forwards_per_sample(supervised, 8) == 3
    # trainers.md 7.2: student 1.5 + 1 + 2, guided teacher 2 or 3, fake 1; five times 2.5 + 3 for the fake score.
    dmd2 = DMD2Settings(steps=1, fake_steps=5, guidance_scale=3.5, image_guidance_scale=1.5)
    assert forwards_per_sample(dmd2, 8) == 4.5 + 2.5 + 1 + 5 * 5.5
    assert forwards_per_sample(dmd2.model_copy(update={"guidance_scale": 1.0, "image_guidance_scale": 1.0}), 8) == 4.5 + 1 + 1 + 5 * 5.5


def test_hours_follow_from_work_and_gpus(network: Network, stages: dict) -> None:
    eight, sixteen = (work_rows(stages, network, Cluster(count=count)) for count in (8, 16))
    for one, two in zip(eight, sixteen, strict=True):
        assert two["gpu_hours"] == pytest.approx(one["gpu_hours"])
        assert two["hours"] == pytest.approx(one["hours"] / 2)
    t2i = eight[0]
    assert t2i["samples_per_s"] * t2i["hours"] * 3600 == pytest.approx(t2i["samples"])
    assert t2i["samples_per_s"] / 8 == pytest.approx(584, rel=0.01), "trainers.md 7.2: H100 at 256 px and 28 %"
    assert eight[-1]["gpu_hours"] == pytest.approx(sum(row["gpu_hours"] for row in eight[:-1]))


def test_sizes_of_a_stage_are_counted_step_by_step(network: Network) -> None:
    sizes = [{"size_px": 128, "steps": 3}, {"size_px": 256, "steps": 1}]
    settings = SupervisedSettings(tasks={"generate": 1.0}, datasets=("t2i",), steps=4, batch=2, size_phases=sizes)
    small, large = (3 * forward_flops(network.config, side) for side in (16, 32))
    at = flops_per_sample(settings, network.config, 256, 8)
    assert [at(step) for step in range(5)] == [small, small, small, large, large]
    (row, _) = work_rows({"t2i": settings}, network, Cluster())
    assert row["tflop_per_sample"] * 1e12 == pytest.approx((3 * small + large) / 4)


def test_disk_of_latents_and_states(network: Network, stages: dict) -> None:
    rows = {row["what"]: row["gb"] for row in disk_rows(stages, network, {"generate": 1_000_000, "edit": 0}, None)}
    assert rows["latents of 1,000,000 images"] == pytest.approx(8.192), "4 x 32 x 32 numbers of 2 bytes"
    assert rows["t2i: resume state (twice while it is replaced)"] == pytest.approx(2 * 16 * OFFICIAL_PARAMETERS / 1e9)
    assert rows["all"] == pytest.approx(sum(gb for what, gb in rows.items() if what != "all"))


def test_the_command_prints_the_tables_and_refuses_an_unknown_gpu(tmp_path) -> None:
    arguments = ["plan", "--preset", "mini", "--lake", str(tmp_path / "lake")]
    said = CliRunner().invoke(app, [*arguments, "--gpu", "l4", "--gpus", "2"])
    assert said.exit_code == 0, said.output
    assert "2 x L4 at 28%" in said.output and "gpu_hours" in said.output and "resume state" in said.output
    wrong = CliRunner().invoke(app, [*arguments, "--gpu", "tpu"])
    assert wrong.exit_code == 2 and "no data sheet of a GPU 'tpu'" in wrong.output
    assert "gpu_hours" not in CliRunner().invoke(app, arguments).output
