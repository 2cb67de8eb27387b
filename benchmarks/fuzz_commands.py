"""The files of `fuzz_grammar` through four commands, as a user calls them: index, read, preprocess and deidentify.

One process with one worker and 1 GB of address space above what its imports have mapped (`RLIMIT_AS`, which its decoders' child
inherits; libraries and stacks of threads map half a gigabyte that is never touched); that no more than 1 GB was resident at any time
is measured beside it. A parent looks on and ends the process where it hangs: 20 seconds on one file, without those that the
processors gave to others. The other seconds are those of the processor, the child's included. A file that is refused may take half a
second and 64 MB, one that is read two seconds and 512 MB, in each command; what took longer is measured again. Each file must stand
exactly once in the index, in the store or its errors, and in the account.
"""
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from fuzz_grammar import made

STAGES = ('index', 'read', 'preprocess', 'deidentify')
LIMITS = dict(refused=(.5, 64), used=(2., 512))  # seconds, MB
MEMORY, KILL, BATCH = 2**30, 20., 250
SECRET = ('SECRET', '^NAME')


def peak() -> float:
    "MB at most since `forget`."
    with open('/proc/self/status') as f: return int(f.read().split('VmHWM:')[1].split()[0])/1024


def mapped() -> int:
    "Bytes of address space that are taken."
    with open('/proc/self/statm') as f: return int(f.read().split()[0])*resource.getpagesize()


def busy() -> float:
    """Processor seconds of this process and of the child that decodes for it: the machine may have others to
    serve."""
    from radiology_ai.dicom.child import in_child
    spent = time.process_time()
    if in_child.process is None: return spent
    try: fields = Path(f'/proc/{in_child.process.pid}/stat').read_text().rsplit(')', 1)[1].split()
    except OSError: return spent
    return spent + (int(fields[11]) + int(fields[12]))/os.sysconf('SC_CLK_TCK')


def forget():
    with open('/proc/self/clear_refs', 'w') as f: f.write('5')


class Account:
    "What became of the files, and what is wrong with that."
    def __init__(self):
        self.counts, self.causes, self.faults, self.most, self.files = Counter(), Counter(), [], {}, 0

    def fault(self, i, stage, what): self.faults.append((i, stage, what))

    def add(self, other: dict):
        "The record of a batch."
        self.files += other['files']
        for k, n in other['counts']: self.counts[tuple(k)] += n
        for k, n in other['causes']: self.causes[tuple(k)] += n
        self.faults += map(tuple, other['faults'])
        for k, v in other['most'].items(): self.most[k] = max(self.most.get(k, (0, 0)), tuple(v))

    def plain(self) -> dict:
        return dict(files=self.files, counts=[*self.counts.items()], causes=[*self.causes.items()],
            faults=self.faults, most=self.most)

    def report(self, seconds: float, n: int, seed: int):
        print(f'{self.files} of {n} files, seed {seed}, in {seconds:.0f} s: {self.files/max(seconds, 1e-9):.0f} files/s')
        for stage in STAGES:
            print(f'{stage:11s}' + ', '.join(f'{k[1]} {v}' for k, v in sorted(self.counts.items())
                if k[0]==stage))
        if self.most.get('MB resident', (0, 0))[0]>1024:
            self.fault(self.most['MB resident'][1], 'all', 'more than 1 GB resident')
        for k, (v, i) in sorted(self.most.items()): print(f'most {k}: {v:.2f} (file {i})')
        for (stage, cause), v in self.causes.most_common(40): print(f'{v:7d}  {stage}: {cause[:120]}')
        for f in self.faults[:60]: print('FAULT file %s, %s: %s'%tuple(f))
        print(f'{len(self.faults)} faults')


