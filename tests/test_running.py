"""The metrics of a fit: equal to the functions for any division into batches, one accumulation for all of
them, and at work in an `xray_learner`."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics as skm
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from hypothesis import given, settings
from hypothesis import strategies as st

from radiology_ai.core import DataError, ModelError
from radiology_ai.losses.base import BCEWithNaN, WeightedCrossEntropy
from radiology_ai.losses.regions import DiceLoss
from radiology_ai.losses.structured import CORN
from radiology_ai.metrics.calibration import calibration
from radiology_ai.metrics.classification import balanced_accuracy, f_beta, macro_auroc, mcc, quadratic_kappa
from radiology_ai.metrics.masks import dice
from radiology_ai.metrics.operating import operating_point
from radiology_ai.metrics.ranking import auroc, average_precision
from radiology_ai.metrics.running import (
    AUROC,
    ECE,
    F1,
    MCC,
    AveragePrecision,
    BalancedAccuracy,
    Brier,
    Collected,
    MeanDice,
    QuadraticKappa,
    Sensitivity,
    Specificity,
    scores_auroc,
)
from radiology_ai.train.callbacks import KeepBest, Plateau


def run(metrics, loss, logits, targets, sizes, *, vocab=None):
    "The values after batches of these sizes, as the recorder asks for them."
    for m in metrics: m.reset()
    assert sum(sizes)==len(logits)
    for z,t in zip(torch.as_tensor(logits).split(sizes), torch.as_tensor(targets).split(sizes)):
        learn = SimpleNamespace(pred=z, yb=(t,), loss_func=loss, metrics=metrics,
            dls=SimpleNamespace(vocab=vocab))
        for m in metrics: m.accumulate(learn)
    return {m.name: m.value for m in metrics}


@st.composite
def divisions(draw, n):
    cuts = sorted(draw(st.sets(st.integers(1, n-1), max_size=12)))
    return np.diff([0, *cuts, n]).tolist()


N = 60
GEN = np.random.default_rng(0)
LABELS = np.where(GEN.random((N, 3))<.3, np.nan, GEN.integers(0, 2, (N, 3)))
LOGITS = GEN.normal(size=(N, 3)) + np.nan_to_num(LABELS, nan=.5)
CLASSES = GEN.integers(0, 3, N)
CLASSES[[4, 50]] = -100
KNOWN = CLASSES>=0


def columns(figure): # the mean over labels, each by its function
    p = 1/(1+np.exp(-LOGITS))
    return np.mean([figure(LABELS[~np.isnan(LABELS[:,k]),k], p[~np.isnan(LABELS[:,k]),k]) for k in range(3)])


def single(figure, threshold): return lambda t, p: operating_point(t, p, threshold).value[figure]


@given(divisions(N))
@settings(max_examples=40, deadline=None)
def test_labels_with_unknowns_in_any_batches(sizes):
    got = run([AUROC(), AveragePrecision(), Sensitivity(.4), Specificity(.4), F1(.4), BalancedAccuracy(.4),
        MCC(.4), Brier(), ECE()], BCEWithNaN(), LOGITS, LABELS, sizes)
    want = dict(auroc=columns(auroc), average_precision=columns(average_precision),
        sensitivity=columns(single('sensitivity', .4)), specificity=columns(single('specificity', .4)),
        f1=columns(lambda t, p: f_beta(t, p>=.4)),
        balanced_accuracy=columns(lambda t, p: balanced_accuracy(t, p>=.4)),
        mcc=columns(lambda t, p: mcc(t, p>=.4)),
        brier=columns(lambda t, p: calibration(t, p).brier), ece=columns(lambda t, p: calibration(t, p).ece))
    assert list(got)==list(want)
    for k,v in want.items(): assert got[k]==pytest.approx(v, abs=1e-9), k


@given(divisions(N))
@settings(max_examples=40, deadline=None)
def test_classes_and_grades_in_any_batches(sizes):
    p = torch.as_tensor(LOGITS).softmax(1).numpy()[KNOWN]
    t,said = CLASSES[KNOWN],p.argmax(1)
    each = [(t==k).astype(float) for k in range(3)]
    got = run([AUROC(), AveragePrecision(), BalancedAccuracy(), MCC(), F1(), Sensitivity(), Specificity(),
        Brier(), ECE(), QuadraticKappa()], WeightedCrossEntropy(), LOGITS, CLASSES, sizes)
    want = [macro_auroc(t, p), np.mean([skm.average_precision_score(each[k], p[:,k]) for k in range(3)]),
        skm.balanced_accuracy_score(t, said), skm.matthews_corrcoef(t, said),
        skm.f1_score(t, said, average='macro'), skm.recall_score(t, said, average='macro'),
        np.mean([((said!=k) & (t!=k)).sum()/(t!=k).sum() for k in range(3)]),
        np.mean([skm.brier_score_loss(each[k], p[:,k]) for k in range(3)]),
        np.mean([calibration(each[k], p[:,k]).ece for k in range(3)]), quadratic_kappa(t, said)]
    for (k,v),w in zip(got.items(), want): assert v==pytest.approx(w, abs=1e-9), k


@given(divisions(N))
@settings(max_examples=25, deadline=None)
def test_ordinal_grades_in_any_batches(sizes):
    loss = CORN()
    z = torch.as_tensor(LOGITS[:,:2])
    p,said = loss.activation(z).numpy()[KNOWN],loss.decodes(z).numpy()[KNOWN]
    t = CLASSES[KNOWN]
    got = run([QuadraticKappa(), AUROC(against=0), BalancedAccuracy(), Sensitivity(.6, against=0),
        ECE(against=0)], loss, z, CLASSES, sizes)
    any_ = 1-p[:,0].astype(float)
    want = [skm.cohen_kappa_score(t, said, weights='quadratic'), auroc(t>0, any_), balanced_accuracy(t, said),
        np.mean(any_[t>0]>=.6), calibration(t>0, any_).ece]
    for (k,v),w in zip(got.items(), want): assert v==pytest.approx(w, abs=1e-9), k
    assert (said!=p.argmax(1)).any() # the median is not the mode: the loss decides


def test_two_classes_and_one_output_are_one_finding():
    t = GEN.integers(0, 2, N)
    t[3] = -100
    z = torch.as_tensor(GEN.normal(size=(N, 2)))
    one = (z[:,1:]-z[:,:1])
    metrics = lambda: [AUROC(), Sensitivity(.3), MCC(.3), Brier()]
    two = run(metrics(), WeightedCrossEntropy(), z, t, [40, 20])
    single = run(metrics(), BCEWithNaN(), one, np.where(t<0, np.nan, t)[:,None], [7, 53])
    assert list(two.values())==pytest.approx(list(single.values()), abs=1e-6)
    first,second = (run([AUROC(label=k), Sensitivity(.3, label=k)], WeightedCrossEntropy(), z, t, [60])
        for k in (0, 1))
    assert second['auroc_1']==two['auroc'] and first['auroc_0']==pytest.approx(two['auroc'])
    p = z.softmax(1).numpy()
    assert second['sensitivity_1']==two['sensitivity']==np.mean(p[t==1,
        1]>=.3) and first['sensitivity_0']==np.mean(p[t==0,0]>=.3)


def test_one_label_by_name():
    names = ['opacity','effusion','nodule']
    got = run([AUROC(label='effusion'), AUROC(label=1), Brier(label='nodule')], BCEWithNaN(), LOGITS, LABELS,
        [30, 30], vocab=names)
    keep = ~np.isnan(LABELS[:,1])
    assert got['auroc_effusion']==got['auroc_1']==pytest.approx(auroc(LABELS[keep,1], LOGITS[keep,1]),
        abs=1e-9)
    with pytest.raises(ModelError, match="no label 'mass'"):
        run([AUROC(label='mass')], BCEWithNaN(), LOGITS, LABELS, [60], vocab=names)
    with pytest.raises(ModelError, match='no label 7'):
        run([AUROC(label=7)], BCEWithNaN(), LOGITS, LABELS, [60])


def test_what_is_not_defined_is_nan_and_the_others_go_on():
    labels = LABELS.copy()
    labels[:,0] = 0 # no positive
    labels[:,2] = np.nan # nothing known
    got = run([AUROC(), Brier(), AUROC(label=0), Sensitivity(label=0)], BCEWithNaN(), LOGITS, labels, [60])
    keep = ~np.isnan(LABELS[:,1])
    assert got['auroc']==pytest.approx(auroc(LABELS[keep,1], LOGITS[keep,1])) and not math.isnan(got['brier'])
    assert math.isnan(got['auroc_0']) and math.isnan(got['sensitivity_0'])
    assert math.isnan(scores_auroc([[.5]], [[np.nan]]))
    assert AUROC().value is None


def test_bad_use_is_refused():
    with pytest.raises(DataError, match='hold NaN'): run([AUROC()], BCEWithNaN(), LOGITS*np.nan, LABELS, [60])
    with pytest.raises(DataError, match='hold NaN'): run([F1()], BCEWithNaN(), LOGITS*np.nan, LABELS, [60])
    with pytest.raises(ModelError, match='is for grades'):
        run([QuadraticKappa()], BCEWithNaN(), LOGITS, LABELS, [60])
    with pytest.raises(ModelError, match='CrossEntropyLoss does not tell'):
        run([AUROC()], torch.nn.CrossEntropyLoss(), LOGITS, CLASSES, [60])


@given(divisions(12))
@settings(max_examples=15, deadline=None)
def test_mean_dice_in_any_batches(sizes):
    gen = np.random.default_rng(1)
    truth = (gen.random((12, 2, 9, 7))<.4).astype(np.float32)
    truth[3],truth[5],truth[6,0,2] = 0,np.nan,np.nan
    z = gen.normal(size=truth.shape)
    z[4] = -9
    pairs = [(a, b) for i in range(12) for a,b in zip(truth[i], z[i]>=0) if i!=5]
    got = run([MeanDice(), MeanDice(lesions=True)], DiceLoss(), z, truth, sizes)
    assert got['mean_dice']==pytest.approx(np.mean([dice(a, b) for a,b in pairs]), abs=1e-12)
    assert got['mean_dice_of_lesions']==pytest.approx(np.mean([dice(a, b) for a,b in pairs if (a>0).any()]),
        abs=1e-12)


def test_mean_dice_of_class_numbers():
    gen = np.random.default_rng(2)
    t,z = gen.integers(0, 3, (6, 8, 8)),gen.normal(size=(6, 3, 8, 8))
    t[0,0] = -100
    soft = SimpleNamespace(activation=lambda z: z.softmax(1))
    got = run([MeanDice()], soft, z, t, [4, 2])['mean_dice']
    said = z.argmax(1)
    assert got==pytest.approx(np.mean([dice(np.where(a<0, np.nan, a==k), b==k) for a,b in zip(t, said)
        for k in (1, 2)]), abs=1e-12)
    with pytest.raises(ModelError, match='MeanDice is for masks'):
        run([MeanDice()], DiceLoss(), np.zeros((2, 3, 4, 4)), np.zeros((2, 1, 4, 4)), [2])


# --- in a fit ---

def small_learner(metrics, n=90, **kwargs):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=gen)
    y = (x[:,:2] + .5*torch.randn(n, 2, generator=gen)>0).float()
    y[torch.rand(n, 2, generator=gen)<.2] = torch.nan
    train,valid = DataLoader(list(zip(x[:40], y[:40])), 16),DataLoader(list(zip(x[40:], y[40:])), 16)
    torch.manual_seed(0)
    learn = Learner(DataLoaders(train, valid, device='cpu'), torch.nn.Linear(5, 2), BCEWithNaN(),
        metrics=metrics, lr=.1, **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = lambda values: None
    return learn,x,y


def test_one_accumulation_for_all_metrics(monkeypatch):
    kept,asked = [],[]
    add = Collected.add
    def counted(self, learn):
        asked.append(1)
        n = len(self.parts)
        add(self, learn)
        kept.append(len(self.parts)-n)
    monkeypatch.setattr(Collected, 'add', counted)
    moves,activation = [],BCEWithNaN.activation
    monkeypatch.setattr(BCEWithNaN, 'activation', lambda self, z: (moves.append(1), activation(self, z))[1])
    metrics = [AUROC(), AveragePrecision(), F1(), Brier(), ECE(), AUROC(label=1)]
    learn,*_ = small_learner(metrics)
    learn.fit(3)
    batches = 3*4 # 50 images in batches of 16, three epochs
    assert len(asked)==6*batches and sum(kept)==batches and len(moves)==batches
    assert len({id(m.collected) for m in metrics})==1 and len(metrics[0].collected.parts)==4


def test_recorder_shows_names_and_values_of_the_last_epoch():
    learn,x,y = small_learner([AUROC(), Sensitivity(.3), MCC(label=0)])
    learn.fit(2)
    assert list(learn.recorder.metric_names)[3:-1]==['auroc','sensitivity','mcc_0']
    with torch.no_grad(): p = learn.model(x[40:]).sigmoid().numpy()
    t = y[40:].numpy()
    assert learn.recorder.values[-1][2]==pytest.approx(macro_auroc(t, p), abs=1e-9)
    last = list(learn.recorder.values[-1][2:])
    assert list(learn.validate()[1:])==pytest.approx(last, abs=1e-12)
    learn.validate(dl=learn.dls.train)
    assert len(learn.metrics[0].collected.parts)==3 # 40 images


def test_metrics_of_the_training_batches_too():
    learn,*_ = small_learner([AUROC(), Brier()])
    learn.recorder.train_metrics = True
    learn.fit(1)
    row = dict(zip(list(learn.recorder.metric_names)[1:], learn.recorder.values[-1]))
    assert {'train_auroc','valid_auroc','train_brier',
        'valid_brier'}<=set(row) and row['train_auroc']!=row['valid_auroc']


@pytest.mark.parametrize('monitor,best', [('brier', min), ('auroc', max), ('valid_loss', min)])
def test_the_best_epoch_is_the_one_with_the_best_figure(monitor, best):
    learn,x,y = small_learner([AUROC(), Brier()], cbs=KeepBest(monitor))
    learn.fit(6, lr=2.) # a rate that jumps about
    names = list(learn.recorder.metric_names)[1:]
    values = [row[names.index(monitor)] for row in learn.recorder.values]
    assert len(set(values))>2
    with torch.no_grad(): z = learn.model(x[40:])
    p,t = z.sigmoid().numpy(),y[40:].numpy()
    kept = {'auroc': lambda: scores_auroc(p, t), 'valid_loss': lambda: None,
        'brier': lambda: np.mean([calibration(t[:,k], p[:,k]).brier for k in (0, 1)])}[monitor]()
    if kept is None:
        # as the recorder averages
        kept = sum(BCEWithNaN()(z[i:i+16], y[40+i:56+i]).item()*len(z[i:i+16]) for i in range(0, 50, 16))/50
    assert kept==pytest.approx(best(values), abs=1e-6)


def test_validation_after_a_fit_leaves_the_best_weights():
    learn,*_ = small_learner([AUROC()], cbs=[KeepBest('auroc'), Plateau('auroc')])
    learn.fit(3, lr=2.)
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    best = max(row[2] for row in learn.recorder.values)
    first = list(learn.validate())
    assert list(learn.validate())==first and first[1]==pytest.approx(best, abs=1e-12)
    assert all(torch.equal(before[k], v) for k,v in learn.model.state_dict().items())


@pytest.mark.slow
def test_in_an_xray_learner():
    from radiology_ai.train.learner import predict_logits, xray_learner
    gen = np.random.default_rng(4)
    y = gen.integers(0, 4, 48)
    x = np.clip(gen.normal(.3, .05, (48, 1, 32, 32)) + y[:,None,None,None]*.1, 0, 1).astype(np.float32)
    data = list(zip(torch.tensor(x), torch.tensor(y)))
    dls = DataLoaders(DataLoader(data[:32], 8), DataLoader(data[32:], 6), device='cpu')
    dls.vocab = ['0','I','II','III']
    metrics = [AUROC(against=0), QuadraticKappa(), BalancedAccuracy(), Sensitivity(against=0),
        Brier(label='II')]
    learn = xray_learner(dls, 'resnet10t', WeightedCrossEntropy(), metrics=metrics, pretrained=False,
        monitor='quadratic_kappa')
    learn.fit_two_phase(2)
    logits,targets = predict_logits(learn, dls.valid)
    best = max(learn.history, key=lambda row: row['quadratic_kappa'])
    assert quadratic_kappa(targets, logits.argmax(1))==pytest.approx(best['quadratic_kappa'], abs=1e-6)
    p = torch.tensor(logits).softmax(1).numpy()
    assert scores_auroc(p, targets, against=0)==pytest.approx(best['auroc'], abs=1e-6)
    assert calibration(targets==2, p[:,2]).brier==pytest.approx(best['brier_II'], abs=1e-5)
    assert [k for k in learn.history[0] if k not in ('phase','epoch','train_loss','valid_loss')]==['auroc',
        'quadratic_kappa','balanced_accuracy','sensitivity','brier_II']
