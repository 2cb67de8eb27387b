"""Few labels: losses and targets against an oracle written from the papers in NumPy float64, each detail that
is easily got wrong, and that the mechanism keeps what the training core promises."""
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
from radiology_ai.semi.audit import audit, audit_curve, pseudo_labels
from radiology_ai.semi.fixmatch import FixMatch, FlexMatch, FreeMatch, MeanTeacher, SoftMatch, consistency
from radiology_ai.semi.guess import (
    Alignment,
    FixedThreshold,
    FlexThreshold,
    FreeThreshold,
    SoftThreshold,
    as_shares,
    as_target,
    class_shares,
    log_probabilities,
    sharpen,
)
from radiology_ai.semi.load import semi_dataloaders
from radiology_ai.semi.mixmatch import MixMatch, distance, mix_pairs, mix_shares
from radiology_ai.semi.step import frozen_statistics, gentle, harsh, interleaved, ramp_up
from radiology_ai.train.learner import predict_logits, xray_learner
from radiology_ai.train.record import run_record
from radiology_ai.vision.augment import BatchAugment

# ---------------------------------------------------------------- the oracle: NumPy, float64, from the papers

def o_softmax(z):
    e = np.exp(z-z.max(-1, keepdims=True))
    return e/e.sum(-1, keepdims=True)

def o_sigmoid(z): return 1/(1+np.exp(-z))

def o_sharpen(p, T):
    "Berthelot et al. 2019, equation 7."
    q = p**(1/T)
    return q/q.sum(-1, keepdims=True)

def o_fixmatch(weak, strong, tau):
    "Sohn et al. 2020, equation 4: one image after the other."
    total = 0.
    for a, b in zip(weak, strong):
        q = o_softmax(a)
        if q.max()>=tau: total -= np.log(o_softmax(b)[q.argmax()])
    return total/len(weak)

def o_fixmatch_labels(weak, strong, tau):
    "The same with a binary question for each label."
    total = 0.
    for a, b in zip(weak.ravel(), strong.ravel()):
        q, p = o_sigmoid(a), o_sigmoid(b)
        if max(q, 1-q)>=tau: total -= np.log(p if q>.5 else 1-p)
    return total/weak.size

def o_uda(weak, strong, tau, T):
    "Xie et al. 2020: confidence masking and a sharpened target; the mean over all images."
    total = 0.
    for a, b in zip(weak, strong):
        q = o_softmax(a)
        if q.max()>=tau: total -= (o_softmax(a/T)*np.log(o_softmax(b))).sum()
    return total/len(weak)

def o_mixmatch_u(q, z):
    "Berthelot et al. 2019, equation 4: 1/(L |U'|) sum ||q - p||^2."
    p = o_softmax(z)
    return sum(((a-b)**2).sum() for a, b in zip(q, p))/(q.shape[1]*len(q))

class OFlex:
    "Zhang et al. 2021, algorithm 1 with the warm-up of equation 11 and the convex mapping of equation 12."
    def __init__(self, n, c, tau): self.said,self.c,self.tau = [-1]*n,c,tau
    def mask(self, q, rows):
        sigma = [sum(s==k for s in self.said) for k in range(self.c)]
        unused = sum(s==-1 for s in self.said)
        beta = [s/max(max(sigma), unused, 1) for s in sigma]
        T = [b/(2-b)*self.tau for b in beta]
        out = np.array([float(v.max()>=T[v.argmax()]) for v in q])
        for v, r in zip(q, rows):
            if v.max()>=self.tau: self.said[r] = int(v.argmax())
        return out

class OFree:
    "Wang et al. 2023, equations 5 to 8 and 11."
    def __init__(self, c, m): self.tau,self.p,self.h,self.m = 1/c,np.full(c, 1/c),np.full(c, 1/c),m
    def mask(self, q):
        m,c = self.m,len(self.p)
        self.tau = m*self.tau + (1-m)*np.mean([v.max() for v in q])
        self.p = m*self.p + (1-m)*q.mean(0)
        self.h = m*self.h + (1-m)*np.bincount(q.argmax(1), minlength=c)/len(q)
        need = self.p/self.p.max()*self.tau
        return np.array([float(v.max()>=need[v.argmax()]) for v in q])
    def fairness(self, strong, mask):
        if not mask.any(): return 0.
        s = o_softmax(strong)[mask>0]
        h = np.bincount(s.argmax(1), minlength=len(self.p))/len(s)
        norm = lambda a: a/a.sum()
        b = norm(np.divide(s.mean(0), h, out=np.zeros_like(h), where=h>0))
        a = norm(np.divide(self.p, self.h, out=np.zeros_like(h), where=self.h>0))
        return float((a*np.log(b+1e-12)).sum())

