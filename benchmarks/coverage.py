"""How often do the 95 % intervals of the library hold the truth with few patients, and how often do its paired tests find
a difference that is not there?

    python benchmarks/coverage.py auroc    AUROC over true value, positives, clusters and form of the scores, beside DeLong's plain form
    python benchmarks/coverage.py figures  every other figure that a report shows
    python benchmarks/coverage.py tests    type I error of the paired tests

Each cell is `--sets` simulated data sets. One positive patient gives no interval; such figures are refused by name."""
import argparse
import time

import numpy as np
import pandas as pd
from scipy.stats import norm

from radiology_ai.metrics.calibration import calibration_ci
from radiology_ai.metrics.classification import balanced_accuracy, label_table, mcc, quadratic_kappa
from radiology_ai.metrics.compare import mcnemar_test, paired_bootstrap
from radiology_ai.metrics.detection import coco_map_ci, froc, rsna_map_ci
from radiology_ai.metrics.intervals import Metric, bootstrap_ci, mean_ci
from radiology_ai.metrics.operating import operating_point
from radiology_ai.metrics.ranking import auroc_ci, average_precision, delong_covariance, delong_test

DRAWS = 200


def scores(gen, positives, negatives, area, kind):
    "Targets, scores and patients: one image each, or three that share most of their score ('clustered')."
    each = 3 if kind=='clustered' else 1
    t = np.repeat(np.r_[np.ones(positives), np.zeros(negatives)], each)
    g = np.arange(len(t))//each
    own = gen.normal(size=positives+negatives)[g]
    noise = (.6**.5*own + .4**.5*gen.normal(size=len(t))) if each>1 else own
    if kind=='exponential': return t,gen.exponential(np.where(t>0, area/(1-area), 1)),g
    spread = 2. if kind=='unequal' else 1.
    return t,np.where(t>0, norm.ppf(area)*(1+spread**2)**.5 + spread*noise, noise),g


def auroc(sets):
    "AUROC: rows of true value and positives, a column a form of the scores."
    rows = []
    for positives in (2, 3, 5, 10, 20, 50):
        for area in (.6, .75, .9, .95, .98, .995):
            row = dict(positives=positives, AUROC=area)
            for kind in ('normal', 'clustered', 'unequal', 'exponential'):
                gen,held,plain,width = np.random.default_rng([positives, int(1000*area), len(kind)]),[],[],[]
                for _ in range(sets):
                    t,s,g = scores(gen, positives, max(60, 2*positives), area, kind)
                    ci = auroc_ci(t, s, g)
                    held.append(ci.low<=area<=ci.high)
                    width.append(ci.high-ci.low)
                    half = 1.96*delong_covariance(t>0, [s], g)[1].item()**.5
                    plain.append(ci.value-half<=area<=ci.value+half)
                row |= {kind: np.mean(held), f'{kind}, DeLong': np.mean(plain)}
                if kind=='normal': row['width'] = np.mean(width)
            rows.append(row)
    table = pd.DataFrame(rows).set_index(['positives', 'AUROC'])
    shown = table.map('{:.1%}'.format)
    shown['width'] = table.width.map('{:.2f}'.format)
    print(shown.to_string())
    for least in (2, 5, 10):
        part = table[table.index.get_level_values(0)>=least]
        for kind in ('normal', 'clustered', 'unequal', 'exponential'):
            print(f'from {least} positives, {kind}: {part[kind].min():.1%} to {part[kind].max():.1%} '
                f'(DeLong {part[f"{kind}, DeLong"].min():.1%} to {part[f"{kind}, DeLong"].max():.1%})')


def hit_share(t, s): return float(np.mean(s))

MEAN = Metric(hit_share, weighted=lambda t, s: lambda w: (s@w)/w.sum(0), limits=(0, 1),
    rests=lambda t, g: len(np.unique(g)))


