"""A network as ONNX: the same answers without torch, for every task and stored bundle; what was changed is
refused."""
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import refuses, run_cli
from make_bundles import FOLDER

from radiology_ai.core import BundleError, DataError, MissingPackageError, ModelError, RadiologyError
from radiology_ai.models.bundle import load_bundle, save_bundle
from radiology_ai.models.detector import create_detector
from radiology_ai.models.export import onnx_difference, read_program_meta, write_onnx, write_program
from radiology_ai.models.meta import read_meta, sealed
from radiology_ai.models.onnx import OnnxNetwork, is_onnx, load_onnx, onnx_entry, onnx_parts
from radiology_ai.models.segmenter import create_segmenter
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.serve.export import export_onnx, export_program, simulated_films
from radiology_ai.serve.predict import explain, predict
from radiology_ai.tasks.pneumonia import PNEUMONIA

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
STORED = sorted(p.name for p in FOLDER.iterdir())


@pytest.fixture(scope='session')
def onnx_of(tmp_path_factory):
    "The ONNX file of a stored bundle, written once a worker, and what it tells."
    folder, made = tmp_path_factory.mktemp('onnx'), {}
    def of(name):
        if name not in made:
            with np.load(FOLDER/name/'case.npz') as f: x = f['x'][:,None]/np.float32(255)
            made[name] = folder/f'{name}.onnx', write_onnx(load_bundle(FOLDER/name), folder/f'{name}.onnx', x)
        return made[name]
    return of


@pytest.mark.parametrize('name', STORED)
def test_every_stored_bundle_answers_alike(name, onnx_of):
    if name.startswith('alignment'):
        with pytest.raises(ModelError, match='no form as ONNX'): onnx_of(name)
        return
    path, told = onnx_of(name)
    assert told['parity'] and all(v['off']<=v['most'] for v in told['parity'].values())
    with np.load(FOLDER/name/'case.npz') as f: case = dict(f)
    x, bundle = case['x'][:,None]/np.float32(255), load_onnx(path)
    out = bundle.model(x)
    kept = [out[k].reshape(len(x), -1) for k in bundle.model.names if k!='anchors']
    logits = np.concatenate(kept, 1).reshape(case['logits'].shape)
    assert np.abs(logits-case['logits']).max()<1e-4*max(1, np.abs(case['logits']).max())
    assert np.abs(bundle.model(x[1:2])[bundle.model.names[0]]-out[bundle.model.names[0]][1:2]).max()<1e-4
    own = load_bundle(FOLDER/name)
    assert (bundle.vocab, bundle.threshold, bundle.recipe, bundle.answer)==(own.vocab, own.threshold,
        own.recipe, own.answer)


def tiny(kind, folder):
    "A bundle of each kind of answer that is not among the stored ones with its thresholds."
    if kind=='boxes':
        net = create_detector('test_efficientnet', 1, pretrained=False, width=.0625, levels=(3, 4, 5), seed=5,
            n_labels=3)
        answer = PNEUMONIA.answer
        spec = {'kind': 'boxes', 'activation': 'softmax', 'classes': list(answer.classes), 'chosen': {},
            'mirror': True,
            'candidates': 40, 'decoding': {'threshold': .005, 'score': .001}}
        return save_bundle(net, folder/kind, recipe('chest', size=64), answer.vocab(None, None),
            task='pneumonia',
            threshold=.3, answer=spec)
    names = ['right_lung', 'left_lung']
    net = create_segmenter('test_efficientnet', 2, pretrained=False, width=.125, seed=3)
    return save_bundle(net, folder/kind, recipe('chest', size=64), names, task='lungs',
        answer={'kind': 'structures', 'mirror': True, 'keep': ['left_lung']})


WITHOUT_TORCH = '''import sys
from radiology_ai.serve.predict import predict
for model, out in zip(sys.argv[3::2], sys.argv[4::2]): predict(model, sys.argv[1:3], out=out, workers=1, show=False)
print([m for m in ('torch', 'fastai', 'timm', 'onnx', 'torchvision') if m in sys.modules])
'''


