"""The index of a folder: the same values as pydicom, incremental runs, hostile headers and files that are
none; and what explore_dicoms finds."""
import os
import random
import shutil
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest

from radiology_ai.core import DataError, DicomError
from radiology_ai.dicom import index
from radiology_ai.dicom.explore import explore_dicoms
from radiology_ai.dicom.index import (
    INDEX_COLUMNS,
    INDEX_FLOAT,
    INDEX_INT,
    fast_header,
    image_files,
    index_dicoms,
    index_row,
    read_index,
    write_index,
)
from radiology_ai.dicom.quality import find_duplicates, pixel_digest
from radiology_ai.dicom.read import read_header
from radiology_ai.phantom.hospital import SYNTAXES, simulate_hospital, write_dicom

SOFT = np.linspace(0, 1, 40*33, dtype=np.float32).reshape(40, 33)


def outcome(read, path):
    "The values of a header, or None where it is refused."
    try: return read(path)
    except DicomError: return None


@pytest.fixture
def folder(tmp_path) -> Path:
    "Five good files of five patients and a text."
    for i in range(5):
        write_dicom(tmp_path/f'{i}.dcm', np.roll(SOFT, i, axis=1),
            header=dict(PatientID=f'P{i}', SOPInstanceUID=f'1.2.{i+1}', StudyInstanceUID=f'1.3.{i+1}'))
    (tmp_path/'note.dcm').write_text('Dear colleague, the film is not here.')
    return tmp_path


@pytest.fixture
def reads(monkeypatch) -> list:
    "The names of the files whose header is read from now on."
    seen, original = [], index._file_tags
    monkeypatch.setattr(index, '_file_tags', lambda path, size: seen.append(os.path.basename(path))
        or original(path, size))
    return seen


def test_same_values_as_pydicom_in_a_hospital(hospital):
    files = image_files(hospital/'dicom')
    assert len(files)>60
    for p in files:
        theirs = outcome(read_header, p)
        if theirs is not None and outcome(fast_header, p) is not None: assert fast_header(p)==theirs, p
    assert sum(outcome(fast_header, p) is None for p in files)<=4 # empty, a text, one without an end


def test_same_values_as_pydicom_on_real_files(real_data):
    # it begins with a stray byte
    files = [p for d in ('dicom', 'dicom_edge') for p in sorted((real_data/d).glob('*.dcm'))
        if p.name!='no_meta.dcm']
    assert len(files)>=26
    for p in files: assert fast_header(p)==read_header(p), p.name


def test_same_values_as_pydicom_on_its_own_samples():
    files = [p for p in Path(pydicom.__path__[0]).rglob('data/*_files/**/*.dcm')
        if p.name not in ('rtplan_truncated.dcm', 'no_meta.dcm')]
    assert len(files)>=90
    for p in files: assert outcome(fast_header, p)==outcome(read_header, p), p.name


@pytest.mark.parametrize('seed', range(4))
def test_mutated_headers(tmp_path, seed):
    "Damaged headers are read as pydicom reads them, or refused in time; nothing else escapes."
    gen = random.Random(seed)
    for s in SYNTAXES:
        write_dicom(tmp_path/f'{s}.dcm', SOFT, syntax=s, window='lut' if gen.random()<.5 else 'linear')
    sources, path, refused = [p.read_bytes()[:6000] for p in tmp_path.glob('*.dcm')], tmp_path/'mutated', 0
    patches = [b'\xff'*4, bytes(4), b'SQ\0\0', b'UN\0\0', b'\xfe\xff\0\xe0', b'\xfe\xff\x0d\xe0',
        b'\xfe\xff\xdd\xe0', b'\x7f\xff\xff\xff']
    for _ in range(250):
        data = bytearray(gen.choice(sources))
        for _ in range(gen.choice([1, 1, 3, 10])):
            i = gen.randrange(128, min(len(data), 2000))
            if gen.random()<.4: data[i] = gen.randrange(256)
            elif gen.random()<.6: data[i:i+4] = gen.choice(patches)
            else: del data[i:i+gen.randrange(1, 9)]
            if len(data)<400: break
        path.write_bytes(data)
        start = time.process_time()
        ours = outcome(fast_header, path)
        assert time.process_time() - start<.5
        theirs = outcome(read_header, path)
        refused += ours is None
        if ours is not None and theirs is not None:
            assert str(ours)==str(theirs) # as text, since not-a-number equals nothing
        index._table([tuple(index_row(path).values())])
    assert 0<refused<250


