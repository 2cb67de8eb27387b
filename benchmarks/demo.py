"""The demonstration on simulated knees: does it tell a good recipe from a bad one?

    python benchmarks/demo.py [--out FOLDER] [--seed 0] [--sizes 128 64]

The same simulated hospital, the same split and the same settings, on stored images of each size; AUROC of fractured or not on
the test patients with its interval, the paired difference of the first size and each other, and the same among the knees that
are hard to read and among the others. A run that is there is not made again.
"""
import argparse
from pathlib import Path

import torch

from radiology_ai.demo import run_demo
from radiology_ai.metrics.ranking import auroc_ci, delong_test
from radiology_ai.preprocess.places import film_id
from radiology_ai.tables import load_table


def judged(out: Path, seed: int, size: int):
    "The test predictions of a demonstration, with whether the knee is hard to read."
    if not (out/'report.html').exists(): run_demo(out, seed=seed, size=size, workers=1)
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
    args = parse.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    tables = {n: judged(args.out/f'{args.seed}_{n}', args.seed, n) for n in args.sizes}
    first = tables[args.sizes[0]]
    for n, t in tables.items():
        assert t.image_id.equals(first.image_id)
        for name, some in (('all', t.subtle>=0), ('hard to read', t.subtle>0), ('others', t.subtle==0)):
            part = t[some]
            v = auroc_ci(part.target.to_numpy(), part.score.to_numpy(), part.patient_id.to_numpy())
            print(f'{n} px, {name}: {len(part)} images of {part.patient_id.nunique()} patients, '
                f'{int(part.target.sum())} fractured, AUROC {v}')
        if t is not first:
            test = delong_test(first.target.to_numpy(), first.score.to_numpy(), t.score.to_numpy(),
                first.patient_id.to_numpy())
            print(f'{args.sizes[0]} px less {n} px: {test.difference}, p {test.p:.3f}')


if __name__=='__main__': main()
