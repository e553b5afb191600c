"""Schemas as Feast's JsonFormat has them: Spark's DDL, "name type, name type not null"."""

import re

from streaming.plan import ColumnType, PlanError

INTEGERS = {"tinyint", "smallint", "int", "bigint"}

_SPARK_NAMES: dict[str, ColumnType] = {
    "byte": "tinyint",
    "short": "smallint",
    "integer": "int",
    "long": "bigint",
    "real": "float",
}
_FIELD = re.compile(
    r"\s*(?:`(?P<quoted>[^`]+)`|(?P<name>\w+))(?:\s*:\s*|\s+)(?P<type>.+?)(?P<required>\s+not\s+null)?\s*",
    re.IGNORECASE,
)


def read_schema(where: str, ddl: str) -> dict[str, tuple[str, bool]]:
    """Name to (type, nullable) of a schema.

    Raises:
        PlanError: `where` says whose it is.
    """
    schema = {}
    for text in _split(ddl):
        match = _FIELD.fullmatch(text)
        if not match:
            raise PlanError(f'{where}: cannot read "{text.strip()}" in the JsonFormat schema: write "name type, ...".')
        declared = match["type"].lower()
        schema[match["quoted"] or match["name"]] = (_SPARK_NAMES.get(declared, declared), match["required"] is None)
    return schema


def write_schema(fields: dict[str, tuple[str, bool]]) -> str:
    """The schema that `read_schema` reads as these fields."""
    return ", ".join(
        f"{name if re.fullmatch(r'[A-Za-z0-9_]+', name) else f'`{name}`'} {kind}{'' if nullable else ' not null'}"
        for name, (kind, nullable) in fields.items()
    )


def _split(ddl: str) -> list[str]:
    parts, depth = [""], 0
    for character in ddl:
        depth += (character in "<(") - (character in ">)")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
