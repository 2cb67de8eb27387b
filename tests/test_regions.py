"""Boxes, outlines, masks and points on the image that is there, against mappings written here from scratch; what nobody
has drawn or only half said, from the table to losses and metrics; and the real films with what was drawn on them."""
import json
import warnings

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import TensorMask

from radiology_ai.core import DataError, ModelError, StoreError
from radiology_ai.data.codes import category_codes, check_classes, firm_labels, label_matrix
from radiology_ai.data.dataset import BoxTargets, MaskTargets, PointTargets
from radiology_ai.data.load import xray_dataloaders
from radiology_ai.data.regions import (
    XYXY,
    bit_planes,
    image_mask,
    outline_boxes,
    outline_mask,
    outline_masks,
    outline_parts,
    pack_planes,
    rle_decode,
    rle_encode,
    size_scale,
)
from radiology_ai.data.sampler import BalancedBatchSampler, PositiveShareSampler, inverse_frequency
from radiology_ai.data.targets import MaskStore, stored_boxes, stored_points, write_masks
from radiology_ai.losses.base import BCEWithNaN
from radiology_ai.losses.labels import default_loss, pos_weights
from radiology_ai.losses.regions import DiceBCE, DiceLoss, LovaszHinge, TverskyLoss
from radiology_ai.metrics.boxes import by_image, known_images, match_boxes
from radiology_ai.metrics.curves import pr_curve, roc_curve
from radiology_ai.metrics.detection import (
    coco_map,
    coco_map_ci,
    detection_table,
    froc,
    rsna_map,
    rsna_map_ci,
    threshold_sweep,
)
from radiology_ai.metrics.masks import dice, iou, mask_table
from radiology_ai.metrics.ranking import auroc, auroc_ci, average_precision, delong_test
from radiology_ai.metrics.running import columns, scores_auroc
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.vision.augment import BatchAugment


class Films:
    "A store of films (height, width), each laid into a square by its matrix."
    fingerprint = 'films'
    def __init__(self, films, matrices, side=64):
        self.side,self.index = side,pd.DataFrame({'image_id': [f'{k}.png' for k in range(len(films))],
            'Rows': [h for h,_ in films], 'Columns': [w for _,w in films],
            'affine': [np.array(m, float).ravel().tolist() for m in matrices]})
    def __len__(self): return len(self.index)
    def __getitem__(self, i): return np.full((self.side, self.side), 40+i, np.uint8)

# whole, padded, cropped, mirrored: what stores do to films of 120 x 160 (height x width)
PLACES = {'squeezed into a square': [[.4, 0, 0], [0, .4, 8], [0, 0, 1]],
    'cropped': [[1.2, 0, -60], [0, 1.2, -40], [0, 0, 1]],
    'mirrored': [[-.4, 0, 64], [0, .4, 8], [0, 0, 1]]}
BOX = np.array([60., 40, 95, 80]) # on the film of 160 x 120

def films(scale=1., n=3, side=64):
    matrices = [np.array(PLACES[p])@np.diag([1/scale, 1/scale, 1]) for p in list(PLACES)[:n]]
    return Films([(round(120*scale), round(160*scale))]*n, matrices, side)

def placed(matrix, points):
    "Points through a matrix, one at a time."
    return np.array([[sum(matrix[r][k]*v for k,v in enumerate((x, y, 1))) for r in (0, 1)] for x,y in points])

def filled(points, shape, fine=16):
    "A polygon as a mask by area: painted `fine` times as large, and what is covered by half."
    big = np.zeros((shape[0]*fine, shape[1]*fine), np.uint8)
    cv2.fillPoly(big, [np.rint(np.asarray(points)*fine).astype(np.int32)], 1)
    return big.reshape(shape[0], fine, shape[1], fine).mean((1, 3))>=.5

def overlap(a, b): return (a & b).sum()/max((a | b).sum(), 1)

def table(ids=('0.png', '1.png', '2.png'), **more):
    return pd.DataFrame([(i, *BOX) for i in ids], columns=['image_id', *XYXY]).assign(**more)


# ---- the image at another size -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('scale', [.25, .5, 1, 2.5])
def test_boxes_points_and_masks_follow_a_film_of_another_size(tmp_path, scale):
    store = films(scale)
    corners = [(BOX[0], BOX[1]), (BOX[2], BOX[3])]
    for how in (dict(drawn_on=(160, 120)), dict(drawn_on=pd.DataFrame({'image_id': store.index.image_id,
            'width': 160, 'height': 120}))):
        moved = stored_boxes(store, table(), **how)
        points = stored_points(store, pd.DataFrame([(i, k, *p) for i in moved.image_id
            for k,p in enumerate(corners)],
            columns=['image_id', 'label', 'x', 'y']), **how)
        for k,m in enumerate(PLACES.values()):
            at = placed(m, corners)
            want = np.r_[at.min(0), at.max(0)].clip(0, 64)
            np.testing.assert_allclose(moved[XYXY].to_numpy()[k], want, atol=1e-9)
            np.testing.assert_allclose(points[['x', 'y']].to_numpy()[2*k:2*k+2], at, atol=1e-9)
    pd.testing.assert_frame_equal(stored_boxes(store, table(width=160, height=120))[XYXY], moved[XYXY])
    mask = np.zeros((120, 160), bool)
    mask[40:80,60:95] = True
    drawn = dict.fromkeys(store.index.image_id, mask)
    for k,b in enumerate(moved[XYXY].to_numpy()):
        got = write_masks(store, drawn, tmp_path/'masks', show=False)[k]>0
        # a pixel along an edge
        assert overlap(got, filled([b[:2], [b[2], b[1]], b[2:], [b[0], b[3]]], (64, 64)))>.93

