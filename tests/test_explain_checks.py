"""A heat map that is wrong, blind to the weights or unstable fails its checks; a report says so and draws the
method that passes."""
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import refuses
from torch import nn

from radiology_ai.core import DataError, ModelError
from radiology_ai.data.tree import LabelTree
from radiology_ai.explain import METHODS, Method
from radiology_ai.heat.checks import (
    alike,
    boxes_mask,
    check_method,
    check_methods,
    chosen_method,
    erasing_gains,
    randomised,
    region_figures,
)
from radiology_ai.heat.grid import layout_of
from radiology_ai.heat.targets import MaskLogit
from radiology_ai.tasks.kinds import Classes, Grades, Labels
from radiology_ai.tasks.looked import checked_method, heat_section, look, network_of, questions_of
from radiology_ai.tasks.masks import Masks
from radiology_ai.tasks.tree import Tree

SIZE = 48


class Spot(nn.Module):
    """Its answer is the brightness of a place that differs from image to image: the brightest of a smoothed
    image."""
    def __init__(self):
        super().__init__()
        self.smooth, self.last = nn.Conv2d(1, 1, 5, padding=2, bias=False), nn.Linear(1, 2)
        with torch.no_grad():
            self.smooth.weight.fill_(1/25)
            self.last.weight.copy_(torch.tensor([[-9.], [9.]]))
    def forward(self, x): return self.last(self.smooth(x).relu().amax((2, 3)))


def films(n=12, seed=0):
    "Grey noise with a bright square, and its mask."
    gen = np.random.default_rng(seed)
    x, masks = gen.normal(.3, .03, (n, SIZE, SIZE)), np.zeros((n, SIZE, SIZE), bool)
    for i in range(n):
        r, c = gen.integers(0, SIZE-9, 2)
        masks[i, r:r+9, c:c+9] = True
    x[masks] += .5
    return torch.tensor(x.clip(0, 1), dtype=torch.float32)[:, None], masks


def fixed(heat_of):
    "A method whose maps are a function of the images and the network."
    return Method(lambda model, x, target, layer: (heat_of(model, x), layout_of(model, x.shape[-2:]), 'made'))


def bright(model, x): return (x[:, 0]-.5).clamp(min=0)


def learnt(model, x):
    "As `bright` while the weights are those of `Spot`."
    own = torch.allclose(model.smooth.weight, torch.tensor(1/25))
    return bright(model, x) if own else torch.rand(x[:, 0].shape, generator=torch.Generator().manual_seed(1))


def jumpy(model, x):
    return torch.rand(x[:, 0].shape, generator=torch.Generator().manual_seed(int(x.sum()*1e3)%1000))


MADE = {'bright': fixed(bright), 'learnt': fixed(learnt), 'dark': fixed(lambda m, x: 1-x[:, 0]),
    'jumpy': fixed(jumpy)}


@pytest.fixture
def made():
    with patch.dict(METHODS, MADE): yield


def test_gains_are_of_the_places_that_count(made):
    x, masks = films()
    gains = erasing_gains(Spot(), x, {'true': masks, 'false': ~masks}, 1)
    assert (gains['true']>0).all(axis=None) and (gains['false']<0).all(axis=None)
    again = erasing_gains(Spot(), x, {'true': masks}, 1)
    assert np.allclose(again['true'], gains['true'], atol=1e-5) # of their own, and the same each time


def test_each_fault_is_named(made):
    x, masks = films()
    good, blind, wrong, loose = check_methods(Spot(), x, ('learnt', 'bright', 'dark', 'jumpy'), 1,
        truth=masks)
    assert good.passed and good.figures['pointing'].value==1 and good.figures['energy over area'].low>.5
    assert blind.failed==('it stays much the same with random weights',)
    assert 'no more than places at random' in wrong.verdict and 'in the true regions' in wrong.notes[0]
    assert 'changes with a little noise' in loose.verdict
    assert chosen_method([blind, good, wrong]).method=='learnt' and chosen_method([blind, wrong]) is None
    assert check_method(Spot(), x, 'attnlrp', 1).failed[0].startswith('it does not fit the network')
    with pytest.raises(ModelError, match='no method'): check_method(Spot(), x, 'gradcan', 1)


