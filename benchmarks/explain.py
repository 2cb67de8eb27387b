"""Heat maps: beside pytorch-grad-cam and captum, the time of a batch, the checks over 200 films, and where the heat lies on
simulated findings, fractures among them, on real boxes and outlines, and about the joint of real knees.

    python benchmarks/explain.py peers
    python benchmarks/explain.py speed
    python benchmarks/explain.py simulated --size 96 --bodies 360 --epochs 12
    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/explain.py real
    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/explain.py knee
    python benchmarks/explain.py weights
"""
import argparse
import json
import os
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import nn

from radiology_ai.core import ModelError, Radiograph, rng
from radiology_ai.explain import explain, gradcam, heat_overlay
from radiology_ai.heat.cam import CAMS, cam_maps
from radiology_ai.heat.checks import alike as alike_maps
from radiology_ai.heat.checks import (
    boxes_mask,
    centre_map,
    check_method,
    check_methods,
    chosen_method,
    figure_of,
    randomised,
    region_figures,
)
from radiology_ai.heat.grid import grid_error
from radiology_ai.heat.paths import integrated_gradients
from radiology_ai.heat.relevance import LRP_RULES, lrp_relevance
from radiology_ai.metrics.ranking import auroc_ci
from radiology_ai.models.backbone import create_model
from radiology_ai.phantom.chest import opacity, simulate_chest
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess.knee import locate_knees
from radiology_ai.tasks.looked import TRIED

CNNS = ('resnet18', 'densenet121', 'mobilenetv3_small_050', 'regnetx_002', 'efficientnet_lite0')
TRANSFORMERS = ('vit_tiny_patch16_224', 'vit_wee_patch16_reg1_gap_256', 'swin_tiny_patch4_window7_224')
SIZES = ((96, 96), (128, 64))
LOUD = 1e4 # the peers add 1e-6 to a denominator of squared gradients, which would otherwise decide


def network(name, size):
    fitted = {} if name in CNNS else {'img_size': size}
    model = create_model(name, 3, pretrained=False, batchnorm=False, **fitted).eval()
    with torch.no_grad(): # BatchNorm as after a training, and the head as well
        gen = torch.Generator().manual_seed(1)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d): m.train()
        for _ in range(3): model(torch.rand(8, 1, *size, generator=gen))
    return model.eval()


def alike(a, b) -> float:
    "The lowest correlation over the images."
    a, b = (np.asarray(v, float).reshape(len(v), -1) for v in (a, b))
    return min(1. if not p.any() and not q.any() else float(np.corrcoef(p, q)[0, 1])
        for p, q in zip(a, b, strict=True))


def peers():
    from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
    kinds = {'gradcam': GradCAM, 'gradcam++': GradCAMPlusPlus, 'layercam': LayerCAM, 'hirescam': HiResCAM,
        'eigencam': EigenCAM}
    print('| network | pixels | ' + ' | '.join(CAMS) + ' | captum GradCAM | captum IG | grid error |')
    for name in (*CNNS, *TRANSFORMERS):
        for size in SIZES:
            model = network(name, size)
            x = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))
            loud = lambda out: LOUD*out[:, 1]
            row = []
            for method, kind in kinds.items():
                with kind(model=model, target_layers=[model.body]) as cam:
                    theirs = cam(input_tensor=x.clone(), targets=[lambda o: LOUD*o[1]]*2)
                if method=='eigencam' and (flip := signs(model, x, theirs)) is not None:
                    row.append(flip); continue
                row.append(alike(explain_quietly(model, x, method, loud), theirs))
            row += captums(model, x)
            print(f'| {name} | {size[0]} x {size[1]} | ' + ' | '.join(f'{v:.5f}' for v in row)
                + f' | {grid_error(model, x):.2f} |', flush=True)


def explain_quietly(model, x, method, target=None):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return explain(model, x, method, target).heat


def signs(model, x, theirs) -> float|None:
    "The sign of a principal component is anyone's choice: the better of both for each image."
    import torch.nn.functional as F
    found = cam_maps(model, x, 1, method='eigencam')
    both = [F.interpolate((s*found.maps).clamp(min=0)[:, None], x.shape[-2:], mode='bilinear')[:, 0].numpy()
        for s in (1, -1)]
    return min(max(np.corrcoef(b[i].ravel(), theirs[i].ravel())[0, 1] for b in both) for i in range(len(x)))


