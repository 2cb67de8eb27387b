"""Calibration, decision curves and recalibration: against plain forms and scikit-learn, planted
miscalibrations recovered within their errors, and what a JSON file does to a calibrator."""
import json
import math

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as skm
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import expit, log_softmax, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from radiology_ai.core import DataError
from radiology_ai.metrics.calibration import brier_parts, calibration, calibration_ci, decision_curve, reliability_curve
from radiology_ai.metrics.intervals import student_quantile, wilson_ci
from radiology_ai.metrics.recalibration import (
    IsotonicCalibration,
    PlattClasses,
    PlattScaling,
    TemperatureScaling,
    VennAbers,
    recalibration_from,
)

KINDS = (TemperatureScaling, PlattScaling, IsotonicCalibration, VennAbers)


def simulated(n=600, seed=0, slope=1., shift=0., images=2):
    """Targets, scores whose log odds are `slope` times the right ones plus `shift`, and patients with several
    alike images."""
    gen = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n), images)
    z = gen.normal(-1, 1.5, n)[patient] + gen.normal(0, .3, n*images)
    t = (gen.random(n)[patient]<expit(z)).astype(float)
    return t,expit(slope*z + shift),patient


# --- in bins ---

@pytest.mark.parametrize('dtype', [np.float64, np.float32])
@pytest.mark.parametrize('bins', [5, 7, 10, 15, 20])
def test_a_score_on_an_edge_lies_in_the_bin_that_begins_there(bins, dtype):
    s = (np.arange(bins)/bins).astype(dtype)
    c = calibration(np.arange(bins)%2, s, bins=bins)
    assert c.table.n.tolist()==[1]*bins and np.allclose(c.table['from'], s, atol=1e-7)
    below = np.nextafter(np.arange(1, bins+1, dtype=np.float32)/np.float32(bins), np.float32(0),
        dtype=np.float32)
    below = below[below.astype(float)<np.arange(1, bins+1)/bins-2**-25] # further off than rounding puts it
    assert (calibration(np.arange(len(below))%2, below, bins=bins).table.to>=below).all()
    assert calibration([1, 0], [1., 1.], bins=bins).table['from'].tolist()==[(bins-1)/bins]


@pytest.mark.parametrize('by', ['width', 'count'])
def test_bins_against_a_plain_loop(by):
    t,s,_ = simulated()
    s[:3] = 0,1,.3 # the ends, and an edge
    edges = np.arange(11)/10 if by=='width' else np.quantile(s, np.linspace(0, 1, 11))
    gap,n = 0,[]
    for k in range(10):
        m = (s>=edges[k]) & ((s<edges[k+1]) if k<9 else (s<=edges[k+1]))
        gap += abs(s[m].sum()-t[m].sum())
        n.append(m.sum())
    c = calibration(t, s, by=by)
    assert c.ece==pytest.approx(gap/len(t), abs=1e-12) and c.table.n.tolist()==[k for k in n if k]
    assert c.brier==pytest.approx(skm.brier_score_loss(t, s), abs=1e-14)
    assert tuple(c.table.iloc[0][['rate','rate_low',
        'rate_high']])==pytest.approx(tuple(wilson_ci(t[s<edges[1]].sum(), n[0])))


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('bins,by', [(10, 'width'), (7, 'count'), (1, 'width'), (200, 'width'),
    (None, 'width')])
def test_brier_parts_add_up(seed, bins, by):
    t,s,_ = simulated(150, seed, 1.7, .4)
    s = s.round(2) if seed%2 else s
    parts = brier_parts(t, s, bins, by)
    assert parts.brier==pytest.approx(((s-t)**2).mean(), abs=1e-14)
    assert min(parts[:4])>=0
    if bins is None: assert parts[3:]==pytest.approx((0, 0), abs=1e-14)


