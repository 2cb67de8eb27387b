"""The golden matrix: what the reader shows is, pixel for pixel, what DCMTK shows; and two decoders agree on the stored integers.

The expected hashes in golden.csv were written by benchmarks/golden_dcmtk.py; golden_cells.py says how pixels become whole numbers."""
import csv
import hashlib
import warnings
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from golden_cells import (
    ALL_SYNTAXES,
    Cell,
    digest,
    golden_cells,
    padding_of,
    quantise,
    rule_of,
    shown,
    stored_bits,
    stored_of,
    write_cell,
)
from pydicom.encaps import get_frame

from radiology_ai.core import DicomError
from radiology_ai.dicom.file import open_dicom
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.dicom.stored import decode_stored
from radiology_ai.phantom.hospital import SYNTAXES

with open(Path(__file__).parent/'golden.csv', newline='') as f:
    EXPECTED = {r['cell']: r for r in csv.DictReader(f)}
GROUPS = sorted({(c.modality, c.voi) for c in golden_cells()})


def read_numbers(cell, path) -> np.ndarray:
    "The cell as the reader shows it, in whole numbers; padding must be black."
    write_cell(cell, path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        if cell.colour: warnings.filterwarnings('ignore', message='.*a colour picture is turned to grey')
        pixels = read_radiograph(path, frame=cell.frame, voi=cell.view).pixels
    pad = padding_of(cell)
    assert (pixels[pad]==0).all(), 'padding is shown'
    a = quantise(pixels, *rule_of(cell))
    a[pad] = 0
    return a


def fault(cell, path) -> str:
    "What is wrong with a cell; '' if nothing."
    try: a = read_numbers(cell, path)
    except (DicomError, AssertionError, Warning) as e: return f'{cell.name}: {e}'
    return '' if digest(a)==EXPECTED[cell.name]['hash'] else f'{cell.name}: not the pixels of {cell.source}'


@pytest.mark.parametrize('group', GROUPS, ids=lambda g: f'{g[0]}-{g[1]}')
def test_pixels_are_those_of_dcmtk(group, tmp_path):
    faults = [w for c in golden_cells() if (c.modality, c.voi)==group and (w:=fault(c, tmp_path/'cell.dcm'))]
    assert not faults, f'{len(faults)} cells:\n' + '\n'.join(faults)


def test_the_table_belongs_to_the_cells():
    cells = golden_cells()
    assert len(cells)==len(EXPECTED)>=500 and {c.name for c in cells}==set(EXPECTED)
    assert all(EXPECTED[c.name]['rule']=='%s%d'%rule_of(c) for c in cells)
    assert sum(r['source'].startswith('dcmtk') for r in EXPECTED.values())>=500
    assert {c.syntax for c in cells}==set(ALL_SYNTAXES)
    assert len({r['hash'] for r in EXPECTED.values()})>250


def test_a_hash_sees_one_pixel(tmp_path):
    "One step of one pixel, or the window of one unit more, is not the expected picture."
    cell = Cell('MONOCHROME1', 'none', 'linear', False, '16/12', 'explicit', 'smooth')
    a = read_numbers(cell, tmp_path/'cell.dcm')
    assert digest(a)==EXPECTED[cell.name]['hash']
    a[5, 5] += 1
    assert digest(a)!=EXPECTED[cell.name]['hash']
    wider = pydicom.dcmread(tmp_path/'cell.dcm')
    wider.WindowWidth = float(wider.WindowWidth) + 1
    wider.save_as(tmp_path/'wider.dcm')
    b = quantise(read_radiograph(tmp_path/'wider.dcm').pixels, *rule_of(cell))
    assert digest(b)!=EXPECTED[cell.name]['hash']


def test_pictures_cover_the_range():
    "Black, white and much between stand in every picture with a window; stored values reach both ends."
    for cell in golden_cells():
        stored = stored_of(cell)[-1].astype(int)
        p = shown(cell, stored)[~padding_of(cell)]
        if cell.colour: assert p.min()<.1 and p.max()>.8; continue
        if (cell.voi not in ('wide', 'sigmoid') and cell.extra!='narrow' and cell.shape==(24, 20)
                and (cell.modality, cell.bits)!=('half', 8)):
            assert (p==0).any() and (p==1).any(), cell.name
        if cell.voi!='step': assert len(np.unique(p))>10, cell.name
        assert stored.min()<=cell.low + 60 and stored.max()>=cell.high - 61, cell.name


def second_decoder(path, cell) -> np.ndarray:
    """The stored integers by another decoder: pydicom's own for RLE, gdcm, OpenJPEG for HTJ2K (which gdcm
    does not know)."""
    ds,k = pydicom.dcmread(path),cell.frame or 0
    if cell.syntax=='htj2k':
        box = imagecodecs.jpeg2k_decode(get_frame(ds.PixelData, k, number_of_frames=cell.frames))
    else:
        if ds.HighBit!=ds.BitsStored-1:
            # else gdcm cuts off JPEG Lossless at the wrong end
            ds.BitsStored,ds.HighBit = cell.alloc,cell.alloc-1
        decoder = pydicom.pixels.get_decoder(ds.file_meta.TransferSyntaxUID)
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='The number of bytes of compressed pixel data matches')
            box = decoder.as_array(ds, index=k, raw=True, correct_unused_bits=False,
                decoding_plugin='pydicom' if cell.syntax=='rle' else 'gdcm')[0]
    return stored_bits(cell, box)


