"""How fast are the intervals of classification metrics, and do they hold what they promise?

    python benchmarks/metrics.py [speed] [coverage] [--images 25596] [--sets 1000] [--peer 3] [--rounds 3]

speed:    intervals of 25,596 x 14 AUROCs from 1,000 draws of patients (scores of three decimals, so that many tie), beside
          scikit-learn in a loop over labels and draws. The loop is measured on `--peer` draws and scaled up. The AUROCs of those
          draws are compared. Then DeLong's intervals for all labels, and the whole `label_table` with operating points. Medians of
          `--rounds` rounds; clock and processor seconds.
coverage: how often the 95 % intervals hold the truth in `--sets` simulated data sets, with one image a patient and with several
          that resemble each other.
"""
import argparse
import time
from statistics import NormalDist

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from radiology_ai.core import rng
from radiology_ai.metrics.classification import auroc_table, label_table
from radiology_ai.metrics.compare import mcnemar_test, paired_bootstrap
from radiology_ai.metrics.intervals import Draws, bootstrap_ci
from radiology_ai.metrics.operating import PROPORTIONS, operating_point
from radiology_ai.metrics.ranking import Ranked, auroc, auroc_ci, average_precision, delong_test

# positives among the test images of ChestX-ray14
SHARES = (.1, .042, .18, .238, .068, .063, .022, .104, .071, .036, .043, .017, .045, .003)


