"""Judge the knee localiser: simulated hospitals, real knees, and radiographs without a knee.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/knee_locator.py [--n 200] [--pictures FOLDER]

Real knees are crops of 224 pixels (OAI): as they are, within a larger black film, and laid into simulated long legs, scaled and turned.
The localiser has never seen one. `--pictures` writes the worst of each kind with the boxes that were found.
"""
import argparse, os, tempfile, time
from pathlib import Path

import cv2, numpy as np, pandas as pd

from radiology_ai.core import Radiograph, RadiologyError, resize_array, rng, transform_points
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.phantom.hospital import simulate_hospital
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess.knee import locate_knees

CROP_MM = 92    # what a crop of knee_oai shows, judged by the plateau's width
ROW, COL = .59, .5 # where in it the middle of the joint space lies, judged by eye on a dozen of them; it differs by a few hundredths from crop to crop


def in_black(r: Radiograph, gen):
    "The crop at another size on a larger black film; the joint's place (row, col)."
    n = int(gen.integers(160, 330))
    knee, (h, w) = resize_array(r.pixels, (n, n)), (n*gen.uniform(1, 1.9, 2)).astype(int)
    film, top, left = np.zeros((h, w), np.float32), int(gen.integers(0, h-n+1)), int(gen.integers(0, w-n+1))
    film[top:top+n, left:left+n] = knee
    return Radiograph(film, (CROP_MM/n,)*2), (top+n*ROW, left+n*COL)


