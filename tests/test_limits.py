"""What asks for more than a film needs is refused within half a second and 64 MB, or read within two seconds and half a
gigabyte, wherever files are opened; and one odd file is one row. Each case is read in a fresh process which tells its
processor time and its memory; what waits or hangs is ended by the time limit of the test."""
import gzip
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import pace
from PIL import Image

from radiology_ai.core import DataError, DicomError
from radiology_ai.data.cells import read_labels
from radiology_ai.data.targets import _one_mask
from radiology_ai.dicom import child as child_room
from radiology_ai.dicom import limits
from radiology_ai.dicom.child import in_child
from radiology_ai.dicom.codecs import check_cost, stream_info
from radiology_ai.dicom.deidentify import deidentify
from radiology_ai.dicom.explore import explore_dicoms, join_labels
from radiology_ai.dicom.file import open_dicom
from radiology_ai.dicom.index import index_dicoms, index_row, read_index, write_index
from radiology_ai.dicom.limits import open_regular
from radiology_ai.dicom.pseudonyms import read_key
from radiology_ai.dicom.quality import ENDS, bytes_digest, find_duplicates
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.dicom.stored import decode_stored
from radiology_ai.names import note_ids, speaking
from radiology_ai.parallel import run_parallel
from radiology_ai.phantom.hospital import write_dicom
from radiology_ai.preprocess.recipe import Preprocess
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.tasks.base import read_settings

J2K, JPG, JLL = (f'1.2.840.10008.1.2.4.{n}' for n in (90, 51, 70))
SOFT = np.linspace(0, 1, 64*64, dtype=np.float32).reshape(64, 64)
ITEM = struct.pack('<HHI', 0xFFFE, 0xE000, 0)


# ---------------------------------------------------------------- a writer that knows no limits

def element(g, e, vr, value, explicit=True):
    value = value.encode('latin-1') if isinstance(value, str) else value
    value += (b'\0' if vr in ('UI', 'OB') else b' ')*(len(value)%2)
    if not explicit: return struct.pack('<HHI', g, e, len(value)) + value
    long = vr in ('OB', 'OW', 'SQ', 'UN', 'UT')
    return struct.pack('<HH2sHI' if long else '<HH2sH', g, e, vr.encode(), *([0] if long else []),
        len(value)) + value


def meta(syntax='1.2.840.10008.1.2.1'):
    body = element(2, 2, 'UI', '1.2.840.10008.5.1.4.1.1.1.1') + element(2, 3, 'UI', '1.2.3') + element(2,
        0x10, 'UI',
        syntax)
    return bytes(128) + b'DICM' + element(2, 0, 'UL', struct.pack('<I', len(body))) + body


def header(rows=64, cols=64, bits=16, frames=None, extra=b'', explicit=True, before=b''):
    def e(*a): return element(*a, explicit=explicit)
    def us(n): return struct.pack('<H', n)
    return (e(8, 0x16, 'UI', '1.2.840.10008.5.1.4.1.1.1.1') + e(8, 0x18, 'UI', '1.2.3.5')
        + e(8, 0x60, 'CS', 'DX')
        + before + e(0x10, 0x10, 'PN', 'A^B') + e(0x10, 0x20, 'LO', 'P1') + e(0x20, 0xD, 'UI', '1.2.9')
        + e(0x28, 2, 'US', us(1)) + e(0x28, 4, 'CS', 'MONOCHROME2')
        + (e(0x28, 8, 'IS', str(frames)) if frames else b'') + e(0x28, 0x10, 'US', us(rows))
        + e(0x28, 0x11, 'US', us(cols)) + e(0x28, 0x100, 'US', us(bits)) + e(0x28, 0x101, 'US', us(bits))
        + e(0x28, 0x102, 'US', us(bits - 1)) + e(0x28, 0x103, 'US', us(0)) + extra)


PIXELS = element(0x7FE0, 0x10, 'OW', bytes(range(256))*32)


def encapsulated(frags, table=b''):
    def item(b): return struct.pack('<HHI', 0xFFFE, 0xE000, len(b)) + b
    return (struct.pack('<HH2sHI', 0x7FE0, 0x10, b'OB', 0, 0xFFFFFFFF) + item(table)
        + b''.join(item(f + b'\0'*(len(f)%2)) for f in frags) + struct.pack('<HHI', 0xFFFE, 0xE0DD, 0))


def open_sequence(content, g=0x28, e=0x3010):
    return (struct.pack('<HH2sHI', g, e, b'SQ', 0, 0xFFFFFFFF) + content
        + struct.pack('<HHI', 0xFFFE, 0xE0DD, 0))


def implicit_window(n):
    value = b'1\\'*n + b'1 '
    return (meta('1.2.840.10008.1.2') + header(explicit=False) + element(0x28, 0x1050, 'DS', value, False)
        + element(0x28, 0x1051, 'DS', value, False) + element(0x7FE0, 0x10, 'OW', bytes(8192), False))


def nested(depth, size):
    "Sequences of defined length within each other around a large value."
    v = element(0x42, 0x11, 'OB', bytes(size))
    for _ in range(depth):
        v = element(0x40, 0x275, 'SQ', struct.pack('<HHI', 0xFFFE, 0xE000, len(v)) + v)
    return meta() + header(extra=v) + PIXELS


def progressive(side, n):
    "A JPEG with `n` more scans."
    out = io.BytesIO()
    Image.fromarray(np.full((side, side), 100, np.uint8)).save(out, 'JPEG', progressive=True, quality=50)
    b = out.getvalue()
    last = b[b.rfind(b'\xff\xc4', 0, b.rfind(b'\xff\xda')):-2]
    return b[:-2] + last*n + b'\xff\xd9'


