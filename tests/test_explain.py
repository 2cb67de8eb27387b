"""Heat maps lie over their image, whatever its shape, the layout of the maps and the size of the gradients; they speak of what was asked,
and no relevance is lost."""
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from radiology_ai.core import ModelError, Radiograph
from radiology_ai.explain import METHODS, deletion_check, explain, gradcam, hottest, lrp
from radiology_ai.heat.grid import Layout, as_map, grid_error
from radiology_ai.heat.paths import attention_rollout, integrated_gradients
from radiology_ai.heat.relevance import LRP_RULES, attnlrp_maps, lrp_relevance
from radiology_ai.heat.targets import DetectionScore, MaskLogit, target_scores
from radiology_ai.losses.graded import any_grade
from radiology_ai.models.backbone import create_backbone, create_model, token_grid
from radiology_ai.models.detector import create_detector
from radiology_ai.models.segmenter import create_segmenter


def reference(model, layer, x, k, to_map=lambda t: t):
    "Selvaraju 2017 written out: the maps of `layer`, weighed by their mean gradients."
    kept = []
    handle = layer.register_forward_hook(lambda m,_,out: kept.append(out))
    out = model(x)
    handle.remove()
    a,grad = to_map(kept[0]),to_map(torch.autograd.grad(out[:,k].sum(), kept[0])[0])
    cam = (a*grad.mean((2, 3), keepdim=True)).sum(1, keepdim=True).clamp(min=0)
    return F.interpolate(cam, x.shape[-2:], mode='bilinear').detach().numpy()[:,0]


def alike(heat, other): return [np.corrcoef(a.ravel(), b.ravel())[0,1] for a,b in zip(heat, other)]


@pytest.mark.parametrize('size,grid', [((96, 64), (6, 4)), ((128, 32), (8, 2)), ((32, 128), (2, 8)),
    ((64, 64), (4, 4))])
def test_tokens_lie_as_the_image_does(size, grid):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model('vit_tiny_patch16_224', 3, 1, False, img_size=size, batchnorm=False).eval()
        x = torch.rand(2, 1, *size)
    assert model.body(x).shape==(2, 192, *grid)
    to_map = lambda t: t[:,1:].reshape(2, *grid, -1).permute(0, 3, 1, 2)
    assert min(alike(gradcam(model, x, 1), reference(model, model.body.net.norm, x, 1, to_map)))>.999


def test_tokens_without_a_grid_are_refused():
    assert token_grid(24, (96, 64))==(6, 4) and token_grid(28, (100, 64), (16, 16))==(7, 4)
    assert token_grid(7, (64, 64)) is None and token_grid(0, (64, 64)) is None
    assert token_grid(32, (64, 128), (16, 16))==(4, 8) and token_grid(8, (64, 32))==(4, 2)
    body,_ = create_backbone('vit_tiny_patch16_224', 1, False, img_size=64)
    body.net.forward_features = lambda x: torch.zeros(len(x), 8, 192)
    with pytest.raises(ModelError, match='7 tokens are no grid over 64 x 64'): body(torch.rand(1, 1, 64, 64))


@pytest.mark.parametrize('size,shape,expected', [
    ((256, 192), (64, 64, 48), (64, 64, 48)), # as many channels as rows
    ((100, 60), (12, 7, 4), (12, 7, 4)), ((224, 224), (7, 7, 768), (768, 7, 7)),
    ((256, 64), (8, 2, 96), (96, 8, 2)), ((64, 64), (8, 8, 8), (8, 8, 8))])
def test_the_layout_of_maps_follows_the_image(size, shape, expected):
    assert tuple(as_map(torch.zeros(1, *shape), Layout(size)).shape[1:])==expected


def test_a_layer_with_as_many_channels_as_rows():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model('resnet18', 3, 1, False, batchnorm=False).eval()
        x = torch.rand(2, 1, 256, 192)
    for k in range(3):
        heat = gradcam(model, x, k, layer='body.net.layer1')
        assert min(alike(heat, reference(model, model.body.net.layer1, x, k)))>.999
        assert (heat.max((1, 2))==1).all()


def copying(weight):
    "One convolution that copies the image; class 1 rises with it by `weight`, class 0 falls."
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(1, 2))
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[3].weight.copy_(torch.tensor([[-weight], [weight]]))
        net[3].bias.zero_()
    return net


