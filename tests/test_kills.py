"""What a killed process leaves is gone on with or removed by the next one, whoever that is; what a living process uses, and
what only looks like ours, is never touched."""
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest

from radiology_ai import core
from radiology_ai.core import DataError, RadiologyError, alone, atomic_path, is_temporary, temporary
from radiology_ai.dicom.child import _CHILD
from radiology_ai.dicom.deidentify import deidentify
from radiology_ai.dicom.pseudonyms import read_key
from radiology_ai.phantom.hospital import write_dicom
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.preprocess.store import ShardWriter
from radiology_ai.tasks.run import alone_in, run_state

KEY = b'a secret key for tests'


def python(code: str, *words, **env) -> subprocess.Popen:
    "A process of its own that runs `code`; `words` are its `sys.argv[1:]`."
    return subprocess.Popen([sys.executable, '-c', code, *map(str, words)], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env={**os.environ, **{k: str(v) for k,v in env.items()}})


def contents(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def alive(pid: int) -> bool:
    "Whether a process runs; one that has ended and was not waited for does not."
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]!='Z'
    except OSError: return False


# Temporary files and folders

HALF = """
import os, signal, sys
from radiology_ai.core import atomic_path, temporary
with temporary(folder=True) as pictures, atomic_path(sys.argv[1]) as half:
    (pictures/'Doe.npy').write_bytes(b'a picture')
    half.write_text('MRN-0042')
    print(os.getpid(), flush=True)
    if len(sys.argv)>2: sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def tmp(tmp_path, monkeypatch):
    "The folder for temporary files, which is swept whenever somebody comes by."
    (tmp_path/'tmp').mkdir()
    monkeypatch.setattr(core.tempfile, 'tempdir', str(tmp_path/'tmp'))
    monkeypatch.setattr(core, '_swept', {})
    return tmp_path/'tmp'


def names(folder): return sorted(p.name for p in Path(folder).iterdir())


def test_the_next_call_of_anybody_removes_what_a_killed_one_left(tmp, tmp_path):
    out = tmp_path/'out'
    assert python(HALF, out/'table.csv', TMPDIR=tmp).wait()==-signal.SIGKILL
    assert len(names(tmp))==1 and len(names(out))==1 and all(map(is_temporary, names(tmp) + names(out)))
    with atomic_path(out/'other.html') as p: p.write_text('whole')
    assert names(tmp)==[] and names(out)==['other.html']


def test_a_living_process_keeps_its_own(tmp, tmp_path):
    out, go = tmp_path/'out', os.pipe()
    process = subprocess.Popen([sys.executable, '-c', HALF, out/'table.csv', 'wait'], stdin=go[0],
        stdout=subprocess.PIPE, env=os.environ | dict(TMPDIR=str(tmp)))
    process.stdout.readline()
    with atomic_path(out/'other.html') as p: p.write_text('whole')
    assert len(names(tmp))==1 and len(names(out))==2
    os.close(go[1]), os.close(go[0])
    process.stdout.close()
    process.kill(), process.wait()


LIKE = ['.table-mine.csv', '.table-abcdefgh.csv', 'radiology_ai-notes', '.table-12s34-abcdefgh.csv',
    '.recipe-mine', '.model-old']


def test_what_only_looks_like_ours_stays(tmp, tmp_path):
    for folder in (tmp, tmp_path/'out'):
        folder.mkdir(exist_ok=True)
        for name in LIKE: (folder/name).write_text('mine')
    target = tmp_path/'thesis'
    target.write_text('mine')
    with temporary(tmp_path/'out/x.csv') as own: gone = re.sub(r'-\d+s', '-4194305s', own.name, count=1)
    (tmp_path/'out'/gone).symlink_to(target)
    core._swept.clear()
    with atomic_path(tmp_path/'out/x.csv') as p: p.write_text('whole')
    assert names(tmp)==sorted(LIKE) and names(tmp_path/'out')==sorted([*LIKE, gone,
        'x.csv']) and target.exists()


def test_of_another_container_or_machine_a_lock_tells(tmp, tmp_path):
    out = tmp_path/'out'
    out.mkdir()
    with temporary(out/'x.csv') as own: name = own.name
    container = re.sub('n[0-9a-f]{8}-', 'n00000000-', name)
    machine = re.sub('b[0-9a-f]{8}n', 'b00000000n', name)
    files = [out/n for n in (container, machine, container.replace('.x', '.held'))]
    def sweep(hours):
        for f in files:
            f.touch()
            os.utime(f, (time.time() - 3600*hours,)*2)
        core._swept.clear()
        core.sweep(out)
        return [f.exists() for f in files]
    files[2].touch()
    with files[2].open('rb+') as held:
        import fcntl
        fcntl.flock(held, fcntl.LOCK_EX)
        assert sweep(0)==[True, True, True] and sweep(1)==[False, True, True] and sweep(25)==[False, False,
            True]


def test_a_bundle_that_was_moved_aside_comes_back(tmp, tmp_path):
    with temporary(tmp_path/'model', folder=True) as own: gone = re.sub(r'-\d+s', '-4194305s', own.name, count=1)
    (tmp_path/gone/'old').mkdir(parents=True)
    (tmp_path/gone/'old/bundle.json').write_text('{}')
    (tmp_path/gone/'.lock').write_text('model')
    core._swept.clear()
    core.sweep(tmp_path)
    assert names(tmp_path/'model')==['bundle.json'] and gone not in names(tmp_path)


def test_a_lock_is_of_one(tmp, tmp_path):
    (tmp_path/'out').mkdir()
    (tmp_path/'out/.lock').write_text('of somebody who was killed')
    with alone(tmp_path/'out'), pytest.raises(RadiologyError, match='in use by another process'):
        with alone(tmp_path/'out'): pass
    assert names(tmp_path/'out')==[]


def test_a_lock_that_others_remove_again_and_again_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(core.os.path, 'samestat', lambda a, b: False)
    with pytest.raises(RadiologyError, match='removed a hundred times'):
        with alone(tmp_path/'out'): pass
    with pytest.raises(RadiologyError, match='removed a hundred times'):
        with ShardWriter(tmp_path/'store', 'plain').alone(): pass


def test_runs_and_stores_take_away_only_what_is_exactly_ours(tmp, tmp_path):
    run, store = tmp_path/'run', tmp_path/'store'
    run.mkdir()
    (run/'plan.json').write_text(json.dumps({'radiology_ai': 'run', 'format': 1}))
    for name in ('.model-old', '.report-backup.html', '.plan-a1b2c3d4.json'): (run/name).write_text('x')
    with alone_in(run): pass
    assert names(run)==['.model-old', '.report-backup.html', 'plan.json']
    (run/'plan.json').unlink()
    assert run_state(run)=='foreign'
    (store/'shards').mkdir(parents=True)
    ShardWriter(store, 'plain').begin(1)
    for name in ('.index-mine.parquet', 'shards/.00001-mine.npy', '.index-a1b2c3d4.parquet',
            'shards/.00001-a1b2c3d4.npy',
            'shards/.00001.errors-a1b2c3d4.parquet'):
        (store/name).write_text('x')
    with ShardWriter(store, 'plain').alone(): pass
    assert {n for n in names(store) if n!='.lock'}=={'.index-mine.parquet', 'recipe.json', 'shards'}
    assert names(store/'shards')==['.00001-mine.npy']


WORK = """
import os, time
from radiology_ai.parallel import run_parallel
def main():
    for _ in run_parallel(time.sleep, [0]*4 + [60]*8, workers=2, show=False): print(os.getpid(), flush=True)