def test_a_size_that_is_not_known_or_another_shape_is_refused_by_name():
    store = films(.5)
    with pytest.raises(DataError,
            match=r"row 0 \(image 0.png\), column 'width': nan, the size that it was drawn on is not known"):
        stored_boxes(store, table())
    with pytest.raises(DataError,
            match=r'drawn on 160 x 160 .*, and the image has 80 x 60: another shape.*Give columns width and height'):
        stored_boxes(store, table(), drawn_on=(160, 160))
    with pytest.raises(DataError, match=r"row 1 \(image 1.png\), column 'width': nan"):
        stored_boxes(store, table(width=[160, np.nan, 160], height=120))
    with pytest.raises(DataError,
            match=r"column 'x2': 95.0, lies outside the image that was drawn on \(0 to its width\)"):
        stored_boxes(store, table(), drawn_on='film') # 80 pixels wide
    points = pd.DataFrame([('0.png', 'apex', 3, 4)], columns=['image_id', 'label', 'x', 'y'])
    with pytest.raises(DataError, match='is not known'): stored_points(store, points)
    with pytest.raises(DataError, match='point was there before'):
        stored_points(store, pd.concat([points]*2), drawn_on='film')
    with pytest.raises(DataError, match="has no column 'label'|have no column 'label'"):
        stored_points(store, points.drop(columns='label'), drawn_on='film')
    unsized = films(.5)
    unsized.index.loc[1, 'Rows'] = 0
    with pytest.raises(DataError, match=r"row 1 \(image 1.png\).*the size of the image is not known"):
        stored_boxes(unsized, table(), drawn_on=(160, 120))
    with pytest.raises(DataError, match="drawn_on is 'original'"):
        stored_boxes(store, table(), drawn_on='original')

def test_all_faults_are_listed_and_the_rest_is_used():
    store = films(.5)
    bad = pd.concat([table(width=160, height=120),
        pd.DataFrame([('0.png', 5, 5, 5, 9), ('1.png', 'x', 1, 9, 9), ('2.png', 1, 1, 500, 9)],
        columns=['image_id', *XYXY]).assign(width=160, height=120),
        table(['0.png'], width=np.nan, height=120)], ignore_index=True)
    good,problems = stored_boxes(store, bad, errors='list')
    assert len(good)==3 and {(r.row, r.column) for r in problems.itertuples()}>={(3, 'x2'), (4, 'x1'),
        (5, 'x2'), (6, 'width')}
    assert set(problems.row)=={3, 4, 5, 6}
    with pytest.raises(DataError, match='The boxes have 4 faults'): stored_boxes(store, bad)
    # two rows are called 0
    twice = pd.concat([table(width=160, height=120), table(['0.png'], width=np.nan, height=120)])
    assert len(stored_boxes(store, twice, errors='list')[0])==3

@pytest.mark.parametrize('drawn, there, fits',
    [((1024, 1024), (512, 512), True), ((2682, 2749), (1000, 1025), True),
    ((2682, 2749), (1000, 1024), True), ((1024, 1024), (512, 500), False),
    ((3000, 2000), (2000, 3000), False),
    ((1024, 1024), (1024, 1024), True), ((2500, 2048), (224, 224), False), ((512, 512), (2048, 2048), True)])
def test_shapes(drawn, there, fits):
    scale,why = size_scale([drawn], [there])
    assert (why[0]=='')==fits
    if fits: np.testing.assert_allclose(scale[0], np.array(there)/drawn)

def test_masks_of_another_shape_are_refused_or_listed(tmp_path):
    store = films(.5)
    whole,odd = np.ones((120, 160), bool),np.ones((160, 160), bool)
    given = {'0.png': whole, '1.png': odd, '2.png': whole}
    with pytest.raises(DataError,
            match='mask of image 1.png has 160 x 160 pixels, its image 60 x 80: another shape'):
        write_masks(store, given, tmp_path/'a', show=False)
    assert not (tmp_path/'a'/'masks.npy').exists()
    done = write_masks(store, given, tmp_path/'b', show=False, errors='list')
    assert done.known.tolist()==[True, False, True] and done.problems.image_id.tolist()==['1.png']
    torn = pd.DataFrame({'image_id': '0.png', 'rle': ['0 5', '0 9'], 'height': [120, 60], 'width': [160, 80]})
    with pytest.raises(DataError, match='several values of height'):
        write_masks(store, torn, tmp_path/'c', show=False)


# ---- outlines and bits -------------------------------------------------------------------------------------------------

