"""Augmentation keeps image, mask, boxes and points in step, can be replayed, and refuses what it cannot
carry."""
import math

import numpy as np
import pytest
import torch
from augment_oracle import CHAINS, KINDS, STILL, H, W, _compare, compare, trace
from fastai.torch_core import TensorCategory, TensorImage, TensorMask
from hypothesis import given, settings
from hypothesis import strategies as st

from radiology_ai.core import DataError
from radiology_ai.vision.augment import BatchAugment, expose_batch, rand_augment
from radiology_ai.vision.geometry import warp
from radiology_ai.vision.mix import CutMix, MixedLoss, MixUp
from radiology_ai.vision.tta import predict_tta, undo_boxes, undo_maps, undo_points

EVERYTHING = dict(rotation=20, translation=.1, scale=(.8, 1.2), shear=8, flip=.5, perspective=.2, elastic=.04,
    crop=(.5, 1), noise=.05, erase=.5, blur=.01, salt=.02, collimate=.5,
                  marker=.5, p=.8)


# --- in step

@pytest.mark.slow
@pytest.mark.parametrize('name', CHAINS)
def test_boxes_and_points_agree_with_the_warped_mask(name):
    "900 draws of each chain here, 10,000 in benchmarks/augment.py."
    found = compare(CHAINS[name], 900)
    assert len(found.iou)>800 and found.iou.min()>=.99
    assert found.point.max()<.01 and found.map.max()<.05 and not found.torn


@pytest.mark.parametrize('field,by', [('angle', .06), ('dx', .02), ('zoom', .03), ('shear', .08),
    ('corners', .05), ('bend', .02), ('crop', .03)])
def test_the_oracle_sees_a_small_fault(field, by, monkeypatch):
    "The library moves a little otherwise than the draw says, by an amount far below what is drawn."
    import radiology_ai.vision.augment as module
    true = module.BatchAugment.move
    def faulty(self, draw, *args, **kwargs):
        wrong = draw[torch.arange(len(draw))]
        setattr(wrong, field, getattr(wrong, field)+by)
        return true(self, wrong, *args, **kwargs)
    monkeypatch.setattr(module.BatchAugment, 'move', faulty)
    found = compare(CHAINS['all'], 100)
    assert np.median(found.iou)<.99 and found.point.max()>.5


def test_another_shape_in_the_box_is_seen():
    "The box around an ellipse is not that around the corners."
    gen = np.random.default_rng(0)
    got = [_compare(CHAINS['rotation'], 30, 0, 0, gen, kind)[0] for kind in KINDS]
    assert all(g.min()>=.99 for g in got)
    aug = BatchAugment(**{**STILL, 'rotation': (30, 30)})
    box = torch.tensor([[[30., 30, 60, 50]]])
    sizes = [float((v[...,2:]-v[...,:2]).prod())
        for v in (BatchAugment(**{**STILL, 'rotation': (30, 30)}, box_from=k).move(aug.draw(1), (H, W),
        boxes=box)[1] for k in KINDS)]
    assert sizes[0]<sizes[1]<sizes[2]


@pytest.mark.parametrize('name', ['affine', 'perspective', 'elastic', 'all'])
def test_a_mask_is_read_at_the_nearest_pixel(name):
    b = 60
    aug = BatchAugment(**CHAINS[name], seed=3)
    draw = aug.draw(b)
    cols,rows = torch.arange(1, W+1).expand(b, H, W),torch.arange(1, H+1)[:,None].expand(b, H, W)
    mask = aug.move(draw, (H, W), mask=TensorMask(torch.stack([cols, rows], 1)))[0]
    assert type(mask) is TensorMask and mask.dtype==torch.int64
    x,y = trace(draw, np.arange(b), np.tile(np.arange(W)+.5, (b, 1)), np.tile(np.arange(H)+.5, (b, 1)))
    sure = (abs(x-x.round())>.02) & (abs(y-y.round())>.02) # not on the line between two pixels
    inside = (x>0) & (x<W) & (y>0) & (y<H)
    for got,at in ((mask[:,0], x), (mask[:,1], y)):
        assert (got.numpy()==np.where(inside, np.floor(at)+1, 0))[sure].all()


