"""A stored bundle loads and predicts alike in every later version, with the oldest and the newest supported timm.

The bundles in `tests/data/bundles` were written once by `tests/make_bundles.py`. With another timm:
`pip install --no-deps --target /tmp/timm timm==...` and `PYTHONPATH=/tmp/timm pytest tests/test_lasting.py`."""
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from make_bundles import BUNDLES, FOLDER, KINDS, logits, probabilities

from radiology_ai.models.bundle import load_bundle
from radiology_ai.models.meta import FORMAT
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.tasks.registry import TASKS


@pytest.mark.parametrize('name', sorted(p.parent.name for p in FOLDER.glob('*/bundle.json')))
def test_a_stored_bundle_says_what_it_said(name):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        bundle = load_bundle(FOLDER/name)
    with np.load(FOLDER/name/'case.npz') as f: case = dict(f)
    assert np.abs(logits(bundle, case['x'])-case['logits']).max()<1e-5*max(1, np.abs(case['logits']).max())
    was = case['probabilities']
    unit = np.maximum(1, np.abs(was).max(0)) # of each output: a pose has pixels and degrees
    assert (np.abs(probabilities(bundle, case['x'])-was)<1e-5*unit).all()
    assert bundle.recipe==recipe('knee' if bundle.task=='knee' else 'chest', size=bundle.recipe.size)
    assert np.ptp(case['logits'], axis=0).max()>.01 # it does look at the images


def test_every_task_has_its_kinds_of_networks():
    assert set(BUNDLES)=={p.name for p in FOLDER.iterdir()}
    assert set(KINDS)==set(TASKS) and all(f'{t}_{k}' in BUNDLES for t in TASKS for k in KINDS[t])


def test_they_are_small_and_of_known_formats():
    for folder in FOLDER.iterdir():
        assert sum(p.stat().st_size for p in Path(folder).iterdir())<1.5*2**20
        assert json.loads((folder/'bundle.json').read_text())['format']<=FORMAT
