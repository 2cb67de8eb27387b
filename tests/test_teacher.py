"""A teacher in a task: what it may be, that its labels are found by their names, that nothing is filled in against the
tree, and that a run with one goes on as it was."""
import hashlib
import warnings
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from radiology_ai.core import BundleError, DataError, ModelError, RadiologyError
from radiology_ai.data.tree import chest_tree
from radiology_ai.losses.base import BCEWithNaN
from radiology_ai.losses.graded import GradedLoss
from radiology_ai.losses.labels import AsymmetricLoss
from radiology_ai.losses.teacher import DistillationLoss
from radiology_ai.losses.tree import UnderTree
from radiology_ai.models.backbone import create_model
from radiology_ai.models.bundle import load_bundle, save_bundle
from radiology_ai.models.segmenter import create_segmenter
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.tasks.base import Settings, Stage, Task, every_image, make_settings
from radiology_ai.tasks.chest import CHEST
from radiology_ai.tasks.fit import has_token, stage_learner, teacher_of, teaching, train_task
from radiology_ai.tasks.kinds import Classes, Grades, Labels, task_manifest
from radiology_ai.tasks.tree import part_of
from radiology_ai.train.checkpoint import Checkpoint
from radiology_ai.train.teacher import Distil, FillUnknown, filled, weights_digest

RECIPE = recipe('plain', size=32)
TINY = dict(arch='test_resnet', pretrained=False, epochs=1, bs=16, min_per_class=0)
GRADES = Task('grades', 'Grades', 'Which?', RECIPE, (Stage(Grades()),))
CLASSES = Task('classes', 'Classes', 'Which?', RECIPE, (Stage(Classes()),))
LABELS = Task('labels', 'Labels', 'Which?', RECIPE, (Stage(Labels()),))
CATEGORIES = ('Lung', 'Pneumonia', 'Heart', 'Normal')


@pytest.fixture(scope='module')
def films(tmp_path_factory):
    "A store of 64 pictures of 32 patients and labels of all kinds."
    folder, gen = tmp_path_factory.mktemp('films'), np.random.default_rng(0)
    for k in range(64):
        cv2.imwrite(str(folder/f'{k:02d}.png'), gen.integers(0, 255, (64, 64), dtype=np.uint8))
    grade = np.arange(64)%3
    labels = pd.DataFrame(dict(path=[f'{k:02d}.png' for k in range(64)],
        patient_id=[f'P{k//2}' for k in range(64)],
        grade=grade, other=grade, part=np.array(['hand', 'knee', 'foot'])[grade], a=(grade>0)*1.,
        b=(grade==1)*1.,
        Lung=(grade>0)*1., Pneumonia=(grade==1)*1., Heart=(np.arange(64)%4==0)*1.))
    labels['Normal'] = ((labels.Lung==0) & (labels.Heart==0))*1.
    return preprocess_folder(folder, folder.parent/'store', RECIPE, workers=1), labels


def made(path, vocab, task='', **kwargs):
    "A bundle of an untrained network with these names."
    multi = kwargs.pop('multi_label', False)
    own = dict(recipe=RECIPE, settings={}) | kwargs
    net = create_model('test_resnet', len(vocab), pretrained=False, multi_label=multi, seed=3)
    return save_bundle(net, path, vocab=vocab, task=task, **own)


def callbacks(task, films, **given):
    "The teachers of a run with these settings, and its rows."
    store, labels = films
    s = make_settings(task.settings, TINY | given)
    task = task.answering(lambda o: o.answer.of_run(s))
    rows = task_manifest(task, store, labels, s)[0].assign(split='train')
    vocab = task.answer.vocab(rows, s)
    return teaching(task, task.stages[0], store, rows, s, vocab=vocab), vocab


def test_settings_are_checked():
    assert (Settings().teacher, Settings().teach, Settings().distil)==(None, 'distil', .5)
    for wrong in (dict(teach='tell'), dict(distil=0.), dict(distil=1.1)):
        with pytest.raises(DataError, match=next(iter(wrong))): Settings(**wrong)


# ---- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('base', [GradedLoss(), UnderTree(np.eye(3, dtype=bool), BCEWithNaN()),
    AsymmetricLoss()])
