"""A search over a real set: 40 short trials by two workers, killed in the middle and gone on with, the winner in full.

`chest_child` (Kermany 2018, CC BY 4.0), three classes, at 32 pixels. `RADIOLOGY_AI_REAL_DATA=... python
benchmarks/search.py --out FOLDER`. Also `--storage 10000`: how long a study of so many trials takes to answer."""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from radiology_ai.preprocess.recipe import recipe
from radiology_ai.tasks.base import Stage, Task
from radiology_ai.tasks.kinds import Classes

CHILD = Task('child', 'Pneumonia of children', 'Is it normal, bacterial or viral?', recipe('chest', size=32),
    (Stage(Classes()),))
SPACE = {'lr': {'low': 2e-4, 'high': 2e-2, 'log': True}, 'bs': [16, 32, 64], 'min_per_class': [0, 1, 4],
    'arch': ['test_resnet', 'resnet10t', 'test_efficientnet'],
    'body_div': {'low': 1., 'high': 10., 'log': True}}


def labels_of(data: Path, store) -> pd.DataFrame:
    table = pd.read_csv(data/'chest_child/manifest.csv')
    index = store.index.assign(name=store.index.path.map(lambda p: Path(p).name))
    df = index.merge(table.assign(name=table.path.map(lambda p: Path(p).name))[['name', 'labels',
        'patient_group']],
        on='name')
    return df.assign(patient_id=df.patient_group.astype(str),
        label=df.labels)[['image_id', 'patient_id', 'label']]


def searched(out: Path, trials: int, workers: int, epochs: int):
    "One call of the search: the process that is killed, and that which goes on."
    from radiology_ai.preprocess.store import ImageStore
    from radiology_ai.search import search
    done = search(CHILD, ImageStore(out/'store'), out/'labels.csv', out/'search', trials=trials,
        workers=workers,
        space=SPACE, short=2, winners=2, seeds=2, say=lambda t: print(t, flush=True), arch='test_resnet',
        pretrained=False, epochs=epochs)
    for line in done.lines(): print(line, flush=True)
    print(pd.DataFrame(done.figures['change']).round(3).to_string())
    print(json.dumps({k: done.figures[k] for k in ('short', 'winner', 'default', 'full')}, indent=1))


def storage(n: int):
    "A study of many trials: how long it takes until it answers."
    import optuna

    from radiology_ai.search import study_of
    with tempfile.TemporaryDirectory() as tmp:
        study = study_of(tmp)
        d = optuna.distributions.FloatDistribution(0, 1)
        study.add_trials([optuna.trial.create_trial(params={'x': i/n}, distributions={'x': d}, value=i/n)
            for i in range(n)])
        start = time.perf_counter()
        again = study_of(tmp)
        opened = time.perf_counter()-start
        best = again.best_value
        known = time.perf_counter()
        again.get_trials(deepcopy=False)
        print(f'{n} trials: opened in {opened:.2f} s, best {best:.2f} after {known-start:.2f} s, asked again '
            f'{time.perf_counter()-known:.3f} s')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path)
    parser.add_argument('--trials', type=int, default=40)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--epochs', type=int, default=8, help='of a full run')
    parser.add_argument('--kill', type=int, default=15, help='the first call is killed after so many trials')
    parser.add_argument('--storage', type=int, default=0)
    parser.add_argument('--go', action='store_true', help='one call of the search')
    args = parser.parse_args()
    if args.storage: return storage(args.storage)
    if args.go: return searched(args.out, args.trials, args.workers, args.epochs)
    from radiology_ai.preprocess.scale import preprocess_folder
    from radiology_ai.search import study_of
    data = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])
    args.out.mkdir(parents=True, exist_ok=True)
    store = preprocess_folder(data/'chest_child/images', args.out/'store', CHILD.recipe, workers=1,
        show=False)
    labels_of(data, store).to_csv(args.out/'labels.csv', index=False)
    words = [sys.executable, __file__, '--go', '--out', str(args.out), '--trials', str(args.trials),
        '--workers',
        str(args.workers), '--epochs', str(args.epochs)]
    start = time.time()
    first = subprocess.Popen(words, start_new_session=True)
    while first.poll() is None and not (args.out/'search'/'search.json').exists(): time.sleep(.5)
    while first.poll() is None and finished(study_of, args.out)<args.kill: time.sleep(1)
    if first.poll() is None: os.killpg(first.pid, signal.SIGKILL)
    print(f'killed after {finished(study_of, args.out)} trials and {time.time()-start:.0f} s', flush=True)
    subprocess.run(words, check=True)
    print(f'{time.time()-start:.0f} s in all')


def finished(study_of, out: Path) -> int:
    if not (out/'search'/'journal.log').exists(): return 0
    return sum(t.state.is_finished() for t in study_of(out/'search').get_trials(deepcopy=False))


if __name__=='__main__': main()
