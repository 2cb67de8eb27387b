"""The image store survives what happens in hospitals: kills, crashing decoders, full folders, copies."""
import os, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from radiology_ai.core import StoreError
from radiology_ai.preprocess.store import ImageStore, Preprocess, preprocess_folder, recipe


class Killer(Preprocess):
    "A recipe that ends its process on images of one size, as a native decoder may on a damaged file."
    def __call__(self, r):
        if r.shape==(33, 44): os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(r)


@pytest.fixture
def pictures(tmp_path):
    "Forty PNG files; two of them are those of which `Killer` dies, one is no image."
    import cv2
    folder = tmp_path/'pictures'
    folder.mkdir()
    gen = np.random.default_rng(0)
    for i in range(40): cv2.imwrite(str(folder/f'{i:02d}.png'), gen.integers(0, 255, (33, 44) if i in (11, 30) else (40, 50), dtype=np.uint8))
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
    assert 'crashed' in causes['11.png'] and 'crashed' in causes['30.png'] and 'crashed' not in causes['07.png']
    assert not list((tmp_path/'store').rglob('*.now'))


def test_a_run_that_a_file_killed_resumes_without_it(pictures, tmp_path):
    code = ("import sys; sys.path[:0]=[{tests!r}, {root!r}]\nfrom test_store import *\n"
            "if __name__=='__main__': print(len(preprocess_folder({src!r}, {out!r}, Killer(size=16), workers=1, show=False)))")
    code = code.format(tests=str(Path(__file__).parent), root=str(Path(__file__).parents[1]), src=str(pictures), out=str(tmp_path/'store'))
    script = tmp_path/'go.py'
    script.write_text(code)
    runs = [subprocess.run([sys.executable, script], capture_output=True, text=True) for _ in range(3)]
    assert [r.returncode for r in runs]==[-signal.SIGKILL, -signal.SIGKILL, 0], runs[-1].stderr
    assert runs[-1].stdout.strip()=='37'


def test_killed_five_times_is_the_same_store(hospital, tmp_path):
    words = [sys.executable, '-c', f"from radiology_ai.preprocess.store import *; preprocess_folder({str(hospital/'dicom')!r}, {str(tmp_path/'store')!r}, recipe('plain', size=64), workers=1, show=False)"]
    for _ in range(5):
        have = len(list((tmp_path/'store').rglob('*.npy')))
        process = subprocess.Popen(words, stderr=subprocess.PIPE)
        while process.poll() is None and len(list((tmp_path/'store').rglob('*.npy')))<=have: time.sleep(.01)
        process.kill()
        process.wait()
    for f in tmp_path.glob('store/**/.*'): f.unlink()   # what was being written
    killed = preprocess_folder(hospital/'dicom', tmp_path/'store', recipe('plain', size=64), workers=1, show=False)
    preprocess_folder(hospital/'dicom', tmp_path/'whole', recipe('plain', size=64), workers=2, show=False)
    assert len(killed)>50
    same(tmp_path/'store', tmp_path/'whole')


def test_copies_are_stored_once(hospital, tmp_path):
    truth = pd.read_csv(hospital/'dicom/truth.csv', keep_default_na=False)
    first = hospital/'dicom'/truth[truth.broken==''].path.iloc[0]
    for name in ('a.dcm', 'b.dcm'): shutil.copy(first, tmp_path/name)
    store = preprocess_folder([tmp_path/'a.dcm', tmp_path/'b.dcm'], tmp_path/'store', recipe('plain', size=32), workers=1, show=False)
    assert len(store)==1 and 'copy of a.dcm' in store.errors.cause.iloc[0]


def test_a_damaged_store_says_so(pictures, tmp_path):
    preprocess_folder(pictures, tmp_path/'store', recipe('plain', size=16), workers=1, show=False)
    (tmp_path/'store/index.parquet').write_bytes(b'nonsense')
    with pytest.raises(StoreError, match='damaged'): ImageStore(tmp_path/'store')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()==0, reason='root may write anywhere')
def test_a_folder_that_cannot_be_written(pictures, tmp_path):
    (tmp_path/'locked').mkdir(mode=0o500)
    with pytest.raises(StoreError, match='cannot be written'): preprocess_folder(pictures, tmp_path/'locked/store', 'plain')


def test_loader_workers_share_the_store(pictures, tmp_path):
    "A store goes to the processes of a DataLoader and gives the same images there."
    from torch.utils.data import DataLoader
    store = preprocess_folder(pictures, tmp_path/'store', recipe('plain', size=16), workers=1, show=False)
    there = np.concatenate([b.numpy() for b in DataLoader(store, batch_size=8, num_workers=2, multiprocessing_context='spawn')])
    assert (there==np.stack(list(store))).all()
