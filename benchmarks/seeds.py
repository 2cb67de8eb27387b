"""Intervals over seeds, or draws of labels, that hold with three to five of them. A percentile bootstrap of so few values
covers 74 to 83 % where it says 95: the spread is too small by a factor of sqrt((n-1)/n), and the tails are those of the normal
distribution. Here the interval is Student's, the variance of what all seeds share (the test patients) is added to
that over seeds, and p-values are corrected for the number of comparisons by Holm's method.

    python benchmarks/seeds.py [--sets 20000]

prints the coverage by simulation: differences over seeds that are normal, even or skewed, with and without shared
test patients.
"""
import argparse
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from radiology_ai.core import rng
from radiology_ai.metrics.compare import holm


class Gain(NamedTuple):
    "A mean difference over seeds with its interval and p-value."
    value: float
    low: float
    high: float
    p: float   # of no difference on average, two-sided
    seeds: int
    def __str__(self): return f'{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})'


def over_seeds(
    each,                # (S,) difference to the same seed's baseline
    shared: float=0.,    # variance of their mean by what all seeds share: `shared_variance`
    units: int=0,        # number of patients that `shared` comes from
    level: float=.95,    # confidence
) -> Gain:
    """The mean over seeds with Student's interval; with `shared`, the degrees of freedom of the sum of both variances
    are Satterthwaite's."""
    d = np.asarray(each, float)
    if d.ndim!=1 or len(d)<2 or not np.isfinite(d).all():
        raise ValueError(f'{d} tell nothing about other seeds: give at least two finite values')
    own = d.var(ddof=1)/len(d)
    se = np.sqrt(own+shared)
    if se==0: return Gain(d.mean(), d.mean(), d.mean(), float(d.mean()==0), len(d))
    df = (own+shared)**2/(own**2/(len(d)-1) + (shared**2/(units-1) if units>1 else 0))
    half = student.ppf(.5+level/2, df)*se
    return Gain(d.mean(), d.mean()-half, d.mean()+half, float(2*student.sf(abs(d.mean())/se, df)), len(d))


def shared_variance(
    figure,        # f(rows) -> (S,) difference of each seed on these test rows
    patients,      # (N,) patient of each test row
    draws: int=1000,
    seed: int=0,
) -> float:
    "Variance of the mean over the seeds when the test patients are drawn anew, the seeds being as they are."
    codes,names = np.unique(np.asarray(patients), return_inverse=True)[::-1]
    order = np.argsort(codes, kind='stable')
    of,gen = np.split(order, np.cumsum(np.bincount(codes))[:-1]),rng(seed, 'patients')
    return float(np.var([np.mean(figure(np.concatenate([of[k]
        for k in gen.integers(len(names), size=len(names))])))
        for _ in range(draws)], ddof=1))


def compared(
    gains: dict, # name: Gain, all comparisons of the same table
) -> dict:
    "name: text with value, interval and p after Holm's correction, and 'not established' from .05 on."
    p = dict(zip(gains, holm([g.p for g in gains.values()])))
    return {k: f'{g}, p = {p[k]:.2g} after Holm over {len(gains)}' + ('' if p[k]<.05 else ': not established')
        for k,g in gains.items()}


# ---------------------------------------------------------------- does it cover?

KINDS = {'normal': lambda gen, n: gen.standard_normal(n), 'even': lambda gen, n: gen.uniform(-1, 1, n)*3**.5,
    'skewed': lambda gen, n: (gen.gamma(8, size=n)-8)/8**.5} # skewness .7


def coverage(seeds: int, kind: str='normal', share: float=0., sets: int=20_000, patients: int=300) -> dict:
    """Share of `sets` simulated experiments whose interval holds the true mean, of Student's and of a percentile
    bootstrap; `share` of the variance of the mean comes from the test patients."""
    gen = rng(seeds, 'coverage', kind, str(share))
    own = KINDS[kind](gen, (sets, seeds))*np.sqrt(seeds*(1-share))
    patient = gen.standard_normal(sets)*np.sqrt(share)
    known = share*gen.chisquare(patients-1, sets)/(patients-1)
    each = own + patient[:,None]
    hit = [g.low<=0<=g.high for g in (over_seeds(d, v, patients if share else 0) for d,v in zip(each, known))]
    many = each[:2000]
    drawn = np.stack([np.take_along_axis(many, gen.integers(seeds, size=many.shape), 1).mean(1)
        for _ in range(1000)])
    drawn = drawn + gen.standard_normal(drawn.shape)*np.sqrt(known[:2000])
    low,high = np.quantile(drawn, [.025, .975], axis=0)
    return dict(student=float(np.mean(hit)), bootstrap=float(np.mean((low<=0) & (high>=0))))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sets', type=int, default=20_000)
    args = parser.parse_args()
    print('seeds  differences  from patients  Student  percentile bootstrap')
    for kind in KINDS:
        for share in (0., .5):
            for n in (3, 4, 5):
                c = coverage(n, kind, share, args.sets)
                print(f'{n:5d}  {kind:11s}  {share:13.0%}  {c["student"]:7.1%}  {c["bootstrap"]:20.1%}',
                    flush=True)


if __name__=='__main__': main()
