"""Commands are killed (SIGKILL) at moments spread over their running time and called again: are the bytes those of an
undisturbed run, and is anything left beside the output, in TMPDIR, in /dev/shm, or running?

    python benchmarks/kills.py [--kills 60] [--seed 0] [--folder FOLDER] [COMMAND ...]

Linux. Commands are forked from a process that has everything imported (tests/forks.py), so that each kill meets their work; with
`--anew` each is a Python of its own. About 8 minutes on two cores, 15 with `--anew`. What two undisturbed runs write with different
bytes is named and not compared."""
import argparse
import getpass
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]/'tests'))
from forks import Forks

COMMAND = [sys.executable, '-c', 'from radiology_ai.cli import main; main()']
TRAIN = ['--labels', 'labels.csv', '--label', 'schatzker', '--arch', 'resnet10t', '--epochs', '1', '--bs',
    '8',
    '--no-pretrained', '--data', 'store']
WORDS = { # words of each command, and its share of the kills
    'index': (['index', 'dicom', '--workers', '2', '--out', 'OUT/out.parquet'], 8),
    'explore': (['explore', 'dicom', '--pixels', '--workers', '2', '--out', 'OUT/out.html'], 7),
    'preprocess': (['preprocess', 'dicom', '--recipe', 'knee', '--size', '64', '--workers', '2',
    '--shard-size', '4', '--out',
        'OUT/out'], 9),
    'deidentify': (['deidentify', 'dicom', '--key', 'key', '--link', 'OUT/link.csv', '--workers', '2',
    '--out', 'OUT/out'], 12),
    'train': (['train', 'knee', *TRAIN, '--out', 'OUT/out'], 9),
    'evaluate': (['evaluate', 'run', '--out', 'OUT/out'], 4),
    'predict': (['predict', 'run', 'dicom', '--workers', '2', '--to', 'csv', '--to', 'json', '--out',
    'OUT/out.csv'], 6),
    'explain': (['explain', 'run', 'dicom', '--workers', '2', '--out', 'OUT/out'], 3),
    'results': (['predict', 'lungs', 'dicom', '--workers', '2', '--to', 'csv,sr,seg,sc,png', '--out',
    'OUT/out.csv'], 6),
    'adapt': (['adapt', 'run', '--data', 'other_store', '--labels', 'other.csv', '--out', 'OUT/out'], 3),
    'export': (['export', 'run', '--out', 'OUT/out.onnx'], 2),
    'demo': (['demo', '--patients', '30', '--epochs', '1', '--workers', '2', '--out', 'OUT/out'], 2)}


CACHES = {f'torchinductor_{getpass.getuser()}', '.ses'} # of torch and optuna, which hold nothing of ours


def digests(folder: Path) -> dict:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob('*')) if p.is_file()}


def marked(mark: str) -> list:
    "Processes whose environment holds the mark."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try: told = (p/'environ').read_bytes()
        except OSError: continue
        if f'KILLS_MARK={mark}'.encode() in told: found.append(int(p.name))
    return found


def told_of(pid: int) -> str:
    "A process that should have ended: its state, what it waits for, its beginning."
    try:
        state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
        words = Path(f'/proc/{pid}/cmdline').read_bytes().replace(b'\0', b' ')[:120].decode(errors='replace')
        return f"{state} {Path(f'/proc/{pid}/wchan').read_text()} {' '.join(words.split())}"
    except OSError: return 'ended meanwhile'


def shared() -> set:
    """Shared memory of processes of Python or torch; of others that work here meanwhile, only what stays for
    a second."""
    def found():
        return {n for n in os.listdir('/dev/shm') if n.startswith(('pym-', 'psm_', 'torch_', 'sem.'))}
    first = found()
    time.sleep(1)
    return first & found()


