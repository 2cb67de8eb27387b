"""The demonstration on simulated knees: does it tell a good recipe from a bad one?

    python benchmarks/demo.py [--out FOLDER] [--seed 0] [--sizes 128 64] [--recipes]

The same simulated hospital, the same split and the same settings, on stored images of each size, or (--recipes) at the first
size with one setting made worse at a time: batches as the classes come, a third of the epochs. AUROC of
fractured or not on the test patients with its interval, the paired difference of the first and each other, and the same among
the knees that are hard to read and among the others. A run that is there is not made again.
"""
import argparse
from pathlib import Path

import torch

from radiology_ai.demo import run_demo
from radiology_ai.metrics.ranking import auroc_ci, delong_test
from radiology_ai.preprocess.places import film_id
from radiology_ai.tables import load_table

WORSE = {'plain batches': {'min_per_class': 0}, 'a third of the epochs': {'epochs': 5}}


def judged(out: Path, seed: int, size: int, **settings):
    "The test predictions of a demonstration, with whether the knee is hard to read."
    if not (out/'report.html').exists(): run_demo(out, seed=seed, size=size, workers=1, **settings)
    t = load_table(out/'run'/'predictions.csv')
    truth = load_table(out/'hospital'/'truth.csv')
    t = t[t.split=='test'].assign(film=t.image_id.map(film_id)) # a film may show two knees
    films = truth[['image_id', 'subtle']].rename(columns={'image_id': 'film'})
    return t.merge(films, on='film', validate='many_to_one').sort_values('image_id', ignore_index=True)


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--out', type=Path, default=Path('demos'))
    parse.add_argument('--seed', type=int, default=0)
    parse.add_argument('--sizes', type=int, nargs='+', default=[128, 64])
    parse.add_argument('--recipes', action='store_true')
    args = parse.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    ways = {f'{n} px': (f'{args.seed}_{n}', n, {}) for n in args.sizes}
    if args.recipes:
        (first, (folder, size, _)), *_ = ways.items()
        ways = {first: ways[first]} | {name: (f'{folder}_{name.replace(" ", "_")}', size, worse)
            for name, worse in WORSE.items()}
    tables = {name: judged(args.out/folder, args.seed, n, **more) for name, (folder, n, more) in ways.items()}
    named, first = next(iter(tables.items()))
    for way, t in tables.items():
        assert t.image_id.equals(first.image_id)
        for name, some in (('all', t.subtle>=0), ('hard to read', t.subtle>0), ('others', t.subtle==0)):
            part = t[some]
            v = auroc_ci(part.target.to_numpy(), part.score.to_numpy(), part.patient_id.to_numpy())
            print(f'{way}, {name}: {len(part)} images of {part.patient_id.nunique()} patients, '
                f'{int(part.target.sum())} fractured, AUROC {v}')
        if t is not first:
            test = delong_test(first.target.to_numpy(), first.score.to_numpy(), t.score.to_numpy(),
                first.patient_id.to_numpy())
            print(f'{named} less {way}: {test.difference}, p {test.p:.3f}')


if __name__=='__main__': main()
