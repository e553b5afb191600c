"""The local stack and the command `millrace`."""

import streaming  # noqa: F401 (before Feast, whose import it makes faster)
