"""One configuration for the whole pipeline: a preset, then `--set a.b.c=value`, checked in full before any compute.
Composes the settings that the data and trainer packages define; adds only seed, gates and how to run."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dreamlite_data.settings import RefreshSettings
from flows.gates import Gate
from trainers.execution import Device, TrainExecution
from trainers.settings import ComponentsSettings, EvaluateSettings, ExportSettings, ModelSettings, StartSettings, TrainSettings

EngineName = Literal["prefect", "inline"]

NETWORK_SETTINGS = frozenset(f"model.{name}" for name in ("preset", "channels", "layers", "head_width", "attention_at_full_resolution"))
"""What builds a network from nothing, and is of no use to a run that starts from a checkpoint."""

PRESETS = Path(__file__).parent / "presets"
STAGES = ("t2i", "edit", "joint", "sft", "refl", "dmd2")
"""Training stages in the order in which each starts from the checkpoint of the one before."""


class ConfigError(ValueError):
    """A setting that cannot be: one clear sentence a line, saying what, where and how to mend it."""


class ExecSettings(BaseModel):
    """How to run. Nothing here can change a result, so nothing here is part of a step's key.
    Where data work runs is `refresh.executor` and `refresh.workers`."""

    model_config = ConfigDict(extra="forbid")

    threads: int | None = Field(None, ge=1, description="threads that share a batch on CPUs; None takes one for each processor")
    device: Device = Field("auto", description="of training, drawing and judging: auto takes a GPU where torch sees one, else the CPU")
    train: TrainExecution = Field(default_factory=TrainExecution, description="processes of the training steps")
    engine: EngineName = Field("prefect", description="under Prefect (tracked in its UI), or in this process only")

    @model_validator(mode="after")
    def _device_is_set_aside(self) -> ExecSettings:
        on_ray, gpus = self.train.runner == "ray", self.train.gpus_per_worker
        if on_ray and self.device == "cuda" and not gpus:
            raise ValueError("exec.device is cuda, but Ray sets no GPU aside for a worker: set exec.train.gpus_per_worker to 1")
        if on_ray and self.device == "cpu" and gpus:
            raise ValueError("exec.device is cpu, but exec.train.gpus_per_worker sets a GPU aside for each worker: set it to 0 or exec.device to auto")
        return self


class PipelineConfig(BaseModel):
    """Everything a `retrain` or `refresh` needs to know."""

    model_config = ConfigDict(extra="forbid")

    preset: str = ""
    seed: int = Field(0, ge=0, description="the one seed from which every random choice follows")
    refresh: RefreshSettings = Field(default_factory=RefreshSettings)
    components: ComponentsSettings = Field(default_factory=ComponentsSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    start: StartSettings | None = Field(None, description="a checkpoint to start the first stage from; null: from scratch")
    train: TrainSettings
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    export: ExportSettings = Field(default_factory=ExportSettings)
    gates: list[Gate] = Field(default_factory=list)
    exec: ExecSettings = Field(default_factory=ExecSettings)

    @model_validator(mode="after")
    def _gates_name_steps(self) -> PipelineConfig:
        evaluations = [f"evaluate_{stage}" for stage in STAGES] + ["export", "evaluate_export"]
        for gate in self.gates:
            for name in filter(None, (gate.after, gate.compared_to)):
                if name not in evaluations:
                    raise ValueError(f"gates: no step with gates '{name}'; there are {', '.join(evaluations)}")
            if gate.compared_to and evaluations.index(gate.compared_to) >= evaluations.index(gate.after):
                raise ValueError(f"gates: '{gate.compared_to}' must come before '{gate.after}'")
        return self

    @model_validator(mode="after")
    def _stages_have_a_start(self) -> PipelineConfig:
        if not self.stages:
            raise ValueError("train: every stage is null; leave at least one to train")
        first = self.stages[0]
        if first in ("refl", "dmd2") and self.start is None:
            raise ValueError(f"train.{first} improves a trained model, but no stage before it is trained: name one in start.checkpoint")
        left_out = [f"evaluate_{stage}" for stage in STAGES if stage not in self.stages]
        for gate in self.gates:
            if gate.compared_to in left_out and gate.after not in left_out:
                raise ValueError(f"gates: '{gate.after}' is compared with '{gate.compared_to}', whose stage is null; compare with another")
        return self

    @model_validator(mode="after")
    def _judged_on_a_split_that_is_there(self) -> PipelineConfig:
        names, chosen = self.refresh.policy.split_names(), self.evaluate.split
        if chosen is not None and (chosen not in names or chosen == "train"):
            raise ValueError(f"evaluate.split is '{chosen}': judge on a split of refresh.policy.splits beside train: {', '.join(name for name in names if name != 'train')}")
        return self

    @model_validator(mode="after")
    def _sizes_end_at_the_model_s(self) -> PipelineConfig:
        if self.start is not None and "size_px" not in self.model.model_fields_set:
            return self  # the checkpoint says the size: the stage compares
        for stage in STAGES:
            phases = getattr(getattr(self.train, stage), "size_phases", ())
            if phases and phases[-1].size_px != self.model.size_px:
                raise ValueError(
                    f"train.{stage}.size_phases ends at {phases[-1].size_px} px, but model.size_px is {self.model.size_px}: end with that size"
                )
        return self

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that are trained, in order."""
        return tuple(stage for stage in STAGES if getattr(self.train, stage) is not None)

    @property
    def judging(self) -> EvaluateSettings:
        """How stages are judged, with the split by name: validation where there is one, for a test split is for the end."""
        names = [name for name in self.refresh.policy.split_names() if name != "train"]
        by_default = "validation" if "validation" in names else names[0]
        return self.evaluate.model_copy(update={"split": self.evaluate.split or by_default})