def test_brier_parts_are_murphys():
    t,s = np.array([0, 0, 1, 1, 1, 0, 1.]),np.array([.1, .1, .1, .8, .8, .8, .8])
    mean = t.mean()
    parts = brier_parts(t, s)
    assert parts.reliability==pytest.approx((3*(.1-1/3)**2 + 4*(.8-.75)**2)/7, abs=1e-15)
    assert parts.resolution==pytest.approx((3*(1/3-mean)**2 + 4*(.75-mean)**2)/7, abs=1e-15)
    assert parts.uncertainty==pytest.approx(mean*(1-mean), abs=1e-15)


# --- intervals ---

@pytest.mark.parametrize('slope,shift', [(1., 0.), (2., .5), (.5, -1.)])
def test_slope_and_intercept_are_those_of_a_logistic_regression(slope, shift):
    t,s,g = simulated(800, 1, slope, shift)
    x = logit(s)[:,None]
    peer = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(x, t)
    table = calibration_ci(t, s, g, draws=50)
    assert table.value['slope']==pytest.approx(peer.coef_.item(), abs=1e-5)
    assert table.value['intercept']==pytest.approx(peer.intercept_.item(), abs=1e-5)
    assert table.value['in the large']==pytest.approx(brentq(lambda b: (expit(x[:,0]+b)-t).sum(), -9, 9,
        xtol=1e-12), abs=1e-8)


def test_standard_errors_are_the_sandwich_over_patients():
    t,s,g = simulated(300, 2, 1.5)
    x = np.stack([logit(s), np.ones(len(t))], 1)
    table = calibration_ci(t, s, g, draws=50)
    p = expit(x@table.value[['slope','intercept']].to_numpy(float))
    bread,meat = np.zeros((2, 2)),np.zeros((2, 2))
    for i in range(len(t)): bread += np.outer(x[i], x[i])*p[i]*(1-p[i])
    for k in range(300):
        u = sum(x[i]*(t[i]-p[i]) for i in np.flatnonzero(g==k))
        meat += np.outer(u, u)
    cov = np.linalg.inv(bread)@meat@np.linalg.inv(bread)*300/299
    half,few = (table.high-table.low)[['slope','intercept']]/2,min(len(set(g[t==v])) for v in (0, 1))
    assert half.to_numpy(float)==pytest.approx(student_quantile(.95, few+4)*np.sqrt(np.diag(cov)), rel=1e-4)


@pytest.mark.slow
def test_coverage_over_simulated_test_sets():
    "The intervals hold the truth about as often as they say; a plain bootstrap of the ECE does not."
    inside,plain = [],[]
    big = simulated(400_000, 99, 1.5, .3)
    true = {'slope': 1/1.5, 'intercept': -.3/1.5, 'ece': calibration(*big[:2]).ece,
        'brier': calibration(*big[:2]).brier}
    for seed in range(100):
        t,s,g = simulated(300, seed, 1.5, .3)
        table = calibration_ci(t, s, g, draws=200)
        inside.append([table.low[k]<=v<=table.high[k] for k,v in true.items()])
        t,s,g = simulated(300, seed) # calibrated: the true ECE is 0
        low = calibration_ci(t, s, g, draws=200).low['ece']
        gen = np.random.default_rng(seed)
        drawn = [calibration(t[i], s[i]).ece for i in ((gen.integers(300, size=300)[:,None]*2
            + [0, 1]).ravel() for _ in range(20))]
        plain.append((low==0, min(drawn)<=0))
    share = np.mean(inside, 0)
    assert (share>=.87).all(), dict(zip(true, share)) # 95 % less four standard errors
    assert np.mean(plain, 0)[0]>=.9 and np.mean(plain, 0)[1]==0


def test_copies_of_an_image_make_nothing_surer():
    t,s,g = simulated(200, 3, 1.5)
    for f in (calibration_ci, decision_curve, reliability_curve):
        once,thrice = (f(*(np.repeat(o, k) for o in (t, s, g)), draws=100) for k in (1, 3))
        columns = (['value','low','high'] if f is calibration_ci
            else list(once.columns.drop('n', errors='ignore')))
        a,b = once[columns].to_numpy(float),thrice[columns].to_numpy(float)
        # quartiles of copies lie elsewhere
        assert a==pytest.approx(b, abs=2e-3 if f is reliability_curve else 1e-9, nan_ok=True)
    assert calibration_ci(t, s, np.arange(400), draws=200).high['slope']<calibration_ci(t, s, g,
        draws=200).high['slope']


