"""Learn what tells a radiograph from its negative, and judge it on real films as they are and inverted.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/polarity.py learn [--films 1800] [--epochs 80]
    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/polarity.py judge [--sheet FILE.png]

`learn` needs torch and writes the weights that the library ships. Learnt from: simulated knees, chests, hands and
hips, and chests of ChestX-ray14 (NIH Clinical Center; Wang et al., CVPR 2017) of patients with an even number; every
fifth of these patients and the last sixth of the simulated films are kept for the temperature and the limit.
`judge` looks at what was never learnt from: the patients with an odd number, children, COVID-19, JSRT, knees (OAI),
and real DICOM files, each film as it is and inverted. Some films of the public sets are stored as negatives: those
that a reader has found to be are named in `NEGATIVES` and count as such.
"""
import os

for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(k, '1')
import argparse
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from radiology_ai.core import rng
from radiology_ai.dicom import polarity as P
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.metrics.intervals import proportion_ci

OUT = Path(P.__file__).with_name('polarity.safetensors')
SETS = dict(chest_nih='patient_id', chest_child='patient_group', chest_covid='patient', chest_jsrt='path',
    knee_oai='patient')
KEPT = 96  # pixels of a film that is learnt from
# films of the public sets that are stored as negatives
NEGATIVES = {'chest_nih/images/00017625_000.jpg', 'chest_nih/images/00017999_000.jpg'} | {
    f'knee_oai/images/{n}.png' for n in ('train_0_9659701R', 'train_0_9597250L', 'train_0_9556150L',
    'train_1_9563176R', 'train_1_9599243R', 'train_2_9567704R', 'train_2_9777777R', 'train_2_9612772L',
    'train_3_9564189L', 'train_4_9721540L', 'val_2_9790812R')}


def simulated(seed: int) -> np.ndarray:
    "A simulated film of a knee, chest, hand or hip."
    from radiology_ai.phantom.chest import simulate_chest
    from radiology_ai.phantom.knee import simulate_knee
    from radiology_ai.phantom.limbs import simulate_hand, simulate_hip
    from radiology_ai.phantom.xray import expose
    part = ('knee', 'chest', 'hand', 'hip', 'knee', 'chest')[seed%6]
    g, side = rng(seed, 'polarity', part), 'RL'[seed//6%2]
    make = dict(knee=lambda: simulate_knee(seed, grade=int(g.integers(0, 7)), side=side, size=192,
            bilateral=bool(g.random()<.15), hardware=bool(g.random()<.15)),
        chest=lambda: simulate_chest(seed, opacities=int(g.choice([0, 0, 1, 2])), size=192),
        hand=lambda: simulate_hand(seed, side, 192), hip=lambda: simulate_hip(seed, side, 192))
    return expose(make[part](), g).pixels


def small(pixels: np.ndarray) -> np.ndarray:
    return cv2.resize(pixels.astype(np.float32), (KEPT, KEPT), interpolation=cv2.INTER_AREA)


def moved(a: np.ndarray, g) -> np.ndarray:
    "(`P.SIZE`, `P.SIZE`): the film turned, stretched, cut, mirrored, its border of any grey."
    n, scale, turn = P.SIZE, np.exp(g.uniform(-.1, .6)), g.normal(0, 10)
    if g.random()<.3: turn += 90*g.integers(4)
    c, s, wide = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn)), scale*np.exp(g.normal(0, .15))
    m = np.array([[c*wide, -s*scale], [s*wide, c*scale]])*n/KEPT
    if g.random()<.5: m[:, 0] *= -1
    middle = KEPT/2+g.uniform(-KEPT/7, KEPT/7, 2)*(scale>1.15)
    border = float(g.choice([0, 1, a.mean()]))
    return cv2.warpAffine(a, np.hstack([m, (n/2-m@middle)[:, None]]).astype(np.float32), (n, n),
        flags=cv2.INTER_AREA if scale<1 else cv2.INTER_LINEAR, borderValue=border,
        borderMode=cv2.BORDER_CONSTANT if g.random()<.7 else cv2.BORDER_REPLICATE)


def shuttered(a: np.ndarray, g) -> np.ndarray:
    "What was not exposed, on up to four sides: black or white, whatever the picture's polarity, with a soft edge."
    n = len(a)
    outside = np.zeros((n, n), np.float32)
    for k in range(4):
        if g.random()<.6: np.rot90(outside, k)[:round(n*g.choice([g.uniform(.02, .15), g.uniform(.1, .36)]))] = 1
    if g.random()<.6: outside = cv2.GaussianBlur(outside, (0, 0), float(g.uniform(.3, 2)))
    grey = float(g.choice([0, 1, g.random()], p=[.4, .4, .2]))
    return a*(1-outside)+grey*outside


def varied(a: np.ndarray, g) -> np.ndarray:
    "A view of a film as another vendor, collimator and cassette would give it; bone stays bright."
    gamma = np.exp(g.normal(0, .45))
    a = moved(a**gamma if g.random()<.5 else 1-(1-a)**gamma, g)
    if g.random()<.25:
        a = cv2.createCLAHE(float(g.uniform(1.5, 5)), (4, 4)).apply((a.clip(0, 1)*255).astype(np.uint8))/255
    if g.random()<.2: a = cv2.GaussianBlur(a, (0, 0), float(g.uniform(.3, 1.2)))
    if g.random()<.5: a = shuttered(a, g)
    return a+g.normal(0, .03, a.shape) if g.random()<.2 else a


