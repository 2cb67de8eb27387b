"""Pneumothorax: the triplet of thresholds against plain loops, masks as answers of a task, two stages, and
bad masks."""
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import pace
from scipy import ndimage

from radiology_ai.core import BundleError, DataError
from radiology_ai.data.load import xray_dataloaders
from radiology_ai.data.regions import rle_decode, rle_encode
from radiology_ai.losses.pairs import MaskLabelLoss
from radiology_ai.metrics.calibration import calibration
from radiology_ai.metrics.masks import dice, hausdorff95
from radiology_ai.metrics.operating import operating_point, threshold_for, youden_threshold
from radiology_ai.metrics.triplet import (
    AREAS,
    LEVELS,
    Triplet,
    confidence,
    decide,
    drawn_films,
    drawn_mask,
    film_regions,
    fit_triplet,
    lesion_recall,
    mask_figures,
    operating_scores,
    plateau_point,
    risk_area,
    risk_coverage,
    sensitivity_threshold,
    size_strata,
    triplet_calls,
    youden_plateau,
)
from radiology_ai.models.bundle import load_bundle
from radiology_ai.models.meta import sealed
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.serve.predict import predict
from radiology_ai.tasks.base import Stage, make_settings
from radiology_ai.tasks.fit import make_plan, stage_learner, train_task
from radiology_ai.tasks.judge import evaluate_run
from radiology_ai.tasks.kinds import task_manifest
from radiology_ai.tasks.masks import Masks, film_scores, mask_answers, mask_fault, on_film, one_mask_a_film, truth_masks
from radiology_ai.tasks.outlines import film_outlines, film_picture, level_mask, packed_levels
from radiology_ai.tasks.pneumothorax import (
    PNEUMOTHORAX,
    PneumothoraxSettings,
    compare_runs,
    outliner,
    paired_figures,
    pool_thresholds,
    save_siim,
    simulated_pneumothoraces,
    specificity_at,
    train_in_phases,
)
from radiology_ai.tasks.run import load_models, mean_threshold


def field(gen, size=40, sigma=2.):
    "A smooth random probability map."
    z = ndimage.gaussian_filter(gen.normal(size=(size, size)), sigma)
    return 1/(1 + np.exp(-(4*z/z.std() - 2)))


def films(n, seed, size=40):
    "Probability maps, true masks (two in five empty) and scores that know a little of them."
    gen = np.random.default_rng(seed)
    maps = [field(gen, size) for _ in range(n)]
    truths = [np.zeros((size, size), bool) if i%5<2 else field(gen, size)>.8 for i in range(n)]
    scores = [1/(1 + np.exp(-gen.normal(1.5*t.any(), 1))) for t in truths]
    return maps, truths, np.array(scores)


EIGHT = np.ones((3, 3))


def test_regions_of_a_film_are_those_of_a_plain_loop():
    for p, truth, _ in zip(*films(8, 0)):
        film = film_regions(p, truth)
        lesions, n = ndimage.label(truth, EIGHT)
        touched = [[] for _ in range(n)]
        for k, level in enumerate(LEVELS):
            labels, m = ndimage.label(p>=level, EIGHT)
            found = [[(labels==j).sum(), (truth & (labels==j)).sum()] for j in range(1, m+1)]
            assert sorted(film['regions'][k])==sorted(found)
            for i, each in enumerate(touched):
                there = [(labels==j).sum() for j in range(1, m+1) if ((labels==j) & (lesions==i+1)).any()]
                each.append(max(there, default=0))
        assert sorted(film['lesions'])==sorted([(lesions==i+1).sum(), t] for i, t in enumerate(touched))


def test_what_is_kept_of_films_gives_the_dice_of_every_triplet():
    maps, truths, scores = films(20, 1)
    kept = [film_regions(p, t) for p, t in zip(maps, truths)]
    drawn = drawn_films(kept)
    for d, level in list(enumerate(LEVELS))[::3]:
        for a, area in list(enumerate(AREAS))[::4]:
            triplet = Triplet(.5, area, level)
            wanted = [decide(s, p, triplet) for s, p in zip(scores, maps)]
            call, value = triplet_calls(scores, drawn, triplet)
            assert call.tolist()==[c for c, _ in wanted]
            assert value==pytest.approx([dice(t, m) for t, (_, m) in zip(truths, wanted)])
            assert drawn.size[:, d, a]==pytest.approx([drawn_mask(p, triplet).mean() for p in maps])
            found = lesion_recall(kept, call, triplet)
            plain = [(m & (ndimage.label(t, EIGHT)[0]==k)).any() for t, (_, m) in zip(truths, wanted)
                for k in range(1, ndimage.label(t, EIGHT)[1]+1)]
            assert len(found)==len(plain) and found.found.sum()==sum(plain)


def test_a_call_without_a_mask_is_cancelled_and_a_mask_without_a_call():
    p = np.zeros((32, 32), np.float32)
    p[4:8, 4:8] = .9
    assert decide(.9, p, Triplet(.5, .01, .5))[0] and not decide(.9, p, Triplet(.5, .05, .5))[0]
    called, mask = decide(.4, p, Triplet(.5, 0, .5))
    assert not called and not mask.any() and not decide(.9, p*0, Triplet(.5, 0, .5))[0]
    with pytest.raises(DataError, match='area of a triplet is 1.5'): Triplet(area=1.5)