def test_outlines_are_filled_by_the_middles_of_pixels():
    from matplotlib.path import Path as Line
    gen = np.random.default_rng(3)
    for k in range(25):
        n = int(gen.integers(3, 30))
        # a star: no line crosses another
        angle,radius = np.sort(gen.uniform(0, 2*np.pi, n)),gen.uniform(3, 40, n)
        p = np.stack([30+radius*np.cos(angle), 25+radius*np.sin(angle)], 1)
        y,x = np.mgrid[:50,:70]+.5
        want = Line(p).contains_points(np.stack([x, y], -1).reshape(-1, 2)).reshape(50, 70)
        got = outline_mask(p, (50, 70))
        assert (got!=want).sum()<=1, k # a middle on a line
        again = rle_decode(rle_encode(got), (50, 70))
        assert (again==got).all()

def test_forms_of_an_outline():
    square = [[1, 2], [5, 2], [5, 6], [1, 6]]
    for form in (square, np.array(square), json.dumps(square), [1, 2, 5, 2, 5, 6, 1, 6], [square],
            [[1, 2, 5, 2, 5, 6, 1, 6]]):
        parts = outline_parts(form)
        assert len(parts)==1 and outline_mask(form, (9, 9)).sum()==16 and outline_mask(form, (9, 9))[2:6,
            1:5].all()
    two = [square, [[6, 6], [8, 6], [8, 8], [6, 8]]]
    assert len(outline_parts(two))==2 and outline_mask(two, (9, 9)).sum()==20
    for nothing in (None, np.nan, '', [], '[]'):
        assert outline_parts(nothing)==[] and not outline_mask(nothing, (4, 4)).any()
    for broken in ('[[1, 2]', [[1, 2], [3, 4]], [1, 2, 3], [['a', 'b']]*3, [[1, np.inf], [2, 3], [4, 5]],
            {'x': 1}):
        with pytest.raises(DataError, match='outline'): outline_parts(broken)

def test_outlines_become_boxes_and_masks():
    lines = pd.DataFrame({'image_id': list('aabc'), 'label': 'mass',
        'polygon': ['[[1, 2], [5, 2], [5, 6.5]]', [[7, 7], [9, 7], [9, 9]],
        None, '[[1, 1], [2'], 'width': 12, 'height': 10})
    with pytest.raises(DataError, match=r"outlines have 1 fault: row 3 \(image c\), column 'polygon'"):
        outline_boxes(lines)
    boxes,problems = outline_boxes(lines, errors='list')
    assert boxes[XYXY].values.tolist()[:2]==[[1, 2, 5, 6.5],
        [7, 7, 9, 9]] and boxes[XYXY].iloc[2].isna().all()
    assert problems.row.tolist()==[3] and list(boxes.label)==['mass']*3
    masks = outline_masks(lines[:3])
    assert masks.rle.iloc[2]=='-1'
    both = image_mask(masks, 'a')
    assert (both==(outline_mask(lines.polygon[0], (10, 12)) | outline_mask(lines.polygon[1], (10, 12)))).all()
    with pytest.raises(DataError, match="no column 'width'"): outline_masks(lines.drop(columns='width'))
    with pytest.raises(DataError, match='reaches out of the image of 6 x 10 pixels'):
        outline_masks(lines[:2].assign(width=6))
    with pytest.raises(DataError, match='not known'): outline_masks(lines[:2].assign(width=np.nan))

@pytest.mark.parametrize('n, dtype', [(1, np.uint8), (8, np.uint8), (9, np.uint16), (20, np.uint32)])
def test_bits(n, dtype):
    planes = np.random.default_rng(n).random((n, 7, 9))<.5
    packed = pack_planes(planes)
    assert packed.dtype==dtype and (bit_planes(packed, n)==planes).all()
    if planes[-1].any():
        with pytest.raises(DataError, match=f'{n-1} masks are the numbers 0 to'): bit_planes(packed, n-1)
    with pytest.raises(DataError, match='Give 1 to 32'): pack_planes(np.zeros((33, 2, 2)))

LABELS = ['left lung', 'right lung', 'heart']

def overlapping(shape=(120, 160)):
    planes = np.zeros((3, *shape), bool)
    planes[0,20:100,10:70] = planes[1,20:100,85:150] = planes[2,60:110,50:110] = True
    return planes

def test_several_masks_a_film_in_every_form(tmp_path):
    store,planes = films(.5, side=96),overlapping()
    bits = sum(p.astype(np.uint8)<<k for k,p in enumerate(planes))
    cv2.imwrite(str(tmp_path/'bits.png'), bits)
    runs = pd.DataFrame([('0.png', l, rle_encode(p), 120, 160) for l,p in zip(LABELS, planes)],
        columns=['image_id', 'label', 'rle', 'height', 'width'])
    whole = write_masks(store, {'0.png': planes}, tmp_path/'0', show=False, labels=LABELS)
    for k,form in enumerate(({'0.png': bits}, {'0.png': tmp_path/'bits.png'},
            {'0.png': dict(zip(LABELS, planes))}, runs), 1):
        got = write_masks(store, form, tmp_path/str(k), show=False, labels=LABELS)
        assert (got[0]==whole[0]).all() and got.known.tolist()==[[True]*3, [False]*3, [False]*3]
    for k in range(3): # each as if it were alone
        alone = write_masks(store, {'0.png': planes[k]}, tmp_path/'alone', show=False)
        assert (alone[0]==whole[0][k]).all() and alone[0].any()
    again = MaskStore(tmp_path/'0')
    assert again.labels==LABELS and again[0].dtype==np.uint8 and again[0].shape==(3, 96,
        96) and 'heart' in repr(again)
    for wrong,told in ((dict(labels=LABELS[:2]), 'The masks hold 7|hold [4-7]'),
            (dict(labels=['a', 'a', 'b']), 'a name of its own')):
        with pytest.raises(DataError, match=told):
            write_masks(store, {'0.png': bits}, tmp_path/'x', show=False, **wrong)
    with pytest.raises(DataError, match=r"No mask has the label 'oedema' \(there are heart"):
        write_masks(store, runs, tmp_path/'x', show=False, labels=['oedema'])
    with pytest.raises(DataError, match="the label 'hart'"):
        write_masks(store, {'0.png': {'hart': bits}}, tmp_path/'x', show=False, labels=LABELS)

