"""A full report on published predictions: CheXNet's on 22,433 images of ChestX-ray14, 14 labels; and how long it takes.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/report.py [--out FOLDER] [--images 25000] [--draws 400]

The AUCs stand beside the published ones. The second model of the comparison is made here: the first with noise on its logits. For
the time, patients are repeated under new names until there are `--images` images. The page names image identifiers of
ChestX-ray14: keep it out of repositories.
"""
import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from radiology_ai.core import rng
from radiology_ai.data.chest import chestxray14
from radiology_ai.report.card import ReportData
from radiology_ai.report.page import write_report
from radiology_ai.report.predictions import choose_thresholds

DATA = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])


def predictions() -> tuple[pd.DataFrame, pd.DataFrame]:
    "The table of truths and scores, and the published AUCs."
    p = pd.read_csv(DATA/'predictions/preds.csv.gz').rename(columns=lambda c: c.replace('prob_',
        'p_')).rename(columns={'Image Index': 'image_id'})
    published = pd.read_csv(DATA/'predictions/aucs.csv').set_index('label').auc
    truth = chestxray14(DATA/'labels/nih/Data_Entry_2017_v2020.csv.gz').manifest
    return p.merge(truth.drop(columns='split', errors='ignore'), on='image_id', validate='1:1'),published


def noisy(table: pd.DataFrame, labels, seed: int=0) -> pd.DataFrame:
    "The same with noise of one unit on each logit."
    logit = np.log(table[[f'p_{l}' for l in labels]].clip(1e-9, 1-1e-9).to_numpy())
    logit -= np.log1p(-np.exp(logit))
    return table.assign(**dict(zip([f'p_{l}' for l in labels],
        (1/(1+np.exp(-(logit + rng(seed, 'noisy').normal(0, 1, logit.shape))))).T)))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='')
    parser.add_argument('--images', type=int, default=25000)
    parser.add_argument('--draws', type=int, default=400)
    args = parser.parse_args()
    table,published = predictions()
    labels = list(published.index)
    patients = table.patient_id.astype(str).drop_duplicates()
    valid = set(patients[rng(0, 'halves').random(len(patients))<.3])
    table = table.assign(split=np.where(table.patient_id.astype(str).isin(valid), 'valid', 'test'))
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(args.out or tmp)
        page = write_report(out/'chexnet.html', ReportData('CheXNet on ChestX-ray14',
            table.assign(split='test'), 'Which of 14 findings does this frontal chest radiograph show?',
            labels=labels,
            subgroups=('sex','age','view'),
            intended_use='A published network, evaluated again from its published scores.'), draws=args.draws)
        found = {o['label']: o['auroc'] for o in json.loads(page.with_suffix('.json').read_text())['labels']}
        print(f'{len(table):,} images of {len(patients):,} patients\n{"label":20s}  published   here (95 % CI)')
        for l in labels:
            print(f'{l:20s}  {published[l]:.4f}      {found[l]["value"]:.4f} ({found[l]["low"]:.4f} to '
                f'{found[l]["high"]:.4f}){"" if abs(found[l]["value"]-published[l])<5e-5 else "   differs"}')
        data = ReportData('CheXNet, operating points from other patients', table, labels=labels,
            threshold=choose_thresholds(table, 'youden', labels=labels), manifest=table, name='CheXNet',
            others={'with noise': noisy(table, labels)}, subgroups=('sex','age','view'))
        write_report(out/'compared.html', data, draws=args.draws)
        more = [table.assign(split='test', patient_id=table.patient_id.astype(str) + f'_{k}',
            image_id=table.image_id + f'_{k}') for k in range(-(-args.images//len(table)))]
        large = pd.concat(more, ignore_index=True)[:args.images]
        start,cpu = time.perf_counter(),time.process_time()
        page = write_report(out/'large.html', ReportData('Large', large, labels=labels,
            subgroups=('sex','age','view')), draws=args.draws)
        print(f'report on {len(large):,} images x {len(labels)} labels: {time.perf_counter()-start:.1f} s, '
            f'processor time {time.process_time()-cpu:.1f} s, page {page.stat().st_size/2**20:.2f} MB')


if __name__=='__main__': main()
