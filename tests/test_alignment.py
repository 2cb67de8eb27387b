"""Alignment: matrices in pixels, what moves together, losses, bundles, learning, and the floors of real
landmarks."""
import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import fails, run_cli

from radiology_ai.core import BundleError, DataError, ModelError, Radiograph, rng, transform_points
from radiology_ai.losses.alignment import ALIGNMENT_LOSSES, AlignmentLoss, Template, correlation_loss, pixel_loss
from radiology_ai.metrics.intervals import mean_ci
from radiology_ai.metrics.pose import (
    MAPS,
    corner_distance,
    corner_error,
    failures_ci,
    landmark_error,
    mean_shape,
    median_ci,
    pairwise_iou,
    pose_error,
    pose_table,
    procrustes,
    shared_edges,
    times_smaller_ci,
)
from radiology_ai.models.bundle import load_bundle, save_bundle
from radiology_ai.models.meta import sealed
from radiology_ai.models.stn import (
    ORIENTATION,
    PARAMETERS,
    FieldHead,
    create_aligner,
    draw_poses,
    filled,
    fit_aligner,
    fit_matrix,
    mean_template,
    moment_points,
    pose_matrix,
    procrustes_poses,
)
from radiology_ai.preprocess.recipe import Align, Preprocess
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.serve.align import align_folder
from radiology_ai.tasks.aligned import AlignBatch
from radiology_ai.tasks.poses import image_poses, rescale_confidence
from radiology_ai.train.poses import Pools, PoseAugment, PoseLoss, draw_lesson, fill_pools, fit_head, quarter_turned
from radiology_ai.vision.geometry import move_boxes, move_points, warp

SIZE = (64, 64)


def generator(seed: int=0) -> torch.Generator: return torch.Generator().manual_seed(seed)


def aligner(kind: str='similarity', **more):
    return create_aligner('test_resnet', kind, pretrained=False, **{'size': 64, **more}).eval()


def disturbed(model, seed: int=0):
    "With a last layer that says something."
    with torch.no_grad():
        model.head.last.bias.copy_(torch.randn(model.head.last.bias.shape, generator=generator(seed)))
    return model


def chests(seeds) -> tuple[torch.Tensor, torch.Tensor]:
    "Simulated films (N, 1, 64, 64) and both lungs."
    from radiology_ai.phantom.chest import simulate_chest
    from radiology_ai.phantom.xray import expose
    films, lungs = [], []
    for seed in seeds:
        chest = simulate_chest(seed, size=64)
        films.append(expose(chest, rng(seed, 'film'), collimate=False, marker=False).pixels)
        lungs.append(np.stack([chest.masks[k] for k in ('right_lung', 'left_lung')]))
    return torch.from_numpy(np.stack(films)).float()[:,None], torch.from_numpy(np.stack(lungs)).float()


# The network

@pytest.mark.parametrize('kind', MAPS)
@pytest.mark.parametrize('shape', [(64, 64), (90, 70), (130, 200)])
def test_a_new_network_leaves_films_as_they_are(kind, shape):
    x = torch.rand(2, 1, *shape, generator=generator())
    with torch.no_grad(): out = aligner(kind, steps=3).align(x)
    assert (out.matrix-torch.eye(3)).abs().max()<1e-6 and out.matrix.dtype==torch.float64
    assert (out.image-x).abs().max()<1e-5 and (out.confidence==0).all()


@pytest.mark.parametrize('kind', MAPS)
def test_matrices_are_maps_of_their_kind_within_their_limits(kind):
    model = aligner(kind, turn=30, shift=.2, scale=(.8, 1.5), shear=10)
    m = model.pose(torch.randn(500, len(PARAMETERS[kind]), generator=generator()).double()*30)
    part, middle = m[:,:2,:2], torch.full((2,), 32.).double()
    gram = part.transpose(1, 2)@part
    assert ((part@middle + m[:,:2,2] - middle).abs()<=.2*64+1e-9).all()
    sx, skew = gram[:,0,0].sqrt(), gram[:,0,1].abs()
    assert sx.min()>=.8-1e-9 and sx.max()<=1.5+1e-9
    assert torch.atan2(-part[:,1,0], part[:,0,0]).abs().max()<=np.radians(30)+1e-9
    if kind=='similarity': assert skew.max()<1e-9 and (gram[:,0,0]-gram[:,1,1]).abs().max()<1e-9
    if kind=='scales': assert skew.max()<1e-9 and (gram[:,0,0]-gram[:,1,1]).abs().max()>.1
    if kind=='affine': assert skew.max()>.1
    assert (torch.linalg.inv(m)@m-torch.eye(3)).abs().max()<1e-12


def test_pixels_of_any_size_in_and_out():
    "The same chest at twice the size, or on a larger sheet, ends up in the same place."
    model = disturbed(aligner(size_out=(40, 60)))
    one, two = model(torch.zeros(1, 1, 64, 64)), model(torch.zeros(1, 1, 128, 128))
    half = torch.diag(torch.tensor([.5, .5, 1.])).double()
    assert (two-one@half).abs().max()<1e-9
    back = torch.linalg.inv(fit_matrix((40, 60), SIZE))@model.pose(model.head.last.bias.double()[None,
        :-1]*2)[0]
    assert (one[0]-back).abs().max()<1e-6
    assert model.align(torch.zeros(3, 1, 30, 90)).image.shape==(3, 1, 40, 60)


def test_outside_is_the_background():
    model = disturbed(aligner(fill=.4), 1)
    image = model.align(torch.full((1, 1, 64, 64), .4)).image
    assert (image-.4).abs().max()<1e-6
    lit = model.align(torch.full((1, 1, 64, 64), 1.)).image
    assert lit.min()>=.4-1e-6


