"""What public bug reports found in other readers of DICOM, each as a file made here from one neutral film: it is read with
the right numbers (those that were written, or the grey values by the formula of the standard), or refused with a true
cause; and the index says of it what the reading says."""
import gzip
import io
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from radiology_ai.core import DataError, DicomError
from radiology_ai.dicom.codecs import DEFLATED_FRAMES, JPEG_XL, RAW_FRAMES
from radiology_ai.dicom.deidentify import deidentify
from radiology_ai.dicom.explore import explore_dicoms
from radiology_ai.dicom.file import open_dicom
from radiology_ai.dicom.index import fast_header, image_files, index_dicoms, index_row
from radiology_ai.dicom.read import read_header, read_radiograph
from radiology_ai.dicom.stored import decode_stored
from radiology_ai.dicom.tags import code_string

H, W = 100, 80


def film(bits: int=12, signed: bool=False) -> np.ndarray:
    "Integers of a soft picture that fills a good part of the range."
    y, x = np.mgrid[0:H, 0:W].astype(float)
    a = np.round((.05 + .8*(.25*y/H + .75*np.exp(-((x - W/2)/(W/6))**2)*(.5 + .5*np.sin(y/8)**2)))*(2**bits - 1))
    return a.astype(np.int64) - (2**(bits-1) if signed else 0)


FILM = film()
WORDS = FILM.astype('<u2')


def header(a=None, bits=12, alloc=16, signed=False, syntax=ExplicitVRLittleEndian, window=True, **more) -> Dataset:
    "A film as a data set; its window shows all numbers."
    a = film(bits, signed) if a is None else a
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = more.pop('sop', '1.2.840.10008.5.1.4.1.1.1.1')
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = '1.2.826.0.1.3'
    ds.StudyInstanceUID, ds.SeriesInstanceUID = '1.2.826.0.1.4', '1.2.826.0.1.5'
    ds.PatientID, ds.Modality = 'P1', 'DX'
    ds.Rows, ds.Columns, ds.SamplesPerPixel = H, W, 1
    ds.PhotometricInterpretation, ds.PixelSpacing = 'MONOCHROME2', [.15, .15]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = alloc, bits, bits - 1, int(signed)
    ds.PixelData = (a & (2**alloc - 1)).astype(f'<u{alloc//8}').tobytes()
    ds['PixelData'].VR = 'OW' if alloc>8 else 'OB'
    if window: ds.WindowCenter, ds.WindowWidth = 2**(bits-1)*(not signed), 2**bits
    for k, v in more.items(): setattr(ds, k, v)
    return ds


def bytes_of(ds: Dataset, **how) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pydicom.dcmwrite(out, ds, enforce_file_format=True, **how)
    return out.getvalue()


def start_of(z: bytes) -> int: return 144 + struct.unpack('<I', z[140:144])[0]


def retagged(z: bytes, syntax) -> bytes:
    "The same data set behind a file meta that names another transfer syntax."
    meta = pydicom.dcmread(io.BytesIO(z)).file_meta
    meta.TransferSyntaxUID = str(syntax)
    out = io.BytesIO()
    pydicom.filewriter.write_file_meta_info(out, meta, enforce_standard=True)
    return bytes(128) + b'DICM' + out.getvalue() + z[start_of(z):]


def even(stream: bytes) -> bytes: return stream + b'\0'*(len(stream)%2)


def compressed(ds: Dataset, fragments, syntax, end: bytes=b'\xfe\xff\xdd\xe0\0\0\0\0') -> bytes:
    "A file with these fragments."
    del ds.PixelData
    z = retagged(bytes_of(ds), syntax) + b'\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff' + b'\xfe\xff\0\xe0\0\0\0\0'
    return z + b''.join(b'\xfe\xff\0\xe0' + struct.pack('<I', len(f)) + f for f in map(even, fragments)) + end


def big_endian() -> bytes:
    ds = header(syntax=ExplicitVRBigEndian)
    ds.PixelData = WORDS.astype('>u2').tobytes()
    return bytes_of(ds, implicit_vr=False, little_endian=False)


def deflated(z: bytes, wbits: int=-15, behind: bytes=b'') -> bytes:
    z = retagged(z, DeflatedExplicitVRLittleEndian)
    pack = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return z[:start_of(z)] + pack.compress(z[start_of(z):]) + pack.flush() + behind


def deflate(data: bytes) -> bytes:
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    return pack.compress(data) + pack.flush()


def rle(words: np.ndarray, behind: bytes=b'') -> bytes:
    high, low = (imagecodecs.packbits_encode(np.ascontiguousarray(p).tobytes()) for p in ((words>>8).astype('u1'),
        words.astype('u1')))
    return struct.pack('<16I', 2, 64, 64 + len(even(high)), *[0]*13) + even(high) + low + behind


STREAMS = dict(lossless=(imagecodecs.ljpeg_encode(WORDS, bitspersample=12), JPEGLosslessSV1),
    jpegls=(imagecodecs.jpegls_encode(WORDS), JPEGLSLossless),
    jpeg2000=(imagecodecs.jpeg2k_encode(WORDS, level=0, reversible=True, codecformat='j2k'), JPEG2000Lossless),
    jpegxl=(imagecodecs.jpegxl_encode(WORDS, lossless=True), JPEG_XL[0]), rle=(rle(WORDS), RLELossless))


