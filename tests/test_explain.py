"Heat maps lie over their image, whatever its shape, the layout of the maps and the size of the gradients."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from radiology_ai.core import ModelError
from radiology_ai.explain import Layout, as_map, deletion_check, gradcam
from radiology_ai.models.backbone import create_backbone, create_model, token_grid


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
