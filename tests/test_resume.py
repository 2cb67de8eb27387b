"""A training that is killed at any step goes on to the same weights; the same seed gives the same batches; an
exported network predicts what the trained one does."""
import math
import multiprocessing
import pickle
import random
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from radiology_ai.core import DataError, ModelError, rng
from radiology_ai.data.load import xray_dataloaders
from radiology_ai.models.backbone import XrayModel
from radiology_ai.models.bundle import load_bundle, save_bundle
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.train.checkpoint import read_checkpoint, write_checkpoint
from radiology_ai.train.learner import predict_logits, xray_learner
from radiology_ai.train.record import run_record
from radiology_ai.vision.augment import BatchAugment


class Store:
    "Images in memory with an index."
    def __init__(self, x): self.x,self.index = x,pd.DataFrame({'image_id': [f'im{i}' for i in range(len(x))]})
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]


def images(n: int=84, size: int=24):
    gen = rng(0, 'bars')
    y = np.arange(n)%3==0
    x = gen.uniform(40, 140, (n, size, size)).astype(np.uint8)
    for i in np.flatnonzero(y): x[i, (r:=gen.integers(4, 18)):r+3, 4:20] = 220
    return Store(x),pd.DataFrame(dict(image_id=[f'im{i}' for i in range(n)],
        patient_id=[f'p{i}' for i in range(n)], split=['train']*60+['valid']*24, bar=y.astype(int)))


def noise(x):
    "A transform that draws from torch's global generator."
    return ((x + .02*torch.randn_like(x)).clamp(0, 1) if torch.is_tensor(x) and x.is_floating_point()
        and x.ndim==4 else x)


def network(seed: int=0) -> nn.Module:
    "A small network with BatchNorm and dropout."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2),
            nn.BatchNorm2d(8), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.3), nn.Linear(8, 2))
    return XrayModel(body, head, {})


def learner(cbs=(), batch_tfms=None, workers=0, seed=3, **kwargs):
    store,manifest = images()
    tfms = [BatchAugment(seed=seed), noise] if batch_tfms is None else batch_tfms
    dls = xray_dataloaders(store, manifest, 'bar', bs=8, batch_tfms=tfms, seed=seed, device='cpu',
        workers=workers)
    return xray_learner(dls, network(), pretrained=False, lr=1e-2, seed=seed, cbs=list(cbs), **kwargs)


PLANS = {'one_cycle': (dict(ema=.9, clip=1., monitor='valid_loss'), dict(schedule='one_cycle')),
         'plateau': (dict(accumulate=3, precision='bf16', patience=9),
         dict(schedule='plateau', plateau=dict(patience=1, factor=.5))),
         'flat_cos': (dict(monitor=None, ema=.8), dict(schedule='flat_cos', body_div=3))}


class Count(Callback):
    "Tells another process how many steps were begun."
    order,watches = 95,True
    def __init__(self, counter): self.counter = counter
    def before_batch(self): self.counter.value += 1


def train(folder, plan, counter, workers=0):
    "A whole run, in a process of its own."
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    if workers: multiprocessing.set_start_method('fork', force=True)
    settings,how = PLANS[plan]
    learn = learner([Count(counter)], workers=workers, **settings)
    learn.fit_two_phase(3, head_epochs=1, checkpoint=folder/'run', every=2, **how)
    write_checkpoint(folder/'done', dict(model=learn.model.state_dict(), history=learn.history,
        losses=[float(v) for v in learn.recorder.losses], lrs=list(map(float, learn.recorder.lrs))))


@pytest.fixture(scope='module')
def processes():
    "Processes that start in a moment: forked from one that has imported everything and computed nothing."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['radiology_ai.train.learner', 'radiology_ai.models.bundle',
        'radiology_ai.data.load',
        'radiology_ai.vision.augment'])
    return context


def run(processes, folder, plan, kills=(), workers=0) -> tuple[dict, int]:
    "The end of a run that is killed after so many steps of each process, and the number of kills that hit."
    folder.mkdir(exist_ok=True)
    hits = 0
    for steps in (*kills, None):
        counter = processes.Value('i', 0, lock=False)
        p = processes.Process(target=train, args=(folder, plan, counter, workers))
        p.start()
        while p.is_alive() and (steps is None or counter.value<steps): time.sleep(.0005)
        if steps is not None and p.is_alive():
            p.kill()
            hits += 1
        p.join()
        if (folder/'done').exists(): break
        assert steps is not None, f'the run ended with exit code {p.exitcode}'
    return read_checkpoint(folder/'done'),hits


