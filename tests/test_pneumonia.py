"""Pneumonia: tables of boxes are folded and refused with the film's name, boxes survive the way to the network and back,
candidates of networks and mirrored films are pooled, what counts is what the rules say, predictions are those of the evaluation."""
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_tasks import Written, from_balanced_batches

from radiology_ai.core import BundleError, DataError, MissingPackageError, RadiologyError
from radiology_ai.data.targets import stored_boxes
from radiology_ai.metrics.calibration import calibration
from radiology_ai.metrics.fusion import Decoding
from radiology_ai.models.bundle import load_bundle
from radiology_ai.models.heads import Head
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.serve.predict import explain, predict
from radiology_ai.tables import table_digest
from radiology_ai.tasks.base import Settings, make_settings
from radiology_ai.tasks.boxes import (
    SWEEP,
    XYWH,
    Boxes,
    box_figures,
    box_lists,
    boxes_text,
    candidates_of,
    counting_boxes,
    film_candidates,
    one_row_a_film,
    rules_of,
    text_boxes,
    to_film,
)
from radiology_ai.tasks.fit import train_task
from radiology_ai.tasks.judge import evaluate_run, report_run
from radiology_ai.tasks.kinds import Classes, task_manifest
from radiology_ai.tasks.pneumonia import PNEUMONIA, RSNA_CLASSES, PneumoniaSettings, simulated_opacities, submission
from radiology_ai.tasks.run import read_exactly, read_run

SMALL = dict(arch='test_resnet', pretrained=False, epochs=1, bs=8, width=.125, levels='3,4,5')
NORMAL, OTHER, OPACITY = RSNA_CLASSES
NONE = [np.nan]*4


def table(*rows, columns=('image_id', *XYWH, 'Target', 'class')): return pd.DataFrame(rows, columns=columns)


RSNA = table(('a', 10, 20, 30, 40, 1, OPACITY), ('a', 60, 20, 30, 45, 1, OPACITY), ('b', *NONE, 0, NORMAL),
    ('c', *NONE, 0, OTHER))


def folded(rows, label='class'): return one_row_a_film(rows, label, RSNA_CLASSES)


@pytest.fixture(scope='module')
def films(made_once):
    "A folder with `films`, `store` and `labels.csv` of a simulated department."
    def make(folder):
        truth = simulated_opacities(folder/'films', 60, 5, 1)
        preprocess_folder(folder/'films', folder/'store', recipe('chest', size=64), workers=1, show=False)
        truth[['image_id', *PneumoniaSettings().labels]].to_csv(folder/'labels.csv', index=False)
    return made_once('opacities', make)


@pytest.fixture(scope='module')
def run(made_once, films):
    def make(out):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            train_task(PNEUMONIA, films/'store', films/'labels.csv', out, **SMALL)
    return read_run(made_once('pneumonia_run', make))


def test_a_row_a_box_becomes_a_row_a_film():
    out = folded(RSNA)
    assert out.image_id.tolist()==['a', 'b', 'c'] and out['class'].tolist()==[OPACITY, NORMAL, OTHER]
    assert out.boxes.tolist()==['[[10.0, 20.0, 40.0, 60.0], [60.0, 20.0, 90.0, 65.0]]', '[]', '[]']
    corners = RSNA.assign(x1=RSNA.x, y1=RSNA.y, x2=RSNA.x+RSNA.width, y2=RSNA.y+RSNA.height)
    assert folded(corners.drop(columns=XYWH)).equals(out)
    shuffled = folded(RSNA.iloc[[3, 1, 2, 0]]).set_index('image_id')
    assert {tuple(b) for b in text_boxes(shuffled.boxes['a'])[0].tolist()}=={
        tuple(b) for b in text_boxes(out.boxes[0])[0].tolist()}
    assert folded(RSNA.assign(**{'class': RSNA['class'].str.lower()})).equals(out)


def test_the_table_of_the_challenge_names_files():
    out = folded(RSNA.rename(columns={'image_id': 'patientId'}).drop(columns='class'))
    assert out.path.tolist()==['a', 'b', 'c'] and out['class'].tolist()==[OPACITY, OTHER, OTHER]
    assert 'patient_id' in folded(RSNA.assign(patient_id=[1, 1, 2, 3]))


