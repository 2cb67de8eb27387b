"""The cells of the golden matrix: small pictures, every value chosen by arithmetic, and how each must be shown.

A cell is one DICOM file: photometric interpretation, modality step, VOI step, sign, bits and transfer syntax. `write_cell` writes it,
`shown` is the display of PS3.3 C.11 in plain float64, and `quantise` turns pixels of the reader into whole numbers as DCMTK rounds them:

- windows (`floor`): DCMTK cuts off, so pixels * (2**depth - 1) are cut off. The picture holds no value whose display lies within 1/64 of
  a step (the exact ends apart), so float32 and float64 agree, and `depth` is the largest for which most values stay.
- tables (`round`), and 8 bits without a window: DCMTK shows an entry of n bits as it is at n bits of output, so
  pixels * (2**n - 1) are rounded.
- tables shown inverted (`inverse`): DCMTK shows entry v as M - v*(M - 1)/(M + 1) cut off, M = 2**n - 1, which is one step
  off the standard in the upper half. The entry is found by rounding, then goes through the same line.
"""
import hashlib
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from radiology_ai.phantom.hospital import SYNTAXES, encode_frame, made_up_uid

MARGIN = 1/64 # of an output step: no shown value lies nearer to one
FORMATS = {'8/8': (8, 8, 7), '16/8': (16, 8, 7), '16/10': (16, 10, 9), '16/12': (16, 12, 11),
    '16/12h15': (16, 12, 15), '16/14': (16, 14, 13), '16/16': (16, 16, 15)}
DCMTK_SYNTAXES = ['implicit', 'explicit', 'big_endian', 'deflated', 'rle', 'jpeg_lossless57', 'jpeg_lossless',
    'jpegls']
ALL_SYNTAXES = [*DCMTK_SYNTAXES, 'jpeg2000', 'htj2k']
PLAIN = ['implicit', 'explicit', 'big_endian', 'deflated', 'rle']
PIPELINES = [('none', v) for v in ('none', 'linear', 'fraction', 'wide', 'step', 'several', 'exact',
    'sigmoid', 'lut8', 'lut8words', 'lut12', 'lut16', 'lutwindow')]
PIPELINES += [('scale', v) for v in ('none', 'linear', 'exact', 'sigmoid', 'lut8', 'lut16')] + [('negative',
    v) for v in ('none', 'linear', 'sigmoid', 'lut16')]
PIPELINES += [('half', 'none'), ('half', 'linear'),
    ('real', 'linear')] + [('mlut', v) for v in ('none', 'linear', 'sigmoid', 'lut8', 'lut16')]
# 65535 computed as 65534.999...
WHITE_END = {'2 negative none signed 16/14 implicit', '2 half none signed 16/10 jpeg_lossless57'}


@dataclass(frozen=True)
class Cell:
    "One file of the matrix."
    photometric: str='MONOCHROME2'
    modality: str='none'
    voi: str='linear'
    signed: bool=False
    format: str='16/12'
    syntax: str='explicit'
    extra: str=''       # what is special
    shape: tuple=(24, 20)
    frames: int=1       # the last is read

    @property
    def name(self) -> str:
        sign = 'signed' if self.signed else 'unsigned'
        frames = f'{self.frames} frames' if self.colour and self.frames>1 else ''
        return ' '.join(o for o in (self.photometric.removeprefix('MONOCHROME'), self.modality, self.voi,
            sign, self.format, self.syntax, self.extra, frames) if o)

    @property
    def alloc(self): return FORMATS[self.format][0]

    @property
    def bits(self): return FORMATS[self.format][1]

    @property
    def low(self): return -2**(self.bits-1) if self.signed else 0

    @property
    def high(self): return self.low + 2**self.bits - 1

    @property
    def inverted(self): return self.photometric=='MONOCHROME1' or self.extra=='shape inverse'

    @property
    def view(self):
        "Which of several windows or tables is shown, from 0."
        return int(self.extra=='second view')

    @property
    def colour(self): return self.photometric=='RGB'

    @property
    def frame(self): return self.frames - 1 if self.frames>1 else None

    @property
    def source(self) -> str:
        "Where the expected value comes from."
        if self.extra=='shape identity':
            return 'formula: MONOCHROME1 with IDENTITY contradicts itself, DCMTK follows the shape'
        if self.name in WHITE_END:
            return 'formula: DCMTK falls one step short of white at the end of the window, by floating point'
        if self.voi=='exact': return 'formula: DCMTK has no LINEAR_EXACT'
        if self.modality=='real': return 'formula: DCMTK cuts modality values off to whole numbers'
        if self.syntax in ('jpeg2000', 'htj2k'): return 'dcmtk, uncompressed twin'
        return 'dcmtk'


