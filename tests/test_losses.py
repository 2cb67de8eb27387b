"""Each loss against a second implementation, written out entry by entry in float64; gradients, autocast,
unknown labels, shapes that must not broadcast."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from radiology_ai.core import ModelError
from radiology_ai.data.tree import LabelTree, chest_tree
from radiology_ai.losses.base import BCEWithNaN, WeightedCrossEntropy, grade_log_probabilities
from radiology_ai.losses.labels import (
    AsymmetricLoss,
    BinaryFocalLoss,
    FocalLoss,
    LogitAdjustedBCE,
    LogitAdjustedLoss,
    default_loss,
)
from radiology_ai.losses.regions import DiceBCE, DiceLoss, LovaszHinge, LovaszSoftmax, TverskyLoss
from radiology_ai.losses.robust import TERMS, DMILoss, RobustLoss
from radiology_ai.losses.structured import CORN, TreeLoss
from radiology_ai.losses.teacher import DistillationLoss, SuppressedConsistency

NAN = float('nan')
TREE = LabelTree(('a', 'b', 'c', 'd', 'e'), ('', 'a', 'b', 'b', ''), ('',)*5)
PRIOR = np.array([.6, .25, .1, .05])
W = np.array([.5, 1, 2, 4])
ONES,ZEROS,FIVE = np.ones(4),np.zeros(4),np.ones(5)


def sigmoid(z): return 1/(1+np.exp(-z))
def softmax(z): return np.exp(z-z.max())/np.exp(z-z.max()).sum()
def mean(terms, weights): return sum(terms)/sum(weights) if sum(weights)>0 else 0.


# ---- batches: (logits, targets) of numpy, with unknown entries -------------------------------------------------

def classes(seed, n=9, c=4):
    gen = np.random.default_rng(seed)
    t = gen.integers(0, c, n)
    t[0],t[1:1+c] = -100,gen.permutation(c)
    return gen.normal(0, 2.5, (n, c)),t

def shares(seed):
    gen = np.random.default_rng(seed)
    y = gen.dirichlet(np.ones(4), 9)
    y[2, 1] = NAN
    return gen.normal(0, 2.5, (9, 4)),y

def labels(seed):
    gen = np.random.default_rng(seed)
    y = gen.integers(0, 2, (9, 4)).astype(float)
    y[gen.random((9, 4))<.3] = NAN
    return gen.normal(0, 2.5, (9, 4)),y

def treed(seed):
    gen = np.random.default_rng(seed)
    y = np.full((8, 5), NAN)
    for i,row in enumerate(gen.integers(0, 2, (8, 5))): # leaves first, so that the row agrees with the tree
        b = max(row[2], row[3], row[1])
        full = np.array([max(b, row[0]), b, row[2]*b, row[3]*b, row[4]], float)
        y[i] = np.where(gen.random(5)<.3, NAN, full)
    return gen.normal(0, 2.5, (8, 5)),y

def masks(seed):
    gen = np.random.default_rng(seed)
    y = (gen.random((3, 2, 4, 5))<.4).astype(float)
    y[gen.random(y.shape)<.2] = NAN
    y[1, 0] = np.where(np.isnan(y[1, 0]), NAN, 0.) # an image without the finding
    y[2, 1] = NAN                                  # and one that nobody has judged
    return gen.normal(0, 2, y.shape),y

def segments(seed):
    gen = np.random.default_rng(seed)
    t = gen.integers(0, 3, (2, 4, 5))
    t[t==2] = np.where(gen.random((t==2).sum())<.5, -100, 2)
    t[1][t[1]==1] = 0 # a class that the second image does not show
    return gen.normal(0, 2, (2, 3, 4, 5)),t

def teacher(seed):
    gen = np.random.default_rng(seed)
    g = gen.normal(0, 3, (9, 4))
    g[4] = NAN
    return gen.normal(0, 2.5, (9, 4)),g


# ---- second implementations --------------------------------------------------------------------------------------

def second_classes(gamma=0., smoothing=0., weight=ONES, shift=0.):
    def loss(z, t):
        terms,norm = [],[]
        for zi,ti in zip(z, t):
            if np.ndim(ti)==0 and ti==-100 or np.isnan(ti).any(): continue
            aim = np.eye(4)[ti] if np.ndim(ti)==0 else ti
            p = softmax(zi+shift)
            terms.append(sum(-weight[k]*(aim[k]*(1-smoothing)+smoothing/4)*(1-p[k])**gamma*np.log(p[k])
                for k in range(4)))
            norm.append(sum(weight[k]*aim[k] for k in range(4)))
        return mean(terms, norm)
    return loss

def second_labels(gamma=0., smoothing=0., pos=ONES, shift=ZEROS):
    def loss(z, y):
        terms = []
        for (i,k),t in np.ndenumerate(y):
            if np.isnan(t): continue
            t,p = t*(1-smoothing)+smoothing/2,sigmoid(z[i,k]+shift[k])
            terms.append(-pos[k]*t*(1-p)**gamma*np.log(p) - (1-t)*p**gamma*np.log(1-p))
        return mean(terms, [1]*len(terms))
    return loss

def second_asymmetric(z, y):
    terms = []
    for (i,k),t in np.ndenumerate(y):
        if np.isnan(t): continue
        p = sigmoid(z[i,k])
        m = max(p-.05, 0)
        terms.append(-(1-p)*np.log(p) if t==1 else -m**4*np.log(1-m))
    return np.mean(terms)

def one_robust(name, p, k, gamma=.5, q=.7):
    c = len(p)
    if name=='ce': return -np.log(p[k])
    if name=='fl': return -(1-p[k])**gamma*np.log(p[k])
    if name=='gce': return (1-p[k]**q)/q
    if name=='mae': return sum(abs(p[j]-(j==k)) for j in range(c))/2
    if name=='rce': return -sum(p[j]*np.log(1. if j==k else 1e-4) for j in range(c))
    if name=='nl': return np.mean([-np.log(1-p[j]) for j in range(c) if j!=k])
    return one_robust(name[1:], p, k)/sum(one_robust(name[1:], p, j) for j in range(c))

def second_robust(names, scale, weight=ONES):
    def loss(z, t):
        known = [(softmax(zi), ti) for zi,ti in zip(z, t) if ti!=-100]
        return mean([weight[k]*sum(s*one_robust(n, p, k) for n,s in zip(names, scale)) for p,k in known],
            [weight[k] for _,k in known])
    return loss

def second_dmi(z, t):
    u,n = np.zeros((4, 4)),(t!=-100).sum()
    for zi,ti in zip(z, t):
        if ti!=-100: u[:,ti] += softmax(zi)/n
    return -np.log(abs(np.linalg.det(u))+1e-3)

def second_corn(weight=ONES):
    def loss(z, t):
        terms,norm = [],[]
        for zi,ti in zip(z, t):
            for k in range(3): # only images that have reached grade k are asked whether they exceed it
                if ti==-100 or ti<k: continue
                p = sigmoid(zi[k])
                terms.append(weight[ti]*-(np.log(p) if ti>k else np.log(1-p)))
                norm.append(weight[ti])
        return mean(terms, norm)
    return loss

BELOW = {0: [0, 1, 2, 3], 1: [1, 2, 3], 2: [2], 3: [3], 4: [4]}

def closed(y):
    "The row of labels with all that follows from the tree."
    y = np.array(y)
    for k in range(5):
        if any(y[j]==1 for j in BELOW[k]): y[k] = 1
    for k in range(5):
        if any(y[j]==0 and k in BELOW[j] for j in range(5)): y[k] = 0
    return y

def second_tree(pos=FIVE):
    def loss(z, y):
        terms = []
        for zi,yi in zip(z, y):
            p,yi = sigmoid(zi),closed(yi)
            for k in range(5):
                if yi[k]==1:
                    terms.append(-pos[k]*np.log(max(yi[j]*p[j] for j in BELOW[k] if not np.isnan(yi[j]))))
                elif yi[k]==0: terms.append(-np.log(1-max(p[j] for j in BELOW[k])))
        return np.mean(terms)
    return loss

def second_regions(one, skip=True):
    def loss(z, y):
        terms = []
        for i,k in itertools.product(range(y.shape[0]), range(y.shape[1])):
            known = ~np.isnan(y[i,k])
            t,zk = y[i,k][known],z[i,k][known]
            if known.any() and (t.any() or not skip): terms.append(one(zk, t))
        return np.mean(terms) if terms else 0.
    return loss

def one_tversky(alpha, beta, gamma, smooth):
    def one(z, t):
        p = sigmoid(z)
        tp,fp,fn = (p*t).sum(),(p*(1-t)).sum(),((1-p)*t).sum()
        return (1-(tp+smooth)/(tp+alpha*fp+beta*fn+smooth))**gamma
    return one

def one_dice(z, t): return 1-(2*(sigmoid(z)*t).sum()+1)/(sigmoid(z).sum()+t.sum()+1)

def one_lovasz(errors, t):
    """The definition: errors in falling order, each times how much the Jaccard loss of the set of mistakes
    grows by that pixel."""
    def jaccard(wrong):
        marked = np.where(wrong, 1-t, t)
        union = ((marked+t)>0).sum()
        return 1-(marked*t).sum()/union if union else 0.
    wrong,total,before = np.zeros(len(t), bool),0.,0.
    for j in np.argsort(-errors, kind='stable'):
        wrong[j] = True
        total,before = total+errors[j]*(jaccard(wrong)-before),jaccard(wrong)
    return total

def one_hinge(z, t): return one_lovasz(np.maximum(1-z*(2*t-1), 0), t)

def second_lovasz_softmax(z, t):
    terms = []
    for i in range(len(t)):
        known = t[i]!=-100
        p = np.array([softmax(v) for v in z[i][:,known].T])
        terms += [one_lovasz(abs((t[i][known]==k)-p[:,k]), (t[i][known]==k).astype(float))
            for k in range(z.shape[1]) if (t[i][known]==k).any()]
    return np.mean(terms)

def second_dice_bce(z, y):
    return .5*second_regions(one_dice)(z, y) + np.mean([-np.log(sigmoid(v)) if t==1 else -np.log(1-sigmoid(v))
        for v,t in zip(z.ravel(), y.ravel()) if not np.isnan(t)])

def second_consistency(counts, beta, kind, threshold):
    def loss(z, g):
        terms = []
        for zi,gi in zip(z, g):
            if np.isnan(gi).any(): continue
            p,s = softmax(gi),softmax(zi)
            c = p.argmax()
            far = -np.log(s[c]) if kind=='ce' else np.mean((s-p)**2)
            terms.append(beta**(1-counts[c]/max(counts))*far*(p[c]>=threshold))
        return np.mean(terms)
    return loss


POS = np.array([1., 2, 3, 4])
COUNTS = [50, 20, 5, 1]
CASES = {
    'ce': (WeightedCrossEntropy(), classes, second_classes()),
    'ce weighted smoothed': (WeightedCrossEntropy(W, .1), classes, second_classes(0, .1, W)),
    'ce shares': (WeightedCrossEntropy(W, .1), shares, second_classes(0, .1, W)),
    'focal': (FocalLoss(W, 2., .1), classes, second_classes(2., .1, W)),
    'focal half': (FocalLoss(gamma=.5), classes, second_classes(.5)),
    'logit adjusted': (LogitAdjustedLoss(PRIOR, 1.5, W), classes,
    second_classes(weight=W, shift=1.5*np.log(PRIOR))),
    'bce': (BCEWithNaN(POS, .1), labels, second_labels(0, .1, POS)),
    'binary focal': (BinaryFocalLoss(POS, 2.), labels, second_labels(2., 0, POS)),
    'binary focal half': (BinaryFocalLoss(gamma=.5), labels, second_labels(.5)),
    'asymmetric': (AsymmetricLoss(), labels, second_asymmetric),
    'asymmetric as focal': (AsymmetricLoss(2., 2., 0.), labels, second_labels(2.)),
    'logit adjusted bce': (LogitAdjustedBCE(PRIOR), labels, second_labels(shift=np.log(PRIOR/(1-PRIOR)))),
    **{n: (RobustLoss(n, weight=W), classes, second_robust([n], [1], W))
    for n in [*TERMS, 'nce', 'nfl', 'ngce', 'nmae', 'nrce']},
    'sce': (RobustLoss('sce', (.1, 1.)), classes, second_robust(['ce', 'rce'], [.1, 1])),
    'ngce+mae': (RobustLoss('ngce+mae', (2., 3.)), classes, second_robust(['ngce', 'mae'], [2, 3])),
    'dmi': (DMILoss(), classes, second_dmi),
    'corn': (CORN(), lambda s: (classes(s)[0][:,:3], classes(s)[1]), second_corn()),
    'corn weighted': (CORN(W), lambda s: (classes(s)[0][:,:3], classes(s)[1]), second_corn(W)),
    'tree': (TreeLoss(TREE), treed, second_tree()),
    'tree weighted': (TreeLoss(TREE, np.arange(1., 6)), treed, second_tree(np.arange(1., 6))),
    'dice': (DiceLoss(), masks, second_regions(one_dice)),
    'dice with empty': (DiceLoss(empty='count'), masks, second_regions(one_dice, False)),
    'tversky': (TverskyLoss(), masks, second_regions(one_tversky(.3, .7, 1, 1))),
    'focal tversky': (TverskyLoss(.2, .8, .75, 2.), masks, second_regions(one_tversky(.2, .8, .75, 2))),
    'lovasz hinge': (LovaszHinge(), masks, second_regions(one_hinge)),
    'lovasz hinge with empty': (LovaszHinge(empty='count'), masks, second_regions(one_hinge, False)),
    'lovasz softmax': (LovaszSoftmax(), segments, second_lovasz_softmax),
    'dice bce': (DiceBCE(), masks, second_dice_bce),
    'consistency ce': (SuppressedConsistency(COUNTS, threshold=.7), teacher,
    second_consistency(COUNTS, .5, 'ce', .7)),
    'consistency mse': (SuppressedConsistency(COUNTS, .3, 'mse'), teacher,
    second_consistency(COUNTS, .3, 'mse', 0)),
}

@pytest.fixture(params=CASES, ids=str)
def case(request):
    loss,batch,second = CASES[request.param]
    return loss,batch,second


@pytest.mark.parametrize('seed', range(5))
def test_agrees_with_a_second_implementation(case, seed):
    loss,batch,second = case
    z,t = batch(seed)
    got = loss(torch.tensor(z), torch.tensor(t))
    assert got.dtype==torch.float64 and got.ndim==0
    np.testing.assert_allclose(got.item(), second(z, t), rtol=1e-6, atol=1e-9) # weights are kept in float32


def test_gradient(case):
    loss,batch,_ = case
    z,t = batch(11)
    assert gradcheck(lambda x: loss(x, torch.tensor(t)), torch.tensor(z, requires_grad=True))


def test_right_under_autocast(case):
    loss,batch,second = case
    z,t = batch(3)
    z = torch.tensor(z).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        got = loss(z, torch.tensor(t).float() if np.asarray(t).dtype.kind=='f' else torch.tensor(t))
    assert got.dtype==torch.float32
    # the same rounded logits: only the loss is in float32
    np.testing.assert_allclose(got.item(), second(z.double().numpy(), t), rtol=1e-4, atol=1e-5)


def test_extreme_logits_stay_finite(case):
    loss,batch,_ = case
    z,t = batch(5)
    for size in (40., 300., 3000.):
        x = torch.tensor(np.sign(z)*size, dtype=torch.float32, requires_grad=True)
        value = loss(x, torch.tensor(t).float() if np.asarray(t).dtype.kind=='f' else torch.tensor(t))
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(x.grad).all()


def test_nothing_known_is_zero(case):
    loss,batch,_ = case
    z,t = batch(0)
    nothing = np.full_like(t, -100) if np.asarray(t).dtype.kind=='i' else np.full_like(t, NAN)
    x = torch.tensor(z, requires_grad=True)
    value = loss(x, torch.tensor(nothing))
    value.backward()
    assert value.item()==0 and x.grad.abs().max().item()==0


def test_minus_one_is_as_unknown_as_minus_100(case):
    loss,batch,_ = case
    z,t = batch(2)
    if np.asarray(t).dtype.kind!='i': return
    assert (t==-100).any()
    for one in (np.where(t==-100, -1, t), np.where((t==-100)
            & (np.arange(len(t))%2==0).reshape(-1, *[1]*(t.ndim-1)),
            -1, t)):
        torch.testing.assert_close(loss(torch.tensor(z), torch.tensor(one)),
            loss(torch.tensor(z), torch.tensor(t)),
            rtol=0, atol=0)
    with pytest.raises(ModelError, match='-2 and'):
        loss(torch.tensor(z), torch.tensor(np.where(t==-100, -2, t)))


def test_unknown_targets_have_no_gradient(case):
    loss,batch,_ = case
    z,t = batch(1)
    x = torch.tensor(z, requires_grad=True)
    loss(x, torch.tensor(t)).backward()
    unknown = np.isnan(t) if np.asarray(t).dtype.kind=='f' else t==-100
    if batch is shares or batch is teacher: unknown = unknown.any(1)
    if batch is treed: unknown = np.isnan([closed(row) for row in t])
    grad = (x.grad.movedim(1, -1) if batch is segments else x.grad)[torch.tensor(unknown)]
    assert unknown.any() and (grad==0).all()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max()>0


def test_unknown_targets_change_nothing(case):
    "The logits of unknown entries may be anything."
    loss,batch,_ = case
    z,t = batch(1)
    unknown = np.isnan(t) if np.asarray(t).dtype.kind=='f' else t==-100
    if batch in (shares, teacher): unknown = unknown.any(1)
    if batch is treed: unknown = np.isnan([closed(row) for row in t])
    other = z.copy()
    if batch is segments: other = np.where(unknown[:,None], -z+1, z)
    else: other[unknown] = 1-other[unknown]
    assert not np.array_equal(other, z)
    torch.testing.assert_close(loss(torch.tensor(other), torch.tensor(t)),
        loss(torch.tensor(z), torch.tensor(t)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', [n for n in CASES if n!='dmi'])
def test_none_is_for_each_sample(name):
    loss,batch,_ = CASES[name]
    z,t = map(torch.tensor, batch(4))
    kept = loss.reduction
    try:
        loss.reduction = 'none'
        each = loss(z, t)
        assert each.shape[0]==len(z) and torch.isfinite(each).all()
        if not isinstance(loss, (RobustLoss, DMILoss)):
            torch.testing.assert_close(each[2:3], loss(z[2:3], t[2:3]))
    finally: loss.reduction = kept


def test_activation_is_a_probability(case):
    loss,batch,_ = case
    z = torch.tensor(batch(6)[0])
    p = loss.activation(z)
    assert ((p>=0) & (p<=1)).all() and loss.activation(z.bfloat16()).dtype==torch.float32
    if batch in (classes, shares, segments, teacher) or isinstance(loss, CORN):
        torch.testing.assert_close(p.sum(1), torch.ones_like(p.sum(1)))
    assert len(loss.decodes(z))==len(z)


# ---- what single losses promise -----------------------------------------------------------------------------------

def test_corn_is_rank_consistent():
    z = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))*6
    p = CORN().activation(z)
    above = 1-p.cumsum(1)
    assert (above.diff(dim=1)<=1e-6).all() and p.shape==(500, 6)
    assert torch.equal(CORN().decodes(z), (p.double().cumsum(1)<.5-1e-9).sum(1))
    torch.testing.assert_close(grade_log_probabilities(z).softmax(1), p)

def test_tree_never_contradicts_itself():
    tree = chest_tree()
    p = TreeLoss(tree).activation(torch.randn(200, 32, generator=torch.Generator().manual_seed(1))*5)
    for i,up in enumerate(tree.parents):
        if up: assert (p[:,i]<=p[:,tree.names.index(up)]).all()

def test_tree_of_single_nodes_is_bce():
    z,y = map(torch.tensor, labels(0))
    torch.testing.assert_close(TreeLoss(np.eye(4, dtype=bool))(z, y), BCEWithNaN()(z, y))

def test_tree_credits_only_positive_children():
    z = torch.tensor([[0., 3, 0, 0, 0]], requires_grad=True) # b is likely, but it is not there
    TreeLoss(TREE, reduction='sum')(z, torch.tensor([[1., 0, NAN, NAN, NAN]])).backward()
    assert z.grad[0,0]<0 and z.grad[0,1]>0 and z.grad[0,4]==0

def test_logit_adjustment_is_bayes():
    "The minimiser of the adjusted loss answers by the balanced posterior, and `natural` by the natural one."
    joint = torch.tensor([[.45, .05], [.40, .10]], dtype=torch.float64) # rows: what is seen, columns: class
    prior = joint.sum(0)
    z = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    step = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-12)
    loss = LogitAdjustedLoss(prior)
    def closure():
        step.zero_grad()
        out = sum(joint[i,k]*loss(z[i:i+1], torch.tensor([k])) for i in range(2) for k in range(2))
        out.backward()
        return out
    step.step(closure)
    balanced = joint/prior
    torch.testing.assert_close(loss.activation(z.detach()), balanced/balanced.sum(1, keepdim=True), rtol=1e-4,
        atol=1e-4)
    torch.testing.assert_close(loss.natural(z.detach()), joint/joint.sum(1, keepdim=True), rtol=1e-4,
        atol=1e-4)

@pytest.mark.parametrize('name', ['mae', 'rce', 'nce', 'nfl', 'ngce', 'nmae', 'nrce', 'nce+rce'])
def test_robust_losses_sum_to_a_constant(name):
    "The condition of Ghosh et al. 2017 for robustness to labels drawn at random."
    z = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = sum(RobustLoss(name, reduction='none')(z, torch.full((20,), k)) for k in range(4))
    torch.testing.assert_close(total, total[:1].expand(20))

def test_ce_is_not_robust():
    z = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert sum(RobustLoss('ce', reduction='none')(z, torch.full((20,), k)) for k in range(4)).std()>1

def test_dice_of_the_whole_batch():
    z,y = map(torch.tensor, masks(0))
    rows = [(z[:,k][~y[:,k].isnan()], y[:,k][~y[:,k].isnan()]) for k in range(2)]
    np.testing.assert_allclose(DiceLoss(batch=True)(z, y).item(),
        np.mean([one_dice(a.numpy(), b.numpy()) for a,b in rows]))

@pytest.mark.parametrize('tau', [1., 3.])
@pytest.mark.parametrize('hard', [False, True])
def test_distillation_of_classes(hard, tau):
    z,t = map(torch.tensor, classes(0))
    g = torch.tensor(teacher(1)[1]).nan_to_num(0.5)
    p = np.array([softmax(v) for v in (g/tau).numpy()])
    s = np.array([softmax(v) for v in (z/tau).numpy()])
    far = (np.mean([-np.log(softmax(a)[b.argmax()]) for a,b in zip(z.numpy(), g.numpy())]) if hard
        else tau**2*np.mean((p*np.log(p/s)).sum(1)))
    loss = DistillationLoss(WeightedCrossEntropy(W), .3, tau, hard)
    np.testing.assert_allclose(loss(z, t, g).item(),
        .7*second_classes(weight=W)(z.numpy(), t.numpy()) + .3*far, rtol=1e-9)
    assert gradcheck(lambda x: loss(x, t, g), z.clone().requires_grad_())
    assert gradcheck(lambda x: loss((x, x.flip(0)), t, g), z.clone().requires_grad_())

@pytest.mark.parametrize('hard', [False, True])
def test_distillation_of_labels(hard):
    z,y = map(torch.tensor, labels(0))
    g = torch.tensor(labels(1)[0])
    p,s = sigmoid(g.numpy()/2),sigmoid(z.numpy()/2)
    s1 = sigmoid(z.numpy())
    far = (np.where(g.numpy()>=0, -np.log(s1), -np.log(1-s1)).mean() if hard
        else 4*(p*np.log(p/s) + (1-p)*np.log((1-p)/(1-s))).mean())
    loss = DistillationLoss(BCEWithNaN(), .4, 2., hard)
    np.testing.assert_allclose(loss(z, y, g).item(), .6*second_labels()(z.numpy(), y.numpy()) + .4*far,
        rtol=1e-9)
    assert gradcheck(lambda x: loss(x, y, g), z.clone().requires_grad_())

def test_the_teacher_learns_nothing():
    g = torch.randn(9, 4, requires_grad=True)
    DistillationLoss(WeightedCrossEntropy())(torch.randn(9, 4, requires_grad=True),
        torch.zeros(9, dtype=torch.long), g).backward()
    SuppressedConsistency(COUNTS, kind='mse')(torch.randn(9, 4, requires_grad=True), g).backward()
    assert g.grad is None


@pytest.mark.parametrize('smoothing', [0., .2])
def test_classes_of_weight_zero(smoothing):
    "A batch which holds only a class that training never saw."
    z = torch.randn(4, 3, requires_grad=True)
    loss = WeightedCrossEntropy([0., 1, 2], smoothing)(z, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.item()==0 and z.grad.abs().max()==0


# ---- other people's implementations --------------------------------------------------------------------------------

@pytest.mark.parametrize('smoothing', [0., .2])
def test_cross_entropy_is_torchs(smoothing):
    z,t = map(torch.tensor, classes(0))
    torch.testing.assert_close(WeightedCrossEntropy(W, smoothing)(z, t),
        torch.nn.functional.cross_entropy(z, t, torch.tensor(W), label_smoothing=smoothing))

def test_focal_is_torchvisions():
    from torchvision.ops import sigmoid_focal_loss
    z,y = torch.tensor(labels(0)[0]),torch.tensor(labels(0)[1]).nan_to_num(1.)
    torch.testing.assert_close(BinaryFocalLoss()(z, y),
        sigmoid_focal_loss(z, y, alpha=-1, gamma=2, reduction='mean'))

def test_lovasz_is_kornias():
    from kornia.losses import lovasz_hinge_loss, lovasz_softmax_loss
    one = [(torch.randn(1, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(s)),
        torch.randint(0, 2, (1, 6, 6), generator=torch.Generator().manual_seed(s))) for s in range(5)]
    for a,b in one: torch.testing.assert_close(LovaszHinge()(a, b[:,None].double()), lovasz_hinge_loss(a, b))
    many = torch.randn(1, 3, 6, 6, dtype=torch.float64,
        generator=torch.Generator().manual_seed(9)),torch.arange(36).reshape(1, 6, 6)%3
    torch.testing.assert_close(LovaszSoftmax()(*many), lovasz_softmax_loss(*many))


# ---- bad input ----------------------------------------------------------------------------------------------------

def wrong_shapes():
    z,one = torch.randn(6, 4),torch.randn(6, 1)
    k = torch.zeros(6, dtype=torch.long)
    for loss in (WeightedCrossEntropy(), FocalLoss(), LogitAdjustedLoss(PRIOR), RobustLoss(), DMILoss(),
            CORN()):
        yield from ((loss, z, k[:,None]), (loss, z, k[:5]), (loss, z, k.float()), (loss, z[:,:,None], k),
            (loss, z, k+9), (loss, z, k-2))
    for loss in (BCEWithNaN(), BinaryFocalLoss(), AsymmetricLoss(), LogitAdjustedBCE(PRIOR),
            TreeLoss(np.eye(4, dtype=bool))):
        yield from ((loss, one, torch.zeros(6)), (loss, z, torch.zeros(6, 1)), (loss, z, torch.zeros(1, 4)),
            (loss, z, torch.full((6, 4), 2.)), (loss, z, torch.full((6, 4), -1.)))
    m = torch.randn(2, 1, 8, 8)
    for loss in (DiceLoss(), TverskyLoss(), LovaszHinge(), DiceBCE()):
        yield from ((loss, m, torch.zeros(2, 8, 8)), (loss, m, torch.zeros(1, 1, 8, 8)), (loss, m, m*0+255),
            (loss, m[:,0,0], m[:,0,0]*0))
    yield from ((LovaszSoftmax(), torch.randn(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)),
        (LovaszSoftmax(), torch.randn(2, 3, 8, 8), torch.full((2, 8, 8), 3)))
    yield from ((SuppressedConsistency(COUNTS), z, z[:1]), (SuppressedConsistency(COUNTS), z[:,:3], z[:,:3]))
    yield from ((WeightedCrossEntropy(W), z[:,:3], k), (CORN(W), z, k), (BCEWithNaN(POS), z[:,:3], z[:,:3]*0),
        (TreeLoss(TREE), z, z*0))

@pytest.mark.parametrize('loss, z, t', [pytest.param(*c, id=f'{type(c[0]).__name__}-{i}')
    for i,c in enumerate(wrong_shapes())])
def test_wrong_shapes_and_values_are_refused(loss, z, t):
    with pytest.raises(ModelError): loss(z, t)

@pytest.mark.parametrize('make', [lambda: WeightedCrossEntropy(reduction='avg'), lambda: FocalLoss(gamma=-1.),
    lambda: BCEWithNaN(smoothing=1.), lambda: AsymmetricLoss(clip=1.), lambda: FocalLoss(gamma=NAN),
    lambda: LogitAdjustedLoss([[.5, .5]]), lambda: LogitAdjustedBCE([.5, 1.5]), lambda: RobustLoss('nnl'),
    lambda: RobustLoss('nce+rce', (1., 2., 3.)), lambda: RobustLoss('gce', q=0.),
    lambda: TreeLoss(np.zeros((3, 3), bool)), lambda: TverskyLoss(-1.), lambda: DiceLoss(empty='no'),
    lambda: DiceBCE(batch=True, reduction='none'), lambda: SuppressedConsistency([0, 0]),
    lambda: SuppressedConsistency(COUNTS, 0.), lambda: DistillationLoss(WeightedCrossEntropy(), 2.),
    lambda: DistillationLoss(lambda z, t: 0), lambda: DistillationLoss(CORN()),
    lambda: default_loss(torch.zeros(3), kind='dice'),
    lambda: default_loss(torch.zeros(3, dtype=torch.long), kind='asymmetric'),
    lambda: default_loss(torch.zeros(3), kind='logit_adjusted')])
def test_wrong_settings_are_refused(make):
    with pytest.raises(ModelError): make()

def test_contradicting_tree_labels_are_refused():
    with pytest.raises(ModelError, match='Image 1 of the batch'):
        TreeLoss(TREE)(torch.zeros(2, 5), torch.tensor([[1., 1, 0, 0, 0], [0, NAN, 1, 0, 0]]))

def test_losses_move_with_their_weights():
    for loss in (LogitAdjustedLoss(PRIOR, weight=W), TreeLoss(TREE), CORN(W), SuppressedConsistency(COUNTS)):
        assert list(loss.buffers()) and loss.state_dict()


# ---- in a Learner -------------------------------------------------------------------------------------------------

def learner(loss, targets, n_out, **kwargs):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    x = torch.randn(len(targets), 6, generator=torch.Generator().manual_seed(0))
    dls = DataLoaders.from_dsets(list(zip(x, targets)), list(zip(x, targets)), bs=8, num_workers=0,
        device=torch.device('cpu'))
    torch.manual_seed(0)
    import fastai.callback.progress  # noqa: F401 (gives Learner no_bar)
    return Learner(dls, torch.nn.Linear(6, n_out), loss_func=loss, **kwargs)

K = torch.arange(32)%4
Y = torch.tensor(np.where(np.random.default_rng(0).random((32, 4))<.2, NAN,
    np.random.default_rng(1).integers(0, 2, (32, 4))), dtype=torch.float32)

@pytest.mark.parametrize('loss, targets, n_out',
    [(WeightedCrossEntropy(W), K, 4), (FocalLoss(), K, 4), (LogitAdjustedLoss(PRIOR), K, 4),
    (RobustLoss(), K, 4), (DMILoss(), K, 4), (CORN(), K, 3),
    (BCEWithNaN(), Y, 4), (AsymmetricLoss(), Y, 4), (LogitAdjustedBCE(PRIOR), Y, 4),
    (TreeLoss(np.eye(4, dtype=bool)), Y, 4), (DistillationLoss(WeightedCrossEntropy()), K, 4)],
    ids=lambda v: type(v).__name__ if isinstance(v, torch.nn.Module) else '')
def test_a_learner_trains_and_predicts(loss, targets, n_out, capsys):
    learn = learner(loss, targets, n_out, lr=.05)
    with learn.no_bar(), learn.no_logging():
        before = learn.validate()[0]
        learn.fit(4, wd=0.)
        assert learn.validate()[0]<before
        p,t,decoded = learn.get_preds(with_decoded=True)
    assert p.shape==(32, 4) and ((p>=0) & (p<=1)).all() and len(decoded)==32
    torch.testing.assert_close(t, targets, equal_nan=True)

@pytest.mark.parametrize('loss, targets, n_out',
    [(WeightedCrossEntropy(W), K, 4), (FocalLoss(), K, 4), (RobustLoss(), K, 4), (CORN(), K, 3),
    (BCEWithNaN(), Y, 4), (AsymmetricLoss(), Y, 4)],
    ids=lambda v: type(v).__name__ if isinstance(v, torch.nn.Module) else '')
def test_mixup_of_fastai_works(loss, targets, n_out):
    from fastai.callback.mixup import MixUp
    learn = learner(loss, targets, n_out, lr=.05, cbs=MixUp(.4))
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert all(math.isfinite(v) for v in map(float, learn.recorder.losses)) and loss.reduction=='mean'
