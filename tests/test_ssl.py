"""Self-supervised methods: losses against NumPy in float64, what each method must not get wrong, the same
weights after a kill, the way into the task."""
import copy
import math
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from torch import nn

pytest.importorskip('lightly')
from radiology_ai.core import DataError, MissingPackageError, ModelError, rng
from radiology_ai.data.load import xray_dataloaders
from radiology_ai.models.backbone import XrayModel, create_backbone, create_model
from radiology_ai.models.heads import Head
from radiology_ai.pretrain.collapse import Collapse, effective_rank, embedding_spread
from radiology_ai.pretrain.methods import METHODS, MaskedModel, Prototypes, SiameseModel, SSLLoss, method_settings
from radiology_ai.pretrain.monitor import KNN, embed, knn_probe
from radiology_ai.pretrain.ssl import SelfSupervised, pretrained_body, save_body, ssl_learner, task_model
from radiology_ai.pretrain.views import PatientBatchSampler, Views, radiograph_views, ssl_dataloaders
from radiology_ai.train.learner import xray_learner

SIDE = 32
SMALL = dict(hidden=24, dim=12, predictor=10, prototypes=9, queue=40, width=24, depth=1, heads=2)


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


class Store:
    "Images in memory with an index."
    def __init__(self, x): self.x,self.index = x,pd.DataFrame({'image_id': [f'im{i}' for i in range(len(x))]})
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]


def images(n: int=60, per_patient: int=2):
    "Bars at random places on a noisy ground; `bar` tells whether there is one."
    gen = rng(0, 'bars')
    y = np.arange(n)%2
    x = gen.uniform(20, 120, (n, SIDE, SIDE)).astype(np.uint8)
    for i in np.flatnonzero(y):
        r = gen.integers(2, 24)
        x[i, r:r+6, 4:28] = 230
    return Store(x),pd.DataFrame(dict(image_id=[f'im{i}' for i in range(n)],
        patient_id=[f'p{i//per_patient}' for i in range(n)], split=['train']*(n-16)+['valid']*16, bar=y))


@pytest.mark.parametrize('method', ['dino', 'swav'])
@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'])
def test_transformers_take_small_crops(method, name):
    store, df = images(32)
    store.x = np.repeat(np.repeat(store.x, 2, 1), 2, 2) # 64 pixels
    learn = ssl_learner(store, df, name, method, bs=8, model_args=dict(depth=1) if 'vit' in name else
        dict(depths=(1, 1), embed_dim=24, num_heads=(2, 2)),
        settings={k: v for k, v in SMALL.items() if k in METHODS[method].settings},
        dls_args=dict(device='cpu'))
    before = {k: v.clone() for k, v in learn.model.body.state_dict().items()}
    learn.fit_two_phase(1)
    assert any(not torch.equal(v, before[k]) for k, v in learn.model.body.state_dict().items())


def test_what_takes_one_size_is_refused_before_small_crops():
    store, df = images(32)
    with pytest.raises(ModelError, match='images of one size only'):
        ssl_learner(store, df, 'levit_128s', 'dino', bs=8, dls_args=dict(device='cpu'))


class Body(nn.Module):
    "A small network with BatchNorm."
    n_features,n_in,pretrained = 16,1,False
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
    def forward(self, x): return self.net(x.as_subclass(torch.Tensor)-.5)


def network(method: str='simclr', seed: int=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if method=='mae':
            return XrayModel(create_backbone('vit_tiny_patch16_224', pretrained=False, img_size=SIDE,
                patch_size=8, embed_dim=24, depth=1, num_heads=2, seed=seed)[0], Head(24, 1), {})
        return XrayModel(Body(), Head(16, 1), {})


def small(method: str, **changes) -> dict:
    return {k: v for k,v in SMALL.items() if k in METHODS[method].settings
        and (k!='queue' or method=='moco')} | changes


def learner(method: str, cbs=(), seed: int=0, bs: int=11, views=None, *, settings=None, collapse=None,
        partners=False, lr=5e-3, **kwargs):
    store,manifest = images()
    return ssl_learner(store, manifest, network(method, seed), method, bs=bs, seed=seed, views=views,
        settings=small(method, **(settings or {})), cbs=list(cbs), labels='bar', partners=partners,
        collapse=collapse,
        dls_args=dict(device='cpu'), lr=lr, **kwargs)


def model_of(method: str, n_features: int=16, **changes):
    s = method_settings(method, small(method, **changes))
    return (MaskedModel(network('mae').body, s) if method=='mae'
        else SiameseModel(network().body, n_features, method, s)),SSLLoss(method, s)


def some_views(n: int=2, n_small: int=0, b: int=8, seed: int=0) -> list:
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(b, 1, SIDE, SIDE, generator=g)
        for _ in range(n)] + [torch.rand(b, 1, 16, 16, generator=g) for _ in range(n_small)]


def equal(a: dict, b: dict) -> bool: return set(a)==set(b) and all(torch.equal(a[k], b[k]) for k in a)


# ---- losses, written from the papers