def in_dicom(stream, side, syntax=J2K): return meta(syntax) + header(side, side, 8) + encapsulated([stream])


def jpeg2000(side, layers=None, precincts=None, blocks=None, more=b'', part=b'', pad=2):
    "A stream of an empty film with other numbers in its header."
    b = bytearray(imagecodecs.jpeg2k_encode(np.full((side, side), 7, np.uint8), codecformat='j2k',
        reversible=True,
        level=0, resolutions=6))
    p = b.find(b'\xff\x52')
    if layers: b[p+6:p+8] = struct.pack('>H', layers)
    if blocks is not None: b[p+10:p+12] = bytes(blocks)
    if precincts is not None:
        n, length = b[p+9] + 1, struct.unpack('>H', b[p+2:p+4])[0]
        b[p+4] |= 1
        b[p+2:p+4] = struct.pack('>H', length + n)
        b[p+2+length:p+2+length] = bytes([precincts]*n)
    q = p + 2 + struct.unpack('>H', b[p+2:p+4])[0]
    b[q:q] = more + (b'\xff\x64' + struct.pack('>HH', 60004, 0) + bytes(60000))*pad
    if part:
        s = b.find(b'\xff\x90', q)
        n = struct.unpack('>I', b[s+6:s+10])[0]
        if n: b[s+6:s+10] = struct.pack('>I', n + len(part))
        b[s+12:s+12] = part
    return bytes(b)


def coded(stream):
    "The segment that tells how components are coded, of a stream."
    p = stream.find(b'\xff\x52')
    return stream[p:p + 2 + struct.unpack('>H', stream[p+2:p+4])[0]]


def tiff(pages, **changes):
    tags = {256: (3, 8), 257: (3, 8), 258: (3, 8), 259: (3, 1), 262: (3, 1), 273: (4, 8), 277: (3, 1),
        278: (3, 8),
        279: (4, 64)}
    tags |= {int(k[1:]): v for k, v in changes.items()}
    out = bytearray(b'II*\0' + struct.pack('<I', 8))
    for k in range(pages):
        entries = b''.join(struct.pack('<HHII', t, v[0], v[2] if v[2:] else 1, v[1])
            for t, v in sorted(tags.items()))
        out += struct.pack('<H', len(tags)) + entries
        out += struct.pack('<I', len(out) + 4 if k<pages - 1 else 0)
    return bytes(out)


def stripped(side, compression, data, rows, bits=8):
    "A TIFF all of whose strips are the same bytes."
    n = -(-side//rows)
    tail = struct.pack(f'<{2*n}I', *[8]*n, *[len(data)]*n)
    at = 8 + len(data)
    places = (at, at + 4*n) if n>1 else (8, len(data))
    tags = {256: (4, 1, side), 257: (4, 1, side), 258: (3, 1, bits), 259: (3, 1, compression), 262: (3, 1, 1),
        273: (4, n, places[0]), 277: (3, 1, 1), 278: (4, 1, rows), 279: (4, n, places[1])}
    entries = b''.join(struct.pack('<HHII', t, *v) for t, v in sorted(tags.items()))
    return (b'II*\0' + struct.pack('<I', at + len(tail)) + data + tail + struct.pack('<H', len(tags))
        + entries
        + bytes(4))


def png(*chunks, hole=0):
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 32, 32, 8, 0, 0, 0, 0))
        + b''.join(chunk(*c) for c in chunks) + chunk(b'IDAT', zlib.compress(bytes(33*32)))
        + chunk(b'IEND', b''))


def deflated(frames):
    "Frames of 98 MB that the header declares, of zeros."
    body = header(7000, 7000, 16, frames) + struct.pack('<HH2sHI', 0x7FE0, 0x10, b'OW', 0, 98_000_000*frames)
    z = zlib.compressobj(1, zlib.DEFLATED, -15)
    return meta('1.2.840.10008.1.2.1.99') + z.compress(body) + z.compress(bytes(2**24)) + z.flush()


def deflated_film(n, side=7000):
    "One frame (of 98 MB) that the header declares, with `n` bytes of it."
    z = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (meta('1.2.840.10008.1.2.1.99') + z.compress(header(side, side, 16)
        + struct.pack('<HH2sHI', 0x7FE0, 0x10, b'OW', 0, 2*side**2)) + z.compress(bytes(n)) + z.flush())


def jpeg_still(segments):
    b = progressive(64, 0)
    return b[:2] + b'\xff\xe1\0\2'*segments + b[2:]


def with_hole(path, head, size, tail=b''):
    with open(path, 'wb') as f:
        f.write(head)
        f.truncate(f.tell() + size)
        f.seek(0, 2)
        f.write(tail)


