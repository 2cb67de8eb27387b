"""Does active learning pay? Real chests of children (normal or pneumonia), labels hidden and given out in
rounds, each strategy against random picks over several seeds.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/active.py [--seeds 5] [--strategies random,entropy,...]

`chest_child` (Kermany 2018) at 48 pixels; patients divided once into 68 % pool, 30 % test and 2 % of which
nothing is made. A small network (resnet10t, random weights)
is trained anew after each round, for a fixed number of steps, and its last weights are judged by the AUROC on
the test patients. The goal is the mean AUROC with all labels less 0.02.
Each seed has its own first labels, weights and order of batches; the strategies share them. Labels needed are
interpolated between rounds; a seed that never reaches the goal counts as infinite. The mean AUROC over the rounds is
compared with that of random picks over the seeds (benchmarks/seeds.py), corrected for the number of strategies.
"""
import os

for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[k] = '1'
import argparse
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import seeds

SIZE, BS = 48, 16


def manifest_of(data: Path, store):
    "The manifest of the stored images with `pneumonia` and a split by patients."
    from radiology_ai.data.split import patient_split
    table = pd.read_csv(data/'chest_child/manifest.csv')
    index = store.index.assign(name=store.index.path.map(lambda p: Path(p).name))
    df = index.merge(table.assign(name=table.path.map(lambda p: Path(p).name))[['name', 'labels',
        'patient_group']], on='name')
    df = df.assign(patient_id=df.patient_group.astype(str),
        pneumonia=(~df.labels.str.lower().str.contains('normal')).astype(int))
    return patient_split(df[['image_id', 'path', 'patient_id', 'study_id', 'view', 'laterality',
        'pneumonia']].assign(study_id=''), {'train': .68, 'valid': .02, 'test': .3}, 'pneumonia', seed=0)


def run(job):
    "The curve of one strategy and seed, or the AUROC with all labels."
    store, data, strategy, seed = job[:4]
    start, step, rounds, steps = job[4:]
    import torch
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    from radiology_ai.data.load import xray_dataloaders, xray_test_dl
    from radiology_ai.metrics.ranking import auroc
    from radiology_ai.preprocess.store import ImageStore
    from radiology_ai.train.learner import predict_probabilities, xray_learner
    from radiology_ai.weak.active import simulate_active
    store = ImageStore(store)
    df = manifest_of(Path(data), store)
    test = df[df.split=='test']
    def train(manifest, seed):
        dls = xray_dataloaders(store, manifest, 'pneumonia', bs=BS, seed=seed, vocab=[0, 1])
        learn = xray_learner(dls, 'resnet10t', pretrained=False, seed=seed, monitor=None)
        return learn.fit_two_phase(max(1, round(steps/len(dls.train))))
    def evaluate(learn):
        return float(auroc(test.pneumonia.to_numpy(),
            predict_probabilities(learn, xray_test_dl(learn.dls, test))[0][:, 1]))
    if strategy=='all':
        return pd.DataFrame([('all', seed, int((df.split=='train').sum()), evaluate(train(df, seed)))],
            columns=['strategy', 'seed', 'labels', 'value'])
    return simulate_active(df, 'pneumonia', train, evaluate, strategy, start=start, step=step, rounds=rounds,
        seed=seed)


def main():
    from radiology_ai.preprocess.recipe import recipe
    from radiology_ai.preprocess.scale import preprocess_folder
    from radiology_ai.weak.active import STRATEGIES, labels_needed
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--strategies', default=','.join(STRATEGIES))
    parser.add_argument('--start', type=int, default=60, help="labels at the beginning")
    parser.add_argument('--step', type=int, default=80, help="labels a round")
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=100, help='batches of a training')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--out', type=Path, help='a CSV for the curves')
    args = parser.parse_args()
    data = os.environ.get('RADIOLOGY_AI_REAL_DATA')
    if not data: raise SystemExit('RADIOLOGY_AI_REAL_DATA is not set')
    with tempfile.TemporaryDirectory() as folder:
        store = preprocess_folder(Path(data)/'chest_child/images', Path(folder)/'store',
            recipe('chest', size=SIZE), workers=args.workers, show=False)
        size = args.start, args.step, args.rounds, args.steps
        jobs = [(str(store.path), data, s, seed, *size) for s in ['all', *args.strategies.split(',')]
            for seed in range(args.seeds)]
        out = []
        with ProcessPoolExecutor(args.workers, mp_context=get_context('spawn')) as pool:
            for r in pool.map(run, jobs):
                out.append(r)
                print(f'{r.strategy[0]:9s} seed {r.seed[0]}: '
                    + ' '.join(f'{n}:{v:.3f}' for n, v in zip(r.labels, r.value)), flush=True)
    t = pd.concat(out, ignore_index=True)
    if args.out: t.to_csv(args.out, index=False)
    full = t[t.strategy=='all']
    goal = full.value.mean() - .02
    print(f'\nall {full.labels.iloc[0]} labels: AUROC {full.value.mean():.3f} (seeds {full.value.min():.3f} '
        f'to {full.value.max():.3f}); goal {goal:.3f}\n')
    need = {s: [labels_needed(c, goal) for _, c in g.groupby('seed')]
        for s, g in t[t.strategy!='all'].groupby('strategy', sort=False)}
    base = np.array(need.get('random', []))
    for s, n in need.items():
        n, area = np.array(n), t[t.strategy==s].groupby('seed').value.mean()
        better = (f', fewer than random in {int((n<base).sum())} of {len(n)} seeds' if len(base)
            and s!='random' else '')
        print(f'{s:9s} labels needed: median {np.median(n):.0f} '
            f'({", ".join("never" if np.isinf(v) else f"{v:.0f}" for v in sorted(n))}){better}; mean AUROC '
            f'over the rounds {area.mean():.3f} (SD over seeds {area.std():.3f}; each '
            f'{" ".join(f"{v:.4f}" for v in area)})')
    area = t[t.strategy!='all'].groupby(['strategy', 'seed']).value.mean().unstack()
    if 'random' in area.index and args.seeds>1:
        gains = {s: seeds.over_seeds(v-area.loc['random']) for s, v in area.iterrows() if s!='random'}
        for s, text in seeds.compared(gains).items(): print(f'{s:9s} against random: {text}')


if __name__=='__main__': main()
