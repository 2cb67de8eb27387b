"""What somebody has changed is refused: bundles, stores, checkpoints and the files beside them, each with an error that names the
part, at once, without much memory, and without running anything of it."""
import contextlib
import copy
import gc
import json
import math
import os
import pickle
import re
import shutil
import struct
import sys
import time
from configparser import ConfigParser
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import pace
from fastai.callback.core import Callback
from safetensors.torch import load, save, save_file
from test_resume import learner
from torch import nn

from radiology_ai.core import BundleError, DataError, ModelError, StoreError
from radiology_ai.data.targets import MaskStore
from radiology_ai.files import plain_digest, quick_digest, read_json
from radiology_ai.metrics.recalibration import recalibration_from
from radiology_ai.models.backbone import create_backbone, create_model
from radiology_ai.models.bundle import load_bundle, save_bundle
from radiology_ai.models.meta import sealed
from radiology_ai.models.weights import read_weights
from radiology_ai.preprocess.recipe import Preprocess
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore, ShardWriter
from radiology_ai.pretrain.ssl import save_body
from radiology_ai.tasks.run import read_record
from radiology_ai.train.checkpoint import read_checkpoint, write_checkpoint

SECONDS, MB = .5, 64


def kilobytes(what: str) -> int:
    return int(re.search(rf'{what}:\s+(\d+)', Path('/proc/self/status').read_text())[1])


@contextlib.contextmanager
def at_once():
    "Half a second of the processor and 64 MB at most."
    linux = sys.platform.startswith('linux')
    if linux:
        with contextlib.suppress(OSError):
            Path('/proc/self/clear_refs').write_text('5') # the peak begins anew
        before = kilobytes('VmRSS')
    gc.disable() # what other tests left is not of this one
    start = time.process_time()
    try: yield
    finally: gc.enable()
    assert time.process_time()-start<SECONDS*pace()
    if linux and kilobytes('VmHWM')>before: assert kilobytes('VmHWM')-before<MB*1024


class Evil:
    "Makes a folder when it is unpickled."
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.mkdir, (self.mark,)


# ---- bundles -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    model = create_model('test_resnet', 3, pretrained=False, seed=1)
    folder = tmp_path_factory.mktemp('good')
    path = save_bundle(model, folder/'model', Preprocess(size=64), ['normal', 'benign', 'cancer'],
        task='breast', threshold=.5,
        answer={'activation': 'softmax'})
    assert load_bundle(path).vocab==['normal', 'benign', 'cancer'] # what is slow the first time
    return path


@pytest.fixture
def bundle(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path/'model'))


def rewrite(path: Path, change, seal=sealed):
    "bundle.json after `change(meta)`; its digest is made again unless `seal` is another."
    meta = json.loads((path/'bundle.json').read_text())
    change(meta)
    (path/'bundle.json').write_text(json.dumps(seal(meta)))


def refused(path: Path, words: str=''):
    with at_once(), pytest.raises(BundleError, match=words) as e: load_bundle(path)
    assert e.value.remedy
    return e.value


def network(**changes): return lambda m: m['network'].update(changes)
def entries(**changes): return lambda m: m.update(changes)
def recipe_with(**changes): return lambda m: m['recipe'].update(changes)


CHANGED = {'names reversed': lambda m: m.update(vocab=m['vocab'][::-1]), 'threshold': entries(threshold=.05),
    'sigmoid for softmax': lambda m: m['answer'].update(activation='sigmoid'),
    'several labels': network(multi_label=True),
    'size': recipe_with(size=512), 'task': entries(task='knee'), 'stage': entries(stage='second'),
    'settings': entries(settings={'lr': 1}), 'card': entries(card={'auroc': 1.}), 'markup as a name':
    lambda m: m['vocab'].__setitem__(0, '<script>alert(1)</script>'),
    'an entry more': entries(weather='rain')}

@pytest.mark.parametrize('name', CHANGED)
def test_any_entry_that_was_changed_is_seen(bundle, name):
    rewrite(bundle, CHANGED[name], seal=lambda m: m)
    refused(bundle, 'not as it was written')


PATHS = ('checkpoint_path','pretrained_cfg_overlay','pretrained_cfg','cache_dir','weights','pretrained',
    'strict','seed','prior',
    'foo','scriptable','exportable','features_only','num_classes','in_chans')