def same(a: dict, b: dict): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('plan', PLANS)
def test_a_killed_run_ends_with_the_same_weights(tmp_path, processes, plan):
    whole,_ = run(processes, tmp_path/'whole', plan)
    draw = random.Random(plan)
    killed,hits = run(processes, tmp_path/'killed', plan, [draw.randint(1, 12) for _ in range(5)])
    assert hits>=3
    assert same(whole['model'], killed['model'])
    assert (whole['history'], whole['losses'], whole['lrs'])==(killed['history'], killed['losses'],
        killed['lrs'])
    assert not list((tmp_path/'killed'/'run').glob('.checkpoint-*'))


def test_killed_runs_with_reading_processes(tmp_path, processes):
    whole,_ = run(processes, tmp_path/'whole', 'one_cycle')
    killed,hits = run(processes, tmp_path/'killed', 'one_cycle', [5, 7], workers=2)
    assert hits==2 and same(whole['model'], killed['model'])


@pytest.fixture
def half(tmp_path):
    "A run that an error stopped in its second epoch, after ten steps, and how to make its call again."
    class Stop(Callback):
        order,watches = 96,True
        def after_batch(self):
            if self.training and self.learn.seeded_run.batches==10: raise KeyboardInterrupt
    def go(stop=False, epochs=2, cbs=(), **kwargs):
        learn = learner([*cbs, *([Stop()] if stop else [])], **kwargs)
        learn.fit_two_phase(epochs, checkpoint=tmp_path/'run', every=1)
        return learn
    with pytest.raises(KeyboardInterrupt): go(True)
    return go


def test_resumed_in_one_process_like_a_run_without_checkpoints(half, tmp_path):
    steps = []
    class See(Callback):
        watches = True
        def before_batch(self):
            steps.append((self.training, self.epoch, self.iter))
            if self.training:
                # a reading process takes the loader, and no network with it
                assert len(pickle.dumps(self.learn.dl.fake_l))<1e6
    done = half(cbs=[See()])
    # nothing is done twice
    assert [s[1:] for s in steps if s[0]]==[(1, k) for k in range(2, len(done.dls.train))]
    plain = learner()
    plain.fit_two_phase(2)
    assert same(plain.model.state_dict(), done.model.state_dict()) and plain.history==done.history
    assert plain.recorder.hps==done.recorder.hps and len(done.recorder.losses)==2*len(done.dls.train)
    before = (tmp_path/'run/checkpoint.safetensors').read_bytes()
    again = half() # the run has ended: its result at once
    assert same(again.model.state_dict(), done.model.state_dict()) and again.history==done.history
    assert (tmp_path/'run/checkpoint.safetensors').read_bytes()==before


def test_another_run_is_refused(half, tmp_path):
    for change,what in ((dict(epochs=3), 'plan'), (dict(seed=4), 'more differ'), (dict(ema=.9), 'callbacks'),
            (dict(batch_tfms=[BatchAugment(seed=3, rotation=1)]), 'data'), (dict(wd=.01), 'wd')):
        with pytest.raises(ModelError, match=f'holds another run: .*{what}'): half(**change)
    learn = learner()
    learn.dls.train_ds.targets[5] = 1 - learn.dls.train_ds.targets[5]
    with pytest.raises(ModelError, match='another run: targets'):
        learn.fit_two_phase(2, checkpoint=tmp_path/'run')
    damaged = (tmp_path/'run/checkpoint.safetensors')
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ModelError, match='damaged'): half()


class Poison(Callback):
    "After so many steps the loss, or a gradient, is not a number."
    order,run_valid,watches = -60,False,True
    def __init__(self, step: int, gradient: bool=False): self.step,self.gradient = step,gradient
    def after_loss(self):
        if self.learn.seeded_run.batches==self.step and not self.gradient:
            self.learn.loss_grad = self.learn.loss_grad*math.nan
    def before_step(self):
        if self.learn.seeded_run.batches==self.step and self.gradient:
            next(self.learn.model.parameters()).grad.fill_(math.nan)


