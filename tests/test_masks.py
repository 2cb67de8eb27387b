"""Overlap and distance of masks against plain forms: brute force over all pairs, distance transforms, rules
for empty and unknown masks."""
import math

import numpy as np
import pytest
from scipy import ndimage

from radiology_ai.core import DataError
from radiology_ai.metrics.intervals import mean_ci, wilson_ci
from radiology_ai.metrics.masks import MISSED, dice, dice_ci, hausdorff95, iou, mask_table, surface_dice
from radiology_ai.metrics.masks import dice as dice_of_classification


def blobs(seed, shape=(40, 56), sigma=3):
    "Two different masks of smooth random shape, neither empty."
    gen = np.random.default_rng(seed)
    out = [ndimage.gaussian_filter(gen.normal(size=shape), sigma) for _ in range(2)]
    return [o>np.quantile(o, gen.uniform(.6, .97)) for o in out]


def outline(mask):
    "Pixels with a neighbour by an edge that is outside, or beyond the image, by a plain loop."
    found = []
    for at in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                to = at.copy()
                to[axis] += step
                if to[axis]<0 or to[axis]>=mask.shape[axis] or not mask[tuple(to)]: found.append(tuple(at))
    return np.array(sorted(set(found)))


def brute(a, b, spacing):
    "Every distance of one outline to the other, in both directions."
    p,q = outline(a)*np.array(spacing),outline(b)*np.array(spacing)
    d = np.sqrt(((p[:,None]-q[None])**2).sum(-1))
    return d.min(1),d.min(0)


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('spacing', [(1., 1.), (.3, .143), (.1, 2.)])
def test_distances_equal_brute_force(seed, spacing):
    a,b = blobs(seed)
    there,back = brute(a, b, spacing)
    for q in (95, 50, 100):
        assert hausdorff95(a, b, spacing, q)==pytest.approx(max(np.percentile(there, q),
            np.percentile(back, q)), abs=1e-9)
    for tolerance in (.2, 1.):
        assert surface_dice(a, b, tolerance, spacing)==pytest.approx((np.concatenate([there, back])<=tolerance
            +1e-9).mean(), abs=1e-12)


@pytest.mark.parametrize('seed', range(4))
def test_distance_of_volumes_equals_a_distance_transform(seed):
    a,b = blobs(seed, (9, 20, 24), 2)
    spacing = (2.5, .5, .4)
    rim = [m & ~ndimage.binary_erosion(m) for m in (a, b)]
    far = [ndimage.distance_transform_edt(~m, sampling=spacing) for m in rim]
    assert hausdorff95(a, b, spacing)==pytest.approx(max(np.percentile(far[1][rim[0]], 95),
        np.percentile(far[0][rim[1]], 95)), abs=1e-9)


def test_millimetres_scale_with_the_pixel_and_axes_are_row_column():
    a,b = np.zeros((2, 30, 30), bool)
    a[5:10,5:10] = b[12:17,5:10] = True # seven rows lower
    assert hausdorff95(a, b)==7 and hausdorff95(a, b, .5)==3.5
    assert hausdorff95(a, b, (.2, 9.))==pytest.approx(1.4) and hausdorff95(a.T, b.T,
        (9., .2))==pytest.approx(1.4)


def test_a_mask_at_the_border_of_the_image_has_its_outline_there():
    full,hole = np.ones((12, 12), bool),np.ones((12, 12), bool)
    hole[5:7,5:7] = False
    there,back = brute(full, hole, (1, 1))
    assert hausdorff95(full, hole)==pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))


@pytest.mark.parametrize('truth,mask,overlap,distance',
    [(0, 0, 1., 0.), (0, 1, 0., None), (1, 0, 0., None), (1, 1, 1., 0.)])
def test_empty_masks(truth, mask, overlap, distance):
    a,b = np.full((6, 6), truth),np.full((6, 6), mask)
    assert [dice(a, b), iou(a, b), surface_dice(a, b, 1.)]==[overlap]*3
    h = hausdorff95(a, b)
    assert math.isnan(h) if distance is None else h==distance


@pytest.mark.parametrize('kind', [bool, np.uint8, np.int64, np.float32])
def test_overlap_for_all_kinds_of_numbers(kind):
    a,b = blobs(3)
    both,either = (a & b).sum(),(a | b).sum()
    a,b = a.astype(kind)*(1 if kind is bool else kind(3)),b.astype(kind)
    assert iou(a, b)==pytest.approx(both/either, abs=1e-15)
    assert dice(a, b)==pytest.approx(2*iou(a, b)/(1+iou(a, b)), abs=1e-15)
    assert dice_of_classification is dice


def test_unknown_pixels_count_nowhere():
    a,b = (o.astype(float) for o in blobs(4))
    cut = a.copy()
    cut[:,30:] = np.nan
    assert dice(cut, b)==dice(a[:,:30], b[:,:30]) and iou(cut, b)==iou(a[:,:30], b[:,:30])
    assert math.isnan(dice(a*np.nan, b)) and math.isnan(iou(a*np.nan, b))
    for f in (hausdorff95, lambda a, b: surface_dice(a, b, 1.)):
        with pytest.raises(DataError, match='unknown'): f(cut, b)


