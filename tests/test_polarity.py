"Films that show bone dark: recognised, told, undone on request, and never done to a sound film."
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest

from radiology_ai.core import Radiograph, RadiologyError, rng
from radiology_ai.dicom import stored
from radiology_ai.dicom.explore import explore_dicoms
from radiology_ai.dicom.polarity import find_polarity
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.models.bundle import load_bundle
from radiology_ai.phantom.hospital import write_dicom
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess.recipe import Preprocess, recipe
from radiology_ai.preprocess.scale import preprocess_folder

REAL = Path(os.environ.get('RADIOLOGY_AI_REAL_DATA', ''))
# stored as negatives in the public sets
NEGATIVES = ['chest_nih/images/00017625_000.jpg', 'chest_nih/images/00017999_000.jpg',
    'knee_oai/images/train_0_9659701R.png', 'knee_oai/images/train_3_9564189L.png']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Six knees as DICOM: of the even ones the header denies that the stored picture is a negative."
    out = tmp_path_factory.mktemp('polarity')
    for k in range(6):
        p = simulate_knee(7000+k, grade=k%3, size=192)
        pixels = expose(p, rng(k, 'polarity test')).pixels
        write_dicom(out/f'{k}.dcm', 1-pixels if k%2==0 else pixels, p, photometric='MONOCHROME2', window=None)
    return out


def test_the_account_tells_and_auto_undoes(folder, tmp_path):
    stores = {how: preprocess_folder(folder, tmp_path/how, recipe('plain', size=64, polarity=how), workers=1,
        show=False) for how in ('header', 'auto')}
    for how, store in stores.items():
        t = store.index.assign(k=[int(Path(p).stem) for p in store.index.path])
        assert (t.polarity[t.k%2==0]=='dark').all() and (t.polarity[t.k%2==1]=='bright').all()
        assert (t.inverted==((t.k%2==0) & (how=='auto'))).all()
        assert t.reason[t.k%2==0].str.contains('negative').all() and not t.reason[t.k%2==1].str.contains('negative').any()
    for i in range(6):
        a, b = (stores[how][i].astype(int) for how in ('header', 'auto'))
        film = (a>0) | (b>0)
        assert film.mean()>.7
        if stores['auto'].index.inverted[i]: assert abs(a+b-255)[film].max()<=2
        else: assert (a==b).all()


def test_masks_and_points_come_along(folder):
    r = read_radiograph(folder/'0.dcm')
    moved = recipe('plain', size=64, polarity='auto')(r, points=[(40., 50.)])
    same = recipe('plain', size=64)(r, points=[(40., 50.)])
    assert (moved.points==same.points).all() and moved.radiograph.tags['inverted']
    assert find_polarity(moved.radiograph).bone=='bright' and find_polarity(same.radiograph).bone=='dark'


def test_each_film_is_decoded_once(folder, tmp_path, monkeypatch):
    "By a page with `pixels='all'`; what it tells of bone is what the reader would show, of files of many kinds."
    a = read_radiograph(folder/'0.dcm').pixels
    for k, (photometric, syntax, window) in enumerate((('MONOCHROME1', 'explicit', None),
            ('MONOCHROME2', 'jpeg2000', 'sigmoid'), ('MONOCHROME1', 'rle', 'lut'))):
        write_dicom(tmp_path/f'{k}.dcm', a, photometric=photometric, syntax=syntax, window=window)
        write_dicom(tmp_path/f'{k}b.dcm', 1-a, photometric=photometric, syntax=syntax, window=window)
    cv2.imwrite(str(tmp_path/'c.png'), np.uint8(255*np.stack([a]*3, -1)))
    ds = pydicom.dcmread(folder/'1.dcm')
    ds.SamplesPerPixel, ds.PlanarConfiguration, ds.PhotometricInterpretation = 3, 0, 'RGB'
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = np.uint8(255*np.stack([1-a]*3, -1)).tobytes()
    ds.save_as(tmp_path/'d.dcm')
    seen, usual = [], stored.layout
    def counted(ds, value, path, *more):
        seen.append(Path(path).name)
        return usual(ds, value, path, *more)
    monkeypatch.setattr(stored, 'layout', counted)
    e = explore_dicoms(tmp_path, pixels='all', workers=1, show=False)
    assert sorted(seen)==sorted(p.name for p in tmp_path.glob('*.dcm'))
    with pytest.warns(UserWarning, match='colour'):
        dark = {p.name for p in tmp_path.iterdir() if find_polarity(read_radiograph(p)).bone=='dark'}
    assert {Path(p).name for p in e.files['negative']}==dark and len(dark)==4


