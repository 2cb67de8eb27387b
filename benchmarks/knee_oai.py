"""Real knees: Kellgren-Lawrence grade 2 or more against less, beside a plain fastai vision_learner on the same images, splits and epochs.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/knee_oai.py [--folds 5] [--epochs 15] [--size 112] [--seed 0]

Cross-validation over patients: each image is tested once, by a model that has seen neither its patient nor the
validation fold. Both train a resnet18 from random weights and keep the epoch with the best AUROC on the validation
fold. Time is from the image files to the trained networks on both sides, preprocessing included. One seed: the interval
is over patients, for these trainings.
"""
import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import (
    ImageDataLoaders,
    Resize,
    RocAucBinary,
    SaveModelCallback,
    aug_transforms,
    resnet18,
    set_seed,
    vision_learner,
)

from radiology_ai.metrics.ranking import auroc_ci, delong_test
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.tasks.registry import train

DATA = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/'knee_oai'


def labels() -> pd.DataFrame:
    t = pd.read_csv(DATA/'manifest.csv', dtype={'patient': str})
    return pd.DataFrame({'path': t.path, 'patient_id': t.patient, 'laterality': t.side,
        'kl2': (t.kl>=2).astype(int)})


def ours(args, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, float]:
    "Predictions of the folds, the manifest with the folds, and the seconds of preprocessing and training."
    start = time.perf_counter()
    store = preprocess_folder(DATA/'images', folder/'store', recipe('plain', size=args.size))
    run = train('knee', store, labels(), folder/'run', label='kl2', arch='resnet18', pretrained=False,
        epochs=args.epochs, lr=2e-3, bs=args.bs, folds=args.folds, seed=args.seed)
    seconds = time.perf_counter()-start
    manifest, predictions = run.manifest, run.predictions
    return predictions[predictions.split=='test'], manifest, seconds


def plain(args, manifest: pd.DataFrame, folder: Path) -> tuple[pd.Series, float]:
    "The test scores of a plain fastai learner on the same folds."
    scores, seconds = {}, 0.
    for k in range(args.folds):
        rows = manifest.assign(is_valid=manifest.fold==(k+1)%args.folds)
        train, test = rows[rows.fold!=k], rows[rows.fold==k]
        set_seed(args.seed)
        dls = ImageDataLoaders.from_df(train, path='/', fn_col='path', label_col='kl2', valid_col='is_valid',
            bs=args.bs, item_tfms=Resize(args.size), batch_tfms=aug_transforms(), num_workers=0)
        learn = vision_learner(dls, resnet18, pretrained=False, metrics=RocAucBinary(), path=folder,
            cbs=SaveModelCallback(monitor='roc_auc_score', comp=np.greater))
        start = time.perf_counter()
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(args.epochs)
            p, _ = learn.get_preds(dl=dls.test_dl(test))
        seconds += time.perf_counter()-start
        scores |= dict(zip(test.image_id, p[:, 1].numpy()))
    return pd.Series(scores), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (('folds', 5), ('epochs', 15), ('size', 112), ('seed', 0), ('bs', 32)):
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        test, manifest, seconds = ours(args, Path(folder))
        peer, peer_seconds = plain(args, manifest, Path(folder))
    y, patient, a, b = test.target, test.patient_id, test.score.to_numpy(), peer[test.image_id].to_numpy()
    print(f'{len(test)} images of {patient.nunique()} patients, {int(y.sum())} with KL >= 2; {args.folds} '
        f'folds, {args.epochs} epochs, {args.size} px, seed {args.seed}')
    print(f'radiology_ai                 AUROC {auroc_ci(y, a, patient)}   {seconds:.0f} s')
    print(f'fastai vision_learner        AUROC {auroc_ci(y, b, patient)}   {peer_seconds:.0f} s')
    d = delong_test(y, a, b, patient)
    print(f'difference {d.difference}, p = {d.p:.2g}; time {seconds/peer_seconds:.2f} of the peer')


if __name__=='__main__': main()