def test_wrong_settings_are_refused():
    for said, args in (('no map', dict(kind='tps')), ('steps', dict(steps=0)), ('steps', dict(steps=1.5)),
            ('limits', dict(scale=(1.2, 2))), ('limits', dict(turn=200)), ('fill', dict(fill=-1)),
            ('size is 8', dict(size=8)), ('fill', dict(fill='x')), ('size_out', dict(size_out=(1, 2, 3))),
            ('limits', dict(scale=(1,))), ('limits', dict(scale=3)), ('limits', dict(turn='x')),
            ('limits', dict(turn=np.nan)), ('size_out', dict(size_out=0)), ('size_out', dict(size_out=10**5)),
            ("template's image", dict(size=64, n_in=3, template=Template(torch.zeros(1, 64, 64)))),
            ('not finite', dict(size=64, template=Template(torch.full((1, 64, 64), torch.nan))))):
        with pytest.raises(ModelError, match=said): create_aligner('test_resnet', pretrained=False, **args)
    with pytest.raises(ModelError, match='no template'): aligner().template()
    with pytest.raises(ModelError, match='room for'):
        aligner(size_out=8).keep_template(Template(torch.zeros(1, 9, 9)))


def test_what_are_no_films_is_refused():
    model = aligner()
    for x in (torch.zeros(1, 64, 64), torch.zeros(2, 3, 64, 64), torch.zeros(2, 1, 64, 64, dtype=torch.uint8),
            torch.zeros(2, 1, 0, 64), np.zeros((2, 1, 64, 64))):
        with pytest.raises(ModelError, match='The films are'): model(x)


def test_no_answer_leaves_the_film_as_it_is():
    """A film with NaN, and a network without a finite answer: the film stays, is marked, and does not touch
    its neighbours."""
    model = disturbed(aligner(size_out=(40, 60)))
    x = torch.rand(3, 1, 64, 64, generator=generator())
    with torch.no_grad():
        good = model.align(x)
        x[1,0,5,5] = torch.nan
        out = model.align(x)
    assert good.moved.all() and out.moved.tolist()==[True, False, True] and out.confidence[1]==-np.inf
    assert torch.equal(out.matrix[[0, 2]], good.matrix[[0, 2]]) and (out.image[0]==good.image[0]).all()
    still = model.still((64, 64))
    assert torch.equal(out.matrix[1], still) and (out.matrix[0]-still).abs().max()>.01
    with torch.no_grad():
        doubtful = model.align(x, least=float(good.confidence[0])+1)
        model.head.last.bias[0] = torch.inf-torch.inf
        lost = model.align(x[:1])
    for v in (doubtful, lost): assert not v.moved.any() and torch.equal(v.matrix, still.expand_as(v.matrix))


@pytest.mark.parametrize('how', ['autocast', 'half', 'bfloat16', 'double'])
def test_half_precision_moves_as_full_does(how):
    "And its gradient is finite and points the same way."
    model = disturbed(aligner())
    x = torch.rand(4, 1, 100, 80, generator=generator())
    kind = {'half': torch.float16, 'double': torch.float64}.get(how, torch.bfloat16)
    template = Template(torch.rand(1, 100, 80, generator=generator(1)))
    loss = AlignmentLoss(ncc=1, pixels=1, consistency=1)
    def slope(x):
        model.zero_grad()
        out = model.answer(x)
        again = torch.eye(3).expand(4, 3, 3)
        loss(out[0], x, template, again=again).backward()
        return out[0].detach(), model.head.last.bias.grad.clone()
    matrix, grad = slope(x)
    with torch.autocast('cpu', torch.bfloat16, enabled=how=='autocast'):
        other, slant = slope(x if how=='autocast' else x.to(kind))
    assert other.dtype==torch.float64 and (corner_error(other.numpy(), matrix.numpy(), (100, 80))<1).all()
    assert torch.isfinite(slant).all() and torch.cosine_similarity(grad, slant, 0)>.95


def test_a_large_film_is_read_without_aliasing():
    "Fine stripes of a film eight times as large become grey, not a coarse pattern; so does a template of it."
    stripes = torch.zeros(1, 1, 512, 512)
    stripes[...,::2] = 1
    model = aligner(size_out=64)
    assert (model.align(stripes).image-.5).abs().max()<1e-5
    assert (model.look(stripes)[0]-.5).abs().max()<1e-5
    dark = mean_template(stripes.expand(2, 1, 512, 512), size_out=(64, 64), align=model.matrices)
    assert (dark.image-.5).abs().max()<1e-5


# Movements

def test_poses_follow_from_their_generator():
    a, b = (draw_poses(generator(3), 200, (50, 70), quarter=True, mirror=True) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a,
        draw_poses(generator(4), 200, (50, 70), quarter=True, mirror=True))
    det = torch.linalg.det(a[:,:2,:2])
    assert .35<(det<0).double().mean()<.65 and det.abs().sqrt().min()>=.75 and det.abs().sqrt().max()<=1.3


def test_film_mask_box_and_points_move_together():
    "Within half a pixel, for a bright block that a known pose has moved to another size of image."
    x = torch.zeros(8, 1, 100, 100)
    x[:,:,40:60,35:65] = 1
    box = torch.tensor([[[35., 40, 65, 60]]]).expand(8, 1, 4)
    middle = torch.tensor([[[50., 50]]]).expand(8, 1, 2)
    pose = draw_poses(generator(1), 8, (100, 100), turn=10, shift=.1, scale=(.9, 1.2))
    model = disturbed(aligner(size_out=(120, 140), turn=5, shift=.05, scale=(.9, 1.1)), 2)
    total = model(warp(x, pose)).detach()@pose
    image, mask = model.move(x, total)[:,0], model.move(x, total, mode='nearest')[:,0]
    gy, gx = torch.meshgrid(torch.arange(120)+.5, torch.arange(140)+.5, indexing='ij')
    for v in (image, mask):
        mass = v/v.sum((1, 2), keepdim=True)
        found = torch.stack([(mass*gx).sum((1, 2)), (mass*gy).sum((1, 2))], 1)
        assert (found-move_points(middle, total)[:,0]).abs().max()<.5
    moved = move_boxes(box.double(), total, (120, 140), 'corners')[:,0]
    for b, v in zip(moved, mask):
        rows, cols = (v.any(1).nonzero()[:,0], v.any(0).nonzero()[:,0])
        extent = torch.tensor([cols[0], rows[0], cols[-1]+1, rows[-1]+1])
        assert (b-extent).abs().max()<1.5 # whole pixels: the tip of a turned block is thinner
    record = Radiograph(x[0,0].numpy()).warped(image[0].numpy(), total[0].numpy())
    assert np.allclose(record.from_stored(middle[0].numpy()), move_points(middle.double(), total)[0])


