"""Detection metrics on 3,000 images: the RSNA score beside a plain Python form, COCO's average precision beside pycocotools, and what
sweeps and intervals cost.

    python benchmarks/detection.py [--parts metrics rules network] [--images 3000] [--repeats 7] [--labels stage_2_train_labels.csv]

One core; the ways of one part take turns, the median counts, and the ratio comes from the same run (processor time; the clock beside
it). Boxes: with `--labels` (or RADIOLOGY_AI_REAL_DATA) the true boxes of the RSNA challenge, once as they come (a quarter of the films
has lesions) and once only the films with lesions; else simulated ones. The predictions are simulated: one lesion in five missed, boxes
shifted and resized, false boxes added.

The RSNA score has two peers: the plain form follows the rules word by word on the arrays of each image, as the challenge's public
kernels do (the IoU anew at each threshold); the tuned one is plain Python on lists, which computes each IoU once and skips what can't hit.
pycocotools gets its dictionaries built inside its time, as `coco_map` does; it is timed with its usual settings and again with only what
AP needs (all areas, 100 boxes an image).

rules: what makes boxes of candidates. A sweep over 20 ways of suppression and 20 thresholds (50 candidates of a film and of its mirrored
image), and an ensemble of 4 folds x 3 checkpoints (50 candidates each), pooled and suppressed or fused.
network: `Detector.detect` beside torchvision's `RetinaNet` of the same backbone, pyramid, heads, anchors and weights on the same films (its
resizing turned off), and what decoding and suppression take of it.
"""
import os

for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[k] = '1'
import argparse
import contextlib
import io
import statistics
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

from radiology_ai.core import rng
from radiology_ai.metrics.detection import COCO_IOUS, RSNA_IOUS, coco_map, froc, rsna_map, rsna_map_ci, threshold_sweep
from radiology_ai.metrics.fusion import Decoding, choose_decoding, decoding_grid, pool_members

# ---- boxes ---------------------------------------------------------------------------------------------------

def predictions(truths: list, seed: int, false: float=.7, size: int=1024):
    "Simulated boxes and scores for each image."
    gen, boxes, scores = rng(seed, 'predictions'), [], []
    for truth in truths:
        found = truth[gen.random(len(truth))<.8]
        side = np.tile(found[:,2:]-found[:,:2], 2)
        corner = gen.uniform(0, size-260, (gen.poisson(false), 2))
        boxes.append(np.vstack([found + side*gen.uniform(-.15, .15, found.shape),
            np.hstack([corner, corner+gen.uniform(60, 250, corner.shape)])]))
        scores.append(np.r_[gen.beta(5, 2, len(found)), gen.beta(2, 4, len(corner))])
    return boxes, scores


def simulated_truths(n: int, seed: int, share: float, size: int=1024) -> list:
    gen, out = rng(seed, 'truths'), []
    for _ in range(n):
        corner = gen.uniform(50, size-320, (gen.integers(1, 4)*(gen.random()<share), 2))
        out.append(np.hstack([corner, corner+gen.uniform(70, 260, corner.shape)]))
    return out


def rsna_truths(labels, n: int, seed: int, ill: bool) -> list:
    "True boxes of `n` random films of the challenge, of those with lesions or of all."
    from radiology_ai.data.chest import rsna_pneumonia
    data = rsna_pneumonia(labels, errors='list')
    by_image = {k: b[['x1', 'y1', 'x2', 'y2']].to_numpy(float) for k, b in data.boxes.groupby('image_id')}
    ids = [i for i in data.manifest.image_id if not ill or i in by_image]
    return [by_image.get(ids[i], np.zeros((0, 4))) for i in rng(seed, 'films').permutation(len(ids))[:n]]


# ---- peers ---------------------------------------------------------------------------------------------------

def area(b): return (b[2]-b[0])*(b[3]-b[1])


def overlap(a, b):
    w, h = min(a[2], b[2])-max(a[0], b[0]), min(a[3], b[3])-max(a[1], b[1])
    if w<=0 or h<=0: return 0.
    return w*h/(area(a)+area(b)-w*h)


def plain_rsna(boxes, scores, truths) -> float:
    "The RSNA score as its rules read: for each threshold, box and free truth, on the arrays as they are."
    total, count = 0., 0
    for p, s, t in zip(boxes, scores, truths):
        if not len(p) and not len(t): continue
        count, image = count+1, 0.
        for level in RSNA_IOUS:
            free, tp = list(range(len(t))), 0
            for i in np.argsort(-s, kind='stable'):
                best, most = None, level
                for j in free:
                    iou = overlap(p[i], t[j])
                    if iou>most: best, most = j, iou
                if best is not None:
                    free.remove(best)
                    tp += 1
            image += tp/(len(p)+len(t)-tp)
        total += image/len(RSNA_IOUS)
    return total/count


