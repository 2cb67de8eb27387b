"""What a colleague meets in the first hour: tables as people have them, words that are mistyped, folders of PNGs, the calls
that everybody knows of fastai, and all of it from a wheel."""
import contextlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import run_cli
from PIL import Image

from radiology_ai.core import DataError, ModelError, Radiograph
from radiology_ai.data.cells import read_cells
from radiology_ai.data.labels import make_manifest, named_columns
from radiology_ai.data.words import grade_numbers, label_numbers
from radiology_ai.names import is_simulated
from radiology_ai.options import option_words, settings_told, tasks_told

matplotlib.use('Agg')
ROOT = Path(__file__).parents[1]


# Tables as people have them

@pytest.mark.parametrize('text', ['Knees 2024\nid;kl\na;1\nb;0\n', 'Export\n\n\nid,kl\na,1\nb,0\n',
    'Title\t\t\nid\tkl\na\t1\nb\t0\n',
    '\ufeff id ; kl \n a ; 1 \n b ; 0 \n'])
def test_a_title_above_the_header_is_none_of_the_table(tmp_path, text):
    (tmp_path/'t.csv').write_text(text, encoding='utf-8')
    df = read_cells(tmp_path/'t.csv')
    assert list(df)==['id', 'kl'] and df.values.tolist()==[['a', '1'], ['b', '0']]
    # the line that it stands in
    assert (tmp_path/'t.csv').read_text(encoding='utf-8').split('\n')[df.index[0]+1].strip()[0]=='a'


def test_a_header_whose_rows_hold_other_separators_is_no_title(tmp_path):
    row = 'a.png,{},"CC BY 4.0 (images, Kermany; masks, V7 Labs)"\n'
    (tmp_path/'t.csv').write_text('path,y,licence\n' + row.format(1) + row.format(0))
    df = read_cells(tmp_path/'t.csv')
    assert list(df)==['path', 'y', 'licence'] and df.y.tolist()==['1', '0']
    (tmp_path/'u.csv').write_text('Export, ward 3\nid;y\na;0\nb;1\n')
    assert list(read_cells(tmp_path/'u.csv'))==['id', 'y']


def test_a_title_in_a_workbook(tmp_path):
    rows = [['My export', None], [None, None], ['id', 'kl'], ['a', True], ['b', False]]
    pd.DataFrame(rows).to_excel(tmp_path/'t.xlsx', index=False, header=False)
    df = read_cells(tmp_path/'t.xlsx')
    assert list(df)==['id', 'kl'] and df.index.tolist()==[2, 3] and label_numbers(df.kl).tolist()==[1, 0]
    pd.DataFrame([['id'], ['a'], ['b']]).to_excel(tmp_path/'one.xlsx', index=False, header=False)
    assert read_cells(tmp_path/'one.xlsx').values.tolist()==[['a'], ['b']]


def test_grades_and_answers_as_people_write_them():
    told = ['KL2', 'II', 'grade 3', 'Schatzker IV', 'KL-0', 'yes', '1,0', ' Typ V ', 3, 'mild', 'IIII', 'IV?',
        '', None]
    found = grade_numbers(pd.Series(told, dtype=object)).fillna(-1).tolist()
    assert found==[2, 2, 3, 4, 0, 1, 1, 5, 3, -1, -1, -1, -1, -1]
    words = ['WAHR', 'falsch', 'oui', 'Non', 'sí', 'absent', 'T', '0,0', 'perhaps', 'II']
    assert label_numbers(pd.Series(words)).fillna(-1).tolist()==[1, 0, 1, 0, 1, 0, 1, 0, -1, -1]


def index_of(*paths, patient='') -> pd.DataFrame:
    return pd.DataFrame({'image_id': [Path(p).name for p in paths], 'path': [f'/films/{p}' for p in paths],
        'patient_id': patient})


@pytest.mark.parametrize('names', [['001', '002', '010'], [1, 2, 10], ['001.dcm', '002.dcm', '010.dcm'],
    ['001.PNG', ' 002.png', '010.Png '],
    ['C:\\x\\001.png', 'C:\\x\\002.png', 'C:\\x\\010.png'], ['a/001.png', './a/002.png', '010']])
