"""Evaluation: corpus metrics with intervals and paired tests, and reports from the same numbers."""

from evaluation.results import EvaluationResult, compare_models, evaluate, generate_report

__all__ = ["EvaluationResult", "compare_models", "evaluate", "generate_report"]
