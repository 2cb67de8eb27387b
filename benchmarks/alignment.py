"""Chests brought into one pose: an aligner taught on children and on ChestX-ray14, judged on other patients of these and on JSRT, of
which it has seen no film.

    RADIOLOGY_AI_REAL_DATA=... python benchmarks/alignment.py train OUT --name first
    ...                        python benchmarks/alignment.py train OUT --name model --start OUT/first --looks 3 --lr 2e-3
    ...                        python benchmarks/alignment.py judge OUT --name model --looks 3 [--lungs OUT of lungs.py] [--most 150]

The body is the published lite0, cut after four stages and left as it is; the head alone learns, on what the body has said of thousands of
moved films (five minutes of one core for both calls). `chest_child` brings lung masks, from which its poses come; those of `chest_nih` are
what the aligner itself says after two rounds, the median of three views. Patients are apart: 70 % teach, 10 % are looked at while
settings are chosen and mend the confidence, 20 % are the test. `judge` writes table.md, mean images and the 20 worst, of `--most`
films of a set. Of JSRT all films are a test, unless `--jsrt` teaches half of them."""
import os

for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(k, '1')
import argparse
import gzip
import json
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from radiology_ai.core import Radiograph, rng, transform_points
from radiology_ai.losses.alignment import Template
from radiology_ai.metrics.intervals import proportion_ci
from radiology_ai.metrics.pose import (
    MAPS,
    corner_error,
    failures_ci,
    mean_shape,
    mean_sharpness,
    median_ci,
    pairwise_iou,
    procrustes,
    times_smaller_ci,
)
from radiology_ai.metrics.recalibration import PlattScaling
from radiology_ai.models.bundle import load_bundle, save_bundle
from radiology_ai.models.run import run_model
from radiology_ai.models.stn import (
    ORIENTATION,
    PARAMETERS,
    create_aligner,
    draw_poses,
    filled,
    fit_matrix,
    mean_template,
    moment_points,
    procrustes_poses,
)
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.tables import load_table, save_table
from radiology_ai.tasks.lungs import child_lungs, jsrt_structures
from radiology_ai.tasks.poses import rescale_confidence
from radiology_ai.tasks.structures import largest_part, structure_answers, truth_planes
from radiology_ai.train.poses import Pools, fill_pools, fit_head, quarter_turned

SIZE = 192    # of the stored films
RECIPE = recipe('chest', size=SIZE)
FOLDERS = dict(jsrt='chest_jsrt', child='chest_child', nih='chest_nih', knees='knee_oai')


def stored(out: Path, name: str) -> ImageStore:
    "The films of a collection, prepared as a bundle would."
    where = out/'stores'/FOLDERS[name]
    if not (where/'index.parquet').exists():
        folder = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/FOLDERS[name]/'images'
        files = sorted(str(p) for p in folder.iterdir())[::2 if name=='knees' else 1]
        preprocess_folder(files, where, RECIPE, workers=1, show=False)
    return ImageStore(where)


def parts(patients, seed: int = 0, shares=(.7, .1)) -> np.ndarray:
    "train, valid or test of each film, by patient."
    names = np.unique(patients)
    at = rng(seed, 'patients').permutation(len(names))/len(names)
    part = np.where(at<shares[0], 'train', np.where(at<sum(shares), 'valid', 'test'))
    return pd.Series(part, names).loc[patients].to_numpy()


def collection(out: Path, name: str) -> dict:
    """Films (N, 1, SIZE, SIZE) uint8, table, moments of both lungs (N, P, 2) and lungs (N, 2, SIZE, SIZE)
    uint8, 255 where nobody has drawn."""
    kept = out/f'{name}.safetensors'
    if not kept.exists():
        made = collected(out, name)
        save_table(made.pop('table'), out/f'{name}.csv')
        save_file({k: v.contiguous() for k, v in made.items()}, kept)
    return load_file(kept) | {'table': load_table(out/f'{name}.csv', numbers=False)}