def test_a_page_lists_negatives(folder):
    e = explore_dicoms(folder, pixels='all', workers=1, show=False)
    assert e.attention.set_index('what').files['negative']==3
    assert {Path(p).stem for p in e.files['negative']}=={'0', '2', '4'}
    assert 'negative' not in set(explore_dicoms(folder, workers=1, show=False).attention.what)


def test_commands(folder, tmp_path):
    code = 'from radiology_ai.cli import main; main()'
    run = lambda *a: subprocess.run([sys.executable, '-c', code, *map(str, a)], capture_output=True, text=True)
    done = run('index', folder, '--out', tmp_path/'i.parquet', '--polarity', '--workers', 1)
    assert done.returncode==0 and 'negatives: 3 of 6' in done.stderr+done.stdout
    assert sorted(pd.read_parquet(tmp_path/'i.parquet').polarity)==['bright']*3+['dark']*3
    done = run('preprocess', folder, '--recipe', 'plain', '--size', 32, '--polarity', 'auto', '--out', tmp_path/'s',
        '--workers', 1)
    assert done.returncode==0 and '3 images show bone dark, which was undone' in done.stderr+done.stdout
    done = run('preprocess', folder, '--recipe', 'plain', '--polarity', 'automatic', '--out', tmp_path/'t')
    assert done.returncode==2 and "polarity is 'automatic'" in done.stderr and not (tmp_path/'t').exists()


def test_recipes_of_before_take_the_header():
    old = recipe('knee').to_dict()
    assert 'polarity' not in old and recipe('knee', polarity='auto').to_dict()['polarity']=='auto'
    assert Preprocess.from_dict(old)==recipe('knee')
    with pytest.raises(RadiologyError, match='polarity is 1'): recipe('knee', polarity=1)
    for b in Path(__file__).with_name('data').glob('**/bundle.json'):
        if 'polarity' not in json.loads(b.read_text()).get('recipe', {}):
            assert load_bundle(b.parent).recipe.polarity=='header'


@pytest.mark.parametrize('shape', [(16, 300), (2500, 60), (700, 701), (48, 48)])
def test_any_shape_is_the_opposite_of_its_negative(shape):
    a = cv2.resize(rng(1, shape).random((7, 9)).astype(np.float32), shape[::-1]).clip(0, 1)
    p, q = find_polarity(a), find_polarity(Radiograph(1-a))
    assert abs(p.score+q.score-1)<1e-3
    assert (p.bone, q.bone) in {('bright', 'dark'), ('dark', 'bright'), ('unsure', 'unsure')}


@pytest.mark.skipif(not (REAL/'knee_oai').is_dir(), reason='RADIOLOGY_AI_REAL_DATA is not set')
def test_real_films_that_were_never_learnt_from():
    films = []
    for name, who in (('chest_nih', 'patient_id'), ('chest_child', None), ('chest_covid', None), ('knee_oai', None)):
        t = pd.read_csv(REAL/name/'manifest.csv')
        if who: t = t[t[who]%2==1]
        films += [f'{name}/{p}' for p in t.path.sample(60, random_state=0)]
    told = {f: find_polarity(read_radiograph(REAL/f)).bone for f in {*films}-{*NEGATIVES}}
    dark = [f for f, b in told.items() if b=='dark' and not f.startswith('knee_oai')]
    assert not dark and list(told.values()).count('bright')>=.93*len(told)
    assert {find_polarity(read_radiograph(REAL/f)).bone for f in NEGATIVES}=={'dark'}


@pytest.mark.skipif(not (REAL/'dicom').is_dir(), reason='RADIOLOGY_AI_REAL_DATA is not set')
def test_real_dicom_files_are_not_taken_for_negatives():
    told = {}
    for f in sorted((REAL/'dicom').glob('*.dcm')):
        try: ds = pydicom.dcmread(f, force=True)
        except Exception: continue
        if 'badhuff' in f.name or 'PixelData' not in ds: continue
        told[f.name] = find_polarity(read_radiograph(f)).bone
    assert len(told)>=15 and 'dark' not in told.values(), told