@pytest.mark.parametrize('column', ['image_id', 'File name', 'Bild'])
def test_images_are_found_by_name_whatever_the_column_is_called(names, column):
    labels = pd.DataFrame({'no': [5., 6, 7], column: names, 'Patient': ['x', 'y', 'y'], 'oa': [1, 0, 1]})
    m = make_manifest(index_of('a/001.png', 'a/002.png', 'a/010.png'), labels)
    assert m.oa.tolist()==[1, 0, 1] and m.patient_id.tolist()==['x', 'y', 'y']


def test_columns_that_name_images_badly_or_twice_are_no_guess():
    index = index_of('1.png', '2.png', '3.png', patient='p')
    ages = pd.DataFrame({'age': [1, 2, 70], 'who': ['u', 'v', 'w'], 'oa': [1, 0, 1]})
    with pytest.raises(DataError, match='no column that names an image|None of the'):
        make_manifest(index, ages.assign(age=[1, 80, 70]))
    two = pd.DataFrame({'one': ['1', '2', '3'], 'other': ['3', '2', '1'], 'oa': [1, 0, 1]})
    with pytest.raises(DataError, match='no column that names an image'): make_manifest(index, two)
    assert make_manifest(index, named_columns(two, 'Other')).oa.tolist()==[1, 0, 1]
    with pytest.raises(DataError, match="did you mean 'other'"): named_columns(two, 'othr')


def test_patients_by_another_name_only_where_the_files_have_none():
    labels = pd.DataFrame({'image_id': ['1.png', '2.png'], 'patient': ['x', 'y'], 'group': ['u', 'u'],
        'oa': [1, 0]})
    assert make_manifest(index_of('1.png', '2.png'), labels).patient_id.tolist()==['x', 'y']
    assert make_manifest(index_of('1.png', '2.png', patient='p'), labels).patient_id.tolist()==['p', 'p']
    named = named_columns(labels, patient='Group')
    assert make_manifest(index_of('1.png', '2.png'), named).patient_id.tolist()==['u', 'u']
    with pytest.raises(DataError, match='have no patient'):
        make_manifest(index_of('1.png', '2.png'), labels.rename(columns={'patient': 'ward'}))


# Words of the command line

def test_the_source_tells_the_tasks_and_their_settings():
    from radiology_ai.tasks.registry import TASKS, settings_table
    assert tasks_told()=={t.name: t.question for t in TASKS.values()}
    for t in TASKS: assert list(settings_told(t))==list(settings_table(t).name)


def test_arguments_of_python_become_options():
    options = dict(on='--on', no_patient='--no-patient', label='--label', update='--update',
        positive='--positive')
    for text,said in {"say no_patient='drop', or 'image'": "say --no-patient drop, or 'image'",
            "Give another positive=": "Give another --positive",
            "Call with update=True (--update on the command line) to redo": "Call with --update to redo",
            "or say on=(label column, manifest column)": "or say --on LABEL-COLUMN",
            "Say teach=distil": "Say --set teach=distil",
            "no_patient=image (--set no_patient=image)": "--no-patient image", "x=3 stays": "x=3 stays",
            "Make one with preprocess_folder, or": "Make one with `radiology_ai preprocess`, or"}.items():
        assert option_words(text, options, ['teach'], ['--update'])==said


