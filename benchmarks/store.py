"""The image store: reading at random beside PNG files, two worker processes beside one, and what a recipe costs beside the decoding.

    python benchmarks/store.py [--repeats 9] [--images 600] [--files 480] [--skip-scale]

Warm page cache, one thread a process. The three parts:
1. one 5-megapixel film (2560 x 2048, 12 bits, a simulated knee with the noise of a detector) in JPEG Lossless: the
   decoder alone (stored integers), `read_radiograph` (grey values in [0, 1]), and `prepare` (reading, locating the
   knee, finding the exposed field, crop, window, CLAHE, 512 px, record, hash of the file); all take turns, the
   median counts;
2. random images of 512 x 512 copied into a batch: from the store, and the same images from PNG files by OpenCV and
   by Pillow (zlib's usual level);
3. `preprocess_folder` over copies of that film (copies are prepared like any file, and listed at the end): one
   process, two, and two workers of a local Dask cluster if it is installed. The start of the processes is included;
   the images a second without it come from the time between the first shard and the last. The writer's own
   processor time (with Dask that of the scheduler too, which runs in the same process here) bounds what one writer
   can take from many workers.
"""
import os

for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[k] = '1'
import argparse
import importlib.util
import logging
import shutil
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from dicom_speed import texture
from PIL import Image

from radiology_ai.core import rng
from radiology_ai.dicom.file import open_dicom
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.dicom.stored import decode_stored
from radiology_ai.phantom.hospital import write_dicom
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess.recipe import Source, prepare, recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore, ShardWriter


def seconds(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def recipe_cost(film: Path, repeats: int):
    "The film decoded, read and prepared."
    r8, r16 = recipe('knee', size=512), recipe('knee', size=512, bits=16)
    def decoded(): # opening included
        ds = open_dicom(film)
        decode_stored(ds, path=film)
    ways = {'decoder alone': decoded, 'read_radiograph': lambda: read_radiograph(film),
        'prepare, knee recipe to 512 px': lambda: prepare(Source(str(film)), r8),
            'the same, 16 bits': lambda: prepare(Source(str(film)), r16)}
    assert prepare(Source(str(film)), r8)[1]['knee_found']
    times = {name: [] for name in ways}
    for _ in range(repeats):
        for name, f in ways.items(): times[name].append(seconds(f))
    first = np.median(times['decoder alone'])
    for name, t in times.items():
        print(f'{name:40s} {1e3*np.median(t):8.1f} ms   {np.median(t)/first:5.2f} x the decoder alone')


def made_store(folder: Path, n: int) -> ImageStore:
    "A store of `n` different knees of 512 px: 24 simulated films, and those moved and with other noise."
    r, results, gen = recipe('knee', size=512), [], rng(0, 'noise')
    for k in range(24):
        cv2.imwrite(str(folder/f'{k}.png'), np.rint(65535*expose(simulate_knee(k, size=768),
            rng(k)).pixels).astype(np.uint16))
    base = [prepare(Source(str(folder/f'{k}.png')), r) for k in range(24)]
    for k in range(n):
        image, record, key = base[k%24]
        image = np.clip(np.roll(image, gen.integers(-20, 20, 2), (0, 1)).astype(np.float32)
            + gen.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
        results.append((image, record | dict(image_id=str(k)), key))
    writer = ShardWriter(folder/'store', r)
    with writer.alone():
        writer.begin(n, 256)
        for k in range(0, n, 256):
            writer.open_shard(k//256)
            for i in range(k, min(k + 256, n)): writer.append(Source(str(i)), results[i])
            writer.seal()
        writer.finish(-(-n//256))
    return ImageStore(folder/'store')


def reading(folder: Path, n: int, repeats: int):
    "Random reads of the same images in three ways."
    store = made_store(folder, n)
    files = [str(folder/'png'/f) for f in store.to_png(folder/'png').file]
    order, batch = rng(0, 'order').integers(n, size=512), np.empty((32, 512, 512), np.uint8)
    print(f"{n} images of 512 x 512, a PNG has {np.mean([os.path.getsize(f) for f in files])/1024:.0f} KiB, an array 256 KiB")
    def run(read):
        for k, i in enumerate(order): batch[k%32] = read(i)
    ways = {'store': lambda i: store[i], 'PNG by OpenCV': lambda i: cv2.imread(files[i],
        cv2.IMREAD_UNCHANGED), 'PNG by Pillow': lambda i: np.asarray(Image.open(files[i]))}
    for f in ways.values(): run(f) # everything in the page cache, and checked
    assert all((ways['PNG by OpenCV'](i)==store[i]).all() for i in order[:20])
    rates = {name: len(order)/np.median([seconds(partial(run, f)) for _ in range(min(5, repeats))])
        for name, f in ways.items()}
    for name, v in rates.items():
        print(f'{name:40s} {v:10,.0f} images/s' + ('' if name=='store'
            else f'   the store is {rates["store"]/v:.1f} x as fast'))


def scale(folder: Path, film: Path, n: int):
    "The same folder with one process, two, and a cluster."
    (folder/'films').mkdir()
    for k in range(n): shutil.copy(film, folder/'films'/f'{k:05d}.dcm')
    def run(name, **how):
        out, own = folder/name.replace(' ', '_'), time.process_time()
        took = seconds(lambda: preprocess_folder(folder/'films', out, recipe('knee', size=512), show=False,
            shard_size=32, **how))
        own = time.process_time() - own
        times = sorted(p.stat().st_mtime for p in (out/'shards').glob('*.json'))
        rate = 32*(len(times) - 1)/(times[-1] - times[0])
        rates.setdefault('all', []).append((n/took, rate))
        (one, steady), whole = rates['all'][0], (out/'shards/00000.npy').read_bytes()
        assert whole==(folder/'one_process/shards/00000.npy').read_bytes()
        print(f'{name:40s} {n/took:8.1f} images/s with the start ({n/took/one:4.2f} x), {rate:8.1f} without '
            f'({rate/steady:4.2f} x); {1e3*own/n:5.2f} ms an image of the writer; load {os.getloadavg()[0]:.1f}', flush=True)
    rates = {}
    run('one process', workers=1)
    run('two processes', workers=2)
    if importlib.util.find_spec('distributed') is None:
        return print('distributed is not installed: no cluster')
    from distributed import LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
            silence_logs=logging.ERROR) as cluster:
        run('Dask, two workers', scheduler=cluster.scheduler_address)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--images', type=int, default=600)
    parser.add_argument('--files', type=int, default=480)
    parser.add_argument('--skip-scale', action='store_true')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    cv2.setNumThreads(1)
    print(f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}')
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        film = folder/'film.dcm'
        write_dicom(film, texture(), syntax='jpeg_lossless', bits=12, window='linear', spacing=.15)
        print(f'The film: {film.stat().st_size/2**20:.1f} MiB')
        recipe_cost(film, args.repeats)
        reading(folder, args.images, args.repeats)
        if not args.skip_scale: scale(folder, film, args.files)


if __name__=='__main__': main()
