"""Several processes train one run: the same files whatever is killed, figures over all validation images, one writer;
others with different data are refused, and nobody waits for a process that has died. A cluster predicts what one process
does."""
import os
import signal
import socket
import time
from dataclasses import replace

import pandas as pd
import pytest
from conftest import refuses
from forks import Forks

from radiology_ai.core import RadiologyError, StoreError
from radiology_ai.dicom.index import image_files
from radiology_ai.metrics.running import scores_auroc
from radiology_ai.serve import predict as serve
from radiology_ai.tasks.run import read_run, run_state

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
TINY = ('--arch', 'test_resnet', '--bs', 16, '--no-pretrained', '--set', 'calibration=none')


@pytest.fixture(scope='module')
def forks():
    running = Forks()
    yield running
    running.close()


def launch(forks, folder, *words) -> list:
    "Start a command as two processes of one job, each with its own words, as a launcher does; their numbers."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    started = []
    for rank, own in enumerate(words):
        told = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        forks.place(folder, {**os.environ, **told})
        started.append(forks.start(own, folder/f'said_{rank}'))
    return started


def ended(forks, folder, started, seconds: float=300) -> list:
    "Exit code and words of each process; none may hang."
    end = time.monotonic()+seconds
    codes = [None]*len(started)
    while None in codes and time.monotonic()<end:
        codes = [forks.ended(p) if c is None else c for p, c in zip(started, codes)]
        time.sleep(.05)
    for p, c in zip(started, codes):
        if c is None: os.kill(p, signal.SIGKILL)
    return [(c, (folder/f'said_{k}').read_text()) for k, c in enumerate(codes)]


def words(store, hospital, out, *more, labels='labels.csv') -> list:
    return ['train', 'knee', '--data', store, '--labels', hospital/labels, '--out', out, *TINY, '--epochs', 4, *more]


@pytest.fixture(scope='module')
def pair(store, hospital, forks, tmp_path_factory):
    "A run that two processes have made, and what they said."
    folder = tmp_path_factory.mktemp('pair')
    started = launch(forks, folder, *[words(store, hospital, folder/'run')]*2)
    said = ended(forks, folder, started)
    assert [c for c, _ in said]==[0, 0], said
    return read_run(folder/'run'), said


def test_two_processes_make_one_run(pair):
    run, said = pair
    fit = run.record['fits'][0]
    assert fit['machine']['processes']==2 and len(fit['curves'])==4
    assert 'AUROC' in said[0][1] and 'epoch 4 of 4' in said[0][1] and said[1][1]=='' # one speaks
    assert run_state(run.path)=='whole' and not list(run.path.rglob('.*'))
    assert run.predictions.image_id.is_unique


def test_figures_are_those_of_all_validation_images(pair):
    "The figure of the best epoch is that of the scores in the table, which one process has made of all images."
    run, _ = pair
    valid = run.predictions[run.predictions.split=='valid']
    own = scores_auroc(valid[['p_0', 'p_1']].to_numpy(), valid.grade.to_numpy())
    assert max(e['auroc'] for e in run.record['fits'][0]['curves'])==pytest.approx(own, abs=1e-6)


def test_a_killed_process_ends_the_job_and_the_next_call_goes_on(pair, store, hospital, forks, tmp_path):
    whole, _ = pair
    started = launch(forks, tmp_path, *[words(store, hospital, tmp_path/'run')]*2)
    end = time.monotonic()+300
    while not any(tmp_path.glob('run/fits/*/*/checkpoint/checkpoint.safetensors')) and time.monotonic()<end: time.sleep(.002)
    os.kill(started[1], signal.SIGKILL)
    (code, said), (other, _) = ended(forks, tmp_path, started)
    assert other==-signal.SIGKILL and code==2, said
    assert 'Another process of this job has ended' in said and 'goes on from the last checkpoint' in said
    assert run_state(tmp_path/'run')=='begun'
    again = ended(forks, tmp_path, launch(forks, tmp_path, *[words(store, hospital, tmp_path/'run')]*2))
    assert [c for c, _ in again]==[0, 0] and 'going on with' in again[0][1]
    for name in ('predictions.csv', 'manifest.csv', 'split.csv', 'model/model.safetensors'):
        assert (tmp_path/'run'/name).read_bytes()==(whole/name).read_bytes()


def test_one_process_goes_on_where_two_were_stopped(store, hospital, forks, tmp_path):
    "The plan is that of any number of processes; that it was another number is said."
    own = words(store, hospital, tmp_path/'run')
    started = launch(forks, tmp_path, own, own)
    end = time.monotonic()+300
    while not any(tmp_path.glob('run/fits/*/*/checkpoint/checkpoint.safetensors')) and time.monotonic()<end: time.sleep(.002)
    for p in started: os.kill(p, signal.SIGKILL)
    assert [c for c, _ in ended(forks, tmp_path, started)]==[-signal.SIGKILL]*2
    forks.place(tmp_path, dict(os.environ))
    said = forks.run(*own)
    assert 'going on with' in said and 'processes 2 -> 1' in said and run_state(tmp_path/'run')=='whole'


