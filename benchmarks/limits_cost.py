"""What the limits of reading cost: files read as they are, beside the same reading with the checks of the limits replaced by nothing.

    [RADIOLOGY_AI_REAL_DATA=../shared/data] python benchmarks/limits_cost.py [--repeats 15] [--films 60] [--seed 0]

Films of a simulated hospital (every transfer syntax), the same as PNG, TIFF and JPEG, and the real ones of the kit, where it is
there. Both ways take turns on each file, in an order that changes; seconds are the processor's, and the least of each way counts.
The figure is the sum with limits over the sum without, with an interval by bootstrap over the files (one file a patient).
Nothing stands for: the leash on the parser of headers, the look at long values and at character sets, the cost of a compressed
stream, the walks over the chunks of a PNG and the pages of a TIFF (a PNG's checksums, which damage is told by, stay), and the
opening of regular files alone. Every check of damage stays on both sides.
Then the fingerprint of a shard of a store by its size, and the import of the command line.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
from PIL import Image

from radiology_ai.core import DicomError, rng
from radiology_ai.dicom import codecs, file, index, limits, still, stored, tags
from radiology_ai.dicom.index import index_row
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.files import map_array, quick_digest
from radiology_ai.phantom.hospital import simulate_hospital

ROOMS = (codecs, file, index, limits, still, stored, tags)


def opened(path, buffering: int=-1): return open(path, 'rb', buffering)


def on_no_leash(self, path):
    "In place of `hold`."
    self.free()
    return self


def picture_sums(f, path, whole):
    "In place of the walk over the chunks of a PNG: its checksums alone, which tell damage."
    f.seek(8)
    head = f.read(8)
    while whole and len(head)==8 and head[4:]!=b'IEND':
        still._check_sum(f, path, int.from_bytes(head[:4], 'big'), still.zlib.crc32(head[4:]))
        head = f.read(8)


INSTEAD = dict(open_regular=opened, check_values=lambda ds, path: None, settle_charset=lambda ds: None,
    check_cost=lambda info, path='': None, _work=lambda info, tile, tiles: {}, _plain_tiles=lambda data, p: True,
    _scans=lambda data, p, info, progressive: 1, _trusted=lambda info, data, r=0: True, _check_png=picture_sums,
    _count_pages=lambda f, path: 1)


@contextmanager
def without_limits():
    "Within it the checks are nothing."
    with ExitStack() as stack:
        for room in ROOMS:
            for name, other in INSTEAD.items():
                if hasattr(room, name): stack.enter_context(patch.object(room, name, other))
        stack.enter_context(patch.object(limits._Leash, 'hold', on_no_leash))
        yield


def spent(f, path) -> float:
    start = time.process_time()
    f(path)
    return time.process_time() - start


def paired(f, path, repeats: int, gen) -> tuple[float, float]:
    "The least seconds with and without the limits."
    took = {True: [], False: []}
    f(path)
    for _ in range(repeats):
        for limited in gen.permutation([True, False]):
            if limited: took[True].append(spent(f, path))
            else:
                with without_limits(): took[False].append(spent(f, path))
    return min(took[True]), min(took[False])


def share(table: pd.DataFrame, gen, n: int=2000) -> tuple[float, float, float]:
    "What the limits cost of the whole, in percent, with an interval of 95 %."
    a, b = table.limited.to_numpy(), table.free.to_numpy()
    rows = gen.integers(0, len(a), (n, len(a)))
    drawn = 100*(a[rows].sum(1)/b[rows].sum(1) - 1)
    return 100*(a.sum()/b.sum() - 1), *np.percentile(drawn, [2.5, 97.5])


def read(path): read_radiograph(path, frame=0)


def readable(path) -> bool:
    try: read(path)
    except DicomError: return False
    return True


def films(folder: Path, n: int) -> dict:
    "Files by where they come from."
    truth = simulate_hospital(folder/'hospital', n=n, seed=11, size=512, show=False)
    simulated = [folder/'hospital'/p for p in truth[truth.broken==''].path]
    pictures = []
    for k, path in enumerate(simulated[:n//2]):
        try: pixels = read_radiograph(path, frame=0).pixels
        except DicomError: continue
        how = ('png', 'tif', 'jpg')[k%3]
        pictures.append(folder/f'{k}.{how}')
        Image.fromarray((255*pixels).astype(np.uint8)).save(pictures[-1])
    real = Path(os.environ.get('RADIOLOGY_AI_REAL_DATA', 'nowhere'))
    kit = sorted(p for d in ('dicom', 'dicom_edge') for p in (real/d).rglob('*') if p.suffix in ('.dcm', ''))
    found = dict(simulated=simulated, pictures=pictures, kit=[p for p in kit if p.is_file()])
    return {k: [p for p in v if readable(p)] for k, v in found.items() if v}


def fingerprints(folder: Path):
    "Of a shard of 256 images when it is first read, from the page cache."
    for side in (64, 224, 512):
        for kind in (np.uint8, np.uint16):
            np.save(folder/'shard.npy', rng(0, 'shard').integers(0, 2**8, (256, side, side), kind))
            images = map_array(folder/'shard.npy', kind, (None, side, side))
            best = min(spent(quick_digest, images) for _ in range(9))
            print(f'fingerprint of a shard of 256 x {side} x {side} x {8*images.itemsize} bits: {1000*best:.2f} ms')


def importing():
    took = []
    for _ in range(9):
        start = time.perf_counter()
        subprocess.run([sys.executable, '-c', 'import radiology_ai.cli'], check=True)
        whole = time.perf_counter() - start
        start = time.perf_counter()
        subprocess.run([sys.executable, '-c', 'import typer'], check=True)
        took.append((whole, time.perf_counter() - start))
    whole, bare = np.min(took, axis=0)
    print(f'import of the command line: {1000*whole:.0f} ms, of typer alone {1000*bare:.0f} ms, Python included')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--films', type=int, default=60)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    gen, rows = rng(args.seed, 'limits'), []
    with tempfile.TemporaryDirectory() as folder:
        for source, paths in films(Path(folder), args.films).items():
            for path in paths:
                for what, f in (('read', read), ('index', index_row)):
                    rows.append((source, what, path.name, *paired(f, str(path), args.repeats, gen)))
        table = pd.DataFrame(rows, columns=['source', 'what', 'name', 'limited', 'free'])
        print('| What | Files | ms a file | Cost of the limits, % [95 %] |\n|---|---|---|---|')
        for (what, source), part in [*table.groupby(['what', 'source']), *((k, p) for k, p in
                (((w, 'all'), table[table.what==w]) for w in ('read', 'index')))]:
            cost, low, high = share(part, gen)
            print(f'| {what}, {source} | {len(part)} | {1000*part.limited.mean():.2f} | '
                f'{cost:+.2f} [{low:+.2f}, {high:+.2f}] |')
        table['cost'] = 100*(table.limited/table.free - 1)
        print(table[table.what=='read'].sort_values('cost').tail(5).to_string(index=False))
        fingerprints(Path(folder))
    importing()


if __name__=='__main__': main()
