"""Serving: registered models behind HTTP, batched, with features from Feast and predictions to Kafka."""

# Before Feast, whose import switches prometheus_client to files shared by processes, in which our counters get lost.
import prometheus_client.values  # noqa: F401

import streaming  # noqa: F401 (before Feast, whose import it makes faster)
