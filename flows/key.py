"""A step's content key: what can change its bytes, hashed, and nothing else.
Kept apart from running so that a plan, `explain` and the tests can compute keys without doing any work."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

PACKAGES = ("dreamlite_data", "trainers", "flows")
KEY_SCHEMA = 1
"""Raised when the meaning of a key changes, so that no old result is taken for a new one."""

DATA_SUFFIXES = {".sql", ".json", ".yaml", ".jinja", ".txt", ".safetensors"}
"""Files beside a module that the module reads as data: policies in SQL, prompts, templates, shipped weights."""

PLUMBING = frozenset({
    "dreamlite_data.lake",        # stores and finds rows; refresh steps, which read its views, name it themselves
    "dreamlite_data.query_guard",  # refuses user SQL
    "dreamlite_data.executors",   # equal bytes on every executor, by test
    "dreamlite_data.ray_workers",
    "dreamlite_data.progress",    # prints
})  # fmt: skip
"""Modules that move bytes but do not make them: their source is in no key, or a mended log line would retrain every stage."""

DECLARATIONS = frozenset(
    {"dreamlite_data.settings", "dreamlite_data.model_settings", "dreamlite_data.strict_settings", "trainers.settings", "trainers.export.settings"}
)
"""Modules that only declare settings. A step's spec holds the values it reads, so the text that declares them is in no
key: a new setting of the export must not retrain six stages."""

EXEC_FIELDS = frozenset({"executor", "workers", "threads", "device", "log_level", "log_every", "progress", "root", "path"})
"""Names of settings that say how and where to run. They can never be part of a key (see `spec_of`)."""


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces; a Path becomes its text, NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be part of a step key: give plain JSON values")


def digest(value: Any) -> str:
    """sha256 hex of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def spec_of(settings: BaseModel | Mapping[str, Any], exclude: Iterable[str] = ()) -> dict[str, Any]:
    """The part of `settings` that can change bytes: every field but the `EXEC_FIELDS` here and of the settings class
    itself, and the top-level names in `exclude`."""
    skip = {*exclude, *EXEC_FIELDS, *getattr(settings, "EXEC_FIELDS", ())}
    names = type(settings).model_fields if isinstance(settings, BaseModel) else settings
    value_of = (lambda name: getattr(settings, name)) if isinstance(settings, BaseModel) else settings.__getitem__
    return {name: _spec_value(value_of(name)) for name in names if name not in skip}


def _spec_value(value: Any) -> Any:
    if isinstance(value, (BaseModel, dict)):
        return spec_of(value)
    if isinstance(value, (list, tuple)):
        return [_spec_value(item) for item in value]
    return json.loads(canonical_json(value))


