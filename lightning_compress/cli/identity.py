"""What a result depends on, as a digest: configuration, data files, code of this library and of the user, versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lightning_compress.cli.config import settings_of, weights_file
from lightning_compress.cli.parts import find_own_modules
from lightning_compress.core.store import key_of

DENSE_PARTS = ("model", "data", "task", "dense", "trainer", "seed")
"""The parts of a configuration that decide what the dense model is after its training."""


def key_of_dense(cfg: DictConfig) -> str:
    """Returns the name under which a trained dense model is kept."""
    settings = settings_of(cfg)
    return _key("dense", {name: settings[name] for name in DENSE_PARTS})


def key_of_job(cfg: DictConfig, folder: str | Path) -> str:
    """Returns the name of a whole job; the folder it writes to makes no difference."""
    text = json.dumps(settings_of(cfg), default=str).replace(json.dumps(str(folder))[1:-1], ".")
    return _key("job", json.loads(text))


def _key(what: str, settings: dict[str, Any]) -> str:
    weights = settings["model"].get("weights")
    texts = {*_texts(settings), *([] if weights is None else [weights_file(weights)])}
    data = [_state_of(Path(text)) for text in sorted(texts) if _is_path(text)]
    find_own_modules()
    code = [_version_of(target) for target in sorted(set(_targets(settings)))]
    return key_of(what, json.dumps(settings, sort_keys=True, default=str), data, code)


def _targets(node: Any) -> Iterator[str]:
    """Yields the `_target_`s of a configuration."""
    for key, value in _items(node):
        if key == "_target_" and isinstance(value, str):
            yield value
        yield from _targets(value)


def _texts(node: Any) -> Iterator[str]:
    for _, value in _items(node):
        if isinstance(value, str):
            yield value
        yield from _texts(value)


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(node, dict):
        return node.items()
    return enumerate(node) if isinstance(node, list) else ()


def _is_path(text: str) -> bool:
    try:
        return bool(text.strip(".")) and Path(text).exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def _state_of(path: Path) -> list[tuple[str, int, int]]:
    """Returns names, sizes and times of the files at a path."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _version_of(target: str) -> tuple[str, str]:
    """Returns a target with the version of its package, or the text of its module where it belongs to none."""
    top = target.partition(".")[0]
    try:
        return target, importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        return target, _source_of(target)


def _source_of(target: str) -> str:
    """Returns the text of all modules beside that of a target in its package, or of the module alone."""
    try:
        spec = importlib.util.find_spec(target.partition(".")[0])
    except (ImportError, ValueError):
        return ""
    if spec is None:
        return ""
    if spec.submodule_search_locations:
        files = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*.py"))
    else:
        files = [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []
    return "\n".join(path.read_text("utf-8", errors="replace") for path in files)
