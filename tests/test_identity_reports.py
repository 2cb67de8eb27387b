"""Where identity was left in copies, by public reports: each place with its right value. Bytes of the copy are searched,
pixels are compared bit for bit."""
import io
import struct

import cv2
import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLosslessSV1, RLELossless

from radiology_ai.dicom.burned_in import find_text
from radiology_ai.dicom.deidentify import deidentify

KEY = b'a secret key for tests'
JPEG_LS, HTJ2K = UID('1.2.840.10008.1.2.4.80'), UID('1.2.840.10008.1.2.4.201')
NAME = b'QUANDLEBURY'


def grey(bits=12, h=120, w=160):
    "A neutral picture with noise in the lower bits, so that streams have something to say."
    y, x = np.mgrid[:h, :w]
    a = (.1 + .8*np.exp(-((x - w/2)/(w/6))**2)*(.6 + .4*np.sin(y/15)))*(2**bits - 1)
    a += np.random.default_rng(0).normal(0, 2**bits/400, a.shape)
    return np.clip(a, 0, 2**bits - 1).astype('u2' if bits>8 else 'u1')


def film(a=None, bits=12, high=None, **header):
    "A data set with these words as its pixels."
    a = grey(bits) if a is None else a
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = '1.2.840.10008.5.1.4.1.1.1.1', '1.2.77.1'
    ds.StudyInstanceUID, ds.SeriesInstanceUID = '1.2.77.2', '1.2.77.3'
    ds.PatientName = 'Quandlebury^Ottoline'
    ds.PatientID = 'MRN-778431'
    ds.Modality = 'DX'
    ds.BodyPartExamined = 'KNEE'
    ds.Rows, ds.Columns = a.shape[-2:] if a.ndim==2 or a.shape[-1]!=3 else a.shape[:2]
    ds.SamplesPerPixel = 3 if a.shape[-1]==3 else 1
    ds.PhotometricInterpretation = 'MONOCHROME2' if ds.SamplesPerPixel==1 else 'RGB'
    if ds.SamplesPerPixel==3: ds.PlanarConfiguration = 0
    if a.ndim==3 and a.shape[-1]!=3: ds.NumberOfFrames = len(a)
    ds.BitsAllocated, ds.BitsStored = 8*a.dtype.itemsize, bits
    ds.HighBit, ds.PixelRepresentation = bits - 1 if high is None else high, int(a.dtype.kind=='i')
    ds.PixelData = a.tobytes()
    ds['PixelData'].VR = 'OW' if a.dtype.itemsize>1 else 'OB'
    for k, v in header.items(): setattr(ds, k, v)
    return ds


def coded(ds, syntax, *fragments, value=None):
    "The data set with these fragments as its pixel data."
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate(list(fragments), has_bot=False) if value is None else value
    ds['PixelData'].VR, ds['PixelData'].is_undefined_length = 'OB', True
    return ds


def item(data, tag=b'\xfe\xff\0\xe0'): return tag + struct.pack('<I', len(data)) + data


def even(data): return data + b'\0'*(len(data)%2)


@pytest.fixture
def copies(tmp_path):
    """A function that de-identifies data sets in one run: of each the row of the account, the bytes of the
    copy and its data set."""
    made = []

    def copies(films, **options):
        folder = tmp_path/f'{len(made)}'
        folder.mkdir()
        made.append(folder)
        for i, ds in enumerate(films):
            if len(films)>1: ds.SOPInstanceUID = f'1.2.77.1.{i}'
            big = ds.file_meta.TransferSyntaxUID==pydicom.uid.ExplicitVRBigEndian
            with pydicom.config.disable_value_validation():
                pydicom.dcmwrite(folder/f'{i:04d}.dcm', ds, enforce_file_format=True, implicit_vr=False,
                    little_endian=not big)
        account = deidentify(folder, tmp_path/f'out{folder.name}', key=KEY, workers=1, show=False, **options)
        out = []
        for row in account.itertuples():
            data = (tmp_path/f'out{folder.name}'/row.path).read_bytes() if row.status=='ok' else b''
            out.append((row, data, pydicom.dcmread(io.BytesIO(data)) if data else None))
        return out
    return copies


@pytest.fixture
def copy(copies):
    "The same of one data set."
    return lambda ds, **options: copies([ds], **options)[0]


def numbers(ds):
    "The stored integers of a copy: by pydicom, but of HTJ2K."
    if ds.file_meta.TransferSyntaxUID==HTJ2K:
        return imagecodecs.jpeg2k_decode(next(generate_frames(ds.PixelData, number_of_frames=1)))
    return ds.pixel_array


# Bits that are not of the picture

def letters(shape):
    t = np.zeros(shape, np.uint8)
    cv2.putText(t, 'QUANDLEBURY', (4, 40), 0, .7, 255, 2)
    return (t>0).astype('u2')


def overlay(position, bits=16):
    "Elements of an overlay that says it lies in the words."
    return {0x60000010: ('US', 120), 0x60000011: ('US', 160), 0x60000040: ('CS', 'G'),
        0x60000050: ('SS', [1, 1]),
        0x60000100: ('US', bits), 0x60000102: ('US', position)}