@pytest.mark.parametrize('targets,scores,row,words', [
    (np.zeros(50), np.linspace(.1, .9, 50), 'slope', 'All 50 targets are 0'),
    (np.arange(50)%2, np.full(50, .3), 'slope', 'All scores are 0.3'),
    (np.arange(50)%2, np.full(50, .3), 'intercept', 'All scores are 0.3'),
    (np.arange(50)>24, np.linspace(.1, .9, 50), 'slope', 'separate'),
])
def test_a_figure_that_is_not_defined_has_its_reason(targets, scores, row, words):
    table = calibration_ci(targets, scores, draws=50)
    assert math.isnan(table.value[row]) and words in table.reason[row]
    assert (table.loc[['ece','brier'], 'reason']=='').all() and table.n[row]==50
    assert table.value['ece']==pytest.approx(calibration(targets, scores).ece)


def test_one_patient_has_figures_without_intervals_named():
    t,s,_ = simulated(40)
    table = calibration_ci(t, s, ['a']*80, draws=50)
    assert table.value.isna().all() and table.reason.str.contains('one patient').all()


# --- the curve ---

def slow_curve(t, s, at, width):
    "Local linear regression at one point by weighted least squares."
    w = np.maximum(1 - ((np.arcsin(np.sqrt(s))-np.arcsin(np.sqrt(at)))/width)**2, 0)
    x = np.stack([np.ones(len(s)), s-at], 1)
    return np.linalg.lstsq(x*np.sqrt(w)[:,None], t*np.sqrt(w), rcond=None)[0][0]


def test_curve_against_weighted_least_squares():
    t,s,g = simulated(1000, 4, 2.)
    u = np.arcsin(np.sqrt(s))
    width = 2.34*min(u.std(), np.subtract(*np.quantile(u, [.75, .25]))/1.34)*1000**-.2
    curve = reliability_curve(t, s, g, grid=11, draws=50)
    hundred = math.ceil(len(u)*min(1/3, 100/len(set(g)))) # images of about a hundred patients
    far = [np.sort(np.abs(u-np.arcsin(np.sqrt(at))))[hundred-1] for at in curve.score]
    slow = np.array([np.clip(slow_curve(t, s, at, min(max(width, f), 4*width)), 0, 1)
        for at,f in zip(curve.score, far)])
    assert max(far)>width # somewhere images are few
    assert curve.rate.to_numpy()==pytest.approx(slow, abs=2e-3)


def test_band_holds_the_true_curve():
    for slope,shift in ((1., 0.), (2., .5)):
        held = []
        for seed in range(12):
            t,s,g = simulated(1000, seed, slope, shift)
            c = reliability_curve(t, s, g, draws=100)[1:-1]
            right = expit((logit(c.score)-shift)/slope) # but for the noise between images of one patient
            held.append(((c.low-.01<=right) & (right<=c.high+.01))[c.n>0].mean())
        assert np.mean(held)>.85


def test_curve_of_one_class_has_wilsons_band_and_empty_places_none():
    s = np.r_[np.linspace(.1, .12, 40), np.full(5, .9)]
    c = reliability_curve(np.zeros(45), s, draws=50)
    near = c[c.n==40].iloc[0]
    assert (near.rate, near.low)==(0, 0) and near.high==pytest.approx(wilson_ci(0, 40).high)
    assert c[c.score.between(.4, .6)].rate.isna().all() and (c[c.score.between(.4, .6)].n==0).all()
    assert c[c.score.round(2)==.9].rate.isna().all() # five images are no curve