def test_a_table_of_files_is_read(tmp_path):
    store = films(.5)
    cv2.imwrite(str(tmp_path/'m.png'), overlapping()[2].astype(np.uint8)*255)
    files = pd.DataFrame({'image_id': ['0.png'], 'label': 'heart', 'rle': '', 'path': str(tmp_path/'m.png'),
        'height': 120, 'width': 160})
    got = write_masks(store, files, tmp_path/'a', show=False)
    assert got[0].any() and (got[0]==write_masks(store, {'0.png': overlapping()[2]}, tmp_path/'b',
        show=False)[0]).all()


# ---- unknown is not empty ----------------------------------------------------------------------------------------------

def manifest(n):
    return pd.DataFrame({'image_id': [f'{k}.png' for k in range(n)],
        'patient_id': [f'p{k}' for k in range(n)],
        'split': ['train' if k<n-4 else 'valid' for k in range(n)], 'ill': [float(k%2) for k in range(n)]})

def many(n=12): return Films([(120, 160)]*n, [PLACES['squeezed into a square']]*n)

def test_boxes_of_images_that_nobody_looked_at():
    store = many()
    looked = pd.concat([table(['0.png', '8.png']), pd.DataFrame({'image_id': ['1.png', '9.png']})],
        ignore_index=True)
    boxes = stored_boxes(store, looked, drawn_on='film')
    assert boxes.image_id.tolist()==['0.png', '8.png', '1.png', '9.png'] and boxes.x1.notna().sum()==2
    t = BoxTargets(store, boxes)
    assert t.present(range(3)).tolist()==[1, 0, -1] and t.vocab==['finding']
    b = t.batch([0, 1, 2])
    assert b['known'].tolist()==[True, True, False] and [len(o) for o in b['boxes']]==[1, 0, 0]
    assert BoxTargets(store, boxes, undrawn='empty').present(range(3)).tolist()==[1, 0, 0]
    assert BoxTargets(store, boxes, undrawn=['2.png']).present([2, 3]).tolist()==[0, -1]
    assert BoxTargets(store, stored_boxes(store, looked, drawn_on='film',
        undrawn='empty')).known(range(12)).all()
    assert BoxTargets(store, stored_boxes(store, looked, drawn_on='film',
        undrawn=['2.png'])).known(range(12)).sum()==5
    with pytest.raises(DataError, match="undrawn is 'none'"): BoxTargets(store, boxes, undrawn='none')
    with pytest.warns(UserWarning, match='1 of 2 boxes lie outside'): # dropped, yet looked at
        lost = stored_boxes(Films([(120, 160)]*2, [PLACES['cropped']]*2), pd.concat([table(['0.png']),
            table(['1.png']).assign(x1=0, x2=9)], ignore_index=True), drawn_on='film')
    assert lost.image_id.tolist()==['0.png', '1.png'] and lost.x1.isna().tolist()==[False, True]

def test_masks_of_images_that_nobody_drew_on(tmp_path):
    store,planes = many(),overlapping()
    one = write_masks(store, pd.DataFrame({'image_id': ['0.png', '1.png', '2.png'],
        'rle': [rle_encode(planes[0]), '-1', np.nan],
        'height': 120, 'width': 160}), tmp_path/'one', show=False)
    assert one.known.tolist()[:4]==[True, True, False, False] # a cell without run lengths says nothing
    t = MaskTargets(store, one)
    assert t.present(range(3)).tolist()==[1, 0, -1] and t.known(range(3)).tolist()==[True, True, False]
    m = t.batch([0, 1, 2])
    assert type(m) is TensorMask and [o.unique().tolist() for o in m]==[[0, 1], [0], [-1]]
    assert (one.target(2)==-1).all() and one.target(0).dtype==np.int8
    several = write_masks(store, {'0.png': {'heart': planes[2]}, '1.png': planes*0}, tmp_path/'several',
        show=False, labels=LABELS)
    s = MaskTargets(store, several)
    assert s.vocab==LABELS and s.present(range(3)).tolist()==[1, 0, -1]
    assert [o.unique().tolist() for o in s.batch([0, 1, 2])[0]]==[[-1], [-1], [0, 1]]
    assert MaskTargets(store, several, undrawn='empty').batch([0, 2])[1].unique().tolist()==[0]
    assert write_masks(store, {'0.png': planes[0]}, tmp_path/'e', show=False, undrawn='empty').known.all()
    assert write_masks(store, {'0.png': planes[0]}, tmp_path/'e', show=False,
        undrawn=['3.png']).known.sum()==2
    (tmp_path/'several'/'masks.json').write_text(json.dumps(dict(store='films', images=12,
        labels=['x', 3, 'y'])))
    with pytest.raises(StoreError, match='no masks'): MaskStore(tmp_path/'several')