def tuned_rsna(boxes, scores, truths) -> float:
    """The same without NumPy: Python lists (made within its time), images without boxes or lesions skipped,
    the overlaps of an image computed once for all thresholds."""
    total, count = 0., 0
    for p, s, t in zip(boxes, scores, truths):
        p, s, t = p.tolist(), s.tolist(), t.tolist()
        if not p and not t: continue
        count += 1
        if not p or not t: continue
        ious, image = [[overlap(p[i], b) for b in t] for i in sorted(range(len(p)), key=lambda i: -s[i])], 0.
        for level in RSNA_IOUS:
            free = list(range(len(t)))
            for row in ious:
                best = max(free, key=row.__getitem__, default=None) # the first of equals
                if best is not None and row[best]>level: free.remove(best)
            tp = len(t)-len(free)
            image += tp/(len(p)+len(t)-tp)
        total += image/len(RSNA_IOUS)
    return total/count


def pycoco(boxes, scores, truths, only_ap: bool=False) -> np.ndarray:
    "AP at each IoU by pycocotools, from the same lists."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = [], []
        for i, t in enumerate(truths):
            for x1, y1, x2, y2 in t.tolist():
                truth.append(dict(id=len(truth)+1, image_id=i, category_id=0, bbox=[x1, y1, x2-x1, y2-y1],
                    area=(x2-x1)*(y2-y1), iscrowd=0))
        for i, (p, s) in enumerate(zip(boxes, scores)):
            for (x1, y1, x2, y2), v in zip(p.tolist(), s.tolist()):
                found.append(dict(image_id=i, category_id=0, bbox=[x1, y1, x2-x1, y2-y1], score=v))
        gt = COCO()
        gt.dataset = dict(info={}, images=[dict(id=i) for i in range(len(truths))], categories=[dict(id=0)],
            annotations=truth)
        gt.createIndex()
        e = COCOeval(gt, gt.loadRes(found), 'bbox')
        if only_ap:
            e.params.areaRng, e.params.areaRngLbl, e.params.maxDets = e.params.areaRng[
                :1], e.params.areaRngLbl[:1], [100]
        e.evaluate()
        e.accumulate()
    return e.eval['precision'][:,:,0,0,-1].mean(1)


# ---- the run -------------------------------------------------------------------------------------------------

def turns(ways: dict, repeats: int) -> dict:
    "Median (processor, clock) seconds of each way, which take turns."
    times = {name: [] for name in ways}
    for f in ways.values(): f()
    for _ in range(repeats):
        for name, f in ways.items():
            clock, cpu = time.perf_counter(), time.process_time()
            f()
            times[name].append((time.process_time()-cpu, time.perf_counter()-clock))
    return {name: tuple(statistics.median(v) for v in zip(*t)) for name, t in times.items()}


def table(title: str, times: dict, ours: str):
    print(f'\n{title}')
    for name, (cpu, clock) in times.items():
        print(f'  {name:48} {cpu*1e3:9.1f} ms   clock {clock*1e3:9.1f} ms   {cpu/times[ours][0]:6.1f} x')


