"""The image store survives what happens in hospitals: kills, crashing decoders, full disks, locked folders,
copies, lost cluster workers."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from radiology_ai.core import DicomError, Radiograph, StoreError, rng
from radiology_ai.phantom.chest import simulate_chest
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess.recipe import Preprocess, Source, prepare, recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore

ROOT = Path(__file__).parents[1]


class Killer(Preprocess):
    "A recipe that ends its process on images of one size, as a native decoder may on a damaged file."
    def __call__(self, r):
        if r.shape==(33, 44): os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(r)


class Slow(Preprocess):
    "A recipe that takes its time."
    def __call__(self, r):
        time.sleep(.05)
        return super().__call__(r)


@pytest.fixture
def pictures(tmp_path):
    "Forty PNG files; two of them are those of which `Killer` dies, one is no image."
    import cv2
    folder = tmp_path/'pictures'
    folder.mkdir()
    gen = np.random.default_rng(0)
    for i in range(40):
        cv2.imwrite(str(folder/f'{i:02d}.png'), gen.integers(0, 255, (33, 44) if i in (11, 30) else (40, 50),
            dtype=np.uint8))
    (folder/'07.png').write_text('a letter')
    return folder


def same(a: Path, b: Path):
    "Do two stores hold the same bytes?"
    files = sorted(f.relative_to(a) for f in a.rglob('*') if f.is_file())
    assert files==sorted(f.relative_to(b) for f in b.rglob('*') if f.is_file())
    for f in files: assert (a/f).read_bytes()==(b/f).read_bytes(), f


def test_a_crashing_decoder_ends_only_its_file(pictures, tmp_path):
    store = preprocess_folder(pictures, tmp_path/'store', Killer(size=16), workers=2, show=False)
    assert len(store)==37
    causes = dict(zip((Path(p).name for p in store.errors.path), store.errors.cause))
    assert set(causes)=={'07.png', '11.png', '30.png'}
    assert 'crashed' in causes['11.png'] and 'crashed' in causes['30.png'] and 'crashed' not in causes[
        '07.png']
    assert not list((tmp_path/'store').rglob('*.now'))


def test_a_run_that_a_file_killed_resumes_without_it(pictures, tmp_path):
    code = ("import sys; sys.path[:0]=[{tests!r}, {root!r}]\nfrom test_store import *\n"
            "if __name__=='__main__': print(len(preprocess_folder({src!r}, {out!r}, Killer(size=16), workers=1, show=False)))")
    code = code.format(tests=str(Path(__file__).parent), root=str(Path(__file__).parents[1]),
        src=str(pictures), out=str(tmp_path/'store'))
    script = tmp_path/'go.py'
    script.write_text(code)
    runs = [subprocess.run([sys.executable, script], capture_output=True, text=True) for _ in range(3)]
    assert [r.returncode for r in runs]==[-signal.SIGKILL, -signal.SIGKILL, 0], runs[-1].stderr
    assert runs[-1].stdout.strip()=='37'


def started(src, out, workers=1, r="recipe('knee', size=64)"):
    "A process that writes a store, as far as its imports."
    code = (f"import sys; sys.path[:0] = {[str(ROOT/'tests'), str(ROOT)]!r}\nfrom test_store import *\nif __name__=='__main__':\n"
            f"    print('go', flush=True)\n    preprocess_folder({str(src)!r}, {str(out)!r}, {r}, "
            f"workers={workers}, show=False, shard_size=4)\n")
    file = Path(out).with_suffix('.py')
    file.write_text(code)
    process = subprocess.Popen([sys.executable, file], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()=='go\n'
    return process


def shards(out) -> int: return len(list(Path(out).glob('shards/0*.json')))


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
def test_killed_five_times_is_the_same_store(hospital, tmp_path, workers):
    gen, left = np.random.default_rng(workers), []
    for _ in range(5):
        have, process = shards(tmp_path/'store'), started(hospital/'dicom', tmp_path/'store', workers)
        while process.poll() is None and shards(tmp_path/'store')<=have:
            time.sleep(.002) # each run gets somewhere, and is then killed at any moment
        time.sleep(gen.uniform(0, .05))
        process.kill()
        process.wait()
        left.append((tmp_path/'store/index.parquet').exists())
    assert sum(left)<=1, 'the runs ended before they were killed'
    killed = preprocess_folder(hospital/'dicom', tmp_path/'store', recipe('knee', size=64), workers=1,
        show=False)
    preprocess_folder(hospital/'dicom', tmp_path/'whole', recipe('knee', size=64), workers=2, show=False,
        shard_size=4)
    assert len(killed)>50 and not len(killed.verify())
    same(tmp_path/'store', tmp_path/'whole')


@pytest.mark.slow
def test_two_files_of_a_shard_that_kill_their_process(pictures, tmp_path):
    shutil.copy(pictures/'11.png', pictures/'12.png')
    for _ in range(6):
        process = started(pictures, tmp_path/'store', r='Killer(size=16)')
        if process.wait()==0: break
    assert process.returncode==0
    store = ImageStore(tmp_path/'store')
    assert len(store)==36 and set(Path(p).name for p in store.errors.path)=={'07.png', '11.png', '12.png',
        '30.png'}


def test_two_runs_into_one_store(pictures, tmp_path):
    first = started(pictures, tmp_path/'store', r='Slow(size=16)')
    while first.poll() is None and not shards(tmp_path/'store'): time.sleep(.01)
    assert first.poll() is None
    with pytest.raises(StoreError, match='Another run is writing'):
        preprocess_folder(pictures, tmp_path/'store', Slow(size=16), workers=1, shard_size=4)
    assert first.wait()==0
    store = preprocess_folder(pictures, tmp_path/'store', Slow(size=16), workers=1)
    assert len(store)==39 and not len(store.verify())


def test_a_full_disk(pictures, tmp_path, monkeypatch):
    """The disk is full in the midst of the third shard, and again while the index is written; each time the
    same call resumes."""
    real, calls = os.fsync, [0]
    def full(fd, at):
        calls[0] += 1
        if calls[0]==at: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd)
    whole = preprocess_folder(pictures, tmp_path/'whole', recipe('plain', size=16), workers=1, shard_size=8)
    for at, done in ((1 + 2*4 + 2, 2), (3*4 + 2, 5)):
        monkeypatch.setattr(os, 'fsync', lambda fd, at=at: full(fd, at))
        calls[0] = 0
        with pytest.raises(StoreError, match='No space left on device.*resumes'):
            preprocess_folder(pictures, tmp_path/'store', recipe('plain', size=16), workers=1, shard_size=8)
        assert shards(tmp_path/'store')==done
        with pytest.raises(StoreError, match='incomplete'): ImageStore(tmp_path/'store')
    monkeypatch.undo()
    assert preprocess_folder(pictures, tmp_path/'store', recipe('plain', size=16),
        workers=1).fingerprint==whole.fingerprint
    same(tmp_path/'store', tmp_path/'whole')


@contextmanager
def small_disk(folder: Path, size: str):
    "A file system of that size at `folder`; skips where none may be mounted."
    folder.mkdir()
    done = (subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder],
        capture_output=True, text=True) if shutil.which('mount') else None)
    if done is None or done.returncode: pytest.skip('no file system can be mounted here')
    try: yield folder
    finally: subprocess.run(['umount', folder], check=True)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_disk_that_is_really_full(pictures, tmp_path, workers):
    with small_disk(tmp_path/'disk', '200k') as disk:
        with pytest.raises(StoreError, match='cannot be written.*No space left'):
            preprocess_folder(pictures, disk/'store', recipe('plain', size=96), workers=workers, shard_size=4,
                show=False)
        assert 0<shards(disk/'store')<10
        shutil.copytree(disk/'store', tmp_path/'store')
    store = preprocess_folder(pictures, tmp_path/'store', recipe('plain', size=96), workers=1, show=False)
    assert len(store)==39 and not len(store.verify())


def test_copies_are_stored_once(hospital, tmp_path):
    truth = pd.read_csv(hospital/'dicom/truth.csv', keep_default_na=False)
    first = hospital/'dicom'/truth[truth.broken==''].path.iloc[0]
    for name in ('a.dcm', 'b.dcm'): shutil.copy(first, tmp_path/name)
    store = preprocess_folder([tmp_path/'a.dcm', tmp_path/'b.dcm'], tmp_path/'store',
        recipe('plain', size=32), workers=1, show=False)
    assert len(store)==1 and 'copy of another file' in store.errors.cause.iloc[0]


def test_a_damaged_store_says_so(pictures, tmp_path):
    preprocess_folder(pictures, tmp_path/'store', recipe('plain', size=16), workers=1, show=False)
    (tmp_path/'store/index.parquet').write_bytes(b'nonsense')
    with pytest.raises(StoreError, match='damaged'): ImageStore(tmp_path/'store')


@contextmanager
def a_user():
    "Not root, who may write anywhere; the files of the test are in a folder that this user can read."
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = hasattr(os, 'geteuid') and os.geteuid()==0
        try: yield Path(folder), lambda: os.seteuid(65534) if root else None
        finally:
            if root: os.seteuid(0)
            for p in Path(folder).rglob('*'): p.chmod(0o755)


def test_a_folder_that_cannot_be_written(pictures):
    with a_user() as (folder, become):
        shutil.copytree(pictures, folder/'pictures')
        whole = preprocess_folder(folder/'pictures', folder/'store', recipe('plain', size=16), workers=1)
        (folder/'locked').mkdir()
        for p in (folder/'store').rglob('*'):
            p.chmod(0o644) # its owner lets others read the tables of files, too
        for p in (folder/'locked', folder/'store', folder/'store/shards'): p.chmod(0o555)
        become()
        with pytest.raises(StoreError, match='cannot be written.*Permission denied'):
            preprocess_folder(folder/'pictures', folder/'locked/store', 'plain')
        # whole: nothing is written
        again = preprocess_folder(folder/'pictures', folder/'store', recipe('plain', size=16))
        assert again.fingerprint==whole.fingerprint and not len(again.verify())
        with pytest.raises(StoreError, match='cannot be written'): again.to_png(folder/'locked/png')


@pytest.mark.slow
def test_loader_workers_share_the_store(pictures, tmp_path):
    "A store goes to the processes of a DataLoader and gives the same images there."
    from torch.utils.data import DataLoader
    store = preprocess_folder(pictures, tmp_path/'store', recipe('plain', size=16), workers=1, show=False)
    there = np.concatenate([b.numpy() for b in DataLoader(store, batch_size=8, num_workers=2,
        multiprocessing_context='spawn')])
    assert (there==np.stack(list(store))).all()


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker(hospital, cluster, tmp_path):
    """One of two workers is killed in the middle: nothing is lost, nothing comes twice, the bytes are those
    of one process."""
    address, workers = cluster
    alive = []
    def kill():
        while shards(tmp_path/'store')<3: time.sleep(.002)
        alive.append(not (tmp_path/'store/index.parquet').exists())
        workers[0].kill()
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    there = preprocess_folder(hospital/'dicom', tmp_path/'store', recipe('knee', size=64), scheduler=address,
        show=False, shard_size=4)
    killer.join(10)
    assert alive==[True] and workers[0].wait(10)==-signal.SIGKILL and workers[1].poll() is None
    preprocess_folder(hospital/'dicom', tmp_path/'here', recipe('knee', size=64), workers=1, show=False,
        shard_size=4)
    assert not there.index.image_id.duplicated().any() and not len(there.verify())
    same(tmp_path/'store', tmp_path/'here')


@pytest.mark.slow
def test_a_scheduler_that_dies(hospital, cluster, tmp_path):
    "A clear error, whole shards, and the same call resumes, here without a cluster."
    address, processes = cluster
    def kill():
        while shards(tmp_path/'store')<3: time.sleep(.002)
        processes[-1].kill()
    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(StoreError, match='cluster.*failed.*resumes'):
        preprocess_folder(hospital/'dicom', tmp_path/'store', recipe('knee', size=64), scheduler=address,
            show=False, shard_size=4)
    assert 3<=shards(tmp_path/'store')<20 and not (tmp_path/'store/index.parquet').exists()
    preprocess_folder(hospital/'dicom', tmp_path/'store', recipe('knee', size=64), workers=1, show=False)
    preprocess_folder(hospital/'dicom', tmp_path/'here', recipe('knee', size=64), workers=1, show=False,
        shard_size=4)
    same(tmp_path/'store', tmp_path/'here')


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='page faults are counted as on Linux')
def test_a_cluster_worker_keeps_its_memory():
    "Page faults of ten large arrays under the environment that Dask's nanny sets."
    code = ("import resource, numpy as np\nfrom radiology_ai.preprocess.scale import _keep_memory\nif {keep}: _keep_memory()\n"
            "def work(): return float(np.full(4_000_000, 2, np.float32).max())\nwork()\nbefore = "
            "resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "for _ in range(10): work()\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)")
    env = {**os.environ, 'MALLOC_TRIM_THRESHOLD_': '65536', 'PYTHONPATH': str(ROOT)}
    given, kept = (int(subprocess.run([sys.executable, '-c', code.format(keep=k)], env=env,
        capture_output=True, text=True, check=True).stdout) for k in (False, True))
    if given<100: pytest.skip('this C library keeps its memory anyway')
    assert kept<given/10


@pytest.mark.slow
@pytest.mark.parametrize('cluster', ['--nanny'], indirect=True)
def test_a_file_that_kills_a_cluster_worker(pictures, cluster, tmp_path):
    "Nannies replace the workers that die; the file is listed."
    (pictures/'30.png').unlink()
    store = preprocess_folder(pictures, tmp_path/'store', Killer(size=16), scheduler=cluster[0], show=False)
    assert len(store)==37 and dict(zip((Path(p).name for p in store.errors.path),
        store.errors.cause))['11.png']=='its decoder crashed'


def test_a_scheduler_that_is_not_there(pictures, tmp_path, monkeypatch):
    pytest.importorskip('distributed',
        reason='distributed is not installed: pip install radiology_ai[cluster]')
    from radiology_ai.preprocess import scale
    monkeypatch.setattr(scale._client.__wrapped__, '__defaults__', (1,))
    with pytest.raises(StoreError, match='does not answer'):
        preprocess_folder(pictures, tmp_path/'store', 'plain', scheduler='tcp://127.0.0.1:1')


# Bad input: a record with its reason or an error with its cause, never a crash, never a random crop

def marked(shape, where, value) -> np.ndarray:
    "Noise with one pixel of another value."
    p = np.random.default_rng(0).random(shape).astype(np.float32)
    p[where] = value
    return p


STRANGE = { # pixels, and whether they are stored (else they are an error)
    'black': (lambda: np.zeros((300, 260), np.float32), True),
    'white': (lambda: np.ones((300, 260), np.float32), True),
    'grey': (lambda: np.full((256, 256), .4, np.float32), True),
    'noise': (lambda: marked((301, 257), (0, 0), 0), True),
    'smallest': (lambda: marked((16, 16), (0, 0), 0), True),
    'too_small': (lambda: marked((15, 40), (0, 0), 0), False),
    'one_pixel': (lambda: np.zeros((1, 1), np.float32), False),
    'one_row': (lambda: marked((1, 900), (0, 0), 0), False),
    'long': (lambda: marked((100, 1500), (0, 0), 0), True),
    'flat_strip': (lambda: marked((8, 4000), (0, 0), 0), False),
    'strip': (lambda: marked((20, 6000), (0, 0), 0), False),
    'upright_strip': (lambda: marked((6000, 20), (0, 0), 0), False),
    'nan': (lambda: marked((1100, 1300), (500, 700), np.nan), False),
    'nan_in_the_last_row': (lambda: marked((1103, 1301), (1102, 4), np.nan), False),
    'nan_in_the_last_column': (lambda: marked((1103, 1301), (7, 1300), np.nan), False),
    'infinite': (lambda: marked((300, 260), (5, 5), np.inf), False),
    'chest': (lambda: expose(simulate_chest(3, size=300), rng(3)).pixels, True),
}
RECIPE_NAMES = ('knee', 'chest', 'plain')


def is_whole(affine, shape, size: int):
    "Does the square show the film to its four corners, along its longer side from edge to edge?"
    corners = Radiograph(np.zeros(shape, np.float32),
        affine=affine).from_stored([[0, 0], [shape[1], shape[0]]])
    lengths = np.ptp(corners, axis=0)
    assert corners.min()>-1e-6 and corners.max()<size + 1e-6 and abs(lengths.max() - size)<1e-6
    # the shorter side is rounded to a pixel
    assert np.allclose(lengths, size*np.array(shape[::-1])/max(shape), atol=.51)
    assert np.allclose(corners.mean(0), size/2, atol=.51)


@pytest.mark.parametrize('name', RECIPE_NAMES)
@pytest.mark.parametrize('kind', STRANGE)
def test_a_recipe_on_strange_pixels(kind, name):
    pixels, stored = STRANGE[kind]
    r = Radiograph(pixels(), (.9, .9) if kind=='chest' else None, path=f'{kind}.dcm')
    if not stored:
        with pytest.raises(DicomError) as e: recipe(name, size=64)(r)
        assert e.value.cause and e.value.remedy and kind in str(e.value)
        return
    out = recipe(name, size=64)(r)
    assert out.shape==(64, 64) and np.isfinite(
        out.pixels).all() and 0<=out.pixels.min() and out.pixels.max()<=1
    is_whole(out.affine, r.shape, 64)
    if name=='knee': assert out.tags['knee_found'] is False and 'no knee' in out.tags['reason']
    if name=='knee' and min(r.shape)>=16: # whose laterality no joint confirms
        left = replace(r, tags=r.tags | {'ImageLaterality': 'L'})
        seen = recipe(name, size=64)(left)
        assert seen.tags['side']=='L' and not seen.tags['flipped'] and np.array_equal(seen.pixels, out.pixels)
    if name!='plain' and kind in ('black', 'white', 'grey', 'smallest', 'long'): assert out.tags['reason']
    if kind=='black': assert out.pixels.max()<.5/255


def test_a_folder_of_strange_pictures(tmp_path):
    import cv2
    folder = tmp_path/'strange'
    folder.mkdir()
    stored, refused = set(), set()
    for kind, (pixels, good) in STRANGE.items():
        p = pixels()
        if np.isfinite(p).all(): cv2.imwrite(str(folder/f'{kind}.png'), np.rint(p*65535).astype(np.uint16))
        else: cv2.imwrite(str(folder/f'{kind}.tiff'), p) # of float32, which no reader of radiographs takes
        (stored if good else refused).add(kind)
    for name in RECIPE_NAMES:
        store = preprocess_folder(folder, tmp_path/name, recipe(name, size=64), workers=1, show=False)
        assert {Path(p).stem for p in store.index.path}==stored and {Path(p).stem
            for p in store.errors.path}==refused
        assert (store.errors.cause!='').all() and (store.errors.remedy!='').all()
        assert not len(store.verify())
        for row in store.index.itertuples():
            shape = STRANGE[Path(row.path).stem][0]().shape
            is_whole(np.array(row.affine).reshape(3, 3), shape, 64)
        if name=='knee':
            assert not store.index.knee_found.any() and store.index.reason.str.contains('no knee').all()


def test_a_crop_is_only_made_around_a_knee(hospital):
    """Each film of the hospital by the knee recipe: a box of its millimetres where a knee was found, else the
    whole."""
    truth = pd.read_csv(hospital/'dicom/truth.csv', keep_default_na=False)
    found = 0
    for path in truth[truth.broken==''].path:
        image, told, _ = prepare(Source(str(hospital/'dicom'/path)), recipe('knee', size=64))
        records = told if isinstance(told, list) else [told] # of two knees on a film each is one
        assert image.shape==(64, 64) if len(records)==1 else image.shape==(2, 64, 64)
        assert image.dtype==np.uint8
        for record in records:
            if record['knee_found']: found += 1
            else: is_whole(np.array(record['affine']).reshape(3, 3), (record['Rows'], record['Columns']), 64)
            assert bool(record['reason'])>=(not record['knee_found'])
    assert found>30


def test_a_store_of_an_older_recipe(pictures, tmp_path):
    preprocess_folder(pictures, tmp_path/'store', recipe('plain', size=16), workers=1, show=False)
    file = tmp_path/'store/recipe.json'
    d = json.loads(file.read_text())
    d['recipe'] = {k: v for k, v in d['recipe'].items() if k!='background'} | {'version': 1}
    file.write_text(json.dumps(d))
    with pytest.raises(StoreError, match='version 1.*Preprocess the files again'):
        ImageStore(tmp_path/'store')
    with pytest.raises(StoreError, match='version 1.*Preprocess the files again'):
        preprocess_folder(pictures, tmp_path/'store', recipe('plain', size=16), workers=1, show=False)