def test_points_that_nobody_set():
    store = many()
    points = pd.DataFrame([('0.png', 'apex', 10, 20), ('0.png', 'base', 15, 90),
        ('1.png', 'apex', np.nan, np.nan)],
        columns=['image_id', 'label', 'x', 'y'])
    t = PointTargets(store, stored_points(store, points, drawn_on='film'))
    assert t.present(range(3)).tolist()==[1, -1, -1]
    xy = t.batch([0, 1])['points']
    np.testing.assert_allclose(xy[0].numpy(), placed(PLACES['squeezed into a square'], [(10, 20), (15, 90)]),
        atol=1e-5)
    assert torch.isnan(xy[1]).all()
    with pytest.raises(DataError, match="label 'apex', which is not among"):
        PointTargets(store, points, ['base'])

def test_loaders_leave_out_what_nobody_drew(tmp_path):
    store,table_ = many(),manifest(12)
    seen = [f'{k}.png' for k in (0, 1, 2, 3, 8, 9)]
    masks = write_masks(store, {k: overlapping()[0]*(i%2) for i,k in enumerate(seen)}, tmp_path/'m',
        show=False)
    boxes = stored_boxes(store, pd.concat([table(seen[::2]), pd.DataFrame({'image_id': seen[1::2]})]),
        drawn_on='film')
    points = stored_points(store, pd.DataFrame([(k, 'apex', 3, 4) for k in seen],
        columns=['image_id', 'label', 'x', 'y']), drawn_on='film')
    for given in (dict(masks=masks), dict(boxes=boxes), dict(points=points)):
        with pytest.warns(UserWarning, match='Nobody has drawn on 6 of 12 images.*undrawn='):
            dls = xray_dataloaders(store, table_, bs=2, device='cpu', **given)
        assert sorted([*dls.train_ds.items.image_id, *dls.valid_ds.items.image_id])==sorted(seen)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            # an unknown mask beside a known label
            beside = xray_dataloaders(store, table_, 'ill', bs=2, device='cpu', **given)
            assert (len(beside.train_ds), len(beside.valid_ds))==(8, 4)
            if 'points' not in given:
                empty = xray_dataloaders(store, table_, bs=2, device='cpu', undrawn='empty', **given)
                assert (len(empty.train_ds), len(empty.valid_ds))==(8, 4)
        beside.valid.show_batch(max_n=4)
    for _,m in xray_dataloaders(store, table_[table_.image_id.isin(seen)], bs=2, device='cpu',
            masks=masks).train:
        assert set(m.flatten(1).amax(1).tolist())=={0, 1} # one with, one without
    with pytest.raises(DataError, match='both boxes and masks'):
        xray_dataloaders(store, table_, boxes=boxes, masks=masks)
    with pytest.raises(DataError,
            match="No image of the split 'valid' was drawn on"), pytest.warns(UserWarning):
        xray_dataloaders(store, table_, bs=2, boxes=boxes[~boxes.image_id.isin(['8.png', '9.png'])])

def test_image_masks_boxes_and_points_move_together(tmp_path):
    """A bright block, its mask, its box and its corners: after every draw they still lie on one another;
    unknown stays unknown."""
    n,side = 24,96
    x,mask = torch.zeros(n, 1, side, side),torch.zeros(n, 3, side, side, dtype=torch.int8)
    x[:,:,30:60,40:70] = 1
    mask[:,0,30:60,40:70] = 1
    mask[:,1,50:80,20:50] = 1
    mask[:,2] = -1
    box,corners = torch.tensor([[40., 30, 70, 60]]),torch.tensor([[40., 30], [70, 30], [70, 60], [40, 60]])
    aug = BatchAugment(rotation=12, translation=.1, scale=(.8, 1.2), noise=0, brightness=0, contrast=(1, 1),
        gamma=(1, 1), flip=.5, seed=4,
        box_from='corners')
    known = torch.arange(n)%2==0
    given = dict(boxes=[box]*n, labels=[torch.zeros(1, dtype=torch.int64)]*n,
        points=corners[None].repeat(n, 1, 1), known=known)
    image,m,t = aug((x, TensorMask(mask), given))
    assert torch.equal(t['known'], known) and (m[:,2]==-1).all() and set(m[:,:2].unique().tolist())=={0, 1}
    for k in range(n):
        lit,drawn = image[k,0].numpy()>.5,m[k,0].numpy()>0
        assert overlap(lit, drawn)>.97
        assert overlap(filled(t['points'][k].numpy(), (side, side)), drawn)>.97
        (x1,y1,x2,y2),(rows,cols) = t['boxes'][k][0].tolist(),np.nonzero(drawn)
        assert x1-2<=cols.min() and cols.max()<=x2+1 and y1-2<=rows.min() and rows.max()<=y2+1
    single = aug((x, TensorMask(torch.where(known[:,None,None], mask[:,0], -1))))[1]
    assert (single[~known]==-1).all() and (single[known]>=0).all()

