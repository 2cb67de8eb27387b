"""Judge the knee localiser on real radiographs: knees pasted into legs, and radiographs without a knee.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/knee_locator.py [--n 200]
"""
import argparse, os, time
from pathlib import Path

import cv2, numpy as np, pandas as pd

from radiology_ai.core import Radiograph, RadiologyError, resize_array, rng
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.preprocess.knee import locate_knees

KNEE_MM = 140 # what a crop of knee_oai shows, about


def pasted(r: Radiograph, gen) -> tuple[Radiograph, tuple]:
    "The crop scaled and set into a longer film whose shafts continue its first and last rows; the joint's place there."
    n = int(gen.integers(180, 320))
    knee = resize_array(r.pixels, (n, n))
    above, below, left, right = (int(gen.uniform(.05, .8)*n) for _ in range(4))
    film = cv2.copyMakeBorder(knee, above, below, left//3, right//3, cv2.BORDER_REPLICATE)
    film[:, :left//3] *= np.linspace(.2, 1, max(1, left//3))[None]
    film[:, film.shape[1]-right//3:] *= np.linspace(1, .2, right//3)[None] if right//3 else 1
    turned = cv2.warpAffine(film, cv2.getRotationMatrix2D((left//3+n/2, above+n/2), gen.uniform(-8, 8), 1), film.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    return Radiograph(turned.astype(np.float32), (KNEE_MM/n,)*2), (above+n/2, left//3+n/2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--n', type=int, default=200, help='knees, and chests of each set')
    args = parser.parse_args()
    cv2.setNumThreads(1)
    data, gen = Path(os.environ['RADIOLOGY_AI_REAL_DATA']), rng(0, 'real knees')
    knees = pd.read_csv(data/'knee_oai/manifest.csv').sample(args.n, random_state=0)
    rows, seconds = [], []
    for path, side in zip(knees.path, knees.side):
        r = read_radiograph(data/'knee_oai'/path)
        for kind, (film, centre) in {'crop': (r, (112, 112)), 'pasted': pasted(r, gen), 'pasted, spacing unknown': None or pasted(r, gen)}.items():
            if 'unknown' in kind: film = Radiograph(film.pixels)
            start = time.perf_counter()
            found = locate_knees(film)
            seconds.append((kind, time.perf_counter()-start))
            mm = film.spacing[0] if film.spacing else KNEE_MM/film.shape[1] if kind=='crop' else np.nan
            size = film.shape[1]
            error = np.hypot(found[0].center[0]-centre[0], found[0].center[1]-centre[1]) if found else np.inf
            rows.append(dict(kind=kind, found=bool(found), mm=error*mm if np.isfinite(error) else np.nan, within_tenth=error<=.1*size, side=bool(found) and found[0].side==side))
    t = pd.DataFrame(rows).groupby('kind', sort=False)
    out = t.agg(n=('found', 'size'), found=('found', 'mean'), median_mm=('mm', 'median'), within_a_tenth_of_the_width=('within_tenth', 'mean'), side_right=('side', 'mean')).round(3)
    print(out.to_string())
    print(pd.DataFrame(seconds, columns=['kind', 'ms']).groupby('kind', sort=False).ms.median().mul(1000).round(1).to_string())
    for name, files in (('chest_nih', sorted((data/'chest_nih/images').iterdir())), ('chest_covid', sorted((data/'chest_covid/images').iterdir())), ('chest_child', sorted((data/'chest_child/images').iterdir())),
                        ('dicom', sorted((data/'dicom').glob('*.dcm')))):
        alarms, read = [], 0
        for f in (files if name=='dicom' else [files[i] for i in np.linspace(0, len(files)-1, args.n).astype(int)]):
            try: r = read_radiograph(f)
            except RadiologyError: continue
            read += 1
            if locate_knees(r): alarms.append(f.name)
        print(f'{name}: {len(alarms)} of {read} taken for a knee', alarms[:4] if name=='dicom' else '')


if __name__=='__main__': main()