def captums(model, x) -> list[float]:
    from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam
    theirs = LayerGradCam(model, model.body).attribute(x.clone(), target=1, relu_attributions=True)
    theirs = LayerAttribution.interpolate(theirs, x.shape[-2:], 'bilinear').detach().numpy()[:, 0]
    own = gradcam(model, x, 1)
    steps = IntegratedGradients(model).attribute(x.clone(), baselines=.5, target=1,
        n_steps=16).detach().numpy()
    return [alike(own, theirs), alike(integrated_gradients(model, x, 1, .5, 16)[0].numpy(), steps)]


def speed():
    model, x = create_model('resnet18', 3, pretrained=False).eval(), torch.rand(16, 1, 224, 224)
    def both():
        y = x.clone().requires_grad_()
        torch.autograd.grad(model(y)[:, 1].sum(), [y, *model.parameters()])
    def best(f, n=3):
        out = []
        for _ in range(n):
            t = time.process_time(); f(); out.append(time.process_time()-t)
        return min(out)
    base = best(both)
    print(f'forward and backward of 16 films of 224 pixels, resnet18: {base:.2f} s of processor')
    for method in (*CAMS, 'integrated_gradients', 'lrp'):
        print(f"{method}: {best(partial(explain_quietly, model, x, method, 1), 2)/base:.2f} x")


def conservation():
    print('| network | ' + ' | '.join(LRP_RULES) + ' | (largest relative error of the sum)')
    for name in CNNS:
        model, x = network(name, (96, 64)), torch.rand(4, 1, 96, 64)
        errors = []
        for rule in LRP_RULES:
            r, start = lrp_relevance(model, x, 1, rule)
            errors.append(float(((r.double().sum((1, 2, 3))-start)/start.abs()).abs().max()))
        print(f'| {name} | ' + ' | '.join(f'{e:.1e}' for e in errors) + ' |', flush=True)


# ---- where the heat lies ---------------------------------------------------------------------------------------------

SHOWN = ('gradcam', 'gradcam++', 'layercam', 'hirescam', 'eigencam', 'integrated_gradients', 'lrp')


def chests(bodies, seed, films=6, size=64):
    """Simulated chests (bodies x films, 1, size, size), every second one with an opacity of its own, whether it has one, its exact
    mask, and the number of the body."""
    images, masks = [], []
    for i in range(bodies):
        gen, p = rng(seed+i, 'opacities'), simulate_chest(seed+i, opacities=0, size=size, pose='random')
        y, x = (np.arange(size, dtype=np.float32)+.5)*p.spacing, (np.arange(size, dtype=np.float32)+.5)*p.spacing
        grid = SimpleNamespace(x=np.broadcast_to(x, (size, size)), y=np.broadcast_to(y[:, None], (size, size)),
            shape=(size, size), spacing=p.spacing)
        for k in range(films):
            more = np.zeros((size, size), np.float32)
            if k%2: more = opacity(grid, p.masks['lungs'], gen, gen.uniform(22, 38),
                gen.uniform(1.2, 1.8))
            images.append(expose(replace(p, line=p.line+more), rng(seed+i, 'beam', k)).pixels)
            masks.append(more>.08) # what can be seen
    x = torch.from_numpy(np.stack(images)).float()[:, None]
    return x, torch.arange(len(x))%2, np.stack(masks), np.arange(bodies).repeat(films)


def small(width=12, last_pool=False):
    "Convolutions to a map of a quarter (an eighth) of the pixels; the answer is the highest place, as the evidence is in one."
    def stage(i, o, pool=True):
        return [nn.Conv2d(i, o, 3, padding=1, bias=False, padding_mode='replicate'), nn.BatchNorm2d(o),
            nn.ReLU(), *[nn.MaxPool2d(2)]*pool]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        w = width
        return nn.Sequential(nn.BatchNorm2d(1), *stage(1, w), *stage(w, 2*w), *stage(2*w, 4*w, last_pool),
            *stage(4*w, 64, False), *[*stage(64, 64, False)]*last_pool,
            nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 2))


