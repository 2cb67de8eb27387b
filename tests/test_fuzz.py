"""Damaged files never do worse than a `DicomError`: a slice of benchmarks/fuzz_dicom.py."""
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import fuzz_commands
import fuzz_dicom
import fuzz_grammar

from radiology_ai.dicom import file
from radiology_ai.dicom.read import read_radiograph


@pytest.fixture(scope='module')
def bases(): return fuzz_dicom.base_files()


def test_every_transfer_syntax_is_among_the_intact_files(bases):
    assert {b.syntax for b in bases if b.kind=='dicom'}==set(fuzz_dicom.SYNTAXES)
    assert {b.syntax for b in bases if b.kind=='still'}=={'png', 'jpeg', 'tiff'}
    for b in bases:
        if b.kind=='dicom': assert fuzz_dicom.says_secret(b.data.decode('latin1')), b.name


def test_a_file_depends_on_the_seed_and_its_number_alone(bases):
    again = fuzz_dicom.base_files()
    for i in (0, 7, 123):
        a, b = fuzz_dicom.mutated(bases, 3, i), fuzz_dicom.mutated(again, 3, i)
        assert (a[0].name, a[1], a[2])==(b[0].name, b[1], b[2])
    assert len({fuzz_dicom.mutated(bases, 3, i)[2] for i in range(40)})>38


def test_intact_files_keep_their_pixels(bases, tmp_path):
    reader = fuzz_dicom.Reader(bases)
    for b in bases:
        path = tmp_path/'file'
        path.write_bytes(fuzz_dicom.intact(b))
        record = reader.one(path, b, 0)
        assert record['outcome']=='same pixels' and not record['faults'], record


def test_the_account_sees_faults(bases, tmp_path):
    "A reader that gives wrong pixels, leaks or raises is caught by the same code."
    reader, b = fuzz_dicom.Reader(bases[:1]), bases[0]
    path = tmp_path/'file'
    path.write_bytes(fuzz_dicom.intact(b))
    honest = reader.read
    def broken(kind):
        def read(path, **how):
            if kind=='raises': raise KeyError('PatientName')
            if kind=='leaks': raise fuzz_dicom.DicomError(path, 'the name SECRET^NAME is odd', 'Leave it out')
            r = honest(path, **how)
            r.pixels = np.full_like(r.pixels, np.nan)
            return r
        return read
    for kind, word in (('raises', 'KeyError'), ('leaks', 'header text'), ('nan', 'nan')):
        reader.read = broken(kind)
        faults = reader.one(path, b, 1)['faults']
        assert faults and word in ' '.join(faults), (kind, faults)


def test_a_header_is_the_same_on_the_leash_and_off(bases, tmp_path):
    "What the first bytes hold is parsed without counting: element by element and in its place as it is with."
    quick = 0
    for b in bases:
        if b.kind=='still': continue
        path = tmp_path/'file'
        path.write_bytes(fuzz_dicom.intact(b))
        head = file.read_head(path, 2**16)
        found = file._parse_head(path, None, head)
        ds, value = file.open_parts(path)
        other, place = file._open_long(path, None, head, pixels=True, max_pixels=file.MAX_PIXELS)
        assert list(ds)==list(other) and ds.filename==str(
            path) and ds.original_encoding==other.original_encoding
        if found is None: continue
        quick += 1
        assert (value.length, value.vr, value.at, value.size)==(place.length, place.vr, place.at, place.size)
    assert quick>40


def test_a_long_header_is_read_on_the_leash(bases, tmp_path):
    b = next(b for b in bases if b.name.startswith('explicit linear') or b.syntax=='explicit')
    at = next(e[0] for e in b.elements if e[3]==0x00280002)
    for n in (2**16 - 400, 2**16, 2**17):
        path = tmp_path/'file'
        path.write_bytes(b.data[:at] + fuzz_dicom.element(0x00231001, 'OB', bytes(n)) + b.data[at:])
        assert (file._parse_head(path, None, file.read_head(path, 2**16)) is None)==(n
            + len(b.data[:b.pixels])>2**16)
        assert read_radiograph(path).shape==(fuzz_dicom.ROWS, fuzz_dicom.COLS)


def test_a_slice_of_the_grammar():
    "Through index, read, preprocess and deidentify in one process with 1 GB: no crash, none lost, none slow."
    account = fuzz_commands.fuzz_files(250, seed=5, told=None)
    assert account.files==250 and not account.faults, [f'{what}: python benchmarks/fuzz_dicom.py --seed 5 --file {i} ({stage})'
        for i, stage, what in account.faults]
    for stage in fuzz_commands.STAGES:
        assert sum(n for k, n in account.counts.items() if k[0]==stage)==250 and account.counts[stage,
            'used']>40


def test_a_file_of_the_grammar_depends_on_its_number_alone():
    assert [fuzz_grammar.made(5, i) for i in (3, 9)]==[fuzz_grammar.made(5, i) for i in (3, 9)]
    assert len({fuzz_grammar.made(5, i)[1] for i in range(60)})>58


def test_the_account_of_commands_sees_faults(tmp_path, monkeypatch):
    "A command that loses a file, or is slow, is caught."
    from radiology_ai.dicom import index
    honest = index.index_dicoms
    monkeypatch.setattr(index, 'index_dicoms', lambda *a, **k: honest(*a, **k).iloc[1:])
    monkeypatch.setitem(fuzz_commands.LIMITS, 'refused', (-1., 64))
    faults = fuzz_commands.Batch(5, [*range(20)], tmp_path/'b').run()['faults']
    assert (0, 'index', 'not once in its account') in faults and any('refused after' in what
        for _, _, what in faults)


@pytest.mark.slow
def test_a_thousand_damaged_files(tmp_path):
    run = fuzz_dicom.fuzz(1000, seed=11, workers=2, findings=tmp_path)
    assert run.total==1000
    assert not run.faults, [f'{name} ({n} x): python benchmarks/fuzz_dicom.py --seed 11 --one '
        f'{run.examples.get(name)}' for name, n in run.faults.items()]
    assert run.outcomes['refused']>300 and run.outcomes['same pixels']>100, run.outcomes
    assert run.peak<256, f'{run.peak:.0f} MB'