def in_leg(r: Radiograph, side: str, gen):
    "The crop laid over the joint of a simulated long leg with soft edges, the whole then turned; the joint's place (row, col)."
    p = simulate_knee(int(gen.integers(10**6)), side=side, size=400, fov=float(gen.uniform(260, 400)))
    leg = expose(p, gen, marker=False).pixels
    n = int(round(CROP_MM/p.spacing))
    knee, (row, col) = resize_array(r.pixels, (n, n)), p.points['joint']
    edge = np.minimum(np.arange(n)+1, np.arange(n)[::-1]+1)
    alpha = np.clip(np.minimum(edge[:, None], edge[None])/(.12*n), 0, 1).astype(np.float32)
    big = np.pad(leg, n, mode='edge')
    y, x = int(row-n*ROW)+n, int(col-n*COL)+n
    under = big[y:y+n, x:x+n]
    knee = (knee-knee.mean())/max(knee.std(), .01)*under.std() + under.mean()
    big[y:y+n, x:x+n] = alpha*knee + (1-alpha)*under
    film = np.clip(big[n:-n, n:-n], 0, 1)
    m = cv2.getRotationMatrix2D((film.shape[1]/2, film.shape[0]/2), float(np.clip(gen.normal(0, 8), -20, 20)), 1)
    film = cv2.warpAffine(np.ascontiguousarray(film), m, film.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    joint = transform_points(np.vstack([m, [0, 0, 1]]), [x-n+n*COL, y-n+n*ROW])
    return Radiograph(film, (p.spacing,)*2), (joint[1], joint[0])


def row_of(kind, film, joint, side, mm):
    "One line of the table: how far, how sure, which side, how long."
    start = time.perf_counter()
    found = locate_knees(film)
    ms = 1000*(time.perf_counter()-start)
    error = min((np.hypot(k.center[0]-joint[0], k.center[1]-joint[1]) for k in found), default=np.inf)
    nearest = min(found, key=lambda k: np.hypot(k.center[0]-joint[0], k.center[1]-joint[1]), default=None)
    return dict(kind=kind, found=bool(found), error_mm=error*mm, within_5_percent=error<=.05*film.shape[1], within_10_percent=error<=.1*film.shape[1],
                side=nearest is not None and nearest.side==side, ms=ms, film=film, knees=found)


def real_knees(data: Path, n: int):
    gen = rng(0, 'real knees')
    table = pd.read_csv(data/'knee_oai/manifest.csv').sample(n, random_state=0)
    for path, side in zip(table.path, table.side):
        r = read_radiograph(data/'knee_oai'/path)
        yield row_of('OAI crop', Radiograph(r.pixels), (r.shape[0]*ROW, r.shape[1]*COL), side, CROP_MM/224)
        for name, (film, joint) in (('OAI in black', in_black(r, gen)), ('OAI in a leg', in_leg(r, side, gen))):
            yield row_of(name, film, joint, side, film.spacing[0])
            yield row_of(f'{name}, spacing unknown', Radiograph(film.pixels), joint, side, film.spacing[0])


def hospital(n: int):
    "Films of a simulated hospital: those with a knee, and how many of the others are taken for one."
    with tempfile.TemporaryDirectory() as d:
        truth = simulate_hospital(d, n=n, seed=77, size=512, workers=1)
        for t in truth[truth.broken==''].itertuples():
            r = read_radiograph(Path(d)/t.path)
            if t.body_part=='KNEE': yield row_of('simulated hospital', r, (t.joint_row, t.joint_col), t.laterality, t.spacing_mm)
            else: yield row_of('simulated other', r, (-1e6, -1e6), '', 1)


def others(data: Path, n: int):
    "Real radiographs without a knee."
    sets = {'chest_nih': sorted((data/'chest_nih/images').iterdir()), 'chest_covid': sorted((data/'chest_covid/images').iterdir()), 'chest_child': sorted((data/'chest_child/images').iterdir())}
    for name, files in sets.items():
        for i in np.linspace(0, len(files)-1, min(n, len(files))).astype(int): yield row_of(name, read_radiograph(files[i]), (-1e6, -1e6), '', 1) | dict(file=files[i].name)
    for f in sorted((data/'dicom').glob('*.dcm')):
        try: yield row_of('dicom', read_radiograph(f), (-1e6, -1e6), '', 1) | dict(file=f.name)
        except RadiologyError: pass


def picture(rows, path):
    "The films of `rows` with their boxes, on one sheet."
    tiles = []
    for r in rows:
        f = 220/max(r['film'].shape)
        a = cv2.cvtColor((resize_array(r['film'].pixels, tuple(max(1, int(n*f)) for n in r['film'].shape))*255).astype(np.uint8), cv2.COLOR_GRAY2BGR)
        for k in r['knees']:
            x1, y1, x2, y2 = (int(v*f) for v in k.box)
            cv2.rectangle(a, (x1, y1), (x2, y2), (0, 255, 255), 1)
            cv2.circle(a, (int(k.center[1]*f), int(k.center[0]*f)), 3, (0, 0, 255), -1)
            cv2.putText(a, f'{k.side} {k.score:.2f}', (3, 14), 0, .45, (0, 255, 0), 1)
        tiles.append(cv2.copyMakeBorder(a, 0, 224-a.shape[0], 0, 224-a.shape[1], cv2.BORDER_CONSTANT))
    while len(tiles)%6: tiles.append(np.zeros_like(tiles[0]))
    cv2.imwrite(str(path), np.vstack([np.hstack(tiles[i:i+6]) for i in range(0, len(tiles), 6)]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--n', type=int, default=200, help='real knees, simulated patients, and chests of each set')
    parser.add_argument('--pictures', type=Path, help='a folder for pictures of the worst')
    args = parser.parse_args()
    cv2.setNumThreads(1)
    rows = list(hospital(args.n))
    data = os.environ.get('RADIOLOGY_AI_REAL_DATA')
    if data: rows += [*real_knees(Path(data), args.n), *others(Path(data), args.n)]
    else: print('RADIOLOGY_AI_REAL_DATA is not set: simulated films only')
    t = pd.DataFrame(rows)
    knee = t[t.kind.str.contains('hospital|OAI')]
    g = knee.groupby('kind', sort=False)
    print(pd.DataFrame(dict(n=g.size(), found=g.found.mean(), median_mm=knee[knee.found].groupby('kind').error_mm.median(), within_10_mm=g.error_mm.agg(lambda e: (e<=10).mean()),
        within_5_percent=g.within_5_percent.mean(), within_10_percent=g.within_10_percent.mean(), side_right=g.side.mean(), median_ms=g.ms.median())).loc[knee.kind.unique()].round(3).to_string())
    rest = t.drop(knee.index).groupby('kind', sort=False)
    print('\ntaken for a knee:')
    print(pd.DataFrame(dict(n=rest.size(), alarms=rest.found.sum(), median_ms=rest.ms.median().round(1))).to_string())
    if 'file' in t: print(t[t.found & t.file.notna()][['kind', 'file']].to_string(index=False))
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        for kind, part in t.groupby('kind', sort=False):
            order = part.error_mm.where(part.found, 1e9).sort_values(ascending=False).index if kind in set(knee.kind) else part.sort_values('found', ascending=False).index
            picture([rows[i] for i in order[:18]], args.pictures/f"{kind.replace(' ', '_').replace(',', '')}.png")


if __name__=='__main__': main()
