"""Architectures at the size of the images, and weights of the field under the names and shapes in which they are given out.
The weights are made here: what is compared is the whole way from a published file to features."""
import argparse
import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva

from radiology_ai.core import ModelError
from radiology_ai.models.backbone import create_backbone, create_model, list_backbones, size_arguments

# the smallest of each family that a chest task is likely to ask for
FAMILIES = ['beit_base_patch16_224', 'cait_xxs24_224', 'coat_tiny', 'coatnet_pico_rw_224', 'convit_tiny',
    'convnext_atto',
    'deit_tiny_patch16_224', 'densenet121', 'efficientformerv2_s0', 'efficientnet_b0', 'efficientvit_m0',
    'eva02_tiny_patch14_224', 'gcvit_xxtiny', 'hiera_tiny_224', 'levit_128s', 'mvitv2_tiny', 'nest_tiny',
    'pit_ti_224',
    'resnet10t', 'swin_tiny_patch4_window7_224', 'swinv2_tiny_window8_256', 'swinv2_cr_tiny_ns_224',
    'tnt_s_legacy_patch16_224',
    'twins_svt_small', 'visformer_tiny', 'vit_tiny_patch16_224', 'vitamin_small_224', 'volo_d1_224',
    'xcit_nano_12_p8_224']


SQUARE = ('convit_tiny', 'nest_tiny') # these take no others


def maps_of(name, height, width):
    body, n = create_backbone(name, 1, pretrained=False, size=(height, width))
    with torch.no_grad(): maps = body.eval()(torch.rand(1, 1, height, width))
    assert maps.ndim==4 and maps.shape[:2]==(1, n)
    return maps


@pytest.mark.parametrize('name', FAMILIES)
def test_a_network_takes_the_images_that_are_there(name):
    assert torch.isfinite(maps_of(name, 128, 128)).all()
    if name not in SQUARE: assert torch.isfinite(maps_of(name, 96, 160)).all()
    else:
        with pytest.raises(ModelError): maps_of(name, 96, 160)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224',
    'eva02_tiny_patch14_224'])
def test_another_size_is_refused_by_name(name):
    body, _ = create_backbone(name, 1, pretrained=False, size=112)
    with pytest.raises(ModelError, match='takes images of 112 x 112 pixels and got 96 x 96'):
        body(torch.rand(1, 1, 96, 96))
    several, _ = create_backbone(name, 1, pretrained=False, size=112, sizes='several')
    with torch.no_grad():
        for size in (112, 56): assert several(torch.rand(1, 1, size, size)).ndim==4


def test_what_cannot_be_is_refused_before_training():
    with pytest.raises(ModelError, match='takes only images of 224 x 224'):
        size_arguments('efficientformer_l1', 160)
    with pytest.raises(ModelError, match='no single map'):
        create_backbone('crossvit_tiny_240', pretrained=False)
    assert not list_backbones('crossvit*')
    with pytest.raises(ModelError, match='no token for a teacher'):
        create_model('vit_tiny_patch16_224', 2, pretrained=False, distilled=True)


def test_a_network_is_made_again_from_its_config():
    for name, more in (('swinv2_tiny_window8_256', {}),
            ('deit_tiny_distilled_patch16_224', dict(distilled=True)),
            ('vit_tiny_patch16_224', dict(pool='query')), ('resnet10t', dict(head_layers=2))):
        model = create_model(name, 3, pretrained=False, size=64, multi_label=True, parents=[-1, 0, -1],
            **more).eval()
        again = create_model(pretrained=False, **model.config).eval()
        again.load_state_dict(model.state_dict())
        x = torch.rand(2, 1, 64, 64)
        with torch.no_grad(): assert torch.equal(model(x), again(x))


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('pool', ['avg', 'query'])
def test_no_label_exceeds_the_one_above_it(seed, pool):
    "Whatever the weights and the calibration are, in half precision too."
    torch.manual_seed(seed)
    parents = [-1, 0, 1, 1, 0, -1, 5]
    model = create_model('test_resnet', 7, pretrained=False, multi_label=True, parents=parents,
        pool=pool).eval()
    model.head.rescale(torch.rand(7)*4, torch.randn(7)*5)
    with torch.no_grad():
        x = torch.rand(16, 1, 64, 64)
        for p in (model(x).sigmoid(), model.bfloat16()(x.bfloat16()).sigmoid(),
                model.half()(x.half()).sigmoid()):
            for child, parent in enumerate(parents):
                if parent>=0: assert (p[:,child]<=p[:,parent]).all()


# Weights of the field

def randomised(net):
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn_like(p)*.02)
    return net.eval()


