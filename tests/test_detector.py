"""Detectors: torchvision's RetinaNet as the oracle, anchors, targets that say nothing, bundles, learning; and
boxes fused."""
import json
import time

import numpy as np
import pytest
import torch
from conftest import pace
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import RetinaNet

from radiology_ai.core import BundleError, DataError, ModelError
from radiology_ai.data.regions import box_clusters, box_iou
from radiology_ai.metrics.detection import coco_map, rsna_scores
from radiology_ai.metrics.fusion import (
    Decoding,
    best_share,
    choose_decoding,
    decoding_grid,
    mirror_boxes,
    pool_members,
    scale_boxes,
    suppress_boxes,
    weighted_fusion,
)
from radiology_ai.models.backbone import create_backbone
from radiology_ai.models.bundle import load_bundle, save_bundle
from radiology_ai.models.detector import (
    LEVELS,
    DetectorLoss,
    anchor_boxes,
    check_boxes,
    create_detector,
    decode_boxes,
    encode_boxes,
    fit_anchors,
    match_anchors,
)
from radiology_ai.preprocess.recipe import Preprocess

SMALL = dict(pretrained=False, width=.125)


@pytest.fixture(scope='module')
def detector():
    "A small network whose answers differ from place to place."
    model = create_detector('resnet10t', 2, norm='batch', head_norm='none', levels=(3, 4, 5), **SMALL).eval()
    gen = torch.Generator().manual_seed(1)
    scores = model.head.boxes.classification_head.cls_logits
    places = model.head.boxes.regression_head.bbox_reg
    with torch.no_grad():
        for p in model.head.boxes.parameters():
            if p.ndim==4: p.copy_(torch.randn(p.shape, generator=gen)*(2/p[0].numel())**.5)
        scores.bias.zero_()
        out = model(torch.rand(2, 1, 128, 192, generator=gen))
        scores.weight.div_(out['logits'].std())
        scores.bias.fill_(-2)
        places.weight.div_(4*out['offsets'].std())
    return model


def theirs(model: nn.Module, kind: str, **rules) -> RetinaNet:
    "torchvision's network of the same encoder, pyramid, heads and anchors."
    class Body(nn.Module):
        out_channels = 32
        def forward(self, x):
            return model.head.pyramid({str(k): m for k, m in enumerate(model.body(x))})
    net = RetinaNet(Body(), model.config['n_out'], min_size=128, max_size=192, image_mean=[0.],
        image_std=[1.],
        anchor_generator=model.anchors, head=model.head.boxes, **rules)
    net.head.regression_head._loss_type = kind
    return net


def some_targets(n: int, seed: int, size=(128, 192)) -> dict:
    gen = np.random.default_rng(seed)
    boxes = []
    for k in range(n):
        corner = gen.uniform(0, .6, (k%3, 2))*size[::-1]
        boxes.append(torch.from_numpy(np.c_[corner, corner + gen.uniform(15, 50, (k%3, 2))]).float())
    return dict(boxes=boxes, labels=[torch.from_numpy(gen.integers(0, 2, len(b))) for b in boxes],
        known=torch.ones(n, dtype=torch.bool))


# Against torchvision

@pytest.mark.parametrize('kind,own', [('l1', dict(beta=0)), ('smooth_l1', dict(beta=1)),
    ('giou', dict(boxes='giou'))])
def test_losses_equal_torchvisions(detector, kind, own):
    x, target = torch.rand(4, 1, 128, 192, generator=torch.Generator().manual_seed(0)), some_targets(4, 0)
    net = theirs(detector, kind).train()
    detector.eval()
    with torch.no_grad():
        wanted = net(list(x), [dict(boxes=b, labels=k) for b, k in zip(target['boxes'], target['labels'])])
        parts = DetectorLoss(**own).parts(detector(x), target)
    assert abs(parts['scores']-wanted['classification'])<1e-5*wanted['classification'].abs().clamp(min=1)
    assert abs(parts['boxes']-wanted['bbox_regression'])<1e-5*wanted['bbox_regression'].abs().clamp(min=1)
    assert wanted['bbox_regression']>0