def test_warp_to_another_size_reads_as_its_gradient_does():
    x, m = torch.rand(2, 1, 30, 40, generator=generator()), draw_poses(generator(), 2, (30, 40), turn=3)
    m = fit_matrix((30, 40), (50, 20))@m
    fast, slow = warp(x, m, size=(50, 20)), warp(x, m.clone().requires_grad_(), size=(50, 20))
    assert fast.shape==(2, 1, 50, 20) and slow.requires_grad and (fast-slow).abs().max()<.04
    assert (fast-slow).abs().mean()<5e-3
    assert torch.equal(warp(x, m), warp(x, m, size=(30, 40)))


# Losses

def seeing():
    "Stands for a network that knows films."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(1, 16, 7, 2, 3), torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 7, 2, 3))


def test_the_network_of_features_stays_as_it_is():
    own = seeing()
    loss = AlignmentLoss(features=1, network=own).train()
    m = torch.eye(3).expand(2, 3, 3).double().clone().requires_grad_()
    template = Template(torch.rand(1, 32, 32, generator=generator()))
    loss(m, torch.rand(2, 1, 32, 32, generator=generator(1)), template).backward()
    assert m.grad.abs().sum()>0 and not loss.network.training and own.training
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())
    assert all(p.requires_grad for p in own.parameters())
    with pytest.raises(ModelError, match='no network'): AlignmentLoss(features=1)


def test_losses_refuse_by_name():
    x, m = torch.rand(2, 1, 16, 16), torch.eye(3).expand(2, 3, 3)
    template = Template(torch.rand(1, 16, 16))
    for odd in (-1, np.nan, np.inf, 'much'):
        with pytest.raises(ModelError, match='no alignment loss'): AlignmentLoss(ncc=odd)
    for k, given in dict(lungs=dict(masks=x), landmarks=dict(points=torch.zeros(2, 3, 2))).items():
        with pytest.raises(ModelError, match='in the template'):
            AlignmentLoss(**{k: 1})(m, x, template, **given)
    full = Template(template.image, torch.rand(2, 16, 16), torch.rand(3, 2))
    cases = dict(lungs=('masks', torch.rand(2, 1, 16, 16)), landmarks=('points', torch.rand(2, 4, 2)),
        consistency=('again', torch.eye(3)))
    for k, (name, v) in cases.items():
        with pytest.raises(ModelError, match=f'^{name} are'): AlignmentLoss(**{k: 1})(m, x, full, **{name: v})
    with pytest.raises(ModelError, match='^matrix are'): AlignmentLoss()(m[:1], x, template)
    with pytest.raises(ModelError, match='^images are'): AlignmentLoss()(m, x.expand(2, 3, 16, 16), template)


def test_losses_of_half_films_are_those_of_full_ones():
    "Sums over a film of 512 pixels pass the largest number of float16."
    x, inside = torch.rand(1, 1, 512, 512, generator=generator()), torch.ones(1, 1, 512, 512)
    for f in (pixel_loss, correlation_loss):
        a = f(x, x[0].flip(1), inside)
        b = f(x.half(), x[0].flip(1).half(), inside.half())
        assert b.dtype==torch.float32 and torch.allclose(a, b, rtol=1e-2)


@pytest.mark.parametrize('name', ALIGNMENT_LOSSES)
def test_losses_are_least_at_the_true_pose_and_lead_there(name):
    gy, gx = torch.meshgrid(torch.arange(64)+.5, torch.arange(64)+.5, indexing='ij')
    spots = [(20., 30., 7.), (44., 26., 9.), (30., 46., 5.)]
    blobs = torch.stack([torch.exp(-((gx-x)**2+(gy-y)**2)/(2*r*r)) for x, y, r in spots])
    points = torch.tensor([s[:2] for s in spots])
    template = Template(blobs.sum(0)[None], blobs, points)
    # from the template to the film
    pose = draw_poses(generator(5), 12, SIZE, turn=15, shift=.06, scale=(.9, 1.1))
    film, masks = warp(template.image.expand(12, 1, 64, 64), pose), warp(blobs.expand(12, 3, 64, 64), pose)
    given = dict(masks=masks, points=move_points(points.expand(12, 3, 2), pose), again=torch.linalg.inv(pose))
    loss, best = AlignmentLoss(network=seeing(), **{name: 1}), torch.linalg.inv(pose)
    def cost(m): return loss.parts(m, film, template, **given)[name]
    assert (cost(best)<cost(torch.eye(3).expand(12, 3, 3).double())).all()
    apart = (torch.eye(3)-best).double()
    for away in (.05, .5, 1.):
        m = (best + away*apart).requires_grad_()
        slope = (torch.autograd.grad(cost(m).sum(), m)[0]*apart).sum((1, 2))
        assert (slope>0).double().mean()>.9, (name, away, slope)
    for k in range(3):
        step = torch.zeros(3, 3).double()
        step[[0, 0, 1][k], [0, 2, 2][k]] = [.04, 1.5, 1.5][k]
        assert (cost(best)<=cost(best+step)).all() and (cost(best)<=cost(best-step)).all()


