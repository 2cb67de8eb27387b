"""The figures of classification against scikit-learn, scipy and brute force in float64; their intervals
against simulated truth; every bad input."""
import copy
import doctest
import inspect
import pickle
from dataclasses import FrozenInstanceError, replace
from itertools import product
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as skm

from radiology_ai.core import DataError
from radiology_ai.metrics.calibration import brier_parts, calibration, calibration_ci, decision_curve, reliability_curve
from radiology_ai.metrics.classification import (
    auroc_table,
    balanced_accuracy,
    confusion,
    f_beta,
    label_table,
    macro_auroc,
    mcc,
    quadratic_kappa,
)
from radiology_ai.metrics.compare import bootstrap_p, compare_models, holm, mcnemar_test, paired_bootstrap, sign_flip_p
from radiology_ai.metrics.curves import pr_curve, roc_curve
from radiology_ai.metrics.intervals import (
    Draws,
    Metric,
    bootstrap,
    bootstrap_ci,
    mean_ci,
    percentile_ci,
    proportion_ci,
    student_quantile,
    wilson_ci,
)
from radiology_ai.metrics.masks import dice
from radiology_ai.metrics.operating import cost_threshold, f_threshold, operating_point, threshold_for, youden_threshold
from radiology_ai.metrics.ranking import auroc, auroc_ci, average_precision, delong_covariance, delong_test
from radiology_ai.metrics.recalibration import PlattClasses, PlattScaling, TemperatureScaling
from radiology_ai.metrics.running import scores_auroc
from radiology_ai.report.evaluation import evaluate_table
from radiology_ai.report.predictions import check_predictions, simulated_predictions

NAN = float('nan')


def close(a, b, eps=1e-12):
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=0, atol=eps)

def scored(seed, n=80, decimals=9, patients=None, prevalence=.35):
    "Targets, scores and patients; few decimals make ties; patients share a part of their score."
    gen = np.random.default_rng(seed)
    g = gen.integers(0, patients or n, n) if patients else np.arange(n)
    t = (gen.random(n)<prevalence).astype(float)
    t[:2] = 1,0
    return t,np.round(t + gen.normal(size=n) + .7*gen.normal(size=n)[g], decimals),g

def ends(values, patients, level=.95):
    "The percentiles that Hesterberg (2015) asks for so many patients."
    z = stats.t.ppf(.5+level/2, patients-1)*(patients/(patients-1))**.5
    return np.quantile(values, stats.norm.cdf([-z, z]))

def accepts(found, wanted, share=.95, level=.999) -> bool:
    "Is `found` of `wanted` hits within the binomial error of `share`?"
    low,high = stats.binom.ppf([(1-level)/2, (1+level)/2], wanted, share)
    return low<=found<=high


# ---- figures -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('decimals', [0, 1, 9])
@pytest.mark.parametrize('own, theirs', [(auroc, skm.roc_auc_score),
    (average_precision, skm.average_precision_score)])
def test_ranking_and_its_weighted_form_are_scikit_learns(own, theirs, decimals):
    for seed in range(8):
        t,s,_ = scored(seed, decimals=decimals, prevalence=(.1, .5, .9)[seed%3])
        close(own(t, s), theirs(t, s))
        gen = np.random.default_rng(seed)
        w = np.c_[gen.integers(0, 4, (len(t), 5)), gen.random((len(t), 5))].astype(float)
        w[:2] = 1
        close(own.weighted(t, s)(w), [theirs(t, s, sample_weight=o) for o in w.T])
        close(own.weighted(t, s)(w.astype(np.float32)), [theirs(t, s, sample_weight=o) for o in w.T], 1e-6)

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2,
    max_size=30).filter(lambda o: 0<sum(t for t,_ in o)<len(o)))
def test_auroc_by_counting_pairs(rows):
    t,s = map(np.array, zip(*rows))
    pairs = [(a>b) + .5*(a==b) for a,b in product(s[t], s[~t])]
    close(auroc(t, s), np.mean(pairs))
    close(auroc(~t, -s), np.mean(pairs))
    close(auroc(t, np.exp(s)), np.mean(pairs)); close(auroc(t, -s), 1-np.mean(pairs))
    cuts = np.unique(s[t])
    steps = [((s[t]==c).sum()/t.sum())*(t[s>=c].mean()) for c in cuts]
    close(average_precision(t, s), sum(steps))

def test_constant_scores_say_nothing():
    t = [1, 0, 0, 1, 0]
    assert auroc(t, [.3]*5)==.5
    close(average_precision(t, [.3]*5), .4)
    for method in ('delong', 'bootstrap'):
        with pytest.raises(DataError, match='All 5 scores are 0.3'): auroc_ci(t, [.3]*5, method=method)
    table = label_table(np.c_[t, t], np.c_[[.3]*5, [.9, .1, .2, .4, .5]], ['flat', 'fine'])
    assert table.reason['flat']=='All 5 scores are 0.3' and np.isnan(table.auroc[['flat',
        'mean']]).all() and table.auroc['fine']>.5
    assert operating_point(t, [.3]*5, .3).value['sensitivity']==1

def test_a_draw_without_a_class_is_undefined():
    w = np.array([[1., 0, 2], [1, 1, 0], [1, 2, 0]])
    assert np.isnan(auroc.weighted([1, 0, 0], [.9, .1, .2])(w)).tolist()==[False, True, True]
    assert np.isnan(average_precision.weighted([1, 0, 0], [.9, .1, .2])(w)).tolist()==[False, True, True]

@pytest.mark.parametrize('seed', range(3))
def test_calls_are_scikit_learns(seed):
    gen = np.random.default_rng(seed)
    t,p = gen.integers(0, 4, 90),gen.integers(0, 4, 90)
    p = np.where(gen.random(90)<.5, t, p)
    close(quadratic_kappa(t, p), skm.cohen_kappa_score(t, p, weights='quadratic'))
    close(mcc(t, p), skm.matthews_corrcoef(t, p))
    close(balanced_accuracy(t, p), skm.balanced_accuracy_score(t, p))
    assert (confusion(t, p).to_numpy()==skm.confusion_matrix(t, p)).all()
    b,q = t>1,p>1
    for beta in (.5, 1, 2): close(f_beta(b, q, beta), skm.fbeta_score(b, q, beta=beta))
    op = operating_point(b, q.astype(float), .5, beta=2)
    wanted = {'sensitivity': skm.recall_score(b, q), 'specificity': skm.recall_score(~b, ~q),
        'PPV': skm.precision_score(b, q), 'NPV': skm.precision_score(~b, ~q),
        'accuracy': skm.accuracy_score(b, q),
              'balanced accuracy': skm.balanced_accuracy_score(b, q), 'F2': skm.fbeta_score(b, q, beta=2),
              'MCC': skm.matthews_corrcoef(b, q)}
    assert list(op.index)==list(wanted)
    close(op.value, [*wanted.values()])

