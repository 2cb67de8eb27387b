"""What the system tests share: the command line as a user runs it, and one small simulated hospital, its store and a
run, which are made once for all workers of pytest-xdist. Who changes them works on a copy."""
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from filelock import FileLock

# two workers on two cores: each computes with one thread, its children too
os.environ.setdefault('OMP_NUM_THREADS', '1')
# a shell gives its background jobs an ignored Ctrl-C, which the commands under test would inherit
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

# The files with the longest tests: a worker that begins with them is not still at it when the other has finished.
LONGEST = ['test_tasks.py', 'test_cli.py', 'test_docs.py', 'test_demo.py', 'test_augment.py', 'test_house.py',
    'test_metadata.py',
    'test_store.py', 'test_metrics.py', 'test_semi.py']
ROOT = Path(__file__).parents[1]
COMMAND = Path(sys.executable).parent/'radiology_ai'


def run_cli(*words, check: bool=True, **env) -> subprocess.CompletedProcess:
    "Run `radiology_ai` with `words` in a process of its own."
    done = subprocess.run([COMMAND, *map(str, words)], capture_output=True, text=True,
        stdin=subprocess.DEVNULL, env={**os.environ, **env})
    if check: assert done.returncode==0, done.stderr
    return done


def fails(*words) -> str:
    "The one line with which a command refuses: exit code 2, no traceback."
    done = run_cli(*words, check=False)
    return one_line(done.returncode, done.stderr, done.stdout)


def refuses(*words) -> str:
    """The same of the function behind the command, in this process: for the further ways in which a command is wrong,
    without the seconds in which a process imports everything."""
    from radiology_ai.cli import main
    out, err = io.StringIO(), io.StringIO()
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(),
            patch('warnings.formatwarning', warnings.formatwarning), pytest.raises(SystemExit) as end):
        main(list(map(str, words)))
    return one_line(end.value.code, err.getvalue(), out.getvalue())


def one_line(code: int, err: str, out: str) -> str:
    assert code==2, f'exit code {code}: {out}{err}'
    lines = err.strip().splitlines()
    assert len(lines)==1, err
    return lines[0]


def pace() -> float:
    """How many times as long as where the limits in seconds were chosen a processor takes at this moment, at least 1: such
    a limit is multiplied by it. Twelve milliseconds of dictionaries and a digest, the best of five."""
    found = []
    for _ in range(5):
        start, table = time.process_time(), {}
        for k in range(60_000): table[str(k%5000)] = k
        hashlib.sha256(bytes(2**22)).digest()
        found.append(time.process_time()-start)
    return max(1., min(found)/.012)


class Tell:
    "Says of each failure at once what it is: a session that something ends from outside has no summary."
    def __init__(self, terminal): self.terminal = terminal

    def pytest_runtest_logreport(self, report):
        if not report.failed: return
        last = (report.longreprtext.strip().splitlines() or [''])[-1]
        self.terminal.ensure_newline()
        self.terminal.write_line(f'FAILED in {report.when} after {report.duration:.0f} s: {report.nodeid}: {last}')


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    terminal = config.pluginmanager.get_plugin('terminalreporter')
    if terminal and not hasattr(config, 'workerinput'): config.pluginmanager.register(Tell(terminal))


@pytest.fixture(scope='session')
def real_data() -> Path:
    "The folder of real radiographs."
    folder = os.environ.get('RADIOLOGY_AI_REAL_DATA')
    if not folder:
        pytest.skip('RADIOLOGY_AI_REAL_DATA is not set: the real radiographs are not in the repository')
    return Path(folder)


def pytest_collection_modifyitems(items):
    "The longest files first."
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope='session')
def made_once(tmp_path_factory) -> Callable:
    """`made_once(name, make)`: the folder `name` of this session, which the first worker that asks for it
    makes with `make(folder)`."""
    root = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: root = root.parent # the workers' folders lie beside one another

    def made(name: str, make: Callable) -> Path:
        with FileLock(root/f'{name}.lock'):
            if not (root/f'{name}.made').exists():
                make(root/name)
                (root/f'{name}.made').touch()
        return root/name

    return made


@pytest.fixture(scope='session')
def hospital(made_once) -> Path:
    "A small hospital folder with its labels.csv beside it."
    from radiology_ai.phantom.hospital import simulate_hospital
    def make(root):
        truth = simulate_hospital(root/'dicom', n=60, seed=5, size=256)
        knees = truth[(truth.body_part=='KNEE') & (truth.broken=='')]
        knees[['image_id','path','fractured','schatzker']].to_csv(root/'labels.csv', index=False)
    return made_once('hospital', make)


@pytest.fixture(scope='session')
def store(made_once, hospital) -> Path:
    "The image store of that hospital."
    return made_once('store', lambda out: run_cli('preprocess', hospital/'dicom', '--recipe', 'knee',
        '--size', 64,
        '--out', out))


@pytest.fixture(scope='session')
def run(made_once, hospital, store) -> Path:
    "A run that was trained on that store for one epoch."
    return made_once('run', lambda out: run_cli('train', 'knee', '--data', store, '--labels',
        hospital/'labels.csv',
        '--out', out, '--arch', 'resnet10t', '--epochs', 1, '--bs', 16, '--no-pretrained'))


@pytest.fixture
def cluster(tmp_path, request):
    """The address of a Dask scheduler with two workers, each a process of its own, and those processes, the
    scheduler last."""
    if importlib.util.find_spec('distributed') is None:
        pytest.skip('distributed is not installed: pip install radiology_ai[cluster]')
    nanny = getattr(request, 'param', '--no-nanny')
    env = {**os.environ, 'PYTHONPATH': f"{ROOT}{os.pathsep}{ROOT/'tests'}", 'OMP_NUM_THREADS': '1',
        'DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES': '3' if nanny=='--no-nanny' else '0'}
    file, processes = tmp_path/'scheduler.json', []
    start = lambda name, *words: processes.append(subprocess.Popen([sys.executable, '-m',
        f'distributed.cli.dask_{name}', *words, '--scheduler-file', str(file), '--no-dashboard'],
        env=env, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True))
    try:
        start('scheduler', '--host', '127.0.0.1', '--port', '0')
        end = time.monotonic()+120
        while not file.exists():
            assert processes[0].poll() is None and time.monotonic()<end, 'the scheduler does not start'
            time.sleep(.05)
        for _ in range(2): start('worker', '--nthreads', '1', nanny)
        yield json.loads(file.read_text())['address'], [*processes[1:], processes[0]]
    finally:
        for p in processes:
            try: os.killpg(p.pid, signal.SIGKILL) # a nanny and its worker
            except ProcessLookupError: pass
            p.wait()