def collected(out: Path, name: str) -> dict:
    "The same, made anew."
    store = stored(out, name)
    folder = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/FOLDERS[name]
    films = torch.from_numpy(np.stack([store[i] for i in range(len(store))]))[:, None]
    table = pd.DataFrame({'image_id': store.index.image_id.astype(str)})
    lungs = torch.full((len(store), 2, SIZE, SIZE), torch.nan)
    if name in ('jsrt', 'child'):
        labels = (jsrt_structures if name=='jsrt' else child_lungs)(folder)
        labels = labels[labels.image_id.isin(table.image_id)].reset_index(drop=True)
        masks = truth_planes(store, labels, ('right_lung', 'left_lung'))
        at = [store.position(i) for i in labels.image_id]
        lungs[at] = torch.from_numpy(np.stack([masks[i] for i in at])).float()
    manifest = pd.read_csv(folder/'manifest.csv', dtype=str)
    column = dict(jsrt='image', child='patient_group', nih='patient_id', knees='patient')[name]
    manifest['image_id'] = [Path(p).name for p in manifest.path]
    table['patient_id'] = table.image_id.map(manifest.set_index('image_id')[column]).to_numpy()
    table['part'] = parts(table.patient_id, shares=(.5, .1) if name=='jsrt' else (.7, .1))
    points = torch.full((len(store), 10, 2), torch.nan).double()
    known = torch.isfinite(lungs).flatten(1).all(1)
    if known.any(): points[known] = torch.from_numpy(moment_points(lungs[known]))
    return dict(films=films, table=table, points=points, lungs=torch.nan_to_num(lungs, nan=255).byte())


def poses_of(c: dict, template: Template) -> torch.Tensor:
    "(N, 3, 3) by the true lungs, NaN where nobody has drawn."
    return procrustes_poses(c['points'], template.points, 'scales')


def own_poses(model, films, *, views: int = 3, seed: int = 0) -> torch.Tensor:
    "(N, 3, 3) what an aligner says of films, the median of the corners over moved views."
    size, out = tuple(films.shape[-2:]), []
    n = model.size
    corners = torch.tensor([[0., 0], [size[1], 0], [size[1], size[0]], [0, size[0]]]).double()
    for k in range(0, len(films), 64):
        x = films[k:k+64].float()/255
        gen, found = torch.Generator().manual_seed(seed+k), []
        for _ in range(views):
            pose = draw_poses(gen, len(x), (n, n), 12, .06, scale=(.88, 1.1))@fit_matrix(size, (n, n))
            with torch.no_grad(): m = upright(model, filled(x, pose, (n, n)))@pose
            found.append(corners@m[:, :2, :2].transpose(1, 2)+m[:, None, :2, 2])
        out.append(torch.stack(found).median(0).values)
    return procrustes_poses_each(corners.numpy(), torch.cat(out).numpy())


def procrustes_poses_each(points, targets) -> torch.Tensor:
    "(N, 3, 3) affine maps of the points onto each of the targets."
    p = np.concatenate([points, np.ones((len(points), 1))], 1)
    part = np.linalg.lstsq(p, targets.transpose(1, 0, 2).reshape(len(points), -1), rcond=None)[0]
    out = np.tile(np.eye(3), (len(targets), 1, 1))
    out[:, :2] = part.reshape(3, len(targets), 2).transpose(1, 2, 0)
    return torch.from_numpy(out)


def upright(model, x) -> torch.Tensor:
    "Matrices of films that are known to stand upright."
    orients, model.orients = model.orients, False
    try: return model.tell(x).matrix
    finally: model.orients = orients


def template_of(c: dict, size: int) -> Template:
    "By the lungs of films, at the mean place and size, in the frame of the aligner."
    known = torch.isfinite(c['points']).flatten(1).all(1) & torch.from_numpy(
        c['table'].part.to_numpy()=='train')
    films = c['films'][known].float()/255
    lungs = c['lungs'][known].float()
    points = c['points'][known].numpy()
    shape = transform_points(fit_matrix((SIZE, SIZE), (size, size)).numpy(), mean_shape(points, 'scales'))
    first = Template(films[0], points=torch.from_numpy(shape).float())
    return mean_template(films, lungs, size_out=(size, size),
        align=lambda x: procrustes_poses(points, first.points, 'scales'))


def validated(model, data: dict, template: Template, part='valid', seed=5) -> dict:
    "Median corner error in percent of validation films, to the pose of the lungs and to the own pose."
    out, n = {}, model.size
    for name, c in data.items():
        films = c['films'][(c['table'].part==part).to_numpy()][:60].float()/255
        truth = poses_of(c, template)[(c['table'].part==part).to_numpy()][:60]
        gen = torch.Generator().manual_seed(seed)
        pose = draw_poses(gen, len(films), (n, n))@fit_matrix((SIZE, SIZE), (n, n))
        with torch.no_grad():
            found, own = upright(model, filled(films, pose, (n, n)))@pose, upright(model, films)
        e = corner_error(found, own, (SIZE, SIZE), template.size[1])
        out[f'{name} own'] = [round(float(np.median(e)), 2), round(float((e>10).mean()*1000), 1)]
        e = corner_error(found, truth, (SIZE, SIZE),
            template.size[1])[torch.isfinite(truth).flatten(1).all(1).numpy()]
        if len(e): out[f'{name} lungs'] = [round(float(np.median(e)), 2), round(float((e>10).mean()*1000), 1)]
    return out


