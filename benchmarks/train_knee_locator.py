"""Learn the two networks of the knee localiser on simulated knees and judge them on unseen ones.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/train_knee_locator.py [--films 6000] [--epochs 8] [--workers 2]

Needs torch, which the localiser itself does not. All knees are simulated. Of real radiographs only chests without a
knee take part, as what is not to be taken for one: those of ChestX-ray14 (NIH Clinical Center; Wang et al., CVPR
2017) whose patient number is even, if RADIOLOGY_AI_REAL_DATA is set. `benchmarks/knee_locator.py` judges on real
knees, on the other half of those patients and on chests of other hospitals.
"""
import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from radiology_ai.core import Radiograph, resize_array, rng, scale, shift, transform_points
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.phantom.chest import simulate_chest
from radiology_ai.phantom.injured import injured_knee
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.phantom.limbs import simulate_hand, simulate_hip
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess import knee as K
from radiology_ai.preprocess.intensity import clahe

OUT = Path(__file__).parents[1]/'radiology_ai/preprocess/knee_locator.safetensors'
CANVAS = 104  # pixels of a training view, 2 mm each
WIDTH = 75.   # mm of the plateau at which log size is 0
# not upside down: see `narrowed`
HARD = ('hand', 'dislocation', 'hand', 'dislocation', 'plate', 'nail', 'plaster', 'fixator', 'oblique')


