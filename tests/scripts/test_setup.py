"""scripts/setup.sh, with an environment that is already installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def tunables(tmp_path):
    """A function: GLIBC_TUNABLES before setup.sh → after it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text("")
    size_and_hash = 'touch "$VENV/installed-none-$(cksum < setup.cfg | cut -d" " -f1)"'
    script = (
        f"{size_and_hash}; source scripts/setup.sh none; echo ${{GLIBC_TUNABLES-unset}}"
    )

    def after_setup(**before: str) -> str:
        environment = {"PATH": os.environ["PATH"], "VENV": str(tmp_path), **before}
        environment["PYTHON"] = sys.executable
        done = subprocess.run(
            ["bash", "-euc", script],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    return after_setup


def test_large_pages_are_requested_where_linux_waits_for_a_request(tunables):
    waits = LARGE_PAGES.exists() and "[madvise]" in LARGE_PAGES.read_text()
    assert tunables() == ("glibc.malloc.hugetlb=1" if waits else "unset")


@pytest.mark.parametrize("value", ["", "glibc.malloc.check=1"])
def test_a_setting_of_the_user_is_kept(tunables, value):
    assert tunables(GLIBC_TUNABLES=value) == value
