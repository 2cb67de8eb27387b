"""What the system tests share: the command line as a user runs it, and one small simulated hospital."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert done.returncode==2, f'exit code {done.returncode}: {done.stdout}{done.stderr}'
    lines = done.stderr.strip().splitlines()
    assert len(lines)==1, done.stderr
    return lines[0]


@pytest.fixture(scope='session')
def real_data() -> Path:
    "The folder of real radiographs."
    folder = os.environ.get('RADIOLOGY_AI_REAL_DATA')
    if not folder:
        pytest.skip('RADIOLOGY_AI_REAL_DATA is not set: the real radiographs are not in the repository')
    return Path(folder)


@pytest.fixture(scope='session')
def hospital(tmp_path_factory) -> Path:
    "A small hospital folder with its labels.csv beside it."
    from radiology_ai.phantom.hospital import simulate_hospital
    root = tmp_path_factory.mktemp('hospital')
    truth = simulate_hospital(root/'dicom', n=60, seed=5, size=256)
    knees = truth[(truth.body_part=='KNEE') & (truth.broken=='')]
    knees[['image_id','path','fractured','schatzker']].to_csv(root/'labels.csv', index=False)
    return root


@pytest.fixture(scope='session')
def store(hospital) -> Path:
    "The image store of that hospital."
    run_cli('preprocess', hospital/'dicom', '--recipe', 'knee', '--size', 64, '--out', hospital/'store')
    return hospital/'store'


@pytest.fixture(scope='session')
def run(hospital, store) -> Path:
    "A run that was trained on that store for one epoch."
    run_cli('train', 'knee', '--data', store, '--labels', hospital/'labels.csv', '--out', hospital/'run',
        '--arch', 'resnet10t',
        '--epochs', 1, '--bs', 16, '--no-pretrained')
    return hospital/'run'
