"""A grammar of DICOM files: headers, frames and streams that are well formed in most of their parts and odd in a few.

File number i depends on nothing but the seed and i. What is drawn: the way the file begins (preamble, file meta), the coding
(implicit, explicit, big endian, deflated), text of every character set and of Python's codecs that are none, sequences of known
and unknown length within each other, private blocks, wrong lengths and types, elements that come twice, values of huge multiplicity;
sizes, bits, planes, photometric interpretations, palettes, overlays, tables and windows; offset tables and fragments; and streams
whose own parts (markers, tables, tiles, runs, chunks, entries) are changed as such. `benchmarks/fuzz_dicom.py --files` reads them.
"""
import io
import random
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache

import imagecodecs
import numpy as np
from PIL import Image

from radiology_ai.phantom.hospital import SYNTAXES, encode_frame

LONG = {'OB', 'OW', 'OF', 'OD', 'OL', 'OV', 'SQ', 'UN', 'UT', 'UC', 'UR', 'SV', 'UV'}
VRS = sorted(LONG | {'AE', 'AS', 'AT', 'CS', 'DA', 'DS', 'DT', 'FD', 'FL', 'IS', 'LO', 'LT', 'PN', 'SH', 'SL',
    'SS', 'ST',
    'TM', 'UI', 'UL', 'US'})
TEXTS = ('LO', 'SH', 'PN', 'CS', 'LT', 'ST', 'UT', 'UC', 'AE', 'UI', 'DA', 'TM', 'DT', 'AS', 'DS', 'IS', 'UR')
CHARSETS = ['', 'ISO_IR 100', 'ISO_IR 192', 'ISO_IR 13', 'ISO_IR 166', 'GB18030', 'GBK', '\\ISO 2022 IR 87',
    'ISO 2022 IR 6\\ISO 2022 IR 149', '\\ISO 2022 IR 58', 'unicode_escape', 'utf-7', 'punycode', 'idna',
    'rot13', 'zlib', 'hex',
    'base64', 'bz2', 'undefined', 'utf-16', 'utf-32', 'raw_unicode_escape', 'quopri', 'uu', 'nonsense',
    'ISO_IR 192\\ISO_IR 100',
    'oem', 'mbcs', '..\\..', 'x'*300]
WORDS = [b'SECRET^NAME', b'KNEE', b'$\\frac{1$', b'=1+1', b'a\nb\rc', b'\x1b[31m', b'\x1b$B8@', b'\\ud800x',
    b'\xff\xfe\xfd',
    'Müller'.encode(), 'Müller'.encode('latin-1'), '山田'.encode(), b'+2AA-', b'a-\x80b', b'\0', b'', b' ',
    b'nan', b'1e400', b'-1',
    b'99999999999999999999', b'1\\2\\3', b'\\'*9, b'19700101', b'20261128-', b'1.2.3', b'P1', b'<script>',
    b'DX', b'x'*70, b'0.2\\0.2',
    b'../../x', b'1.2/../../y', b'0', b'.']
HEADER = { # elements beside those of the picture: (tag, type)
    (8, 8): 'CS', (8, 0x12): 'DA', (8, 0x20): 'DA', (8, 0x30): 'TM', (8, 0x50): 'SH', (8, 0x68): 'CS',
    (8, 0x70): 'LO', (8, 0x80): 'LO',
    (8, 0x90): 'PN', (8, 0x1030): 'LO', (8, 0x103E): 'LO', (8, 0x1090): 'LO', (0x10, 0x1000): 'LO',
    (0x10, 0x30): 'DA', (0x10, 0x40): 'CS',
    (0x10, 0x1010): 'AS', (0x10, 0x4000): 'LT', (0x18, 0x15): 'CS', (0x18, 0x60): 'DS', (0x18, 0x1164): 'DS',
    (0x18, 0x5101): 'CS',
    (0x18, 0x1114): 'DS', (0x20, 0x10): 'SH', (0x20, 0x11): 'IS', (0x20, 0x13): 'IS', (0x20, 0x60): 'CS',
    (0x20, 0x62): 'CS', (0x20, 0x4000): 'LT',
    (0x28, 0x30): 'DS', (0x28, 0x34): 'IS', (0x28, 0x301): 'CS', (0x28, 0x1050): 'DS', (0x28, 0x1051): 'DS',
    (0x28, 0x1052): 'DS',
    (0x28, 0x1053): 'DS', (0x28, 0x1056): 'CS', (0x28, 0x120): 'US', (0x28, 0x121): 'US',
    (0x28, 0x2110): 'CS', (0x40, 0xA124): 'UI',
    (0x2050, 0x20): 'CS', (0x5400, 0x1010): 'OW', (0x6000, 0x10): 'US', (0x6000, 0x3000): 'OW',
    (0x4008, 0x300): 'ST', (0x18, 0x1000): 'LO'}
