"""Configurations as plain data and as files. Knows no particular configuration class."""

from __future__ import annotations

from crosslens.config.files import load_file, to_yaml
from crosslens.config.plain import differences, from_plain, to_plain
from crosslens.config.strict import kind_of

__all__ = ["differences", "from_plain", "kind_of", "load_file", "to_plain", "to_yaml"]