def test_ppv_at_a_stated_prevalence():
    t,s,_ = scored(3, 400)
    op,rare = operating_point(t, s, .6),operating_point(t, s, .6, prevalence=.01)
    sick,well = 10_000,990_000 # a made-up population
    tp,fp = sick*op.value['sensitivity'],well*(1-op.value['specificity'])
    close(rare.value['PPV'], tp/(tp+fp)); close(rare.value['NPV'], (well-fp)/(well-fp + sick-tp))
    assert rare.low['PPV']<rare.value['PPV']<rare.high['PPV']<op.low['PPV']
    close(operating_point(t, s, .6, prevalence=t.mean()).value, op.value)

@pytest.mark.parametrize('decimals', [1, 9])
def test_thresholds_are_the_best_of_all(decimals):
    def rates(t, s, c): return (s[t>0]>=c).mean(),(s[t==0]<c).mean()
    def cost(t, s, c, pi):
        se,sp = rates(t, s, c)
        return -7*(1-se)*pi - (1-sp)*(1-pi)
    for seed in range(8):
        t,s,_ = scored(seed, 60, decimals)
        cuts = np.r_[np.unique(s), s.max()+1]
        close(sum(rates(t, s, youden_threshold(t, s))), max(sum(rates(t, s, c)) for c in cuts))
        for beta in (.5, 2):
            close(f_beta(t, s>=f_threshold(t, s, beta), beta), max(f_beta(t, s>=c, beta) for c in cuts))
        for pi in (None, .02):
            share = pi or t.mean()
            close(cost(t, s, cost_threshold(t, s, 7, 1, pi), share), max(cost(t, s, c, share) for c in cuts))
        cut = threshold_for(t, s, sensitivity=.8)
        assert rates(t, s, cut)[0]>=.8
        close(rates(t, s, cut)[1], max(sp for se,sp in (rates(t, s, c) for c in cuts) if se>=.8))
        cut = threshold_for(t, s, specificity=.9)
        assert rates(t, s, cut)[1]>=.9
        close(rates(t, s, cut)[0], max(se for se,sp in (rates(t, s, c) for c in cuts) if sp>=.9))


# ---- DeLong ------------------------------------------------------------------------------------------------------

def brute_covariance(t, scores, g):
    """AUROCs and covariance from the m x n table of comparisons (DeLong 1988; summed over patients:
    Obuchowski 1997), patient by patient."""
    m,n = t.sum(),(~t).sum()
    tables = [np.array([[float(a>b) + .5*(a==b) for b in s[~t]] for a in s[t]]) for s in scores]
    theta = np.array([o.mean() for o in tables])
    people = np.unique(g)
    x = np.array([[sum(o[i].mean()-th for i in np.flatnonzero(g[t]==p)) for p in people]
        for o,th in zip(tables, theta)])/m
    y = np.array([[sum(o[:,j].mean()-th for j in np.flatnonzero(g[~t]==p)) for p in people]
        for o,th in zip(tables, theta)])/n
    i10,i01,k = len(set(g[t])),len(set(g[~t])),len(people)
    s10,s01,s11 = x@x.T*i10/(i10-1),y@y.T*i01/(i01-1),x@y.T*k/(k-1)
    return theta,s10 + s01 + s11 + s11.T

@pytest.mark.parametrize('patients', [None, 25])
@pytest.mark.parametrize('decimals', [0, 9])
def test_delong_is_brute_force(patients, decimals):
    for seed in range(5):
        t,a,g = scored(seed, 60, decimals, patients)
        b = np.round(a + np.random.default_rng(seed).normal(size=60), decimals)
        theta,cov = brute_covariance(t>0, [a, b], g)
        if patients is None: # the definition of 1988, with numpy's covariance
            tables = [(s[t>0][:,None]>s[t==0]) + .5*(s[t>0][:,None]==s[t==0]) for s in (a, b)]
            close(cov, sum(np.cov([o.mean(axis) for o in tables])/tables[0].shape[1-axis] for axis in (0, 1)),
                1e-14)
        close(delong_covariance(t>0, [a, b], g)[1], cov, 1e-14)
        r,se = delong_test(t, a, b, g),(cov[0,0] + cov[1,1] - 2*cov[0,1])**.5
        close((r.a, r.b, r.difference.value, r.z), (*theta, theta[0]-theta[1], (theta[0]-theta[1])/se), 1e-10)

def score_ends(theta, v, m, n):
    """The score interval of an AUROC without clusters, by trying every value: variance v, m positives, n
    negatives."""
    few,edge = min(m, n)-1,.5/(m*n)
    def spread(x): return x*(1-x)/(m*n)*(1 + ((m+n)/2-1)*((1-x)/(2-x) + x/(1+x)))
    ratio = sum(v)/spread(np.clip(theta, edge, 1-edge))
    prior = 5 if ratio>1 else 30
    freedom = sum(v)**2/(v[0]**2/(m-1) + v[1]**2/(n-1)) if sum(v)>0 else few
    q = stats.t.ppf(.975, freedom+5) if ratio>1 else stats.norm.ppf(.975)
    x = np.linspace(0, 1, 400_001)
    inside = x[(x-theta)**2<=q*q*(prior + few*ratio)/(prior + few)*spread(x) + 1e-18]
    return inside.min(),inside.max()

@pytest.mark.parametrize('shift', [0., 1., 2.5, 9.])
@pytest.mark.parametrize('size', [(2, 30), (5, 7), (40, 60)])
def test_the_interval_of_the_auroc_is_newcombes_with_delongs_variance(shift, size):
    gen = np.random.default_rng([int(10*shift), *size])
    t = np.r_[np.ones(size[0]), np.zeros(size[1])]
    for decimals in (1, 9):
        s = np.round(gen.normal(size=len(t)) + shift*t, decimals)
        table = (s[t>0][:,None]>s[t==0]) + .5*(s[t>0][:,None]==s[t==0])
        v = [table.mean(axis).var(ddof=1)/len(table.mean(axis)) for axis in (1, 0)]
        ci = auroc_ci(t, s)
        close(ci[1:], score_ends(table.mean(), v, *size), 5e-6)
        assert 0<=ci.low<ci.value<=ci.high<=1
        # the same from every function that has it
        assert ci==bootstrap_ci(auroc, t, s) and ci==auroc_ci(t, s, np.arange(len(t)))
        row = label_table(t[:,None], s[:,None], draws=20, mean=False).iloc[0]
        close(row[['auroc','auroc_low','auroc_high']], ci)
        close(auroc_table(t[:,None], s[:,None]).iloc[0,:3], ci)

