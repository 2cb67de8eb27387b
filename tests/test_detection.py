"""Metrics of detection against second implementations written out box by box: the RSNA score in exact fractions, COCO's average
precision by its published rules, the free-response curve by re-matching at every score, and intervals by repeating images.
pycocotools, where it is installed, is compared too; without it COCO's values come from the plain form below."""
import importlib.metadata
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from radiology_ai.core import DataError, rng
from radiology_ai.metrics import boxes as matching
from radiology_ai.metrics.boxes import by_image, match_boxes
from radiology_ai.metrics.detection import (
    COCO_IOUS,
    RATES,
    RSNA_IOUS,
    coco_map,
    coco_map_ci,
    detection_table,
    froc,
    rsna_map,
    rsna_map_ci,
    rsna_scores,
    threshold_sweep,
)
from radiology_ai.metrics.intervals import bounded_ci
from radiology_ai.metrics.readings import detection_gain, two_readings

A, B, C = [10, 10, 30, 30], [50, 50, 80, 80], [100, 10, 130, 40]
NONE = np.zeros((0, 4))


def score(boxes, truths, scores=None) -> float:
    "The RSNA score of one image."
    return float(rsna_scores([boxes], [np.linspace(1, .5, len(boxes)) if scores is None else scores],
        [truths])[0])


def films(seed, n, classes=1, most=4, false=1., *, size=800, tied=True):
    "Boxes, scores, truths, classes and true classes of `n` random images."
    gen, out = rng(seed, 'films'), ([], [], [], [], [])
    for _ in range(n):
        corner = gen.uniform(0, size, (gen.integers(0, most+1), 2))
        truth = np.hstack([corner, corner+gen.uniform(60, 200, corner.shape)])
        found = truth[gen.random(len(truth))<.8]
        place = gen.uniform(0, size, (gen.poisson(false), 2))
        boxes = np.vstack([found+gen.normal(0, 7, found.shape),
            np.hstack([place, place+gen.uniform(60, 200, place.shape)])])
        s = gen.random(len(boxes))
        for o, x in zip(out, (boxes, s.round(1) if tied else s, truth, gen.integers(0, classes, len(boxes)),
                gen.integers(0, classes, len(truth)))):
            o.append(x)
    return out


# ---- the RSNA score ------------------------------------------------------------------------------------------

def brute_rsna(boxes, scores, truths):
    """The score of an image of whole-number boxes as an exact fraction, None where it does not count, and
    whether ties decided anything."""
    def area(b): return (b[2]-b[0])*(b[3]-b[1])
    def overlap(a, b):
        shared = max(0, min(a[2], b[2])-max(a[0], b[0]))*max(0, min(a[3], b[3])-max(a[1], b[1]))
        return Fraction(shared, area(a)+area(b)-shared)
    if not boxes and not truths: return None
    ious = [[overlap(b, t) for t in truths] for b in boxes]
    total = Fraction(0)
    for twentieths in range(8, 16):
        free, tp = list(range(len(truths))), 0
        for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
            best = None
            for j in free:
                if ious[i][j]*20>twentieths and (best is None or ious[i][j]>ious[i][best]): best = j
            if best is not None:
                free.remove(best)
                tp += 1
        total += Fraction(tp, len(boxes)+len(truths)-tp)
    return total/8


def random_case(gen):
    "An image with whole-number boxes on a small field, so that equal overlaps and equal scores are common."
    def some(n):
        corner = gen.integers(0, 4, (n, 2))
        return np.hstack([corner, corner+gen.integers(1, 6, (n, 2))])
    n = gen.integers(0, 6)
    return some(n), gen.integers(0, 4, n)/4, some(gen.integers(0, 4))


def test_rsna_score_equals_brute_force_on_10000_random_cases():
    gen = rng(0, 'cases')
    cases = [random_case(gen) for _ in range(10_000)]
    expected = [brute_rsna(b.tolist(), s.tolist(), t.tolist()) for b, s, t in cases]
    got = rsna_scores(*zip(*cases))
    np.testing.assert_allclose(got, [np.nan if e is None else float(e) for e in expected], rtol=0, atol=1e-14)
    counting = [e for e in expected if e is not None]
    assert abs(rsna_map(*zip(*cases))-float(sum(counting)/len(counting)))<1e-12
    # the cases hold what is asked of them: images that don't count, boxes without lesions, equal scores, overlaps of exactly a threshold
    at_threshold = sum(np.isin(matching.pair_iou(np.repeat(b, len(t), 0).astype(float),
        np.tile(t, (len(b), 1)).astype(float)), RSNA_IOUS).any() for b, _, t in cases if len(b) and len(t))
    assert None in expected and expected.count(0)>1000 and at_threshold>500
    assert sum(len(set(s.tolist()))<len(s) for _, s, _ in cases)>3000