def test_intervals_are_over_patients(made):
    x, masks = films(16)
    def width(n, groups):
        twice = torch.arange(16).repeat_interleave(n)
        f = check_method(Spot(), x[twice], 'learnt', 1, truth=masks[twice], groups=groups,
            steps=1).figures['energy']
        return f.high-f.low
    alone, pairs, wrong = width(1, None), width(2, np.arange(16).repeat(2)), width(2, None)
    assert pairs==pytest.approx(alone, rel=.1) and wrong<.85*alone


def test_regions_beside_chance():
    masks = np.stack([boxes_mask([(0, 0, 12, 12)], (48, 48)), boxes_mask([(18, 18, 30, 30)], (48, 48)),
        np.zeros((48, 48), bool)])
    flat = region_figures(np.ones((3, 48, 48)), masks)
    assert flat.pointing.tolist()[:2]==[0, 0] and np.allclose(flat.energy[:2],
        1/16) and flat.iloc[2].isna().all()
    assert flat.centre_pointing.tolist()[:2]==[0, 1] and flat.centre_energy[1]>.1>flat.centre_energy[0]
    with pytest.raises(DataError, match='Give a mask for each image'):
        region_figures(np.ones((1, 48, 48)), masks)
    assert alike(masks[:2], masks[:2]).tolist()==[1, 1] and alike(masks[2:], masks[:1]).tolist()==[0]


def test_random_weights_leave_the_model_alone():
    model, x = Spot(), films()[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = randomised(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(other.last.weight, model.last.weight)
    assert torch.equal(randomised(model, x).last.weight, other.last.weight)


class Stored:
    "As much of an `ImageStore` as a report's pictures need."
    def __init__(self, x):
        self.images = (x[:, 0].numpy()*255).astype(np.uint8)
        self.index = pd.DataFrame({'image_id': [f'i{k}' for k in range(len(x))]})
    def position(self, i): return int(i[1:])
    def __getitem__(self, i): return self.images[i]


def tables(n):
    ids = pd.DataFrame({'image_id': [f'i{k}' for k in range(n)], 'patient_id': [f'p{k}' for k in range(n)]})
    return ids, ids.assign(a=1., b=[k%2 for k in range(n)], p_a=np.linspace(.2, .9, n), p_b=.6,
        threshold_a=.5, threshold_b=.5)


def section(answer, model, store, table, valid, **drawn):
    return heat_section(look(answer, model, store, table, valid), answer, model, store, **drawn)


def test_labels_have_their_pictures_and_their_check(made):
    """The method that passes is chosen; the label of the dark output, for which it is wrong, is named, and its pictures
    say so."""
    x, _ = films(12)
    ids, table = tables(12)
    model = Spot()
    with torch.no_grad(): model.last.weight.copy_(torch.tensor([[9.], [-.1]])) # the likeliest is the first label
    with patch('radiology_ai.tasks.looked.TRIED', ('bright', 'learnt')):
        found = section(Labels(), model, Stored(x), table, ids)
    text, checks, *parts = found.parts
    pictures = [p for p in parts if not isinstance(p, str)]
    assert 'those of learnt' in text and text.endswith('passed its checks in all but not of b: do not rest on those.')
    assert not found.warnings
    common = 'the likeliest'
    assert [(r['method'], r['of'], r['films'], r['verdict'][:6])
        for r in checks.rows]==[('bright', common, '8 validation', 'failed'), ('learnt', common, '8 validation', 'passed'),
        ('learnt', common, '8 test', 'passed'), ('learnt', 'a', '8 test', 'passed'), ('learnt', 'b', '8 test', 'failed')]
    assert {p.kind for p in pictures}=={'a: true positive', 'a: false negative', 'b: true positive',
        'b: false positive'}
    assert all(p.heat.shape==(SIZE, SIZE) for p in pictures)
    assert {(p.kind[0], p.note.split('; ')[1]) for p in pictures}=={('a', 'learnt, passed its checks'),
        ('b', 'learnt, failed its checks')} and all(p.kind.endswith(p.note.split('; ')[0]) for p in pictures)
    assert [p for p in parts if isinstance(p, str)]==['Of a:', 'Of b:']
    assert {(p.kind, p.truth) for p in pictures}=={('a: true positive', 'a'), ('a: false negative', 'a'),
        ('b: true positive', 'b'), ('b: false positive', 'no b')}
    assert [q.name for q in questions_of(Classes(), table, None)]==['a', 'b']


def test_where_no_method_passes_it_is_said_first(made):
    x, _ = films(8)
    ids, table = tables(8)
    with patch('radiology_ai.tasks.looked.TRIED', ('dark', 'bright')):
        found = section(Labels(), Spot(), Stored(x), table, ids.iloc[:0])
    assert found.warnings and 'must not be read as reasons' in found.parts[0]
    assert {r['films'] for r in found.parts[1].rows}=={'8 test'}
    assert found.parts[3].note=='true positive; dark, failed its checks'


def test_pictures_that_are_there_are_not_drawn_again(made):
    x, _ = films(8)
    ids, _ = tables(8)
    table = ids.assign(target=[k%2 for k in range(8)], score=.7, threshold=.5)
    with patch('radiology_ai.tasks.looked.TRIED', ('learnt',)):
        looked = look(Grades(), Spot(), Stored(x), table, ids)
        found = heat_section(looked, Grades(), Spot(), Stored(x), drawn=True)
        assert 'those of learnt' in found.parts[0] and found.parts[2:]==['Heat maps of the worst errors and of true '
            'positives stand under Worst errors.']
        assert 'the heat of learnt' in looked.of_errors and 'passed its checks' in looked.of_errors
        assert len(section(Grades(), Spot(), Stored(x), table, ids).parts)>2
        few = checked_method(Spot(), Stored(x), 1, ids[:1], ids[:1])
    assert few==('learnt', [])
    flat = nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, 2))
    told = look(Grades(), flat, Stored(x), table, ids)
    assert told.fault and 'There are no heat maps' in told.of_errors and section(Grades(), flat, Stored(x), table,
        ids).parts[-1].startswith('There are no heat maps')


