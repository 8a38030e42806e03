"""Every attack, with a small count; `python tests/attacks/attack_NAME.py --count 4000` runs a large one."""

import subprocess
import sys
from pathlib import Path

import pytest
from outside import needs

HERE = Path(__file__).parent
ATTACKS = sorted(path.name for path in HERE.glob("attack_*.py"))


COUNTS = {"attack_kills.py": 5, "attack_bundles.py": 8, "attack_damages.py": 8, "attack_sharing.py": 2}
"""Cases of those that take a second or more each; 15 of the others."""

NEEDS = {"attack_sharing.py": needs("docker-registry")}


def test_there_are_attacks() -> None:
    assert ATTACKS


@pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDS.get(name, ())) for name in ATTACKS])
def test_attack(name: str, tmp_path: Path) -> None:
    count = COUNTS.get(name, 15)
    command = [sys.executable, str(HERE / name), "--count", str(count)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == f"{count} cases, 0 with faults"