@pytest.mark.parametrize('weight,bright', [(1., 1.), (1e-20, 1.), (1e-30, 1e-9), (1e-38, 1e-6), (1e25, 1e12)])
def test_the_hottest_place_is_1_however_small_the_gradient(weight, bright):
    x = torch.rand(3, 1, 6, 8)*bright
    x[2] = 0
    heat = gradcam(copying(weight), x, target=1)
    assert heat.max((1, 2)).tolist()==[1, 1, 0] and np.isfinite(heat).all()
    np.testing.assert_allclose(heat[:2], (x/x.amax((2, 3), keepdim=True))[:2,0], rtol=1e-5)
    assert gradcam(copying(weight), x, target=0).max()==0


def test_gradients_that_are_not_finite_are_named():
    with pytest.raises(ModelError, match='not finite'): gradcam(copying(torch.nan), torch.rand(1, 1, 6, 8), 1)


def test_empty_heat_has_no_hottest_square():
    model,x = copying(1.),torch.rand(4, 1, 20, 30)
    heat = gradcam(model, x, 1)
    heat[1],heat[3] = 0,.5
    found = deletion_check(model, x, heat, 1)
    assert found.hot.isna().tolist()==[False, True, False, True] and found.random.notna().all()
    whole = deletion_check(model, x, gradcam(model, x, 1), 1)
    assert (whole.random==found.random).all() and (whole.hot==found.hot)[[0, 2]].all()


@pytest.mark.parametrize('name', ['vit_wee_patch16_reg1_gap_256', 'deit_tiny_distilled_patch16_224',
    'swin_tiny_patch4_window7_224',
    'resnet10t', 'mobilenetv3_small_050'])
@pytest.mark.parametrize('size', [(96, 160), (160, 96)])
def test_places_depend_on_the_pixels_under_them(name, size):
    "Registers, two class tokens, windows with the channels last, and maps."
    fitted = {} if name[:3] in ('res', 'mob') else {'img_size': size}
    model = create_model(name, 2, pretrained=False, **fitted)
    x = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))
    assert grid_error(model, x)<1
    assert gradcam(model, x, 1).shape==(1, *size)


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        return explain(*args, **kwargs)


@pytest.mark.parametrize('method', ['gradcam', 'gradcam++', 'layercam', 'hirescam', 'eigencam', 'lrp'])
def test_each_view_of_each_study_has_its_map(method):
    """The second study is not given the first one's second view; a batch is what its studies are alone; a
    missing view has no heat."""
    model = create_model('resnet10t', 2, n_in=2, views=2, pretrained=False).eval()
    x = torch.rand(3, 2, 96, 64, generator=torch.Generator().manual_seed(0))
    x[1, 0] = 0
    heat = quietly(model, x, method, target=1).heat
    assert heat.shape==(3, 2, 96, 64) and not heat[1, 0].any()
    assert set(heat.max((1, 2, 3)).tolist())<={0., 1.}
    for i in range(3):
        np.testing.assert_allclose(heat[i], quietly(model, x[i:i+1], method, target=1).heat[0], atol=2e-4)
    np.testing.assert_allclose(quietly(model, x[:, :, None], method, target=1).heat, heat, atol=1e-6)


def test_a_missing_view_stays_away_on_the_way():
    model = create_model('resnet10t', 2, n_in=2, views=2, pretrained=False).eval()
    x = torch.rand(1, 2, 64, 64)
    x[0, 1] = 0
    shares, difference = integrated_gradients(model, x, 1, steps=16)
    assert not shares[0, 1].any()
    torch.testing.assert_close(shares.sum((1, 2, 3)), difference, rtol=.1, atol=.02)


def test_heat_of_a_padded_image_lies_where_the_film_is():
    "A segmenter fills images up to whole cells; the bright square in the corner stays in the corner."
    pytest.importorskip('segmentation_models_pytorch')
    model = create_segmenter('resnet10t', pretrained=False, width=.25).eval()
    x = torch.rand(1, 1, 100, 70)
    heat = gradcam(model, x, MaskLogit())
    assert heat.shape==(1, 100, 70)
    full = torch.nn.functional.pad(x, (0, 26, 0, 28), mode='replicate')
    region = torch.zeros(1, 128, 96, dtype=torch.bool)
    region[:, :100, :70] = True
    whole = gradcam(model, full, MaskLogit(where=region))[:, :100, :70]
    own = gradcam(model, x, MaskLogit(where=torch.ones(1, 100, 70)))
    np.testing.assert_allclose(own/max(own.max(), 1e-9), whole/max(whole.max(), 1e-9), atol=1e-4)
    with pytest.raises(ModelError, match='pixels of what the network sees'):
        gradcam(model, x, MaskLogit(where=region))
    with pytest.raises(ModelError, match='the model has 1'): gradcam(model, x, 1)


