"""Damaged and hostile files given to the reader: what it says, how long it takes, how much memory it needs.

    python benchmarks/fuzz_dicom.py --n 100000 --seed 0 --workers 2 [--seconds 900] [--findings FOLDER]
    python benchmarks/fuzz_dicom.py --one 4711 [--seed 0]      # makes one file again and reads it in this process
    python benchmarks/fuzz_dicom.py --files 100000 --seed 0    # files of a grammar (fuzz_grammar.py) through four commands
    python benchmarks/fuzz_dicom.py --file 4711 [--seed 0]     # one of these again
    python benchmarks/fuzz_dicom.py --bombs                    # small files that ask for gigabytes: time and memory of the refusal

File number i depends on nothing but the seed and i. Each is made from an intact file of some transfer syntax (`base_files`) by one
of `MUTATIONS` (every fifth by two), put on a RAM disk and given to `read_radiograph` (every fourth also with `size=`) and
`index_row` in worker processes that say which file they begin. Each file ends in one of these:

- the pixels of the intact file; other pixels (an uncompressed file can't know); or a `DicomError`, counted by cause;
- a *fault*: another exception, a crash of the process, more than 2 seconds, pixels that are no float32 in [0, 1] of the declared
  shape, or header text (the files belong to SECRET^NAME) in a message, warning, log or on stderr. One fault makes exit code 1.
- a compressed stream gave other integers than the intact one, without an error. Then an independent decoder (gdcm in a process of
  its own; pydicom for RLE and colour, OpenJPEG for HTJ2K) gets the same stream. It agrees: nobody can tell. It refuses or gives a third
  result: the reader is asked again with `verify=True`. What it still does not refuse is *silent garbage*, a fault; so is a PNG whose own
  checksum is wrong.
"""
import argparse
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import imagecodecs
import numpy as np
import pydicom
from PIL import Image
from pydicom.encaps import encapsulate

from radiology_ai.core import DicomError, rng
from radiology_ai.phantom.hospital import SYNTAXES, encode_frame, write_dicom

SECRET = ('SECRET', '^NAME')  # the marker in each header
HANG, KILL = 2., 20.          # seconds: a fault; the worker is ended
ROWS, COLS = 64, 56


# ---------------------------------------------------------------- intact files

@dataclass
class Base:
    "An intact file and where its elements are."
    name: str
    data: bytes                 # of a deflated file: with the data set inflated
    kind: str = 'dicom'         # or still
    syntax: str = ''            # a key of SYNTAXES
    implicit: bool = False
    big: bool = False
    body: int = 0               # where the data set begins
    elements: list = field(default_factory=list)  # (start, value start, end, tag, VR) of the top level
    pixels: int = 0             # where the value of the pixel data begins


def walk(data: bytes, p: int, implicit: bool, big: bool) -> list:
    "The elements of the top level from position `p`; sequences here have defined lengths."
    out, order = [], '>' if big else '<'
    while p + 8 <= len(data):
        g, e = struct.unpack_from(order + 'HH', data, p)
        vr = b'' if implicit else data[p+4:p+6]
        if implicit: v, n = p + 8, struct.unpack_from(order + 'I', data, p + 4)[0]
        elif vr in (b'OB', b'OW', b'SQ', b'UN', b'UT', b'UC', b'UR', b'OF', b'OL'):
            v, n = p + 12, struct.unpack_from(order + 'I', data, p + 8)[0]
        else: v, n = p + 8, struct.unpack_from(order + 'H', data, p + 6)[0]
        if n==0xFFFFFFFF:
            n = (len(data) - v if (g, e)==(0x7FE0, 0x10)
                else data.index(b'\xfe\xff\xdd\xe0\0\0\0\0', v) + 8 - v)
        out.append((p, v, v + n, g<<16|e, vr.decode('latin1')))
        p = v + n
    return out


def dicom_base(name: str, data: bytes, syntax: str) -> Base:
    "A base of the bytes of a DICOM file."
    body = 0
    if data[128:132]==b'DICM': body = 144 + struct.unpack_from('<I', data, 140)[0]
    if syntax=='deflated': data = data[:body] + zlib.decompress(data[body:], -15)
    implicit, big = syntax=='implicit', syntax=='big_endian'
    elements = walk(data, body, implicit, big)
    return Base(name, data, 'dicom', syntax, implicit, big, body, elements, elements[-1][1])


def film(seed: int=0) -> np.ndarray:
    "(ROWS, COLS) pixels in [0, 1]: a simulated knee."
    from radiology_ai.core import resize_array
    from radiology_ai.phantom.knee import simulate_knee
    from radiology_ai.phantom.xray import expose
    return np.clip(resize_array(expose(simulate_knee(seed, size=128), rng(seed, 'film')).pixels,
        (ROWS, COLS)), 0, 1)


_HEADER = dict(PatientName='SECRET^NAME', PatientID='SECRET', PatientBirthDate='19700101',
    StudyDescription='SECRET^NAME knee', InstitutionName='SECRET', OtherPatientNames='SECRET^NAME')


def written(tmp: Path, image: np.ndarray, **how) -> bytes:
    "The bytes that `write_dicom` writes."
    write_dicom(tmp, image, header=_HEADER | how.pop('header', {}), spacing=.2, **how)
    return tmp.read_bytes()


def reset(data: bytes, pixels: bytes, encapsulated: bool=False, drop=(), **changes) -> bytes:
    "A DICOM file with other pixel data and header values."
    ds = pydicom.dcmread(io.BytesIO(data))
    for k, v in changes.items():
        if k.endswith('Descriptor'): ds.add_new(k, 'US', v)
        else: setattr(ds, k, v)
    for k in drop:
        if k in ds: del ds[k]
    ds.add_new('PixelData', 'OB' if encapsulated or ds.BitsAllocated==8 else 'OW',
        pixels + b'\0'*(len(pixels)%2))
    if encapsulated: ds['PixelData'].is_undefined_length = True
    out = io.BytesIO()
    ds.save_as(out)
    return out.getvalue()


def grey_bases(tmp: Path, image: np.ndarray) -> list:
    "One-frame grey files: every transfer syntax with several kinds of windows, tables and signs."
    kinds = [dict(bits=12, window='linear'), dict(bits=16, window=None, photometric='MONOCHROME1'),
        dict(bits=10, window='lut'),
             dict(bits=14, window='sigmoid', rescale=(2, -512)), dict(bits=8, window='linear_exact'),
             dict(bits=12, rescale='lut', window=None),
             dict(bits=12, window='linear', signed=True)]
    out = []
    for n, syntax in enumerate(SYNTAXES):
        for k in range(3):
            how = dict(kinds[(3*n + k)%len(kinds)])
            if syntax in ('jpeg', 'jpeg12', 'jpeg2000_lossy', 'htj2k'): how.pop('signed', None)
            if syntax in ('jpeg', 'jpeg12'): how['rescale'] = None
            name = f'{syntax} ' + ' '.join(str(v) for v in how.values())
            out.append(dicom_base(name, written(tmp, image, syntax=syntax, **how), syntax))
    padded = written(tmp, image, syntax='explicit',
        header=dict(PixelPaddingValue=0, PixelPaddingRangeLimit=20))
    out.append(dicom_base('explicit padding', padded, 'explicit'))
    plain = written(tmp, image, syntax='implicit')
    return out + [dicom_base('implicit without preamble',
        plain[144 + struct.unpack_from('<I', plain, 140)[0]:], 'implicit')]