class Batch:
    "Some files in a folder, and the commands over them."
    def __init__(self, seed: int, numbers: list, folder: Path, clock=None):
        self.seed, self.folder, self.clock, self.account = seed, Path(folder), clock, Account()
        self.kinds, self.took = {}, {}
        (self.folder/'in').mkdir(parents=True)
        for i in numbers:
            kind, data = made(seed, i)
            (self.folder/'in'/f'f{i:07d}.dcm').write_bytes(data)
            self.kinds[i] = kind

    def number(self, path) -> int: return int(Path(path).stem[1:])

    def watched(self, stage: str, fn, path_of, refused_of):
        "`fn` with its time and memory taken."
        def call(*args, **kwargs):
            i = self.number(path_of(*args))
            if self.clock is not None:
                self.clock[0], self.clock[1], self.clock[2] = i, STAGES.index(stage), time.monotonic()
            forget()
            self.base = base = peak()
            start, cause = busy(), None
            try:
                out = fn(*args, **kwargs)
                cause = refused_of(out)
                return out
            finally:
                seconds, mb = busy() - start, peak() - base
                if self.clock is not None: self.clock[2] = 0
                self.note(i, stage, cause, seconds, mb)
        return call

    def note(self, i, stage, cause, seconds, mb):
        "A file has gone through a command; `cause` is '' where it was used, None where it raised."
        how = 'used' if cause=='' else 'refused'
        self.account.counts[stage, how] += 1
        if cause:
            self.account.causes[stage, re.sub(r'\d+', '#', cause)] += 1
            if any(s in cause for s in SECRET): self.account.fault(i, stage, 'header text in a cause')
        self.account.most['MB resident'] = max(self.account.most.get('MB resident', (0, 0)),
            (self.base + mb, i))
        for name, v in ((f'seconds {stage}', seconds), (f'MB {stage}', mb)):
            k = f'{name} {how}'
            self.account.most[k] = max(self.account.most.get(k, (0, 0)), (v, i))
        if seconds>LIMITS[how][0] or mb>LIMITS[how][1]:
            self.took.setdefault((i, stage, how), []).append((seconds, mb))

    def run(self) -> dict:
        "The four commands."
        from radiology_ai.core import DicomError
        from radiology_ai.dicom import deidentify, index
        from radiology_ai.dicom.read import read_radiograph
        from radiology_ai.preprocess import scale
        from radiology_ai.preprocess.recipe import Preprocess
        files, out = sorted((self.folder/'in').iterdir()), self.folder
        kept = index._row, scale.prepare, deidentify._one
        index._row = self.watched('index', kept[0], lambda p, *a: p, lambda row: row[1])
        scale.prepare = self.watched('preprocess', kept[1], lambda s, *a: s.path,
            lambda o: o[1]['cause'] if o[0] is None else '')
        deidentify._one = self.watched('deidentify', kept[2], lambda job: job.path, lambda o: o[0]['cause'])
        def read(path):
            try: read_radiograph(path, frame=0)
            except DicomError as e: return e.cause
            return ''
        read_one = self.watched('read', read, lambda p: p, lambda cause: cause)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                df = self.attempt('index', lambda: index.index_dicoms(out/'in', workers=1, show=False))
                for p in files: self.attempt('read', lambda p=p: read_one(p))
                store = self.attempt('preprocess', lambda: scale.preprocess_folder(out/'in', out/'store',
                    Preprocess(size=32), workers=1, show=False,
                    allow_empty=True))
                table = self.attempt('deidentify', lambda: deidentify.deidentify(out/'in', out/'out',
                    key=b'fuzz'*8, workers=1, show=False))
        finally: index._row, scale.prepare, deidentify._one = kept
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            self.again()
        self.check(files, df, store, table)
        self.account.files = len(files)
        return self.account.plain()

    def attempt(self, stage, f):
        "The result of a command; what it raises is a fault."
        try: return f()
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            i = int(self.clock[0]) if self.clock is not None else -1
            self.account.fault(i, stage,
                f'{type(e).__name__} in {Path(where.filename).name}:{where.lineno}: {str(e)[:100]}')

    def again(self):
        "What took too long once is measured twice more; the least counts."
        from radiology_ai.dicom import deidentify, index
        from radiology_ai.dicom.read import read_radiograph
        from radiology_ai.preprocess import scale
        from radiology_ai.preprocess.recipe import Preprocess, Source
        for (i, stage, how), took in [*self.took.items()]:
            path = str(self.folder/'in'/f'f{i:07d}.dcm')
            for k in range(2):
                forget()
                base, start = peak(), busy()
                try:
                    if stage=='index': index.index_row(path)
                    elif stage=='read': read_radiograph(path, frame=0)
                    elif stage=='preprocess': scale.prepare(Source(path, 'x'), Preprocess(size=32))
                    else:
                        deidentify._one(deidentify._Job(0, path, str(self.folder/f'again{i}-{k}'), b'k'*16,
                            frozenset(), 'black'))
                except Exception: pass # counted where it was raised first
                took.append((busy() - start, peak() - base))
            seconds, mb = min(t[0] for t in took), min(t[1] for t in took)
            if seconds>LIMITS[how][0]: self.account.fault(i, stage, f'{how} after {seconds:.2f} s')
            if mb>LIMITS[how][1]: self.account.fault(i, stage, f'{how} with {mb:.0f} MB')

    def check(self, files, df, store, table):
        "Is each file once in each account?"
        want = Counter(map(str, files))
        have = {} if df is None else {'index': Counter(df.path)}
        if store is not None: have['preprocess'] = Counter([*store.index.path, *store.errors.path])
        for stage, found in have.items():
            for p in (want - found) + (found - want):
                self.account.fault(self.number(p), stage, 'not once in its account')
        if table is None: return
        if sorted(table.number)!=[*range(len(files))]: self.account.fault(-1, 'deidentify', 'files are lost')
        for number, path in zip(table.number, table.path):
            if path and not (self.folder/'out'/path).is_file():
                self.account.fault(self.number(files[number]), 'deidentify', 'its copy is not there')


