"""Learn the templates of the knee localiser on simulated radiographs and judge them on unseen ones.

    python benchmarks/train_knee_locator.py [--n 400] [--out radiology_ai/preprocess/knee_locator.safetensors]
"""
import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2, numpy as np
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression

from radiology_ai.core import Radiograph, rng
from radiology_ai.phantom.xray import expose
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.phantom.chest import simulate_chest
from radiology_ai.phantom.limbs import simulate_hand, simulate_hip
from radiology_ai.preprocess import knee as K

OUT = Path(__file__).parents[1]/'radiology_ai/preprocess/knee_locator.safetensors'


def film(seed: int, part: str):
    "An exposed radiograph and the joints in it as (row, col, side)."
    gen = rng(seed, 'locator', part)
    if part=='knee':
        side, both = 'RL'[seed%2], gen.random()<.2
        p = simulate_knee(seed, int(gen.integers(0, 7))*int(gen.random()<.5), side, 384, bilateral=both, hardware=gen.random()<.1)
        other = [(*p.points['joint_other'], 'LR'[side=='L'])] if both else []
        joints = [(*p.points['joint'], side)] + other
    else:
        make = {'chest': lambda: simulate_chest(seed, size=384), 'hand': lambda: simulate_hand(seed, 'RL'[seed%2], 384), 'hip': lambda: simulate_hip(seed, 'RL'[seed%2], 384)}
        p, joints = make[part](), []
    return Radiograph(expose(p, gen).pixels, (p.spacing, p.spacing)), joints


def mirror(v: np.ndarray) -> np.ndarray: return K.mirrored(v.reshape(K.CELLS, K.CELLS, K.BINS)).ravel()


def samples(job):
    "Window vectors of one film: at the joints (as right knees), and elsewhere."
    cv2.setNumThreads(1)
    seed, part = job
    r, joints = film(seed, part)
    padded, per = K.at_scale(r, r.spacing[0])
    hist = K.cell_histograms(padded)
    gen = rng(seed, 'windows')
    places = [(row*per, col*per, side) for row, col, side in joints]
    positive = []
    for row, col, side in places:
        for _ in range(2):
            v = K.window_vector(hist, row + gen.normal(0, 1), col + gen.normal(0, 1))
            positive.append(v if side=='R' else mirror(v))
    negative = []
    h, w = r.shape[0]*per, r.shape[1]*per
    while len(negative)<8:
        row, col = gen.uniform(0, h), gen.uniform(0, w)
        if all(np.hypot(row-a, col-b)>12 for a, b, _ in places): negative.append(K.window_vector(hist, row, col))
    return np.array(positive, np.float16).reshape(-1, K.CELLS**2*K.BINS), np.array(negative, np.float16)


def mistakes(job):
    "The windows that the present template takes for a knee, away from the joints."
    cv2.setNumThreads(1)
    seed, part, t = job
    r, joints = film(seed, part)
    padded, per = K.at_scale(r, r.spacing[0])
    hist = K.cell_histograms(padded)
    both, out = K.window_scores(hist, t['knee'], t['bias'], 2), []
    rows, cols = np.indices(both.shape[1:])*2
    for row, col, _ in joints: both[:, np.hypot(rows-row*per, cols-col*per)<=12] = -np.inf
    for k in range(2):
        for i in np.argsort(both[k].ravel())[-3:]:
            if both[k].ravel()[i]>-1:
                v = K.window_vector(hist, *(rows.ravel()[i], cols.ravel()[i]))
                out.append(v if k==0 else mirror(v))
    return np.array(out, np.float16).reshape(-1, K.CELLS**2*K.BINS)


def judge(job):
    "Best score; error in mm and side of the labelled knees; or only the score where there is none."
    cv2.setNumThreads(1)
    seed, part, t = job
    K._templates = lambda: t
    r, joints = film(seed, part)
    found = K.locate_knees(r, threshold=0.)
    best = found[0].score if found else 0.
    if not joints: return part, best, np.nan, True
    near = [min(((np.hypot(k.center[0]-row, k.center[1]-col)*r.spacing[0], k.side==side) for k in found[:len(joints)]), default=(999., False)) for row, col, side in joints]
    return part, best, max(e for e, _ in near), all(s for _, s in near)


def jobs(n: int, start: int) -> list:
    return [(start+i, 'knee' if i%2==0 else ('chest','hand','hip')[i//2%3]) for i in range(n)]


def fit(x, y, c): return LogisticRegression(C=c, max_iter=300, class_weight={0: 1, 1: 3}).fit(x.astype(np.float32), y)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--n', type=int, default=500, help='films to learn from; a third as many to judge')
    parser.add_argument('--out', type=Path, default=OUT)
    args = parser.parse_args()
    train, test = jobs(args.n, 10_000), jobs(args.n//3, 90_000)
    with ProcessPoolExecutor(2) as pool:
        got = list(pool.map(samples, train, chunksize=4))
        pos, neg = (np.concatenate([g[k] for g in got]) for k in (0, 1))
        for turn in range(3):
            model = fit(np.concatenate([pos, neg]), np.r_[np.ones(len(pos)), np.zeros(len(neg))], .02)
            w = model.coef_[0].astype(np.float32)
            knee = w.reshape(K.CELLS, K.CELLS, K.BINS)
            t = dict(knee=np.stack([knee, K.mirrored(knee)]), bias=np.repeat(model.intercept_, 2).astype(np.float32))
            print(f'turn {turn}: {len(pos)} knees, {len(neg)} others', flush=True)
            if turn<2: neg = np.concatenate([neg, *pool.map(mistakes, [(*j, t) for j in train], chunksize=4)])
        left = np.array([mirror(v) for v in pos])
        side = LogisticRegression(C=.005, max_iter=300, fit_intercept=False).fit(np.concatenate([pos, left]).astype(np.float32), np.r_[np.ones(len(pos)), np.zeros(len(left))])
        t |= dict(side=side.coef_[0].astype(np.float32), threshold=0.)
        result = list(pool.map(judge, [(*j, t) for j in test], chunksize=4))
    score = np.array([r[1] for r in result])
    knee = np.array([r[0]=='knee' for r in result])
    error, sides = np.array([r[2] for r in result])[knee], np.array([r[3] for r in result])[knee]
    low, high = np.quantile(score[knee], .01), np.quantile(score[~knee], .99)
    threshold = float(np.clip((low+high)/2, .2, .8))
    save_file({'knee': w.astype(np.float16), 'bias': model.intercept_.astype(np.float32), 'side': side.coef_[0].astype(np.float16), 'threshold': np.array([threshold], np.float32)}, args.out)
    print(f'{knee.sum()} unseen knee films: median error {np.median(error):.1f} mm, within 10 mm {np.mean(error<=10):.3f}, side right {sides.mean():.3f}, found {np.mean(score[knee]>=threshold):.3f}')
    print(f'{(~knee).sum()} other films: taken for a knee {np.mean(score[~knee]>=threshold):.3f}; threshold {threshold:.3f}; {args.out.stat().st_size/1024:.0f} kB')


if __name__=='__main__': main()
