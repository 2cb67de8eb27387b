"""Lungs: several masks at once whose sides change places in mirror images, what is measured on them, unknown
structures, and the masks on the original film."""
import json
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import TensorMask
from fastai.vision.core import TensorImage

from radiology_ai.core import BundleError, DataError
from radiology_ai.data.regions import rle_decode, rle_encode
from radiology_ai.metrics.masks import dice, hausdorff95, iou, mask_table
from radiology_ai.models.bundle import load_bundle
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.serve.predict import predict
from radiology_ai.tasks.base import make_settings
from radiology_ai.tasks.fit import train_task
from radiology_ai.tasks.judge import evaluate_run, examples_of, report_run
from radiology_ai.tasks.kinds import task_manifest
from radiology_ai.tasks.lungs import (
    JSRT_BITS,
    LUNGS,
    STRUCTURES,
    LungsSettings,
    child_lungs,
    jsrt_structures,
    simulated_structures,
    structure_augment,
    two_lungs,
)
from radiology_ai.tasks.outlines import pixel_mm
from radiology_ai.tasks.structures import (
    CTR,
    Structures,
    agreement,
    film_masks,
    film_record,
    largest_part,
    measure_figures,
    measured,
    runs_from_files,
    structure_answers,
    swapped,
    truth_planes,
)
from radiology_ai.vision.augment import BatchAugment, rand_augment
from radiology_ai.vision.sided import SidedAugment, sided

NAMES = list(STRUCTURES)


def blob(y, x, r, size=48): return np.hypot(*(np.mgrid[:size, :size] - np.array([y, x])[:, None, None]))<r


def chest(size=48) -> dict:
    "Masks of a chest as a child would draw it."
    return {'right_lung': blob(24, 12, 9), 'left_lung': blob(24, 38, 8), 'heart': blob(30, 26, 7),
        'right_clavicle': blob(8, 12, 4), 'left_clavicle': blob(8, 38, 3)}


# ---- sides ---------------------------------------------------------------------------------------------------

def test_in_a_mirror_image_right_and_left_change_places():
    masks = np.stack(list(chest().values())).astype(np.int8)
    masks[3] = -1 # nobody has drawn it
    b = (TensorImage(torch.rand(6, 1, 48, 48)), TensorMask(torch.from_numpy(np.stack([masks]*6))))
    still = dict(rotation=0, translation=0, scale=(1, 1), brightness=0, contrast=(1, 1), gamma=(1, 1),
        noise=0, p=1.)
    aug = sided(BatchAugment(flip=1., **still), swapped(NAMES))
    assert isinstance(aug, SidedAugment)
    image, moved = aug(b, split_idx=0)
    assert isinstance(moved, TensorMask) and moved.dtype==torch.int8
    for k, other in enumerate((1, 0, 2, 4, 3)):
        told, expected = moved[0, k].numpy(), masks[other][:, ::-1]
        assert np.array_equal(told, expected) if other!=3 else (told==-1).all()
    assert torch.equal(image, b[0].flip(-1))
    half = sided(BatchAugment(flip=.5, seed=3, **still), swapped(NAMES))
    flipped = half.draw(6).flip
    _, some = half(b, split_idx=0)
    heart = some[:, 2].numpy().astype(float).mean(1)@np.arange(48)/some[:, 2].numpy().mean(1).sum(1)
    assert flipped.any() and not flipped.all() and ((heart<24).tolist()==flipped.tolist())
    right = some[:, 0].numpy().mean(1)@np.arange(48)/some[:, 0].numpy().mean(1).sum(1)
    assert (right<24).all() # the right lung stays on the left of the image
    assert isinstance(structure_augment(LungsSettings()), SidedAugment)
    assert not isinstance(structure_augment(LungsSettings(flip=0.)), SidedAugment)
    with pytest.raises(DataError, match="'left_lung' has no other side"): swapped(['heart', 'left_lung'])


def test_a_sided_augmentation_draws_as_the_plain_one():
    a, b = structure_augment(LungsSettings(seed=5)), rand_augment(3., flip=.5, seed=5)
    first, second = a.draw(20), b.draw(20)
    assert torch.equal(first.matrix(32, 32), second.matrix(32, 32)) and torch.equal(first.flip, second.flip)