def test_what_nobody_has_drawn_costs_nothing():
    template = Template(torch.rand(1, 16, 16), torch.rand(2, 16, 16), torch.rand(3, 2)*16)
    masks = torch.full((2, 2, 16, 16), torch.nan)
    points = torch.full((2, 3, 2), torch.nan)
    m = torch.eye(3).expand(2, 3, 3).double().clone().requires_grad_()
    loss = AlignmentLoss(lungs=1, landmarks=1)(m, torch.rand(2, 1, 16, 16), template, masks=masks,
        points=points)
    loss.backward()
    assert loss==0 and (m.grad==0).all()
    with pytest.raises(ModelError, match='has no points'):
        AlignmentLoss(landmarks=1)(m, torch.rand(2, 1, 16, 16), template)


# Measures

def test_corner_error_of_known_matrices():
    assert np.allclose(corner_error(np.diag([1.1, 1.1, 1]), np.eye(3), (100, 100)), 10*(0+1+1+2**.5)/4)
    pose = draw_poses(generator(), 5, (80, 60)).numpy()
    assert np.allclose(corner_error(np.linalg.inv(pose)@pose, np.eye(3), (80, 60)), 0, atol=1e-9)
    assert np.isnan(corner_error(np.full((1, 3, 3), np.nan), np.eye(3), (8, 8))).all()


def test_errors_in_degrees_and_mm():
    c, s = np.cos(np.radians(7)), np.sin(np.radians(7))
    truth = draw_poses(generator(), 6, (80, 60)).numpy()
    off = np.array([[c*1.1, s*1.1, 0], [-s*1.1, c*1.1, 0], [0, 0, 1]])
    off[:2,2] = np.array([32, 40])-off[:2,:2]@[32, 40]+[3, 4] # about the middle of 80 x 64
    found = pose_error(off@truth, truth, (80, 64), spacing=.7)
    assert np.allclose(found, [[7, 10, 3.5]]*6) and list(found)==['turn', 'scale', 'shift']
    assert np.allclose(pose_error(truth, off@truth, (80, 64))[['turn', 'scale']], [[7, 10]]*6)
    tall = pose_error(np.array([[1, 0, 3], [0, 1, 4], [0, 0, 1.]]), np.eye(3), (80, 64), spacing=(2, 1))
    assert np.isclose(tall['shift'][0], np.hypot(3, 8))
    assert np.allclose(corner_distance(off@truth, truth, (80, 60), .7),
        .7*corner_distance(off@truth, truth, (80, 60)))
    bad = np.stack([np.full((3, 3), np.nan), np.diag([-1., 1, 1]), np.zeros((3, 3))])
    assert pose_error(bad, np.eye(3), (8, 8)).isna().all(axis=None) and pose_error(np.eye(3), bad,
        (8, 8)).isna().all(axis=None)
    for call in (lambda: corner_error(np.eye(2), np.eye(3), (8, 8)),
            lambda: pose_error(np.eye(3), np.ones(3), (8, 8)),
            lambda: corner_distance(np.eye(3), np.eye(3), (8, 8), 0),
            lambda: landmark_error(np.ones((2, 3, 2)), np.ones((4, 2)))):
        with pytest.raises(DataError): call()


def test_paired_figures():
    gen = rng(4, 'paired')
    before = gen.gamma(3, 3, 120)
    after, patients = before/5*gen.uniform(.9, 1.1, 120), np.arange(120)//2
    times = times_smaller_ci(before, after, patients)
    assert 4.5<times.low<times.value<times.high<5.5 and times.value==np.median(before)/np.median(after)
    gap = after.copy()
    gap[3] = np.nan
    assert times_smaller_ci(before, gap).value==np.median(np.delete(before, 3))/np.median(np.delete(after, 3))
    with pytest.raises(DataError, match='119 after'): times_smaller_ci(before, after[1:])
    where = gen.integers(0, 8, 40)
    masks = np.stack([np.roll(np.eye(24, dtype=bool).cumsum(0)>0, k, 0) for k in where])
    same = masks[:1].repeat(40, 0)
    rise = pairwise_iou(same, before=masks)
    assert np.isclose(rise.value, pairwise_iou(same).value-pairwise_iou(masks).value) and rise.low>0
    assert pairwise_iou(masks, before=same).high<0
    images = gen.random((40, 12, 12))
    half = shared_edges(images+images[:1])
    few = shared_edges((images+images[:1])[1:20])
    assert .4<half.low<half.value<half.high<.6 and abs(half.value-few.value)<.06
    assert shared_edges(images+images[:1], before=images).low>.3
    for odd in (np.full((3, 4, 4), np.nan), np.full((3, 4, 4), .5), masks[0]):
        with pytest.raises(DataError, match='masks are'): pairwise_iou(odd)
    with pytest.raises(DataError, match='one patient'): pairwise_iou(masks, np.zeros(40))


@pytest.mark.parametrize('kind', MAPS)
def test_procrustes_is_not_beaten_by_a_slow_search(kind):
    from scipy.optimize import minimize
    gen = rng(1, kind)
    def built(v):
        c, s, sx, sy = np.cos(v[0]), np.sin(v[0]), v[3], v[3 if kind=='similarity' else 4]
        m = np.eye(3)
        m[:2,:2] = np.array([[c, -s], [s, c]])@np.array([[sx, v[5]*(kind=='affine')], [0, sy]])
        m[:2,2] = v[1:3]
        return m
    def cost(m, p, q): return ((transform_points(m, p)-q)**2).sum()
    def found(v, p, q): return cost(built(v), p, q)
    for _ in range(4):
        p, q = gen.normal(0, 30, (2, 9, 2))+50
        q = p*.6+q*.4
        slow = min(minimize(found, [turn, 0, 0, 1, 1, 0], (p, q), method='BFGS').fun for turn in (-1., 0, 1.))
        assert cost(procrustes(p, q, kind), p, q)<=slow+1e-4
    holes = p.copy()
    holes[2] = np.nan
    assert np.allclose(procrustes(holes, q, kind), procrustes(np.delete(p, 2, 0), np.delete(q, 2, 0), kind))
    with pytest.raises(DataError, match='no extent'): procrustes(p[:1], q[:1], kind)