def test_every_loss_of_a_task_is_distilled(base):
    z, t = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    y = torch.arange(6)%3 if isinstance(base, GradedLoss) else torch.randint(0, 2, (6, 3)).float()
    loss = DistillationLoss(base, .25)
    far = loss.distance(z, t).mean()
    assert torch.allclose(loss(z, y, t), .75*base(z, y) + .25*far) and torch.equal(loss(z, y), base(z, y))
    assert torch.equal(loss.activation(z), base.activation(z))


def test_a_loss_without_reductions_has_a_mean_only():
    with pytest.raises(ModelError, match='only has a mean'): DistillationLoss(GradedLoss(), reduction='none')


# ---- who teaches ---------------------------------------------------------------------------------------------------

def test_labels_are_found_by_their_names(films, tmp_path):
    made(tmp_path/'t', ['c', 'b', 'a'], multi_label=True)
    for task, given in ((LABELS, dict(label='a,b')), (LABELS, dict(label='b,a'))):
        (cb,), vocab = callbacks(task, films, teacher=str(tmp_path/'t'), **given)
        assert isinstance(cb, Distil) and [['c', 'b', 'a'][k] for k in cb.columns]==vocab
    made(tmp_path/'classes', ['knee', 'hand', 'foot'], settings={'label': 'part'})
    (cb,), vocab = callbacks(CLASSES, films, label='part', teacher=str(tmp_path/'classes'))
    assert [['knee', 'hand', 'foot'][k] for k in cb.columns]==vocab==['foot', 'hand', 'knee']


@pytest.mark.parametrize('task, given, teacher, error, said', [
    (LABELS, dict(label='a,b'), dict(vocab=['a', 'd'], multi_label=True), ModelError,
    "does not know the label 'b'"),
    (LABELS, dict(label='a,b', teach='fill'), dict(vocab=['d'], multi_label=True), ModelError, 'knows none'),
    (LABELS, dict(label='a,b'), dict(vocab=['a', 'b']), BundleError, 'answers with classes'),
    (GRADES, dict(label='grade'), dict(vocab=[0, 1, 2, 3]), BundleError, 'classes 0, 1, 2, 3 apart'),
    (GRADES, dict(label='grade'), dict(vocab=[0, 1, 2], settings={'label': 'other'}), BundleError,
    "learnt 'other'"),
    (GRADES, dict(label='grade', teach='fill'), dict(vocab=[0, 1, 2]), BundleError, 'no labels to fill in'),
    (GRADES, dict(label='grade'), dict(vocab=[0, 1, 2], recipe=replace(RECIPE, clip=2.)), BundleError,
        'another recipe: clip was 2.0')])
def test_who_cannot_teach_is_named(films, tmp_path, task, given, teacher, error, said):
    made(tmp_path/'t', **teacher)
    with pytest.raises(error, match=said): callbacks(task, films, teacher=str(tmp_path/'t'), **given)


def test_masks_folds_and_nothing_do_not_teach(films, tmp_path):
    s = Settings(label='a', teacher=str(tmp_path/'masks'))
    save_bundle(create_segmenter('test_resnet', 1, pretrained=False, width=.125), tmp_path/'masks', RECIPE,
        ['a'])
    with pytest.raises(BundleError, match='answers with masks'): teacher_of(LABELS, films[0], s)
    for k in range(2): made(tmp_path/'folds'/f'fold_{k}'/'model', ['a'], multi_label=True)
    with pytest.raises(BundleError, match='cross-validation of 2'):
        teacher_of(LABELS, films[0], replace(s, teacher=str(tmp_path/'folds')))
    with pytest.raises(BundleError): teacher_of(LABELS, films[0], replace(s, teacher=str(tmp_path/'nothing')))


def test_where_only_the_size_differs_the_images_are_brought_to_it(films, tmp_path):
    made(tmp_path/'t', [0, 1, 2], recipe=replace(RECIPE, size=64))
    (cb,), _ = callbacks(GRADES, films, label='grade', teacher=str(tmp_path/'t'))
    seen = []
    cb.teacher = lambda x: seen.append(tuple(x.shape)) or torch.zeros(len(x), 3)
    cb.teacher.eval = lambda: cb.teacher
    cb.learn = type('Learn', (), {'xb': (torch.rand(2, 1, 32, 32),)})
    assert cb.asked().shape==(2, 3) and seen==[(2, 1, 64, 64)]


# ---- filling in ----------------------------------------------------------------------------------------------------