SPARSE = dict( # (bytes in front of the hole, its size, bytes behind)
    zeros_20_GB=(meta() + header(), 20*10**9), film_and_20_GB=(meta() + header() + PIXELS, 20*10**9),
    png_and_20_GB=(png(), 20*10**9), zeros_no_header=(bytes(128) + b'DICM', 10**9),
    png_chunk=(png()[:33] + struct.pack('>I', 1_500_000_000) + b'prVt', 1_500_000_000, bytes(4) + png()[33:]),
    png_picture=(png()[:33] + struct.pack('>I', 2_000_000_000) + b'IDAT', 2_000_000_000, bytes(4)),
    jpeg=(b'\xff\xd8\xff\xe1\xff\xff', 3*10**9), tiff_entry=(tiff(1, t273=(4, 8, 2**28)), 2**31),
    tiff_strip=(tiff(1, t279=(4, 1_500_000_000)), 1_500_000_100),
    value_in_item=(meta() + header(before=struct.pack('<HH2sHI', 8, 0x1140, b'SQ', 0, 0xFFFFFFFF)
        + struct.pack('<HHI', 0xFFFE, 0xE000, 0xFFFFFFFF)
        + struct.pack('<HH2sHI', 0x42, 0x11, b'OB', 0, 1_500_000_000)),
        1_500_000_000),
    open_value=(meta() + header(extra=struct.pack('<HH2sHI', 0x29, 0x1010, b'OB', 0, 0xFFFFFFFF)), 3*10**9))

BOMBS = dict(
    items=lambda: meta() + header(extra=open_sequence(ITEM*4_000_000)) + PIXELS,
    items_of_known_length=lambda: meta() + header(extra=element(0x28, 0x3010, 'SQ', ITEM*250_000)) + PIXELS,
    views=lambda: meta() + header(before=element(8, 0x2218, 'SQ', ITEM*500_000)) + PIXELS,
    window=lambda: implicit_window(1_000_000),
    elements=lambda: meta('1.2.840.10008.1.2') + b''.join(struct.pack('<HHI', 9 + 2*(k//60000), 1 + k%60000,
    0)
        for k in range(300_000)) + header(explicit=False) + element(0x7FE0, 0x10, 'OW', bytes(8192), False),
    group_2=lambda: bytes(128) + b'DICM' + b'\2\0\x02\x01LO\0\0'*2_000_000,
    nested_20_MB=lambda: nested(60, 20_000_000),
    zeros=lambda: meta() + header() + bytes(20_000_000),
    scans_500=lambda: in_dicom(progressive(3000, 500), 3000, JPG),
    scans_5000=lambda: in_dicom(progressive(1000, 5000), 1000, JPG),
    precincts_2x2=lambda: in_dicom(jpeg2000(2048, precincts=0x11), 2048),
    precincts_layers=lambda: in_dicom(jpeg2000(1024, precincts=0x44, layers=65535), 1024),
    blocks_4x4=lambda: in_dicom(jpeg2000(4096, blocks=(0, 0)), 4096),
    fragments_2_frames=lambda: meta(JLL) + header(frames=2) + encapsulated([b'\xff\xd8\xff\0']*20_000),
    frames_60000=lambda: meta(JLL) + header(frames=60_000)
    + encapsulated([b'\xff\xd8\xff\0']*60_000 + [b'abcd']*3_000),
    frames_16000=lambda: meta(JLL) + header(frames=16_000)
    + encapsulated([b'\xff\xd8\xff\0']*16_000 + [b'abcd']*3_000),
    offsets=lambda: meta(JLL) + header(frames=2) + encapsulated([b'\xff\xd8\xff\0']*3, bytes(20_000_000)),
    deflated_frames=lambda: deflated(5),
    tiff_pages=lambda: tiff(60_000), tiff_thin=lambda: tiff(1) [:-4]
    + b''.join(struct.pack('<IHHHII', 126 + 18*k, 1,
        256, 3, 1, 8) for k in range(100_000)) + bytes(4),
    tiff_tile=lambda: tiff(1, t322=(4, 60_000), t323=(4, 100_000), t324=(4, 8), t325=(4, 64)),
    tiff_same_strips=lambda: stripped(7000, 8, zlib.compress(bytes(90_000_000), 0), 1),
    tiff_scans=lambda: stripped(6000, 7, progressive(6000, 90), 6000),
    scans_40_of_49_MP=lambda: in_dicom(progressive(7000, 37), 7000, JPG),
    scans_220=lambda: in_dicom(progressive(3000, 220), 3000, JPG),
    png_texts=lambda: png(*[(b'tEXt', b'k%d\0v'%k) for k in range(50_000)]),
    png_packed_text=lambda: png((b'zTXt', b'a\0\0' + zlib.compress(bytes(2**27), 1))),
    jpeg_segments=lambda: jpeg_still(3_000_000), jpeg_scans=lambda: progressive(1000, 5000),
    j2k_segments=lambda: in_dicom(jpeg2000(64, more=b'\xff\x64\0\4\0\0'*500_000, pad=0), 64),
    lut=lambda: meta() + header(extra=open_sequence(struct.pack('<HHI', 0xFFFE, 0xE000, 0xFFFFFFFF)
        + element(0x28, 0x3002, 'US', struct.pack('<HHH', 16, 0, 16))
        + element(0x28, 0x3006, 'OW', bytes(24_000_000))
        + struct.pack('<HHI', 0xFFFE, 0xE00D, 0))) + PIXELS,
    tiff_packbits_of_nothing=lambda: stripped(7000, 32773, bytes(5000), 7000, 16),
    tiff_lzw_of_nothing=lambda: stripped(7000, 5, bytes(5000), 7000, 16),
    tiff_zstd_of_nothing=lambda: stripped(7000, 50000, bytes(5000), 7000, 16),
    tiff_deflate_of_nothing=lambda: stripped(7000, 8, zlib.compress(bytes(5_000_000)), 7000, 16),
    tiff_deflate_ends_early=lambda: stripped(7000, 8, zlib.compress(bytes(90_000_000)), 7000, 16),
    jpeg_progressive_ends_early=lambda: progressive(7000, 0)[:-2],
    deflated_ends_early=lambda: deflated_film(90_000_000))

READ = '''
import json,sys,time,warnings; from pathlib import Path; warnings.simplefilter('ignore')
from radiology_ai.dicom.deidentify import _Job, _one
from radiology_ai.dicom.index import index_row
from radiology_ai.dicom.quality import pixel_digest
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.preprocess.recipe import Preprocess, Source, prepare
path,out = sys.argv[1:]
def peak():
    with open('/proc/self/status') as f: return int(f.read().split('VmHWM:')[1].split()[0])/1024
def reset():
    with open('/proc/self/clear_refs', 'w') as f: f.write('5')
def digest(p): return pixel_digest(p)[2] or 'decoded'
def prepared(p):
    image,record,_ = prepare(Source(p, 'x'), Preprocess(size=32))
    return record['cause'] if image is None else 'prepared'
def deidentified(p):
    Path(out, 'parts').mkdir(parents=True)
    row = _one(_Job(0, p, out, bytes(16), frozenset(), 'black'))[0]
    return row['cause'] or 'clean'
told = {}
for name,fn in dict(index=lambda p: index_row(p)['error'] or 'readable', read=lambda p: read_radiograph(p).codec, prepare=prepared,
        digest=digest, deidentify=deidentified).items():
    reset()
    base,cpu = peak(),time.process_time()
    try: said = fn(path)
    except Exception as e: said = ('refused: ' if type(e).__name__=='DicomError' else 'raised ') + str(e)
    told[name] = (said, time.process_time() - cpu, peak() - base)
print(json.dumps(told))
'''


def costs(path, tmp_path) -> dict:
    "What five readers say to a file in a fresh process with one worker: text, processor seconds, MB."
    done = subprocess.run([sys.executable, '-c', READ, str(path), str(tmp_path/'out')], capture_output=True,
        text=True,
        timeout=60, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4*2**30,)*2),
        env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode==0, done.stderr
    return json.loads(done.stdout)