def test_curve_of_constant_scores():
    t = (np.arange(100)%4==0).astype(float)
    c = reliability_curve(t, np.full(100, .3), draws=100).dropna()
    assert len(c) and (c.score-.3).abs().max()<.05 and c.rate.to_numpy()==pytest.approx(np.full(len(c), .25))
    assert (c.low<.25).all() and (c.high>.25).all()


# --- decisions ---

@pytest.mark.parametrize('prevalence', [None, .02, .5])
def test_net_benefit_against_a_plain_loop(prevalence):
    t,s,g = simulated(200, 5)
    s = s.round(2) # scores that are thresholds
    cuts = [.5, .07, .9, .25]
    d = decision_curve(t, s, g, cuts, draws=50, prevalence=prevalence)
    for i,p in enumerate(cuts):
        tp = sum(1 for a,b in zip(t, s) if a and b>=p)
        fp = sum(1 for a,b in zip(t, s) if not a and b>=p)
        pi = t.mean() if prevalence is None else prevalence
        net = tp/t.sum()*pi - fp/(len(t)-t.sum())*(1-pi)*p/(1-p)
        assert d.threshold[i]==p and d.net_benefit[i]==pytest.approx(net, abs=1e-12)
        assert d['all'][i]==pytest.approx(pi-(1-pi)*p/(1-p), abs=1e-12)
        assert d.low[i]<=d.net_benefit[i]<=d.high[i]
    assert (d.none==0).all()


def test_net_benefit_interval_is_as_wide_as_its_spread_over_test_sets():
    values = [decision_curve(*simulated(300, seed), [.3], draws=20).net_benefit[0] for seed in range(150)]
    d = decision_curve(*simulated(300, 7), [.3], draws=1000)
    assert (d.high-d.low)[0]==pytest.approx(2*1.96*np.std(values), rel=.25)


def test_calling_everyone_and_no_one():
    t,_,g = simulated(100)
    d = decision_curve(t, np.where(np.arange(200)<300, .95, 0), g, [.2, .95, .96], draws=50)
    assert d.net_benefit[:2].to_numpy()==pytest.approx(d['all'][:2].to_numpy(),
        abs=1e-12) and d.net_benefit[2]==0


# --- unknown targets, bad input ---

def test_unknown_targets_are_left_out():
    t,s,g = simulated(100, 6, 1.4)
    known = np.random.default_rng(0).random(200)<.7
    holes = np.where(known, t, np.nan)
    for f in (lambda *a: calibration(*a[:2]).table, lambda *a: calibration_ci(*a, draws=50),
            lambda *a: reliability_curve(*a, draws=50), lambda *a: decision_curve(*a, draws=50)):
        pd.testing.assert_frame_equal(f(holes, s, g), f(t[known], s[known], g[known]))
    assert brier_parts(holes, s)==brier_parts(t[known], s[known])
    for kind in KINDS: assert (kind().fit(holes, s, g)(s)==kind().fit(t[known], s[known], g[known])(s)).all()


@pytest.mark.parametrize('f', [calibration, calibration_ci, brier_parts, reliability_curve, decision_curve]
    + [lambda *a, k=k: k().fit(*a) for k in KINDS])
@pytest.mark.parametrize('targets,scores,words', [
    ([0, 1, 0], [.1, 1.2, .3], 'Scores reach from 0.1 to 1.2'),
    ([0, 1, 0], [-3., 1., .3], 'apply a sigmoid'),
    ([0, 1, 0], [.1, np.nan, .3], '1 of 3 scores are NaN'),
    ([0, 1, 0], [.1, .2], '3 targets but 2 scores'),
    ([0, 1, 2], [.1, .2, .3], r'targets hold \[2.0\]'),
    ([np.nan]*3, [.1, .2, .3], 'no images'),
    ([], [], 'no images'),
])
def test_bad_input_is_refused(f, targets, scores, words):
    with pytest.raises(DataError, match=words): f(targets, scores)