def test_a_mean_shape_does_not_shrink():
    gen = rng(2, 'shapes')
    shapes = gen.normal(0, 40, (1, 20, 2)) + gen.normal(0, 10, (30, 20, 2))
    def radius(s): return np.sqrt(((s-s.mean(-2, keepdims=True))**2).sum(-1).mean())
    assert np.isclose(radius(mean_shape(shapes, iterations=50)), radius(shapes))


def test_intervals_are_by_patient():
    gen = rng(3, 'intervals')
    errors = np.repeat(gen.gamma(2, 2, 40), 5)
    patients = np.repeat(np.arange(40), 5)
    def wide(ci): return ci.high-ci.low
    for f in (median_ci, failures_ci):
        how = dict(limit=5) if f is failures_ci else {}
        assert wide(f(errors, groups=patients, **how))>1.5*wide(f(errors, **how))
    assert failures_ci([np.nan, 1, 2, 3], 10).value==250
    masks = gen.random((12, 6, 6))<.5
    brute = np.mean([(masks[i] & masks[j]).sum()/(masks[i] | masks[j]).sum() for i in range(12)
        for j in range(12)
        if i//2!=j//2])
    assert np.isclose(pairwise_iou(masks, np.arange(12)//2).value, brute)
    table = pose_table(errors, errors, patients, 100, masks=np.tile(masks[:2], (100, 1, 1)))
    assert table.patients.eq(40).all() and table.low.le(table.value).all() and table.value.le(
        table.high).all()


# Template, learning, bundle

def test_a_template_undoes_the_poses_of_its_films():
    gy, gx = torch.meshgrid(torch.arange(64)+.5, torch.arange(64)+.5, indexing='ij')
    lungs = torch.stack([(((gx-x)/8)**2+((gy-32)/15)**2<1).float() for x in (21, 43)])
    pose = draw_poses(generator(2), 20, SIZE, turn=20, shift=.08, scale=(.8, 1.1))
    masks = (warp(lungs.expand(20, 2, 64, 64), pose)>.5).float()
    films = masks.sum(1, keepdim=True)*.8
    template = mean_template(films, masks)
    def blurred(v): return float(((v>.1) & (v<.9)).float().mean())
    assert blurred(template.masks)<.5*blurred(masks.mean(0))
    back = procrustes_poses(moment_points(masks), template.points)@pose
    spread = corner_error(back, back[:1].expand(20, 3, 3), SIZE)
    assert np.median(spread)<2
    other = mean_template(films, masks, size_out=(32, 48))
    assert other.size==(32, 48) and other.masks.shape==(2, 32, 48)
    again = mean_template(films, masks, align=lambda x: procrustes_poses(moment_points(masks),
        template.points))
    assert torch.allclose(again.image, template.image, atol=1e-5)
    assert mean_template(films).points is None


@pytest.fixture(scope='module')
def learnt():
    "An aligner that has learnt on 64 simulated chests, and its template."
    films, lungs = chests(range(64))
    template = mean_template(films, lungs)
    model = create_aligner('test_resnet', pretrained=False, size=64, template=template)
    points = torch.from_numpy(moment_points(lungs)).float()
    fit_aligner(model, films, AlignmentLoss(landmarks=1, lungs=.1), 80, 5e-3, masks=lungs, points=points,
        scale=(.75, 1.1))
    return model, template


def test_what_was_learnt_holds_on_new_patients(learnt):
    model, template = learnt
    films, lungs = chests(range(900, 924))
    pose = draw_poses(generator(9), 24, SIZE, scale=(.75, 1.1))
    truth = procrustes_poses(moment_points(lungs), template.points)
    with torch.no_grad(): matrix = model(warp(films, pose))@pose
    before, after = corner_error(pose, truth, SIZE), corner_error(matrix, truth, SIZE)
    assert mean_ci(before-after, limits=(-np.inf, np.inf)).low>5
    assert np.median(after)<.6*np.median(before)


def test_films_that_are_no_chests_are_left_as_they_are():
    films, lungs = chests(range(32))
    gen = generator(5)
    def odd(n): return torch.cat([torch.zeros(n, 1, 64, 64), torch.rand(n, 1, 64, 64, generator=gen)])
    template = mean_template(films, lungs)
    model = create_aligner('test_resnet', pretrained=False, size=64, template=template, steps=1)
    points = torch.from_numpy(moment_points(lungs)).float()
    fit_aligner(model, films, AlignmentLoss(landmarks=1), 50, 5e-3, points=points, others=odd(8), bs=8)
    with torch.no_grad():
        yes, no = model.align(chests(range(700, 716))[0], least=0.), model.align(odd(16), least=0.)
    assert yes.moved.double().mean()>=.9 and no.moved.double().mean()<=.1
    assert torch.equal(no.matrix[~no.moved], model.still(SIZE).expand(int((~no.moved).sum()), 3, 3))


def test_wrong_lessons_are_refused():
    x = torch.rand(4, 1, 64, 64, generator=generator())
    model = create_aligner('test_resnet', pretrained=False, size=64, template=Template(x.mean(0)))
    for said, args in (('films are none', dict(images=x*torch.nan)), ('films are none', dict(images=x[:0])),
            ('4 films and 3 masks', dict(masks=x[:3])), ('The films are', dict(others=x[0])),
            ('others are', dict(others=x[...,:32])), ('steps', dict(steps=1)),
            ('one fill|fills', dict(loss=AlignmentLoss(fill=.5)))):
        with pytest.raises(ModelError, match=said):
            fit_aligner(model, **{'images': x, 'loss': AlignmentLoss(), 'steps': 2, **args})
    with pytest.raises(ModelError, match='no template'): fit_aligner(aligner(), x, AlignmentLoss())


def test_a_template_of_films_that_are_drawn_in_part():
    films, lungs = chests(range(6))
    some = lungs.clone()
    some[2:4] = torch.nan
    for align in (None, lambda x: torch.eye(3).double().expand(len(x), 3, 3)):
        template = mean_template(films, some, align=align)
        assert all(torch.isfinite(v).all() for v in (template.image, template.masks, template.points))


def test_learning_repeats_itself():
    x = torch.rand(6, 1, 64, 64, generator=generator())
    def once():
        model = create_aligner('test_resnet', pretrained=False, size=64, template=Template(x.mean(0)))
        return fit_aligner(model, x, AlignmentLoss(ncc=1, pixels=1, consistency=1), 2, bs=3)
    assert once()==once()


def test_a_bundle_holds_the_aligner_and_its_template(learnt, tmp_path):
    model, template = learnt
    names = [*PARAMETERS['similarity'], 'confidence']
    path = save_bundle(model, tmp_path/'aligner', Preprocess(), names, task='alignment')
    again, x = load_bundle(path).model, torch.rand(2, 1, 100, 90, generator=generator())
    with torch.no_grad(): assert torch.equal(again(x), model(x))
    for k in ('image', 'masks', 'points'):
        assert torch.equal(getattr(again.template(), k), getattr(template, k))
    plain = load_bundle(save_bundle(disturbed(aligner('affine')), tmp_path/'plain', Preprocess(),
        [*PARAMETERS['affine'], 'confidence'], task='alignment')).model
    with torch.no_grad(): assert torch.equal(plain(x), disturbed(aligner('affine'))(x))
    body = create_aligner(str(path), size=64).body.state_dict()
    assert all(torch.equal(v, model.body.state_dict()[k]) for k, v in body.items())
    meta = json.loads((path/'bundle.json').read_text())
    for k, v in dict(map='tps', steps=99, limits=[45, .4, .5, 2], size=10**6, fill='x', n_points=-1).items():
        (path/'bundle.json').write_text(json.dumps(sealed(meta | {'network': meta['network'] | {k: v}})))
        with pytest.raises(BundleError, match=f'has {k} '): load_bundle(path)


# Places, orientation, lessons

def field(kind: str='affine', **more):
    return create_aligner('test_resnet', kind, pretrained=False, head='field', **{'size': 64, **more}).eval()


@pytest.mark.parametrize('kind', MAPS)
@pytest.mark.parametrize('shape', [(64, 64), (130, 200)])
def test_an_aligner_of_places_begins_at_the_identity(kind, shape):
    x = torch.rand(2, 1, *shape, generator=generator())
    with torch.no_grad(): out = field(kind, steps=3, orient=True).align(x)
    assert (out.matrix-torch.eye(3)).abs().max()<1e-5 and (out.image-x).abs().max()<1e-4
    assert out.told.turned.sub(.25).abs().max()<1e-6 and (out.confidence==0).all()


@pytest.mark.parametrize('kind', MAPS)
def test_places_give_back_the_map_that_moved_them(kind):
    head = FieldHead(8, kind, (45, .4, .5, 2, 15), 8).double()
    gen, n = generator(3), 40
    def drawn(low, high, *shape): return low+(high-low)*torch.rand(*shape, generator=gen).double()
    scale, shear = drawn(.7, 1.4, n, 2), drawn(-.2, .2, n)*(kind=='affine')
    if kind=='similarity': scale[:, 1] = scale[:, 0]
    pose = pose_matrix(drawn(-.7, .7, n), scale, shear, drawn(-15, 15, n, 2), SIZE)
    place = head.field(torch.zeros(n, 8, 4, 4).double())[0]
    found = move_points((place+1)*32, pose)/32-1
    sure = torch.randn(n, 16, generator=gen).double()
    model = field(kind)
    assert (model.pose(head.parameters_of(place, found, sure))-pose).abs().max()<.3
    found[:, 0] += 5 # one place errs, and says so
    sure[:, 0] = -20
    assert (model.pose(head.parameters_of(place, found, sure))-pose).abs().max()<.3


def says(model, **logits):
    "The same whatever it sees: `ORIENTATION` by name."
    with torch.no_grad():
        for k, v in logits.items(): model.head.logits.bias[1+ORIENTATION.index(k)] = v
    return model


@pytest.mark.parametrize('k', range(4))
def test_quarter_turns_inverted_greys_and_mirror_images_are_undone_where_that_is_sure(k):
    x = torch.rand(3, 1, 64, 64, generator=generator())
    seen = 1-quarter_turned(x.flip(-1), torch.full((3,), k))
    with torch.no_grad():
        sure = says(field(orient=True), **{f'turned_{90*k}': 9., 'inverted': 9., 'mirrored': 9.}).align(seen)
        unsure = says(field(orient=True), mirrored=1.5).align(seen) # .82, and .9 is asked for
    assert (sure.image-x).abs().max()<1e-4 and .99<sure.told.mirrored.min()
    assert torch.linalg.det(sure.matrix[:, :2, :2]).sub(-1).abs().max()<1e-6
    assert (unsure.image-seen).abs().max()<1e-4
    back = sure.matrix[0]@torch.tensor([9.5, 19.5, 1]).double()
    assert torch.allclose(sure.image[0, 0, int(back[1]), int(back[0])], 1-seen[0, 0, 19, 9], atol=1e-4)


def test_wrong_heads_are_refused():
    for said, args in (('no head', dict(head='field2')), ("head='field'", dict(orient=True)),
            ('sure', dict(head='field',
            orient=True, sure=(.2, .9, .5))), ('cut after stage', dict(head='field', stages=60))):
        with pytest.raises(ModelError, match=said):
            create_aligner('test_resnet', pretrained=False, size=64, **args)


def test_a_lesson_tells_the_truth():
    films, lungs = chests(range(8))
    poses = procrustes_poses(moment_points(lungs), mean_template(films, lungs).points)
    lesson = draw_lesson(generator(2), films, poses, 64, turn=20, shift=.08, scale=(.85, 1.1))
    upright = torch.where(lesson.inverted[:, None, None, None],
        1-quarter_turned(lesson.first, -lesson.turned%4),
        quarter_turned(lesson.first, -lesson.turned%4))
    assert (upright-lesson.look)[:, :, 20:44, 20:44].abs().max()<1e-5
    assert lesson.mirrored.any() and lesson.inverted.any() and lesson.turned.max()>1
    for i in range(8):
        aim = filled(films[i:i+1], poses[i:i+1], SIZE)[0, 0]
        got = filled(lesson.look[i:i+1], lesson.truth[i:i+1], SIZE)[0, 0]
        if lesson.mirrored[i]: got = got.flip(-1)
        r = np.corrcoef(aim[16:48, 16:48].ravel(), got[16:48, 16:48].ravel())[0, 1]
        assert r>.6, (i, r)


def test_the_corners_of_a_film_tell_its_pose():
    loss, corners = PoseLoss(64, (100, 100)), torch.tensor([[5., 6], [60, 10], [3, 58], [0, 0]])
    augment = PoseAugment(rotation=20, translation=.05, scale=(.8, 1.1), flip=.5, p=1., noise=0, brightness=0,
        contrast=0, gamma=(1, 1))
    augment.spoil, augment.invert = 0, 0
    x = torch.zeros(12, 1, 64, 64)
    x[:, :, 30:34, 20:24] = 1 # a spot at (22, 32)
    told = {'points': torch.cat([corners[:3], torch.tensor([[22., 32]])]).expand(12, 4, 2).clone()}
    image, target = augment.augment((x, told))
    gy, gx = torch.meshgrid(torch.arange(64)+.5, torch.arange(64)+.5, indexing='ij')
    mass = image[:, 0]/image[:, 0].sum((1, 2), keepdim=True)
    centre = torch.stack([(mass*gx).sum((1, 2)), (mass*gy).sum((1, 2))], 1)
    assert (centre-target['points'][:, 3]).abs().max()<.6
    frame = move_points(target['points'][:, :3].double(),
        loss.poses(target['points'][:, :3], torch.eye(3).double()))
    assert (frame-torch.tensor([[0., 0], [64, 0], [0, 64]]).double()).abs().max()<1e-6
    augment.spoil = 1
    assert torch.isnan(augment.augment((x, told))[1]['points'][:, :3]).all()


def test_a_head_that_learns_on_what_the_body_has_said_holds_on_new_patients():
    films, lungs = chests(range(48))
    template = mean_template(films, lungs)
    poses = procrustes_poses(moment_points(lungs), template.points)
    model = create_aligner('resnet10t', 'affine', 1, pretrained=False, size=64, template=template,
        head='field', stages=3).eval()
    pools = Pools([], [], [])
    fill_pools(model, pools, films, poses, 640, gen=generator(1), looks=0, turn=20, shift=.1, scale=(.8, 1.2))
    losses = fit_head(model, pools, 150)
    new, new_lungs = chests(range(900, 932))
    pose = draw_poses(generator(9), 32, SIZE, turn=20, shift=.1, scale=(.8, 1.2))
    truth = procrustes_poses(moment_points(new_lungs), template.points)
    with torch.no_grad(): matrix = model(warp(new, pose))@pose
    before, after = corner_error(pose, truth, SIZE), corner_error(matrix, truth, SIZE)
    assert losses[-1]<losses[0] and mean_ci(before-after, limits=(-np.inf, np.inf)).low>1


def test_poses_by_images_alone_undo_part_of_a_movement():
    films, lungs = chests(range(16))
    pose = draw_poses(generator(4), 16, SIZE, turn=8, shift=.05, scale=(.92, 1.08))
    true = np.linalg.inv(procrustes_poses(moment_points(lungs), mean_template(films, lungs).points).numpy())
    def apart(maps): # each film by its pose and back by that of its lungs: the same for all, where the poses are right
        both = maps@pose.numpy()@true
        return np.median(corner_error(both, np.median(both, 0), SIZE))
    assert apart(image_poses(warp(films, pose)[:, 0].numpy(), 64))<.8*apart(np.eye(3))


# Where it is used

@pytest.fixture(scope='module')
def placed(tmp_path_factory):
    "A bundle of the task, films of simulated chests, and a file that is none."
    import cv2
    folder = tmp_path_factory.mktemp('align')
    (folder/'films').mkdir()
    for i, film in enumerate(chests(range(3))[0]):
        cv2.imwrite(str(folder/'films'/f'film{i}.png'), np.uint8(255*film[0].numpy()))
    (folder/'films'/'torn.png').write_bytes(b'no picture')
    model = says(field(size_out=(256, 256), orient=True), turned_180=9.)
    names = [*PARAMETERS['affine'], 'confidence', *ORIENTATION]
    save_bundle(model, folder/'bundle', Preprocess('chest', size=64, background='chest'), names,
        task='alignment',
        answer=dict(kind='poses', activation='sigmoid', least=.5, structures=[]))
    return folder


def test_a_folder_is_aligned_and_a_bad_file_ends_nothing(placed, tmp_path):
    import cv2
    run_cli('align', placed/'films', '--model', placed/'bundle', '--out', tmp_path/'out', '--size', 64,
        '--workers', 1)
    table = pd.read_csv(tmp_path/'out'/'poses.csv')
    good, bad = table[table.error.isna()], table[table.error.notna()]
    assert len(good)==3 and len(bad)==1 and bad.path.iloc[0].endswith('torn.png') and good.aligned.eq(
        1).all() and good.turned.eq(180).all()
    film = cv2.imread(str(placed/'films'/'film0.png'), 0)
    done = cv2.imread(str(tmp_path/'out'/good.picture.iloc[0]), 0)
    assert np.abs(done[::-1, ::-1].astype(int)-film).mean()<3
    matrix = np.vstack([good.iloc[0][['a11', 'a12', 'a13', 'a21', 'a22', 'a23']].to_numpy(float).reshape(2,
        3), [0, 0, 1]])
    assert np.allclose(matrix, [[-1, 0, 64], [0, -1, 64], [0, 0, 1]], atol=.02)
    page = (tmp_path/'out'/'gallery.html').read_text()
    assert page.count('<img')==3 and 'film0' not in page and '<script' not in page and 'http' not in page
    assert 'bundle' in fails('align', placed/'films', '--model', placed/'films', '--out', tmp_path/'no')


def test_what_is_not_sure_is_left_and_flagged(placed, tmp_path):
    table = align_folder(placed/'bundle', placed/'films', tmp_path, size=64, least=.9, workers=1)
    good = table[table.error=='']
    assert good.aligned.eq(0).all()
    assert np.allclose(good[['a11', 'a12', 'a13', 'a21', 'a22', 'a23']].to_numpy(float), [1, 0, 0, 0, 1, 0],
        atol=1e-6)
    film = Radiograph(chests(range(1))[0][0, 0].numpy())
    left, moved = Align(str(placed/'bundle'), .9)(film), Align(str(placed/'bundle'))(film)
    assert np.array_equal(left.pixels,
        film.pixels) and 'not aligned' in left.tags['reason'] and not left.tags['aligned']
    assert np.abs(moved.pixels[::-1, ::-1]-film.pixels).max()<1e-4 and np.allclose(moved.affine[:2, :2],
        -np.eye(2), atol=1e-4)
    assert AlignBatch(placed/'bundle')(torch.rand(2, 3, 64, 64)).shape==(2, 3, 64, 64)


def test_a_recipe_with_an_aligner_is_stored_and_others_are_as_they_were(placed, tmp_path):
    assert 'align' not in Preprocess().to_dict()
    made = Preprocess('chest', size=48, background='chest', align=str(placed/'bundle'))
    assert Preprocess.from_dict(made.to_dict())==made
    store = preprocess_folder(placed/'films', tmp_path/'store', made, workers=1)
    plain = preprocess_folder(placed/'films', tmp_path/'plain',
        Preprocess('chest', size=48, background='chest'), workers=1)
    assert len(store)==3 and np.abs(store[0][::-1, ::-1].astype(int)-plain[0]).max()<=2
    with pytest.raises(BundleError): Align(str(tmp_path))(Radiograph(np.zeros((48, 48), np.float32)))


def test_a_bundle_of_places_is_read_again_and_checked(placed):
    again = load_bundle(placed/'bundle')
    assert again.model.config['sure']==[.5, .9, .75] and again.model.orients
    meta = json.loads((placed/'bundle'/'bundle.json').read_text())
    try:
        for k, v in dict(head='eye', stages=0, orient=2, sure=[0, 0, 0]).items():
            (placed/'bundle'/'bundle.json').write_text(json.dumps(sealed(meta
                | {'network': meta['network'] | {k: v}})))
            with pytest.raises(BundleError, match=f'has {k} '): load_bundle(placed/'bundle')
    finally: (placed/'bundle'/'bundle.json').write_text(json.dumps(meta))


def test_a_mended_confidence_is_the_line_of_the_logit():
    model = says(disturbed_logits(field(orient=True)), turned_0=3.)
    x = torch.rand(4, 1, 64, 64, generator=generator())
    with torch.no_grad():
        before = model.tell(x).confidence
        rescale_confidence(model, 2., -.5)
        assert torch.allclose(model.tell(x).confidence, 2*before-.5, atol=1e-5)


def disturbed_logits(model):
    with torch.no_grad():
        model.head.logits.weight.copy_(torch.randn(model.head.logits.weight.shape, generator=generator(1)))
    return model


# Real films

def test_floors_of_real_landmarks(real_data):
    """JSRT, lungs and heart: how far landmarks stand from the mean shape as they come and after the best map of each kind, over
    all points (the median) and over the means of films."""
    films = {}
    with open(real_data/'chest_jsrt'/'landmarks_512px.csv', newline='') as f:
        for row in csv.DictReader(f):
            if 'clavicle' not in row['part']:
                films.setdefault(row['image'], []).append((float(row['x']), float(row['y'])))
    shapes = np.array(list(films.values()))
    assert shapes.shape==(199, 120, 2)
    mean = shapes.mean(0)
    each, points = {}, {}
    for kind in ('none', *MAPS):
        fitted = (shapes if kind=='none' else np.stack([transform_points(procrustes(s, mean, kind), s)
            for s in shapes]))
        each[kind] = np.median(landmark_error(fitted, mean))
        points[kind] = np.median(np.linalg.norm(fitted-mean, axis=2))
    assert np.allclose([each[k] for k in ('none', *MAPS)], [24.90, 12.11, 10.49, 10.13], atol=.01)
    assert np.allclose([points[k] for k in ('none', *MAPS)], [24.04, 11.25, 9.63, 9.18], atol=.01)
    assert np.isclose(landmark_error(shapes, mean, spacing=.7).mean(), .7*27.69, atol=.01)
