"""The documentation site builds from the notebooks without a warning, and none of its links is broken."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec('myst_nb') is None,
    reason="the packages of the extra 'docs' are not installed")
def test_the_site_builds_without_warnings():
    done = subprocess.run([sys.executable, ROOT/'docs/build.py'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode==0, done.stdout[-3000:] + done.stderr[-3000:]
    assert '0 broken links' in done.stdout
    assert (ROOT/'docs/_build/html/index.html').exists()
