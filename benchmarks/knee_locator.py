"""Judge the knee localiser: simulated framings that training has not seen, injured knees, simulated hospitals, real knees, and radiographs
without a knee.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/knee_locator.py [--n 400] [--others] [--pictures FOLDER]

Framings that training has not seen: a whole leg (440 to 520 mm) beside a ruler, with mirrored letters; both legs on
a wide film (440 to 520 mm); two knees exposed one after the other on one cassette; a joint 20 to 34 mm from an edge
of the film. Injured knees (`phantom.injured`) lie under a hand, are dislocated, in plaster or upside down, have plates, nails or a fixator.
"Kept" counts the knees that are sure and those that a recipe keeps and flags as doubtful. Real knees are crops of
224 pixels (OAI): as they are, within a larger black film, and laid into
simulated long legs, scaled and turned; no real knee took part in training. The joint in a crop is where the mean of
all crops, aligned with it, has its joint: the joint was marked once, in the mean. Of ChestX-ray14 only patients
with an odd number are judged, since the others took part in training. `--pictures` writes the worst of each kind
with the boxes that were found.
"""
import argparse
import os
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from radiology_ai.core import Radiograph, RadiologyError, resize_array, rng, transform_points
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.metrics.intervals import proportion_ci
from radiology_ai.phantom.chest import simulate_chest
from radiology_ai.phantom.hospital import simulate_hospital
from radiology_ai.phantom.injured import INJURIES, injured_knee
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.phantom.limbs import simulate_hand, simulate_hip
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess.knee import CALLED, DOUBTFUL, evened, locate_knees

CROP_MM = 92       # what a crop of knee_oai shows, judged by the plateau's width
X, Y = .5, .59 # where in the mean of the crops the middle of the joint space lies


def joints(crops: list, sides: list, n: int=112) -> list:
    """(x, y) of the joint in each crop, as shares of its sides: the mean of all crops is laid over each,
    by correlation, left knees mirrored."""
    a = [resize_array(c, (n, n)) for c in crops]
    a = np.stack([np.clip(evened(np.ascontiguousarray(c[:, ::-1] if s=='L' else c)), -3, 3)
        for c, s in zip(a, sides)])
    (t, b, l, r), most, mean = (30, 95, 12, 100), 14, a.mean(0)
    for _ in range(4):
        at = []
        for c in a:
            room = cv2.copyMakeBorder(c, most, most, most, most, cv2.BORDER_REPLICATE)[t:b+2*most, l:r+2*most]
            at.append(np.unravel_index(cv2.matchTemplate(room, mean[t:b, l:r], cv2.TM_CCOEFF_NORMED).argmax(),
                (2*most+1, 2*most+1)))
        at = np.array(at) - most
        at -= np.rint(at.mean(0)).astype(int)
        mean = np.mean([np.roll(c, -o, (0, 1)) for c, o in zip(a, at)], 0).astype(np.float32)
    return [(X+x/n if s=='R' else 1-X-x/n, Y+y/n) for (y, x), s in zip(at, sides)]


def in_black(r: Radiograph, at, gen):
    "The crop at another size on a larger black film; the joint's place (x, y)."
    n = int(gen.integers(160, 330))
    knee, (h, w) = resize_array(r.pixels, (n, n)), (n*gen.uniform(1, 1.9, 2)).astype(int)
    film, top, left = np.zeros((h, w), np.float32), int(gen.integers(0, h-n+1)), int(gen.integers(0, w-n+1))
    film[top:top+n, left:left+n] = knee
    return Radiograph(film, (CROP_MM/n,)*2), (left+n*at[0], top+n*at[1])