# ---- the grayscale pipeline of PS3.3 C.11 in float64 ----

def rescale_of(cell) -> tuple:
    "Slope and intercept."
    return {'scale': (2, -512), 'negative': (-1, 100), 'half': (.5, -100),
        'real': (.3, 7.25)}.get(cell.modality, (1, 0))

def table_of(kind, first, span) -> tuple:
    "Descriptor and entries of a lookup table over about half of `span`, bent, from black to white."
    bits = 8 if kind.startswith('lut8') else 12 if kind in ('lut12', 'mlut') else 16
    if kind=='lutfull':
        return (0, int(first), 16),np.arange(65535, -1, -1) # falling; 0 stands for 65536 entries
    n = int(min(max(span//2, 2), 1500))//2*2
    t = np.arange(n)/(n - 1)
    return (n, int(first), bits),np.round((2**bits - 1)*t**1.4).astype(int)

def modality_table(cell): return table_of('mlut', cell.low + (cell.high - cell.low)//5, cell.high - cell.low)

def through(x, descriptor, entries):
    "`x` through a table: below its first mapped value the first entry, beyond its end the last (C.11.1.1)."
    return entries[np.clip(x - descriptor[1], 0, len(entries) - 1).astype(int)].astype(float)

def modality_of(cell, stored):
    "Modality values."
    if cell.modality=='mlut': return through(stored, *modality_table(cell))
    slope,intercept = rescale_of(cell)
    return np.asarray(stored, float)*slope + intercept

def modality_ends(cell):
    """Smallest and largest modality value of the picture; of 8 bits without a window, of all that the bits
    may hold (without a table)."""
    whole = cell.voi=='none' and cell.bits==8 and cell.modality!='mlut'
    ends = modality_of(cell, np.array((cell.low, cell.high) if whole else stored_ends(cell)))
    return ends.min(),ends.max()

def voi_table(cell):
    a,b = modality_ends(cell)
    if cell.voi=='lutfull': return table_of(cell.voi, a, b - a)
    return table_of(cell.voi, max(np.ceil(a + (b - a)//7), -32700), b - a) # the descriptor holds 16 bits

def windows_of(cell) -> list:
    "Centers and widths, the default first."
    a,b = modality_ends(cell)
    s = b - a
    if cell.voi=='step': return [(float(np.floor(a + s/2)) + .5, 1.)] # a value stands on the border
    if cell.voi=='wide': return [(float(np.floor(a + .6*s)), float(np.floor(1.7*s)))]
    if cell.voi=='fraction': return [(round(a + .45*s, 2) + .37, round(.5*s, 1) + .3)]
    if cell.voi=='sigmoid': return [(float(np.floor(a + .45*s)), float(np.floor(s/3)))]
    first = (float(np.floor(a + .45*s)), float(np.floor(.6*s)))
    return [first, (first[0]/2 + 3, first[1]/3 + 2), (1., 50.)] if cell.voi=='several' else [first]

def shown(cell, stored, x=None):
    """The display of stored values in [0, 1] (C.11.2.1.2, C.11.2.1.3), inverted where the header says so; of
    colour the luma of BT.601. `x`: modality values other than theirs."""
    if cell.colour: return stored@np.array([.299, .587, .114])/255
    x = modality_of(cell, stored) if x is None else x
    if cell.voi.startswith('lut'):
        (n, first, bits),entries = voi_table(cell)
        y = through(x, (n, first, bits), entries[::-1] if cell.view else entries)/(2**bits - 1)
    elif cell.voi=='none':
        a,b = modality_ends(cell)
        y = (x - a)/(b - a)
    else:
        c,w = windows_of(cell)[cell.view]
        if cell.voi=='sigmoid': y = 1/(1 + np.exp(-4*(x - c)/w))
        elif cell.voi=='exact': y = np.where(x<=c - w/2, 0, np.where(x>c + w/2, 1, (x - c)/w + .5))
        else:
            y = np.where(x<=c - .5 - (w-1)/2, 0, np.where(x>c - .5 + (w-1)/2, 1,
                (x - (c - .5))/((w - 1) or 1) + .5))
    return 1 - y if cell.inverted else y


# ---- from display to whole numbers ----

def far_from_steps(p, depth):
    "Which displays have one answer at that depth."
    v = p*(2**depth - 1)
    return (np.abs(v - np.round(v))>MARGIN) | (p==0) | (p==1)

@cache
def rule_of(cell) -> tuple:
    "Rounding and depth of the comparison."
    if cell.extra=='narrow': return 'inverse' if cell.inverted else 'round',8
    if cell.colour: return 'floor',8
    if cell.voi.startswith('lut'): return 'inverse' if cell.inverted else 'round',voi_table(cell)[0][2]
    p = shown(cell, candidates(cell))
    return 'floor',next((d for d in range(16, 7, -1) if far_from_steps(p, d).mean()>.9), 8)

def quantise(pixels, rule, depth):
    "Display in [0, 1] as whole numbers."
    m,p = 2**depth - 1,np.asarray(pixels, float)
    if rule=='floor': return np.floor(m*p).astype(int)
    if rule=='round': return np.round(m*p).astype(int)
    return np.floor(m - np.round(m*(1 - p))*((m - 1)/(m + 1))).astype(int)

def digest(numbers) -> str:
    "A short hash of whole numbers and their shape."
    a = np.ascontiguousarray(numbers, '<i4')
    return hashlib.sha256(repr(a.shape).encode() + a.tobytes()).hexdigest()[:16]


# ---- the picture ----

def stored_ends(cell) -> tuple:
    "Smallest and largest stored value of the picture (padding apart)."
    if cell.extra=='narrow': return cell.low + 40,cell.high - 61
    if cell.extra.startswith('padding'): return cell.low + 2,cell.high
    return cell.low,cell.high - (cell.modality=='half')

def candidates(cell):
    "Stored values over the whole range, as many where the display changes, and the neighbours of its bends."
    a,b = stored_ends(cell)
    step = 2 if cell.modality=='half' else 1
    v = np.unique(np.linspace(a, b, 700).round().astype(int))
    bends = v[_bends(cell, v)]
    x = np.concatenate([v, *(i + np.arange(-3, 4) for i in bends),
        *([np.linspace(*bends, 400).round().astype(int)] if len(bends) else [])])
    x = x[(x>=a) & (x<=b)]
    return np.unique(np.concatenate([x - (x - a)%step, [a, b]]))

def _bends(cell, v):
    "Where the display starts and stops to change."
    p = shown(cell, v)
    moving = np.flatnonzero(np.diff(p))
    return [] if not len(moving) else [moving[0], min(moving[-1] + 1, len(v) - 1)]

@cache
def stored_of(cell):
    "Stored integers (frames, H, W), of colour (frames, H, W, 3)."
    if cell.colour: return _colours(cell)
    v = candidates(cell)
    rule,depth = rule_of(cell)
    if rule=='floor': v = v[far_from_steps(shown(cell, v), depth)]
    ends,n = np.array(stored_ends(cell)),int(np.prod(cell.shape))*cell.frames
    order = (np.arange(n)*(len(v)//3*2 + 1 if np.gcd(len(v)//3*2 + 1, len(v))==1 else 1)) % len(v)
    a = v[order].reshape(cell.frames, *cell.shape)
    a[:, 0, -1],a[:, -1, -1] = ends[0],ends[1]
    if cell.extra.startswith('padding'):
        a[:, :, :6] = cell.low + (np.arange(6)%2 if cell.extra=='padding range' else 0)
    if cell.extra=='smooth': a = np.sort(a.ravel()).reshape(a.shape) # long runs for RLE and JPEG-LS
    dtype = np.dtype(f"{'i' if cell.signed else 'u'}{cell.alloc//8}")
    return a.astype(dtype)

def _colours(cell):
    "Many colours whose luma lies away from a step, black and white among them."
    i = np.arange(4000)
    rgb = np.stack([i*37%256, i*91%256, i*151%256], -1)
    rgb[:7] = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 252], [254, 255, 255],
        [249, 255, 251]]
    rgb = rgb[far_from_steps(shown(cell, rgb), 8)]
    n = int(np.prod(cell.shape))*cell.frames
    return rgb[np.arange(n)%len(rgb)].reshape(cell.frames, *cell.shape, 3).astype(np.uint8)

def padding_of(cell):
    "Which pixels (H, W) of the frame that is read are padding."
    mask = np.zeros(cell.shape, bool)
    if cell.extra.startswith('padding'): mask[:, :6] = True
    return mask


# ---- the file ----

def container_of(cell, stored):
    "Stored integers at their place in the allocated bits, with whatever stands in the unused ones."
    alloc,bits,high = FORMATS[cell.format]
    if bits==alloc: return stored
    if high==bits-1 and cell.extra not in ('overlay bits', 'masked'): return stored
    u = (stored.view(f'u{alloc//8}') & (2**bits - 1)) << (high + 1 - bits)
    if cell.extra=='overlay bits':
        free = [i for i in range(alloc) if not high + 1 - bits<=i<=high]
        bit = free[-1]
        u = u | (_plane(cell).astype(u.dtype) << bit)
    return u.astype(f'u{alloc//8}').view(stored.dtype)

def _plane(cell): return (np.add.outer(np.arange(cell.shape[0]), np.arange(cell.shape[1]))%5==0)

def _item(descriptor, entries, kind, negative, little):
    n,first,bits = descriptor
    item = Dataset()
    item.add_new('LUTDescriptor', 'SS' if negative else 'US', [n, first, bits])
    if kind=='lut8':
        data = (entries.astype('u1').tobytes() if little
            else entries.astype('u1').reshape(-1, 2)[:, ::-1].tobytes())
    else: data = entries.astype('<u2' if little else '>u2').tobytes()
    item.add_new('LUTData', 'OW', data)
    return item

def stored_bits(cell, box):
    "The stored integers in allocated ones: BitsStored bits down from HighBit, with their sign."
    alloc,bits,high = FORMATS[cell.format]
    v = (np.asarray(box).astype(np.int64) >> (high + 1 - bits)) & (2**bits - 1)
    return v - ((v >> (bits - 1)) << bits) if cell.signed else v

def header_of(cell) -> Dataset:
    "Every element but the pixels."
    alloc,bits,high = FORMATS[cell.format]
    little,ds = cell.syntax!='big_endian',Dataset()
    ds.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    ds.SOPInstanceUID = made_up_uid('golden', cell.name)
    ds.Modality = 'DX'
    ds.PatientID = 'GOLDEN'
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = cell.photometric
    ds.Rows,ds.Columns = cell.shape
    ds.BitsAllocated,ds.BitsStored,ds.HighBit,ds.PixelRepresentation = alloc,bits,high,int(cell.signed)
    if cell.frames>1: ds.NumberOfFrames = cell.frames
    if cell.colour: ds.SamplesPerPixel,ds.PlanarConfiguration = 3,int(cell.extra[-1])
    if cell.modality=='mlut':
        ds.ModalityLUTSequence = [_item(*modality_table(cell), 'mlut', cell.signed, little)]
        ds.ModalityLUTSequence[0].ModalityLUTType = 'US'
    elif cell.modality!='none': ds.RescaleSlope,ds.RescaleIntercept,ds.RescaleType = *rescale_of(cell),'US'
    if cell.voi.startswith('lut'):
        descriptor,entries = voi_table(cell)
        signed = modality_ends(cell)[0]<0
        ds.VOILUTSequence = [_item(descriptor, entries, cell.voi, signed, little)]
        if cell.voi=='lut16':
            ds.VOILUTSequence.append(_item(descriptor, entries[::-1], cell.voi, signed, little))
        if cell.voi=='lutwindow': ds.WindowCenter,ds.WindowWidth = windows_of(replace(cell, voi='linear'))[0]
    elif cell.voi!='none':
        w = windows_of(cell)
        ds.WindowCenter,ds.WindowWidth = [o[0] for o in w],[o[1] for o in w]
        f = {'exact': 'LINEAR_EXACT', 'sigmoid': 'SIGMOID', 'linear': 'LINEAR'}.get(cell.voi)
        if f: ds.VOILUTFunction = f
    _extras(ds, cell)
    return ds

def _extras(ds, cell):
    "What is special about a cell."
    if cell.extra=='shape inverse': ds.PresentationLUTShape = 'INVERSE'
    if cell.extra=='shape identity': ds.PresentationLUTShape = 'IDENTITY'
    if cell.extra=='shape': ds.PresentationLUTShape = 'INVERSE' if cell.inverted else 'IDENTITY'
    if cell.extra.startswith('padding'):
        vr = 'SS' if cell.signed else 'US'
        ds.add_new('PixelPaddingValue', vr, cell.low)
        if cell.extra=='padding range': ds.add_new('PixelPaddingRangeLimit', vr, cell.low + 1)
    if cell.extra.startswith('overlay'):
        h,w = cell.shape
        for tag,vr,v in ((0x10, 'US', h), (0x11, 'US', w), (0x40, 'CS', 'G'), (0x50, 'SS', [1, 1])):
            ds.add_new(0x60000000+tag, vr, v)
        if cell.extra=='overlay bits':
            alloc,bits,high = FORMATS[cell.format]
            bit = [i for i in range(alloc) if not high + 1 - bits<=i<=high][-1]
            ds.add_new(0x60000100, 'US', alloc)
            ds.add_new(0x60000102, 'US', bit)
        else:
            ds.add_new(0x60000100, 'US', 1)
            ds.add_new(0x60000102, 'US', 0)
            data = np.packbits(_plane(cell).ravel(), bitorder='little').tobytes()
            ds.add_new(0x60003000, 'OW', data + b'\0'*(len(data)%2))

def _rle_colour(frame, *_):
    "An RGB frame (H, W, 3) as DICOM RLE."
    about = dict(rows=frame.shape[0], columns=frame.shape[1], samples_per_pixel=3, planar_configuration=0,
        photometric_interpretation='RGB', bits_allocated=8, bits_stored=8,
                 pixel_representation=0, number_of_frames=1)
    return pydicom.pixels.get_encoder(uid.RLELossless).encode(frame, encoding_plugin='pydicom', **about)

def write_cell(cell, path) -> np.ndarray:
    "Writes the file and returns the stored integers (frames, H, W)."
    ds,stored = header_of(cell),stored_of(cell)
    box,bits = container_of(cell, stored),cell.bits
    if (box!=stored).any(): bits = cell.alloc
    if cell.extra=='planes 1' and cell.syntax!='rle': box = np.moveaxis(box, -1, 1)
    encode = _rle_colour if cell.colour and cell.syntax=='rle' else encode_frame
    frames = [encode(np.ascontiguousarray(f), cell.syntax, bits) for f in box]
    syntax = SYNTAXES[cell.syntax]
    if syntax.is_encapsulated: data = encapsulate([f + b'\0'*(len(f)%2) for f in frames])
    else: data = b''.join(frames)
    ds.add_new('PixelData', 'OB' if syntax.is_encapsulated or cell.alloc==8 else 'OW',
        data + b'\0'*(len(data)%2))
    if syntax.is_encapsulated: ds['PixelData'].is_undefined_length = True
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID,ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID,ds.SOPInstanceUID
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return stored


# ---- the matrix ----

def _possible(format, syntax):
    # imagecodecs writes no 8-bit stream from 16-bit numbers
    return not (format=='16/8' and syntax.startswith('jpeg_lossless'))

@cache
def golden_cells() -> tuple:
    "All cells."
    out,k = [],0
    for photometric in ('MONOCHROME1', 'MONOCHROME2'):
        for modality,voi in PIPELINES:
            for signed in (False, True):
                for f in FORMATS:
                    usable = [s for s in DCMTK_SYNTAXES if _possible(f, s)]
                    out.append(Cell(photometric, modality, voi, signed, f, usable[k%len(usable)]))
                    k += 1
        for syntax in ALL_SYNTAXES:
            for signed in (False, True):
                out += [Cell(photometric, 'none', 'linear', signed, f, syntax, 'smooth') for f in FORMATS
                    if _possible(f, syntax)]
                out += [Cell(photometric, 'none', 'linear', signed, f, syntax, 'odd', (13, 11))
                    for f in ('8/8', '16/12')]
                out.append(Cell(photometric, 'none', 'linear', signed, '16/12', syntax, 'frames', (12, 10),
                    3))
        out += _special(photometric)
    for syntax in PLAIN:
        for planes in '01':
            out += [Cell('RGB', 'none', 'none', False, '8/8', syntax, f'planes {planes}', shape, n)
                for shape,n in (((24, 20), 1), ((13, 11), 2))]
    return tuple(out)

def _special(photometric):
    "Padding, overlays, presentation shapes."
    out = []
    for signed in (False, True):
        for voi in ('linear', 'none', 'lut16', 'sigmoid'):
            for f in ('16/12', '16/16'):
                out += [Cell(photometric, 'none', voi, signed, f, 'implicit', e)
                    for e in ('padding', 'padding range')]
            out += [Cell(photometric, 'none', voi, signed, '16/12', s, e)
                for s,e in (('explicit', 'shape'), ('rle', 'overlay plane'))]
            out.append(Cell(photometric, 'none', voi, signed, '16/12', 'explicit',
                'shape inverse' if photometric=='MONOCHROME2' else 'shape identity'))
        out.append(Cell(photometric, 'none', 'lutfull', signed, '16/16', 'implicit'))
        out += [Cell(photometric, m, v, signed, '16/12', s, 'second view') for m in ('none', 'scale')
            for v in ('several', 'lut16') for s in ('explicit', 'rle')]
        out += [Cell(photometric, 'scale', 'lut16', signed, '16/12', s, 'tables') for s in PLAIN]
        out += [Cell(photometric, 'mlut', 'lut8', signed, '16/14', s, 'tables') for s in PLAIN]
        for s in ALL_SYNTAXES:
            out += [Cell(photometric, 'none', 'linear', signed, f, s, 'overlay bits')
                for f in ('16/10', '16/12', '16/12h15')]
            out.append(Cell(photometric, 'none', 'linear', signed, '16/12', s, 'masked'))
        out += [Cell(photometric, 'none', 'none', signed, '8/8', s, 'narrow') for s in ('explicit', 'jpegls')]
    return out
