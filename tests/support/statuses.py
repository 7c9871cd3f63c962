"""A rank's status for tests: nothing has happened, but for what they say."""

from dataclasses import asdict, is_dataclass
from typing import Any, get_origin, get_type_hints

from sidp_sgl.scheduler.status import Status


def make_status(**changes: Any) -> Status:
    """`changes`: values by name, and dictionaries of them for nested ones."""
    return _make(Status, {"mode": "was", "batch_threshold": None, **changes})


def status_dict(**changes: Any) -> dict[str, Any]:
    return asdict(make_status(**changes))


def _make(part: type, changes: dict[str, Any]) -> Any:
    values = {}
    for name, kind in get_type_hints(part).items():
        if is_dataclass(kind):
            values[name] = _make(kind, dict(changes.pop(name, {})))
        else:
            values[name] = changes.pop(name) if name in changes else (get_origin(kind) or kind)()
    assert not changes, f"{part.__name__} has no {list(changes)}"
    return part(**values)