class OSoft:
    "Chen et al. 2023, equations 5 to 8."
    def __init__(self, c, m): self.mu,self.var,self.m = 1/c,1.,m
    def weight(self, q):
        top = q.max(1)
        self.mu = self.m*self.mu + (1-self.m)*top.mean()
        self.var = self.m*self.var + (1-self.m)*top.var()*len(q)/(len(q)-1)
        return np.where(top<self.mu, np.exp(-(top-self.mu)**2/(2*self.var)), 1.)

def o_align(q, prior, means):
    "Berthelot et al. 2020 (ReMixMatch), section 3.1; `means` holds the mean guesses of the last batches."
    out = q*(prior+1e-6)/(np.mean(means, 0)+1e-6)
    return out/out.sum(1, keepdims=True)


def t64(a): return torch.from_numpy(np.asarray(a, np.float64))

def batches(n, key, c=None):
    "n random pairs of logits, from timid to sure."
    gen = rng(0, key)
    for _ in range(n):
        k,b = c or int(gen.integers(2, 12)),int(gen.integers(2, 40))
        z = gen.normal(size=(2, b, k))*gen.uniform(.2, 8)
        yield gen,z[0],z[1]

def close(a, b):
    np.testing.assert_allclose(float(a) if np.ndim(b)==0 else np.asarray(a), b, rtol=1e-6, atol=1e-9)


def test_fixmatch_against_the_oracle():
    for gen, a, b in batches(200, 'fixmatch'):
        tau = gen.uniform(.3, .99)
        p = log_probabilities(t64(a)).exp()
        close(consistency(p, log_probabilities(t64(b)), FixedThreshold(tau)(p, None)), o_fixmatch(a, b, tau))
        p = log_probabilities(t64(a), True).exp()
        close(consistency(p, log_probabilities(t64(b), True), FixedThreshold(max(tau, .5))(p, None)),
            o_fixmatch_labels(a, b, max(tau, .5)))

def test_soft_targets_against_the_oracle():
    for gen, a, b in batches(100, 'uda'):
        tau,T = gen.uniform(.2, .9),gen.uniform(.1, 1)
        p = log_probabilities(t64(a)).exp()
        close(consistency(p, log_probabilities(t64(b)), FixedThreshold(tau)(p, None), T), o_uda(a, b, tau, T))

def test_mixmatch_against_the_oracle():
    for gen, a, b in batches(200, 'mixmatch'):
        T = gen.uniform(.1, 1)
        views = o_softmax(np.stack([a, b]))
        q = sharpen(t64(views).mean(0), T)
        close(q, o_sharpen(views.mean(0), T))
        close(distance(q[:,None], log_probabilities(t64(b)).exp()),
            o_mixmatch_u(o_sharpen(views.mean(0), T), b))

def test_flexmatch_against_the_oracle():
    for run in range(10):
        gen,n,c,tau = rng(run, 'flex'),60,int(rng(run).integers(2, 7)),.8
        ours,theirs = FlexThreshold(tau),OFlex(n, c, tau)
        ours.begin(n, n, (1, c), 'cpu')
        for _ in range(10):
            rows,q = gen.permutation(n)[:20],o_softmax(gen.normal(size=(20, c))*4)
            close(ours(t64(q)[:,None], rows)[:,0], theirs.mask(q, rows))
        assert ours.state['last'][:,0].tolist()==theirs.said

def test_freematch_against_the_oracle():
    for run in range(20):
        gen,c = rng(run, 'free'),int(rng(run).integers(2, 7))
        ours,theirs = FreeThreshold(.9, fairness=1.),OFree(c, .9)
        ours.begin(0, 0, (1, c), 'cpu')
        ours.state.update({k: v.double() for k,v in ours.state.items()})
        for k in ('tau','mean','histogram'): ours.state[k] = torch.full_like(ours.state[k], 1/c)
        for _ in range(10):
            a,b = gen.normal(size=(2, 24, c))*gen.uniform(.5, 5)
            p,logp = log_probabilities(t64(a)).exp(),log_probabilities(t64(b))
            used,mask = ours(p, None),theirs.mask(o_softmax(a))
            close(used[:,0], mask)
            close(ours.penalty(p, logp, used), theirs.fairness(b, mask))

def test_softmatch_against_the_oracle():
    for run in range(20):
        gen,c = rng(run, 'soft'),int(rng(run).integers(2, 7))
        ours,theirs = SoftThreshold(.9),OSoft(c, .9)
        ours.begin(0, 0, (1, c), 'cpu')
        ours.state.update(mu=torch.full((1,), 1/c, dtype=torch.float64),
            var=torch.ones(1, dtype=torch.float64))
        for _ in range(10):
            q = o_softmax(gen.normal(size=(24, c))*gen.uniform(.5, 5))
            close(ours(t64(q)[:,None], None)[:,0], theirs.weight(q))