main()
"""


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='processes are looked up in /proc')
def test_workers_end_with_the_process_that_was_killed(tmp, monkeypatch):
    tmp = Path(tempfile.mkdtemp(prefix='k', dir='/tmp')) # the address of a socket is short
    monkeypatch.setattr(core.tempfile, 'tempdir', str(tmp))
    process = python(WORK, TMPDIR=tmp)
    for _ in range(4): process.stdout.readline()
    parents = {int(p.name): int((p/'stat').read_text().rpartition(')')[2].split()[1])
        for p in Path('/proc').glob('[0-9]*') if (p/'stat').exists()}
    ours = {p for p,up in parents.items() if up==process.pid}
    ours |= {p for p,up in parents.items() if up in ours}
    assert len(ours)>=3
    process.kill(), process.wait()
    process.stdout.close()
    end = time.monotonic() + 10
    while any(map(alive, ours)) and time.monotonic()<end: time.sleep(.02)
    assert not any(map(alive, ours)) and all(map(is_temporary, names(tmp)))
    core._swept.clear()
    with temporary(): assert len(names(tmp))==1
    tmp.rmdir()


SLOW_MODULE = """
import os, sys, time
if 'multiprocessing' in ' '.join(sys.orig_argv):
    with open(os.environ['BEGUN'], 'w') as f: f.write(str(os.getpid()))
    time.sleep(60)