@pytest.fixture
def write(tmp_path):
    "Writes a file (bytes or a data set) and gives its path."
    def written(z, name='a.dcm'):
        (tmp_path/name).write_bytes(z if isinstance(z, bytes) else bytes_of(z))
        return tmp_path/name
    return written


def stored(path, frame: int|None=None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return decode_stored(open_dicom(path), frame, path)[0]


def refusal(path) -> str:
    with pytest.raises(DicomError) as e: read_radiograph(path)
    return e.value.cause


def grey(path, **how) -> np.ndarray: return read_radiograph(path, **how).pixels


def linear(x, center, width):
    "PS3.3 C.11.2.1.2.1"
    return np.clip((x - (center - .5))/(width - 1) + .5, 0, 1)


FULL = linear(FILM, 2048, 4096)


def same(pixels, wanted): np.testing.assert_allclose(pixels, wanted, atol=2e-6)


# ---------------------------------------------------------------- a data set in another encoding than its file meta says

NATIVE = dict(implicit=lambda: bytes_of(header(syntax=ImplicitVRLittleEndian)), explicit=lambda: bytes_of(header()))


@pytest.mark.parametrize('name', NATIVE)
@pytest.mark.parametrize('syntax', [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRLittleEndian + ' '])
@pytest.mark.parametrize('behind', [b'', bytes(8), b'\xfc\xff\xfc\xffOB\0\0\4\0\0\0abcd'])
def test_implicit_and_explicit_are_told_by_the_data_set(write, name, syntax, behind):
    path = write(retagged(NATIVE[name](), syntax) + behind)
    assert np.array_equal(stored(path), FILM)
    assert np.array_equal(pydicom.dcmread(path).pixel_array, FILM)
    same(grey(path), FULL)
    assert index_row(path)['error']=='' and fast_header(path)==read_header(path)


@pytest.mark.parametrize('name', NATIVE)
def test_the_pixel_data_element_may_be_written_otherwise(write, name):
    z = NATIVE[name]()
    k = z.rindex(b'\xe0\x7f\x10\0')
    other = z[:k+4] + (z[k+8:] if name=='explicit' else b'OW\0\0' + z[k+4:])
    assert np.array_equal(stored(write(other)), FILM) and index_row(write(other))['error']==''


@pytest.mark.parametrize('vr', [b'OB', b'UN'])
def test_the_type_of_pixel_data_is_another(write, vr):
    z = bytes_of(header())
    k = z.rindex(b'\xe0\x7f\x10\0OW')
    assert np.array_equal(stored(write(z[:k+4] + vr + z[k+6:])), FILM)


@pytest.mark.parametrize('name,syntax', [('implicit', ExplicitVRBigEndian), ('explicit', ExplicitVRBigEndian),
    ('big', ImplicitVRLittleEndian), ('big', ExplicitVRLittleEndian), ('big', JPEGLosslessSV1), ('deflated', None)])
def test_another_byte_order_is_refused(write, name, syntax):
    z = big_endian() if name=='big' else NATIVE[name]() if syntax else deflated(big_endian())
    path = write(retagged(z, syntax) if syntax else z)
    assert 'byte order' in refusal(path) and 'byte order' in index_row(path)['error']


@pytest.mark.parametrize('syntax,cause', [(JPEGLosslessSV1, 'not in whole fragments'), (JPEG_XL[0], 'not in whole'),
    (RLELossless, 'not in whole'), (RAW_FRAMES, 'not in whole'), (DeflatedExplicitVRLittleEndian, 'not deflated'),
    ('1.2.840.10008.1.2.4.100', r'MPEG2 .* not supported'), ('1.2.3.4.5', r'\(private\) is not supported'),
    ('1.2.840.113619.5.2', r'\(private\) is not supported'), ('1.2.840.10008.1.2.4.999', r'\(unknown\) is not')])
def test_uncompressed_numbers_under_a_syntax_that_says_otherwise(write, syntax, cause):
    for make in NATIVE.values():
        path = write(retagged(make(), syntax))
        with pytest.raises(DicomError, match=cause): read_radiograph(path)
        assert index_row(path)['error']==refusal(path)


@pytest.mark.parametrize('kind', ['lossless', 'jpegls', 'jpeg2000', 'jpegxl'])
def test_a_stream_says_itself_what_it_is(write, kind):
    for syntax in (ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, '1.2.3.4.5', '1.2.840.10008.1.2.4.102'):
        assert np.array_equal(stored(write(compressed(header(), [STREAMS[kind][0]], syntax))), FILM), syntax


def test_the_copy_of_a_mismatch_is_sound(write, tmp_path):
    path = write(retagged(NATIVE['implicit'](), ExplicitVRLittleEndian) + bytes(8))
    account = deidentify(path, tmp_path/'out', key=b'0'*32, burned_in='keep', workers=1)
    assert account.status.tolist()==['ok']
    copy = tmp_path/'out'/account.path[0]
    assert np.array_equal(pydicom.dcmread(copy).pixel_array, FILM)
    same(grey(copy), FULL)


# ---------------------------------------------------------------- bits

@pytest.mark.parametrize('how', [dict(HighBit=7), dict(HighBit=16), dict(HighBit=3),
    dict(bits=8, alloc=8, HighBit=15), dict(bits=16, HighBit=11)])
def test_an_impossible_high_bit(write, how):
    bits = how.get('bits', 12)
    path = write(header(**how))
    assert np.array_equal(stored(path), film(bits))
    with pytest.warns(UserWarning, match='HighBit .* is impossible'): pixels = grey(path)
    same(pixels, linear(film(bits), 2**(bits-1), 2**bits))


@pytest.mark.parametrize('signed', [False, True])
def test_no_bits_stored(write, signed):
    "HighBit tells where the sign is."
    ds = header(signed=signed)
    ds.PixelData = (film(12, signed) & 0xFFF).astype('<u2').tobytes()
    del ds.BitsStored
    path = write(ds)
    with pytest.warns(UserWarning, match='BitsStored is missing; 12 is taken'): pixels = grey(path)
    assert np.array_equal(stored(path), film(12, signed))
    same(pixels, linear(film(12, signed), 2048*(not signed), 4096))
    del ds.HighBit
    assert np.array_equal(stored(write(ds)), film(12, signed) & 0xFFF)


def test_a_high_bit_that_the_numbers_contradict(write):
    "The lowest bits are used and the highest are not: shifted down, four bits of the picture would be lost."
    path = write(header(HighBit=15))
    with pytest.warns(UserWarning, match='HighBit 15 contradicts the pixels; 11 is taken'): pixels = grey(path)
    same(pixels, FULL)
    assert np.array_equal(pydicom.dcmread(path).pixel_array, stored(path))
    # really above: shifted
    assert np.array_equal(stored(write(header(FILM<<4, HighBit=15))), FILM)


# ---------------------------------------------------------------- lookup tables

ROOT = np.round(4095*(np.arange(4096)/4095)**.5).astype(int) # no straight line
BYTES = (ROOT>>4).astype('u1')


def table(n, first, bits, data, described='US', vr='US'):
    item = Dataset()
    item.add_new('LUTDescriptor', described, [n, first, bits])
    item.add_new('LUTData', vr, data if isinstance(data, bytes) else [int(v) for v in data])
    return Sequence([item])


LITTLE = dict(
    whole=(table(4096, 0, 12, ROOT), ROOT[FILM]/4095),
    words_as_bytes=(table(4096, 0, 12, ROOT.astype('<u2').tobytes(), vr='OW'), ROOT[FILM]/4095),
    short=(table(4096, 0, 12, ROOT[:3000]), ROOT[np.minimum(FILM, 2999)]/4095),
    short_by_half=(table(4096, 0, 12, ROOT[:2048]), ROOT[np.minimum(FILM, 2047)]/4095),
    long=(table(4096, 0, 12, [*ROOT, *[65535]*99]), ROOT[FILM]/4095),
    later=(table(2048, 1024, 12, ROOT[:2048]), ROOT[np.clip(FILM - 1024, 0, 2047)]/4095),
    eight_bits=(table(4096, 0, 8, BYTES), BYTES[FILM]/255),
    packed=(table(4096, 0, 8, BYTES.tobytes(), vr='OW'), BYTES[FILM]/255),
    packed_words=(table(4096, 0, 8, np.frombuffer(BYTES.tobytes(), '<u2')), BYTES[FILM]/255),
    packed_bytes=(table(4096, 0, 8, BYTES.tobytes(), vr='OB'), BYTES[FILM]/255),
    packed_odd=(table(4095, 0, 8, BYTES.tobytes(), vr='OW'), BYTES[np.minimum(FILM, 4094)]/255),
    packed_though_16_bits=(table(4096, 0, 16, BYTES.tobytes(), vr='OW'), BYTES[FILM]/255),
    no_bits=(table(4096, 0, 0, ROOT), ROOT[FILM]/4095), too_many_bits=(table(4096, 0, 17, ROOT), ROOT[FILM]/4095),
    sixteen_bits=(table(4096, 0, 16, ROOT), ROOT[FILM]/65535))


@pytest.mark.parametrize('name', LITTLE)
@pytest.mark.parametrize('syntax', [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.filterwarnings('ignore:.*fewer entries')
def test_tables_of_the_voi_step(write, name, syntax):
    voi, wanted = LITTLE[name]
    same(grey(write(header(syntax=syntax, VOILUTSequence=voi))), wanted)


def test_a_short_table_is_told(write):
    with pytest.warns(UserWarning, match='fewer entries than it says'):
        grey(write(header(VOILUTSequence=LITTLE['short'][0])))


@pytest.mark.parametrize('name', ['words_as_bytes', 'packed'])
def test_tables_in_big_endian(write, name):
    voi, wanted = LITTLE[name]
    ds = header(syntax=ExplicitVRBigEndian, VOILUTSequence=table(*voi[0].LUTDescriptor,
        np.frombuffer(voi[0].LUTData, '<u2').astype('>u2').tobytes(), vr='OW'))
    ds.PixelData = WORDS.astype('>u2').tobytes()
    same(grey(write(bytes_of(ds, implicit_vr=False, little_endian=False))), wanted)


def test_long_tables(write):
    "65,536 entries are written as 0; from 32,768 on an implicit signed file has a negative number of them."
    root = np.round(65535*(np.arange(65536)/65535)**.5).astype(int)
    path = write(header(film(16), bits=16, VOILUTSequence=table(0, 0, 16, root.astype('<u2').tobytes(), vr='OW')))
    same(grey(path), root[film(16)]/65535)
    for n, first in ((40000, -20000), (65535, -32768), (0, -32768)):
        voi = table(n, first & 0xFFFF, 16, root[:n or 65536].astype('<u2').tobytes(), vr='OW')
        path = write(header(film(16, True), bits=16, signed=True, syntax=ImplicitVRLittleEndian, VOILUTSequence=voi))
        same(grey(path), root[np.clip(film(16, True) - first, 0, (n or 65536) - 1)]/65535)


@pytest.mark.parametrize('described,first', [('SS', -2048), ('US', 65536 - 2048)])
@pytest.mark.parametrize('syntax', [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_the_first_value_is_negative(write, described, first, syntax):
    if syntax==ImplicitVRLittleEndian: described = 'US' # the type is not written
    voi = table(4096, first & 0xFFFF if described=='US' else first, 12, ROOT, described=described)
    same(grey(write(header(signed=True, syntax=syntax, VOILUTSequence=voi))), ROOT[FILM]/4095)
    ds = header(syntax=syntax, RescaleSlope=1, RescaleIntercept=-2048, VOILUTSequence=voi)
    if described=='US': same(grey(write(ds)), ROOT[FILM]/4095)


@pytest.mark.parametrize('described', ['US', 'SS'])
def test_the_first_value_is_large(write, described):
    ramp = np.linspace(0, 4095, 20000).round().astype(int)
    voi = table(20000, 40000 - (65536 if described=='SS' else 0), 12, ramp, described=described)
    path = write(header(film(16), bits=16, VOILUTSequence=voi))
    same(grey(path), ramp[np.clip(film(16) - 40000, 0, 19999)]/4095)


def test_both_steps_have_tables(write):
    down = 4095 - np.arange(4096)
    path = write(header(ModalityLUTSequence=table(4096, 0, 12, ROOT), VOILUTSequence=table(4096, 0, 12, down)))
    same(grey(path), (4095 - ROOT[FILM])/4095)
    path = write(header(ModalityLUTSequence=table(4096, 0, 12, ROOT[:3000]), WindowCenter=2000, WindowWidth=1000))
    with pytest.warns(UserWarning, match='fewer entries'):
        same(grey(path), linear(ROOT[np.minimum(FILM, 2999)], 2000, 1000))


EMPTY = dict(item=Sequence([Dataset()]), no_data=Sequence([Dataset()]), no_descriptor=Sequence([Dataset()]),
    two_numbers=Sequence([Dataset()]))
EMPTY['no_data'][0].add_new('LUTDescriptor', 'US', [4096, 0, 12])
EMPTY['no_descriptor'][0].add_new('LUTData', 'US', [1, 2, 3, 4])
EMPTY['two_numbers'][0].add_new('LUTDescriptor', 'US', [4096, 0])
EMPTY['two_numbers'][0].add_new('LUTData', 'US', [1, 2, 3, 4])


@pytest.mark.parametrize('name', EMPTY)
@pytest.mark.parametrize('step', ['ModalityLUTSequence', 'VOILUTSequence'])
@pytest.mark.filterwarnings('ignore:.*cannot be used and is left out')
def test_empty_tables(write, step, name):
    "The window counts, or without one the used range; and a table that is beside the empty one."
    same(grey(write(header(**{step: EMPTY[name]}))), FULL)
    low, high = FILM.min(), FILM.max()
    same(grey(write(header(window=False, **{step: EMPTY[name]}))), (FILM - low)/(high - low))
    both = Sequence([EMPTY[name][0], table(4096, 0, 12, ROOT)[0]])
    if step=='VOILUTSequence': same(grey(write(header(VOILUTSequence=both))), ROOT[FILM]/4095)


@pytest.mark.parametrize('sop,shown', [('12.1', False), ('12.2', False), ('12.3', False), ('1.1', True),
    ('12.1.1', True)])
def test_the_modality_step_of_fluoroscopy_is_not_for_display(write, sop, shown):
    "PS3.3 C.8.7.1.1.2; DCMTK leaves it out as well."
    sop = f'1.2.840.10008.5.1.4.1.1.{sop}'
    down = table(4096, 0, 16, 4095 - np.arange(4096))
    for how in (dict(ModalityLUTSequence=down), dict(RescaleSlope=-1, RescaleIntercept=4095)):
        same(grey(write(header(sop=sop, **how))), 1 - FULL if shown else FULL)


# ---------------------------------------------------------------- code strings

@pytest.mark.parametrize('code', ['Monochrome1', 'monochrome1 ', ' MONOCHROME1', 'MONOCHROME 1', 'MONOCHROME_1'])
def test_white_is_zero_in_other_letters(write, code):
    path = write(header(PhotometricInterpretation=code))
    same(grey(path), 1 - FULL)
    same(grey(path, verify=True), 1 - FULL)
    path = write(compressed(header(PhotometricInterpretation=code), [STREAMS['lossless'][0]], JPEGLosslessSV1))
    same(grey(path, verify=True), 1 - FULL)


def test_a_code_that_is_none(write):
    path = write(header(PhotometricInterpretation='GREY'))
    with pytest.warns(UserWarning, match='MONOCHROME2 is taken'): same(grey(path), FULL)


def test_other_codes_in_other_letters(write):
    for code in ('inverse', ' Inverse', 'INVERSE '):
        same(grey(write(header(PresentationLUTShape=code))), 1 - FULL)
    sigmoid = 1/(1 + np.exp(-4*(FILM - 2048)/4096))
    for code in ('sigmoid', 'Sigmoid '): same(grey(write(header(VOILUTFunction=code))), sigmoid)
    for code in ('Linear_Exact', 'LINEAR EXACT'):
        path = write(header(VOILUTFunction=code, WindowCenter=2000, WindowWidth=1000))
        same(grey(path), np.clip((FILM - 2000)/1000 + .5, 0, 1))
    assert [code_string(v) for v in ('ybr full 422', ['palette_color', 'X'], None, 'for processing\0')]==[
        'YBR_FULL_422', 'PALETTE COLOR', '', 'FOR PROCESSING']


def test_colour_in_other_letters(write):
    rgb = np.stack([FILM>>4, (FILM>>4)[::-1], FILM>>5], -1).astype('u1')
    for code, wanted in (('rgb', rgb), ('ybr_full', None)):
        ds = header(film(8), bits=8, alloc=8, SamplesPerPixel=3, PhotometricInterpretation=code, PlanarConfiguration=0)
        ds.PixelData = rgb.tobytes()
        ds.PhotometricInterpretation = code
        wanted = rgb if wanted is not None else pydicom.pixels.convert_color_space(rgb, 'YBR_FULL', 'RGB')
        assert np.array_equal(stored(write(ds)), wanted)
    half = header(film(8), bits=8, alloc=8, SamplesPerPixel=3, PlanarConfiguration=0)
    half.PixelData = rgb[..., :2].tobytes()
    half.PhotometricInterpretation = 'ybr_full_422'
    assert stored(write(half)).shape==(H, W, 3) and index_row(write(half))['error']==''


def test_the_page_knows_codes_in_other_letters(tmp_path):
    for k, code in enumerate(['Monochrome1', 'MONOCHROME2', 'monochrome2']):
        ds = header(PhotometricInterpretation=code, PresentationIntentType='for processing', Modality='dx')
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f'1.2.826.0.1.9{k}'
        (tmp_path/f'{k}.dcm').write_bytes(bytes_of(ds))
    e = explore_dicoms(tmp_path)
    assert [Path(p).name for p in e.files['some are MONOCHROME1']]==['0.dcm'] and len(e.files['for processing'])==3
    assert not {'colour', 'not a projection radiograph'} & {*e.files}


# ---------------------------------------------------------------- streams

FILLINGS = dict(zeros=bytes(128), ones=b'\xff'*200, blanks=b' '*100, text=b'made by somebody '*20, long=bytes(70_000),
    noise=np.random.default_rng(3).integers(0, 256, 300).astype('u1').tobytes())


@pytest.mark.parametrize('kind', STREAMS)
def test_bytes_behind_the_end_marker(write, kind):
    stream, syntax = STREAMS[kind]
    for name, filling in FILLINGS.items():
        path = write(compressed(header(), [even(stream) + filling], syntax))
        assert np.array_equal(stored(path), FILM), name
    if kind!='rle':
        assert np.array_equal(stored(write(compressed(header(), [even(stream)*2], syntax))), FILM)


@pytest.mark.parametrize('kind', ['lossless', 'jpegls'])
def test_an_end_marker_in_the_middle_is_damage(write, kind):
    stream, syntax = STREAMS[kind]
    middle = len(stream)//2
    hurt = stream[:middle] + b'\xff\xd9' + stream[middle+2:]
    for filling in (b'', bytes(128), b'\xff'*128):
        assert 'damaged' in refusal(write(compressed(header(), [hurt + filling], syntax)))
    for filling in (b'', bytes(200), b'\xff'*200):
        assert 'ends early' in refusal(write(compressed(header(), [stream[:-200] + filling], syntax)))


@pytest.mark.parametrize('kind', STREAMS)
def test_no_mark_of_the_end_of_fragments(write, kind):
    stream, syntax = STREAMS[kind]
    for fragments, end in (([stream], b''), ([stream], b'\0\0\0'), ([even(stream)[:500], even(stream)[500:]], b'')):
        path = write(compressed(header(), fragments, syntax, end=end))
        assert np.array_equal(stored(path), FILM) and index_row(path)['error']==''
    path = write(compressed(header(), [stream], syntax, end=b'')[:-100])
    assert index_row(path)['error']==refusal(path)=='the compressed pixel data ends early'
    path = write(compressed(header(), [], syntax, end=b''))
    assert index_row(path)['error']==refusal(path)=='the compressed pixel data is not in whole fragments'


@pytest.mark.parametrize('kind', STREAMS)
def test_fragments_behind_a_length(write, kind):
    z = compressed(header(), [STREAMS[kind][0]], STREAMS[kind][1])
    k = z.rindex(b'\xe0\x7f\x10\0OB') + 12
    path = write(z[:k-4] + struct.pack('<I', len(z) - k) + z[k:])
    assert np.array_equal(stored(path), FILM) and index_row(path)['error']==''


def test_deflated_files(write):
    plain = bytes_of(header())
    k = plain.rindex(b'\xe0\x7f\x10\0OW')
    length = b'\xe0\x7f\0\0UL\4\0' + struct.pack('<I', 2*H*W + 12)
    for z in (deflated(plain[:k] + length + plain[k:]), plain[:k] + length + plain[k:], deflated(plain, 15),
            deflated(plain, behind=b'\0'), deflated(plain, behind=b'more'*99), deflated(NATIVE['implicit']())):
        path = write(z)
        assert np.array_equal(stored(path), FILM) and index_row(path)['error']==''
    path = write(deflated(plain)[:-3000])
    assert 'ends early' in refusal(path) and 'ends early' in index_row(path)['error']


# ---------------------------------------------------------------- transfer syntaxes since 2024

def test_jpeg_xl(write):
    wide = film(16).astype('u2')
    small = film(8).astype('u1')
    encode = imagecodecs.jpegxl_encode
    for syntax in JPEG_XL:
        assert np.array_equal(stored(write(compressed(header(), [encode(WORDS, lossless=True)], syntax))), FILM)
    for how in (dict(usecontainer=True), dict(bitspersample=12)):
        path = write(compressed(header(), [encode(WORDS, lossless=True, **how)], JPEG_XL[0]))
        assert np.array_equal(stored(path), FILM)
    path = write(compressed(header(bits=16), [encode(wide, lossless=True)], JPEG_XL[0]))
    assert np.array_equal(stored(path), wide)
    path = write(compressed(header(bits=8, alloc=8), [encode(small, lossless=True)], JPEG_XL[0]))
    assert np.array_equal(stored(path), small)
    signed = (film(12, True) & 0xFFF).astype('u2')
    path = write(compressed(header(signed=True), [encode(signed, lossless=True)], JPEG_XL[0]))
    assert np.array_equal(stored(path), film(12, True))
    two = [encode(WORDS, lossless=True), encode(WORDS[::-1].copy(), lossless=True)]
    path = write(compressed(header(NumberOfFrames=2), two, JPEG_XL[0]))
    assert np.array_equal(stored(path, 1), FILM[::-1])
    lossy = stored(write(compressed(header(), [encode(WORDS, level=95)], JPEG_XL[2])))
    assert 0<np.abs(lossy.astype(int) - FILM).mean()<20


def test_jpeg_xl_is_looked_at_first(write):
    stream = STREAMS['jpegxl'][0]
    for hurt in (stream[:-200], stream[:200] + bytes(50) + stream[250:], stream[:3], b'\xff\x0a'):
        path = write(compressed(header(), [hurt], JPEG_XL[0]))
        with pytest.raises(DicomError, match='damaged|declares'): read_radiograph(path)
    other = imagecodecs.jpegxl_encode(WORDS[:-2], lossless=True)
    assert 'the compressed stream 98 x 80' in refusal(write(compressed(header(), [other], JPEG_XL[0])))
    large = imagecodecs.jpegxl_encode(np.zeros((5000, 5000), np.uint16), lossless=True) # some hundred bytes
    assert 'the compressed stream 5000 x 5000' in refusal(write(compressed(header(), [large], JPEG_XL[0])))
    with pytest.raises(DicomError, match='second decoder does not confirm'):
        read_radiograph(write(compressed(header(), [stream], JPEG_XL[0])), verify=True)


@pytest.mark.parametrize('syntax', [DEFLATED_FRAMES, RAW_FRAMES])
def test_frames_that_are_not_compressed_as_pictures(write, syntax):
    pack = deflate if syntax==DEFLATED_FRAMES else bytes
    one, two = pack(WORDS.tobytes()), pack(WORDS[::-1].tobytes())
    path = write(compressed(header(), [one], syntax))
    assert np.array_equal(stored(path), FILM)
    same(grey(path, verify=True), FULL)
    assert index_row(path)['error']==''
    path = write(compressed(header(NumberOfFrames=2), [one, two], syntax))
    assert np.array_equal(stored(path, 1), FILM[::-1])
    assert np.array_equal(stored(write(compressed(header(), [one[:1000], one[1000:]], syntax))), FILM)
    for hurt in (one[:-500], pack(bytes(10**6)) if syntax==DEFLATED_FRAMES else one + bytes(100)):
        assert 'damaged' in refusal(write(compressed(header(), [hurt], syntax)))
    rgb = np.stack([FILM>>4]*2 + [FILM>>5], -1).astype('u1')
    ds = header(film(8), bits=8, alloc=8, SamplesPerPixel=3, PhotometricInterpretation='RGB', PlanarConfiguration=1)
    path = write(compressed(ds, [pack(rgb.transpose(2, 0, 1).tobytes())], syntax))
    assert np.array_equal(stored(path), rgb)


@pytest.mark.parametrize('syntax,cause', [('1.2.840.10008.1.2.4.102', 'MPEG-4'), ('1.2.3.4', 'private'),
    ('1.2.840.10008.1.2.4.999', 'unknown'), (ExplicitVRLittleEndian, 'where its transfer syntax says that it is not'),
    (JPEG2000Lossless, 'neither JPEG, JPEG-LS, JPEG 2000 nor JPEG XL')])
def test_streams_of_other_kinds(write, syntax, cause):
    said = refusal(write(compressed(header(), [b'\0\0\1\xb3' + bytes(range(256))*40], syntax)))
    assert cause in said and ('damaged' in said)==(syntax==JPEG2000Lossless)


# ---------------------------------------------------------------- functional groups

def group(**macros):
    "An item of functional groups: each macro with its elements."
    out = Dataset()
    for name, values in macros.items():
        item = Dataset()
        for k, v in values.items(): setattr(item, k, v)
        setattr(out, name, Sequence([item]))
    return out


def tomosynthesis(shared, *frames, **more) -> Dataset:
    ds = header(window=False, sop='1.2.840.10008.5.1.4.1.1.13.1.3', **more)
    ds.NumberOfFrames, ds.PixelData = 2, WORDS.tobytes() + WORDS[::-1].tobytes()
    del ds.PixelSpacing
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    ds.PerFrameFunctionalGroupsSequence = Sequence([*frames])
    return ds


def test_functional_groups_that_all_frames_share(write):
    path = write(tomosynthesis(group(PixelMeasuresSequence=dict(PixelSpacing=[.1, .2]),
        FrameVOILUTSequence=dict(WindowCenter=1000, WindowWidth=1000)), Dataset(), Dataset()))
    for frame, wanted in ((0, FILM), (1, FILM[::-1])):
        r = read_radiograph(path, frame=frame)
        same(r.pixels, linear(wanted, 1000, 1000))
        assert r.spacing==(.1, .2) and r.tags['WindowCenter']==1000


def test_functional_groups_of_each_frame(write):
    voi = dict(WindowCenter=[1000, 3000], WindowWidth=[1000, 500])
    path = write(tomosynthesis(group(PixelMeasuresSequence=dict(PixelSpacing=[.1, .1]), FrameVOILUTSequence=voi),
        group(PixelValueTransformationSequence=dict(RescaleSlope=2, RescaleIntercept=-100)),
        group(PixelMeasuresSequence=dict(PixelSpacing=[.3, .3]), FrameAnatomySequence=dict(FrameLaterality='L'),
            FrameVOILUTSequence=dict(WindowCenter=2000, WindowWidth=800, VOILUTFunction='sigmoid')),
        # what stands outside of the groups counts where they are silent
        RescaleSlope=4, RescaleIntercept=0, VOILUTSequence=table(4096, 0, 12, ROOT)))
    first, second = read_radiograph(path, frame=0), read_radiograph(path, frame=1)
    same(first.pixels, linear(2*FILM - 100, 1000, 1000))
    same(second.pixels, 1/(1 + np.exp(-4*(4*FILM[::-1] - 2000)/800)))
    assert (first.spacing, second.spacing, second.tags['FrameLaterality'])==((.1, .1), (.3, .3), 'L')
    same(grey(path, frame=0, voi=1), linear(2*FILM - 100, 3000, 500))
    assert index_row(path)['spacing_row']==.1


def test_functional_groups_that_are_broken(write):
    "Too few frames, an empty sequence, a number that is none: what can be read counts."
    shared = group(FrameVOILUTSequence=dict(WindowCenter=1000, WindowWidth=1000))
    same(grey(write(tomosynthesis(shared)), frame=1), linear(FILM[::-1], 1000, 1000))
    ds = tomosynthesis(Dataset(), Dataset(), Dataset())
    ds.SharedFunctionalGroupsSequence = Sequence([])
    ds.PerFrameFunctionalGroupsSequence[1].FrameVOILUTSequence = Sequence([])
    low, high = FILM.min(), FILM.max()
    same(grey(write(ds), frame=1), (FILM[::-1] - low)/(high - low))
    z = bytes_of(tomosynthesis(group(PixelMeasuresSequence=dict(PixelSpacing=[.125, .125])), Dataset()))
    path = write(z.replace(b'0.125\\0.125', b'0.1x5\\0.125'))
    assert read_radiograph(path, frame=0).spacing is None and np.isnan(index_row(path)['spacing_row'])


# ---------------------------------------------------------------- padding

@pytest.mark.parametrize('how', [dict(PixelPaddingValue=0, PixelPaddingRangeLimit=4095),
    dict(PixelPaddingValue=4095, PixelPaddingRangeLimit=0), dict(PixelPaddingValue=0, PixelPaddingRangeLimit=65535)])
def test_padding_that_covers_everything(write, how):
    with pytest.warns(UserWarning, match='padding of the header would cover the whole picture'):
        same(grey(write(header(**how))), FULL)
    low, high = FILM.min(), FILM.max()
    with pytest.warns(UserWarning, match='padding'):
        same(grey(write(header(window=False, **how))), (FILM - low)/(high - low))


def test_padding_of_the_other_sign(write):
    "-2000 written as 63,536, and the reverse."
    a = film(16, True)
    a[:20] = -32000
    ds = header(a, bits=16, signed=True, window=False)
    ds.add_new('PixelPaddingValue', 'US', 65536 - 32000)
    pixels = grey(write(ds))
    assert (pixels[:20]==0).all()
    same(pixels[20:], (a[20:] - a[20:].min())/(a[20:].max() - a[20:].min()))
    a = film(16)
    a[:20] = 64000
    ds = header(a, bits=16, window=False)
    ds.add_new('PixelPaddingValue', 'SS', 64000 - 65536)
    same(grey(write(ds))[20:], (a[20:] - a[20:].min())/(a[20:].max() - a[20:].min()))


# ---------------------------------------------------------------- packed files, and DICOM under other names

def packed_folder(folder: Path) -> dict:
    "Files by name, and what the index must say of each; None: it is not listed."
    film_ = bytes_of(header())
    def zipped(how=zipfile.ZIP_DEFLATED, **members):
        out = io.BytesIO()
        with zipfile.ZipFile(out, 'w', how) as z:
            for name, data in members.items(): z.writestr(name.replace('__', '/').replace('_DOT_', '.'), data)
        return out.getvalue()
    encrypted = bytearray(zipped(a_DOT_dcm=film_))
    for mark, at in ((b'PK\3\4', 6), (b'PK\1\2', 8)): encrypted[encrypted.index(mark) + at] |= 1
    inside = gzip.compress(film_)
    tar = bytearray(512)
    tar[:5], tar[257:262] = b'a.dcm', b'ustar'
    return {'a.dcm': (film_, ''), 'b.dcm.gz': (inside, ''), 'c.gz': (inside, ''), 'members.dcm.gz': (
        gzip.compress(film_[:3000]) + gzip.compress(film_[3000:]), ''),
        'compressed.dcm.gz': (gzip.compress(compressed(header(), [STREAMS['lossless'][0]], JPEGLosslessSV1)), ''),
        'note.txt': (film_, ''), 'run.log': (film_, ''), 'letter.doc': (film_, ''),
        'x.inf': (film_[start_of(film_):], ''),
        'still.txt': (imagecodecs.png_encode(film(8).astype('u1')), ''),
        'twice.dcm.gz': (gzip.compress(inside), 'the file is packed (gzip)'),
        'deflated.dcm.gz': (gzip.compress(deflated(film_)), 'the file is packed twice (deflate, gzip)'),
        'cut.dcm.gz': (inside[:-2000], 'the packed file ends early'),
        'hurt.dcm.gz': (inside[:2000] + bytes(500) + inside[2500:], 'the packed file is damaged'),
        'still.png.gz': (gzip.compress(imagecodecs.png_encode(film(8).astype('u1'))),
            'it is a still image that is packed (gzip)'),
        'one.zip': (zipped(a_DOT_dcm=film_), 'the file is packed (zip)'),
        'many.zip': (zipped(a=film_, b=film_), 'the file is packed (zip)'),
        'outside.zip': (zipped(**{'______etc__a_DOT_dcm': film_}), 'the file is packed (zip)'),
        'locked.zip': (bytes(encrypted), 'the file is packed (zip)'),
        'cut.zip': (zipped(a_DOT_dcm=film_)[:-30], 'the file is packed (zip)'),
        'tar.tar': (bytes(tar) + film_, 'the file is packed (tar)'), 'x.tgz': (gzip.compress(bytes(tar) + film_),
            'the file is packed (tar)'), 'x.7z': (b'7z\xbc\xaf\x27\x1c' + bytes(99), 'the file is packed (7z)'),
        'x.dcm.bz2': (b'BZh91AY&SY' + bytes(99), 'the file is packed (bzip2)'),
        'labels.csv': (b'a,b\n1,2\n', None), 'labels.csv.gz': (gzip.compress(b'a,b\n1,2\n'*99), None),
        'code.zip': (zipped(a_DOT_py=b'x', README=b'text'), None), 'notes.txt': (b'Dear colleague, ' + b'x'*200, None),
        'empty.txt': (b'', None), 'volume.nii.gz': (gzip.compress(b'\x5c\1\0\0' + bytes(900)), None),
        'code.tar.gz': (gzip.compress(b'a.py' + bytes(253) + b'ustar' + bytes(700)), None), 'empty.gz': (b'', None),
        'bad.gz': (b'\x1f\x8bnot really', None)}


def test_packed_files_are_listed(tmp_path):
    files = packed_folder(tmp_path)
    for name, (data, _) in files.items(): (tmp_path/name).write_bytes(data)
    df = index_dicoms(tmp_path)
    said = {Path(p).name: e for p, e in zip(df.path, df.error)}
    assert said=={name: e for name, (_, e) in files.items() if e is not None}
    good = df[(df.error=='') & (df.SOPInstanceUID!='')]
    assert len(good)==9 and set(good.Rows)=={H} and set(good.PatientID)=={'P1'}
    for path, error in zip(df.path, df.error):
        if error: assert refusal(path)==error, path
        elif 'still' not in path:
            assert np.array_equal(stored(path), FILM), path
            assert read_header(path)==fast_header(path)
            same(grey(path), FULL)
    with pytest.raises(DataError, match='holds no image files'):
        (tmp_path/'texts').mkdir()
        (tmp_path/'texts'/'a.txt').write_text('text')
        image_files(tmp_path/'texts')


def test_packed_bombs(tmp_path, write):
    "What unpacks to more than the header declares is refused; so is a header without end."
    film_ = bytes_of(header())
    assert 'inflates beyond' in refusal(write(gzip.compress(film_ + bytes(2**26), 1)))
    endless = film_[:start_of(film_)] + b'\x09\0\x10\x10OB\0\0\xff\xff\xff\x0f' + bytes(2**25)
    path = write(gzip.compress(endless, 1))
    assert 'header is longer than' in refusal(path) and 'header is longer than' in index_row(path)['error']
    many = header(NumberOfFrames=16_000, Rows=4000, Columns=4000)
    assert 'bytes of deflated pixel data' in refusal(write(gzip.compress(bytes_of(many) + bytes(2**21), 1)))
