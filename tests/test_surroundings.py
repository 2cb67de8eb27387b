"""Closed streams, a reader that leaves, a locale of ASCII, few open files, a full disk, signals: a command works, or says
why in one line."""
import errno
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import COMMAND
from test_store import small_disk

from radiology_ai import parallel
from radiology_ai.core import DataError, StoreError, atomic_path, disk_remedy, progress, save_picture
from radiology_ai.dicom.deidentify import deidentify
from radiology_ai.dicom.index import index_dicoms
from radiology_ai.names import speaking
from radiology_ai.phantom.hospital import write_dicom
from radiology_ai.preprocess import scale
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.serve.predict import stored

SHELL = shutil.which('bash')
pytestmark = pytest.mark.skipif(SHELL is None or os.name!='posix', reason='the cases are written for a shell')


@pytest.fixture(scope='module')
def films(tmp_path_factory):
    "Twelve films, one of them of a patient and with a name beyond ASCII."
    folder = tmp_path_factory.mktemp('films')/'säle'
    pixels = np.random.default_rng(0).random((64, 64), np.float32)
    folder.mkdir()
    for k in range(12):
        write_dicom(folder/f'{"Jörg" if k==3 else k}.dcm', pixels, header=dict(PatientID=f'MRN-{k:04d}',
            SpecificCharacterSet='ISO_IR 192', PatientName='Müller^Ünal', SOPInstanceUID=f'1.2.5.{k}'))
    return folder


def shell(line: str, **env) -> subprocess.CompletedProcess:
    "A line of the shell in which `radiology_ai` is this command."
    line = f'set -o pipefail; radiology_ai() {{ "{sys.executable}" "{COMMAND}" "$@"; }}; {line}'
    return subprocess.run([SHELL, '-c', line], capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, **env}, errors='replace', timeout=120)


@pytest.mark.parametrize('closed', ['2>&-', '<&- >&- 2>&-'])
def test_closed_streams(films, tmp_path, closed):
    done = shell(f'radiology_ai preprocess {films} --recipe plain --size 32 --workers 2 --out {tmp_path}/s {closed}')
    assert done.returncode==0, done.stderr
    done = shell(f'radiology_ai index {films} --workers 1 --out {tmp_path}/i.parquet {closed}')
    assert done.returncode==0 and len(pd.read_parquet(tmp_path/'i.parquet'))==12


def test_without_standard_error_there_is_no_bar(monkeypatch):
    for name in ('stdout', 'stderr'): monkeypatch.setattr(sys, name, None)
    assert list(progress([1, 2], 'count'))==[1, 2]


def test_the_command_itself_without_standard_error(films, tmp_path):
    done = subprocess.run([sys.executable, '-c', f"""
import sys
sys.stderr = sys.stdout = None
from radiology_ai.cli import main
main(['deidentify', {str(films)!r}, '--workers', '1', '--out', {str(tmp_path/'out')!r}])"""])
    assert done.returncode==0 and (tmp_path/'out/account.csv').exists()


def test_a_reader_that_leaves_is_not_missed(films, tmp_path):
    done = shell(f'(radiology_ai index {films} --workers 1 --out {tmp_path}/i.parquet; echo $? > {tmp_path}/code) | true')
    assert done.stderr=='' and (tmp_path/'code').read_text()=='0\n' and (tmp_path/'i.parquet').exists()


def test_names_of_any_letters_in_a_locale_of_ascii(films, tmp_path):
    done = shell(f'radiology_ai index {films} --workers 2 --out {tmp_path}/i.parquet && radiology_ai deidentify {films} '
        f'--workers 1 --out {tmp_path}/out', LC_ALL='C', PYTHONUTF8='0', PYTHONIOENCODING='ascii')
    assert done.returncode==0 and done.stderr=='' and '12 of 12 files' in done.stdout
    index = pd.read_parquet(tmp_path/'i.parquet')
    assert (index.error=='').all() and any('Jörg' in p for p in index.path)


def test_a_standard_output_that_is_full(films, tmp_path):
    done = shell(f'radiology_ai index {films} --workers 1 --out {tmp_path}/i.parquet > /dev/full')
    assert done.returncode==2 and (tmp_path/'i.parquet').exists()
    assert done.stderr=='radiology_ai: standard output cannot be written (No space left on device)\n'


def test_no_more_processes_are_allowed(films, tmp_path, monkeypatch):
    "As many workers as there may be work; where there may be none, this process does."
    real, begun = parallel._Worker, []
    def worker(*args):
        if len(begun)==most: raise BlockingIOError(errno.EAGAIN, 'Resource temporarily unavailable')
        begun.append(real(*args))
        return begun[-1]
    monkeypatch.setattr(parallel, '_Worker', worker)
    for most in (1, 0):
        begun.clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            assert list(parallel.run_parallel(abs, range(-9, 0), 2, show=False))==[*range(9, 0, -1)]
        assert len(begun)==most and any('working in this process' in str(w.message) for w in told)==(most==0)


