"""One process and two on the same machine: what a shared batch saves, and whether the figures are the same.

    python benchmarks/processes.py [--arch resnet18] [--sizes 128 224] [--images 192] [--bs 32] [--repeats 3]
    python benchmarks/processes.py --figures FOLDER [--seeds 5]

Random grey images with random labels in memory, an epoch of training by `xray_learner` with one thread a process, alone and by
`torchrun --nproc-per-node 2`; the runs take turns. Printed is the wall-clock time of the second epoch, which holds neither the
start of the processes nor their imports, as the median over the repeats, its ratio with the smallest and largest of the pairs,
and the processor time of the first process.

`--figures`: three classes of `chest_child` as `search.py --out FOLDER` has prepared them, the same training with each seed in
one process and in two; mean AUROC over the classes on test patients (each seed has its own split), the difference of the two
with the same seed, and the spread over the seeds.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from radiology_ai.core import rng, save_picture
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder

ALONE, TWO = [sys.executable], [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']


def films(folder: Path, n: int, size: int):
    "A store of random grey images."
    gen = rng(0, 'films')
    (folder/'png').mkdir()
    for i in range(n): save_picture(folder/'png'/f'{i:04d}.png', gen.integers(0, 256, (size, size), dtype=np.uint8))
    preprocess_folder(folder/'png', folder/'store', recipe('plain', size=size), workers=1, show=False)


def work(args):
    "The time of an epoch in this process, printed by the first one."
    import pandas as pd
    import torch
    from fastai.callback.core import Callback

    from radiology_ai.data.load import xray_dataloaders
    from radiology_ai.preprocess.store import ImageStore
    from radiology_ai.train.distributed import Distributed
    from radiology_ai.train.learner import xray_learner
    from radiology_ai.train.ranks import is_first
    torch.set_num_threads(1)

    class Clock(Callback):
        several, laps = True, []
        def before_train(self): self.laps.append([time.perf_counter(), time.process_time()])
        def after_train(self):
            self.laps[-1] = [time.perf_counter() - self.laps[-1][0], time.process_time() - self.laps[-1][1]]

    store = ImageStore(args.store)
    rows = pd.DataFrame({'image_id': store.index.image_id, 'patient_id': store.index.image_id})
    rows = rows.assign(split=['train']*args.images + ['valid']*8, label=rng(1, 'labels').integers(0, 2, len(rows)))
    dls = xray_dataloaders(store, rows, 'label', bs=args.bs, sampler=None)
    clock = Clock()
    learn = xray_learner(dls, args.arch, pretrained=False, show=False, cbs=[Distributed(), clock])
    learn.fit(2)
    if is_first(): print(json.dumps(clock.laps[-1]), flush=True)


def fitted(args):
    "A training of which this process may be one of several."
    from search import CHILD

    from radiology_ai.preprocess.store import ImageStore
    from radiology_ai.tasks.registry import train
    train(CHILD, ImageStore(args.store), args.figures/'labels.csv', args.into, arch='test_resnet', pretrained=False,
        body_div=1., epochs=8, seed=args.seed)


def mean_auroc(run: Path) -> float:
    "Over the classes, of the test patients of a run."
    from radiology_ai.metrics.ranking import auroc
    from radiology_ai.tables import load_table
    t = load_table(run/'predictions.csv')
    t = t[t.split=='test']
    return float(np.mean([auroc(t[c[2:]].to_numpy(), t[c].to_numpy()) for c in t if c.startswith('p_')]))


def figures(args, told: dict):
    "The figures of each seed in one process and in two."
    found = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as tmp:
        for seed in range(args.seeds):
            for n, launcher in ((1, ALONE), (2, TWO)):
                run = Path(tmp)/f'{n}_{seed}'
                done = subprocess.run([*launcher, __file__, '--figures', args.figures, '--store', args.figures/'store',
                    '--into', run, '--seed', str(seed)], env=told, capture_output=True, text=True)
                if done.returncode: sys.exit(done.stderr[-2000:])
                found[n].append(mean_auroc(run))
                print(f'seed {seed}, {n} processes: mean AUROC {found[n][-1]:.4f}', flush=True)
    one, two = np.array(found[1]), np.array(found[2])
    print(f'one process {one.mean():.4f} (spread {one.std(ddof=1):.4f}), two {two.mean():.4f} (spread {two.std(ddof=1):.4f}); '
        f'two less one with the same seed {(two-one).mean():+.4f}, from {(two-one).min():+.4f} to {(two-one).max():+.4f}')


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--arch', default='resnet18')
    parse.add_argument('--sizes', type=int, nargs='+', default=[128, 224])
    for name, value in dict(images=192, bs=32, repeats=3).items():
        parse.add_argument(f'--{name}', type=int, default=value)
    parse.add_argument('--store', help='of the images that a process is given: for the processes that this script starts')
    parse.add_argument('--figures', type=Path)
    parse.add_argument('--seeds', type=int, default=5)
    for name in ('into', 'seed'): parse.add_argument(f'--{name}', help='likewise')
    args = parse.parse_args()
    if args.into:
        args.seed = int(args.seed)
        return fitted(args)
    if args.store: return work(args)
    if args.figures: return figures(args, {**os.environ, 'OMP_NUM_THREADS': '1'})
    own = [__file__, *sum(([f'--{k}', str(getattr(args, k))] for k in ('arch', 'images', 'bs')), [])]
    told = {**os.environ, 'OMP_NUM_THREADS': '1'}
    for size in args.sizes:
        laps = {1: [], 2: []}
        with tempfile.TemporaryDirectory() as tmp:
            films(Path(tmp), args.images + 8, size)
            for _ in range(args.repeats):
                for n, launcher in ((1, ALONE), (2, TWO)):
                    done = subprocess.run([*launcher, *own, '--store', f'{tmp}/store'], env=told,
                        capture_output=True, text=True)
                    if done.returncode: sys.exit(done.stderr[-2000:])
                    laps[n].append(json.loads(done.stdout.strip().splitlines()[-1]))
        one, two = (np.array(laps[n]) for n in (1, 2))
        pairs = one[:, 0]/two[:, 0]
        print(f'{args.arch}, {size} pixels: one process {np.median(one[:, 0]):.2f} s, two {np.median(two[:, 0]):.2f} s, '
            f'{np.median(pairs):.2f} times as fast ({pairs.min():.2f} to {pairs.max():.2f} of {len(pairs)} pairs); '
            f'processor time of the first {np.median(one[:, 1]):.2f} and {np.median(two[:, 1]):.2f} s', flush=True)


if __name__=='__main__': main()