def test_one_positive_patient_is_refused_by_the_same_words_everywhere():
    t,s = np.r_[1., np.zeros(30)],np.r_[.95, np.random.default_rng(0).random(30)]
    words = '1 patients have a positive and 30 a negative image'
    for f in (lambda: auroc_ci(t, s), lambda: auroc_ci(t, s, method='bootstrap'),
            lambda: bootstrap_ci(auroc, t, s),
            lambda: bootstrap_ci(average_precision, t, s), lambda: bootstrap_ci(skm.roc_auc_score, t, s),
            lambda: delong_test(t, s, -s), lambda: paired_bootstrap(average_precision, t, s, -s),
            lambda: auroc_ci(np.r_[t, 1, 1], np.r_[s, .9, .8], np.r_[np.arange(31), 0, 0])): # three images of one
        with pytest.raises(DataError, match=words): f()
    for table in (label_table(t[:,None], s[:,None], draws=20), auroc_table(t[:,None], s[:,None]),
            auroc_table(t[:,None], s[:,None], method='bootstrap', draws=20),
            compare_models(t, {'a': s, 'b': -s}, draws=20)):
        assert words in table.reason.iloc[0]
    assert operating_point(t, s, .9).loc['sensitivity', ['low','high']].tolist()==list(wilson_ci(1, 1)[1:])

def bounded(value, values, m, low=0, high=1):
    "Ends of the score interval of a figure between limits, from its draws."
    p,se = (value-low)/(high-low),np.std(values)*(m/(m-1))**.5/(high-low)
    at = np.clip(p, .25/m, 1-.25/m)
    ratio = (2 + (m-1)*se**2*m/(at*(1-at)))/(m+1) if 0<p<1 else 1
    n,q = m/ratio,stats.t.ppf(.975, m+4)
    mid,half = (p + q*q/2/n)/(1+q*q/n),q*(p*(1-p)/n + q*q/4/n/n)**.5/(1+q*q/n)
    return low + (high-low)*np.array([mid-half, mid+half])

PERFECT = {'kappa': (quadratic_kappa, -1), 'mcc': (mcc, -1), 'balanced': (balanced_accuracy, 0)}

@pytest.mark.parametrize('name', PERFECT)
def test_perfect_figures_have_a_width(name):
    metric,low = PERFECT[name]
    y = np.tile([0, 1], 5)
    ci = bootstrap_ci(metric, y, y, draws=50)
    assert ci.value==1 and ci.high==1 and low<ci.low<.85
    assert bootstrap_ci(metric, np.tile(y, 20), np.tile(y, 20), draws=50).low>ci.low # more patients are surer

def test_perfect_means_have_a_width():
    t = np.tile([0, 1, 2], 10)
    table = label_table(t, np.eye(3)[t]*.8+.1, draws=50)
    assert (table.auroc==1).all() and table.auroc_low.between(.85, .95).all()
    assert bootstrap_ci(macro_auroc, t, np.eye(3)[t], draws=50).low<.97
    ci = mean_ci(np.ones(5))
    close(ci[1:], bounded(1, [1], 5)); assert ci.low<.65
    with pytest.raises(DataError, match='The figure is 3 in all draws'): mean_ci([3., 3., 3.])
    with pytest.raises(DataError, match='beyond its limits'): mean_ci([3., 3., 4.], limits=(0, 1))
    inverted = bootstrap_ci(auroc, t>1, -1.*t)
    assert inverted.value==inverted.low==0 and .05<inverted.high<.3

@pytest.mark.parametrize('positives', [5, 10])
@pytest.mark.parametrize('shift', [.36, 1., 3.])
def test_intervals_hold_with_few_positives(positives, shift):
    truth,held,gen = NormalDist().cdf(shift/2**.5),[],np.random.default_rng([positives, int(100*shift)])
    t = np.r_[np.ones(positives), np.zeros(60)]
    for _ in range(1000):
        ci = auroc_ci(t, gen.normal(size=len(t)) + shift*t)
        held.append(ci.low<=truth<=ci.high)
    assert .93<=np.mean(held)<=.99, np.mean(held)

@pytest.mark.parametrize('positives', [5, 10, 50])
def test_equal_models_differ_in_one_study_of_twenty(positives):
    alarms,gen = [],np.random.default_rng(positives)
    t = np.r_[np.ones(positives), np.zeros(60)]
    for _ in range(600):
        shared = .7*gen.normal(size=len(t)) + t
        alarms.append(delong_test(t, *(shared + .7*gen.normal(size=(2, len(t))))).p<.05)
    assert stats.binom.ppf(.001, 600, .03)/600<=np.mean(alarms)<=stats.binom.ppf(.999, 600,
        .07)/600, np.mean(alarms)

def test_four_images_prove_nothing():
    r = delong_test([0, 0, 1, 1], [.1, .2, .8, .9], [.9, .8, .2, .1])
    close(r.p, 1/3); assert r.difference.value==1 and r.difference.low<=0
    five = delong_test([0]*5 + [1]*5, np.arange(10.), -np.arange(10.)) # 252 ways to choose five of ten
    assert 2/252<=five.p<.05 and 0<five.difference.low<five.difference.high<=1
    for seed in range(20): # p and interval agree, at every level
        t,a,_ = scored(seed, 40)
        b = np.random.default_rng(seed).normal(size=40) + .5*t
        for level in (.8, .95, .99):
            r = delong_test(t, a, b, level=level)
            assert (r.p<1-level)==(r.difference.low>0 or r.difference.high<0)

def test_patients_with_one_image_are_no_clusters():
    t,s,_ = scored(0)
    close(auroc_ci(t, s, [f'p{k}' for k in range(80)]), auroc_ci(t, s))
    twice = auroc_ci(np.r_[t, t], np.r_[s, s], np.r_[:80, :80])
    close(twice, auroc_ci(t, s), 1e-12) # the same images again are no news

def test_perfect_scores_are_not_certain():
    for method in ('delong', 'bootstrap'):
        ci = auroc_ci([0]*10 + [1]*10, np.arange(20), method=method)
        assert ci.value==ci.high==1 and .8<ci.low<.9 and ci==auroc_ci([0]*10 + [1]*10, np.arange(20))
    table = label_table([0]*10 + [1]*10, np.c_[-np.arange(20.), np.arange(20.)], thresholds=9.5)
    assert (table.auroc==1).all() and (table.auroc_low[:2]<.9).all() and (
        table.ap_low[:2]<.9).all() and table.MCC_low[1]<.9


# ---- the bootstrap -----------------------------------------------------------------------------------------------

