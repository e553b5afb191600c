"""Prometheus metrics, in registries of their own: importing Feast may switch the default one to multiprocess mode."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class HttpMetrics:
    """What the gateway sees."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "millrace_http_requests", "HTTP requests answered", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "millrace_http_request_seconds",
            "From the first byte in to the last byte out",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )

    def render(self) -> str:
        """Prometheus text."""
        return generate_latest(self.registry).decode()


class ModelMetrics:
    """What the models' side sees."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("millrace_model_requests", "Requests to a model", ["model"], registry=registry)
        self.errors = Counter("millrace_model_errors", "Requests that failed", ["model", "code"], registry=registry)
        self.seconds = Histogram(
            "millrace_model_request_seconds",
            "Queue and model of one request",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "millrace_batch_size", "Rows or pieces of audio a model call", ["model"], buckets=SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "millrace_batch_seconds", "One model call", ["model"], buckets=SECONDS, registry=registry
        )
        self.queue_depth = Gauge(
            "millrace_queue_depth", "Requests that wait for a worker", ["model"], registry=registry
        )
        self.version = Gauge(
            "millrace_model_version", "The version that answers", ["model", "variant"], registry=registry
        )
        self.feature_misses = Counter(
            "millrace_feature_misses",
            "Rows whose features of a view were the defaults: missing, stale, timeout or error",
            ["view", "reason"],
            registry=registry,
        )
        self.published = Counter("millrace_predictions_published", "Predictions in Kafka", registry=registry)
        self.dropped = Counter("millrace_predictions_dropped", "Predictions lost", ["reason"], registry=registry)

    def render(self) -> str:
        """Prometheus text."""
        return generate_latest(self.registry).decode()

    def of_model(self, model: str) -> dict[str, float]:
        """Requests, errors, mean latency (ms) and mean batch size of a model since the start."""

        def value(name: str) -> float:
            return self.registry.get_sample_value(name, {"model": model}) or 0.0

        errors = sum(
            sample.value
            for metric in self.errors.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.labels["model"] == model
        )
        answered = value("millrace_model_request_seconds_count")
        batches = value("millrace_batch_size_count")
        return {
            "requests": value("millrace_model_requests_total"),
            "errors": errors,
            "mean_latency_ms": 1e3 * value("millrace_model_request_seconds_sum") / answered if answered else 0.0,
            "mean_batch_size": value("millrace_batch_size_sum") / batches if batches else 0.0,
        }