def test_the_figure_of_a_triplet_is_the_mean_dice_and_the_best_that_of_a_plain_search():
    maps, truths, scores = films(25, 2)
    drawn = drawn_films([film_regions(p, t, (.3, .6)) for p, t in zip(maps, truths)], (.3, .6), (0., .01))
    found = fit_triplet(scores, drawn, draws=40, cuts=100)
    assert found.value==pytest.approx(triplet_calls(scores, drawn, found.triplet)[1].mean())
    cuts = np.r_[-1., (np.sort(scores)[:-1] + np.sort(scores)[1:])/2]
    best = max(np.mean([dice(t, decide(s, p, Triplet(max(c, 0), a, d))[1])
        for s, p, t in zip(scores, maps, truths)]) for c in cuts for d in (.3, .6) for a in (0., .01))
    assert found.best==pytest.approx(best) and fit_triplet(scores, drawn, draws=40, cuts=100,
        width=None).value==pytest.approx(best)
    rare = fit_triplet(scores, drawn, draws=40, cuts=100, prevalence=.02, width=None)
    value, lesion = triplet_calls(scores, drawn, rare.triplet)[1], drawn.truth>0
    assert rare.value==pytest.approx(.02*value[lesion].mean() + .98*value[~lesion].mean())


def test_unknown_masks_do_not_count_and_one_kind_of_film_is_refused():
    maps, truths, scores = films(25, 3)
    kept = [film_regions(p, t) for p, t in zip(maps, truths)]
    more = kept + [film_regions(p) for p in maps[:5]]
    a = fit_triplet(scores, drawn_films(kept), np.arange(25)//2, draws=30)
    b = fit_triplet(np.r_[scores, np.ones(5)], drawn_films(more), np.r_[np.arange(25)//2, np.arange(20, 25)],
        draws=30)
    assert a.value==b.value and a.triplet==b.triplet
    assert np.isnan(triplet_calls(np.ones(30), drawn_films(more), a.triplet)[1][25:]).all()
    for which in (0, 2):
        some = [k for k in range(25) if (k%5<2)==(which==0)]
        with pytest.raises(DataError, match='with and without'):
            fit_triplet(scores[some], drawn_films([kept[k] for k in some]))
    with pytest.raises(DataError, match='not 10'): drawn_films([film_regions(maps[0], levels=(.5,))])


def test_a_broad_plateau_wins_over_a_peak_unless_all_patients_agree_on_it():
    gen = np.random.default_rng(0)
    value = np.zeros((20, 9))
    value[2:12, 2:7] = .8   # broad
    value[11, 6] = .83      # higher, beside the cliff
    value[17, 4] = .9       # a peak alone
    drawn = value + gen.normal(0, .1, (100, *value.shape))
    c, d = plateau_point(value, drawn)
    assert 4<=c<=9 and 3<=d<=5
    assert plateau_point(value, value + gen.normal(0, .01, drawn.shape))==(17, 4)


def answers(n, seed, size=40):
    "Scores and films of a network that marks a third of the films rightly and some of the others, too."
    gen = np.random.default_rng(seed)
    yy, xx = np.mgrid[:size, :size]
    kept, scores = [], []
    for i in range(n):
        lesion, (y, x), r = i%3==0, gen.uniform(8, size-8, 2), gen.uniform(2, 6)
        truth = lesion & ((yy-y)**2 + (xx-x)**2<r*r)
        strength = gen.normal(3.2, 1.2) if lesion else gen.normal(-1, 1.6)
        near = np.exp(-((yy-y-gen.normal())**2 + (xx-x-gen.normal())**2)/(2*(r*.8)**2))
        z = (strength+2)*near - 2.5 + 3*ndimage.gaussian_filter(gen.normal(size=(size, size)), 1.5)
        kept.append(film_regions(1/(1 + np.exp(-z)), truth))
        scores.append(1/(1 + np.exp(-(strength + gen.normal(0, .8)))))
    return np.array(scores), drawn_films(kept)


@pytest.mark.slow
def test_the_plateau_varies_less_than_the_maximum_and_is_better_on_new_films():
    scores, drawn = answers(600, 1000)
    out = {None: [], 1.: []}
    for seed in range(30):
        s, d = answers(60, seed)
        for width, rows in out.items():
            t = fit_triplet(s, d, draws=100, width=width).triplet
            rows.append((t.call, t.draw, triplet_calls(scores, drawn, t)[1].mean()))
    peak, broad = (np.array(out[k]) for k in (None, 1.))
    gain = broad[:, 2] - peak[:, 2]
    assert gain.mean()>gain.std()/len(gain)**.5 and broad[:, 0].std()<.6*peak[:, 0].std()


def test_the_threshold_of_a_wanted_sensitivity_is_reached_as_often_as_said():
    gen = np.random.default_rng(4)
    hits = {.5: [], .9: []}
    for _ in range(150):
        t = (np.arange(120)%3==0).astype(float)
        s = 1/(1 + np.exp(-gen.normal(2*t, 1)))
        for sure, reached in hits.items():
            at = sensitivity_threshold(t, s, .9, draws=60, sure=sure)
            reached.append(np.mean(gen.normal(2, 1, 4000)>=np.log(at/(1-at)))>=.9)
    assert np.mean(hits[.9])>np.mean(hits[.5])+.2 and np.mean(hits[.9])>.75
    with pytest.raises(DataError, match='sensitivity is 1.2'):
        sensitivity_threshold([0, 1, 1], [.1, .5, .9], 1.2)


def test_youden_of_a_plateau_is_near_the_best_and_steadier():
    gen = np.random.default_rng(5)
    broad, peak = [], []
    for seed in range(60):
        t = np.arange(200)%10==0
        s = 1/(1 + np.exp(-gen.normal(2.*t, 1)))
        broad.append(youden_plateau(t.astype(float), s, np.arange(200)//2, 60, seed))
        peak.append(youden_threshold(t.astype(float), s))
    assert abs(np.median(broad) - 1/(1+np.exp(-1)))<.04 and np.std(broad)<.85*np.std(peak)


def test_figures_by_size_and_over_all():
    truth = np.array([0, 0, .001, .004, .01, .05, .09, np.nan])
    strata = size_strata(truth, (.032, .08))
    assert {k: v.sum() for k, v in strata.items()}=={'below 3.20 %': 3, '3.20 % to 8.00 %': 1,
        'from 8.00 %': 1}
    assert sum(v.sum() for k, v in size_strata(truth).items())==10 and size_strata([0, 0])=={}
    value = np.array([1, 0, .5, .5, .6, .7, .8, np.nan])
    table = mask_figures(np.nan_to_num(value)>0, value, truth, draws=200)
    assert table.value['Dice of all']==pytest.approx(np.nanmean(value)) and table.n['Dice of all']==7
    assert table.value['Dice of lesions']==pytest.approx(.62) and table.value['called of lesions']==1
    assert table.reason['Dice of lesions from 8.00 %'] and table.value['Dice of lesions from 8.00 %']==.8


def test_risk_against_coverage():
    gen = np.random.default_rng(6)
    wrong, sure = gen.random(200)<.3, gen.random(200)
    table = risk_coverage(wrong, sure, np.arange(200)//2, (1., .5, .25), draws=100)
    order = np.argsort(-sure)
    assert table.n.tolist()==[200, 100, 50]
    assert table.risk.tolist()==pytest.approx([wrong[order[:n]].mean() for n in (200, 100, 50)])
    assert risk_area(wrong, sure)==pytest.approx(np.mean([wrong[order[:k+1]].mean() for k in range(200)]))
    tied = [risk_area(wrong[o], np.arange(200)[::-1]) for o in (gen.permutation(200) for _ in range(400))]
    assert risk_area(wrong, np.ones(200))==pytest.approx(np.mean(tied), abs=.01)
    assert risk_coverage(wrong, np.ones(200), coverages=(.5,), draws=30).n[0]==200
    assert confidence([.5, .9, .1, 1.], .5)[:3]==pytest.approx([0, np.log(9), np.log(9)])


def kept_table(n=40, seed=11, size=40):
    "A table of scores as a run keeps it, and the probabilities and truths behind it."
    maps, truths, scores = films(n, seed, size)
    maps = [np.clip(p + .5*ndimage.gaussian_filter(t.astype(float), 1), 0, 1) for p, t in zip(maps, truths)]
    mm = [None, [.5, .5], [.5, .4]]
    told = [json.dumps(film_regions(p, t) | film_picture(p, t, mm[k%3]))
        for k, (p, t) in enumerate(zip(maps, truths))]
    target = np.array([t.any() for t in truths], float)
    return pd.DataFrame({'image_id': [f'i{k:02}' for k in range(n)], 'patient_id': np.arange(n)//2,
        'split': 'test',
        'target': target, 'score': scores, 'film': told, 'drain': np.arange(n)%3//2}), maps, truths


def test_what_is_kept_of_a_film_draws_any_triplet():
    maps, truths, _ = films(6, 12)
    for p, truth in zip(maps, truths):
        film = json.loads(json.dumps(film_picture(p, truth)))
        for level in LEVELS:
            for area in AREAS[::4]:
                drawn, true = film_outlines(film, Triplet(.5, area, level))
                assert np.array_equal(drawn, drawn_mask(p, Triplet(.5, area, level))) and np.array_equal(true,
                    truth)
    assert film_outlines(film_regions(p, truth), Triplet()) is None
    for text, shape in ((packed_levels(p), (40, 41)), (packed_levels(p)[:-4], (40, 40)),
            ('nothing', (40, 40)), (None, (4, 4))):
        with pytest.raises(DataError, match='is not one of'): level_mask(text, shape, Triplet())


def test_distances_groups_points_and_pictures_are_those_of_the_films():
    table, maps, truths = kept_table()
    answer = Masks('air', wanted=.8).settled(table, ['air'])
    t = answer.triplet
    told = answer.thresholds(table, t.call)
    call = (told.score>=told.threshold).to_numpy()
    for k, (p, truth) in enumerate(zip(maps, truths)):
        if not (call[k] and truth.any()):
            assert np.isnan(told.hd95[k]) and np.isnan(told.hd95_mm[k])
            continue
        mask = drawn_mask(p, t)
        assert told.hd95[k]==pytest.approx(hausdorff95(truth, mask)/np.hypot(40, 40))
        mm = [None, .5, (.5, .4)][k%3]
        assert np.isnan(told.hd95_mm[k]) if mm is None else told.hd95_mm[k]==pytest.approx(hausdorff95(truth,
            mask, mm))
    here, answer = answer, replace(answer, prevalence=.01)
    figures = answer.figures(told, ['drain'])
    assert figures['far']['mm']['value']==pytest.approx(told.hd95_mm.mean()) and figures['far']['mm'][
        'n']<figures['far'][
        'share of the diagonal']['n']==int((call & (told.marked>0)).sum())
    own = {r['group']: r for r in figures['groups']}
    with_drain = (told.drain==1) & (told.marked>0)
    assert own['drain 1']['lesions']==with_drain.sum() and own['drain 1']['Dice']['value']==pytest.approx(
        told.dice[with_drain].mean()) and own['drain 0']['called']['value']==pytest.approx(
        call[(told.drain==0) & (told.marked>0)].mean())
    assert set(figures['points'])=={'triplet', 'youden', 'sensitivity'}
    wanted = operating_point(told.target, call.astype(float), .5, told.patient_id.to_numpy())
    assert here.point(told, call)['PPV']['value']==pytest.approx(wanted.value['PPV'])
    assert figures['points']['triplet']['PPV']['value']<.5*wanted.value['PPV']
    assert figures['prevalence']['PPV']==figures['points']['triplet']['PPV']
    shown = answer.examples(told)
    assert set(shown.kind)<={'true positive', 'false negative', 'false positive',
        'true negative'} and shown.image_id.is_unique
    assert ((shown.kind=='true positive')==((shown.score>=shown.threshold) & (shown.target>0))).all()
    class Grey(list):
        def position(self, image_id): return int(image_id[1:])
    pictures = answer.pictures(shown, Grey(np.full((40, 40, 40), 90, np.uint8)))
    assert [o.kind for o in pictures]==list(shown.kind) and all(o.heat is None and o.image.ndim==3
        for o in pictures)
    coloured = [bool((np.ptp(o.image.astype(int), axis=2)>0).any()) for o in pictures]
    assert coloured==[k in ('true positive', 'false positive') for k in shown.kind]
    parts = [p for section in answer.sections(figures) for p in section.parts if not isinstance(p, str)]
    assert {'Operating points', 'Films with a lesion by group'}<={p.caption for p in parts}
    assert any('Hausdorff' in line and 'mm' in line for line in answer.lines(figures))


def test_points_beside_the_triplet_are_reached_and_call_no_film_without_a_mask():
    table, _, truths = kept_table(60, 13)
    drawn, score = drawn_films([json.loads(o) for o in table.film]), table.score.to_numpy()
    triplet = fit_triplet(score, drawn, table.patient_id.to_numpy(), draws=60).triplet
    there = drawn.at(triplet)[0]>0
    found = operating_scores(table.target, score, drawn, triplet, table.patient_id.to_numpy(),
        sensitivity=.75)
    call = triplet_calls(score, drawn, replace(triplet, call=found['sensitivity']))[0]
    assert call[table.target>0].mean()>=.7 and not call[~there].any()
    held = np.where(there, score, 0.)
    assert found['youden']==youden_plateau(table.target, held, table.patient_id.to_numpy())
    assert found['sensitivity']==sensitivity_threshold(table.target, held, .75, table.patient_id.to_numpy())
    one = operating_scores(np.r_[1., np.zeros(59)], score, drawn, triplet, table.patient_id.to_numpy())
    assert 'sensitivity' not in one # all positive images are of one patient
    for name in ('triplet', 'youden', 'sensitivity'):
        answer = Masks('air', operating=name).settled(table, ['air'])
        point = answer.points.get(name, answer.triplet.call)
        assert answer.tune(table, ['air'])==point
        again = Masks('air').of_bundle(json.loads(json.dumps(answer.spec(None, ['air'], None))))
        assert (again.points, again.operating, again.wanted)==(answer.points, name, answer.wanted)


def test_a_joint_score_that_is_too_sure_is_mended_once_and_everywhere():
    table = kept_table(120, 16)[0]
    raw = 1/(1 + np.exp(-4*np.log(table.score/(1-table.score)) - 3))
    table = table.assign(score=raw, raw=raw)
    answer = Masks('air', whole=True, calibration='platt').settled(table, ['air'])
    told = answer.thresholds(table, answer.tune(table, ['air']))
    ece = [calibration(table.target, s).ece for s in (raw, told.score)]
    assert answer.rule[0]<.6 and ece[1]<.7*ece[0] and told.raw.equals(raw)
    assert answer.thresholds(told, answer.triplet.call).score.equals(told.score)
    again = Masks('air', whole=True).of_bundle(json.loads(json.dumps(answer.spec(None, ['air'], None))))
    assert again.rule==answer.rule and again.ruled(raw)==pytest.approx(told.score)
    plain = Masks('air', whole=True, calibration='none')
    assert plain.settled(table, ['air']).rule==() and plain.ruled(raw).tolist()==raw.tolist()
    assert Masks('air', calibration='platt').settled(table, ['air']).rule==() # the network has no label


def test_two_networks_are_compared_on_the_same_films():
    table, maps, truths = kept_table(60, 14)
    answer = Masks('air').settled(table, ['air'])
    gen = np.random.default_rng(0)
    a = answer.thresholds(table, answer.triplet.call)
    b = answer.thresholds(table.assign(score=np.clip(table.score + gen.normal(0, .3, 60), 0, 1)),
        answer.triplet.call)
    found = paired_figures(a, b.sample(frac=1, random_state=1), sensitivity=.8, draws=200).set_index('figure')
    call, lesion = [(o.score>=o.threshold).to_numpy() for o in (a, b)], (table.target>0).to_numpy()
    assert found.a['sensitivity']==call[0][lesion].mean() and found.b['specificity']==(
        ~call[1][~lesion]).mean()
    assert found.difference['Dice of lesions']==pytest.approx((a.dice-b.dice)[lesion].mean())
    assert found.difference['Dice of all']==pytest.approx((a.dice-b.dice).mean())
    held = [np.where(o['area']>0, o.score, 0.) for o in (a, b)]
    at = [threshold_for(table.target, s, sensitivity=.8) for s in held]
    name = 'specificity at a sensitivity of 80%'
    assert found.a[name]==np.mean(held[0][~lesion]<at[0]) and found.b[name]==np.mean(held[1][~lesion]<at[1])
    assert ((found.low<=found.difference)
        & (found.difference<=found.high)).all() and (found.p_holm>=found.p).all()
    same = paired_figures(a, a, draws=50)
    assert (same.difference==0).all() and (same.p==1).all()
    with pytest.raises(DataError, match='1 of 60 films'): paired_figures(a, b[1:])


def test_specificity_at_a_sensitivity_in_draws_is_that_of_repeated_films():
    gen = np.random.default_rng(15)
    t = (np.arange(50)%3==0).astype(float)
    s, metric = np.round(gen.normal(t, 1), 1), specificity_at(.7)
    w = gen.integers(0, 3, (50, 8))
    drawn = metric.weighted(t, s)(w)
    plain = [metric(np.repeat(t, k), np.repeat(s, k)) for k in w.T]
    assert drawn==pytest.approx(plain)
    assert metric(t, s)==np.mean(s[t==0]<threshold_for(t, s, sensitivity=.7))


def test_fast_enough_for_a_department():
    p = field(np.random.default_rng(7), 512, 6.).astype(np.float32)
    triplet, times = Triplet(.5, .001, .3), []
    for _ in range(15):
        start = time.process_time()
        decide(.9, p, triplet)
        times.append(time.process_time()-start)
    assert min(times)<.005*pace()
    start = time.process_time()
    mask_figures(np.ones(3000, bool), np.random.default_rng(0).random(3000), np.zeros(3000),
        np.arange(3000)//2)
    assert time.process_time()-start<2*pace()


def test_run_lengths_of_random_masks_come_back():
    gen = np.random.default_rng(8)
    for k in range(2000):
        h, w = gen.integers(1, 24, 2)
        mask = gen.random((h, w))<gen.choice([0, .1, .5, .9, 1])
        assert np.array_equal(rle_decode(rle_encode(mask), (h, w)), mask), k
    with pytest.raises(DataError, match='another size'): rle_decode('5 20', (4, 4))


def seconds_of(f, n=3):
    times = []
    for _ in range(n):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter()-start)
    return min(times)


def test_run_lengths_are_faster_than_a_loop():
    mask = np.hypot(*np.mgrid[-256:256, -256:256])<130
    runs = rle_encode(mask)
    def loop():
        out, at = np.zeros(mask.size, np.uint8), 0
        numbers = list(map(int, runs.split()))
        for k, length in enumerate(numbers):
            for i in range(at, at+length): out[i] = k%2
            at += length
        return out.reshape(512, 512).T
    assert np.array_equal(loop()>0, mask)
    assert seconds_of(lambda: rle_decode(runs, mask.shape))<seconds_of(loop)/50


smp = pytest.importorskip('segmentation_models_pytorch')
TINY = dict(arch='resnet10t', pretrained=False, width=.125, epochs=1, bs=8)
COLUMNS = ['image_id', 'Pneumothorax', 'rle', 'height', 'width', 'drain']
ONE = replace(PNEUMOTHORAX, stages=(replace(PNEUMOTHORAX.stages[0], name=''),))


@pytest.fixture(scope='module')
def chests(made_once) -> Path:
    "A small department with `truth.csv` and its store at 64 pixels."
    def make(root):
        truth = simulated_pneumothoraces(root/'dicom', 40, 5, 1, size=160)
        truth[COLUMNS].to_csv(root/'labels.csv', index=False)
        preprocess_folder(root/'dicom', root/'store', replace(PNEUMOTHORAX.recipe, size=64), workers=1)
    return made_once('pneumothoraces', make)


@pytest.fixture(scope='module')
def labels(chests) -> pd.DataFrame: return pd.read_csv(chests/'labels.csv', dtype={'rle': str})


@pytest.fixture(scope='module')
def both(made_once, chests) -> Path:
    "A run of two stages."
    return made_once('pneumothorax_run', lambda out: train_task(PNEUMOTHORAX, chests/'store',
        chests/'labels.csv',
        out, **TINY))


def test_the_simulated_department_has_masks_that_fit_their_labels(chests, labels):
    store = ImageStore(chests/'store')
    assert len(store)==len(labels) and .2<labels.Pneumothorax.mean()<.7
    share = [rle_decode(r, (h, w)).mean() for r, h, w in zip(labels.rle, labels.height, labels.width)]
    assert ((np.array(share)>0)==(labels.Pneumothorax==1)).all()


@pytest.mark.slow
def test_one_stage_trains_saves_loads_evaluates_and_predicts(chests, tmp_path):
    run = train_task(ONE, chests/'store', chests/'labels.csv', tmp_path/'run', **TINY)
    evaluation = evaluate_run(ONE, run)
    bundle = load_models(run.path, ONE)[0]
    assert bundle.meta['network']['kind']=='segmenter' and not bundle.meta['network']['n_labels']
    t = bundle.answer['triplet']
    assert t['call']==bundle.threshold and set(t)>={'area', 'draw', 'value', 'ranges'}
    assert {'masks', 'lesions', 'abstain'}<=set(evaluation.figures) and any('Dice' in o
        for o in evaluation.lines())
    first = run.predictions
    assert len(json.loads(first.film[0])['regions'])==len(LEVELS)
    again = train_task(ONE, chests/'store', chests/'labels.csv', tmp_path/'run', **TINY)
    assert again.predictions.equals(first)


@pytest.mark.slow
def test_the_second_stage_starts_from_the_weights_of_the_first(chests, both):
    store = ImageStore(chests/'store')
    settings = make_settings(PneumothoraxSettings, TINY)
    first, second = (load_bundle(both/'model'/name).model for name in ('outline', 'call'))
    assert second.config['n_labels']==1 and second.head.labels is not None
    plan = make_plan(PNEUMOTHORAX, settings, store, chests/'labels.csv')
    learn = stage_learner(PNEUMOTHORAX, PNEUMOTHORAX.stages[1], store, plan.manifest, settings,
        earlier={'outline': first})
    made = learn.model.cpu().state_dict()
    assert all(torch.equal(v, made[k]) for k, v in first.state_dict().items())
    assert [k for k in made if k not in first.state_dict()] and all(k.startswith('head.labels')
        for k in made if k not in first.state_dict())
    own = stage_learner(PNEUMOTHORAX, PNEUMOTHORAX.stages[0], store, plan.manifest, settings, earlier={})
    sampler = own.dls.train.sampler
    rows = own.dls.train_ds.items
    assert all(rows.Pneumothorax.iloc[b].eq(1).all() for b in sampler)
    assert learn.settings['ema']==0 and stage_learner(PNEUMOTHORAX, PNEUMOTHORAX.stages[0], store,
        plan.manifest,
        replace(settings, ema=.9), earlier={}).settings['ema']==.9
    falling = learn.dls.train.sampler
    assert (falling.start, falling.end)==(.8, .3)


@pytest.mark.slow
def test_what_is_predicted_is_what_was_evaluated_with_the_mask_on_the_film(chests, both, tmp_path):
    evaluation = evaluate_run(PNEUMOTHORAX, both)
    assert paired_figures(evaluation.table, evaluation.table).equals(compare_runs(both, both))
    table = evaluation.table.set_index('image_id')
    bundle = tmp_path/'run'
    shutil.copytree(both, bundle)
    # thresholds at which this network, which has learnt nothing, calls and draws
    meta = json.loads((bundle/'model'/'call'/'bundle.json').read_text())
    meta['threshold'] = float(table.score.median())
    meta['answer']['triplet'] |= {'call': meta['threshold'], 'area': 0., 'draw': .1}
    (bundle/'model'/'call'/'bundle.json').write_text(json.dumps(sealed(meta)))
    model = load_bundle(bundle/'model'/'call').model
    told = predict(bundle, list(table.path), out=tmp_path/'p.csv', to=('csv', 'json', 'siim'), workers=1,
        task=PNEUMOTHORAX).set_index('image_id').loc[table.index]
    assert np.abs(told.score.astype(float) - table.score).max()<1e-6
    store = ImageStore(chests/'store')
    readings = {r['image_id']: r for r in json.loads((tmp_path/'p.json').read_text())['readings']}
    for image, row in told.iterrows():
        i = store.position(image)
        x = torch.from_numpy(store[i].astype(np.float32)/255)[None, None]
        p = mask_answers([model], x, mirror=True)[0][0]
        mask = rle_decode(row.rle, (row.height, row.width))
        film = store.index.iloc[i]
        assert mask.shape==(film.Rows, film.Columns)
        assert row.call==int(row.score>=meta['threshold']
            and (p>=.1).any()) and bool(mask.any())==bool(row.call)
        found = readings[image]['findings'][0]
        assert found['call']==bool(row.call) and ('mask' in found)==bool(row.call)
    siim = pd.read_csv(tmp_path/'p_siim.csv', dtype=str)
    assert save_siim(told.reset_index(), tmp_path/'again.csv').equals(siim)
    assert list(siim)==['ImageId', 'EncodedPixels'] and len(siim)==len(told)


def test_a_mask_of_the_network_lies_where_it_was_drawn(chests):
    """From the film to the stored pixels and back: the middle of the mask moves by less than half a pixel of
    the store."""
    store, gen = ImageStore(chests/'store'), np.random.default_rng(3)
    rows = store.index.head(12)
    h, w = rows.Rows.to_numpy(), rows.Columns.to_numpy()
    discs = [np.hypot(*(np.mgrid[:a, :b] - gen.uniform(.35, .65, 2)[:, None, None]*[[[a]], [[b]]]))<.15*b
        for a, b in zip(h, w)]
    masks = truth_masks(store, rows.assign(rle=[rle_encode(d) for d in discs], height=h, width=w), 'x')
    for disc, row in zip(discs, rows.itertuples()):
        small = masks[store.position(row.image_id)][0]>0
        back = rle_decode(on_film(small, row)['rle'], disc.shape)
        scale = row.affine[0]
        off = np.abs(np.argwhere(back).mean(0) - np.argwhere(disc).mean(0)).max()*scale
        assert off<.5 and dice(disc, back)>.9 and abs(back.sum()*scale**2/small.sum()-1)<.05


def test_the_loss_of_masks_and_labels_leaves_out_what_is_unknown():
    loss, gen = MaskLabelLoss(), torch.Generator().manual_seed(0)
    z = torch.randn(3, 1, 8, 8, generator=gen, requires_grad=True), torch.randn(3, 1, generator=gen,
        requires_grad=True)
    masks = (torch.rand(3, 1, 8, 8, generator=gen)<.3).to(torch.int8)
    masks[2] = -1
    loss(z, masks, torch.tensor([[1.], [0.], [1.]])).backward()
    assert z[0].grad[2].eq(0).all() and z[0].grad[:2].ne(0).any() and z[1].grad.ne(0).all()
    assert torch.isfinite(loss(z, masks*0-1, torch.ones(3, 1)))
    with pytest.raises(Exception, match='n_labels=1'): loss(z[0], masks, torch.ones(3, 1))


def test_the_score_of_a_film_joins_its_label_and_its_likeliest_pixels():
    gen = torch.Generator().manual_seed(1)
    p, z = torch.rand(3, 50, 80, generator=gen), torch.randn(3, generator=gen)
    top = np.sort(p.numpy().reshape(3, -1))[:, -2:].mean(1)
    assert film_scores(p).numpy()==pytest.approx(top)
    assert film_scores(p, z).numpy()==pytest.approx(1/(1 + np.exp(-(np.log(top/(1-top)) + z.numpy())/2)),
        abs=1e-6)
    assert torch.isfinite(film_scores(torch.tensor([[[0.]], [[1.]]]), torch.zeros(2))).all()


def test_several_rows_a_film_become_one_and_files_are_read(tmp_path):
    import cv2
    a, b = np.zeros((2, 20, 30), bool)
    a[2:5, 3:9] = b[10:12, 20:25] = True
    t = pd.DataFrame({'image_id': ['x', 'x', 'y'], 'Pneumothorax': [1, 1, 0], 'height': 20, 'width': 30,
        'rle': [rle_encode(a), rle_encode(b), '-1']})
    out = one_mask_a_film(t, 'Pneumothorax')
    assert len(out)==2 and np.array_equal(rle_decode(out.rle[0], (20, 30)), a | b)
    with pytest.raises(DataError, match='sizes'):
        one_mask_a_film(t.assign(width=[30, 31, 30]), 'Pneumothorax')
    with pytest.raises(DataError, match='several values'):
        one_mask_a_film(t.assign(Pneumothorax=[1, 0, 0]), 'Pneumothorax')
    cv2.imwrite(str(tmp_path/'m.png'), (a*255).astype(np.uint8))
    files = pd.DataFrame({'image_id': ['x', 'y'], 'Pneumothorax': [1, 0],
        'mask': [str(tmp_path/'m.png'), None]})
    read = Masks().prepared(files, PneumothoraxSettings())
    assert read.rle[0]==rle_encode(a) and read.rle[1]=='' and read.height[0]==20
    with pytest.raises(DataError, match='cannot be read'):
        Masks().prepared(files.assign(mask=str(tmp_path/'none.png')), PneumothoraxSettings())
    with pytest.raises(DataError, match='no masks'): Masks().prepared(t[['image_id', 'Pneumothorax']],
        PneumothoraxSettings())


def planned(chests, table, **more):
    settings = make_settings(PneumothoraxSettings, TINY | more)
    return task_manifest(PNEUMOTHORAX, ImageStore(chests/'store'), table, settings)[0]


def damaged(labels, row, **cells):
    out = labels.copy()
    for k, v in cells.items(): out.loc[row, k] = v
    return out


def test_masks_that_cannot_be_right_are_named_or_unknown(chests, labels):
    yes, no = (int(np.argmax(labels.Pneumothorax==v)) for v in (1, 0))
    h, w = (int(labels.loc[yes, c]) for c in ('height', 'width'))
    box = np.zeros((h, w), bool)
    box[20:60, 30:50] = True
    wrong = {'says none, yet there is a mask': dict(row=no, rle=labels.rle[yes], height=h, width=w),
        'yet the mask is empty': dict(row=yes, rle='-1'), 'covers 100%': dict(row=yes, rle=f'0 {h*w}'),
        'is a rectangle': dict(row=yes, rle=rle_encode(box)), f'has {h*w}': dict(row=yes, rle=f'5 {h*w}'),
        'not whole numbers': dict(row=yes, rle='3 x'), 'are not pairs': dict(row=yes, rle='3 5 7'),
        'hold a negative number': dict(row=yes, rle='30 10 -5 10')} # the second run lies over the first
    for why, how in wrong.items():
        table = damaged(labels, **how)
        with pytest.raises(DataError, match=why) as e: planned(chests, table)
        assert str(labels.image_id[how['row']]) in str(e.value) and 'contradictions=unknown' in str(e.value)
    with pytest.warns(UserWarning, match='1 masks cannot be right and are unknown'):
        manifest = planned(chests, table, contradictions='unknown')
    assert manifest.set_index('image_id').rle[labels.image_id[yes]]==''
    assert mask_fault('', (0, 0), 1)=='' and 'size' in mask_fault('1 2', (np.nan, 4), 1)


def test_a_mask_of_another_size_is_scaled_and_of_another_shape_refused(chests, labels):
    store, yes = ImageStore(chests/'store'), int(np.argmax(labels.Pneumothorax==1))
    row = labels.loc[[yes]]
    h, w = int(row.height.iloc[0]), int(row.width.iloc[0])
    large = np.kron(rle_decode(row.rle.iloc[0], (h, w)), np.ones((2, 2)))>0
    twice = row.assign(rle=rle_encode(large), height=2*h, width=2*w)
    i = store.position(row.image_id.iloc[0])
    a, b = (truth_masks(store, t, 'Pneumothorax')[i][0] for t in (row, twice))
    assert (a!=b).mean()<.01 and a.any()
    with pytest.raises(DataError, match='another shape'):
        truth_masks(store, row.assign(width=w*2, height=h//2), 'Pneumothorax')
    assert truth_masks(store, row.assign(rle=''), 'Pneumothorax') is None


def test_a_part_without_positives_is_refused_before_training(chests, labels, tmp_path):
    split = labels.assign(split=np.where(np.arange(len(labels))%4==0, 'test', 'train'))
    split.loc[(split.Pneumothorax==0) & (np.arange(len(labels))%4==1), 'split'] = 'valid'
    store = ImageStore(chests/'store')
    patients = store.index.set_index('image_id').patient_id
    split['patient_id'] = [f'P{k}' for k in range(len(split))]
    assert len(patients)==len(split)
    with pytest.raises(DataError, match="'valid' has 0 films with a mask"):
        train_task(PNEUMOTHORAX, store, split, tmp_path/'run', **TINY, copies=1.1)
    assert not (tmp_path/'run').exists()


def test_films_of_unknown_mask_teach_their_label_alone(chests, labels):
    some = labels.copy()
    some.loc[(some.Pneumothorax==1) & (np.arange(len(some))%2==0), 'rle'] = np.nan
    manifest = planned(chests, some)
    manifest['split'] = np.where(np.arange(len(manifest))%3==0, 'valid', 'train')
    unknown = int(((manifest.rle=='') & (manifest.split=='train')).sum())
    store, settings = ImageStore(chests/'store'), make_settings(PneumothoraxSettings, TINY)
    outline, call = (xray_dataloaders(store, rows, bs=8, check_leakage=False,
        **stage.answer.targets(store, rows, settings)).train_ds
        for stage in PNEUMOTHORAX.stages for rows in [stage.rows(manifest, {})])
    assert unknown and len(call)-len(outline)==unknown and call.targets.shape==(len(call), 1)
    assert int((call.batch(range(len(call)))[1]==-1).flatten(1).all(1).sum())==unknown
    assert not (outline.batch(range(len(outline)))[1]==-1).any()


def test_a_bundle_without_thresholds_is_refused(both):
    for spec in ({'triplet': {'call': 2, 'area': 0, 'draw': .3}}, {'triplet': {'call': .5}},
            {'levels': [.5]}):
        with pytest.raises(BundleError, match='no thresholds of masks'): Masks().of_bundle(spec)
    with pytest.raises(BundleError, match='no thresholds'): Masks().thresholds(pd.DataFrame({'film': []}), .5)
    for bad in (dict(label='a,b'), dict(contradictions='?'), dict(augment=11), dict(width=0), dict(flip=2),
            dict(ema=1),
            dict(operating='?'), dict(sensitivity=0), dict(sensitivity=2)):
        with pytest.raises(DataError): PneumothoraxSettings(**bad)
    assert isinstance(Stage(Masks(), model=outliner).answer, Masks)


@pytest.mark.slow
def test_folds_get_one_triplet_from_their_pooled_scores(chests, both, tmp_path):
    with pytest.raises(DataError, match='has no folds'): pool_thresholds(both)
    run = train_task(ONE, chests/'store', chests/'labels.csv', tmp_path/'run', **TINY | {'folds': 3})
    tested = run.predictions[run.predictions.split=='test']
    assert tested.image_id.is_unique and len(tested)==len(run.manifest)
    before = evaluate_run(ONE, run).table.dice
    found = pool_thresholds(run)
    wanted = fit_triplet(tested.score, drawn_films([json.loads(t) for t in tested.film]),
        tested.patient_id.to_numpy())
    assert found.triplet==wanted.triplet
    bundles = load_models(run.path, ONE)
    assert len(bundles)==3 and mean_threshold(bundles)==pytest.approx(found.triplet.call)
    assert all(b.answer['triplet']['draw']==found.triplet.draw and b.answer['triplet']['pooled']
        for b in bundles)
    points = operating_scores(tested.target, tested.score, drawn_films([json.loads(t) for t in tested.film]),
        found.triplet, tested.patient_id.to_numpy())
    assert all(b.answer['points']==points for b in bundles) and set(points)=={'youden', 'sensitivity'}
    assert evaluate_run(ONE, run).table.dice.equals(before)


def test_thresholds_that_call_nothing_are_told():
    p, corner = np.full((40, 40), .2), np.zeros((40, 40), bool)
    p[10:30, 10:30], corner[:2, :2] = .9, True
    kept = [json.dumps(film_regions(p, corner & (k%5==0))) for k in range(20)]
    valid = pd.DataFrame({'score': np.linspace(.1, .9, 20), 'film': kept, 'patient_id': range(20),
        'target': (np.arange(20)%5==0).astype(float)})
    with pytest.warns(UserWarning, match='call no validation film'): Masks().settled(valid, ['x'])


@pytest.mark.slow
def test_the_plan_of_three_phases_goes_on_where_it_was_stopped(chests, labels, tmp_path):
    patients = ImageStore(chests/'store').index.set_index('image_id').patient_id
    group = labels.image_id.map(patients).map({p: k%5 for k, p in enumerate(sorted(set(patients)))})
    public, own, test = (labels[group.isin(k)] for k in ((0, 1), (2, 3), (4,)))
    args = dict(public=(chests/'store', public), own=(chests/'store', own), out=tmp_path/'plan',
        test=(chests/'store', test), folds=3, task=ONE, **TINY)
    seen = []
    def stop(at):
        def say(text):
            seen.append(text)
            if text==at: raise KeyboardInterrupt
        return say
    for at in ('fold 2 of 3', 'phase 3 of 3: the test set'):
        with pytest.raises(KeyboardInterrupt): train_in_phases(**args, say=stop(at))
    assert sum('is finished' in o for o in seen)==1 # the public run, not the own one, which was stopped
    done = train_in_phases(**args)
    assert done.own.settings['start']==str(done.public.path) and done.own.settings['lr']==pytest.approx(
        TINY.get('lr', 1e-3)/3)
    assert set(done.test.table.image_id)==set(test.image_id) and done.test.table.at_triplet.isin([0, 1]).all()
    assert done.fit.triplet==done.test.task.answer.triplet