MISTAKES = [ # the words behind `radiology_ai`, and what the one line says
    ('train knees --data store --labels l.csv --out r', "no task 'knees'. Did you mean 'knee'"),
    ('train knee --data store --labels l.csv --out r --set epoch=3',
    "no setting 'epoch'. Did you mean 'epochs'"),
    ('train knee --data store --labels l.csv --out r --set epochs', '--set epochs has no value'),
    ('train knee --data store --labels l.csv --out r --set lr=fast', "setting lr is 'fast'"),
    ('train knee --data store --labels l.csv --out r --epochs 0', "'--epochs'"),
    ('train knee --data store --labels l.csv --out r --set bs=1', 'at least 2'),
    ('train knee --data store --labels l.csv --out r --no-patient keep', 'Choose drop, image or raise'),
    ('train knee --data store --labels l.csv --out r --hierarchy flat',
    'It is a setting: --set hierarchy=VALUE'),
    ('train knee --data store --labels l.csv --out r --dat x', 'Did you mean --data'),
    ('train knee --data store --labels l.csv --out r', "no image store in store"),
    ('train knee --data films --labels l.csv --out r', '`radiology_ai preprocess`'),
    ('train knee --data l.csv --labels l.csv --out r', 'is a file, not an image store'),
    ('train knee --data store --labels l.csv', '--out'),
    ('evaluate rn', "did you mean 'run'"),
    ('evaluate run --epochs 3', 'belongs to train, demo'),
    ('evaluate run --data store', 'belong together'),
    ('evaluate l.csv', 'is a file'),
    ('predict run films.zip --out p.csv', 'Unpack it first'),
    ('predict run nowhere --out p.csv', 'does not exist'),
    ('predict run films --out p.csv --to pngs', "no output 'pngs'"),
    ('index films.zip --out i.parquet', 'Unpack it first'),
    ('index packed --out i.parquet', 'archives and no images'),
    ('index film --out i.parquet', "did you mean 'films'"),
    ('preprocess films --recipe kne --out s', "no recipe 'kne'"),
    ('demo kneee', "Did you mean 'knee'"),
    ('tasks kneee', "Did you mean 'knee'"),
    ('trian knee', "Did you mean 'train'"),
    ('index films --out i.parquet --names', 'None of 1 files could be read'),
]

ALL_AT_ONCE = """
import contextlib, io, json, sys
from radiology_ai.cli import main
for words in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try: main(words.split())
        except SystemExit as e: code = e.code
    print(json.dumps([words, code, err.getvalue(), 'torch' in sys.modules]))
"""


def test_mistakes_are_told_on_one_line_before_torch_is_loaded(tmp_path):
    for folder in ('films', 'packed', 'run'): (tmp_path/folder).mkdir()
    (tmp_path/'films/a.png').write_text('no picture')
    for name in ('films.zip', 'packed/a.zip'): (tmp_path/name).write_bytes(b'PK\3\4')
    (tmp_path/'l.csv').write_text('image_id,oa\na,1\n')
    done = subprocess.run([sys.executable, '-c', ALL_AT_ONCE], input=json.dumps([w for w,_ in MISTAKES]),
        cwd=tmp_path,
        capture_output=True, text=True, check=True)
    told = list(map(json.loads, done.stdout.splitlines()))
    assert len(told)==len(MISTAKES)
    for (words,said),(_,code,err,torch) in zip(MISTAKES, told):
        assert code==2 and err.count('\n')==1 and said in err, (words, err)
        assert not torch, words


def test_targets_that_cannot_be_written_are_refused_before_all_else(tmp_path):
    """Of every command that writes: a file in place of a folder, a folder in place of a file, below a file, and where
    no file may be made."""
    from radiology_ai.cli import EXAMPLES
    (tmp_path/'films').mkdir()
    (tmp_path/'films/a.png').write_text('no picture')
    (tmp_path/'file').touch()
    (tmp_path/'folder').mkdir()
    writing = {c: words.split() for c, words in EXAMPLES.items() if '--out' in words}
    assert len(writing)==13
    files = ('index', 'explore', 'predict', 'export')
    asked = []
    for command, words in writing.items():
        at = words.index('--out') + 1
        for target, said in [('folder', 'folder, and a file') if command in files else ('file', 'file, and a folder'),
                ('file/x/y.onnx', 'is a file, not a folder'), ('/proc/x/y.onnx', 'takes no file')]:
            asked.append((' '.join([command, *words[:at], target, *words[at + 1:]]), said))
    asked.append(('deidentify films --out new --link folder', 'folder, and a file'))
    done = subprocess.run([sys.executable, '-c', ALL_AT_ONCE], input=json.dumps([w for w,_ in asked]),
        cwd=tmp_path, capture_output=True, text=True, check=True)
    told = list(map(json.loads, done.stdout.splitlines()))
    assert len(told)==len(asked)
    for (words, said), (_, code, err, torch) in zip(asked, told):
        assert code==2 and err.count('\n')==1 and (said in err or not os.path.exists('/proc')), (words, err)
        assert not torch, words
    assert sorted(p.name for p in tmp_path.iterdir())==['file', 'films', 'folder']