def test_alignment_against_the_oracle():
    for run in range(10):
        gen,c,means = rng(run, 'align'),4,[]
        prior = gen.dirichlet(np.ones(c))
        ours = Alignment(t64(prior)[None], n=6)
        for _ in range(10):
            q = o_softmax(gen.normal(size=(16, c))*2)
            means = (means + [q.mean(0)])[-6:]
            close(ours(t64(q)[:,None])[:,0], o_align(q, prior, means))

def test_float32_is_near_the_oracle():
    for _, a, b in batches(40, 'float32'):
        p = log_probabilities(torch.from_numpy(a).float()).exp()
        got = float(consistency(p, log_probabilities(torch.from_numpy(b).float()), FixedThreshold(0)(p, None),
            .5))
        np.testing.assert_allclose(got, o_uda(a, b, 0, .5), rtol=2e-5, atol=1e-5)


# ---------------------------------------------------------------- the details

def test_targets_are_averaged_before_they_are_sharpened():
    p = torch.tensor([[.9, .1], [.45, .55]], dtype=torch.float64)
    right,wrong = sharpen(p.mean(0)),sharpen(p).mean(0)
    assert (right-wrong).abs().max()>.1
    seen = {}
    class Spy(MixMatch):
        def guess(self, u):
            return torch.log(p[:,None].repeat_interleave(len(u)//2, 0)).float()
        def guesses(self, u):
            seen['q'],seen['asked'] = MixMatch.guesses(self, u),len(u)
            return seen['q']
    train(Spy(K=2, T=.5), steps=1, n_out=2)
    assert seen['asked']==2*N_U and torch.allclose(seen['q'].double(), right.expand(N_U, 1, 2), atol=1e-6)

def test_mixmatch_guesses_on_weak_views_and_learns_strong_ones():
    "Where both are the same views the network already agrees with its guess, and the term teaches nothing."
    weak,strong = (lambda x: x*.5),(lambda x: 1-x)
    class Spy(MixMatch):
        def guess(self, x, model=None):
            seen['asked'] = x
            return super().guess(x, model)
        def views(self, x, y, u):
            images,target = super().views(x, y, u)
            seen.update(x=x, u=u, learnt=images)
            return images,target
    for given,learns in ((strong, strong), ('weak', weak)):
        seen = {}
        # a tiny alpha leaves each image itself
        learn = train(Spy(alpha=1e-9, weak=weak, strong=given), steps=1)
        twice = torch.cat([seen['u']]*2)
        torch.testing.assert_close(seen['asked'], weak(twice))
        torch.testing.assert_close(seen['learnt'], torch.cat([weak(seen['x']), learns(twice)]))
        assert run_record(learn)['settings']['spy']['strong']==repr(given)

def test_mixmatch_of_the_paper_draws_one_view():
    """`strong='weak'` learns the views of the guess; a strong view leaves the draws of the weak ones as they
    are."""
    class Spy(MixMatch):
        def see(self, name, augment, x):
            seen.append((name, type(augment), super().see(name, augment, x)))
            return seen[-1][2]
    drawn = []
    for strong in ('weak', None):
        seen = []
        train(Spy(strong=strong), steps=1)
        drawn.append(seen)
    assert [n for n,_,_ in drawn[0]]==['weak'] and [n for n,_,_ in drawn[1]]==['weak','strong']
    assert torch.equal(drawn[0][0][2], drawn[1][0][2]) and drawn[1][1][1] is type(harsh())

def test_the_weight_of_mixmatch_grows_with_the_classes():
    "The distance is divided by the classes: an image counts the same in the loss, whatever their number."
    for n, multi in ((2, False), (3, False), (3, True)):
        cb = MixMatch()
        learn = train(cb, steps=1, n_out=n, multi=multi)
        k = 2 if multi else n
        assert cb.lambda_u==2.5*k and run_record(learn)['settings']['mix_match']['lambda_u']==2.5*k
    given = MixMatch(lambda_u=0.)
    train(given, steps=1)
    assert given.lambda_u==0

def test_mixup_stays_nearer_to_the_first():
    share,partner = mix_shares(5000, .75, rng(0))
    plain = rng(0).beta(.75, .75, 5000)
    assert (share.numpy()==np.maximum(plain, 1-plain)).all() and share.min()>=.5 and plain.min()<.01
    x = torch.randn(5000, 3, dtype=torch.float64)
    assert torch.allclose(mix_pairs(x, share, partner), share[:,None]*x + (1-share)[:,None]*x[partner])

def test_distance_is_divided_by_classes():
    for c in (2, 5, 10):
        q,p = torch.eye(c)[:1][:,None],torch.full((1, 1, c), 1/c)
        np.testing.assert_allclose(float(distance(q, p)), ((1-1/c)**2 + (c-1)/c**2)/c, rtol=1e-6)
    one = torch.tensor([[[.3, .7]]]),torch.tensor([[[.6, .4]]]) # a label: (p - q)^2
    np.testing.assert_allclose(float(distance(*one)), .09, rtol=1e-6)

def test_no_gradient_through_targets():
    a,b = (torch.randn(6, 3, requires_grad=True) for _ in range(2))
    p = log_probabilities(a).exp()
    for temperature in (None, .5):
        consistency(p, log_probabilities(b), torch.ones(6, 1), temperature).backward()
    distance(p, log_probabilities(b).exp()).backward()
    assert a.grad is None and b.grad.abs().sum()>0

def test_mask_divides_by_all_unlabelled_images():
    p = torch.tensor([[[.99, .01]], [[.6, .4]], [[.5, .5]], [[.55, .45]]])
    logp = log_probabilities(torch.zeros(4, 2))
    np.testing.assert_allclose(float(consistency(p, logp, FixedThreshold(.95)(p, None))), np.log(2)/4,
        rtol=1e-6)

def test_ramp():
    assert [ramp_up(s, 10) for s in (0, 5, 10, 99)]==[0, .5, 1, 1]
    np.testing.assert_allclose([ramp_up(s, 10, 'sigmoid') for s in (0, 5, 10)], np.exp([-5, -1.25, 0]))
    class Spy(FixMatch):
        def after_loss(self):
            before = float(self.learn.loss_grad)
            super().after_loss()
            seen.append((self.weight_now, float(self.learn.loss_grad)-before, float(self.last_loss)))
    for ramp,steps in ((4, 4), (.5, 5)):
        seen = []
        train(Spy(tau=0, lambda_u=3., ramp=ramp), steps=10)
        w = [min(k/steps, 1)*3 for k in range(10)]
        np.testing.assert_allclose([s[0] for s in seen], w)
        np.testing.assert_allclose([s[1] for s in seen], [a*s[2] for a,s in zip(w, seen)], rtol=1e-3,
            atol=1e-5)

def test_flexmatch_counts_the_whole_unlabelled_set():
    "A class that most of the set is sure of keeps tau, whatever the batch holds; all begin near zero."
    t = FlexThreshold(.9)
    t.begin(100, 90, (1, 2), 'cpu') # ten rows are labelled only
    assert t.thresholds().tolist()==[[0, 0]]
    t.state['last'][:60,0] = 0
    t.state['last'][60:75,0] = 1
    np.testing.assert_allclose(t.thresholds()[0], [.9, .9*.25/1.75], rtol=1e-6)
    t.state['last'][20:60,0] = -1 # now 55 are unused, more than the 20 of the best class
    np.testing.assert_allclose(t.thresholds()[0], [.9*b/(2-b) for b in (20/55, 15/55)], rtol=1e-6)

def test_softmatch_truncates():
    t = SoftThreshold()
    t.begin(0, 0, (1, 2), 'cpu')
    t.state.update(mu=torch.tensor([.8]), var=torch.tensor([.01]))
    p = torch.tensor([.6, .8, .9, .99])
    w = t(torch.stack([p, 1-p], -1)[:,None], None)[:,0]
    assert w[0]<.2 and (w[2:]==1).all()

def test_statistics_are_counted_once():
    """A step moves the running averages once, whatever the number of guessing passes; the guess uses its own
    batch."""
    for cb in (FixMatch(tau=0), MixMatch(K=3), MeanTeacher()):
        learn = train(cb, steps=3)
        norm = next(m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d))
        assert norm.num_batches_tracked.item()==3, type(cb).__name__
    norm = nn.BatchNorm1d(2)
    with frozen_statistics(norm): out = norm(torch.randn(64, 2)*5+9)
    assert out.mean().abs()<1e-5 and norm.running_mean.tolist()==[0, 0] and norm.track_running_stats

def test_one_pass_sees_all_views():
    sizes = []
    class Spy(Callback):
        order = 20
        def before_batch(self):
            if self.training: sizes.append(len(self.learn.xb[0]))
        def after_loss(self):
            if self.training: sizes.append(len(self.learn.pred))
    train(FixMatch(), steps=1, cbs=[Spy()])
    train(MixMatch(K=2), steps=1, cbs=[Spy()])
    assert sizes==[N_L+2*N_U, N_L, N_L+2*N_U, N_L]

def test_interleaving_changes_the_order_only():
    assert sorted(interleaved([3, 7, 11], 4))==list(range(21))
    for part in np.split(np.repeat([0, 1, 2], [4, 12, 12])[interleaved([4, 12, 12], 4)], 4):
        assert np.bincount(part).tolist()==[1, 3, 3]
    def first(k):
        learn = make(FixMatch(tau=0, interleave=k), steps=1)
        learn.model.head[1].p = 0.
        learn.fit_two_phase(1)
        return [float(learn.recorder.losses[0]), float(learn.fix_match.last_loss)]
    np.testing.assert_allclose(first(2), first(1), rtol=1e-4)

def test_nan_labels_are_honoured():
    y = torch.tensor([[1., np.nan], [0., 1.]])
    s = as_shares(y, 2)
    assert torch.isnan(s[0,1]).all() and torch.equal(torch.nan_to_num(as_target(s, True), nan=-1),
        torch.nan_to_num(y, nan=-1))
    # the unknown entry adds nothing
    assert float(distance(s, torch.full((2, 2, 2), .5)))==pytest.approx(.25*3/4)
    assert torch.equal(as_target(as_shares(torch.tensor([2, 0]), 3)), torch.eye(3)[[2, 0]])


# ---------------------------------------------------------------- the mechanism

N_L,N_U = 6,12

class Store:
    "Images in memory with an index."
    def __init__(self, x): self.x,self.index = x,pd.DataFrame({'image_id': [f'im{i}' for i in range(len(x))]})
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]

