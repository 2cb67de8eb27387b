"""The way of the RSNA pneumonia challenge on real films: DICOM files and `stage_2_*` tables in, a cross-validated detector, figures with
intervals beside shortcuts and a second reader, and a submission.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/rsna.py --out FOLDER [--size 160] [--epochs 10] [--width .25] [--folds 3]
        [--model retinanet dfine] [--set weights=none pretrained=false ...]

`chest_nih`: the 434 films of 394 persons that the challenge has read, 105 of them with its boxes, written as 8-bit DICOM (512 pixels)
with age, sex and view in the header; the tables have the columns of the challenge, the boxes are in pixels of these files. A fold never
parts a person, which the challenge's own "patients" do. Each film is judged by the network that has not seen its person; rules and
thresholds come from other persons. The commands are those of a user: `preprocess`, `train`, `evaluate`, `predict --to submission`.

The films come from three repositories, which says much of their class: what source and view, or 16 x 16 pixels, tell by themselves
stands beside the AUROC, and the AUROC within source and view. A second reader: boxes of ChestX-Det on the films that both have read.
Nothing of these films is written anywhere but into FOLDER.
"""
import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from readers import MAPPINGS, lists, readings

from radiology_ai.metrics.ranking import auroc_ci
from radiology_ai.metrics.readings import two_readings
from radiology_ai.phantom.hospital import made_up_uid, write_dicom
from radiology_ai.report.shortcuts import audit_shortcuts, stratified_auroc_ci
from radiology_ai.tasks.boxes import box_picture, counting_boxes, text_boxes
from radiology_ai.tasks.chest import chest_start
from radiology_ai.tasks.registry import evaluate

XYWH = ['x', 'y', 'width', 'height']


def challenge(data: Path, out: Path) -> pd.DataFrame:
    "The DICOM files and the tables of the challenge; a row a film."
    m = pd.read_csv(data/'manifest.csv', dtype={'patient_id': str})
    m = m[m.rsna_class.notna()].rename(columns={'rsna_patientId': 'patientId',
        'rsna_class': 'class'}).reset_index(drop=True)
    m['source'] = m.source.str.extract('github:([^/ ]+)')[0]
    boxes = pd.read_csv(data/'boxes_1024.csv')
    boxes = boxes[boxes.set=='RSNA'].merge(m[['image', 'patientId']], on='image')
    drawn = pd.DataFrame(boxes[['x', 'y', 'w', 'h']].to_numpy(float)/2,
        columns=XYWH).assign(patientId=boxes.patientId.to_numpy(), Target=1)
    none = m[['patientId']][~m.patientId.isin(drawn.patientId)].assign(Target=0)
    (out/'dicom').mkdir(parents=True, exist_ok=True)
    pd.concat([drawn, none])[['patientId', *XYWH, 'Target']].to_csv(out/'stage_2_train_labels.csv',
        index=False)
    m[['patientId', 'class']].to_csv(out/'stage_2_detailed_class_info.csv', index=False)
    for r in m.itertuples():
        header = dict(PatientID=r.patient_id, PatientName=f'NIH^{r.patient_id}',
            PatientAge=f'{int(r.age):03d}Y',
            PatientSex=r.sex, ViewPosition=r.view, BodyPartExamined='CHEST',
            StudyInstanceUID=made_up_uid('study', r.patientId),
            SeriesInstanceUID=made_up_uid('series', r.patientId),
            SOPInstanceUID=made_up_uid('film', r.patientId))
        film = cv2.imread(str(data/r.path), cv2.IMREAD_GRAYSCALE)/255
        write_dicom(out/'dicom'/f'{r.patientId}.dcm', film, bits=8, window=None, modality='CR',
            spacing=.168*2,
            header=header)
    return m


def told(*command, **more) -> str:
    "A command of the package; its output."
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', 'from radiology_ai.cli import main; main()',
        *map(str, command)],
        capture_output=True, text=True, **more)
    if done.returncode: raise SystemExit(done.stderr)
    return done.stdout


def trained(out: Path, model: str, args) -> Path:
    "A run of the whole way, its figures printed by `evaluate`, its submission written by `predict`."
    labels, store, run = out/'labels.csv', out/f'store_{args.size}', out/f'run_{model}'
    if not store.exists():
        told('preprocess', out/'dicom', '--recipe', 'chest', '--size', args.size, '--out', store, '--workers',
            1)
    given = chest_start() | dict(model=model, levels='3,4,5', body_div=1., head_epochs=0, bs=8, lr=1e-3,
        width=args.width,
        epochs=args.epochs, folds=args.folds) | dict(v.split('=', 1) for v in args.set)
    start = os.times()
    told('train', 'pneumonia', '--data', store, '--labels', labels, '--out', run,
        *(a for k, v in given.items()
        for a in ('--set', f'{k}={v}')))
    end = os.times()
    print(f'\n== {model}: {end.children_user+end.children_system-start.children_user-start.children_system:.0f} s of processor')
    print(told('evaluate', run))
    told('predict', run, out/'dicom', '--out', out/f'{model}.csv', '--to', 'csv,submission', '--workers', 1)
    sent = pd.read_csv(out/f'{model}_submission.csv', dtype=str)
    print(f'{len(sent)} films in {model}_submission.csv, {int(sent.PredictionString.notna().sum())} with boxes')
    return run