RESEALED = {**{f'network {k}': (network(**{k: '/etc/passwd'}), 'no setting of a network') for k in PATHS},
    **{f'name {v}': (network(name=v), 'the name of an architecture')
    for v in ('demo/run/model', 'hf-hub:someone/evil',
        'local-dir:build/x', '/etc', '../model', 'hf_hub:a', 'torchxrayvision/../x', '', 5, None,
        ['resnet18'])},
    'unknown name': (network(name='resnet_of_nobody'), 'cannot be built'),
    'another network': (network(name='test_convnext'), 'do not fit'),
    'a giant': (network(name='eva02_enormous_patch14_clip_224'), 'takes more than'),
    'a giant of one layer': (network(name='test_vit', embed_dim=8192, num_heads=1),
    'takes more than|cannot be built'),
    'n_in of a billion': (network(n_in=10**9), 'n_in'), 'n_in as text': (network(n_in='1'), 'n_in'),
    'n_in true': (network(n_in=True), 'n_in'), 'n_in 3': (lambda m: (network(n_in=3)(m), m.update(n_in=3)),
    'do not fit'),
    'n_in elsewhere': (entries(n_in=2), 'contradicts'),
    'views of a billion': (network(views=10**9, n_in=10**9), 'must be'),
    'views': (network(views=2), 'contradicts'),
    'n_out': (network(n_out=4), 'contradicts'), 'dropout 5': (network(dropout=5.), 'dropout'),
    'pool': (network(pool='min'), 'pool'), 'parents': (network(parents=[9, 9, 9]), 'parents'),
    'img_size': (network(img_size=10**6), 'img_size'),
    'img_size of a ResNet': (network(img_size=64), 'cannot be built'),
    'network a list': (entries(network=[1]), "'network'"),
    'network empty': (entries(network={}), 'has not the entries'),
    'format text': (entries(format='1'), 'format'), 'format true': (entries(format=True), 'format'),
    'format -5': (entries(format=-5), 'format -5'), 'format 99': (entries(format=99), 'Update'),
    'format 1 with entries of 2': (entries(format=1), 'format 1'),
    'sha256 a list': (entries(sha256=['x']), 'sha256'),
    'recipe more': (recipe_with(__class__='os.system'), 'recipe'),
    'recipe a list': (entries(recipe=[1, 2]), "'recipe'"),
    'recipe size text': (recipe_with(size='128'), 'size'),
    'recipe size true': (recipe_with(size=True), 'size'),
    'recipe tiles': (recipe_with(tiles=10**9), 'tiles'), 'recipe low text': (recipe_with(low='a'), 'low'),
    'recipe version text': (recipe_with(version='2'), 'recipe'),
    'recipe bits 8.0': (recipe_with(bits=8.5), 'bits'),
    'threshold text': (entries(threshold='=1+1'), 'threshold'),
    'threshold true': (entries(threshold=True), 'threshold'),
    'threshold 2': (entries(threshold=2.), 'threshold'),
    'two thresholds': (entries(threshold=[.5, .4]), '2 thresholds for 3'),
    'threshold in the answer': (entries(answer={'thresholds': {'a': -1}}), 'threshold'),
    'answer a list': (entries(answer=[1]), 'answer'),
    'names twice': (entries(vocab=['a', 'a', 'b']), 'one name'),
    '1 and text 1': (entries(vocab=[1, '1', 'b']), 'one name'),
    'two names': (entries(vocab=['a', 'b']), 'contradicts'),
    'name with a line break': (entries(vocab=['a\nb', 'b', 'c']), 'printable'),
    'name with an escape': (entries(vocab=['\x1b[2J', 'b', 'c']), 'printable'),
    'name a list': (entries(vocab=[['a'], 'b', 'c']), 'printable'),
    'surrogate': (entries(vocab=['\ud800', 'b', 'c']), 'printable'),
    'no name': (entries(vocab=['', 'b', 'c']), 'printable'),
    'long name': (entries(vocab=['x'*10**6, 'b', 'c']), 'printable'),
    'task a list': (entries(task=[1]), 'task'),
    'stage a path': (entries(stage='\0'), 'stage'), 'vocab a text': (entries(vocab='abc'), 'vocab'),
    'no threshold': (lambda m: m.pop('threshold'), "no entry 'threshold'")}

@pytest.mark.parametrize('name', RESEALED)
def test_entries_that_cannot_be_are_refused_with_a_new_digest(bundle, name):
    change, words = RESEALED[name]
    rewrite(bundle, change)
    said = str(refused(bundle, words))
    assert len(said)<600


