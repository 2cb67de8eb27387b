"""Simulated chests: labels, boxes and masks say what was drawn, findings occur together as in the published list, and a
seed is a seed."""
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from radiology_ai.core import RadiologyError, rng
from radiology_ai.data.regions import box_problems
from radiology_ai.data.tree import chest_terms, chest_tree
from radiology_ai.dicom.index import index_dicoms
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.phantom.cases import HOSPITALS, MASKS, expose_chest, simulate_case
from radiology_ai.phantom.findings import SIGNS, TERMS, TREE32, Case, Sign, draw_case
from radiology_ai.phantom.hospital import box_table, read_planes, simulate_chests
from radiology_ai.phantom.signs import draw_pneumothorax
from radiology_ai.phantom.thorax import build_thorax, draw_build

NOTHING = {kind: 0. for kind in SIGNS}
SIZE = 144


def case_of(kind: str, seed: int, view: str='PA', **other) -> Case:
    "A case with nothing but one kind of sign."
    return draw_case(rng(seed, kind), view, changed=NOTHING | {kind: 1.} | other)


def both(case: Case, seed: int, size: int=SIZE):
    """The film of a case and that of the same patient without its signs, where the signs leave the anatomy
    alone."""
    return simulate_case(seed, case, size), simulate_case(seed, replace(case, signs=()), size)


@pytest.fixture(scope='module')
def chests(tmp_path_factory):
    "The exports of the two hospitals, and of the first one again with two processes."
    folder = tmp_path_factory.mktemp('chests')
    how = dict(n=12, seed=3, size=128, show=False, follow_ups=.4, changed={'pneumothorax': .3})
    truth = {h: simulate_chests(folder/h, hospital=h, workers=1, **how) for h in HOSPITALS}
    again = simulate_chests(folder/'again', workers=2, **how)
    return folder, truth, again


def test_labels_are_those_of_the_tree():
    tree = chest_tree()
    assert set(TREE32)==set(tree.names)
    assert set(tree.names)-{c for k in SIGNS.values() for c in k.categories}=={'Normal'}
    cases = pd.DataFrame([draw_case(rng(i, 'tree')).labels() for i in range(600)])
    assert tree.contradictions(cases)==[]
    pd.testing.assert_frame_equal(tree.close(cases[list(TREE32)]).astype(int)[list(tree.names)],
        cases[list(tree.names)].astype(int))
    terms = chest_terms('nih14')
    for kind in SIGNS.values():
        if kind.term.lower() in terms: assert set(kind.categories)==set(terms[kind.term.lower()]), kind
    assert {t.lower() for t in TERMS}==set(terms) | {'fracture'}


def test_findings_occur_as_often_and_together_as_published():
    cases = [draw_case(rng(i, 'shares')) for i in range(3000)]
    seen = pd.DataFrame([{'view': c.view} | {k: c.has(k) for k in SIGNS} for c in cases])
    share = seen.groupby('view')[list(SIGNS)].mean()
    for kind, what in SIGNS.items():
        for view, p in (('PA', what.pa), ('AP', what.ap)):
            if kind in ('spondylosis', 'aorta', 'calcification', 'cardiomegaly', 'hernia', 'pacemaker',
                    'blunting'):
                continue # these follow age or give way to others
            n = (seen.view==view).sum()
            assert abs(share.loc[view, kind]-p)<4*np.sqrt(p*(1-p)/n)+.002, (kind, view)

    def lift(a: str, b: str) -> float: return (seen[a]&seen[b]).mean()/(seen[a].mean()*seen[b].mean())
    for a, b, least in [('edema', 'effusion', 1.4), ('cardiomegaly', 'effusion', 1.5),
            ('emphysema', 'pneumothorax', 2.5), ('drain', 'pneumothorax', 4), ('tube', 'gastric', 2.5)]:
        assert lift(a, b)>least, (a, b, lift(a, b))
    often = [draw_case(rng(i, 'often'), changed={'edema': .2, 'cardiomegaly': .2}) for i in range(1000)]
    large, wet = (np.array([c.has(k) for c in often]) for k in ('cardiomegaly', 'edema'))
    assert wet[large].mean()>1.25*wet.mean()
    ap = seen[seen.view=='AP']
    assert ap.tube.mean()>10*seen[seen.view=='PA'].tube.mean()
    treated = ap[ap.pneumothorax].drain.mean()
    # a drain without a pneumothorax, and one without a drain
    assert .25<treated<.9 and ap[~ap.pneumothorax].drain.sum()>10
    assert all(c.supine<=(c.view=='AP') for c in cases)