GOOD = ('readable', 'raw', 'prepared', 'decoded', 'clean', 'pillow', 'imagecodecs')


def within_limits(path, tmp_path):
    slower = pace()
    for name, (said, seconds, mb) in costs(path, tmp_path).items():
        assert not said.startswith('raised'), (name, said)
        good = said.startswith(GOOD)
        assert seconds<(2 if good else .5)*slower and mb<(512 if good else 64), (name, said, seconds, mb)


@pytest.mark.slow
@pytest.mark.parametrize('name', BOMBS)
def test_bombs(name, tmp_path):
    path = tmp_path/'bomb.dcm'
    path.write_bytes(BOMBS[name]())
    within_limits(path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('name', SPARSE)
def test_holes(name, tmp_path):
    path = tmp_path/'hole.dcm'
    with_hole(path, *SPARSE[name])
    within_limits(path, tmp_path)


@pytest.mark.parametrize('name', ['items_of_known_length', 'window', 'scans_5000', 'precincts_2x2',
    'frames_60000', 'tiff_pages', 'zeros',
    'tiff_tile', 'deflated_frames', 'group_2', 'tiff_same_strips', 'tiff_scans', 'scans_220'])
def test_refused_by_name(name, tmp_path):
    "The cause says what is too much, also where a parser takes the refusal for its own fault."
    path = tmp_path/'bomb.dcm'
    path.write_bytes(BOMBS[name]())
    with pytest.raises(DicomError) as e: read_radiograph(path)
    words = dict(items_of_known_length='items|bytes', window='0028,1050', scans_5000='scans',
        precincts_2x2='precincts',
        frames_60000='60000 frames', tiff_pages='pages', zeros='elements', tiff_tile='entry',
        deflated_frames='bytes of deflated',
        group_2='elements', tiff_same_strips='strips', tiff_scans='scans', scans_220='scans')
    assert any(w in e.value.cause for w in words[name].split('|')), e.value.cause
    assert 'bomb.dcm' in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['tiff', 'jpeg', 'deflated', 'gzip'])
def test_large_films_of_few_bytes_are_read(tmp_path, kind):
    "What unpacks to a whole film, a blank one, is one; more than `MAX_HELD`, of less than a hundredth of it."
    path, side = tmp_path/'film', 4200
    n = 2*side**2
    assert n>limits.MAX_HELD
    head = meta() + header(side, side) + struct.pack('<HH2sHI', 0x7FE0, 0x10, b'OW', 0, n)
    data = {'tiff': lambda: stripped(side, 8, zlib.compress(bytes(n)), side, 16),
        'jpeg': lambda: progressive(5800, 0), 'deflated': lambda: deflated_film(n, side),
        'gzip': lambda: gzip.compress(head + bytes(n), 1)}[kind]()
    path.write_bytes(data)
    assert read_radiograph(path, frame=0).pixels.shape[0]>=side
    if kind=='gzip':
        path.write_bytes(gzip.compress(head + bytes(n-10**6), 1))
        with pytest.raises(DicomError, match=f'ends early: {n-10**6} of {n}'): read_radiograph(path)


def test_items_are_refused_as_items(tmp_path):
    path = tmp_path/'items.dcm'
    path.write_bytes(meta() + header(extra=open_sequence(ITEM*60_000)) + PIXELS)
    with pytest.raises(DicomError, match='more than 12000 elements'): read_radiograph(path)


# ---------------------------------------------------------------- streams that hide what they cost

