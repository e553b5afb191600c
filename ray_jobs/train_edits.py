"""Trains the tabular model on the edits of the topic and the features the stream worker logged, and registers it."""

import tempfile
from pathlib import Path

from models import runs
from models.registry import Registry
from models.tabular import data, train
from models.tabular.config import TabularConfig
from ops.configuration import load
from ops.environment import Environment
from ops.jobs import add_repo, open_repo, parser, run


def main() -> dict[str, object]:
    """Train, log, register, and point the champion's alias at the new version.

    Runs in the job's own process: the rows fit one machine, and a start of Ray would take longer than the training.
    """
    arguments_parser = parser(__doc__ or "", config="configs/tabular/edits.yaml")
    add_repo(arguments_parser)
    arguments = arguments_parser.parse_args()
    environment = Environment.read()
    environment.export()
    config = load(TabularConfig, arguments.config, arguments.overrides)
    store = open_repo(arguments.repo)
    splits = data.load(store, config.data, environment.kafka_bootstrap_servers)
    rows = {name: len(getattr(splits, name).labels) for name in data.SPLITS}
    with runs.opened(environment.tracking_uri, config.name, f"train {config.name}") as tracked:
        tracked.log_params(runs.flatten(config.model_dump()) | {"data.hash": splits.hash})
        trained = train.train(splits, config.train)
        tracked.log_metrics({**trained.metrics, "threshold": trained.threshold})
        tracked.log_metrics({f"rows_{name}": count for name, count in rows.items()})
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            train.save(folder, trained, splits, config)
            registry = Registry(environment.tracking_uri)
            tags = {"task": "tabular", "data.hash": splits.hash}
            version = registry.register(config.name, folder, run_id=tracked.id, tags=tags)
        reason = f"trained: AUROC {trained.metrics['auroc']:.3f} on held-out entities"
        registry.promote(config.name, version.version, reason)
    return {
        "model": config.name,
        "version": version.version,
        "run_id": tracked.id,
        "features": len(splits.features),
        "rows": rows,
        "threshold": trained.threshold,
        **trained.metrics,
    }


if __name__ == "__main__":
    run(main)