def test_prevalences_can_be_chosen():
    cases = [draw_case(rng(i, 'chosen'), changed={'pneumothorax': .4, '*effusion': 0}) for i in range(800)]
    assert abs(np.mean([c.has('pneumothorax') for c in cases])-.4)<.06
    assert not any(c.has('effusion') for c in cases)


@pytest.mark.parametrize('kind', SIGNS)
def test_every_sign_shows(kind):
    "A sign changes the film of the same patient, in both views, and has a box where it has a mask."
    for seed, view in ((1, 'PA'), (2, 'AP')):
        case = case_of(kind, seed, view)
        case = replace(case, signs=tuple(replace(s, contrast=.7) for s in case.signs))
        with_, without = both(case, seed)
        assert with_.labels[SIGNS[kind].term or 'Lung']==int(bool(SIGNS[kind].term
            or 'Lung' in SIGNS[kind].categories))
        assert np.abs(with_.line-without.line).max()>.02, kind
        assert set(with_.names)<={kind}
        for name in with_.names: assert with_.labels[SIGNS[name].term or 'Lung'] in (0, 1)
        for x1, y1, x2, y2 in with_.boxes: assert 0<=x1<x2<=SIZE and 0<=y1<y2<=SIZE


def test_pneumothorax_lies_in_its_lung_and_is_as_large_as_real_ones():
    areas, forms, darker = [], set(), []
    for seed in range(48):
        case = case_of('pneumothorax', seed, ('PA', 'AP')[seed%2])
        sign, = case.signs
        p, q = both(case, seed)
        mask = p.masks['pneumothorax']
        lung = p.masks['left_lung' if sign.side=='L' else 'right_lung']
        assert mask.any() and not (mask&~lung).any()
        areas.append(mask.mean())
        forms.add(sign.form)
        if sign.form not in ('tension', 'basal'): darker.append((q.line-p.line)[mask].mean())
    assert forms=={f for f, _ in SIGNS['pneumothorax'].forms}
    assert .003<np.median(areas)<.008, np.median(areas)
    assert min(areas)<.002 and max(areas)>.03
    assert np.median(darker)>.05 and np.quantile(darker, .1)>0


