"""One process and two on the same machine: what a shared batch saves.

    python benchmarks/processes.py [--arch resnet18] [--sizes 128 224] [--images 192] [--bs 32] [--repeats 3]

Random grey images with random labels in memory, an epoch of training by `xray_learner` with one thread a process, alone and by
`torchrun --nproc-per-node 2`; the runs take turns. Printed is the wall-clock time of the second epoch, which holds neither the
start of the processes nor their imports, as the median over the repeats, its ratio with the smallest and largest of the pairs,
and the processor time of the first process.
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


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--arch', default='resnet18')
    parse.add_argument('--sizes', type=int, nargs='+', default=[128, 224])
    for name, value in dict(images=192, bs=32, repeats=3).items():
        parse.add_argument(f'--{name}', type=int, default=value)
    parse.add_argument('--store', help='of the images that a process is given: for the processes that this script starts')
    args = parse.parse_args()
    if args.store: return work(args)
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