@pytest.mark.parametrize('score,nms', [(.05, .5), (.3, .3)])
def test_detections_equal_torchvisions(detector, score, nms):
    x = torch.rand(3, 1, 128, 192, generator=torch.Generator().manual_seed(2))
    net = theirs(detector, 'l1', score_thresh=score, nms_thresh=nms, topk_candidates=10**6,
        detections_per_img=40).eval()
    detector.eval()
    with torch.no_grad(): wanted = net(list(x))
    found = detector.detect(x, score, nms, top=10**6, most=40)
    assert sum(len(f['boxes']) for f in found)>30
    for f, w in zip(found, wanted):
        assert torch.equal(f['labels'], w['labels'])
        assert torch.allclose(f['boxes'], w['boxes'], atol=1e-4) and torch.allclose(f['scores'], w['scores'],
            atol=1e-5)


def test_matches_equal_torchvisions():
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou as pairs
    anchors = anchor_boxes((96, 128))
    for seed in range(20):
        boxes = some_targets(3, seed, (96, 128))['boxes'][2]
        assert torch.equal(match_anchors(anchors, boxes), Matcher(.5, .4, True)(pairs(boxes, anchors)))
    assert (match_anchors(anchors, torch.zeros(0, 4))==-1).all()


def test_offsets_go_forth_and_back():
    anchors = anchor_boxes((96, 128))
    gen = torch.Generator().manual_seed(0)
    corner = torch.rand(len(anchors), 2, generator=gen)*80
    boxes = torch.cat([corner, corner + 2 + torch.rand(len(anchors), 2, generator=gen)*60], 1)
    assert torch.allclose(decode_boxes(encode_boxes(boxes, anchors), anchors), boxes, atol=1e-3)


# Networks

@pytest.mark.parametrize('name,levels,more', [('resnet10t', LEVELS, {}), ('seresnext26d_32x4d', (4, 5), {}),
    ('convnext_atto', (2, 3, 4, 5, 6, 7), {}), ('tf_efficientnet_lite0', (3, 4, 5), {}),
    ('swin_tiny_patch4_window7_224', (3, 4, 5),
    dict(size=(64, 96), depths=(1, 1, 1, 1), embed_dim=24, num_heads=(2, 2, 2, 2)))])
def test_any_encoder_with_falling_resolution(name, levels, more):
    "One answer for each anchor, and the settings make the same network."
    model = create_detector(name, 2, levels=levels, n_labels=0, **SMALL, **more).eval()
    x = torch.rand(1, 1, 60, 90)
    with torch.no_grad(): out = model(x)
    assert out['logits'].shape==(1, len(out['anchors']), 2) and out['offsets'].shape==(1, len(out['anchors']),
        4)
    assert torch.equal(out['anchors'], anchor_boxes((64, 96), levels)) and 'classes' not in out
    again = create_detector(pretrained=False, **{k: v for k, v in model.config.items() if k!='kind'}).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad(): assert torch.equal(again(x)['logits'], out['logits'])
    assert model.config==json.loads(json.dumps(model.config))


@pytest.mark.parametrize('n_in', [1, 3])
def test_the_encoder_starts_from_a_file(tmp_path, n_in):
    photo, _ = create_backbone('resnet10t', 3, pretrained=False, seed=5)
    save_file(photo.net.state_dict(), tmp_path/'w.safetensors')
    body, _ = create_backbone('resnet10t', n_in, weights=tmp_path/'w.safetensors')
    x = torch.rand(1, n_in, 64, 64)
    for norm in ('', 'batch'):
        model = create_detector('resnet10t', 1, n_in, weights=tmp_path/'w.safetensors', width=.125, norm=norm)
        with torch.no_grad(): assert torch.allclose(model.body.eval()(x)[-1], body.eval()(x), atol=1e-5)
        assert model.config['norm']==(norm or 'frozen') and model.body.start['sha256']


