"""Chest triage: what is learnt, predicted, mended, averaged and called keeps to the tree, whatever the label set; figures of
the long tail; a run that is trained further on another hospital; named errors."""
import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from radiology_ai.core import BundleError, DataError, ModelError, RadiologyError, StoreError
from radiology_ai.data.tree import LabelTree
from radiology_ai.losses.base import BCEWithNaN
from radiology_ai.losses.labels import AsymmetricLoss
from radiology_ai.losses.structured import TreeLoss
from radiology_ai.losses.tree import UnderTree
from radiology_ai.metrics.ranking import auroc, average_precision
from radiology_ai.models.backbone import XrayModel
from radiology_ai.models.bundle import load_bundle, save_bundle
from radiology_ai.models.heads import Head, tree_parents
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.serve.predict import predict
from radiology_ai.tasks.adapt import adapt_run
from radiology_ai.tasks.chest import CHEST, LABEL_SETS, ChestSettings, chest_seen, label_set
from radiology_ai.tasks.registry import evaluate, report, train
from radiology_ai.tasks.run import read_record, write_record
from radiology_ai.tasks.tree import (
    Tree,
    by_frequency,
    called_tier,
    enforced,
    long_tail_figures,
    part_of,
    scored_tier,
    tier_figures,
    tree_calls,
    triage_score,
)

TREES = [*LABEL_SETS, 'deep']


def tree_named(name: str) -> LabelTree:
    "A label set, or a chain of ten with two branches."
    if name!='deep': return label_set(name)
    names = tuple('abcdefghij')
    return LabelTree(names, ('', *names[:7], 'b', ''), ('low', *('high',)*8, 'low'), ('low', 'high'), 'j')


def below_parent(tree, p) -> bool:
    "No child is above its parent."
    at = tree.names.index
    return all((p[:, i]<=p[:, at(q)]).all() for i, q in enumerate(tree.parents) if q)


class Body(torch.nn.Module):
    def forward(self, x): return x


def reading(tree, seed=0, parents=True):
    "A network whose last layer mixes its (B, 4, 1, 1) images at random, with the head of a tree."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        C = len(tree.names)
        head = Head(4, C, batchnorm=False, multi_label=True, parents=tree_parents(tree) if parents else None)
        torch.nn.init.normal_(head.linear.weight, std=3.)
    return XrayModel(Body(), head, {'n_in': 4}).eval()


class Vectors(list):
    "A store of images of four numbers."
    def position(self, image_id): return int(image_id)


@pytest.fixture
def by_numbers(monkeypatch):
    "Networks are asked for (N, 4) numbers in place of images."
    def logits(models, store, positions, bs=64, show=None):
        x = torch.tensor(np.stack([store[i] for i in positions]), dtype=torch.float32)[:, :, None, None]
        with torch.no_grad(): return np.stack([m(x).numpy() for m in models])
    monkeypatch.setattr('radiology_ai.tasks.kinds.network_logits', logits)


