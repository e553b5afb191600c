"""YAML files and dotted overrides, read into frozen pydantic models."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class ConfigurationError(ValueError):
    """A configuration that can't be used, in one sentence."""


def load(model: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """Read a YAML file, apply overrides such as `train.epochs=3` in their order, and validate.

    Raises:
        ConfigurationError: no such file, not YAML, an unknown key (the nearest right one is named) or a wrong value.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: can't be read ({error.strerror}); give an existing file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{path}: is not YAML: {reason}.") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigurationError(f"{path}: holds a {type(document).__name__}; a mapping of sections is expected.")
    for override in overrides:
        _apply(document, override)
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {_explain(model, error)}.") from None


def _apply(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise ConfigurationError(f"--set {override}: give it as section.key=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigurationError(f"--set {override}: the value is not YAML.") from None
    place = document
    for part in path[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ConfigurationError(f"--set {override}: {part} is a value, not a section.")
    place[path[-1]] = value


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    name = ".".join(location) or "the whole file"
    if first["type"] == "extra_forbidden":
        known = sorted(_keys(model, location[:-1]))
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {name} ({hint})"
    if first["type"] == "missing":
        return f"{name} is missing"
    return f"{name} is {first.get('input')!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _keys(model: type[BaseModel], location: Sequence[str]) -> Iterator[str]:
    """The keys allowed at a place; a union counts all of its branches, whose tags pydantic puts into the path."""
    models = [model]
    for part in location:
        inner: list[type[BaseModel]] = []
        for candidate in models:
            if part in candidate.model_fields:
                inner += _models(candidate.model_fields[part].annotation)
        models = inner or models
    for candidate in models:
        yield from candidate.model_fields


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]
