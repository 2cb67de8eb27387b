"""Real chests, trained from random weights: radiology_ai beside fastai's vision_learner with its own
transforms, on the same images, splits, network and epochs.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/chest_training.py [child] [nih] [labels]
        [--seeds 3] [--epochs 8] [--size 96]

child:  paediatric chests (Kermany 2018), pneumonia or normal.   nih: ChestX-ray14, any finding or none.
        labels: its findings with 40 positives or more, several labels.
Patients are divided once, 55 to 15 to 30 %. Both train a resnet18 from random weights for the same epochs and keep
their last one; the number of images that each has seen is printed. Time is from the image files to the trained
network on both sides: our preprocessing counts in full for every seed. Each seed has other weights, batches
and draws. The intervals are over seeds and test patients (benchmarks/seeds.py); p is corrected for the tasks.
"""
import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import seeds
import torch
from fastai.losses import BCEWithLogitsLossFlat
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
    ColSplitter,
    DataBlock,
    ImageBlock,
    MultiCategoryBlock,
    Resize,
    aug_transforms,
    resnet18,
    set_seed,
    vision_learner,
)

from radiology_ai.data.load import xray_dataloaders, xray_test_dl
from radiology_ai.data.split import patient_split
from radiology_ai.metrics.ranking import auroc
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.train.learner import predict_probabilities, xray_learner
from radiology_ai.vision.augment import BatchAugment

DATA = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])
FINDINGS = ('Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation '
    'Edema Emphysema Fibrosis Pleural_Thickening Hernia').split()


def table(task: str) -> tuple[pd.DataFrame, list, Path]:
    "The images with patient, labels and split; the label columns; the folder."
    folder = DATA/('chest_child' if task=='child' else 'chest_nih')
    t = pd.read_csv(folder/'manifest.csv')
    if task=='child':
        t = t.assign(patient_id=t.patient_group.astype(str), y=(t.binary!='NORMAL').astype(float))
    else: t = t.assign(patient_id=t.patient_id.astype(str), y=(t[FINDINGS].sum(1)>0).astype(float))
    labels = [c for c in FINDINGS if t[c].sum()>=40] if task=='labels' else ['y']
    t = patient_split(t.assign(image_id=t.path)[['image_id', 'path', 'patient_id', *labels]],
        {'train': .55, 'valid': .15, 'test': .3}, labels, seed=0)
    return t, labels, folder


def ours(t, labels, folder, args, seed, *, store):
    "Scores (N, C) of the test images, the seconds of training, and the images seen."
    ids = dict(zip(store.index.path.map(lambda p: Path(p).name), store.index.image_id))
    t = t.assign(image_id=t.path.map(lambda p: ids[Path(p).name]))
    what = labels if len(labels)>1 else labels[0]
    aug = BatchAugment(rotation=10, translation=.06, scale=(.9, 1.1), brightness=.1, contrast=.2,
        gamma=(.8, 1.25), noise=.02, seed=seed)
    dls = xray_dataloaders(store, t, what, bs=32, batch_tfms=[aug], seed=seed)
    learn = xray_learner(dls, 'resnet18', pretrained=False, seed=seed, monitor=None)
    start = time.perf_counter()
    learn.fit_two_phase(args.epochs)
    seconds = time.perf_counter()-start
    p = predict_probabilities(learn, xray_test_dl(dls, t[t.split=='test']))[0]
    return (p if len(labels)>1 else p[:, 1:]), seconds, args.epochs*len(dls.train)*dls.train.bs


def plain(t, labels, folder, args, seed, *, store):
    "The same of a plain fastai learner."
    several = len(labels)>1
    rows = t[t.split!='test'].assign(is_valid=lambda d: d.split=='valid',
        words=lambda d: [' '.join(c for c in labels if r[c]==1) if several else str(int(r['y']))
        for r in d.to_dict('records')])
    set_seed(seed)
    block = DataBlock(blocks=(ImageBlock, MultiCategoryBlock(vocab=labels) if several else CategoryBlock),
        get_x=ColReader('path', pref=f'{folder}/'),
        get_y=ColReader('words', label_delim=' ' if several else None),
        splitter=ColSplitter('is_valid'), item_tfms=Resize(args.size), batch_tfms=aug_transforms())
    dls = block.dataloaders(rows, bs=32, num_workers=0)
    learn = vision_learner(dls, resnet18, pretrained=False,
        **(dict(loss_func=BCEWithLogitsLossFlat(), metrics=[]) if several else {}))
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(args.epochs)
        seconds = time.perf_counter()-start
        p = learn.get_preds(dl=dls.test_dl(t[t.split=='test']))[0].numpy()
    return (p if several else p[:, 1:]), seconds, args.epochs*len(dls.train)*dls.train.bs


def mean_auroc(y, p) -> float:
    each = [auroc(y[:, k], p[:, k]) for k in range(y.shape[1]) if 0<y[:, k].sum()<len(y)]
    return float(np.mean(each))


def compare(task: str, args, folder: Path) -> seeds.Gain:
    t, labels, images = table(task)
    start = time.perf_counter()
    store = preprocess_folder(images/'images', folder/task, recipe('chest', size=args.size), show=False)
    before = {'ours': time.perf_counter()-start, 'fastai': 0.}
    test = t[t.split=='test']
    y, patients = test[labels].to_numpy(float), pd.factorize(test.patient_id)[0]
    scores, seconds, seen = {'ours': [], 'fastai': []}, {'ours': 0., 'fastai': 0.}, {}
    for seed in range(args.seeds):
        for name, f in (('ours', ours), ('fastai', plain)):
            p, s, seen[name] = f(t, labels, images, args, seed, store=store)
            scores[name].append(p)
            seconds[name] += s + before[name]
        print(f'{task} seed {seed}: ' + ', '.join(f'{n} {mean_auroc(y, v[-1]):.3f}'
            for n, v in scores.items()), flush=True)
    def each(name, rows): return np.array([mean_auroc(y[rows], p[rows]) for p in scores[name]])
    def gain(f): # over seeds and test patients
        shared = seeds.shared_variance(f, patients, args.draws)
        return seeds.over_seeds(f(np.arange(len(y))), shared, patients.max()+1)
    d = gain(lambda rows: each('ours', rows)-each('fastai', rows))
    print(f"{task}: {len(t)} images of {t.patient_id.nunique()} patients, {(t.split=='train').sum()} to "
        f"train, {len(test)} to test, {len(labels)} labels; {args.seeds} seeds, {args.epochs} epochs, {args.size} px")
    for name in scores:
        v = each(name, np.arange(len(y)))
        print(f'  {name:6s} AUROC {v.mean():.3f} (SD {v.std(ddof=1):.3f}; each {" ".join(f"{o:.3f}" for o in v)})   '
            f'{seconds[name]:.0f} s, {seen[name]} images a seed')
    print(f'  difference {d}, p = {d.p:.2g} before correction; time '
        f'{seconds["ours"]/seconds["fastai"]:.2f} of the peer', flush=True)
    return d


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('tasks', nargs='*', default=['child', 'nih', 'labels'])
    for name, value in (('seeds', 3), ('epochs', 8), ('size', 96), ('draws', 1000),
            ('threads', os.cpu_count())):
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        gains = {task: compare(task, args, Path(folder)) for task in args.tasks}
    for task, text in seeds.compared(gains).items(): print(f'{task}: {text}')


if __name__=='__main__': main()