@pytest.mark.parametrize('padding', ['zeros', 'border', 'reflection'])
@pytest.mark.parametrize('mode', ['bilinear', 'nearest'])
def test_both_readers_give_one_picture(padding, mode):
    draw = BatchAugment(**CHAINS['all'], seed=5).draw(20)
    x = torch.nn.functional.interpolate(torch.rand(20, 2, 10, 12), (H, W), mode='bicubic').clamp(0, 1)
    args = draw.matrix(H, W),mode,padding,draw.bend
    off = (warp(x, *args)-warp(x.double(), *args)).abs()
    assert off.mean()<1e-3 and (off>.05).float().mean()<1e-3


def test_one_interpolation_keeps_what_five_blur():
    gen = torch.Generator().manual_seed(0)
    x = torch.rand(8, 1, H, W, generator=gen)
    each = dict(rotation=dict(rotation=20), shear=dict(shear=10), perspective=dict(perspective=.1),
        elastic=dict(elastic=.03), translation=dict(translation=.05))
    chain = BatchAugment(**{**STILL, **{k: v for d in each.values() for k,v in d.items()}})
    once = chain.apply(chain.draw(8), x).image
    many = x
    for s in each.values():
        aug = BatchAugment(**{**STILL, **s})
        many = aug.apply(aug.draw(8), many).image
    middle = (..., slice(25, 55), slice(30, 65))
    assert once[middle].std()>1.4*many[middle].std()


def test_what_the_collimator_hides_is_hidden_everywhere():
    aug = BatchAugment(**STILL, collimate=1)
    draw = aug.draw(3)
    draw.field = torch.tensor([[.25, .25, .75, .75, .5]]*2 + [[math.nan]*5], dtype=torch.float64)
    x,mask = torch.ones(3, 1, H, W),torch.ones(3, H, W, dtype=torch.bool)
    boxes = [torch.tensor([[20., 30, 60, 50], [0, 0, 20, 18]])]*3
    out = aug.apply(draw, x, mask, boxes)
    assert (out.image[0][out.mask[:1]]==1).all() and (out.image[0][~out.mask[:1]]==.5).all() and int(
        out.mask[0].sum())==48*40
    assert out.boxes[0].tolist()==[[24, 30, 60,
        50]] and out.boxes[2].tolist()==boxes[2].tolist() and out.mask[2].all()
    erased = BatchAugment(**STILL, erase=1)
    got = erased.apply(erased.draw(3), torch.rand(3, 1, H, W), mask, boxes)
    assert got.mask.all() and torch.equal(got.boxes[0], boxes[0])


def test_the_marker_is_never_mirrored():
    base = {**STILL, 'marker': 1, 'seed': 4}
    plain,mirrored = BatchAugment(**base),BatchAugment(**base, flip=1)
    draw = plain.draw(6)
    turned = draw[torch.arange(6)]
    turned.flip = torch.ones(6, dtype=torch.bool)
    x = torch.zeros(6, 1, H, W)
    a = plain.apply(draw, x).image
    assert (a.amax((1, 2, 3))>.6).all() and torch.equal(a, mirrored.apply(turned, x).image)


# --- replay

