import subprocess
import sys

import pytest

import sdpctl


def test_exported_names_are_listed_once_and_there():
    assert len(set(sdpctl.__all__)) == len(sdpctl.__all__)
    assert all(getattr(sdpctl, name) is not None for name in sdpctl.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = sdpctl.nothing


def test_importing_the_package_costs_nothing():
    script = "import sys, sdpctl; sdpctl.Instance.parse('full'); assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
