"""From a DICOM file to 512 x 512 pixels in [0, 1]: this library beside fastai.medical, MONAI, torchxrayvision and plain pydicom.

    python benchmarks/dicom_speed.py [--repeats 9] [--only jpeg2000 explicit] [--skip-memory]

One image of 2560 x 2048 pixels and 12 bits (a simulated knee, enlarged, with the noise of a detector, so that lossless compression
gives 2 to 3 : 1) in each transfer syntax. Every reader makes a (512, 512) float32 image in [0, 1] from the file, which lies in the
page cache; one process, one thread; all readers of a file take turns, the median counts (on the clock; the processor's time is beside it,
which a busy machine disturbs less). What each does and leaves out:

- radiology_ai: `read_radiograph(path, size=(512, 512))`: modality step, window, inversion, padding, header values,
  geometry; area averages.
- pydicom: `dcmread`, `pixel_array` by the plugin that pydicom prefers (it is printed), minimum and maximum to [0, 1],
  OpenCV's area averages. No window, no inversion.
- fastai.medical: `Path.dcmread`, `hist_scaled` (its way to [0, 1]; `windowed` with the header's window as a second
  line), torch's area averages. No inversion; the rescale step only.
- MONAI: `LoadImage` with its PydicomReader (and ITKReader), `ScaleIntensity`, `Resize(mode='area')`. No window, no
  inversion, no rescale with the PydicomReader's pixel array beyond slope and intercept.
- torchxrayvision: `read_xray_dcm` ([-1024, 1024] by BitsStored, MONOCHROME1 inverted, no window),
  `XRayResizer(512)` by scikit-image (two-linear, without area averages) and, as a second line, by OpenCV.
- gdcm: decodes to stored integers only: no step to grey, no resizing.

A peer that is not installed is left out with a line; none of them is a dependency of the project.
Then: two processes; and the memory that one worker needs above its imports, up to the largest permitted file (50 million pixels).
"""
import os

for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS',
        'ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS', 'NUMEXPR_NUM_THREADS'):
    os.environ[k] = '1'
import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np

SIZE = (512, 512)
CASES = dict(explicit='uncompressed', jpeg_lossless='JPEG Lossless SV1 (.70)', jpegls='JPEG-LS (.80)',
    jpeg2000='JPEG 2000 lossless (.90)', rle='RLE (.5)', htj2k='HTJ2K lossless (.201)')
TARGETS = [('explicit', 'fastai.medical hist_scaled', 20), ('explicit', 'MONAI PydicomReader', 8),
    ('jpeg_lossless', 'pydicom', 6), ('jpeg2000', 'gdcm decode only', 4)]


# ---------------------------------------------------------------- files

def texture(rows: int=2560, cols: int=2048, noise: float=.0022) -> np.ndarray:
    "(rows, cols) pixels in [0, 1] that compress like a radiograph."
    from radiology_ai.core import rng
    from radiology_ai.phantom.knee import simulate_knee
    from radiology_ai.phantom.xray import expose
    small = expose(simulate_knee(3, size=768), rng(3, 'film')).pixels
    big = cv2.resize(small, (cols, rows), interpolation=cv2.INTER_CUBIC)
    return np.clip(.04 + .92*big + noise*rng(3, 'noise').standard_normal(big.shape, np.float32), 0, 1)


def write_files(folder: Path, only: list) -> dict:
    "The files by syntax; the bytes of each are printed."
    from radiology_ai.phantom.hospital import write_dicom
    image, out = texture(), {}
    for s in only:
        out[s] = folder/f'{s}.dcm'
        write_dicom(out[s], image, syntax=s, bits=12, window='linear', spacing=.15)
        n = out[s].stat().st_size
        print(f'{CASES[s]:26s} {n/2**20:6.2f} MiB, {2*image.size/n:.2f} : 1 of 16 bits, {1.5*image.size/n:.2f} : 1 of 12 bits')
    return out


# ---------------------------------------------------------------- readers: a function path -> (512, 512) float32

def area(a: np.ndarray) -> np.ndarray: return cv2.resize(a, SIZE[::-1], interpolation=cv2.INTER_AREA)


def ours():
    from radiology_ai.dicom.read import read_radiograph
    return lambda path: read_radiograph(path, size=SIZE).pixels


def plain_pydicom():
    import pydicom
    def read(path):
        a = pydicom.dcmread(path).pixel_array.astype(np.float32)
        lo, hi = float(a.min()), float(a.max())
        return area((a - lo)/((hi - lo) or 1))
    return read


def fastai_medical(way: str):
    import torch
    from fastai.medical.imaging import dcmread  # noqa: F401 (patches pathlib.Path)
    shrink = lambda t: torch.nn.functional.interpolate(t[None, None].float(), SIZE, mode='area')[0, 0].numpy()
    def read(path):
        ds = Path(path).dcmread()
        return shrink(ds.hist_scaled() if way=='hist_scaled'
            else ds.windowed(float(ds.WindowWidth), float(ds.WindowCenter)))
    return read