def film(seed: int, part: str) -> tuple[Radiograph, list]:
    "An exposed film and its knees as (x, y, side)."
    g = rng(seed, 'locator', part)
    if part=='injured':
        more = dict(fov=float(g.uniform(240, 400))) if g.random()<.3 else {}
        p = injured_knee(seed, HARD[seed%len(HARD)], 'RL'[seed//len(HARD)%2], int(g.integers(200, 320)),
            **more)
        knees = [(*p.points['joint'], p.side)]
    elif part=='knee':
        both, long = g.random()<.2, g.random()<.4
        more = dict(fov=float(g.uniform(240, 420))) if long and not both else {}
        more |= dict(turn=float(g.normal(0, 6)), rotation=float(np.clip(g.normal(0, 6), -14, 14)))
        p = simulate_knee(seed, int(g.integers(0, 7))*int(g.random()<.5), 'RL'[seed%2],
            int(g.integers(200, 320)), bilateral=both, hardware=bool(g.random()<.15), **more)
        knees = [(*p.points['joint'], p.side)] + ([(*p.points['joint_other'], 'LR'[p.side=='L'])] if both
            else [])
    else:
        make = dict(chest=lambda: simulate_chest(seed, size=256),
            hand=lambda: simulate_hand(seed, 'RL'[seed%2], 256),
            hip=lambda: simulate_hip(seed, 'RL'[seed%2], 256))
        p, knees = make[part](), []
    return Radiograph(expose(p, g).pixels, (p.spacing, p.spacing)), knees


def other_grey(a: np.ndarray, g) -> np.ndarray:
    "The same film from another vendor, another room, another century."
    a = a**np.float32(np.exp(g.normal(0, .4)))
    if g.random()<.35: a = clahe(a, float(g.uniform(1.5, 5)), int(g.integers(3, 9)))
    if g.random()<.5: a = cv2.GaussianBlur(a, (0, 0), float(g.uniform(.3, 2.2)))
    elif g.random()<.4:
        a = np.clip(a + float(g.uniform(.3, 1.5))*(a-cv2.GaussianBlur(a, (0, 0), float(g.uniform(1, 4)))), 0,
            1)
    if g.random()<.5:  # uneven brightness
        field = cv2.resize(g.normal(0, 1, (4, 4)).astype(np.float32), a.shape[::-1],
            interpolation=cv2.INTER_CUBIC)
        a = a + np.float32(g.uniform(0, .15))*field
    return np.clip(a + np.float32(g.uniform(0, .04))*g.standard_normal(a.shape, dtype=np.float32), 0, 1)


def clutter(a: np.ndarray, g) -> np.ndarray:
    "Bars, letters and covers that are no anatomy."
    if g.random()<.2: # a dressing, a filter, a part evened out by itself
        n, (r, c), (y, x) = g.uniform(.15, .6)*max(a.shape), g.uniform(0, 1, 2)*a.shape, np.ogrid[:a.shape[0],
            :a.shape[1]]
        inside = np.clip((n/2-np.maximum(np.abs(y-r), np.abs(x-c)))/(.1*n), 0, 1).astype(np.float32)
        a = np.clip(a*(1-inside) + inside*((a-a.mean())*float(np.exp(g.normal(0, .4))) + a.mean()
            + float(g.normal(0, .12))), 0, 1)
    a = np.rint(a*255).astype(np.uint8)
    for _ in range(int(g.integers(0, 4)) if g.random()<.5 else 0):
        r, c = g.uniform(0, 1, 2)*a.shape
        grey, kind = int(g.choice([0, 255, g.integers(256)])), g.random()
        if kind<.4:
            cv2.putText(a, str(g.choice(list('RLABX17'))), (int(c), int(r)), 0, float(g.uniform(.5, 2)), grey,
                int(g.integers(1, 5)))
        elif kind<.7:
            cv2.line(a, (int(c), int(r)), tuple(int(v) for v in g.uniform(0, 1, 2)*a.shape[::-1]), grey,
                int(g.integers(1, 7)))
        else: a[int(r):int(r)+int(g.uniform(5, 60)), int(c):int(c)+int(g.uniform(5, 60))] = grey
    return a.astype(np.float32)/255


def turned(part: str, g) -> float:
    "By how much a film lies askew, in radians."
    if part=='hand' and g.random()<.4:
        return float(np.radians(g.uniform(-180, 180))) # an upright wrist is what is most like a knee
    return float(np.radians(np.clip(g.normal(0, 9), -32, 32) if g.random()<.75 else g.uniform(-32, 32)))


def narrowed(pixels: np.ndarray, knees: list, mm: float, g):
    "A narrow film around the joint, or one on its head, or the film as it is; and its knees."
    kind = g.random()
    if knees and kind<.45:
        mid, high, _ = knees[int(g.integers(len(knees)))]
        t, b, le, ri = (float(v)/mm for v in g.uniform(36, 90, 4))
        r, c = max(0, int(high-t)), max(0, int(mid-le))
        knees = [(x-c, y-r, s) for x, y, s in knees if r<y<high+b and c<x<mid+ri]
        pixels = pixels[r:int(high+b), c:int(mid+ri)]
    elif not knees and kind<.5: # a part
        (h, w), (a, b) = pixels.shape, g.uniform(.35, 1, 2)
        r, c = int(g.uniform(0, 1-a)*h), int(g.uniform(0, 1-b)*w)
        pixels = pixels[r:r+max(32, int(a*h)), c:c+max(32, int(b*w))]
    elif knees and kind<.52: # on its head it is not to be found: a shank above a joint is an ankle
        pixels, knees = pixels[::-1] if g.random()<.7 else pixels.T, []
    return np.ascontiguousarray(pixels), knees


def view(r: Radiograph, knees: list, g, part: str):
    "One view for the first look: (CANVAS, CANVAS) int8 and its knees as (x, y, is_left, log size)."
    size = np.exp(g.uniform(-.3, .3)) if part in ('knee', 'injured') else np.exp(g.uniform(-.8, .8))
    per, turn = r.spacing[0]/K.MM*size, turned(part, g)
    pixels, knees = narrowed(r.pixels, knees, r.spacing[0], g)
    h, w = pixels.shape
    if knees and g.random()<.8: # a knee in the view
        x, y, _ = knees[int(g.integers(len(knees)))]
        at = g.uniform(.12, .88, 2)*CANVAS
    else: y, x, at = *(g.uniform(.1, .9, 2)*(h, w)), g.uniform(.2, .8, 2)*CANVAS
    m = shift(*at)@rotation(turn)@scale(per, per)@shift(-x, -y)
    a = clutter(other_grey(pixels, g), g)
    if per<.9: a = cv2.GaussianBlur(a, (0, 0), .45/per)
    out, mask = warped(a, m, (CANVAS, CANVAS))
    where = []
    for x, y, s in knees:
        x, y, _ = m@[x, y, 1]
        if 4<x<CANVAS-4 and 4<y<CANVAS-4: where.append((x, y, s=='L', np.log(size)))
    return np.rint(K.evened(out, mask)*31).astype(np.int8), where


def rotation(turn):
    return np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])


