"""What is shipped to run elsewhere fits the code: entry points, parameters, pins, users, ports."""

import inspect
import re
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"

PREFECT_SCHEMA = {
    "type": "object",
    "required": ["name", "prefect-version", "pull", "deployments"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "prefect-version": {"type": "string"},
        "definitions": {"type": "object"},
        "pull": {"type": "array", "minItems": 1},
        "deployments": {
            "type": "array",
            "minItems": 2,
            "items": {
                "type": "object",
                "required": ["name", "entrypoint", "parameters", "schedules", "concurrency_limit", "work_pool"],
                "additionalProperties": False,
                "properties": {
                    "name": {"enum": ["refresh-nightly", "retrain-weekly"]},
                    "description": {"type": "string", "minLength": 10},
                    "entrypoint": {"type": "string", "pattern": r"^[\w/]+\.py:\w+$"},
                    "parameters": {"type": "object"},
                    "schedules": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["cron", "timezone"],
                            "additionalProperties": False,
                            "properties": {"cron": {"type": "string", "pattern": r"^(\S+ ){4}\S+$"}, "timezone": {"type": "string"}},
                        },
                    },
                    "concurrency_limit": {
                        "type": "object",
                        "required": ["limit", "collision_strategy"],
                        "additionalProperties": False,
                        "properties": {"limit": {"const": 1}, "collision_strategy": {"enum": ["CANCEL_NEW", "ENQUEUE"]}},
                    },
                    "work_pool": {"type": "object", "required": ["name"]},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
            },
        },
    },
}

COMPOSE_SERVICE = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {
        "image": {"type": "string"},
        "build": {"type": "object", "required": ["context", "dockerfile"], "additionalProperties": False,
                  "properties": {"context": {"const": ".."}, "dockerfile": {"const": "infra/Dockerfile"}}},
        "command": {"type": "array", "items": {"type": "string"}},
        "environment": {"type": "object", "additionalProperties": {"type": "string"}},
        "ports": {"type": "array", "items": {"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"}},
        "volumes": {"type": "array", "items": {"type": "string"}},
        "depends_on": {"type": "object", "additionalProperties": {"type": "object", "required": ["condition"]}},
        "healthcheck": {"type": "object", "required": ["test", "interval", "retries"]},
        "restart": {"enum": ["unless-stopped", "no"]},
        "shm_size": {"type": "string"},
    },
}  # fmt: skip


def load(name: str) -> dict:
    return yaml.safe_load((INFRA / name).read_text())


def test_prefect_yaml_has_the_right_shape():
    jsonschema.validate(load("prefect.yaml"), PREFECT_SCHEMA)


def test_a_misspelt_key_in_prefect_yaml_would_be_caught():
    broken = load("prefect.yaml")
    broken["deployments"][0]["shedules"] = broken["deployments"][0].pop("schedules")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, PREFECT_SCHEMA)


@pytest.mark.parametrize("name", ["refresh-nightly", "retrain-weekly"])
def test_deployment_entry_points_import_and_take_these_parameters(name):
    deployment = next(item for item in load("prefect.yaml")["deployments"] if item["name"] == name)
    file, _, function = deployment["entrypoint"].partition(":")
    assert (ROOT / file).is_file()
    flow = getattr(import_module(file.removesuffix(".py").replace("/", ".")), function)
    known = inspect.signature(flow.fn).parameters
    assert set(deployment["parameters"]) <= set(known)
    required = {item.name for item in known.values() if item.default is inspect.Parameter.empty}
    assert required <= set(deployment["parameters"])
    from flows.config import presets

    assert deployment["parameters"]["preset"] in presets()


def test_compose_has_the_right_shape_and_publishes_on_loopback_only():
    compose = load("compose.yaml")
    assert {"postgres", "prefect-server", "worker", "ray-head"} <= set(compose["services"])
    for service in compose["services"].values():
        jsonschema.validate(service, COMPOSE_SERVICE)
    used = {volume.split(":")[0] for service in compose["services"].values() for volume in service.get("volumes", [])}
    assert used == set(compose["volumes"])