def test_boxes_that_are_there_twice_count_once():
    with pytest.warns(UserWarning, match='2 boxes are there twice'):
        assert folded(pd.concat([RSNA, RSNA])).boxes.tolist()==folded(RSNA).boxes.tolist()


def test_a_film_that_nobody_looked_at_is_left_out():
    out = folded(pd.concat([RSNA, table(('d', *NONE, np.nan, np.nan))]))
    assert out.boxes.tolist()[3]=='' and out['class'].tolist()[3]==''
    assert PNEUMONIA.answer.known(out.rename(columns={'class': 'film_class'}),
        None).tolist()==[True]*3 + [False]


def changed(row, **cells):
    out = RSNA.astype(object)
    for k, v in cells.items(): out.loc[row, k] = v
    return out


BAD = {'image a.*the box is empty': changed(0, width=0), 'image a.*is no number': changed(0, x='left'),
    "image a.*'height'.*is no number": changed(0, height=np.nan),
    'image a.*there is a box on a film without an opacity': changed(0, Target=0),
    'image b.*the film has no box': changed(2, Target=1),
    'image c.*the film has no box': changed(3, **{'class': OPACITY, 'Target': np.nan}),
    'image a.*there is a box on a film of this class': changed(0, **{'class': NORMAL}),
    'image b.*is no class: Did you mean': changed(2, **{'class': 'Normaal'}),
    'image b.*is not 1 or 0': changed(2, Target=3),
    'image c.*the film has no class': changed(3, **{'class': np.nan}),
    'image b.*several classes': pd.concat([RSNA, table(('b', *NONE, 0, OTHER))]),
    'more than 100 boxes': table(*[('a', k, 1, 5, 5, 1, OPACITY) for k in range(101)]),
    'image a.*the film has several': RSNA.assign(patient_id=[1, 2, 3, 4]),
    "no column 'height'": RSNA.drop(columns='height'), 'names a film': RSNA.drop(columns='image_id')}


@pytest.mark.parametrize('said', BAD)
def test_what_contradicts_itself_names_its_film(said):
    with pytest.raises(DataError, match=said): folded(BAD[said])


@pytest.mark.parametrize('text', ['[[1, 2, 3]]', 'nothing', '[[1, 2, 3, NaN]]', '{}', '[1, 2, 3, 4]',
    '['*5000])
def test_text_that_holds_no_boxes_is_refused(text):
    with pytest.raises(DataError, match='cannot be read'): text_boxes(text)


def frame(**more):
    films = folded(RSNA).rename(columns={'class': 'film_class'})
    return films.assign(Columns=100, Rows=80, **more)


def test_a_box_outside_its_film_is_refused_and_one_of_another_size_is_moved():
    answer = PNEUMONIA.answer
    assert answer.checked(frame(), None).boxes[0]==frame().boxes[0]
    with pytest.raises(DataError, match='image a.*lies outside the film of 50 x 40'):
        answer.checked(frame(drawn_width=50, drawn_height=40), None)
    twice = answer.checked(frame(drawn_width=200, drawn_height=160), None)
    assert np.allclose(text_boxes(twice.boxes[0])[0]*2, text_boxes(frame().boxes[0])[0])
    assert 'drawn_width' not in twice and twice.class_number.tolist()==[2, 0, 1]
    with pytest.raises(DataError, match='another shape'):
        answer.checked(frame(drawn_width=200, drawn_height=200), None)
    with pytest.raises(DataError, match='lies outside the film of 60 x 80'):
        answer.checked(frame().assign(Columns=60), None)
    with pytest.raises(DataError, match='None of 2 films'): answer.checked(frame()[1:], None)
    with pytest.raises(DataError, match='All of 1 films'): answer.checked(frame()[:1], None)


