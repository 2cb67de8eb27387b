"""Small findings of simulated chests: whether they can be seen at their place, and a body that was taught where they lie.

    python benchmarks/chest_outlines.py films --out FOLDER [--patients 1500] [--sizes 192 320]
    python benchmarks/chest_outlines.py seen --out FOLDER [--sizes 192 320]
    python benchmarks/chest_outlines.py teach --out FOLDER [--epochs 4] [--weights BUNDLE] [--pool both]

`films` simulates films of the first hospital with more findings than usual. `seen`: a linear model looks at a crop around the
place of a finding, or at the same place of a film without it; AUROC in five parts of patients. What it cannot tell apart
at the known place, no network finds on the whole film.
`teach` trains a network of the chest task, whose last map has a cell for each 16 pixels (32 as it comes), on the categories
and, by a further layer on that map, on the cells in which a finding lies; it writes the bundle `outlined` for
`chest_hospitals.py run --start`. One in five of these films is for looking only. `--weights` begins with another body than
that of ImageNet, such as that of a run.
"""
import argparse
import json
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from torch import nn

from radiology_ai.core import rng, transform_boxes
from radiology_ai.losses.base import BCEWithNaN
from radiology_ai.losses.labels import pos_weights
from radiology_ai.losses.tree import UnderTree
from radiology_ai.metrics.ranking import auroc_ci
from radiology_ai.models.backbone import create_model
from radiology_ai.models.bundle import save_bundle
from radiology_ai.models.heads import tree_parents
from radiology_ai.phantom.hospital import simulate_chests
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.tasks.chest import CHEST, ChestSettings

ARCH, PACKAGE = 'tf_efficientnet_lite0', 'efficientnet-lite0'
MORE = dict(nodule=.3, mass=.2, pneumothorax=.3, calcification=.3, atelectasis=.22, infiltration=.2,
    consolidation=.12,
    pneumonia=.12, nipple=.25, hernia=.08, thickening=.12, fibrosis=.1, blunting=.12, effusion=.18, hila=.12,
    fracture=.1, edema=.06, emphysema=.06, suboptimal=.1, cardiomegaly=.08, congestion=.1)
KINDS = ('atelectasis', 'infiltration', 'mass', 'nodule', 'pneumonia', 'pneumothorax', 'consolidation',
    'calcification',
    'effusion', 'blunting', 'hernia', 'fracture', 'tube', 'gastric', 'line', 'drain', 'pacemaker',
    'electrodes', 'wires',
    'clothing')
CROPS = dict(calcification=.052, nodule=.0625, mass=.135, pneumothorax=.135, atelectasis=.135,
    infiltration=.135)


def films(args):
    start = time.process_time()
    truth = simulate_chests(args.out/'outlined_films', n=args.patients, seed=77, size=384, hospital='a',
        changed=MORE,
        follow_ups=0., workers=1, masks=False)
    truth.to_csv(args.out/'outlined.csv', index=False)
    for size in args.sizes:
        preprocess_folder(args.out/'outlined_films', args.out/f'outlined_{size}', recipe('chest', size=size),
            workers=1,
            show=False)
    print(f'{len(truth)} films, {time.process_time()-start:.0f} s of processor')


def outlines(args, size) -> SimpleNamespace:
    "The store, its rows of the truth, their positions, and for each film its (kind, box in stored pixels)."
    store, t = ImageStore(args.out/f'outlined_{size}'), pd.read_csv(args.out/'outlined.csv')
    t = t[t.image_id.isin(set(store.index.image_id))].reset_index(drop=True)
    at = [store.position(i) for i in t.image_id]
    boxes = []
    for k, text in zip(at, t.boxes):
        affine = np.array(store.index.affine.iloc[k], float).reshape(3, 3)
        boxes.append([(kind, transform_boxes(affine, np.array([b])).reshape(-1))
            for kind, *b in json.loads(text)])
    return SimpleNamespace(store=store, table=t, at=at, boxes=boxes, size=size)


# ---- what can be seen ----------------------------------------------------------------------------------------------