def learn(net, x, y, epochs, lr=2e-3, bs=32):
    opt = torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=epochs*(len(x)//bs))
    net.train()
    for epoch in range(epochs):
        order, total = rng(epoch, 'order').permutation(len(x)), 0.
        for i in order[:len(x)//bs*bs].reshape(-1, bs):
            flip = torch.from_numpy(rng(epoch, int(i[0])).random(bs)<.5)[:, None, None, None]
            moved = torch.where(flip, x[i].flip(-1), x[i])*float(1+.1*rng(epoch, int(i[1])).normal())
            loss = nn.functional.cross_entropy(net(moved), y[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
            rate.step()
            total += float(loss.detach())
        print(f'  epoch {epoch}: loss {total/(len(x)//bs):.3f}', flush=True)
    return net.eval()


def odds(net, x):
    with torch.no_grad(): z = torch.cat([net(v) for v in x.split(64)])
    return (z[:, 1]-z[:, 0]).numpy()


def print_regions(net, x, masks, groups, methods=SHOWN):
    print('| method | pointing | energy | energy over area | rank |')
    for method in (*methods, 'middle'):
        if method=='middle': heat = np.stack([centre_map(x.shape[-2:])]*len(x))
        else: heat = np.concatenate([explain_quietly(net, v, method, 1) for v in x.split(32)])
        f = region_figures(heat, masks)
        f['over'] = f.energy-f.area
        print(f'| {method} | ' + ' | '.join(str(figure_of(f[k], groups, (-1, 1) if k=='over' else (0, 1)))
            for k in ('pointing', 'energy', 'over', 'rank')) + ' |', flush=True)
    print(f'share of area: {figure_of(f.area, groups, (0, 1))}')


def simulated():
    clock = time.process_time()
    x, y, masks, _ = chests(args.bodies, 10_000, size=args.size)
    valid, yv, seen, who = chests(40, 20_000, films=4, size=args.size)
    test, yt, truth, bodies = chests(60, 40_000, films=4, size=args.size)
    print(f'simulated: {time.process_time()-clock:.0f} s of processor time; opacities cover {masks[1::2].mean():.3f} of the film')
    clock = time.process_time()
    net = learn(small(16, True), x, y, args.epochs, 4e-3, 16)
    print(f"learnt from {len(x)} films of {args.bodies} bodies: {time.process_time()-clock:.0f} s; "
        f"valid AUROC {auroc_ci(yv, odds(net, valid), groups=who)}")
    clock = time.process_time()
    checks = check_methods(net, valid[1::2], TRIED, 1, groups=who[1::2], steps=4)
    print(f'checks of {len(checks)} methods on {checks[0].images} validation films: {time.process_time()-clock:.0f} s')
    for c in checks: print(f"  {c.method}: {c.verdict}; deletion {c.figures['deletion']}, insertion {c.figures['insertion']}, "
        f"random weights {c.figures['random weights']}, noise {c.figures['noise']}")
    print('validation films')
    print_regions(net, valid[1::2], seen[1::2], who[1::2], SHOWN[:5] + SHOWN[-1:])
    chosen = chosen_method(checks)
    print(f'chosen: {chosen.method if chosen else None}; test AUROC {auroc_ci(yt, odds(net, test), groups=bodies)}')
    print_regions(net, test[1::2], truth[1::2], bodies[1::2], SHOWN[:5] + SHOWN[-1:])
    save_picture(net, test[1::4], truth[1::4], 'simulated')
    clock, wall = time.process_time(), time.perf_counter()
    check_method(net, test[:200], 'gradcam', 1)
    print(f'all checks of GradCAM on 200 films: {time.process_time()-clock:.1f} s of processor time, {time.perf_counter()-wall:.1f} s')


def save_picture(net, x, masks, name, methods=('gradcam', 'layercam', 'lrp'), n=5):
    "Films with the true outline, and the heat of some methods below."
    import cv2
    rows = []
    heats = {m: explain_quietly(net, x[:n], m, 1) for m in methods}
    for method in (None, *methods):
        row = []
        for i in range(n):
            film = x[i, 0].numpy()
            a = (np.repeat((film*255).astype(np.uint8)[..., None], 3, 2) if method is None
                else heat_overlay(film, heats[method][i]))
            a = cv2.resize(a, (256, 256))
            lines, _ = cv2.findContours(cv2.resize(masks[i].astype(np.uint8), (256, 256),
                interpolation=cv2.INTER_NEAREST),
                cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            row.append(cv2.drawContours(np.ascontiguousarray(a), lines, -1, (0, 190, 255), 1))
        rows.append(np.concatenate(row, 1))
    path = Path(args.out)/f'explain_{name}.jpg'
    cv2.imwrite(str(path), np.concatenate(rows)[..., ::-1])
    print(path)


def nih_films(size):
    "Films of ChestX-ray14 by patient: abnormal or not, with boxes of opacities and outlines of findings."
    import cv2
    root = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/'chest_nih'
    t, boxes, outlines = (pd.read_csv(root/n, low_memory=False)
        for n in ('manifest.csv', 'boxes_1024.csv', 'polygons_1024.csv'))
    t['y'] = (t.labels!='No Finding').astype(int)
    x = torch.from_numpy(np.stack([cv2.resize(cv2.imread(str(root/p), 0), (size, size),
        interpolation=cv2.INTER_AREA)
        for p in t.path])).float()[:, None]/255
    def boxed(i):
        b = boxes[boxes.image==i][['x', 'y', 'w', 'h']].to_numpy(float)*size/1024
        return boxes_mask(np.c_[b[:, :2], b[:, :2]+b[:, 2:]], (size, size))
    def outlined(i):
        out = np.zeros((size, size), np.uint8)
        for text in outlines[outlines.image==i].polygon.dropna():
            points = np.array(json.loads(text), float).reshape(-1, 2)*size/1024
            cv2.fillPoly(out, [points.round().astype(int)], 1)
        return out>0
    return t, x, {'boxes': (set(boxes.image), boxed), 'outlines': (set(outlines.image), outlined)}


def real():
    t, x, truths = nih_films(args.size)
    gen, held = rng(0, 'patients'), set(t.patient_id[t.image.isin(truths['outlines'][0])])
    others = np.array(sorted(set(t.patient_id[t.image.isin(truths['boxes'][0])])-held))
    held |= set(gen.permutation(others)[:len(others)//2].tolist())
    test = t.patient_id.isin(held).to_numpy()
    print(f'{(~test).sum()} films of {t.patient_id[~test].nunique()} patients to learn from, {test.sum()} of {len(held)} to judge')
    net = small()
    if args.size>64:
        net = create_model('tf_efficientnet_lite0', 2, pretrained=False, weights='efficientnet-lite0',
            batchnorm=False)
    clock = time.process_time()
    learn(net, x[~test], torch.from_numpy(t.y[~test].to_numpy()), args.epochs,
        lr=4e-4 if args.size>64 else 2e-3)
    print(f'learnt: {time.process_time()-clock:.0f} s')
    judged = t[test & t.image.isin(truths['outlines'][0])]
    seen = np.array([truths['outlines'][1](i).any() for i in judged.image], int) # NIH's label is positive on all of them
    print(f'a finding of the readers or none on {len(judged)} films of ChestX-Det: AUROC '
        f'{auroc_ci(seen, odds(net, x[judged.index.to_numpy()]), groups=judged.patient_id.to_numpy())}')
    for name, (images, draw) in truths.items():
        rows = t[test & t.image.isin(images) & (t.y==1)]
        masks = np.stack([draw(i) for i in rows.image])
        rows, masks = rows[masks.any((1, 2))], masks[masks.any((1, 2))]
        own = x[rows.index.to_numpy()]
        print(f'{name}: {len(rows)} films of {rows.patient_id.nunique()} patients')
        print_regions(net, own, masks, rows.patient_id.to_numpy(), ('gradcam', 'layercam', 'hirescam', 'lrp'))
        save_picture(net, own, masks, name)
        if name=='outlines':
            for c in check_methods(net, own[:32], TRIED, 1, groups=rows.patient_id.to_numpy()[:32], steps=4):
                print(f"  {c.method}: {c.verdict}; deletion {c.figures['deletion']}, insertion {c.figures['insertion']}")


# ---- knees -----------------------------------------------------------------------------------------------------------

KNEE_MM = 110 # of the side of a simulated crop
FOR_KNEES = ('gradcam', 'layercam', 'hirescam', 'lrp')


def around_joint(image, p, gen, size):
    "A square of the film with the joint near its middle, `size` pixels of `KNEE_MM`."
    import cv2
    scale = KNEE_MM/size/p.spacing
    x, y = np.array(p.points['joint']) + gen.uniform(-6, 6, 2)/p.spacing
    m = np.float32([[scale, 0, x-scale*(size-1)/2-.5], [0, scale, y-scale*(size-1)/2-.5]])
    return cv2.warpAffine(np.asarray(image, np.float32), m, (size, size),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_CONSTANT)


def simulated_joints(n, seed, size=64):
    """Simulated knees (n, 1, size, size), every second one fractured, whether it is, the exact mask of the fracture (gaps, and
    where bone lies over bone), and the Schatzker type."""
    images, masks, grades = [], [], []
    for i in range(n):
        grade = i%2*(1 + i//2%6)
        p = simulate_knee(seed+i, grade, 'RL'[i//2%2], 192)
        film = expose(p, rng(seed+i, 'beam')).pixels
        images.append(around_joint(film, p, rng(seed+i, 'place'), size))
        masks.append(around_joint(p.masks['fracture'], p, rng(seed+i, 'place'), size)>.3)
        grades.append(grade)
    x = torch.from_numpy(np.stack(images)).float()[:, None].clamp(0, 1)
    return x, torch.arange(n)%2, np.stack(masks), np.array(grades)


def print_checks(net, x, methods, groups=None):
    "The five checks without a true region; gives them."
    found = check_methods(net, x, methods, 1, groups=groups, steps=4)
    print('| method | deletion | insertion | random weights | noise | verdict |')
    for c in found:
        print(f'| {c.method} | ' + ' | '.join(str(c.figures.get(k, '')) for k in ('deletion', 'insertion',
            'random weights', 'noise')) + f" | {'; '.join([c.verdict, *c.notes])} |", flush=True)
    chosen = chosen_method(found)
    print(f'chosen: {chosen.method if chosen else None}')
    return found


def fractures():
    clock = time.process_time()
    x, y, masks, _ = simulated_joints(args.knees, 40_000)
    valid, yv, _, _ = simulated_joints(60, 50_000)
    test, yt, truth, grades = simulated_joints(160, 60_000)
    print(f'simulated: {time.process_time()-clock:.0f} s of processor time; fractures cover {masks[1::2].mean():.3f} of the crop')
    clock = time.process_time()
    net = learn(small(), x, y, args.epochs, 5e-3, 16)
    print(f'learnt from {len(x)} knees: {time.process_time()-clock:.0f} s; valid AUROC {auroc_ci(yv, odds(net, valid))}')
    clock = time.process_time()
    print_checks(net, valid[1::2], FOR_KNEES)
    print(f'checks of {len(FOR_KNEES)} methods on {len(valid)//2} validation knees: {time.process_time()-clock:.0f} s')
    print(f'test AUROC {auroc_ci(yt, odds(net, test))}; type by type against intact: '
        + ', '.join(f'{k} {auroc_ci(yt[(grades==k) | (grades==0)], odds(net, test[(grades==k) | (grades==0)])).value:.2f}'
        for k in range(1, 7)))
    own = truth[1::2].any((1, 2))
    print_regions(net, test[1::2][own], truth[1::2][own], np.arange(int(own.sum())), FOR_KNEES)
    save_picture(net, test[1::2][own], truth[1::2][own], 'fractures', n=6)


def joint_mask(knee, size):
    "(size, size) bool: 80 mm across and 30 mm along the leg, about the joint that the localiser found."
    x1, _, x2, _ = knee.box
    mm, (x, y) = (x2-x1)/knee.size_mm, knee.center
    return boxes_mask([(x-40*mm, y-15*mm, x+40*mm, y+15*mm)], (size, size))


def learn_head(net, x, y, steps=400, bs=64):
    "The head alone, on the maps of a body that stays as it was."
    with torch.no_grad(): maps = torch.cat([net.eval().body(v) for v in x.split(64)])
    opt = torch.optim.AdamW(net.head.parameters(), 1e-3, weight_decay=1e-1)
    net.head.train()
    for k in range(steps):
        i = torch.from_numpy(rng(0, 'head', k).integers(len(x), size=bs))
        loss = nn.functional.cross_entropy(net.head(maps[i]), y[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net.eval()


def real_knees():
    import cv2
    root = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/'knee_oai'
    t = pd.read_csv(root/'manifest.csv', dtype={'patient': str})
    films = [cv2.imread(str(root/p), 0) for p in t.path]
    x = torch.from_numpy(np.stack([cv2.resize(f, (args.size, args.size), interpolation=cv2.INTER_AREA)
        for f in films])).float()[:, None]/255
    y = torch.from_numpy((t.kl>=2).to_numpy().astype(int))
    persons = rng(0, 'patients').permutation(sorted(set(t.patient)))
    n = len(persons)
    part = [t.patient.isin(persons[a:b]).to_numpy() for a, b in ((0, n*6//10), (n*6//10, n*7//10), (n*7//10, n))]
    net = create_model('tf_efficientnet_lite0', 2, pretrained=False, weights='efficientnet-lite0', batchnorm=False)
    clock = time.process_time()
    learn_head(net, x[part[0]], y[part[0]])
    print(f'head learnt from {part[0].sum()} knees: {time.process_time()-clock:.0f} s; test AUROC of grade 2 or more '
        f'{auroc_ci(y[part[2]], odds(net, x[part[2]]), groups=t.patient[part[2]].to_numpy())}, {part[2].sum()} knees')
    ill = part[1] & (y==1).numpy()
    ill = np.flatnonzero(ill)[:24]
    print_checks(net, x[ill], FOR_KNEES, t.patient.to_numpy()[ill])
    judged = np.flatnonzero(part[2] & (y==1).numpy())[:100]
    knees = {i: locate_knees(Radiograph(films[i].astype(np.float32)/255)) for i in judged}
    found = {i: max(k, key=lambda k: k.score, default=None) for i, k in knees.items()}
    own = np.array([i for i in judged if found[i] is not None])
    masks = np.stack([cv2.resize(joint_mask(found[i], films[i].shape[0]).astype(np.uint8), (args.size, args.size),
        interpolation=cv2.INTER_NEAREST)>0 for i in own])
    print(f'a joint was found on {len(own)} of {len(judged)} knees of grade 2 or more')
    print_regions(net, x[own], masks, t.patient[own].to_numpy(), FOR_KNEES)
    save_picture(net, x[own], masks, 'knees', n=6)


def weights():
    "The correlation of each method's map with that of random weights, on 16 fractured knees; below .5 the check is passed."
    x, _, _, _ = simulated_joints(32, 70_000, 96)
    x = x[1::2]
    nets = {'tf_efficientnet_lite0 of ImageNet': (create_model('tf_efficientnet_lite0', 2, pretrained=False,
        weights='efficientnet-lite0', batchnorm=False), SHOWN),
        'vit_tiny_patch16_224, random': (create_model('vit_tiny_patch16_224', 2, pretrained=False, img_size=96,
        batchnorm=False), (*SHOWN[:-1], 'rollout', 'attnlrp'))}
    print('| network | method | correlation with random weights | |')
    for name, (net, methods) in nets.items():
        other = randomised(net.eval(), x)
        for method in methods:
            try: own, random = (explain_quietly(n, x, method, 1) for n in (net, other))
            except ModelError as e:
                print(f'| {name} | {method} | | refused: {e.what} |', flush=True)
                continue
            there = own.any((1, 2)) # an empty map is like no other
            if there.sum()<2:
                print(f'| {name} | {method} | | not judged: its maps are empty |', flush=True)
                continue
            f = figure_of(alike_maps(own[there], random[there]), None, (-1, 1))
            print(f"| {name} | {method} | {f} | {'passed' if f.high<.5 else 'failed'} |", flush=True)


def knee():
    if args.only!='real': fractures()
    if args.only!='simulated': real_knees()


if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=('peers', 'speed', 'conservation', 'simulated', 'real', 'knee', 'weights'))
    parser.add_argument('--epochs', type=int, default=12)
    parser.add_argument('--bodies', type=int, default=160, help='simulated, to learn from, with six films each')
    parser.add_argument('--knees', type=int, default=480, help='simulated, to learn from')
    parser.add_argument('--only', choices=('simulated', 'real'), help='of the knees')
    parser.add_argument('--size', type=int, default=128, help='pixels of a film')
    parser.add_argument('--out', default='.', help='the folder of the pictures')
    args = parser.parse_args()
    globals()[args.part]()