def test_a_training_without_boxes_is_refused(films):
    settings = make_settings(PneumoniaSettings, SMALL)
    store = ImageStore(films/'store')
    manifest = task_manifest(PNEUMONIA, store, films/'labels.csv', settings)[0]
    split = np.where(manifest.film_class==OPACITY, 'valid', 'train')
    with pytest.raises(DataError, match='of the training has a box'):
        PNEUMONIA.answer.targets(store, manifest.assign(split=split), settings)


def test_boxes_survive_the_way_to_the_network_and_back(films):
    store = ImageStore(films/'store')
    manifest = task_manifest(PNEUMONIA, store, films/'labels.csv', make_settings(PneumoniaSettings, SMALL))[0]
    rows = [(i, *b) for i, each in zip(manifest.image_id, box_lists(manifest.boxes)[0]) for b in each]
    drawn = pd.DataFrame(rows, columns=['image_id', 'x1', 'y1', 'x2', 'y2'])
    there = stored_boxes(store, drawn.assign(number=range(len(drawn))), drawn_on='film').dropna(subset='x1')
    back = [to_film(b[None], store.index.iloc[store.position(i)])[0]
        for i, b in zip(there.image_id, there[['x1', 'y1', 'x2', 'y2']].to_numpy())]
    there = there.assign(number=there.number.astype(int))
    assert len(there)==len(drawn)>20
    assert np.abs(np.array(back)-drawn.iloc[there.number, 1:].to_numpy()).max()<.5


def test_a_manifest_is_read_again_as_it_was(films, run):
    settings = make_settings(PneumoniaSettings, SMALL)
    again = task_manifest(PNEUMONIA, ImageStore(films/'store'), run.path/'manifest.csv', settings)[0]
    shared = [c for c in run.manifest if c in again and c!='split']
    assert {'boxes', 'film_class', 'class_number'}<=set(shared)
    assert table_digest(again[['image_id', 'boxes', 'film_class']])==table_digest(
        run.manifest[['image_id', 'boxes', 'film_class']])
    assert read_exactly(run.path/'manifest.csv').boxes.tolist()==run.manifest.boxes.tolist()


class Bright(torch.nn.Module):
    "A network that finds the bright place of a film, a pixel too far to the right."
    config = {'n_in': 1}

    def detect(self, x, score, nms, top, most):
        out = []
        for film in x[:, 0]:
            y, x_ = (film>.5).nonzero().T
            box = torch.stack([x_.min()+1, y.min(), x_.max()+2, y.max()+1]).float()
            out.append(dict(boxes=box[None], scores=torch.tensor([.8]), labels=torch.tensor([0]),
                classes=torch.tensor([.3, .7])))
        return out


def test_all_networks_and_the_mirrored_film_are_pooled():
    film = np.zeros((20, 30), np.uint8)
    film[4:9, 3:8] = 255
    one, both, three = (film_candidates([Bright()]*n, [film, film], [0, 1], mirror=m, show=False)
        for n, m in ((1, False), (1, True), (3, True)))
    assert one[0]['boxes'].tolist()==[[4, 4, 9, 9]] and [f['members']
        for f in (one[0], both[0], three[1])]==[1, 2, 6]
    assert both[1]['boxes'].tolist()==[[4, 4, 9, 9], [2, 4, 7, 9]] and len(three[0]['boxes'])==6
    assert both[0]['classes'].tolist()==pytest.approx([.3, .7])


def candidates(n=12, seed=0):
    gen = np.random.default_rng(seed)
    corner = gen.uniform(0, 200, (n, 8, 2))
    boxes = np.concatenate([corner, corner+gen.uniform(20, 80, (n, 8, 2))], 2)
    return pd.DataFrame({'image_id': [f'i{k}' for k in range(n)],
        'patient_id': [f'p{k//2}' for k in range(n)],
        'target': np.arange(n)%2, 'score': gen.uniform(size=n), 'members': 2,
        'candidates': [boxes_text(b, s) for b, s in zip(boxes, gen.uniform(.02, 1, (n, 8)))],
        'boxes_true': [boxes_text(b[:1]) if k%2 else '[]' for k, b in enumerate(boxes)]})


@pytest.mark.parametrize('rules', [Decoding(score=.1, iou=.2, threshold=.5, best=.5),
    Decoding(how='fuse', best=.7),
    Decoding(overall=.5, positive=-1, threshold=.4, size=.8)])