def test_other_data_on_one_process_is_refused_on_all(store, hospital, forks, tmp_path):
    short = tmp_path/'short.csv'
    pd.read_csv(hospital/'labels.csv').iloc[:-3].to_csv(short, index=False)
    for other, what in ((words(store, hospital, tmp_path/'run', labels=short), 'the labels'),
            (words(store, hospital, tmp_path/'run', '--lr', .5), 'the setting lr')):
        started = launch(forks, tmp_path, words(store, hospital, tmp_path/'run'), other)
        for code, said in ended(forks, tmp_path, started):
            assert code==2 and f'Process 1 of 2 has other data than the first: {what}.' in said, said
        assert not (tmp_path/'run').exists()


def test_an_error_of_one_process_is_that_of_all(store, hospital, forks, tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'thesis.txt').write_text('x')
    started = launch(forks, tmp_path, *[words(store, hospital, tmp_path/'run')]*2)
    first, second = ended(forks, tmp_path, started)
    assert first[0]==second[0]==2 and 'is there already and is no run' in first[1]
    assert 'Process 0 of 2 has stopped' in second[1] and 'is no run' in second[1]
    started = launch(forks, tmp_path, *[words(store, hospital, tmp_path/'new', '--bs', 2)]*2)
    for code, said in ended(forks, tmp_path, started):
        assert code==2 and 'cannot be shared by 2 processes' in said, said


def test_commands_that_are_not_shared_refuse_a_launcher(pair, monkeypatch):
    told = dict(RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='1')
    for k, v in told.items(): monkeypatch.setenv(k, v)
    assert 'evaluate is done by one process, and 2 were started' in refuses('evaluate', pair[0].path)


# Prediction by the workers of a cluster

def told(run, hospital, out, **more):
    return serve.predict(run, hospital/'dicom', out, ('csv', 'json'), show=False, **more)


@pytest.mark.slow
def test_a_cluster_predicts_what_one_process_does(run, hospital, cluster, tmp_path, monkeypatch):
    "To the byte, one row a file, those that cannot be read with their cause; nothing is left over."
    here = told(run, hospital, tmp_path/'here.csv', workers=1)
    there = told(run, hospital, tmp_path/'there.csv', scheduler=cluster[0])
    pd.testing.assert_frame_equal(here, there)
    assert here.path.drop_duplicates().tolist()==image_files(hospital/'dicom') and (here.error!='').any()
    for form in ('csv', 'json'):
        assert (tmp_path/f'here.{form}').read_bytes()==(tmp_path/f'there.{form}').read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix!='.json' or p.stem!='scheduler')==[
        'here.csv', 'here.json', 'there.csv', 'there.json']
    # stopped in the middle it goes on with the parts that are there
    monkeypatch.setattr(serve, 'PART', 16)
    asked, real = [], serve.on_cluster
    def counts(fn, items, *args, **kwargs):
        asked.append(len(items))
        for k, out in enumerate(real(fn, items, *args, **kwargs)):
            if k==2 and len(asked)==1: raise KeyboardInterrupt
            yield out
    monkeypatch.setattr(serve, 'on_cluster', counts)
    with pytest.raises(KeyboardInterrupt): told(run, hospital, tmp_path/'again.csv', scheduler=cluster[0])
    assert len(list((tmp_path/'again.csv.parts').glob('scores-*')))==2
    again = told(run, hospital, tmp_path/'again.csv', scheduler=cluster[0])
    pd.testing.assert_frame_equal(here, again, rtol=1e-5)
    assert asked==[asked[0], asked[0]-2] and not (tmp_path/'again.csv.parts').exists()
    # another model there, a folder of somebody else
    (tmp_path/'mine.csv.parts').mkdir()
    (tmp_path/'mine.csv.parts'/'thesis.txt').write_text('x')
    with pytest.raises(RadiologyError, match='did not write'):
        told(run, hospital, tmp_path/'mine.csv', scheduler=cluster[0])
    (tmp_path/'mine.csv.parts'/'thesis.txt').unlink() # nor is a file of others below the store our own
    (tmp_path/'mine.csv.parts'/'store').mkdir()
    (tmp_path/'mine.csv.parts'/'prediction.json').write_text('{"radiology_ai": "prediction", "model": "another"}')
    (tmp_path/'mine.csv.parts'/'store'/'thesis.txt').write_text('x')
    with pytest.raises(RadiologyError, match='thesis.txt'):
        told(run, hospital, tmp_path/'mine.csv', scheduler=cluster[0])
    assert (tmp_path/'mine.csv.parts'/'store'/'thesis.txt').read_text()=='x'
    work = serve._Work(str(run), None, 'another', str(tmp_path))
    with pytest.raises(StoreError, match='sees another model'): serve._seen_there(work)
    with pytest.raises(StoreError, match='does not see'): serve._seen_there(replace(work, model='/nowhere'))
    with pytest.raises(RadiologyError, match='Give out='): serve.predict(run, hospital/'dicom', scheduler=cluster[0])