def monai(reader: str):
    from monai.transforms import Compose, LoadImage, Resize, ScaleIntensity
    if reader=='ITKReader': importlib.import_module('itk') # which the reader looks for
    steps = Compose([LoadImage(reader=reader, image_only=True, ensure_channel_first=True), ScaleIntensity(),
        Resize(SIZE, mode='area')])
    def read(path):
        a = steps(str(path))[0].numpy()
        return np.ascontiguousarray((a[..., 0] if a.ndim==3 else a).T, np.float32) # MONAI's first axis is x
    if reader!='ITKReader': return read
    steps = Compose([LoadImage(reader=reader, image_only=True, ensure_channel_first=True),
        lambda x: x[..., 0] if x.ndim==4 else x, ScaleIntensity(), Resize(SIZE, mode='area')])
    return lambda path: np.ascontiguousarray(steps(str(path))[0].numpy().T, np.float32)


def xrayvision(engine: str):
    import torchxrayvision as xrv
    shrink = xrv.datasets.XRayResizer(SIZE[0], engine=engine)
    return lambda path: (shrink(xrv.utils.read_xray_dcm(path)[None])[0]/1024 + 1)/2


def gdcm_decode():
    import gdcm
    def read(path):
        r = gdcm.ImageReader()
        r.SetFileName(str(path))
        if not r.Read(): raise ValueError('gdcm refuses the file')
        b = r.GetImage().GetBuffer()
        return np.frombuffer(b.encode('utf-8', 'surrogateescape') if isinstance(b, str) else b, np.uint16)
    return read


READERS = {'radiology_ai': ours, 'pydicom': plain_pydicom,
    'fastai.medical hist_scaled': lambda: fastai_medical('hist_scaled'),
    'fastai.medical windowed': lambda: fastai_medical('windowed'),
           'MONAI PydicomReader': lambda: monai('PydicomReader'),
           'MONAI ITKReader': lambda: monai('ITKReader'), 'torchxrayvision': lambda: xrayvision('skimage'),
           'torchxrayvision, OpenCV': lambda: xrayvision('cv2'),
           'gdcm decode only': gdcm_decode}


def make_readers() -> dict:
    "The readers that are installed."
    out = {}
    for name, make in READERS.items():
        try: out[name] = make()
        except ImportError as e: print(f'left out: {name} ({e})')
    return out


def one_thread():
    cv2.setNumThreads(1)
    try:
        import torch
    except ImportError: return
    torch.set_num_threads(1)


def plugin(path) -> str:
    "The plugin which pydicom takes first for a file."
    import pydicom
    uid = pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID
    if not uid.is_compressed: return 'numpy'
    return next(iter(pydicom.pixels.get_decoder(uid)._available), 'none') # the public list is sorted by name


# ---------------------------------------------------------------- one core

def compare(path: Path, readers: dict, repeats: int) -> dict:
    """Median milliseconds of each reader on a file, on the clock and of the processor, taking turns; NaN
    where a reader refuses the file."""
    times, likeness, wanted = {k: [] for k in readers}, {}, None
    for turn in range(repeats + 1): # the first turn warms up
        for name, read in readers.items():
            if times[name] is None: continue
            try:
                start, cpu = time.perf_counter(), time.process_time()
                a = read(path)
                spent = 1000*(time.perf_counter() - start), 1000*(time.process_time() - cpu)
            except Exception as e:
                times[name] = None
                print(f'    {name} refuses it: {type(e).__name__}: {str(e).splitlines()[0][:90] if str(e) else ""}')
                continue
            if turn: times[name].append(spent); continue
            if name=='radiology_ai': wanted = a
            if a.ndim==2: likeness[name] = check(name, a, wanted)
    return {k: (*(np.median(v, 0) if v else (np.nan, np.nan)), likeness.get(k, np.nan))
        for k, v in times.items()}


def check(name, a, wanted) -> float:
    "The correlation with our image; a reader that gives another shape or range is no fair peer."
    assert a.shape==SIZE and a.min()>=-1e-3 and a.max()<=1.001, f'{name}: {a.shape} in [{a.min()}, {a.max()}]'
    return float(np.corrcoef(a.ravel(), wanted.ravel())[0, 1])


def speed_table(files: dict, repeats: int) -> dict:
    "Prints milliseconds and ratios of every file and reader."
    readers, found = make_readers(), {}
    for s, path in files.items():
        print(f'\n{CASES[s]} (pydicom decodes with {plugin(path)})')
        result = compare(path, readers, repeats)
        mine, mine_cpu, _ = result['radiology_ai']
        for name, (ms, cpu, like) in result.items():
            found[s, name] = ms/mine
            if not np.isnan(ms):
                print(f'    {name:28s} {ms:8.1f} ms {1000/ms:8.1f} images/s {ms/mine:6.2f} x ours   '
                    f'processor {cpu:8.1f} ms {cpu/mine_cpu:6.2f} x ours'
                    + ('' if np.isnan(like) else f'   correlation {like:.4f}'))
    print('\nTargets on one core')
    for s, name, times in TARGETS:
        if not np.isnan(r := found.get((s, name), np.nan)):
            print(f'    {CASES[s]:26s} {r:6.2f} x {name} (target {times}): {"reached" if r>=times else "missed"}')
    return found


