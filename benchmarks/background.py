"""Judge the background cleaning: overlap with the true field, anatomy cut, speed, and what it changes on real films.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/background.py [--films 100] [--first 5000] [--pictures FOLDER]

1. simulated knees, chests, hands and hips, 512 px, from seeds that were not used to set the thresholds (those are
   below 1000): overlap (intersection over union) with the true field, 5 % quantile, the same for the collimated
   ones alone and for a peer by thresholds (black or white areas that fill a good part of a side), body pixels of
   the true field that were left out, letters found, ms a film with the search for letters and without, as recipes
   do it;
2. real films: how many are changed and by how much. `--pictures` writes contact sheets of those changed, to be
   looked at (not to be published).
"""
import argparse
import os
import time
from pathlib import Path

import cv2
import numpy as np

from radiology_ai.core import RadiologyError, rng
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.phantom.chest import simulate_chest
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.phantom.limbs import simulate_hand, simulate_hip
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess.background import find_field

BODIES = dict(knee=simulate_knee, chest=simulate_chest, hand=simulate_hand, hip=simulate_hip)


def kind_of(name: str) -> str: return 'chest' if 'chest' in name else 'limb'


def overlap(a, b) -> float: return float((a & b).sum()/max((a | b).sum(), 1))


def by_threshold(pixels, near: float=.03, side: float=.3):
    "The peer: black and white areas that take up the part `side` of a side are border."
    k = max(1, round(max(pixels.shape)/256))
    small = cv2.blur(cv2.resize(pixels, (pixels.shape[1]//k, pixels.shape[0]//k),
        interpolation=cv2.INTER_AREA), (3, 3), borderType=cv2.BORDER_REPLICATE)
    out = np.zeros(small.shape, np.uint8)
    for end in (small<=near, small>=1 - near):
        n, labels = cv2.connectedComponents(end.astype(np.uint8))
        keep = np.any([np.bincount(line, minlength=n)>=side*len(line)
            for line in (labels[0], labels[-1], labels[:, 0], labels[:, -1])], 0)
        keep[0] = False
        out |= keep[labels].astype(np.uint8)
    out = cv2.dilate(out, np.ones((3, 3), np.uint8), iterations=2) # the blurred rim belongs to the border
    return (cv2.resize(1 - out, pixels.shape[::-1], interpolation=cv2.INTER_NEAREST)>0 if out.mean()<=.9
        else np.ones(pixels.shape, bool))


def judged(part: str, seed: int) -> dict:
    "One simulated film: overlaps, body lost, letters, seconds."
    e = expose(BODIES[part](seed, size=512), rng(seed, 'background'))
    start = time.perf_counter()
    f = find_field(e.pixels, kind_of(part))
    middle = time.perf_counter()
    find_field(e.pixels, kind_of(part), letters=False)
    seconds, plain = middle - start, time.perf_counter() - middle
    body = (e.phantom.line>.05) & e.field
    deep = cv2.erode(e.field.astype(np.uint8), np.ones((7, 7), np.uint8), borderType=cv2.BORDER_CONSTANT,
        borderValue=1)>0
    m, letter = e.beam.marker, None
    if (m is not None and e.field[min(int(m['y']), e.field.shape[0] - 1),
            min(int(m['x']), e.field.shape[1] - 1)]):
        letter = bool(f.parts.get('marker', np.zeros_like(f.mask))[int(m['y']) - 8:int(m['y']) + 8,
            int(m['x']) - 8:int(m['x']) + 8].any())
    return dict(seed=seed, collimated=not e.field.all(), outside=e.beam.outside,
        overlap=overlap(f.mask, e.field), peer=overlap(by_threshold(e.pixels), e.field),
        lost=float((body & ~f.mask).sum()/max(body.sum(), 1)),
                deep=int((body & deep & ~f.mask).sum()), letter=letter, ms=1e3*seconds, plain=1e3*plain)


def simulated(films: int, first: int) -> None:
    print(f"{'':6s} {'films':>5s} {'overlap':>8s} {'5 %':>6s} {'collim.':>8s} {'5 %':>6s} {'peer':>6s} "
        f"{'body lost':>9s} {'worst':>7s} {'deep':>5s} {'letters':>9s} {'ms':>6s} {'without':>7s}")
    every = []
    for part in (*BODIES, 'all'):
        rows = every if part=='all' else [judged(part, first + i) for i in range(films)]
        if part!='all': every += rows
        o = np.array([r['overlap'] for r in rows])
        c = np.array([r['overlap'] for r in rows if r['collimated']] or [np.nan])
        letters = [r['letter'] for r in rows if r['letter'] is not None]
        print(f"{part:6s} {len(rows):5d} {o.mean():8.4f} {np.quantile(o, .05):6.3f} {c.mean():8.4f} "
            f"{np.quantile(c, .05):6.3f} {np.mean([r['peer'] for r in rows]):6.3f} {np.mean([r['lost'] for r in rows]):9.3%} "
              f"{max(r['lost'] for r in rows):7.2%} {sum(r['deep']>0 for r in rows):5d} "
              f"{sum(letters):4d}/{len(letters):<4d} {np.median([r['ms'] for r in rows]):6.1f} "
              f"{np.median([r['plain'] for r in rows]):7.1f}", flush=True)
    e = expose(simulate_knee(first, size=512), rng(first, 'background'))
    big = np.repeat(np.repeat(e.pixels, 4, 0), 4, 1)
    start = time.perf_counter()
    find_field(big)
    print(f"a film of {big.shape[0]} x {big.shape[1]}: {1e3*(time.perf_counter() - start):.0f} ms (the "
        "search is done on copies of 256 and 1024 px)")
    print("deep: films that lose body pixels more than 3 px inside of the true field")
    for r in sorted(every, key=lambda r: -r['deep'])[:5]:
        print('  most lost:', {k: r[k] for k in ('seed', 'outside', 'overlap', 'lost', 'deep')})


def outlined(pixels, mask, n: int=300):
    "The film with its field's outline, `n` px."
    s = n/max(pixels.shape)
    im = cv2.resize(cv2.cvtColor((np.clip(pixels, 0, 1)*255).astype(np.uint8), cv2.COLOR_GRAY2BGR), None,
        fx=s, fy=s, interpolation=cv2.INTER_AREA)
    m = np.pad(cv2.resize(mask.astype(np.uint8), im.shape[1::-1], interpolation=cv2.INTER_NEAREST), 1)
    cv2.drawContours(im, [c - 1 for c in cv2.findContours(m, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]], -1,
        (0, 255, 0), 1)
    return cv2.copyMakeBorder(im, 0, n - im.shape[0], 0, n - im.shape[1], cv2.BORDER_CONSTANT)


def real(folder: Path, pictures: str|None) -> None:
    print(f"\n{'':12s} {'films':>5s} {'changed':>8s} {'left out, median of those changed':>34s}")
    for name, pattern, every, kind in (('dicom', 'dicom/*.dcm', 1, ''),
            ('chest_nih', 'chest_nih/images/*', 23, 'chest'),
            ('chest_covid', 'chest_covid/images/*', 4, 'chest'),
                                       ('chest_child', 'chest_child/images/*', 12, 'chest'),
                                       ('knee_oai', 'knee_oai/**/*.png', 4, 'limb')):
        cells, films, changed = [], 0, []
        for p in sorted(folder.glob(pattern))[::every]:
            try: r = read_radiograph(p)
            except RadiologyError: continue # some of the DICOM files are broken on purpose
            films += 1
            body = str(r.tags.get('BodyPartExamined', ''))
            mask = find_field(r, kind or ('limb' if body in ('HIP', 'EXTREMITY', 'HAND', 'KNEE')
                else 'chest')).mask
            if mask.all(): continue
            changed.append(1 - mask.mean())
            if pictures: cells.append(outlined(r.pixels, mask))
        print(f"{name:12s} {films:5d} {len(changed):8d} {np.median(changed) if changed else 0:34.1%}",
            flush=True)
        for i in range(0, len(cells), 24):
            row = cells[i:i + 24] + [np.zeros_like(cells[0])]*(-len(cells[i:i + 24]) % 6)
            cv2.imwrite(str(Path(pictures)/f'{name}_{i//24}.png'),
                np.vstack([np.hstack(row[j:j + 6]) for j in range(0, len(row), 6)]))


def main():
    a = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    a.add_argument('--films', type=int, default=100, help='of each body part')
    a.add_argument('--first', type=int, default=5000, help='first seed')
    a.add_argument('--pictures', help='folder for contact sheets of the real films that were changed')
    a = a.parse_args()
    cv2.setNumThreads(1)
    if a.pictures: Path(a.pictures).mkdir(parents=True, exist_ok=True)
    simulated(a.films, a.first)
    folder = os.environ.get('RADIOLOGY_AI_REAL_DATA')
    if folder: real(Path(folder), a.pictures)
    else: print("RADIOLOGY_AI_REAL_DATA is not set: no real films")


if __name__=='__main__': main()