def test_bootstrap_is_a_plain_loop_over_the_same_draws():
    t,s,g = scored(1, 120, 1, 50)
    few = min(len(set(g[t>0])), len(set(g[t==0])))
    for metric,theirs,strata in ((auroc, skm.roc_auc_score, t),
            (average_precision, skm.average_precision_score, None), (mcc, skm.matthews_corrcoef, None)):
        given_scores = s>.5 if metric is mcc else s
        rows = [np.repeat(np.arange(120), o.astype(int))
            for o in np.concatenate(list(Draws(g, strata, draws=60, seed=4)), 1).T]
        wanted = ends([theirs(t[i], given_scores[i]) for i in rows], few)
        m = len(set(g[t>0])) if metric is average_precision else few
        close(bootstrap_ci(replace(metric, interval=None), t, given_scores, g, draws=60, seed=4)[1:],
            bounded(theirs(t, given_scores), [theirs(t[i], given_scores[i]) for i in rows], m,
            *metric.limits), 1e-6)
        close(bootstrap_ci(theirs, t, given_scores, g, draws=60, seed=4,
            stratify=strata is not None)[1:], wanted)
    close(mean_ci(s, g, draws=60, seed=4)[1:], ends([s[i].mean() for i in rows], len(set(g))), 1e-6)

def test_draws_are_of_patients_within_strata():
    t,_,g = scored(2, 200, patients=60)
    sick = np.isin(g, g[t>0]) if t.mean()<.5 else None
    w = np.concatenate(list(Draws(g, t, draws=300)), 1)
    first = np.unique(g, return_index=True)[1]
    assert all((w[g==p]==w[i]).all() for p,i in zip(g[first], first))
    people = w[first]
    assert (people[sick[first]].sum(0)==sick[first].sum()).all() and (people.sum(0)==len(first)).all()
    counts = np.concatenate(list(Draws(np.arange(12), draws=4000)), 1)
    assert abs(counts.mean()-1)<1e-9 and abs(counts.var(1).mean() - 11/12)<.03 # multinomial
    assert np.abs(np.corrcoef(counts)[np.triu_indices(12, 1)] + 1/11).max()<.08

def test_draws_do_not_depend_on_blocks_or_rows_or_the_kind_of_names():
    t,s,g = scored(3, 90, patients=30)
    a = np.concatenate(list(Draws(g, t, draws=50)), 1)
    small = Draws(g, t, draws=50); small.block = 3
    np.testing.assert_array_equal(a, np.concatenate(list(small), 1))
    order = np.random.default_rng(0).permutation(90)
    np.testing.assert_array_equal(a[order], np.concatenate(list(Draws(g[order], t[order], draws=50)), 1))
    np.testing.assert_array_equal(a, np.concatenate(list(Draws([f'p{k:03}' for k in g], t, draws=50)), 1))
    assert (np.concatenate(list(Draws(g, t, draws=50, seed=1)), 1)!=a).any()

def test_undefined_draws_are_replaced_or_left_out():
    t = np.r_[1., np.zeros(9)] # a third of the draws has no positive
    alone = bootstrap(lambda w: np.where(t@w>0, t@w, np.nan), np.arange(10), draws=200)
    assert alone.shape==(200,) and (alone>=1).all()
    both = bootstrap(lambda w: np.stack([np.where(t@w>0, t@w, np.nan), w[1]]), np.arange(10), draws=200)
    assert both.shape==(200, 2) and .2<np.isnan(both[:,0]).mean()<.5 and not np.isnan(both[:,1]).any()
    assert percentile_ci(1, both[:,0]).low>=1
    with pytest.raises(DataError, match='bootstrap draws hold what'):
        percentile_ci(1, np.where(np.arange(100)<60, np.nan, 1))
    with pytest.raises(DataError, match='bootstrap draws hold what'):
        bootstrap(lambda w: np.full(w.shape[1], np.nan), np.arange(10), draws=20)

@pytest.mark.parametrize('metric', [quadratic_kappa, balanced_accuracy, mcc])
def test_counted_metrics_bootstrap_like_a_loop(metric):
    gen = np.random.default_rng(5)
    t = gen.integers(0, 3, 80); p = np.where(gen.random(80)<.6, t, gen.integers(0, 3, 80))
    fast,slow = replace(metric, interval=None),replace(metric, interval=None, weighted=None)
    close(bootstrap_ci(fast, t, p, draws=40), bootstrap_ci(slow, t, p, draws=40), 1e-9)
    if metric is balanced_accuracy: # the shares of each class, their distances added in squares
        each = [proportion_ci(p==k, t==k) for k in range(3)]
        ci = bootstrap_ci(metric, t, p)
        close(ci.value-ci.low, sum((o.value-o.low)**2 for o in each)**.5/3)
        close(ci.high-ci.value, sum((o.value-o.high)**2 for o in each)**.5/3)


# ---- do the intervals hold the truth? ----------------------------------------------------------------------------

def simulated_study(seed, patients=120, images=3):
    gen = np.random.default_rng([seed, 77])
    g = np.repeat(np.arange(patients), images)
    t = (gen.normal(size=patients)[g] + gen.normal(size=len(g))>.7).astype(float)
    own = .7*gen.normal(size=patients)[g]
    return t,1.2*t + own + .51**.5*gen.normal(size=len(g)),1.2*t + own + .51**.5*gen.normal(size=len(g)),g

def test_delong_and_wilson_cover_the_truth_by_patient():
    n,truth,hits = 3000,NormalDist().cdf(1.2/2**.5),np.zeros(6)
    sens = NormalDist().cdf(.5)
    for seed in range(n):
        t,a,b,g = simulated_study(seed)
        one,test = auroc_ci(t, a, g),delong_test(t, a, b, g)
        se,acc = proportion_ci(a>=.7, t>0, g),mcnemar_test(t, a>=.7, b>=.7, g).difference
        blind,image = proportion_ci(a>=.7, t>0),auroc_ci(t, a)
        hits += [one.low<=truth<=one.high, test.difference.low<=0<=test.difference.high,
            se.low<=sens<=se.high, acc.low<=0<=acc.high, blind.low<=sens<=blind.high,
            image.low<=truth<=image.high]
    assert ((.93<=hits[:4]/n) & (hits[:4]/n<=.97)).all(), hits
    assert (hits[4:]/n<.92).all(), hits # as if all images were patients

@pytest.mark.slow
def test_bootstrap_covers_the_truth_by_patient():
    n,truth,hits = 1000,NormalDist().cdf(1.2/2**.5),np.zeros(3)
    for seed in range(n):
        t,a,b,g = simulated_study(seed)
        one = auroc_ci(t, a, g, method='bootstrap', draws=300)
        pair = paired_bootstrap(auroc, t, a, b, g, draws=300).difference
        blind = auroc_ci(t, a, method='bootstrap', draws=300)
        hits += [one.low<=truth<=one.high, pair.low<=0<=pair.high, blind.low<=truth<=blind.high]
    assert ((.93<=hits[:2]/n) & (hits[:2]/n<=.97)).all(), hits
    assert hits[2]/n<.92, hits