def test_help_version_and_completion(tmp_path):
    alone = run_cli()
    assert alone.stdout==run_cli('--help').stdout==run_cli('help').stdout and 'train' in alone.stdout
    assert '...' not in alone.stdout.split('Commands:')[1] and 'Exit codes' in alone.stdout
    from radiology_ai import __version__
    assert run_cli('--version').stdout==f'radiology_ai {__version__}\n'
    env = dict(_RADIOLOGY_AI_COMPLETE='complete_bash', COMP_WORDS='radiology_ai tr', COMP_CWORD='1')
    assert run_cli(**env).stdout.split()==['train']
    env |= dict(COMP_WORDS='radiology_ai train ch', COMP_CWORD='2')
    assert run_cli(**env).stdout.split()==['chest']


def test_strict_says_by_its_exit_code_that_files_were_left_out(tmp_path):
    (tmp_path/'films').mkdir()
    Image.fromarray(np.arange(64*64, dtype=np.uint8).reshape(64, 64)).save(tmp_path/'films/a.png')
    words = ['index', tmp_path/'films', '--out', tmp_path/'i.parquet']
    assert run_cli(*words, '--strict').returncode==0
    (tmp_path/'films/b.png').write_text('no picture')
    assert run_cli(*words).returncode==0
    done = run_cli(*words, '--strict', check=False)
    assert done.returncode==3 and '2 files, 1 unreadable' in done.stdout and done.stderr==''


# A finding of the chest

def chest_settings(label, label_set='nih14'):
    from radiology_ai.tasks.base import make_settings
    from radiology_ai.tasks.registry import TASKS
    return make_settings(TASKS['chest'].settings, dict(label=label, label_set=label_set))


def test_a_finding_of_the_chest_as_people_write_it():
    from radiology_ai.tasks.registry import TASKS
    s = chest_settings('effusion, Pleural thickening')
    answer = TASKS['chest'].answer.of_run(s)
    told = pd.DataFrame({'image_id': list('abcd'), 'EFFUSION ': ['ja', 'nein', None, '1,0'],
        'pleural thickening': [1, 0, 1, 0]})
    rows = answer.prepared(told, s)
    assert rows.Effusion.fillna(-1).tolist()==[1, 0, -1, 1] and rows.Pleural_Thickening.tolist()==[1, 0, 1, 0]
    with pytest.raises(DataError, match="'EFFUSION|'Effusion' holds 'perhaps' in 1 cells"):
        answer.prepared(told.replace('nein', 'perhaps'), s)
    with pytest.raises(DataError, match="no category of 'Effusion', 'Pleural_Thickening'"):
        answer.prepared(told[['image_id']], s)
    one = chest_settings('Effusion')
    with pytest.raises(DataError, match=r"no category of 'Effusion' \(1 in all\)"):
        TASKS['chest'].answer.of_run(one).prepared(told[['image_id']], one)


@pytest.mark.parametrize('label,label_set,said', [
    ('Effusion', 'tree32', "Did you mean 'Pleural effusion'\\? nih14 has it: give label_set=nih14"),
    ('fracture', 'tree32', 'chexpert has it'), ('Edema', 'tree32', 'nih14 and chexpert have it'),
    ('xyz', 'nih14', 'The categories are Atelectasis')])
def test_a_category_of_another_label_set_is_found(label, label_set, said):
    with pytest.raises(DataError, match=said): chest_settings(label, label_set).tree()