def beside(run, films: pd.DataFrame, out: Path):
    "Shortcuts beside the AUROC, and the AUROC within source and view."
    t = evaluate(run).table
    by = films.set_index('patientId')
    names = t.path.map(lambda p: Path(str(p)).stem)
    t = t.assign(source=by.source[names].to_numpy(), view=by['view'][names].to_numpy(), Opacity=t.target*1.,
        p_Opacity=t.score)
    pixels = {i: cv2.resize(cv2.imread(str(out/by.path[n]), cv2.IMREAD_GRAYSCALE), (64, 64),
        interpolation=cv2.INTER_AREA)
        for i, n in zip(t.image_id, names)}
    print('AUROC of the film: {:.3f} ({:.3f} to {:.3f})'.format(*auroc_ci(t.target, t.score, t.patient_id)))
    print('  within source and view {:.3f} ({:.3f} to {:.3f})'.format(*stratified_auroc_ci(t.target, t.score,
        t.source+t['view'], t.patient_id)))
    for o in audit_shortcuts(t, pixels, ['Opacity'], columns=['source', 'view'])['labels']:
        for name, b in o['baselines'].items():
            f = b['auroc']
            print(f"  without anatomy, {name}: {f['value']:.3f} ({f['low']:.3f} to {f['high']:.3f})")
    return t


def sheet(t: pd.DataFrame, films: pd.DataFrame, data: Path, path: Path, n: int=12):
    "A picture: the surest films with boxes and without, true boxes in green, found ones in orange."
    by, tiles = films.set_index('patientId'), []
    boxes, scores = counting_boxes(t)
    order = [*t[t.target==1].sort_values('score').index[::-1][:n],
        *t[t.target==1].sort_values('score').index[:n],
        *t[t.target==0].sort_values('score').index[::-1][:n]]
    for k in order:
        film = cv2.imread(str(data/by.path[Path(str(t.path[k])).stem]), cv2.IMREAD_GRAYSCALE)
        tiles.append(cv2.resize(box_picture(film, text_boxes(t.boxes_true[k])[0], boxes[k], scores[k]),
            (256, 256)))
    rows = [np.concatenate(tiles[k:k+6], 1) for k in range(0, len(tiles)//6*6, 6)]
    cv2.imwrite(str(path), np.concatenate(rows)[..., ::-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True)
    for name, value in (('size', 160), ('epochs', 10), ('folds', 3)):
        p.add_argument(f'--{name}', type=int, default=value)
    p.add_argument('--width', type=float, default=.25)
    p.add_argument('--model', nargs='+', choices=['retinanet', 'dfine'], default=['retinanet'])
    p.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE', help='further settings')
    p.add_argument('--readers', action='store_true', help='the second reader alone')
    args = p.parse_args()
    folder = os.environ.get('RADIOLOGY_AI_REAL_DATA')
    if not folder: raise SystemExit('Set RADIOLOGY_AI_REAL_DATA to the folder that holds chest_nih')
    data = Path(folder)/'chest_nih'
    print(f'Python {platform.python_version()}, NumPy {np.__version__}, {time.strftime("%Y-%m-%d")}')
    both, rsna, outlines = readings(data)
    for name, findings in MAPPINGS.items():
        print('== a second reader, '
            f'{name}\n{two_readings(*lists(both, rsna, outlines, findings)[::-1], both.patient_id).round(3).to_string()}\n')
    if args.readers: return
    films = challenge(data, args.out)
    labels = pd.read_csv(args.out/'stage_2_train_labels.csv').merge(
        pd.read_csv(args.out/'stage_2_detailed_class_info.csv'))
    labels.merge(films[['patientId', 'patient_id']]).to_csv(args.out/'labels.csv', index=False)
    print(f"{len(films)} films of {films.patient_id.nunique()} persons, {int((films['class']=='Lung Opacity').sum())} with boxes")
    for model in args.model:
        t = beside(trained(args.out, model, args), films, data)
        sheet(t, films, data, args.out/f'{model}.png')


if __name__=='__main__': main()