def odd_bases(tmp: Path, image: np.ndarray) -> list:
    "Several frames, colour, palettes."
    out, grey = [], written(tmp, image, bits=12)
    stored = pydicom.dcmread(io.BytesIO(grey)).pixel_array
    out.append(dicom_base('explicit 3 frames', reset(grey, stored.tobytes()*3, NumberOfFrames=3), 'explicit'))
    for s in ('jpegls', 'rle', 'jpeg_lossless', 'jpeg2000'):
        frame = encode_frame(stored, s, 12)
        data = written(tmp, image, bits=12, syntax=s)
        out.append(dicom_base(f'{s} 2 frames', reset(data, encapsulate([frame, frame]), True,
            NumberOfFrames=2), s))
        if s!='rle':
            out.append(dicom_base(f'{s} 4 fragments',
                reset(data, encapsulate([frame], fragments_per_frame=4), True), s))
    rgb = np.stack([image, image**2, 1 - image], -1)
    rgb = (255*rgb).astype(np.uint8)
    colour = dict(SamplesPerPixel=3, BitsAllocated=8, BitsStored=8, HighBit=7, PlanarConfiguration=0,
        drop=('WindowCenter', 'WindowWidth', 'PresentationLUTShape'))
    out.append(dicom_base('explicit RGB', reset(grey, rgb.tobytes(), PhotometricInterpretation='RGB',
        **colour), 'explicit'))
    planes = rgb.transpose(2, 0, 1).tobytes()
    out.append(dicom_base('big endian RGB planes',
        reset(written(tmp, image, bits=8, syntax='big_endian'), planes, PhotometricInterpretation='RGB',
        **colour | dict(PlanarConfiguration=1)), 'big_endian'))
    baseline = written(tmp, image, syntax='jpeg')
    out.append(dicom_base('jpeg YBR', reset(baseline, encapsulate([imagecodecs.jpeg8_encode(rgb, level=90)]),
        True, PhotometricInterpretation='YBR_FULL_422', **colour), 'jpeg'))
    data = written(tmp, image, syntax='jpeg2000', bits=8)
    out.append(dicom_base('jpeg2000 RGB', reset(data,
        encapsulate([imagecodecs.jpeg2k_encode(rgb, codecformat='j2k', reversible=True, mct=False)]), True,
        PhotometricInterpretation='RGB', **colour), 'jpeg2000'))
    ramp = np.arange(256, dtype='<u2')*257
    tables = {f'{c}PaletteColorLookupTable{k}': v for c in ('Red', 'Green', 'Blue')
        for k, v in (('Descriptor', [256, 0, 16]), ('Data', ramp.tobytes()))}
    out.append(dicom_base('palette', reset(grey, rgb[..., 0].tobytes(),
        PhotometricInterpretation='PALETTE COLOR', **colour | dict(SamplesPerPixel=1), **tables), 'explicit'))
    return out