def same_features(name, file, reference, size, tokens, prefix=1, **args):
    "Our network gives what the reference gives for three equal channels of the same pixels."
    body, _ = create_backbone(name, 1, weights=file, **args)
    assert body.pretrained and body.start['sha256']
    x = torch.rand(1, 1, size, size)
    with torch.no_grad():
        ours = body.eval()(x)
        theirs = reference.forward_features(((x - body.mean)/body.std).repeat(1, 3, 1, 1))
    theirs = theirs[:,prefix:].transpose(1, 2).reshape(ours.shape) if tokens else theirs.permute(0, 3, 1, 2)
    assert torch.allclose(ours, theirs, atol=1e-4)
    smaller, _ = create_backbone(name, 1, weights=file, size=tuple(s//2//28*28 for s in (size, size)), **args)
    assert torch.isfinite(smaller(torch.rand(1, 1, *smaller.size))).all() # tables of positions are stretched


@pytest.mark.parametrize('name, made', [('tiny', dict(embed_dim=192, num_heads=3)),
    ('base', dict(embed_dim=768, num_heads=12, qkv_fused=False, scale_mlp=True))])
def test_eva_x(tmp_path, name, made):
    "hustvl/EVA-X: a PyTorch file of masked image modelling, EVA's names, the script's arguments beside it."
    net = randomised(Eva(img_size=224, patch_size=16, depth=2, mlp_ratio=4*2/3, swiglu_mlp=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(14, 14), num_classes=0, **made))
    names = {'mlp.fc1_g': 'mlp.w1', 'mlp.fc1_x': 'mlp.w2', 'mlp.fc1': 'mlp.w12', 'mlp.norm': 'mlp.ffn_ln',
        'mlp.fc2': 'mlp.w3', 'fc_norm': 'norm', 'q_proj.bias': 'q_bias', 'v_proj.bias': 'v_bias'}
    state = {'mask_token': torch.zeros(1, 1, made['embed_dim']), 'lm_head.weight': torch.zeros(3, 3)}
    for k, v in net.state_dict().items():
        old = next((a for a in names if a in k), None)
        if 'rope' not in k: state[k.replace(old, names[old]) if old else k] = v
    torch.save({'model': state, 'args': argparse.Namespace(lr=.1), 'best': np.float64(.8)}, tmp_path/'eva.pt')
    same_features(f'eva-x/{name}', tmp_path/'eva.pt', net, 224, True, depth=2)


@pytest.mark.parametrize('layout', ['transformers', 'dinov2'])
def test_rad_dino(tmp_path, layout):
    """microsoft/rad-dino: model.safetensors has the names of transformers, backbone_compatible.safetensors
    those of DINOv2."""
    net = randomised(timm.create_model('vit_base_patch14_dinov2', num_classes=0, depth=2))
    state = {}
    for k, v in net.state_dict().items():
        block = re.match(r'blocks\.(\d+)\.attn\.qkv\.(\w+)', k)
        if layout=='dinov2': state[k] = v
        elif block:
            for part, t in zip(('query', 'key', 'value'), v.chunk(3)):
                state[f'encoder.layer.{block[1]}.attention.attention.{part}.{block[2]}'] = t.contiguous()
        else:
            for ours, theirs in (('blocks.', 'encoder.layer.'), ('attn.proj.', 'attention.output.dense.'),
                    ('ls1.gamma', 'layer_scale1.lambda1'), ('ls2.gamma', 'layer_scale2.lambda1'),
                    ('patch_embed.proj.', 'embeddings.patch_embeddings.projection.')):
                k = k.replace(ours, theirs)
            k = re.sub(r'^norm\.', 'layernorm.', k)
            state[{'cls_token': 'embeddings.cls_token', 'pos_embed': 'embeddings.position_embeddings'}.get(k,
                k)] = v
    token = 'embeddings.mask_token' if layout=='transformers' else 'mask_token'
    save_file(state | {token: torch.zeros(1, 768)}, tmp_path/'rad.safetensors')
    same_features('rad-dino', tmp_path/'rad.safetensors', net, 518, True, depth=2)


def test_ark(tmp_path):
    """jlianglab/Ark: student and teacher in one file, `module.` in front, the names of timm 0.5, heads of
    many data sets."""
    made = dict(depths=(1, 1, 1, 1), embed_dim=24, num_heads=(2, 2, 2, 2))
    net = randomised(timm.create_model('swin_large_patch4_window12_384', num_classes=0, img_size=768, **made))
    state = {'module.' + re.sub(r'layers\.(\d)\.downsample', lambda m: f'layers.{int(m[1])-1}.downsample',
        k): v
        for k, v in net.state_dict().items()}
    state |= {'module.layers.0.blocks.0.attn.relative_position_index': torch.zeros(144, 144,
        dtype=torch.long),
        'module.projector.weight': torch.zeros(1376, 192),
        'module.omni_heads.0.weight': torch.zeros(14, 1376)}
    student = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    torch.save({'epoch': 3, 'lossMIN': np.float64(.2), 'state_dict': student, 'teacher': state},
        tmp_path/'ark.pth.tar')
    same_features('ark+/swin-large-768', tmp_path/'ark.pth.tar', net, 768, False, **made)
    with pytest.raises(ModelError, match='given out on request'):
        create_backbone('ark+/swin-large-768', strict=True, **made)


def test_a_file_that_runs_code_is_refused_beside_arguments(tmp_path):
    class Program:
        def __reduce__(self): return eval, ('1',)
    torch.save({'model': {'weight': torch.ones(2)}, 'args': argparse.Namespace(x=Program())},
        tmp_path/'evil.pt')
    with pytest.raises(ModelError): create_backbone('eva-x/tiny', weights=tmp_path/'evil.pt', depth=1)