def test_nothing_is_filled_in_against_the_tree():
    tree, gen = chest_tree(), torch.Generator().manual_seed(0)
    leaf = torch.rand(300, len(tree.names), generator=gen)<.1
    whole = pd.DataFrame((leaf.float()@torch.from_numpy(tree.below).float()>0).float().numpy(),
        columns=tree.names)
    whole[tree.normal] = (~whole[np.array(tree.names)[tree.disease]].any(axis=1)).astype(float)
    hidden = whole.mask(torch.rand(whole.shape, generator=gen).numpy()<.7)
    labels = torch.tensor(tree.close(hidden)[list(tree.names)].to_numpy(np.float32))
    told = torch.rand(labels.shape, generator=gen)
    below = torch.from_numpy(tree.below)
    k = tree.names.index(tree.normal)
    disease = torch.from_numpy(tree.disease)
    naive = filled(labels, told, .6, None).numpy()
    out = filled(labels, told, .6, below, normal=k, disease=disease).numpy()
    assert tree.contradictions(pd.DataFrame(naive, columns=tree.names))
    assert tree.contradictions(pd.DataFrame(out, columns=tree.names))==[]
    known = ~np.isnan(labels.numpy())
    assert np.array_equal(out[known], labels.numpy()[known]) and (np.isnan(out)<=~known).all()
    assert np.isnan(out).sum()<.6*(~known).sum() # it does fill


def test_normal_is_filled_in_by_the_diseases():
    nan, disease, below = torch.nan, torch.tensor([True, True, False]), torch.eye(3, dtype=torch.bool)
    labels = torch.tensor([[nan]*3, [nan, nan, 0.], [nan, nan, 1.], [0., 0., nan], [1., nan, nan]])
    told = torch.tensor([[1., 0., 1.], [0., 0., 0.], [1., 0., 0.], [0., 0., 0.], [0., 0., 1.]])
    out = filled(labels, told, .9, below, normal=2, disease=disease)
    assert out.nan_to_num(-1).tolist()==[[1, 0, -1], [-1, -1, 0], [-1, 0, 1], [0, 0, -1], [1, 0, -1]]


def test_a_part_of_a_tree_in_another_order():
    tree = part_of(chest_tree(), list(chest_tree().names)[:12])
    vocab = list(tree.names)[::-2]
    cb = FillUnknown(torch.nn.Identity(), vocab, vocab, tree=tree)
    at = [tree.names.index(v) for v in vocab]
    assert np.array_equal(cb.below.numpy(), tree.below[np.ix_(at, at)]) and len(cb.disease)==len(vocab)
    with pytest.raises(ModelError, match='The tree has'):
        FillUnknown(torch.nn.Identity(), ['x'], ['x'], tree=tree)


# ---- runs ----------------------------------------------------------------------------------------------------------

def tree_file(folder):
    "The tree of `CATEGORIES` as a file."
    rows = pd.DataFrame(dict(category=CATEGORIES, parent=['', 'Lung', '', ''],
        tier=['pathologic', 'urgent', 'pathologic',
        'no pathology']))
    rows.to_csv(folder/'tree.csv', index=False)
    return str(folder/'tree.csv')


KINDS = {'grades': (GRADES, 'grade'), 'classes': (CLASSES, 'part'), 'labels': (LABELS, 'a,b'),
    'tree': (CHEST, '')}


@pytest.mark.slow
@pytest.mark.parametrize('kind, teach', [(k, 'distil') for k in KINDS]
    + [('labels', 'fill'), ('tree', 'fill')])
