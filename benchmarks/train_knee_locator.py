"""Learn the knee localiser's network on simulated radiographs and judge it on unseen ones.

    python benchmarks/train_knee_locator.py [--films 5000] [--epochs 8] [--workers 2]

Needs torch, which the localiser itself does not. Real radiographs take no part; `benchmarks/knee_locator.py` reports on them.
"""
import argparse, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2, numpy as np
from safetensors.numpy import save_file

from radiology_ai.core import Radiograph, resize_array, rng, scale, shift
from radiology_ai.phantom.chest import simulate_chest
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.phantom.limbs import simulate_hand, simulate_hip
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess import knee as K
from radiology_ai.preprocess.intensity import clahe

OUT = Path(__file__).parents[1]/'radiology_ai/preprocess/knee_locator.safetensors'
CANVAS = 104  # pixels of a training view, 2 mm each
WIDTH = 75.   # mm of the plateau at which log size is 0


def film(seed: int, part: str) -> tuple[Radiograph, list]:
    "An exposed film and its knees as (row, col, side)."
    g = rng(seed, 'locator', part)
    if part=='knee':
        both, long = g.random()<.2, g.random()<.4
        more = dict(fov=float(g.uniform(240, 420))) if long and not both else {}
        more |= dict(turn=float(g.normal(0, 6)), rotation=float(np.clip(g.normal(0, 6), -14, 14)))
        p = simulate_knee(seed, int(g.integers(0, 7))*int(g.random()<.5), 'RL'[seed%2], int(g.integers(200, 320)), bilateral=both, hardware=bool(g.random()<.15), **more)
        knees = [(*p.points['joint'], p.side)] + ([(*p.points['joint_other'], 'LR'[p.side=='L'])] if both else [])
    else:
        make = dict(chest=lambda: simulate_chest(seed, size=256), hand=lambda: simulate_hand(seed, 'RL'[seed%2], 256), hip=lambda: simulate_hip(seed, 'RL'[seed%2], 256))
        p, knees = make[part](), []
    return Radiograph(expose(p, g).pixels, (p.spacing, p.spacing)), knees


def other_grey(a: np.ndarray, g) -> np.ndarray:
    "The same film from another vendor, another room, another century."
    a = a**np.float32(np.exp(g.normal(0, .4)))
    if g.random()<.35: a = clahe(a, float(g.uniform(1.5, 5)), int(g.integers(3, 9)))
    if g.random()<.5: a = cv2.GaussianBlur(a, (0, 0), float(g.uniform(.3, 2.2)))
    elif g.random()<.4: a = np.clip(a + float(g.uniform(.3, 1.5))*(a-cv2.GaussianBlur(a, (0, 0), float(g.uniform(1, 4)))), 0, 1)
    if g.random()<.5:  # uneven brightness
        field = cv2.resize(g.normal(0, 1, (4, 4)).astype(np.float32), a.shape[::-1], interpolation=cv2.INTER_CUBIC)
        a = a + np.float32(g.uniform(0, .15))*field
    return np.clip(a + np.float32(g.uniform(0, .04))*g.standard_normal(a.shape, dtype=np.float32), 0, 1)


def clutter(a: np.ndarray, g) -> np.ndarray:
    "Bars, letters and covers that are no anatomy."
    a = np.rint(a*255).astype(np.uint8)
    for _ in range(int(g.integers(0, 4)) if g.random()<.5 else 0):
        r, c = g.uniform(0, 1, 2)*a.shape
        grey, kind = int(g.choice([0, 255, g.integers(256)])), g.random()
        if kind<.4: cv2.putText(a, str(g.choice(list('RLABX17'))), (int(c), int(r)), 0, float(g.uniform(.5, 2)), grey, int(g.integers(1, 5)))
        elif kind<.7: cv2.line(a, (int(c), int(r)), tuple(int(v) for v in g.uniform(0, 1, 2)*a.shape[::-1]), grey, int(g.integers(1, 7)))
        else: a[int(r):int(r)+int(g.uniform(5, 60)), int(c):int(c)+int(g.uniform(5, 60))] = grey
    return a.astype(np.float32)/255