def test_files_named_in_a_bundle_are_not_opened(bundle, tmp_path, monkeypatch):
    "As timm before 1.0.26 loaded them: as pickles."
    with open(tmp_path/'evil.pth', 'wb') as f: pickle.dump(Evil(tmp_path/'ran'), f, protocol=2)
    opened = []
    for where in (timm.models._factory, timm.models._helpers, timm.models._builder):
        for name in ('load_checkpoint','load_state_dict'):
            if hasattr(where, name): monkeypatch.setattr(where, name, lambda *a, **k: opened.append(a))
    monkeypatch.setattr(torch, 'load', lambda *a, **k: opened.append(a))
    for entry in ({'checkpoint_path': str(tmp_path/'evil.pth')}, {'weights': str(tmp_path/'evil.pth')},
            {'pretrained': True, 'pretrained_cfg_overlay': {'file': str(tmp_path/'evil.pth')}}):
        whole = copy.copy((bundle/'bundle.json').read_bytes())
        rewrite(bundle, network(**entry))
        refused(bundle, 'no setting of a network')
        with at_once(), pytest.raises(ModelError, match='no setting of a network'): create_backbone(bundle)
        (bundle/'bundle.json').write_bytes(whole)
    assert not opened and not (tmp_path/'ran').exists()


def test_the_bound_of_timm():
    "From 1.0.26 on its load_checkpoint does not run pickles."
    read = ConfigParser()
    read.read(Path(__file__).parents[1]/'settings.ini')
    version = re.search(r'^timm>=([\d.]+)$', read['DEFAULT']['requirements'], re.M)[1]
    assert tuple(map(int, version.split('.')))>=(1, 0, 26)


def test_the_name_of_an_architecture_is_no_folder(bundle, tmp_path, monkeypatch):
    "A folder that is called as the network in a bundle: the bundle's own weights are taken all the same."
    expected = load_bundle(bundle).model.state_dict()
    monkeypatch.chdir(tmp_path)
    other = create_model('test_convnext', 2, pretrained=False)
    save_bundle(other, tmp_path/'test_resnet', Preprocess(size=64), ['a', 'b'])
    assert load_bundle(bundle).model.state_dict().keys()==expected.keys()


TEXTS = {'deep': '['*200_000 + ']'*200_000, 'never closed': '['*200_000, 'dict for ever': '{"a":'*100_000,
    'empty': '', 'list': '[1, 2]',
    'number': '5', 'NaN': '{"format": NaN}', 'not UTF-8': b'\xff\xfe\0\0', 'zeros': b'\0'*1000,
    'digits': '1'*10_000}