def test_losses_honour_what_nobody_drew():
    z = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = (torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))<.4).long()
    y[1] = -1
    y[2,0] = -100
    floats = torch.where(y<0, torch.nan, y.float())
    for loss in (DiceLoss(), TverskyLoss(), LovaszHinge(), DiceBCE(), BCEWithNaN(), DiceLoss(batch=True),
            DiceLoss(empty='count')):
        a = loss(z, TensorMask(y))
        assert torch.equal(a, loss(z, floats))
        g, = torch.autograd.grad(a, z)
        assert (g[1]==0).all() and (g[2,0]==0).all() and (g[0]!=0).any()
    one = TensorMask(y[:,0])
    assert torch.equal(DiceBCE()(z[:,:1], one), DiceBCE()(z[:,:1], floats[:,:1]))
    assert isinstance(default_loss(TensorMask(y)), BCEWithNaN)
    with pytest.raises(ModelError, match='A target is -2'): DiceLoss()(z, torch.full_like(y, -2))

def test_metrics_honour_what_nobody_drew():
    gen = np.random.default_rng(0)
    truths = [(gen.random((9, 9))<.4).astype(np.int8) for _ in range(8)]
    masks = [gen.random((9, 9))<.4 for _ in range(8)]
    groups = np.arange(8)
    want = mask_table(truths[2:], masks[2:], groups[2:], tolerance=1)
    unknown = [None, np.full((9, 9), -1, np.int8), *truths[2:]]
    pd.testing.assert_frame_equal(mask_table(unknown, masks, groups, tolerance=1), want)
    half = truths[3].copy()
    half[:5] = -1
    assert dice(half, masks[3])==dice(truths[3][5:], masks[3][5:]) and iou(half, masks[3])==iou(truths[3][5:],
        masks[3][5:])

def test_detection_leaves_out_what_nobody_looked_at():
    gen = np.random.default_rng(1)
    place = lambda n: np.hstack([c:=gen.uniform(0, 60, (n, 2)), c+gen.uniform(10, 40, (n, 2))])
    truths = [place(int(k%3)) for k in range(30)]
    boxes = [np.vstack([t+gen.normal(0, 2, t.shape), place(int(gen.integers(0, 3)))]) for t in truths]
    scores,groups = [gen.random(len(b)) for b in boxes],np.arange(30)//2
    unknown = [None if k in (4, 7, 20) else t for k,t in enumerate(truths)]
    keep = [k for k,t in enumerate(unknown) if t is not None]
    b,s,t = ([o[k] for k in keep] for o in (boxes, scores, truths))
    g,how = groups[keep],dict(draws=50)
    assert rsna_map(boxes, scores, unknown)==rsna_map(b, s, t)
    whole, part = (tuple(rsna_map_ci(*o, **how)) for o in ((boxes, scores, unknown, groups), (b, s, t, g)))
    assert whole==pytest.approx(part) # sums in another order
    assert coco_map(boxes, scores, unknown)[:3]==coco_map(b, s, t)[:3]
    same = pd.testing.assert_frame_equal
    same(coco_map_ci(boxes, scores, unknown, groups=groups, **how), coco_map_ci(b, s, t, groups=g, **how))
    same(detection_table(boxes, scores, unknown, .5, groups, **how), detection_table(b, s, t, .5, g, **how))
    same(threshold_sweep(boxes, scores, unknown, [.2, .6], groups, **how),
        threshold_sweep(b, s, t, [.2, .6], g, **how))
    f,h = froc(boxes, scores, unknown, groups, **how),froc(b, s, t, g, **how)
    same(f.curve, h.curve)
    assert f.images==27 and f.cpm==h.cpm
    with pytest.raises(DataError, match=r'truth of image 4 is unknown \(3 such images\)'):
        match_boxes(boxes, scores, unknown)
    with pytest.raises(DataError, match='Nobody looked'): known_images([None, None])
    listed = by_image(['a', 'b', 'c'], pd.DataFrame([('a', 1, 2, 3, 4), ('b', *[np.nan]*4)],
        columns=['image_id', *XYXY]), undrawn='unknown')
    assert [None if o is None else len(o) for o in listed]==[1, 0, None]


# ---- soft labels -------------------------------------------------------------------------------------------------------

SOFT = pd.DataFrame({'oedema': [1, .7, 0, np.nan, .2, 1, 0, 0], 'effusion': [0, 1, 0, 1, 0, 1, 0, 1.]})

