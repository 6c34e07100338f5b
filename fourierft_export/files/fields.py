"""Fields of a JSON object, each of the type that it must have."""

from __future__ import annotations

from typing import Any

from ..errors import BadInputError

_MISSING = object()


class Fields:
    """Takes typed fields out of a JSON object and complains about what is left."""

    def __init__(self, value: Any, where: str, what: str) -> None:
        self.where = f"{where}, {what}"
        if not isinstance(value, dict):
            raise BadInputError(self.where, expected="a JSON object", found=type(value).__name__)
        self.values = dict(value)

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _MISSING) -> Any:
        """The field `key`; bool is not taken for a number."""
        value = self.values.pop(key, default)
        if value is default and default is not _MISSING:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:
            wanted = " or ".join(k.__name__ for k in kinds)
            found = "nothing" if value is _MISSING else type(value).__name__
            raise BadInputError(f"{self.where}, field {key}", expected=wanted, found=found)
        return value

    def finish(self) -> None:
        """Refuse fields that nobody took."""
        if self.values:
            extra = ", ".join(sorted(self.values)[:5])
            raise BadInputError(self.where, expected="no unknown fields", found=extra)