def test_compose_services_wait_only_for_services_that_can_answer():
    services = load("compose.yaml")["services"]
    for service in services.values():
        for name, how in service.get("depends_on", {}).items():
            assert name in services
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[name], f"{name} is waited for but has no healthcheck"


def test_compose_holds_no_secret_and_the_worker_shares_the_lake_with_ray():
    text = (INFRA / "compose.yaml").read_text()
    assert all(value.startswith("${POSTGRES_PASSWORD:?") for value in re.findall(r"PASSWORD: (.*)", text))
    services = load("compose.yaml")["services"]
    assert "lake:/lake" in services["worker"]["volumes"] and "lake:/lake" in services["ray-head"]["volumes"]


def test_the_image_is_slim_pinned_and_ends_as_an_ordinary_user():
    lines = [line for line in (INFRA / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    words = [line.split()[0] for line in lines if re.match(r"[A-Z]+ ", line)]
    assert re.fullmatch(r"FROM python:3\.11-slim\S*", lines[0])
    assert "ADD" not in words
    assert words.index("USER") < words.index("CMD") and "USER root" not in lines
    for line in lines:
        if "COPY" in line.split()[:1]:
            for source in [word for word in line.split()[1:-1] if not word.startswith("--")]:
                assert (ROOT / source).exists(), f"the image copies {source}, which is not in the repository"


def pins() -> dict[str, str]:
    found = {}
    for line in (INFRA / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals, f"constraints.txt must be exact, not {line!r}"
            found[canonicalize_name(name)] = version
    return found


def test_every_dependency_is_pinned_to_a_version_it_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    exact = pins()
    # The postgres extra is for clusters and is not part of the tested environment; it carries its own exact pin.
    extras = project["optional-dependencies"]
    tested = ("dev", "nsfw", "ocr", "bench", "coreml", "executorch")
    for text in [*project["dependencies"], *(text for extra in tested for text in extras[extra])]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in exact, f"{name} is not in infra/constraints.txt"
        assert requirement.specifier.contains(exact[name], prereleases=True), f"{text} does not allow {exact[name]}"


def test_the_pins_are_what_the_tests_run_on():
    from importlib.metadata import version

    for name in ("duckdb", "prefect", "ray", "torch", "transformers", "diffusers", "fastapi", "pydantic"):
        assert version(name).split("+")[0] == pins()[name]


def test_make_and_ci_do_what_the_readme_says():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("venv", "retrain", "test", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, re.M)
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(ROOT / ".ci/run")], check=True)
    subprocess.run(["make", "-n", "-C", str(ROOT), "retrain", "PRESET=smoke", "LAKE=/tmp/x"], check=True, capture_output=True)


def test_every_command_in_the_readmes_exists():
    from typer.main import get_command

    from flows.cli import app

    commands = get_command(app).commands
    for file in (ROOT / "README.md", INFRA / "README.md"):
        for line in re.findall(r"^(?:\.venv/bin/)?dreamlite ([\w-]+)(.*)$", file.read_text(), re.M):
            assert line[0] in commands, f"{file.name} shows 'dreamlite {line[0]}', which does not exist"
            command, words = commands[line[0]], line[1].split("#")[0]
            if hasattr(command, "commands"):  # a group: `dreamlite policy try ...`
                name = words.split()[0]
                assert name in command.commands, f"{file.name} shows 'dreamlite {line[0]} {name}', which does not exist"
                command = command.commands[name]
            known = {option for parameter in command.params for option in parameter.opts}
            for option in re.findall(r"(?<=\s)--?[a-z-]+", words):
                assert option in known, f"{file.name} shows '{option}' for 'dreamlite {line[0]}', which has {sorted(known)}"


def test_the_tree_in_the_readme_names_every_module_and_nothing_else():
    block = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    named, folders = set(), []
    for line in filter(str.strip, block.splitlines()):
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            named.add("/".join(folders[: depth + 1]))
        assert len(line.split()) > 2, f"'{name}' has no remark"
    modules = {
        str(file.relative_to(ROOT))
        for package in ("dreamlite_data", "trainers", "flows")
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert not modules - named, f"add to the tree in README.md: {sorted(modules - named)}"
    assert all((ROOT / name).exists() for name in named), f"gone: {sorted(name for name in named if not (ROOT / name).exists())}"