def identity(x): return x
"""
USERS = dict(
    forkserver="from radiology_ai.parallel import run_parallel; list(run_parallel(slow_module.identity, [0]*9, workers=2, show=False))",
    process="from radiology_ai.parallel import start_process; start_process(slow_module.identity, 0).join()")


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='processes are looked up in /proc')
@pytest.mark.parametrize('user', USERS)
def test_a_process_that_still_imports_ends_with_the_one_that_was_killed(tmp, tmp_path, user):
    (tmp_path/'slow_module.py').write_text(SLOW_MODULE)
    begun = tmp_path/'begun'
    process = python('import slow_module; ' + USERS[user], TMPDIR=tmp, BEGUN=begun,
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(core.__file__).parents[1])]))
    end = time.monotonic() + 60
    while not (begun.exists() and begun.read_text()) and time.monotonic()<end: time.sleep(.02)
    importing = int(begun.read_text())
    assert alive(importing)
    process.kill(), process.wait()
    process.stdout.close()
    end = time.monotonic() + 20
    while alive(importing) and time.monotonic()<end: time.sleep(.02)
    assert not alive(importing)


@pytest.mark.skipif(not hasattr(select, 'poll'), reason='this system does not tell the end of a pipe')
def test_a_decoder_that_still_imports_ends_with_the_one_that_was_killed(tmp_path):
    (tmp_path/'gdcm.py').write_text('import time; time.sleep(60)')
    process = subprocess.Popen([sys.executable, '-P', '-c', _CHILD], stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    time.sleep(.1)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=20)==1


# De-identification

@pytest.fixture(scope='module')
def films(tmp_path_factory):
    "Sixteen films of eight patients; two have the same instance UID, one is broken."
    folder, pixels = tmp_path_factory.mktemp('films'), simulate_knee(3, side='R', size=96)
    from radiology_ai.core import rng
    from radiology_ai.phantom.xray import expose
    pixels = expose(pixels, rng(3, 'film')).pixels
    for k in range(16):
        n = 4 if k==15 else k
        write_dicom(folder/f'{k:02d}.dcm', pixels,
            header=dict(PatientID=f'MRN-{n//2:04d}', PatientName='DOE^JANE',
            StudyInstanceUID='1.2.3', SeriesInstanceUID='1.2.4', SOPInstanceUID=f'1.2.5.{n}'))
    (folder/'07.dcm').write_bytes(b'broken')
    return folder


@pytest.fixture(scope='module')
def whole(films, tmp_path_factory):
    "What an undisturbed run makes of them, with its linking table."
    folder = tmp_path_factory.mktemp('whole')
    account = deidentify(films, folder/'out', key=KEY, link=folder/'link.csv', workers=1, show=False)
    return contents(folder), account


SLOW = """
import sys, time
from radiology_ai.dicom import deidentify as room
real = room._one
def slow(job):
    time.sleep(.03)
    return real(job)