def compare(name: str, truths: list, repeats: int):
    boxes, scores = predictions(truths, 1)
    print(f'\n== {name}: {len(truths)} images, {sum(map(len, truths))} true boxes, {sum(map(len, boxes))} predicted ones')
    given = boxes, scores, truths
    gap = max(abs(rsna_map(*given)-f(*given)) for f in (plain_rsna, tuned_rsna))
    assert gap<1e-12, gap
    ways = {'rsna_map': lambda: rsna_map(*given), 'plain Python': lambda: plain_rsna(*given),
        'plain Python, lists, each IoU once': lambda: tuned_rsna(*given)}
    table(f'RSNA score {rsna_map(*given):.4f}, largest difference {gap:.0e}', turns(ways, repeats),
        'rsna_map')
    ways = {'coco_map': lambda: coco_map(boxes, scores, truths)}
    try:
        gap = np.abs(coco_map(boxes, scores, truths).by_iou.to_numpy()-pycoco(boxes, scores, truths)).max()
        assert gap<1e-9, gap
        ways |= {'pycocotools': lambda: pycoco(boxes, scores, truths),
            'pycocotools, only what AP needs': lambda: pycoco(boxes, scores, truths, True)}
        note = f'largest difference at {len(COCO_IOUS)} IoUs {gap:.0e}'
    except ImportError: note = 'pycocotools is not installed'
    table(f'COCO AP {coco_map(boxes, scores, truths).AP:.4f}, {note}', turns(ways, repeats), 'coco_map')
    ways = {'threshold_sweep, 50 thresholds, no new matching': lambda: threshold_sweep(boxes, scores, truths,
        draws=1000),
        'rsna_map_ci, 1,000 draws': lambda: rsna_map_ci(boxes, scores, truths),
        'froc with its band, 1,000 draws': lambda: froc(boxes, scores, truths)}
    table('With intervals', turns(ways, max(2, repeats//3)), 'rsna_map_ci, 1,000 draws')


# ---- from candidates to boxes --------------------------------------------------------------------------------

def candidates(truths: list, members: int, each: int=50, seed: int=5, size: int=1024) -> list:
    """Of each film simulated candidates of so many members: half of them about the true boxes, where there
    are any."""
    gen, out = rng(seed, 'candidates'), []
    for t in truths:
        n = members*each
        middle, half = gen.uniform(100, size-100, (n, 2)), gen.uniform(30, 130, (n, 2))
        if len(t):
            k = gen.integers(0, len(t), n//2)
            middle[:n//2] = (t[k,:2]+t[k,2:])/2 + gen.normal(0, 25, (n//2, 2))
            half[:n//2] = (t[k,2:]-t[k,:2])/2*gen.uniform(.7, 1.3, (n//2, 2))
        p = gen.random()
        out.append(dict(boxes=np.hstack([middle-half, middle+half]), scores=gen.beta(1, 6, n)*.98+.011,
            members=members,
            classes=np.array([1-p, p])))
    return out


def rules(images: int):
    truths = simulated_truths(images, 0, .4)
    found = candidates(truths, 2)
    grid = decoding_grid(Decoding(score=.01, most=20), iou=np.linspace(.05, .6, 20).tolist(),
        threshold=np.linspace(.02, .9, 20).tolist())
    once = {f'{len(grid)} settings on {images} films': lambda: choose_decoding(found, truths, grid)}
    many = candidates(truths, 12)
    parts = [[{k: f[k][50*m:50*m+50] for k in ('boxes', 'scores')} | dict(classes=f['classes']) for f in many]
        for m in range(12)]
    for how in ('suppress', 'fuse'):
        once[f'12 members on {images} films, pooled, then {how}'] = lambda how=how: Decoding(how=how, iou=.4)(
            pool_members(parts))
    print('\n== From candidates to boxes (each once)')
    for name, f in once.items():
        clock, cpu = time.perf_counter(), time.process_time()
        f()
        print(f'  {name:52} {time.process_time()-cpu:7.1f} s   clock {time.perf_counter()-clock:7.1f} s',
            flush=True)


# ---- the network ---------------------------------------------------------------------------------------------

def same_retinanet(model, size: int):
    "torchvision's RetinaNet of the parts of a `Detector`."
    import torch
    from torchvision.models.detection import RetinaNet
    class Body(torch.nn.Module):
        out_channels = model.head.boxes.regression_head.conv[0][0].in_channels
        def forward(self, x):
            maps = model.body(x)
            return model.head.pyramid(OrderedDict((str(k), m) for k, m in enumerate(maps)))
    return RetinaNet(Body(), 1, min_size=size, max_size=size, image_mean=[0.], image_std=[1.],
        anchor_generator=model.anchors,
        head=model.head.boxes, score_thresh=.05, nms_thresh=.5, topk_candidates=1000,
        detections_per_img=300).eval()


def network(name: str, width: float, repeats: int, *, size: int=224, bs: int=8):
    import torch

    from radiology_ai.models.detector import candidates as decoded
    from radiology_ai.models.detector import create_detector
    torch.set_num_threads(1)
    model = create_detector(name, pretrained=False, n_labels=0, width=width, norm='frozen').eval()
    x = torch.rand(bs, 1, size, size, generator=torch.Generator().manual_seed(0))
    theirs = same_retinanet(model, size)
    with torch.no_grad():
        model.head.boxes.classification_head.cls_logits.bias += 1.5 # many candidates
        found, peer, n = model.detect(x), theirs(list(x)), len(decoded(model(x))[1])
        print(f"\n== {name}, width {width}, {bs} films of {size} pixels: {n} candidates, "
            f"{sum(len(f['scores']) for f in found)} boxes, torchvision (1,000 candidates a level) "
            f"{sum(len(f['scores']) for f in peer)}")
        table('Inference', turns({'Detector.detect': lambda: model.detect(x),
            "torchvision's RetinaNet": lambda: theirs(list(x)), 'the network alone': lambda: model(x)},
            repeats),
            'Detector.detect')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = os.environ.get('RADIOLOGY_AI_REAL_DATA')
    p.add_argument('--parts', nargs='+', choices=['metrics', 'rules', 'network'],
        default=['metrics', 'rules', 'network'])
    p.add_argument('--images', type=int, default=3000)
    p.add_argument('--repeats', type=int, default=7)
    p.add_argument('--labels', default=str(Path(real)/'labels/rsna/stage_2_train_labels.csv.gz') if real
        else None)
    a = p.parse_args()
    if 'rules' in a.parts: rules(a.images)
    for name, width in (('resnet18', 1.), ('tf_efficientnet_lite0', .25)) if 'network' in a.parts else ():
        network(name, width, a.repeats)
    if 'metrics' not in a.parts: return
    if a.labels:
        compare('RSNA films with lesions', rsna_truths(a.labels, a.images, 0, True), a.repeats)
        compare('RSNA films as they come', rsna_truths(a.labels, a.images, 0, False), a.repeats)
    else: print('RADIOLOGY_AI_REAL_DATA is not set and no --labels given: simulated boxes only')
    compare('simulated films with lesions', simulated_truths(a.images, 0, 1.), a.repeats)


if __name__=='__main__': main()