def warped(a, m, shape, border=None):
    "`a` moved by `m` (3, 3), and where it lies; around it its edge goes on, or `border`."
    to = (shift(-.5, -.5)@m@shift(.5, .5))[:2]
    out = cv2.warpAffine(a, to, shape[::-1], flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE if border is None else cv2.BORDER_CONSTANT,
        borderValue=float(border or 0))
    return out, cv2.warpAffine(np.ones_like(a), to, shape[::-1], flags=cv2.INTER_NEAREST)


def views(job):
    "Several views of one film."
    seed, part, n = job
    cv2.setNumThreads(1)
    r, knees = film(seed, part)
    g = rng(seed, 'views', part)
    return [view(r, knees, g, part) for _ in range(n)]


def scene(r: Radiograph, knees: list, g, part: str):
    """A film as a hospital may send it: askew, narrow, on a larger black or white ground. Its record with the
    spacing, and its knees."""
    pixels, knees = narrowed(r.pixels, knees, r.spacing[0], g)
    a, turn = clutter(other_grey(pixels, g), g), turned(part, g)
    h, w = a.shape
    room = g.uniform(1, 1.8, 2) if g.random()<.25 else np.ones(2)
    size = int(h*room[0]), int(w*room[1])
    m = shift(*(np.array(size[::-1])/2 + g.uniform(-.5, .5,
        2)*(np.array(size[::-1])-(w, h))))@rotation(turn)@shift(-w/2, -h/2)
    out, _ = warped(a, m, size, None if g.random()<.4 and (room==1).all()
        else float(g.choice([0., 0., 1., .5])))
    knees = [(*transform_points(m, [x, y]), s) for x, y, s in knees]
    return Radiograph(out, r.spacing), [k for k in knees if 0<k[0]<size[1] and 0<k[1]<size[0]]


def proposed(r: Radiograph, knees: list, g, weights, truth: int=2):
    """What the first look proposes, and `truth` views near each knee, cut out for the second look: (VIEW,
    VIEW) int8 and (is_knee, dx, dy, log size); is_knee is NaN where it is neither."""
    mm, out = r.spacing, []
    assumed = [mm, *((n/max(r.shape),)*2 for n in K.LENGTHS)] if g.random()<.6 else [mm]
    found = [p for at in assumed for p in K.places(r.pixels, at, weights) if p.logit>-4.5]
    for x, y, _ in knees*truth:
        f = float(np.exp(g.normal(0, .13)))
        dy, dx = g.normal(0, 4)/mm[0], g.normal(0, 4)/mm[1]
        found.append(K.Place(0, x+dx, y+dy, (mm[0]*f, mm[1]*f)))
    for p in found:
        cut, (top, left, a, b) = K.cut_out(r.pixels, p)
        at = [((x-left)/b, (y-top)/a) for x, y, _ in knees]
        x, y = min(at, key=lambda o: np.hypot(o[0]-K.VIEW/2, o[1]-K.VIEW/2), default=(1e3, 1e3))
        far, size = max(abs(x-K.VIEW/2), abs(y-K.VIEW/2)), np.log(p.mm[0]/mm[0])
        good = far<9 and abs(size)<.45
        is_knee = 1. if good else 0. if far>14 or abs(size)>.7 else np.nan
        out.append((np.rint(cut*31).astype(np.int8),
            (is_knee, (x-K.VIEW/2)/8 if good else 0, (y-K.VIEW/2)/8 if good else 0, size if good else 0)))
    return out


def cuts(job):
    "Views for the second look from one film, in `n` scenes."
    seed, part, n, weights = job
    cv2.setNumThreads(1)
    r, knees = film(seed, part)
    g, out = rng(seed, 'cuts', part), []
    for _ in range(n): out += proposed(*scene(r, knees, g, part), g, weights)
    return out


def chest_cuts(job):
    "Views for the second look from a real chest."
    path, n, weights = job
    cv2.setNumThreads(1)
    r, g, out = read_radiograph(path), rng(0, 'chest', Path(path).name), []
    for _ in range(n):
        mm = float(np.exp(g.uniform(np.log(.2), np.log(.9))))
        a, _ = scene(Radiograph(r.pixels, (mm, mm)), [], g, 'chest')
        out += proposed(a, [], g, weights)
    return out


