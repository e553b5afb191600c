"""Serving: registered models behind HTTP, batched, with features from Feast and predictions to Kafka."""