@pytest.mark.parametrize('error', [MemoryError(), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    RuntimeError("can't start new thread"),
    Exception('Unknown error: Failed to launch worker thread: Resource temporarily unavailable')])
def test_want_of_memory_or_threads_is_told_as_that(error):
    from radiology_ai.cli import _one_line
    assert 'not enough memory, or the system allows no more threads' in _one_line(error)


def test_a_folder_that_may_not_be_written_is_told_with_the_file(tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), '.i-123-abc.parquet')
    monkeypatch.setattr('radiology_ai.core.tempfile.mkstemp', refuse)
    with pytest.raises(PermissionError) as e, atomic_path(tmp_path/'i.parquet'): pass
    assert e.value.filename==str(tmp_path/'i.parquet')


def test_the_command_as_a_module(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'radiology_ai.cli', '--version'], capture_output=True,
        text=True)
    assert done.returncode==0 and done.stdout.startswith('radiology_ai')


def test_few_open_files(films, tmp_path):
    done = shell(f'ulimit -n 64; radiology_ai preprocess {films} --recipe plain --size 32 --workers 2 --shard-size 2 '
        f'--out {tmp_path}/s')
    assert done.returncode==0, done.stderr


@pytest.mark.parametrize('number', [errno.EMFILE, errno.EACCES, errno.EIO, errno.EROFS, errno.ENOSPC])
def test_space_is_missing_only_where_it_is(films, tmp_path, monkeypatch, number):
    def refuse(fd): raise OSError(number, os.strerror(number))
    assert ('space' in disk_remedy(OSError(number, '')))==(number==errno.ENOSPC)
    monkeypatch.setattr(os, 'fsync', refuse)
    with pytest.raises(StoreError, match=os.strerror(number)) as e:
        preprocess_folder(films, tmp_path/'s', 'plain', workers=1, show=False)
    assert ('Free some space' in str(e.value))==(number==errno.ENOSPC)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_full_disk_ends_deidentify_which_goes_on_elsewhere(films, tmp_path, workers):
    key = b'a secret key for tests'
    whole = deidentify(films, tmp_path/'whole', key=key, workers=1, show=False)
    with small_disk(tmp_path/'disk', '64k') as disk:
        with pytest.raises(DataError,
                match='No space left on device.*Free some space; with a key the same call'):
            deidentify(films, disk/'out', key=key, workers=workers, show=False)
        with pytest.raises(OSError, match='No space left'):
            (disk/'fill').write_bytes(bytes(2**20))
        with pytest.raises(OSError, match='No space left') as e:
            save_picture(disk/'p.png', np.eye(99, dtype=np.uint8))
        assert e.value.filename==str(disk/'p.png') and not (disk/'p.png').exists()
        shutil.copytree(disk/'out', tmp_path/'out')
    account = deidentify(films, tmp_path/'out', key=key, workers=1, show=False)
    pd.testing.assert_frame_equal(account, whole)
    for p in account.path: assert (tmp_path/'out'/p).read_bytes()==(tmp_path/'whole'/p).read_bytes()


def test_workers_have_ended_when_an_error_is_raised(films, tmp_path, monkeypatch):
    with pytest.raises(ValueError) as kept:
        list(parallel.run_parallel(math.isqrt, [4]*9 + [-1] + [4]*99, 2, show=False))
    assert not multiprocessing.active_children()
    def refuse(*args): raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr('radiology_ai.dicom.deidentify.os.replace', refuse)
    with pytest.raises(DataError) as mine:
        deidentify(films, tmp_path/'out', key=b'a secret key for tests', workers=2, show=False)
    assert not multiprocessing.active_children()
    assert kept.tb and mine.tb # what was raised is still there, and with it all that its functions hold


class Rust(Exception): "How a library of another language tells it."


@pytest.mark.parametrize('told', [Rust('I/O error: No space left on device (os error 28)'),
    OSError('[Errno 28] Error writing')])
def test_what_the_disk_refuses_is_told_with_the_file(tmp_path, told):
    with pytest.raises(OSError) as e, atomic_path(tmp_path/'weights.safetensors'): raise told
    assert (e.value.errno, e.value.filename)==(errno.ENOSPC, str(tmp_path/'weights.safetensors'))
    with pytest.raises(FileNotFoundError, match='nowhere'), atomic_path(tmp_path/'x'):
        open(tmp_path/'nowhere')
    with pytest.raises(Rust, match='^damaged$'), atomic_path(tmp_path/'x'): raise Rust('damaged')
    assert list(tmp_path.iterdir())==[]


# Signals