class SourceTree:
    """The packages on disk, read as syntax trees: which module imports which, and what each one says.

    `root` is the folder that holds the packages. A digest sees code, not its looks: comments, layout and
    docstrings do not count.
    """

    def __init__(self, root: Path | None = None, packages: tuple[str, ...] = PACKAGES) -> None:
        self.root = root or Path(__file__).resolve().parent.parent
        self.packages = packages
        self._parsed: dict[str, tuple[ast.Module, list[ast.AST]] | None] = {}
        self._digests: dict[str, str] = {}
        self._imports: dict[str, set[str]] = {}
        self._data: dict[Path, list[Path]] = {}

    def path(self, module: str) -> Path | None:
        """File of a module or package of ours; None when there is no such module."""
        if module.split(".")[0] not in self.packages:
            return None
        base = self.root.joinpath(*module.split("."))
        for candidate in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
        return None

    def _parse(self, module: str) -> tuple[ast.Module, list[ast.AST]] | None:
        """Syntax tree without docstrings, and all its nodes: walking costs more than parsing, so it is done once."""
        if module not in self._parsed:
            path = self.path(module)
            self._parsed[module] = None if path is None else _without_docstrings(ast.parse(path.read_text(), str(path)))
        return self._parsed[module]

    def imports(self, module: str) -> set[str]:
        """Modules of ours that `module` imports anywhere, inside functions too."""
        if module not in self._imports:
            self._imports[module] = self._find_imports(module)
        return self._imports[module]

    def _find_imports(self, module: str) -> set[str]:
        parsed, path = self._parse(module), self.path(module)
        if parsed is None or path is None:
            return set()
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found: set[str] = set()
        for node in parsed[1]:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*parts, base] if base else parts)
                found.add(base)
                found |= {f"{base}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _MODULE.fullmatch(node.value):
                found.add(node.value)  # a registry that imports by name: "dreamlite_data.operators.quality:Quality"
                found.add(node.value.split(":")[0])
        return {name for name in found if self.path(name) is not None}

    def closure(self, modules: Iterable[str]) -> list[str]:
        """`modules`, all they import within our packages, and the `__init__` of every package on the way."""
        seen: set[str] = set()
        pending = list(modules)
        while pending:
            module = pending.pop()
            if module in seen or module in PLUMBING or module in DECLARATIONS:
                continue
            if self.path(module) is None:
                raise ValueError(f"no module {module!r} under {self.root}: a step names code that does not exist")
            seen.add(module)
            pending += self.imports(module)
            parent = module.rpartition(".")[0]
            if parent:
                pending.append(parent)
        return sorted(seen)

    def digests(self, modules: Iterable[str], alone: Iterable[str] = ()) -> dict[str, str]:
        """{module or data file: digest} of the closure of `modules`, plus the modules in `alone` without theirs."""
        names = sorted({*self.closure(modules), *alone})
        found = {name: self._module_digest(name) for name in names}
        files = {file for name in names for file in self._data_files(name)}
        return found | {str(file.relative_to(self.root)): _data_digest(file) for file in sorted(files)}

    def _data_files(self, module: str) -> list[Path]:
        """Data files beside or below `module` whose name, or at least suffix, the module writes down."""
        path, parsed = self.path(module), self._parse(module)
        if path is None or parsed is None:
            return []
        found = self._beside(path.parent)
        if not found:
            return []
        texts = [node.value for node in parsed[1] if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        wanted = {suffix for suffix in DATA_SUFFIXES if any(text.endswith(suffix) for text in texts)}
        return [file for file in found if file.suffix in wanted]

    def _beside(self, package: Path) -> list[Path]:
        """Data files in and below the folder of a package."""
        if package not in self._data:
            below = [package]
            for folder in below:  # grows while it is walked; folders that are packages answer for themselves
                below += [item for item in folder.iterdir() if item.is_dir() and not (item / "__init__.py").exists()]
            self._data[package] = sorted(file for folder in below for file in folder.iterdir() if file.suffix in DATA_SUFFIXES and file.is_file())
        return self._data[package]

    def _module_digest(self, module: str) -> str:
        if module not in self._digests:
            parsed = self._parse(module)
            if parsed is None:
                raise ValueError(f"no module {module!r} under {self.root}: a step names code that does not exist")
            self._digests[module] = hashlib.sha256(ast.dump(parsed[0]).encode()).hexdigest()[:16]
        return self._digests[module]


_MODULE = re.compile(r"(dreamlite_data|trainers|flows)(\.[a-z_0-9]+)+(:\w+)?")


def _without_docstrings(tree: ast.Module) -> tuple[ast.Module, list[ast.AST]]:
    """The tree without docstrings, and its nodes."""
    nodes: list[ast.AST] = [tree]
    for node in nodes:  # grows while it is walked
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [
                item
                for item in node.body
                if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and isinstance(item.value.value, str))
            ]
        nodes += ast.iter_child_nodes(node)
    return tree, nodes


def _data_digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".sql":  # layout and full-line comments decide nothing; '-- @rule' and its like do
        lines = [line for line in data.decode().splitlines() if not re.match(r"\s*--(?!\s*@)", line)]
        data = " ".join(" ".join(lines).split()).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; lists count as one value."""
    if isinstance(value, Mapping) and value:
        flat: dict[str, Any] = {}
        for name, item in value.items():
            flat |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
        return flat
    return {prefix: value}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs between two sets of key parts: (dotted name, old value, new value), None for absent."""
    # Module names hold dots themselves; flattening is only for people to read, never for the key.
    before, after = flatten(old), flatten(new)
    return [(name, before.get(name), after.get(name)) for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def folder_digest(folder: Path) -> str:
    """sha256 over names and bytes of a folder up to 256 MB; beyond that over names, sizes and modification times.

    A source of terabytes must be planned in seconds; a checkpoint folder must be known by its content alone.
    """
    if not folder.is_dir():
        return "absent"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [path.stat() for path in files]
    by_content = sum(stat.st_size for stat in stats) <= 256 * 1024**2
    total = hashlib.sha256(b"content" if by_content else b"listing")
    for path, stat in zip(files, stats, strict=True):
        total.update(str(path.relative_to(folder)).encode() + b"\0")
        if by_content:
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            total.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return total.hexdigest()
