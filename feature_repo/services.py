"""Who reads what: one feature service per reader, so that a model names its inputs by one word."""

from feast import FeatureService
from features import COLUMNS, WINDOWS, editor_activity, utterance_audio

edits_robot = FeatureService(
    name="edits_robot",
    features=[
        editor_activity[
            [f"count_added_{window}" for window in WINDOWS]
            + [
                f"{function}_{column}_{window}"
                for window in WINDOWS
                for column in COLUMNS
                for function in ("sum", "mean")
            ]
        ]
    ],
    description="Inputs of the model `edits`: is this editor a robot?",
)

speech_slices = FeatureService(
    name="speech_slices",
    features=[utterance_audio],
    description="What word error rates are broken down by.",
)
