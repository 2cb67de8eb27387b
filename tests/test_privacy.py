"""A name that is planted in headers, files and folders is looked for, byte by byte, in everything that the commands say and leave."""
import ast
import base64
import contextlib
import io
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from radiology_ai.core import Radiograph, harmless, write_text
from radiology_ai.names import file_label

HEADER = dict(PatientName='QYNAME^QYGIVEN', OtherPatientIDs='QYOTHERID', InstitutionName='QYINST',
    ReferringPhysicianName='QYREF^DOC', StudyDescription='QYSTUDY knee', SeriesDescription='QYSERIES',
    AccessionNumber='QYACC1', PatientAddress='QYADDRESS', OperatorsName='QYOPER', StationName='QYSTATION',
    RequestedProcedureDescription='QYPROC', PatientBirthDate='19321107', ProtocolName='QYPROTOCOL')
WORDS = sorted({w.lower() for v in HEADER.values() for w in re.split(r'[\^ ]', v) if w.startswith('QY')}) + ['19321107',
    'sim0000', '9.8.7.6', 'qyfolder', 'qyfile', 'qyodd_', 'qyred', 'qyline', 'qyturn', 'qylong', 'qymaths', 'qypicture',
    'qyidsim']
ODD_NAMES = [b'QYF\xfcLE.dcm', b'QYRED\x1b[31m.dcm', b'QYLINE\nline.dcm', 'QYTURN\u202e.dcm'.encode(),
    b'QYLONG' + b'g'*245 + b'.dcm', b'QYMATHS$\\frac{1$.dcm']
# the tables with identifiers: for the owner's eyes
TABLES = ('index.parquet', 'errors.parquet', 'shards/*', 'manifest.csv', 'split.csv', 'predictions.csv', 'scores.csv',
    'heat.csv', 'p.csv', 'p.json', 'link.csv', '*unreadable.csv', 'images.csv', 'other.csv')
OWN = ('*unreadable.csv', 'images.csv', 'place.json', 'p.json')


class Terminal(io.StringIO):
    def isatty(self): return True


def command(*words, stream=io.StringIO):
    "Exit code and what is said, in this process."
    from radiology_ai.cli import main
    out, err = stream(), stream()
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(),
            patch('warnings.formatwarning', warnings.formatwarning), pytest.raises(SystemExit) as end):
        warnings.simplefilter('always')
        warnings.showwarning = lambda *of, **more: sys.stderr.write(warnings.formatwarning(*of[:4]))
        main(list(map(str, words)))
    return end.value.code, out.getvalue() + err.getvalue()


def spoken(data: bytes) -> set:
    "The planted words in bytes, whatever their case and their width."
    data = data.lower()
    return {w for w in WORDS if w.encode() in data or w.encode('utf-16-le') in data}


def contents(path: Path) -> bytes:
    "The bytes of a file, and what is packed in them."
    data = path.read_bytes() + os.fsencode(path.name)
    if path.suffix=='.parquet': data += pd.read_parquet(path).to_csv().encode()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z: data += b''.join(n.encode() + z.read(n) for n in z.namelist())
    if path.suffix=='.png': data += repr(Image.open(path).info).encode()
    if path.suffix=='.html':
        pictures = re.compile(rb'base64,([A-Za-z0-9+/=]+)')
        data = pictures.sub(b'', data) + b''.join(map(base64.b64decode, pictures.findall(data)))
    return data


def leaks(folder, allowed=()) -> dict:
    "The files below a folder that hold planted words, without the tables that may."
    out = {}
    for p in sorted(Path(folder).rglob('*')):
        if not p.is_file() or any(p.match(a) for a in allowed): continue
        words = spoken(contents(p)) | spoken(os.fsencode(p.relative_to(folder)))
        if words: out[str(p.relative_to(folder))] = words
    return out