def crop_features(image, middle, half) -> np.ndarray:
    "Directions of the grey, and differences of Gaussians at four widths, of a crop."
    x, y = (int(np.clip(v, 0, image.shape[0]-1)) for v in middle)
    wide = cv2.copyMakeBorder(image, half, half, half, half, cv2.BORDER_REFLECT)[y:y+2*half, x:x+2*half]
    grey = cv2.resize(wide, (32, 32), interpolation=cv2.INTER_AREA)
    f = (grey-grey.mean()).astype(np.float32)
    across, down = cv2.Sobel(f, cv2.CV_32F, 1, 0), cv2.Sobel(f, cv2.CV_32F, 0, 1)
    angle, steep = np.arctan2(down, across)%np.pi, np.hypot(across, down)
    out = [cv2.resize(steep*((angle*6/np.pi).astype(int)==k), (4, 4), interpolation=cv2.INTER_AREA).ravel()/40
        for k in range(6)]
    for sigma in (1, 2, 3.5, 6):
        b = cv2.GaussianBlur(f, (0, 0), sigma)-cv2.GaussianBlur(f, (0, 0), 1.6*sigma)
        near = b[8:24, 8:24]
        out += [np.array([b[14:18, 14:18].mean(), b[12:20, 12:20].max(), near.max(), near.min()])/5,
            near.ravel()/20]
    return np.concatenate(out)


def at_places(d, kind, half) -> tuple:
    """Features, whether the finding is there, patients; at most 700 places, each on a film with it and one
    without."""
    gen, small = rng(0, kind), ('nodule', 'mass')
    has = [{k for k, _ in b} for b in d.boxes]
    free = [i for i, h in enumerate(has) if not h & set(small if kind in small else (kind,))]
    x, y, patients = [], [], []
    for i, box in [(i, b) for i, bs in enumerate(d.boxes) for k, b in bs if k==kind][:700]:
        middle = (box[0]+box[2])/2, (box[1]+box[3])/2
        for j, there in ((i, 1), (free[int(gen.integers(len(free)))], 0)):
            x.append(crop_features(d.store[d.at[j]], middle, half))
            y.append(there)
            patients.append(d.table.patient_id[j])
    return np.array(x), np.array(y), np.array(patients)


def seen(args):
    for size in args.sizes:
        d = outlines(args, size)
        for kind, share in CROPS.items():
            x, y, patients = at_places(d, kind, round(share*size))
            z = np.zeros(len(y))
            for a, b in GroupKFold(5).split(x, y, patients):
                few = PCA(60, whiten=True, random_state=0).fit(x[a])
                fit = LogisticRegression(C=.02, max_iter=300).fit(few.transform(x[a]), y[a])
                z[b] = fit.decision_function(few.transform(x[b]))
            v = auroc_ci(y, z, patients)
            print(f'{size} pixels, {kind}: {y.sum()} places, AUROC {v[0]:.3f} ({v[1]:.3f} to {v[2]:.3f})',
                flush=True)


# ---- a body that is taught where --------------------------------------------------------------------------------------

def cells(boxes, size, n) -> np.ndarray:
    "(kinds, n, n): 1 in cells in which a finding lies, NaN where it is but touched, else 0."
    out, g = np.zeros((len(KINDS), n, n), np.float32), np.arange(n)
    for kind, box in boxes:
        if kind not in KINDS: continue
        x1, y1, x2, y2 = box/(size/n)
        share = np.outer(np.clip(np.minimum(g+1, y2)-np.maximum(g, y1), 0, 1),
            np.clip(np.minimum(g+1, x2)-np.maximum(g, x1), 0, 1))
        hit, layer = (share>.5) | (share>.3*(x2-x1)*(y2-y1)), out[KINDS.index(kind)]
        layer[(share>0) & ~hit & (layer==0)] = np.nan
        layer[hit] = 1
    return out