def hostile_headers():
    element = lambda tag, vr, value, n=None: struct.pack('<HH', tag>>16,
        tag&0xFFFF) + (vr + b'\0\0' + struct.pack('<I', len(value) if n is None else n)
                                             if vr in (b'SQ', b'OB', b'UN')
                                             else vr + struct.pack('<H',
                                             len(value) if n is None else n)) + value
    start = lambda syntax='1.2.840.10008.1.2.1': bytes(128) + b'DICM' + element(0x00020010, b'UI',
        syntax.encode() + b'\0'*(len(syntax)%2))
    sequence, open_item = element(0x00081110, b'SQ', b'', 2**32-1), b'\xfe\xff\0\xe0\xff\xff\xff\xff'
    z = zlib.compressobj(9, wbits=-15)
    nested = b''
    for _ in range(4000):
        nested = element(0x00540220, b'SQ', b'\xfe\xff\0\xe0' + struct.pack('<I', len(nested)) + nested)
    return dict(deep=start() + (sequence + open_item)*100_000,
        many=start() + element(0x00091010, b'LO', b'')*1_000_000,
        many_items=start() + sequence + b'\xfe\xff\0\xe0\0\0\0\0'*1_000_000,
        four_gigabytes=start() + element(0x00091010, b'OB', b'xx', 2**32-2),
        long_value=start() + element(0x00180015, b'UN', b'K'*20_000_000),
        endless=start() + sequence + open_item + element(0x00080104, b'LO', b'x'),
        deep_wanted=start() + nested, deep_wanted_letters=start()
        + element(0x00080005, b'CS', b'ISO 2022 IR 87') + nested,
        implicit=start('1.2.840.10008.1.2') + b'\x08\0\x10\x11\xff\xff\xff\xff'*100_000,
        big=start('1.2.840.10008.1.2.2') + b'\0\x09\0\x10LO\0\0'*500_000,
        deflated=start('1.2.840.10008.1.2.1.99') + z.compress(element(0x00091010, b'LO', bytes(60_000))*8000)
        + z.flush())


@pytest.mark.parametrize('name,data', hostile_headers().items(),
    ids=lambda o: o if isinstance(o, str) else '')