MOVED = dict(turn=27., shift=.16, scale=(.72, 1.33))


def train(args):
    "Teach the head on what the published body sees: children, then what it says of NIH as well, then both."
    torch.set_num_threads(1)
    data = {name: collection(args.out, name) for name in ('child', 'nih', *['jsrt']*args.jsrt)}
    knees = collection(args.out, 'knees')
    others = knees['films'][torch.from_numpy((knees['table'].part=='train').to_numpy())]
    template = template_of(data['child'], 256)
    model = create_aligner(args.arch, 'affine', pretrained=True, steps=args.looks, size=args.size,
        template=template, head='field',
        stages=args.stages, orient=True, seed=args.seed, weights='efficientnet-lite0')
    if args.start is not None: model.load_state_dict(load_bundle(args.start).model.state_dict())
    model.body.to(memory_format=torch.channels_last)
    model.eval()
    gen, pools, said = torch.Generator().manual_seed(args.seed), Pools([], [], []), []
    taught = {}
    for k, (names, looks, views, steps) in enumerate(plan(args)):
        start = time.process_time()
        for name in names:
            if name not in taught: taught[name] = taught_poses(model, data[name], template, args)
            fill_pools(model, pools, *taught[name], views, gen=gen, looks=looks, others=others, **MOVED)
        filled_in = time.process_time()-start
        losses = fit_head(model, pools, steps, args.lr, seed=args.seed+k)
        said.append(dict(round=k, maps=len(pools.looks),
            seconds=[round(filled_in), round(time.process_time()-start)],
            loss=round(float(np.mean(losses[-100:])), 3), valid=validated(model, data, template)))
        print(json.dumps(said[-1]), flush=True)
        names = [*PARAMETERS['affine'], 'confidence', *ORIENTATION]
        save_bundle(model, args.out/args.name, RECIPE, names, task='alignment', record={'rounds': said},
            answer={'kind': 'poses', 'activation': 'sigmoid', 'least': .5, 'structures': []})


