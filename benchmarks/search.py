"""A search over a real set: 40 short trials by two workers; one is killed, later the search itself, and the same call goes
on; then the best and the default settings in full, judged on untouched patients.

`chest_child` (Kermany 2018, CC BY 4.0), three classes, at 32 pixels. `RADIOLOGY_AI_REAL_DATA=... python
benchmarks/search.py --out FOLDER`. Then, of the same folder, `--bits`: what numbers of 8 and 16 bits cost on the untouched patients. Also
`--storage 10000`: how long a study of so many trials takes to answer."""
import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from radiology_ai.preprocess.recipe import recipe
from radiology_ai.tasks.base import Stage, Task
from radiology_ai.tasks.kinds import Classes

CHILD = Task('child', 'Pneumonia of children', 'Is it normal, bacterial or viral?', recipe('chest', size=32),
    (Stage(Classes()),))
SPACE = {'lr': {'low': 2e-4, 'high': 2e-2, 'log': True}, 'bs': [16, 32, 64], 'min_per_class': [0, 1, 4],
    'arch': ['test_resnet', 'test_efficientnet', 'test_convnext'],
    'body_div': {'low': 1., 'high': 10., 'log': True}}


def labels_of(data: Path, store) -> pd.DataFrame:
    table = pd.read_csv(data/'chest_child/manifest.csv')
    index = store.index.assign(name=store.index.path.map(lambda p: Path(p).name))
    df = index.merge(table.assign(name=table.path.map(lambda p: Path(p).name))[['name', 'labels',
        'patient_group']],
        on='name')
    return df.assign(patient_id=df.patient_group.astype(str),
        label=df.labels)[['image_id', 'patient_id', 'label']]


def searched(out: Path, trials: int, workers: int, epochs: int, full: tuple[int, int]):
    "One call of the search: the process that is killed, and that which goes on."
    from radiology_ai.preprocess.store import ImageStore
    from radiology_ai.search import search
    done = search(CHILD, ImageStore(out/'store'), out/'labels.csv', out/'search', trials=trials,
        workers=workers,
        space=SPACE, short=3, winners=full[0], seeds=full[1], say=lambda t: print(t, flush=True), arch='test_resnet',
        body_div=1., pretrained=False, epochs=epochs)
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