def data(n=96, labelled=18, n_out=2, multi=False, size=16):
    "Images with bars: a class is where the bar lies."
    gen = rng(0, 'bars')
    y = np.arange(n)%n_out
    x = gen.uniform(20, 90, (n, size, size)).astype(np.uint8)
    for i in range(n): x[i, 2+4*y[i]:4+4*y[i], 2:14] = 230
    t = pd.DataFrame(dict(image_id=[f'im{i}' for i in range(n)], patient_id=[f'p{i}' for i in range(n)],
        split=np.where(np.arange(n)<n*2//3, 'train', 'valid'), truth=y))
    seen = (np.arange(n)<labelled) | (t.split=='valid')
    if not multi: return Store(x),t.assign(y=np.where(seen, y, np.nan)),'y'
    for k in range(n_out): t[f'l{k}'] = np.where(seen, y==k, np.nan)
    t.loc[0, 'l1'] = np.nan # partly unknown
    return Store(x),t,[f'l{k}' for k in range(n_out)]

def network(n_out=2, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2),
            nn.BatchNorm2d(12), nn.ReLU())
        return XrayModel(body, nn.Sequential(nn.Flatten(), nn.Dropout(.1), nn.Linear(108, n_out)), {})

def make(cb, n_out=2, steps=4, cbs=(), multi=False, *, mu=N_U/N_L, dls=None, seed=3, **kwargs):
    store,t,labels = data(n_out=n_out, multi=multi)
    dls = dls or semi_dataloaders(store, t, labels, bs=N_L, mu=mu, n_batches=steps, seed=seed, device='cpu')
    return xray_learner(dls, network(n_out), pretrained=False, lr=3e-3, seed=seed, metrics=[], monitor=None,
        cbs=[*([] if cb is None else [cb]), *cbs], **kwargs)

def train(cb, epochs=1, **kwargs):
    learn = make(cb, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit_two_phase(epochs)
    return learn

def same(a, b):
    return all(torch.equal(u, v) for u,v in zip(a.model.state_dict().values(), b.model.state_dict().values()))

METHODS = {'fixmatch': lambda: FixMatch(tau=.6), 'flexmatch': lambda: FlexMatch(tau=.6),
    'freematch': FreeMatch, 'softmatch': SoftMatch, 'aligned': lambda: FixMatch(tau=.6, align='labels'),
           'uda': lambda: FixMatch(tau=.6, temperature=.4),
           'meanteacher': lambda: MeanTeacher(strong=harsh()), 'mixmatch': MixMatch,
           'mixmatch of the paper': lambda: MixMatch(strong='weak'),
           'mixmatch aligned': lambda: MixMatch(K=1, align='labels')}


def test_loaders_pair_and_hide():
    store,t,labels = data()
    dls = semi_dataloaders(store, t, labels, bs=N_L, mu=2, device='cpu')
    known = np.flatnonzero(t.y[:64].notna())
    seen = []
    for (x,y),rows in zip(dls.train, dls.train.sampler.set_epoch(0)):
        assert len(x)==N_L+N_U and (y[:N_L]>=0).all() and (y[N_L:]==-1).all()
        assert y[:N_L].tolist()==t.y.iloc[rows[:N_L]].astype(int).tolist()
        seen += rows[N_L:]
    # labelled images stand among the unlabelled ones
    assert set(seen)>=set(range(64)) and set(known)<=set(seen)
    apart = semi_dataloaders(store, t, labels, bs=N_L, mu=2, among=False, device='cpu')
    assert not {r for b in apart.train.sampler for r in b[N_L:]} & set(known)
    many = semi_dataloaders(*data(multi=True)[:2], data(multi=True)[2], bs=N_L, mu=2,
        device='cpu').one_batch()[1]
    assert torch.isnan(many[N_L:]).all() and not torch.isnan(many[:N_L]).all(1).any()

@pytest.mark.slow
@pytest.mark.parametrize('multi', [False, True])
@pytest.mark.parametrize('name', METHODS)
def test_every_method_learns_something(name, multi):
    learn = train(METHODS[name](), steps=30, multi=multi, n_out=3, epochs=2, ema=.9)
    p,y = predict_logits(learn, learn.dls.valid)
    right = (p.argmax(1)==(y.argmax(1) if multi else y)).mean()
    assert right>.6 and np.isfinite(p).all()
    last = learn.history[-1]
    assert 0<=last['used']<=1 and .3<last['confidence']<=1 and learn.metrics==[]

@pytest.mark.parametrize('name', METHODS)
def test_killed_and_resumed_gives_the_same_weights(name, tmp_path):
    class Kill(Callback):
        order,watches = 95,True
        def __init__(self, at): self.at,self.n = at,0
        def after_batch(self):
            self.n += int(self.training)
            if self.n==self.at: raise KeyboardInterrupt
    args = dict(steps=6, n_out=3, ema=.9, accumulate=2, precision='bf16')
    run = lambda cbs=(): make(METHODS[name](), cbs=cbs, **args)
    whole = run()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        whole.fit_two_phase(2)
        with pytest.raises(KeyboardInterrupt):
            run([Kill(9)]).fit_two_phase(2, checkpoint=tmp_path/'run', every=2)
        again = run()
        again.fit_two_phase(2, checkpoint=tmp_path/'run', every=2)
    assert same(whole, again) and again.history==whole.history

def test_a_run_with_another_threshold_is_not_gone_on_with(tmp_path):
    make(FixMatch(tau=.6), steps=4, n_out=3).fit_two_phase(1, checkpoint=tmp_path/'run')
    with pytest.raises(ModelError):
        make(FixMatch(tau=.7), steps=4, n_out=3).fit_two_phase(1, checkpoint=tmp_path/'run')

def test_same_seed_same_weights():
    a,b,c = (train(FixMatch(tau=.6, seed=s), n_out=3, steps=6) for s in (None, None, 8))
    assert same(a, b) and not same(a, c)

def test_truth_and_hidden_labels_take_no_part():
    store,t,labels = data(n_out=3)
    run = lambda table, **k: train(FixMatch(tau=.4, **k), n_out=3,
        dls=semi_dataloaders(store, table, labels, bs=N_L, mu=2, n_batches=6, seed=3, device='cpu'))
    plain,audited = run(t),run(t, truth='truth')
    shuffled = run(t.assign(truth=rng(1).permutation(t.truth.to_numpy())), truth='truth')
    assert same(plain, audited) and same(plain, shuffled)
    assert audited.history[-1]['guess_accuracy']!=shuffled.history[-1][
        'guess_accuracy'] and 'guess_accuracy' not in plain.history[-1]

def test_hidden_labels_take_no_part():
    """What a labelled image's label is changes the labelled part alone: among the unlabelled ones it is not
    seen."""
    class Spy(FixMatch):
        def views(self, x, y, u):
            seen.append((len(y), self.learn.yb[0][len(y):].unique().tolist()))
            return super().views(x, y, u)
    seen = []
    train(Spy(), steps=2)
    assert seen==[(N_L, [-1])]*2

def test_bf16_gives_all_weights_a_gradient():
    "Casts of a pass without gradient must not be kept for the pass with one."
    class Spy(Callback):
        order = -5
        def before_step(self):
            grads.append([p.grad is not None and bool(p.grad.abs().sum()>0)
                for p in self.learn.model.parameters()])
    for cb in (MixMatch(), MeanTeacher(), FixMatch(tau=0)):
        grads = []
        train(cb, steps=2, cbs=[Spy()], precision='bf16')
        assert all(sum(g)>=len(g)-2 for g in grads) # a bias before BatchNorm has none

def test_accumulation_scales_the_whole_loss():
    scale = []
    class Spy(Callback):
        order = 50
        def after_loss(self):
            if self.training: scale.append(float(self.learn.loss_grad/self.learn.loss))
    train(FixMatch(tau=0), steps=4, cbs=[Spy()], accumulate=2)
    np.testing.assert_allclose(scale, .5, rtol=1e-5)

def test_ema_is_evaluated():
    learn = make(FixMatch(tau=.6), steps=6, ema=.99)
    seen = {}
    class Spy(Callback):
        order = 63
        def before_validate(self): seen['w'] = self.learn.model.body[0].weight.clone()
        def before_train(self): seen['live'] = self.learn.model.body[0].weight
    learn.add_cb(Spy())
    learn.fit_two_phase(1)
    assert torch.equal(seen['w'], learn.model.body[0].weight) # the average is validated and kept
    ordinary = train(FixMatch(tau=.6), steps=6)
    assert not torch.equal(ordinary.model.body[0].weight, learn.model.body[0].weight)

def test_mean_teacher_averages():
    learn = train(MeanTeacher(decay=.9), steps=5)
    cb = learn.mean_teacher
    assert cb.state['steps']==5 and not any(p.requires_grad for p in cb.teacher.parameters())
    class Track(Callback):
        def before_fit(self): self.w = self.learn.model.body[0].weight.detach().clone()
        def after_step(self):
            self.n = getattr(self, 'n', 0)+1
            d = min(1-1/(self.n+1), .9)
            self.w = d*self.w + (1-d)*self.learn.model.body[0].weight.detach()
    other = train(MeanTeacher(decay=.9), steps=5, cbs=[Track()])
    torch.testing.assert_close(other.mean_teacher.teacher.body[0].weight, other.track.w)

def test_out_of_scope_images_count_for_nothing():
    store,t,labels = data(n_out=3)
    for cb in (FixMatch(tau=0, in_scope='scope', strong=gentle()), MixMatch(in_scope='scope', ramp=0),
            MeanTeacher(in_scope='scope', ramp=0)):
        learn = train(cb, n_out=3, dls=semi_dataloaders(store, t.assign(scope=0.), labels, bs=N_L, mu=2,
            n_batches=3, device='cpu'))
        assert float(cb.last_loss)==0 and learn.history[-1]['used']==0

def test_suppression_weighs_by_class():
    store,t,labels = data(n_out=2)
    t = t.assign(y=t.y.where((t.split=='valid') | (t.truth==0) | (t.index<4))) # 9 and 2 labels
    learn = train(FixMatch(tau=0, suppress=.5),
        dls=semi_dataloaders(store, t, labels, bs=N_L, mu=2, n_batches=2, device='cpu'))
    counts = t[t.split=='train'].y.value_counts()
    np.testing.assert_allclose(learn.fix_match.rare, [1, .5**(1-counts[1.]/counts[0.])], rtol=1e-5)
    p,logp = torch.tensor([[[.9, .1]], [[.2, .8]]]),log_probabilities(torch.zeros(2, 2))
    np.testing.assert_allclose(float(consistency(p, logp, torch.ones(2, 1), weight=torch.tensor([1., .25]))),
        np.log(2)*1.25/2, rtol=1e-6)

def test_record_tells_the_settings():
    learn = train(FlexMatch(tau=.7, ramp=.2), steps=2)
    kept = run_record(learn)['settings']['flex_match']
    assert (kept['tau'], kept['threshold'], kept['ramp'])==(.7, 'FlexThreshold', .2)

def test_views_replay():
    x = torch.rand(5, 1, 16, 16)
    cb = FixMatch()
    cb.draw_seed = 4
    a,b = cb.see('weak', cb.weak, x),cb.see('weak', cb.weak, x)
    assert torch.equal(a, b) and not torch.equal(a, cb.see('strong', cb.weak, x))
    cb.batches = 1
    assert not torch.equal(a, cb.see('weak', cb.weak, x))
    noise = lambda v: (v + .1*torch.randn_like(v)).clamp(0, 1)
    assert torch.equal(cb.see('weak', noise, x),
        cb.see('weak', noise, x)) and not torch.equal(cb.see('weak', noise, x), x)


@pytest.mark.parametrize('multi', [False, True])
def test_audit_counts(multi):
    learn = train(FixMatch(tau=.6), steps=30, n_out=3, multi=multi)
    store,t,labels = data(n_out=3, multi=multi)
    rows = t[t.split=='train'].assign(**{f't{k}': (t.truth==k).astype(int) for k in range(3)})
    table = pseudo_labels(learn, rows, [f't{k}' for k in range(3)] if multi else 'truth')
    assert len(table)==len(rows)*(3 if multi else 1) and table.truth.notna().all()
    tau = float(table.confidence.median())
    taken = table[table.confidence>=tau]
    everything = audit(table, tau).loc[('', 'all')]
    assert everything.checked==len(taken) and everything.right==pytest.approx(
        (taken.guess==taken.truth).mean()) and everything.low<=everything.right<=everything.high
    each = audit(table, tau).drop(index=('', 'all'))
    assert each.images.sum()==len(table) and each.checked.sum()==len(taken)
    curve = audit_curve(table.assign(truth=np.nan))
    assert curve.checked.eq(0).all() and curve.right.isna().all() and (np.diff(curve.taken)<=0).all()
    with pytest.raises(DataError, match="no column 'nobody'"):
        pseudo_labels(learn, rows, ['nobody'] if multi else 'nobody')


# ---------------------------------------------------------------- bad input

def test_bad_data_is_named():
    store,t,labels = data(n_out=3)
    train_rows = t.split=='train'
    given = lambda table, **k: semi_dataloaders(store, table, labels, bs=N_L, mu=2, device='cpu', **k)
    shared = t.assign(patient_id=np.where(t.index.isin([40, 70]), 'x', t.patient_id)) # 40 is unlabelled
    cases = [(t.assign(y=t.truth), 'none is unlabelled'),
        (t.assign(y=t.y.where(~train_rows)), 'No training image has a known label'),
        (t.assign(y=t.y.where(~train_rows | (t.y!=2))), '2 has no labelled training image'),
        (t.assign(y=t.y.where(train_rows)), "split 'valid' has a known label"),
        (shared, 'more than one split'),
        (t.assign(split='train'), "No row has split = 'valid'"),
        (t.drop(columns='y'), "no label column 'y'"),
        (t.assign(Modality=np.where(t.y.notna(), 'DX', 'MR')), "Modality = 'MR'")]
    for table,words in cases:
        with pytest.raises(DataError, match=words): given(table)
    with pytest.warns(UserWarning, match='may be out of scope'):
        given(t.assign(BodyPartExamined=np.where((t.index>57), 'HAND', 'KNEE')))

def test_bad_settings_are_named():
    for f, words in ((lambda: FixMatch(tau=2), 'tau is 2'),
            (lambda: FixMatch(threshold='firm'), 'threshold is'),
            (lambda: FixMatch(lambda_u=-1), 'lambda_u is -1'), (lambda: MixMatch(K=0), 'K 0'),
            (lambda: MixMatch(strong='gentle'), "strong is 'gentle'"),
                     (lambda: FixMatch(temperature=0), 'temperature is 0'),
                     (lambda: MeanTeacher(decay=1), 'decay is 1'),
                     (lambda: FreeThreshold(momentum=1), 'momentum is 1'),
                     (lambda: SoftThreshold(sigmas=0), 'sigmas 0'),
                     (lambda: FixMatch(collapse='no'), 'collapse is'),
                     (lambda: class_shares([.5, .6], np.array([0, 1]), 2), 'align is'),
                     (lambda: class_shares('even', np.array([0, 1]), 2), "align is 'even'")):
        with pytest.raises(ModelError, match=words): f()
    store,t,labels = data()
    with pytest.raises(DataError, match='loaders without unlabelled'):
        train(FixMatch(), dls=xray_dataloaders(store, t.assign(y=t.truth), labels, bs=8, device='cpu'))
    dls = semi_dataloaders(store, t, labels, bs=N_L, mu=2, device='cpu')
    dls.train.after_batch.add(BatchAugment())
    with pytest.raises(DataError, match='pass through BatchAugment before FixMatch'):
        train(FixMatch(), dls=dls)
    for cb in (FixMatch(suppress=.5), FixMatch(truth='truth')):
        with pytest.raises(ModelError, match='several labels'): train(cb, multi=True)
    with pytest.raises(DataError, match="no column 'scope'"): train(FixMatch(in_scope='scope'))

def test_collapse_is_named():
    class Lost(FixMatch):
        def unlabelled_loss(self, rest):
            bias = torch.tensor([50., 0])
            return super().unlabelled_loss(rest + bias)
    with pytest.raises(ModelError,
            match='100.0% of the guesses of epoch 0 are 0: the training has collapsed'):
        make(Lost(collapse='stop'), steps=10).fit_two_phase(1)
    with pytest.warns(UserWarning, match='Align the guesses'): make(Lost(), steps=10).fit_two_phase(1)
    learn = make(Lost(collapse='stop'), steps=10)
    with pytest.raises(ModelError): learn.fit_two_phase(1)
    assert learn.metrics==[] # put back after an error