room._one = slow
key = eval(sys.argv[3])
room.deidentify(sys.argv[1], sys.argv[2] + '/out', key=key, link=key and sys.argv[2] + '/link.csv', workers=1, show=False)
"""


def killed(films, folder, lines: int, key=KEY):
    "A call that is killed when its journal has so many lines."
    process, journal = python(SLOW, films, folder, repr(key)), folder/'out/journal.jsonl'
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic()<end:
        if journal.exists() and journal.read_bytes().count(b'\n')>=lines: break
        time.sleep(.002)
    process.kill()
    assert process.wait()==-signal.SIGKILL
    process.stdout.close()


def test_deidentify_killed_and_called_again_ends_with_the_same_bytes(films, whole, tmp_path):
    for lines in (1, 9): killed(films, tmp_path, lines)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'out').rglob('2.25.*.dcm')}
    assert len(before)>=8 and not (tmp_path/'out/account.csv').exists()
    account = deidentify(films, tmp_path/'out', key=KEY, link=tmp_path/'link.csv', workers=2, show=False)
    pd.testing.assert_frame_equal(account, whole[1])
    assert contents(tmp_path)==whole[0] and (tmp_path/'link.csv').stat().st_mode & 0o777==0o600
    after = {p: p.stat().st_mtime_ns for p in before}
    assert sum(after[p]==t for p,t in before.items())>=len(before) - 1 # only the one at hand was done twice
    again = deidentify(films, tmp_path/'out', key=KEY, link=tmp_path/'link.csv', show=False)
    pd.testing.assert_frame_equal(again, account)
    assert contents(tmp_path)==whole[0]
    told = (tmp_path/'out/deidentify.json').read_text()
    assert 'MRN' not in told and str(films) not in told


@pytest.mark.parametrize('left', ['half a line', 'no account', 'account', 'no plan', 'a copy is gone',
    'parts'])
def test_every_moment_is_gone_on_from(films, whole, tmp_path, left):
    for name,data in whole[0].items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes(data)
    out, account = tmp_path/'out', whole[1]
    actions = [json.loads(line)['actions'] for line in (out/'actions.jsonl').read_text().splitlines()]
    lines = [json.dumps([row, a]) + '\n' for row,a in zip(account.to_dict('records'), actions)]
    if left!='account': (out/'account.csv').unlink()
    if left in ('half a line', 'a copy is gone', 'parts'): (tmp_path/'link.csv').unlink()
    if left=='half a line': lines = [*lines[:6], lines[6][:40]]
    if left=='a copy is gone': (out/account.path[4]).unlink()
    if left=='parts':
        (out/'parts').mkdir()
        (out/'parts/9.dcm').write_bytes(b'half')
        lines = lines[:9]
    (out/'journal.jsonl').write_text(''.join(lines))
    if left=='no plan':
        shutil.rmtree(out)
        (tmp_path/'link.csv').unlink()
        out.mkdir()
        (out/'.lock').touch()
    deidentify(films, out, key=KEY, link=tmp_path/'link.csv', workers=1, show=False)
    assert contents(tmp_path)==whole[0]


def test_of_two_files_with_one_uid_the_first_is_kept_by_any_number_of_workers(films, whole, tmp_path):
    account = deidentify(films, tmp_path/'out', key=KEY, workers=2, show=False)
    assert account.status.tolist()==whole[1].status.tolist()
    assert account.status.value_counts().to_dict()=={'ok': 14, 'error': 1, 'held': 1}
    assert 'same SOP instance UID' in account.cause[list(account.status).index('held')]


def test_without_a_key_it_begins_anew_over_its_own_only(films, tmp_path):
    out = tmp_path/'out'
    killed(films, tmp_path, 3, None)
    before = {p.name for p in out.glob('P*')}
    with pytest.raises(DataError, match='it was begun without a key'):
        deidentify(films, out, key=KEY, show=False)
    (out/'thesis.txt').write_text('mine')
    with pytest.raises(RadiologyError, match='holds thesis.txt, which this library did not write'):
        deidentify(films, out, show=False)
    assert before=={p.name for p in out.glob('P*')}
    (out/'thesis.txt').unlink()
    with pytest.warns(UserWarning, match='begun without a key.*begun anew'):
        account = deidentify(films, out, workers=1, show=False)
    assert len(account)==16 and not before & {p.name
        for p in out.glob('P*')} and not (out/'journal.jsonl').exists()
    with pytest.raises(DataError, match='not an empty folder'): deidentify(films, out, show=False)


def test_another_call_is_refused_by_name(films, tmp_path):
    killed(films, tmp_path, 3)
    (tmp_path/'link.csv').unlink(missing_ok=True)
    before = contents(tmp_path)
    for given,why in ((dict(key=b'another key of tests'), 'the key or the files are others'),
            (dict(), 'begun with a key'),
            (dict(key=KEY, retain='uids'), 'retain was'), (dict(key=KEY, burned_in='hold'), 'burned_in was')):
        with pytest.raises(DataError, match=why): deidentify(films, tmp_path/'out', **given, show=False)
    (tmp_path/'link.csv').write_text('mine')
    with pytest.raises(DataError, match='linking table .* exists'):
        deidentify(films, tmp_path/'out', key=KEY, link=tmp_path/'link.csv', show=False)
    (tmp_path/'link.csv').unlink()
    after = contents(tmp_path)
    assert {k: v for k,v in before.items() if k!='out/.lock'}==after
    with alone(tmp_path/'out'), pytest.raises(RadiologyError, match='in use'):
        deidentify(films, tmp_path/'out', key=KEY, show=False)


def test_a_key_is_drawn_as_a_whole_and_once(tmp_path, monkeypatch):
    key = read_key(tmp_path/'new.key')
    assert read_key(tmp_path/'new.key')==key and names(tmp_path)==['new.key']
    def refused(*args): raise OSError('no links here')
    monkeypatch.setattr(os, 'link', refused)
    assert len(read_key(tmp_path/'other.key'))==32 and (tmp_path/'other.key').stat().st_mode & 0o777==0o600


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes are not forked here')
def test_a_fork_that_ends_leaves_temporary_folders_to_its_parent():
    done = subprocess.run([sys.executable, '-c', """
import multiprocessing
from contextlib import ExitStack
from multiprocessing import util
from radiology_ai.core import temporary
kept = ExitStack()
folder = kept.enter_context(temporary(folder=True))
util.Finalize(None, print, (kept,), exitpriority=-200) # a fork forgets what its parent has to do at the end
del kept
child = multiprocessing.get_context('fork').Process(target=int)
child.start()
child.join()
assert folder.is_dir()"""], capture_output=True, text=True, timeout=120)
    assert done.returncode==0, done.stderr