def test_frozen_statistics_stay_and_groups_have_none(tmp_path):
    model = create_detector('resnet10t', norm='frozen', levels=(3, 4, 5), **SMALL).train()
    before = {k: v.clone() for k, v in model.body.named_buffers()}
    with torch.no_grad(): model(torch.rand(2, 1, 64, 64))
    assert any('running' in k for k in before)
    assert all(torch.equal(v, before[k]) for k, v in model.body.named_buffers())
    free = create_detector('resnet10t', norm='group', levels=(3, 4, 5), **SMALL)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in free.modules())
    assert any(isinstance(m, nn.GroupNorm) for m in free.body.modules())
    assert free.config['norm']==create_detector('resnet10t', levels=(3, 4, 5), **SMALL).config['norm']


def test_wrong_settings_are_named():
    for words, args in {'The levels are': dict(levels=(3, 4)), 'norm is': dict(norm='layer'),
            'head_norm is': dict(head_norm='batch'),
            'kinds of boxes': dict(n_out=0),
            'classes of the image': dict(n_labels=1), 'anchor_sizes': dict(anchor_sizes=[]),
            'anchor_ratios': dict(anchor_ratios=[1., -1])}.items():
        with pytest.raises(ModelError, match=words): create_detector('resnet10t', **SMALL | args)
    with pytest.raises(ModelError, match='falling resolution'):
        create_detector('vit_tiny_patch16_224', **SMALL)
    with pytest.raises(ModelError, match='images'):
        create_detector('resnet10t', **SMALL)(torch.rand(1, 3, 64, 64))


# Anchors

def test_fitted_anchors_reach_more_boxes():
    """Boxes of lungs' opacities, taller than wide: more of them have an anchor over them by more than 0.5 and
    0.6."""
    gen = np.random.default_rng(0)
    def drawn(n):
        wh = np.exp(gen.multivariate_normal([4., 4.45], [[.1, .05], [.05, .2]], n)).clip(8, 200)
        corner = gen.uniform(0, 1, (n, 2))*(256-wh)
        return np.c_[corner, corner+wh]
    boxes, other = drawn(200), drawn(200)
    fitted = fit_anchors(boxes, (256, 256))
    assert fitted==fit_anchors(boxes, (256, 256)) and set(fitted)=={'anchor_sizes', 'anchor_ratios'}
    usual, own = (box_iou(other, anchor_boxes((256, 256), LEVELS, *a).numpy()).max(1)
        for a in ((), fitted.values()))
    assert all((own>t).mean()>(usual>t).mean() for t in (.6, .7)) and own.mean()>usual.mean()
    assert create_detector('resnet10t', **SMALL, **fitted).config['anchor_ratios']==fitted['anchor_ratios']
    with pytest.raises(DataError, match='There are 1 boxes'): fit_anchors(boxes[:1])


# Targets

def test_boxes_that_are_none_are_refused(detector):
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad(): pred = detector(x)
    good = torch.tensor([[5., 5, 30, 40]])
    label, loss = torch.zeros(1, dtype=torch.int64), DetectorLoss()
    def refused(words, boxes, labels=None):
        target = dict(boxes=[good, boxes], labels=[label,
            label.expand(len(boxes)) if labels is None else labels])
        with pytest.raises(DataError, match=words): loss(pred, target)
    refused('of image 1 of the batch has no area', torch.tensor([[5., 5, 5, 40]]))
    refused('has no area', torch.tensor([[9., 5, 5, 40]]))
    refused('outside the image of 64 x 64', torch.tensor([[5., 5, 66, 40]]))
    refused('outside', torch.tensor([[-2., 5, 60, 40]]))
    refused('there twice', good.repeat(2, 1))
    refused('not finite', torch.tensor([[5., torch.nan, 20, 40]]))
    refused(r'of which there are 2 \(it is number 2\)', good, label+2)
    refused('Give each box a label', good, label[:0])
    with pytest.raises(ModelError, match='answers for 2 images'): loss(pred, dict(boxes=[good]))
    check_boxes([good, good.repeat(2, 1) + torch.tensor([[0.], [1]])], [label, torch.tensor([0, 1])],
        size=(64, 64), n_out=2)
    assert torch.isfinite(loss(pred, dict(boxes=[good, good.repeat(2, 1)],
        labels=[label, torch.tensor([0, 1])])))