def test_coarse_and_empty_maps_are_called_so(made):
    x, _ = films(8)
    ids, _ = tables(8)
    table = ids.assign(target=[k%2 for k in range(8)], score=.7, threshold=.5)
    quarter = fixed(lambda m, x: torch.nn.functional.adaptive_avg_pool2d(x, 2)[:, 0])
    none = fixed(lambda m, x: -x[:, 0])
    with patch.dict(METHODS, {'quarter': quarter, 'none': none}):
        for method, fine, note in (('quarter', '(coarse, 2 x 2 cells of 24 x 24 pixels)', ''),
                ('none', '(48 x 48 cells of 1 x 1 pixels)', '; nothing speaks for it')):
            with patch('radiology_ai.tasks.looked.TRIED', (method,)):
                found = section(Grades(), Spot(), Stored(x), table, ids)
            assert fine in found.parts[0] and found.parts[3].note==f'true positive; {method}, failed its checks{note}'
    assert found.parts[1].columns[:2]==['method', 'verdict'] # first, as a narrow page shows no more


class Masks2(nn.Module):
    "Two masks: where the image is bright, and where it is dark."
    def __init__(self):
        super().__init__()
        self.smooth = nn.Conv2d(1, 2, 5, padding=2)
        with torch.no_grad():
            self.smooth.weight.fill_(1/25)
            self.smooth.weight[1] = -1/25
    def forward(self, x): return 9*(self.smooth(x.sub(.5)))


def test_masks_are_asked_whether_or_not_they_have_a_score_each():
    "A film-wise mask without a column for each structure, and structures with one."
    ids, _ = tables(4)
    one = ids.assign(score=.6, threshold=.5, dice=.5, target=1)
    asked = questions_of(Masks(name='air'), one, Masks2())
    assert [(q.name, q.target, len(q.rows), q.true) for q in asked]==[('the mask', MaskLogit(), 3, 'air')]