@pytest.fixture(scope='session')
def chests(made_once):
    from radiology_ai.phantom.hospital import simulate_chests
    root = made_once('export_chests', lambda root: simulate_chests(root, n=2, seed=3, size=128, workers=1))
    return sorted(str(p) for p in root.rglob('*.dcm'))[:2]


def test_predict_needs_onnxruntime_alone_and_says_the_same(tmp_path, chests, onnx_of):
    """Of every other kind of answer than grades: the tree, masks with a label, structures, boxes; in one process that
    never sees torch."""
    models = {n: FOLDER/n for n in ('chest_vit', 'pneumothorax_efficientnet')}
    models |= {k: tiny(k, tmp_path) for k in ('boxes', 'structures')}
    x = simulated_films(recipe('chest', size=64), 2)
    for name, path in models.items(): write_onnx(load_bundle(path), tmp_path/f'{name}.onnx', x)
    words = [str(w) for name in models for w in (tmp_path/f'{name}.onnx', tmp_path/f'{name}.csv')]
    done = subprocess.run([sys.executable, '-c', WITHOUT_TORCH, *chests, *words], capture_output=True,
        text=True)
    assert done.returncode==0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1]=='[]'
    for name in models:
        ours = predict(models[name], chests, out=tmp_path/'own.csv', workers=1, show=False)
        assert len(ours)
        a, b = (pd.read_csv(tmp_path/f) for f in ('own.csv', f'{name}.csv'))
        assert list(a)==list(b) and len(a)==len(b)
        for c in a:
            if c=='boxes': assert_boxes(a[c], b[c])
            elif pd.api.types.is_numeric_dtype(a[c]):
                np.testing.assert_allclose(a[c], b[c], atol=2e-5, err_msg=f'{name} {c}')
            elif not c.startswith('rle'): assert (a[c].fillna('')==b[c].fillna('')).all(), (name, c)
    table = pd.read_csv(tmp_path/'boxes.csv')
    assert table.n_boxes.max()>0


def assert_boxes(a, b):
    for one, other in zip(a.fillna('[]'), b.fillna('[]')):
        one, other = (np.array(json.loads(t), float).reshape(-1, 5) for t in (one, other))
        assert one.shape==other.shape
        if len(one): assert np.abs(one[:,:4]-other[:,:4]).max()<.05 and np.abs(one[:,4]-other[:,4]).max()<1e-4


def test_boxes_are_decoded_as_torch_decodes_them():
    import torch
    net = create_detector('test_efficientnet', 2, pretrained=False, width=.0625, levels=(3, 4, 5), seed=2,
        n_labels=2).eval()
    x = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    from radiology_ai.models.onnx import decoded_boxes
    for rules in (dict(score=.009, nms=.5, top=200, most=50), dict(score=.001, nms=1., top=50, most=50)):
        with torch.no_grad():
            raw = {k: v.numpy() for k, v in net(x).items()}
            aim = net.detect(x, **rules)
        rules = dict(rules)
        found = decoded_boxes(raw, (64, 64), **rules)
        for a, b in zip(aim, found):
            assert len(a['boxes'])==len(b['boxes'])
            np.testing.assert_allclose(b['scores'], a['scores'].numpy(), atol=1e-6)
            np.testing.assert_allclose(b['boxes'], a['boxes'].numpy(), atol=1e-3)
            assert (b['labels']==a['labels'].numpy()).all()
            np.testing.assert_allclose(b['classes'], a['classes'].numpy(), atol=1e-6)


@pytest.fixture(scope='session')
def knees(hospital):
    "Some labelled films of the shared hospital, and their labels."
    labels = pd.read_csv(hospital/'labels.csv').iloc[:16]
    return [hospital/'dicom'/p for p in labels.path], labels


def test_a_run_is_exported_and_predicts_the_same(tmp_path, run, knees):
    "The shared run, through the command line."
    films = knees[0][:4]
    done = run_cli('export', run, '--out', tmp_path/'knee.onnx', '--films', films[0], '--films', films[1])
    assert '2 given films: logits' in done.stdout and str(tmp_path/'knee.onnx') in done.stdout
    run_cli('predict', tmp_path/'knee.onnx', *films, '--out', tmp_path/'a.csv')
    a, b = pd.read_csv(tmp_path/'a.csv'), predict(run, films, workers=1, show=False)
    assert (a.call==b.call).all() and np.abs(a.score-b.score).max()<2e-6 and a.path.nunique()==4