# A grade with a cut, and what a report is called

def kl_settings(**given):
    from radiology_ai.tasks.base import make_settings
    from radiology_ai.tasks.registry import TASKS
    return make_settings(TASKS['knee'].settings, dict(label='KL grade') | given)


def test_a_grade_is_positive_from_its_cut_on():
    import torch

    from radiology_ai.losses.graded import GradedLoss, any_grade
    from radiology_ai.tasks.kinds import Grades
    s = kl_settings(positive='2', grade_names='none,doubtful, mild')
    kind = Grades('fractured', 'not', ('fractured',)).of_run(s)
    rows = pd.DataFrame({'image_id': list('abcd'), 'KL grade': ['KL0', 'I', 'grade 2', 4]})
    rows = kind.checked(rows, s)
    assert kind.truth(rows, s).values.tolist()==[[0, 0], [0, 1], [1, 2], [1, 4]]
    assert kind.names(s)==dict(positive='KL grade 2 or higher', negative='KL grade below 2')
    assert kind._named(4)==['none', 'doubtful', 'mild', 3]
    again = Grades().of_bundle(json.loads(json.dumps(kind.spec(rows, range(5), s))))
    assert (again.cut, again.positive, again.grade_names)==(2, 'KL grade 2 or higher',
        ('none', 'doubtful', 'mild'))
    with pytest.raises(DataError, match="All grades of 'KL grade' are below 2"):
        kind.checked(rows.assign(**{'KL grade': [0, 1, 0, 1]}), s)
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    p = z.softmax(1)
    assert torch.allclose(any_grade(z, 2).sigmoid(), p[:,2:].sum(1), atol=1e-6)
    t = torch.tensor([0, 1, 2, 3, 4, -1])
    assert GradedLoss()(z, t)!=GradedLoss(cut=2)(z, t)
    from radiology_ai.metrics.running import scores_auroc
    assert scores_auroc(p, np.array([0, 1, 2, 3, 4, 2]), (0, 1))==scores_auroc(
        np.c_[p[:,:2].sum(1), p[:,2:].sum(1)], np.array([0, 0, 1, 1, 1, 1]))


def test_a_report_is_called_after_its_question():
    from radiology_ai.tasks.registry import TASKS
    knee = TASKS['knee']
    assert knee.told(knee.settings())==(knee.title, knee.question)
    assert knee.told(kl_settings(label='Schatzker'))==(knee.title, knee.question)
    title,question = knee.told(kl_settings(positive=2))
    assert 'racture' not in title+question and title=='KL grade: frontal knee radiographs'
    assert question=='Does this frontal knee radiograph show KL grade 2 or higher?'
    assert knee.told(kl_settings(title='Worn knees', question='How worn?'))==('Worn knees', 'How worn?')
    assert TASKS['chest'].told(TASKS['chest'].settings(label='Pneumonia'))[0]==TASKS['chest'].title


def test_simulated_radiographs_say_so(run):
    from radiology_ai.names import SIMULATED
    from radiology_ai.tasks.registry import evaluate, report
    assert is_simulated(['2.25.1', '1.2.3', '2.25.1', 'a.png'],
        ['SIM000001', 'SIM000001', 'P7', '']).tolist()==[True, False, False, False]
    found = evaluate(run)
    assert found.lines()[0]==SIMULATED
    page = report(run, found, out=run.parent/'page', audit=False)
    assert SIMULATED.split(':')[0] in page.read_text() and SIMULATED in json.loads(
        page.with_suffix('.json').read_text())['warnings']


# The calls that everybody knows of fastai

def test_warnings_of_other_libraries_greet_nobody():
    code = 'from radiology_ai.train.learner import xray_learner'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stderr==''


class MemoryStore:
    "Images in memory with an index and a recipe, as a store has them."
    def __init__(self, x):
        from radiology_ai.preprocess.recipe import recipe
        self.x, self.recipe = x, recipe('plain', size=32)
        self.index = pd.DataFrame({'image_id': [f'im{i}' for i in range(len(x))]})
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]