@pytest.mark.parametrize('args', [{}, dict(kind='quality'), dict(boxes='giou')], ids=str)
def test_an_image_that_nobody_drew_on_says_nothing(detector, args):
    """Neither its boxes, nor NaN among its answers, change the loss or its gradient; its class may count
    still."""
    x, target, loss = torch.rand(4, 1, 64, 64), some_targets(4, 3, (64, 64)), DetectorLoss(**args)
    target['boxes'] = [b.clamp(max=64) for b in target['boxes']]
    target |= dict(known=torch.tensor([True, True, True, False]), classes=torch.tensor([0, 1, -1, 2]))
    with torch.no_grad(): pred = {k: v.clone() for k, v in detector(x).items()}
    value, three = loss.parts(pred, target), loss.parts({k: v if k in ('anchors', 'size') else v[:3]
        for k, v in pred.items()},
        {k: v[:3] for k, v in target.items()})
    assert torch.equal(value['scores'], three['scores']) and torch.equal(value['boxes'], three['boxes'])
    pred['logits'][3], pred['offsets'][3] = torch.nan, torch.nan
    for k in ('logits', 'offsets', 'classes'): pred[k].requires_grad_()
    target['boxes'][3] = torch.tensor([[torch.nan]*4])
    other = loss(pred, target)
    assert torch.allclose(other, value['scores']+value['boxes']+.1*value['classes'])
    other.backward()
    assert not pred['logits'].grad[3].any() and not pred['offsets'].grad[3].any() and pred['classes'].grad[
        3].any()
    assert not pred['classes'].grad[2].any() and pred['logits'].grad[:3].flatten(1).any(1).all()
    nothing = loss(pred, dict(target, known=torch.zeros(4, dtype=torch.bool), classes=torch.full((4,), -1)))
    assert nothing==0 and torch.isfinite(nothing)


def test_quality_wants_the_overlap():
    "An anchor that is a box is taught the IoU its box reaches: with that score the loss is least."
    anchors, box = torch.tensor([[0., 0, 20, 20], [100, 100, 120, 120]]), torch.tensor([[0., 0, 20, 25]])
    def value(p):
        logit = torch.tensor([p, 1e-4]).logit().reshape(1, 2, 1)
        pred = dict(logits=logit, offsets=torch.zeros(1, 2, 4), anchors=anchors,
            size=torch.tensor([128, 128]))
        return float(DetectorLoss('quality', box_weight=0)(pred, dict(boxes=[box])))
    at = np.linspace(.5, .99, 50)
    assert abs(at[np.argmin([value(p) for p in at])]-.8)<.011 and value(.8)<1e-4


def test_a_film_that_gives_nan_is_no_film_without_boxes(detector):
    x = torch.rand(3, 1, 64, 64)
    x[2,0,3,3] = torch.nan
    with pytest.raises(ModelError, match='NaN or infinity for image 2'): detector.eval().detect(x)


def test_a_mirrored_look_is_pooled_before_suppression(detector):
    x = torch.rand(2, 1, 64, 96, generator=torch.Generator().manual_seed(4))
    both = detector.eval().detect(x, .2, .4, mirror=True)
    own, turned = (detector.detect(v, .2, 1., most=10**5) for v in (x, x.flip(-1)))
    for k, f in enumerate(both):
        pooled = np.r_[own[k]['boxes'].numpy(), mirror_boxes(turned[k]['boxes'].numpy(), 96)]
        scores, labels = (np.r_[own[k][n].numpy(), turned[k][n].numpy()] for n in ('scores', 'labels'))
        keep = suppress_boxes(pooled, scores, .4, labels)
        keep = keep[np.argsort(-scores[keep], kind='stable')][:300]
        assert np.allclose(f['scores'].numpy(), scores[keep]) and np.allclose(f['boxes'].numpy(),
            pooled[keep], atol=1e-3)
        assert torch.allclose(f['classes'], (own[k]['classes']+turned[k]['classes'])/2)