def test_the_boxes_that_count_are_those_of_the_rules(rules):
    found = candidates()
    boxes, scores = counting_boxes(replace(PNEUMONIA.answer, decoding=rules).thresholds(found, None))
    for b, s, f in zip(boxes, scores, rules(candidates_of(found))):
        assert np.allclose(b, f['boxes'], atol=.01) and np.allclose(s, f['scores'], atol=1e-5)


def test_rules_are_chosen_on_validation_films_and_their_optimism_is_told():
    found = candidates(40)
    settled = PNEUMONIA.answer.settled(found, [OPACITY])
    assert settled.decoding in rules_of(SWEEP)
    assert settled.chosen['optimism']==pytest.approx(settled.chosen['score']-settled.chosen['honest'])
    fixed = replace(PNEUMONIA.answer, sweep=False).settled(found, [OPACITY])
    assert fixed.chosen=={'reason': 'it was not asked for'}
    none = PNEUMONIA.answer.settled(found.assign(boxes_true='[]'), [OPACITY])
    assert none.chosen=={'reason': 'no validation film has a box'}


def test_folds_decode_by_the_rules_that_are_best_for_all_of_them():
    answer, parts = PNEUMONIA.answer, [candidates(30, seed) for seed in (1, 2, 3)]
    each = [answer.settled(p, [OPACITY]) for p in parts]
    specs = json.loads(json.dumps([a.spec(films_of(RSNA_CLASSES), [OPACITY], None) for a in each]))
    both = answer.of_bundles(specs)
    n = np.array([a.tried['films'] for a in each])
    mean = (n*[a.tried['score'] for a in each]).sum(0)/np.maximum(n.sum(0), 1)
    assert both.decoding==rules_of(SWEEP)[int(mean.argmax())] and len({a.decoding for a in each})>1
    assert both.chosen['score']==pytest.approx(mean.max()) and both.chosen['folds']==3
    assert both.chosen['honest']<=max(a.chosen['score'] for a in each)
    assert both.chosen['optimism']==pytest.approx(both.chosen['score']-both.chosen['honest'])
    assert answer.of_bundles(specs[:1])==answer.of_bundle(specs[0])
    whole = answer.settled(pd.concat(parts, ignore_index=True), [OPACITY])
    assert whole.decoding==both.decoding and whole.chosen['score']==pytest.approx(both.chosen['score'],
        abs=1e-5)
    none = answer.of_bundles([specs[1] | {'tried': {}}, specs[0]])
    assert none.decoding==each[1].decoding # no sweep, no choice


def films_of(classes): return pd.DataFrame({'film_class': list(classes)})


def test_scores_of_boxes_stand_beside_what_they_hit():
    found = PNEUMONIA.answer.thresholds(candidates(30), None).assign(view=['AP', 'PA']*15)
    found = found.assign(boxes=[boxes_text(text_boxes(t)[0], [.9]*len(text_boxes(t)[0])) if t!='[]'
        else '[[5, 5, 9, 9, 0.15], [5, 5, 9, 9, 0.35]]' for t in found.boxes_true])
    rows = {r['boxes']: r for r in box_figures(found, 50, ['view'])['hits']}
    assert rows['score 0.7 to 1']['share that hits']['value']==1 and rows['score 0.7 to 1']['number']==15
    assert rows['score 0.1 to 0.2']['share that hits']['value']==rows['view AP']['share that hits'][
        'value']==0
    assert rows['score 0.3 to 0.5']['mean score']==.35 and rows['view PA']['number']==15
    assert sum(r['number'] for k, r in rows.items() if k.startswith('side'))==45