def small_learner(loss=None, cbs=(), show=False, labels='bar', **loaders):
    from radiology_ai.data.load import xray_dataloaders
    from radiology_ai.train.learner import xray_learner
    x = np.random.default_rng(0).integers(60, 90, (24, 32, 32)).astype(np.uint8)
    for i in range(0, 24, 2): x[i, 8:24, 4*(i%6):4*(i%6)+4] = 220
    m = pd.DataFrame(dict(image_id=[f'im{i}' for i in range(24)], patient_id=[f'p{i}' for i in range(24)],
        split=['train']*12 + ['valid']*12, bar=['bar', 'none']*12, one=[1, 0]*12, two=[0, 1, 1, 0]*6))
    dls = xray_dataloaders(MemoryStore(x), m, labels, bs=6, device='cpu', **loaders)
    return xray_learner(dls, 'test_resnet', loss, pretrained=False, cbs=list(cbs), show=show, lr=1e-2)


@pytest.fixture(scope='module')
def learned():
    return small_learner().fit_two_phase(1)


def test_the_usual_calls_answer(learned, tmp_path, monkeypatch, capsys):
    from fastai.interpret import ClassificationInterpretation

    from radiology_ai.models.bundle import load_bundle
    monkeypatch.chdir(tmp_path)
    learned.show_results(max_n=4)
    p,t,said = learned.get_preds(with_decoded=True)
    assert torch_equal(said, p.argmax(1)) and len(t)==12
    words,number,q = learned.predict('im12')
    assert words==learned.dls.vocab[int(number)] and np.allclose(q, p[0], atol=1e-5)
    assert np.allclose(learned.predict(learned.dls.store[12])[2], q, atol=1e-6)
    assert learned.tta(n=1)[0].shape==p.shape
    both = ClassificationInterpretation.from_learner(learned)
    assert both.confusion_matrix().sum()==12
    both.print_classification_report()
    assert 'Total params' in str(learned.summary()) and learned.lr_find(show_plot=False, num_it=12)
    assert np.allclose(load_bundle(learned.export('out')).probabilities(learned.dls.store[12][None]), q,
        atol=1e-5)
    for call,why in [(lambda: learned.export('model.pkl'), 'not the pickle'),
            (lambda: learned.predict('im99'), 'no image of this store'),
            (lambda: learned.predict(__file__), 'learn.export'),
            (lambda: learned.predict(np.ones((32, 32))*200.), 'reach from')]:
        with pytest.raises((DataError, ModelError), match=why): call()


def torch_equal(a, b): return bool((a==b).all())


def test_labels_and_grades_are_decoded_from_logits():
    learn = small_learner(labels=['one', 'two'])
    p,_,said = learn.get_preds(with_decoded=True)
    assert torch_equal(said.bool(), p>=.5)
    words,_,q = learn.predict('im0')
    assert words==(', '.join(n for n,v in zip(['one', 'two'], q) if v>=.5) or 'none')
    learn.show_results(max_n=2)


def test_mixed_films_ask_for_their_loss():
    from fastai.callback.mixup import MixUp as FastaiMixUp

    from radiology_ai.losses.base import WeightedCrossEntropy
    from radiology_ai.losses.teacher import DistillationLoss
    from radiology_ai.vision.mix import CutMix, MixedLoss, MixUp
    for mix in (MixUp(), CutMix()):
        with pytest.raises(ModelError, match=r'Give loss_func=MixedLoss\(WeightedCrossEntropy'):
            small_learner(WeightedCrossEntropy(), batch_tfms=[mix]).fit_two_phase(1)
    small_learner(MixedLoss(WeightedCrossEntropy()), batch_tfms=[MixUp()]).fit_two_phase(1)
    with pytest.raises(ModelError, match="fastai's MixUp cannot mix targets for DistillationLoss"):
        small_learner(DistillationLoss(WeightedCrossEntropy()), [FastaiMixUp(.4)]).fit_two_phase(1)