@pytest.mark.parametrize('f', [decision_curve] + [lambda *a, k=k: k().fit(*a) for k in KINDS])
def test_one_class_is_refused(f):
    with pytest.raises(DataError, match='All 3 targets are 1'): f([1, 1, 1], [.1, .2, .3])


@pytest.mark.parametrize('call,words', [
    (lambda t, s: calibration(t, s, bins=0), 'bins is 0'),
    (lambda t, s: calibration(t, s, by='size'), "by is 'size'"),
    (lambda t, s: reliability_curve(t, s, grid=1), 'grid is 1'),
    (lambda t, s: decision_curve(t, s, thresholds=[0., .5]), 'thresholds are'),
    (lambda t, s: decision_curve(t, s, thresholds=[]), 'thresholds are'),
    (lambda t, s: decision_curve(t, s, prevalence=1.), 'prevalence is 1'),
    (lambda t, s: calibration_ci(t, s, level=95), 'level is 95'),
    (lambda t, s: calibration_ci(t, s, groups=[1, 2]), '4 targets but 2 groups'),
    (lambda t, s: TemperatureScaling().fit(t, 1-np.array(s)), 'wrong way'),
    (lambda t, s: PlattScaling().fit(t, 1-np.array(s)), 'wrong way'),
    (lambda t, s: PlattScaling().fit(t, [.5]*4), 'All scores are 0.5'),
    (lambda t, s: TemperatureScaling().fit([0, 0, 1, 1], [.1, .2, .8, .9]), 'separate'),
    (lambda t, s: TemperatureScaling().fit([0, 3, 1, 1], np.eye(4)[:,:3]), 'class numbers 0 to 2'),
    (lambda t, s: TemperatureScaling().fit(np.zeros((4, 3)), np.eye(4)[:,:3]), 'targets have shape'),
    (lambda t, s: VennAbers()(s), 'not been fitted'),
    (lambda t, s: IsotonicCalibration()(s), 'not been fitted'),
    (lambda t, s: TemperatureScaling()(s), 'not been fitted'),
    (lambda t, s: PlattScaling().to_dict(), 'not been fitted'),
    (lambda t, s: VennAbers().fit(t, s)([1.5]), 'Scores reach'),
    (lambda t, s: VennAbers().fit(t, s)([np.nan]), 'NaN'),
])
def test_wrong_arguments_are_refused(call, words):
    with pytest.raises(DataError, match=words): call([0, 1, 0, 1], [.2, .4, .45, .9])


# --- recalibration ---

def test_planted_temperature_and_shift_are_recovered_within_their_errors():
    off = {'temperature': [], 'slope': [], 'intercept': []}
    for seed in range(60):
        t,s,g = simulated(500, seed, 2.5)
        c = TemperatureScaling().fit(t, s, g)
        off['temperature'].append((c.temperature-2.5)/c.error)
        t,s,g = simulated(500, seed, 1/.6, -.3/.6)[:3]
        c = PlattScaling().fit(t, s, g)
        off['slope'].append((c.slope-.6)/c.slope_error)
        off['intercept'].append((c.intercept-.3)/c.intercept_error)
    for name,z in off.items(): assert abs(np.mean(z))<.6 and .75<np.std(z)<1.3, (name, np.mean(z), np.std(z))


def test_temperature_of_classes():
    gen = np.random.default_rng(2)
    z = gen.normal(size=(4000, 5))*2
    t = (np.cumsum(np.exp(z), 1)/np.exp(z).sum(1, keepdims=True)<gen.random((4000, 1))).sum(1).astype(float)
    t[::10] = np.nan
    c = TemperatureScaling().fit(t, 3*z)
    assert abs(c.temperature-3)<3*c.error and c.error<.1 and c.n==3600
    kept = ~np.isnan(t)
    loss = lambda v: -log_softmax(3*z[kept]/v, 1)[np.arange(3600), t[kept].astype(int)].sum()
    assert c.temperature==pytest.approx(minimize_scalar(loss, bounds=(.5, 9), method='bounded',
        options=dict(xatol=1e-9)).x, abs=1e-5)
    assert c(3*z).sum(1)==pytest.approx(np.ones(4000)) and (c(3*z).argmax(1)==z.argmax(1)).all()
    with pytest.raises(DataError, match=r'Give finite logits \(N, 5\)'): c(z[:,:4])