def test_one_image_alone_scores_as_among_others():
    cases = [random_case(rng(i, 'alone')) for i in range(200)]
    np.testing.assert_array_equal(rsna_scores(*zip(*cases)),
        [rsna_scores([b], [s], [t])[0] for b, s, t in cases])


def test_overlap_of_exactly_the_threshold_is_no_hit():
    assert score([[10, 10, 30, 22]], [A])==4/8 # IoU 0.6 passes 0.40, 0.45, 0.50, 0.55
    assert score([[10, 10, 30, 18]], [A])==0   # IoU 0.4 passes none
    assert match_boxes([[[10, 10, 30, 20]]], [[1]], [[A]], .5,
        strict=False).hit.all() and not match_boxes([[[10, 10, 30, 20]]], [[1]], [[A]], .5).hit.any()


def test_thresholds_are_the_decimal_numbers():
    assert RSNA_IOUS==(.4, .45, .5, .55, .6, .65, .7, .75) # 0.4 + 0.05 * 4 is more than 0.6 in floating point


def test_image_without_lesion_and_box_does_not_count():
    assert np.isnan(score([], []))
    assert rsna_map([[A], [], []], [[1], [], []], [[A], [], [B]])==.5


def test_box_on_an_image_without_lesion_scores_zero():
    assert score([A], [])==0 and rsna_map([[A], [A]], [[1], [.01]], [[A], []])==.5


def test_lesion_without_box_scores_zero(): assert score([], [A])==0


def test_second_box_on_a_lesion_is_false(): assert score([A, A], [A])==1/2


def test_higher_score_chooses_first_though_worse_placed():
    worse = [12, 10, 32, 30] # IoU 0.818
    assert match_boxes([[A, worse]], [[.5, .9]], [[A]], .7).hit[:,0].tolist()==[False, True]
    # the box of the first choice takes the lesion that the second would need
    left, right = [0, 0, 10, 10], [2, 0, 12, 10]
    assert score([[1, 0, 11, 10], left], [left, right],
        [.9, .5])==pytest.approx(brute_rsna([[1, 0, 11, 10], left], [.9, .5], [left, right]))


def test_equal_scores_keep_the_given_order():
    first, second = [0, 0, 10, 10], [3, 0, 13, 10]
    assert match_boxes([[first, second]], [[.5, .5]], [[first]], .4).hit[:,0].tolist()==[True, False]
    assert match_boxes([[second, first]], [[.5, .5]], [[first]], .4).hit[:,0].tolist()==[True, False]


def test_equally_good_truths_first_is_taken():
    # the first box overlaps both truths alike; the second only the left one, so the order of the truths decides
    middle, left, right, far_left = [2, 0, 12, 10], [0, 0, 10, 10], [4, 0, 14, 10], [-1, 0, 9, 10]
    assert match_boxes([[middle, far_left]], [[.9, .5]], [[left, right]], .6).hit[:,0].tolist()==[True, False]
    assert match_boxes([[middle, far_left]], [[.9, .5]], [[right, left]], .6).hit[:,0].tolist()==[True, True]


def test_coco_takes_the_last_of_equally_good_truths():
    middle, left, right, far_left = [2, 0, 12, 10], [0, 0, 10, 10], [4, 0, 14, 10], [-1, 0, 9, 10]
    assert match_boxes([[middle, far_left]], [[.9, .5]], [[left, right]], .6, strict=False).hit[:,
        0].tolist()==[True, True]
    assert match_boxes([[middle, far_left]], [[.9, .5]], [[right, left]], .6, strict=False).hit[:,
        0].tolist()==[True, False]