SEQUENCES = [(8, 0x1140), (8, 0x2218), (8, 0x1111), (0x40, 0x275), (0x54, 0x220), (0x28, 0x3010),
    (0x28, 0x3000), (0x40, 0x555), (0x5200, 0x9229),
    (8, 0x2112), (0x10, 0x1002), (0x88, 0x200)]
PHOTOMETRIC = ['MONOCHROME1', 'MONOCHROME2', 'MONOCHROME2', 'RGB', 'YBR_FULL', 'YBR_FULL_422', 'YBR_ICT',
    'YBR_RCT', 'PALETTE COLOR', 'CMYK',
    'ARGB', 'HSV', '', 'monochrome2', 'MONOCHROME2\\RGB']


@dataclass
class Form:
    "How elements are coded, and how often one is odd."
    r: random.Random
    implicit: bool=False
    big: bool=False
    rate: float=.02

    def pack(self, codes: str, *values): return struct.pack(('>' if self.big else '<') + codes, *values)

    def tag(self, tag): return self.pack('HH', *tag)

    def element(self, tag, vr: str, value: bytes, length: int|None=None) -> bytes:
        "One element; `length` is another than that of its value."
        r, times = self.r, 1
        if r.random()<.9: value += (b'\0' if vr in ('UI', 'OB', 'UN') else b' ')*(len(value)%2)
        n = len(value) if length is None else length
        if r.random()<self.rate:
            how = r.randrange(6)
            if how==0: n = max(0, n + r.choice([-3, -2, -1, 1, 2, 7, 100]))
            elif how==1:
                n = r.choice([0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0xFFFF, 2*n, n//2, r.getrandbits(32)])
            elif how==2: vr = r.choice(VRS)
            elif how==3: vr = r.choice(['XX', '  ', '\0\0', '??', 'OX', 'us', 'ZZ'])
            elif how==4 and len(value)<1000: times = r.choice([2, 3, 50])
            else: value = value[:r.randrange(len(value) + 1)]
        n = min(max(0, n), 0xFFFFFFFF)
        if self.implicit: out = self.tag(tag) + self.pack('I', n) + value
        elif vr in LONG: out = self.tag(tag) + vr.encode('latin-1') + b'\0\0' + self.pack('I', n) + value
        else: out = self.tag(tag) + vr.encode('latin-1') + self.pack('H', n & 0xFFFF) + value
        return out*times

    def value(self, vr: str) -> bytes:
        "Bytes that a type might have."
        r = self.r
        if vr in ('US', 'SS', 'OW'): return r.randbytes(2*r.choice([1, 1, 1, 2, 3, 0, 16]))
        if vr in ('UL', 'SL', 'FL', 'AT', 'OF', 'OL'): return r.randbytes(4*r.choice([0, 1, 1, 2]))
        if vr in ('FD', 'OD', 'SV', 'UV', 'OV'): return r.randbytes(8*r.choice([0, 1, 1, 2]))
        if vr in ('OB', 'UN'): return r.randbytes(r.choice([0, 1, 2, 17, 300]))
        if vr in ('DS', 'IS') and r.random()<.7:
            return r.choice(['0.2', '1', '0.2\\0.2', '40', '400', '-1024', '1\\2\\3', '0', '4095',
                '1e3']).encode()
        if r.random()<.004:
            return b'\\'.join([r.choice(WORDS)]*r.choice([300, 3000, 30_000])) # huge multiplicity
        return b'\\'.join(r.choice(WORDS) for _ in range(r.choice([1, 1, 1, 1, 2, 3])))

    def items(self, contents: list) -> bytes:
        "Items of known or unknown length, with or without their ends."
        r, out = self.r, b''
        for c in contents:
            known = r.random()<.5
            out += self.tag((0xFFFE, 0xE000)) + self.pack('I', len(c) if known else 0xFFFFFFFF) + c
            if not known and r.random()<.97 or r.random()<.01:
                out += self.tag((0xFFFE, 0xE00D)) + self.pack('I', 0)
        return out

    def sequence(self, tag, contents: list) -> bytes:
        "A sequence of known or unknown length."
        r, value = self.r, self.items(contents)
        if r.random()<.5: return self.element(tag, r.choice(['SQ']*9 + ['UN']), value)
        end = b'' if r.random()<.03 else self.tag((0xFFFE, 0xE0DD)) + self.pack('I', 0)
        return self.element(tag, r.choice(['SQ']*9 + ['UN']), value + end, 0xFFFFFFFF)

    def nested(self, depth: int) -> bytes:
        "The content of an item."
        r = self.r
        out = [self.element(t, vr, self.value(vr))
            for t, vr in sorted(r.sample(sorted(HEADER.items()), r.randrange(3)))]
        if depth: out.append(self.sequence(r.choice(SEQUENCES), [self.nested(depth - 1)]))
        return b''.join(out)

    def table(self, tag) -> bytes:
        "A lookup table in a sequence."
        r = self.r
        n, bits = r.choice([2, 16, 256, 0, 4096, 65535]), r.choice([8, 12, 16, 0, 17, 255])
        data = np.arange(r.choice([n, n, n//2, 1]), dtype='>u2' if self.big else '<u2').tobytes()
        return self.sequence(tag, [self.element((0x28, 0x3002), 'US',
            self.pack('HHH', n, r.choice([0, 0, 100, 65000]), bits))
            + self.element((0x28, 0x3006), r.choice(['OW', 'US', 'UN']), data)]*r.choice([1, 1, 2, 0]))


# ---------------------------------------------------------------- streams

@lru_cache(None)
def picture(rows: int, cols: int, bits: int, samples: int) -> np.ndarray:
    "A soft picture with some noise."
    y, x = np.mgrid[:rows, :cols]
    a = .5 + .3*np.sin(x/9) + .2*np.cos(y/7) + .02*np.random.default_rng(0).standard_normal((rows, cols))
    a = (np.clip(a, 0, 1)*(2**bits - 1)).astype(np.uint8 if bits<=8 else np.uint16)
    return a if samples==1 else np.stack([a, a//2, a.max() - a], -1)


@lru_cache(None)
def stream(syntax: str, rows: int, cols: int, bits: int, samples: int, how: int) -> bytes:
    "An intact frame; `how` chooses among the ways to code it."
    a = picture(rows, cols, bits, samples)
    if syntax=='progressive':
        out = io.BytesIO()
        Image.fromarray(picture(rows, cols, 8, samples)).save(out, 'JPEG', progressive=True,
            restart_marker_blocks=5*(how%2))
        return out.getvalue()
    if syntax in ('jpeg2000', 'jpeg2000_lossy'):
        options = [{}, dict(resolutions=6), dict(resolutions=1), dict(level=60),
            dict(codecformat='jp2')][how%5]
        return imagecodecs.jpeg2k_encode(a, **dict(codecformat='j2k', reversible=syntax=='jpeg2000',
            numthreads=1) | options)
    if syntax=='htj2k': return imagecodecs.htj2k_encode(a)
    if syntax=='jpeg' and samples==3: return imagecodecs.jpeg8_encode(picture(rows, cols, 8, 3), level=90)
    if syntax=='rle' or samples==1: return encode_frame(a if samples==1 else a[..., 0], syntax, bits)
    if syntax=='jpegls': return bytes(imagecodecs.jpegls_encode(a))
    return imagecodecs.jpeg8_encode(a, lossless=True, predictor=1, bitspersample=bits)


def parts_of(data: bytes, last: bytes=b'\xff\xda') -> list:
    "The marker segments of a stream up to its first scan or tile, and the rest."
    out, p = [data[:2]], 2
    while p + 4<=len(data) and data[p]==0xFF:
        n = 2 + int.from_bytes(data[p+2:p+4], 'big')
        if data[p:p+2]==last: return [*out, data[p:p+n], data[p+n:]]
        out.append(data[p:p+n])
        p += n
    return [*out, data[p:]]


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack('>H', (len(payload) + 2) & 0xFFFF) + payload


def flipped(r, data: bytes, most: int=4) -> bytes:
    "Some bytes changed."
    if not data: return data
    out = bytearray(data)
    for _ in range(r.randint(1, most)):
        out[r.randrange(len(out))] = r.choice([0, 1, 127, 128, 255, r.randrange(256)])
    return bytes(out)


NUMBERS = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 127, 128, 255]


def with_field(r, part: bytes, at: int, size: int) -> bytes:
    "A big endian number of `size` bytes at byte `at` changed."
    if at + size>len(part): return part
    n = r.choice([*NUMBERS, 2**(8*size) - 1, 2**(8*size - 1), r.getrandbits(8*size)]) & (2**(8*size) - 1)
    return part[:at] + n.to_bytes(size, 'big') + part[at + size:]


def odd_jpeg(r, data: bytes) -> bytes:
    "A JPEG or JPEG-LS stream with another structure."
    parts = parts_of(data)
    if len(parts)<3: return flipped(r, data)
    frame = next((i for i, p in enumerate(parts) if p[:1]==b'\xff' and len(p)>9
        and p[1] in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7)), 1)
    how = r.randrange(16)
    if how<=2:
        parts[frame] = with_field(r, parts[frame],
            *r.choice([(4, 1), (5, 2), (7, 2), (9, 1), (10, 1), (11, 1), (12, 1)]))
    elif how==3: parts[-2] = with_field(r, parts[-2], r.randrange(4, max(5, len(parts[-2]))), 1)
    elif how==4:
        i = r.randrange(1, len(parts) - 1)
        parts[i] = parts[i][:4] + flipped(r, parts[i][4:])
    elif how==5:
        parts.insert(r.randrange(1, len(parts)), segment(r.choice([0xE0, 0xE1, 0xEE, 0xFE, 0xDC, 0xDD]),
            r.randbytes(r.choice([0, 2, 12, 400])))*r.choice([1, 1, 2, 300, 5000]))
    elif how==6: del parts[r.randrange(1, len(parts))]
    elif how==7: parts.insert(r.randrange(1, len(parts)), parts[r.randrange(1, len(parts) - 1)])
    elif how==8:
        i, j = r.randrange(1, len(parts)), r.randrange(1, len(parts))
        parts[i:i+1], parts[j:j+1] = parts[j:j+1], parts[i:i+1]
    elif how==9:
        parts[frame] = b'\xff' + bytes([r.choice([0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC9, 0xCA, 0xCB,
            0xF7])]) + parts[frame][2:]
    elif how==10:
        body, k = parts[-1], r.randrange(len(parts[-1]) + 1)
        parts[-1] = body[:k] + r.choice([b'\xff\xd0', b'\xff\xd7', b'\xff\xd9', b'\xff\xff', b'\xff\x01',
            b'\xff\xda\0\2', b'\xff\xc4\0\3\0']) + body[k:]
    elif how==11: parts[-1] = flipped(r, parts[-1], 12)
    elif how==12: # more scans
        scan = parts[-2] + parts[-1][:-2]
        parts[-1] = parts[-1][:-2] + scan*min(r.choice([1, 2, 20, 400]),
            2**21//max(1, len(scan))) + b'\xff\xd9'
    elif how==13:
        # LSE
        parts.insert(frame, segment(0xF8, bytes([r.choice([1, 2, 3, 4])])
            + r.randbytes(r.choice([10, 3, 0, 700]))))
    elif how==14: parts[-1] = parts[-1][:r.randrange(len(parts[-1]) + 1)] + r.choice([b'', b'\xff\xd9'])
    else: parts.insert(1, b'\xff'*r.choice([1, 5, 1000, 20_000]))
    return b''.join(parts)


def odd_jpeg2000(r, data: bytes) -> bytes:
    "A JPEG 2000 stream with other numbers, markers or tiles."
    at = max(0, data.find(b'\xff\x4f\xff\x51'))
    box, parts = data[:at], parts_of(data[at:], b'\xff\x90')
    if len(parts)<4: return flipped(r, data)
    def of(marker): return next((i for i, p in enumerate(parts) if p[:2]==marker), 1)
    size, coding, quant = of(b'\xff\x51'), of(b'\xff\x52'), of(b'\xff\x5c')
    how = r.randrange(12)
    if how<=1:
        parts[size] = with_field(r, parts[size], *r.choice([(4, 2), *((k, 4) for k in range(6, 38, 4)),
            (38, 2), (40, 1), (41, 1), (42, 1)]))
    elif how<=4:
        parts[coding] = with_field(r, parts[coding],
            *r.choice([(4, 1), (5, 1), (6, 2), (8, 1), (9, 1), (10, 1), (11, 1), (12, 1), (13, 1)]))
    elif how==5: # other precincts
        p, n = parts[coding], r.randint(1, 9)
        parts[coding] = segment(0x52, bytes([p[4] | 1]) + p[5:14]
            + bytes(r.choice([0, 0x11, 0x22, 0x44, 0x88, 0xFF]) for _ in range(n)))
    elif how==6: parts[quant] = parts[quant][:4] + flipped(r, parts[quant][4:])
    elif how==7:
        marker = r.choice([0x53, 0x5D, 0x5E, 0x5F, 0x60, 0x61, 0x55, 0x57, 0x58, 0x63, 0x64, 0x50, 0x59])
        parts.insert(r.randrange(2, len(parts) - 1),
            segment(marker, r.randbytes(r.choice([0, 1, 3, 7, 9, 40])))*r.choice([1, 1, 3, 500, 5000]))
    elif how==8: parts[-2] = with_field(r, parts[-2], *r.choice([(4, 2), (6, 4), (10, 1), (11, 1)]))
    elif how==9: parts[-1] = flipped(r, parts[-1], 12)
    elif how==10:
        # tiles again
        parts[-1] = parts[-1][:-2] + (parts[-2] + parts[-1][:-2])*r.choice([1, 3, 60]) + b'\xff\xd9'
    else: parts[-1] = parts[-1][:r.randrange(len(parts[-1]) + 1)] + r.choice([b'', b'\xff\xd9'])
    if r.random()<.1: box = flipped(r, box) if box else b'\0\0\0\x0cjP  \r\n\x87\n' + bytes(r.randrange(30))
    return box + b''.join(parts)


def odd_rle(r, data: bytes) -> bytes:
    "RLE with another number of segments, other starts or other runs."
    head, body, how = [*struct.unpack('<16I', data[:64])], data[64:], r.randrange(6)
    if how==0: head[0] = r.choice([0, 1, 2, 3, 4, 8, 15, 16, 2**31])
    elif how==1:
        head[r.randrange(1, 5)] = r.choice([0, 63, 64, 65, 70, len(data), len(data) - 1, 2**32 - 1, 2**31])
    elif how==2:
        runs = [bytes([r.randrange(256)]) + r.randbytes(r.choice([1, 1, 2, 127]))
            for _ in range(r.choice([1, 50, 2000]))]
        body = b''.join(runs)
    elif how==3: body = flipped(r, body, 20)
    elif how==4: body = body[:r.randrange(len(body) + 1)]
    else: body = b'\x80'*r.choice([1, 100, 100_000]) + body
    return struct.pack('<16I', *head) + body


def odd_stream(r, syntax: str, data: bytes) -> bytes:
    "A stream with its structure changed once or twice."
    change = odd_rle if syntax=='rle' else odd_jpeg2000 if '2000' in syntax or syntax=='htj2k' else odd_jpeg
    for _ in range(r.choice([1, 1, 1, 2])): data = change(r, data)
    return data[:2**22]


def fragmented(f: Form, frames: list) -> bytes:
    "Encapsulated pixel data: an offset table and fragments."
    r, item = f.r, lambda v: b'\xfe\xff\0\xe0' + struct.pack('<I', len(v)) + v
    pieces, starts, at = [], [], 0
    for s in frames:
        starts.append(at)
        n = r.choice([1]*12 + [2, 3, 7]) if len(frames)<100 else 1
        step = max(2, -(-len(s)//n)//2*2)
        cut = [s[k:k + step] for k in range(0, len(s), step)] or [b'']
        cut = [c + b'\0'*(len(c)%2) if r.random()<.995 else c for c in cut]
        pieces += cut
        at += sum(8 + len(c) for c in cut)
    table = struct.pack(f'<{len(starts)}I', *starts)
    how = r.randrange(20)
    if how<8: table = b''
    elif how==8: table = r.randbytes(r.choice([1, 3, 4, 8, 400]))
    elif how==9:
        table = struct.pack(f'<{len(starts)}I', *(s + r.choice([-8, 2, 2**20]) & 0xFFFFFFFF for s in starts))
    if r.random()<.03: pieces.insert(r.randrange(len(pieces) + 1), r.choice([b'', b'ab', pieces[0]]))
    if r.random()<.01: pieces += [b'']*r.choice([10, 3000, 6000])
    out = item(table) + b''.join(map(item, pieces))
    if r.random()<.02: out = flipped(r, out[:40]) + out[40:]
    if r.random()<.97: out += b'\xfe\xff\xdd\xe0\0\0\0\0'
    if r.random()<.03: out += r.randbytes(r.choice([2, 8, 1000]))
    f = Form(r, False, False, 0)
    return f.element((0x7FE0, 0x10), 'OB', out, 0xFFFFFFFF if r.random()<.97 else len(out))


# ---------------------------------------------------------------- files

def image_numbers(r, syntax: str) -> dict:
    "What the header says of the picture, consistent but for a few."
    bits = {'jpeg': 8, 'progressive': 8, 'jpeg12': 12}.get(syntax) or r.choice([8, 10, 12, 12, 14, 16])
    samples = 3 if r.random()<.12 and syntax not in ('jpeg12', 'rle') else 1
    if samples==3: bits = 8
    rows, cols = r.choice([(64, 56), (64, 56), (16, 16), (33, 47), (128, 96), (8, 300)])
    return dict(rows=rows, cols=cols, allocated=8 if bits==8 else 16, stored=bits, high=bits - 1,
        sign=int(r.random()<.1),
        samples=samples, planar=int(r.random()<.3),
        photometric=r.choice(PHOTOMETRIC[:3]) if samples==1 else r.choice(PHOTOMETRIC[3:8]),
        frames=r.choice([1]*12 + [2, 3, 5]))


def odd_numbers(r, said: dict):
    "One of the numbers is another."
    k = r.choice([*said])
    if k=='photometric': said[k] = r.choice(PHOTOMETRIC)
    elif k=='frames': said[k] = r.choice([0, 2, 3, 64, 1000, 16384, 16385, 60000, -1, 2**31])
    elif k in ('rows', 'cols'):
        said[k] = r.choice([0, 1, 2, said[k] + 1, said[k] - 1, 2*said[k], 4096, 7000, 10_000, 65535])
    else: said[k] = r.choice(NUMBERS[:16])


def described(f: Form, said: dict) -> dict:
    "The elements that describe the picture, by tag."
    us = lambda tag, n: {tag: f.element(tag, 'US', f.pack('H', n & 0xFFFF))}
    text = lambda tag, vr, v: {tag: f.element(tag, vr, str(v).encode())}
    out = us((0x28, 2), said['samples']) | text((0x28, 4), 'CS', said['photometric']) | us((0x28, 0x10),
        said['rows'])
    out |= us((0x28, 0x11), said['cols']) | us((0x28, 0x100), said['allocated']) | us((0x28, 0x101),
        said['stored'])
    out |= us((0x28, 0x102), said['high']) | us((0x28, 0x103), said['sign'])
    if said['samples']>1: out |= us((0x28, 6), said['planar'])
    if said['frames']!=1: out |= text((0x28, 8), 'IS', said['frames'])
    if said['photometric']=='PALETTE COLOR':
        for k in range(3):
            n = f.r.choice([256, 16, 0, 65535])
            out[0x28, 0x1101 + k] = f.element((0x28, 0x1101 + k), 'US',
                f.pack('HHH', n, 0, f.r.choice([8, 16])))
            out[0x28, 0x1201 + k] = f.element((0x28, 0x1201 + k), 'OW', f.r.randbytes(2*(n or 65536)))
            if f.r.random()<.1: out[0x28, 0x1221 + k] = f.element((0x28, 0x1221 + k), 'OW', f.r.randbytes(64))
    return out


def overlay(f: Form, said: dict) -> dict:
    "An overlay of its own or in unused bits."
    g, out = f.r.choice([0x6000, 0x6002, 0x601E, 0x6001]), {}
    for e, vr, v in ((0x10, 'US', f.pack('H', said['rows'] & 0xFFFF)),
            (0x11, 'US', f.pack('H', said['cols'] & 0xFFFF)), (0x40, 'CS', b'G'),
            (0x50, 'SS', f.pack('2h', 1, 1)), (0x100, 'US', f.pack('H', f.r.choice([1, 16]))),
            (0x102, 'US', f.pack('H', f.r.choice([0, 0, 12, 15])))):
        out[g, e] = f.element((g, e), vr, v)
    if f.r.random()<.7:
        out[g, 0x3000] = f.element((g, 0x3000), 'OW', bytes(max(0, said['rows']*said['cols']//8 % 9000)))
    return out


def header(f: Form, said: dict, i: int) -> bytes:
    "The elements in front of the pixel data."
    r = f.r
    out = {(8, 0x16): f.element((8, 0x16), 'UI', b'1.2.840.10008.5.1.4.1.1.1.1'),
        (8, 0x18): f.element((8, 0x18), 'UI', b'1.2.3.%d'%i),
        (8, 0x60): f.element((8, 0x60), 'CS', r.choice([b'DX', b'CR', b'XX'])),
        (0x10, 0x10): f.element((0x10, 0x10), 'PN', b'SECRET^NAME'),
        (0x10, 0x20): f.element((0x10, 0x20), 'LO', b'SECRET%d'%(i//2)),
        (0x20, 0xD): f.element((0x20, 0xD), 'UI', b'1.2.9.%d'%i)}
    out |= described(f, said)
    if r.random()<.3: out[8, 5] = f.element((8, 5), 'CS', r.choice(CHARSETS).encode())
    for t, vr in r.sample(sorted(HEADER.items()), r.choice([0, 2, 5, 12])):
        out[t] = f.element(t, vr, f.value(vr))
    t = r.choice(SEQUENCES)
    if r.random()<.3:
        out[t] = f.sequence(t, [f.nested(r.choice([0, 0, 1, 2, 5]))
            for _ in range(r.choice([0, 1, 1, 2, 9]))])
    elif r.random()<.07: out[t] = f.sequence(t, [f.nested(r.choice([20, 63, 64, 65, 200]))])
    t = r.choice([(0x28, 0x3000), (0x28, 0x3010)])
    if r.random()<.08: out[t] = f.table(t)
    if r.random()<.08: out |= overlay(f, said)
    if r.random()<.2: # a private block, with or without its creator
        g = r.choice([9, 0x11, 0x19, 0x29, 0x2001, 0x7FD1])
        if r.random()<.8: out[g, 0x10] = f.element((g, 0x10), 'LO', r.choice(WORDS) or b'ACME')
        for e in range(0x1001, 0x1001 + r.choice([1, 3, 40])):
            vr = r.choice(VRS)
            out[g, e] = f.sequence((g, e), [f.nested(1)]) if vr=='SQ' else f.element((g, e), vr, f.value(vr))
    for k in [k for k in out if r.random()<.006]: del out[k]
    parts = [out[k] for k in sorted(out)]
    if r.random()<.02: r.shuffle(parts)
    if r.random()<.02: parts.insert(r.randrange(len(parts)), r.choice(parts))
    if r.random()<.01:
        parts.insert(r.randrange(len(parts)), f.tag((r.choice([8, 0x10, 0x28]), 0)) + r.randbytes(8))
    if r.random()<.002:
        parts.insert(len(parts)//2, b''.join(f.element((0x29, k & 0xFFFF), 'LO', b'')
            for k in range(r.choice([2000, 20_000, 60_000]))))
    if r.random()<.002:
        parts.insert(len(parts)//2, f.sequence((8, 0x1140), [b'']*r.choice([1000, 9000, 30_000])))
    if r.random()<.002:
        parts.insert(len(parts)//2, f.element((0x29, 0x1099), r.choice(['OB', 'UT', 'UN']),
            bytes(r.choice([10**5, 3*10**6]))))
    if r.random()<.002: parts.insert(len(parts)//2, bytes(r.choice([8, 5000, 10**6])))
    return b''.join(parts)


def pixels(f: Form, said: dict, syntax: str, honest: dict) -> bytes:
    "The pixel data element of the `honest` numbers."
    r = f.r
    a = picture(honest['rows'], honest['cols'], honest['stored'], honest['samples'])
    if syntax in ('implicit', 'explicit', 'big_endian', 'deflated'):
        data = (a.byteswap() if f.big and a.dtype.itemsize==2 else a).tobytes()*honest['frames']
        how = r.randrange(14)
        if how==0: data = data[:r.randrange(len(data) + 1)]
        elif how==1: data += bytes(r.choice([1, 2, 100, 10**5]))
        elif how==2: return f.element(r.choice([(0x7FE0, 8), (0x7FE0, 9)]), r.choice(['OF', 'OD']), data)
        elif how==3:
            return f.element((0x7FE0, 0x10), 'OW', data, r.choice([0xFFFFFFFF, 0, 2**31, len(data)//2]))
        elif how==4 and r.random()<.3: return b''
        elif how==5 and r.random()<.1: data = bytes(r.choice([10**6, 2*10**7]))
        return f.element((0x7FE0, 0x10), 'OB' if honest['allocated']==8 else 'OW', data)
    s = stream(syntax, honest['rows'], honest['cols'], honest['stored'], honest['samples'], r.randrange(5))
    odd = r.random()<.75
    n = min(honest['frames'], 5)
    return fragmented(f, [odd_stream(r, syntax, s) if odd and r.random()<.8 else s for _ in range(n)])


def file_start(r, syntax: str) -> bytes:
    "Preamble and file meta, or what stands in their place."
    f = Form(r, False, False, .004)
    told = 'jpeg' if syntax=='progressive' else syntax
    if r.random()<.04: told = r.choice([*SYNTAXES])
    uid = (str(SYNTAXES[told]).encode() if r.random()<.98
        else r.choice([b'', b'1.2.3', b'1.2.840.10008.1.2.4.100', b'x'*64, b'1.2.840.10008.1.2.4.110']))
    body = (f.element((2, 1), 'OB', b'\0\1') + f.element((2, 2), 'UI', b'1.2.840.10008.5.1.4.1.1.1.1')
        + f.element((2, 3), 'UI', b'1.2.3')
        + f.element((2, 0x10), 'UI', uid))
    if r.random()<.2:
        body += f.element((2, 0x16), 'AE', b'AE') + f.element((2, 0x102), 'OB',
            r.randbytes(r.choice([4, 5000])))
    n = len(body) if r.random()<.97 else r.choice([0, 1, len(body) + 9, 2**32 - 1, 2**31])
    meta = f.element((2, 0), 'UL', struct.pack('<I', n)) + body
    how = r.randrange(60)
    if how==0: return b''             # nothing in front of the data set
    if how==1: return meta            # no preamble
    if how==2: return bytes(128) + b'DICM'
    if how==3: return bytes(128) + b'DICN' + meta
    return (bytes(128) if how>4 else r.randbytes(128)) + b'DICM' + meta


SYNTAX_SHARES = ['explicit']*4 + ['implicit']*3 + ['big_endian', 'deflated', 'deflated'] + ['jpeg', 'jpeg',
    'progressive', 'jpeg12',
    'jpeg_lossless', 'jpeg_lossless', 'jpeg_lossless57', 'jpegls', 'jpegls', 'jpeg2000', 'jpeg2000',
    'jpeg2000', 'jpeg2000_lossy',
    'htj2k', 'htj2k', 'rle', 'rle']


def dicom_file(r, i: int) -> bytes:
    "One DICOM file."
    syntax = r.choice(SYNTAX_SHARES)
    f = Form(r, syntax=='implicit', syntax=='big_endian', r.choice([0, 0, 0, .01, .05]))
    honest = image_numbers(r, syntax)
    said = dict(honest)
    if r.random()<.25: odd_numbers(r, said)
    if r.random()<.03: odd_numbers(r, said)
    if said['photometric']=='YBR_FULL_422' and syntax in ('explicit', 'implicit') and r.random()<.5:
        said['photometric'] = 'RGB'
    body = header(f, said, i) + pixels(f, said, syntax, honest)
    if r.random()<.05: body += f.element((0xFFFC, 0xFFFC), 'OB', bytes(r.choice([2, 10, 3000])))
    start = file_start(r, syntax)
    if syntax=='deflated':
        if r.random()<.02: body += bytes(r.choice([10**6, 3*10**7]))
        body = zlib.compress(body, 1, -15)
        if r.random()<.1: body = flipped(r, body)
    data = start + body
    if r.random()<.06: data = flipped(r, data)
    if r.random()<.05: data = data[:r.randrange(len(data) + 1)]
    return data


def png_file(r) -> bytes:
    "A PNG whose chunks are drawn."
    def chunk(kind, v):
        return struct.pack('>I', len(v)) + kind + v + struct.pack('>I',
            zlib.crc32(kind + v) if r.random()<.99 else 0)
    bits, colour = r.choice([(8, 0), (16, 0), (8, 2), (8, 3), (1, 0), (8, 4), (8, 6), (16, 2), (4, 3),
        (3, 1)])
    h, w = r.choice([(32, 40), (32, 40), (1, 1), (0, 5), (7000, 7100), (20_000, 3), (2**31 - 1, 2)])
    per = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    row = -(-min(w, 8000)*per*bits//8)
    raw = b''.join(bytes([r.choice([0]*9 + [1, 2, 3, 4, 9])]) + r.randbytes(min(row, 99))
        + bytes(max(0, row - 99)) for _ in range(min(h, 64)))
    more = [r.choice([(b'PLTE', r.randbytes(3*r.choice([2, 256, 300]))),
        (b'tRNS', r.randbytes(r.choice([2, 256]))), (b'sBIT', b'\x08'),
        (b'zTXt', b'a\0\0' + zlib.compress(bytes(r.choice([10, 10**6, 2*10**7])), 1)),
        (b'iCCP', b'a\0\0' + zlib.compress(bytes(r.choice([10, 10**7])), 1)),
        (b'iTXt', b'a\0\1\0\0\0' + zlib.compress(bytes(10**6), 1)), (b'eXIf', r.randbytes(60)),
        (b'acTL', struct.pack('>II', r.choice([1, 2, 2**31]), 0)),
        (b'fcTL', r.randbytes(26)), (b'pHYs', r.randbytes(9)), (b'gAMA', r.randbytes(4)),
        (b'IHDR', r.randbytes(13))]) for _ in range(r.choice([0, 0, 1, 3]))]
    if colour==3 and r.random()<.9: more.insert(0, (b'PLTE', r.randbytes(768)))
    packed, k = zlib.compress(raw, 1), r.choice([1, 1, 2, 50])
    step = max(1, len(packed)//k)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR',
        struct.pack('>IIBBBBB', w, h, bits, colour, 0, 0, r.choice([0, 0, 0, 1])))
        + b''.join(chunk(*c) for c in more)
        + b''.join(chunk(b'IDAT', packed[p:p + step]) for p in range(0, len(packed), step))
        + chunk(b'IEND', b''))


def tiff_file(r) -> bytes:
    "A TIFF whose entries are drawn."
    order, out = r.choice('<>'), b''
    pack = lambda codes, *v: struct.pack(order + codes, *v)
    w, h, bits = r.choice([(8, 8), (8, 8), (64, 64), (60_000, 60_000), (0, 8),
        (7000, 7000)]) + (r.choice([1, 8, 8, 16, 32]),)
    compression = r.choice([1, 1, 1, 5, 7, 8, 32773, 32946, 2, 4, 50000, 34712])
    body = r.randbytes(min(w*h*bits//8, 5000))
    if compression in (8, 32946): body = zlib.compress(bytes(min(w*h*max(1, bits//8), 3*10**7)), 1)
    if compression==7: body = odd_jpeg(r, stream('jpeg', 64, 56, 8, 1, 0))
    at = 8 + len(body)
    tags = {256: (4, 1, w), 257: (4, 1, h), 258: (3, 1, bits), 259: (3, 1, compression),
        262: (3, 1, r.choice([0, 1, 1, 2, 3, 6, 8])), 273: (4, 1, 8),
        277: (3, 1, r.choice([1, 1, 3, 4])), 278: (4, 1, h), 279: (4, 1, len(body))}
    for _ in range(r.choice([0, 1, 2])):
        tags[r.choice([*tags, 317, 320, 322, 323, 324, 325, 338, 339, 700, 34665, 33550])] = (r.choice([1, 2,
            3, 4, 5, 12, 99]),
            r.choice([0, 1, 1, 2, 1000, 2**20, 2**31]), r.choice([0, 1, 8, 16, at, 2**31, r.getrandbits(32)]))
    pages = r.choice([1, 1, 1, 2, 5, 600])
    for k in range(pages):
        entries = b''.join(pack('HHI', t, kind, n)
            + (pack('HH', v & 0xFFFF, 0) if kind==3 and n==1 else pack('I', v))
            for t, (kind, n, v) in sorted(tags.items()))
        here = 8 + len(body) + len(out)
        size = 2 + len(entries) + 4
        out += pack('H', len(tags)) + entries + pack('I',
            r.choice([here + size]*9 + [8, here]) if k<pages - 1 else 0)
    return (b'II*\0' if order=='<' else b'MM\0*') + pack('I', at) + body + out


def made(seed: int, i: int) -> tuple[str, bytes]:
    "File number `i`: its kind and its bytes."
    r = random.Random(f'{seed} {i}')
    k = r.random()
    if k<.04: return 'png', png_file(r)
    if k<.08: return 'tiff', tiff_file(r)
    if k<.12:
        s = r.choice(['jpeg', 'progressive', 'jpeg'])
        return 'jpeg', odd_jpeg(r, stream(s, 64, 56, 8, r.choice([1, 3]), r.randrange(5)))
    return 'dicom', dicom_file(r, i)
