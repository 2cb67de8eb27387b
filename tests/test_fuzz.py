"""Damaged files never do worse than a `DicomError`: a slice of benchmarks/fuzz_dicom.py."""
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import fuzz_dicom


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


@pytest.mark.slow
def test_a_thousand_damaged_files(tmp_path):
    run = fuzz_dicom.fuzz(1000, seed=11, workers=2, findings=tmp_path)
    assert run.total==1000
    assert not run.faults, [f'{name} ({n} x): python benchmarks/fuzz_dicom.py --seed 11 --one '
        f'{run.examples.get(name)}' for name, n in run.faults.items()]
    assert run.outcomes['refused']>300 and run.outcomes['same pixels']>100, run.outcomes
    assert run.peak<256, f'{run.peak:.0f} MB'
