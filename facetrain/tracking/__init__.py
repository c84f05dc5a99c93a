"""Tracking: parameters, metrics and files of a run, in its own metrics.jsonl always and in MLflow where wanted."""

from facetrain.tracking.tracker import Tracker, lacks_results, sync

__all__ = ["Tracker", "lacks_results", "sync"]