def test_the_cost_of_honest_streams():
    "Streams as they are written are far below every limit."
    side = 1024
    soft = (np.random.default_rng(0).random((side, side))*255).astype(np.uint8)
    for how in ({}, dict(resolutions=6), dict(level=80)):
        info = stream_info(imagecodecs.jpeg2k_encode(soft, codecformat='j2k', **how))
        check_cost(info)
        assert info['plain'] and info['packets']<1000 and info['blocks']<2000
    out = io.BytesIO()
    Image.fromarray(soft).save(out, 'JPEG', progressive=True)
    assert stream_info(out.getvalue())['scans']<=6


def hidden():
    "Streams whose tiles or components have precincts of 2 x 2, which the main header does not tell."
    cod = coded(jpeg2000(1024, precincts=0x11))
    coc = b'\xff\x53' + struct.pack('>H', len(cod) - 2 - 4 + 1) + b'\0' + cod[4:5] + cod[9:]
    whole = jpeg2000(1024)
    box = struct.pack('>I', 8 + len(jpeg2000(64))) + b'uuid' + jpeg2000(64)
    return dict(in_a_tile=jpeg2000(1024, part=cod), in_a_component=jpeg2000(1024, more=coc),
        in_a_box=box + whole)


@pytest.mark.parametrize('name', hidden())
def test_hidden_costs_are_met_in_a_child(name, tmp_path):
    "It is decoded with little memory or refused; this process takes none."
    stream = hidden()[name]
    assert stream_info(stream).get('plain') is False or 'fault' in stream_info(stream)
    path = tmp_path/'hidden.dcm'
    path.write_bytes(in_dicom(stream, 1024))
    within_limits(path, tmp_path)


def test_a_child_is_ended():
    "After the time limit, or when it takes too much memory, and the next call has a new one."
    stream = imagecodecs.jpeg2k_encode(np.zeros((64, 64), np.uint8), codecformat='j2k')
    assert in_child.decode('jpeg2k', stream)==bytes(64*64)
    with pytest.raises(ValueError, match='took more than'):
        in_child.decode('jpeg2k', jpeg2000(2048), seconds=1e-4)
    large = imagecodecs.jpeg2k_encode(np.zeros((4096, 4096), np.uint8), codecformat='j2k')
    with pytest.raises(ValueError): in_child.decode('jpeg2k', large, memory=2**24)
    assert in_child.decode('jpeg2k', stream)==bytes(64*64)


@pytest.mark.skipif(not hasattr(signal, 'SIGSTOP'), reason='processes cannot be halted here')
@pytest.mark.parametrize('busy', [True, False])
def test_time_that_the_processors_gave_to_others_is_no_fault_of_a_stream(monkeypatch, busy):
    "A decoder that waits for its turn is waited for; one that waits for nothing is ended."
    stream = imagecodecs.jpeg2k_encode(np.zeros((64, 64), np.uint8), codecformat='j2k')
    assert in_child.decode('jpeg2k', stream)==bytes(64*64)
    if busy: monkeypatch.setattr(child_room, '_lent', lambda pid: time.monotonic())
    halted = in_child.process
    halted.send_signal(signal.SIGSTOP)
    later = threading.Timer(.6, halted.send_signal, [signal.SIGCONT])
    later.start()
    if busy: assert in_child.decode('jpeg2k', stream, seconds=.3)==bytes(64*64)
    else:
        with pytest.raises(ValueError, match='took more than 0.3 s'):
            in_child.decode('jpeg2k', stream, seconds=.3)
    later.join()


def test_a_large_picture_of_few_bytes_is_decoded_in_a_child(monkeypatch, tmp_path):
    """Its code-blocks may ask for passes over data that is not there; an honest one gives the same pixels
    there."""
    side = 2200
    noise = np.random.default_rng(0).integers(0, 60, (side, side)).astype(np.uint16)
    for part, child in ((400, True), (side, False)):
        smooth = np.outer(np.arange(side), np.ones(side)).astype(np.uint16)//16
        smooth[:part, :part] += noise[:part, :part]
        stream = imagecodecs.jpeg2k_encode(smooth, codecformat='j2k', bitspersample=16, reversible=True)
        path = tmp_path/'large.dcm'
        path.write_bytes(meta(J2K) + header(side, side) + encapsulated([stream]))
        asked = []
        real = in_child.decode
        monkeypatch.setattr(in_child, 'decode', lambda *a, real=real, asked=asked: asked.append(a[0])
            or real(*a))
        stored = decode_stored(open_dicom(path), path=path)[0]
        monkeypatch.undo()
        assert np.array_equal(stored, smooth) and bool(asked)==child
        assert read_radiograph(path, size=200).codec.startswith('pillow') # at a quarter it is small


@pytest.mark.skipif(not hasattr(resource, 'RLIMIT_AS'), reason='this system has no such limit')
def test_the_child_starts_under_a_hard_limit(tmp_path):
    "A limit that cannot be raised is kept to."
    code = ("import resource; from radiology_ai.dicom.child import in_child\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3*2**30,)*2)\n"
        "import imagecodecs, numpy as np\nb = imagecodecs.jpeg2k_encode(np.zeros((8, 8), np.uint8), codecformat='j2k')\n"
        "print(len(in_child.decode('jpeg2k', b)))")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip()=='64', done.stderr