@pytest.mark.parametrize('syntax', [s for s in ALL_SYNTAXES if SYNTAXES[s].is_encapsulated])
def test_two_decoders_agree(syntax, tmp_path):
    "The stored integers are those that were written, by imagecodecs and by another decoder."
    path,faults,n = tmp_path/'cell.dcm',[],0
    for cell in [c for c in golden_cells() if c.syntax==syntax and c.modality=='none'
            and c.voi in ('linear', 'none')]:
        truth = write_cell(cell, path)[cell.frame or 0]
        a,codec = decode_stored(open_dicom(path), cell.frame, path)
        assert codec.startswith('imagecodecs'), codec
        b,n = second_decoder(path, cell),n+1
        if a.dtype!=truth.dtype or not np.array_equal(a, truth): faults.append(f'{cell.name}: the reader')
        if not np.array_equal(b, truth): faults.append(f'{cell.name}: the second decoder')
    assert n>=32 and not faults, '\n'.join(faults)


@pytest.mark.parametrize('syntax', [s for s in ALL_SYNTAXES if SYNTAXES[s].is_encapsulated])
def test_verify_runs_two_decoders(syntax, tmp_path):
    "`verify=True` gives the same pixels and names two codecs."
    cells = [c for c in golden_cells() if c.syntax==syntax and c.voi in ('linear', 'none')
        and c.extra in ('smooth', 'frames', 'masked', 'overlay bits', 'planes 0')]
    for cell in cells:
        write_cell(cell, tmp_path/'cell.dcm')
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='.*a colour picture is turned to grey')
            a,b = (read_radiograph(tmp_path/'cell.dcm', frame=cell.frame, verify=v) for v in (False, True))
        assert np.array_equal(a.pixels, b.pixels), cell.name
        assert ' + ' in b.codec, f'{cell.name}: {b.codec}'


# ---- known answers in real files ----

@pytest.mark.parametrize('name,n', [('RG3', 5), ('RG2', 3)])
def test_lossless_copies_decode_alike(real_data, name, n):
    "The lossless copies of one radiograph have one sha256 of stored pixels, that of the manifest."
    with open(real_data/'dicom'/'manifest.csv', newline='') as f:
        rows = [r for r in csv.DictReader(f) if r['path'].startswith(name)]
    lossless = [r for r in rows if not any(k in r['path'] for k in ('lossy', 'near', 'extended'))]
    assert len(lossless)==n
    found = set()
    for r in lossless:
        path = real_data/'dicom'/r['path']
        stored,_ = decode_stored(open_dicom(path), path=path)
        found.add(hashlib.sha256(np.ascontiguousarray(stored, '<u2').tobytes()).hexdigest())
    assert found=={r['sha256'] for r in lossless} and len(found)==1


def test_bad_huffman_files_are_refused(real_data):
    "A 12-bit JPEG whose scan header is wrong gives an error that says so."
    files = sorted((real_data/'dicom').glob('*_badhuff*'))
    assert len(files)>=2
    for path in files:
        with pytest.raises(DicomError) as e: read_radiograph(path)
        assert 'the JPEG scan header selects coefficients' in e.value.cause and e.value.remedy
        with pytest.raises(DicomError): decode_stored(open_dicom(path), path=path)