def test_order_of_boxes_and_images_does_not_matter():
    b, s, t, *_ = films(3, 40, tied=False)
    mix = [rng(i, 'mix').permutation(len(x)) for i, x in enumerate(b)]
    images = rng(0, 'images').permutation(40)
    assert rsna_map([b[i][mix[i]] for i in images], [s[i][mix[i]] for i in images],
        [t[i] for i in images])==pytest.approx(rsna_map(b, s, t), abs=1e-15)


# ---- input ---------------------------------------------------------------------------------------------------

BAD = {'box of five numbers': ([[[1, 10, 10, 30, 30]]], [[.5]], [[A]], 'shape'),
    'a single box without its list': ([A], [[.5]], [[A]], 'shape'),
    'no numbers': ([[list('abcd')]], [[.5]], [[A]], 'not numbers'),
    'x2 below x1': ([[[30, 10, 10, 30]]], [[.5]], [[A]], 'x1 < x2'),
    'no height': ([[[10, 10, 30, 10]]], [[.5]], [[A]], 'x1 < x2'),
    'true box of size zero': ([[A]], [[.5]], [[[10, 10, 10, 10]]], 'truths'),
    'NaN in a box': ([[[10, 10, np.nan, 30]]], [[.5]], [[A]], 'x1 < x2'),
    'infinite box': ([[[10, 10, np.inf, 30]]], [[.5]], [[A]], 'inf'),
    'NaN score': ([[A]], [[np.nan]], [[A]], 'not finite'),
    'scores missing': ([[A, B]], [[.5]], [[A]], '2 boxes but 1 scores'),
    'score column': ([[A]], [[[.5]]], [[A]], 'shape'),
    'lists of unequal length': ([[A], [B]], [[.5]], [[A]], 'one entry an image'),
    'no images': ([], [], [], 'no images'), 'one image as None': ([[A], None], [[.5], []], [[A], []],
    'shape'), 'object array': (np.array([[['a']*4]], object), [[.5]], [[A]], 'not numbers')}


@pytest.mark.parametrize('case', BAD, ids=list(BAD))
@pytest.mark.parametrize('f', [rsna_map, rsna_map_ci, coco_map, threshold_sweep, froc,
    lambda *a: detection_table(*a, .5)], ids=['rsna_map', 'rsna_map_ci', 'coco_map', 'threshold_sweep',
    'froc', 'detection_table'])
def test_bad_input_is_refused(f, case):
    *given, said = BAD[case]
    with pytest.raises(DataError, match=said): f(*given)


def test_the_message_names_the_image():
    with pytest.raises(DataError, match='image 2'):
        rsna_map([[A], [], [[5, 5, 4, 9]]], [[.5], [], [.5]], [[A], [A], [A]])


@pytest.mark.parametrize('f', [rsna_map, rsna_map_ci])
def test_no_image_that_counts_is_refused(f):
    with pytest.raises(DataError, match='None of 2 images'): f([[], []], [[], []], [[], []])


@pytest.mark.parametrize('f', [froc, coco_map, coco_map_ci])
def test_no_lesion_is_refused(f):
    with pytest.raises(DataError, match='true box'): f([[A], []], [[.5], []], [[], []])


@pytest.mark.parametrize('given', [dict(ious=(.4, 1.)), dict(ious=(0,)), dict(ious=())])
def test_thresholds_of_overlap_outside_0_to_1_are_refused(given):
    with pytest.raises(DataError, match='IoU'): rsna_map([[A]], [[.5]], [[A]], **given)


def test_empty_entries_in_any_form_are_alike():
    given = [[A], [], NONE, np.zeros((0, 4), int), ()]
    assert [len(x) for x in given]==[1, 0, 0, 0, 0]
    assert rsna_map(given, [[.5], [], np.zeros(0), (), []], [[A], [A], [A], [A], [A]])==1/5


def test_tensors_are_taken():
    torch = pytest.importorskip('torch')
    assert rsna_map([torch.tensor([A, B])], [torch.tensor([.9, .5])], [torch.tensor([A])])==rsna_map([[A, B]],
        [[.9, .5]], [[A]])