def chest_scores(n: int, seed: int=0):
    "Targets and scores (N, 14) and patients, about nine images each."
    gen = rng(seed, 'benchmark')
    patients = np.sort(gen.integers(0, max(2, n//9), n))
    t = (gen.random((n, len(SHARES)))<SHARES).astype(float)
    return t,np.round(gen.normal(size=t.shape) + .6*gen.normal(size=(patients.max()+1, len(SHARES)))[patients]
        + 1.2*t, 3),patients


def timed(run, rounds: int):
    "Median seconds by the clock and of the processor, and the last result."
    taken = []
    for _ in range(rounds):
        clock,cpu = time.perf_counter(),time.process_time()
        out = run()
        taken.append((time.perf_counter()-clock, time.process_time()-cpu))
    return *np.median(taken, 0),out


def speed(args):
    t,s,patients = chest_scores(args.images)
    labels = range(t.shape[1])
    draws = Draws(patients, draws=1000)
    w = next(iter(draws))[:,:args.peer]
    ours,cpu,table = timed(lambda: auroc_table(t, s, groups=patients, method='bootstrap'), args.rounds)
    rows = [np.repeat(np.arange(len(t)), o.astype(int)) for o in w.T]
    peers = {'rows copied': lambda: [[roc_auc_score(t[i,c], s[i,c]) for i in rows] for c in labels],
        'sample_weight': lambda: [[roc_auc_score(t[:,c], s[:,c], sample_weight=o) for o in w.T]
        for c in labels]}
    fast = np.array([Ranked(t[:,c], s[:,c]).auroc(w) for c in labels])
    print(f"{args.images} images x {len(SHARES)} labels, {draws.patients} patients, {len(np.unique(s[:,0]))} "
        "distinct scores of the first label")
    print(f"1,000 draws, intervals of all AUROCs: {ours:.2f} s ({cpu:.2f} s of processor)")
    for name,peer in peers.items():
        theirs,their_cpu,slow = timed(peer, args.rounds)
        print(f"scikit-learn with {name}, {args.peer} draws scaled: {theirs*1000/args.peer:.0f} s "
            f"({their_cpu*1000/args.peer:.0f}): {theirs*1000/args.peer/ours:.0f} x, by processor {their_cpu*1000/args.peer/cpu:.0f} x; "
              f"largest difference of the AUROCs of the same draws {np.abs(fast-slow).max():.1e}")
    clock,cpu,delong = timed(lambda: auroc_table(t, s, groups=patients), args.rounds)
    print(f"DeLong, clustered by patient, all labels: {1000*clock:.0f} ms ({1000*cpu:.0f}); half widths "
        f"differ from the bootstrap's by at most {np.abs((delong.high-delong.low)/(table.high-table.low) - 1).max():.0%}")
    clock,cpu,_ = timed(lambda: auroc_table(t, s), args.rounds)
    print(f"DeLong, each image on its own: {1000*clock:.0f} ms ({1000*cpu:.0f})")
    clock,cpu,_ = timed(lambda: label_table(t, s, groups=patients, thresholds=1.), args.rounds)
    print(f"label_table (AUROC, AP, operating points, means; 1,000 draws): {clock:.2f} s ({cpu:.2f})")


def data_set(seed: int, patients: int, images: int, labels: int=1):
    """Targets, scores of two models (N, labels) and patients with 1 to 2 `images` - 1 images each; the images
    of a patient share half of the variance of their scores and tend to share the target."""
    gen = rng(seed, 'coverage', patients, images)
    g = np.repeat(np.arange(patients), gen.integers(1, 2*images, patients))
    n = len(g)
    ill = gen.normal(size=(patients, labels))[g]*(images>1)
    t = (ill + gen.normal(size=(n, labels))*(1 if images>1 else 2**.5)>.7).astype(float)
    own = gen.normal(size=patients)[g][:,None]
    a,b = (1.1*t + .5**.5*own + .3**.5*base + .2**.5*gen.normal(size=t.shape)
        for base in [gen.normal(size=t.shape)]*2)
    return t,a,b,g


def intervals(t, a, b, g) -> dict:
    "The intervals that are tested; all 95 %."
    y,s = t[:,0],a[:,0]
    op = operating_point(y, s, .7, g)
    out = {'AUROC, DeLong': auroc_ci(y, s, g)[1:],
        'AUROC, bootstrap': auroc_ci(y, s, g, method='bootstrap')[1:],
        'AP, bootstrap': bootstrap_ci(average_precision, y, s, g)[1:],
           'mean AUROC of 3 labels, bootstrap': tuple(label_table(t, a, groups=g).loc['mean',
           ['auroc_low','auroc_high']]),
           'AUROC difference, DeLong': delong_test(y, s, b[:,0], g).difference[1:],
           'AUROC difference, bootstrap': paired_bootstrap(auroc, y, s, b[:,0], g).difference[1:],
           'accuracy difference (McNemar)': mcnemar_test(y, s>.7, b[:,0]>.7, g).difference[1:]}
    return out | {of_method(k): tuple(op.loc[k, ['low','high']]) for k in op.index}


def of_method(figure: str) -> str:
    "The figure with the way its interval is made."
    return f"{figure}, {'Wilson' if figure in PROPORTIONS else 'bootstrap'}"


def truths(images: int) -> dict:
    "What the intervals should hold: the figures of a very large data set."
    t,a,_,g = data_set(10**6, 400_000, images, 3)
    op = operating_point(t[:,0], a[:,0], .7, draws=20).value
    area = NormalDist().cdf(1.1/2**.5)
    out = {'AUROC, DeLong': area, 'AUROC, bootstrap': area,
        'AP, bootstrap': average_precision(t[:,0], a[:,0]), 'mean AUROC of 3 labels, bootstrap': area,
           'AUROC difference, DeLong': 0, 'AUROC difference, bootstrap': 0,
           'accuracy difference (McNemar)': 0}
    return out | {of_method(k): op[k] for k in op.index}


def coverage(args):
    out = {}
    for name,patients,images in (('200 patients, one image each', 200, 1),
            ('100 patients, 1 to 5 images', 100, 3)):
        truth,hits = truths(images),[]
        for seed in range(args.sets):
            found = intervals(*data_set(seed, patients, images, 3))
            hits.append({k: low<=truth[k]<=high for k,(low,high) in found.items()})
        out[name] = pd.DataFrame(hits).mean()
    print(f"share of {args.sets} simulated data sets whose 95 % interval holds the truth (binomial error {(.95*.05/args.sets)**.5:.1%})")
    print(pd.DataFrame(out).map('{:.1%}'.format).to_string())


if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='*', default=['speed', 'coverage'])
    for name,value in (('images', 25_596), ('sets', 1000), ('peer', 3), ('rounds', 3)):
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args()
    for what in args.what: dict(speed=speed, coverage=coverage)[what](args)
