"""Keeps secrets out of texts that show a value."""

from typing import Any, Protocol


class Named(Protocol):
    """A named tuple."""

    def _asdict(self) -> dict[str, Any]: ...


def shown(value: Named, *hidden: str) -> str:
    """The repr of a named tuple, without the fields ``hidden``."""
    fields = {name: field for name, field in value._asdict().items() if name not in hidden}
    return f"{type(value).__name__}({', '.join(f'{name}={fields[name]!r}' for name in fields)})"