@pytest.mark.parametrize('gradient', [False, True])
def test_nan_keeps_the_last_good_checkpoint(tmp_path, gradient):
    good = learner(monitor='valid_loss')
    good.fit_two_phase(3, checkpoint=tmp_path/'good', every=1)
    bad = learner([Poison(12, gradient)], monitor='valid_loss')
    state = torch.get_rng_state()
    with pytest.raises(ModelError,
            match='no longer finite after epoch 1, batch [0-9]+; .* holds the last good state' if gradient
            else r'^The loss became .* in epoch 1, batch 4 \(images im'):
        bad.fit_two_phase(3, checkpoint=tmp_path/'bad', every=1)
    assert torch.equal(state, torch.get_rng_state())
    kept = read_checkpoint(tmp_path/'bad/checkpoint.safetensors')
    assert kept['position']==[1, 4] and all(torch.isfinite(v).all() for v in kept['model'].values())
    # the Learner has the best epoch's weights if its own are lost
    assert all(torch.isfinite(v).all() for v in bad.model.state_dict().values())
    healed = learner(monitor='valid_loss')
    healed.fit_two_phase(3, checkpoint=tmp_path/'bad', every=1)
    assert same(healed.model.state_dict(), good.model.state_dict())


def test_the_batch_of_a_nan_loss_is_named_after_a_resume(half):
    learn = learner()
    rows = list(learn.dls.train.sampler.set_epoch(1))[5]
    names = ', '.join(f'im{learn.dls.train_ds.items.image_id.iloc[r][2:]}' for r in rows)
    with pytest.raises(ModelError, match=rf'in epoch 1, batch 5 \(images {names}\)'): half(cbs=[Poison(13)])


def test_same_seed_same_batches():
    def batches(seed, disturb):
        seen = []
        class See(Callback):
            def after_pred(self):
                if self.training:
                    seen.append((self.learn.x.clone(), self.learn.y.clone(),
                        self.learn.pred.detach().clone()))
        learn = learner([See()], seed=seed)
        if disturb: torch.rand(3), np.random.rand(3), learn.dls.one_batch()
        learn.fit_two_phase(2)
        return seen
    first,second,other = batches(3, False),batches(3, True),batches(4, False)
    assert len(first)==16 and all(torch.equal(a, b) for s,t in zip(first, second) for a,b in zip(s, t))
    assert not torch.equal(first[0][0], other[0][0]) and not torch.equal(first[0][0], first[8][0])


def test_export_and_reload_predict_the_same(tmp_path):
    store,manifest = images(size=32)
    dls = xray_dataloaders(store, manifest, 'bar', bs=8, device='cpu')
    learn = xray_learner(dls, 'test_resnet', pretrained=False, lr=1e-2, ema=.9)
    learn.fit_two_phase(1, checkpoint=tmp_path/'run')
    logits,_ = predict_logits(learn, dls.valid)
    bundle = load_bundle(save_bundle(learn, tmp_path/'bundle', recipe('knee', size=32), dls.vocab,
        task='bar'))
    own = predict_logits(bundle.model, dls.valid)[0]
    assert np.array_equal(own, logits) and np.array_equal(np.concatenate([bundle.logits(x)
        for x,_ in dls.valid]), logits)
    record = run_record(learn, data='bars')
    assert record['split_hash']==run_record(learn)['split_hash'] and record['plan']['epochs']==1 and record[
        'settings']['ema']==.9 and record['curves']==learn.history
    assert bundle.meta['training']['data_hash']==record['data_hash']