def presets() -> list[str]:
    """Names of the presets that ship with the project."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(preset: str = "mini", overrides: Sequence[str] = ()) -> PipelineConfig:
    """The validated configuration of a preset (a name, or a path to a YAML file) with 'a.b.c=value' overrides.

    What a file does not say is taken from the preset that its `extends` names, if it names one. Raises ConfigError with one
    sentence per mistake.
    """
    files = _files(preset)
    values = functools.reduce(_over, [own for _, own in reversed(files)])
    values["preset"] = files[0][1].get("preset", files[0][0].stem)
    from_command: dict[str, str] = {}
    for text in overrides:
        dotted, equals, value = text.partition("=")
        dotted = dotted.strip()
        if not equals or not dotted:
            raise ConfigError(f"--set '{text}' is not of the form name.of.setting=value")
        from_command[dotted] = text
        try:
            _put(values, dotted, yaml.safe_load(value) if value else None, text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set '{text}' has no readable value: {' '.join(str(error).split())}") from None
    where = _Where(files, from_command)
    start = values.get("start")
    shape = [name for name in from_command if name in NETWORK_SETTINGS]
    if shape and isinstance(start, dict) and start.get("checkpoint"):
        raise ConfigError(f"--set {shape[0]}: the network is that of start.checkpoint, {start['checkpoint']}; leave it out")
    if unknown := [_unknown_sentence(name, where) for name in _unknown(values, PipelineConfig)]:
        raise ConfigError("\n".join(unknown))
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        lines = [_sentence(item, where) for item in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _files(preset: str) -> list[tuple[Path, dict[str, Any]]]:
    """The file of a preset and what it holds, then those of the preset that it extends, and so on."""
    files: list[tuple[Path, dict[str, Any]]] = []
    named: str | None = preset
    while named is not None:
        path = Path(named) if named.endswith((".yaml", ".yml")) else PRESETS / f"{named}.yaml"
        if not path.is_file():
            by = f", which {files[-1][0].name} extends" if files else ""
            raise ConfigError(
                f"no preset '{named}'{by}: give one of {', '.join(presets())}, or the path of a .yaml file{_did_you_mean(named, presets())}"
            )
        if path.resolve() in [known.resolve() for known, _ in files]:
            raise ConfigError(f"{path} extends itself: {' -> '.join(known.name for known, _ in files)} -> {path.name}")
        try:
            values = yaml.safe_load(path.read_text("utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold settings as 'name: value', it holds {type(values).__name__}")
        base = values.pop("extends", None)
        files.append((path, values))
        named = None if base is None else str(path.parent / str(base)) if str(base).endswith((".yaml", ".yml")) else str(base)
    return files


def _over(base: Any, own: Any) -> Any:
    """Settings with another file's over them: groups are joined name by name, everything else is replaced."""
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return own
    return base | {name: _over(base.get(name), value) for name, value in own.items()}


