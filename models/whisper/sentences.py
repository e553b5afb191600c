"""What is said in synthetic speech: everyday sentences, and those of two domains, by templates over lexicons.

`field` is dictation during the inspection of wind turbines and substations, `coffee` orders at a counter. Sentences
are lower-case words without punctuation or figures, as the error rates compare them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_SLOT = re.compile(r"\{(\w+)\}")

Lexicon = Mapping[str, tuple[str, ...]]


class SentenceError(ValueError):
    """Sentences that can't be made, in one sentence."""


@dataclass(frozen=True)
class Domain:
    """Templates such as `the {part} is {state}`, and the words and phrases that fill their slots.

    `terms` are the phrases that a listener of this domain must not miss.
    """

    templates: tuple[str, ...]
    lexicon: Lexicon
    term_slots: tuple[str, ...] = ()

    @property
    def terms(self) -> tuple[str, ...]:
        """The domain's own words and phrases, sorted."""
        return tuple(sorted({term for slot in self.term_slots for term in self.lexicon[slot]}))

    @property
    def phrases(self) -> tuple[str, ...]:
        """All that the slots are filled with, sorted."""
        return tuple(sorted({phrase for slot in self.lexicon.values() for phrase in slot}))

    def sentences(self, count: int, rng: np.random.Generator) -> list[str]:
        """Different sentences, in random order; the same generator state gives the same ones.

        Raises:
            SentenceError: the templates hardly have so many.
        """
        found: dict[str, None] = {}
        for _ in range(20 * count):
            if len(found) == count:
                break
            found.setdefault(self._fill(str(rng.choice(self.templates)), rng))
        if len(found) < count:
            raise SentenceError(f"The templates give {len(found)} sentences where {count} are asked; ask for fewer.")
        return list(found)

    def _fill(self, template: str, rng: np.random.Generator) -> str:
        return _SLOT.sub(lambda slot: str(rng.choice(self.lexicon[slot[1]])), template)


def terms_in(text: str, terms: Sequence[str]) -> list[str]:
    """The terms that occur in a text as whole words, from left to right; of overlapping ones the longest."""
    if not terms:
        return []
    longest_first = sorted(terms, key=lambda term: (-len(term), term))
    pattern = r"(?<!\S)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\S)"
    return re.findall(pattern, text)


def named(name: str) -> Domain:
    """The general sentences, or those of a domain.

    Raises:
        SentenceError: there is none of this name.
    """
    if name not in DOMAINS:
        raise SentenceError(f"There are no sentences named {name!r}; there are {', '.join(DOMAINS)}.")
    return DOMAINS[name]


_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty")

_GENERAL = Domain(
    templates=(
        "{person} {verb} the {thing}",
        "{person} {verb} a {quality} {thing}",
        "the {quality} {thing} is {place}",
        "there are {number} {things} {place}",
        "{time} {person} {verb} the {thing} {place}",
        "please {order} the {quality} {thing}",
        "please {order} {number} {things} {time}",
        "can you {order} the {thing} {place}",
        "the {thing} was {quality} {time}",
        "where is the {quality} {thing}",
        "i think the {thing} is too {quality}",
        "we need {number} more {things} {time}",
        "{time} it was {weather} {place}",
        "it will be {weather} {time}",
        "{person} went {place} with {number} {things}",
        "nobody knows why the {thing} is {quality}",
        "{order} it {place} and call me {time}",
        "{quality} {things}",
        "{number} {things}",
        "{weather} {time}",
        "{person} {verb} it",
    ),
    lexicon={
        "person": (
            *("my brother", "her sister", "the teacher", "our neighbour", "a friend", "the doctor", "his uncle"),
            *("the driver", "a young woman", "the old man", "the children", "everybody", "the baker", "my mother"),
        ),
        "verb": (
            *("found", "bought", "opened", "closed", "carried", "painted", "washed", "forgot", "wanted", "dropped"),
            *("sold", "borrowed", "described", "watched", "repaired", "pushed", "turned", "touched", "lifted"),
        ),
        "order": (
            *("bring", "open", "clean", "check", "move", "send", "keep", "show", "count", "leave", "mark", "change"),
            *("replace", "report", "record", "inspect"),
        ),
        "thing": (
            *("door", "window", "table", "letter", "garden", "bottle", "picture", "kitchen", "ladder", "basket"),
            *("bicycle", "engine", "paper", "jacket", "hammer", "pocket", "machine", "button", "bridge", "camera"),
            *("blanket", "cable", "mirror", "carpet", "lamp", "tower", "river", "ticket", "number", "station"),
        ),
        "things": (
            *("books", "apples", "chairs", "birds", "horses", "boxes", "plates", "shoes", "stones", "candles"),
            *("keys", "coins", "trees", "boats", "cups", "bags", "bolts", "wheels", "ropes", "flowers"),
        ),
        "quality": (
            *("green", "yellow", "heavy", "broken", "little", "empty", "cold", "wooden", "dirty", "quiet", "long"),
            *("new", "old", "narrow", "round", "dark", "bright", "loose", "strong", "wet", "dry", "soft", "expensive"),
        ),
        "place": (
            *("in the house", "near the river", "behind the school", "on the roof", "at the market", "in the office"),
            *("under the bridge", "beside the road", "at the station", "in the village", "on the left side"),
            *("on the right side", "across the street", "in front of the shop", "over the hill"),
        ),
        "time": (
            *("today", "yesterday", "tomorrow", "this morning", "last night", "on monday", "on friday", "at noon"),
            *("before breakfast", "after lunch", "in the evening", "next week", "in the winter", "all summer"),
        ),
        "weather": ("raining", "snowing", "sunny", "cloudy", "very windy", "foggy", "freezing", "warm", "stormy"),
        "number": _NUMBERS,
    },
)

