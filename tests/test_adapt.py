"""A run adapted on more and more labels of another hospital: who is picked, what is compared, and that it
goes on."""
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from radiology_ai.core import DataError
from radiology_ai.metrics.ranking import auroc
from radiology_ai.models.backbone import create_model
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.tasks.adapt import (
    Curve,
    adapt_curve,
    adaptation_rows,
    curve_chart,
    curve_section,
    paired_auroc,
    picked_order,
    share_of_patients,
)
from radiology_ai.tasks.base import Stage, Task, every_image
from radiology_ai.tasks.chest import CHEST
from radiology_ai.tasks.fit import train_task
from radiology_ai.tasks.judge import Evaluation, report_run
from radiology_ai.tasks.kinds import Grades, Labels
from radiology_ai.weak.active import STRATEGIES, model_outputs

RECIPE = recipe('plain', size=64)
CATEGORIES = ['Lung', 'Pneumothorax', 'Normal']
TASK = replace(CHEST, recipe=RECIPE, usable=every_image)
TINY = dict(arch='test_resnet', pretrained=False, epochs=1, bs=16, augment=0.)


def pictures(folder: Path, n: int, mark: str):
    "A store of pictures, two of a patient, with a bright square where there is something, and their labels."
    gen = np.random.default_rng(ord(mark))
    folder.mkdir(parents=True)
    ill = gen.random(n)<.5
    for k in range(n):
        film = gen.normal(90, 25, (64, 64))
        film[8:24, 8:24] += 60*ill[k]
        cv2.imwrite(str(folder/f'{mark}{k:03d}.png'), np.clip(film, 0, 255).astype(np.uint8))
    labels = pd.DataFrame(dict(path=[f'{mark}{k:03d}.png' for k in range(n)], patient_id=[f'{mark}{k//2}'
        for k in range(n)], Pneumothorax=ill*1., Lung=ill*1., Normal=1.-ill, grade=ill*1))
    return preprocess_folder(folder, folder.parent/f'{mark}_store', RECIPE, workers=1), labels


@pytest.fixture(scope='module')
def here(tmp_path_factory): return pictures(tmp_path_factory.mktemp('here')/'films', 60, 'a')


@pytest.fixture(scope='module')
def there(tmp_path_factory): return pictures(tmp_path_factory.mktemp('there')/'films', 60, 'b')


@pytest.fixture(scope='module')
def run(here, tmp_path_factory):
    return train_task(TASK, *here, tmp_path_factory.mktemp('run')/'run', **TINY)


# ---- who is picked -------------------------------------------------------------------------------------------------