class Places(nn.Conv2d):
    "Logits of each kind at each cell of a map."
    def __init__(self, n_features, shares):
        super().__init__(n_features, len(KINDS), 1)
        self.positive = torch.tensor(((1-shares)/np.maximum(shares, 1e-4))**.5, dtype=torch.float32)[:, None,
            None]
        nn.init.normal_(self.weight, std=.01)
        nn.init.constant_(self.bias, -4.)

    def loss(self, z, targets):
        "The mean over the cells of which it is known."
        each = F.binary_cross_entropy_with_logits(z, targets.nan_to_num(0), pos_weight=self.positive,
            reduction='none')
        return each[~targets.isnan()].mean()


def images(d, rows) -> torch.Tensor:
    x = torch.from_numpy(np.stack([d.store[d.at[i]] for i in rows])).float().div(255)[:, None]
    return x.contiguous(memory_format=torch.channels_last)


def figures(names, y, z) -> str:
    "The mean AUROC, and each."
    each = {c: auroc_ci(y[:, k], z[:, k])[0] for k, c in enumerate(names) if 10<=y[:, k].sum()<=len(y)-10}
    return f"{np.mean(list(each.values())):.3f} ({', '.join(f'{c} {v:.2f}' for c, v in each.items())})"


def teach(args):
    began, size, s = time.process_time(), args.sizes[0], ChestSettings(augment=1.)
    d, answer, gen = outlines(args, size), CHEST.answer.of_run(s), rng(0, 'teach')
    names, order = s.labels, gen.permutation(len(d.table))
    valid, rows = order[:len(order)//5], order[len(order)//5:]
    y = d.table[names].to_numpy(np.float32)
    grids = np.stack([cells(b, size, size//16) for b in d.boxes])
    there = np.array([[k in {n for n, _ in b} for k in KINDS] for b in d.boxes], float)
    model = create_model(ARCH, len(names), weights=args.weights or PACKAGE, multi_label=True,
        prior=y[rows].mean(0),
        pool=args.pool, output_stride=16,
        parents=tree_parents(answer.tree)).to(memory_format=torch.channels_last)
    places = Places(model.body.n_features, np.nanmean(grids[rows], (0, 2, 3)))
    loss, augment = UnderTree(answer.tree, BCEWithNaN(pos_weights(y[rows])**.5)), CHEST.augment(s)
    n = len(rows)//16
    opt = torch.optim.AdamW([*model.parameters(), *places.parameters()], lr=3e-3, weight_decay=.05,
        betas=(.9, .99))
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=args.epochs*n, pct_start=.2)
    for epoch in range(args.epochs):
        model.train()
        for b in np.split(gen.permutation(rows)[:n*16], n):
            last = model.body(augment(images(d, b)).as_subclass(torch.Tensor))
            told = loss(model.head(last), torch.from_numpy(y[b]))
            (told + 10*places.loss(places(last), torch.from_numpy(grids[b]))).backward()
            opt.step()
            opt.zero_grad()
            plan.step()
        model.eval()
        with torch.no_grad():
            last = [model.body(images(d, b)) for b in np.array_split(valid, len(valid)//32+1)]
        with torch.no_grad(): z, at = (torch.cat([f(m) for m in last]).numpy() for f in (model.head, places))
        print(f'epoch {epoch+1}, {len(valid)} films: categories {figures(names, y[valid], z)}; by the likeliest cell '
            f'{figures(KINDS, there[valid], at.max((2, 3)))}; {time.process_time()-began:.0f} s', flush=True)
    model.to(memory_format=torch.contiguous_format)
    save_bundle(model, args.out/'outlined', d.store.recipe, names, task='chest', settings={'arch': ARCH},
        answer=answer.spec(d.table.loc[rows], names, s), threshold=[.5]*len(names))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('films', 'seen', 'teach'))
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--patients', type=int, default=1500)
    parser.add_argument('--sizes', type=int, nargs='+', default=[192])
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--weights', type=Path)
    parser.add_argument('--pool', default='both')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    {'films': films, 'seen': seen, 'teach': teach}[args.what](args)


if __name__=='__main__': main()
