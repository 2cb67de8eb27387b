"""Chest triage at home and in a second simulated hospital (another scanner, exposure and post-processing): a run of the
`chest` task as it comes there, and adapted with a tenth of that hospital's patients.

    python benchmarks/chest_hospitals.py films --out FOLDER [--patients 1600 700] [--size 192]
    python benchmarks/chest_hospitals.py run --out FOLDER [--epochs 14] [--flat] [--start BUNDLE] [--pool both] [--lr .004]
    python benchmarks/chest_hospitals.py adapt --out FOLDER [--share .1] [--epochs 14]
    python benchmarks/chest_hospitals.py paired --out FOLDER

The mean AUROC is over the categories of the 32 that have at least ten positives and negatives among the films judged, with
intervals over patients. `--flat` trains the same without the
tree in the network (`hierarchy='flat'`); `paired` compares both on the same test patients, with what violates the tree.
`--start` begins with another network, such as that of `chest_outlines.py teach`; `--first` takes so many patients only.
"""
import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from radiology_ai.metrics.classification import label_table
from radiology_ai.phantom.hospital import simulate_chests
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.report.predictions import check_predictions
from radiology_ai.tasks.adapt import numeric_targets, paired_auroc
from radiology_ai.tasks.chest import CHEST, chest_start
from radiology_ai.tasks.registry import adapt, evaluate, train


def films(args):
    for hospital, n in zip('ab', args.patients):
        start = time.process_time()
        folder = args.out/hospital
        truth = simulate_chests(folder, n=n, seed=31, size=384, hospital=hospital, workers=1, masks=False)
        truth.to_csv(args.out/f'{hospital}.csv', index=False)
        store = preprocess_folder(folder, args.out/f'{hospital}_{args.size}', recipe('chest', size=args.size),
            workers=1, show=False)
        print(f'hospital {hospital}: {len(store)} films of {n} patients, {time.process_time()-start:.0f} s')


def run(args):
    start = time.process_time()
    labels = pd.read_csv(args.out/'a.csv')
    if args.first: labels = labels[labels.patient_id.isin(sorted(labels.patient_id.unique())[:args.first])]
    done = train('chest', args.out/f'a_{args.size}', labels, args.out/name(args), **chest_start()
        | ({'start': str(args.start)} if args.start else {})
        | dict(epochs=args.epochs, head_epochs=args.head_epochs, lr=args.lr, body_div=1., bs=16, augment=1.,
        pool=args.pool,
            hierarchy='flat' if args.flat else 'max'))
    print(f'{time.process_time()-start:.0f} s of processor')
    for line in evaluate(done).lines(): print(line)
    told('home', evaluate(done))
    told('second hospital as it comes', evaluate(done, args.out/f'b_{args.size}', args.out/'b.csv'))


def name(args) -> str: return 'flat' if args.flat else 'tree'


def told(what: str, evaluation):
    "The mean AUROC over categories with at least ten positives and negatives."
    seen = check_predictions(numeric_targets(evaluation.table))
    enough = (np.nansum(seen.targets, 0)>=10) & (np.nansum(1-seen.targets, 0)>=10)
    names = [n for n, k in zip(seen.labels, enough) if k]
    row = label_table(seen.targets[:, enough], seen.scores[:, enough], names, seen.patients).iloc[-1]
    print(f'{what}: {len(seen.targets)} films, {len(names)} categories with at least ten of each: mean AUROC '
        f'{row.auroc:.3f} ({row.auroc_low:.3f} to {row.auroc_high:.3f})', flush=True)


def paired(args):
    "With the tree in the network less flat, on the test patients at home and in the second hospital."
    runs = [args.out/k for k in ('tree', 'flat')]
    for place, data in (('home', ()), ('second hospital', (args.out/f'b_{args.size}', args.out/'b.csv'))):
        both = [evaluate(r, *data) for r in runs]
        d = paired_auroc(*both)
        print(f"{place}: tree less flat, mean AUROC {d['value']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})")
        tree = CHEST.settings().tree()
        for r, e in zip(('tree', 'flat'), both):
            names = [n for n in tree.names if f'p_{n}' in e.table]
            above = [(n, tree.parents[tree.names.index(n)]) for n in names]
            pairs = [(n, q) for n, q in above if q in names]
            wrong = np.any([e.table[f'p_{n}']>e.table[f'p_{q}'] for n, q in pairs], 0)
            print(f'    {r}: films of which some category is above its parent {wrong.mean():.3f}')


def adapted(args):
    done = adapt(args.out/name(args), args.out/f'b_{args.size}', args.out/'b.csv',
        args.out/f'adapted_{args.share}',
        share=args.share, replay=.3, say=print, epochs=args.epochs)
    for line in done.lines(): print(line)
    for k in ('old', 'new'):
        told(f'{k} hospital, before', done.before[k])
        told(f'{k} hospital, after', done.after[k])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('films', 'run', 'adapt', 'paired'))
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--patients', nargs=2, type=int, default=[1600, 700])
    parser.add_argument('--size', type=int, default=192)
    parser.add_argument('--epochs', type=int, default=14)
    parser.add_argument('--share', type=float, default=.1)
    parser.add_argument('--flat', action='store_true')
    parser.add_argument('--start', type=Path)
    parser.add_argument('--pool', default='avg')
    parser.add_argument('--lr', type=float, default=4e-3)
    parser.add_argument('--head-epochs', type=int)
    parser.add_argument('--first', type=int)
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    {'films': films, 'run': run, 'adapt': adapted, 'paired': paired}[args.what](args)


if __name__=='__main__': main()