def test_tables_become_lists():
    pd = pytest.importorskip('pandas')
    table = pd.DataFrame([('b', *A, .9), ('a', *B, .3), ('b', *C, .1)],
        columns=['image_id', 'x1', 'y1', 'x2', 'y2', 'score'])
    boxes, scores = by_image(['c', 'b', 'a'], table), by_image(['c', 'b', 'a'], table, 'score')
    assert [b.tolist() for b in boxes]==[[], [A, C], [B]] and [s.tolist() for s in scores]==[[], [.9, .1],
        [.3]]
    assert by_image(['c'], table[:0])[0].shape==(0, 4)
    with pytest.raises(DataError, match="'b' is listed twice"): by_image(['b', 'a', 'b'], table)
    with pytest.raises(DataError, match="such as 'a'"): by_image(['b'], table)
    with pytest.raises(DataError, match="no column 'y1'"): by_image(['a', 'b'], table.drop(columns='y1'))


# ---- sweeps and tables ---------------------------------------------------------------------------------------

def above(b, s, threshold): return [x[v>=threshold] for x, v in zip(b, s)], [v[v>=threshold] for v in s]


def test_each_row_of_the_sweep_is_a_new_evaluation_of_the_boxes_left():
    b, s, t, *_ = films(5, 60)
    sweep = threshold_sweep(b, s, t, np.linspace(-.05, 1.05, 23), draws=20)
    for threshold, row in sweep.iterrows():
        b2, s2 = above(b, s, threshold)
        assert row.score==pytest.approx(rsna_map(b2, s2, t), abs=1e-12)
        hit, marks = match_boxes(b2, s2, t, .5).hit.sum(), sum(map(len, b2))
        assert (row.tp, row.fp, row.fn)==(hit, marks-hit, sum(map(len, t))-hit)
        assert row.n==sum(len(x)+len(y)>0 for x, y in zip(b2, t)) and row.with_boxes==sum(len(x)>0
            for x in b2)==60-row.without_boxes
    assert sweep.with_boxes.iloc[-1]==0 and sweep.score.iloc[-1]==0


def test_sweep_computes_the_overlaps_once(monkeypatch):
    calls, real = [], matching.pair_iou
    monkeypatch.setattr(matching, 'pair_iou', lambda *a: calls.append(1) or real(*a))
    b, s, t, *_ = films(6, 30)
    threshold_sweep(b, s, t, np.linspace(0, 1, 200), draws=20)
    assert len(calls)==1


def test_sweep_interval_is_that_of_the_score_alone():
    b, s, t, *_ = films(7, 80)
    patients = [f'p{i//3}' for i in range(80)]
    row = threshold_sweep(b, s, t, [.4], patients, draws=300, seed=4).iloc[0]
    ci = rsna_map_ci(*above(b, s, .4), t, patients, draws=300, seed=4)
    assert (row.score, row.low, row.high)==pytest.approx(tuple(ci), abs=1e-6) and ci.low<ci.value<ci.high


def test_sweep_names_the_reason_where_nothing_counts():
    sweep = threshold_sweep([[A], []], [[.4], []], [[], []], [.3, .5], draws=20)
    assert sweep.score.iloc[0]==0 and np.isnan(sweep.score.iloc[1]) and 'no image' in sweep.reason.iloc[1]
    one = threshold_sweep([[A], [B]], [[.4], [.9]], [[A], [A]], [.3], groups=['p', 'p'], draws=20).iloc[0]
    assert one.score==.5 and np.isnan(one.low) and 'one patient' in one.reason


def test_sweep_without_thresholds_covers_the_scores():
    b, s, t, *_ = films(8, 30)
    sweep = threshold_sweep(b, s, t, draws=20)
    assert sweep.index[0]==min(v.min() for v in s if len(v)) and sweep.index[-1]==max(v.max() for v in s
        if len(v))


def test_table_at_a_threshold_by_hand():
    b, s, t = [[A, C], [A], [], [B], [C]], [[.9, .8], [.7], [], [.9], [.2]], [[A, B], [B], [A], [], []]
    table = detection_table(b, s, t, .5, draws=50)
    assert table.value.to_dict()==pytest.approx({'sensitivity by lesion': 1/4,
        'sensitivity by image, any box': 2/3, 'sensitivity by image, a lesion hit': 1/3,
        'specificity by image': 1/2,
        'boxes that hit': 1/4, 'false boxes an image': 3/5})
    assert table.n.tolist()==[4, 3, 3, 2, 4,
        5] and (table.low<=table.value).all() and (table.value<=table.high).all()
    empty = detection_table([[], []], [[], []], [[A], [B]], .5, draws=50)
    assert np.isnan(empty.value['specificity by image']) and 'every image' in empty.reason[
        'specificity by image'] and 'no box' in empty.reason['boxes that hit']


