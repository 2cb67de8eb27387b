"""Indexing the headers of a folder, beside loops over pydicom, in one run on one machine.

    python benchmarks/index_dicoms.py [--patients 400] [--files 6000] [--pixels 0]

The files are those of a simulated hospital at 512 px (13 transfer syntaxes, lookup tables, some broken files),
copied until there are enough, and read once before the clock starts (a warm disk). A loop that reads the same
elements is the fair peer; one that reads ten is what notebooks do. Each figure is the best of three runs.
"""
import argparse
import os
import shutil
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import pydicom

from radiology_ai.dicom.explore import explore_dicoms
from radiology_ai.dicom.index import image_files, index_dicoms, read_index, write_index
from radiology_ai.dicom.tags import TAGS
from radiology_ai.phantom.hospital import simulate_hospital

TEN = '''PatientID StudyInstanceUID SOPInstanceUID Modality BodyPartExamined ViewPosition Laterality
Manufacturer Rows Columns'''.split()


def rate(f, n: int, times: int=3) -> float:
    "Files a second, the best of some runs."
    best = float('inf')
    for _ in range(times):
        start = time.perf_counter()
        f()
        best = min(best, time.perf_counter() - start)
    return n/best


def loop(files: list, keywords: list, only: bool) -> list:
    """pydicom's own header reading, the values as text, errors skipped; `only` tells pydicom which elements
    are wanted."""
    rows = []
    for f in files:
        try:
            ds = pydicom.dcmread(f, stop_before_pixels=True, specific_tags=keywords if only else None)
            rows.append({k: str(ds.get(k, '')) for k in keywords})
        except Exception: continue
    return rows


def grow(folder: Path, n: int) -> list:
    "Copies the files in `folder` until there are `n`."
    files = image_files(folder)
    for i in range(n - len(files)):
        source = Path(files[i % len(files)])
        target = folder/f'copy{i//len(files)}'/source.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return image_files(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--patients', type=int, default=400)
    parser.add_argument('--files', type=int, default=6000)
    parser.add_argument('--pixels', type=int, default=0,
        help='also hash the pixels of so many files, with two processes')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)/'hospital'
        simulate_hospital(folder, n=args.patients, size=512, show=False)
        first = image_files(folder)
        files = grow(folder, args.files)
        for f in files: Path(f).read_bytes()
        ours = rate(lambda: index_dicoms(first, workers=1), len(first))
        def best(tags):
            return max(rate(partial(loop, first, tags, only), len(first)) for only in (True, False))
        peers = [('pydicom loop, same elements', best(TAGS)), ('pydicom loop, ten elements', best(TEN))]
        print(f'{len(first)} files once, {len(files)} with copies, {os.cpu_count()} cores, one process where nothing else is said')
        print(f"{'index_dicoms':58s} {ours:9.0f} files/s")
        for name, peer in peers:
            print(f'{name:58s} {peer:9.0f} files/s   index_dicoms is {ours/peer:.1f} times as fast')
        one = rate(lambda: index_dicoms(folder, workers=1), len(files))
        two = rate(lambda: index_dicoms(folder, workers=2), len(files))
        print(f"{f'index_dicoms, {len(files)} files':58s} {one:9.0f} files/s")
        print(f"{'the same, two processes with their start':58s} {two:9.0f} files/s   ratio to one process {two/one:.1f}")
        path = write_index(index_dicoms(folder), Path(tmp)/'index.parquet')
        again = rate(lambda: index_dicoms(folder, workers=1, previous=path), len(files))
        print(f"{'a second run, nothing changed':58s} {again:9.0f} files/s   ratio to a first run {again/one:.1f}")
        for f in files[::100]: os.utime(f, ns=(1, 1))
        some = rate(lambda: index_dicoms(folder, workers=1, previous=path), len(files))
        print(f"{'a second run, one file in a hundred changed':58s} {some:9.0f} files/s   ratio to a first run {some/one:.1f}")
        if args.pixels:
            df = read_index(path)
            part = df[df.error==''].head(args.pixels).reset_index(drop=True)
            for n in (1, 2):
                explore = partial(explore_dicoms, part, pixels='all', workers=n, show=False)
                print(f"{f'explore_dicoms with the pixels of {len(part)} files, {n} process(es)':58s} "
                    f"{rate(explore, len(part), 1):9.0f} files/s")


if __name__=='__main__': main()