def test_soft_labels_through_the_loaders():
    store,rows = many(),manifest(12)
    values = np.tile([1, .7, 0, np.nan, .2, 0], 2)
    dls = xray_dataloaders(store, rows.assign(oedema=values), ['oedema', 'ill'], bs=4, device='cpu')
    y = torch.cat([y for _,y in dls.valid])
    np.testing.assert_allclose(y[:,0].numpy(), values[8:], rtol=1e-6)
    loss = BCEWithNaN()
    z = torch.zeros(4, 2)
    t = y.nan_to_num(.5).numpy()
    want = [-(a*np.log(.5)+(1-a)*np.log(.5)) for a,k in zip(t.ravel(), ~np.isnan(y.numpy()).ravel()) if k]
    assert loss(z, y).item()==pytest.approx(np.mean(want))
    pulled = torch.zeros(1, 1).requires_grad_()
    loss(pulled, torch.tensor([[.7]])).backward()
    assert pulled.grad.item()==pytest.approx(.5-.7) # not that of a 1 or a 0
    assert dls.train_ds.title(torch.tensor([.7, 1.])).startswith('ill')
    with pytest.raises(DataError, match=r"holds 0.7 in row 1: a soft label is no class.*\['oedema'\]"):
        xray_dataloaders(store, rows.assign(oedema=values), 'oedema', bs=4, device='cpu')
    for wrong in (-.1, 1.2, 2, -1):
        with pytest.raises(DataError, match='soft between 0 and 1'):
            label_matrix(SOFT.assign(oedema=wrong), ['oedema'])
    with pytest.raises(DataError, match='have oedema = 0.7 only'):
        check_classes(np.full((5, 1), .7), ['oedema'], ['oedema'])
    assert category_codes(pd.DataFrame({'kl': [0, .5, 2.]}), 'kl')[1]==[0, .5, 2] # half grades are classes

def test_soft_labels_in_samplers():
    soft,firm = SOFT.to_numpy(),firm_labels(SOFT.to_numpy())
    assert firm[:,0].tolist()[:3]==[1, 1, 0] and firm[4,0]==0 and np.isnan(firm[3,0])
    for make in (lambda y: BalancedBatchSampler(y, 4, seed=1), lambda y: PositiveShareSampler(y, 4, seed=1)):
        for a,b in zip(make(soft), make(firm)): assert a==b
    assert (inverse_frequency(soft)==inverse_frequency(firm)).all()
    with pytest.raises(DataError, match=r'hold 0.2: a soft label is no class.*\(N, 1\)'):
        BalancedBatchSampler(SOFT.oedema, 4)
    with pytest.raises(DataError, match='holds 1.5'): BalancedBatchSampler(SOFT.assign(oedema=1.5), 4)
    with pytest.raises(DataError, match='at is 1'): firm_labels([.3], 1)
    assert pos_weights([.75, .25, 0, 1, np.nan]).tolist()==[1.]

def test_soft_labels_in_figures_are_refused_until_it_is_said_where_they_count():
    t,s = SOFT.oedema.to_numpy(),np.linspace(1, 0, 8)
    for figure in (auroc, average_precision, auroc_ci, lambda t, s: delong_test(t, s, s[::-1]),
            lambda t, s: roc_curve(t[~np.isnan(t)], s[~np.isnan(t)], np.arange(7)),
            lambda t, s: pr_curve(t[~np.isnan(t)],
                s[~np.isnan(t)], np.arange(7))):
        with pytest.raises(DataError, match=r'targets hold \[?0\.[27].*firm_labels'): figure(t, s)
        figure(firm_labels(t), s)
    assert auroc(firm_labels(t, .1), s)!=auroc(firm_labels(t, .9), s)
    for a, b in zip(roc_curve([1, 0, np.nan], [1, 0, 1], [0, 1, 2]), roc_curve([1, 0], [1, 0], [0, 1])):
        np.testing.assert_array_equal(a, b) # what is unknown is left out
    p = np.stack([s, s], 1)
    np.testing.assert_array_equal(columns(p, SOFT.to_numpy())[0], firm_labels(SOFT.to_numpy()))
    assert scores_auroc(p[:,:1], t[:,None])==auroc(firm_labels(t), s)


# ---- real films ----------------------------------------------------------------------------------------------------------

SIZES = (128, 224, 384)

def real_store(real_data, tmp_path, paths, size, name='plain'):
    "A store of a few real films."
    import shutil
    folder = tmp_path/'films'
    folder.mkdir(exist_ok=True)
    for p in paths: shutil.copy(real_data/p, folder)
    return preprocess_folder(folder, tmp_path/f'{name}{size}', recipe(name, size=size), workers=1, show=False)

def own_matrix(store, i, film):
    "From the film to the stored image, checked by laying the film over it."
    m = np.reshape(store.index.affine.iloc[i], (3, 3))
    to = np.array([[1, 0, -.5], [0, 1, -.5], [0, 0, 1]])@m@np.array([[1, 0, .5], [0, 1, .5], [0, 0, 1]])
    laid = cv2.warpAffine(cv2.GaussianBlur(film, (0, 0), .4/m[0, 0]), to[:2], store[i].shape[::-1])
    inside = store[i]>0 # outside the field it is black
    assert inside.mean()>.6 and np.corrcoef(laid[inside], store[i][inside])[0, 1]>.85
    return m

def scaled(points, film, drawn=1024):
    return np.asarray(points, float)*[film.shape[1]/drawn, film.shape[0]/drawn]