def test_hostile_headers_are_refused(tmp_path, monkeypatch, name, data):
    """After a bounded number of short reads and in a few megabytes, with a cause, without a RecursionError;
    `benchmarks/fuzz_dicom.py --bombs` measures the time."""
    path, reads = tmp_path/'hostile.dcm', []
    path.write_bytes(data)
    original = index._Source.at
    monkeypatch.setattr(index._Source, 'at', lambda self, p, *n: (out := original(self, p, *n),
        reads.append(len(out)))[0])
    row = index_row(path)
    assert len(reads)<200 and sum(reads)<4*2**20, (len(reads), sum(reads))
    tracemalloc.start()
    again = index_row(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row==again or str(row)==str(again)
    assert peak<8*2**20
    assert row['error'] and 'RecursionError' not in row['error']


def test_a_hole_of_four_gigabytes(tmp_path):
    path = tmp_path/'hole.dcm'
    write_dicom(path, SOFT)
    with open(path, 'r+b') as f: f.truncate(2**32 + 2**20)
    start = time.process_time()
    assert index_row(path)['error']==''
    assert time.process_time() - start<.5


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes')
def test_things_that_are_no_files(folder):
    os.mkfifo(folder/'pipe')
    os.symlink(folder/'nowhere', folder/'link.dcm')
    os.symlink(folder, folder/'loop')
    with open(os.fsencode(folder) + b'/M\xfcller.dcm', 'wb') as f: f.write((folder/'0.dcm').read_bytes())
    df = index_dicoms(folder).set_index('path')
    assert len(df)==9
    assert df.error[str(folder/'pipe')]=='it is not a regular file'
    assert df.error[str(folder/'link.dcm')].startswith('the file cannot be opened')
    assert df.error[[p for p in df.index if 'ller' in p][0]]=='the name of the file is not UTF-8; rename it'
    write_index(df.reset_index(), folder/'index.parquet')


def test_only_what_changed_is_read_again(folder, reads):
    first = index_dicoms(folder)
    assert sorted(reads)==['0.dcm', '1.dcm', '2.dcm', '3.dcm', '4.dcm', 'note.dcm']
    path = write_index(first, folder/'index.parquet')
    for previous in (first, path, str(path)):
        reads.clear()
        pd.testing.assert_frame_equal(index_dicoms(folder, previous=previous), first)
        assert reads==[]
    before = (folder/'1.dcm').stat()
    # the same length
    write_dicom(folder/'1.dcm', SOFT, header=dict(PatientID='Q1', SOPInstanceUID='1.2.2',
        StudyInstanceUID='1.3.2'))
    assert (folder/'1.dcm').stat().st_size==before.st_size
    os.utime(folder/'1.dcm', ns=(before.st_atime_ns, before.st_mtime_ns + 1)) # a nanosecond later
    shutil.copy(folder/'2.dcm', folder/'new.dcm')
    (folder/'3.dcm').unlink()
    second = index_dicoms(folder, previous=path)
    assert sorted(reads)==['1.dcm', 'new.dcm']
    pd.testing.assert_frame_equal(second, index_dicoms(folder))
    assert [os.path.basename(p) for p in second.path]==['0.dcm', '1.dcm', '2.dcm', '4.dcm', 'new.dcm',
        'note.dcm']
    assert second.PatientID[1]=='Q1'


def test_an_index_that_cannot_be_trusted_is_read_anew(folder, reads):
    first = index_dicoms(folder)
    old = first.copy()
    old.attrs['index_version'] = 0
    unopened = first.copy()
    unopened.loc[0, 'error'] = 'the file cannot be opened (PermissionError)'
    for previous, n in ((old, 6), (first.drop(columns='KVP'), 6), (folder/'not_yet.parquet', 6),
            (unopened, 1), (first.iloc[:2], 4), (pd.concat([first, first]), 0)):
        reads.clear()
        pd.testing.assert_frame_equal(index_dicoms(folder, previous=previous), first)
        assert len(reads)==n
    (folder/'bad.parquet').write_bytes(b'PAR1')
    with pytest.raises(DataError, match='not a readable parquet'):
        index_dicoms(folder, previous=folder/'bad.parquet')


def test_workers_types_and_parquet(hospital, tmp_path):
    one, two = index_dicoms(hospital/'dicom', workers=1), index_dicoms(hospital/'dicom', workers=2)
    pd.testing.assert_frame_equal(one, two)
    again = read_index(write_index(one, tmp_path/'a.parquet'))
    pd.testing.assert_frame_equal(one, again)
    assert again.attrs==one.attrs and list(one)==INDEX_COLUMNS
    for k in INDEX_COLUMNS:
        kind = 'i' if k in INDEX_INT else 'f' if k in INDEX_FLOAT else None
        if kind: assert one[k].dtype.kind==kind
        else: assert one[k].map(type).eq(str).all()


def test_a_file_over_which_a_process_was_lost(folder):
    row = dict(zip(INDEX_COLUMNS, index._row(str(folder/'0.dcm'), 'the process that read it died')))
    assert row['error']=='the process that read it died' and row['bytes']>0 and row['PatientID']==''


def test_numbers_beyond_any_column(folder):
    "A header may claim anything; a column holds 64 bits."
    write_dicom(folder/'0.dcm', SOFT, header=dict(NumberOfFrames='99999999999999999999', KVP='1e400',
        WindowCenter=['1', '2']))
    row = index_dicoms(folder/'0.dcm').iloc[0]
    assert row.NumberOfFrames==0 and np.isnan(row.KVP) and row.WindowCenter==1


def test_a_folder_that_cannot_be_opened_is_told(folder):
    if os.geteuid()==0: pytest.skip('root opens every folder')
    (folder/'closed').mkdir(mode=0)
    with pytest.warns(UserWarning, match='closed cannot be opened'): index_dicoms(folder)


def test_explore_finds_what_is_wrong(tmp_path):
    sop, n = {}, iter(range(1000))
    def film(what, image=None, **header):
        i = next(n)
        part = dict(PatientID=f'SECRET{i}', PatientBirthDate='19551224', PatientName='Secret^Name',
            StudyInstanceUID=f'1.2.826.0.1.77{i}', SOPInstanceUID=f'1.2.826.0.1.88{i}', StudyDate='20190317')
        sop.setdefault(what, []).append(str(tmp_path/f'{i}.dcm'))
        how = {k: header.pop(k) for k in ('photometric', 'syntax', 'bits') if k in header}
        write_dicom(tmp_path/f'{i}.dcm', np.roll(BIG, i, axis=1) if image is None else image,
            spacing=header.pop('spacing', .2), header=part | header, **how)
    BIG = np.random.default_rng(0).random((260, 300), dtype=np.float32)
    for _ in range(4): film('fine')
    film('no patient', PatientID=None)
    film('sides disagree', ImageLaterality='L', SeriesDescription='Knee RT')
    film('burned-in annotation', BurnedInAnnotation='YES')
    film('secondary capture', SOPClassUID='1.2.840.10008.5.1.4.1.1.7')
    film('for processing', PresentationIntentType='FOR PROCESSING')
    film('not a projection radiograph', Modality='CT')
    film('lossy compression', syntax='jpeg'); film('all pixels equal', np.full((260, 300), .5, np.float32))
    film('some are MONOCHROME1', photometric='MONOCHROME1')
    film('spacing unknown', ImagerPixelSpacing=None); film('pixels not square', ImagerPixelSpacing=[.2, .3])
    film('no body part', BodyPartExamined=None)
    film('no side', ImageLaterality=None)
    film('small', BIG[:100, :100]); film('implausible date', StudyDate='18990101')
    for _ in range(2): film('one study, several patients', StudyInstanceUID='1.2.3.4')
    for i in (1, 2):
        film('patient with several birth dates', PatientID='SAME1', PatientBirthDate=f'196{i}0101')
    for s in 'MF': film('patient with several sexes', PatientID='SAME2', PatientSex=s)
    for s in ('explicit', 'jpegls', 'big_endian'): film('same pixels, different patients', BIG*.7, syntax=s)
    for s in ('explicit', 'rle'): film('same pixels', BIG*.6, syntax=s, PatientID='SAME3')
    (tmp_path/'empty.dcm').write_bytes(b'')
    sop['unreadable'] = [str(tmp_path/'empty.dcm')]
    e = explore_dicoms(tmp_path, pixels='all', workers=1)
    fine = sop.pop('fine')
    assert {k: sorted(v) for k, v in e.files.items()}=={k: sorted(v) for k, v in sop.items()}
    assert not any(p in v for p in fine for v in e.files.values())
    assert set(e.attention.columns)=={'what', 'files', 'share', 'why it matters',
        'what to do'} and (e.attention.files>0).all()
    page = e.to_html(tmp_path/'page.html').read_text()
    shown = page + repr(e) + e._repr_html_() + e.attention.to_csv() + ''.join(t.drop(columns=['path',
        'example'], errors='ignore').to_csv() for t in e.tables.values())
    for secret in ('SECRET', 'Secret', '19551224', '20190317', '1.2.826.0.1.88', '1.2.826.0.1.77'):
        assert secret not in shown


def test_duplicates(folder):
    shutil.copy(folder/'0.dcm', folder/'copy.dcm')
    write_dicom(folder/'resent.dcm', SOFT, header=dict(PatientID='P0', SOPInstanceUID='1.2.1',
        SeriesDescription='sent again'))
    write_dicom(folder/'other.dcm', np.roll(SOFT, 1, axis=1), syntax='jpeg2000',
        header=dict(PatientID='X', SOPInstanceUID='1.9'))
    df = index_dicoms(folder)
    t = find_duplicates(df, pd.Series({p: pixel_digest(p)[0] for p in df.path[df.error=='']}))
    names = {k: sorted(os.path.basename(p) for p in g.path) for k, g in t.groupby(['kind', 'group'])}
    assert names=={('same SOP instance', 1): ['0.dcm', 'copy.dcm', 'resent.dcm'],
        ('same bytes', 1): ['0.dcm', 'copy.dcm'],
                   ('same pixels', 1): ['0.dcm', 'copy.dcm', 'resent.dcm'],
                   ('same pixels', 2): ['1.dcm', 'other.dcm']}
    assert sorted(set(t.patients))==[1, 2]


def test_explore_with_labels_of_any_kind(tmp_path):
    truth = simulate_hospital(tmp_path, n=20, size=96, workers=1)
    df = index_dicoms(tmp_path)
    n = int(truth.fractured[truth.broken==''].sum())
    for labels in (tmp_path/'truth.csv', truth[['path', 'fractured']], truth[['image_id', 'fractured']]):
        t = explore_dicoms(df[df.error=='' ].reset_index(drop=True), labels=labels,
            columns='fractured').tables['labels']
        assert t.positive[0]>=n and (t.prevalence.dropna().between(t.low.dropna(), t.high.dropna())).all()
    with pytest.raises(DataError, match='join no file'):
        explore_dicoms(df, labels=pd.DataFrame(dict(image_id=['1'], ill=[1])))
    with pytest.raises(DataError, match="pixels is 'some'"): explore_dicoms(df, pixels='some')
    with pytest.raises(DataError, match='no column'): explore_dicoms(df[['path', 'error']])


def test_a_folder_of_broken_files_only(tmp_path):
    for i in range(3): (tmp_path/f'{i}.dcm').write_bytes(b'')
    e = explore_dicoms(tmp_path, pixels='all')
    assert dict(e.tables['overview'].values)['unreadable']==3 and list(e.attention.what)==['unreadable']
    e.figures()