def test_draws_within_classes_are_too_narrow_for_what_depends_on_prevalence():
    t,s,g = scored(8, 400)
    free,within = (bootstrap_ci(average_precision, t, s, g, stratify=o) for o in (None, True))
    assert (free.high-free.low)>1.1*(within.high-within.low)
    assert bootstrap_ci(auroc, t, s, g)==bootstrap_ci(auroc, t, s, g, stratify=True)

def test_few_patients_widen_the_interval():
    values = np.random.default_rng(0).normal(size=4000)
    close(percentile_ci(0, values)[1:], np.quantile(values, [.025, .975]))
    widths = [np.ptp(percentile_ci(0, values, patients=m)[1:]) for m in (3, 10, 100, 10_000)]
    assert widths==sorted(widths, reverse=True) and abs(widths[-1]/np.ptp(percentile_ci(0, values)[1:])-1)<.01
    close(student_quantile(.95, 10), stats.t.ppf(.975, 10))


# ---- tests of two models -----------------------------------------------------------------------------------------

def test_mcnemar_is_the_exact_binomial():
    gen = np.random.default_rng(0)
    for n in (1, 5, 40, 700):
        t,a,b = gen.integers(0, 2, (3, n))
        r = mcnemar_test(t, a, b)
        only_a,only_b = int(((a==t) & (b!=t)).sum()),int(((a!=t) & (b==t)).sum())
        assert (r.only_a, r.only_b)==(only_a, only_b)
        close(r.p, stats.binomtest(only_a, only_a+only_b).pvalue if only_a+only_b else 1, 1e-10)
        close(r.difference.value, (a==t).mean()-(b==t).mean())
        close((r.a, r.b), ((a==t).mean(), (b==t).mean()))

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_clustered_mcnemar_by_trying_all_signs(sums):
    totals = [abs(sum(s*o for s,o in zip(signs, sums))) for signs in product((-1, 1), repeat=len(sums))]
    close(sign_flip_p(sums), np.mean(np.array(totals)>=abs(sum(sums))), 1e-12)

def test_repeated_images_are_no_news_to_mcnemar():
    gen = np.random.default_rng(1)
    t,a,b = gen.integers(0, 2, (3, 80))
    once = mcnemar_test(t, a, b)
    thrice = mcnemar_test(*(np.repeat(o, 3) for o in (t, a, b)), groups=np.repeat(np.arange(80), 3))
    close(once.p, thrice.p); close(once.difference.value, thrice.difference.value)
    # 80/79 and Student's quantile
    assert 1<=(thrice.difference.high-thrice.difference.low)/(once.difference.high-once.difference.low)<1.02

def test_holm_of_a_known_example():
    close(holm([.01, .04, .03, .005]), [.03, .06, .06, .02]) # R: p.adjust(c(.01, .04, .03, .005), 'holm')
    out = holm([.01, NAN, .04])
    close(out[[0, 2]], [.02, .04]); assert np.isnan(out[1])
    assert len(holm([]))==0 and np.isnan(holm([NAN])).all()
    with pytest.raises(DataError, match='outside'): holm([1.2])

@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_its_definition(p):
    order = sorted(range(len(p)), key=p.__getitem__)
    wanted = {k: min(1, max((len(p)-j)*p[order[j]] for j in range(i+1))) for i,k in enumerate(order)}
    close(holm(p), [wanted[k] for k in range(len(p))])

def test_paired_bootstrap_is_its_definition():
    t,a,g = scored(4, 100, 9, 40)
    b = a + np.random.default_rng(4).normal(size=100)
    r = paired_bootstrap(average_precision, t, a, b, g, draws=100, seed=2)
    w = np.concatenate(list(Draws(g, draws=100, seed=2)), 1)
    d = np.array([[skm.average_precision_score(t, s, sample_weight=o) for s in (a, b)] for o in w.T])
    m,x,y = len(set(g[t>0])),skm.average_precision_score(t, a),skm.average_precision_score(t, b)
    (la,ua),(lb,ub) = bounded(x, d[:,0], m),bounded(y, d[:,1], m)
    rho = np.corrcoef(d.T)[0,1]*(m-1)**2/((m-1)**2+1)
    far = lambda p, q: (p*p + q*q - 2*rho*p*q)**.5
    close(r.difference, (x-y, x-y - far(x-la, ub-y), x-y + far(ua-x, y-lb)), 1e-6)
    at_p = paired_bootstrap(average_precision, t, a, b, g, draws=100, seed=2, level=1-r.p).difference
    close(min(abs(at_p.low), abs(at_p.high)), 0, 1e-5)
    plain = paired_bootstrap(lambda t, s: s[t>0].mean(), t, a, b, g, draws=100, seed=2) # without limits
    few,d = min(len(set(g[t>0])), len(set(g[t==0]))),[(o*(t>0)*(a-b)).sum()/(o*(t>0)).sum() for o in w.T]
    close(plain.difference[1:], ends(d, few), 1e-9)
    close(plain.p, 2*stats.t.cdf(stats.norm.ppf((1 + min(np.sum(np.array(d)<=0),
        np.sum(np.array(d)>=0)))/101)/(few/(few-1))**.5, few-1))
    assert bootstrap_p(np.zeros(100))==1 and bootstrap_p(np.r_[np.full(999, .1), NAN])==2/1000
    assert paired_bootstrap(auroc, t, a, a, g, draws=20)[:2]==((0, 0, 0), 1)