@pytest.mark.skipif(not os.access('/proc/self/environ', os.R_OK), reason='this system has no files of the kernel')
def test_a_file_that_says_it_is_empty_is_not_read(tmp_path):
    """Those of the kernel are regular files of no size, and some never end: what is read of them is what they say.
    /proc/kmsg, which only some may open, gave nothing and no end, for ever."""
    folder = tmp_path/'films'
    folder.mkdir()
    for name in ('environ', 'kmsg'):
        (folder/f'{name}.dcm').symlink_to('/proc/kmsg' if name=='kmsg' else '/proc/self/environ')
    (tmp_path/'empty').touch()
    assert bytes_digest('/proc/self/environ')==bytes_digest(tmp_path/'empty')
    with open_regular('/proc/self/environ') as f: assert f.read()==b''
    for path in folder.iterdir():
        with pytest.raises(DicomError, match='the file is empty|cannot be opened'): read_radiograph(path)
    assert index_dicoms(folder, workers=1).error.str.fullmatch('the file is empty|the file cannot be opened.*').all()
    store = preprocess_folder(folder, tmp_path/'store', Preprocess(size=32), workers=1, show=False, allow_empty=True)
    assert len(store.errors)==2


def test_a_cell_of_megabytes_does_not_hold_up_what_is_said(tmp_path):
    cell = 'x'*2**25
    start = time.process_time()
    with speaking(()) as speech:
        note_ids(pd.DataFrame({'image_id': [cell, 'MRN-0042']}))
        said = speech.without_names('column image_id holds MRN-0042')
    from radiology_ai.cli import _one_line
    line = _one_line(DataError(f'It holds {cell}', 'Write it otherwise'))
    assert said=='column image_id holds #2' and len(line)<5000 and line.endswith('Write it otherwise')
    assert time.process_time() - start<2*pace()


# ---------------------------------------------------------------- what is said of bytes

def test_a_digest_is_of_all_bytes(tmp_path):
    "Two files that differ in their middle are not the same, however large they are."
    for name in 'ab': with_hole(tmp_path/name, b'head', 40*2**20, b'tail')
    with open(tmp_path/'b', 'r+b') as f:
        f.seek(20*2**20)
        f.write(b'x')
    a, b = tmp_path/'a', tmp_path/'b'
    assert bytes_digest(a)!=bytes_digest(b)
    assert bytes_digest(a, whole=False)==bytes_digest(b, whole=False) and bytes_digest(a,
        whole=False).startswith(ENDS)


def test_the_same_bytes_are_the_same_bytes(tmp_path):
    "Of three large films with one header, two are the same."
    head = meta() + header(4800, 4800) + struct.pack('<HH2sHI', 0x7FE0, 0x10, b'OW', 0, 4800*4800*2)
    for name in 'abc': with_hole(tmp_path/f'{name}.dcm', head, 4800*4800*2)
    with open(tmp_path/'c.dcm', 'r+b') as f:
        f.seek(20*2**20)
        f.write(b'x')
    df = index_dicoms(tmp_path)
    assert (df.error=='').all()
    twice = find_duplicates(df)
    assert [Path(p).stem for p in twice.path[twice.kind=='same bytes']]==['a', 'b']


# ---------------------------------------------------------------- only files

def films(folder, n=3):
    folder.mkdir()
    for k in range(n): write_dicom(folder/f'{k}.dcm', np.roll(SOFT, k, 1), bits=12,
        header=dict(PatientID=f'P{k}', SOPInstanceUID=f'1.2.9.{k}'))
    return folder


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes')
def test_pipes_and_devices_are_no_files(tmp_path):
    "In every command a row, at once and with one worker."
    folder = films(tmp_path/'in')
    os.mkfifo(folder/'x.dcm')
    for name, target in (('zero', '/dev/zero'), ('random', '/dev/random'), ('self', folder/'self.dcm')):
        (folder/f'{name}.dcm').symlink_to(target)
    odd = 4
    with pytest.raises(DicomError, match='not a regular file'): read_radiograph(folder/'x.dcm')
    with pytest.raises(DicomError, match='not a regular file'): read_radiograph(folder/'zero.dcm')
    df = index_dicoms(folder)
    assert (df.error!='').sum()==odd and (df.error=='it is not a regular file').sum()==3
    store = preprocess_folder(folder, tmp_path/'store', Preprocess(size=32), workers=1)
    assert len(store)==3 and len(store.errors)==odd
    account = deidentify(folder, tmp_path/'out', workers=1)
    assert (account.status=='ok').sum()==3 and (account.status=='error').sum()==odd
    assert bytes_digest(folder/'x.dcm')=='' and bytes_digest(folder/'zero.dcm')==''
    explored = explore_dicoms(folder, pixels='all', workers=1)
    assert len(explored.index)==3 + odd


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes')
def test_tables_are_files(tmp_path):
    for name in ('labels.csv', 'index.parquet'): os.mkfifo(tmp_path/name)
    with pytest.raises(DataError): read_labels(tmp_path/'labels.csv')
    with pytest.raises(DataError): limits.table_bytes(tmp_path/'labels.csv')
    with pytest.raises(DataError): read_index(tmp_path/'index.parquet')
    df = index_dicoms(films(tmp_path/'in'))
    with pytest.raises(DataError, match='not a regular file'): join_labels(df, tmp_path/'labels.csv')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes')