# ---- the free-response curve ---------------------------------------------------------------------------------

def brute_froc(b, s, t, rates, iou=.5):
    """Sensitivity at each rate: the best of all thresholds with at most so many false boxes an image, matched
    anew at each."""
    points = [(0, 0.)]
    for threshold in np.unique(np.concatenate(s)):
        b2, s2 = above(b, s, threshold)
        hit = match_boxes(b2, s2, t, iou).hit.sum()
        points.append((sum(map(len, b2))-hit, hit/sum(map(len, t))))
    return [max(y for x, y in points if x<=rate*len(t)) for rate in rates]


@pytest.mark.parametrize('seed', range(4))
def test_froc_equals_matching_anew_at_every_score(seed):
    b, s, t, *_ = films(seed, 50, false=[.3, 1, 3, 12][seed])
    f = froc(b, s, t, draws=20)
    assert f.table.index.tolist()==list(RATES) and f.table.sensitivity.tolist()==pytest.approx(brute_froc(b,
        s, t, RATES), abs=1e-12)
    assert f.cpm.value==pytest.approx(np.mean(brute_froc(b, s, t, RATES)), abs=1e-12) and (f.images,
        f.lesions)==(50, sum(map(len, t)))
    assert f.curve.sensitivity.is_monotonic_increasing and f.cpm.low<=f.cpm.value<=f.cpm.high
    for rate, row in f.table.iterrows(): # the threshold gives what the row says
        at = detection_table(b, s, t, min(row.threshold, 2), draws=20)
        assert at.value['sensitivity by lesion']==pytest.approx(row.sensitivity) and at.value[
            'false boxes an image']<=rate+1e-12


def test_froc_takes_equal_scores_as_one_step():
    f = froc([[A, B, C]], [[.5, .5, .5]], [[A]], false_positives=(1, 2), groups=None, draws=20)
    # one patient: no band
    assert f.table.sensitivity.tolist()==[0, 1] and f.table.threshold.tolist()==[np.inf, .5]
    assert 'one patient' in f.table.reason.iloc[0] and np.isnan(f.cpm.low)


def test_froc_without_any_box_is_zero():
    f = froc([[], []], [[], []], [[A], [B]], draws=20)
    assert f.cpm.value==0 and (f.curve.threshold==np.inf).all()


# ---- COCO ----------------------------------------------------------------------------------------------------

def plain_coco(boxes, scores, truths, classes=None, truth_classes=None) -> np.ndarray:
    """AP (10,) at each IoU, mean over classes with true boxes, by COCO's published rules: 100 boxes an image
    and class, an overlap at the threshold hits, the last of equal truths, 101 recalls."""
    classes = classes or [[0]*len(b) for b in boxes]
    truth_classes = truth_classes or [[0]*len(t) for t in truths]
    def overlap(a, b):
        w, h = min(a[2], b[2])-max(a[0], b[0]), min(a[3], b[3])-max(a[1], b[1])
        shared = max(0, w)*max(0, h)
        return shared/((a[2]-a[0])*(a[3]-a[1])+(b[2]-b[0])*(b[3]-b[1])-shared)
    out = []
    for iou in COCO_IOUS:
        aps = []
        for k in sorted({int(c) for cs in truth_classes for c in cs}):
            marks, total = [], 0
            for b, s, t, c, tc in zip(boxes, scores, truths, classes, truth_classes):
                true = [x for x, y in zip(t, tc) if y==k]
                free, total = list(range(len(true))), total+len(true)
                for i in sorted((i for i in range(len(b)) if c[i]==k), key=lambda i: -s[i])[:100]:
                    best, value = None, min(iou, 1-1e-10)
                    for j in free:
                        if overlap(b[i], true[j])>=value: best, value = j, overlap(b[i], true[j])
                    if best is not None: free.remove(best)
                    marks.append((s[i], best is not None))
            hits, points = 0, []
            for n, (_, hit) in enumerate(sorted(marks, key=lambda m: -m[0]), 1):
                hits += hit
                points.append((hits/total, hits/n))
            aps.append(np.mean([max((p for r, p in points if r>=recall), default=0)
                for recall in np.linspace(0, 1, 101)]))
        out.append(np.mean(aps))
    return np.array(out)


