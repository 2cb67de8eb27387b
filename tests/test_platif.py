"""The public set of fractures of the tibial plateau, in the form in which it is published, made here."""
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from radiology_ai.core import DataError
from radiology_ai.data.datasets import PLATIF, from_platif
from radiology_ai.data.regions import rle_decode

RNG = np.random.default_rng(0)


def patient(path, *labels, odd=(), nested=False, side=(24, 18), colour=False):
    images = {}
    for k, label in enumerate(labels):
        pixels = RNG.integers(0, 255, side).astype(np.uint8)
        outline = np.zeros((side[0], side[1] + (k in odd)), bool)
        outline[5:15, 4:12] = True
        images[f'im{k}'] = dict(OriginalImage=np.stack([pixels]*3, -1) if colour else pixels, BW=outline,
            maskedImage=pixels*(not odd), label=label)
    savemat(path, dict(data=images) if nested else images)
    return images


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "186 patients with 421 images, as published, of some pixels each."
    root = tmp_path_factory.mktemp('platif')
    number = 0
    for label, (patients, images) in PLATIF.items():
        share = [images//patients + (k>=patients - images%patients) for k in range(patients)]
        for n in share:
            number += 1
            patient(root/f'{number:03}.mat', *[label]*n, odd=[1] if number in (47, 81) else (), side=(6, 5))
    return root


@pytest.mark.filterwarnings('ignore:PlaTiF.*odd cell')
def test_counts_are_the_published_ones(whole, tmp_path):
    knees = from_platif(whole, tmp_path/'out')
    df = knees.manifest
    assert (len(df), df.patient_id.nunique(), len(knees.masks))==(421, 186, 419)
    assert df.groupby('schatzker').size().to_dict()=={0: 139, 1: 65, 2: 70, 3: 26, 4: 17, 5: 22, 6: 82}
    assert (df.fractured==(df.schatzker>0)).all() and df.patient_id.value_counts().max()>1
    assert knees.problems.image_id.tolist()==['047_im1', '081_im1']
    assert knees.problems.problem.str.contains('the mask has 6 x 6 pixels, its image 5 x 6').all()
    assert not {'047_im1', '081_im1'} & set(knees.masks.image_id)


@pytest.mark.parametrize('how', [{}, dict(nested=True), dict(colour=True)])
def test_pixels_and_masks(tmp_path, how):
    (tmp_path/'in').mkdir()
    made = patient(tmp_path/'in'/'007.mat', 3, 3, **how)
    with pytest.warns(UserWarning, match='odd cell'): knees = from_platif(tmp_path/'in', tmp_path/'out')
    for k, row in enumerate(knees.manifest.itertuples()):
        pixels = made[f'im{k}']['OriginalImage']
        assert np.array_equal(np.asarray(Image.open(row.path)), pixels[..., 0] if how.get('colour') else pixels)
        mask = knees.masks[knees.masks.image_id==row.image_id].iloc[0]
        assert np.array_equal(rle_decode(mask.rle, (24, 18)), made[f'im{k}']['BW'])
    assert 'published are 12 and 26' in ' '.join(knees.problems.problem)


def test_faults_are_named(tmp_path):
    (tmp_path/'in').mkdir()
    with pytest.raises(DataError, match='nothing that fits'): from_platif(tmp_path/'in', tmp_path/'out')
    patient(tmp_path/'in'/'001.mat', 7)
    (tmp_path/'in'/'002.mat').write_bytes(b'no such file')
    patient(tmp_path/'in'/'003.mat', 8)
    with pytest.raises(DataError, match='2 faults'): from_platif(tmp_path/'in', tmp_path/'out')
    with pytest.warns(UserWarning): knees = from_platif(tmp_path/'in', tmp_path/'out', errors='list')
    fractured = dict(zip(knees.manifest.patient_id, knees.manifest.fractured))
    assert fractured['001']==0 and np.isnan(fractured['003'])
    assert knees.problems.problem.str.contains('cannot be read').any()