def test_settings_keys_masks_and_books_are_files(tmp_path):
    for name in ('settings.toml', 'key', 'mask.png', 'book.xlsx', 'b.csv'): os.mkfifo(tmp_path/name)
    with pytest.raises(DataError, match='settings file'): read_settings(tmp_path/'settings.toml')
    with pytest.raises(DataError, match='cannot be read'): read_key(tmp_path/'key')
    with pytest.raises(DataError, match='cannot be read'): _one_mask(tmp_path/'mask.png', 'a')
    with pytest.raises(DataError,
            match='not a readable Excel file'), limits.open_workbook(tmp_path/'book.xlsx'):
        pass
    for name in ('settings.toml', 'key'):
        (tmp_path/name).unlink()
        with_hole(tmp_path/name, b'', 10**9)
    with pytest.raises(DataError, match='settings file'): read_settings(tmp_path/'settings.toml')
    with pytest.raises(DataError, match='cannot be read'): read_key(tmp_path/'key')


# ---------------------------------------------------------------- tables

def book(path, xml=b'', name='xl/worksheets/sheet1.xml'):
    "An Excel file one of whose parts is replaced."
    from openpyxl import Workbook
    made = Workbook()
    made.active.append(['image_id', 'answer'])
    made.save(path)
    with zipfile.ZipFile(path) as z: parts = {i.filename: z.read(i) for i in z.infolist()}
    if xml: parts[name] = xml(parts[name])
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for k, v in parts.items(): z.writestr(k, v)
    return path


def test_packed_books(tmp_path):
    with limits.open_workbook(book(tmp_path/'good.xlsx')) as b: assert len(list(b.active.iter_rows()))==1
    with pytest.raises(DataError, match='unpacks to'):
        with limits.open_workbook(book(tmp_path/'large.xlsx', lambda b: b + b' '*2**26)): pass
    wide = book(tmp_path/'wide.xlsx', lambda b: b.replace(b'A1:B1', b'A1:XFD1048576'))
    with pytest.raises(DataError, match='1048576 rows'):
        with limits.open_workbook(wide): pass


def test_packed_tables(tmp_path):
    bomb = tmp_path/'labels.csv.gz'
    with gzip.open(bomb, 'wb', 1) as f:
        for _ in range(64): f.write(b'image_id,label\n' + bytes(2**20))
    with pytest.raises(DataError, match='holds more than'): read_labels(bomb)
    honest = tmp_path/'honest.csv.gz'
    honest.write_bytes(gzip.compress(b'image_id,label\n'
        + b''.join(b'%d,%d\n'%(k, k%2) for k in range(20_000))))
    assert len(read_labels(honest, 'label'))==20_000
    honest.write_bytes(honest.read_bytes()[:-900])
    with pytest.raises(DataError, match='damaged gzip'): read_labels(honest)


def test_wide_tables(tmp_path):
    wide = tmp_path/'wide.csv'
    wide.write_text('image_id,' + ','.join(f'c{k}' for k in range(100_000)) + '\n' + 'a' + ',1'*100_000
        + '\n')
    with pytest.raises(DataError, match='columns'): read_labels(wide)
    wide.write_text('image_id,' + ','.join(f'c{k}' for k in range(400)) + '\n' + 'a' + ',1'*400 + '\n')
    assert read_labels(wide).shape==(1, 401)


def test_repeated_cells(tmp_path):
    "A parquet file of some kilobytes with a hundred million cells."
    import pyarrow as pa
    from pyarrow import parquet
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2**20, np.int32)), pa.array(['x']))
    with parquet.ParquetWriter(tmp_path/'a.parquet', pa.schema([('image_id', column.type)])) as f:
        for _ in range(129): f.write_table(pa.table({'image_id': column}))
    for read in (read_labels, read_index):
        with pytest.raises(DataError): read(tmp_path/'a.parquet')


def test_repeated_texts(tmp_path):
    "A parquet file of a kilobyte with a gigabyte of text; an honest one is read."
    import pyarrow as pa
    from pyarrow import parquet
    with parquet.ParquetWriter(tmp_path/'a.parquet', pa.schema([('image_id', pa.string())]),
            compression='zstd') as f:
        for _ in range(10): f.write_table(pa.table({'image_id': pa.array(['x'*10**6]*100)}))
    assert (tmp_path/'a.parquet').stat().st_size<20_000
    for read in (read_labels, read_index):
        with pytest.raises(DataError, match='bytes of text'): read(tmp_path/'a.parquet')
    ids = [f'{i:040d}' for i in range(20_000)]
    pd.DataFrame({'image_id': ids, 'x': [0, 1]*10_000}).to_parquet(tmp_path/'b.parquet')
    assert read_labels(tmp_path/'b.parquet').image_id.tolist()==ids


# ---------------------------------------------------------------- one file, one row

def rewritten(source, target, charset=None, **values):
    "A copy whose texts are these bytes."
    ds = pydicom.dcmread(source)
    if charset is not None: ds.SpecificCharacterSet = charset
    for k, v in values.items():
        tag = pydicom.tag.Tag(k)
        v += b' '*(len(v)%2)
        implicit, little = ds.original_encoding
        ds._dict[tag] = pydicom.dataelem.RawDataElement(tag,
            None if implicit else pydicom.datadict.dictionary_VR(tag), len(v), v, 0,
            implicit, little)
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter('ignore')
        ds.save_as(target, enforce_file_format=False)


def every_command(folder, tmp_path) -> tuple:
    "The index, the store, the account and the page of a folder."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        df = index_dicoms(folder)
        write_index(df, tmp_path/'i.parquet')
        store = preprocess_folder(folder, tmp_path/'store', Preprocess(size=32), workers=1)
        account = deidentify(folder, tmp_path/'out', workers=1, link=tmp_path/'link.csv')
        explore_dicoms(read_index(tmp_path/'i.parquet'), pixels='all', workers=1).to_html(tmp_path/'x.html')
    return df, store, account