def graded(gen, n, right):
    "Grades 0 to 2, a tenth of them 2, and what a model says, `right` of them right."
    t = gen.choice(3, n, p=(.7, .2, .1))
    return t.astype(float),np.where(gen.random(n)<right, t, (t+gen.integers(1, 3, n))%3).astype(float)


def boxes(gen, n, found):
    "One lesion an image in two of three images, a share found, and now and then a false box."
    truths = [np.array([[0., 0, 10, 10]]) if k%3 else np.zeros((0, 4)) for k in range(n)]
    said = [np.vstack([t + gen.choice([0., 2.]) if len(t) and gen.random()<found else np.zeros((0, 4)),
        *([[[50, 50, 60, 60.]]] if gen.random()<.2 else [])]) for t in truths]
    return said,[gen.random(len(b)) for b in said],truths


def cells():
    "Name -> (how a data set is made, its intervals by figure)."
    out = {}
    for n in (10, 20, 50):
        for p in (.7, .9, .97):
            out[f'share of hits {p}, {n} images'] = (lambda gen, n=n, p=p: (gen.random(n)<p).astype(float),
                lambda v: {'mean_ci': mean_ci(v, draws=DRAWS)})
        for missed in (0., .1):
            out[f'Dice, {missed:.0%} missed, {n} images'] = (
                lambda gen, n=n, missed=missed: gen.beta(8, 1.5, n)*(gen.random(n)>=missed),
                lambda v: {'mean Dice': mean_ci(v, draws=DRAWS)})
        out[f'boxes, {n} images'] = (lambda gen, n=n: boxes(gen, n, .9), lambda d: {
            'RSNA score': rsna_map_ci(*d, draws=DRAWS), 'CPM': froc(*d, draws=DRAWS).cpm,
            'COCO AP': tuple(coco_map_ci(*d, draws=DRAWS).loc['AP', ['value', 'low', 'high']])})
        for right in (.6, .85, .97):
            out[f'grades, {right:.0%} right, {n} images'] = (lambda gen, n=n, right=right: graded(gen, n,
                right),
                lambda d: {m.__name__: bootstrap_ci(m, *d, draws=DRAWS)
                for m in (quadratic_kappa, balanced_accuracy, mcc)})
    for positives in (5, 10, 20):
        for shift in (.5, 1.5, 3.):
            def made(gen, positives=positives, shift=shift):
                t = np.r_[np.ones(positives), np.zeros(60)]
                return t,gen.normal(size=len(t)) + shift*t
            def seen(d):
                point = operating_point(*d, 1., draws=DRAWS)
                return {'average precision': bootstrap_ci(average_precision, *d, draws=DRAWS)} | {
                    k: tuple(r[['value', 'low', 'high']]) for k,r in point.iterrows()}
            out[f'{positives} positives of {positives+60}, shift {shift}'] = made,seen
            if shift==1.5:
                out[f'{positives} positives, probabilities'] = (lambda gen, made=made: calibrated(gen, made),
                    lambda d: {k: tuple(r[['value', 'low', 'high']])
                    for k,r in calibration_ci(*d, draws=DRAWS).iterrows()})
        def labels(gen, positives=positives):
            t = np.zeros((60+positives, 3))
            for c in range(3): t[gen.choice(len(t), positives, replace=False),c] = 1
            return t,gen.normal(size=t.shape) + 1.5*t
        out[f'three labels of {positives} positives'] = labels,lambda d: {'mean AUROC': tuple(
            label_table(*d, draws=DRAWS).loc['mean', ['auroc', 'auroc_low', 'auroc_high']])}
    return out


def calibrated(gen, made):
    "Targets of probabilities that are true."
    t,s = made(gen)
    p = norm.cdf(s - 1.5)
    return (gen.random(len(p))<p).astype(float),p


