"""Where a finding goes under a draw, by another way than the library's: a mask without pixels (a formula),
carried along step by step, and its extent.

`BatchAugment` multiplies matrices (kornia's for the perspective) and moves contours forward. Here each new
place is traced back to its old one, one operation after the other, with OpenCV's perspective matrix and
SciPy's B-splines, and asked whether it lies in the shape: the octagon, ellipse or rectangle that the box
stands for. The extent of the places that do is found on a coarse grid over three times the frame, then on two
finer ones along each side, to a few hundredths of a pixel.
"""
from typing import NamedTuple

import cv2
import numpy as np
import torch
from scipy.interpolate import BSpline

from radiology_ai.vision.augment import BatchAugment, rand_augment
from radiology_ai.vision.geometry import warp

H,W = 80,96
KINDS = ('ellipse', 'edges', 'corners')
STILL = dict(rotation=0, translation=0, scale=(1, 1), brightness=0, contrast=(1, 1), gamma=(1, 1), noise=0,
    p=1.)
CHAINS = {name: {**STILL, **settings} for name,settings in {
    'rotation': dict(rotation=45), 'translation': dict(translation=.3), 'scale': dict(scale=(.6, 1.6)),
    'shear': dict(shear=20), 'flip': dict(flip=.5),
    'perspective': dict(perspective=.5), 'elastic': dict(elastic=.05), 'crop': dict(crop=(.3, 1)),
    'affine': dict(rotation=30, translation=.15, scale=(.75, 1.3), shear=10, flip=.5),
    'crop, bent': dict(crop=(.5, 1), elastic=.04, rotation=10),
    'all': dict(rotation=25, translation=.1, scale=(.8, 1.25), shear=10, flip=.5, perspective=.25,
    elastic=.04, crop=(.5, 1))}.items()}
CHAINS['RandAugment'] = None


class Found(NamedTuple):
    iou: np.ndarray   # of the boxes that both keep, (N,)
    point: np.ndarray # pixels between a point and where the oracle says the moved point came from
    map: np.ndarray   # pixels between where the moved image read and where it should have, the largest of each image
    torn: int         # boxes that only one of the two keeps, beyond doubt about the share that is visible


def basis(t, k: int):
    "(..., k) uniform cubic B-splines on [0, 1] with k control values."
    n = k-3
    flat = np.clip(t, 0, 1-1e-12).reshape(-1)
    return BSpline.design_matrix(flat, np.arange(-3, n+4)/n, 3).toarray().reshape(*t.shape, k)


def trace(draw, i, x, y):
    "Old (x, y) of the new places on the grid x (B, n) by y (B, m), for the images `i`: two arrays (B, m, n)."
    get = lambda name: getattr(draw, name).numpy()[i]
    col = lambda v: np.asarray(v)[:,None,None]
    qx,qy = np.broadcast_arrays(x[:,None,:], y[:,:,None])
    if draw.bend is not None:
        bend = get('bend')
        bx,by = basis(x/W, bend.shape[-1]),basis(y/H, bend.shape[-1])
        qx = qx + W*(by @ bend[:,0] @ bx.transpose(0, 2, 1))
        qy = qy + H*(by @ bend[:,1] @ bx.transpose(0, 2, 1))
    if draw.crop is not None:
        x1,y1,x2,y2 = get('crop').T
        qx,qy = col(x1*W) + qx*col(x2-x1),col(y1*H) + qy*col(y2-y1)
    if draw.corners is not None:
        frame = np.array([[0, 0], [W, 0], [W, H], [0, H]], np.float64)
        m = np.stack([cv2.getPerspectiveTransform((frame + c*[W, H]).astype(np.float32),
            frame.astype(np.float32)) for c in get('corners')])
        px,py,depth = (col(m[:,r,0])*qx + col(m[:,r,1])*qy + col(m[:,r,2]) for r in range(3))
        ahead = depth>1e-3
        depth = np.where(ahead, depth, 1)
        qx,qy = np.where(ahead, px/depth, 1e9),np.where(ahead, py/depth, 1e9)
    qx,qy = qx - col(get('dx')*W) - W/2,qy - col(get('dy')*H) - H/2
    cos,sin = col(np.cos(get('angle'))),col(np.sin(get('angle')))
    # clockwise as displayed undoes counter-clockwise
    qx,qy = (cos*qx - sin*qy)/col(get('zoom')),(sin*qx + cos*qy)/col(get('zoom'))
    if draw.shear is not None:
        tx,ty = (col(v) for v in np.tan(get('shear')).T)
        qx,qy = (qx - tx*qy)/(1-tx*ty),(qy - ty*qx)/(1-tx*ty)
    return np.where(col(get('flip')), -qx, qx) + W/2,qy + H/2


def inside(px, py, box, kind: str):
    "Whether places lie in the shape that stands for the box (B, 4)."
    x1,y1,x2,y2 = (v[:,None,None] for v in box.T)
    u,v = abs(px-(x1+x2)/2)/((x2-x1)/2),abs(py-(y1+y2)/2)/((y2-y1)/2)
    if kind=='ellipse': return u*u+v*v<=1
    return (u<=1) & (v<=1) & (True if kind=='corners' else u+v<=4/3)