def test_two_classes_by_logits_are_the_binary_temperature():
    t,s,g = simulated(300, 8, 2.)
    z = np.stack([np.zeros(600), logit(s)], 1)
    a,b = TemperatureScaling().fit(t, s, g),TemperatureScaling().fit(t, z, g)
    assert (a.temperature, a.error)==pytest.approx((b.temperature, b.error),
        rel=1e-8) and a(s)==pytest.approx(b(z)[:,1], abs=1e-9)


def test_two_classes_by_logits_are_platts_line():
    t,s,g = simulated(300, 8, 2., .7)
    a,b = PlattScaling().fit(t, s, g),PlattClasses().fit(t, np.stack([np.zeros(600), logit(s)], 1), g)
    assert (a.slope, a.intercept, a.slope_error, a.intercept_error)==pytest.approx(
        (b.slope, b.intercepts[1], b.slope_error, b.intercept_errors[1]), rel=1e-6)


def drawn_classes(n, seed, share, slope=2.):
    "Class numbers, with logits right for even shares and divided by `slope`, and patients of two images."
    gen = np.random.default_rng(seed)
    t = gen.choice(len(share), n, p=share)
    return t,(np.eye(len(share))[t] + gen.normal(size=(n, len(share))))/slope,np.arange(n)//2


def test_platt_of_classes_finds_the_shares_and_the_temperature():
    """Normal logits with the deviation 1 and means apart by 1 are right log odds for even shares: the intercepts are
    the logarithms of the true ones. Targets that are drawn in cost a little of the slope."""
    share = np.array([.6, .25, .1, .05])
    off = {'slope': [], 'intercepts': []}
    for seed in range(40):
        c = PlattClasses().fit(*drawn_classes(1500, seed, share))
        off['slope'].append((c.slope-2)/c.slope_error)
        off['intercepts'].append((c.intercepts-np.log(share/share[0]))[1:]/c.intercept_errors[1:])
    for name,z in off.items(): assert abs(np.mean(z))<.8 and .75<np.std(z)<1.3, (name, np.mean(z), np.std(z))
    t,z,_ = drawn_classes(4000, 99, share)
    assert c(z).mean(0)==pytest.approx(np.bincount(t)/4000, abs=.03)


def test_platt_of_classes_is_the_minimum():
    t,z,g = drawn_classes(200, 1, [.5, .3, .2])
    c,n = PlattClasses().fit(t, z, g),np.bincount(t)
    soft = np.where(np.eye(3)[t]==1, (n[t]+1)[:,None], .5)/(n[t]+2)[:,None]
    loss = lambda b: -(soft*log_softmax(b[0]*z + np.r_[0, b[1:]], 1)).sum()
    best = minimize(loss, [1, 0, 0], tol=1e-12)
    assert np.r_[c.slope, c.intercepts[1:]]==pytest.approx(best.x, abs=1e-4)


def test_a_class_without_images_keeps_a_small_probability():
    t,z,g = drawn_classes(100, 2, [.6, .4, 0.])
    p = PlattClasses().fit(t, z, g)(z)
    assert 0<p[:,2].mean()<.03 and p.sum(1)==pytest.approx(np.ones(100))


def test_platt_of_classes_refuses_what_it_cannot_mend():
    t,z,g = drawn_classes(100, 3, [.6, .4])
    with pytest.raises(DataError, match='wrong way round'): PlattClasses().fit(t, -z, g)
    with pytest.raises(DataError, match='logits are alike'): PlattClasses().fit(t, 0*z, g)
    with pytest.raises(DataError, match='not finite'): PlattClasses().fit(t, z*np.nan, g)
    with pytest.raises(DataError, match=r'Give finite logits \(N, 2\)'): PlattClasses().fit(t, z, g)(z[:,:1])
    with pytest.raises(DataError, match='not been fitted'): PlattClasses()(z)