def bits(out: Path):
    "What fewer bits cost each full run of the winner and of the default settings, by the untouched patients."
    from radiology_ai.models.bundle import load_bundle
    from radiology_ai.models.export import difference_text, fewer_bits, write_onnx
    from radiology_ai.models.onnx import load_onnx
    from radiology_ai.preprocess.store import ImageStore
    from radiology_ai.serve.export import precision_change
    from radiology_ai.tasks.kinds import stored_arrays
    from radiology_ai.tasks.run import read_exactly
    store, rows = ImageStore(out/'store'), read_exactly(out/'search'/'manifest.csv')
    place = {k: i for i, k in enumerate(store.index.image_id)}
    learnt = rows.image_id[rows.split=='train'].iloc[::9][:64]
    x = np.concatenate(list(stored_arrays(store, [place[k] for k in learnt], show=False)))
    trial = json.loads((out/'search'/'figures.json').read_text())['trial']
    table = pd.read_csv(out/'labels.csv', dtype=dict(patient_id=str))
    judges = table[table.image_id.isin(rows.image_id[rows.split=='test'])]
    print(f'{len(x)} training films for the ranges; {len(judges)} films of {judges.patient_id.nunique()} '
        'untouched patients')
    for run in [f'{name}_seed_{k}' for name in ('default', f'trial_{trial}') for k in range(2)]:
        if not (out/'search'/'full'/run).exists(): continue
        bundle = load_bundle(out/'search'/'full'/run)
        task = CHILD.answering(lambda o, b=bundle: o.answer.of_bundle(b.answer))
        with tempfile.TemporaryDirectory() as tmp:
            told = write_onnx(bundle, Path(tmp)/'a.onnx', x)
            print(run, bundle.meta['arch'], difference_text(told['parity']))
            for precision in ('fp16', 'int8'):
                few = fewer_bits(Path(tmp)/'a.onnx', Path(tmp)/'b.onnx', x, precision)
                change = precision_change(*(load_onnx(Path(tmp)/f) for f in ('a.onnx', 'b.onnx')), task, store, judges)
                print(precision, f"logits within {few['difference']['logits']['off']:.2g} of the largest")
                print(change.to_string(float_format='{:+.5f}'.format), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path)
    parser.add_argument('--trials', type=int, default=40)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--epochs', type=int, default=8, help='of a full run')
    parser.add_argument('--kill', type=int, default=15,
        help='the first call is killed after so many trials, a worker of it after a third of them')
    parser.add_argument('--full', type=int, nargs=2, default=(2, 2),
        help='trials that are run in full, and seeds of each')
    parser.add_argument('--storage', type=int, default=0)
    parser.add_argument('--bits', action='store_true', help='of a search that is done: what fewer bits cost')
    parser.add_argument('--go', action='store_true', help='one call of the search')
    args = parser.parse_args()
    if args.storage: return storage(args.storage)
    if args.bits: return bits(args.out)
    if args.go: return searched(args.out, args.trials, args.workers, args.epochs, args.full)
    from radiology_ai.preprocess.scale import preprocess_folder
    from radiology_ai.search import study_of
    data = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])
    args.out.mkdir(parents=True, exist_ok=True)
    store = preprocess_folder(data/'chest_child/images', args.out/'store', CHILD.recipe, workers=1,
        show=False)
    labels_of(data, store).to_csv(args.out/'labels.csv', index=False)
    words = [sys.executable, __file__, '--go', '--out', str(args.out), '--trials', str(args.trials), '--workers',
        str(args.workers), '--epochs', str(args.epochs), '--full', *map(str, args.full)]
    start = time.time()
    first = subprocess.Popen(words)
    def wait(trials):
        while first.poll() is None and finished(study_of, args.out)<trials: time.sleep(1)
    wait(args.kill//3)
    crew = children(first.pid)
    os.kill(crew[0], signal.SIGKILL)
    print(f'killed worker {crew[0]} of {crew} after {finished(study_of, args.out)} trials', flush=True)
    wait(args.kill)
    crew = children(first.pid)
    first.kill()
    first.wait()
    print(f'killed the search after {finished(study_of, args.out)} trials and {time.time()-start:.0f} s', flush=True)
    end = time.time()+30
    while any(map(running, crew)) and time.time()<end: time.sleep(.1)
    print(f'workers that outlive it: {[p for p in crew if running(p)]}', flush=True)
    subprocess.run(words, check=True)
    print(f'{time.time()-start:.0f} s in all')
    told(args.out)


def children(parent: int) -> list[int]:
    "Processes of a process that hold a trial's lease, which are its workers."
    out = []
    for p in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError, IndexError):
            above = int((p/'stat').read_text().rsplit(')', 1)[1].split()[1])
            if above==parent and any('/leases/' in os.readlink(f) for f in (p/'fd').iterdir()):
                out.append(int(p.name))
    return sorted(out)


def running(pid: int) -> bool:
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]!='Z'
    except OSError: return False


def told(out: Path):
    "What the trials took, and what stands between them."
    table = pd.read_csv(out/'search'/'trials.csv')
    print(table.state.value_counts().to_string())
    print(table.groupby(['state', 'epochs']).seconds.agg(['count', 'median', 'sum']).to_string())
    print(table[(table.state=='killed') | table['of'].notna()][['trial', 'state', 'of']].to_string())
    print(table.sort_values('value', ascending=False).head(5).to_string())


def finished(study_of, out: Path) -> int:
    if not (out/'search'/'journal.log').exists(): return 0
    return sum(t.state.is_finished() for t in study_of(out/'search').get_trials(deepcopy=False))


if __name__=='__main__': main()