def mistakes(job):
    "Views around the likeliest knees that the present first look sees in a film without one."
    seed, part, weights = job
    cv2.setNumThreads(1)
    r, _ = film(seed, part)
    g, out = rng(seed, 'mistakes'), []
    for _ in range(2):
        pixels = other_grey(r.pixels, g)
        for mm in K.LENGTHS:
            s = mm/max(pixels.shape)*np.exp(g.uniform(-.15, .15))/K.MM
            image = np.pad(K.evened(resize_array(pixels, tuple(max(4, round(n*s)) for n in pixels.shape))),
                CANVAS)
            heat = K.first_look(image, weights)[:2].max(0)
            at = np.unravel_index(heat.argmax(), heat.shape)
            if heat[at]<-2.2: continue
            y, x = (int(np.clip(k*K.CELL - g.uniform(.3, .7)*CANVAS, 0, n-CANVAS))
                for k, n in zip(at, image.shape))
            out.append((np.rint(image[y:y+CANVAS, x:x+CANVAS]*31).astype(np.int8), []))
    return out


def parts(n: int, start: int, share: float=.6, *, injured: float=0.) -> list:
    "Seeds and parts of `n` films; of the knees a share is hard to find."
    k = int(n*share)
    hard = int(k*injured)
    return [(start+i, 'injured' if i<hard else 'knee')
        for i in range(k)] + [(start+i, ('chest', 'hand', 'hip', 'hand')[i%4])
        for i in range(n-k)]


def targets(where: list):
    "Heat (2, h, w), regression (3, h, w) and its weight (h, w) of one view."
    n = CANVAS//K.CELL
    heat = np.zeros((2, n, n), np.float32)
    reg = np.zeros((3, n, n), np.float32)
    weight = np.zeros((n, n), np.float32)
    yy, xx = np.mgrid[:n, :n] + .5
    for x, y, left, size in where:
        x, y = x/K.CELL, y/K.CELL
        blob = np.exp(-((xx-x)**2 + (yy-y)**2)/(2*.9**2)).astype(np.float32)
        heat[int(left)] = np.maximum(heat[int(left)], blob/blob.max())
        near = blob>weight
        reg[:, near] = np.stack([x-xx, y-yy, np.full_like(xx, size)])[:, near]
        weight = np.maximum(weight, blob)
    return heat, reg, weight*(weight>.2)


