"Heat maps are those of pytorch-grad-cam and captum where both define the same, on images of any shape."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from radiology_ai.heat.cam import CAMS, cam_heat, cam_maps
from radiology_ai.heat.paths import integrated_gradients
from radiology_ai.heat.relevance import lrp_relevance
from radiology_ai.models.backbone import create_model

SIZE = 96, 128
LOUD = 1e4 # the peer adds 1e-6 to a denominator of squared gradients, which would otherwise decide


def network(name):
    fitted = {'img_size': SIZE} if name[:3] in ('vit', 'swi') else {}
    model = create_model(name, 3, pretrained=False, batchnorm=False, **fitted)
    with torch.no_grad(): model.train()(torch.rand(8, 1, *SIZE, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def alike(a, b) -> float:
    return min(1. if not p.any() and not q.any() else float(np.corrcoef(p.ravel(), q.ravel())[0, 1])
        for p, q in zip(np.asarray(a), np.asarray(b), strict=True))


@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv3_small_050', 'vit_wee_patch16_reg1_gap_256'])
def test_maps_are_those_of_pytorch_grad_cam(name):
    peer = pytest.importorskip('pytorch_grad_cam')
    kinds = {'gradcam': peer.GradCAM, 'gradcam++': peer.GradCAMPlusPlus, 'layercam': peer.LayerCAM,
        'hirescam': peer.HiResCAM, 'eigencam': peer.EigenCAM}
    assert set(kinds)==set(CAMS)
    model, x = network(name), torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    k = int(model(x).mean(0).argmax())
    for method, kind in kinds.items():
        with kind(model=model, target_layers=[model.body]) as cam:
            theirs = cam(input_tensor=x.clone(), targets=[lambda o: LOUD*o[k]]*2)
        if method!='eigencam':
            own = cam_heat(cam_maps(model, x, lambda out: LOUD*out[:, k], method=method))
            assert alike(own, theirs)>.999, method
            continue
        # the sign of a principal component is anyone's choice
        maps = cam_maps(model, x, k, method=method).maps
        both = [F.interpolate((s*maps).clamp(min=0)[:, None], SIZE, mode='bilinear')[:, 0].numpy()
            for s in (1, -1)]
        assert all(max(alike(b[i:i+1], theirs[i:i+1]) for b in both)>.999 for i in range(2))


def test_integrated_gradients_are_those_of_captum():
    captum = pytest.importorskip('captum.attr')
    model, x = network('resnet10t'), torch.rand(2, 1, *SIZE)
    theirs = captum.IntegratedGradients(model).attribute(x.clone(), baselines=.5, target=1, n_steps=8)
    own, difference = integrated_gradients(model, x, 1, .5, 8)
    assert alike(own, theirs.detach())>.999
    own, difference = integrated_gradients(model, x, 1, .5, 64)
    torch.testing.assert_close(own.sum((1, 2, 3)), difference, rtol=.02, atol=2e-3)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, bias=False),
            nn.ReLU())
        self.last = nn.Linear(8*6*4, 3, bias=False)
    def forward(self, x): return self.last(self.maps(x).flatten(1))


def test_relevance_is_that_of_captum():
    "On a plain network without biases, which captum's rules do not hand on."
    captum = pytest.importorskip('captum.attr')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Plain().eval()
    x = torch.rand(2, 1, 16, 12)
    own, start = lrp_relevance(net, x, 1, 'epsilon', epsilon=1e-9)
    assert alike(own, captum.LRP(net).attribute(x.clone(), target=1).detach())>.999
    torch.testing.assert_close(own.sum((1, 2, 3)), net(x)[:, 1].detach(), rtol=1e-4, atol=1e-5)