@dataclass(frozen=True)
class _Where:
    """Says in which file or on which part of the command line a setting was written."""

    files: list[tuple[Path, dict[str, Any]]]
    from_command: dict[str, str]

    def of(self, dotted: str) -> str:
        command = next(
            (text for name, text in self.from_command.items() if f"{dotted}.".startswith(f"{name}.") or name.startswith(f"{dotted}.")), None
        )
        return f"in --set '{command}'" if command else f"in {self.file(dotted)}"

    def file(self, dotted: str) -> str:
        """The name of the first file that says anything of a setting, else of the preset's own."""

        def says(values: Any) -> bool:
            for name in dotted.split("."):
                if not isinstance(values, dict) or name not in values:
                    return isinstance(values, list)  # lists are of one file
                values = values[name]
            return True

        return next((path.name for path, values in self.files if says(values)), self.files[0][0].name)


def _unknown(values: Any, model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names in `values` that no settings class knows."""
    for name, value in values.items():
        dotted = f"{prefix}.{name}" if prefix else str(name)
        if name not in model.model_fields:
            yield dotted
            continue
        for kind in _models_in(model.model_fields[name].annotation):
            for at, item in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(item, dict):
                    yield from _unknown(item, kind, f"{dotted}.{at}" if isinstance(value, list) else dotted)


def _unknown_sentence(dotted: str, where: _Where) -> str:
    names = list(setting_names())
    parent, _, last = dotted.rpartition(".")
    siblings = [name for name in names if name.rpartition(".")[0] == parent]
    namesakes = [name for name in names if name.rpartition(".")[2] == last]
    hint = _did_you_mean(dotted, namesakes or siblings) or _did_you_mean(dotted, names)
    return f"unknown setting '{dotted}' {where.of(dotted)}{hint}"


def _put(values: dict[str, Any], dotted: str, value: Any, text: str) -> None:
    *parents, last = dotted.split(".")
    node: Any = values
    for name in parents:
        if isinstance(node, list):
            node = _item(node, name, text)
            continue
        if not isinstance(node.setdefault(name, {}), (dict, list)):
            raise ConfigError(f"--set '{text}': '{name}' is a single value in this preset and has no '{last}'")
        node = node[name]
    if isinstance(node, list):
        _item(node, last, text)
        node[int(last)] = value
    else:
        node[last] = value


def _item(node: list[Any], name: str, text: str) -> Any:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"--set '{text}': '{name}' must be the index of one of {len(node)} list items, counted from 0")
    return node[int(name)]


def _sentence(item: Any, where: _Where) -> str:
    dotted = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if not dotted:
        return f"{message} ({where.files[0][0].name})"
    given = "" if item["type"] == "missing" or isinstance(item["input"], (dict, list)) else f", not {item['input']!r}"
    return f"setting '{dotted}' {where.of(dotted)}: {message[0].lower() + message[1:]}{given}"


def _did_you_mean(name: str, options: Sequence[str]) -> str:
    last = name.rpartition(".")[2]
    close = [option for option in options if option.rpartition(".")[2] == last][:3] or difflib.get_close_matches(
        name, options, n=1, cutoff=0.6
    )
    return f"; did you mean {' or '.join(repr(option) for option in close)}?" if close else ""


def setting_names(model: type[BaseModel] = PipelineConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted name that `--set` takes."""
    for name, field in model.model_fields.items():
        dotted = f"{prefix}.{name}" if prefix else name
        yield dotted
        for kind in _models_in(field.annotation):
            yield from setting_names(kind, dotted)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