@pytest.mark.parametrize('decimals', [12, 2, 1])
def test_isotonic_is_scikit_learns(decimals):
    t,s,_ = simulated(200, 9)
    s = s.round(decimals)
    x = np.r_[0, 1, np.random.default_rng(0).random(500), s]
    assert IsotonicCalibration().fit(t, s)(x)==pytest.approx(IsotonicRegression(out_of_bounds='clip', y_min=0,
        y_max=1).fit(s, t).predict(x), abs=1e-12)


@pytest.mark.parametrize('seed', range(30))
def test_venn_abers_against_two_fits_for_each_image(seed):
    gen = np.random.default_rng(seed)
    n = int(gen.integers(2, 40))
    s = gen.random(n).round(1 if seed%2 else 6)
    t = (gen.random(n)<(.5 if seed%3 else s)).astype(float)
    t[:2] = 0,1
    c = VennAbers().fit(t, s)
    for x in np.r_[0, 1, gen.random(12), s[:10]]:
        slow = [IsotonicRegression().fit(np.r_[s, x], np.r_[t, label]).predict([x])[0] for label in (0, 1)]
        low,high = c.interval(x)
        assert (low, high)==pytest.approx(tuple(slow), abs=1e-12)
        assert c(x)==pytest.approx(high/(1-low+high), abs=1e-15)


def test_venn_abers_interval_holds_the_rate():
    """Over many calibration sets, in each third of the scores, the rate of new images lies between the mean
    ends, whatever the miscalibration."""
    low,high,hits,third = [],[],[],[]
    for seed in range(400):
        gen = np.random.default_rng(seed)
        z = gen.normal(0, 1.5, 130)
        t,s = (gen.random(130)<expit(z)**2).astype(float),expit(3*z + 1)
        if t[:100].min()==t[:100].max(): continue
        ends = VennAbers().fit(t[:100], s[:100]).interval(s[100:])
        low.append(ends[0])
        high.append(ends[1]); hits.append(t[100:]); third.append(np.digitize(s[100:], [.3, .95]))
    low,high,hits,third = map(np.concatenate, (low, high, hits, third))
    for k in range(3):
        m = third==k
        error = 3*hits[m].std()/math.sqrt(m.sum())
        assert low[m].mean()-error<=hits[m].mean()<=high[m].mean()+error
        assert high[m].mean()-low[m].mean()<.2


def test_the_ranking_stays():
    t,s,g = simulated(300, 10, 3., 1.)
    x = np.linspace(0, 1, 2001)
    for kind in KINDS: assert (np.diff(kind().fit(t, s, g)(x))>=-1e-12).all()
    assert all(0<=o<=1 for kind in KINDS for o in kind().fit(t, s, g)(np.array([0., 1.])))


def test_recalibrated_scores_are_calibrated_on_new_images():
    t,s,g = simulated(3000, 11, 2., 1.)
    new = simulated(3000, 12, 2., 1.)
    before = calibration_ci(new[0], new[1], new[2], draws=100)
    for kind in KINDS[1:]:
        c = kind().fit(t, s, g)
        after = calibration_ci(new[0], c(new[1]), new[2], draws=100)
        assert after.high['ece']<before.low['ece'] and after.value['brier']<before.value['brier']
        if kind is not PlattScaling: continue
        # of the new images and of the fit
        error = np.hypot((after.high-after.low)['slope']/3.92, c.slope_error/c.slope)
        assert abs(after.value['slope']
            -1)<3*error<.2 and abs(after.value['in the large'])<.15<before.value['in the large']*-1


def test_a_fit_that_failed_leaves_nothing_behind():
    t,s,g = simulated(100, 15)
    for kind in (TemperatureScaling, PlattScaling):
        c = kind().fit(t, s, g)
        with pytest.raises(DataError, match='wrong way'): c.fit(t, 1-s, g)
        with pytest.raises(DataError, match='not been fitted'): c(s)
        with pytest.raises(DataError, match='not been fitted'): c.to_dict()