def serve(seed: int, batches: list, folder: str, clock, pipe, memory: int):
    "The one process: it takes batches of numbers."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import cv2

    import radiology_ai.dicom.deidentify
    import radiology_ai.preprocess.scale  # noqa: F401  what is imported counts as memory that is taken
    cv2.setNumThreads(1)
    Batch(seed, [*range(10**9, 10**9 + 60)], Path(folder)/'warm').run() # what is imported late
    shutil.rmtree(Path(folder)/'warm')
    if memory: resource.setrlimit(resource.RLIMIT_AS, (mapped() + memory,)*2)
    for k, numbers in batches:
        place = Path(folder)/f'b{k}'
        shutil.rmtree(place, ignore_errors=True)
        record = Batch(seed, numbers, place, clock).run()
        shutil.rmtree(place, ignore_errors=True)
        pipe.send((k, record))
    pipe.send(None)


def ram() -> str|None: return '/dev/shm' if Path('/dev/shm').is_dir() else None


def fuzz_files(n: int, seed: int=0, seconds: float=1e9, first: int=0, memory: int=MEMORY, batch: int=BATCH,
        told=print) -> Account:
    "`n` files from number `first` on."
    todo = [(k, [*range(k, min(k + batch, first + n))]) for k in range(first, first + n, batch)]
    context, account, end = multiprocessing.get_context('spawn'), Account(), time.monotonic() + seconds
    folder, clock = tempfile.mkdtemp(dir=ram(), prefix='fuzz'), context.Array('d', 3, lock=False)
    begin, hung = time.monotonic(), set()
    try:
        while todo and time.monotonic()<end:
            here, there = context.Pipe(False)
            process = context.Process(target=serve, args=(seed, todo, folder, clock, there, memory))
            clock[2] = 0
            process.start()
            there.close()
            cause = attend(process, here, clock, todo, account, end, lambda: told and told(
                f'{account.files} files, {time.monotonic() - begin:.0f} s, {len(account.faults)} faults',
                flush=True))
            process.kill()
            process.join()
            if cause and not clock[2] and 'died' in cause:
                raise RuntimeError(f'{cause} between two files, in batch {todo[0][0]}')
            if cause: # the file is left out, and its batch begins again
                i = int(clock[0])
                if 'hangs' in cause and i not in hung: # once more, in a new process
                    hung.add(i)
                    continue
                account.fault(i, STAGES[int(clock[1])], cause)
                account.files += 1
                todo[0] = (todo[0][0], [j for j in todo[0][1] if j!=i])
    finally: shutil.rmtree(folder, ignore_errors=True)
    return account


def others(pid: int) -> float:
    "Seconds that a process and its children were ready to go on, while the processors served others."
    try:
        pids = [pid, *Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
        return sum(int(Path(f'/proc/{p}/schedstat').read_text().split()[1]) for p in pids)/1e9
    except OSError: return 0. # not told here, or a child has ended


class Patience:
    "How long a process has been at one file in one command: what the processors gave to others does not count."
    def __init__(self, pid: int, clock):
        self.pid, self.clock, self.at, self.spent = pid, clock, None, 0.
        self.now, self.lent = time.monotonic(), others(pid)

    def seconds(self) -> float:
        "Until now; called about twice a second."
        at, now, lent = tuple(self.clock), time.monotonic(), others(self.pid)
        if at!=self.at: self.at, self.spent = at, 0.
        # a machine that stood still is no fault of the file
        else: self.spent += max(0., min(now - self.now, 2.) - max(0., lent - self.lent))
        self.now, self.lent = now, lent
        return self.spent if self.clock[2] else 0.


def attend(process, pipe, clock, todo, account, end, told) -> str:
    "Takes the records of a process until it ends; why it ended too early."
    patience = Patience(process.pid, clock)
    while time.monotonic()<end:
        try: record = pipe.recv() if pipe.poll(.5) else 0
        except EOFError:
            process.join()
            return f'the process died ({process.exitcode})'
        if record is None: return ''
        if record:
            account.add(record[1])
            todo.pop(0)
            if todo and todo[0][0]//BATCH%8==0: told()
        if patience.seconds()>KILL: return f'hangs for more than {KILL:.0f} s'
    return ''


def one_file(seed: int, i: int):
    "Makes one file again and takes it through the commands here."
    with tempfile.TemporaryDirectory() as folder:
        batch = Batch(seed, [i], Path(folder)/'b', [0, 0, 0])
        path = Path(tempfile.gettempdir())/f'fuzz-{seed}-{i}.dcm'
        path.write_bytes((Path(folder)/'b'/'in'/f'f{i:07d}.dcm').read_bytes())
        print(f'{batch.kinds[i]}, {path.stat().st_size} bytes: {path}')
        print(json.dumps({k: v for k, v in batch.run().items() if k!='files'}, indent=1, default=str))


def main(args) -> int:
    if args.file is not None:
        one_file(args.seed, args.file)
        return 0
    begin = time.monotonic()
    account = fuzz_files(args.files, args.seed, args.seconds, args.first, args.memory)
    account.report(time.monotonic() - begin, args.files, args.seed)
    if account.faults: print(f'again: {sys.argv[0]} --seed {args.seed} --file NUMBER')
    return int(bool(account.faults))