class Forked:
    "A command that was forked, as `subprocess.Popen` has processes."
    def __init__(self, forks, words, out: Path):
        self.forks, self.out, self.returncode = forks, out, None
        self.pid = forks.start(words, out)

    def poll(self):
        if self.returncode is None: self.returncode = self.forks.ended(self.pid)
        return self.returncode

    def wait(self, seconds: float=600.):
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic()>end: raise subprocess.TimeoutExpired('radiology_ai', seconds)
            time.sleep(.005)
        return self.returncode

    def kill(self):
        if self.poll() is None: os.kill(self.pid, signal.SIGKILL)

    def said(self) -> str:
        self.wait()
        return self.out.read_text()


class Anew(subprocess.Popen):
    "A command in a Python of its own."
    def said(self) -> str: return self.communicate()[0]


class Place:
    "A folder with a small hospital, its store and run, in which commands are called."
    def __init__(self, root: Path, anew: bool):
        self.root, self.tmp, self.anew = root, root/'tmp', anew
        self.tmp.mkdir(parents=True)
        self.env = os.environ | dict(TMPDIR=str(self.tmp), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
        self.forks = Forks()

    def start(self, words, out: str, mark: str='none') -> Forked|Anew:
        env, words = self.env | dict(KILLS_MARK=mark), [w.replace('OUT', out) for w in words]
        if self.anew:
            return Anew([*COMMAND, *words], cwd=self.root, env=env, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True, start_new_session=True)
        self.forks.place(self.root, env)
        return Forked(self.forks, words, self.root/'said')

    def call(self, words, out: str='.') -> float:
        start, process = time.monotonic(), self.start(words, out)
        text = process.said()
        if process.returncode: raise SystemExit(f'{" ".join(words)}: {text}')
        return time.monotonic() - start

    def make(self, names: list):
        from radiology_ai.phantom.hospital import simulate_hospital
        truth = simulate_hospital(self.root/'all', n=60, seed=5, size=256, show=False)
        knees = truth[(truth.body_part=='KNEE') & (truth.broken=='')]
        knees[['image_id', 'path', 'fractured', 'schatzker']].to_csv(self.root/'labels.csv', index=False)
        (self.root/'dicom').mkdir()
        for k,p in enumerate([*knees.path[:30], *truth[truth.broken!=''].path[:4]]):
            shutil.copy(self.root/'all'/p, self.root/'dicom'/f'{k:02d}.dcm')
        (self.root/'key').write_bytes(b'k'*32)
        self.call(['preprocess', 'all', '--recipe', 'knee', '--size', '64', '--out', 'store'])
        self.call(['train', 'knee', *TRAIN, '--out', 'run'])
        if 'adapt' in names: self.make_other()
        if 'results' not in names: return
        self.call(['demo', 'lungs', '--patients', '30', '--epochs', '1', '--out', 'of_lungs'])
        (self.root/'of_lungs/model').rename(self.root/'lungs')
        shutil.rmtree(self.root/'of_lungs')

    def make_other(self):
        "Another hospital, to which a run is adapted."
        from radiology_ai.phantom.hospital import simulate_hospital
        truth = simulate_hospital(self.root/'other', n=40, seed=6, size=256, show=False)
        knees = truth[(truth.body_part=='KNEE') & (truth.broken=='')]
        labels = knees[['image_id', 'schatzker']].assign(patient_id='other ' + knees.patient_id)
        labels.to_csv(self.root/'other.csv', index=False)
        self.call(['preprocess', 'other', '--recipe', 'knee', '--size', '64', '--out', 'other_store'])

    def undisturbed(self, name: str) -> tuple[float, dict, list]:
        "Seconds of a run, the digests that every run gives, and the files that differ from run to run."
        seconds, told = [], []
        for _ in range(2):
            (self.root/'whole').mkdir()
            seconds.append(self.call(WORDS[name][0], 'whole'))
            told.append(digests(self.root/'whole'))
            shutil.rmtree(self.root/'whole')
        same = {k: v for k,v in told[0].items() if told[1].get(k)==v}
        return min(seconds), same, sorted(set(told[0]) - set(same))

    def killed(self, name: str, seconds: float, k: int) -> tuple[bool, list]:
        "Whether it was still running when it was killed, and what was running 5 seconds later."
        mark = f'{name}{k}x{os.getpid()}'
        process = self.start(WORDS[name][0], 'whole', mark)
        try: process.wait(seconds)
        except subprocess.TimeoutExpired: pass
        alive = process.poll() is None
        if alive and k%2:
            try: os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError: pass # it has no group yet
        process.kill()
        process.wait()
        if self.anew: process.stdout.close()
        end = time.monotonic() + 5
        while marked(mark) and time.monotonic()<end: time.sleep(.05)
        left = {p: told_of(p) for p in marked(mark)}
        for p in left:
            try: os.kill(p, signal.SIGKILL)
            except ProcessLookupError: pass # it ended meanwhile
        return alive, list(left.values())

    def once(self, name: str, moment: float, k: int, want: dict) -> dict:
        "A kill, the second call, and what came of both."
        shm = shared()
        (self.root/'whole').mkdir()
        alive, orphans = self.killed(name, moment, k)
        found = dict(moment=moment, alive=alive, orphans=orphans, between=len(os.listdir(self.tmp)))
        process = self.start(WORDS[name][0], 'whole')
        text = process.said()
        got = digests(self.root/'whole')
        known = set(want) | self.differ
        found |= dict(code=process.returncode, same=all(got.get(f)==d for f,d in want.items()),
            more=sorted(set(got) - known), shm=sorted(shared() - shm),
            tmp=[n for n in os.listdir(self.tmp) if n not in CACHES],
            text=text.strip().splitlines()[-1:] if process.returncode else [])
        shutil.rmtree(self.root/'whole')
        for p in self.tmp.iterdir(): shutil.rmtree(p, ignore_errors=True)
        return found

    def series(self, name: str, kills: int, seed: int):
        "All kills of a command, and its line of the table."
        seconds, want, differ = self.undisturbed(name)
        self.differ = set(differ)
        draw = random.Random(f'{seed} {name}')
        rows = [self.once(name, seconds*(k + draw.random())/kills, k, want) for k in range(kills)]
        bad = [r for r in rows if r['code'] or not r['same'] or r['more'] or r['tmp'] or r['shm']
            or r['orphans']]
        print(f"{name:<11}{seconds:>8.1f}{kills:>7}{sum(r['alive'] for r in rows):>9}{sum(r['same'] for r in rows):>7}"
            f"{sum(len(r['more']) for r in rows):>8}{sum(len(r['tmp']) for r in rows):>8}"
            f"{sum(len(r['shm']) for r in rows):>10}{sum(len(r['orphans']) for r in rows):>9}   {', '.join(differ)[:70]}", flush=True)
        for r in bad: print('   ', r, flush=True)
        return rows, bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('commands', nargs='*', help=', '.join(WORDS))
    parser.add_argument('--kills', type=int, default=60)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--folder', type=Path)
    parser.add_argument('--anew', action='store_true', help='each command is a Python of its own')
    args = parser.parse_args()
    names = args.commands or list(WORDS)
    shares = sum(WORDS[n][1] for n in names)
    place = Place(Path(tempfile.mkdtemp(prefix='kills-', dir=args.folder)), args.anew)
    place.make(names)
    print('command     seconds  kills  running   same  beside  TMPDIR  /dev/shm  orphans   not compared',
        flush=True)
    results = [place.series(n, max(1, round(args.kills*WORDS[n][1]/shares)), args.seed) for n in names]
    shutil.rmtree(place.root)
    rows, bad = [r for o in results for r in o[0]], [r for o in results for r in o[1]]
    print(f"{len(rows)} kills, {sum(r['alive'] for r in rows)} of them while it ran: {len(bad)} with a fault; "
        f"{sum(r['between']>0 for r in rows)} left something in TMPDIR until the second call")
    sys.exit(bool(bad))


if __name__=='__main__': main()