@pytest.mark.parametrize('size', SIZES)
def test_boxes_and_outlines_of_another_size_lie_on_the_real_films(real_data, tmp_path, size):
    base = real_data/'chest_nih'
    lines = pd.read_csv(base/'polygons_1024.csv').rename(columns={'image': 'stem', 'finding': 'label'})
    boxes = pd.read_csv(base/'boxes_1024.csv').rename(columns={'image': 'stem'})
    of = pd.read_csv(base/'manifest.csv', usecols=['path', 'image']).set_index('image').path
    some = [s for s in lines.stem.unique() if s in set(boxes.stem)][:6]
    some += [s for s in lines.stem[lines.label=='No Finding'].unique() if s not in some][:2]
    name = {s: of[s].split('/')[-1] for s in some}
    store = real_store(real_data, tmp_path, [f'chest_nih/{of[s]}' for s in some], size, 'chest')
    lines,boxes = (t[t.stem.isin(some)].assign(image_id=t.stem.map(name)) for t in (lines, boxes))
    boxes = boxes.assign(x1=boxes.x, y1=boxes.y, x2=boxes.x+boxes.w, y2=boxes.y+boxes.h)
    with pytest.raises(DataError, match='size that it was drawn on is not known'): stored_boxes(store, boxes)
    moved = stored_boxes(store, boxes, .01, drawn_on=(1024, 1024))
    labels = sorted(set(lines.label)-{'No Finding'})
    masks = write_masks(store, outline_masks(lines.assign(width=1024, height=1024)), tmp_path/f'm{size}',
        show=False, labels=labels)
    outlined = stored_boxes(store, outline_boxes(lines), .01, drawn_on=(1024, 1024))
    checked = 0
    for i,here in enumerate(store.index.image_id):
        film = cv2.imread(str(tmp_path/'films'/here), cv2.IMREAD_GRAYSCALE)
        m = own_matrix(store, i, film)
        for r,b in zip(boxes[boxes.image_id==here].itertuples(),
                moved[moved.image_id==here][XYXY].to_numpy()):
            at = placed(m, scaled([(r.x, r.y), (r.x+r.w, r.y+r.h)], film)).clip(0, size)
            shared = np.prod(np.minimum(at[1], b[2:])-np.maximum(at[0], b[:2]))
            assert shared/(np.prod(at[1]-at[0])+np.prod(b[2:]-b[:2])-shared)>=.98
            checked += 1
        mine = lines[(lines.image_id==here) & lines.polygon.notna()]
        assert outlined[outlined.image_id==here].x1.notna().sum()==len(mine)
        for k,l in enumerate(labels):
            want = np.zeros((size, size), bool)
            for p in mine.polygon[mine.label==l]:
                want |= filled(placed(m, scaled(json.loads(p), film)), (size, size))
            got = masks[i][k]>0
            assert got.any()==want.any() and (not want.any() or overlap(got, want)>=.98), (here, l)
            checked += want.any()
    assert checked>15 and masks.known.all()

@pytest.mark.parametrize('size', SIZES)
def test_masks_and_landmarks_of_real_lungs(real_data, tmp_path, size):
    base = real_data/'chest_jsrt'
    films = pd.read_csv(base/'manifest.csv')[:5]
    store = real_store(real_data, tmp_path, ['chest_jsrt/'+p for p in films.path], size)
    names = ['left lung', 'right lung', 'heart', 'left clavicle', 'right clavicle']
    masks = write_masks(store, {f'{r.image}.jpg': base/r.mask for r in films.itertuples()}, tmp_path/'m',
        show=False, labels=names)
    points = pd.read_csv(base/'landmarks_512px.csv')
    points = points[points.image.isin(films.image)].assign(image_id=lambda d: d.image+'.jpg',
        label=lambda d: d.part+d.point.astype(str))
    there = PointTargets(store, stored_points(store, points, drawn_on=(512, 512)))
    xy = there.batch(range(len(store)))['points'].numpy()
    for i,here in enumerate(store.index.image_id):
        film = cv2.imread(str(tmp_path/'films'/here), cv2.IMREAD_GRAYSCALE)
        m = own_matrix(store, i, film)
        bits = cv2.imread(str(base/'masks'/here.replace('.jpg', '.png')), cv2.IMREAD_UNCHANGED)
        big = 8
        to = np.diag([big, big, 1])@m
        to = np.array([[1, 0, -.5], [0, 1, -.5], [0, 0, 1]])@to@np.array([[1, 0, .5], [0, 1, .5], [0, 0, 1]])
        for k in range(5):
            fine = cv2.warpAffine((bits>>k&1).astype(np.uint8), to[:2], (size*big, size*big),
                flags=cv2.INTER_NEAREST)
            want = fine.reshape(size, big, size, big).mean((1, 3))>=.5
            assert want.any() and overlap(masks[i][k]>0, want)>=(.98 if want.sum()>=400 else .9), (here,
                names[k])
        for r in points[points.image_id==here].itertuples():
            np.testing.assert_allclose(xy[i][there.vocab.index(r.label)], placed(m, [(r.x, r.y)])[0],
                atol=1e-3)
        lung = np.array([xy[i][there.vocab.index(f'right_lung{k}')]
            for k in range((points[(points.image_id==here)
            & (points.part=='right_lung')].shape[0]))])
        # the line around the lung
        assert max(overlap(filled(lung, (size, size)), masks[i][k]>0) for k in (0, 1))>.9
