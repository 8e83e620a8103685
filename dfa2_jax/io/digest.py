"""Checksums of files and of what they say."""

import hashlib
import json
from pathlib import Path
from typing import Any


def digest_of(content: Any) -> str:
    """The sha256 of a JSON value, whatever the order of its keys and the spaces in its file."""
    compact = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(compact.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal, of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