def plan(args) -> list:
    "Of each round the collections, the looks that have been taught, views a collection, and steps."
    v, s = args.views, args.steps
    more = ['jsrt']*args.jsrt
    if args.start is not None: return [(['child', 'nih', *more], 2, v*2//3, 3*s)]
    return [(['child', *more], 0, v, s), (['child', *more], 1, v//2, s), (['nih'], 1, v//2, s),
        (['child', 'nih', *more], 1, v//2, 2*s)]


def taught_poses(model, c: dict, template: Template, args) -> tuple:
    "Films of training and their poses: of the lungs, or what the aligner says itself."
    learn = torch.from_numpy((c['table'].part=='train').to_numpy())
    pose = poses_of(c, template)
    if not torch.isfinite(pose).any():
        at = torch.nonzero(learn)[:args.pseudo, 0]
        return c['films'][at], own_poses(model, c['films'][at])
    use = learn & torch.isfinite(pose).flatten(1).all(1)
    return c['films'][use], pose[use]


# Peers

def own(model):
    "A function of films (B, 1, H, W) in [0, 1]: their (B, 3, 3) maps to the template, by the aligner."
    return lambda x: np.concatenate([run_model(model, [x[k:k+64]],
        {'m': lambda m, x: upright(m, x).flatten(1).float()})['m'].numpy()
        .reshape(-1, 3, 3).astype(float) for k in range(0, len(x), 64)])


def small(x, side: int = 96) -> np.ndarray:
    "(B, side, side) smoothed and of unit variance."
    f = np.stack([cv2.GaussianBlur(cv2.resize(o[0].numpy(), (side, side), interpolation=cv2.INTER_AREA),
        (0, 0), 1.5) for o in x])
    return ((f-f.mean((1, 2), keepdims=True))/np.maximum(f.std((1, 2), keepdims=True),
        1e-3)).astype(np.float32)


def from_small(m, size, side, frame) -> np.ndarray:
    """(3, 3) from pixels of the film to the template, of OpenCV's (2, 3) map from the template to the film,
    both of `side` pixels."""
    middle = np.array([[1, 0, .5], [0, 1, .5], [0, 0, 1]])
    square = middle@np.linalg.inv(np.vstack([m, [0, 0, 1]]))@np.linalg.inv(middle)
    return np.diag([frame/side, frame/side, 1])@square@np.diag([side/size[1], side/size[0], 1])


def ecc(template, side: int = 96):
    """OpenCV's ECC, an affine map onto the mean film, begun at the identity, up to 60 steps; NaN where it
    gives up."""
    aim = small(template.image[None], side)[0]
    def align(x):
        out = np.full((len(x), 3, 3), np.nan)
        for i, f in enumerate(small(x, side)):
            try:
                m = cv2.findTransformECC(aim, f, np.eye(2, 3, dtype=np.float32), cv2.MOTION_AFFINE,
                    (3, 60, 1e-4), None, 5)[1]
                out[i] = from_small(m, x.shape[-2:], side, template.size[1])
            except (cv2.error, np.linalg.LinAlgError): pass
        return out
    return align


def phase(template, side: int = 96):
    """Phase correlation: turn and scale of the spectra on a logarithmic polar grid, then the shift (Reddy and
    Chatterji 1996)."""
    aim, window = small(template.image[None], side)[0], cv2.createHanningWindow((side, side), cv2.CV_32F)
    centre = (side/2, side/2)
    def polar(f):
        spectrum = np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(f*window)))).astype(np.float32)
        return cv2.warpPolar(spectrum, (side, side), centre, side/2, cv2.WARP_POLAR_LOG)
    def align(x):
        out = []
        for f in small(x, side):
            (dx, dy), _ = cv2.phaseCorrelate(polar(aim), polar(f))
            scale, turn = np.exp(dx*np.log(side/2)/side), dy*360/side
            best = None
            for t in (turn, turn+180):
                m = cv2.getRotationMatrix2D(((side-1)/2, (side-1)/2), t, scale)
                g = cv2.warpAffine(f, m, (side, side))
                (sx, sy), r = cv2.phaseCorrelate(g, aim, window)
                if best is None or r>best[0]:
                    best = r, np.array([[1, 0, sx], [0, 1, sy]])@np.vstack([m, [0, 0, 1]])
            inverse = np.linalg.inv(np.vstack([best[1], [0, 0, 1]]))[:2]
            out.append(from_small(inverse, x.shape[-2:], side, template.size[1]))
        return np.stack(out)
    return align


def by_lungs(run, template):
    "The lungs as a network of the task `lungs` draws them, their moments laid onto the template's."
    model = load_bundle(run/'model').model
    def align(x):
        masks = np.concatenate([structure_answers([model], x[k:k+32])[:, :2]>=.5
            for k in range(0, len(x), 32)])
        masks = np.stack([[largest_part(m) for m in film] for film in masks])
        return procrustes_poses(moment_points(masks), template.points, 'scales').numpy()
    return align


def unmoved(template):
    "Films as they come, fitted into the frame."
    return lambda x: np.tile(fit_matrix(tuple(x.shape[-2:]), template.size).numpy(), (len(x), 1, 1))


# Figures

def told_ci(ci, digits: int = 2) -> str:
    return f'{ci[0]:.{digits}f} ({ci[1]:.{digits}f} to {ci[2]:.{digits}f})'


def tested(c: dict, part: str = 'test', most: int = 10**6) -> dict:
    "The films of a part, in [0, 1]."
    at = np.flatnonzero((c['table'].part==part).to_numpy()) if part else np.arange(len(c['table']))
    at = at[:most]
    return dict(x=c['films'][at].float()/255, patients=c['table'].patient_id.to_numpy()[at],
        points=c['points'][at], lungs=c['lungs'][at],
        ids=c['table'].image_id.to_numpy()[at])


def corner_rows(name: str, t: dict, methods: dict, template: Template) -> tuple:
    "Rows of the table, and the errors of each method: from the own pose and from that of the lungs."
    size, width = (SIZE, SIZE), template.size[1]
    pose = draw_poses(torch.Generator().manual_seed(17), len(t['x']), size)
    moved = filled(t['x'], pose, size)
    truth, errors, rows = procrustes_poses(t['points'], template.points, 'scales').numpy(), {}, []
    for k, f in methods.items():
        start = time.process_time()
        still, after = f(t['x']), f(moved)
        seconds = (time.process_time()-start)/len(t['x'])/2
        e = corner_error(after@pose.numpy(), still, size, width)
        e = np.where(np.isnan(e), 1e3, e)
        if k=='as they come': e = corner_error(pose.numpy(), np.eye(3), size)
        lungs = corner_error(after@pose.numpy(), truth, size, width)
        errors[k] = dict(own=e, lungs=np.where(np.isnan(lungs) & np.isfinite(truth).all((1, 2)), 1e3, lungs),
            still=still, after=after)
        first = errors[next(iter(methods))]['own']
        known = ~np.isnan(errors[k]['lungs'])
        rows.append(f"| {name} | {k} | {len(e)} | {told_ci(median_ci(e, t['patients']))} | "
            f"{told_ci(failures_ci(e, 10, t['patients']), 1)} | "
            + (told_ci(median_ci(errors[k]['lungs'][known], t['patients'][known])) if known.any() else '')
            + f" | {'' if first is e else told_ci(times_smaller_ci(e, first, t['patients']))} | {1000*seconds:.0f} |")
    return rows, errors, pose


def landmarks(ids) -> np.ndarray:
    "(N, 120, 2) of lungs and heart in the pixels of 512, NaN where there are none."
    t = pd.read_csv(Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/'chest_jsrt'/'landmarks_512px.csv')
    t = t[~t.part.str.contains('clavicle')]
    by = {k: g[['x', 'y']].to_numpy(float) for k, g in t.groupby('image')}
    return np.stack([by.get(Path(i).stem, np.full((120, 2), np.nan)) for i in ids])


def landmark_rows(t: dict, errors: dict) -> list:
    """Distance of the landmarks from their mean after each method, in pixels of 512 at the mean size of the
    films."""
    shapes = landmarks(t['ids'])
    known = np.isfinite(shapes).all((1, 2))
    shapes, patients, raw = shapes[known], t['patients'][known], np.nanmean(shapes[known], 0)
    def off(moved):
        scaled = np.stack([transform_points(procrustes(moved.mean(0), raw), s) for s in moved])
        return np.linalg.norm(scaled-scaled.mean(0), axis=2)
    found = {'films as they come': off(shapes)}
    for kind in MAPS:
        found[f'best {kind} by the true landmarks'] = off(np.stack([transform_points(procrustes(s, raw, kind),
            s) for s in shapes]))
    k = SIZE/512
    for name, e in errors.items():
        if name!='as they come':
            found[name] = off(np.stack([transform_points(m@np.diag([k, k, 1]), s) if np.isfinite(m).all()
                else s for m, s in zip(e['still'][known], shapes)]))
    found['aligner, films moved on purpose'] = off(np.stack([transform_points(m@p@np.diag([k, k, 1]), s)
        for m, p, s in
        zip(errors['aligner']['after'][known], errors['pose'][known], shapes)]))
    floor = np.median(found['best scales by the true landmarks'])
    return [f"| {n} | {np.median(d):.2f} | {told_ci(median_ci(d.mean(1), patients))} | {.7*np.median(d):.2f} "
        f"mm | {np.median(d)/floor:.2f} |"
        for n, d in found.items()]


def overlap_rows(name, t, errors, template) -> list:
    "How the lungs of pairs of patients overlap, and how sharp the mean is, before and after."
    known = torch.isfinite(t['points']).flatten(1).all(1).numpy()
    lungs, g = (t['lungs'][known]==1).any(1, keepdim=True).float(), t['patients'][known]
    def masks(m, pose=None):
        return (filled(lungs, torch.from_numpy(m[known]), template.size, mode='nearest')[:, 0]>.5).numpy()[:,
            ::2, ::2]
    before, after = masks(errors['as they come']['still']), masks(errors['aligner']['still'])
    rise = pairwise_iou(after, g, before=before)
    sharp = [mean_sharpness(filled(t['x'], torch.from_numpy(errors[k]['still']), template.size)[:, 0, ::2,
        ::2].numpy())
        for k in ('as they come', 'aligner')]
    return [f"| {name} | {len(g)} | {told_ci(pairwise_iou(before, g), 3)} | {told_ci(pairwise_iou(after, g), 3)} | {told_ci(rise, 3)} | "
        f"{sharp[0]:.3f}, {sharp[1]:.3f} |"]


def orientation_rows(sets: dict, model) -> list:
    "Each film in three of the 16 states, moved by up to 15 degrees: what is recognised."
    got = {k: [] for k in ('turned', 'inverted', 'mirrored', 'mirrored, where it is sure')}
    rows = []
    for name, t in sets.items():
        mine, who = {k: [] for k in got}, []
        for s in range(3):
            gen = torch.Generator().manual_seed(100+s)
            n = len(t['x'])
            k = torch.randint(4, (n,), generator=gen)
            m = torch.rand(n, generator=gen)<.5
            v = torch.rand(n, generator=gen)<.5
            x = torch.where(m[:, None, None, None], t['x'].flip(-1), t['x'])
            x = filled(x, draw_poses(gen, n, (SIZE, SIZE), 15, .08, scale=(.85, 1.2)), (SIZE, SIZE))
            x = quarter_turned(torch.where(v[:, None, None, None], 1-x, x), k)
            told = run_model(model, [x[i:i+64] for i in range(0, n, 64)],
                {'o': lambda m, x: (lambda o: torch.cat([o.turned,
                o.mirrored[:, None], o.inverted[:, None]], 1))(m.tell(x))})['o']
            mine['turned'].append((told[:, :4].argmax(1)==k).numpy())
            mine['inverted'].append(((told[:, 5]>=.5)==v).numpy())
            right, sure = ((told[:, 4]>=.5)==m).numpy().astype(float), ((told[:, 4]-.5).abs()>=.4).numpy()
            mine['mirrored'].append(right)
            mine['mirrored, where it is sure'].append(np.where(sure, right, np.nan))
            who.append(t['patients'])
        who = np.concatenate(who)
        for k, values in mine.items():
            v = np.concatenate(values).astype(float)
            there = ~np.isnan(v)
            rows.append(f"| {name} | {k} | {int(there.sum())} | {told_ci(proportion_ci(v[there]>.5, None, who[there]), 4)} |")
    return rows


def volume() -> np.ndarray:
    "The real CT in HU: axes left, anterior, superior (NIfTI-1, read by its header)."
    data = gzip.decompress((Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/'ct_chest'/'cxr.nii.gz').read_bytes())
    shape = np.frombuffer(data, '<i2', 8, 40)[1:4]
    kind = {4: '<i2', 8: '<i4', 16: '<f4', 64: '<f8'}[int(np.frombuffer(data, '<i2', 1, 70)[0])]
    offset, slope, intercept = (float(v) for v in np.frombuffer(data, '<f4', 3, 108))
    v = np.frombuffer(data, kind, int(np.prod(shape)), int(offset)).reshape(shape,
        order='F').astype(np.float32)
    return v*(slope or 1)+intercept


def projected(angles, pitch: float = 0.) -> torch.Tensor:
    """(N, 1, SIZE, SIZE) radiographs of the real CT, turned about its long axis by each angle (90: a lateral
    film)."""
    from scipy.ndimage import rotate, zoom
    v = zoom(np.clip(1+volume()/1000, 0, 2.2), (.25, .25, 2.5/2.8), order=1)
    out = []
    for a in angles:
        w = rotate(v, a, (0, 1), reshape=False, order=1)
        if pitch: w = rotate(w, pitch, (1, 2), reshape=False, order=1)
        film = np.exp(-.0195*2.8*w.sum(1)).T[::-1]
        film = 1-film**.35
        film = np.pad(film, ((max(0, (film.shape[1]-film.shape[0])//2),)*2,
            (max(0, (film.shape[0]-film.shape[1])//2),)*2))
        film = cv2.resize(np.float32((film-film.min())/np.ptp(film)), (SIZE, SIZE),
            interpolation=cv2.INTER_AREA)
        out.append(RECIPE(Radiograph(film)).pixels)
    return torch.from_numpy(np.stack(out))[:, None].float()


def refused_films(out: Path) -> dict:
    "Films that are no frontal chest, by kind."
    knees = tested(collection(out, 'knees'))
    where = out/'stores'/'dicom'
    folder = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/'dicom'
    files = sorted(str(p) for p in folder.iterdir() if p.suffix=='.dcm')
    if not (where/'index.parquet').exists():
        preprocess_folder(files, where, RECIPE, workers=1, show=False, allow_empty=True)
    store = ImageStore(where)
    limb = [i for i in range(len(store)) if not any(k in store.index.path.iloc[i]
        for k in ('chest', 'NIH', 'Canon'))]
    gen = torch.Generator().manual_seed(3)
    blank = torch.rand(40, 1, 1, 1, generator=gen).expand(40, 1, SIZE, SIZE).clone()
    blank[20:] = (blank[20:]+.2*torch.randn(20, 1, SIZE, SIZE, generator=gen)).clamp(0, 1)
    return {'knees': knees['x'], 'hands, hips, legs (DICOM)': torch.from_numpy(np.stack([store[i]
        for i in limb]))[:, None].float()/255,
        'black and blank films': blank, 'lateral films of the CT': projected([80, 85, 90, 95, 100, -80, -85,
        -90, -95, -100])}


def half(x) -> torch.Tensor:
    "Of each film one half is black: right, left, upper, lower in turn."
    out, n = x.clone(), x.shape[-1]//2
    for i in range(len(out)):
        if i%4<2: out[i, :, :, :n] = 0
        if i%4==1: out[i] = out[i].flip(-1)
        if i%4==2: out[i, :, :n] = 0
        if i%4==3: out[i, :, n:] = 0
    return out


def confidence(model, x) -> np.ndarray:
    "(N,) probabilities."
    return run_model(model, [x[k:k+64] for k in range(0, len(x), 64)],
        {'c': lambda m, x: m.tell(x).confidence})['c'].sigmoid().numpy()


def calibrated(model, out: Path, data: dict, template) -> dict:
    "Mend the confidence on films of validation patients: right is a chest whose pose is within 10 %."
    right, p, who = [], [], []
    for name in ('child', 'nih'):
        t = tested(data[name], 'valid')
        pose = draw_poses(torch.Generator().manual_seed(29), len(t['x']), (SIZE, SIZE))
        moved = filled(t['x'], pose, (SIZE, SIZE))
        e = corner_error(own(model)(moved)@pose.numpy(), own(model)(t['x']), (SIZE, SIZE), template.size[1])
        right += [*(e<=10), *np.zeros(len(e))]
        p += [*confidence(model, moved), *confidence(model, half(moved))]
        who += [*t['patients'], *t['patients']]
    knees = tested(collection(out, 'knees'), 'valid')
    right += [0]*len(knees['x']); p += list(confidence(model, knees['x'])); who += list(knees['patients'])
    rule = PlattScaling().fit(np.array(right, float), np.clip(p, 1e-9, 1-1e-9), np.array(who, str))
    rescale_confidence(model, rule.slope, rule.intercept)
    return rule.to_dict()


def refusal_rows(model, out: Path, sets: dict) -> list:
    "The share that is moved at a confidence of one half."
    films = {f'{k}, as they come': (t['x'], t['patients']) for k, t in sets.items()}
    films |= {f'{k}, half of each black': (half(t['x']), t['patients']) for k, t in sets.items()}
    films |= {k: (x, np.arange(len(x))) for k, x in refused_films(out).items()}
    rows = []
    for k, (x, g) in films.items():
        p = confidence(model, x)
        rows.append(f"| {k} | {len(x)} | {told_ci(proportion_ci(p>=.5, None, g), 3)} | {np.median(p):.3f} |")
    return rows


def turned_rows(model, template) -> list:
    """The CT turned out of the plane: how far the pose stands from that of the frontal projection, and the
    confidence."""
    angles = [0, 5, 10, 15, 20, 30, 40, 60, 90]
    rows = []
    for pitch in (0, 10):
        x = projected(angles, pitch)
        first = own(model)(projected([0], 0))
        m, p = own(model)(x), confidence(model, x)
        pose = draw_poses(torch.Generator().manual_seed(41), 8, (SIZE, SIZE))
        for i, a in enumerate(angles):
            moved = filled(x[i:i+1].expand(8, -1, -1, -1), pose, (SIZE, SIZE))
            e = corner_error(own(model)(moved)@pose.numpy(), first, (SIZE, SIZE), template.size[1])
            rows.append(f"| {a} | {pitch} | "
                f"{corner_error(m[i], first[0], (SIZE, SIZE), template.size[1])[0]:.1f} | {np.median(e):.1f} | {p[i]:.3f} |")
    return rows


def speed_rows(model, template) -> list:
    "64 films of 320 pixels, one core: seconds of the processor."
    x = torch.rand(64, 1, 320, 320,
        generator=torch.Generator().manual_seed(0))*.05+torch.nn.functional.interpolate(
        template.image[None], (320, 320), mode='bilinear')
    pose = draw_poses(torch.Generator().manual_seed(1), 64, (320, 320), 15, .1, scale=(.85, 1.2))
    x = filled(x, pose, (320, 320))
    def clock(f):
        f(x[:2])
        start = time.process_time()
        f(x)
        return time.process_time()-start
    mine = clock(lambda v: run_model(model, [v], {'m': lambda m, x: m.tell(x).matrix}))
    slow = clock(ecc(template))
    full = clock(ecc(template, 320))
    return [f'aligner {mine:.2f} s, ECC at 96 px {slow:.2f} s ({slow/mine:.1f} times), ECC at 320 px '
        f'{full:.2f} s ({full/mine:.1f} times)']


def sheet(path: Path, name: str, t: dict, errors: dict, template):
    "Mean images before and after, and the 20 worst: the moved film, and it as it was aligned."
    moved = filled(t['x'], torch.from_numpy(errors['pose']), (SIZE, SIZE))
    after = filled(moved, torch.from_numpy(errors['aligner']['after']), template.size)[:, 0]
    def grey(a):
        return cv2.resize(np.uint8(255*np.clip(np.asarray(a), 0, 1)), (160, 160),
            interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(path/f'mean_{name}.png'), np.hstack([grey(a)
        for a in (t['x'][:, 0].mean(0), moved[:, 0].mean(0), after.mean(0),
        template.image[0])]))
    worst = np.argsort(-errors['aligner']['own'])[:20]
    tiles = [np.hstack([grey(moved[i, 0]), grey(after[i])]) for i in worst]
    tiles += [np.zeros_like(tiles[0])]*(20-len(tiles))
    cv2.imwrite(str(path/f'worst_{name}.png'), np.vstack([np.hstack(tiles[k:k+4]) for k in range(0, 20, 4)]))


def judge(args):
    "All figures; what a peer needs is left out where it is not there."
    torch.set_num_threads(1)
    model = load_bundle(args.out/args.name).model
    if args.looks: model.steps = args.looks
    model.body.to(memory_format=torch.channels_last)
    template = model.template()
    data = {name: collection(args.out, name) for name in ('jsrt', 'child', 'nih')}
    rule = calibrated(model, args.out, data, template)
    sets = {'jsrt': tested(data['jsrt'], 'test' if args.jsrt else '', args.jsrts)}
    sets |= {k: tested(data[k], most=args.most) for k in ('child', 'nih')}
    lines = [f'calibration on validation patients: {json.dumps(rule)}', '',
        '| set | method | films | corner error, % of the width | '
        'failures per 1000 | from the pose of the true lungs | times larger than the aligner | ms a film |',
        '|'+'---|'*8]
    every = {}
    for name, t in sets.items():
        methods = {'aligner': own(model), 'as they come': unmoved(template), 'ECC': ecc(template),
            'phase correlation': phase(template)}
        teachers = dict(jsrt=['child', 'jsrt'], child=['child'], nih=['jsrt'])[name]
        for learnt in teachers*bool(args.lungs):
            methods[f'lungs drawn, learnt on {learnt}'] = by_lungs(args.lungs/f'run_{learnt}', template)
        rows, errors, pose = corner_rows(name, t, methods, template)
        every[name] = errors | {'pose': pose.numpy()}
        lines += rows
        print('\n'.join(rows), flush=True)
        sheet(args.out, name, t, every[name], template)
    clean = {k: {m: e for m, e in v.items() if m!='pose'} for k, v in every.items()}
    lines += ['', '| JSRT landmarks | median px of 512 | mean of a film, median | mm | times the floor |',
        '|'+'---|'*5,
        *landmark_rows(sets['jsrt'], _with_pose(clean['jsrt'], every['jsrt']['pose']))]
    lines += ['', '| set | films | IoU before | after | rise | sharpness of the mean before, after |',
        '|'+'---|'*6]
    for k in ('jsrt', 'child'): lines += overlap_rows(k, sets[k], clean[k], template)
    lines += ['', '| set | recognised | films | share |', '|'+'---|'*4, *orientation_rows(sets, model)]
    lines += ['', '| films | n | moved | median confidence |', '|'+'---|'*4,
        *refusal_rows(model, args.out, sets)]
    lines += ['', '| turned out of the plane | tilted | error, % | moved as well | confidence |',
        '|'+'---|'*5, *turned_rows(model, template)]
    lines += ['', *speed_rows(model, template)]
    (args.out/'table.md').write_text('\n'.join(lines)+'\n')
    print('\n'.join(lines))


class _with_pose(dict):
    "Errors by method, and the poses by which films were moved."
    def __init__(self, errors, pose):
        super().__init__(errors)
        self.pose = pose
    def __getitem__(self, k): return self.pose if k=='pose' else super().__getitem__(k)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['train', 'judge'])
    parser.add_argument('out', type=Path)
    for name, default in dict(size=96, looks=2, stages=4, seed=0, views=2400, steps=700, pseudo=400,
            most=10**6, jsrts=200).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    for name, default in dict(lr=3e-3).items():
        parser.add_argument(f'--{name}', type=float, default=default)
    parser.add_argument('--arch', default='tf_efficientnet_lite0')
    parser.add_argument('--name', default='model')
    parser.add_argument('--start', type=Path, default=None, help='a bundle that is taught further')
    parser.add_argument('--lungs', type=Path, default=None, help='OUT of benchmarks/lungs.py, for that peer')
    parser.add_argument('--jsrt', action='store_true')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args) if args.what=='train' else judge(args)


if __name__=='__main__': main()