# ---------------------------------------------------------------- two processes

def _loop(name: str, path: str, n: int, rounds: int, gate, out):
    one_thread()
    warnings.simplefilter('ignore')
    read = READERS[name]()
    read(path)
    for k in range(rounds):
        gate.wait()
        start = time.time()
        for _ in range(n): read(path)
        out.put((k, start, time.time()))


def rate(name: str, path: Path, processes: int, n: int, rounds: int=3) -> float:
    "Images a second of several processes that start together: the median of some rounds."
    context = multiprocessing.get_context('spawn')
    gate, out = context.Barrier(processes), context.Queue()
    running = [context.Process(target=_loop, args=(name, str(path), n, rounds, gate, out))
        for _ in range(processes)]
    for p in running: p.start()
    spans = [out.get() for _ in range(rounds*processes)]
    for p in running: p.join()
    return float(np.median([processes*n/(max(e for j, _, e in spans if j==k)
        - min(b for j, b, _ in spans if j==k)) for k in range(rounds)]))


def two_processes(files: dict):
    print('\nTwo processes, images a second')
    for s, path in files.items():
        mine, theirs = (rate(name, path, 2, n) for name, n in (('radiology_ai', 40), ('pydicom', 10)))
        target = (f' (targets 45 /s, 6 x): {"reached" if mine>=45 and mine/theirs>=6 else "missed"}'
            if s=='jpeg_lossless' else '')
        print(f'    {CASES[s]:26s} ours {mine:8.1f}   pydicom {theirs:8.1f}   {mine/theirs:6.2f} x{target}')


# ---------------------------------------------------------------- memory

def peak() -> float:
    "MB at most in memory since the mark was reset."
    return next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines()
        if l.startswith('VmHWM'))/1024


def memory(path: str, size: int):
    "In a fresh process: MB above the imports while a file is read."
    one_thread()
    warnings.simplefilter('ignore')
    import radiology_ai.dicom.read as r
    from radiology_ai.phantom.hospital import write_dicom
    with tempfile.TemporaryDirectory() as folder:
        write_dicom(Path(folder)/'a', np.eye(64, dtype=np.float32), syntax='jpegls')
        r.read_radiograph(Path(folder)/'a', size=32)
    Path('/proc/self/clear_refs').write_text('5')
    floor, start = peak(), time.perf_counter()
    image = r.read_radiograph(path, size=size or None)
    print(json.dumps(dict(mb=peak() - floor, ms=1000*(time.perf_counter() - start), shape=image.shape,
        codec=image.codec)))


def memory_table(folder: Path, sides: list):
    "Prints what a worker needs for large files of every syntax."
    from radiology_ai.phantom.hospital import write_dicom
    print('\nMemory of one worker above its imports (target 512 MB)')
    for side in sides:
        image = cv2.resize(texture(), (side, side), interpolation=cv2.INTER_LINEAR)
        for s in [*CASES, 'big_endian', 'deflated', 'jpeg2000_lossy']:
            path = folder/'large'
            write_dicom(path, image, syntax=s, bits=16, window='linear', spacing=.1)
            for size in (512, 0):
                done = subprocess.run([sys.executable, __file__, '--memory', str(path), str(size)],
                    capture_output=True, text=True)
                if done.returncode:
                    print(f'    {side} x {side} {s:16s} size={size or None}: {done.stderr.strip().splitlines()[-1][:120]}')
                    continue
                m = json.loads(done.stdout.splitlines()[-1])
                print(f"    {side} x {side} of 16 bits, {s:16s} {path.stat().st_size/2**20:6.1f} MiB, "
                    f"size={str(size or None):5s} {m['mb']:7.0f} MB {m['ms']:8.0f} ms  "
                    f"{m['codec']}{'  ABOVE' if m['mb']>512 else ''}", flush=True)
            path.unlink()


def machine():
    cpu = next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines()
        if l.startswith('model name')), platform.processor())
    print(f'{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}')
    names = '''numpy opencv-python-headless pydicom imagecodecs python-gdcm fastai torch monai itk-core
torchxrayvision scikit-image pylibjpeg pylibjpeg-openjpeg'''.split()
    def version(n):
        try: return importlib.metadata.version(n)
        except importlib.metadata.PackageNotFoundError: return None
    print(', '.join(f'{n} {v}' for n in names if (v := version(n))) + '\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--only', nargs='*', default=list(CASES), help='transfer syntaxes')
    parser.add_argument('--sides', nargs='*', type=int, default=[4096, 7071], help='sides of the large files')
    parser.add_argument('--skip-memory', action='store_true')
    parser.add_argument('--skip-speed', action='store_true')
    parser.add_argument('--memory', nargs=2, help='used by the script itself: file, size')
    args = parser.parse_args()
    if args.memory: return memory(args.memory[0], int(args.memory[1]))
    warnings.simplefilter('ignore')
    one_thread()
    machine()
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else None) as folder:
        if not args.skip_speed:
            files = write_files(Path(folder), args.only)
            speed_table(files, args.repeats)
            two_processes(files)
        if not args.skip_memory: memory_table(Path(folder), args.sides)


if __name__=='__main__': main()