def extent(draw, i, box, kind: str, coarse: int=96, levels=((12, 160), (12, 300), (12, 500))) -> np.ndarray:
    """(B, 4) the upright box around the moved shape, not cut off; NaN where it is not on the canvas of three
    frames."""
    def span(lo, hi, n): return lo[:,None] + (hi-lo)[:,None]*((np.arange(n)+.5)/n)
    b = len(i)
    gx,gy = span(np.full(b, -W), np.full(b, 2*W), coarse),span(np.full(b, -H), np.full(b, 2*H), coarse)
    hit = inside(*trace(draw, i, gx, gy), box, kind)
    ends = lambda hit,at,axis: (np.where(hit.any(axis), at, np.inf).min(1),
        np.where(hit.any(axis), at, -np.inf).max(1))
    (x1,x2),(y1,y2) = ends(hit, gx, 1),ends(hit, gy, 2)
    out = np.stack([x1, y1, x2, y2], 1)
    lost = ~np.isfinite(out).all(1)
    out[lost] = 0
    step = np.array([3*W, 3*H, 3*W, 3*H])/coarse
    reach = 2*step
    for across,along in levels:
        new,outer = out.copy(),np.concatenate([out[:,:2]-reach[:2], out[:,2:]+reach[2:]], 1)
        for side in range(4):
            axis,way = side%2,-1 if side<2 else 1
            edge = out[:,side]
            near = span(np.minimum(edge-way*step[side], edge+way*reach[side]),
                np.maximum(edge-way*step[side], edge+way*reach[side]), across)
            other = span(outer[:,1-axis], outer[:,3-axis], along)
            hit = inside(*trace(draw, i, *((near, other) if axis==0 else (other, near))), box,
                kind).any(1 if axis==0 else 2)
            found = np.where(hit, near, way*-np.inf)
            found = found.min(1) if way<0 else found.max(1)
            new[:,side] = np.where(np.isfinite(found), found, edge)
        out,step = new,(step+reach)/across
        reach = step*1.5
    out = out + np.array([-1, -1, 1, 1])*step/2 # a place stands for its cell
    out[lost] = np.nan
    return out


def compare(settings: dict|None, n: int, seed: int=0, batch: int=50) -> Found:
    "The library beside the oracle over `n` draws; None: RandAugment at level 7, four operations."
    gen = np.random.default_rng([seed, 11])
    parts = [_compare(settings, batch, seed, k, gen, KINDS[k%3]) for k in range(-(-n//batch))]
    return Found(*(np.concatenate([p[j] for p in parts]) for j in range(3)), sum(p[3] for p in parts))


def _compare(settings, b: int, seed: int, k: int, gen, kind: str):
    aug = (rand_augment(7, 4, seed=seed, box_from=kind, collimate=0) if settings is None
        else BatchAugment(**settings, seed=seed, box_from=kind))
    draw = aug.draw(b, aug.generator(k))
    side = gen.uniform(24, 48, (b, 2))
    corner = gen.uniform(0, 1, (b, 2))*([W, H]-side)
    box,points = np.concatenate([corner, corner+side], 1),gen.uniform(0, 1, (b, 8, 2))*[W, H]
    px = torch.stack(torch.meshgrid((torch.arange(H)+.5)/H, (torch.arange(W)+.5)/W,
        indexing='ij')[::-1]).expand(b, 2, H, W)
    image = torch.cat([px, torch.ones(b, 1, H, W)], 1)
    _,new,moved,_ = aug.move(draw, (H, W), boxes=torch.from_numpy(box)[:,None],
        points=torch.from_numpy(points))
    read = warp(image, draw.matrix(H, W), bend=draw.bend).numpy()
    i = np.arange(b)
    tx,ty = trace(draw, i, np.tile(np.arange(W)+.5, (b, 1)), np.tile(np.arange(H)+.5, (b, 1)))
    sure = (tx>1) & (tx<W-1) & (ty>1) & (ty<H-1)
    error = np.where(sure, np.hypot(read[:,0]*W-tx, read[:,1]*H-ty), 0).max((1, 2))
    q = moved.numpy().reshape(-1, 1, 2)
    back = np.stack([v[:,0,0] for v in trace(draw, np.repeat(i, 8), q[...,0], q[...,1])], 1)
    point = np.linalg.norm(back - points.reshape(-1, 2), axis=1)
    whole = extent(draw, i, box, kind)
    cut = np.clip(whole, 0, [W, H, W, H])
    area = lambda v: np.clip(v[:,2:]-v[:,:2], 0, None).prod(1)
    share = np.nan_to_num(area(cut)/area(whole))
    got = new[:,0].numpy()
    kept = np.isfinite(got[:,0])
    torn = int(((kept & (share<.3-.01)) | (~kept & (share>.3+.01))).sum())
    got,cut = got[kept],cut[kept]
    both = np.clip(np.minimum(got[:,2:], cut[:,2:]) - np.maximum(got[:,:2], cut[:,:2]), 0, None).prod(1)
    return both/(area(got)+area(cut)-both),point,error,torn