def test_a_line_an_epoch_and_no_columns_twice():
    from fastai.callback.core import Callback
    class Stop(Callback):
        order, watches = 99, True
        def after_batch(self):
            if self.training: raise KeyboardInterrupt
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        learn = small_learner(show=None, cbs=[Stop()])
        with pytest.raises(KeyboardInterrupt): learn.fit_two_phase(1)
        learn.remove_cb(Stop)
        learn.fit_two_phase(2)
        learn.validate()
        learn.get_preds()
    lines = err.getvalue().strip().splitlines()
    assert [line.split(':')[0] for line in lines]==['epoch 1 of 2', 'epoch 2 of 2']
    assert list(learn.recorder.metric_names)==['epoch', 'train_loss', 'valid_loss', 'auroc', 'time']


def test_what_stands_at_the_end_of_a_cell(learned, run, store):
    from radiology_ai.metrics.intervals import Interval
    from radiology_ai.models.bundle import load_bundle
    from radiology_ai.preprocess.store import ImageStore
    assert repr(Interval(.9961, .9672, 1.))=='Interval(0.996 (0.967 to 1.000))'
    assert '12 images to train and 12 images to validate' in repr(learned.dls) and 'bar, none' in repr(learned.dls)
    assert '1 epoch, the last one' in repr(learned) and 'test_resnet' in repr(learned)
    assert 'untrained' in repr(small_learner())
    film = Radiograph(np.zeros((300, 1000), np.float32), tags={'Modality': '<b>'})
    for shown in (film, ImageStore(store)):
        assert shown._repr_html_().count('data:image/png;base64,')==1 and len(shown._repr_html_())<200_000
    assert '<b>' not in film._repr_html_() and '&lt;b&gt;' in film._repr_html_()
    bundle = load_bundle(run)
    assert bundle.task=='knee' and len(repr(bundle))<400 and "recipe 'knee'" in repr(bundle)
    from radiology_ai.tasks.registry import TASKS, evaluate
    found = repr(evaluate(run))
    assert 'AUROC' in found and '2.25.' not in found and len(found.splitlines())<15 # no identifier of an image
    assert all(len(repr(t))<300 and t.question in repr(t) for t in TASKS.values())


def test_a_checkpoint_as_a_callback_says_what_to_call(tmp_path):
    from radiology_ai.train.checkpoint import Checkpoint
    with pytest.raises(ModelError, match='fit_two_phase\\(epochs, checkpoint=folder\\)'):
        small_learner(cbs=[Checkpoint(tmp_path/'state')]).fit_two_phase(1)


def test_where_no_image_is_left_it_says_why(store, tmp_path):
    from radiology_ai.preprocess.store import ImageStore
    from radiology_ai.tasks.kinds import task_manifest
    from radiology_ai.tasks.registry import TASKS
    task, images = TASKS['knee'], ImageStore(store)
    labels = pd.DataFrame({'image_id': images.index.image_id, 'fractured': np.nan})
    with pytest.raises(DataError, match=rf'No image is left: .*{len(images.errors)} unreadable.*\d+ without a label'):
        task_manifest(task, images, labels, task.settings(label='fractured'))


# The whole way, from a folder of PNGs and an Excel table

