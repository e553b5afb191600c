"""What is computed: windowed activity of editors over the stream, and the sound of recordings."""

from datetime import timedelta

from entities import editor, utterance
from feast import FeatureView, Field
from feast.aggregation import Aggregation
from feast.stream_feature_view import StreamFeatureView
from feast.types import Float64, Int64, String
from sources import edits, utterance_audio_log

# Suffix of the feature's name -> (length, slide); tumbling where both are equal.
WINDOWS = {
    "10m_by_1m": (timedelta(minutes=10), timedelta(minutes=1)),
    "1h_by_5m": (timedelta(hours=1), timedelta(minutes=5)),
    "1h": (timedelta(hours=1), timedelta(hours=1)),
}
COLUMNS = ("added", "deleted")
FUNCTIONS = {"count": Int64, "sum": Float64, "mean": Float64}

editor_activity = StreamFeatureView(
    name="editor_activity",
    entities=[editor],
    ttl=timedelta(days=1),
    source=edits,
    timestamp_field="time",
    aggregations=[
        # Named, because Feast's own names hold no slide and the two windows of an hour would collide.
        Aggregation(
            name=f"{function}_{column}_{window}",
            column=column,
            function=function,
            time_window=length,
            slide_interval=slide,
        )
        for window, (length, slide) in WINDOWS.items()
        for column in COLUMNS
        for function in FUNCTIONS
    ],
    schema=[
        # The join key is listed too: without it `feast apply` would infer its type from files not yet written.
        Field(name="user", dtype=String),
        *(
            Field(name=f"{function}_{column}_{window}", dtype=dtype)
            for window in WINDOWS
            for column in COLUMNS
            for function, dtype in FUNCTIONS.items()
        ),
    ],
    description="Number and size of an editor's edits in the last ten minutes and hour.",
)

utterance_audio = FeatureView(
    name="utterance_audio",
    entities=[utterance],
    ttl=timedelta(0),
    source=utterance_audio_log,
    schema=[
        Field(name="utterance_id", dtype=String),
        Field(name="duration_s", dtype=Float64),
        Field(name="level_db", dtype=Float64),
        Field(name="speaker", dtype=String),
        Field(name="subset", dtype=String),
        Field(name="noise", dtype=String),
        Field(name="ratio", dtype=String),
        Field(name="condition", dtype=String),
    ],
    description="Length, loudness and speaker of a recording, and with which noise it is heard.",
)