def labelled(seed=0, n=400, c=4):
    gen = np.random.default_rng(seed)
    g = gen.integers(0, n//2, n)
    t = (gen.random((n, c))<np.linspace(.5, .1, c)).astype(float)
    s = t + gen.normal(size=(n, c)) + .5*gen.normal(size=(n, c))[g]
    t[gen.random((n, c))<.15] = NAN
    return t,s,g

def test_compare_models_is_its_parts():
    t,s,g = labelled()
    t[:,3] = np.where(np.isnan(t[:,3]), NAN, 0) # nobody has it
    models = {'a': s, 'b': s + np.random.default_rng(1).normal(size=s.shape),
        'c': s + .3*np.random.default_rng(2).normal(size=s.shape)}
    table = compare_models(t, models, list('wxyz'), g, draws=200)
    assert len(table)==3*5 and table.label.tolist().count('mean')==3
    for row in table[table.label.isin(list('wxy'))].itertuples():
        c = 'wxyz'.index(row.label)
        r = delong_test(t[:,c], models[row.a][:,c], models[row.b][:,c], g)
        close((row.difference, row.low, row.high, row.p, row.auroc_a), (*r.difference, r.p, r.a))
        assert row.n==np.isfinite(t[:,c]).sum() and not row.reason
    labels,means = table[table.label!='mean'],table[table.label=='mean']
    close(labels.p_holm.dropna(), holm(labels.p.dropna())); close(means.p_holm, holm(means.p))
    assert labels.reason[labels.label=='z'].str.contains('targets are 0').all() and labels.p_holm[
        labels.label=='z'].isna().all()
    close(means.difference, [macro_auroc(t[:,:3], models[a][:,:3]) - macro_auroc(t[:,:3], models[b][:,:3])
        for a,b in (('a','b'), ('a','c'), ('b','c'))])
    assert (means.low<means.difference).all() and (means.difference<means.high).all() and (
        means.reason=='without z').all()


# ---- tables ------------------------------------------------------------------------------------------------------

def test_label_table_is_its_parts():
    t,s,g = labelled(1)
    cuts = [.5, .6, .7, .8]
    table = label_table(t, s, list('wxyz'), g, cuts, draws=200, seed=3)
    w = np.concatenate(list(Draws(g, draws=200, seed=3)), 1).astype(float)
    drawn,patients = [],[]
    for c,name in enumerate('wxyz'):
        k,row = np.isfinite(t[:,c]),table.loc[name]
        y,x = t[k,c],s[k,c]
        close((row.auroc, row.ap), (skm.roc_auc_score(y, x), skm.average_precision_score(y, x)))
        assert (row.n, row.positives, row.negatives, row.patients, row.threshold)==(k.sum(), y.sum(),
            (y==0).sum(), len(set(g[k])), cuts[c])
        drawn.append([skm.roc_auc_score(y, x, sample_weight=o[k]) for o in w.T])
        few = min(len(set(g[k & (t[:,c]==v)])) for v in (0, 1))
        patients.append(few)
        close(row[['auroc_low','auroc_high']], auroc_ci(y, x, g[k])[1:])
        op = operating_point(t[:,c], s[:,c], cuts[c], g)
        for f in ('sensitivity', 'specificity', 'PPV', 'NPV', 'accuracy'):
            close(row[[f, f'{f}_low', f'{f}_high']], op.loc[f, ['value','low','high']])
        close(row[['F1','MCC','balanced accuracy']], op.value[['F1','MCC','balanced accuracy']])
        called = s[:,c]>=cuts[c]
        close(row[['F1_low','F1_high']], bounded(skm.f1_score(y, called[k]),
            [skm.f1_score(y, called[k], sample_weight=o[k]) for o in w.T], few), 1e-6)
    mean = table.loc['mean']
    close(mean.auroc, table.auroc[:4].mean())
    close(mean[['auroc_low','auroc_high']], bounded(mean.auroc, np.mean(drawn, 0),
        16/np.sum(1/np.array(patients))), 1e-6)
    assert mean.n==np.isfinite(t).any(1).sum() and not table.reason.any()

def test_a_label_without_positives_is_never_silently_left_out():
    t,s,g = labelled(2)
    t[:,1] = np.where(t[:,1]==1, NAN, t[:,1])
    table = label_table(t, s, list('wxyz'), g, draws=50)
    assert np.isnan(table.auroc[['x',
        'mean']]).all() and 'targets are 0' in table.reason['x'] and 'x' in table.reason[
        'mean'] and table.auroc[['w','y','z']].notna().all()
    skipped = label_table(t, s, list('wxyz'), g, draws=50, missing='skip')
    close(skipped.auroc['mean'], table.auroc[['w','y','z']].mean())
    assert skipped.reason['mean'].startswith('without x: All ')
    with pytest.raises(DataError, match=r'Classes \[1\] lack'): macro_auroc(t, s)
    with pytest.warns(UserWarning, match=r'leaves out the classes \[1\]'): macro_auroc(t, s, missing='skip')
    nothing = label_table(np.zeros((5, 2)), np.random.default_rng(0).random((5, 2)), draws=50)
    assert nothing.auroc.isna().all() and nothing.reason.all()
    nobody = label_table(np.zeros((0, 2)), np.zeros((0, 2)), list('ab'), groups=[], thresholds=.5)
    assert nobody[['auroc','auroc_low',
        'auroc_high']].isna().all(axis=None) and (nobody.n==0).all() and nobody.reason[:2].str.contains(
        'no images').all()
    one_patient = label_table(t[:,:1], s[:,:1], groups=np.zeros(len(t)), draws=50)
    assert one_patient.auroc.isna().all() and 'one patient' in one_patient.reason[0]
    assert 'mean' not in label_table(t, s, draws=50, mean=False).index

@pytest.mark.parametrize('unknown', [NAN, -1, -100])
def test_unknown_targets_are_left_out_everywhere(unknown):
    t,s,g = scored(6, 100, 9, 50)
    holes = np.r_[t, [unknown]*20]
    more,mg = np.r_[s, np.random.default_rng(0).normal(size=20)],np.r_[g, g[:20]]
    more[-1] = NAN # a score that nobody asks for
    for f in (auroc, average_precision, youden_threshold, f_threshold): close(f(holes, more), f(t, s))
    close(auroc_ci(holes, more, mg), auroc_ci(t, s, g))
    close(bootstrap_ci(auroc, holes, more, mg, draws=50), bootstrap_ci(auroc, t, s, g, draws=50))
    close(operating_point(holes, more, .5, mg), operating_point(t, s, .5, g))
    close(delong_test(holes, more, -more, mg)[1:], delong_test(t, s, -s, g)[1:])
    close(cost_threshold(holes, more, 2, 1), cost_threshold(t, s, 2, 1))
    close(mean_ci(np.r_[s, NAN], np.r_[g, 0], draws=50), mean_ci(s, g, draws=50))
    calls = np.r_[s>.5, [1]*20].astype(float)
    for f in (quadratic_kappa, mcc, balanced_accuracy, f_beta): close(f(holes, calls), f(t, s>.5))
    close(mcnemar_test(holes, calls, 1-calls, mg)[1:], mcnemar_test(t, (s>.5)*1., (s<=.5)*1., g)[1:])
    close(paired_bootstrap(auroc, holes, more, -more, mg, draws=50).difference,
        paired_bootstrap(auroc, t, s, -s, g, draws=50).difference)
    p,q = (1/(1+np.exp(-o)) for o in (s, more))
    for f in (calibration_ci, reliability_curve, decision_curve):
        pd.testing.assert_frame_equal(f(holes, q, mg, draws=20), f(t, p, g, draws=20))
    close(calibration(holes, q)[:2], calibration(t, p)[:2])
    close(brier_parts(holes, q), brier_parts(t, p))
    for f in (roc_curve, pr_curve):
        for a,b in zip(f(holes, more, mg, 20), f(t, s, g, 20)): pd.testing.assert_frame_equal(a, b)
    for rule in (TemperatureScaling, PlattScaling):
        assert rule().fit(holes, q, mg).to_dict()==rule().fit(t, p, g).to_dict()

@pytest.mark.parametrize('unknown', [NAN, -1, -100])
def test_unknown_classes_are_left_out_everywhere(unknown):
    "Class numbers as `category_codes` gives them, in every function that takes such."
    gen = np.random.default_rng(5)
    t,g = gen.integers(0, 3, 90),np.arange(90)//2
    z = gen.normal(size=(90, 3)) + np.eye(3)[t]
    p = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    kind = float if np.isnan(unknown) else int
    holes,said = np.r_[t, [unknown]*6].astype(kind),p.argmax(1)
    wide,more,mg = (np.concatenate([o, o[:6]]) for o in (p, said, g))
    close(macro_auroc(holes, wide), macro_auroc(t, p))
    close(bootstrap_ci(macro_auroc, holes, wide, mg, draws=30), bootstrap_ci(macro_auroc, t, p, g, draws=30))
    for f in (label_table, auroc_table):
        pd.testing.assert_frame_equal(f(holes, wide, groups=mg, draws=30), f(t, p, groups=g, draws=30))
    pd.testing.assert_frame_equal(compare_models(holes, {'a': wide, 'b': wide**2}, groups=mg, draws=30),
        compare_models(t, {'a': p, 'b': p**2}, groups=g, draws=30))
    for f in (quadratic_kappa, mcc, balanced_accuracy):
        close(f(holes, more), f(t, said))
        close(bootstrap_ci(f, holes, more, mg, draws=30), bootstrap_ci(f, t, said, g, draws=30))
    assert (confusion(holes, more).to_numpy()==confusion(t, said).to_numpy()).all()
    close(mcnemar_test(holes, more, 0*more, mg)[1:], mcnemar_test(t, said, 0*said, g)[1:])
    close(accuracy_of(holes, more, mg), accuracy_of(t, said, g))
    for rule in (TemperatureScaling, PlattClasses):
        assert rule().fit(holes, np.log(wide), mg).to_dict()==rule().fit(t, np.log(p), g).to_dict()
    if kind is int: close(scores_auroc(wide, holes), scores_auroc(p, t))
    for wrong in (-2, 3, .5):
        for f in (macro_auroc, lambda a, b: PlattClasses().fit(a, np.log(b)),
                lambda a, b: confusion(a, said, 3)):
            with pytest.raises(DataError): f(np.r_[wrong, t[1:]], p)

@pytest.mark.parametrize('unknown', [NAN, -1, -100])
def test_unknown_targets_and_grades_of_a_report(unknown):
    table = simulated_predictions(200)
    holes = table.copy()
    holes.loc[:19, 'target'] = holes.loc[10:29, 'grade'] = unknown
    p,wanted = check_predictions(holes),check_predictions(table[20:])
    assert p.unknown==20 and np.array_equal(p.targets, wanted.targets)
    found = evaluate_table(holes, .5, draws=20)
    assert found['labels']==evaluate_table(table[20:], .5, draws=20)['labels']
    assert found['grades']==evaluate_table(table[30:], .5, draws=20)['grades']
    assert found['grades']['accuracy']['n']==170
    assert evaluate_table(holes.assign(grade=unknown), .5, draws=20)['grades'] is None

def accuracy_of(t, said, g):
    return paired_bootstrap(Metric(lambda a, b: float(np.mean(a==b))), t, said, 0*said, g,
        draws=30).difference

def test_masks_of_less_than_nothing_are_refused():
    for truth in ([0, -2], [0, -1.], [0, -.5]):
        with pytest.raises(DataError, match=f'The truth holds {truth[1]:.3g}'): dice(truth, [0, 1])
    for unknown in (-1, -100): assert dice([1, unknown, 0], [1, 1, 0])==1

def test_order_of_rows_and_names_of_patients_do_not_matter():
    t,s,g = scored(7, 120, 1, 40)
    order,names = np.random.default_rng(1).permutation(120),np.random.default_rng(2).permutation(40)
    renamed = np.array([f'patient {k}' for k in names])[g[order]]
    close(auroc_ci(t[order], s[order], renamed), auroc_ci(t, s, g))
    close(delong_test(t[order], s[order], -s[order], renamed)[1:], delong_test(t, s, -s, g)[1:])
    close(operating_point(t[order], s[order], .5, renamed), operating_point(t, s, .5, g))
    close(mcnemar_test(t[order], s[order]>.5, s[order]>1, renamed)[1:], mcnemar_test(t, s>.5, s>1, g)[1:])
    close(bootstrap_ci(auroc, t[order], s[order], g[order], draws=100),
        bootstrap_ci(auroc, t, s, g, draws=100), 1e-6)
    # other draws of the same patients
    close(bootstrap_ci(auroc, t[order], s[order], renamed), bootstrap_ci(auroc, t, s, g), .02)

def test_order_of_labels_does_not_matter():
    t,s,g = labelled(3)
    order = [2, 0, 3, 1]
    a = label_table(t, s, list('wxyz'), g, draws=60)
    b = label_table(t[:,order], s[:,order], list('ywzx'), g, draws=60)
    pd.testing.assert_frame_equal(a.loc[b.index], b)
    grades = np.random.default_rng(0).integers(0, 4, 400)
    close(macro_auroc(grades, s), macro_auroc(np.argsort(order)[grades], s[:,order]))
    pd.testing.assert_frame_equal(auroc_table(grades, s), auroc_table(np.eye(4)[grades], s))


# ---- bad input ---------------------------------------------------------------------------------------------------

T,S = [1, 0, 1, 0, 1, 0],[.9, .1, .8, .3, .4, .6]
BAD = {'one class': (([1]*6, S), 'All 6 targets are 1'), 'no images': (([], []), 'no images'),
    'all unknown': (([NAN]*6, S), 'no images'), 'unequal lengths': ((T, S[:5]), '6 targets but 5 scores'),
       'a grade': (([0, 1, 2, 0, 1, 0], S), r'targets hold \[2.0\]'),
       'a score of NaN': ((T, S[:5]+[NAN]), '1 of 6 scores are NaN'),
       'words': ((T, ['high']*6), 'not numbers'),
       'two columns': ((T, np.ones((6, 2))), r'shape \(6, 2\)')}

@pytest.mark.parametrize('why', BAD)
@pytest.mark.parametrize('f', [auroc, average_precision, auroc_ci, youden_threshold, f_threshold,
    lambda t, s: cost_threshold(t, s, 1, 1), lambda t, s: threshold_for(t, s, sensitivity=.9),
                               lambda t, s: delong_test(t, s, s)],
                               ids=['auroc', 'ap', 'auroc_ci', 'youden', 'f', 'cost', 'threshold_for',
                               'delong'])
def test_bad_input_is_refused(f, why):
    args,message = BAD[why]
    with pytest.raises(DataError, match=message): f(*args)

REFUSED = {
    'a missing patient': (lambda: auroc_ci(T, S, ['a', 'b', None, 'c', 'd', 'e']),
    'group of row 2 is missing'), 'too few patients': (lambda: auroc_ci(T, S, ['a']*6),
    '1 patients have a positive'),
    'too few groups': (lambda: auroc_ci(T, S, ['a']*5), '6 targets but 5 groups'),
    'bootstrap of one patient': (lambda: bootstrap_ci(auroc, T, S, ['a']*6), 'one patient'),
    'few draws': (lambda: bootstrap_ci(auroc, T, S, draws=3), 'draws is 3'),
    'a level in per cent': (lambda: auroc_ci(T, S, level=95), 'level is 95'),
    'an unknown method': (lambda: auroc_ci(T, S, method='hanley'), "'hanley'"),
    'a threshold of NaN': (lambda: operating_point(T, S, NAN), 'threshold is nan'),
    'a prevalence in per cent': (lambda: operating_point(T, S, .5, prevalence=5), 'prevalence is 5'),
    'a negative cost': (lambda: cost_threshold(T, S, -1, 1), 'costs are -1 and 1'),
    'beta 0': (lambda: f_threshold(T, S, 0), 'beta is 0'),
    'a sensitivity in per cent': (lambda: threshold_for(T, S, sensitivity=90), 'value is 90'),
    'both wishes': (lambda: threshold_for(T, S, .9, .9), 'Both or none'),
    'scores as calls': (lambda: f_beta(T, S), 'not 1 and 0'),
    'calls that are no classes': (lambda: quadratic_kappa(T, S), 'not class numbers'),
    'one true class': (lambda: balanced_accuracy([1, 1], [0, 1]), 'All 2 targets are 1'),
    'a class too many': (lambda: confusion([0, 3], [0, 1], classes=2), 'outside the 2 classes'),
    'more hits than images': (lambda: wilson_ci(3, 2), 'not a proportion'),
    'one model': (lambda: compare_models(T, {'a': S}), '1 models'),
    'scores for McNemar': (lambda: mcnemar_test(T, S, T), 'threshold first'),
    'other columns': (lambda: compare_models(np.eye(6)[:,:2], {'a': np.ones((6, 2)), 'b': np.ones((6, 3))}),
    r'\(6, 2\) but there are 3'), 'names': (lambda: label_table(T, np.ones((6, 2)), ['a']), '1 names for 2'),
    'rows of a table': (lambda: label_table(T, np.ones((5, 2))), '6 targets but 5 scores'),
    'class numbers beyond': (lambda: label_table([0, 5], np.ones((2, 2))), 'reach from 0 to 5'),
    'missing': (lambda: label_table(T, np.ones((6, 2)), missing='drop'), "missing is 'drop'"),
    'a threshold of a label': (lambda: label_table(T, np.ones((6, 2)), thresholds=[.5, NAN]),
    'threshold of 1 is nan')}

@pytest.mark.parametrize('why', REFUSED)
def test_refusals_name_the_value(why):
    call,message = REFUSED[why]
    with pytest.raises(DataError, match=message) as e: call()
    assert e.value.remedy


# ---- a published model -------------------------------------------------------------------------------------------

def test_chexnets_published_aurocs(real_data):
    "The labels are those of the edition of 2020 (Data_Entry_2017_v2020); all 22,433 images are in it."
    from radiology_ai.data.chest import NIH14, chestxray14
    scores = pd.read_csv(real_data/'predictions/preds.csv.gz')
    truth = chestxray14(real_data/'labels/nih/Data_Entry_2017_v2020.csv.gz').manifest.set_index(
        'image_id').loc[scores['Image Index']]
    published = pd.read_csv(real_data/'predictions/aucs.csv', index_col=0).auc[list(NIH14)]
    t,s = truth[list(NIH14)].to_numpy(float),scores[[f'prob_{k}' for k in NIH14]].to_numpy()
    table = label_table(t, s, NIH14, truth.patient_id, draws=400)
    delong = auroc_table(t, s, NIH14, truth.patient_id)
    close(table.auroc[:-1], published, 1e-12)
    close(delong.value, published, 1e-12); close(table.auroc['mean'], published.mean(), 1e-12)
    assert table.n['Hernia']==22_433 and table.positives['Hernia']==42 and table.patients[
        'mean']==truth.patient_id.nunique()
    assert ((delong.low<published) & (published<delong.high)).all()
    width = (table.auroc_high-table.auroc_low)[:-1]/(delong.high-delong.low)
    assert width.between(.85, 1.15).all(), width
    naive = auroc_table(t, s, NIH14)
    # several images of a patient tell less than as many patients
    assert ((delong.high-delong.low)/(naive.high-naive.low)).median()>1.03


# ---- Metrics as records ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('metric', [auroc, average_precision, macro_auroc, quadratic_kappa, balanced_accuracy,
    mcc],
    ids=lambda m: m.__name__)