@pytest.mark.parametrize('seed,classes', [(0, 1), (1, 1), (2, 3), (3, 5)])
def test_coco_map_equals_its_published_rules(seed, classes):
    flat = films(seed, 25, classes)
    given = flat[:3] if classes==1 else flat
    got, expected = coco_map(*given), plain_coco(*given)
    np.testing.assert_allclose(got.by_iou, expected, rtol=0, atol=1e-9)
    assert (got.AP, got.AP50, got.AP75)==pytest.approx((expected.mean(), expected[0], expected[5]), abs=1e-9)
    assert got.by_class.mean()==pytest.approx(got.AP, abs=1e-9)


def test_coco_map_equals_pycocotools():
    pytest.importorskip('pycocotools', reason='pycocotools is not installed')
    sys.path.insert(0, str(__import__('pathlib').Path(__file__).parent.parent/'benchmarks'))
    from detection import pycoco
    for seed in range(3):
        b, s, t, *_ = films(seed, 300)
        np.testing.assert_allclose(coco_map(b, s, t).by_iou, pycoco(b, s, t), rtol=0, atol=1e-9)


def test_coco_takes_the_best_100_boxes_of_an_image():
    gen = rng(0, 'many')
    corner = gen.uniform(0, 900, (150, 2))
    b = [np.vstack([[A], np.hstack([corner, corner+40])])]
    s = [np.r_[.001, gen.uniform(.1, 1, 150)]]
    t = [[A]]
    assert coco_map(b, s, t).AP==plain_coco(b, s, t).mean()
    assert coco_map([b[0][:100]], [s[0][:100]], t).AP>0==coco_map([b[0]], [s[0]], t).AP


def test_interval_of_coco_takes_the_best_100_boxes_of_an_image():
    place = np.repeat(rng(0, 'places').uniform(200, 900, (100, 1)), 4, 1)+[0, 0, 40, 40]
    for false, ap in ((100, 0), (99, 1/100)): # the box that hits is the last, and only counts as one of 100
        b, s = [np.vstack([place[:false], [A]])]*2, [np.r_[np.full(false, .9), .1]]*2
        assert coco_map(b, s, [[A]]*2).AP==pytest.approx(ap)
        ends = coco_map_ci(b, s, [[A]]*2, draws=20)[['low', 'high']].to_numpy()
        assert ends==pytest.approx(np.tile(bounded_ci(ap, 0., 2)[1:], (3, 1))) # all draws are alike


def test_coco_intervals_match_by_coco_rules_on_ties():
    """Whole-number boxes on a small field, so that equal overlaps, equal scores and overlaps of exactly a
    threshold are common: an image beside an empty one
    has the same AP in each draw."""
    checked = 0
    for seed in range(300):
        b, s, t = random_case(rng(seed, 'coco ties'))
        if not len(t): continue
        # the order of equal scores of different images is not COCO's in a draw
        s = s + rng(seed, 'order').permutation(len(s))*1e-6
        table = coco_map_ci([b, NONE], [s, []], [t, NONE], draws=20)
        # draws without the image are undefined, draws with it all alike
        alone = [bounded_ci(v, 0., 1)[1:] for v in coco_map([b], [s], [t])[:3]]
        assert table[['low', 'high']].to_numpy()==pytest.approx(np.array(alone), abs=1e-7)
        checked += int((table.value>0).sum())
    assert checked>100


def test_coco_class_without_true_box_is_left_out():
    got = coco_map([[A, B]], [[.9, .8]], [[A]], [[0, 1]], [[0]])
    assert got.AP==pytest.approx(1) and got.by_class[0]==pytest.approx(1) and np.isnan(got.by_class[1])


def test_coco_without_any_box_is_zero():
    assert coco_map([[], []], [[], []], [[A], [B]]).AP==0


@pytest.mark.parametrize('classes,said', [(([[0]], None), 'Only one'), (([[0, 1]], [[0]]), 'Image 0'),
    (([[.5]], [[0]]), 'whole'), (([[0], [0]], [[0]]), '2 entries')])
def test_coco_classes_that_do_not_fit_are_refused(classes, said):
    with pytest.raises(DataError, match=said): coco_map([[A]], [[.9]], [[A]], *classes)