def base_files() -> list:
    "All intact files."
    image = film()
    with tempfile.TemporaryDirectory() as folder:
        out = grey_bases(Path(folder)/'a', image) + odd_bases(Path(folder)/'a', image)
    g8, g16 = (255*image).astype(np.uint8), (65535*image).astype(np.uint16)
    rgb = np.stack([g8, g8//2, 255 - g8], -1)
    for name, a, form, how in (('png 8', g8, 'PNG', {}), ('png 16', g16, 'PNG', {}),
            ('png RGB', rgb, 'PNG', {}), ('jpeg', g8, 'JPEG', {}),
            ('jpeg RGB progressive', rgb, 'JPEG', dict(progressive=True)),
                               ('tiff 8', g8, 'TIFF', {}), ('tiff 16 deflate', g16, 'TIFF',
                               dict(compression='tiff_adobe_deflate')),
                               ('tiff lzw RGB', rgb, 'TIFF', dict(compression='tiff_lzw'))):
        buffer = io.BytesIO()
        Image.fromarray(a).save(buffer, form, **how)
        out.append(Base('still ' + name, buffer.getvalue(), 'still', form.lower(), pixels=buffer.tell()//3))
    return out


# ---------------------------------------------------------------- mutations: (base, generator, all bases) -> bytes

def _flip(data: bytes, gen, lo: int, hi: int) -> bytes:
    "One to eight bits or bytes between `lo` and `hi` changed."
    out = bytearray(data)
    for p in gen.integers(lo, max(lo + 1, hi), int(gen.integers(1, 9))):
        if p>=len(out): continue
        out[p] = (out[p] ^ 1<<int(gen.integers(8)) if gen.random()<.7
            else int(gen.choice([0, 1, 127, 128, 255, int(gen.integers(256))])))
    return bytes(out)


def bits_header(b, gen, bases):
    return _flip(b.data, gen, 0 if b.kind=='still' else max(0, b.body - 60), b.pixels)
def bits_pixels(b, gen, bases): return _flip(b.data, gen, b.pixels, len(b.data))
def bits_stream(b, gen, bases): return _flip(b.data, gen, b.pixels, min(b.pixels + 240, len(b.data)))
def bits_any(b, gen, bases): return _flip(b.data, gen, 0, len(b.data))


def truncate(b, gen, bases):
    "The end cut off, anywhere or near the end."
    return b.data[:int(gen.integers(len(b.data)))] if gen.random()<.6 else b.data[:-int(gen.integers(1, 64))]


def block(b, gen, bases):
    "A stretch overwritten with noise or one byte, taken out, or repeated."
    n, p = int(2**gen.uniform(0, 10)), int(gen.integers(len(b.data)))
    part, how = b.data[p:p + n], int(gen.integers(4))
    new = (gen.bytes(len(part)) if how==0 else bytes([int(gen.choice([0, 255]))])*len(part) if how==1 else b''
        if how==2 else part*int(gen.integers(2, 9)))
    return b.data[:p] + new + b.data[p + n:]


def splice(b, gen, bases):
    "The beginning of one file and the rest of another; or the pixel data of another."
    o = bases[int(gen.integers(len(bases)))]
    if gen.random()<.5 and b.elements and o.elements: return b.data[:b.pixels] + o.data[o.pixels:]
    return b.data[:int(gen.integers(len(b.data)))] + o.data[int(gen.integers(len(o.data))):]


def _element(b, gen): return b.elements[int(gen.integers(len(b.elements)))]


def length(b, gen, bases):
    "The length field of an element: huge, odd, zero, undefined."
    start, v, end, tag, vr = b.elements[-1] if gen.random()<.2 else _element(b, gen)
    wide = b.implicit or v - start==12
    n, order = end - v, 'big' if b.big else 'little'
    new = int(gen.choice([0, 1, n + 1, max(0, n - 1), n + 2, 2*n, 0x7FFFFFFF, 0xFFFFFFF0, 0xFFFFFFFE,
        0xFFFFFFFF, int(gen.integers(2**32)), int(gen.integers(2**16))]))
    size = 4 if wide else 2
    return b.data[:v - size] + (new%2**(8*size)).to_bytes(size, order) + b.data[v:]


def delete(b, gen, bases):
    "One to three elements left out."
    data = b.data
    for k in sorted({int(gen.integers(len(b.elements))) for _ in range(int(gen.integers(1, 4)))},
            reverse=True):
        start, _, end, *_ = b.elements[k]
        data = data[:start] + data[end:]
    return data


def duplicate(b, gen, bases):
    "An element told twice, beside itself or elsewhere."
    start, _, end, *_ = _element(b, gen)
    at = end if gen.random()<.5 else _element(b, gen)[0]
    return b.data[:at] + b.data[start:end]*int(gen.choice([1, 1, 2, 50])) + b.data[at:]


def swap(b, gen, bases):
    "Two elements in each other's place, whole or only their values."
    i, j = sorted(int(k) for k in gen.choice(len(b.elements), 2, replace=False))
    k = int(gen.integers(2)) # from the start, or from the value
    (s, e), (t, f) = (b.elements[i][k], b.elements[i][2]), (b.elements[j][k], b.elements[j][2])
    return b.data[:s] + b.data[t:f] + b.data[e:t] + b.data[s:e] + b.data[f:]


def value_type(b, gen, bases):
    "Another VR, or in an implicit file another tag."
    start, v, end, tag, vr = _element(b, gen)
    if b.implicit: return b.data[:start] + gen.bytes(4) + b.data[start + 4:]
    new = gen.choice(['OB', 'OW', 'SQ', 'UN', 'US', 'SS', 'DS', 'IS', 'LO', 'PN', 'UI', 'AT', 'FD', 'UT',
        'UV', 'XX', '\0\0', '\xff\xff'])
    return b.data[:start + 4] + str(new).encode('latin1') + b.data[start + 6:]


def syntax(b, gen, bases):
    "Another transfer syntax UID."
    at = b.data.find(b'\x02\0\x10\0UI', 132, max(b.body, 133))
    if at<0: return truncate(b, gen, bases)
    n = struct.unpack_from('<H', b.data, at + 6)[0]
    others = [*map(str, SYNTAXES.values()), '1.2.840.10008.1.2.4.81', '1.2.840.10008.1.2.4.202',
        '1.2.840.10008.1.2.4.203', '1.2.840.10008.1.2.4.100', '1.2.840.10008.1.2.4.110', '1.2.3', '', '9'*64]
    uid = str(gen.choice(others)).encode()
    uid += b'\0'*(len(uid)%2)
    meta = struct.unpack_from('<I', b.data, 140)[0] + len(uid) - n
    data = b.data[:140] + struct.pack('<I', meta) + b.data[144:at + 6] + struct.pack('<H',
        len(uid)) + uid + b.data[at + 8 + n:]
    return data


_WHOLE = {0x00280002:'samples', 0x00280006:'planar', 0x00280010:'rows', 0x00280011:'columns',
    0x00280100:'allocated', 0x00280101:'stored', 0x00280102:'high', 0x00280103:'sign', 0x00280120:'padding',
    0x00280121:'limit'}
_TEXTS = {0x00280008:'frames', 0x00281050:'center', 0x00281051:'width', 0x00281052:'intercept',
    0x00281053:'slope', 0x00280004:'photometric', 0x20500020:'shape', 0x00281056:'function',
    0x00181164:'spacing', 0x00280030:'spacing'}


def numbers(b, gen, bases):
    "One or two of the values that describe the pixels."
    hits = [e for e in b.elements if e[3] in _WHOLE or e[3] in _TEXTS]
    if not hits: return bits_any(b, gen, bases)
    data = b.data
    for k in sorted({int(gen.integers(len(hits))) for _ in range(int(gen.integers(1, 3)))}, reverse=True):
        start, v, end, tag, vr = hits[k]
        if tag in _WHOLE:
            n = int(gen.choice([0, 1, 2, 3, 4, 7, 8, 9, 11, 12, 15, 16, 17, 24, 31, 32, 33, 55, 57, 63, 64,
                65, 128, 255, 256, 1000, 4096, 8192, 32767, 32768, 65535, int(gen.integers(65536))]))
            new = struct.pack('>H' if b.big else '<H', n)
        else:
            new = str(gen.choice(['0', '-1', '1', '2', '3', '1000', '2147483647', '2147483648', '1e308',
                '-1e308', '1e-320', 'nan', 'inf', '1\\2', '', 'abc', '0.0000001', '9'*16, 'MONOCHROME1',
                'MONOCHROME2', 'RGB',
                        'PALETTE COLOR', 'YBR_FULL_422', 'YBR_FULL', 'YBR_ICT', 'CMYK', 'SECRET^NAME',
                        'INVERSE', 'SIGMOID', 'LINEAR_EXACT', '4095\\4095'])).encode()
        new += b' '*(len(new)%2)
        size = 4 if b.implicit or v - start==12 else 2
        data = data[:v - size] + len(new).to_bytes(size, 'big' if b.big else 'little') + new + data[end:]
    return data


def _items(data: bytes, p: int) -> list:
    "The items of encapsulated pixel data from position `p`, each with its header."
    out = []
    while data[p:p + 4]==b'\xfe\xff\0\xe0':
        n = struct.unpack_from('<I', data, p + 4)[0]
        out.append(data[p:p + 8 + n])
        p += 8 + n
    return out


def fragments(b, gen, bases):
    """The fragments of compressed pixel data: repeated, left out, exchanged, split, of other lengths; another
    offset table."""
    items = _items(b.data, b.pixels)
    if len(items)<2: return block(b, gen, bases)
    k, how, end = int(gen.integers(1, len(items))), int(gen.integers(7)), b'\xfe\xff\xdd\xe0\0\0\0\0'
    if how==0: items[k:k] = [items[k]]*int(gen.choice([1, 2, 1000]))
    elif how==1: del items[k]
    elif how==2: items[0], items[k] = items[k], items[0]
    elif how==3:
        cut = 2*int(gen.integers(0, max(1, len(items[k])//2 - 4)))
        v = items[k][8:]
        items[k:k + 1] = [b'\xfe\xff\0\xe0' + struct.pack('<I', len(o)) + o for o in (v[:cut], v[cut:])]
    elif how==4:
        items[k] = items[k][:4] + struct.pack('<I',
            int(gen.choice([0, 1, 0xFFFFFFFF, 0xFFFFFFF0, 0x7FFFFFFF,
            int(gen.integers(2**16))]))) + items[k][8:]
    elif how==5:
        table = struct.pack(f'<{(n := int(gen.choice([1, 2, 3, 1000])))}I',
            *(int(o) for o in gen.integers(0, gen.choice([64, 2**16, 2**32]), n)))
        items[0] = b'\xfe\xff\0\xe0' + struct.pack('<I', len(table)) + table
    else: end = gen.bytes(int(gen.integers(12)))
    return b.data[:b.pixels] + b''.join(items) + end


MUTATIONS = [bits_header, bits_header, bits_pixels, bits_stream, bits_stream, bits_any, truncate, block,
    splice, length, delete, duplicate, swap, value_type, syntax, numbers, numbers, fragments]
_STILL = [bits_header, bits_header, bits_pixels, bits_any, truncate, block, splice]


def mutated(bases: list, seed: int, i: int) -> tuple:
    "File number `i`: the base, the names of its mutations and its bytes."
    gen = rng(seed, 'fuzz', i)
    b = bases[int(gen.integers(len(bases)))]
    data, names = b.data, []
    for _ in range(1 + (gen.random()<.2)):
        kinds = _STILL if b.kind=='still' or names else MUTATIONS # the second one knows no positions
        m = kinds[int(gen.integers(len(kinds)))]
        now = (Base(b.name, data, 'still', b.syntax, b.implicit, b.big, b.body, [],
            min(b.pixels, len(data)//2)) if names else b)
        if len(data)<2: break
        data = m(now, gen, bases)
        names.append(m.__name__)
    if b.syntax=='deflated': data = _deflate(b, data, gen)
    return b, '+'.join(names), data


def _deflate(b, data, gen):
    "A deflated file again; every second one damaged behind the compression too."
    z = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = z.compress(data[b.body:]) + z.flush()
    if gen.random()<.5 and len(packed):
        packed = (_flip(packed, gen, 0, len(packed)) if gen.random()<.5
            else packed[:int(gen.integers(len(packed)))])
    return data[:b.body] + packed


def intact(b: Base) -> bytes:
    "The file of a base, unchanged."
    if b.syntax!='deflated': return b.data
    z = zlib.compressobj(1, zlib.DEFLATED, -15)
    return b.data[:b.body] + z.compress(b.data[b.body:]) + z.flush()


# ---------------------------------------------------------------- bombs

def element(tag: int, vr: str, value: bytes, length: int|None=None) -> bytes:
    "One explicit little endian element; `length` states another length than the value has."
    n = len(value) if length is None else length
    head = struct.pack('<HH', tag>>16, tag & 0xFFFF) + vr.encode()
    return head + (struct.pack('<HI', 0, n) if vr in ('OB', 'OW', 'SQ', 'UN', 'UT')
        else struct.pack('<H', n)) + value


def numbered(**values) -> bytes:
    "The elements that describe a picture: 2,048 x 2,048 pixels, 16 bits, unless told otherwise."
    v = dict(samples=1, photometric=b'MONOCHROME2 ', frames=None, rows=2048, cols=2048, allocated=16,
        stored=16, signed=0) | values
    us = lambda tag, n: element(tag, 'US', struct.pack('<H', n))
    frames = element(0x00280008, 'IS', v['frames']) if v['frames'] else b''
    return us(0x00280002, v['samples']) + element(0x00280004, 'CS',
        v['photometric']) + frames + us(0x00280010, v['rows']) + us(0x00280011, v['cols']) \
        + us(0x00280100, v['allocated']) + us(0x00280101, v['stored']) + us(0x00280102,
        v['stored'] - 1) + us(0x00280103, v['signed'])


def part10(syntax: str, body: bytes) -> bytes:
    "Preamble and file meta before a data set."
    uid = str(SYNTAXES[syntax]).encode()
    uid += b'\0'*(len(uid)%2)
    meta = element(0x00020002, 'UI', b'1.2.840.10008.5.1.4.1.1.1.1\0') + element(0x00020003, 'UI',
        b'2.25.1') + element(0x00020010, 'UI', uid)
    return b'\0'*128 + b'DICM' + element(0x00020000, 'UL', struct.pack('<I', len(meta))) + meta + body


def packed(*frames: bytes, table: bytes=b'') -> bytes:
    "Compressed pixel data: an offset table and one fragment a frame."
    item = lambda v: b'\xfe\xff\0\xe0' + struct.pack('<I', len(v)) + v
    return element(0x7FE00010, 'OB', item(table) + b''.join(item(f + b'\0'*(len(f)%2)) for f in frames)
        + b'\xfe\xff\xdd\xe0\0\0\0\0', 0xFFFFFFFF)


def deflated(start: bytes, zeros: int, end: bytes=b'') -> bytes:
    "`start`, then `zeros` zero bytes, then `end`, deflated: 1 MB for each gigabyte of zeros."
    z = zlib.compressobj(9, zlib.DEFLATED, -15)
    out, chunk = [z.compress(start)], bytes(2**24)
    for _ in range(zeros//2**24): out.append(z.compress(chunk))
    return b''.join(out) + z.compress(bytes(zeros%2**24)) + z.compress(end) + z.flush()


def declared(stream: bytes, marker: bytes, at: int, form: str) -> bytes:
    """A codestream whose own header declares 65,535 x 65,535 (`form`: how the two numbers are written, `at`
    bytes behind `marker`)."""
    p = stream.index(marker) + at
    return stream[:p] + struct.pack(form, 65535, 65535) + stream[p + struct.calcsize(form):]


def stream_bombs() -> dict:
    """Codestreams that declare 65,535 x 65,535 pixels: with a header that tells the same, and with one that
    tells 64 x 56."""
    small = (film()*4095).astype(np.uint16)
    streams = dict(jpeg_lossless=(b'\xff\xc3', 5, '>HH'), jpeg12=(b'\xff\xc1', 5, '>HH'),
        jpegls=(b'\xff\xf7', 5, '>HH'), jpeg2000=(b'\xff\x51', 6, '>II'), htj2k=(b'\xff\x51', 6, '>II'))
    out = {}
    for s, where in streams.items():
        stream = declared(encode_frame(small, s, 12), *where)
        if s in ('jpeg2000', 'htj2k'): # one tile of the whole size
            p = stream.index(b'\xff\x51') + 22
            stream = stream[:p] + struct.pack('>II', 65535, 65535) + stream[p + 8:]
        out[f'{s} stream of 65535 x 65535, header the same'] = part10(s,
            numbered(rows=65535, cols=65535, stored=12) + packed(stream))
        out[f'{s} stream of 65535 x 65535, header 64 x 56'] = part10(s,
            numbered(rows=ROWS, cols=COLS, stored=12) + packed(stream))
        out[f'{s} stream of 7001 x 7001 in 3 kB'] = part10(s,
            numbered(rows=7001, cols=7001, stored=12) + packed(_sized(encode_frame(small, s, 12), where, s)))
    return out


def _sized(stream, where, s, n=7001):
    "A stream that declares `n` x `n`, within the limit, but holds next to nothing."
    marker, at, form = where
    for p, f in [(at, form)] + ([(22, '>II')] if form=='>II' else []):
        q = stream.index(marker) + p
        stream = stream[:q] + struct.pack(f, n, n) + stream[q + struct.calcsize(f):]
    return stream


def rle_bombs() -> dict:
    "4 MB of runs that unpack to 256 MB where 8 MB are declared; and a segment that begins behind the end."
    run = b'\x81\xff'*2**20 # 2 MB: each pair of bytes makes 128
    head = struct.pack('<16I', 2, 64, 64 + len(run), *[0]*13)
    far = struct.pack('<16I', 2, 64, 0xFFFFFFF0, *[0]*13)
    return {'4 MB of RLE that unpack to 256 MB': part10('rle', numbered() + packed(head + run*2)),
            'RLE segments far behind the end': part10('rle', numbered() + packed(far + run[:4096])),
            'RLE of 15 segments of 4 MB': part10('rle',
            numbered() + packed(struct.pack('<16I', 15, *[64]*15) + run*2))}


def still_bombs() -> dict:
    "PNG and TIFF files of a few kB which declare or unpack to gigabytes."
    chunk = lambda kind, v: struct.pack('>I', len(v)) + kind + v + struct.pack('>I', zlib.crc32(kind + v))
    png = lambda w, h, bits, data: b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR',
        struct.pack('>IIBBBBB', w, h, bits, 0, 0, 0, 0)) + chunk(b'IDAT', data) + chunk(b'IEND', b'')
    z = zlib.compressobj(9)
    zeros = b''.join([z.compress(bytes(2**24)) for _ in range(16)]) + z.flush()
    entries = [(256, 4, 1, 60000), (257, 4, 1, 60000), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1),
        (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 60000), (279, 4, 1, 64)]
    tiff = lambda entries: b'II*\0' + struct.pack('<I', 72) + zlib.compress(bytes(4096), 9).ljust(64,
        b'\0') + struct.pack('<H', len(entries)) + b''.join(struct.pack('<HHII', *e)
        for e in entries) + bytes(4)
    text = chunk(b'zTXt', b'Comment\0\0' + zeros)
    good = png(8, 8, 8, zlib.compress(bytes(72)))
    return {'PNG of 60000 x 60000 pixels': png(60000, 60000, 16, zeros),
        'PNG of 2**31 - 1 rows': png(2**31 - 1, 2**31 - 1, 8, zlib.compress(b'')),
        'PNG whose text unpacks to 256 MB': good[:33] + text + good[33:],
            'TIFF of 60000 x 60000 pixels': tiff(entries),
            'TIFF of 2**31 x 2**31 pixels': tiff([(t, k, c, 2**31 - 1) if t in (256, 257, 278)
            else (t, k, c, v) for t, k, c, v in entries])}


def header_bombs() -> dict:
    "Headers that ask for too much: sizes, frames, depth, fragments, lengths."
    pixels = element(0x7FE00010, 'OW', bytes(1024))
    deep = bytearray()
    for _ in range(10000):
        deep += element(0x00081140, 'SQ', b'', 0xFFFFFFFF) + b'\xfe\xff\0\xe0\xff\xff\xff\xff'
    deep_ended = bytes(deep) + (b'\xfe\xff\x0d\xe0\0\0\0\0' + b'\xfe\xff\xdd\xe0\0\0\0\0')*10000
    jls = encode_frame((film()*4095).astype(np.uint16), 'jpegls', 12)
    table = struct.pack('<I', 0)*2**20
    return {'a header of 46341 x 46341': part10('explicit', numbered(rows=46341, cols=46341) + pixels),
        'a header of 65535 x 65535': part10('jpegls', numbered(rows=65535, cols=65535) + packed(jls)),
            '2**31 frames': part10('explicit', numbered(frames=b'2147483648') + pixels),
            '2**31 - 1 frames, compressed': part10('jpegls',
            numbered(rows=ROWS, cols=COLS, stored=12, frames=b'2147483647 ') + packed(jls)),
            'a sequence 10,000 deep, open': part10('explicit', bytes(deep)),
            'a sequence 10,000 deep, closed': part10('explicit',
            deep_ended + numbered(rows=8, cols=8) + pixels),
            '1,000,000 fragments of 2 bytes': part10('jpegls',
            numbered(rows=ROWS, cols=COLS, stored=12) + packed(*[b'\xff\xd8']*10**6)),
            '1,000,000 empty fragments': part10('jpegls',
            numbered(rows=ROWS, cols=COLS, stored=12) + packed(*[b'']*10**6)),
            'an offset table of 4 MB': part10('jpegls',
            numbered(rows=2048, cols=2048, stored=12) + packed(b'\xff\xd8', table=table)),
            'an element of length 0xFFFFFFF0': part10('explicit',
            element(0x00091001, 'OB', b'ab', 0xFFFFFFF0) + numbered() + pixels),
            'pixel data of length 0xFFFFFFF0': part10('explicit',
            numbered() + element(0x7FE00010, 'OW', bytes(1024), 0xFFFFFFF0)),
            'file meta of length 0xFFFFFFF0': part10('explicit', numbered() + pixels)[:140]
            + struct.pack('<I', 0xFFFFFFF0) + part10('explicit', numbered() + pixels)[144:]}


def bombs() -> dict:
    "Every bomb by its name: the bytes of the file."
    pixels = numbered(rows=64, cols=64) + element(0x7FE00010, 'OW', b'', 8192)
    private = element(0x00091001, 'OB', b'', 3*2**30)
    out = {'1 MB deflated, pixel data of 1 GB where 8 kB are declared': part10('deflated',
        deflated(numbered(rows=64, cols=64) + element(0x7FE00010, 'OW', b'', 2**30), 2**30)),
           '1 MB deflated, 1 GB behind honest pixel data': part10('deflated', deflated(pixels, 2**30)),
           '3 MB deflated, a private element of 3 GB before the pixels': part10('deflated',
           deflated(private, 3*2**30, pixels + bytes(8192))),
           '1 MB deflated, one element of 1 GB of text': part10('deflated',
           deflated(element(0x00081080, 'UT', b'', 2**30), 2**30, pixels + bytes(8192)))}
    return out | rle_bombs() | stream_bombs() | still_bombs() | header_bombs()


def _peak() -> float:
    "MB at most in memory since `_forget`."
    return next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines()
        if l.startswith('VmHWM'))/1024


def refusal(path: str) -> dict:
    """In a fresh process: how `read_radiograph` (whole, and with `size=`; the slower counts) and `index_row`
    take a file, in milliseconds and MB. Honest files are read before."""
    import cv2

    from radiology_ai.dicom.index import index_row
    from radiology_ai.dicom.read import read_radiograph
    cv2.setNumThreads(1)
    resource.setrlimit(resource.RLIMIT_AS, (6*2**30, 6*2**30)) # a guard for the machine
    with tempfile.TemporaryDirectory(dir=ram()) as folder:
        for s in ('explicit', 'deflated', 'jpegls'):
            write_dicom(Path(folder)/s, film(), syntax=s)
            read_radiograph(Path(folder)/s, size=32); index_row(str(Path(folder)/s))
        for form in ('PNG', 'TIFF'):
            Image.fromarray(np.eye(64, dtype=np.uint8)).save(Path(folder)/form, form)
            read_radiograph(Path(folder)/form)
    Path('/proc/self/clear_refs').write_text('5') # the highest mark begins anew
    floor, start = _peak(), time.perf_counter()
    try: said, cause = 'read', repr(read_radiograph(path))
    except DicomError as e: said, cause = 'refused', str(e)
    except BaseException as e: said, cause = 'FAULT', f'{type(e).__name__}: {e}'[:300]
    ms, start = 1000*(time.perf_counter() - start), time.perf_counter()
    try: small = f'{said}, but read with size=' if read_radiograph(path, size=512) and said!='read' else said
    except DicomError: small = said
    except BaseException as e: small, cause = 'FAULT with size=', f'{type(e).__name__}: {e}'[:300]
    said, ms, mb = small, max(ms, 1000*(time.perf_counter() - start)), _peak() - floor
    start = time.perf_counter()
    try: row = index_row(path)['error']
    except BaseException as e: row, said = f'{type(e).__name__}: {e}'[:300], 'FAULT in index_row'
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/1024
    return dict(said=said, cause=cause, ms=ms, mb=mb, index=row, index_ms=1000*(time.perf_counter() - start),
        index_mb=_peak() - floor, children_mb=children)


def fresh(path, seconds: float=120) -> dict:
    "The answer of `refusal` from a process of its own."
    try:
        done = subprocess.run([sys.executable, __file__, '--bomb', str(path)], capture_output=True, text=True,
            timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return dict(said='FAULT', cause=f'more than {seconds} s', ms=1000*seconds, mb=np.nan, index='',
            index_ms=np.nan, index_mb=np.nan, children_mb=np.nan)
    if done.returncode or not done.stdout.strip():
        return dict(said='FAULT', cause=f'exit code {done.returncode}: {done.stderr[-300:]}', ms=np.nan,
            mb=np.nan, index='', index_ms=np.nan, index_mb=np.nan, children_mb=np.nan)
    return json.loads(done.stdout.strip().splitlines()[-1])


def bomb_table() -> int:
    "Prints the time and memory of each refusal; 1 if a file was not refused, took more than 50 ms or 64 MB."
    print(f"{'bomb':62s} {'bytes':>9s} {'ms':>8s} {'MB':>7s} {'index ms':>8s} {'MB':>7s} {'children MB':>11s}  answer")
    bad = 0
    with tempfile.TemporaryDirectory(dir=ram()) as folder:
        path = Path(folder)/'bomb'
        for name, data in bombs().items():
            path.write_bytes(data)
            r = fresh(path)
            wrong = r['said']!='refused' or r['ms']>50 or not r['index_mb']<64
            bad += wrong
            answer = r['cause'].replace(str(path), '').strip(' :')[:110]
            print(f"{name:62s} {len(data):9d} {r['ms']:8.1f} {r['mb']:7.1f} {r['index_ms']:8.1f} "
                f"{r['index_mb']:7.1f} {r['children_mb']:11.0f}  {'* ' if wrong else ''}{r['said']}: "
                f"{answer} | index: {r['index'][:60]}", flush=True)
    print(f'{bad} beyond the limits of 50 ms and 64 MB, marked *')
    return int(bad>0)


# ---------------------------------------------------------------- a second decoder, in a process of its own

def _kind(stream: bytes) -> str:
    "The transfer syntax that a stream is of, by its own markers."
    if b'\xff\x4f\xff\x51' in stream[:200]: return 'htj2k' if b'\xff\x50' in stream[:200] else 'jpeg2000'
    p = 2
    while stream[:2]==b'\xff\xd8' and p + 4<len(stream) and stream[p]==0xFF:
        if stream[p + 1] in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7):
            return {0xC3: 'jpeg_lossless57', 0xF7: 'jpegls'}.get(stream[p + 1],
                'jpeg' if stream[p + 4]==8 else 'jpeg12')
        p += 2 + int.from_bytes(stream[p + 2:p + 4], 'big')
    return ''


def second_decode(path: str, frame: int) -> np.ndarray:
    """The integers of a frame by gdcm, from a file made anew around the stream (pydicom for RLE and colour,
    OpenJPEG for HTJ2K)."""
    ds = pydicom.dcmread(path, force=True)
    uid = ds.file_meta.get('TransferSyntaxUID', '')
    frames = int(ds.get('NumberOfFrames') or 1)
    samples = int(ds.get('SamplesPerPixel') or 1)
    try: # one fragment a frame needs no offset table, which may be damaged
        _, *parts = pydicom.encaps.generate_fragments(ds.PixelData)
        stream = (b''.join(parts) if frames<=1 else parts[frame] if len(parts)==frames
            else pydicom.encaps.get_frame(ds.PixelData, frame, number_of_frames=frames))
    except Exception as e: raise LookupError from e
    kind, signed = _kind(stream), int(bool(ds.get('PixelRepresentation')))
    if not kind and uid!=SYNTAXES['rle']: raise LookupError
    if kind=='htj2k': return imagecodecs.jpeg2k_decode(stream)
    if not kind or samples!=1:
        if kind: ds.file_meta.TransferSyntaxUID = uid = SYNTAXES[kind]
        if ds.get('PhotometricInterpretation') not in ('RGB', 'YBR_FULL', 'YBR_FULL_422', 'YBR_RCT',
                'YBR_ICT'):
            ds.PhotometricInterpretation = ('MONOCHROME2' if samples==1 else 'YBR_FULL_422' if kind=='jpeg'
                else 'RGB')
        ds.SamplesPerPixel, ds.PixelRepresentation, ds.NumberOfFrames = samples, signed, 1
        ds.PixelData = pydicom.encaps.encapsulate([stream]) # without the file's own offset table
        if not kind:
            # whole words, as RLE holds them
            ds.BitsStored, ds.HighBit = ds.BitsAllocated, ds.BitsAllocated - 1
        # pydicom refuses where one is missing, which says nothing of the stream
        for k, v in (('BitsStored', ds.BitsAllocated), ('HighBit', ds.BitsAllocated - 1)):
            if not isinstance(ds.get(k), int): setattr(ds, k, v)
        return pydicom.pixels.get_decoder(uid).as_array(ds, index=0, raw=samples==1,
            decoding_plugin='pydicom' if uid==SYNTAXES['rle'] else 'gdcm')[0]
    import gdcm
    bits = ds.BitsAllocated if kind in ('jpeg12', 'jpeg_lossless57', 'jpegls', 'jpeg2000') else 8
    bare = part10(kind, numbered(rows=ds.Rows, cols=ds.Columns, allocated=bits, stored=bits, signed=signed)
        + packed(stream))
    Path(path + '.bare').write_bytes(bare)
    r = gdcm.ImageReader()
    r.SetFileName(path + '.bare')
    if not r.Read(): raise ValueError('gdcm refuses it')
    b = r.GetImage().GetBuffer()
    return np.frombuffer(b.encode('utf-8', 'surrogateescape') if isinstance(b, str) else b,
        f'<u{bits//8}').reshape(ds.Rows, ds.Columns)


def judge():
    "Answers lines 'path frame' with one word; the integers go to path + '.npy'."
    warnings.simplefilter('ignore')
    logging.disable()
    print('ready', flush=True)
    for line in sys.stdin:
        path, frame = line.rstrip('\n').rsplit(' ', 1)
        try:
            with pydicom.config.disable_value_validation():
                np.save(path + '.npy', second_decode(path, int(frame)))
            print('decoded', flush=True)
        except Exception as e: print('nothing' if isinstance(e, LookupError) else 'refused', flush=True)


class Judge:
    "The process of `judge`, started when first asked and again after it died."
    def __init__(self): self.process = None

    def ask(self, path: str, frame: int, seconds: float=10):
        "An array, or 'refused', 'nothing' (no frame for it), 'crashed', 'hung'."
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen([sys.executable, __file__, '--judge'], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self.process.stdout.readline()
        self.process.stdin.write(f'{path} {frame}\n'); self.process.stdin.flush()
        if not wait([self.process.stdout], seconds): self.process.kill(); self.process.wait(); return 'hung'
        answer = self.process.stdout.readline().split()
        if not answer: self.process.wait(); return 'crashed'
        return np.load(path + '.npy') if answer[0]=='decoded' else answer[0]


def agreement(ours: np.ndarray, other, lossy: bool, bits: int, low: int) -> str:
    """Are the integers of two decoders the same? Signs and unused high bits are left out of it; words may
    have been shifted by `low` bits, where the header says so."""
    if (low and not isinstance(other, str) and agreement(ours, other>>low, lossy, bits,
            0)=='second decoder agrees'):
        return 'second decoder agrees'
    if isinstance(other, str):
        return ('pydicom finds no such frame in the fragments' if other=='nothing'
            else 'second decoder ' + other)
    if ours.shape!=other.shape: return 'second decoder gives another shape'
    mask = 2**min(bits, 8*ours.dtype.itemsize) - 1
    gap = np.abs((ours.astype(np.int64) & mask) - (other.astype(np.int64) & mask))
    if lossy:
        # two inverse cosine transforms differ a little
        gap = gap*(np.minimum(gap, mask + 1 - gap)>max(3, mask//64))
    return 'second decoder agrees' if (gap!=0).mean()<=(.01 if lossy else 0) else 'second decoder disagrees'


# ---------------------------------------------------------------- one file

def says_secret(*texts) -> bool: return any(s in str(t) for t in texts for s in SECRET)


def chain(e):
    "An exception and those behind it."
    while e is not None:
        yield e
        e = e.__cause__ or e.__context__


class Reader:
    "Reads files as a user would and says how it went."
    def __init__(self, bases: list):
        import cv2
        cv2.setNumThreads(1)
        from radiology_ai.dicom import index, read
        try:
            from radiology_ai.dicom import file, stored
        except ImportError: file = stored = read
        self.read = read.read_radiograph
        self.index = index.index_row
        self.open = file.open_dicom
        self.stored = stored.decode_stored
        self.judge, self.logged, self.truth = Judge(), io.StringIO(), {}
        logging.getLogger().addHandler(logging.StreamHandler(self.logged))
        with tempfile.TemporaryDirectory(dir=ram()) as folder, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for b in bases:
                path = Path(folder)/'base'
                path.write_bytes(intact(b))
                self.truth[b.name] = self.read(path, frame=self.frame(b)).pixels, self.integers(path, b)

    def frame(self, b): return 1 if ' frames' in b.name else None

    def integers(self, path, b):
        if b.kind=='still': return None
        return self.stored(self.open(path), self.frame(b), path)[0]

    def one(self, path: Path, b: Base, i: int) -> dict:
        "What became of a file."
        record = dict(i=i, base=b.name, cause='', faults=[], note='')
        begin = time.perf_counter()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            r = self.attempt(record, lambda: self.read(path, frame=self.frame(b)))
            record['seconds'] = time.perf_counter() - begin
            if i%4==0:
                self.attempt(record, lambda: self.read(path, size=40, frame=self.frame(b)), first=False)
            row = self.attempt(record, lambda: self.index(str(path)), first=False)
        if row and says_secret(row['error']): record['faults'].append('header text in the error of index_row')
        if any(says_secret(w.message) for w in told): record['faults'].append('header text in a warning')
        if says_secret(self.logged.getvalue()): record['faults'].append('header text in a log')
        self.logged.seek(0); self.logged.truncate()
        if r is not None: self.inspect(record, r, path, b)
        record['total'] = time.perf_counter() - begin
        return record

    def attempt(self, record, f, first=True):
        "The result of `f`, or None and the reason in `record`."
        try: return f()
        except DicomError as e:
            if first: record.update(outcome='refused', cause=re.sub(r'\d+', '#', e.cause))
            if says_secret(e): record['faults'].append('header text in the message of an error')
            elif any(says_secret(o, o.args) for o in chain(e)):
                record['note'] = 'header text behind the error (__cause__)'
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt): raise
            if first: record.update(outcome='exception', cause=type(e).__name__)
            where = traceback.extract_tb(e.__traceback__)[-1]
            record['faults'].append(f'{type(e).__name__} in {Path(where.filename).name}:{where.name}:{where.lineno}')
            record['trace'] = ''.join(traceback.format_exception(e))[-3000:]

    def inspect(self, record, r, path, b):
        "Were the pixels to be given?"
        p, (pixels, stored) = r.pixels, self.truth[b.name]
        declared = r.tags.get('Rows'), r.tags.get('Columns')
        sane = (p.dtype==np.float32 and p.ndim==2 and p.shape==declared and np.isfinite(p).all()
            and p.min()>=0 and p.max()<=1 and np.isfinite(r.affine).all())
        if not sane:
            record['faults'].append(f'pixels are {p.dtype} {p.shape} in [{p.min()}, {p.max()}], declared {declared}')
        if r.spacing is not None and not all(np.isfinite(v) and v>0 for v in r.spacing):
            record['faults'].append(f'spacing {r.spacing}')
        if p.shape==pixels.shape and np.array_equal(p, pixels): record['outcome'] = 'same pixels'
        elif b.kind=='still': record['outcome'] = f'other pixels, {b.syntax}'
        else: self.compare(record, r, path, b, stored)
        if record['outcome']=='other pixels, png' and not png_whole(path.read_bytes()):
            record['faults'].append("silent garbage: the PNG's own checksum is wrong")

    def compare(self, record, r, path, b, stored):
        "Other pixels of a DICOM file: by its header, uncompressed, or by a compressed stream?"
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            found = self.attempt(record, lambda: ((ds := self.open(path)),
                *self.stored(ds, self.frame(b), path)), first=False)
            if found is None:
                record.update(outcome='read_radiograph reads it, decode_stored does not'); return
            ds, ours, codec = found
            if ours.shape==stored.shape and np.array_equal(ours, stored):
                record['outcome'] = 'same integers, other window'
            elif codec=='raw': record['outcome'] = 'other integers, uncompressed'
            else:
                uid = str(getattr(getattr(ds, 'file_meta', None), 'TransferSyntaxUID', ''))
                lossy = (uid in (SYNTAXES['jpeg'], SYNTAXES['jpeg12'], SYNTAXES['jpeg2000_lossy'])
                    or codec.endswith('jpeg8'))
                bits = int(ds.get('BitsStored') or 16)
                low = int(ds.get('HighBit') or 0) + 1 - bits
                answer = agreement(ours, self.judge.ask(str(path), self.frame(b) or 0), lossy, bits,
                    low if 0<low<=int(ds.BitsAllocated) - bits else 0)
                record.update(outcome='other integers, compressed: ' + answer, codec=codec)
                if 'agrees' in answer.split(): return
                record['verify'] = self.verified(path, b)
                if (record['verify']!='refused under verify=True' and 'crashed' not in answer
                        and 'no such frame' not in answer):
                    record['faults'].append(f'silent garbage, {b.syntax}: {answer}, {record["verify"]}')

    def verified(self, path, b):
        "Does the reader itself refuse the file when it is asked to verify?"
        try: self.read(path, frame=self.frame(b), verify=True); return 'passes verify=True'
        except DicomError: return 'refused under verify=True'
        except TypeError: return 'no verify'


def png_whole(data: bytes) -> bool:
    "Are the checksums of all chunks up to IEND right?"
    p = 8
    while p + 12<=len(data):
        n = struct.unpack_from('>I', data, p)[0]
        if data[p + 8 + n:p + 12 + n]!=struct.pack('>I', zlib.crc32(data[p + 4:p + 8 + n])): return False
        if data[p + 4:p + 8]==b'IEND': return True
        p += 12 + n
    return False


def ram() -> str|None:
    "A folder in memory."
    return '/dev/shm' if os.access('/dev/shm', os.W_OK) else None


# ---------------------------------------------------------------- workers

def work(k: int, start: int, step: int, n: int, seed: int, folder: str, pipe, clock, deadline: float):
    "Files start, start + step, ... of one process; `clock` holds the file at work and since when."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    err = open(Path(folder)/f'stderr{k}', 'ab')
    os.dup2(err.fileno(), 2)
    bases = base_files()
    reader, path = Reader(bases), Path(folder)/f'file{k}'
    high = floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(dict(ready=k))
    for i in range(start, n, step):
        if time.monotonic()>deadline: break
        b, how, data = mutated(bases, seed, i)
        path.write_bytes(data)
        clock[2*k], clock[2*k + 1] = i, time.monotonic()
        record = reader.one(path, b, i)
        clock[2*k + 1] = 0
        if record['seconds']>HANG: # the machine may have been busy: once more
            again = reader.one(path, b, i)
            record['seconds'] = min(record['seconds'], again['seconds'])
        if record['seconds']>HANG: record['faults'].append(f"{record['seconds']:.1f} s")
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send(record | dict(how=how, grew=(now - high)/1024, rise=(now - floor)/1024))
        high = now
    pipe.send(dict(done=k))


class Run:
    "The workers, their records and what is wrong with them."
    def __init__(self, n: int, seed: int, workers: int, seconds: float, findings: Path):
        self.n, self.seed, self.workers, self.findings = n, seed, min(workers, n), findings
        self.deadline = time.monotonic() + seconds
        self.context = multiprocessing.get_context('spawn')
        self.clock = self.context.Array('d', 2*self.workers, lock=False)
        self.bases, self.folder = base_files(), tempfile.mkdtemp(dir=ram(), prefix='fuzz')
        self.outcomes = Counter()
        self.causes = Counter()
        self.faults = Counter()
        self.notes = Counter()
        self.kinds = Counter()
        self.garbage, self.saved, self.slow, self.memory = Counter(), Counter(), [], (0, -1)
        self.live, self.total, self.examples = {}, 0, {}

    def start(self, k: int, at: int):
        here, there = self.context.Pipe(False)
        self.clock[2*k], self.clock[2*k + 1] = at, 0
        p = self.context.Process(target=work, args=(k, at, self.workers, self.n, self.seed, self.folder,
            there, self.clock, self.deadline))
        p.start()
        there.close()
        self.live[k] = p, here

    def run(self):
        for k in range(self.workers): self.start(k, k)
        try:
            while self.live:
                for pipe in wait([pipe for _, pipe in self.live.values()], .5):
                    k = next(k for k, (_, o) in self.live.items() if o is pipe)
                    try: self.take(k, pipe.recv())
                    except EOFError: self.died(k, 'crash')
                for k in list(self.live):
                    since = self.clock[2*k + 1]
                    if since and time.monotonic() - since>KILL: self.live[k][0].kill(); self.died(k, 'hang')
            for f in Path(self.folder).glob('stderr*'):
                if says_secret(f.read_bytes().decode('latin1')): self.fault('header text on stderr', None)
        finally:
            for p, _ in self.live.values(): p.kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def died(self, k: int, how: str):
        "A worker that ended on its own, or was ended; the next one goes on behind its file."
        p, _ = self.live.pop(k)
        p.join()
        i = int(self.clock[2*k])
        if how!='hang' and (p.exitcode==1 or not self.clock[2*k + 1]):
            raise RuntimeError(f'worker {k} failed by itself at file {i} (exit code {p.exitcode}): '
                + (Path(self.folder)/f'stderr{k}').read_bytes().decode('latin1')[-1500:])
        what = (f'hang of more than {KILL:.0f} s' if how=='hang' else f'crash (signal {-p.exitcode})'
            if p.exitcode<0 else f'exit code {p.exitcode}')
        b, names, _ = mutated(self.bases, self.seed, i)
        self.count(dict(i=i, base=b.name, how=names, outcome=how, cause='', faults=[what], note='',
            seconds=KILL if how=='hang' else 0, rise=0, grew=0))
        if i + self.workers<self.n: self.start(k, i + self.workers)

    def take(self, k: int, record: dict):
        if 'ready' in record: return
        if 'done' in record: self.live.pop(k)[0].join(); return
        self.count(record)

    def count(self, r: dict):
        self.total += 1
        self.outcomes[r['outcome']] += 1
        for m in r['how'].split('+'): self.kinds[m, r['outcome'].split(',')[0]] += 1
        if r['outcome']=='refused': self.causes[r['cause']] += 1; self.examples.setdefault(r['cause'], r['i'])
        if r['note']: self.notes[r['note']] += 1; self.examples.setdefault(r['note'], r['i'])
        if 'verify' in r:
            name = f"{r['outcome'].split(': ')[1]}, {r['base'].split()[0]}, {r['verify']}"
            self.garbage[name] += 1
            self.save(name, r)
        self.slow = sorted(self.slow + [(r['seconds'], r['i'], r['base'], r['how'])], reverse=True)[:5]
        if r['grew']>self.memory[0]: self.memory = r['grew'], r['i']
        self.peak = max(getattr(self, 'peak', 0), r['rise'])
        for f in r['faults']: self.fault(f, r)

    def fault(self, name: str, r: dict|None):
        self.faults[name] += 1
        if r: self.save(name, r)

    def save(self, name: str, r: dict, most: int=5):
        "The file and its record, the first few of each kind."
        self.examples.setdefault(name, r['i'])
        self.saved[name] += 1
        if self.findings is None or self.saved[name]>most: return
        self.findings.mkdir(parents=True, exist_ok=True)
        stem = self.findings/f"{hashlib.sha1(name.encode()).hexdigest()[:6]}-{self.seed}-{r['i']}"
        stem.with_suffix('.bin').write_bytes(mutated(self.bases, self.seed, r['i'])[2])
        stem.with_suffix('.json').write_text(json.dumps(r | dict(name=name), indent=1))

    @property
    def bad(self) -> int: return sum(self.faults.values())

    def report(self, seconds: float):
        print(f'{self.total} of {self.n} files, seed {self.seed}, {len(self.bases)} intact files, '
            f'{self.workers} processes, {seconds:.0f} s ({1000*seconds*self.workers/max(1, self.total):.1f} ms a file and process)\n')
        table('outcome', self.outcomes, self.total)
        table('cause of a refusal (the first 25)', self.causes, self.total, self.examples, 25)
        table('compressed, other integers, second decoder does not agree', self.garbage, self.total,
            self.examples)
        table('note', self.notes, self.total, self.examples)
        print('slowest: ' + '; '.join(f'{s:.2f} s ({i}, {b}, {h})' for s, i, b, h in self.slow))
        print(f'memory: a worker grew by {getattr(self, "peak", 0):.0f} MB in all, by {self.memory[0]:.0f} '
            f'MB in one file ({self.memory[1]})\n')
        table('FAULT', self.faults, self.total, self.examples)
        if not self.faults: print('no fault')


def table(title: str, counts: Counter, total: int, examples: dict|None=None, most: int=60):
    if not counts: return
    print(f'{title:110s} {"files":>7s} {"share":>7s}' + ('  first' if examples else ''))
    for k, v in counts.most_common(most):
        print(f'{str(k)[:110]:110s} {v:7d} {v/total:7.2%}' + (f'  {examples.get(k)}' if examples else ''))
    print()


def fuzz(n: int, seed: int=0, workers: int=2, seconds: float=1e9, findings: Path|None=None) -> Run:
    "A run over `n` files."
    run = Run(n, seed, workers, seconds, findings)
    run.run()
    return run


def one(seed: int, i: int):
    "Makes one file again and reads it here."
    bases = base_files()
    b, how, data = mutated(bases, seed, i)
    path = Path(tempfile.gettempdir())/f'fuzz-{seed}-{i}.bin'
    path.write_bytes(data)
    print(f'{b.name}, {how}, {len(data)} bytes: {path}')
    print(json.dumps(Reader(bases).one(path, b, i), indent=1).replace('\\n', '\n'))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=2000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--seconds', type=float, default=1e9, help='stop after this time')
    parser.add_argument('--findings', type=Path, default=Path(tempfile.gettempdir())/'fuzz_findings',
        help='folder for the files with faults')
    parser.add_argument('--one', type=int, help='the number of one file')
    parser.add_argument('--files', type=int,
        help='files of the grammar through index, read, preprocess and deidentify')
    parser.add_argument('--first', type=int, default=0, help='number of the first of these')
    parser.add_argument('--file', type=int, help='the number of one file of the grammar')
    parser.add_argument('--memory', type=int, default=2**30,
        help='bytes of address space for --files; 0: no limit')
    parser.add_argument('--judge', action='store_true', help='used by the script itself')
    parser.add_argument('--bombs', action='store_true',
        help='time and memory of refusing decompression bombs')
    parser.add_argument('--bomb', help='used by the script itself: one file')
    args = parser.parse_args()
    if args.judge: return judge()
    if args.files is not None or args.file is not None:
        import fuzz_commands
        return fuzz_commands.main(args)
    if args.bomb: return print(json.dumps(refusal(args.bomb)))
    if args.bombs: return bomb_table()
    if args.one is not None: return one(args.seed, args.one)
    start = time.perf_counter()
    run = fuzz(args.n, args.seed, args.workers, args.seconds, args.findings)
    run.report(time.perf_counter() - start)
    if run.saved: print(f'files of each kind: {args.findings}')
    return 1 if run.bad else 0


if __name__=='__main__': sys.exit(main())