BITS = [(15, 12, 11, {}), (12, 12, 11, {}), (15, 12, 11, overlay(0)), (15, 12, 11, overlay(15)),
    (15, 12, 11, overlay(15, 1)), (14, 10, 9, {}),
    (0, 12, 15, {}), (3, 12, 15, overlay(0)), (15, 12, 13, {}), (1, 12, 13, {}), (15, 12, 16, {}),
    (15, 12, 7, {}), (7, 7, 6, {}), (0, 6, 7, {})]


def test_bits_that_are_not_of_the_picture_are_zero(copies):
    pictures, films = [], []
    for bit, bits, high, extra in BITS:
        a = grey(bits) << (max(0, high + 1 - bits) if high<16 else 0)
        films.append(film(a | letters(a.shape).astype(a.dtype)<<bit, bits, high))
        pictures.append(a)
        for tag, (vr, v) in extra.items(): films[-1].add_new(tag, vr, v)
    for a, case, (row, _, new) in zip(pictures, BITS, copies(films, burned_in='keep')):
        words = np.frombuffer(new.PixelData, a.dtype)[:a.size].reshape(a.shape)
        assert row.status=='ok' and (words==a).all() and not any(t.group==0x6000 for t in new.keys()), case


def test_bits_are_told_by_the_high_bit_where_nothing_else_tells_them(copies):
    films = [film(grey() | letters(grey().shape)<<15, high=11) for _ in range(2)]
    del films[0].BitsStored
    films[1].BitsStored = None
    for row, _, new in copies(films, burned_in='keep'):
        assert row.status=='ok' and new.PixelData==grey().tobytes()


def test_signed_numbers_keep_their_sign_and_nothing_else(copy):
    a = grey().astype('i2') - 2048
    _, _, new = copy(film(a))
    assert np.frombuffer(new.PixelData, '<i2').tobytes()==a.tobytes() # the sign repeated tells nothing
    for bit in (12, 15):
        _, _, new = copy(film((a.view('u2') ^ letters(a.shape)<<bit).view('i2')), burned_in='keep')
        assert not (np.frombuffer(new.PixelData, '<u2') & 0xF000).any()
        assert (new.pixel_array==a).all()


def test_big_endian_several_frames_and_32_bits(copy):
    a = np.stack([grey(), grey()[::-1]])
    high = np.stack([letters(a.shape[1:])]*2)<<15
    row, _, new = copy(film(a | high), burned_in='keep')
    assert (new.pixel_array==a).all() and np.frombuffer(new.PixelData, '<u2').max()<4096
    ds = film(a[0].astype('u4') | letters(a.shape[1:]).astype('u4')<<27)
    row, _, new = copy(ds, burned_in='keep')
    assert (np.frombuffer(new.PixelData, '<u4').reshape(a[0].shape)==a[0]).all()
    ds = film((a[0] | high[0]).astype('>u2'))
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    row, _, new = copy(ds, burned_in='keep')
    assert (np.frombuffer(new.PixelData, '>u2').reshape(a[0].shape)==a[0]).all()


def test_bits_in_lossless_streams_are_zero(copies):
    a = grey()
    cases = [(name, bit) for name in ('lossless', 'jpegls', 'jpeg2k', 'htj2k', 'rle') for bit in (12, 15)]
    for case, (row, _, new) in zip(cases, copies([stream(name, a | letters(a.shape)<<bit)
            for name, bit in cases], burned_in='keep')):
        assert row.status=='ok' and (numbers(new)==a).all(), case


def test_type_in_a_bit_of_the_picture_itself_holds_the_file(copy):
    ds = film((grey(h=400, w=400) & 0xFFE) | cv2.resize(letters((120, 160)), (400, 400),
        interpolation=cv2.INTER_NEAREST))
    for tag, (vr, v) in overlay(0).items(): ds.add_new(tag, vr, v)
    row, _, _ = copy(ds, burned_in='keep')
    assert row.status=='held' and 'overlay' in row.cause


# Streams

def stream(name, a, data=None, **header):
    "A data set with the picture as a stream (or with a stream that was made from it)."
    bits = 8*a.dtype.itemsize
    make, syntax = {
        'jpeg': (lambda: imagecodecs.jpeg8_encode(a, level=95), JPEGBaseline8Bit),
        'lossless': (lambda: imagecodecs.ljpeg_encode(a, bitspersample=bits), JPEGLosslessSV1),
        'jpegls': (lambda: imagecodecs.jpegls_encode(a), JPEG_LS),
        'jpeg2k': (lambda: imagecodecs.jpeg2k_encode(a, level=0, reversible=True, codecformat='j2k'),
        JPEG2000Lossless),
        'htj2k': (lambda: imagecodecs.htj2k_encode(a), HTJ2K),
        'rle': (lambda: runs(a), RLELossless)}[name]
    data = data(make()) if data else make()
    data = data if isinstance(data, list) else [data]
    return coded(film(a, 8 if bits==8 else 12, **header), syntax, *map(even, data))


