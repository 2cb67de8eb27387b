"""A search of settings: judged on validation patients alone, gone on with after kills, refused where it would
be another."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import refuses, run_cli

from radiology_ai import search as room
from radiology_ai.core import DataError, RadiologyError
from radiology_ai.search import check_space, default_space, read_space, search, study_of, work
from radiology_ai.tasks.knee import KNEE
from radiology_ai.tasks.registry import TASKS
from radiology_ai.tasks.run import read_exactly

optuna = pytest.importorskip('optuna')
SPACE = {'lr': {'low': 1e-4, 'high': 1e-2, 'log': True}, 'bs': [8, 16]}
TINY = dict(arch='test_resnet', pretrained=False, epochs=1, head_epochs=0, bs=16)
GIVEN = dict(space=SPACE, winners=1, seeds=1, short=1)


def tiny(store, hospital, out, trials=2, **changes):
    short = GIVEN | {k: changes.pop(k) for k in list(changes) if k in GIVEN
        or k in ('workers', 'storage', 'seconds', 'seed')}
    return search('knee', store, hospital/'labels.csv', out, trials=trials, **short, **TINY | changes)


@pytest.fixture(scope='session')
def searched(made_once, store, hospital):
    "A search of two trials, made once."
    return made_once('searched', lambda out: tiny(store, hospital, out))


def test_a_search_leaves_a_winner_and_a_page(searched, store, hospital, monkeypatch):
    figures = json.loads((searched/'figures.json').read_text())
    trials = pd.read_csv(searched/'trials.csv')
    assert list(trials.state)==['complete']*2 and {'lr', 'bs', 'value', 'seconds'}<=set(trials)
    assert trials.value.max()==pytest.approx(figures['short']) and 0<=figures['winner']['test'][0]<=1
    assert trials.lr[0]==2e-3 # the default settings, which lie in the space, are tried first
    page = (searched/'search.html').read_text()
    for words in ('best of 2', 'untouched patients', 'History', 'Parallel coordinates', 'All trials'):
        assert words in page
    assert 'http' not in page.replace('http://www.w3.org', '')
    # the same call reads what is there, and more trials are added to it
    monkeypatch.setattr(room, 'short_run', lambda *args, **kwargs: pytest.fail('it was trained again'))
    again = tiny(store, hospital, searched)
    assert again.figures==figures and 'winner: ' in again.lines()[1]


def test_a_trial_never_sees_a_test_patient(searched, store, hospital, monkeypatch):
    rows, every = (read_exactly(searched/f) for f in ('rows.csv', 'manifest.csv'))
    assert set(rows.split)=={'train', 'valid'} and set(every.split)=={'train', 'valid', 'test'}
    assert not set(rows.patient_id) & set(every.patient_id[every.split=='test'])
    record = json.loads((searched/'full'/'default_seed_0'/'run.json').read_text())
    full = read_exactly(searched/'full'/'default_seed_0'/'manifest.csv').set_index('image_id').split
    assert (every.set_index('image_id').split==full).all() and record['task']=='knee'


def test_the_settings_of_the_winner_train(searched, tmp_path):
    done = run_cli('train', '--settings', searched/'run.toml', '--out', tmp_path/'run', '--epochs', 1)
    assert 'AUROC' in done.stdout


def begin(store, hospital, out, **more):
    "A search that has begun and has no trial."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(room, '_all_work', lambda *args, **kwargs: None)
        with pytest.raises(RadiologyError, match='None of . trials is complete'):
            tiny(store, hospital, out, **more)


def killed(out, trials, storage=''):
    "A worker in a process of its own that is killed in the middle of its trial."
    running = lambda: {t.number for t in study_of(out, storage).trials
        if t.state.name=='RUNNING' and 'lease' in t.user_attrs}
    before = running()
    child = os.fork()
    if not child:
        room.short_run = lambda *args, **kwargs: time.sleep(60)
        try: work('knee', out, trials, storage=storage)
        finally: os._exit(0)
    end = time.monotonic()+50
    while not (begun := running()-before) and time.monotonic()<end: time.sleep(.02)
    assert begun
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_killed_workers_leave_nothing_that_stops_the_others(store, hospital, tmp_path, monkeypatch):
    """Ten times: the trial counts as failed, its settings are tried again, and there are as many trials as
    were wanted."""
    out = tmp_path/'killed'
    begin(store, hospital, out)
    for _ in range(10): killed(out, 2)
    monkeypatch.setattr(room, 'short_run', lambda *args, **kwargs: ('AUROC', .75))
    assert work('knee', out, 2)==2
    states = [t.state.name for t in study_of(out).trials]
    assert states.count('FAIL')==10 and states.count(
        'COMPLETE')==2 and 'RUNNING' not in states and 'WAITING' not in states[:10]
    again = [t for t in study_of(out).trials if 'of' in t.user_attrs]
    assert again and all(t.params==study_of(out).trials[t.user_attrs['of']].params for t in again if t.params)
    assert max(t.user_attrs['again'] for t in again)<=room.AGAIN
    assert work('knee', out, 2)==0


def test_workers_share_a_search_and_one_that_dies_is_replaced(store, hospital, tmp_path):
    "Two processes, one of which kills itself at its first trial."
    out = tmp_path/'two'
    begin(store, hospital, out)
    said = []
    room._all_work(Dying(), out, 3, 2, math.inf, storage='', say=said.append)
    states = [t.state.name for t in study_of(out).trials]
    assert states.count('COMPLETE')==3 and states.count('FAIL')==1 and len(
        said)==1 and 'another takes its place' in said[0]


class Dying:
    "Stands for the task in a worker: whoever begins first kills itself; the others answer at once."
    def __reduce__(self): return dying, ()


def dying():
    "In the worker, where it is unpickled."
    def one(task, plan, study, trial, data):
        place = room.Path(os.environ.get('TMPDIR', '/tmp'))/f'dying-{os.getppid()}'
        try: os.close(os.open(place, os.O_CREAT | os.O_EXCL))
        except FileExistsError: return study.tell(trial, .5)
        os.kill(os.getpid(), signal.SIGKILL)
    room._one_trial = one
    return KNEE


def test_a_trial_that_cannot_be_trained_is_told(store, hospital, tmp_path, monkeypatch):
    begin(store, hospital, tmp_path/'out')
    def fails(*args, **kwargs): raise DataError("The loss became nan", "Lower the learning rate")
    monkeypatch.setattr(room, 'short_run', fails)
    with pytest.raises(RadiologyError, match='None of 2 trials is complete. The loss became nan'):
        tiny(store, hospital, tmp_path/'out')


def test_pruned_trials_stop_early(store, hospital, tmp_path):
    "A trial reports each epoch; Optuna's word stops it, and nothing of it is judged."
    class Trial:
        told = []
        def report(self, value, step): self.told.append((step, value))
        def should_prune(self): return len(self.told)==2
    begin(store, hospital, tmp_path/'out')
    rows = read_exactly(tmp_path/'out'/'rows.csv')
    from radiology_ai.preprocess.store import ImageStore
    s = KNEE.settings(**TINY | {'epochs': 3, 'bs': 8})
    with pytest.raises(optuna.TrialPruned): room.short_run(KNEE, ImageStore(store), rows, s, Trial())
    assert [step for step, _ in Trial.told]==[0, 1]


def test_another_search_is_refused(searched, store, hospital, tmp_path):
    for changes, words in ((dict(space={'bs': [8, 16]}), 'the space'), (dict(seed=3), 'the seed'),
            (dict(lr=1e-3), 'a setting')):
        with pytest.raises(RadiologyError, match=f'holds another search: {words} differs'):
            tiny(store, hospital, searched, **changes)
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('x')
    with pytest.raises(RadiologyError, match='is no search'): tiny(store, hospital, tmp_path/'mine')
    # a study of somebody else in the same storage
    begin(store, hospital, tmp_path/'out')
    study_of(tmp_path/'out').set_user_attr('radiology_ai', 'another')
    with pytest.raises(RadiologyError, match='holds a study .* with other settings'):
        tiny(store, hospital, tmp_path/'out')
    with pytest.raises(DataError, match='SQLite is no storage'):
        tiny(store, hospital, tmp_path/'new', storage='sqlite:///a.db')
    for wrong in (dict(folds=3), dict(start='run')):
        with pytest.raises(DataError, match='from the beginning'):
            tiny(store, hospital, tmp_path/'new', **wrong)


def test_spaces(tmp_path):
    for task in TASKS.values(): assert 'lr' in check_space(task, default_space(task))
    assert default_space(TASKS['chest'])['loss']==['bce',
        'asymmetric'] and 'loss' not in default_space(TASKS['knee'])
    for wrong, words in (({'learning_rate': [1]}, "no setting 'learning_rate' to search"),
            ({'arhc': ['resnet18']}, "mean 'arch'"),
            ({'folds': [0, 5]}, 'may not vary'), ({'label': ['a']}, 'may not vary'),
            ({'epochs': [1, 9]}, 'may not vary'),
            ({'lr': [0.]}, 'learning rate above 0'), ({'bs': ['many']}, 'bs is'),
            ({'lr': {'low': 1}}, 'Give low and high'),
            ({'lr': {'low': 2., 'high': 1.}}, 'low < high'),
            ({'lr': {'low': .1, 'high': 1., 'stp': 2}}, "mean 'step'"),
            ({'lr': 'all'}, 'Give a list'), ({'lr': []}, 'Give a list'), ({}, 'is empty')):
        with pytest.raises(DataError, match=words): check_space(KNEE, wrong)
    (tmp_path/'s.toml').write_text('[space]\nlr = {low = 1e-4, high = 1e-2, log = true}\nbs = [8, 16]\n')
    assert check_space(KNEE, read_space(tmp_path/'s.toml'))==SPACE
    (tmp_path/'s.toml').write_text('lr = low')
    with pytest.raises(DataError, match='no space of settings'): read_space(tmp_path/'s.toml')
    with pytest.raises(DataError, match='no file'): read_space(tmp_path/'none.toml')


def test_the_command_refuses_what_is_wrong(store, hospital, tmp_path):
    (tmp_path/'s.toml').write_text('learning_rate = [1]\n')
    words = ('search', 'knee', '--data', store, '--labels', hospital/'labels.csv', '--out', tmp_path/'out')
    assert "no setting 'learning_rate'" in refuses(*words, '--space', tmp_path/'s.toml')
    assert 'no task' in refuses('search', 'kne', *words[2:])
    assert not (tmp_path/'out').exists()


class Slow:
    "Stands for the task in a worker: each trial takes a minute, and tells the number of its process."
    def __reduce__(self): return slow, ()


def slow():
    "In the worker, where it is unpickled."
    def one(task, plan, study, trial, data):
        (room.Path(os.environ.get('TMPDIR', '/tmp'))/f'slow-{os.getppid()}-{os.getpid()}').touch()
        time.sleep(60)
    room._one_trial = one
    return KNEE


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='no /proc here')
def test_workers_end_with_a_search_that_is_killed(store, hospital, tmp_path, monkeypatch):
    out = tmp_path/'orphans'
    begin(store, hospital, out)
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    child = os.fork()
    if not child:
        try: room._all_work(Slow(), out, 2, 2, math.inf, storage='', say=print)
        finally: os._exit(0)
    end = time.monotonic()+60
    while len(found := list(tmp_path.glob(f'slow-{child}-*')))<2 and time.monotonic()<end: time.sleep(.1)
    assert len(found)==2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    running = lambda: [p for p in found if os.path.isdir(f"/proc/{p.name.split('-')[-1]}")]
    end = time.monotonic()+10
    while running() and time.monotonic()<end: time.sleep(.1)
    assert not running()


@pytest.fixture(scope='session')
def postgres():
    "The address of a PostgreSQL server of our own: on a Unix socket in a folder of its own, not as root."
    pytest.importorskip('psycopg', reason="PostgreSQL's driver is not installed: pip install 'psycopg[binary]'")
    found = [shutil.which('initdb'), *sorted(Path('/usr/lib/postgresql').glob('*/bin/initdb'))]
    found = [Path(p).resolve().parent for p in found if p]
    if not found: pytest.skip('there is no PostgreSQL server here: apt-get install postgresql')
    root, who = Path(tempfile.mkdtemp(prefix='pg', dir='/tmp')), {}  # the path of a socket has at most 107 bytes
    if os.geteuid()==0:
        try: shutil.chown(root, 'postgres')
        except LookupError: pytest.skip('PostgreSQL does not run as root, and there is no user postgres')
        who = dict(user='postgres', extra_groups=[])
    subprocess.run([found[0]/'initdb', '-D', root/'data', '-U', 'reader', '-A', 'trust', '-N', '--no-locale', '-E',
        'UTF8'], cwd=root, check=True, capture_output=True, **who)
    words = ['-D', root/'data', '-k', root, '-F', '-c', 'listen_addresses=', '-c', 'max_connections=8']
    with open(root/'log', 'w') as log:
        server = subprocess.Popen([found[0]/'postgres', *words], stdout=log, stderr=log, cwd=root, **who)
    try:
        end = time.monotonic()+30
        while subprocess.run([found[0]/'pg_isready', '-q', '-h', root]).returncode:
            assert server.poll() is None and time.monotonic()<end, (root/'log').read_text()
            time.sleep(.05)
        yield f'postgresql+psycopg://reader:secret@/postgres?host={root}'
    finally:
        server.send_signal(signal.SIGINT)  # it ends without waiting for its clients
        server.wait(30)
        shutil.rmtree(root)


def worker(out, trials, storage):
    "Takes part in a process of its own, whose exit status tells how many trials it made."
    child = os.fork()
    if child: return child
    made = 255
    try: made = work('knee', out, trials, storage=storage)
    finally: os._exit(made)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_workers_share_a_database(store, hospital, tmp_path, monkeypatch, postgres):
    """In PostgreSQL: a killed worker's trial is tried again, and two workers make the rest, more than the server takes
    connections at once."""
    out = tmp_path/'shared'
    begin(store, hospital, out, storage=postgres)
    assert 'secret' not in (out/'search.json').read_text() and not (out/'journal.log').exists()
    killed(out, 12, postgres)
    monkeypatch.setattr(room, 'short_run', lambda *args, **kwargs: time.sleep(.02) or ('AUROC', .75))
    crew = [worker(out, 12, postgres) for _ in range(2)]
    made = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in crew]
    trials = study_of(out, postgres).trials
    states = [t.state.name for t in trials]
    assert sum(made)==states.count('COMPLETE')==12 and min(made)>0 and states.count('FAIL')==1 and len(states)==13
    again, = (t for t in trials if 'of' in t.user_attrs)
    assert again.params==trials[again.user_attrs['of']].params and trials[again.user_attrs['of']].state.name=='FAIL'
    # the study belongs to its settings, and another folder of the same name is another search
    with pytest.raises(RadiologyError, match='holds a study .* with other settings'):
        tiny(store, hospital, tmp_path/'elsewhere'/'shared', seed=5, storage=postgres)


def test_a_database_that_is_not_there_is_told(tmp_path):
    pytest.importorskip('psycopg')
    for storage in ('postgresql+psycopg://reader:secret@/postgres?host=/nowhere', 'postgresql:reader:secret',
            'postgresql+none://reader:secret@host/name'):
        with pytest.raises(DataError, match='cannot be used') as told: study_of(tmp_path, storage)
        assert 'secret' not in str(told.value)


def test_a_driver_that_is_missing_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'psycopg', None)
    with pytest.raises(RadiologyError, match=r"driver .* not installed. .*psycopg\[binary\]"):
        study_of(tmp_path, 'postgresql+psycopg://reader@host/name')