def test_faster_coco_eval_brings_nothing_else():
    """Only NumPy is required (a second OpenCV beside opencv-python-headless would break it), and no plotting
    library is loaded."""
    needs = [r for r in importlib.metadata.requires('faster-coco-eval') if 'extra ==' not in r]
    assert needs==['numpy']
    code = """import sys, radiology_ai.metrics.detection as d
assert 'faster_coco_eval' not in sys.modules
d.coco_map([[[0,0,1,1]]], [[1]], [[[0,0,1,1]]])
print([m for m in ('plotly', 'torch', 'matplotlib') if m in sys.modules])"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
        check=True).stdout.strip()=='[]'


# ---- intervals -----------------------------------------------------------------------------------------------

def repeated(lists, weights): return [[x for x, k in zip(o, weights) for _ in range(int(k))] for o in lists]


def test_weighted_figures_are_those_of_repeated_images(monkeypatch):
    """The figures of a draw from weights equal the figures of a data set in which each image stands as often
    as it was drawn."""
    from radiology_ai.metrics import detection
    seen = []
    real = detection.bootstrap
    def watched(evaluate, *a, **k):
        return real(lambda w: seen.append((w, evaluate(w))) or seen[-1][1], *a, **k)
    monkeypatch.setattr(detection, 'bootstrap', watched)
    flat = films(9, 30, 2, tied=False)
    b, s, t = flat[:3]
    c, tc = flat[3:]
    patients = [i//2 for i in range(30)]
    for name, run, again in (('rsna', lambda: rsna_map_ci(b, s, t, patients, draws=20),
            lambda *x: [rsna_map(*x[:3])]),
                             ('froc', lambda: froc(b, s, t, patients, draws=20),
                             lambda *x: [*froc(*x[:3], draws=20).curve.sensitivity,
                             froc(*x[:3], draws=20).cpm.value]),
                             ('coco', lambda: coco_map_ci(b, s, t, groups=patients, draws=20),
                             lambda *x: coco_map(*x[:3])[:3]),
                             ('coco, 2 classes', lambda: coco_map_ci(b, s, t, c, tc, groups=patients,
                             draws=20),
                             lambda *x: coco_map(*x)[:3])):
        seen.clear()
        run()
        w, values = seen[0]
        for r in range(3):
            np.testing.assert_allclose(np.atleast_2d(values)[:,r], again(*repeated(flat, w[:,r])),
                rtol=0, atol=1e-6, err_msg=name)


def test_patients_are_the_unit_of_the_intervals():
    "Five copies of every film, all of one patient, tell no more than one film."
    b, s, t, *_ = films(10, 60)
    five, patients = repeated((b, s, t), [5]*60), np.repeat(np.arange(60), 5)
    width = lambda ci: ci.high-ci.low
    once, copies, naive = rsna_map_ci(b, s, t), rsna_map_ci(*five, patients), rsna_map_ci(*five)
    assert tuple(copies)==pytest.approx(tuple(once), abs=1e-6) and width(naive)<.6*width(once)
    once, copies, naive = (froc(*o, draws=200).cpm for o in ((b, s, t), (*five, patients), five))
    assert tuple(copies)==pytest.approx(tuple(once), abs=1e-6) and width(naive)<.6*width(once)
    once, copies, naive = (coco_map_ci(*o, groups=g, draws=100).loc['AP']
        for o, g in (((b, s, t), None), (five, patients), (five, None)))
    assert copies.high-copies.low==pytest.approx(once.high-once.low,
        rel=.1) and naive.high-naive.low<.6*(once.high-once.low)
    once, copies, naive = (detection_table(*o, .5, g).loc['sensitivity by lesion']
        for o, g in (((b, s, t), np.arange(60)), (five, patients), (five, None)))
    assert copies.high-copies.low==pytest.approx(once.high-once.low,
        rel=.05) and naive.high-naive.low<.6*(once.high-once.low)


def test_the_same_seed_gives_the_same_interval():
    b, s, t, *_ = films(11, 40)
    assert rsna_map_ci(b, s, t, seed=1)==rsna_map_ci(b, s, t, seed=1)!=rsna_map_ci(b, s, t, seed=2)


@pytest.mark.parametrize('f', [rsna_map_ci, froc, coco_map_ci,
    lambda *a, **k: threshold_sweep(*a, [.5], **k)],
    ids=['rsna_map_ci', 'froc', 'coco_map_ci', 'threshold_sweep'])
def test_bad_groups_draws_and_levels_are_refused(f):
    b, s, t, *_ = films(12, 6)
    for given in (dict(groups=[1, 2]), dict(groups=[1, 2, 3, None, 5, 6]), dict(draws=3), dict(level=95)):
        with pytest.raises(DataError): f(b, s, t, **given)


# ---- the challenge's boxes -----------------------------------------------------------------------------------

def test_boxes_of_the_challenge(real_data):
    from radiology_ai.data.chest import rsna_pneumonia
    data = rsna_pneumonia(real_data/'labels/rsna/stage_2_train_labels.csv.gz', errors='list')
    true = by_image(data.manifest.image_id, data.boxes)
    assert sum(map(len, true))==len(data.boxes) and len(true)==len(data.manifest)
    ill = sum(len(t)>0 for t in true)
    ones = [np.ones(len(t)) for t in true]
    assert rsna_map(true, ones, true)==1 and coco_map(true, ones, true).AP==pytest.approx(1)
    none = [NONE]*len(true)
    table = threshold_sweep(none, [[]]*len(true), true, [.5], data.manifest.patient_id, draws=20).iloc[0]
    assert (table.score, table.n, table.fn)==(0, ill, len(data.boxes))
    counts = Counter(map(len, true))
    # one false box more on every film
    everywhere = rsna_map([np.vstack([t, [[1, 1, 9, 9]]]) for t in true],
        [np.r_[np.ones(len(t)), .5] for t in true], true)
    assert everywhere==pytest.approx(sum(n*k/(k+1) for k, n in counts.items())/len(true), abs=1e-12)


# ---- two sets of boxes ---------------------------------------------------------------------------------------

def test_each_reading_is_judged_as_a_model_of_the_other():
    _, _, t, *_ = films(13, 40)
    other = [np.asarray(b).reshape(-1, 4)+1 for b in t]
    other[0] = np.zeros((0, 4)) if len(t[0]) else np.array([[1., 1, 9, 9]])
    area = lambda r: [(b[:, 2]-b[:, 0])*(b[:, 3]-b[:, 1]) for b in map(lambda v: np.reshape(v, (-1, 4)), r)]
    told = two_readings(t, other, draws=50)
    assert told.loc['films that agree', 'value']==39/40
    for name, a, b in (('first', t, other), ('second', other, t)):
        assert told.loc[f'RSNA score, {name} as the model', 'value']==pytest.approx(rsna_map(a, area(a), b))
        assert told.loc[f'AP50, {name} as the model', 'value']==pytest.approx(coco_map(a, area(a), b).AP50)
    nobody = [None if k==5 else b for k, b in enumerate(other)]
    without = [[b for k, b in enumerate(r) if k!=5] for r in (t, other)]
    assert two_readings(t, nobody, draws=50).equals(two_readings(*without, draws=50))
    with pytest.raises(DataError, match='readings of 40 and of 39'): two_readings(t, other[1:])


def test_what_an_ensemble_gains_is_its_figure_less_the_mean_of_its_members():
    b, s, t, *_ = films(14, 50)
    less = [[v[1:] for v in r] for r in (b, s)]
    told = detection_gain((b, s), [less, (b, s)], t, np.arange(50)//2, draws=60)
    for name, f in (('RSNA score', rsna_map), ('AP50', lambda *a: coco_map(*a).AP50)):
        whole, part = f(b, s, t), f(*less, t)
        assert told.loc[name, 'value']==pytest.approx(whole)
        assert told.loc[name, 'gain']==pytest.approx((whole-part)/2, abs=1e-6)
        assert told.loc[name, 'low']<=told.loc[name, 'gain']<=told.loc[name, 'high']
    none = detection_gain((b, s), [(b, s)]*2, t, draws=60)
    assert np.allclose(none[['gain', 'low', 'high']], 0)
    counting = detection_gain((b, s), [(b, s)], t, draws=60, counting=[less, (b, s)])
    assert counting.gain['AP50']==0 and counting.value['RSNA score']==pytest.approx(rsna_map(*less, t))
    assert 'one patient' in detection_gain((b, s), [less], t, [1]*50).reason.iloc[0]
    with pytest.raises(DataError, match='no members'): detection_gain((b, s), [], t)