@pytest.mark.parametrize('charset', ['unicode_escape', 'utf-7', 'punycode', 'raw_unicode_escape', 'idna',
    'nonsense'])
def test_charsets_that_are_codecs(charset, tmp_path):
    folder = films(tmp_path/'in')
    text = dict(unicode_escape=b'\\ud800x', raw_unicode_escape=b'\\ud800x').get(charset,
        b'+2AA-' if charset=='utf-7' else b'a'*20 + b'-b')
    rewritten(folder/'0.dcm', folder/'odd.dcm', charset, Manufacturer=text, PatientID=text,
        SeriesInstanceUID=text)
    df, store, account = every_command(folder, tmp_path)
    assert (df.error=='').all() and len(df)==4
    assert len(store) + len(store.errors)==4
    assert len(account)==4
    for k in ('Manufacturer', 'PatientID'): df[k].map(lambda v: v.encode('utf-8'))


def test_a_codec_that_is_none_of_text(tmp_path):
    folder = films(tmp_path/'in')
    odd = element(8, 5, 'CS', 'zlib') + header(before=element(8, 0x70, 'LO', b'M\xfcller'))
    (folder/'odd.dcm').write_bytes(meta() + odd + PIXELS)
    df, store, account = every_command(folder, tmp_path)
    assert df.Manufacturer[df.path.str.endswith('odd.dcm')].tolist()==['Müller'] and len(store)==len(
        account)==4


def test_punycode_takes_no_hours(tmp_path):
    folder = films(tmp_path/'in', 1)
    rewritten(folder/'0.dcm', folder/'odd.dcm', 'punycode', Manufacturer=b'a'*30_000 + b'-' + b'b'*30_000)
    assert index_row(folder/'odd.dcm')['Manufacturer'].startswith('aaa')
    assert read_radiograph(folder/'odd.dcm').tags['Manufacturer'].startswith('aaa')


@pytest.mark.parametrize('name', [b'caf\xe9\xff.dcm', b'n'*251 + b'.dcm', b'a.' + b'x'*253,
    b'a\nb\x1b[31m.dcm', b'$\\frac{1$.dcm'])
def test_odd_names(name, tmp_path):
    folder = films(tmp_path/'in')
    try: (folder/os.fsdecode(name)).write_bytes((folder/'0.dcm').read_bytes()[:-2] + b'zz')
    except OSError: pytest.skip('this file system has no such names')
    df, store, account = every_command(folder, tmp_path)
    assert len(df)==4 and len(store) + len(store.errors)==4 and len(account)==4
    bad = b'\xff' in name
    assert (df.error!='').sum()==bad
    if bad: assert store.errors.cause.str.contains('not UTF-8').any()


@pytest.mark.parametrize('text', [b'$\\frac{1$', b'$a_b^c$', b'\\$x$', b'<b>&amp;'])
def test_no_mathematics_in_headers(text, tmp_path):
    folder = films(tmp_path/'in')
    rewritten(folder/'0.dcm', folder/'odd.dcm', Manufacturer=text, BodyPartExamined=text)
    df, store, account = every_command(folder, tmp_path)
    assert (df.error=='').all() and (tmp_path/'x.html').stat().st_size>10_000


# ---------------------------------------------------------------- memory

def hungry(n):
    "Takes all memory in small pieces where n is 3."
    if n!=3: return n
    held = []
    while True: held.append([n]*20)


OUT_OF_MEMORY = '''
import resource,sys
sys.path.insert(0, {tests!r})
from test_limits import hungry
from radiology_ai.names import note_ids, speaking
from radiology_ai.parallel import run_parallel
def gone(item, cause): return f'{{item}} {{cause}}'
if __name__=='__main__':
    resource.setrlimit(resource.RLIMIT_AS, ({gb}*2**30,)*2)
    print(list(run_parallel(hungry, list(range(8)), {workers}, few=0, show=False, lost=gone)))
'''


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
def test_memory_that_runs_out_costs_one_item(workers, tmp_path):
    script = tmp_path/'script.py'
    script.write_text(OUT_OF_MEMORY.format(tests=str(Path(__file__).parent), workers=workers, gb=2))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120,
        env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert "[0, 1, 2, '3 ran out of memory', 4, 5, 6, 7]" in done.stdout, done.stdout + done.stderr


def no_memory(*args, **kwargs): raise MemoryError


def test_memory_is_the_cause(tmp_path, monkeypatch):
    "A film for which memory does not suffice is told as that, not as damaged."
    folder = films(tmp_path/'in')
    from radiology_ai.dicom import read, stored
    monkeypatch.setattr(read, 'decode', no_memory)
    monkeypatch.setattr(stored, 'decode', no_memory)
    with pytest.raises(DicomError, match='not enough memory'): read_radiograph(folder/'0.dcm')
    store = preprocess_folder(folder, tmp_path/'store', Preprocess(size=32), workers=1, allow_empty=True)
    assert (store.errors.cause=='there was not enough memory for it').all() and len(store.errors)==3
    account = deidentify(folder, tmp_path/'out', workers=1)
    assert (account.cause=='there was not enough memory for it').all()


def test_an_error_without_a_substitute_is_raised():
    with pytest.raises(MemoryError): list(run_parallel(no_memory, [1], 1, show=False))


def test_read_index_keeps_what_was_written(tmp_path):
    df = index_dicoms(films(tmp_path/'in'))
    pd.testing.assert_frame_equal(read_index(write_index(df, tmp_path/'i.parquet')), df)
