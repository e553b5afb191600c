"""What differs between the declaration that made checkpoints and the one that would go on with them, in words."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from streaming.checkpoint import CheckpointStore
from streaming.deriving.derivation import Derivation
from streaming.plan import Plan
from streaming.state import StateError

_NAMES = {
    "delay_us": "watermark delay",
    "lateness_us": "allowed lateness",
    "idle_ttl_us": "idle TTL",
    "entity_type": "type of the entity",
    "timestamp": "timestamp field",
    "clocks": "clocks of",
    "on": "field to join on",
    "earliest_us": "earliest of the interval",
    "latest_us": "latest of the interval",
}
_UNITS = (("d", 86_400_000_000), ("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000))
_WINDOWS = {
    "sliding": "over {window} every {slide}",
    "session": "over sessions with gaps of {window}",
    "last": "over the last {size} events",
    "lifetime": "over all events",
}


def check_declared(checkpoints: CheckpointStore, plan: Plan | Derivation, partitions: Iterable[int]) -> None:
    """Make sure that the checkpoints that there are were made by the declaration as it is now.

    Raises:
        StateError: they were not; says what has changed and how to go on.
    """
    essence = plan.essence
    for partition in partitions:
        before = checkpoints.declared(plan.view, partition)
        if before is None or before == essence:
            continue
        what = "; ".join(changes(before, essence))
        if isinstance(plan, Plan):
            raise StateError(
                f"View '{plan.view}' has checkpoints of another declaration, and this one cannot go on with them:"
                f" {what}. Declare it as it was, give the changed one a name of its own, or start it from the earliest"
                f" offset with --reset {plan.view}, which keeps the old checkpoints aside."
            )
        raise StateError(
            f"Derived topic '{plan.view}' was written by another declaration: {what}. Declare it as it was, give the"
            f" changed one a name of its own, or delete the topic and its consumer group 'millrace-{plan.view}' and"
            f" start with --reset {plan.view}, which keeps the old checkpoints aside."
        )


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between the essences of two plans, or of two derivations; at least one unless they are equal."""
    found: list[str] = []
    for name in dict.fromkeys([*before, *after]):
        then, now = before.get(name), after.get(name)
        if then == now or name == "columns":
            continue
        if name == "transformation_text":
            found.append("the transformation or filter was changed")
        elif name == "inputs":
            for side, one, other in zip(("left", "right"), then or (), now or (), strict=False):
                found += [f"{side} input: {change}" for change in changes(one, other)]
        elif name == "table":
            found += [f"table: {change}" for change in changes(then or {}, now or {})]
        elif name in _LISTS:
            kind, text = _LISTS[name]
            found += _listed(kind, [text(each) for each in then or ()], [text(each) for each in now or ()])
        else:
            found.append(f"{_label(name)} {_shown(name, then)} became {_shown(name, now)}")
    return found + _columns(before, after, bool(found)) or ["the order of its fields was changed"] * (before != after)


def _columns(before: Mapping[str, Any], after: Mapping[str, Any], explained: bool) -> list[str]:
    """What became of the fields that are read; which of them are follows from what else has changed."""
    then, now = ({each["name"]: _field(each) for each in essence.get("columns", ())} for essence in (before, after))
    found = [f"field {then[name]} became {now[name]}" for name in then if then[name] != now.get(name, then[name])]
    if explained or found or then == now:
        return found
    return _listed("field", list(then.values()), list(now.values()))


def _listed(kind: str, then: Sequence[str], now: Sequence[str]) -> list[str]:
    lost, won = [each for each in then if each not in now], [each for each in now if each not in then]
    if len(lost) == len(won) == 1:
        return [f"{kind} {lost[0]} became {won[0]}"]
    found = [*(f"{kind} {each} was removed" for each in lost), *(f"{kind} {each} was added" for each in won)]
    return found or [f"the order or number of its {kind}s was changed"]


def _aggregate(one: Mapping[str, Any]) -> str:
    shape = _WINDOWS[one["kind"]]
    if one["kind"] == "lifetime" and one["window_us"]:
        shape += " with a half-life of {window}"
    window, slide = _duration(one["window_us"]), _duration(one["slide_us"])
    return f"{one['function']} of '{one['column']}' " + shape.format(window=window, slide=slide, size=one["size"])


def _model(one: Mapping[str, Any]) -> str:
    parameters = ", ".join(f"{name}={value:g}" for name, value in one["parameters"])
    return f"'{one['column']}' {one['function']}({', '.join(one['inputs'])}; {parameters}) every {one['every']}"


def _field(one: Mapping[str, Any]) -> str:
    return f"'{one['name']}' {one['type']}" + " not null" * (not one["nullable"])


def _label(name: str) -> str:
    return _NAMES.get(name) or name.removesuffix("_us").replace("_", " ")


def _shown(name: str, value: Any) -> str:
    if name.endswith("_us") and isinstance(value, int):
        return _duration(value)
    return "none" if value is None or value == "" else f"'{value}'"


def _duration(us: int) -> str:
    """As a tag would have it, in the largest unit of which it is a multiple."""
    for unit, size in _UNITS:
        if us and us % size == 0:
            return f"{us // size}{unit}"
    return f"{us}us" if us else "0s"


_LISTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "aggregates": ("aggregation", _aggregate),
    "models": ("model", _model),
    "features": ("feature", " from ".join),
    "source": ("field", _field),
}