def test_a_detection_is_explained_by_its_own_score():
    model = create_detector('resnet10t', n_out=2, pretrained=False, levels=(3, 4, 5), width=.25).eval()
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad(): model.head.boxes.classification_head.cls_logits.weight.normal_(0, .1, generator=gen)
    x = torch.rand(2, 1, 100, 96, generator=gen)
    found = model.detect(x, score=0.)
    boxes = torch.stack([f['boxes'][3] for f in found])
    with torch.no_grad(): out = model(x)
    scores = DetectionScore(boxes, int(found[0]['labels'][3]))(out).sigmoid()
    torch.testing.assert_close(scores[0], found[0]['scores'][3])
    torch.testing.assert_close(DetectionScore()(out).sigmoid(), torch.stack([f['scores'][0] for f in found]))
    assert quietly(model, x, target=DetectionScore(boxes)).heat.shape==(2, 100, 96)
    with pytest.raises(ModelError, match='2 kinds'): gradcam(model, x, DetectionScore(k=2))
    with pytest.raises(ModelError, match='answers boxes'): gradcam(model, x, 0)


def test_grades_are_explained_by_the_log_odds_of_being_so_high():
    model = create_model('resnet10t', 4, pretrained=False, ordinal=True).eval()
    x = torch.rand(2, 1, 128, 128)
    out = model(x).detach()
    p = out.softmax(1)
    torch.testing.assert_close(target_scores(out, partial(any_grade, cut=2)), torch.logit(p[:, 2:].sum(1)))
    relevance, start = lrp_relevance(model, x, partial(any_grade, cut=2)) # through the rule of the head
    torch.testing.assert_close(relevance.sum((1, 2, 3)), start, rtol=1e-4, atol=1e-5)
    assert quietly(model, x, target=partial(any_grade, cut=2)).heat.shape==(2, 128, 128)


@pytest.mark.parametrize('rule', LRP_RULES)
@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv3_small_050', 'regnetx_002', 'efficientnet_lite0',
    'tf_efficientnet_lite0', 'densenet121'])
def test_relevance_is_kept(name, rule):
    """The sum over the pixels is the logit, to a ten thousandth; BatchNorm, gates, sums and concatenations
    are no hole."""
    model = create_model(name, 3, pretrained=False)
    with torch.no_grad(): model.train()(torch.rand(6, 1, 64, 96, generator=torch.Generator().manual_seed(1)))
    x = torch.rand(2, 1, 64, 96, generator=torch.Generator().manual_seed(0))
    relevance = lrp(model.eval(), x, 2, rule)
    logits = model(x)[:, 2].detach().numpy()
    assert relevance.shape==(2, 64, 96)
    np.testing.assert_allclose(relevance.astype(float).sum((1, 2)), logits, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_batchnorm_is_folded():
    "The same network with BatchNorm written into its convolutions has the same relevance."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv, norm, last = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)
        norm.running_mean.normal_()
        norm.running_var.uniform_(.5, 2)
        with torch.no_grad(): norm.weight.normal_(), norm.bias.normal_()
    tail = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last]
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm.eval())
    x = torch.rand(2, 1, 9, 7)
    for rule in LRP_RULES:
        np.testing.assert_allclose(lrp(nn.Sequential(conv, norm, *tail), x, 1, rule),
            lrp(nn.Sequential(folded, *tail), x, 1, rule),
            atol=1e-5)


def test_functions_without_a_rule_are_named():
    class Odd(nn.Module):
        def forward(self, x): return torch.fft.rfft(x.mean((1, 2))).abs()
    with pytest.raises(ModelError, match='no rule for the function'): lrp(Odd(), torch.rand(1, 1, 8, 8), 0)