def unit(z): return z/np.linalg.norm(z, axis=-1, keepdims=True)
def log_softmax(x, axis=-1):
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def nt_xent(a, b, t):
    "SimCLR, equation 1: the mean over all 2N views; k != i in the denominator."
    z = unit(np.concatenate([a, b]))
    n,total = len(a),0.
    for i in range(2*n):
        j = (i+n)%(2*n)
        s = np.array([z[i]@z[k]/t for k in range(2*n) if k!=i])
        total += np.log(np.exp(s-s.max()).sum()) + s.max() - z[i]@z[j]/t
    return total/(2*n)


def info_nce(q, k, queue, t):
    "MoCo, equation 1: one positive, the queue's keys are the negatives."
    q,k = unit(q),unit(k)
    logits = np.concatenate([(q*k).sum(1, keepdims=True), q@queue.T], 1)/t
    return -log_softmax(logits)[:,0].mean()


def barlow(a, b, lam):
    "Barlow Twins, equation 1, with the 1e-5 that BatchNorm adds to the variance."
    norm = lambda z: (z-z.mean(0))/np.sqrt(z.var(0)+1e-5)
    c = norm(a).T@norm(b)/len(a)
    return ((1-np.diag(c))**2).sum() + lam*((c**2).sum() - (np.diag(c)**2).sum())


def vicreg(a, b, inv, var, cov):
    "VICReg, equations 1 to 6 (the variance terms of both branches are averaged, as in the authors' program)."
    v = lambda z: np.maximum(0, 1-np.sqrt(z.var(0, ddof=1)+1e-4)).mean()
    def c(z):
        m = np.cov(z.T)
        return ((m**2).sum() - (np.diag(m)**2).sum())/z.shape[1]
    return inv*((a-b)**2).mean() + var*(v(a)+v(b))/2 + cov*(c(a)+c(b))


def sinkhorn(scores, eps, rounds):
    q = np.exp(scores/eps).T
    q /= q.sum()
    for _ in range(rounds):
        q = q/q.sum(1, keepdims=True)/q.shape[0]
        q = q/q.sum(0, keepdims=True)/q.shape[1]
    return (q*q.shape[1]).T


def swav(scores, t, eps, rounds, queue=None):
    "SwAV, equations 2 and 3 with multi-crop: codes from the two whole views, predicted from all other views."
    total = 0.
    for i in (0, 1):
        code = sinkhorn(scores[i] if queue is None else np.concatenate([scores[i], queue[i]]), eps,
            rounds)[:len(scores[i])]
        total += np.mean([-(code*log_softmax(scores[v]/t)).sum(1).mean() for v in range(len(scores)) if v!=i])
    return total/2


def dino(teacher, student, centre, tt, ts):
    "DINO, algorithm 1 with multi-crop: all pairs of different views."
    terms = [-(np.exp(log_softmax((t-centre)/tt))*log_softmax(s/ts)).sum(1).mean()
        for i,t in enumerate(teacher) for v,s in enumerate(student) if i!=v]
    return np.mean(terms)


def expected(method, out, s):
    "The loss of what a model gave, by the functions above."
    n = {k: [np.asarray(t) for t in v] if isinstance(v, list) else np.asarray(v) for k,v in out.items()}
    z = n['student']
    if method=='simclr': return nt_xent(z[0], z[1], s['temperature'])
    if method=='moco':
        return (info_nce(z[0], n['target'][0], n['queue'], s['temperature']) if len(n['queue'])
            else nt_xent(z[0], n['target'][0], s['temperature']))
    if method in ('byol', 'simsiam'):
        return -((unit(z[0])*unit(n['target'][1])).sum(1).mean()
            + (unit(z[1])*unit(n['target'][0])).sum(1).mean())/2
    if method=='barlow': return barlow(z[0], z[1], s['redundancy'])
    if method=='vicreg': return vicreg(z[0], z[1], s['invariance'], s['variance'], s['covariance'])
    if method=='swav': return swav(z, s['temperature'], s['epsilon'], s['sinkhorn'], n.get('queue'))
    if method=='dino': return dino(n['target'], z, n['centre'], float(n['temperature']), s['temperature'])
    return ((z[0]-n['target'][0])**2).mean()


@pytest.mark.parametrize('method', METHODS)
def test_loss_against_numpy_in_float64(method):
    "115 random batches of each of the nine methods, of different sizes, to 1e-6."
    gen,s,worst = rng(1, method),method_settings(method, {}),0.
    loss = SSLLoss(method, s)
    for k in range(115):
        b = int(gen.integers(2, 12))
        d = int(gen.integers(2, 20))
        small_ones = int(gen.integers(0, 3)) if METHODS[method].small else 0
        draw = lambda rows=b, d=d: torch.from_numpy(gen.normal(size=(rows, d)))
        cosines = lambda rows=b, d=d: torch.from_numpy(gen.uniform(-1, 1, (rows, d)))
        out = dict(student=[(cosines if METHODS[method].prototypes else draw)() for _ in range(2+small_ones)])
        if method in ('moco', 'byol', 'simsiam', 'mae'): out['target'] = [draw() for _ in range(2)]
        if method=='moco': out['queue'] = F.normalize(draw(int(gen.integers(0, 30))), dim=1)
        if method=='swav' and k%2: out['queue'] = [cosines(7) for _ in range(2)]
        if method=='dino':
            out |= dict(target=[cosines() for _ in range(2)], centre=.1*draw(1),
                temperature=torch.tensor(.0625))
            loss = SSLLoss(method, {**s, 'prototypes': d})
        worst = max(worst, abs(float(loss(out)) - expected(method, out, s)))
    assert worst<1e-6