def test_a_run_is_taught_and_goes_on_the_same(kind, teach, films, tmp_path, monkeypatch):
    (task, label), (store, labels) = KINDS[kind], films
    how = TINY | dict(label=label) | (dict(label_set=tree_file(tmp_path)) if kind=='tree' else {})
    torn = labels.assign(**{c: labels[c].where(np.arange(64)%4>0) for c in ('b', 'Pneumonia')})
    task = replace(task, recipe=RECIPE, usable=every_image) if kind=='tree' else task
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        teacher = train_task(task, store, labels, tmp_path/'teacher', **how)
        bundle = load_bundle(teacher/'model')
        bundle.model.head.rescale(1., 6. if teach=='fill' else 0.) # sure of everything, or as it is
        save_bundle(bundle.model, tmp_path/'sure', bundle.recipe, bundle.vocab, settings=bundle.settings,
            answer=bundle.answer)
        how |= dict(teacher=str(tmp_path/'sure'), teach=teach, epochs=2)
        one = train_task(task, store, torn, tmp_path/'one', **how)
        stop_after_an_epoch(monkeypatch)
        with pytest.raises(KeyboardInterrupt): train_task(task, store, torn, tmp_path/'two', **how)
        monkeypatch.undo()
        assert list((tmp_path/'two').rglob('checkpoint.safetensors'))
        two = train_task(task, store, torn, tmp_path/'two', **how)
        alone = train_task(task, store, torn, tmp_path/'alone', **how | {'teacher': None})
    files = [hashlib.sha256((r/'model'/'model.safetensors').read_bytes()).hexdigest()
        for r in (one, two, alone)]
    assert files[0]==files[1]!=files[2]
    assert one.record['teacher']==load_bundle(tmp_path/'sure').meta[
        'sha256'] and 'teacher' not in alone.record


def stop_after_an_epoch(monkeypatch):
    "Interrupt the process at the end of the first epoch, as Ctrl-C does."
    own = Checkpoint.after_epoch
    def after_epoch(self):
        own(self)
        raise KeyboardInterrupt
    monkeypatch.setattr(Checkpoint, 'after_epoch', after_epoch)


def test_another_teacher_is_another_run(films, tmp_path):
    store, labels = films
    made(tmp_path/'t', [0, 1, 2], settings={'label': 'grade'})
    how = TINY | dict(label='grade', teacher=str(tmp_path/'t'))
    train_task(GRADES, store, labels, tmp_path/'run', **how)
    net = create_model('test_resnet', 3, pretrained=False, seed=4)
    save_bundle(net, tmp_path/'t', recipe=RECIPE, vocab=[0, 1, 2])
    with pytest.raises(RadiologyError, match='the teacher is another one'):
        train_task(GRADES, store, labels, tmp_path/'run', **how)
    assert weights_digest(net)!=weights_digest(create_model('test_resnet', 3, pretrained=False, seed=5))


def test_a_teacher_that_has_seen_the_test_is_warned_of(films, tmp_path):
    store, labels = films
    teacher = train_task(GRADES, store, labels, tmp_path/'t', label='grade', **TINY)
    rows = teacher.manifest.assign(split=np.where(teacher.manifest.split=='test', 'train', 'test'))
    s = make_settings(Settings, TINY | dict(label='grade', teacher=str(teacher.path)))
    with pytest.warns(UserWarning, match='has learnt from .* patients of the test'):
        teaching(GRADES, GRADES.stages[0], store, rows, s, vocab=[0, 1, 2])


def test_a_deit_learns_with_its_token(films, tmp_path):
    store, labels = films
    assert has_token('deit_tiny_distilled_patch16_224') and not has_token('deit_tiny_patch16_224')
    made(tmp_path/'t', [0, 1, 2])
    how = TINY | dict(arch='deit_tiny_distilled_patch16_224', label='grade')
    s = make_settings(Settings, how | {'teacher': str(tmp_path/'t')})
    rows = task_manifest(GRADES, store, labels, s)[0]
    rows['split'] = np.where(np.arange(len(rows))//2%4==0, 'valid', 'train')
    plain = stage_learner(GRADES, GRADES.stages[0], store, rows, replace(s, teacher=None), earlier={})
    assert not plain.model.config.get('distilled') and not isinstance(plain.loss_func, DistillationLoss)
    learn = stage_learner(GRADES, GRADES.stages[0], store, rows, s, earlier={})
    assert learn.model.config['distilled'] and learn.loss_func.alpha==.5
    before = learn.model.head.second.weight.clone()
    learn.fit_two_phase(1, 0)
    assert not torch.equal(before, learn.model.head.second.weight)
    save_bundle(learn, tmp_path/'own', recipe=RECIPE, vocab=[0, 1, 2], task='grades',
        answer={'activation': 'softmax'})
    further = replace(s, start=str(tmp_path/'own'), teacher=None) # trained further without its teacher
    again = stage_learner(GRADES, GRADES.stages[0], store, rows, further, earlier={})
    assert isinstance(again.loss_func, DistillationLoss)
    again.fit_two_phase(1, 0)