def test_a_seed_gives_the_same_batches_and_leaves_the_global_state():
    state = torch.get_rng_state()
    x = torch.rand(6, 1, 40, 50, generator=torch.Generator().manual_seed(0))
    a,b = BatchAugment(**EVERYTHING, seed=2),BatchAugment(**EVERYTHING, seed=2)
    first = [a.augment(x) for _ in range(4)]
    b.calls = 2
    assert torch.equal(b.augment(x), first[2]) and torch.equal(b.augment(x), first[3])
    assert not torch.equal(first[0], first[1])
    c = BatchAugment(**EVERYTHING, seed=3)
    assert not torch.equal(c.augment(x), first[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_one_draw_at_two_resolutions_is_one_movement():
    aug = BatchAugment(**CHAINS['all'], seed=1)
    draw = aug.draw(20)
    points = torch.rand(20, 5, 2, dtype=torch.float64)*torch.tensor([W, H])
    small = aug.move(draw, (H, W), points=points)[2]
    large = aug.move(draw, (3*H, 3*W), points=points*3)[2]
    assert torch.allclose(small*3, large, atol=1e-3)


def test_images_that_do_not_move_stay_bit_for_bit():
    aug = BatchAugment(**{**EVERYTHING, 'p': .5, 'flip': 0, 'erase': 0, 'collimate': 0, 'marker': 0,
        'noise': 0, 'blur': 0, 'salt': 0}, brightness=0, contrast=0, gamma=(1, 1))
    x,boxes = torch.rand(40, 1, H, W),torch.rand(40, 2, 4)*20+torch.tensor([0, 0, 30, 30])
    draw = aug.draw(40)
    out = aug.apply(draw, x, boxes=boxes)
    still = ~draw.moved()
    assert 5<int(still.sum())<35
    assert torch.equal(out.image[still], x[still]) and torch.equal(out.boxes[still], boxes[still])
    assert all(not torch.equal(a, b) for a,b in zip(out.image[~still], x[~still]))


# --- bad input

@pytest.mark.parametrize('spoil,says', [(lambda x: x*255, 'reach from'), (lambda x: x-.5, 'reach from'),
    (lambda x: x.clone().index_fill_(0, torch.tensor(1), math.nan), 'reach from'),
    (lambda x: (x*255).byte(), 'Give float images'), (lambda x: x[:,0], 'Give float images'),
    (lambda x: x[:2], 'Give float images')])
def test_pixels_out_of_range_are_refused(spoil, says):
    aug = BatchAugment()
    with pytest.raises(DataError, match=says): aug.apply(aug.draw(4), spoil(torch.rand(4, 1, 20, 24)))


@pytest.mark.parametrize('parts,says', [(dict(mask=torch.zeros(4, 10, 24)), 'height and width'),
    (dict(mask=torch.zeros(3, 20, 24)), 'one entry'), (dict(boxes=torch.zeros(3, 1, 4)), 'one entry'),
    (dict(boxes=torch.zeros(4, 1, 5)), '4 numbers'),
    (dict(boxes=torch.tensor([[[9., 9, 3, 12]]]*4)), 'ends before'),
    (dict(points=[torch.zeros(2, 3)]*4), '2 numbers')])
def test_parts_that_do_not_fit_are_refused(parts, says):
    aug = BatchAugment()
    with pytest.raises(DataError, match=says): aug.apply(aug.draw(4), torch.rand(4, 1, 20, 24), **parts)


def test_nothing_is_left_behind():
    aug,x = BatchAugment(),TensorImage(torch.rand(4, 1, 20, 24))
    for target in ({'masks': torch.zeros(4, 20, 24)}, {'keypoints': torch.zeros(4, 2, 2)},
            torch.zeros(4, 20, 24), TensorImage(torch.zeros(4, 1, 20, 24))):
        with pytest.raises(DataError): aug((x, target))
    with pytest.raises(DataError, match='cannot follow'):
        mirror = BatchAugment(padding='reflection')
        mirror((x, {'boxes': [torch.zeros(1, 4)]*4}))
    for kind in (MixUp, CutMix):
        with pytest.raises(DataError, match='not boxes'): kind()((x, {'boxes': [torch.zeros(1, 4)]*4}))


@pytest.mark.parametrize('settings', [dict(scale=(0, 1)), dict(flip=2), dict(elastic=.2),
    dict(perspective=.9), dict(crop=(0, 1)), dict(shear=60), dict(box_from='middle'), dict(padding='wrap'),
    dict(noise=-1), dict(n_ops=40), dict(rotation=math.nan), dict(flip=.5, anatomy='chest'), dict(salt=-.1)])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(DataError): BatchAugment(**settings)


# --- any batch

@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(8, 40),
    st.integers(8, 40), st.sampled_from([torch.float32, torch.float64]), st.floats(0, 10))
def test_any_batch_keeps_its_form_and_range(seed, b, c, h, w, dtype, level):
    x = torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed)).to(dtype)
    aug = rand_augment(level, 6, flip=.5, seed=seed) if level else rand_augment(0)
    boxes = [torch.tensor([[1., 1, w-1, h-1]])[:k%2] for k in range(b)]
    before = x.clone()
    image,t = aug((x.as_subclass(TensorImage), {'mask': TensorMask(torch.ones(b, h, w).long()),
        'boxes': boxes, 'labels': [torch.arange(len(v)) for v in boxes], 'points': [torch.rand(2, 2)*8]*b}))
    assert image.shape==x.shape and image.dtype==dtype and type(
        image) is TensorImage and 0<=image.min() and image.max()<=1
    assert torch.equal(x, before), 'the batch itself is not changed'
    assert set(t['mask'].unique().tolist())<={0,
        1} and [len(v) for v in t['boxes']]==[len(v) for v in t['labels']] and all(v.shape==(2, 2)
        for v in t['points'])
    for v in t['boxes']:
        assert (v[:,:2]>=0).all() and (v[:,2:]<=torch.tensor([w, h])).all() and (v[:,2:]>v[:,:2]).all()