def test_bad_input_names_its_images():
    def fit(change=lambda x, m: None, vocab=None, tfms=(), **kwargs):
        store,manifest = images()
        change(store.x, manifest)
        dls = xray_dataloaders(store, manifest, 'bar', bs=8, batch_tfms=list(tfms), device='cpu')
        if vocab: dls.train_ds.targets[4] = 7
        xray_learner(dls, network(), pretrained=False, **kwargs).fit_two_phase(1)
    def black(x, m): x[11] = 0
    with pytest.raises(DataError, match=r'^All pixels of an image are 0 \(images im11\)'): fit(black)
    with pytest.raises(DataError, match=r'^A label is 7, which is not one of the 2 classes \(images im4\)'):
        fit(vocab=True)
    with pytest.raises(DataError, match=r'^The pixels of a batch reach from .* \(images im'):
        fit(tfms=[lambda b: (b[0]*255, *b[1:]) if isinstance(b, tuple) else b*255])
    with pytest.raises(ModelError, match="'fp8'"): fit(precision='fp8')
    with pytest.raises(ModelError, match="'f1' is not recorded"): fit(monitor='f1')


def test_an_error_leaves_nothing_switched_on():
    class Raise(Callback):
        order = 20
        def before_batch(self):
            if self.iter==2: raise DataError('Stopped here', 'Go on')
    learn = learner([Raise()], precision='bf16', ema=.9)
    transforms = list(learn.dls.train.after_batch.fs)
    with pytest.raises(DataError, match='^Stopped here. Go on$'): learn.fit_two_phase(1)
    assert not torch.is_autocast_enabled('cpu') and list(learn.dls.train.after_batch.fs)==transforms


class Masks(nn.Module):
    "A network with a map as output."
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Conv2d(1, 4, 3, padding=1),nn.Conv2d(4, 1, 1)
    def forward(self, x): return self.head(self.body(x.as_subclass(torch.Tensor)))


class MaskLoss(nn.Module):
    "Takes the mask, or the boxes and the class, as targets."
    def forward(self, pred, *targets):
        t = targets[0]
        if isinstance(t, dict): return pred.square().mean() + sum(b.sum() for b in t['boxes'])*0
        return nn.functional.binary_cross_entropy_with_logits(pred[:, 0], t.as_subclass(torch.Tensor).float())


@pytest.mark.parametrize('kind', ['masks', 'boxes', 'boxes and labels'])
def test_masks_and_boxes_train_with_a_loss(tmp_path, kind):
    store,manifest = images()
    class MaskStore:
        known = np.ones(len(store), bool)
        def check(self, store): pass
        def __getitem__(self, i): return (store[i]>200).astype(np.int64)
    boxes = pd.DataFrame([(f'im{i}', 2., 3., 9., 8.) for i in range(0, 84, 3)],
        columns=['image_id', 'x1', 'y1', 'x2', 'y2'])
    given = dict(masks=MaskStore()) if kind=='masks' else dict(boxes=boxes)
    dls = xray_dataloaders(store, manifest, 'bar' if 'labels' in kind else None, bs=8, device='cpu',
        undrawn='empty', **given)
    if kind!='masks':
        with pytest.raises(ModelError, match='no loss'): xray_learner(dls, Masks())
    torch.manual_seed(0)
    learn = xray_learner(dls, Masks(), MaskLoss(), lr=1e-2)
    learn.fit_two_phase(2, checkpoint=tmp_path/'run')
    assert learn.history[-1]['valid_loss']<learn.history[0]['valid_loss'] or kind!='masks'
    assert predict_logits(learn, dls.valid)[0].shape[0]==24


def test_views_of_a_study_are_channels():
    store,manifest = images()
    studies = manifest.assign(study_id=[f's{i//2}' for i in range(84)],
        patient_id=[f's{i//2}' for i in range(84)], view=['PA', 'LATERAL']*42, bar=np.arange(84)//2%2)
    dls = xray_dataloaders(store, studies, 'bar', bs=8, views=['PA', 'LATERAL'], device='cpu')
    learn = xray_learner(dls, 'test_resnet', pretrained=False)
    learn.fit_two_phase(1)
    assert learn.model.config['n_in']==2 and run_record(learn)['views']==['PA', 'LATERAL']


def test_without_a_compiler_the_network_runs_uncompiled(monkeypatch):
    def broken(self, *args, **kwargs): raise RuntimeError('no C++ compiler')
    monkeypatch.setattr(nn.Module, 'compile', broken)
    with pytest.warns(UserWarning, match='uncompiled: RuntimeError: no C'): learn = learner(compile=True)
    learn.fit_two_phase(1)
    assert learn.settings['compiled'] is False