def pictures(folder: Path) -> Path:
    "Fifty pictures of twenty-five people, and a table as a colleague has it."
    (folder/'PNGs').mkdir(parents=True)
    gen = np.random.default_rng(0)
    rows = []
    for k in range(50):
        x = gen.integers(40, 120, (96, 96)).astype(np.uint8)
        grade = k//2%5
        x[10:12+10*grade, 20:70] = 230
        Image.fromarray(x).save(folder/f'PNGs/knee_{k:03d}.png')
        rows.append([f'knee_{k:03d}', f'P{k//2}', f'KL{grade}', 'ja' if grade>1 else 'nein',
            ('male', 'W')[k//2%2], 30+k, ('links', 'right')[k%2]])
    table = [['Knees of our clinic', *[None]*6], ['Bild', 'Patient', 'KL grade', 'OA', 'Sex', 'Age (years)', 'Side'],
        *rows]
    pd.DataFrame(table).to_excel(folder/'knees.xlsx', index=False, header=False)
    return folder


def goes_the_whole_way(folder, cli):
    cli('preprocess', folder/'PNGs', '--recipe', 'plain', '--size', 64, '--out', folder/'store')
    done = cli('train', 'knee', '--data', folder/'store', '--labels', folder/'knees.xlsx', '--label',
        'kl_grade', '--positive', 2,
        '--grade-names', 'none,doubtful,mild,moderate,severe', '--out', folder/'run', '--arch', 'test_resnet',
        '--no-pretrained',
        '--epochs', 1, '--bs', 8)
    assert 'AUROC' in done.stdout and 'epoch 1 of 1' in done.stderr
    cli('evaluate', folder/'run')
    told = pd.read_csv(folder/'run/predictions.csv', dtype=str)
    assert set(told.PatientSex)=={'M', 'F'} and set(told.side)<={'L', 'R'} and told.PatientAge.str.fullmatch('0[3-7].Y').all()
    page = (folder/'run/report.html').read_text()
    assert '40 to 64' in page # years, as a group of the table's own column
    assert 'kl_grade: frontal knee radiographs' in page and 'moderate' in page and 'racture' not in page.split('</header>')[0]
    assert 'simulated' not in page.split('</header>')[0]
    cli('predict', folder/'run', folder/'PNGs', '--out', folder/'p.csv', '--to', 'json', '--to', 'csv')
    assert 'kl_grade 2 or higher' in (folder/'p.json').read_text()


@pytest.mark.slow
def test_from_pngs_and_excel_to_a_report(tmp_path):
    goes_the_whole_way(pictures(tmp_path), run_cli)


@pytest.mark.slow
def test_the_first_hour_from_a_wheel(tmp_path):
    "The wheel alone, beside the packages that it needs: nothing of the checkout is imported."
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
    source = tmp_path/'source'
    subprocess.run(['git', 'clone', '-q', '--depth', '1', f'file://{ROOT}', source], check=True)
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path/'wheel', source],
        check=True)
    wheel, = (tmp_path/'wheel').glob('*.whl')
    subprocess.run([*pip, 'install', '--no-deps', '--target', tmp_path/'site', wheel], check=True)
    env = os.environ | {'PYTHONPATH': str(tmp_path/'site')}
    start = [sys.executable, '-c', 'import sys; from radiology_ai.cli import main; main()']
    def cli(*words):
        return subprocess.run([*start, *map(str, words)], cwd=tmp_path, env=env, capture_output=True,
            text=True, check=True)
    where = [sys.executable, '-c', 'import radiology_ai; print(radiology_ai.__file__)']
    assert str(tmp_path/'site') in subprocess.run(where, cwd=tmp_path, env=env, capture_output=True,
        text=True).stdout
    assert 'train' in cli().stdout and cli('tasks').stdout.startswith('knee')
    goes_the_whole_way(pictures(tmp_path/'work'), cli)


def test_help_tells_every_parameter():
    import pydoc

    import radiology_ai.all as everything
    from radiology_ai.signatures import parameters
    told = {n: getattr(everything, n) for n in everything.__all__}
    told = {n: o for n, o in told.items() if inspect.isfunction(o) and any(said for _, said in parameters(o))}
    assert len(told)>170
    for name, o in told.items():
        page = pydoc.plain(pydoc.render_doc(o))
        lines = dict(parameters(o))
        of = inspect.unwrap(o).__code__
        for p in of.co_varnames[:of.co_argcount + of.co_kwonlyargcount]:
            code = next((c for c in lines if re.search(rf'\b{p}\b', c)), None)
            assert code and code in page and lines[code] in page, (name, p)
        assert page.count('Parameters, as they are')==1, name
    shown = inspect.getdoc(everything.preprocess_folder)
    assert 'size' in shown and inspect.getdoc(everything.Preprocess).count('\n')>12