# ---- views

def test_views_of_an_image_differ_and_depend_on_the_batch_alone():
    x = torch.rand(4, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    views = Views(2, 2, seed=3)
    first,again,following,other = views(x, 5),Views(2, 2, seed=3)(x, 5),views(x, 6),Views(2, 2, seed=4)(x, 5)
    assert [tuple(v.shape) for v in first]==[(4, 1, SIDE, SIDE)]*2 + [(4, 1, 16, 16)]*2
    assert all(torch.equal(a, b) for a,b in zip(first, again))
    for a,b in [*zip(first, following), *zip(first, other), (first[0], first[1]), (first[2], first[3]),
            (first[0], x), (first[1], x)]:
        assert ((a-b).abs().amax((1, 2, 3))>.05).all()


def test_both_views_of_a_training_are_changed_and_different():
    seen = []
    class Look(Callback):
        order = 6
        def before_batch(self):
            if self.training: seen.append((self.learn.images.clone(), *self.learn.xb[0]))
    learner('simclr', [Look()]).fit_two_phase(2)
    assert len(seen)==8
    for x,a,b in seen: assert not torch.equal(a, b) and not torch.equal(a, x) and not torch.equal(b, x)
    assert not any(torch.equal(seen[i][1], seen[j][1]) for i in range(8) for j in range(i))


def test_no_mirror_where_sides_matter():
    with pytest.raises(DataError, match='Left and right differ'): radiograph_views(flip=.5, anatomy='CHEST')
    assert not Views().big.draw(64, torch.Generator().manual_seed(0)).flip.any()
    assert radiograph_views(flip=.5).draw(64, torch.Generator().manual_seed(0)).flip.any()


def test_partners_are_two_images_of_one_patient():
    store,manifest = images()
    patient = (np.arange(60)//2).astype(np.uint8)
    # the grey value tells patient and image
    store.x[:] = (patient[:,None,None]*4 + np.arange(60)[:,None,None]%2*2 + 20)
    store.x[:,:4] += 1
    manifest.loc[manifest.index[-1], 'patient_id'] = 'alone'
    dls = ssl_dataloaders(store, manifest, bs=6, partners=True, device='cpu')
    still = radiograph_views(0, crop=(.9, 1.))
    for x,_ in dls.train:
        a,b = ((v.amax((1, 2, 3))*255).round().int() for v in Views(2, big=still, partners=True)(x, 0))
        assert ((a-21)//4==(b-21)//4).all() and (a!=b).all() # the same patient, another image
        # nobody twice: no film of his counts as a stranger's
        assert len(set(((a-21)//4).tolist()))==6


def test_partners_in_training_and_one_image_in_validation():
    seen = []
    class Look(Callback):
        order = 6
        def before_batch(self):
            seen.append((self.training, len(self.learn.images), [len(v) for v in self.learn.xb[0]]))
    store,manifest = images()
    still = Views(2, big=radiograph_views(0, crop=(.98, 1.)), partners=True)
    learn = ssl_learner(store, manifest.drop(index=59), network(), 'simclr', bs=6, partners=True, views=still,
        settings=small('simclr'), cbs=[Look()], dls_args=dict(device='cpu'))
    learn.fit_two_phase(1)
    assert [s for s in seen if s[0]]==[(True, 12, [6, 6])]*3 and [s[1:] for s in seen
        if not s[0]]==[(6, [6, 6]), (6, [6, 6]), (3, [3, 3])]
    x,_ = next(iter(learn.dls.valid))
    a,b = still(x, -1, partners=False)
    assert (a-b).abs().mean()<.1<(a-b.flip(0)).abs().mean()


def test_callback_alone_turns_a_learner_into_a_method():
    store,manifest = images()
    dls = ssl_dataloaders(store, manifest, bs=11, device='cpu')
    model = network()
    body = model.body
    learn = xray_learner(dls, model, monitor=None, cbs=SelfSupervised('vicreg', **small('vicreg')))
    before = copy.deepcopy(body.state_dict())
    learn.fit_two_phase(1)
    assert learn.model.body is body and not equal(before,
        body.state_dict()) and list(learn.history[0])[2:]==['train_loss', 'valid_loss']
    late = xray_learner(dls, network(), monitor=None, metrics=[])
    with pytest.raises(ModelError, match='Pass it as cbs'): late.fit(1, cbs=SelfSupervised('vicreg'))


def test_partner_is_the_same_image_where_there_is_no_other():
    s = PatientBatchSampler(['a', 'b', 'b'], 2, seed=0)
    rows = s.batches(0)[0]
    assert sorted([rows[0]==rows[2], rows[1]==rows[3]])==[False, True]


# ---- SimCLR

def test_simclr_does_not_count_an_image_as_its_own_negative():
    z = torch.eye(4, dtype=torch.float64)
    loss = float(SSLLoss('simclr', method_settings('simclr', dict(temperature=1.)))(dict(student=[z, z])))
    # the partner and six others, not itself (which would make 2e + 6)
    assert loss==pytest.approx(-1 + math.log(math.e + 6))


def test_simclr_both_views_are_positives_of_each_other():
    a,b = (v.requires_grad_() for v in torch.randn(2, 6, 5, dtype=torch.float64,
        generator=torch.Generator().manual_seed(0)))
    loss = SSLLoss('simclr', method_settings('simclr', {}))
    one,other = loss(dict(student=[a, b])),loss(dict(student=[b, a]))
    assert one.item()==pytest.approx(other.item(), abs=1e-12)
    one.backward()
    assert a.grad.abs().min()>0 and b.grad.abs().min()>0


def test_batchnorm_sees_both_views_together_where_the_paper_says_so():
    for method,joint in (('simclr', True), ('barlow', False)):
        model,_ = model_of(method)
        bn,before = model.body.net[1],int(model.body.net[1].num_batches_tracked)
        model(some_views())
        assert int(bn.num_batches_tracked)-before==(1 if joint else 2)


# ---- MoCo

class Watch(Callback):
    "The queue before each training batch, the keys, and the queue after it."
    order = 30
    def __init__(self): self.before,self.keys,self.valid = [],[],[]
    def after_pred(self):
        if not self.training: return self.valid.append(self.learn.model.queue.held())
        self.before.append(self.learn.pred['queue'].clone())
        self.keys.append(F.normalize(self.learn.pred['target'][0], dim=1).clone())


def test_moco_queue_holds_keys_of_earlier_batches_only():
    w = Watch()
    learn = learner('moco', [w])
    learn.fit_two_phase(3)
    assert len(w.keys)==12 and len(w.before[0])==0
    for k in range(1, 12):
        earlier = torch.cat(w.keys[:k])[-40:]
        match = (w.before[k][:,None]==earlier[None]).all(2)
        # the last 40 keys, and nothing else
        assert len(w.before[k])==len(earlier) and match.any(0).all() and match.any(1).all()
        assert not (w.before[k][:,None]==w.keys[k][None]).all(2).any()
    # validation leaves it alone
    assert all(torch.equal(w.valid[0], v) for v in w.valid[:2]) and not w.keys[0].requires_grad


def test_moco_asks_one_view_and_answers_with_the_other():
    model,_ = model_of('moco')
    model.eval()
    a,b = some_views()
    out,swapped = model([a, b]),model([b, a])
    assert torch.allclose(model.head['projector'](model.body(a).mean((2, 3))), out['student'][0], atol=1e-6)
    # an untrained teacher is the student
    assert torch.allclose(out['target'][0], swapped['student'][0], atol=1e-6)
    assert len(out['student'])==len(out['target'])==1


@pytest.mark.parametrize('method', ['moco', 'byol', 'dino'])
def test_teacher_follows_by_the_schedule_without_gradient(method):
    "The teacher's weights against a moving average in float64, from the student's weights after each step."
    trace = []
    class Trace(Callback):
        order = 40
        def before_fit(self): trace.append((0., flat(self.learn.model)))
        def after_step(self): trace.append((float(self.learn.pct_train), flat(self.learn.model)))
    parts = lambda m: {'body': m.body, **m.head}
    flat = lambda m: {k: torch.cat([p.detach().double().ravel() for p in parts(m)[k].parameters()])
        for k in m.teacher}
    learn = learner(method, [Trace()], settings=dict(momentum=.8))
    start = {k: torch.cat([p.double().ravel() for p in v.parameters()])
        for k,v in learn.model.teacher.items()}
    optimised = {id(p) for group in learn.splitter(learn.model) for p in group}
    learn.fit_two_phase(2)
    mean = start
    for progress,student in trace[1:]:
        m = 1 - .2*(math.cos(math.pi*progress)+1)/2
        mean = {k: m*mean[k] + (1-m)*student[k] for k in mean}
    for k,v in learn.model.teacher.items():
        assert torch.allclose(torch.cat([p.double().ravel() for p in v.parameters()]), mean[k], atol=1e-5)
        assert all(not p.requires_grad and p.grad is None and id(p) not in optimised for p in v.parameters())
    assert not torch.allclose(mean['body'], trace[-1][1]['body'], atol=1e-4)


def test_momentum_rises_along_a_cosine_to_one():
    cb = SelfSupervised('byol', momentum=.9)
    assert [round(cb.momentum(p), 12) for p in (0, .5, 1, 1.2)]==[.9, .95, 1., 1.]
    assert cb.momentum(.25)==pytest.approx(1 - .1*(math.cos(math.pi/4)+1)/2)


def test_teacher_follows_once_a_step_with_accumulated_batches():
    moves = []
    class Count(Callback):
        order = -30
        def before_batch(self):
            if self.training: moves.append(next(self.learn.model.teacher['body'].parameters()).clone())
    learn = learner('byol', [Count()], accumulate=2, settings=dict(momentum=.5))
    learn.fit_two_phase(1)
    assert learn.self_supervised.steps==2 and learn.self_supervised.batches==4
    assert torch.equal(moves[0], moves[1]) and not torch.equal(moves[1], moves[2]) and torch.equal(moves[2],
        moves[3])


# ---- BYOL and SimSiam

@pytest.mark.parametrize('method', ['byol', 'simsiam'])
def test_no_gradient_through_the_target(method):
    "The gradient is that of a loss whose targets are constants; letting it through would change it."
    model,loss = model_of(method)
    model.double()
    views = [v.double() for v in some_views()]
    out = model(views)
    loss(out).backward()
    grads = {k: p.grad.clone() for k,p in model.named_parameters() if p.grad is not None}
    def again(through):
        model.zero_grad()
        z = [model.head['projector'](model.body(v).mean((2, 3))) for v in views]
        p = [model.head['predictor'](v) for v in z]
        t = z if through else [torch.from_numpy(v.detach().numpy().copy()) for v in out['target']]
        (-(F.cosine_similarity(p[0], t[1]).mean() + F.cosine_similarity(p[1], t[0]).mean())/2).backward()
        return {k: q.grad.clone() for k,q in model.named_parameters() if q.grad is not None}
    same,leaky = again(False),again(True)
    assert all(torch.allclose(grads[k], same[k], atol=1e-9) for k in grads)
    assert any(not torch.allclose(grads[k], leaky[k], atol=1e-6) for k in grads)


@pytest.mark.parametrize('method', ['byol', 'simsiam'])
def test_both_views_are_asked(method):
    model,loss = model_of(method)
    model.eval().double()
    a,b = (v.double() for v in some_views())
    assert float(loss(model([a, b])).detach())==pytest.approx(float(loss(model([b, a])).detach()), abs=1e-12)
    out = model([a, b])
    half = lambda p, t: float(-F.cosine_similarity(p, t).mean().detach())
    # so one direction alone is another loss
    assert half(out['student'][0], out['target'][1])!=pytest.approx(half(out['student'][1], out['target'][0]),
        abs=1e-6)


# ---- SwAV and DINO

def test_prototypes_have_length_one_whatever_the_optimizer_does():
    p = Prototypes(6, 5)
    z = torch.randn(40, 6)
    with torch.no_grad():
        before = p(z)
        p.weight *= 30
    assert torch.allclose(p(7*z), before, atol=1e-5) and before.abs().max()<=1+1e-6
    assert torch.allclose(p(p.weight).diagonal(), torch.ones(5), atol=1e-6)


@pytest.mark.parametrize('method,freeze', [('swav', None), ('swav', 2), ('dino', 3)])
def test_prototypes_are_frozen_in_the_first_steps(method, freeze):
    seen = []
    class Look(Callback):
        order = 70
        def after_step(self): seen.append(self.learn.model.head['prototypes'].weight.detach().clone())
    learn = learner(method, [Look()], settings=dict(freeze=freeze), wd=.1)
    start = learn.model.head['prototypes'].weight.detach().clone()
    learn.fit_two_phase(2)
    n = 4 if freeze is None else freeze # an epoch has four steps
    # not even by weight decay
    assert all(torch.equal(w, start) for w in seen[:n]) and not torch.equal(seen[n], start)


def test_sinkhorn_shares_the_images_among_the_prototypes():
    from lightly.loss.swav_loss import sinkhorn as theirs
    scores = torch.from_numpy(rng(0, 'scores').uniform(-1, 1, (24, 6)))
    q = theirs(scores, iterations=50, epsilon=.2)
    assert torch.allclose(q.sum(1), torch.ones(24, dtype=q.dtype)) and torch.allclose(q.sum(0),
        torch.full((6,), 4., dtype=q.dtype), atol=1e-6)
    assert np.allclose(theirs(scores, iterations=3, epsilon=.05), sinkhorn(scores.numpy(), .05, 3),
        atol=1e-12)
    assert not theirs(scores.clone().requires_grad_()).requires_grad


def test_swav_queue_takes_the_embeddings_of_both_whole_views():
    learn = learner('swav', settings=dict(queue=30))
    learn.fit_two_phase(1)
    assert len(learn.model.queue)==30 and learn.model.queue.rows.shape==(30, 24)
    learn.model.eval()
    out = learn.model(some_views(2, 2))
    assert [tuple(v.shape) for v in out['queue']]==[(30, 9)]*2 and len(out['student'])==4
    assert torch.allclose(out['queue'][1], learn.model.head['prototypes'](learn.model.queue.held()[:,12:]))


def test_small_crops_ask_the_teacher_about_whole_views_only():
    model,_ = model_of('dino')
    calls = []
    model.teacher['body'].register_forward_hook(lambda m, x, y: calls.append(tuple(x[0].shape)))
    out = model(some_views(2, 3))
    assert calls==[(16, 1, SIDE, SIDE)] and len(out['student'])==5 and len(out['target'])==2


def test_dino_centre_follows_the_teacher_in_training_only():
    seen = []
    class Look(Callback):
        order = 40
        def after_loss(self):
            seen.append((self.training, self.learn.model.centre.clone(),
                torch.cat(self.learn.pred['target']).mean(0, keepdim=True),
                self.learn.pred['centre'].clone()))
    learner('dino', [Look()]).fit_two_phase(2)
    centre = torch.zeros(1, 9)
    for training,after,answers,used in seen:
        assert torch.allclose(used, centre, atol=1e-6) # the loss used the centre of the batches before
        if training: centre = .9*centre + .1*answers
        assert torch.allclose(after, centre, atol=1e-6)
    assert centre.abs().max()>0 and sum(t for t,*_ in seen)==8


def test_dino_teacher_temperature_warms_up():
    model,_ = model_of('dino', warmup=.4, teacher_start=.04, teacher_end=.08)
    for progress,want in ((0, .04), (.2, .06), (.4, .08), (1, .08)):
        model.elapsed = progress
        assert model.teacher_temperature()==pytest.approx(want)
    seen = []
    class Look(Callback):
        order = 40
        def after_pred(self):
            if self.training: seen.append(float(self.learn.pred['temperature']))
    learner('dino', [Look()], settings=dict(warmup=.5, teacher_start=.04, teacher_end=.08)).fit_two_phase(2)
    assert seen==pytest.approx([.04, .05, .06, .07, .08, .08, .08, .08])


# ---- Barlow Twins and VICReg

def test_barlow_normalises_each_component_over_the_batch():
    a,b = torch.randn(2, 30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = SSLLoss('barlow', method_settings('barlow', {}))
    moved = loss(dict(student=[a*torch.tensor([1., 2, 3, 4, 5, 6]) + 9, b*7 - 2]))
    assert float(loss(dict(student=[a, b])))==pytest.approx(float(moved), abs=1e-3)
    assert float(loss(dict(student=[a, a])))<float(loss(dict(student=[a, b])))/2


def test_vicreg_has_three_terms():
    a,b = (2*rng(0, 'v').normal(size=(2, 12, 5))).astype(float)/3
    terms = dict(invariance=(1, 0, 0), variance=(0, 1, 0), covariance=(0, 0, 1))
    got = {k: float(SSLLoss('vicreg', method_settings('vicreg',
        dict(zip(terms, w))))(dict(student=[torch.from_numpy(a), torch.from_numpy(b)])))
        for k,w in terms.items()}
    assert got['invariance']==pytest.approx(((a-b)**2).mean(), abs=1e-9)
    assert all(got[k]==pytest.approx(vicreg(a, b, *w), abs=1e-9) and got[k]>0 for k,w in terms.items())


# ---- MAE

@pytest.mark.parametrize('share', [.5, .75, .9])
def test_mae_hides_exactly_the_share(share):
    body = create_backbone('vit_tiny_patch16_224', pretrained=False, img_size=40, patch_size=4, embed_dim=8,
        depth=1, num_heads=2)[0]
    model = MaskedModel(body, method_settings('mae', small('mae', share=share)))
    out = model([torch.rand(3, 1, 40, 40)])
    assert out['hidden'].shape==(3, round(100*share)) and all(len(set(r.tolist()))==round(100*share)
        for r in out['hidden'])
    assert out['student'][0].shape==out['target'][0].shape==(3, round(100*share), 16)
    assert not torch.equal(out['hidden'][0].sort()[0], out['hidden'][1].sort()[0]) # each image its own


def test_mae_encoder_sees_nothing_of_what_is_hidden_and_the_loss_nothing_else():
    model,loss = model_of('mae')
    model.eval()
    x = torch.rand(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    def run(x):
        torch.manual_seed(5)
        return model([x])
    out = run(x)
    hide,show = x.clone(),x.clone()
    mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, out['hidden'], True).reshape(2, 1, 4,
        4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    hide[mask],show[~mask] = torch.rand(int(mask.sum())),torch.rand(int((~mask).sum()))
    a,b = run(hide),run(show)
    assert torch.equal(a['embedding'], out['embedding']) and torch.equal(a['student'][0],
        out['student'][0]) and not torch.equal(a['target'][0], out['target'][0])
    assert torch.equal(b['target'][0], out['target'][0]) and not torch.allclose(b['embedding'],
        out['embedding'])
    assert torch.allclose(out['target'][0].mean(2), torch.zeros(2, 12),
        atol=1e-5) and torch.allclose(out['target'][0].var(2), torch.ones(2, 12), atol=1e-2)


def test_mae_encoder_is_the_body():
    "With nothing hidden its tokens are those of the body."
    model,_ = model_of('mae')
    model.eval()
    x = torch.rand(2, 1, SIDE, SIDE)
    kept = torch.arange(16).expand(2, 16)
    tokens = model.encode((x-model.body.mean)/model.body.std, kept)[:,model.prefix:]
    assert torch.allclose(tokens.transpose(1, 2).reshape(2, 24, 4, 4), model.body(x), atol=1e-5)


def test_mae_fixed_positions_are_not_trained():
    learn = learner('mae')
    before = learn.model.head['decoder'].pos_embed.clone()
    learn.fit_two_phase(1)
    assert torch.equal(learn.model.head['decoder'].pos_embed, before) and before.abs().max()>.5


# ---- the training around it

class Kill(Callback):
    "An error before the n-th training batch."
    order,watches = 95,True
    def __init__(self, n): self.n = n
    def before_batch(self):
        self.n -= self.training
        if self.n<0: raise KeyboardInterrupt


@pytest.mark.parametrize('method,kwargs', [('moco', dict(ema=.9)), ('byol', dict(accumulate=2)),
    ('swav', dict(settings=dict(queue=30, freeze=3))), ('dino', dict(precision='bf16', clip=3.)), ('mae', {}),
    ('simclr', {})])
def test_killed_and_resumed_gives_the_same_weights(method, kwargs, tmp_path):
    whole = learner(method, collapse=Collapse(), **copy.deepcopy(kwargs))
    whole.fit_two_phase(3)
    with pytest.raises(KeyboardInterrupt):
        learner(method, [Kill(6)], collapse=Collapse(), **copy.deepcopy(kwargs)).fit_two_phase(3,
            checkpoint=tmp_path, every=1)
    again = learner(method, collapse=Collapse(), **copy.deepcopy(kwargs))
    again.fit_two_phase(3, checkpoint=tmp_path, every=1)
    assert again.self_supervised.batches==12 and equal(whole.model.state_dict(),
        again.model.state_dict()) and whole.history==again.history
    names = set(again.model.state_dict())
    for key,there in (('teacher.body', method in ('moco', 'byol', 'dino')),
            ('queue.rows', method in ('moco', 'swav')), ('centre', method=='dino'),
            ('head.prototypes', method in ('swav', 'dino'))):
        assert any(n.startswith(key) for n in names)==there


def test_rate_finder_leaves_no_trace(tmp_path):
    learn = learner('moco')
    learn.path,before = tmp_path,{k: v.clone() for k,v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)
    assert equal(before, learn.model.state_dict()) and (learn.self_supervised.batches,
        learn.self_supervised.steps, len(learn.model.queue))==(0, 0, 0)


def test_other_settings_are_another_run(tmp_path):
    learner('simclr').fit_two_phase(1, checkpoint=tmp_path)
    with pytest.raises(ModelError, match='holds another run'):
        learner('simclr', settings=dict(temperature=.3)).fit_two_phase(1, checkpoint=tmp_path)


def test_same_seed_same_weights_and_another_seed_others():
    a,b,c = (learner('simclr', seed=s) for s in (0, 0, 1))
    for l in (a, b, c): l.fit_two_phase(1)
    assert equal(a.model.state_dict(), b.model.state_dict()) and not equal(a.model.state_dict(),
        c.model.state_dict())


@pytest.mark.parametrize('method', METHODS)
def test_every_method_trains_in_bf16_and_records(method):
    learn = learner(method, precision='bf16', collapse='warn')
    before = copy.deepcopy(learn.model.body.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.filterwarnings('ignore', message='.*torch.jit.*')
        learn.fit_two_phase(1)
    h = learn.history[0]
    assert {'train_loss', 'valid_loss', 'spread',
        'rank'}<=set(h) and all(math.isfinite(h[k]) for k in ('train_loss', 'valid_loss', 'spread', 'rank'))
    assert not equal(before, learn.model.body.state_dict())


def test_labels_do_not_touch_the_training():
    store,manifest = images()
    def run(table, labels):
        learn = ssl_learner(store, table, network(), 'vicreg', bs=11, labels=labels, settings=small('vicreg'),
            dls_args=dict(device='cpu'))
        return learn.fit_two_phase(1).model.state_dict()
    a = run(manifest, 'bar')
    b = run(manifest.assign(bar=1-manifest.bar), 'bar')
    c = run(manifest.drop(columns='bar'), None)
    assert equal(a, b) and equal(a, c)


def test_knn_judges_by_other_patients_and_honours_unknown_labels():
    learn = learner('vicreg')
    learn.metrics = [KNN(k=3)]
    learn.fit_two_phase(1)
    value = learn.history[0]['knn']
    f,y = embed(learn, learn.dls.valid)
    who = learn.dls.valid_ds.items.patient_id.to_numpy()
    f = unit(f.astype(float)-f.mean(0))
    score = []
    for i in range(16):
        s = np.where(who==who[i], -np.inf, f@f[i])
        near = np.argsort(-s)[:3]
        w = np.exp(s[near]/.07)
        score.append((w*y[near]).sum()/w.sum())
    from sklearn.metrics import roc_auc_score
    assert value==pytest.approx(roc_auc_score(y, score), abs=1e-6)
    metric = KNN()
    metric.reset()
    metric.features,metric.targets = [f],[np.full(16, -1)]
    assert metric.value is None


# ---- into the task

def test_pretrained_body_lands_in_the_task(tmp_path):
    store,manifest = images()
    learn = ssl_learner(store, manifest, 'resnet10t', 'simclr', bs=11,
        model_args=dict(channels=(8, 8, 16, 16)), settings=small('simclr'), dls_args=dict(device='cpu'))
    untrained = copy.deepcopy(learn.model.body.state_dict())
    learn.fit_two_phase(1)
    assert not equal(untrained, learn.model.body.state_dict())
    dls = xray_dataloaders(store, manifest, 'bar', bs=11, device='cpu')
    model = task_model(learn, dls, dropout=.2)
    task = xray_learner(dls, model, seed=0)
    assert equal(task.model.body.state_dict(),
        learn.model.body.state_dict()) and model.config['name']=='resnet10t' and model.config['dropout']==.2
    task.fit_two_phase(2)
    assert [h['phase'] for h in task.history]==['head', 'all', 'all'] and task.history[-1]['auroc']>.5
    assert not equal(task.model.body.state_dict(), learn.model.body.state_dict())
    save_body(learn, tmp_path/'body.safetensors')
    other = create_model('resnet10t', 2, weights=tmp_path/'body.safetensors', channels=(8, 8, 16, 16))
    assert equal({k: v.contiguous() for k,v in other.body.state_dict().items()},
        learn.model.body.state_dict()) and pretrained_body(learn).pretrained
    several = xray_dataloaders(store, manifest.assign(other=1-manifest.bar), ['bar', 'other'], bs=11,
        device='cpu')
    assert task_model(learn, several).config['multi_label']


def test_task_of_other_channels_is_refused():
    store,manifest = images()
    learn = learner('simclr')
    with pytest.raises(ModelError, match='3 channels'):
        task_model(learn, xray_dataloaders(store, manifest, 'bar', bs=11, channels=3, device='cpu'))


# ---- collapse

class Agree(nn.Module):
    "Nothing but agreement, with the gradient through both views: the planted fault."
    def forward(self, out, *_): return -F.cosine_similarity(out['student'][0], out['student'][1]).mean()


def test_planted_collapse_is_detected_and_a_healthy_run_is_not():
    def run(sick):
        learn = learner('barlow', collapse='stop', lr=3e-2)
        if sick: learn.loss_func = Agree()
        learn.fit_two_phase(10)
        return learn.history[-1]
    with pytest.raises(ModelError, match='have collapsed'): run(True)
    healthy = run(False)
    assert healthy['spread']>.3 and healthy['rank']>2


def test_spread_and_rank_against_numpy():
    z = rng(0, 'z').normal(size=(50, 8))@np.diag([3, 2, 1, .5, .1, .1, .1, .1])
    u = unit(z)
    s = np.linalg.svd(u-u.mean(0), compute_uv=False)
    p = s/s.sum()
    assert effective_rank(torch.from_numpy(z))==pytest.approx(np.exp(-(p*np.log(p)).sum()), abs=1e-9)
    assert embedding_spread(torch.from_numpy(z))==pytest.approx(np.sqrt(u.var(0).mean()*8), abs=1e-6)


# ---- bad input and packages

def test_bad_input_is_named():
    store,manifest = images()
    for match,call in {'no method': lambda: SelfSupervised('simclear'),
            "no setting 'tau'": lambda: SelfSupervised('moco', tau=1),
            'whole views': lambda: SelfSupervised('simclr', Views(3)),
            'small crops': lambda: SelfSupervised('moco', Views(2, 2)),
                       'no patches': lambda: ssl_learner(store, manifest, network(), 'mae', bs=11,
                       dls_args=dict(device='cpu')),
                       'no body': lambda: SelfSupervised('simclr').__dict__.update(learn=None)
                       or xray_learner(ssl_dataloaders(store, manifest, bs=8, device='cpu'), odd(),
                       cbs=SelfSupervised('simclr'))}.items():
        with pytest.raises(ModelError, match=match): call()
    for match,call in {'fewer than a batch': lambda: ssl_dataloaders(store, manifest, bs=500, device='cpu'),
            'No row has split': lambda: ssl_dataloaders(store, manifest, bs=4, train='unlabelled',
            device='cpu'),
                       'one image': lambda: learner('simclr', bs=1).fit_two_phase(1),
                       'class among': lambda: knn_probe(np.ones((4, 2)), np.zeros(4), np.ones((2, 2))),
                       'has no patient': lambda: PatientBatchSampler(['a', None], 1)}.items():
        with pytest.raises(DataError, match=match): call()
    leaky = manifest.assign(patient_id='one')
    with pytest.raises(DataError): ssl_dataloaders(store, leaky, bs=4, device='cpu')


def odd():
    "A network whose body does not tell its features."
    m = nn.Module()
    m.body,m.head = nn.Conv2d(1, 2, 3),nn.Linear(2, 1)
    return m


@pytest.mark.slow
def test_lightly_is_loaded_when_a_method_is_made_and_sends_nothing():
    code = """
import socket, sys
def refuse(*a, **k): raise SystemExit('a connection was tried')
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import radiology_ai.pretrain.ssl, radiology_ai.pretrain.monitor
early = [m for m in sys.modules if m.split('.')[0] in ('lightly', 'pytorch_lightning', 'lightning')]
from radiology_ai.pretrain.methods import SSLLoss, method_settings
SSLLoss('simclr', method_settings('simclr', {}))
late = [m for m in ('lightly.loss', 'pytorch_lightning', 'lightning_utilities', 'hydra', 'aiohttp') if m in sys.modules]
print(early, late)
"""
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.stdout.strip()=="[] ['lightly.loss']", run.stderr


def test_without_lightly_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lightly.loss', None)
    with pytest.raises(MissingPackageError, match=r"radiology_ai\[ssl\]"):
        SSLLoss('simclr', method_settings('simclr', {}))