@pytest.mark.parametrize('name', TREES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_prediction_of_a_head_violates_the_tree(name, dtype):
    tree, gen = tree_named(name), torch.Generator().manual_seed(0)
    net = reading(tree).requires_grad_(False).to(dtype)
    for slopes in (False, True):
        if slopes:
            C = len(tree.names)
            net.head.rescale(torch.rand(C, generator=gen)*3+.05, torch.randn(C, generator=gen)*4)
        for scale in (1e-3, 1, 30, 3e4):
            z = (torch.randn(300, len(tree.names), generator=gen)*scale).to(dtype)
            held = net((torch.randn(300, 4, 1, 1, generator=gen)*min(scale, 100)).to(dtype)).sigmoid().numpy()
            for p in (held, enforced(z.float().numpy(), tree.below),
                    enforced(z.sigmoid().float().numpy(), tree.below),
                    UnderTree(tree, BCEWithNaN()).activation(z).numpy()):
                assert below_parent(tree, p) and not np.isnan(p).any()


@pytest.mark.parametrize('name', TREES)
def test_mending_and_averaging_and_calling_keep_to_the_tree(name, by_numbers):
    tree, gen = tree_named(name), np.random.default_rng(1)
    vocab, n = list(tree.names), 240
    store = Vectors(gen.normal(size=(n, 4)))
    leaves = (gen.random((n, len(vocab)))<.12).astype(float)
    truth = ((leaves@tree.below)>0).astype(float)
    if tree.normal: truth[:, vocab.index(tree.normal)] = ~(truth[:, tree.disease]>0).any(1)
    truth[gen.random(truth.shape)<.15] = np.nan
    truth[:, 3] = np.where(truth[:, 3]==1, np.nan, truth[:, 3]) # no positive of this category here
    rows = pd.DataFrame(truth, columns=vocab).assign(image_id=np.arange(n), patient_id=np.arange(n)//2)
    answer, settings = dataclasses.replace(Tree(), tree=tree), ChestSettings()
    nets = [reading(tree, seed) for seed in range(3)]
    rules = [answer.calibrate(net, store, rows, vocab, settings) for net in nets]
    assert all(r['kind']=='platt' and 'reason' in r['labels'][3] for r in rules)
    for some in ([nets[0]], nets):
        table = pd.concat([rows, answer.scores(some, store, rows, vocab)], axis=1)
        p = table[[f'p_{v}' for v in vocab]].to_numpy()
        assert below_parent(tree, p) and ((p>=0) & (p<=1)).all() and table.triage.between(0, 1).all()
        cuts = answer.tune(table, vocab)
        assert cuts[3] is None
        told = answer.row(answer.scores(some, store, rows, vocab), cuts, vocab)
        called = [v for v in vocab if f'call_{v}' in told]
        calls = told[[f'call_{v}' for v in called]].set_axis(called, axis=1).astype(float)
        assert not tree.contradictions(calls)
        judged = answer.thresholds(table, cuts)
        for v in called: assert ((judged[f'p_{v}']>=judged[f'threshold_{v}'])==(calls[v]>0)).all()
        assert (judged.tier==told.tier).all() if tree.order else True
        if tree.normal and tree.order: assert ((told.tier==tree.order[0])==(calls[tree.normal]>0)).all()
    # a second line takes the place of the first
    again = answer.calibrate(nets[0], store, rows, vocab, settings)
    assert again==rules[0]


@pytest.mark.parametrize('name', TREES)
def test_a_category_without_a_line_takes_the_one_above(name, by_numbers):
    tree = tree_named(name)
    child = next((i for i, p in enumerate(tree.parents) if p), None)
    if child is None: pytest.skip('no category stands below another')
    gen, vocab = np.random.default_rng(0), list(tree.names)
    truth = (gen.random((100, len(vocab)))<.4).astype(float)
    truth[:, child] = 0
    z = gen.normal(size=truth.shape)
    slope, bias, told = dataclasses.replace(Tree(), tree=tree).rules('platt', truth, z, np.arange(100), vocab)
    parent = vocab.index(tree.parents[child])
    if 'reason' in told['labels'][parent]: pytest.skip('nor has its parent')
    assert told['labels'][child]['line of']==vocab[parent] and (slope[child], bias[child])==(slope[parent],
        bias[parent])


@pytest.mark.parametrize('name', TREES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_any_loss_under_a_tree(name, dtype):
    tree, gen = tree_named(name), torch.Generator().manual_seed(2)
    C, below = len(tree.names), torch.from_numpy(tree.below).float()
    weight = torch.rand(C, generator=gen)*5+1
    for _ in range(5):
        z = (torch.randn(32, C, generator=gen)*3).to(dtype)
        t = ((torch.rand(32, C, generator=gen)<.1).float()@below>0).float()
        t[torch.rand(32, C, generator=gen)<.3] = torch.nan
        one, two = TreeLoss(tree, weight)(z, t), UnderTree(tree, BCEWithNaN(weight))(z, t)
        assert one.item()==pytest.approx(two.item(), rel=1e-5)
    hard = z.double().requires_grad_()
    g = torch.autograd.grad(UnderTree(tree, AsymmetricLoss())(hard, t), hard)[0]
    assert torch.isfinite(g).all()
    nothing = torch.full_like(t, torch.nan)
    assert UnderTree(tree, AsymmetricLoss())(hard, nothing).item()==0
    with pytest.raises(ModelError, match='between 0 and 1'): UnderTree(tree, BCEWithNaN())(z, t*0+.5)


def test_the_label_sets_and_their_tiers():
    sizes = {'tree32': 32, 'nih14': 14, 'chexpert': 14}
    assert {k: len(label_set(k).names) for k in LABEL_SETS}==sizes
    tiers = {k: dict(zip(label_set(k).names, label_set(k).tiers)) for k in LABEL_SETS}
    assert tiers['nih14']['Pneumothorax']==tiers['chexpert']['Pneumothorax']=='urgent'
    assert tiers['nih14']['Mass']=='pathologic' and tiers['chexpert']['Support Devices']=='no pathology'
    part = ChestSettings(label_set='chexpert', label='Pneumonia, Lung Opacity, No Finding').tree()
    assert dict(zip(part.names, part.parents))=={'No Finding': '', 'Lung Opacity': '',
        'Pneumonia': 'Lung Opacity'}
    with pytest.raises(DataError, match="no label set 'tree33'.*Did you mean 'tree32'"): label_set('tree33')
    with pytest.raises(DataError, match="no category 'Pneumonias'"): ChestSettings(label='Pneumonias').tree()
    for wrong in (dict(hierarchy='min'), dict(loss='mse'), dict(pos_weight=2.), dict(augment=11.),
            dict(repeats=5),
            dict(contradictions='drop'), dict(calls='sp50'), dict(tier_calls='sp95'), dict(pool='mean'),
            dict(head_layers=4), dict(head_layers=1, pool='query')):
        with pytest.raises(DataError, match=next(iter(wrong))): ChestSettings(**wrong)


def test_a_tree_of_ones_own(tmp_path):
    (tmp_path/'tree.csv').write_text('category,parent,tier\nWater,,pathologic\nEffusion,Water,urgent\nNo finding,,no pathology\n')
    tree = ChestSettings(label_set=str(tmp_path/'tree.csv')).tree()
    assert tree.parents==('', 'Water', '') and tree.normal=='No finding' and tree.order[-1]=='urgent'
    for text, word in (('a,b,urgent\nb,a,urgent\n', 'below itself'),
            ('a,a,urgent\n', 'below itself'), ('d,a,\na,b,\nb,c,\nc,a,\n', "'.' stands below itself"),
            ('a,,urgent\na,,urgent\n', 'there before'),
            ('Lung,,urgent\nlung,,urgent\nNodule,Lung,urgent\n', 'line 3.*there before'), # parents named alike
            ('a,p,urgent\np,,\nq,,\na,q,urgent\n', 'line 5.*there before'), # two parents of one category
            ('a,,soon\n', "'soon' is not among"), ('a,b,urgent\n', "'b' is no category")):
        (tmp_path/'odd.csv').write_text('category,parent,tier\n' + text)
        with pytest.raises(DataError, match=word): label_set(str(tmp_path/'odd.csv'))


def test_what_is_out_of_scope():
    films = pd.DataFrame({'view': ['PA', 'AP', '', 'LAT', 'OBL', ''],
        'BodyPartExamined': ['CHEST', '', 'THORAX AP', 'CHEST', '', 'KNEE']})
    assert chest_seen(films).tolist()==['', '', '', 'not a frontal view', 'not a frontal view',
        'another part of the body']
    assert chest_seen(films[[]]).eq('').all()


def test_tiers_and_the_triage_score():
    tree = label_set('tree32')
    p = np.zeros((4, 32))
    at = tree.names.index
    p[0, at('Normal')] = p[1, at('Tube')] = p[2, at('Mass')] = 1
    p[3, [at(n) for n in ('Pneumothorax', 'PDTW-urgent', 'PDTW')]] = 1
    calls = tree_calls(tree, p, [.5]*32)
    assert called_tier(tree, calls).tolist()==['no pathology', 'no pathology', 'pathologic', 'urgent']
    assert triage_score(tree, p).tolist()==[0, 0, .5, 1]
    assert called_tier(tree, tree_calls(tree, p, [None]*32)).tolist()==['no pathology']*4


def test_a_tier_has_an_operating_point_of_its_own():
    tree, gen = label_set('tree32'), np.random.default_rng(0)
    number, urgent = gen.choice(3, 900, p=[.4, .3, .3]), tree.names.index('Pneumothorax')
    truth = np.zeros((900, 32))
    truth[number==0, tree.names.index('Normal')] = truth[number==1, tree.names.index('Mass')] = 1
    truth[number==2, urgent] = 1
    truth = ((truth@tree.below)>0).astype(float)
    triage = 1/(1+np.exp(-(gen.normal(size=900)+1.5*number-2)))
    p = np.tile(triage[:, None], (1, 32)) # every category is called at chance
    table = pd.concat([pd.DataFrame({'patient_id': np.arange(900), 'triage': triage}),
        pd.DataFrame(truth, columns=tree.names), pd.DataFrame(p, columns=[f'p_{v}' for v in tree.names])],
        axis=1)
    valid, test, vocab, cuts = table[:400], table[400:].reset_index(drop=True), list(tree.names), [.2]*32
    def of(how): return dataclasses.replace(Tree(), tree=tree, tier_calling=how).settled(valid, vocab)
    for how, wanted in (('se90', .9), ('se95', .95), ('se99', .99)):
        answer = of(how)
        told = answer.thresholds(test, cuts)
        assert answer.row(test, cuts, vocab).tier.tolist()==told.tier.tolist()
        low, high = answer.tier_thresholds
        assert 0<low<high<1 and ((told.tier=='urgent')==(told.triage>=high)).all()
        for k, cut in ((1, low), (2, high)):
            known = number[:400]>=k
            true, false = valid.triage[known].to_numpy(), valid.triage[~known].to_numpy()
            # no other threshold that reaches it calls fewer of the rest
            assert (true>=cut).mean()>=wanted
            assert min((false>=c).sum() for c in true if (true>=c).mean()>=wanted)==(false>=cut).sum()
            f = tier_figures(tree, told)['tiers'][k-1]
            assert f['sensitivity']['value']>=wanted-.06 and f['specificity']['value']>(.5 if how=='se90'
                else .1)
        again = Tree().of_bundle(answer.spec(test, vocab, ChestSettings()))
        assert again.thresholds(test, cuts).equals(told)
        columns = [f'threshold_{v}' for v in vocab]
        assert told[columns].equals(of('categories').thresholds(test, cuts)[columns]) # the calls stay
    by = of('categories')
    assert not by.tier_thresholds
    assert by.row(test, cuts, vocab).tier.tolist()==called_tier(tree, by.calls(test, cuts, vocab)).tolist()
    # of the highest tier there is no film: its categories decide
    none = of('se95').settled(valid[number[:400]<2], vocab)
    assert none.tier_thresholds[0]>0 and none.tier_thresholds[1] is None
    calls = by.calls(test, cuts, vocab)
    assert (none.row(test, cuts, vocab).tier=='urgent').tolist()==(called_tier(tree,
        calls)=='urgent').tolist()
    told = of('se95').settled(valid.assign(triage=1-valid.triage), vocab).tier_thresholds
    assert told[0]<=told[1] # a film of a tier belongs to the lower ones too
    assert scored_tier(tree, [0., 1.], np.zeros((2, 32), bool), told).tolist()==['no pathology', 'urgent']
    spec = of('se95').spec(test, vocab, ChestSettings())
    for wrong in ([.5], [.5, 'x'], .5):
        with pytest.raises(BundleError, match='tells no tree'):
            Tree().of_bundle(spec | {'tier_thresholds': wrong})
    old = {k: v for k, v in spec.items() if not k.startswith('tier_')} # of a bundle made before
    assert Tree().of_bundle(old).row(test, cuts, vocab).tier.tolist()==by.row(test, cuts, vocab).tier.tolist()


def simulated_table(tree, n=300, seed=0):
    gen = np.random.default_rng(seed)
    names = list(tree.names)
    share = np.geomspace(.4, .004, len(names))
    t = (gen.random((n, len(names)))<share).astype(float)
    p = 1/(1+np.exp(-(gen.normal(size=t.shape)+2*t-2)))
    t[gen.random(t.shape)<.1] = np.nan
    t[:, -1] = np.where(np.isnan(t[:, -1]), np.nan, 0.) # without any positive
    return pd.DataFrame({'image_id': [f'i{k}' for k in range(n)],
        'patient_id': [f'P{k//2}' for k in range(n)],
        'sex': gen.choice(['F', 'M'], n), 'projection': gen.choice(['PA', 'AP'], n)} | dict(zip(names, t.T))
        | {f'p_{v}': p[:, k] for k, v in enumerate(names)}
        | {f'threshold_{v}': .4 for v in names}), dict(zip(names, share))


def test_figures_of_the_long_tail_by_hand():
    tree = label_set('nih14')
    table, frequency = simulated_table(tree)
    names = list(tree.names)
    rows = {r['part']: r for r in long_tail_figures(table, names, frequency, ['sex', 'projection'], draws=50)}
    assert list(rows)==['all', 'head', 'medium', 'tail', 'sex F', 'sex M', 'projection AP', 'projection PA']
    parts = by_frequency(frequency)
    assert sum(map(len, parts.values()))==14 and all(frequency[n]>=.1 for n in parts['head'])
    for part, some in {'all': names, **parts}.items():
        r = rows[part]
        judged = [n for n in some if all(table.patient_id[table[n]==v].nunique()>1 for v in (0, 1))]
        assert r['left_out']==[n for n in some if n not in judged] and r['categories']==len(judged)
        if not judged:
            assert r['auroc']['reason'] and r['false negatives']['reason']
            continue
        known = {n: table[table[n].notna()] for n in judged}
        for k, fn in (('auroc', auroc), ('average_precision', average_precision)):
            assert r[k]['value']==pytest.approx(np.mean([fn(d[n], d[f'p_{n}']) for n, d in known.items()]))
        calls = {n: d[f'p_{n}']>=.4 for n, d in known.items()}
        assert r['false negatives']['value']==pytest.approx(np.mean([1-calls[n][d[n]==1].mean()
            for n, d in known.items()]))
        assert r['false positives']['value']==pytest.approx(np.mean([calls[n][d[n]==0].mean()
            for n, d in known.items()]))
        assert all(r[k]['low']<=r[k]['value']<=r[k]['high']
            for k in ('auroc', 'false negatives', 'false positives'))
    assert names[-1] in rows['all']['left_out'] and rows['all']['images']==rows['sex F']['images']+rows[
        'sex M']['images']


# ---- runs on small pictures ----------------------------------------------------------------------------------------

FINDINGS = {'Pneumothorax': (8, 8), 'Atelectasis': (24, 8), 'Mass': (8, 24)}
TINY = dict(arch='test_resnet', pretrained=False, epochs=1, bs=16, augment=0., lr=4e-3)


def pictures(folder: Path, n: int, seed: int, mark: str, gain: float=1.):
    "A store of `n` pictures with a bright square for each finding, two of a patient, and their labels."
    gen = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    there = gen.random((n, 3))<.35
    for k in range(n):
        film = gen.normal(90, 25, (32, 32))
        for (x, y), on in zip(FINDINGS.values(), there[k]): film[y-5:y+5, x-5:x+5] += 90*on
        film = cv2.resize(np.clip(film*gain, 0, 255).astype(np.uint8), (64, 64),
            interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(folder/f'{mark}{k:03d}.png'), film)
    labels = pd.DataFrame(there.astype(float), columns=list(FINDINGS)).assign(path=[f'{mark}{k:03d}.png'
        for k in range(n)],
        patient_id=[f'{mark}{k//2}' for k in range(n)], Normal=(~there.any(1)).astype(float))
    store = preprocess_folder(folder, folder.parent/f'{folder.name}_store',
        recipe('chest', size=64, clip=0., background=''),
        workers=1)
    return store, labels


@pytest.fixture(scope='module')
def here(tmp_path_factory): return pictures(tmp_path_factory.mktemp('here')/'films', 100, 0, 'a')


@pytest.fixture(scope='module')
def there(tmp_path_factory): return pictures(tmp_path_factory.mktemp('there')/'films', 60, 1, 'b', .6)


@pytest.fixture(scope='module')
def run(here, tmp_path_factory): return train('chest', *here, tmp_path_factory.mktemp('run')/'run', **TINY)


def test_a_run_learns_what_its_labels_know(run, here):
    bundle = load_bundle(run/'model')
    learnt = ['Lung', 'Lung-urgent', 'Atelectasis', 'PDTW', 'PDTW-urgent', 'Pneumothorax', 'Mass', 'Normal']
    assert sorted(bundle.vocab)==sorted(learnt) and bundle.answer['hierarchy']=='max'
    assert len(bundle.answer['tree']['names'])==32
    assert bundle.answer['frequency']['Mass']==pytest.approx(
        run.manifest[run.manifest.split=='train'].Mass.mean())
    tree = part_of(label_set('tree32'), bundle.vocab)
    x = np.random.default_rng(0).random((20, 64, 64), np.float32)
    assert below_parent(tree, bundle.probabilities(x)) and below_parent(tree, bundle.logits(x))
    closed = run.manifest[run.manifest.Atelectasis==1]
    assert (closed.Lung==1).all() and (closed.Normal==0).all()
    figures = evaluate(run).figures
    assert {'long_tail', 'tiers'} <= set(figures) and figures['tiers']['names'][-1]=='urgent'
    # chosen on validation patients, kept
    scored, (low, high) = run.predictions, bundle.answer['tier_thresholds']
    assert ((scored.tier=='urgent')==(scored.triage>=high)).all() and low<=high
    found = scored[(scored.split=='valid') & (scored.tier_true=='urgent')]
    assert bundle.answer['tier_calls']=='se95' and (found.tier=='urgent').mean()>=.95


def test_the_report_tells_tiers_and_the_tail(run, tmp_path):
    text = report(run, out=tmp_path).read_text()
    assert 'Long tail' in text and 'Triage' in text and 'tier or above' in text
    # more than six labels: what is said of each is folded
    vocab = load_bundle(run.path/'model').vocab
    assert len(vocab)>6 and all(f'<details><summary>{v}: AUROC' in text for v in vocab)
    assert text.count('<details')==text.count('</details>')>=len(vocab)+1
    # columns of the labels that are named like those of the header stay apart
    again = dataclasses.replace(run, manifest=run.manifest.assign(sex='F', age=50))
    assert 'Long tail' in report(again, out=tmp_path/'again').read_text()


def test_one_file_a_folder_and_several_runs_are_predicted(run, here, tmp_path):
    store, _ = here
    one = predict(run, store.index.path[0], workers=1)
    some = predict(run, list(store.index.path[:5]), out=tmp_path/'p.csv', to=('csv', 'json'), workers=1)
    assert len(one)==1 and some.iloc[0].triage==pytest.approx(one.iloc[0].triage, abs=1e-4)
    assert {'tier', 'triage', 'call_Mass', 'p_Mass'} <= set(some) and set(some.tier) <= {'no pathology',
        'pathologic', 'urgent'}
    back = pd.read_csv(tmp_path/'p.csv')
    assert not label_set('tree32').contradictions(back[[c for c in back if c.startswith('call_')]].rename(
        columns=lambda c: c[5:]))


@pytest.mark.slow
def test_folds_are_averaged_and_repeats_and_flat_are_settings(here, tmp_path):
    more = TINY | dict(repeats=2, loss='asymmetric', augment=2., folds=3)
    folds = train('chest', *here, tmp_path/'folds', **more)
    table = predict(folds, list(here[0].index.path[:8]), workers=1)
    vocab = load_bundle(folds/'fold_0'/'model').vocab
    assert below_parent(part_of(label_set('tree32'), vocab), table[[f'p_{v}' for v in vocab]].to_numpy(float))
    assert len(evaluate(folds).table)==100
    flat = train('chest', *here, tmp_path/'flat', **TINY, hierarchy='flat')
    bundle = load_bundle(flat/'model')
    assert bundle.answer['hierarchy']=='flat' and bundle.model.head.below is None and evaluate(flat).auroc


def test_unknown_is_not_negative_and_sets_are_trained_together(here, tmp_path):
    store, labels = here
    first, second = labels.index<50, labels.index>=50
    mixed = labels.assign(Mass=labels.Mass.where(first), Atelectasis=labels.Atelectasis.where(second),
        Normal=np.nan)
    run = train('chest', store, mixed, tmp_path/'run', **TINY)
    assert run.manifest.Mass.isna().sum()==50 and run.manifest.Atelectasis.isna().sum()==50
    told = evaluate(run).figures['labels']
    assert all(o['images']<=20 for o in told if o['label'] in ('Mass', 'Atelectasis'))


def test_a_category_of_few_patients_is_warned_of_and_has_a_reason(here, tmp_path):
    store, labels = here
    rare = labels.assign(Mass=0., Hila=0., split=np.where(labels.index<60, 'train',
        np.where(labels.index<80, 'valid', 'test')))
    rare.loc[70, 'Mass'] = rare.loc[5, 'Hila'] = 1.
    rare['Normal'] = np.nan
    with pytest.warns(UserWarning, match='Mass = 0 only: it is not learnt'):
        run = train('chest', store, rare, tmp_path/'run', **TINY)
    figures = {o['label']: o for o in evaluate(run).figures['labels']}
    assert figures['Mass']['auroc']['reason'] and figures['Hila']['auroc']['reason'] and not figures[
        'Atelectasis']['auroc']['reason']
    all_of = evaluate(run).figures['long_tail'][0]
    assert {'Mass', 'Hila'} <= set(all_of['left_out']) and not all_of['auroc']['reason']
    assert load_bundle(run/'model').threshold[load_bundle(run/'model').vocab.index('Hila')] is None


def test_a_category_without_positives_in_a_fold_has_a_reason(here, tmp_path):
    store, labels = here
    rare = labels.assign(Mass=0., Normal=np.nan)
    rare.loc[[6, 7], 'Mass'] = 1. # of one patient
    with pytest.warns(UserWarning, match='Mass = 1.0 occurs in 1 patients: none of them in fold'):
        run = train('chest', store, rare, tmp_path/'run', **TINY, folds=3)
    with pytest.warns(UserWarning, match='Mass has no threshold for'): e = evaluate(run)
    mass = next(o for o in e.figures['labels'] if o['label']=='Mass')
    assert mass['positives']==2 and mass['auroc']['reason'] and mass['threshold'] is None
    assert 'Mass' in e.figures['long_tail'][0]['left_out'] and np.isfinite(e.auroc).all()
    table = predict(run, list(store.index.path[:4]), workers=1)
    assert 'p_Mass' in table and 'call_Mass' not in table


@pytest.mark.parametrize('head', (dict(pool='query'), dict(pool='both', head_layers=2)))
def test_another_head_is_a_setting(head, here, tmp_path):
    run = train('chest', *here, tmp_path/'run', **TINY, **head)
    network, vocab = load_bundle(run.path/'model').meta['network'], load_bundle(run.path/'model').vocab
    assert {k: network[k] for k in head}==head and network['parents']
    table = predict(run, list(here[0].index.path[:8]), workers=1)
    assert below_parent(part_of(label_set('tree32'), vocab), table[[f'p_{v}' for v in vocab]].to_numpy(float))


def test_a_run_of_fewer_settings_goes_on(run, here):
    "A run that was made before a setting of the task was there has its default."
    record = read_record(run.path/'run.json')
    for k in ('pool', 'head_layers'): del record['settings'][k]
    kept = (run.path/'run.json').read_bytes()
    try:
        write_record(run.path/'run.json', record)
        assert train('chest', *here, run.path, **TINY).manifest.equals(run.manifest)
        with pytest.raises(RadiologyError, match="pool was 'avg' and is 'query'"):
            train('chest', *here, run.path, **TINY, pool='query')
    finally: (run.path/'run.json').write_bytes(kept)


def test_labels_that_contradict_the_tree_are_named(here, tmp_path):
    store, labels = here
    torn = labels.assign(Lung=np.where(labels.index==int(labels.index[labels.Atelectasis==1][0]), 0., np.nan))
    with pytest.raises(DataError,
            match="labels of 1 images contradict.*of image .*'Atelectasis' is 1, and 'Lung' above it is 0"):
        train('chest', store, torn, tmp_path/'run', **TINY)
    with pytest.warns(UserWarning, match='1 images contradict'):
        run = train('chest', store, torn, tmp_path/'run', **TINY, contradictions='unknown')
    assert len(run.manifest)==99
    with pytest.raises(DataError, match="no category of 'Mass', 'Lung'.*label_set"):
        train('chest', store, labels[['path', 'patient_id']].assign(effusion=1), tmp_path/'other', **TINY)
    with pytest.raises(DataError, match='positives and negatives'):
        train('chest', store, labels[['path', 'patient_id']].assign(Mass=1), tmp_path/'other', **TINY)
    assert not (tmp_path/'other').exists()


def test_an_architecture_that_cannot_take_the_size_is_named(here, tmp_path):
    with pytest.raises(ModelError, match='takes only images of 224 x 224 pixels, not 64 x 64'):
        train('chest', *here, tmp_path/'run', **TINY | {'arch': 'efficientformer_l1'})
    assert not (tmp_path/'run').exists()


def test_a_bundle_without_its_tree_is_refused(run, here, tmp_path):
    bundle = load_bundle(run/'model')
    save_bundle(bundle.model, tmp_path/'b', recipe=bundle.recipe, vocab=bundle.vocab, task='chest',
        threshold=bundle.threshold)
    with pytest.raises(BundleError, match='tells no tree'):
        predict(tmp_path/'b', here[0].index.path[0], workers=1)


def test_labels_of_another_set_are_refused_elsewhere(run, here, there, tmp_path):
    store, labels = there
    with pytest.raises(DataError, match='label set'):
        evaluate(run, store, labels[['path', 'patient_id']].assign(Effusion=1))
    for other, said in ((dict(label_set='nih14'), "has 32 categories, the label set 'nih14' 14: .* in one of them only"),
            (dict(label='Pneumothorax, Normal'), "the label set 'tree32' 2: 'Mass' is in one"),
            (dict(hierarchy='flat'), "hierarchy is 'flat'")):
        with pytest.raises(BundleError, match=said):
            train('chest', *here, tmp_path/'other', **TINY, start=str(run.path), **other)
    assert not (tmp_path/'other').exists()


# ---- another hospital ----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_run_is_adapted_and_both_hospitals_are_judged(run, there, tmp_path):
    store, labels = there
    how = dict(share=.5, replay=.3, epochs=1)
    done = adapt_run(CHEST, run, store, labels, tmp_path/'run2', **how)
    assert load_bundle(done.run/'model').vocab==load_bundle(run/'model').vocab and done.run.settings[
        'start']==str(run.path)
    tested = {k: set(e.table.image_id) for k, e in done.after.items()}
    assert tested=={k: set(e.table.image_id)
        for k, e in done.before.items()} and not tested['old'] & tested['new']
    learnt = done.run.manifest[done.run.manifest.split!='test']
    assert not set(learnt.image_id) & (tested['old'] | tested['new']) and set(learnt.hospital)=={'old', 'new'}
    assert len(done.lines())==2 and done.table().hospital.tolist()==['old', 'new']
    said = []
    again = adapt_run(CHEST, run, store, labels, tmp_path/'run2', **how, say=said.append)
    assert said==[f"{tmp_path/'run2'} is finished"] and again.run.predictions.equals(done.run.predictions)
    assert report(done.run).exists()


def test_what_cannot_be_adapted_is_named(run, here, there, tmp_path):
    store, labels = there
    with pytest.raises(DataError, match='share is 0'):
        adapt_run(CHEST, run, store, labels, tmp_path/'x', share=0.)
    with pytest.raises(DataError, match='replay is 2'):
        adapt_run(CHEST, run, store, labels, tmp_path/'x', replay=2.)
    with pytest.raises(DataError, match='patients are in both'):
        adapt_run(CHEST, run, store, labels.assign(patient_id=labels.patient_id.str.replace('b', 'a')),
            tmp_path/'x')
    with pytest.raises(StoreError, match='in two of the stores'):
        adapt_run(CHEST, run, here[0], here[1].assign(patient_id='other ' + here[1].patient_id), tmp_path/'x')
    assert not (tmp_path/'x').exists()