# Learning and bundles

def rectangles(n: int, seed: int):
    gen = np.random.default_rng(seed)
    x, boxes = gen.normal(.3, .05, (n, 64, 64)), []
    for film in x:
        found = []
        for left in (2, 34)[:int(gen.integers(0, 3))]:
            x1 = left + gen.integers(0, 8)
            y1 = gen.integers(2, 30)
            w = gen.integers(12, 20)
            h = gen.integers(14, 30)
            film[y1:y1+h, x1:x1+w] += .3
            found.append([x1, y1, x1+w, y1+h])
        boxes.append(torch.tensor(np.array(found), dtype=torch.float32).reshape(-1, 4))
    return torch.from_numpy(x.clip(0, 1)).float()[:,None], boxes


@pytest.fixture(scope='module')
def learnt():
    x, boxes = rectangles(16, 0)
    target = dict(boxes=boxes, labels=[torch.zeros(len(b), dtype=torch.int64) for b in boxes],
        known=torch.ones(16, dtype=torch.bool), classes=torch.tensor([2*(len(b)>0) for b in boxes]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_detector('resnet10t', levels=(3, 4, 5), **SMALL,
            **fit_anchors(torch.cat(boxes), (64, 64), (3, 4, 5), 2, 2))
        loss, opt = DetectorLoss(), torch.optim.AdamW(model.parameters(), 2e-3)
        for _ in range(60):
            opt.zero_grad()
            loss(model.train()(x), target).backward()
            opt.step()
    return model.eval(), x, boxes


def test_bright_rectangles_are_learnt(learnt):
    model, x, boxes = learnt
    start = time.process_time()
    found = model.detect(x)
    assert time.process_time()-start<5*pace()
    ap = coco_map([f['boxes'].numpy() for f in found], [f['scores'].numpy() for f in found],
        [b.numpy() for b in boxes])
    assert ap.AP50>.8
    classes = torch.stack([f['classes'] for f in found]).argmax(1)
    assert (classes==torch.tensor([2*(len(b)>0) for b in boxes])).float().mean()>.8


def test_a_bundle_gives_the_same_boxes(learnt, tmp_path):
    model, x, _ = learnt
    save_bundle(model, tmp_path/'b', Preprocess(size=64), ['opacity'], task='pneumonia')
    bundle, wanted = load_bundle(tmp_path/'b'), model.detect(x, .1)
    found = bundle.detect(x, score=.1)
    assert sum(len(f['boxes']) for f in found)>5
    for f, w in zip(found, wanted): assert all(torch.equal(f[k], w[k]) for k in w)


def test_a_detector_lends_its_encoder(tmp_path):
    "The folder of its bundle is the start of a classifier."
    model = create_detector('resnet10t', norm='batch', levels=(3, 4, 5), **SMALL).eval()
    save_bundle(model, tmp_path/'b', Preprocess(size=64), ['opacity'])
    body, _ = create_backbone(str(tmp_path/'b'), 1)
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad(): assert torch.allclose(body.eval()(x), model.body(x)[-1], atol=1e-5)


def test_a_bundle_of_other_kinds_is_refused(tmp_path):
    "Another number or order of the kinds, or other settings of the network, than those of the weights."
    model = create_detector('resnet10t', 2, levels=(3, 4, 5), **SMALL)
    with pytest.raises(BundleError, match='vocabulary has 3 entries'):
        save_bundle(model, tmp_path/'b', Preprocess(size=64), ['opacity', 'mass', 'effusion'])
    save_bundle(model, tmp_path/'b', Preprocess(size=64), ['opacity', 'mass'])
    meta = json.loads((tmp_path/'b'/'bundle.json').read_text())
    from radiology_ai.models.meta import sealed
    def refused(words, change, seal=True):
        new = json.loads(json.dumps(meta))
        change(new)
        (tmp_path/'b'/'bundle.json').write_text(json.dumps(sealed(new) if seal else new))
        with pytest.raises(BundleError, match=words): load_bundle(tmp_path/'b')
    refused('digest is another', lambda m: m['vocab'].reverse(), seal=False)
    refused('for 2 outputs', lambda m: m.update(vocab=['opacity']))
    refused('do not fit its network|cannot be built',
        lambda m: (m.update(vocab=['opacity']), m['network'].update(n_out=1)))
    refused('do not fit its network|cannot be built', lambda m: m['network'].update(levels=[3, 4, 5, 6, 7]))
    refused('do not fit its network|cannot be built', lambda m: m['network'].update(anchor_sizes=[4.]))
    refused('cannot be built', lambda m: m['network'].update(levels=[3, 5]))
    refused('anchor_ratios', lambda m: m['network'].update(anchor_ratios=[0.]))
    refused('it must be one of', lambda m: m['network'].update(norm='evil'))


def test_a_classifier_gives_no_boxes(tmp_path):
    from radiology_ai.models.backbone import create_model
    save_bundle(create_model('resnet10t', 2, pretrained=False), tmp_path/'c', Preprocess(size=64), ['a', 'b'])
    with pytest.raises(BundleError, match='holds no detector'):
        load_bundle(tmp_path/'c').detect(np.zeros((1, 64, 64)))


# Fusing

def drawn(n: int, gen) -> tuple:
    "Boxes in heaps, and their scores."
    middle = gen.uniform(20, 80, (max(n//4, 1), 2))[gen.integers(0, max(n//4, 1), n)] + gen.normal(0, 4,
        (n, 2))
    half = gen.uniform(5, 18, (n, 2))
    return np.c_[middle-half, middle+half], gen.uniform(.01, 1, n).round(2)


def slow_nms(boxes, scores, iou):
    left, keep = list(np.argsort(-scores, kind='stable')), []
    while left:
        keep.append(left.pop(0))
        left = [k for k in left if box_iou(boxes[keep[-1:]], boxes[k:k+1])[0, 0]<=iou]
    return keep


def slow_wbf(boxes, scores, iou, members):
    """As in the paper: boxes by falling score join the fused box that they overlap most, which is made anew
    each time."""
    heaps, fused = [], []
    for k in np.argsort(-scores, kind='stable'):
        best, at = iou, -1
        for j, f in enumerate(fused):
            over = box_iou(f[None], boxes[k:k+1])[0, 0]
            if over>best: best, at = over, j
        if at<0:
            heaps.append([k])
            fused.append(boxes[k])
        else:
            heaps[at].append(k)
            w = scores[heaps[at]]
            fused[at] = (boxes[heaps[at]]*w[:,None]).sum(0)/w.sum()
    score = np.array([scores[h].mean()*min(len(h), members)/members for h in heaps])
    order = np.argsort(-score, kind='stable')
    return np.array(fused)[order], score[order]


@pytest.mark.parametrize('iou', [0., .3, .55, .9])
def test_suppression_and_fusion_equal_the_slow_way(iou):
    gen = np.random.default_rng(int(iou*100))
    for n in [1, 2, 5, 20, 60]:
        boxes, scores = drawn(n, gen)
        assert suppress_boxes(boxes, scores, iou).tolist()==slow_nms(boxes, scores, iou)
        scores = scores + np.arange(n)*1e-6 # no ties: which of equals comes first is no matter of the method
        fused, score, group = weighted_fusion(boxes, scores, iou, 3)
        wanted, their = slow_wbf(boxes, scores, iou, 3)
        assert np.allclose(fused, wanted) and np.allclose(score, their) and not group.any()
    films = [drawn(int(n), gen) for n in gen.integers(0, 20, 12)]
    image = np.repeat(np.arange(12), [len(s) for _, s in films])
    boxes, scores = (np.concatenate(v) for v in zip(*films))
    keep = suppress_boxes(boxes, scores, iou, image)
    for k, (b, s) in enumerate(films):
        first = int((image<k).sum())
        assert (keep[image[keep]==k]-first).tolist()==slow_nms(b, s, iou)


def test_suppression_stops_at_the_best_of_each_group():
    boxes, scores = drawn(200, np.random.default_rng(7))
    groups = np.arange(200)%3
    whole = suppress_boxes(boxes, scores, .4, groups)
    first = [k for g in range(3) for k in whole[groups[whole]==g][:4]]
    assert suppress_boxes(boxes, scores, .4, groups, most=4).tolist()==first
    assert not len(suppress_boxes(np.zeros((0, 4)), [], .4)) and not len(suppress_boxes(boxes, scores,
        most=0))
    assert [len(v) for v in weighted_fusion(np.zeros((0, 4)), [])]==[0, 0, 0]


def test_all_groups_are_fused_as_each_alone():
    gen = np.random.default_rng(8)
    films = [drawn(int(n), gen) for n in gen.integers(1, 40, 9)] # scores with ties
    groups = np.repeat(np.arange(9)[::-1]*3, [len(s) for _, s in films])
    order = gen.permutation(len(groups))
    boxes, scores = (np.concatenate(v)[order] for v in zip(*films))
    fused, score, group = weighted_fusion(boxes, scores, .4, 2, groups=groups[order])
    assert (np.diff(group)>=0).all()
    for k, (b, s) in enumerate(films[::-1]):
        one, theirs, _ = weighted_fusion(b, s, .4, 2)
        assert np.allclose(fused[group==3*k], one) and np.allclose(score[group==3*k], theirs)
        assert len(one)==box_clusters(b, s, .4).max()+1


@pytest.mark.parametrize('how', ['suppress', 'fuse'])
def test_a_sweep_over_thresholds_gives_the_scores_of_each_rule(how):
    "One joining and one matching serve all thresholds; a film that nobody looked at does not count."
    gen = np.random.default_rng(4)
    films = [drawn(12, gen) for _ in range(20)]
    found = [dict(boxes=b, scores=s, classes=[1-p, p], members=2)
        for (b, s), p in zip(films, gen.uniform(size=20))]
    truths = [None if k==3 else b[:k%3]+1 for k, (b, _) in enumerate(films)]
    grid = decoding_grid(Decoding(how=how), iou=[.2, .5], overall=[0., .5], size=[.9, 1.],
        threshold=[.05, .3, .6, .95],
        best=[0., .5, 1.], most=[2, 100])
    best, told, table = choose_decoding(found, truths, grid)
    slow = [rsna_scores([f['boxes'] for f in d], [f['scores'] for f in d], truths)
        for d in (s(found) for s in grid)]
    assert np.allclose(table.value, sorted((np.nanmean(v) for v in slow), reverse=True), rtol=0, atol=1e-12)
    assert sorted(table.n)==sorted((~np.isnan(v)).sum() for v in slow) and told['n']==table.n.iloc[0]
    assert np.isclose(np.nanmean(slow[grid.index(best)]), told['score'])


def test_members_are_pooled_before_suppression():
    """What one fold alone would suppress by a box that another fold's better box removes, stays with the ensemble as it would in one
    long list; kinds don't mix; the order of the members does not matter."""
    a, b, c = [0, 0, 40, 40], [12, 0, 52, 40], [24, 0, 64, 40]
    one, two = dict(boxes=[b, c], scores=[.8, .5]), dict(boxes=[a], scores=[.9])
    rule = Decoding(iou=.5)
    apart = np.concatenate([rule([f])[0]['boxes'] for f in (one, two)])
    together = rule(pool_members([[one], [two]]))[0]
    assert together['boxes'].tolist()==[a, c] and apart.tolist()==[b, a]
    assert rule(pool_members([[two], [one]]))[0]['boxes'].tolist()==[a, c]
    kinds = pool_members([[one | {'labels': [0, 0]}], [two | {'labels': [1]}]])
    assert rule(kinds)[0]['labels'].tolist()==[1, 0]
    fused = Decoding(how='fuse', iou=.5)(pool_members([[two], [two], [one]]))[0]
    assert np.isclose(fused['scores'][0], np.mean([.9, .9, .8])) and fused['scores'][-1]==pytest.approx(.5/3)
    for members, words in (([[one], [one, two]], 'looked at'), ([], 'looked at'),
            ([[one | {'classes': [.1, .9]}], [two]], 'classes of film 0')):
        with pytest.raises(DataError, match=words): pool_members(members)


def test_rules_of_one_film():
    boxes, scores = drawn(30, np.random.default_rng(3))
    assert np.allclose(mirror_boxes(mirror_boxes(boxes, 100), 100), boxes)
    area = lambda b: (b[:,2:]-b[:,:2]).prod(1)
    assert np.allclose(area(scale_boxes(boxes, .8)), .64*area(boxes))
    assert best_share([.9, .44, .46, .2, .1], .5, [0, 0, 0, 1, 1]).tolist()==[True, False, True, True, True]
    films = [dict(boxes=boxes, scores=scores, classes=[.2, .8]),
        dict(boxes=np.zeros((0, 4)), scores=[], classes=[.9, .1])]
    out = Decoding(overall=.3, best=.5, most=3)(films)
    assert len(out)==2 and len(out[0]['boxes'])<=3 and len(out[1]['boxes'])==0 and out[0]['classes']==[.2, .8]
    assert np.isclose(out[0]['scores'][0], scores.max()**.7*.8**.3) and (np.diff(out[0]['scores'])<=0).all()
    for words, args in {'score is': dict(score=-1), 'how is': dict(how='soft'),
            'size 0': dict(size=0)}.items():
        with pytest.raises(DataError, match=words): Decoding(**args)
    with pytest.raises(DataError, match='Film 0 has 30 boxes'):
        Decoding()([dict(boxes=boxes, scores=scores[:9])])
    with pytest.raises(DataError, match='no area|x1 < x2'):
        Decoding()([dict(boxes=[[5, 5, 5, 9]], scores=[.5])])
    with pytest.raises(DataError, match='NaN'):
        Decoding(overall=.5)([dict(boxes=boxes, scores=scores, classes=[np.nan])])
    assert Decoding()([])==[]


def test_a_choice_flatters_and_says_by_how_much():
    "Of settings that are all as good the best looks better than it is; a setting that is better is found."
    gen = np.random.default_rng(0)
    films = [drawn(6, gen) for _ in range(40)]
    found = [dict(boxes=b, scores=s) for b, s in films]
    truths = [b[:1]+gen.normal(0, 2, (1, 4)) for b, _ in films]
    noise = {}
    def chance(boxes, scores, truths):
        key = len(noise)
        return noise.setdefault(key, gen.uniform(0, 1, len(truths)))
    grid = decoding_grid(score=list(np.linspace(.05, .5, 10)), iou=[.3, .5])
    assert len(set(grid))==20
    _, told, table = choose_decoding(found, truths, grid, metric=chance)
    assert told['optimism']>.02 and len(table)==20 and table.value.iloc[0]==told['score']
    assert abs(told['honest']-.5)<.15
    best, told, _ = choose_decoding(found, truths, decoding_grid(size=[.3, 1.]), np.arange(40)//2)
    assert best.size==1 and told['optimism']==0 and told['n']==40
    values = rsna_scores(*zip(*((f['boxes'], f['scores']) for f in best(found))), truths)
    assert np.isclose(told['score'], values.mean())
    with pytest.raises(DataError, match='no setting'): decoding_grid(speed=[1])
    with pytest.raises(DataError, match='0 settings'): choose_decoding(found, truths, [])