def test_of_a_tree_the_triage_and_the_labels_are_explained():
    "The triage score's logit is that of the likeliest category of each tier; beside it stand the labels."
    tree = LabelTree(('normal', 'mass', 'nodule', 'air'), ('',)*4, ('fine', 'soon', 'soon', 'now'),
        ('fine', 'soon', 'now'), 'normal')
    answer = Tree(tree, outputs=tree.names)
    z = torch.tensor([[9., 1., 2., 0.], [0., -3., -1., 4.]])
    assert answer.heat_of_score()(z).tolist()==[(2+0)/2, (4+4)/2]
    ids, _ = tables(6)
    table = ids.assign(tier='now', tier_true=['now', 'fine']*3, triage=.5, mass=1., p_mass=.5)
    asked = questions_of(answer, table, None)
    assert [(q.name, q.drawn) for q in asked]==[('triage', True), ('mass', False)]
    assert set(asked[0].rows.kind)=={'true positive', 'false positive'}
    assert Tree().heat_of_score() is None


def test_of_a_pose_its_confidence_is_explained_on_the_film_itself():
    from radiology_ai.models.stn import create_aligner
    from radiology_ai.tasks.poses import Poses
    model = create_aligner('resnet10t', pretrained=False, size=32).eval()
    x = films(4)[0]
    ids, _ = tables(4)
    own = network_of(Poses(), model)
    torch.testing.assert_close(own(x)[:, 0], model.answer(x)[1].float())
    found = section(Poses(), model, Stored(x), ids.assign(error_moved=[1., 2., 3., 4.], p_chest=.5), ids)
    assert {r['method'] for r in found.parts[1].rows}=={'integrated_gradients'}
    assert found.parts[3].kind=='confidence: worst' and found.parts[3].heat.shape==(SIZE, SIZE)


def test_an_unknown_method_is_one_line(run, hospital, tmp_path):
    film = min((hospital/'dicom').rglob('*.dcm'))
    said = refuses('explain', run, film, '--out', tmp_path/'x', '--method', 'gradcan')
    assert "no method 'gradcan'" in said and 'layercam' in said and not (tmp_path/'x').exists()


def test_a_method_draws_on_the_film(run, hospital, tmp_path):
    from radiology_ai.serve.predict import explain
    film = min((hospital/'dicom').rglob('*.dcm'))
    plain, other = (explain(run, [film], tmp_path/m, workers=1, method=m)
        for m in ('gradcam', 'integrated_gradients'))
    assert (tmp_path/'integrated_gradients'/other.picture[0]).exists()
    assert (plain.hot_x[0], plain.hot_y[0])!=(other.hot_x[0], other.hot_y[0])


def test_heat_is_handed_on_as_dicom(run, hospital, tmp_path):
    "A secondary capture of each picture, in the study of its film; a film of which none can be made has its picture and a fault."
    import cv2
    import pydicom

    from radiology_ai.serve.predict import explain
    film = min((hospital/'dicom').rglob('*.dcm'))
    bare = tmp_path/'bare.dcm'
    ds = pydicom.dcmread(film)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID + '.1'
    del ds.StudyInstanceUID
    ds.save_as(bare)
    table = explain(run, [film, bare], tmp_path/'heat', workers=1, dicom=True).set_index('path')
    name = table.picture[str(film)]
    made = pydicom.dcmread(tmp_path/'heat'/name.replace('.png', '_sc.dcm'))
    assert made.StudyInstanceUID==pydicom.dcmread(film).StudyInstanceUID
    assert made.SourceImageSequence[0].ReferencedSOPInstanceUID==pydicom.dcmread(film).SOPInstanceUID
    picture = cv2.imread(str(tmp_path/'heat'/name))[..., ::-1]
    np.testing.assert_array_equal(made.pixel_array, picture)
    assert 'no StudyInstanceUID' in table.error[str(bare)] and len(list((tmp_path/'heat').glob('*_sc.dcm')))==1
    assert (tmp_path/'heat'/table.picture[str(bare)]).exists()