@pytest.fixture(scope='module')
def place(tmp_path_factory, hospital):
    "A hospital with planted words, in h; the outputs go to o; HOME and TMPDIR are here."
    root = tmp_path_factory.mktemp('privacy')
    for name in ('h', 'o', 'home', 'tmp'): (root/name).mkdir()
    plant(hospital/'dicom', root/'h')
    truth = pd.read_csv(hospital/'dicom/truth.csv', keep_default_na=False)
    knees = truth[(truth.body_part=='KNEE') & (truth.broken=='')]
    labels = knees[['image_id', 'schatzker']].assign(patient_id='QYID' + knees.patient_id)
    labels.to_csv(root/'labels.csv', index=False)
    old = os.getcwd()
    with patch.dict(os.environ, HOME=str(root/'home'), TMPDIR=str(root/'tmp')), patch.object(tempfile, 'tempdir', None):
        os.chdir(root)
        yield root
        os.chdir(old)


def plant(source: Path, target: Path):
    "Copies with planted words in header, folder and file; and some files that cannot be read."
    for p in sorted(source.rglob('*')):
        if not p.is_file() or p.suffix: continue
        at = p.relative_to(source)
        to = target/f'Qyfolder_{at.parts[0]}'/f'Qyfile_{"_".join(at.parts[1:])}'
        to.parent.mkdir(exist_ok=True)
        shutil.copy(p, to)
        with contextlib.suppress(Exception), pydicom.config.disable_value_validation(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ds = pydicom.dcmread(p)
            for k, v in HEADER.items(): setattr(ds, k, v)
            ds.BodyPartExamined = ds.get('BodyPartExamined') or '$\\FRAC{1$'
            ds.save_as(to)
    films = [p for p in sorted(target.rglob('*')) if p.is_file()]
    odd = target/'Qyodd_folder'
    odd.mkdir()
    for k, name in enumerate(ODD_NAMES):
        (odd/os.fsdecode(name)).write_bytes(films[0].read_bytes()[:400*k])
    grey = np.random.default_rng(0).integers(0, 255, (80, 60, 3), dtype=np.uint8)
    for k in range(2): Image.fromarray(grey).save(odd/f'QYPICTURE_{k}.png')


STEPS = dict(index='index h --out o/index.parquet', again='index h --out o/index.parquet --debug',
    explore='explore h --pixels --out o/explore.html --workers 1',
    preprocess='preprocess h --recipe knee --size 64 --workers 1 --out o/store',
    train='train knee --data o/store --labels labels.csv --label schatzker --arch resnet10t --epochs 1 --bs 8 --out o/run '
    '--no-pretrained', repeated='train --settings o/run/run.toml --out o/run2',
    evaluate='evaluate o/run --out o/report',
    elsewhere='evaluate o/run --data o/store --labels labels.csv --out o/there',
    predict='predict o/run h --out o/p.csv --to csv --to json --to png --workers 1',
    explain='explain o/run h --out o/heat --workers 1', verify='verify o/store',
    deidentify='deidentify h --key key --out o/deid --workers 1',
    linked='deidentify h --key key --link o/link.csv --burned-in keep --out o/deid2 --workers 1')


@pytest.fixture(scope='module')
def said(place):
    "What each step said."
    return {name: command(*words.split()) for name, words in STEPS.items()}


@pytest.mark.parametrize('step', STEPS)
def test_no_log_holds_a_name(said, step):
    code, text = said[step]
    assert code==(2 if step=='elsewhere' else 0), text
    assert not spoken(text.encode('utf-8', 'surrogateescape')), text
    if step in ('index', 'preprocess', 'predict', 'explain'): assert re.search(r'  file \d+: ', text), text


def test_nothing_that_is_handed_on_holds_a_name(place, said):
    assert leaks(place/'o', TABLES)=={}
    assert leaks(place/'home')==leaks(place/'tmp')=={}
    for p in (place/'o').rglob('*'):
        if any(p.match(a) for a in OWN): assert p.stat().st_mode & 0o777==0o600, p
