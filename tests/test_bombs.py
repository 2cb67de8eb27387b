"""Small files that ask for gigabytes are refused before the memory is taken, each in a fresh process whose
memory is measured."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import fuzz_dicom

BOMBS = fuzz_dicom.bombs()
GIGABYTES = [k for k in BOMBS if 'deflated' in k]


def refused(path, name):
    r = fuzz_dicom.fresh(path)
    assert r['said']=='refused', f"{name}: {r['said']}: {r['cause']}"
    assert Path(path).name in r['cause'], f"{name}: the message does not name the file: {r['cause']}"
    assert r['mb']<64 and r['index_mb']<64, f"{name}: {r['mb']:.0f} MB read, {r['index_mb']:.0f} MB with the index"
    # a guard against hangs: benchmarks measure the time
    assert r['ms']<5000 and r['index_ms']<5000, f"{name}: {r['ms']:.0f} ms"
    return r


@pytest.mark.parametrize('name', BOMBS)
def test_refused(name, tmp_path):
    path = tmp_path/'bomb.dcm'
    path.write_bytes(BOMBS[name])
    assert path.stat().st_size<12*2**20
    refused(path, name)


@pytest.mark.parametrize('name', GIGABYTES)
def test_the_bomb_is_one(name):
    "It really inflates to a gigabyte or more."
    import zlib
    data = BOMBS[name]
    z, size, rest = zlib.decompressobj(-15), 0, data[144 + int.from_bytes(data[140:144], 'little'):]
    while rest and size<2**30:
        size += len(z.decompress(rest, 2**24))
        rest = z.unconsumed_tail
    assert size>=2**30


def test_real_bombs(real_data):
    "A real file that declares 46341 x 46341 pixels, where the folder has one."
    import pydicom
    found = 0
    for path in sorted((real_data/'dicom_edge').glob('*.dcm')):
        ds = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=['Rows', 'Columns'])
        if int(ds.get('Rows') or 0)*int(ds.get('Columns') or 0)<=50_000_000: continue
        refused(path, path.name)
        found += 1
    if not found: pytest.skip('no file in dicom_edge declares more than 50 million pixels')


def test_the_measure_sees_memory(tmp_path):
    "An honest file of 16 megapixels is read, and its memory shows."
    import numpy as np

    from radiology_ai.phantom.hospital import write_dicom
    path = tmp_path/'large.dcm'
    write_dicom(path, np.zeros((4096, 4096), np.float32), bits=16, window=None)
    r = fuzz_dicom.fresh(path)
    assert r['said']=='read' and r['mb']>64, r
