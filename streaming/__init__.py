"""From Kafka to features: the kernel, the workers around it, and simulators that feed them.

Feast has typeguard rewrite a dozen of its classes while it is imported, so that they check types at run time: half of
the 6 to 7 seconds that the import takes, in every job, worker and replica. mypy checks our calls before that, so
typeguard leaves the classes as they are where this package comes first.
"""

from typing import TypeVar

import typeguard

T = TypeVar("T")


def _as_it_is(target: T) -> T:
    return target


typeguard.typechecked = _as_it_is  # type: ignore[assignment]
