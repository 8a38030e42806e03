"""Programs of the operating system that some tests need."""

import os
import shutil

import pytest

REQUIRE = "SDPCTL_REQUIRE_INTEROP"
"""Environment variable that makes a missing program a failure."""


def needs(*programs: str) -> pytest.MarkDecorator:
    """Return the mark of tests that are skipped where a program is missing, unless all are required."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(
        bool(missing) and REQUIRE not in os.environ, reason=f"needs {', '.join(missing)}: `apt install` it"
    )
