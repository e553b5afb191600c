"""Metrics as per-sample sufficient statistics: whatever aggregates, resamples or merges them needs no inference."""

from evaluation.metrics.metric import Metric, MetricError
from evaluation.metrics.registry import metric, names

__all__ = ["Metric", "MetricError", "metric", "names"]