def group(pid: int) -> list:
    "The living processes of a session."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try: told = (p/'stat').read_text().rpartition(')')[2].split()
        except OSError: continue
        if int(told[3])==pid and told[0]!='Z': found.append(int(p.name))
    return found


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='processes are looked up in /proc')
@pytest.mark.parametrize('number, everybody', [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_ends_with_one_line(films, tmp_path, number, everybody):
    words = [COMMAND, 'preprocess', films, '--recipe', 'plain', '--size', '32', '--workers', '2',
        '--shard-size', '1',
        '--out', tmp_path/'s']
    many = tmp_path/'many'
    many.mkdir()
    for k in range(400): (many/f'{k}.dcm').symlink_to(films/'1.dcm')
    words[2] = many
    (tmp_path/'tmp').mkdir()
    process = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True, start_new_session=True, env=os.environ | dict(TMPDIR=str(tmp_path/'tmp')))
    end = time.monotonic() + 60
    while process.poll() is None and not list(tmp_path.glob('s/shards/*.npy')) and time.monotonic()<end:
        time.sleep(.005)
    (os.killpg if everybody else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode==128 + number, err
    assert err=='radiology_ai: interrupted. What is done is kept: the same command goes on where it stopped\n'
    end = time.monotonic() + 10
    while group(process.pid) and time.monotonic()<end: time.sleep(.02)
    assert group(process.pid)==[] and list((tmp_path/'tmp').iterdir())==[]


@pytest.mark.parametrize('module', ['typer', 'pandas']) # before and after the command line is there
def test_a_signal_while_modules_are_imported(module):
    done = subprocess.run([sys.executable, '-c', f"""
import os, signal, sys
class Hit:
    def find_spec(self, name, path=None, target=None):
        if name=='{module}': os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Hit())
from radiology_ai.command import main
main()""", 'index', 'nowhere', '--out', 'nothing'], capture_output=True, text=True)
    assert done.returncode==130 and done.stderr=='radiology_ai: interrupted. The same command begins anew\n'


def test_what_packages_would_tell_their_makers_is_switched_off(tmp_path, monkeypatch):
    "onnxruntime opens an account of its use, to be sent, as soon as it is imported."
    for name in ('ORT_DISABLE_TELEMETRY', 'MLFLOW_DISABLE_TELEMETRY'): monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, '-c', """
import os
from radiology_ai.core import MissingPackageError, optional
for name in ('onnxruntime', 'mlflow'):
    try: optional(name, 'extra')
    except MissingPackageError: pass
print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['MLFLOW_DISABLE_TELEMETRY'])"""], capture_output=True,
text=True,
        env={**os.environ, 'HOME': str(tmp_path), 'TMPDIR': str(tmp_path)})
    assert done.stdout.split()==['1', '1'], done.stderr
    assert not any(name=='.ses' or 'onnxruntime' in name for _, folders, files in os.walk(tmp_path)
        for name in folders + files)


def test_a_broken_link_in_a_folder_is_one_row(films, tmp_path):
    folder = tmp_path/'films'
    folder.mkdir()
    shutil.copy(films/'1.dcm', folder)
    (folder/'gone.dcm').symlink_to('nowhere')
    (folder/'round.dcm').symlink_to('round.dcm')
    with stored('plain', folder, workers=1, show=False) as store: # what `predict` reads
        assert len(store)==1 and sorted(Path(p).name for p in store.errors.path)==['gone.dcm', 'round.dcm']


def test_the_note_of_the_file_at_work_is_its_owners_alone(films, tmp_path, monkeypatch):
    "It names a file, and so perhaps a patient; one that an earlier version left is closed too."
    note, real, seen = tmp_path/'s/shards/now.txt', scale.prepare, []
    note.parent.mkdir(parents=True)
    note.write_text('')
    def looked_at(*args):
        seen.append((note.stat().st_mode & 0o777, note.read_text()))
        return real(*args)
    monkeypatch.setattr(scale, 'prepare', looked_at)
    preprocess_folder(films, tmp_path/'s', 'plain', workers=1, show=False)
    assert {mode for mode, _ in seen}=={0o600} and str(films/'1.dcm') in {text for _, text in seen}
    assert not note.exists()


def test_a_folder_that_cannot_be_opened_is_not_named_in_a_log(films, tmp_path, monkeypatch, capsys):
    (tmp_path/'DOE^JANE').mkdir()
    shutil.copy(films/'1.dcm', tmp_path)
    real = os.scandir
    def refused(folder):
        if str(folder).endswith('DOE^JANE'): raise PermissionError
        return real(folder)
    monkeypatch.setattr(os, 'scandir', refused)
    with pytest.warns(UserWarning) as told, speaking(('index', str(tmp_path))): index_dicoms(tmp_path, workers=1)
    assert [str(w.message) for w in told]==[
        'A folder cannot be opened (PermissionError); its files are not in the table']
