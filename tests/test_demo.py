"""The demonstration, as README's first command runs it."""
import json

import pandas as pd
import pytest
from conftest import fails, run_cli

from radiology_ai.core import RadiologyError
from radiology_ai.demo import DEMO
from radiology_ai.phantom.hospital import HOSPITAL
from radiology_ai.tasks.run import RUN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)] # the whole of README's first command


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo')/'out'
    return out, run_cli('demo', '--out', out, '--names').stdout


def test_demo_reaches_its_figures(demo):
    out, said = demo
    figures = json.loads((out/'demo.json').read_text())
    value, low, high = figures['auroc']
    assert .85<=value<.99 and low<=value<=high # some knees are hard to read
    assert figures['heat']['share']>=.8
    assert figures['heat']['n']>=10
    assert 'AUROC' in said and '95 % CI' in said


def test_demo_writes_what_it_says(demo):
    out, said = demo
    for name in ('report.html','predictions.csv','model'):
        assert (out/name).exists() and str(out/name) in said
    page = (out/'report.html').read_text()
    assert page.count('data:image')>=5 and '<script src' not in page and 'http-equiv="refresh"' not in page


def test_all_that_it_writes_is_known_as_its_own(demo):
    out, _ = demo
    DEMO.check(out) # the next demonstration replaces it
    RUN.check(out/'run')
    assert HOSPITAL.foreign(out/'hospital') is None
    (out/'letter.txt').write_text('mine')
    try:
        with pytest.raises(RadiologyError, match='letter.txt'): DEMO.check(out)
    finally: (out/'letter.txt').unlink()


def test_demo_lists_the_broken_files(demo):
    out, said = demo
    truth = pd.read_csv(out/'hospital/truth.csv', keep_default_na=False)
    broken = truth[truth.broken!='']
    table = pd.read_csv(out/'predictions.csv', keep_default_na=False)
    errors = table.set_index('path').error
    assert len(broken)>=5
    for path, cause in zip(broken.path, errors[[str(out/'hospital'/p) for p in broken.path]]):
        assert cause and f'{path}: {cause}' in said
    page = (out/'report.html').read_text()
    assert all(cause in page for cause in errors[[str(out/'hospital'/p) for p in broken.path]])


def test_the_same_seed_gives_the_same_figures(tmp_path):
    words = ['--seed', 3, '--patients', 40, '--epochs', 1]
    for name in ('a','b'): run_cli('demo', '--out', tmp_path/name, *words)
    for name in ('demo.json','report.json'):
        assert (tmp_path/'a'/name).read_text()==(tmp_path/'b'/name).read_text()
    a, b = (pd.read_csv(tmp_path/name/'predictions.csv').drop(columns='path') for name in ('a','b'))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_demo_refuses_a_folder_with_other_files(tmp_path):
    (tmp_path/'letter.txt').write_text('mine')
    assert str(tmp_path) in fails('demo', '--out', tmp_path)
    assert (tmp_path/'letter.txt').read_text()=='mine'