# --- back again

@pytest.mark.parametrize('name', ['affine', 'perspective', 'elastic', 'all'])
def test_predictions_go_back_to_their_place(name):
    aug = BatchAugment(**CHAINS[name], seed=8, box_from='ellipse')
    draw = aug.draw(40)
    points = torch.rand(40, 6, 2, dtype=torch.float64)*torch.tensor([W, H])
    there = aug.move(draw, (H, W), points=points)[2]
    assert (undo_points(draw, there, (H, W))-points).abs().max()<1e-2
    gy,gx = torch.meshgrid(torch.arange(H)+.5, torch.arange(W)+.5, indexing='ij')
    smooth = (.5+.5*torch.sin(gx/9)*torch.cos(gy/8)).expand(40, 1, H, W).contiguous()
    back,seen = undo_maps(draw, aug.apply(draw, smooth).image)
    inner = torch.nn.functional.max_pool2d(1-seen, 5, 1, 2)==0
    inner[...,:3,:],inner[...,-3:,:],inner[...,:,:3],inner[...,:,-3:] = False,False,False,False
    assert inner.float().mean()>.3 and ((back-smooth).abs()*inner).max()<.1 and ((back
        -smooth).abs()*inner).mean()<.01
    box = torch.tensor([[[30., 25, 66, 55]]]).expand(40, 1, 4)
    again = undo_boxes(draw, aug.move(draw, (H, W), boxes=box)[1], (H, W), 'ellipse')
    whole = torch.isfinite(again).all(-1)
    assert whole.float().mean()>.8 and (again-box)[whole].abs().median()<4


def test_the_mean_of_views_is_a_mean():
    x = torch.rand(3, 1, 32, 32)
    aug = BatchAugment(rotation=5, noise=0, p=1)
    f = lambda v: v.mean((2, 3))
    by_hand = torch.stack([f(x), *(f(aug.apply(aug.draw(3, aug.generator(k)), x).image)
        for k in range(3))]).mean(0)
    assert torch.allclose(predict_tta(f, x, aug, 3), by_hand, atol=1e-6)
    assert predict_tta(lambda v: v, x, aug, 3).shape==x.shape


# --- mixing

@pytest.mark.parametrize('kind', [MixUp, CutMix])
def test_share_of_the_other_film_is_the_share_of_the_pixels(kind):
    x = torch.arange(8.)[:,None,None,None].expand(8, 1, 50, 60)/8
    for mixed,a,b,share in (kind(alpha=1, seed=s)((x, TensorCategory(torch.arange(8)))) for s in range(20)):
        assert torch.allclose(mixed.mean((1, 2, 3)), (share*a+(1-share)*b).as_subclass(torch.Tensor)/8,
            atol=1e-4)
        assert torch.allclose(MixedLoss(lambda p,t: t.float().mean())(None, a, b, share), torch.tensor(3.5))


