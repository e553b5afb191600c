"""What Prometheus reads of a stream."""

import urllib.request

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from streaming.metrics import SECONDS, Distribution, Measures, StreamMetrics, serve
from streaming.records import RecordBatch


def batch(timestamps_ms: list[int]) -> RecordBatch:
    count = len(timestamps_ms)
    spans = np.zeros((count, 2), np.int64)
    return RecordBatch(0, np.zeros(0, np.uint8), np.arange(count), spans, spans, np.array(timestamps_ms))


def test_a_distribution_counts_like_prometheus_own_histogram():
    from prometheus_client import Histogram

    values = np.random.default_rng(0).lognormal(-2, 2, 1000)
    values[:3] = SECONDS[:3]
    registry = CollectorRegistry()
    theirs = Histogram("h", "h", buckets=SECONDS, registry=registry)
    for value in values:
        theirs.observe(value)
    expected = {
        sample.labels["le"]: sample.value for sample in theirs.collect()[0].samples if sample.name == "h_bucket"
    }
    ours = Distribution(SECONDS)
    ours.add(values)
    buckets, total = ours.buckets()
    assert dict(buckets) == expected
    assert np.isclose(total, values.sum())


def test_freshness_runs_from_the_record_to_the_flush_and_a_large_batch_is_sampled():
    measures = Measures()
    measures.read(batch([1_000] * 10))
    measures.read(batch([900] * 100_000))
    measures.flushed(0.01, now_us=1_200_000)
    buckets = dict(measures.freshness_s.buckets()[0])
    assert buckets["0.15"] == 0
    assert buckets["0.25"] == 10
    assert 10 < buckets["0.5"] <= 10 + 64
    measures.flushed(0.01, now_us=9_000_000)
    assert dict(measures.freshness_s.buckets()[0]) == buckets, "no record is counted twice"


def test_every_figure_is_served_by_view_and_partition():
    measures = Measures()
    measures.read(batch([1_000]))
    measures.flushed(0.02, now_us=1_100_000)
    first = {"lag": 7, "processed": 5, "watermark_s": None, "panes": 30, "drifts": 1}
    status = {"a view": {0: first, 1: {"lag": 0, "processed": 2}}}
    metrics = StreamMetrics(lambda: status, lambda: {"a view": measures})
    registry = CollectorRegistry()
    registry.register(metrics)
    address, stop = serve(metrics, "127.0.0.1")
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        stop()
    assert text == generate_latest(registry).decode()
    found = {
        (sample.name, sample.labels.get("partition")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["millrace_stream_lag_records", "0"] == 7
    assert found["millrace_stream_processed_total", "1"] == 2
    assert (found["millrace_stream_panes", "0"], found["millrace_stream_drifts_total", "0"]) == (30, 1)
    assert ("millrace_stream_watermark_seconds", "0") not in found
    assert found["millrace_stream_flush_milliseconds_count", None] == 1
