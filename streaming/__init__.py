"""From Kafka to features: the kernel, the workers around it, and simulators that feed them.

Feast has typeguard rewrite a dozen of its classes while it is imported, so that they check types at run time: half of
the 6 to 7 seconds that the import takes, in every job, worker and replica. mypy checks our calls before that, so
typeguard leaves the classes of Feast, and of nobody else, as they are where this package comes first.
"""

from typing import Any

import typeguard

_typechecked: Any = typeguard.typechecked


def _but_not_of_feast(target: Any = None, **options: Any) -> Any:
    if (getattr(target, "__module__", None) or "").partition(".")[0] == "feast":
        return target
    return _typechecked(target, **options)


typeguard.typechecked = _but_not_of_feast