def runs(a):
    planes = [imagecodecs.packbits_encode(np.ascontiguousarray(p).tobytes())
        for p in ((a>>8).astype('u1'), (a & 255).astype('u1'))] if a.dtype.itemsize==2 else [
        imagecodecs.packbits_encode(a.tobytes())]
    planes = [even(bytes(p)) for p in planes]
    places = [64 + sum(map(len, planes[:i])) for i in range(len(planes))]
    return struct.pack('<16I', len(planes), *places, *[0]*(15 - len(planes))) + b''.join(planes)


def marker(code, text, at=2):
    "Puts a marker segment with a text at byte `at` of a stream."
    return lambda s: s[:at] + b'\xff' + bytes([code]) + struct.pack('>H', len(text) + 2) + text + s[at:]


TOLD = b'Operator Winterbottom; ' + NAME + b', born 17.3.1951, MRN 778431'
SMALL = bytes(imagecodecs.jpeg8_encode(grey(8, 30, 40)))
JPEG_PLACES = dict(
    comment=marker(0xFE, TOLD), exif=marker(0xE1, b'Exif\0\0' + TOLD),
    xmp=marker(0xE1, b'http://ns.adobe.com/xap/1.0/\0' + TOLD),
    thumbnail=marker(0xE0, b'JFXX\0\x10' + SMALL + TOLD),
    jfif=marker(0xE0, b'JFIF\0\1\2\0\0\1\0\1\7\1' + (TOLD + b'\0'*30)[:21]),
    photoshop=marker(0xED, b'Photoshop 3.0\0' + TOLD), app15=marker(0xEF, TOLD),
    spiff=marker(0xE8, b'SPIFF\0' + TOLD),
    tail=lambda s: s + TOLD, second=lambda s: s + b'\xff\xd8' + marker(0xFE, TOLD)(SMALL)[2:],
    fill=lambda s: s[:2] + b'\xff\xff\xff' + marker(0xFE, TOLD)(s)[3:],
    density=marker(0xE8, b'SPIFF\0Winterbottom Smythe 4711'),
    huffman=marker(0xC4, bytes([3, *[0]*7, len(TOLD), *[0]*8]) + TOLD), quantised=marker(0xDB, b'\3' + (TOLD*2)[:64]),
    late=lambda s: marker(0xFE, TOLD, s.index(b'\xff\xda'))(s), fragment=lambda s: [even(s), TOLD],
    long=lambda s: s[:2] + marker(0xFE, b'x'*65000)(b'\xff\xd8')[2:] + marker(0xFE, TOLD)(s)[2:])


def clean(copies, name, a, places):
    """Asserts that copies of the stream with a text in each of the places hold the picture and nothing of the
    text."""
    plain = numbers(stream(name, a))
    found = copies([stream(name, a, put) for put in places.values()])
    for place, (row, data, new) in zip(places, found):
        assert row.status=='ok', (place, row.cause)
        assert not any(t in data.upper() for t in (NAME, b'WINTERBOTTOM', b'W\0I\0N', b'1951', b'778431', b'EXIF')), place
        assert (numbers(new)==plain).all() and new['PixelData'].is_undefined_length, place


@pytest.mark.parametrize('name', ['jpeg', 'lossless', 'jpegls'])
def test_nothing_but_the_picture_is_left_in_jpeg(copies, name):
    # its decoder refuses tables
    places = {k: v for k, v in JPEG_PLACES.items() if name!='jpegls' or k not in ('huffman', 'quantised')}
    clean(copies, name, grey(8 if name=='jpeg' else 12), places)


def in_tile(s):
    "A comment in the header of the first tile-part, whose length is put right."
    at, n = s.index(b'\xff\x90'), len(TOLD) + 6
    end = struct.unpack('>I', s[at+6:at+10])[0]
    s = s[:at+6] + struct.pack('>I', end + n if end else 0) + s[at+10:]
    return s[:at+12] + b'\xff\x64' + struct.pack('>HH', n - 2, 1) + TOLD + s[at+12:]


def boxed(kind, code=b''):
    def put(s):
        rows, cols = struct.unpack('>II', s[12:16] + s[8:12])
        box = lambda t, d: struct.pack('>I', 8 + len(d)) + t + d
        head = box(b'ihdr', struct.pack('>IIHBBBB', rows, cols, 1, 15, 7, 0, 0)) + box(b'colr',
            b'\1\0\0\0\0\0\x11')
        return (box(b'jP  ', b'\r\n\x87\n') + box(b'ftyp', b'jp2 \0\0\0\0jp2 ') + box(b'jp2h', head)
            + box(kind, code + TOLD) + box(b'jp2c', s) + box(kind, code + TOLD))
    return put


J2K_PLACES = dict(comment=lambda s: marker(0x64, b'\0\1' + TOLD, s.index(b'\xff\x52'))(s),
    profile=lambda s: marker(0x59, even(TOLD), s.index(b'\xff\x52'))(s), lengths=lambda s: marker(0x57, b'\0'
    + 'Winterbottom'.encode('utf-16-le'), s.index(b'\xff\x90'))(s), tiles=lambda s: marker(0x55, b'\0\0' + even(TOLD),
    s.index(b'\xff\x90'))(s), binary=lambda s: marker(0x64, b'\0\0' + TOLD,
    s.index(b'\xff\x52'))(s), tile=in_tile, xml=boxed(b'xml '), uuid=boxed(b'uuid', b'\1'*16),
    free=boxed(b'free'), tail=lambda s: s + TOLD,
    fragment=lambda s: [even(s), TOLD])