def test_fewer_bits_and_what_they_cost(tmp_path, run, knees):
    "The figures of int8 on labels stand in the file."
    films, labels = knees
    done = export_onnx(run, tmp_path/'k8.onnx', films=films, labels=labels, precision='int8', workers=1, show=False)
    row = done.change.iloc[0]
    assert row.figure=='AUROC' and row.low<=row.change<=row.high and row.images>10
    assert any('AUROC' in line and 'change' in line for line in done.lines())
    meta = load_onnx(tmp_path/'k8.onnx').meta['onnx']
    assert meta['precision']=='int8' and meta['change'][0]['figure']=='AUROC'
    assert meta['difference']['logits']['off']>0
    export_onnx(run, tmp_path/'k16.onnx', precision='fp16')
    export_onnx(run, tmp_path/'k32.onnx')
    size = {n: os.path.getsize(tmp_path/f'k{n}.onnx') for n in (8, 16, 32)}
    assert size[8]<.5*size[32] and size[16]<.6*size[32]
    assert load_onnx(tmp_path/'k32.onnx').meta['onnx']['films']=='simulated'


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old)==1 and len(old)==len(new)
    return data.replace(old, new)


def test_what_was_changed_is_refused(tmp_path, onnx_of):
    path, _ = onnx_of('knee_resnet')
    data = path.read_bytes()
    digest, (own,) = onnx_parts(data)
    meta, body = json.loads(own), data[:len(data)-len(onnx_entry(own.decode()))]
    def refused(data, words):
        (tmp_path/'m.onnx').write_bytes(data)
        with pytest.raises(BundleError, match=words): load_onnx(tmp_path/'m.onnx')
    refused(changed(data, b'"threshold": 0.31', b'"threshold": 0.13'), 'not as it was written')
    refused(changed(data, b'"vocab": [0, 1, 2', b'"vocab": [1, 0, 2'), 'not as it was written')
    weights = bytearray(data)
    weights[len(body)//2] ^= 1
    refused(bytes(weights), 'checksum is another|damaged|no ONNX')
    refused(data[:-7], 'no ONNX file, or it is damaged')
    refused(data[:1000], 'no ONNX file|0 entries')
    refused(body, '0 entries of radiology_ai')
    refused(data + onnx_entry(own.decode()), '2 entries')
    refused(data + onnx_entry('{}').replace(b'radiology_ai', b'producer_abc'), 'checksum is another')
    assert onnx_parts(body + onnx_entry('{}'))[0]==digest
    # made anew by somebody who knows how, what it says must still be possible
    def anew(**changes): return body + onnx_entry(json.dumps(sealed(meta | changes)))
    (tmp_path/'m.onnx').write_bytes(anew())
    load_onnx(tmp_path/'m.onnx')
    for changes, words in ((dict(vocab=['a', 'b']), 'for 7 outputs'), (dict(threshold=2.), 'probability'),
            (dict(onnx=None), 'does not tell how'), (dict(onnx=meta['onnx'] | {'precision': 'int2'}),
            'does not tell how'),
            (dict(recipe={'nothing': 1}), 'recipe of m.onnx'),
            (dict(onnx=meta['onnx'] | {'sha256': '0'*64}), 'checksum'),
            (dict(network=meta['network'] | {'kind': 'segmenter'}), 'gives logits'),
            (dict(network=meta['network'] | {'kind': 'aligner'}), 'no form as ONNX'),
            (dict(network=meta['network'] | {'n_in': 3}, n_in=3), '3 channels')):
        refused(anew(**changes), words)
    no_network = b'\x08\x09' + onnx_entry(json.dumps(sealed(meta | {'onnx': meta['onnx']
        | {'sha256': onnx_parts(b'\x08\x09')[0]}})))
    refused(no_network, 'cannot be read')


def test_a_file_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    "The comparison is of the file itself: a network that gives something else is found, and nothing is left."
    call = OnnxNetwork.__call__
    def off(self, x): return {k: v + np.float32(1e-3) for k, v in call(self, x).items()}
    monkeypatch.setattr(OnnxNetwork, '__call__', off)
    for name in ('knee_resnet', 'pneumothorax_efficientnet'):
        bundle = load_bundle(FOLDER/name)
        with pytest.raises(BundleError, match=r'answers otherwise than the network: \w+ \d.*at most 1e-0'):
            write_onnx(bundle, tmp_path/'m.onnx', simulated_films(bundle.recipe, 1))
    assert not list(tmp_path.iterdir())
    z = {'logits': np.zeros((1, 2), np.float32)}
    assert onnx_difference(z, {'logits': np.full((1, 2), np.nan)}, {}, (8, 8))['logits']['off']==np.inf


def test_wrong_arguments_are_told(tmp_path, onnx_of, chests, monkeypatch):
    path, _ = onnx_of('chest_resnet')
    model = load_onnx(path).model
    for shape in ((1, 1, 32, 64), (1, 1, 65, 64), (64, 64)):
        with pytest.raises(DataError, match='the network takes 64 x 64 pixels'):
            model(np.zeros(shape, np.float32))
    bundle = load_bundle(FOLDER/'chest_vit')
    with pytest.raises(ModelError, match='cannot take images of 48 x 48 pixels'):
        write_onnx(bundle, tmp_path/'m.onnx', np.zeros((2, 1, 48, 48), np.float32))
    with pytest.raises(DataError, match='have the shape'):
        write_onnx(bundle, tmp_path/'m.onnx', np.zeros((0, 1, 64, 64)))
    with pytest.raises(DataError, match='Call it something.onnx'): export_onnx(bundle, tmp_path/'model')
    with pytest.raises(DataError, match='no films for the ranges'):
        export_onnx(bundle, tmp_path/'m.onnx', precision='int8')
    with pytest.raises(ModelError, match='precision is'):
        export_onnx(bundle, tmp_path/'m.onnx', precision='int4')
    with pytest.raises(BundleError, match='has no gradients'): explain(path, chests, tmp_path/'heat')
    assert 'Give one of them' in refuses('export', FOLDER/'knee_vit', '--out', tmp_path/'m.onnx', '--int8',
        '--fp16')
    assert 'There is no folder' in refuses('export', tmp_path/'none', '--out', tmp_path/'m.onnx')
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(MissingPackageError, match='onnxscript'): export_onnx(bundle, tmp_path/'m.onnx', dynamo=True)
    assert is_onnx('A.ONNX') and not is_onnx('a.onnx.zip') and isinstance(path, Path)


@pytest.fixture(scope='session')
def program(tmp_path_factory):
    "The archive of a stored bundle, its images and what it tells."
    path = tmp_path_factory.mktemp('program')/'chest.pt2'
    with np.load(FOLDER/'chest_resnet'/'case.npz') as f: x = f['x'][:, None]/np.float32(255)
    return path, x, write_program(load_bundle(FOLDER/'chest_resnet'), path, x)


ALONE = '''import sys, numpy as np, torch
network, x = torch.export.load(sys.argv[1]).module(), torch.from_numpy(np.load(sys.argv[2]))
np.savez(sys.argv[3], *[network(part)[0].detach().numpy() for part in (x, x[:1])])
print([m for m in sys.modules if m.startswith(('radiology_ai', 'timm', 'fastai'))])
'''


def test_a_program_of_torch_answers_alike_without_us(tmp_path, program):
    "In a process that sees torch alone, a batch and a single image; no pixel and no path of this machine is in it."
    path, x, told = program
    assert told['exporter']=='torch.export' and told['images']==len(x) and told['parity']['logits']['off']<=1e-5
    np.save(tmp_path/'x.npy', x)
    done = subprocess.run([sys.executable, '-c', ALONE, path, tmp_path/'x.npy', tmp_path/'out.npz'],
        capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode==0 and done.stdout.strip()=='[]', done.stderr[-2000:]
    wanted = load_bundle(FOLDER/'chest_resnet').logits(x)
    with np.load(tmp_path/'out.npz') as f:
        for name, aim in (('arr_0', wanted), ('arr_1', wanted[:1])): np.testing.assert_allclose(f[name], aim, atol=1e-5)
    data = path.read_bytes()
    assert x[0].tobytes()[:4096] not in data
    for place in (os.getcwd(), os.path.dirname(os.__file__), str(path.parent)): assert place.encode() not in data


def test_entries_of_a_program_are_read_without_loading_it(tmp_path, program, monkeypatch):
    import torch
    path, _, _ = program
    monkeypatch.setattr(torch, 'load', None)
    monkeypatch.setattr(torch.export, 'load', None)
    meta, own = read_program_meta(path), read_meta(FOLDER/'chest_resnet')
    assert all(meta[k]==own[k] for k in ('recipe', 'vocab', 'threshold', 'answer', 'task'))
    def refused(words, **changes):
        "An archive made anew, with other members."
        with zipfile.ZipFile(path) as f: inside = {i.filename: f.read(i) for i in f.infolist()}
        inside |= {k: v for k, v in changes.pop('members', {}).items()}
        with zipfile.ZipFile(tmp_path/'m.pt2', 'w', **changes) as f:
            for k, v in inside.items():
                if v is not None: f.writestr(k, v)
        with pytest.raises(BundleError, match=words): read_program_meta(tmp_path/'m.pt2')
    entry = next(n for n in zipfile.ZipFile(path).namelist() if n.endswith('radiology_ai.json'))
    weights = next(n for n in zipfile.ZipFile(path).namelist() if n.endswith('weight_0'))
    refused('checksum is another', members={weights: b'other'})
    refused('checksum is another', members={'archive/data/aotinductor/model/evil.so': b'code'})
    refused('no entries', members={entry: None})
    refused('no entries', members={entry: b'{'})
    refused('not as it was written', members={entry: json.dumps(meta | {'vocab': []}).encode()})
    refused('compressed', compression=zipfile.ZIP_DEFLATED)
    (tmp_path/'m.pt2').write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BundleError, match='no archive|no entries'): read_program_meta(tmp_path/'m.pt2')
    with pytest.raises(BundleError, match='no archive'): read_program_meta(tmp_path/'none.pt2')


def test_programs_from_outside_are_never_loaded(tmp_path, program):
    "What predicts takes none, and what stands there already is replaced only where it is ours."
    path, _, _ = program
    assert 'is a file' in refuses('predict', path, path, '--out', tmp_path/'a.csv')
    with pytest.raises(BundleError, match='never loaded because they can run code'): predict(path, [path])
    (tmp_path/'thesis.pt2').write_text('mine')
    with pytest.raises(RadiologyError, match='did not write it'):
        export_program(FOLDER/'chest_resnet', tmp_path/'thesis.pt2')
    with pytest.raises(DataError, match='Call it something.pt2'):
        export_program(FOLDER/'chest_resnet', tmp_path/'a.onnx')
    assert 'belong to ONNX' in refuses('export', FOLDER/'knee_vit', '--out', tmp_path/'m.pt2', '--int8')


def test_a_program_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    from radiology_ai.models import export as room
    bundle = load_bundle(FOLDER/'chest_resnet')
    monkeypatch.setattr(room, '_program', lambda *args: None)
    monkeypatch.setattr(room, '_program_network', lambda *args: lambda x: {'logits': bundle.logits(x)+np.float32(1e-3)})
    with pytest.raises(BundleError, match='The archive answers otherwise than the network: logits'):
        export_program(bundle, tmp_path/'m.pt2')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['knee_vit', 'pneumonia_efficientnet'])
def test_a_bundle_as_a_program_and_by_dynamo(name, tmp_path):
    "Both agree with torch, or nothing is written; dynamo's file says where it came from to nobody."
    with np.load(FOLDER/name/'case.npz') as f: x = f['x'][:, None]/np.float32(255)
    told = [write_program(load_bundle(FOLDER/name), tmp_path/'m.pt2', x)]
    if importlib.util.find_spec('onnxscript'):
        told.append(write_onnx(load_bundle(FOLDER/name), tmp_path/'m.onnx', x, dynamo=True))
        assert os.getcwd().encode() not in (tmp_path/'m.onnx').read_bytes()
    for one in told: assert one['parity'] and all(v['off']<=v['most'] for v in one['parity'].values())
