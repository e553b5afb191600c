"""Who features belong to: the keys that requests and events carry."""

from feast import Entity, ValueType

editor = Entity(
    name="editor",
    join_keys=["user"],
    value_type=ValueType.STRING,
    description="A Wikipedia account, or the address of an anonymous editor.",
)

utterance = Entity(
    name="utterance",
    join_keys=["utterance_id"],
    value_type=ValueType.STRING,
    description="One recording of the speech data.",
)