def figures(sets):
    "Every other figure of a report."
    rows = []
    for name,(make,seen) in cells().items():
        gen,found = np.random.default_rng([len(name), sum(map(ord, name))]),[]
        started = time.process_time()
        for _ in range(sets):
            try: found.append(seen(make(gen)))
            except Exception as e:
                if type(e).__name__!='DataError': raise
        truth = truths(name, make, gen, seen)
        for figure in found[0]:
            ends = np.array([o[figure] for o in found], float)
            ends = ends[~np.isnan(ends[:,1])]
            rows.append(dict(data=name, figure=figure, truth=truth[figure], held=np.mean(
                (ends[:,1]<=truth[figure]+1e-9) & (truth[figure]-1e-9<=ends[:,2])),
                width=np.mean(ends[:,2]-ends[:,1]),
                defined=len(ends)/sets))
        print(name, f'{time.process_time()-started:.0f} s', flush=True)
    table = pd.DataFrame(rows)
    shown = table.copy()
    for k in ('held', 'defined'): shown[k] = table[k].map('{:.1%}'.format)
    print(shown.to_string(index=False, float_format='{:.3f}'.format))


def truths(name, make, gen, seen):
    "Figures of a data set a thousand times as large, in parts that the machine holds."
    if name.startswith('share'): return {'mean_ci': float(name.split()[3].strip(','))}
    if name.startswith('Dice'): return {'mean Dice': 8/9.5*(1 - (.1 if '10%' in name else 0))}
    if name.startswith('grades'):
        t,s = graded(gen, 1_000_000, float(name.split()[1].strip('%'))/100)
        return {m.__name__: m(t, s) for m in (quadratic_kappa, balanced_accuracy, mcc)}
    if name.startswith('boxes'): return {k: v[0] for k,v in seen(boxes(gen, 6000, .9)).items()}
    if name.startswith('three'): return {'mean AUROC': norm.cdf(1.5/2**.5)}
    positives = int(name.split()[0])
    t = np.r_[np.ones(positives*2000), np.zeros(60*2000)]
    if 'probabilities' in name:
        p = norm.cdf(gen.normal(size=len(t)) + 1.5*t - 1.5)
        return {'ece': 0., 'brier': float(np.mean(p*(1-p))), 'slope': 1., 'intercept': 0., 'in the large': 0.}
    s = gen.normal(size=len(t)) + float(name.split()[-1])*t
    return {'average precision': average_precision(t, s)} | operating_point(t, s, 1.,
        draws=20).value.to_dict()


def tests(sets):
    "Type I error at 5 %: two models that are equally good and share half of their noise."
    rows = []
    for positives in (3, 5, 10, 50):
        for area in (.65, .76, .9):
            gen,p = np.random.default_rng([positives, int(100*area)]),[]
            shift = norm.ppf(area)*2**.5
            for _ in range(sets):
                t = np.r_[np.ones(positives), np.zeros(max(60, 2*positives))]
                shared = .5**.5*gen.normal(size=len(t)) + shift*t
                a,b = shared + .5**.5*gen.normal(size=(2, len(t)))
                p.append((delong_test(t, a, b).p, paired_bootstrap(average_precision, t, a, b, draws=DRAWS).p,
                    paired_bootstrap(MEAN, t, (a>shift/2)==(t>0), (b>shift/2)==(t>0), draws=DRAWS).p,
                    mcnemar_test(t, a>shift/2, b>shift/2).p))
            rows.append((positives, area, *np.mean(np.array(p)<.05, 0)))
    table = pd.DataFrame(rows, columns=['positives', 'AUROC', 'AUROC (delong_test)', 'average precision',
        'accuracy',
        'accuracy, exact (mcnemar_test)']).set_index(['positives', 'AUROC'])
    print(table.map('{:.1%}'.format).to_string())


if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='*', default=['auroc', 'figures', 'tests'])
    parser.add_argument('--sets', type=int, default=1000)
    args = parser.parse_args()
    for what in args.what: dict(auroc=auroc, figures=figures, tests=tests)[what](args.sets)