@pytest.mark.parametrize('name', TEXTS)
def test_strange_json(bundle, name):
    text = TEXTS[name]
    (bundle/'bundle.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(bundle, 'broken|no entry')


def test_json_with_something_more(bundle):
    text = (bundle/'bundle.json').read_text().rstrip()[:-1]
    for more, words in ((',"card2":' + '['*100_000 + ']'*100_000 + '}', 'nested'),
            (',"threshold":0.0001}', 'twice'),
            (',"more": 1e999}', 'finite'), (',"more": Infinity}', 'finite'),
            (',"more": "' + 'x'*2**24 + '"}', 'more than')):
        (bundle/'bundle.json').write_text(text + more)
        refused(bundle, words)
    rewrite_raw = json.loads(text + '}')
    rewrite_raw['recipe']['mm'] = math.inf
    (bundle/'bundle.json').write_text(json.dumps(rewrite_raw))
    refused(bundle, 'finite')


def test_an_archive_is_no_folder(bundle, tmp_path):
    shutil.make_archive(str(tmp_path/'a'), 'zip', bundle)
    refused(tmp_path/'a.zip', 'is a file')


def test_no_files(bundle):
    for name, words in (('bundle.json', 'broken'), ('model.safetensors', 'cannot be read')):
        whole = (bundle/name).read_bytes()
        for make in (lambda p: os.mkfifo(p), lambda p: p.symlink_to('/dev/zero'), lambda p: p.mkdir()):
            (bundle/name).unlink()
            make(bundle/name)
            refused(bundle, f'{words}.*no regular file')
            if (bundle/name).is_dir() and not (bundle/name).is_symlink(): (bundle/name).rmdir()
            else: (bundle/name).unlink()
            (bundle/name).write_bytes(whole)
        with open(bundle/name, 'r+b') as f: f.truncate(2**40) # a hole of a terabyte
        refused(bundle, 'more than')
        (bundle/name).write_bytes(whole)
    with open(bundle/'model.safetensors', 'wb') as f: f.truncate(2**33)
    refused(bundle, 'does not begin')


def floats(f): return lambda b: save({k: f(v) if v.is_floating_point() else v for k,v in load(b).items()})

def one_value(value):
    def change(v):
        v = v.clone()
        v.view(-1)[-1] = value
        return v
    return floats(change)


WEIGHTS = {'header of exabytes': (lambda b: struct.pack('<Q', 2**62) + b[8:], 'begin'),
    'header of 100 MB': (lambda b: struct.pack('<Q', 100_000_001) + b[8:], 'begin'),
    'header beyond the file': (lambda b: struct.pack('<Q', len(b)) + b[8:], 'begin'),
    'complex': (floats(lambda v: v.to(torch.complex64)), 'do not fit'),
    'whole numbers': (floats(lambda v: v.long()), 'do not fit'),
    'other shapes': (floats(lambda v: v.repeat(2, *[1]*(v.ndim-1)) if v.ndim else v), 'do not fit'),
    'missing': (lambda b: save(dict(list(load(b).items())[5:])), 'do not fit'),
    'more': (lambda b: save(load(b) | {'more': torch.ones(1)}), 'do not fit'),
    'none': (lambda b: save({}), 'takes more|do not fit'),
    'half': (lambda b: b[:len(b)//2], 'cannot be read'), 'nothing': (lambda b: b'', 'begin'),
    'NaN': (floats(lambda v: torch.full_like(v, math.nan)), 'NaN or infinity'),
    'one NaN': (one_value(math.nan), 'NaN or infinity'),
    'infinity': (one_value(math.inf), 'NaN or infinity'),
    'infinities': (floats(lambda v: torch.where(torch.arange(v.numel()).reshape(v.shape)%2==0, math.inf,
    -math.inf)), 'NaN or inf'),
    'NaN of half precision': (floats(lambda v: torch.full_like(v, math.nan).half()), 'NaN or infinity')}

@pytest.mark.parametrize('name', WEIGHTS)
def test_weights_that_cannot_be(bundle, name):
    change, words = WEIGHTS[name]
    data = change((bundle/'model.safetensors').read_bytes())
    (bundle/'model.safetensors').write_bytes(data)
    if data[8:9]==b'{': refused(bundle, 'sha256|begin')
    rewrite(bundle, entries(sha256=sha256(data).hexdigest()))
    refused(bundle, words)


def test_weights_that_were_changed(bundle):
    whole = (bundle/'model.safetensors').read_bytes()
    for at in (20, len(whole)//2, len(whole)-1):
        data = bytearray(whole)
        data[at] ^= 1
        (bundle/'model.safetensors').write_bytes(data)
        refused(bundle, 'sha256')
        with pytest.raises(ModelError, match='sha256'): read_weights(bundle)


@pytest.mark.parametrize('protocol', range(6))
def test_a_pickle_is_not_opened(bundle, tmp_path, protocol):
    data = pickle.dumps(Evil(tmp_path/'ran'), protocol=protocol)
    (bundle/'model.safetensors').write_bytes(data)
    rewrite(bundle, entries(sha256=sha256(data).hexdigest()))
    refused(bundle, 'pickle in disguise|does not begin')
    assert not (tmp_path/'ran').exists()


def test_half_precision_is_read(bundle):
    "Weights of another precision are those of the network all the same."
    data = floats(lambda v: v.half())((bundle/'model.safetensors').read_bytes())
    (bundle/'model.safetensors').write_bytes(data)
    rewrite(bundle, entries(sha256=sha256(data).hexdigest()))
    assert load_bundle(bundle).model.head.linear.weight.dtype==torch.float32


def test_a_bundle_of_the_first_format_is_read_with_a_warning(bundle):
    rewrite(bundle, lambda m: (m.update(format=1),
        [m.pop(k) for k in ('stage','settings','answer','digest')]), seal=lambda m: m)
    with pytest.warns(UserWarning, match='earlier version.*Save it again'): b = load_bundle(bundle)
    assert b.threshold==.5 and b.activation=='softmax'


BAD = {'two thresholds': dict(threshold=[.5, .4]), 'NaN': dict(threshold=math.nan),
    'numpy NaN': dict(threshold=np.float32('nan')),
    'NaN in a list': dict(threshold=[.1, .2, math.nan]), 'a threshold of 3': dict(threshold=3),
    'text': dict(threshold='.5'),
    'names twice': dict(vocab=['a', 'a', 'b']), 'line break': dict(vocab=['a\n', 'b', 'c']),
    'NaN as a name': dict(vocab=['a', 'b', math.nan]),
    'infinite in the answer': dict(answer={'thresholds': {'any': math.inf}}),
    'a list for a name': dict(vocab=[['a'], 'b', 'c'])}

@pytest.mark.parametrize('name', BAD)
def test_what_could_not_be_read_again_is_not_saved(good, tmp_path, name):
    model = create_model('test_resnet', 3, pretrained=False)
    with pytest.raises(BundleError):
        save_bundle(model, tmp_path/'b', Preprocess(size=64), **dict(vocab=['a', 'b', 'c']) | BAD[name])
    assert not list(tmp_path.iterdir())


def test_a_network_that_a_bundle_cannot_hold_is_not_saved(tmp_path):
    model = create_model('test_resnet', 3, pretrained=False)
    with torch.no_grad(): model.head.norm.bias[1] = math.nan
    with pytest.raises(BundleError, match='head.norm.bias hold NaN'):
        save_bundle(model, tmp_path/'b', Preprocess(size=64), ['a', 'b', 'c'])
    model = create_model('test_resnet', 3, pretrained=False)
    model.config['checkpoint_path'] = '/x'
    with pytest.raises(BundleError, match='no setting of a network'):
        save_bundle(model, tmp_path/'b', Preprocess(size=64), ['a', 'b', 'c'])
    assert not list(tmp_path.iterdir())


def test_plain_settings_of_architectures_come_back(tmp_path):
    for name, args in (('test_vit', dict(img_size=96, drop_path_rate=.1)),
            ('test_vit', dict(dynamic_img_size=True, patch_size=8)),
            ('test_resnet', dict(drop_rate=.2, output_stride=16)),
            ('efficientnet_pytorch/efficientnet-b0', {})):
        model = create_model(name, 2, pretrained=False, **args)
        again = load_bundle(save_bundle(model, tmp_path/'b', Preprocess(size=96), ['a', 'b'])).model
        assert all(torch.equal(v, again.state_dict()[k])
            for k,v in model.state_dict().items()) and again.config==model.config


# ---- stores --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Twelve pictures in three shards; a store as it is made now, and one as it was made before."
    folder = tmp_path_factory.mktemp('pictures')
    gen = np.random.default_rng(0)
    for i in range(12):
        cv2.imwrite(str(folder/f'{i:02d}.png'), gen.integers(0, 255, (40, 40), dtype=np.uint8))
    out = tmp_path_factory.mktemp('stores')
    preprocess_folder(folder, out/'new', Preprocess(size=32), workers=1, show=False, shard_size=4)
    shutil.copytree(out/'new', out/'old')
    (out/'old/sums.json').unlink()
    for p in (out/'old/shards').glob('*.json'):
        p.write_text(json.dumps({k: v for k,v in json.loads(p.read_text()).items() if k!='quick'}))
    for name in ('new', 'old'):
        assert len(list(ImageStore(out/name)))==12 and not len(ImageStore(out/name).verify())
    return out, folder


@pytest.fixture(params=['new', 'old'])
def store(whole, tmp_path, request):
    return Path(shutil.copytree(whole[0]/request.param, tmp_path/'store'))


N0 = 'shards/00000.npy'

def swap(*parts):
    def change(d):
        for part in parts:
            a, b = d/f'shards/00000{part}', d/f'shards/00001{part}'
            x, y = a.read_bytes(), b.read_bytes()
            a.write_bytes(y)
            b.write_bytes(x)
    return change

def npy(shape: str, kind: str='|u1', rest: bytes=b''):
    def change(d):
        h = (f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}").ljust(117) + '\n'
        (d/N0).write_bytes(b'\x93NUMPY\1\0' + struct.pack('<H', len(h)) + h.encode()
            + (rest or (d/N0).read_bytes()[128:]))
    return change

def index(**changes):
    def change(d):
        table = pd.read_parquet(d/'index.parquet')
        table.assign(**changes).to_parquet(d/'index.parquet', index=False)
    return change

def text(name, old, new): return lambda d: (d/name).write_text((d/name).read_text().replace(old, new))
def bytes_of(name, data): return lambda d: (d/name).write_bytes(data)

def flipped(d):
    data = bytearray((d/N0).read_bytes())
    data[1000] ^= 1
    (d/N0).write_bytes(data)

def account(**changes):
    def change(d):
        p = d/'shards/00000.json'
        p.write_text(json.dumps(json.loads(p.read_text()) | changes))
    return change

def instead(name, make):
    def change(d):
        (d/name).unlink()
        make(d/name)
    return change


STORES = {'objects': lambda d: np.save(d/N0, np.array([Evil(d/'ran')], object), allow_pickle=True),
    'pickle': lambda d: (d/N0).write_bytes(pickle.dumps(Evil(d/'ran'))),
    'archive': lambda d: (np.savez(str(d/'x.npz'), a=np.zeros(3)), shutil.move(d/'x.npz', d/N0)),
    'images exchanged': swap('.npy'), 'images and accounts exchanged': swap('.npy', '.json'),
    'shards exchanged': swap('.npy', '.json', '.parquet', '.errors.parquet'), 'a bit': flipped,
    'half a shard': lambda d: (d/N0).write_bytes((d/N0).read_bytes()[:2000]),
    'empty shard': bytes_of(N0, b''),
    'shard as text': index(shard='../../../../../tmp/x'), 'negative shard': index(shard=-1),
    'huge shard': index(shard=2**60),
    'negative row': index(row=-1), 'huge row': index(row=10**9),
    'row of another shard': index(row=3, shard=7),
    'shard NaN': index(shard=math.nan), 'rows of floats': index(row=1.), 'path': index(path='/etc/passwd'),
    'path a number': index(path=5),
    'no path': index(path=None), 'device': instead(N0, lambda p: p.symlink_to('/dev/zero')),
    'pipe': instead(N0, os.mkfifo),
    'pipe as index': instead('index.parquet', os.mkfifo), 'pipe as recipe': instead('recipe.json', os.mkfifo),
    'pipe as account': instead('shards/00000.json', os.mkfifo),
    'recipe deep': bytes_of('recipe.json', b'['*100_000 + b']'*100_000),
    'recipe a list': bytes_of('recipe.json', b'[1]'),
    'recipe of a billion': text('recipe.json', '"size": 32', '"size": 1000000000'),
    'version text': text('recipe.json', '"version": 2', '"version": "2"'),
    'another size': text('recipe.json', '"size": 32', '"size": 64'),
    'size true': text('recipe.json', '"size": 32', '"size": true'),
    'two sizes': text('recipe.json', '"size": 32', '"size": 32, "size": 64'),
    'other bits': text('recipe.json', '"bits": 8', '"bits": 16'),
    'shard size': text('recipe.json', '"shard_size": 4', '"shard_size": "4"'),
    'format': text('recipe.json', '"format": 2', '"format": 3'), 'huge shape': npy('(10000000000, 32, 32)'),
    'other shape': npy('(4, 1024)'),
    'floats': npy('(1, 32, 32)', '<f4'), 'shape of nothing': npy('(0, 32, 32)'),
    'huge header': bytes_of(N0, b'\x93NUMPY\2\0' + struct.pack('<I', 2**31) + b'x'*100),
    'code in the header': npy('__import__("os").getpid()'),
    'account with a way out': account(sums={'../../../../etc/passwd': 'x'}),
    'account deep': bytes_of('shards/00000.json', b'['*100_000),
    'account with other types': account(files=[1]),
    'account of sums of lists': account(sums=dict.fromkeys(('.npy', '.parquet',
    '.errors.parquet'), ['x'])), 'index nonsense': bytes_of('index.parquet', b'PAR1' + b'\0'*100 + b'PAR1')}
OF_NOW = {'another patient': index(patient_id='P'),
    'another image': index(image_id=[f'x{i}' for i in range(12)]),
    'another contrast': text('recipe.json', '"high": 99.5', '"high": 90.0'), 'errors': lambda d: pd.DataFrame(
    {'path': ['x'], 'cause': ['y'], 'remedy': ['']}).to_parquet(d/'errors.parquet'),
    'sums a list': bytes_of('sums.json', b'[]'),
    'sums deep': bytes_of('sums.json', b'['*100_000), 'sums of nothing': bytes_of('sums.json', b'{}'),
    'affine': index(affine=[[0.]*9]*12)}


def look(d: Path):
    with at_once(), pytest.raises(StoreError) as e:
        s = ImageStore(d)
        for i in range(len(s)): s[i]
    assert e.value.remedy and not (d/'ran').exists()


@pytest.mark.parametrize('name', STORES)
def test_a_store_that_was_changed(store, name):
    STORES[name](store)
    look(store)


@pytest.mark.parametrize('name', OF_NOW)
def test_what_the_sums_of_a_store_tell(whole, tmp_path, name):
    d = Path(shutil.copytree(whole[0]/'new', tmp_path/'store'))
    OF_NOW[name](d)
    look(d)


def test_a_changed_store_is_listed_and_mended(whole, tmp_path):
    "`verify` tells what is wrong with it, and the same call mends it."
    d = Path(shutil.copytree(whole[0]/'new', tmp_path/'store'))
    for change, file in ((flipped, N0), (swap('.npy'), N0), (index(patient_id='P'), 'index.parquet'),
            (lambda d: (d/'shards/00002.npy').write_bytes(b'x'), 'shards/00002.npy'),
            (OF_NOW['errors'], 'sums.json')):
        change(d)
        look(d)
        faults = ImageStore(d, whole=False).verify()
        assert file in set(faults.file) and (faults.remedy!='').all()
        again = preprocess_folder(whole[1], d, Preprocess(size=32), workers=1, show=False, content=True)
        assert not len(again.verify()) and (
            np.stack(list(again))==np.stack(list(ImageStore(whole[0]/'new')))).all()
        assert read_json(d/'sums.json')==read_json(whole[0]/'new/sums.json')


def test_shards_that_change_under_a_reader(whole, tmp_path):
    "What has been looked at stays; what is looked at first after the change is refused."
    d = Path(shutil.copytree(whole[0]/'new', tmp_path/'store'))
    s = ImageStore(d)
    first = s[0].copy()
    a, b = d/'shards/00001.npy', d/'shards/00002.npy'
    a.rename(d/'x')
    b.rename(a)
    (d/'x').rename(b)
    assert (s[0]==first).all()
    for i in (4, 11):
        with pytest.raises(StoreError, match='not as it was written'): s[i]


def test_the_first_look_at_a_shard_is_quick():
    a = np.random.default_rng(0).integers(0, 256, (80, 224, 224), dtype=np.uint8) # 4 MB
    times = []
    for _ in range(7):
        start = time.perf_counter()
        quick_digest(a)
        times.append(time.perf_counter()-start)
    assert min(times)<.001*pace()


@pytest.mark.parametrize('shape', [(0, 32, 32), (1, 1, 1), (3, 7, 5), (2, 64, 64), (5, 100, 100)])
@pytest.mark.parametrize('kind', ['uint8', 'uint16'])
def test_every_byte_counts(shape, kind):
    a = np.random.default_rng(1).integers(0, 256, shape).astype(kind)
    digest = quick_digest(a)
    assert quick_digest(a.copy())==digest
    for at in np.random.default_rng(2).integers(0, max(a.nbytes, 1), 20 if a.nbytes else 0):
        b = a.copy()
        b.reshape(-1).view(np.uint8)[at] ^= 1 << int(at)%8
        assert quick_digest(b)!=digest
    if len(a)>1: assert quick_digest(a[::-1].copy())!=digest


def test_a_recipe_of_another_kind():
    good = Preprocess(size=64).to_dict()
    for bad in ([1], None, 'knee', 5, {'version': None}, {1: 2}, good | {'mm': math.nan},
            good | {'clip': math.inf},
            good | {'version': 2.}, good | {'version': True}, good | {'name': 5}, good | {'bits': 8.},
            good | {'knee': 1}):
        with at_once(), pytest.raises(StoreError): Preprocess.from_dict(bad)


def test_a_begun_store_of_another_kind(tmp_path):
    (tmp_path/'recipe.json').write_text('['*100_000)
    with at_once(), pytest.raises(StoreError, match='damaged'): ShardWriter(tmp_path, 'plain').begin(9)


# ---- checkpoints and other files of the library --------------------------------------------------------------------

@pytest.fixture
def checkpoint(tmp_path):
    gen = torch.Generator().manual_seed(0)
    state = dict(model={'w': torch.randn(30, 7, generator=gen), 'n': torch.tensor(3)}, phase=1,
        best=(-math.inf, math.nan),
        moments=[torch.randn(30, 7, generator=gen).bfloat16(), torch.zeros(0)])
    write_checkpoint(tmp_path/'checkpoint.safetensors', state)
    return tmp_path/'checkpoint.safetensors', state


def test_a_bit_of_a_checkpoint(checkpoint):
    "Wherever it flips, in the header or in the numbers."
    path, state = checkpoint
    assert torch.equal(read_checkpoint(path)['model']['w'], state['model']['w'])
    data = path.read_bytes()
    for at in np.unique(np.linspace(0, len(data)-1, 300).astype(int)):
        changed = bytearray(data)
        changed[at] ^= 1 << int(at)%7
        path.write_bytes(changed)
        try: back = read_checkpoint(path)
        except ModelError as e: assert e.remedy
        else: # padding of the header is nobody's
            assert chr(data[at])==' ' and back['best'][0]==-math.inf
            assert all(torch.equal(v, state['model'][k]) for k,v in back['model'].items())


def test_a_training_does_not_go_on_from_a_flipped_bit(tmp_path):
    "A bit of the weights, after the run was cut off in its second epoch."
    with pytest.raises(KeyboardInterrupt):
        learner([Cut()], []).fit_two_phase(2, checkpoint=tmp_path/'run', every=2)
    file = tmp_path/'run/checkpoint.safetensors'
    data = bytearray(file.read_bytes())
    n = struct.unpack('<Q', data[:8])[0]
    at = json.loads(data[8:8+n])['model.body.3.weight']['data_offsets'][0]
    data[8+n+at+2] ^= 64
    file.write_bytes(data)
    with pytest.raises(ModelError, match='damaged'):
        learner([], []).fit_two_phase(2, checkpoint=tmp_path/'run', every=2)


class Cut(Callback):
    order,watches,steps = 95,True,0
    def after_batch(self):
        self.steps += int(self.training)
        if self.steps==11: raise KeyboardInterrupt


def test_checkpoints_that_are_something_else(checkpoint, tmp_path):
    path, _ = checkpoint
    for told in ({'radiology_ai': '{}'}, {'sha256': 'x', 'radiology_ai': '['*100_000}, {'sha256': 'x'}, None):
        save_file({'a': torch.ones(1)}, path, metadata=told)
        with at_once(), pytest.raises(ModelError, match='damaged'): read_checkpoint(path)
    for make in (os.mkfifo, lambda p: p.symlink_to('/dev/zero'),
            lambda p: p.write_bytes(pickle.dumps(Evil(tmp_path/'ran')))):
        path.unlink()
        make(path)
        with at_once(), pytest.raises(ModelError, match='damaged'): read_checkpoint(path)
    assert not (tmp_path/'ran').exists()


class Learn:
    "What `save_body` asks of a learner."
    def __init__(self): self.model = nn.Module()


def test_the_body_of_a_self_supervised_training(tmp_path):
    learn, path = Learn(), tmp_path/'body.safetensors'
    learn.model.body = create_backbone('test_resnet', pretrained=False)[0]
    save_body(learn, path)
    assert create_backbone('test_resnet', weights=path)[0].pretrained
    data = bytearray(path.read_bytes())
    data[-7] ^= 16
    path.write_bytes(data)
    with at_once(), pytest.raises(ModelError, match='not as it was written'):
        create_backbone('test_resnet', weights=path)
    with torch.no_grad(): next(learn.model.body.net.parameters()).fill_(math.nan)
    with pytest.raises(ModelError, match='NaN'): save_body(learn, path)


def test_masks_of_a_store(tmp_path):
    def masks(n=2, meta='{"store": "x", "images": 2}', known=None):
        np.save(tmp_path/'masks.npy', np.zeros((n, 8, 8), np.uint8))
        np.save(tmp_path/'known.npy', np.ones(2, bool) if known is None else known)
        (tmp_path/'masks.json').write_text(meta)
        return tmp_path
    assert MaskStore(masks()).known.tolist()==[True, True]
    for args in (dict(n=3), dict(meta='['*100_000), dict(meta='[]'), dict(meta='{}'), dict(known=np.ones(2)),
            dict(known=np.ones(3, bool))):
        with at_once(), pytest.raises(StoreError, match='no masks'): MaskStore(masks(**args))
    (masks()/'masks.npy').unlink()
    os.mkfifo(tmp_path/'masks.npy')
    with at_once(), pytest.raises(StoreError, match='no masks'): MaskStore(tmp_path)


def test_records_and_recalibrations(tmp_path):
    for data in ('['*100_000, '{"radiology_ai": "run", "radiology_ai": "run"}',
            '{"radiology_ai": "run", "x": NaN}'):
        (tmp_path/'run.json').write_text(data)
        with at_once(): assert read_record(tmp_path/'run.json') is None
    deep = []
    for _ in range(50_000): deep = [deep]
    for bad in (deep, {'kind': deep}, {'kind': 'platt', 'slope': deep, 'intercept': 1., 'slope_error': 1.,
            'intercept_error': 1., 'n': 1,
            'patients': 1}, {'kind': 'temperature', 'temperature': 10**5000, 'error': 1., 'classes': 1,
            'n': 1, 'patients': 1}):
        with at_once(), pytest.raises(DataError): recalibration_from(bad)
    assert plain_digest({'a': 1})!=plain_digest({'a': 1.5})