def test_a_run_holds_a_detector_and_its_rules(run):
    bundle = load_bundle(run/'model')
    assert bundle.meta['network']['kind']=='detector' and bundle.vocab==[OPACITY]
    answer = PNEUMONIA.answer.of_bundle(bundle.answer)
    assert answer.seen==RSNA_CLASSES and answer.chosen['n']>0
    assert answer.of_bundle(json.loads(json.dumps(bundle.answer)))==answer
    odd = [{}, bundle.answer | {'classes': ['Normal']}, bundle.answer | {'decoding': {'iou': 3}},
        bundle.answer | {'classes': [OPACITY, NORMAL]}, bundle.answer | {'decoding': {'iuo': .1}},
        *(bundle.answer | {'tried': bundle.answer['tried'] | t}
        for t in ({'films': []}, {'rules': [{'size': [0]}]},
            {'rules': [{'iou': [.5]*200, 'best': [.5]*200}]},
            {'score': ['x']*len(bundle.answer['tried']['score'])}))]
    for spec in odd:
        with pytest.raises(BundleError, match='tells no boxes'): PNEUMONIA.answer.of_bundle(spec)


def test_predictions_are_those_of_the_evaluation_in_pixels_of_the_film(run, tmp_path):
    told = evaluate_run(PNEUMONIA, run).table
    (tmp_path/'torn.dcm').write_bytes(b'DICM')
    with pytest.warns(UserWarning, match='1 films have no answer'):
        found = predict(run, [*(Path(p) for p in told.path), tmp_path/'torn.dcm'], out=tmp_path/'p.csv',
            to=('csv', 'json', 'png', 'submission'), workers=1, show=False)
    sent = pd.read_csv(tmp_path/'p_submission.csv', dtype=str)
    found = found[found.error=='']
    assert sent.patientId.tolist()==found.image_id.tolist() # the files of this folder are called alike
    assert [len(str(t).split())//5 for t in sent.PredictionString.fillna('')]==found.n_boxes.tolist()
    with pytest.raises(DataError, match="no output 'siim'"):
        predict(run, told.path[0], to=['siim'], show=False)
    rows = found.set_index('image_id').loc[told.image_id]
    assert np.abs(rows.score.to_numpy(float)-told.score.to_numpy()).max()<1e-6
    for text, b, s in zip(rows.boxes, *counting_boxes(told)):
        boxes, scores = text_boxes(text, True)
        assert np.allclose(boxes, b, atol=.02) and np.allclose(scores, s, atol=1e-5)
    readings = {r['image_id']: r for r in json.loads((tmp_path/'p.json').read_text())['readings']}
    for i, n in zip(rows.index, rows.n_boxes):
        whole, *places = readings[i]['findings']
        assert 'box' not in whole and len(places)==n and all(f['label']==OPACITY for f in places)
    assert len(list((tmp_path/'p').glob('*.png')))==len(told)


def test_the_command_writes_a_submission(run, films, tmp_path):
    from radiology_ai.cli import main
    film = evaluate_run(PNEUMONIA, run).table.path[0]
    def predicted(to):
        words = ['predict', run.path, film, '--out', tmp_path/'p.csv', '--workers', 1, '--to', to]
        with pytest.raises(SystemExit) as end: main(list(map(str, words)))
        return end.value.code
    assert not predicted('csv,submission')
    sent = pd.read_csv(tmp_path/'p_submission.csv', dtype=str)
    assert sent.columns.tolist()==['patientId', 'PredictionString'] and len(sent)==1
    assert predicted('csv,kaggle')==2


def test_the_report_shows_boxes_and_an_explanation_can_be_drawn(run, tmp_path):
    evaluation = evaluate_run(PNEUMONIA, run)
    text = report_run(PNEUMONIA, run, evaluation, out=tmp_path).read_text()
    assert 'RSNA score' in text and 'Free response' in text and 'data:image' in text and 'optimism' in text
    assert (explain(run, [Path(evaluation.table.path[0])], tmp_path/'heat', workers=1,
        show=False).error=='').all()


def test_queries_are_trained_saved_and_asked_by_the_same_task(films, tmp_path, monkeypatch):
    pytest.importorskip('transformers')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        run = train_task(PNEUMONIA, films/'store', films/'labels.csv', tmp_path/'run', **SMALL, model='dfine')
    bundle = load_bundle(run/'model')
    assert bundle.meta['network']['kind']=='dfine' and bundle.meta['network']['levels']==[3, 4, 5]
    told = evaluate_run(PNEUMONIA, run).table
    found = predict(run, [Path(p) for p in told.path], workers=1, show=False).set_index('image_id')
    assert np.abs(found.score[told.image_id].to_numpy(float)-told.score.to_numpy()).max()<1e-5
    assert len(told) and (told.boxes!='').all() and all((np.diff(s)<=0).all()
        for s in box_lists(told.boxes, True)[1])
    boxes = bundle.detect(np.array(ImageStore(films/'store')[0])[None], score=.001)
    assert set(boxes[0])=={'boxes', 'scores', 'labels', 'classes'}
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(MissingPackageError, match=r'radiology_ai\[detect\]'):
        train_task(PNEUMONIA, films/'store', films/'labels.csv', tmp_path/'other', **SMALL, model='dfine')
    with pytest.raises(RadiologyError, match=r'radiology_ai\[detect\]'): load_bundle(run/'model')
    assert not (tmp_path/'other').exists()


def test_a_run_is_trained_further_where_the_classes_are_known(run, films, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        more = train_task(PNEUMONIA, films/'store', run.path/'manifest.csv', tmp_path/'more', **SMALL,
            start=str(run.path))
    assert load_bundle(more/'model').vocab==[OPACITY]


@pytest.mark.parametrize('given', [dict(anchors='some'), dict(model='yolo'),
    dict(loss='bce'), dict(flip=2), dict(candidates=0),
    dict(levels='three'), dict(teacher='run'), dict(decoding='best'), dict(norm='layer')])
def test_settings_are_checked(given):
    with pytest.raises(DataError): make_settings(PneumoniaSettings, given)


class Says(torch.nn.Module):
    "A detector whose classes are the numbers that were written into the images."
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Module()
        self.head.classes = Head(3, 3, batchnorm=False)
        with torch.no_grad(): self.head.classes.linear.weight.copy_(torch.eye(3))

    def forward(self, x): return {'classes': self.head.classes(x[:, 0, 0, :3, None, None]*10 - 5)}


def test_the_probabilities_of_the_film_are_mended_inside_the_classifier():
    rows, z, vocab = from_balanced_batches(Classes())
    rows, model = rows.assign(class_number=rows.a.map(vocab.index)), Says()
    errors = []
    for kind in ('none', 'platt'):
        told = PNEUMONIA.answer.calibrate(model, Written(z), rows[:300], [OPACITY],
            Settings(calibration=kind))
        with torch.no_grad():
            p = model(torch.from_numpy(np.stack(Written(z)))[:, None]/255)['classes'].softmax(1)
        errors.append(calibration(rows.class_number[300:]==0, p[300:, 0].numpy().astype(float)).ece)
    assert told['kind'].startswith('platt') and errors[1]<.06<.1<errors[0], errors


def predictions(*films, **more):
    return pd.DataFrame([dict(path=f'/x/{f}.dcm', boxes=t, error='') | more for f, t in films])


def test_a_submission_is_that_of_the_challenge(tmp_path):
    two = predictions(('a', boxes_text([[1, 2, 4, 8]], [.5])), ('b', '[]'))
    out = submission(two, ['b', 'a'], tmp_path/'s.csv')
    assert out.patientId.tolist()==['b', 'a'] and out.PredictionString.tolist()==['',
        '0.5000 1.0 2.0 3.0 6.0']
    assert (tmp_path/'s.csv').read_text().splitlines()[0]=='patientId,PredictionString'
    for films, said in ((['a'], 'b is not in the list'), (['a', 'b', 'c'], 'c was not predicted')):
        with pytest.raises(DataError, match=said): submission(two, films)
    with pytest.raises(DataError, match='twice'): submission(pd.concat([two, two]))
    with pytest.raises(DataError, match='no answer'): submission(predictions(('a', ''), error='no pixels'))


def test_another_kind_of_place_is_a_setting_of_the_kind():
    out = one_row_a_film(table(('a', 1, 1, 5, 5, 1), ('b', *NONE, 0), columns=('path', *XYWH, 'Target')),
        'what',
        ('nothing', 'finding'))
    assert Boxes().positive=='finding' and out['what'].tolist()==['finding', 'nothing']
