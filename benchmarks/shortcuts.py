"""What predicts the labels of chest_nih without anatomy, beside what is known of it; and how long the audit and the reading room take.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/shortcuts.py [--images 25000] [--labels 32] [--films 100000]

Known before any image was looked at: its source and view give an AUROC of 0.767 for "no finding" and 0.787 for pneumonia, a linear
model on 16 x 16 pixels 0.816, and 0.93 for the view. CheXNet's published scores of the same images stand beside, whole and
within source and view. Processor time is printed beside the time that passed.
"""
import argparse
import math
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from radiology_ai.core import rng
from radiology_ai.metrics.ranking import auroc_ci
from radiology_ai.report.reading_room import WAITS, ReadingRoom, reading_starts, simulate_reading
from radiology_ai.report.shortcuts import audit_shortcuts, stratified_auroc_ci

KNOWN = {('No Finding', 'metadata'): .767, ('Pneumonia', 'metadata'): .787, ('No Finding', 'thumbnail'): .816}
LABELS = ['No Finding', 'Pneumonia', 'Effusion', 'Pneumothorax', 'Cardiomegaly', 'Atelectasis',
    'Infiltration', 'Nodule', 'Mass']


def said(f: dict) -> str:
    return f['reason'] or f"{f['value']:.3f} ({f['low']:.3f} to {f['high']:.3f})"


def timed(name: str, call):
    "What `call` gives, its time printed."
    start,cpu = time.perf_counter(),time.process_time()
    out = call()
    print(f'{name}: {time.perf_counter()-start:.1f} s, processor time {time.process_time()-cpu:.1f} s')
    return out


def chests(folder: Path):
    "The audit of the real chests."
    m = pd.read_csv(folder/'chest_nih'/'manifest.csv')
    films = [cv2.imread(str(folder/'chest_nih'/p), cv2.IMREAD_REDUCED_GRAYSCALE_8) for p in m.path]
    m = m.assign(image_id=m.image, patient_id=m.patient_id.astype(str),
        source=m.source.str.extract('github:([^/ ]+)')[0],
        **{'No Finding': (m.labels=='No Finding')*1.})
    scores = pd.read_csv(folder/'predictions'/'preds.csv.gz').rename(columns={'Image Index': 'image_id'})
    scores = scores.set_index('image_id').reindex(m.image_id)
    for l in LABELS: m[f'p_{l}'] = rng(0, l).random(len(m)) # no model: the baselines alone
    found = audit_shortcuts(m, dict(zip(m.image_id, films)), LABELS, columns=['source', 'view'])
    print(f"chest_nih, {found['images']:,} images of {found['patients']:,} patients: AUROC of what sees no anatomy")
    for o in found['labels']:
        for name,b in o['baselines'].items():
            known = KNOWN.get((o['label'], name))
            print(f"  {o['label']:14s} n = {o['positives']:3d}  {name:10s} {said(b['auroc'])}"
                + (f'   known: {known}' if known else ''))
    strata = m.source + m['view']
    for l in LABELS[1:]:
        score = scores.get(f'prob_{l}')
        there = np.zeros(len(m), bool) if score is None else score.notna().to_numpy()
        if m.loc[there, l].sum()<10: continue
        t,s,g = m.loc[there, l].to_numpy(float),score[there].to_numpy(),m.patient_id[there].to_numpy()
        print(f'  CheXNet on {l} ({int(t.sum())} of {len(t)}): {auroc_ci(t, s, g)}; within source and view '
            f'{stratified_auroc_ci(t, s, strata[there].to_numpy(), g)}')


class Films:
    "As a store: images by number, a few hundred of them again and again."
    def __init__(self, size=256):
        self.bank = rng(0, 'films').integers(0, 255, (200, size, size), dtype=np.uint8)
    def position(self, image_id): return int(image_id[1:])
    def __getitem__(self, k): return self.bank[k%200]


def many(n: int, labels: int) -> pd.DataFrame:
    "Predictions of many labels, each unknown in other images."
    gen = rng(0, 'many')
    t = (gen.random((n, labels))<gen.uniform(.005, .3, labels)).astype(float)
    p = 1/(1+np.exp(2 - 1.5*t - gen.normal(size=t.shape)))
    t[gen.random(t.shape)<.1] = np.nan
    names = [f'finding {k}' for k in range(labels)]
    return pd.DataFrame({'image_id': [f'i{k}' for k in range(n)],
        'patient_id': [f'p{k//2}' for k in range(n)],
        'sex': gen.choice(['F','M'], n), 'age': gen.integers(10, 90, n), 'view': gen.choice(['AP','PA'], n),
        'manufacturer': gen.choice(list('ABCDEF'), n), **dict(zip(names, t.T)),
        **dict(zip([f'p_{l}' for l in names], p.T))})


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=25000)
    parser.add_argument('--labels', type=int, default=32)
    parser.add_argument('--films', type=int, default=100000)
    args = parser.parse_args()
    if 'RADIOLOGY_AI_REAL_DATA' in os.environ: chests(Path(os.environ['RADIOLOGY_AI_REAL_DATA']))
    table = many(args.images, args.labels)
    timed(f'audit of {args.images:,} images x {args.labels} labels', lambda: audit_shortcuts(table, Films()))
    room = ReadingRoom(days=max(1, round(args.films/220)))
    at,minutes,gen = room.draw(0)
    tier = gen.integers(0, 3, len(at))
    for name,limit in (('tiers', math.inf), ('tiers with a limit', room.limit)):
        timed(f'reading room, {len(at):,} films, {name}',
            lambda limit=limit: reading_starts(at, minutes, tier, room.readers, limit))
    truth = gen.choice(3, 4000, p=[.1, .4, .5])
    calls = np.array([[.8, .1, .1], [.08, .77, .15], [.03, .17, .8]]).cumsum(1)
    rows = simulate_reading(truth==0, {'three tiers': (gen.random(4000)[:,None]>calls[truth]).sum(1)},
        repeats=100)
    print('waiting of urgent films, minutes, over 100 weeks (Baltruschat 2021: mean 80 -> 36, maximum 890 -> 1,293, with a limit 979)')
    for r in rows:
        print(f"  {r['order']:28s}"
            + '; '.join(f"{w} {r[w]['value']:.0f} ({r[w]['low']:.0f} to {r[w]['high']:.0f})" for w in WAITS))


if __name__=='__main__': main()