def test_the_mean_with_the_mirror_image_is_that_of_an_even_network():
    class Sides(torch.nn.Module):
        "A network that marks the left half as right and the right half as left."
        def forward(self, x):
            z = torch.where(torch.arange(x.shape[-1])<x.shape[-1]//2, 4., -4.).expand(len(x), *x.shape[-2:])
            return torch.stack([z, -z], 1)*x
    x = torch.ones(2, 1, 8, 8)
    plain = structure_answers([Sides()], x)
    assert np.allclose(structure_answers([Sides()], x, [1, 0]), plain, atol=1e-6)
    assert np.allclose(structure_answers([Sides()], x, [0, 1]), .5) # without the change of places


# ---- measurements --------------------------------------------------------------------------------------------

def test_what_is_measured_and_how_well_masks_agree():
    masks, mm = chest(), (.5, .4)
    found = measured(masks, mm, (CTR,))
    lungs = np.flatnonzero((masks['right_lung'] | masks['left_lung']).any(0))
    assert found['ctr']==pytest.approx(13/(np.ptp(lungs)+1))
    assert found['cm2_heart']==pytest.approx(masks['heart'].sum()*.5*.4/100)
    assert found['area_heart']==pytest.approx(masks['heart'].mean())
    unknown = measured(masks | {'heart': None}, None, (CTR,), '_true')
    assert all(math.isnan(unknown[k]) for k in ('ctr_true', 'area_heart_true', 'cm2_heart_true',
        'cm2_left_lung_true'))
    moved = np.roll(masks['heart'], 2, 0)
    for size in (None, (.5, .5), (.5, .4)):
        got = agreement(masks['heart'], moved, size)
        assert (got['dice'], got['iou'])==(dice(masks['heart'], moved), iou(masks['heart'], moved))
        assert got['hd95']==pytest.approx(hausdorff95(masks['heart'], moved)/math.hypot(48, 48))
        assert math.isnan(got['hd95_mm']) if size is None else (
            got['hd95_mm']==pytest.approx(hausdorff95(masks['heart'], moved, size)))
    assert all(math.isnan(v) for v in agreement(None, moved).values())
    empty = agreement(masks['heart'], moved & False)
    assert empty['dice']==0 and math.isnan(empty['hd95'])


def test_the_size_of_a_pixel_is_that_of_the_header_or_of_the_labels():
    film = pd.Series({'spacing_row': .3, 'spacing_col': .2, 'affine': [.5, 0, 3, 0, .25, 4, 0, 0, 1]})
    assert pixel_mm(film, .7)==[.3, .2]==pixel_mm(film)
    film['spacing_row'] = np.nan
    assert pixel_mm(film, .7)==[2.8, 1.4]
    assert all(pixel_mm(film, v) is None for v in (None, np.nan, '', 0, -1))


def test_a_film_comes_back_as_it_was_kept():
    masks = chest()
    text = film_record(np.stack(list(masks.values())), np.stack(list(masks.values())), [1, 1, 0, 1, 1],
        [.5, .5])
    drawn, true, mm = film_masks(text, NAMES)
    assert all(np.array_equal(drawn[n], masks[n]) for n in NAMES) and true['heart'] is None and mm==[.5, .5]
    assert film_masks(film_record(np.stack(list(masks.values()))), NAMES)[1]==dict.fromkeys(NAMES)


def scored(gen, n=12, specks=0):
    "A table as of `Structures.scores`: masks a little moved, and with specks far away."
    films = []
    for k in range(n):
        true = np.stack([np.roll(m, int(gen.integers(-1, 2)), 1) for m in chest().values()])
        drawn = np.stack([np.roll(m, gen.integers(-1, 2, 2), (0, 1)) for m in true])
        if specks: drawn[2] |= blob(44, 4, specks)
        films.append(film_record(drawn, true, [1, 1, k>3, 1, 1], [.5, .5] if k%2 else None))
    return pd.DataFrame({'image_id': range(n), 'patient_id': np.arange(n)//2, 'split': 'test', 'film': films,
        **{f'p_{n}': .9 for n in NAMES}})


def test_the_largest_part_is_kept_where_validation_says_that_it_helps():
    mask = blob(20, 20, 6) | blob(40, 40, 2)
    assert np.array_equal(largest_part(mask), blob(20, 20, 6)) and not largest_part(mask & False).any()
    gen = np.random.default_rng(0)
    answer = Structures(ratios=(CTR,)).settled(scored(gen, specks=3), NAMES)
    assert answer.keep==('heart',
        ) and answer.chosen['heart']['largest part']>answer.chosen['heart']['all parts']
    assert Structures().settled(scored(gen), NAMES).keep==() and Structures(sweep=False).settled(scored(gen,
        6), NAMES).keep==()
    again = Structures(ratios=(CTR,)).of_bundle(json.loads(json.dumps(answer.spec(None, NAMES, None))))
    assert again.keep==answer.keep and again.chosen==answer.chosen and Structures().of_bundle({}).keep==()
    with pytest.raises(BundleError, match='does not tell how structures are drawn'):
        Structures().of_bundle({'keep': 3})
    table = scored(gen, specks=3)
    assert (answer.thresholds(table, None).dice>Structures().thresholds(table, None).dice)[4:].all()


def test_figures_are_those_of_the_masks_and_unknown_structures_do_not_count():
    table, answer = scored(np.random.default_rng(1)), Structures(ratios=(CTR,))
    told = answer.thresholds(table, None)
    figures = answer.figures(told, ())
    pairs = [film_masks(t, NAMES)[:2] for t in table.film]
    for n in NAMES:
        own = mask_table([t[n] for _, t in pairs], [d[n] for d, _ in pairs], table.patient_id, draws=400)
        assert figures['structures'][n]['dice']['n']==(8 if n=='heart' else 12)==int(own.n['dice'])
        for a, b in (('dice', 'dice'), ('iou', 'iou')):
            assert figures['structures'][n][a]['value']==pytest.approx(own.value[b])
            assert figures['structures'][n][a]['low']==pytest.approx(own.low[b])
        assert figures['structures'][n]['hd95_mm']['n']==(4 if n=='heart' else 6)
    assert figures['labels']==[] and answer.headline(figures)==('mean Dice', figures['dice'])
    assert figures['measures']['ctr']['difference']['n']==8
    d = (told.ctr-told.ctr_true).dropna()
    low, high = figures['measures']['ctr']['spread']
    assert figures['measures']['ctr']['difference']['value']==pytest.approx(d.mean())==pytest.approx((low
        +high)/2)
    assert figures['measures']['ctr']['absolute']['value']==pytest.approx(d.abs().mean())
    lines = answer.lines(figures)
    assert any('Dice' in o and 'mm' in o for o in lines) and 'cardiothoracic ratio' in lines[-1]
    shown = answer.examples(told)
    assert shown.kind.value_counts().to_dict()=={'worst': 4, 'best': 2,
        'median': 2} and shown.image_id.is_unique
    assert shown.dice[shown.kind=='worst'].max()<=shown.dice[shown.kind=='best'].min()
    nothing = measure_figures(told.assign(ctr=''), 'ctr') # a column that was read as text since it is empty
    assert nothing['difference']['reason'] and nothing['spread'] is None


def test_a_structure_that_is_not_drawn_is_missed_and_never_a_distance():
    masks = np.stack(list(chest().values()))
    films = [film_record(masks*(np.arange(5)!=2)[:, None, None]>0, masks, [1]*5)]*6
    table = pd.DataFrame({'image_id': range(6), 'patient_id': range(6), 'film': films,
        **{f'p_{n}': .5 for n in NAMES}})
    answer = Structures(ratios=(CTR,))
    figures = answer.figures(answer.thresholds(table, None), ())
    heart = figures['structures']['heart']
    assert heart['missed']==6 and heart['dice']['value']==0 and heart['hd95']['reason'] and heart['hd95_mm'][
        'reason']
    assert 'heart: Dice 0.000' in '\n'.join(answer.lines(figures)) and answer.sections(figures)[
        0].title=='Structures'
    row = answer.row(table, None, NAMES)
    assert row.ctr.isna().all() and (row.area_heart==0).all()


# ---- labels --------------------------------------------------------------------------------------------------

def films_table(tmp_path) -> pd.DataFrame:
    rows = []
    for k in range(3):
        row = {'image_id': f'i{k}', 'patient_id': f'p{k}'}
        for n, m in chest().items():
            if k==1 and n=='heart': continue
            row[f'mask_{n}'] = str(tmp_path/f'{k}_{n}.png')
            cv2.imwrite(row[f'mask_{n}'], m.astype(np.uint8)*255)
        rows.append(row)
    return pd.DataFrame(rows)


def test_masks_come_from_files_and_what_is_not_there_is_unknown(tmp_path):
    table, settings = films_table(tmp_path), LungsSettings()
    out = Structures().prepared(table, settings)
    assert out.rle_heart.tolist()==[rle_encode(chest()['heart']), '', rle_encode(chest()['heart'])]
    assert out.height.tolist()==[48]*3 and not any(c.startswith('mask_') for c in out)
    lungs = Structures().prepared(table[['image_id', 'mask_right_lung', 'mask_left_lung']], settings)
    assert (lungs.rle_heart=='').all() and Structures().known(lungs, settings).all()
    assert not Structures().known(lungs.assign(rle_right_lung='', rle_left_lung=np.nan), settings).any()
    with pytest.raises(DataError, match='no masks of right_lung'):
        Structures().prepared(table[['image_id']], settings)
    cv2.imwrite(table.mask_heart[0], np.ones((50, 48), np.uint8))
    with pytest.raises(DataError, match=r'row 1 have the sizes \[\(48, 48\), \(50, 48\)\]'):
        runs_from_files(table, NAMES)
    with pytest.raises(DataError, match='cannot be read'):
        runs_from_files(table.assign(mask_heart=str(tmp_path/'none.png')), NAMES)
    with pytest.raises(DataError, match='have the sizes'):
        runs_from_files(table.drop(columns='mask_heart').assign(height=40, width=48), NAMES)


def test_settings_that_cannot_be_are_refused():
    for bad in (dict(label=''), dict(label='heart,heart'), dict(contradictions='?'), dict(augment=11),
            dict(flip=2), dict(width=0), dict(ema=1)):
        with pytest.raises(DataError): LungsSettings(**bad)
    assert LungsSettings(label='heart').labels==['rle_heart', 'height', 'width']


def test_two_lungs_in_one_mask_are_told_apart_or_unknown(tmp_path):
    right, left = chest()['right_lung'], chest()['left_lung']
    got = two_lungs(right | left | blob(2, 2, 2))
    assert np.array_equal(got[0], right) and np.array_equal(got[1], left)
    assert two_lungs(right) is None and two_lungs(right | blob(40, 40, 2)) is None and two_lungs(right
        & False) is None
    (tmp_path/'lung_masks').mkdir()
    for k, m in enumerate((right | left, right)):
        cv2.imwrite(str(tmp_path/f'lung_masks/{k}.png'), m.astype(np.uint8)*255)
    pd.DataFrame({'path': [f'images/{k}.jpg' for k in range(3)],
        'lung_mask': ['lung_masks/0.png', 'lung_masks/1.png', None],
        'patient_group': ['a', 'b', 'c'], 'labels': 'normal'}).to_csv(tmp_path/'manifest.csv', index=False)
    table = child_lungs(tmp_path)
    assert table.image_id.tolist()==['0.jpg'] and table.rle_left_lung[0]==rle_encode(left)
    with pytest.raises(DataError, match='There is no file'): child_lungs(tmp_path/'none')


def test_bit_planes_become_a_column_a_structure(tmp_path):
    (tmp_path/'masks').mkdir()
    planes = sum(chest()[n].astype(np.uint8)<<k for k, n in enumerate(JSRT_BITS))
    cv2.imwrite(str(tmp_path/'masks/a.png'), planes)
    pd.DataFrame({'path': ['images/a.jpg'], 'mask': ['masks/a.png'], 'image': ['A'], 'nodule': [1],
        'spacing_mm_512': [.7]}).to_csv(tmp_path/'manifest.csv', index=False)
    table = jsrt_structures(tmp_path)
    assert all(table[f'rle_{n}'][0]==rle_encode(m) for n, m in chest().items())
    assert table[['image_id', 'patient_id', 'spacing_mm', 'height']].iloc[0].tolist()==['a.jpg', 'A', .7, 48]


# ---- a run ---------------------------------------------------------------------------------------------------

smp = pytest.importorskip('segmentation_models_pytorch')
TINY = dict(arch='resnet10t', pretrained=False, width=.125, epochs=6, bs=4, lr=1e-2, body_div=1., augment=1.)
COLUMNS = LungsSettings().labels


@pytest.fixture(scope='module')
def chests(made_once) -> Path:
    "A small department with its labels and its store at 64 pixels."
    def make(root):
        truth = simulated_structures(root/'dicom', 24, 5, 1, size=128)
        truth[['image_id', 'ctr', *COLUMNS]].to_csv(root/'labels.csv', index=False)
        preprocess_folder(root/'dicom', root/'store', replace(LUNGS.recipe, size=64), workers=1)
    return made_once('lungs', make)


@pytest.fixture(scope='module')
def labels(chests) -> pd.DataFrame:
    return pd.read_csv(chests/'labels.csv', dtype=dict.fromkeys(COLUMNS[:5], str))


@pytest.fixture(scope='module')
def run(made_once, chests) -> Path:
    return made_once('lungs_run', lambda out: train_task(LUNGS, chests/'store', chests/'labels.csv', out,
        **TINY))


def test_the_simulated_masks_lie_on_their_sides_and_tell_the_ratio(chests, labels):
    store = ImageStore(chests/'store')
    manifest = task_manifest(LUNGS, store, labels, make_settings(LungsSettings))[0]
    masks = truth_planes(store, manifest, NAMES)
    for r in manifest.itertuples():
        m = dict(zip(NAMES, masks[store.position(r.image_id)]>0))
        middle = {n: np.flatnonzero(m[n].any(0)).mean() for n in NAMES if m[n].any()}
        assert middle['right_lung']<middle['left_lung'] and middle['right_clavicle']<middle['left_clavicle']
        assert abs(CTR.of(m)-r.ctr)<.1
    assert masks.known.all(axis=1).sum()==len(manifest)


def test_an_unknown_structure_teaches_nothing_and_one_never_drawn_is_refused(chests, labels):
    store, settings = ImageStore(chests/'store'), make_settings(LungsSettings, TINY)
    some = labels.copy()
    some.loc[::2, 'rle_heart'] = np.nan
    manifest = task_manifest(LUNGS, store, some, settings)[0]
    masks = truth_planes(store, manifest, NAMES)
    target = torch.from_numpy(np.stack([masks.target(store.position(i)) for i in manifest.image_id]))
    assert set(target[:, 2].flatten(1).amax(1).tolist())=={-1, 1} and (target[:, 0]>=0).all()
    z = torch.zeros(target.shape, requires_grad=True)
    LUNGS.answer.loss(settings, None)(z, target).backward()
    nobody = (target[:, 2]==-1).flatten(1).all(1)
    assert z.grad[nobody, 2].eq(0).all() and z.grad[~nobody, 2].ne(0).any() and z.grad[nobody, 0].ne(0).any()
    manifest['split'] = np.where(np.arange(len(manifest))%3==0, 'valid', 'train')
    with pytest.raises(DataError, match="'train' has no film on which heart is drawn.*label="):
        LUNGS.answer.targets(store, manifest.assign(rle_heart=''), settings)
    alone = make_settings(LungsSettings, TINY | {'label': 'right_lung,heart'})
    with pytest.raises(DataError, match='has no other side'): LUNGS.answer.targets(store, manifest, alone)


def test_masks_that_cannot_be_right_are_named_or_unknown(chests, labels):
    store, (h, w) = ImageStore(chests/'store'), (int(labels.height[1]), int(labels.width[1]))
    wrong = labels.copy()
    wrong.loc[1, 'rle_heart'] = f'0 {h*w}'
    with pytest.raises(DataError, match=rf'of image {labels.image_id[1]} in rle_heart the mask covers 100%'):
        task_manifest(LUNGS, store, wrong, make_settings(LungsSettings))
    with pytest.warns(UserWarning, match='1 masks cannot be right and are unknown'):
        manifest = task_manifest(LUNGS, store, wrong,
            make_settings(LungsSettings, {'contradictions': 'unknown'}))[0]
    row = manifest.set_index('image_id').loc[labels.image_id[1]]
    assert row.rle_heart=='' and row.rle_left_lung==labels.rle_left_lung[1]


def test_a_run_learns_is_reported_and_predicts_what_was_evaluated(chests, run, tmp_path):
    evaluation = evaluate_run(LUNGS, run)
    table = evaluation.table.set_index('image_id')
    assert evaluation.figures['structures']['right_lung']['dice']['value']>.3
    assert evaluation.headline==('mean Dice', evaluation.figures['dice'])
    pictures = examples_of(LUNGS, run, evaluation, chests/'store')
    assert {'best', 'worst'}<={o.kind
        for o in pictures} and pictures[0].image.ndim==3 and 'Dice right lung' in pictures[0].note
    text = report_run(LUNGS, run, evaluation, out=tmp_path).read_text()
    assert 'How well the masks agree' in text and 'cardiothoracic ratio' in text and 'data:image' in text
    assert '>Films</h2>' in text and 'Worst errors' not in text and 'GradCAM' not in text
    told = predict(run, list(table.path), out=tmp_path/'p.csv', to=('csv', 'json', 'png'), workers=1,
        task=LUNGS).set_index('image_id').loc[table.index]
    same = [f'p_{n}' for n in NAMES] + [f'area_{n}' for n in NAMES] + [f'cm2_{n}' for n in NAMES]
    assert np.abs(told[same].to_numpy(float) - table[same].to_numpy(float)).max()<1e-6
    index, store = ImageStore(chests/'store').index.set_index('image_id'), ImageStore(chests/'store')
    readings = {r['image_id']: r for r in json.loads((tmp_path/'p.json').read_text())['readings']}
    model, keep = load_bundle(run/'model').model, evaluation.task.answer.keep
    for image, r in told.iterrows():
        film, scale = index.loc[image], index.loc[image].affine[0]
        assert (r.height, r.width)==(film.Rows, film.Columns)
        x = torch.from_numpy(store[store.position(image)].astype(np.float32)/255)[None, None]
        p = structure_answers([model], x, swapped(NAMES))[0]
        for k, n in enumerate(NAMES):
            small = largest_part(p[k]>=.5) if n in keep else p[k]>=.5
            mask = rle_decode(r[f'rle_{n}'], (r.height, r.width))
            if small.sum()<30: continue
            assert abs(mask.sum()*scale**2/small.sum()-1)<.1
            assert np.abs(np.argwhere(mask).mean(0)*scale + np.array(film.affine)[[5, 2]]
                - np.argwhere(small).mean(0)).max()<1
        findings = readings[image]['findings']
        assert [f['label'] for f in findings]==NAMES and not any('call' in f for f in findings)
        assert all(('mask' in f)==(r[f"rle_{f['label']}"]!='-1') for f in findings)
        assert readings[image]['area_heart']==pytest.approx(r.area_heart)


def test_a_network_of_five_is_judged_where_two_were_drawn(chests, run, labels):
    own = labels.drop(columns=['rle_heart', 'rle_right_clavicle', 'rle_left_clavicle']).assign(
        patient_id=[f'OTHER{k}' for k in range(len(labels))])
    bundle_settings = make_settings(LungsSettings, TINY)
    manifest = task_manifest(LUNGS, ImageStore(chests/'store'), own, bundle_settings)[0]
    answer, model = LUNGS.answer, load_bundle(run/'model').model
    rows = manifest.head(6).assign(spacing_mm=.5)
    table = pd.concat([rows[['image_id', 'patient_id']],
        answer.scores([model], ImageStore(chests/'store'), rows, NAMES)], axis=1)
    figures = answer.figures(answer.thresholds(table, None), ())
    counted = {n: o['dice']['n'] for n, o in figures['structures'].items()}
    assert counted=={n: 6 if n.endswith('lung') else 0
        for n in NAMES} and figures['measures']['ctr']['difference']['n']==0