# --- on a GPU

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_the_gpu_does_the_same():
    x = torch.rand(8, 1, H, W)
    mask = TensorMask(torch.randint(0, 3, (8, H, W)))
    boxes = [torch.tensor([[20., 20, 60, 50]])]*8
    aug = BatchAugment(**{**EVERYTHING, 'noise': 0, 'salt': 0})
    draw = aug.draw(8)
    a,b = aug.apply(draw, x, mask, boxes),aug.apply(draw, x.cuda(), mask.cuda(), [v.cuda() for v in boxes])
    assert b.image.is_cuda and (a.image
        -b.image.cpu()).abs().mean()<2e-3 and (a.mask!=b.mask.cpu()).float().mean()<5e-3
    assert all(torch.allclose(v, w.cpu(), atol=1e-2) for v,w in zip(a.boxes, b.boxes))
    noisy = BatchAugment(**EVERYTHING)
    assert torch.equal(noisy.apply(draw, x.cuda()).image, noisy.apply(draw, x.cuda()).image)


# --- parts, types and mixing

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize('rows', [slice(3, 7), [5], [6, 1, 1]])
def test_a_part_of_a_draw_does_what_the_whole_does(dtype, rows):
    aug = BatchAugment(**{**EVERYTHING, 'noise': .1, 'salt': .1, 'blur': .03, 'p': 1.}, seed=4)
    draw,x = aug.draw(8),torch.rand(8, 2, 40, 50).to(dtype)
    assert torch.equal(aug.apply(draw[rows], x[rows]).image, aug.apply(draw, x).image[rows])
    assert torch.equal(expose_batch(x[rows], draw[rows]), expose_batch(x, draw)[rows])
    again = draw[2:][1:]
    assert again.place.tolist()==[3, 4, 5, 6, 7]
    assert torch.equal(expose_batch(x[3:], again), expose_batch(x, draw)[3:])


@pytest.mark.parametrize('dtype,eps', [(torch.float64, 1e-6), (torch.float16, 2e-3)])
def test_noise_and_salt_do_not_depend_on_the_type(dtype, eps):
    aug = BatchAugment(**{**STILL, 'salt': .1, 'noise': .1})
    draw,x = aug.draw(6),torch.rand(6, 2, 30, 40)
    draw.noise[0] = 0
    one,other = (aug.apply(draw, v).image.double() for v in (x, x.to(dtype)))
    torch.testing.assert_close(other, one, atol=eps, rtol=0)
    noise = one-x
    assert noise[1:].flatten(1).std(1).min()>.02 and not torch.equal(noise[1], noise[2])
    with pytest.raises(DataError, match='Give float images'): aug.apply(draw, (x*255).byte())
    with pytest.raises(DataError, match='Give float images'): expose_batch((x*255).byte(), draw)


@pytest.mark.parametrize('kind', [MixUp, CutMix])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.float16, torch.float32, torch.float64])
def test_mixing_keeps_the_type_and_the_share(kind, dtype):
    x,y = (torch.rand(6, 1, 20, 30)*255).round(),torch.arange(6)%3
    for seed in range(4):
        exact,_,other,share = kind(alpha=1, seed=seed)((x.double(), y))
        mixed,a,b,same = kind(alpha=1, seed=seed)((x.to(dtype).as_subclass(TensorImage), TensorCategory(y)))
        assert type(mixed) is TensorImage and mixed.dtype==dtype and same.dtype in (torch.float32,
            torch.float64)
        assert .4<float(same)<=1 and float(same)==pytest.approx(float(share), abs=1e-6)
        assert torch.equal(a, y) and torch.equal(b, other)
        torch.testing.assert_close(mixed.double().as_subclass(torch.Tensor), exact, rtol=1e-3, atol=.5 if not
            dtype.is_floating_point else .15)
    with pytest.raises(DataError, match='torch.bool'): kind()((x>99, y))