def learnt_from(data: Path, films: int) -> tuple[np.ndarray, np.ndarray]:
    "Films (N, KEPT, KEPT) of ChestX-ray14 and of the simulator, and (N,) bool: kept for the limit."
    t = pd.read_csv(data/'chest_nih/manifest.csv')
    t = t[(t.patient_id%2==0) & ~('chest_nih/'+t.path).isin(NEGATIVES)]
    real = [small(read_radiograph(data/'chest_nih'/p).pixels) for p in t.path]
    made = [small(simulated(i)) for i in range(films)]
    kept = np.concatenate([t.patient_id%10==0, np.arange(films)>=films*5//6])
    return np.stack(real+made).clip(0, 1), kept


def learn(data: Path, films: int, epochs: int, batch: int=64):
    import torch
    from safetensors.numpy import save_file
    from torch import nn
    from torch.nn import functional as F
    torch.manual_seed(0)
    x, kept = learnt_from(data, films)
    g, rows = rng(0, 'polarity', 'learn'), np.flatnonzero(~kept)
    views = lambda rows, g: torch.from_numpy(np.stack([P.evened(varied(x[j], g)) for j in rows]))[:, None]
    ins = [1, *(n for n, *_ in P.LAYERS[:-1])]
    layers = [nn.Conv2d(i, n, k, stride, d*(k//2), d) for i, (n, k, stride, d) in zip(ins, P.LAYERS)]
    net = nn.Sequential(*(m for c in layers[:-1] for m in (c, nn.ReLU())), layers[-1])
    logit = lambda v: (net(v)-net(-v)).mean((1, 2, 3))
    steps, began = epochs*len(rows)//batch, time.perf_counter()
    opt = torch.optim.AdamW(net.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps)
    for k in range(steps):
        loss = F.softplus(-logit(views(g.choice(rows, batch), g))).mean()
        opt.zero_grad(); loss.backward(); opt.step(); schedule.step()
        if k%200==0: print(f'step {k} of {steps}: loss {loss:.3f}, {time.perf_counter()-began:.0f} s', flush=True)
    g = rng(1, 'polarity', 'limit')
    with torch.no_grad(): z = np.concatenate([logit(views(np.flatnonzero(kept), g)).numpy() for _ in range(8)])
    heats = np.geomspace(.3, 5, 60)
    heat = heats[np.argmin([np.logaddexp(0, -z/t).mean() for t in heats])]
    limits = np.linspace(0, 8, 161)
    limit = limits[np.argmax([(z<-c).mean()<=1e-3 for c in limits])]
    print(f'{len(z)} views kept apart: wrong {(z<0).mean():.4f}, temperature {heat:.2f}, limit {limit:.2f}, '
        f'unsure {(abs(z)<limit).mean():.4f}')
    out = {f'{what}{i}': getattr(c, name).detach().numpy().astype(np.float16)
        for i, c in enumerate(layers) for what, name in (('w', 'weight'), ('b', 'bias'))}
    save_file(out | dict(temperature=np.float32([heat]), limit=np.float32([limit])), OUT)
    print(f'{OUT}: {OUT.stat().st_size} bytes')


def judge(data: Path, sheet):
    rows = []
    for name, who in SETS.items():
        t = pd.read_csv(data/name/'manifest.csv')
        if name=='chest_nih': t = t[t.patient_id%2==1]
        rows += [(name, str(p), str(data/name/f), f'{name}/{f}' in NEGATIVES) for p, f in zip(t[who], t.path)]
    rows += [('dicom', f.name, str(f), False) for f in sorted((data/'dicom').glob('*.dcm'))]
    out, times = [], []
    for name, patient, path, negative in rows:
        try: r = read_radiograph(path)
        except Exception as e:
            print(f'{Path(path).name}: {type(e).__name__}')
            continue
        for inverted in (False, True):
            began = time.process_time()
            found = P.find_polarity(1-r.pixels if inverted else r.pixels)
            times.append(time.process_time()-began)
            out.append((name, patient, path, inverted, found.bone=='unsure',
                (found.bone=='dark')==(inverted!=negative), found.score))
    t = pd.DataFrame(out, columns='set patient path inverted unsure right score'.split())
    print('| Films | looks | right, of those told (95 % Wilson, by patient) | wrong | unsure |\n|---|---|---|---|---|')
    for name, part in [*t.groupby('set', sort=False), ('all', t)]:
        told = part[~part.unsure]
        i = proportion_ci(told.right, groups=told.set+told.patient)
        print(f'| {name} | {len(part)} | {i.value:.4f} ({i.low:.4f} to {i.high:.4f}) | {(~told.right).sum()} '
            f'| {part.unsure.mean():.4f} |')
    print(f'{1e3*np.median(times):.2f} ms of processor time a film (median)')
    odd = t[(t.unsure | ~t.right) & ~t.inverted]
    print(odd.drop(columns='patient').assign(path=odd.path.map(lambda p: Path(p).name)).to_string(index=False))
    if sheet and len(odd):
        cells = [np.pad(small(read_radiograph(p).pixels), 2) for p in odd.path[:60]]
        cells += [np.zeros_like(cells[0])]*(-len(cells)%10)
        rows = [np.hstack(cells[i:i+10]) for i in range(0, len(cells), 10)]
        cv2.imwrite(str(sheet), (255*np.vstack(rows).clip(0, 1)).astype(np.uint8))


if __name__=='__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('what', choices=['learn', 'judge'])
    a.add_argument('--films', type=int, default=1800)
    a.add_argument('--epochs', type=int, default=80)
    a.add_argument('--sheet')
    o = a.parse_args()
    cv2.setNumThreads(1)
    real = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])
    if o.what=='learn': learn(real, o.films, o.epochs)
    else: judge(real, o.sheet)