def network(table, last=()):
    "The convolutions of `table` with batch normalisation between them, and `last`."
    from torch import nn
    layers, c = [], 1
    for i, (k, size, stride, dilation) in enumerate(table):
        layers.append(nn.Conv2d(c, k, size, stride, dilation*(size//2), dilation))
        if last or i<len(table)-1: layers += [nn.BatchNorm2d(k), nn.ReLU()]
        c = k
    return nn.Sequential(*layers, *last)


def folded(net, name: str) -> dict:
    "Weights with the batch normalisation folded in, float16."
    convs = [m for m in net if hasattr(m, 'kernel_size')]
    norms = [m for m in net if hasattr(m, 'running_mean')]
    out = {}
    for i, c in enumerate(convs):
        w, b = c.weight.detach().numpy(), c.bias.detach().numpy()
        if i<len(norms):
            n = norms[i]
            s = (n.weight/(n.running_var+n.eps).sqrt()).detach().numpy()
            w, b = w*s[:, None, None, None], (b-n.running_mean.numpy())*s + n.bias.detach().numpy()
        # safetensors writes bytes as they lie
        out |= {f'{name}.w{i}': np.ascontiguousarray(w, np.float16),
            f'{name}.b{i}': np.ascontiguousarray(b, np.float32)}
    if hasattr(net[-1], 'in_features'):
        out |= {f'{name}.w': np.ascontiguousarray(net[-1].weight.detach().numpy(), np.float16),
            f'{name}.b': np.ascontiguousarray(net[-1].bias.detach().numpy(), np.float32)}
    return out


def flipped(x, heat, reg, weight, on):
    "Mirror the views where `on` is true: right knees become left ones."
    import torch
    sel = on[:, None, None, None]
    heat = torch.where(sel, heat.flip(-1)[:, [1, 0]], heat)
    reg = torch.where(sel, reg.flip(-1)*torch.tensor([-1., 1, 1])[:, None, None], reg)
    return torch.where(sel, x.flip(-1), x), heat, reg, torch.where(on[:, None, None], weight.flip(-1), weight)


def loss_of(out, heat, reg, weight):
    "Focal loss of the heat (CornerNet, Law 2018) and L1 of the regression."
    import torch
    logits = out[:, :2]
    p = logits.sigmoid().clamp(1e-4, 1-1e-4)
    focal = torch.where(heat>.999, -(1-p)**2*p.log(), -(1-heat)**4*p**2*(1-p).log()).sum()
    l1 = ((out[:, 2:]-reg).abs()*weight[:, None]*torch.tensor([1., 1, 2])[:, None, None]).sum()
    return (focal + .5*l1)/max(1, int((heat>.999).sum()))


def fit(net, n: int, step, epochs: int, bs: int, lr: float, threads: int):
    "Train `net`; `step(rows)` gives the loss of some of `n` examples."
    import torch
    torch.set_num_threads(threads)
    opt = torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-2)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=epochs*(n//bs))
    for epoch in range(epochs):
        order, total = torch.randperm(n), 0.
        for rows in order[:n//bs*bs].split(bs):
            loss = step(rows)
            opt.zero_grad()
            loss.backward()
            opt.step()
            plan.step()
            total += loss.item()
        print(f'epoch {epoch}: loss {total/(n//bs):.3f}', flush=True)
    return net.eval()


def learn_first(data, epochs, threads, bs=64) -> dict:
    import torch
    torch.manual_seed(0)
    net = network(K.FIRST)
    net[-1].bias.data[:2] = -4.
    net = net.to(memory_format=torch.channels_last)
    x = torch.from_numpy(np.stack([d[0] for d in data]))
    wanted = [torch.from_numpy(np.stack(o).astype(np.float16)) for o in zip(*(targets(d[1]) for d in data))]
    def step(rows):
        xb, *t = flipped(x[rows][:, None].float()/31, *(o[rows].float() for o in wanted), torch.rand(bs)<.5)
        with torch.autocast('cpu', torch.bfloat16): out = net(xb.to(memory_format=torch.channels_last))
        return loss_of(out.float(), *t)
    return folded(fit(net, len(x), step, epochs, bs, 5e-3, threads), 'first')


def learn_second(data, epochs, threads, bs=128) -> dict:
    import torch
    from torch import nn
    from torch.nn import functional as F
    torch.manual_seed(0)
    net = network(K.SECOND, [nn.Flatten(), nn.Linear(K.SECOND[-1][0]*(K.VIEW//8)**2,
        4)]).to(memory_format=torch.channels_last)
    x = torch.from_numpy(np.stack([d[0] for d in data]))
    t = torch.tensor([d[1] for d in data], dtype=torch.float32)
    sign = torch.tensor([1., -1, 1, 1]) # of what a mirror does to dx
    def step(rows):
        xb, tb = x[rows][:, None].float()/31, t[rows]
        on = torch.rand(len(rows))<.5
        xb, tb = torch.where(on[:, None, None, None], xb.flip(-1), xb), torch.where(on[:, None], tb*sign, tb)
        xb = torch.roll(xb, tuple(int(v) for v in torch.randint(-1, 2, (2,))),
            (2, 3))*(1+.1*torch.randn(len(rows), 1, 1, 1))
        with torch.autocast('cpu', torch.bfloat16): out = net(xb.to(memory_format=torch.channels_last))
        out, known, knee = out.float(), ~tb[:, 0].isnan(), tb[:, 0]==1
        loss = F.binary_cross_entropy_with_logits(out[known, 0], tb[known, 0])
        if knee.any(): loss = loss + (out[knee, 1:]-tb[knee, 1:]).abs().mean()
        return loss
    return folded(fit(net, len(x), step, epochs, bs, 3e-3, threads), 'second')


def judge(job):
    "Best score, error in mm and sides of one unseen film; without and with its spacing."
    seed, part, weights, known = job
    cv2.setNumThreads(1)
    r, knees = film(seed, part)
    K._weights = lambda: weights
    g = rng(seed, 'judge')
    mm = r.spacing[0]
    r = Radiograph(other_grey(r.pixels, g), r.spacing if known else None)
    # two knees are told by their order
    best, found = K.locate_knees(r, threshold=0.), K.locate_knees(r, threshold=.3)
    errors = [min(((np.hypot(k.center[0]-x, k.center[1]-y)*mm, k.side==side) for k in found),
        default=(999., False)) for x, y, side in knees]
    return part, known, best[0].score if best else 0., max((e for e, _ in errors),
        default=np.nan), all(s for _, s in errors), len(knees)


def real_chests() -> list:
    "Files of ChestX-ray14 patients with an even number."
    folder = Path(os.environ.get('RADIOLOGY_AI_REAL_DATA', ''))/'chest_nih'
    if not (folder/'manifest.csv').exists(): return []
    table = pd.read_csv(folder/'manifest.csv', usecols=['path', 'patient_id'])
    return [str(folder/p) for p in table.path[table.patient_id%2==0]]


def f32(weights): return {k: v.astype(np.float32) for k, v in weights.items()}


def first_weights(args, pool, said) -> dict:
    "Learn the first look: a few epochs, then the mistakes of these with the rest."
    data = flat(pool.map(views, [(*p, args.views) for p in parts(args.films, 10_000)], chunksize=8))
    said(f'{len(data)} views of {args.films} films, {sum(len(d[1])>0 for d in data)} with a knee')
    early = f32(learn_first(data, 3, args.threads))
    data += flat(pool.map(mistakes, [(*p, early) for p in parts(args.films//4, 500_000, share=0)],
        chunksize=8))
    said(f'{len(data)} views with the mistakes of the first turn')
    return learn_first(data, args.epochs, args.threads)


def flat(results): return [v for vs in results for v in vs]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--films', type=int, default=6000, help='films to learn from')
    parser.add_argument('--views', type=int, default=4, help='views of each film')
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--injured', type=float, default=0.,
        help='share of the knees that are hard to find, for the second look')
    parser.add_argument('--test', type=int, default=600, help='unseen films')
    parser.add_argument('--workers', type=int, default=2, help='processes of simulation')
    parser.add_argument('--threads', type=int, default=1, help='threads of torch')
    parser.add_argument('--out', type=Path, default=OUT)
    parser.add_argument('--first', type=Path,
        help='weights of an earlier run whose first look is kept; only the second is learnt')
    args = parser.parse_args()
    start = time.time()
    def said(what): print(f'{what}, {time.time()-start:.0f} s', flush=True)
    with ProcessPoolExecutor(args.workers, mp_context=get_context('spawn')) as pool:
        if args.first is None: weights = first_weights(args, pool, said)
        else: weights = {k: v for k, v in load_file(args.first).items() if k.startswith('first.')}
        first = f32(weights)
        cut = flat(pool.map(cuts, [(*p, 3, first) for p in parts(args.films, 2_000_000, .4,
            injured=args.injured)], chunksize=8))
        chests = real_chests()
        real = flat(pool.map(chest_cuts, [(p, 2, first) for p in chests], chunksize=8))
        said(f'{len(cut)} views for the second look, {sum(d[1][0]==1 for d in cut)} of a knee, and '
            f'{len(real)} of {len(chests)} real chests')
        weights |= learn_second(cut+real, args.epochs, args.threads)
        said('trained')
        w = f32(weights) | {'threshold': np.float32([0])}
        rows = list(pool.map(judge, [(*p, w, known) for p in parts(args.test, 900_000)
            for known in (True, False)], chunksize=8))
    part, known, score, error, side, n = (np.array(o) for o in zip(*rows))
    knee = part=='knee'
    # one other film in a hundred may pass
    weights['threshold'] = np.float32([np.clip(np.quantile(score[~knee], .99), .5, .8)])
    save_file(weights, args.out)
    t = weights['threshold'][0]
    for k, name in ((True, 'spacing known'), (False, 'spacing unknown')):
        a, b = knee & (known==k), ~knee & (known==k)
        found = a & (score>=t)
        print(f'{name}: {a.sum()} knee films, found {np.mean(score[a]>=t):.3f}, median error '
            f'{np.median(error[found]):.2f} mm, within 10 mm {np.mean(error[a]<=10):.3f}, side right {side[a].mean():.3f}; '
              f'{b.sum()} others, taken for a knee {np.mean(score[b]>=t):.3f}')
    print(f'threshold {t:.2f}, {args.out.stat().st_size/1024:.0f} kB, {time.time()-start:.0f} s in all')


if __name__=='__main__': main()
