"""Digests of result files, by which a file that was edited afterwards shows.

A digest guards against accidents and quiet corrections, not against forgery: anyone who edits a file can recompute it.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from attention.core.results import Report

ALGORITHM: Final = "sha256"


def digest_of(document: Mapping[str, Any]) -> str:
    """Return the digest of a result file's document: of all but its own digest, without nulls, with sorted keys."""
    content = _without_nulls({name: value for name, value in document.items() if name != "digest"})
    encoded = msgspec.json.encode(content, order="deterministic")
    return f"{ALGORITHM}:{hashlib.sha256(encoded).hexdigest()}"


def sealed(report: Report, further: Mapping[str, Any] | None = None) -> bytes:
    """Encode a report as JSON with its digest; unknown and infinite figures are null.

    Args:
        report: the report.
        further: keys beside those of the report.
    """
    encoded = msgspec.json.encode({**msgspec.to_builtins(report), **(further or {})})
    document = msgspec.json.decode(encoded)
    return msgspec.json.encode({**document, "digest": digest_of(document)})


def is_edited(content: bytes) -> bool:
    """Return whether a file with a digest does not have it; one without is not known to be edited.

    Args:
        content: a JSON document that is a report.
    """
    document = msgspec.json.decode(content)
    stored = document.get("digest") if isinstance(document, dict) else None
    if stored is None:
        return False
    try:
        return bool(stored != digest_of(document))
    except (OverflowError, ValueError, msgspec.MsgspecError):  # a number that cannot be written again
        return True


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