def manifest(n: int, mark: str) -> pd.DataFrame:
    "A manifest of `n` images of half as many patients, with a split."
    return pd.DataFrame(dict(image_id=[f'{mark}{k}' for k in range(n)],
        patient_id=[f'{mark}P{k//2}' for k in range(n)],
        split=np.repeat(['train', 'valid', 'test'], [n//2, n//4, n-n//2-n//4])))


def test_an_order_decides_the_training_patients_and_only_these():
    old, new = manifest(80, 'a'), manifest(80, 'b')
    order = list(new.patient_id[new.split=='train'].unique()[::-1])
    rows, usual = adaptation_rows(old, new, .2, .5, 3, order=order), adaptation_rows(old, new, .2, .5, 3)
    mine = rows[(rows.hospital=='new') & (rows.split=='train')]
    assert list(mine.patient_id.unique())==order[:4][::-1] and len(mine)==8
    others = [r[(r.hospital!='new') | (r.split!='train')].reset_index(drop=True) for r in (rows, usual)]
    assert others[0].equals(others[1]) # validation, test and replay do not know of it
    assert set(share_of_patients(new, .1, 0).image_id)<set(share_of_patients(new, .3, 0).image_id)


@pytest.mark.parametrize('strategy', [k for k in STRATEGIES if k!='random'])
def test_every_strategy_orders_all_patients_under_a_tree(strategy, run, there):
    store, labels = there
    rows = pd.DataFrame(dict(image_id=store.index.image_id,
        patient_id=[f'P{k//3}' for k in range(len(store))]))
    order = picked_order(TASK, run, store, rows, strategy)
    assert sorted(order)==sorted(rows.patient_id.unique()) and order==picked_order(TASK, run, store, rows,
        strategy)
    more = picked_order(TASK, run, store, rows, strategy, taken=order[:5])
    assert more[:5]==order[:5] and sorted(more)==sorted(order)


def test_entropy_takes_first_whom_the_network_is_unsure_of(run, there, monkeypatch):
    store, z = there[0], np.full((1, 60, 3), -5.)
    z[0, 40, 1], z[0, 7, 0] = 0., -.4
    monkeypatch.setattr('radiology_ai.tasks.adapt.network_logits', lambda *a, **k: z)
    rows = pd.DataFrame(dict(image_id=store.index.image_id, patient_id=[f'P{k//2}' for k in range(60)]))
    assert picked_order(TASK, run, store, rows, 'entropy')[:2]==['P20', 'P3']


@pytest.mark.parametrize('args', [dict(multi_label=True), dict(multi_label=True, head_layers=2),
    dict(multi_label=True, parents=[-1, 0, -1]), dict(ordinal=True), dict(multi_label=True, pool='query')])
def test_the_features_of_any_head(args):
    model = create_model('test_resnet', 3, pretrained=False, **args).eval()
    x = torch.rand(5, 1, 32, 32)
    learn = SimpleNamespace(model=model, loss_func=SimpleNamespace(activation=torch.sigmoid))
    said = model_outputs(learn, [x], draws=2)
    with torch.no_grad(): wanted = model(x).sigmoid().numpy()
    assert np.allclose(said['p'], wanted, atol=1e-6) and len(said['features'])==5 and said['features'].ndim==2
    assert said['draws'].shape==(2, 5, 3)


# ---- what is compared ----------------------------------------------------------------------------------------------

GRADED, MULTI = (Task('toy', 'Toy', 'What?', RECIPE, (Stage(a),)) for a in (Grades(), Labels()))


def evaluation(skill, seed=0, n=200, names=None):
    "A made-up evaluation; the patients and the truth are always the same."
    t = np.random.default_rng(9).random((n, 2))<.4
    z = skill*t + np.random.default_rng(seed).normal(size=(n, 2))
    table = pd.DataFrame(dict(image_id=[f'i{k:03d}' for k in range(n)],
        patient_id=[f'P{k//2}' for k in range(n)],
        split='test'))
    if names:
        table = table.assign(**{v: t[:,k]*1. for k, v in enumerate(names)}, **{f'p_{v}': 1/(1+np.exp(-z[:,k]))
            for k, v in enumerate(names)}, **{f'threshold_{v}': .5 for v in names})
    else: table = table.assign(target=t[:,0]*1, score=1/(1+np.exp(-z[:,0])), threshold=.5)
    task = MULTI if names else GRADED
    return Evaluation(task, '', table, task.answer.figures(table, []))


@pytest.mark.parametrize('names', [None, ['a', 'b']])
def test_gained_and_forgotten_are_paired_differences(names):
    a, b = evaluation(2., 1, names=names), evaluation(.5, 1, names=names)
    shuffled = replace(b, table=b.table.sample(frac=1, random_state=0))
    got = paired_auroc(a, shuffled)
    pairs = [('target', 'score')] if names is None else [(v, f'p_{v}') for v in names]
    mean = [np.mean([auroc(e.table[t], e.table[s]) for t, s in pairs]) for e in (a, b)]
    assert got['value']==pytest.approx(mean[0]
        -mean[1]) and 0<got['low']<got['value']<got['high'] and not got['reason']
    back = paired_auroc(b, a)
    assert back['value']==pytest.approx(-got['value'])
    assert paired_auroc(a, a)['value']==0


def curve(skills=((50, .6), (100, 1.2), (200, 2.4)), names=None):
    "A made-up curve of random and of active picks."
    points = [dict(picks=k, share=n/1000, patients=n//2, labels=n, run=None,
        new=evaluation(s+more, 3, names=names),
        old=evaluation(1.8, 2, names=names)) for k, more in (('random', 0), ('entropy', .4))
        for n, s in skills]
    return Curve({'old': evaluation(2., 2, names=names), 'new': evaluation(.3, 3, names=names)}, points)


def test_how_many_labels_suffice():
    c = curve()
    assert (c.table().gained_low[1:3]>0).all() and (c.table().forgotten>0).all()
    new = dict(zip(c.table().labels[:3], c.table().new[:3]))
    got = c.enough(target=new[100])
    assert (got['labels'], got['surely'])==(100, 200)
    assert c.enough(target=.9999)=={'target': .9999, 'labels': None, 'surely': None}
    assert c.enough()['target']==pytest.approx(c.before['old'].auroc.value)
    assert c.table().over_random[:3].isna().all() and (c.table().over_random[3:]>0).all()


def test_the_section_says_how_many_and_of_which_not():
    c = curve(((50, .3), (100, .6)), names=['a', 'b'])
    s = curve_section(c)
    kinds = [k for k, _ in s.by_kind()]
    assert kinds.count('chart')==1 and kinds.count('table')==2
    text = ' '.join(p for p in s.parts if isinstance(p, str))
    assert 'picked by random' in text and 'is not reached with these' in text
    assert 'Below what they are at home even with most labels: a, b' in text
    assert 'is reached with 50 labels' in ' '.join(curve_section(c, .55).parts[:2])
    assert 'new hospital, entropy' in curve_chart(c).svg()


# ---- the loop ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_curve_of_runs_goes_on_and_is_reported(run, there, tmp_path):
    how = dict(shares=(.3, .6), picks=('random', 'active'), replay=.2, epochs=1)
    said = []
    first = adapt_curve(TASK, run, *there, tmp_path/'curve', **how | {'shares': (.3,), 'picks': 'random'})
    c = adapt_curve(TASK, run, *there, tmp_path/'curve', **how, say=said.append)
    assert [s for s in said if s.endswith('is finished')]==[f"{tmp_path/'curve'/k} is finished"
        for k in ('random_0.3',)]
    t = c.table()
    assert t.picks.tolist()==['random', 'random', 'entropy', 'entropy'] and t.share.tolist()==[.3, .6, .3, .6]
    assert (t.labels[1], t.labels[3])>(t.labels[0], t.labels[2]) and t.patients[0]==t.patients[2]
    assert first.table().equals(t[:1])
    tested = [set(p['new'].table.image_id) for p in c.points]
    assert all(k==set(c.before['new'].table.image_id) for k in tested)
    valid = [set(m.image_id[m.split=='valid']) for m in (c.points[k]['run'].manifest for k in (0, 2))]
    assert valid[0]==valid[1]
    taken = [set(m.patient_id[(m.split=='train') & (m.hospital=='new')]) for m in (p['run'].manifest
        for p in c.points)]
    assert taken[0]<taken[1] and taken[2]<taken[3]
    assert len(pd.read_csv(tmp_path/'curve'/'curve.csv'))==4
    last = c.points[-1]
    page = report_run(TASK, last['run'], last['new'], out=tmp_path/'page', sections=[curve_section(c)],
        audit=False)
    assert 'how many labels' in page.read_text()


def test_what_is_no_curve_is_named(run, there, tmp_path):
    with pytest.raises(DataError, match="no picks 'entropi'. Did you mean 'entropy'"):
        adapt_curve(TASK, run, *there, tmp_path/'c', picks='entropi')
    with pytest.raises(DataError, match='share is 0'):
        adapt_curve(TASK, run, *there, tmp_path/'c', shares=(.5, 0))
    assert not (tmp_path/'c').exists()