def test_no_vessel_beyond_the_pleural_line():
    case = Case(signs=(Sign('pneumothorax', 'apical', 'R', .97, .8),))
    for seed in range(3):
        t = build_thorax(case, draw_build(rng(seed), case), rng(seed), SIZE)
        before = t.tree.copy()
        mask = draw_pneumothorax(t, case.signs[0], rng(seed))
        inner = ~cv2.dilate((~mask).astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
        assert inner.any() and before[inner].max()>.5 and t.tree[inner].max()<.01
        assert (t.tree==before)[t.fields['L']].all()


def test_heart_is_large_in_cardiomegaly_alone():
    large = [simulate_case(s, case_of('cardiomegaly', s), 128).labels['ctr'] for s in range(8)]
    normal = [simulate_case(s, Case(sex='FM'[s%2], age=30+5*s), 128) for s in range(10)]
    lying = [simulate_case(s, Case('AP', True, 'FM'[s%2], 30+5*s), 128) for s in range(10)]
    assert min(large)>.5
    assert max(p.labels['ctr'] for p in normal)<.5
    wide = [np.mean([p.labels['ctr'] for p in group]) for group in (normal, lying)]
    assert wide[1]>1.05*wide[0] # magnified on an AP film


def test_lying_patients_have_high_domes():
    def low(p) -> float:
        return np.flatnonzero(p.masks['lungs'].any(1))[-1]*p.spacing - p.points['right_apex'][1]*p.spacing
    standing, lying = ([low(simulate_case(s, Case(v, v=='AP'), 128)) for s in range(10)]
        for v in ('PA', 'AP'))
    assert np.mean(lying)<np.mean(standing)-5


def test_effusion_whitens_the_base():
    for view in ('PA', 'AP'):
        for side, lung in (('L', 'left_lung'), ('R', 'right_lung')):
            p, q = both(Case(view, view=='AP', signs=(Sign('effusion', side=side, amount=.6),)), 4)
            rows, cols = np.nonzero(q.masks[lung])
            base = q.masks[lung].copy()
            base[:int(np.quantile(rows, .75))] = False
            other = q.masks['right_lung' if side=='L' else 'left_lung']
            assert (p.line-q.line)[base].mean()>.08
            assert abs((p.line-q.line)[other].mean())<.01
            shot = [expose_chest(film, rng(1), 'a').pixels[base].mean() for film in (p, q)]
            assert shot[0]>shot[1]+.02


def test_opacities_are_graded_and_boxed():
    gains = {}
    for kind in ('pneumonia', 'consolidation', 'infiltration'):
        for seed in range(10):
            case = case_of(kind, seed)
            p, q = both(case, seed)
            mask = p.masks.get('opacity')
            if mask is None: continue
            gains.setdefault(kind, []).append((p.line-q.line)[mask].mean())
            hull = np.zeros_like(mask)
            for x1, y1, x2, y2 in p.boxes: hull[int(y1):int(np.ceil(y2)), int(x1):int(np.ceil(x2))] = True
            assert not (mask&~hull).any() and set(p.names)=={kind}
    assert all(min(v)>0 for v in gains.values())
    assert np.median(gains['consolidation'])>np.median(gains['infiltration'])
    spread = np.concatenate(list(gains.values()))
    assert np.quantile(spread, .9)>3*np.quantile(spread, .1) # from hardly to plainly visible
    assert all(len(v)>=8 for v in gains.values())


def test_look_alikes_are_no_pneumonia():
    for kind in ('effusion', 'mass', 'atelectasis', 'nipple', 'skinfold'):
        case = case_of(kind, 3)
        assert not case.labels()['Pneumonia'] and 'opacity' not in simulate_case(3, case, SIZE).masks
    assert case_of('skinfold', 3).labels()['Normal']==1 and case_of('electrodes', 3).labels()['Normal']==1


def test_masks_of_anatomy():
    for seed in range(6):
        p = simulate_case(seed, size=SIZE)
        m = p.masks
        assert set(m)<={*MASKS, 'lungs'} and {*MASKS[:5], 'lungs'}<=set(m)
        assert not (m['left_lung']&m['right_lung']).any()
        assert np.nonzero(m['right_lung'])[1].mean()<np.nonzero(m['heart'])[1].mean()<np.nonzero(
            m['left_lung'])[1].mean()
        assert .1<m['lungs'].mean()<.5 and .002<m['left_clavicle'].mean()<.05


def test_patients_differ():
    bodies = [simulate_case(s, Case(sex='FM'[s%2], age=40), SIZE) for s in range(20)]
    size = np.array([p.masks['lungs'].mean() for p in bodies])
    assert size.std()/size.mean()>.08
    assert np.std([p.labels['ctr'] for p in bodies])>.015 and np.std([p.spacing for p in bodies])>.05


def test_a_follow_up_shows_the_same_body():
    case = Case(signs=(Sign('mass', side='L', amount=.4, contrast=.9),))
    a, b = (simulate_case(8, case, SIZE, film=k) for k in (0, 1))
    assert abs(a.labels['ctr']-b.labels['ctr'])<.03 and (a.line!=b.line).any()
    assert abs(a.masks['lesion'].sum()/b.masks['lesion'].sum()-1)<.15


def test_hospitals_differ_in_grey_not_in_anatomy():
    p = simulate_case(5, size=SIZE)
    a, b = (expose_chest(p, rng(5), h) for h in HOSPITALS)
    assert a.phantom is p and b.phantom is p and np.abs(a.pixels-b.pixels).mean()>.03
    assert (simulate_case(5, size=SIZE).line==p.line).all()
    shots = {h: [expose_chest(simulate_case(s, Case(), 128), rng(s), h) for s in range(8)] for h in HOSPITALS}
    white = {h: np.mean([(e.pixels==1)[e.field].mean() for e in v]) for h, v in shots.items()}
    assert white['b']>2*white['a'] # another window
    icu = {h: np.mean([c.view=='AP' for c in [draw_case(rng(i), portable=HOSPITALS[h].portable)
        for i in range(400)]])
        for h in HOSPITALS}
    assert icu['b']>icu['a']+.1


def test_same_seed_same_bytes(chests):
    folder, truth, again = chests
    pd.testing.assert_frame_equal(again, truth['a'])

    def digest(place: Path) -> dict:
        return {p.relative_to(place): hashlib.sha256(p.read_bytes()).hexdigest() for p in place.rglob('*')
            if p.is_file()}
    assert digest(folder/'a')==digest(folder/'again')
    assert not set(truth['a'].image_id) & set(truth['b'].image_id)
    assert not set(truth['a'].patient_id) & set(truth['b'].patient_id)


def test_truth_is_that_of_the_stored_pixels(chests):
    folder, truth, _ = chests
    for name, t in truth.items():
        assert len(t)>12 and t.image_id.is_unique and (t.broken=='').all()
        assert set(TREE32)|set(TERMS)<=set(t.columns) and chest_tree().contradictions(t)==[]
        boxes = box_table(t)
        assert box_problems(boxes, t)==[] and len(boxes)
        for row in t.itertuples():
            film = read_radiograph(folder/name/row.path)
            masks = read_planes(folder/name/row.masks)
            assert film.pixels.shape==(row.height, row.width)==masks['heart'].shape
            if row.Pneumothorax and 'pneumothorax:tension' not in row.forms:
                assert masks['pneumothorax'].any()
            dark, bright = film.pixels[masks['left_lung']|masks['right_lung']], film.pixels[masks['heart']]
            assert np.median(dark)<np.median(bright)
    index = index_dicoms(folder/'a'/'films', workers=1)
    assert sorted(index.SOPInstanceUID)==sorted(truth['a'].image_id)
    assert json.loads((folder/'a'/'chests.json').read_text())['hospital']=='a'


def test_folder_is_ours_and_arguments_are_checked(tmp_path):
    t = simulate_chests(tmp_path/'x', n=7, size=96, workers=1, broken=True, masks=False, show=False)
    assert (t.broken!='').sum()==6 and not (tmp_path/'x'/'masks').exists()
    assert len(simulate_chests(tmp_path/'x', n=1, size=96, workers=1, show=False, follow_ups=0))==1
    (tmp_path/'x'/'mine.txt').write_text('mine')
    with pytest.raises(RadiologyError, match='mine.txt'): simulate_chests(tmp_path/'x', n=1, size=96)
    for wrong, said in ((dict(n=0), 'at least 1 patient'), (dict(size=20), '64 pixels'),
            (dict(hospital='z'), 'one of a, b'),
            (dict(follow_ups=2), 'share'), (dict(changed={'fever': 1}), "no 'fever'"),
            (dict(portable=-1), 'share')):
        with pytest.raises(RadiologyError, match=said): simulate_chests(tmp_path/'y', **dict(size=96) | wrong)
    assert not (tmp_path/'y').exists()