_FIELD = Domain(
    templates=(
        "{defect} on the {part}",
        "{defect} at the {part} of {asset} {number}",
        "the {part} of {asset} {number} shows {defect}",
        "{asset} {number} {part} {state}",
        "inspected the {part} and found {defect}",
        "replace the {part} on {asset} {number}",
        "tighten the {part} to {number} newton metres",
        "{action} the {part} before the next inspection",
        "{part} temperature is {number} kelvin above ambient",
        "{measure} at the {part} reads {number}",
        "no {defect} found at the {part}",
        "{severity} {defect} on {asset} {number}",
        "please {action} the {part} and record the {measure}",
        "the {measure} of the {part} is {state}",
        "{action} {asset} {number} because of {defect}",
        "{part} {state} and {part} {state}",
        "close up photo of the {part} with {defect}",
    ),
    lexicon={
        "part": (
            *("nacelle", "gearbox", "yaw drive", "pitch bearing", "rotor blade", "leading edge", "trailing edge"),
            *("main shaft", "slip ring", "brake caliper", "hub casting", "stator winding", "anemometer"),
            *("transformer", "circuit breaker", "busbar", "insulator", "surge arrester", "switchgear", "relay"),
            *("disconnector", "conservator", "bushing", "radiator fins", "tap changer", "earthing strap"),
            *("cable gland", "junction box", "flange", "torque arm", "coolant hose", "oil filter", "gasket"),
            *("guy wire", "crossarm", "lattice tower", "spacer damper", "capacitor bank"),
        ),
        "defect": (
            *("corrosion", "pitting", "delamination", "hairline crack", "oil leak", "lightning damage", "erosion"),
            *("arcing marks", "partial discharge", "chafing", "vibration", "overheating", "flashover", "misalignment"),
            *("fretting", "bird nesting", "ice accretion", "scuffing"),
        ),
        "asset": ("turbine", "substation", "feeder", "bay", "pylon"),
        "state": ("serviceable", "out of tolerance", "de energised", "locked out", "worn beyond limit", "re greased"),
        "action": ("isolate", "re torque", "lubricate", "megger", "ground", "derate", "commission", "inspect"),
        "measure": ("insulation resistance", "oil level", "backlash", "dew point", "clearance", "megawatt output"),
        "severity": ("minor", "moderate", "severe", "critical"),
        "number": _NUMBERS,
    },
    term_slots=("part", "defect", "state", "action", "measure"),
)

_SHOTS = ("single shot", "double shot", "triple shot")
_AMOUNTS = ("some", "a bit of", "a little bit of", "a lot of", "lots of")

_COFFEE = Domain(
    templates=(
        "can i get a {size} {drink}",
        "i would like a {shots} {drink} please",
        "a {size} {drink} with {milk} please",
        "could i have a {size} {shots} {drink} with {milk}",
        "make me a {roast} {drink} with {sweet}",
        "{size} {drink} with {sweet} and {milk}",
        "i want a {shots} {drink} {roast} with {amount} {sweet}",
        "please make a {roast} {drink} with {amount} {milk} and {amount} {sweet}",
        "a {drink} {shots} with {amount} {sweet}",
        "let me have one {size} {roast} {drink}",
        "hey could i please get a {shots} {size} {drink} with {amount} {milk}",
        "{drink} with {milk}",
        "{shots} {drink}",
        "{roast} {size} {drink}",
    ),
    lexicon={
        "drink": (
            *("coffee", "latte", "mocha", "espresso", "americano", "cappuccino", "iced coffee", "iced mocha"),
            *("drip coffee", "house coffee"),
        ),
        "shots": _SHOTS,
        "roast": ("light roast", "medium roast", "dark roast"),
        "size": ("small", "medium", "large", "eight ounce", "twelve ounce", "sixteen ounce", "twenty ounce"),
        "milk": ("milk", "whole milk", "skim milk", "soy milk", "almond milk", "cream"),
        "sweet": ("sugar", "brown sugar", "sweetener"),
        "amount": _AMOUNTS,
    },
    term_slots=("drink", "shots", "roast", "size", "milk", "sweet"),
)

DOMAINS: Mapping[str, Domain] = {"general": _GENERAL, "field": _FIELD, "coffee": _COFFEE}