def in_leg(r: Radiograph, at, side: str, gen):
    """The crop laid over the joint of a simulated long leg with soft edges, the whole then turned; the
    joint's place (x, y)."""
    p = simulate_knee(int(gen.integers(10**6)), side=side, size=400, fov=float(gen.uniform(260, 400)))
    leg = expose(p, gen, marker=False).pixels
    n = int(round(CROP_MM/p.spacing))
    knee, joint = resize_array(r.pixels, (n, n)), p.points['joint']
    edge = np.minimum(np.arange(n)+1, np.arange(n)[::-1]+1)
    alpha = np.clip(np.minimum(edge[:, None], edge[None])/(.12*n), 0, 1).astype(np.float32)
    big = np.pad(leg, n, mode='edge')
    x, y = (int(j-n*a)+n for j, a in zip(joint, at))
    under = big[y:y+n, x:x+n]
    knee = (knee-knee.mean())/max(knee.std(), .01)*under.std() + under.mean()
    big[y:y+n, x:x+n] = alpha*knee + (1-alpha)*under
    film = np.clip(big[n:-n, n:-n], 0, 1)
    m = cv2.getRotationMatrix2D((film.shape[1]/2, film.shape[0]/2), float(np.clip(gen.normal(0, 8), -20, 20)),
        1)
    film = cv2.warpAffine(np.ascontiguousarray(film), m, film.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    joint = transform_points(np.vstack([m, [0, 0, 1]]), [x-n+n*at[0], y-n+n*at[1]])
    return Radiograph(film, (p.spacing,)*2), tuple(joint)


def letters(a, gen, mirrored):
    "Lead letters on a film, as they are or mirrored."
    layer = np.zeros(a.shape, np.uint8)
    cv2.putText(layer, str(gen.choice(list('RL')))+str(gen.choice(['', 'AP', ' 7'])),
        (int(gen.uniform(0, .6)*a.shape[1]), int(gen.uniform(.1, .95)*a.shape[0])), 0, 1.2, 255, 3)
    return np.maximum(a, (layer[:, ::-1] if mirrored else layer).astype(np.float32)/255)


def whole_leg(seed, side, gen):
    p = simulate_knee(seed, int(gen.integers(7)), side, 420, fov=float(gen.uniform(440, 520)),
        hardware=bool(gen.random()<.2))
    a = letters(expose(p, gen).pixels.copy(), gen, True)
    x, cm = int(gen.uniform(.05, .95)*a.shape[1]), 10/p.spacing
    a[:, max(0, x-1):x+1] = 1
    for k in range(int(a.shape[0]/cm)): a[int(k*cm):int(k*cm)+2, max(0, x-(10 if k%5==0 else 5)):x] = 1
    return a, p.spacing, [(*p.points['joint'], side)]


def both_legs(seed, side, gen):
    p = simulate_knee(seed, int(gen.integers(7)), side, 460, bilateral=True, fov=float(gen.uniform(440, 520)))
    return expose(p, gen).pixels, p.spacing, [(*p.points['joint'], side),
        (*p.points['joint_other'], 'LR'[side=='L'])]


def two_exposures(seed, side, gen):
    films, knees, left, gap = [], [], 0, int(gen.uniform(6, 30))
    mm = None
    for k, s in enumerate('RL'): # as displayed, the patient's right knee is on the left
        p = simulate_knee(seed+k*10**6, int(gen.integers(7)), s, 340)
        a, mm = expose(p, gen).pixels, mm or p.spacing
        size = tuple(max(1, round(n*p.spacing/mm)) for n in a.shape)
        films.append(resize_array(a, size))
        x, y = p.points['joint']
        knees.append((left+x*size[1]/a.shape[1], y*size[0]/a.shape[0], s))
        left += size[1] + gap
    h, grey = max(f.shape[0] for f in films), float(gen.choice([0, 1]))
    films = [np.vstack([f, np.full((h-f.shape[0], f.shape[1]), grey, np.float32)]) for f in films]
    return np.hstack([films[0], np.full((h, gap), grey, np.float32), films[1]]), mm, knees


def near_an_edge(seed, side, gen):
    p = simulate_knee(seed, int(gen.integers(7)), side, 360)
    a, (x, y), (h, w) = expose(p, gen).pixels, p.points['joint'], p.shape
    d = int(round(gen.uniform(20, 34)/p.spacing))
    t, l = 0, 0
    if gen.random()<.5: t, h = (int(y)-d, h) if gen.random()<.5 else (0, int(y)+d)
    else: l, w = (int(x)-d, w) if gen.random()<.5 else (0, int(x)+d)
    t, l = max(t, 0), max(l, 0)
    return np.ascontiguousarray(a[t:h, l:w]), p.spacing, [(x-l, y-t, side)]


def unseen_framings(n: int):
    "Simulated films of framings that training has not seen."
    for make in (whole_leg, both_legs, two_exposures, near_an_edge):
        for k in range(n//4):
            gen, side = rng(k, make.__name__), 'RL'[k%2]
            a, mm, knees = make(3_000_000+k, side, gen)
            for known in (True, False):
                found = locate_knees(film:=Radiograph(a, (mm, mm) if known else None))
                for x, y, s in knees:
                    yield row_of(f"unseen: {make.__name__.replace('_', ' ')}, spacing "
                        f"{'' if known else 'un'}known", film, (x, y), s, mm, found)


def unseen_others(n: int):
    "Simulated films without a knee: whole, and parts of them askew."
    for make, name in ((lambda s: simulate_chest(s, size=384), 'chest'),
            (lambda s: simulate_hand(s, 'RL'[s%2], 384), 'hand'),
            (lambda s: simulate_hip(s, 'RL'[s%2], 384), 'hip')):
        for k in range(n//3):
            gen, p = rng(k, 'others', name), make(4_000_000+k)
            a = expose(p, gen).pixels
            if k%2:
                h, w = (int(gen.uniform(.4, 1)*v) for v in a.shape)
                t, l = (int(gen.integers(0, v-u+1)) for v, u in zip(a.shape, (h, w)))
                m = cv2.getRotationMatrix2D((w/2, h/2), float(gen.uniform(-30, 30)), 1)
                a = cv2.warpAffine(np.ascontiguousarray(a[t:t+h, l:l+w]), m, (w, h),
                    borderMode=cv2.BORDER_REPLICATE)
            for known in (True, False):
                yield row_of(f"simulated {name}, spacing {'' if known else 'un'}known",
                    Radiograph(a, (p.spacing,)*2 if known else None), (-1e6, -1e6), '', 1)


def injured(n: int):
    """Simulated knees that are hard to find; 20 mm from the middle between the bones is near enough for a
    crop of 140 mm."""
    for kind in INJURIES:
        for k in range(n//5):
            p = injured_knee(5_000_000+k, kind, 'RL'[k%2], 384)
            a = expose(p, rng(k, 'injured', kind)).pixels
            for known in (True, False):
                yield row_of(f"injured: {kind}, spacing {'' if known else 'un'}known",
                    Radiograph(a, (p.spacing,)*2 if known
                    else None, dict(BodyPartExamined='KNEE')), p.points['joint'], p.side, p.spacing)


def row_of(kind, film, joint, side, mm, found=None):
    "One line of the table: how far, how sure, which side, how long; and what a recipe keeps."
    start = time.process_time()
    if found is None: found = locate_knees(film)
    ms = 1000*(time.process_time()-start)
    nearest = min(found, key=lambda k: np.hypot(k.center[0]-joint[0], k.center[1]-joint[1]), default=None)
    error = np.hypot(nearest.center[0]-joint[0], nearest.center[1]-joint[1]) if found else np.inf
    called = 'KNEE' in str(film.tags.get('BodyPartExamined', '')).upper()
    kept = found or locate_knees(film, doubtful=CALLED if called else DOUBTFUL, called=called)
    place = kept[0].center if kept else (np.inf, np.inf)
    if found: place = nearest.center
    return dict(kind=kind, found=bool(found), error_mm=error*mm, kept=bool(kept),
        doubt=bool(kept) and not found,
        kept_within_20_mm=np.hypot(place[0]-joint[0], place[1]-joint[1])*mm<=20,
        within_5_percent=error<=.05*film.shape[1],
        side=bool(found) and nearest.side==side, ms=ms, film=film, knees=found)


def real_knees(data: Path, n: int):
    gen = rng(0, 'real knees')
    table = pd.read_csv(data/'knee_oai/manifest.csv')
    crops = [read_radiograph(data/'knee_oai'/p) for p in table.path]
    table['at'] = joints([r.pixels for r in crops], table.side)
    for i in table.sample(min(n, len(table)), random_state=0).index:
        r, side, at = crops[i], table.side[i], table['at'][i]
        who = dict(patient=str(table.patient[i]))
        yield row_of('OAI crop', Radiograph(r.pixels), (r.shape[1]*at[0], r.shape[0]*at[1]), side,
            CROP_MM/224) | who
        for name, (film, joint) in (('OAI in black', in_black(r, at, gen)),
                ('OAI in a leg', in_leg(r, at, side, gen))):
            yield row_of(f'{name}, spacing known', film, joint, side, film.spacing[0]) | who
            yield row_of(f'{name}, spacing unknown', Radiograph(film.pixels), joint, side,
                film.spacing[0]) | who


def hospital(n: int):
    "Films of a simulated hospital: those with a knee, and how many of the others are taken for one."
    with tempfile.TemporaryDirectory() as d:
        truth = simulate_hospital(d, n=n, seed=77, size=512, workers=1)
        for t in truth[truth.broken==''].itertuples():
            r = read_radiograph(Path(d)/t.path)
            if t.body_part=='KNEE':
                yield row_of('simulated hospital', r, (t.joint_x, t.joint_y), t.laterality, t.spacing_mm)
            else: yield row_of('simulated other', r, (-1e6, -1e6), '', 1)


def others(data: Path, n: int):
    "Real radiographs without a knee."
    odd = pd.read_csv(data/'chest_nih/manifest.csv',
        usecols=['path', 'patient_id']).query('patient_id%2==1').path
    sets = {'chest_nih': [data/'chest_nih'/p for p in odd],
        'chest_covid': sorted((data/'chest_covid/images').iterdir()),
        'chest_child': sorted((data/'chest_child/images').iterdir())}
    for name, files in sets.items():
        for i in np.linspace(0, len(files)-1, min(n, len(files))).astype(int):
            yield row_of(name, read_radiograph(files[i]), (-1e6, -1e6), '', 1) | dict(file=files[i].name)
    for f in sorted((data/'dicom').glob('*.dcm')):
        try: yield row_of('dicom', read_radiograph(f), (-1e6, -1e6), '', 1) | dict(file=f.name)
        except RadiologyError: pass


def picture(rows, path):
    "The films of `rows` with their boxes, on one sheet."
    tiles = []
    for r in rows:
        f = 220/max(r['film'].shape)
        a = cv2.cvtColor((resize_array(r['film'].pixels,
            tuple(max(1, int(n*f)) for n in r['film'].shape))*255).astype(np.uint8), cv2.COLOR_GRAY2BGR)
        for k in r['knees']:
            x1, y1, x2, y2 = (int(v*f) for v in k.box)
            cv2.rectangle(a, (x1, y1), (x2, y2), (0, 255, 255), 1)
            cv2.circle(a, (int(k.center[0]*f), int(k.center[1]*f)), 3, (0, 0, 255), -1)
            cv2.putText(a, f'{k.side} {k.score:.2f}', (3, 14), 0, .45, (0, 255, 0), 1)
        tiles.append(cv2.copyMakeBorder(a, 0, 224-a.shape[0], 0, 224-a.shape[1], cv2.BORDER_CONSTANT))
    while len(tiles)%5: tiles.append(np.zeros_like(tiles[0]))
    cv2.imwrite(str(path), np.vstack([np.hstack(tiles[i:i+5]) for i in range(0, len(tiles), 5)]))


def share(v) -> str:
    return f'{100*np.mean(v):.1f}'


def told(hits, who) -> str:
    "A share in percent with its interval over patients."
    v = proportion_ci(hits, groups=who)
    return f'{100*v.value:.1f} ({100*v.low:.1f} to {100*v.high:.1f})'


def print_others(t):
    "How many films without a knee are taken for one, or kept as doubtful."
    chests = t[t.kind.str.startswith('chest_')]
    if len(chests): t = pd.concat([t, chests.assign(kind='real chests, all', file=None)])
    rest = t.groupby('kind', sort=False)
    print('\ntaken for a knee:')
    print(pd.DataFrame(dict(films=rest.size(), alarms=rest.found.sum(), doubtful=rest.doubt.sum(),
        percent=rest.found.agg(lambda v: told(v, np.arange(len(v)))),
        doubtful_percent=rest.doubt.agg(lambda v: told(v, np.arange(len(v)))),
        median_ms=rest.ms.median().round(1))).to_string())
    if 'file' in t: print(t[t.kept & t.file.notna()][['kind', 'file', 'found']].to_string(index=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--n', type=int, default=400, help='films of each kind')
    parser.add_argument('--others', action='store_true', help='the real radiographs without a knee alone')
    parser.add_argument('--pictures', type=Path, help='a folder for pictures of the worst')
    args = parser.parse_args()
    cv2.setNumThreads(1)
    data = os.environ.get('RADIOLOGY_AI_REAL_DATA')
    if args.others and not data: parser.error('--others needs RADIOLOGY_AI_REAL_DATA')
    rows = [] if args.others else [*unseen_framings(args.n), *injured(args.n), *unseen_others(args.n),
        *hospital(args.n//2)]
    if data: rows += [*([] if args.others else real_knees(Path(data), args.n)), *others(Path(data), args.n)]
    else: print('RADIOLOGY_AI_REAL_DATA is not set: simulated films only')
    if args.others:
        print_others(pd.DataFrame(rows))
        return
    t = pd.DataFrame(rows)
    if 'patient' not in t: t['patient'] = None
    for known in ('known', 'unknown'):
        part = t[t.kind.str.startswith('unseen') & t.kind.str.endswith(f' {known}')]
        rows += [r | dict(kind=f'unseen: all, spacing {known}') for r in part.to_dict('records')]
    t = pd.DataFrame(rows).reindex(columns=list(t))
    knee = t[t.kind.str.contains('unseen|hospital|OAI|injured')]
    g = knee.groupby('kind', sort=False)
    who = knee.patient.where(knee.patient.notna(), pd.Series(knee.index.astype(str), knee.index)).astype(str)
    print(pd.DataFrame({name: {kind: told(part[name], who[part.index]) for kind, part in g}
        for name in ('found', 'kept', 'kept_within_20_mm')}).loc[knee.kind.unique()].to_string(), '\n')
    print(pd.DataFrame(dict(knees=g.size(), found=g.found.agg(share),
        median_mm=knee[knee.found].groupby('kind').error_mm.median().round(2),
        within_10_mm=g.error_mm.agg(lambda e: share(e<=10)),
        within_5_percent_of_width=g.within_5_percent.agg(share), side_right=g.side.agg(share),
        median_ms=g.ms.median().round(1))).loc[knee.kind.unique()].to_string())
    print_others(t.drop(knee.index))
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        for kind, part in t.groupby('kind', sort=False):
            order = (part.error_mm.where(part.found, 1e9).sort_values(ascending=False).index
                if kind in set(knee.kind) else part.sort_values('found', ascending=False).index)
            picture([rows[i] for i in order[:20]],
                args.pictures/f"{kind.replace(' ', '_').replace(',', '').replace(':', '')}.png")


if __name__=='__main__': main()