@pytest.mark.parametrize('call,words', [
    (lambda: dice(np.zeros((3, 3)), np.zeros((3, 4))), r'\(3, 3\) and \(3, 4\)'),
    (lambda: dice([0, 1], [.3, .8]), 'threshold'),
    (lambda: iou([0, -1.], [0, 1]), 'truth holds -1'),
    (lambda: dice([0, 1], [np.nan, 1.]), 'mask holds NaN'),
    (lambda: hausdorff95([[1, 0]], [[0, 1]], (1., 1., 1.)), 'spacing'),
    (lambda: hausdorff95([[1, 0]], [[0, 1]], -1.), 'spacing is -1'),
    (lambda: hausdorff95([[1, 0]], [[0, 1]], q=0), 'q is 0'),
    (lambda: surface_dice([[1, 0]], [[0, 1]], -1), 'tolerance is -1'),
    (lambda: dice_ci([[1]], [[1], [0]]), '1 true masks but 2'),
    (lambda: mask_table([], []), 'no masks'),
    (lambda: mask_table([[1]]*3, [[1]]*3, groups=[1, 2]), '3 targets but 2 groups'),
])
def test_bad_input_is_refused(call, words):
    with pytest.raises(DataError, match=words): call()


def hospital(n=40):
    """Masks of patients with two images each: a third healthy, some lesions missed, some invented, one image
    unknown."""
    gen,truths,masks = np.random.default_rng(1),[],[]
    for i in range(n):
        a,b = blobs(i, (24, 24))
        t = a.astype(float) if i%3 else np.zeros((24, 24))
        m = np.zeros((24, 24), bool) if i%5==0 else (a if gen.random()<.5 else b)
        truths.append(t); masks.append(m)
    truths[7] = np.full((24, 24), np.nan)
    return truths,masks,np.arange(n)//2


def test_table_is_its_figures():
    truths,masks,patients = hospital()
    table = mask_table(truths, masks, patients, spacing=.5, tolerance=1., draws=200, seed=3)
    known = [i for i in range(40) if i!=7]
    lesion,found = [i for i in known if truths[i].any()],[i for i in known if masks[i].any()]
    each = np.array([dice(truths[i], masks[i]) for i in range(40)])
    for name,which in (('dice', known), ('dice of lesions', lesion)):
        assert tuple(table.loc[name, ['value','low','high']])==tuple(mean_ci(each[which], patients[which],
            draws=200, seed=3))
        assert table.n[name]==len(which) and table.patients[name]==len(set(patients[which]))
    both = sorted(set(lesion) & set(found))
    assert table.value['hausdorff95']==pytest.approx(np.mean([hausdorff95(truths[i], masks[i], .5)
        for i in both]))
    assert table.n['hausdorff95']==len(both)
    assert table.value['missed lesions']==pytest.approx(1
        -len(both)/len(lesion)) and table.n['missed lesions']==len(lesion)
    healthy = sorted(set(known)-set(lesion))
    assert table.value['invented lesions']==pytest.approx(np.mean([masks[i].any() for i in healthy]))
    assert (table.low<=table.value).all() and (table.value<=table.high).all() and (table.reason=='').all()


def test_each_image_may_have_its_own_pixel_size():
    truths,masks,patients = hospital()
    sizes = [(.2, .2) if i%2 else (.4, .1) for i in range(40)]
    each = [hausdorff95(t, m, s) for t,m,s in zip(truths, masks, sizes) if np.any(t>0) and m.any()]
    assert mask_table(truths, masks, patients, spacing=sizes,
        draws=50).value['hausdorff95']==pytest.approx(np.mean(each))


def test_rows_that_are_not_defined_have_a_reason():
    healthy = [np.zeros((4, 4))]*6
    table = mask_table(healthy, healthy, draws=50)
    assert table.value['dice']==1 and math.isnan(table.value['dice of lesions'])
    assert table.reason['dice of lesions'] and table.reason['hausdorff95'] and table.n['dice of lesions']==0
    assert tuple(table.loc['invented lesions', ['value','low','high']])==pytest.approx(tuple(wilson_ci(0, 6)))
    one = mask_table(healthy, healthy, groups=['a']*6, draws=50)
    assert 'one patient' in one.reason['dice'] and one.patients['dice']==1


def test_missing_lesions_does_not_look_better():
    k = np.zeros((20, 20))
    k[5:10,5:10] = 1
    found = mask_table([k]*10, [np.roll(k, 3, 1)]*10, spacing=(.5, 2.))
    lost = mask_table([k]*10, [np.roll(k, 1, 1)]*2 + [k*0]*8, spacing=(.5, 2.))
    assert found.value[MISSED]==found.value['hausdorff95']==6
    assert lost.value['hausdorff95']==2 and lost.n['hausdorff95']==2
    assert lost.value[MISSED]==pytest.approx((2*2+8*np.hypot(10, 40))/10) and lost.n[MISSED]==10
    none = mask_table([k*0]*6, [k*0]*6)
    assert none.n[MISSED]==0 and none.reason[MISSED]
