"""Lungs, heart and clavicles on real films: `lungs` trained on JSRT and on children, each tested on its own patients and on the
other's films, and pictures of the ten worst.

    RADIOLOGY_AI_REAL_DATA=... python benchmarks/lungs.py OUT [--size 192] [--epochs 30] [--children 400] [--seed 0]
    python benchmarks/lungs.py OUT --validate KEY=VALUE,...    one run on JSRT; figures of the validation patients alone

`chest_jsrt` (200 adults, 512 px, outlines of SCR: both lungs without the heart, the heart, both clavicles) and `chest_child` (Kermany
2018 at 224 px, lungs of V7 Labs with what lies behind the heart). Patients are apart: 60 % train, 15 % validate (best epoch, largest
parts), 25 % are the test, which is looked at once. Of the children `--children` films are taken. Everything lies below OUT: a run that
is there is read, not trained again."""
import os

for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(k, '1')
import argparse
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from radiology_ai.core import rng
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.tasks.judge import Evaluation
from radiology_ai.tasks.lungs import LUNGS, STRUCTURES, child_lungs, jsrt_structures
from radiology_ai.tasks.outlines import outlined
from radiology_ai.tasks.registry import evaluate, train
from radiology_ai.tasks.structures import film_masks, table_names

SPLIT = dict(train=.6, valid=.15)
SETS = {'jsrt': ('chest_jsrt', jsrt_structures, STRUCTURES),
    'child': ('chest_child', child_lungs, STRUCTURES[:2])}


def some(table, n: int, seed: int):
    "The films of patients drawn at random until there are `n`."
    patients = table.patient_id.unique()
    order = {p: k for k, p in enumerate(patients[rng(seed, 'children').permutation(len(patients))])}
    return table.assign(order=table.patient_id.map(order)).sort_values(['order',
        'image_id']).head(n).drop(columns='order')


def prepared(name: str, out: Path, size: int, most: int, seed: int):
    "Store and labels of a collection."
    folder, read, _ = SETS[name]
    folder = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/folder
    labels = read(folder)
    if len(labels)>most: labels = some(labels, most, seed)
    where = out/f'{name}_{size}'
    if not (where/'index.parquet').exists():
        files = [str(folder/'images'/i) for i in labels.image_id]
        preprocess_folder(files, where, replace(LUNGS.recipe, size=size), workers=1, show=False)
    return ImageStore(where), labels


def trained(name: str, out: Path, data, args, **more):
    "A run and the processor seconds it took (0 where it was there)."
    start = time.process_time()
    run = train('lungs', *data, out, label=','.join(SETS[name][2]), epochs=args.epochs, seed=args.seed,
        show=args.show,
        **SPLIT | dict(o.split('=') for o in args.set) | more)
    return run, time.process_time()-start


def rows(what: str, e) -> list[str]:
    "A row of a table of markdown for each structure."
    def said(f, scale=1., digits=3):
        return ('n/a' if f['reason']
            else f"{f['value']*scale:.{digits}f} ({f['low']*scale:.{digits}f} to {f['high']*scale:.{digits}f})")
    out = []
    for n, o in e.figures['structures'].items():
        if not o['dice']['n']: continue
        far = (said(o['hd95_mm'], 1, 1) + ' mm' if not o['hd95_mm']['reason']
            else said(o['hd95'], 100, 1) + ' %')
        out.append(f"| {what} | {n.replace('_', ' ')} | {o['dice']['n']} | {said(o['dice'])} | "
            f"{said(o['iou'])} | {far} | {o['missed']} |")
    return out


def ratio(e) -> str:
    "The cardiothoracic ratio in words."
    o = e.figures['measures']['ctr']
    f = {k: f"{o[k]['value']:.4f} ({o[k]['low']:.4f} to {o[k]['high']:.4f})"
        for k in ('drawn', 'true', 'difference', 'absolute')}
    return (f"Cardiothoracic ratio on {o['difference']['n']} films: drawn {f['drawn']}, true {f['true']}, difference {f['difference']}, "
        f"absolute {f['absolute']}; 95 % of differences between {o['spread'][0]:.3f} and {o['spread'][1]:.3f}.")


def worst(e, store, path: Path, n: int=10):
    "The ten films of the lowest mean Dice with the outlines, five a row."
    table, names = e.table, table_names(e.table)
    tiles = []
    for r in table.assign(dice=pd.to_numeric(table.dice)).sort_values('dice').head(n).itertuples():
        drawn, true, _ = film_masks(r.film, names, e.task.answer.keep)
        film = outlined(np.asarray(store[store.position(r.image_id)]), drawn, true, 320)
        film = cv2.resize(film, (384, 384), interpolation=cv2.INTER_AREA)
        cv2.putText(film, f'{r.dice:.3f}', (6, 18), cv2.FONT_HERSHEY_SIMPLEX, .5, (255, 255, 255), 1,
            cv2.LINE_AA)
        tiles.append(film)
    tiles += [np.zeros_like(tiles[0])]*(-len(tiles)%5)
    sheet = np.vstack([np.hstack(tiles[k:k+5]) for k in range(0, len(tiles), 5)])
    cv2.imwrite(str(path), sheet[..., ::-1])


def validate(args):
    "Train once with other settings; print the figures of the validation patients."
    store, labels = prepared('jsrt', args.out, args.size, 10**6, args.seed)
    given = dict(o.split('=') for o in args.validate.split(',') if o)
    name = '_'.join(f'{k}-{v}' for k, v in sorted(given.items())) or 'usual'
    run, seconds = trained('jsrt', args.out/'tried'/f'{args.epochs}_{name}', (store, labels), args, **given)
    table = run.predictions[run.predictions.split=='valid']
    dice = {n: round(float(pd.to_numeric(table[f'dice_{n}']).mean()), 4) for n in STRUCTURES}
    print(json.dumps({'settings': given, 'epochs': args.epochs, 'dice on validation': dice,
        'seconds': round(seconds)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path)
    for name, default in dict(size=192, epochs=30, children=400, seed=0).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--set', action='append', default=[], help='further settings KEY=VALUE of both runs')
    parser.add_argument('--validate', default=None)
    parser.add_argument('--show', action='store_true')
    parser.add_argument('--only', choices=list(SETS), default=None, help='train on this collection alone')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.validate is not None: return validate(args)
    data = {name: prepared(name, args.out, args.size, 10**6 if name=='jsrt' else args.children, args.seed)
        for name in SETS}
    table = ['| trained on, tested on | structure | films | Dice | IoU | Hausdorff 95 | missed |',
        '|' + '---|'*7]
    notes = []
    for name in SETS if args.only is None else [args.only]:
        other = next(o for o in SETS if o!=name)
        run, seconds = trained(name, args.out/f'run_{name}', data[name], args)
        own = evaluate(run)
        notes.append(f"{name}: {seconds:.0f} s of one core; {own.figures['keep']['kept'] or 'none'} with the largest part alone. "
            + (ratio(own) if name=='jsrt' else ''))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            away: Evaluation = evaluate(run, *data[other])
        for what, e, store in ((f'{name}, {name}', own, data[name][0]),
                (f'{name}, {other}', away, data[other][0])):
            table += rows(what, e)
            worst(e, store, args.out/f"worst_{what.replace(', ', '_on_')}.png")
            print('\n'.join([what, *e.lines()]), flush=True)
    (args.out/'table.md').write_text('\n'.join([*table, '', *notes]) + '\n')
    print('\n'.join([*table, '', *notes]))


if __name__=='__main__': main()