# --- plain numbers ---

@pytest.mark.parametrize('kind', KINDS)
def test_a_calibrator_survives_json(kind):
    t,s,g = simulated(200, 13, 1.7, .2)
    c = kind().fit(t, s.astype(np.float32), g)
    told = json.dumps(c.to_dict(), allow_nan=False)
    again = recalibration_from(json.loads(told))
    x = np.r_[0, 1, s, np.random.default_rng(1).random(1000), s.astype(np.float32)]
    assert type(again) is kind and (again(x)==c(x)).all() and json.dumps(again.to_dict())==told
    assert (again.n, again.patients)==(400, 200)
    if kind is VennAbers: assert all((a==b).all() for a,b in zip(again.interval(x), c.interval(x)))


@pytest.mark.parametrize('kind', [TemperatureScaling, PlattClasses])
def test_a_rule_of_classes_survives_json(kind):
    gen = np.random.default_rng(3)
    z = gen.normal(size=(200, 3))
    c = kind().fit((z + gen.normal(size=(200, 3))).argmax(1), z)
    assert (recalibration_from(json.loads(json.dumps(c.to_dict())))(z)==c(z)).all()


def good(kind): return json.loads(json.dumps(kind().fit(*simulated(60, 14, 1.5)).to_dict()))


@pytest.mark.parametrize('d,words', [
    (None, "kind of the recalibration is 'None'"), ([], 'kind'), ({}, "'None'"),
    ({'kind': 'isotonics'}, "'isotonics'"), ({'kind': ['platt']}, 'kind'),
    ({'kind': 'platt'}, 'lacks intercept, intercept_error, n, patients, slope'),
    (lambda: good(PlattScaling) | {'weights': 1}, 'has unknown weights'),
    (lambda: good(PlattScaling) | {'slope': '0.5'}, "slope is '0.5'"),
    (lambda: good(PlattScaling) | {'slope': None}, 'slope'),
    (lambda: good(PlattScaling) | {'slope': True}, "slope is 'True'"),
    (lambda: good(PlattScaling) | {'slope': -1.}, "slope is '-1.0'"),
    (lambda: good(PlattScaling) | {'intercept': math.inf}, "intercept is 'inf'"),
    (lambda: good(TemperatureScaling) | {'temperature': 0}, "temperature is '0'"),
    (lambda: good(TemperatureScaling) | {'temperature': math.nan}, "temperature is 'nan'"),
    (lambda: good(TemperatureScaling) | {'classes': 1.5}, 'classes'),
    (lambda: good(TemperatureScaling) | {'n': 0}, "n is '0'"),
    (lambda: good(IsotonicCalibration) | {'rates': []}, 'rates is'),
    (lambda: good(IsotonicCalibration) | {'rates': 'abc'}, "rates is 'abc'"),
    (lambda: good(IsotonicCalibration) | {'rates': good(IsotonicCalibration)['rates'][:-1]},
    'differ in length'),
    (lambda: good(IsotonicCalibration) | {'rates': good(IsotonicCalibration)['rates'][::-1]},
    'rates do not rise'),
    (lambda: good(IsotonicCalibration) | {'scores': [.5, .5] + good(IsotonicCalibration)['scores'][2:]},
    'scores do not rise'),
    (lambda: good(IsotonicCalibration) | {'rates': [0., 2.]}, r"rates\[1\] is '2.0'"),
    (lambda: good(VennAbers) | {'positives': [10**6]*len(good(VennAbers)['scores'])},
    'positives are more than images'),
    (lambda: good(VennAbers) | {'images': [[1]]}, r'images\[0\]'),
])
def test_a_strange_dict_is_refused_by_name(d, words):
    with pytest.raises(DataError, match=words): recalibration_from(d() if callable(d) else d)
