"""How fast are the intervals of classification metrics? (`coverage.py` says what they hold.)

    python benchmarks/metrics.py [speed] [--images 25596] [--peer 3] [--rounds 3]

speed:    intervals of 25,596 x 14 AUROCs from 1,000 draws of patients (scores of three decimals, so that many tie), beside
          scikit-learn in a loop over labels and draws. The loop is measured on `--peer` draws and scaled up. The AUROCs of those
          draws are compared. Then DeLong's intervals for all labels, and the whole `label_table` with operating points. Medians of
          `--rounds` rounds; clock and processor seconds.
"""
import argparse
import time

import numpy as np
from sklearn.metrics import roc_auc_score

from radiology_ai.core import rng
from radiology_ai.metrics.classification import auroc_table, label_table
from radiology_ai.metrics.intervals import Draws
from radiology_ai.metrics.ranking import Ranked

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


if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='*', default=['speed'])
    for name,value in (('images', 25_596), ('peer', 3), ('rounds', 3)):
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args()
    for what in args.what: dict(speed=speed)[what](args)