def view(r: Radiograph, knees: list, g, part: str):
    "One training view: (CANVAS, CANVAS) int8 and its knees as (x, y, is_left, log size)."
    size = np.exp(g.uniform(-.3, .3)) if part=='knee' else np.exp(g.uniform(-.8, .8))
    per = r.spacing[0]/K.MM*size
    turn = np.radians(np.clip(g.normal(0, 9), -30, 30) if part=='knee' else g.uniform(-180, 180) if part=='hand' else g.normal(0, 25))
    pixels, kind = r.pixels, g.random()
    if knees and kind<.4: # a narrow film around the joint
        row, col, _ = knees[int(g.integers(len(knees)))]
        t, b, le, ri = (float(v)/r.spacing[0] for v in g.uniform(40, 85, 4))
        rows, cols = (max(0, int(row-t)), int(row+b)), (max(0, int(col-le)), int(col+ri))
        pixels = np.ascontiguousarray(pixels[rows[0]:rows[1], cols[0]:cols[1]])
        knees = [(a-rows[0], c-cols[0], s) for a, c, s in knees if rows[0]<a<rows[1] and cols[0]<c<cols[1]]
    elif knees and kind<.5: # on its head it is not to be found: a shank above a joint is an ankle
        pixels, knees = np.ascontiguousarray(pixels[::-1] if g.random()<.7 else pixels.T), []
    h, w = pixels.shape
    if knees and g.random()<.8: # a knee in the view
        row, col, _ = knees[int(g.integers(len(knees)))]
        at = g.uniform(.12, .88, 2)*CANVAS
    else: row, col, at = *(g.uniform(.1, .9, 2)*(h, w)), g.uniform(.2, .8, 2)*CANVAS
    rot = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    m = shift(*at)@rot@scale(per, per)@shift(-col, -row)
    a = clutter(other_grey(pixels, g), g)
    if per<.9: a = cv2.GaussianBlur(a, (0, 0), .45/per)
    to = (shift(-.5, -.5)@m@shift(.5, .5))[:2]
    out = cv2.warpAffine(a, to, (CANVAS, CANVAS), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    mask = cv2.warpAffine(np.ones_like(a), to, (CANVAS, CANVAS), flags=cv2.INTER_NEAREST)
    where = []
    for row, col, s in knees:
        x, y, _ = m@[col, row, 1]
        if 4<x<CANVAS-4 and 4<y<CANVAS-4: where.append((x, y, s=='L', np.log(size)))
    return np.rint(K.evened(out, mask)*31).astype(np.int8), where


def views(job):
    "Several views of one film."
    seed, part, n = job
    cv2.setNumThreads(1)
    r, knees = film(seed, part)
    g = rng(seed, 'views', part)
    return [view(r, knees, g, part) for _ in range(n)]


def mistakes(job):
    "Views around the likeliest knees that the present network sees in a film without one."
    seed, part, weights = job
    cv2.setNumThreads(1)
    r, _ = film(seed, part)
    g, out = rng(seed, 'mistakes'), []
    for _ in range(2):
        pixels = other_grey(r.pixels, g)
        for mm in K.LENGTHS:
            s = mm/max(pixels.shape)*np.exp(g.uniform(-.15, .15))/K.MM
            image = np.pad(K.evened(resize_array(pixels, tuple(max(4, round(n*s)) for n in pixels.shape))), CANVAS)
            heat = K.answer(image, weights)[:2].max(0)
            at = np.unravel_index(heat.argmax(), heat.shape)
            if heat[at]<-2.2: continue
            y, x = (int(np.clip(k*K.CELL - g.uniform(.3, .7)*CANVAS, 0, n-CANVAS)) for k, n in zip(at, image.shape))
            out.append((np.rint(image[y:y+CANVAS, x:x+CANVAS]*31).astype(np.int8), []))
    return out


def parts(n: int, start: int, share: float=.6) -> list:
    "Seeds and parts of `n` films."
    k = int(n*share)
    return [(start+i, 'knee') for i in range(k)] + [(start+i, ('chest', 'hand', 'hip')[i%3]) for i in range(n-k)]


def targets(where: list):
    "Heat (2, h, w), regression (3, h, w) and its weight (h, w) of one view."
    n = CANVAS//K.CELL
    heat, reg, weight = np.zeros((2, n, n), np.float32), np.zeros((3, n, n), np.float32), np.zeros((n, n), np.float32)
    yy, xx = np.mgrid[:n, :n] + .5
    for x, y, left, size in where:
        x, y = x/K.CELL, y/K.CELL
        blob = np.exp(-((xx-x)**2 + (yy-y)**2)/(2*.9**2)).astype(np.float32)
        heat[int(left)] = np.maximum(heat[int(left)], blob/blob.max())
        near = blob>weight
        reg[:, near] = np.stack([x-xx, y-yy, np.full_like(xx, size)])[:, near]
        weight = np.maximum(weight, blob)
    return heat, reg, weight*(weight>.2)


def network():
    import torch
    from torch import nn
    layers, c = [], 1
    for i, (k, size, stride, dilation) in enumerate(K.LAYERS):
        layers += [nn.Conv2d(c, k, size, stride, dilation*(size//2), dilation)] + ([nn.BatchNorm2d(k), nn.ReLU()] if i<len(K.LAYERS)-1 else [])
        c = k
    layers[-1].bias.data[:2] = -4.
    return nn.Sequential(*layers)


def folded(net) -> dict:
    "Weights with the batch normalisation folded in, float16."
    convs, norms = [m for m in net if hasattr(m, 'kernel_size')], [m for m in net if hasattr(m, 'running_mean')]
    out = {}
    for i, c in enumerate(convs):
        w, b = c.weight.detach().numpy(), c.bias.detach().numpy()
        if i<len(norms):
            n = norms[i]
            s = (n.weight/(n.running_var+n.eps).sqrt()).detach().numpy()
            w, b = w*s[:, None, None, None], (b-n.running_mean.numpy())*s + n.bias.detach().numpy()
        out |= {f'w{i}': np.ascontiguousarray(w, np.float16), f'b{i}': np.ascontiguousarray(b, np.float32)} # safetensors writes bytes as they lie
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


def train(data, epochs, threads, bs=64):
    import torch
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    net = network().to(memory_format=torch.channels_last)
    x = torch.from_numpy(np.stack([d[0] for d in data]))
    wanted = [torch.from_numpy(np.stack(o).astype(np.float16)) for o in zip(*(targets(d[1]) for d in data))]
    opt = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1e-4)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 5e-3, total_steps=epochs*(len(x)//bs))
    for epoch in range(epochs):
        order, total = torch.randperm(len(x)), 0.
        for b in order[:len(x)//bs*bs].split(bs):
            xb, *t = flipped(x[b][:, None].float()/31, *(o[b].float() for o in wanted), torch.rand(bs)<.5)
            with torch.autocast('cpu', torch.bfloat16): out = net(xb.to(memory_format=torch.channels_last))
            loss = loss_of(out.float(), *t)
            opt.zero_grad()
            loss.backward()
            opt.step()
            plan.step()
            total += loss.item()
        print(f'epoch {epoch}: loss {total/(len(x)//bs):.3f}', flush=True)
    return folded(net.eval())


def judge(job):
    "Best score, error in mm and sides of one unseen film; without and with its spacing."
    seed, part, weights, known = job
    cv2.setNumThreads(1)
    r, knees = film(seed, part)
    K._weights = lambda: weights
    g = rng(seed, 'judge')
    r = Radiograph(other_grey(r.pixels, g), r.spacing if known else None)
    mm = np.sqrt(np.prod(r.spacing)) if known else film(seed, part)[0].spacing[0]
    found, best = K.locate_knees(r, threshold=.3), K.locate_knees(r, threshold=0.)
    score = best[0].score if best else 0.
    errors = [min(((np.hypot(k.center[0]-row, k.center[1]-col)*mm, k.side==side) for k in found), default=(999., False)) for row, col, side in knees]
    return part, known, score, max((e for e, _ in errors), default=np.nan), all(s for _, s in errors), len(knees)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--films', type=int, default=5000, help='films to learn from')
    parser.add_argument('--views', type=int, default=4, help='views of each film')
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--test', type=int, default=600, help='unseen films')
    parser.add_argument('--workers', type=int, default=2, help='processes of simulation')
    parser.add_argument('--out', type=Path, default=OUT)
    args = parser.parse_args()
    start = time.time()
    with ProcessPoolExecutor(args.workers, mp_context=get_context('spawn')) as pool:
        data = [v for vs in pool.map(views, [(*p, args.views) for p in parts(args.films, 10_000)], chunksize=8) for v in vs]
        print(f'{len(data)} views of {args.films} films, {sum(len(d[1])>0 for d in data)} with a knee, {time.time()-start:.0f} s', flush=True)
        first = {k: v.astype(np.float32) for k, v in train(data, 3, 1).items()}
        more = [(*p, first) for p in parts(args.films//4, 500_000, share=0)]
        data += [v for vs in pool.map(mistakes, more, chunksize=8) for v in vs]
        print(f'{len(data)} views with the mistakes of the first turn, {time.time()-start:.0f} s', flush=True)
        weights = train(data, args.epochs, 1)
        print(f'trained, {time.time()-start:.0f} s', flush=True)
        w = {k: v.astype(np.float32) for k, v in weights.items()} | {'threshold': np.float32([0])}
        rows = list(pool.map(judge, [(*p, w, known) for p in parts(args.test, 900_000) for known in (True, False)], chunksize=8))
    part, known, score, error, side, n = (np.array(o) for o in zip(*rows))
    knee = part=='knee'
    weights['threshold'] = np.float32([np.clip(np.quantile(score[~knee], .99), .3, .7)]) # one other film in a hundred may pass
    save_file(weights, args.out)
    t = weights['threshold'][0]
    for k, name in ((True, 'spacing known'), (False, 'spacing unknown')):
        a, b = knee & (known==k), ~knee & (known==k)
        found = a & (score>=t)
        print(f'{name}: {a.sum()} knee films, found {np.mean(score[a]>=t):.3f}, median error {np.median(error[found]):.2f} mm, within 10 mm {np.mean(error[a]<=10):.3f}, side right {side[a].mean():.3f}; '
              f'{b.sum()} others, taken for a knee {np.mean(score[b]>=t):.3f}')
    print(f'threshold {t:.2f}, {args.out.stat().st_size/1024:.0f} kB, {time.time()-start:.0f} s in all')


if __name__=='__main__': main()