@pytest.mark.parametrize('name', ['jpeg2k', 'htj2k'])
def test_nothing_but_the_picture_is_left_in_jpeg_2000(copies, name): clean(copies, name, grey(), J2K_PLACES)


RLE_PLACES = dict(tail=lambda s: s + b'\x7f' + TOLD, runs=lambda s: s + bytes([len(TOLD) - 1]) + TOLD,
    header=lambda s: s[:16] + even(TOLD)[:48] + s[64:] if len(TOLD)>=48 else s,
    between=lambda s: struct.pack('<16I', 2, 64, struct.unpack_from('<I', s, 8)[0] + len(even(TOLD)), *[0]*13)
        + s[64:struct.unpack_from('<I', s, 8)[0]] + even(TOLD) + s[struct.unpack_from('<I', s, 8)[0]:])


def test_nothing_but_the_picture_is_left_in_rle(copies): clean(copies, 'rle', grey(), RLE_PLACES)


def test_what_stands_between_and_beside_the_fragments_goes(copies):
    a = np.stack([grey(), grey()[::-1], grey()[:, ::-1]])
    frames = [even(imagecodecs.jpegls_encode(f)) for f in a]
    dirty = [even(marker(0xFE, TOLD)(f) + TOLD) for f in frames]
    delimiter = item(b'', b'\xfe\xff\xdd\xe0')
    starts = [sum(8 + len(f) for f in dirty[:i]) for i in range(3)]
    split = [f[i:i + 1000] for f in dirty for i in range(0, len(f), 1000)]
    counts = [-(-len(f)//1000) for f in dirty]
    split_starts = [sum(8 + len(s) for s in split[:sum(counts[:i])]) for i in range(3)]
    table = lambda o: struct.pack(f'<{len(o)}I', *o)
    values = (item(b'') + b''.join(map(item, dirty)), item(table(starts)) + b''.join(map(item, dirty)),
        item(table(split_starts)) + b''.join(map(item, split)), item(even(TOLD)) + b''.join(map(item, dirty)),
        item(b'') + b''.join(map(item, dirty)) + item(even(TOLD)),
        item(b'') + b''.join(map(item, dirty)) + delimiter[:4] + item(even(TOLD))[4:])
    for i, (row, data, new) in enumerate(copies([coded(film(a), JPEG_LS, value=v) for v in values])):
        assert row.status=='ok', (i, row.cause)
        assert NAME not in data and b'1951' not in data and (new.pixel_array==a).all(), i


def test_offset_tables_stay_right(copy):
    a = np.stack([grey(), grey()[::-1]])
    frames = [even(bytes(imagecodecs.jpegls_encode(f))) for f in a]
    split = [f[i:i + 2000] for f in frames for i in range(0, len(f), 2000)]
    n = -(-len(frames[0])//2000)
    ds = coded(film(a), JPEG_LS, value=item(b'') + b''.join(map(item, split)))
    ds.ExtendedOffsetTable = struct.pack('<2Q', 0, len(frames[0]) + 8*n)
    ds.ExtendedOffsetTableLengths = struct.pack('<2Q', *map(len, frames))
    row, data, new = copy(ds)
    assert row.status=='ok' and (new.pixel_array==a).all()
    ds = coded(film(a), JPEG_LS, *frames)
    ds.ExtendedOffsetTable = NAME + b' born 51'[:5]
    row, data, new = copy(ds)
    assert row.status=='ok' and NAME not in data and (new.pixel_array==a).all()


def test_a_clean_stream_stays_byte_for_byte(copies):
    films = [stream(name, grey(8 if name=='jpeg' else 12))
        for name in ('jpeg', 'lossless', 'jpegls', 'jpeg2k', 'htj2k', 'rle')]
    for old, (row, _, new) in zip(films, copies(films)):
        assert row.status=='ok' and new.PixelData==old.PixelData, old.file_meta


def test_colour_keeps_its_transform(copy):
    a = np.stack([grey(8), grey(8)[::-1], grey(8)[:, ::-1]], -1)
    for kw in ({}, dict(colorspace='RGB', outcolorspace='RGB')):
        plain = coded(film(a, 8), JPEGBaseline8Bit, even(imagecodecs.jpeg8_encode(a, level=95, **kw)))
        dirty = coded(film(a, 8), JPEGBaseline8Bit,
            even(marker(0xFE, TOLD)(imagecodecs.jpeg8_encode(a, level=95, **kw))))
        row, data, new = copy(dirty, burned_in='keep')
        assert row.status=='ok' and NAME not in data and (new.pixel_array==plain.pixel_array).all()


@pytest.mark.parametrize('name, put', [('jpeg', lambda s: s[:-2] + NAME + s[-2:]),
    ('lossless', lambda s: s[:-2] + NAME + s[-2:]), *((name, lambda s, t=t: s[:-2] + t + s[-2:])
        for name in ('jpeg', 'lossless') for t in (b'Doe', 'Иван'.encode(), 'Winter'.encode('utf-16-le'))),
    ('jpeg', lambda s: marker(0xDD, b'\0\0' + NAME)(s)), ('jpeg', lambda s: marker(0xF0, TOLD)(s)),
    ('jpegls', lambda s: marker(0xF2, TOLD)(s)),
    ('jpeg2k', lambda s: marker(0x77, TOLD, s.index(b'\xff\x52'))(s))])
def test_what_cannot_be_told_from_the_picture_holds_the_file(copy, name, put):
    row, _, _ = copy(stream(name, grey(8 if name=='jpeg' else 12), put, PatientName='Other^One'))
    assert row.status in ('held', 'error') and row.cause
    if row.status=='held': assert 'looked through' in row.cause


@pytest.mark.parametrize('syntax', ['1.2.840.10008.1.2.4.102', '1.2.840.10008.1.2.4.107',
    '1.2.840.10008.1.2.1.98', '1.2.3.4.5'])
def test_unknown_streams_hold_the_file(copy, syntax):
    ds = coded(film(), UID(syntax), even(b'\0\0\0\x0cJXL \r\n\x87\n' + TOLD))
    row, _, _ = copy(ds, burned_in='keep')
    assert row.status in ('held', 'error') and row.cause


def test_what_stands_behind_the_last_pixel_goes(copy):
    for ds in (film(), film(grey(8), 8), film(grey(8, h=121, w=161), 8)):
        a = ds.PixelData
        ds.PixelData = even(a + TOLD)
        row, data, new = copy(ds, burned_in='keep')
        assert NAME not in data and new.PixelData[:len(a)]==a and len(new.PixelData)==len(even(a))
    a = np.zeros((40, 80, 3), 'u1')
    ds = film(a, 8, PhotometricInterpretation='YBR_FULL_422')
    ds.PixelData = b'\x40'*6400 + TOLD*10 + b' '*(len(TOLD)*10%2)
    row, data, new = copy(ds, burned_in='keep')
    assert NAME not in data and len(new.PixelData)==6400


# Texts that stay

def meaning(text, **header):
    c = Dataset()
    c.CodeValue, c.CodingSchemeDesignator, c.CodeMeaning = 'R-10206', 'SRT', text
    return film(ViewCodeSequence=Sequence([c]), **({'SpecificCharacterSet': 'ISO_IR 192'} | header))


DATES = ['17.3.1951', '17 MAR 1951', '03/17/51', '17-03-51', '51-3-17', '1951/3/17', '17. März 1951',
    'March 17th, 1951', '17MAR1951', '19510317', '170351',
    '031751', '510317', '1951年3月17日', '昭和26年3月17日', 'S26.3.17', '1951년 3월 17일', '17.III.1951',
    '17 de marzo de 1951', '17 mars 1951', '17.03.2494',
    '１７．３．１９５１', '17/03/1951', '17,3,1951', '1951-03-17T10:12', '17 3 1951', 'Mar 17 1951', '17. 3. 1951',
    '17-Mar-51', '17_03_1951', '19510317101112',
    '17th of March 1951', '一九五一年三月十七日', '17–03–1951', '1951.03.17', '1951-076', 'den 17. maerz',
    '17 mrt 1951'.replace('mrt', 'maart')]


def test_a_date_in_any_writing_goes(copies):
    films = [meaning(f'AP born {t} here', PatientBirthDate='19510317') for t in DATES]
    for text, (row, _, new) in zip(DATES, copies(films, burned_in='keep')):
        left = new.ViewCodeSequence[0].CodeMeaning.split()
        assert row.status=='ok' and left==['AP', 'born',
            'here'] or text.startswith('den') and '17.' not in left, text


OTHERS = ['21.4.1948', '21 APR 1948', '1948-04-21', 'April 21, 1948', '04/21/48', '1948年4月21日', '21.IV.1948',
    '19480421', 'Oktober 1948']


def test_a_date_of_somebody_else_goes_too(copies):
    for text, (_, _, new) in zip(OTHERS, copies([meaning(f'AP born {t} here') for t in OTHERS],
            burned_in='keep')):
        assert new.ViewCodeSequence[0].CodeMeaning=='AP born here', text


KOREAN = 'Kim^Heejung=金^喜中=김^희중'
NAMES = [('AP 김희중', KOREAN), ('AP 희중님', KOREAN), ('AP 金喜中', KOREAN), ('AP 金 喜中', KOREAN), ('AP 金様', KOREAN),
    ('AP KIM', KOREAN), ('AP heejungkim', KOREAN),
    ('AP 山田太郎', 'Yamada^Tarou=山田^太郎=やまだ^たろう'), ('AP ﾔﾏﾀﾞ', 'Yamada^Tarou=山田^太郎=やまだ^たろう'),
    ('AP ヤマダタロウ', 'Yamada^Tarou=山田^太郎=やまだ^たろう'),
    ('AP 王小明', 'Wang^XiaoMing=王^小明'), ('AP王小明', 'Wang^XiaoMing=王^小明'),
    ('AP Xiao Ming Wang', 'Wang^Xiao Ming'), ('AP Li Na', 'Li^Na'), ('AP LINA', 'Li^Na'),
    ('AP NA, LI', 'Li^Na'), ('AP Ng', 'Ng^Oi'), ('AP MUELLER', 'Müller^Jörg'), ('AP Muller', 'Müller^Jörg'),
    ('AP JOERG', 'Müller^Jörg'), ('AP Müller', 'MUELLER^JOERG'),
    ('AP Mu\u0308ller', 'Müller^Jörg'), ('AP ＭＵＬＬＥＲ', 'Müller^Jörg'), ('AP Strauss', 'Strauß^Zoë'),
    ('AP ZOE', 'Strauß^Zoë'), ('AP Lukasz', 'Wałęsa^Łukasz'),
    ('AP WALESA', 'Wałęsa^Łukasz'), ('AP Nguyen', 'Nguyễn^Đức'), ('AP duc', 'Nguyễn^Đức'),
    ('AP Soren Aarup', 'Aarup^Søren'), ('AP SOEREN', 'Årup^Søren'),
    ('AP OBRIEN', "O'Brien^Pat"), ('AP Smythe Jones', 'Smythe-Jones^A'), ('AP smythejones', 'Smythe-Jones^A'),
    ('AP QuandleburyOttoline', 'Quandlebury^Ottoline'),
    ('AP Hand, Peter', 'Hand^Peter'), ('AP Иванов', 'Иванов^Пётр'), ('AP ПЕТР', 'Иванов^Пётр'),
    ('AP Garc\u00ada', 'Garca^Ana'), ('AP Q u a n d l e b u r y', 'Quandlebury^Ottoline'),
    ('AP Quandle-\r\nbury', 'Quandlebury^Ottoline'), ("AP Quandlebury's", 'Quandlebury^Ottoline'),
    ('AP Quandleburys', 'Quandlebury^Ottoline'), ('AP Quandleb', 'Quandlebury^Ottoline'),
    ('AP O.Q.', 'Quandlebury^Ottoline'), ('AP O. M. Q.', 'Quandlebury^Ottoline^Maria'),
    ('AP OMQ', 'Quandlebury^Ottoline^Maria'),
    ('AP Ivanov Pyotr', 'Иванов^Пётр'), ('AP IVANOV, PETR', 'Иванов^Пётр'), ('AP Иванов', 'Ivanov^Pyotr'),
    ('AP Sergey', 'Щукин^Сергей'), ('AP Shchukin', 'Щукин^Сергей'), ('AP Papadopoulos', 'Παπαδόπουλος^Γιώργος'),
    ('AP Παπαδόπουλος', 'Papadopoulos^Giorgos'), ('AP राम', 'राम^कुमार'), ('AP कुमार', 'राम^कुमार'),
    ('AP MUELLER', 'Müller^Jörg'.encode().decode('latin-1'))]


def test_a_name_in_any_writing_goes(copies):
    films = [meaning(text, PatientName=name) for text, name in NAMES]
    for case, (row, _, new) in zip(NAMES, copies(films, burned_in='keep')):
        assert row.status=='ok' and ''.join(new.ViewCodeSequence[0].CodeMeaning.split()).strip(
            ',')=='AP', case


TOLD_BY_THEMSELVES = ['Mr. Smith', 'Dr. Anna-Lena Winter', 'Mrs Winter', 'Patient: Winter, Karl', 'Name: Winter',
    'jane.roe@hospital.org', '+49 170 1234567', 'tel 555-1234', '123-45-6789',
    'MRN: A4711', 'https://pacs/x?id=99123', '4711471']


def test_whoever_is_told_by_a_title_an_address_or_a_number_goes(copies):
    made = copies([meaning(f'AP {t}') for t in TOLD_BY_THEMSELVES], burned_in='keep')
    for text, (_, _, new) in zip(TOLD_BY_THEMSELVES, made):
        assert new.ViewCodeSequence[0].CodeMeaning in ('AP', 'AP tel'), text


PLACES = dict(PatientID='A12345678', AccessionNumber='ACC-9912345', PatientAddress='12 Nettlecombe Lane, Ely',
    InstitutionName='St. Bertilla Hospital')


def test_numbers_held_apart_and_words_of_addresses_go(copies):
    told = ['1234 5678', 'a 12-34-56.78', '9912345', '99 123 45', 'Nettlecombe', 'BERTILLA']
    for text, (_, _, new) in zip(told, copies([meaning(f'Hospital AP {t}', **PLACES) for t in told], burned_in='keep')):
        assert new.ViewCodeSequence[0].CodeMeaning=='Hospital AP', text


def test_a_short_number_goes_though_a_new_uid_holds_it_by_chance(copies):
    films = [meaning(f'AP {100 + i}', PatientID=f'{100 + i}') for i in range(40)]
    assert all(new.ViewCodeSequence[0].CodeMeaning=='AP' for _, _, new in copies(films, burned_in='keep'))


def test_a_code_keeps_a_meaning(copies):
    left = {'MRN778431': 'REMOVED', 'AP 778431': 'AP', 'AP mrn 778431': 'AP', 'Ottoline': 'REMOVED',
        'postero-anterior': 'postero-anterior',
        'Line placement, final': 'Line placement, final', 'PS3.15 2026c': 'PS3.15 2026c'}
    assert [new.ViewCodeSequence[0].CodeMeaning
        for _, _, new in copies(list(map(meaning, left)), burned_in='keep')]==list(left.values())


def test_terms_of_the_standard_are_nobodys_name(copy):
    ds = film(PatientName='Lin^No', PixelIntensityRelationship='LIN', BurnedInAnnotation='NO',
        ViewPosition='AP', ImageType=['ORIGINAL', 'PRIMARY', 'LIN NO'])
    _, _, new = copy(ds)
    assert [new.PixelIntensityRelationship, new.BurnedInAnnotation, new.ViewPosition, *new.ImageType]==['LIN',
        'NO', 'AP', 'ORIGINAL', 'PRIMARY', '']


WORDS = [('Rosenberg^Ann', 'Knee Rosenberg', 'Knee'), ('ROSENBERG^A', 'Knee PA rosenberg WB', 'Knee PA WB'),
    ('Merchant^Al', 'Merchant view', 'view'),
    ('Small^Wall', 'Knee small, wall', 'Knee'), ('Head^Knee', 'Head AP', 'AP'),
    ('Quandlebury^O', 'Knee Rosenberg', 'Knee Rosenberg'), ('Füß^A', 'Fuss AP', 'AP')]


def test_descriptions_keep_no_name_that_is_also_a_word(copies):
    films = [film(PatientName=n, SeriesDescription=t, StudyDescription=t, SpecificCharacterSet='ISO_IR 100')
        for n, t, _ in WORDS]
    for case, (_, _, new) in zip(WORDS, copies(films, retain='descriptions', burned_in='keep')):
        assert new.SeriesDescription==new.StudyDescription==case[2], case


@pytest.mark.filterwarnings('ignore')
def test_what_is_no_uid_is_not_retained(copies):
    keys = 'StudyInstanceUID', 'SeriesInstanceUID', 'FrameOfReferenceUID'
    cases = [(k, uid) for uid in ('abc', 'Quandlebury', '1.2.abc', '..', '1', '1.2.778431x') for k in keys]
    for (k, uid), (row, data, new) in zip(cases,
            copies([film(**{k: u}) for k, u in cases], retain='uids', burned_in='keep')):
        assert row.status=='ok' and new[k].value.startswith('2.25.') and (len(uid)<3
            or uid.encode() not in data), (k, uid)
    for uid in ('abc', '..'):
        [(row, data, new)] = copies([film(SOPInstanceUID=uid)], retain='uids', burned_in='keep')
        assert row.status=='ok' and new.SOPInstanceUID.startswith('2.25.') and row.path.endswith(
            f'{new.SOPInstanceUID}.dcm')
    [(row, _, new)] = copies([film()], retain='uids', burned_in='keep')
    assert new.SOPInstanceUID=='1.2.77.1' and row.path.endswith('1.2.77.1.dcm')


UNLISTED = dict(PatientBirthDateInAlternativeCalendar='S26.03.17 Winterbottom',
    PatientDeathDateInAlternativeCalendar='Winterbottom', PatientAlternativeCalendar='WINTERBOTTOM',
    ContactDisplayName='Winterbottom', PlacerOrderNumberProcedure='Winterbottom',
    FillerOrderNumberProcedure='Winterbottom', DoseComment='Winterbottom', TestResultComment='Winterbottom',
    SystemStatusComment='Winterbottom', SubstanceAdministrationNotes='Winterbottom',
    ItineraryID='Winterbottom', OwnerID='Winterbottom', ContentDescription='Winterbottom',
    PotentialDiagnosticTasks='Winterbottom', ICCProfile=b'Winterbottom', NTPSourceAddress='Winterbottom',
    AssignedLocation='Winterbottom', PatientReliabilityIndicator='Winterbottom')


def test_unlisted_elements_of_persons_dates_and_texts_go(copy):
    inner = Dataset()
    for k, v in UNLISTED.items(): setattr(inner, k, v)
    ds = film(ReferencedImageSequence=Sequence([inner]), **UNLISTED)
    block = ds.private_block(0x0019, 'ACME', create=True)
    for i, vr in enumerate(('PN', 'DA', 'DT', 'TM', 'LT', 'ST', 'UT', 'AE', 'UC', 'UR'), 1):
        block.add_new(i, vr, {'DA': '19480421', 'DT': '19480421101112', 'TM': '101112'}.get(vr,
            'Winterbottom'))
    block.add_new(0x20, 'DS', '4.5')
    safe = Dataset()
    safe.PrivateGroupReference = 0x0019
    safe.PrivateCreatorReference = 'ACME'
    safe.BlockIdentifyingInformationStatus = 'SAFE'
    ds.PrivateDataElementCharacteristicsSequence = [safe]
    for retain in ((), ('safe_private', 'descriptions', 'device', 'institution', 'patient', 'uids')):
        row, data, new = copy(ds, retain=retain, burned_in='keep')
        assert row.status=='ok' and b'WINTERBOTTOM' not in data.upper() and b'19480421' not in data
        assert (0x00191020 in new)==bool(retain)


def with_vr(keyword, vr, text):
    "The bytes of a film with a text in an element of another type."
    out = io.BytesIO()
    ds = film(**{'PatientBirthDate': '19510317'})
    ds.add_new(keyword, 'LO', text)
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    at = out.getvalue().index(text.encode())
    return out.getvalue()[:at-4] + vr + out.getvalue()[at-2:]


@pytest.mark.parametrize('keyword, vr', [('ExposureTime', b'IS'), ('KVP', b'DS'), ('PixelSpacing', b'DS')])
def test_a_number_that_is_none_goes(tmp_path, keyword, vr):
    (tmp_path/'a.dcm').write_bytes(with_vr(keyword, vr, 'Winterbottom'))
    row = next(deidentify(tmp_path/'a.dcm', tmp_path/'out', key=KEY, workers=1, show=False,
        burned_in='keep').itertuples())
    assert row.status=='ok' and b'Winterbottom' not in (tmp_path/'out'/row.path).read_bytes()


def test_a_number_or_uid_that_tells_somebody_goes(copy):
    inner = Dataset()
    inner.ReferencedSOPClassUID, inner.ReferencedSOPInstanceUID = '1.2.3.4.778431', '1.2.3.5'
    ds = film(SOPClassUID='1.2.3.17031951', StudyInstanceUID='1.2.840.10008.1951.3.17', PatientBirthDate='19510317',
        SeriesNumber=778431, InstanceNumber=17031951, AcquisitionNumber=7, ReferencedImageSequence=Sequence([inner]))
    row, data, new = copy(ds, burned_in='keep')
    assert row.status=='ok' and not any(t in data for t in (b'778431', b'17031951', b'10008.1951'))
    assert new.AcquisitionNumber==7 and new.SOPClassUID.startswith('2.25.')
    assert copy(film(SOPClassUID='1.3.46.670589.2.5.1.1'), burned_in='keep')[2].SOPClassUID=='1.3.46.670589.2.5.1.1'


def test_no_other_picture_and_no_rest_of_a_table_stays(copy):
    small = letters((120, 160)).astype('u1')*255
    view = Dataset()
    view.CodeValue, view.CodingSchemeDesignator, view.CodeMeaning = 'R-10206', 'SRT', 'AP'
    view.Rows, view.Columns, view.PixelData = 120, 160, small.tobytes()
    view['PixelData'].VR = 'OB'
    lut = Dataset()
    lut.add_new('LUTDescriptor', 'US', [4096, 0, 12])
    lut.add_new('LUTData', 'OW', np.arange(4096, dtype='<u2').tobytes() + b'Winterbottom')
    ds = film(ViewCodeSequence=Sequence([view]), VOILUTSequence=Sequence([lut]))
    for k in ('Gray', 'RedPaletteColor', 'SegmentedRedPaletteColor', 'Blending'):
        ds.add_new(f'{k}LookupTableData', 'OW', b'Winterbottom')
    row, data, new = copy(ds, burned_in='keep')
    assert row.status=='ok' and b'Winterbottom' not in data and small[20:24].tobytes() not in data
    assert new.VOILUTSequence[0].LUTData==np.arange(4096, dtype='<u2').tobytes()


def test_technical_elements_stay(copy):
    kept = dict(Manufacturer='ACME', ManufacturerModelName='DX-1000', SoftwareVersions='VA20C',
        FilterType='STRIP', WindowCenterWidthExplanation='NORMAL', RescaleType='US',
        KVP='60', ExposureTime='10', BodyPartExamined='KNEE', PatientOrientation=['L', 'F'],
        PhosphorType='CsI')
    _, _, new = copy(film(**kept))
    assert {k: new[k].value for k in kept}=={k: film(**kept)[k].value for k in kept}


# Type in the picture

def typed(size=900, high=160, text='HARGREAVES', value=4095, upright=False, font='DejaVuSans'):
    import matplotlib
    a = grey(h=size, w=size)
    f = ImageFont.truetype(f'{matplotlib.get_data_path()}/fonts/ttf/{font}.ttf', high)
    page = Image.new('L', (size, size))
    ImageDraw.Draw(page).text((20, 30), text, 255, font=f)
    ink = np.asarray(page)>127
    if upright: a, ink = np.ascontiguousarray(a.T), np.ascontiguousarray(ink.T[:, ::-1])
    return np.where(ink, value, a).astype('u2'), ink


@pytest.mark.parametrize('how', [dict(high=220, size=1500), dict(high=120, value=0),
    dict(high=60, text='DOE, JANE 12.03.1956'), dict(high=130, upright=True),
    dict(high=150, text='LI NA', font='DejaVuSerif-Bold'),
    dict(high=100, text='ID: 77843', font='DejaVuSansMono')])
def test_a_line_of_type_is_black_as_a_whole(how):
    a, ink = typed(**how)
    seen = np.zeros(a.shape, bool)
    for x1, y1, x2, y2 in find_text(a): seen[y1:y2, x1:x2] = True
    assert not (ink & ~seen).any() and seen.mean()<.6


def test_no_type_is_found_on_a_neutral_film():
    assert not len(find_text(grey(h=900, w=900)))