def test_a_metric_is_called_helped_and_pickled_as_a_function(metric, capsys):
    assert isinstance(metric, Metric) and metric.weighted is not None
    names = list(inspect.signature(metric).parameters)
    assert names==list(inspect.signature(metric.function).parameters) and metric.__name__ in repr(metric)
    assert pickle.loads(pickle.dumps(metric)) is metric and copy.deepcopy(metric) is metric
    help(metric)
    text = capsys.readouterr().out
    assert all(f'{n}:' in text for n in names), 'help() does not tell the parameters'
    example = doctest.DocTestParser().get_doctest(metric.__doc__, {metric.__name__: metric}, metric.__name__,
        '', 0)
    assert len(example.examples)==1 and doctest.DocTestRunner().run(example).failed==0
    with pytest.raises(FrozenInstanceError): metric.by_class = True


def test_further_metrics_in_the_table_of_labels():
    t,s,g = labelled(1)
    def above(t, s): return float(np.mean(s[t>0]>.5))
    share = Metric(above, weighted=lambda t, s: lambda w: ((t>0) & (s>.5))@w/((t>0)@w),
        limits=(0, 1))
    table = label_table(t, s, groups=g, draws=100, metrics={'above': share})
    plain = label_table(t, s, groups=g, draws=100)
    pd.testing.assert_frame_equal(table[plain.columns], plain)
    for c in range(t.shape[1]):
        k = ~np.isnan(t[:,c])
        close(table['above'].iloc[c], above(t[k,c], s[k,c]))
        assert table.above_low.iloc[c]<=table['above'].iloc[c]<=table.above_high.iloc[c]
    close(table.above['mean'], table.above.iloc[:-1].mean())
    lost = label_table(np.ones((5, 2)), np.zeros((5, 2)), draws=20, metrics={'above': share})
    assert lost.above.isna().all()
