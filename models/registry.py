"""The model registry: folders of files as versions of MLflow's registered models, found by alias."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion as MlflowModelVersion
from mlflow.exceptions import MlflowException

CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS = "previous"
BASELINE = "baseline"
EXPERIMENTS = "-experiments"
"""After the name of a model: what comparisons register, so that none of them touches a model that is served."""


class RegistryError(ValueError):
    """A model, alias or version that isn't there, in one sentence."""


@dataclass(frozen=True)
class ModelVersion:
    """One registered version; `source` is the artifact URI of its folder."""

    name: str
    version: int
    run_id: str
    tags: Mapping[str, str]
    source: str

    @property
    def split_hash(self) -> str:
        """The test split beside which it was trained: what it never saw."""
        return self.tags.get("split_hash", "unknown")


class Registry:
    """Versions and aliases behind an MLflow tracking URI, a server's address or `sqlite:///...`."""

    def __init__(self, tracking_uri: str) -> None:
        self._tracking_uri = tracking_uri
        self._client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)

    def register(self, name: str, folder: Path, *, run_id: str, tags: Mapping[str, str]) -> ModelVersion:
        """Upload a model's folder as an artifact of the run and make it the next version of the name."""
        place = f"{name}-{folder.name}"
        self._client.log_artifacts(run_id, str(folder), artifact_path=place)
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        artifacts = self._client.get_run(run_id).info.artifact_uri
        version = self._client.create_model_version(name, source=f"{artifacts}/{place}", run_id=run_id, tags=dict(tags))
        return _version(version)

    def set_alias(self, name: str, alias: str, version: int, reason: str) -> None:
        """Point an alias at a version; the reason stays on the version as the tag `<alias>.reason`."""
        self._client.set_model_version_tag(name, str(version), f"{alias}.reason", reason)
        self._client.set_registered_model_alias(name, alias, str(version))

    def promote(self, name: str, version: int, reason: str) -> None:
        """Make a version the champion; the one before stays as `previous`, to roll back to."""
        present = self.aliases().get((name, CHAMPION))
        if present is not None and present != version:
            self.set_alias(name, PREVIOUS, present, f"champion before version {version}")
        self.set_alias(name, CHAMPION, version, reason)

    def roll_back(self, name: str, reason: str) -> int:
        """Make the previous champion the champion again; the version that is now one becomes `previous`.

        Raises:
            RegistryError: there is no previous one.
        """
        previous = self.resolve(name, PREVIOUS).version
        self.promote(name, previous, reason)
        return previous

    def enter(self, version: ModelVersion) -> str:
        """Make a new version the champion if there is none yet, else the challenger, which a gate has to let pass.

        Returns:
            The alias.
        """
        if (version.name, CHAMPION) not in self.aliases():
            self.promote(version.name, version.version, "the first version")
            return CHAMPION
        self.set_alias(version.name, CHALLENGER, version.version, "just trained")
        return CHALLENGER

    def aliases(self) -> dict[tuple[str, str], int]:
        """The version of every (name, alias), all models in one query; an empty registry gives an empty mapping."""
        found: dict[tuple[str, str], int] = {}
        token: str | None = None
        while token != "":
            page = self._client.search_registered_models(max_results=1000, page_token=token)
            for model in page:
                found |= {(model.name, alias): int(version) for alias, version in model.aliases.items()}
            token = page.token or ""
        return found

    def resolve(self, name: str, reference: str) -> ModelVersion:
        """The version that an alias points at, or that has a number.

        Raises:
            RegistryError: there is none; the sentence names what is registered.
        """
        try:
            if reference.isdecimal():
                return _version(self._client.get_model_version(name, reference))
            return _version(self._client.get_model_version_by_alias(name, reference))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
        known = ", ".join(sorted(f"{model}@{given}" for model, given in self.aliases())) or "nothing"
        wanted = f"{name} version {reference}" if reference.isdecimal() else f"{name}@{reference}"
        raise RegistryError(f"{wanted} is not registered; registered: {known}.")

    def find(self, model: str, name: str, cache: Path) -> tuple[Path, ModelVersion | None]:
        """A model's folder, from a path or from the number or alias of a version of the name; and which version it is.

        Raises:
            RegistryError: there is no such folder, version or alias.
        """
        if Path(model).is_dir():
            return Path(model), None
        version = self.resolve(name, model)
        return self.download(version, cache), version

    def download(self, version: ModelVersion, cache: Path) -> Path:
        """The version's files in `cache/<name>/<version>`, fetched once; a download that breaks off leaves nothing."""
        folder = cache / version.name / str(version.version)
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{version.version}-", dir=folder.parent))
        try:
            fetched = download_artifacts(
                artifact_uri=version.source, dst_path=str(partial), tracking_uri=self._tracking_uri
            )
            try:
                os.rename(fetched, folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder


def _version(version: MlflowModelVersion) -> ModelVersion:
    return ModelVersion(
        name=version.name,
        version=int(version.version),
        run_id=str(version.run_id),
        tags=dict(version.tags),
        source=str(version.source),
    )