class Patches(nn.Module):
    "Tokens (B, N, C), as timm's."
    def __init__(self):
        super().__init__()
        self.proj, self.patch_size = nn.Conv2d(1, 8, 8, 8), (8, 8)
    def forward(self, x): return self.proj(x).flatten(2).transpose(1, 2)


class OneBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed, self.norm = Patches(), nn.LayerNorm(8)
        self.qkv, self.last = nn.Linear(8, 24), nn.Linear(8, 3)
    def forward(self, x):
        t = self.patch_embed(x)
        q, k, v = (u[:, None] for u in self.qkv(self.norm(t)).chunk(3, 2))
        return self.last((t + F.scaled_dot_product_attention(q, k, v)[:, 0]).mean(1))


def half(t): return t/2 + (t/2).detach()


def test_attnlrp_is_what_its_rules_say():
    "Of one block, written out: constants where a rule says so, half for each factor of a product."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = OneBlock(), torch.rand(2, 1, 24, 16)
    tokens = model.patch_embed(x).detach().requires_grad_()
    spread = (tokens.var(2, keepdim=True, unbiased=False)+1e-5).sqrt().detach()
    q, k, v = model.qkv((tokens-tokens.mean(2, keepdim=True))/spread).chunk(3, 2)
    a = (half(q)@half(k).transpose(1, 2)/math.sqrt(8)).softmax(2)
    z = model.last((tokens + half(a)@half(v)).mean(1))[:, 1].sum()
    slope, = torch.autograd.grad(z, tokens)
    maps, _ = attnlrp_maps(model, x, 1)
    torch.testing.assert_close(maps, (tokens*slope).sum(2).detach().reshape(2, 3, 2), rtol=1e-4, atol=1e-6)


def test_rollout_follows_the_token_that_decides():
    import timm
    vit = timm.create_model('vit_tiny_patch16_224', in_chans=1, num_classes=2, img_size=(96, 64),
        depth=2).eval()
    x = torch.rand(1, 1, 96, 64)
    kept = []
    for block in vit.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, i, out: kept.append(out.detach()))
    with torch.no_grad(): vit(x)
    a, b = ((t.mean(1)+torch.eye(25))/2 for t in kept)
    expected = (b@a)[0, 0, 1:].reshape(6, 4)
    torch.testing.assert_close(attention_rollout(vit, x, 1)[0][0], expected, rtol=1e-4, atol=1e-6)


def test_a_map_says_how_coarse_it_is():
    model = create_model('resnet10t', 2, pretrained=False)
    with pytest.warns(UserWarning, match='2 x 2 cells of 32 x 32 pixels'):
        out = explain(model, torch.rand(1, 1, 64, 64), target=1)
    assert out.coarse and out.cells==(2, 2) and out.relevance.shape==(1, 2, 2)


def test_heat_goes_back_onto_the_film():
    film = Radiograph(np.random.default_rng(0).random((300, 200), np.float32))
    seen = film.crop((40, 60, 200, 220)).resize(128).flip()
    out = explain(create_model('resnet10t', 2, pretrained=False), torch.from_numpy(seen.pixels)[None, None],
        'integrated_gradients', 1)
    laid = out.on_film(seen, shape=film.shape)
    assert laid.shape==film.shape and not laid[:60].any() and not laid[:, :40].any()
    np.testing.assert_allclose(hottest(laid), seen.to_stored(hottest(out.heat[0])), atol=1.)


def test_what_does_not_fit_says_so():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x = torch.rand(1, 1, 8, 8)
    for method, message in {'gradcam': 'No layer', 'rollout': 'no attention',
            'attnlrp': 'has no patches'}.items():
        with pytest.raises(ModelError, match=message): explain(flat, x, method)
    assert set(METHODS)=={'gradcam', 'gradcam++', 'layercam', 'hirescam', 'eigencam', 'rollout',
        'integrated_gradients', 'lrp', 'attnlrp'}
    with pytest.raises(ModelError, match='2 outputs'): explain(flat, x, 'lrp', 2)
    with pytest.raises(ModelError, match='targets for 1'): explain(flat, x, 'lrp', [0, 1])
    with pytest.raises(ModelError, match='windows'):
        gradcam(create_model('swin_tiny_patch4_window7_224', 2, pretrained=False, img_size=112),
            torch.rand(1, 1, 112, 112), 1,
            layer='body.net.layers.0.blocks.0.attn')
