"""A name that is planted in headers, files and folders is looked for, byte by byte, in everything that the
commands say and leave."""
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
import time
import warnings
import zipfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import pace
from PIL import Image

from radiology_ai.core import Radiograph, harmless, write_text
from radiology_ai.names import file_label

HEADER = dict(PatientName='QYNAME^QYGIVEN', OtherPatientIDs='QYOTHERID', InstitutionName='QYINST',
    ReferringPhysicianName='QYREF^DOC', StudyDescription='QYSTUDY knee', SeriesDescription='QYSERIES',
    AccessionNumber='QYACC1', PatientAddress='QYADDRESS', OperatorsName='QYOPER', StationName='QYSTATION',
    RequestedProcedureDescription='QYPROC', PatientBirthDate='19321107', ProtocolName='QYPROTOCOL')
WORDS = sorted({w.lower() for v in HEADER.values() for w in re.split(r'[\^ ]', v)
    if w.startswith('QY')}) + ['19321107',
    'sim0000', 'sima0000', 'simb0000', '9.8.7.6', 'qyfolder', 'qyfile', 'qyodd_', 'qyred', 'qyline', 'qyturn',
    'qylong', 'qymaths',
    'qypicture',
    'qyidsim']
ODD_NAMES = [b'QYF\xfcLE.dcm', b'QYRED\x1b[31m.dcm', b'QYLINE\nline.dcm', 'QYTURN\u202e.dcm'.encode(),
    b'QYLONG' + b'g'*245 + b'.dcm', b'QYMATHS$\\frac{1$.dcm']
# the tables with identifiers: for the owner's eyes
TABLES = ('index.parquet', 'errors.parquet', 'shards/*', 'manifest.csv', 'split.csv', 'predictions.csv',
    'scores.csv',
    'heat.csv', 'p.csv', 'p.json', 'onnx.csv', 'poses.csv', 'link.csv', '*unreadable.csv', 'images.csv', 'other.csv')
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
    labels = knees[['image_id']].assign(patient_id='QYID' + knees.patient_id,
        schatzker=np.arange(len(knees))%2*3)
    labels.to_csv(root/'labels.csv', index=False)
    old = os.getcwd()
    homes = patch.dict(os.environ, HOME=str(root/'home'), TMPDIR=str(root/'tmp'))
    with homes, patch.object(tempfile, 'tempdir', None):
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
        with (contextlib.suppress(Exception), pydicom.config.disable_value_validation(),
                warnings.catch_warnings()):
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
    (target/'Qypictures').mkdir()
    for k in range(2): Image.fromarray(grey).save(target/f'Qypictures/QYPICTURE_{k}.png')


def name_films(folder: Path) -> list:
    """Plants the words in the headers of simulated films, behind what stands there, and in the names of their files and
    folders; the files."""
    for p in sorted(p for p in folder.rglob('IM*') if p.is_file()):
        with (contextlib.suppress(Exception), pydicom.config.disable_value_validation(),
                warnings.catch_warnings()):
            warnings.simplefilter('ignore')
            ds = pydicom.dcmread(p)
            for k, v in HEADER.items(): setattr(ds, k, f'{ds.get(k) or ""} {v}'.strip() if 'Desc' in k else v)
            ds.save_as(p)
        p.rename(p.with_name(f'Qyfile_{p.name}'))
    for p in sorted(folder.rglob('SIM*')): p.rename(p.with_name(f'Qyfolder_{p.name}'))
    return sorted(folder.rglob('Qyfile_*'))


ALIGNER = Path(__file__).parent/'data/bundles/alignment_resnet'
STEPS = dict(index='index h --out o/index.parquet', again='index h --out o/index.parquet --debug',
    explore='explore h --pixels --out o/explore.html --workers 1',
    preprocess='preprocess h --recipe knee --size 64 --workers 1 --out o/store',
    train='train knee --data o/store --labels labels.csv --label schatzker --arch resnet10t --epochs 1 --bs 8 '
    '--out o/run --no-pretrained',
    evaluate='evaluate o/run --out o/report',
    elsewhere='evaluate o/run --data o/store --labels labels.csv --out o/there',
    predict='predict o/run h --out o/p.csv --to csv --to json --to png --workers 1',
    explain='explain o/run h --out o/heat --workers 1',
    export='export o/run --out o/model.onnx --films h --workers 1', packed='predict o/model.onnx h --out o/onnx.csv --workers 1',
    align=f'align h --model {ALIGNER} --out o/aligned --size 64 --workers 1', verify='verify o/store',
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
    for name in ('model.onnx', 'onnx.csv', 'aligned/poses.csv', 'aligned/gallery.html'): assert (place/'o'/name).exists()
    assert leaks(place/'o', TABLES)=={}
    assert leaks(place/'home')==leaks(place/'tmp')=={}
    for p in (place/'o').rglob('*'):
        if any(p.match(a) for a in OWN): assert p.stat().st_mode & 0o777==0o600, p


def test_the_tables_tell_who_it_was(place, said):
    for name in ('o/index.unreadable.csv', 'o/store/unreadable.csv', 'o/run/unreadable.csv',
            'o/p.unreadable.csv',
            'o/heat/unreadable.csv'):
        table = pd.read_csv(place/name)
        assert list(table)==['number', 'path', 'cause'] and table.path.str.contains('Qyodd_folder').any()
        assert table.path.is_unique and (table.cause.str.len()>3).all()
    by_number = pd.read_csv(place/'o/index.unreadable.csv').set_index('number').path
    assert (by_number==pd.read_parquet(place/'o/index.parquet').path[by_number.index-1].to_numpy()).all()
    predicted = pd.read_csv(place/'o/p.csv', keep_default_na=False)
    for p in (place/'o/p').glob('*.png'): assert predicted.error[int(p.stem)-1]==''
    heat = pd.read_csv(place/'o/heat/heat.csv', keep_default_na=False)
    drawn = heat[heat.picture!='']
    assert len(drawn) and all(int(p[:4])==k+1 for k, p in drawn.picture.items())
    shown = set(map(int, re.findall(r'image (\d+)', (place/'o/report/report.html').read_text())))
    rows = pd.read_csv(place/'o/run/predictions.csv')
    assert shown and all(rows.split[k-1]=='test' for k in shown)


# What fails

FAILS = dict(file='predict o/run h/Qyodd_folder/QYPICTURE_0.gif --out o/x.csv',
    unreadable='predict o/run {film} --out o/x.csv', missing='explain o/run h/Qyfolder_nowhere --out o/x',
    empty='index h/Qyempty_folder --out o/x.parquet',
    no_store='train knee --data h/Qyodd_folder --labels labels.csv '
    '--label schatzker --out o/x',
    label='train knee --data o/store --labels labels.csv --label patient_id --out o/x',
    leak='evaluate o/run --data o/store --labels labels.csv --out o/x', target='deidentify h --out o/deid',
    changed='preprocess h/Qyodd_folder --recipe knee --size 64 --workers 1 --out o/store',
    none='preprocess h/Qyodd_folder --recipe knee --size 64 --workers 1 --out o/x',
    join='train knee --data o/store --labels other.csv --label schatzker --out o/x',
    twice='train knee --data o/store --labels twice.csv --label schatzker --out o/x',
    fault='index h --out o/x.parquet')


@pytest.mark.parametrize('debug', [False, True])
@pytest.mark.parametrize('name', FAILS)
def test_no_error_holds_a_name(place, said, name, debug):
    (place/'h/Qyempty_folder').mkdir(exist_ok=True)
    labels = pd.read_csv(place/'labels.csv')
    labels.assign(image_id='QYFILE_' + labels.index.astype(str)).to_csv(place/'other.csv', index=False)
    other = labels.assign(schatzker=(labels.schatzker+1)%7)
    pd.concat([labels, other]).to_csv(place/'twice.csv', index=False)
    words = FAILS[name].format(film=place/'h/Qyodd_folder/QYMATHS$\\frac{1$.dcm').split()
    def gone(folder, **more): os.listdir(folder/('QYFI' + 'LE_gone'))
    broken = patch('radiology_ai.dicom.index.index_dicoms', gone)
    with broken if name=='fault' else contextlib.nullcontext():
        code, text = command(*words, *['--debug']*debug)
    assert code==(1 if debug else 2) and ('Traceback' in text)==debug, text
    assert not spoken(text.encode('utf-8', 'surrogateescape')), text
    if name=='unreadable' and not debug: assert 'file 1: ' in text


def test_warnings_and_logging_of_a_python_session_hold_no_name(place):
    from radiology_ai.dicom.read import read_radiograph
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        read_radiograph(place/'h/Qypictures/QYPICTURE_0.png')
    assert 'a file: a colour picture' in str(told[0].message)
    assert file_label('QYFILE.dcm')=='a file'


def test_logging_in_a_command_holds_no_name(place):
    def summary(df):
        logging.getLogger('somebody').warning('odd: %s and %s', df.path.iloc[-1], df.PatientID.max())
        return pd.DataFrame()
    with patch('radiology_ai.dicom.explore.summarise', summary), patch.object(logging.root, 'handlers', []):
        _, text = command('index', 'h', '--out', 'o/log.parquet')
    assert re.search(r'odd: file \d+ and #\d+', text), text


def test_folders_that_are_called_as_this_library_speaks():
    "Their names are taken out, but not from its own sentences; and a word of a megabyte costs nothing."
    from radiology_ai.names import Speech
    speech = Speech(words=('index',))
    speech.roots += ['/h/empty', '/h/dicom', '/h/results']
    speech.ids.append(pd.Series(['x'*60_000]))
    for said, wanted in (('a file: the file is empty', 'a file: the file is empty'),
            ('There is no folder empty', 'There is no folder (path 1)'), ('empty/a.dcm', '(path 1)/a.dcm'),
            ("Run: pip install 'radiology_ai[results]'", "Run: pip install 'radiology_ai[results]'"),
            ('results: ' + 'x'*60_000, '(path 3): #1')):
        assert speech.without_names(said)==wanted
    start = time.process_time()
    for long in ('y'*10**6, 'y-'*50_000, 'y/'*50_000): assert speech.without_names(long)==long
    assert time.process_time() - start<5*pace()


# Where names are said

@pytest.mark.parametrize('how', ['terminal', 'names'])
def test_names_are_said_where_they_are_asked_for_and_do_no_harm(place, said, how):
    words = ['index', 'h/Qyodd_folder', '--out', 'o/shown.parquet'] + ['--names']*(how=='names')
    _, text = command(*words, stream=Terminal if how=='terminal' else io.StringIO)
    for name in ('QYF\\udcfcLE.dcm', 'QYRED\\x1b[31m.dcm', 'QYLINE\\nline.dcm', 'QYTURN\\u202e.dcm',
            'QYMATHS$\\frac{1$.dcm'):
        assert f'  {name}: ' in text, text
    assert all(line.isprintable() for line in text.splitlines())
    _, text = command('index', 'h', '--out', 'o/shown.parquet', *words[4:],
        stream=Terminal if how=='terminal' else io.StringIO)
    assert '  Qyodd_folder/' in text or '  Qyfolder_' in text # relative to the folder that was given
    code, text = command('predict', 'o/run', place/'h/Qyodd_folder/QYRED\x1b[31m.dcm', '--out', 'o/x.csv',
        *words[4:],
        stream=Terminal if how=='terminal' else io.StringIO)
    assert code==2 and 'radiology_ai: QYRED\\x1b[31m.dcm: ' in text and text.count('\n')==1


def test_names_that_are_asked_for_stand_in_what_is_handed_on(place, said):
    command('evaluate', '--names', 'o/run', '--out', 'o/named')
    page = (place/'o/named/report.html').read_text()
    assert 'QYMATHS$' in page and 'QYRED\\x1b[31m.dcm' in page and re.search(r'image \d+: [\d.]+', page)
    command('explain', 'o/run', 'h', '--out', 'o/named_heat', '--names', '--workers', 1)
    assert any('Qyfile' in p.name for p in (place/'o/named_heat').glob('*.png'))


# Text on axes

def test_text_on_axes_is_no_mathematics(tmp_path):
    import matplotlib.pyplot as plt
    ax = Radiograph(np.zeros((8, 8), np.float32)).show(title='$\\frac{1$ \x1b[31m')
    write_text(ax.set_yticks, range(2), ['$\\frac{1$', '$x'])
    ax.figure.savefig(tmp_path/'a.png')
    assert ax.get_title()=='$\\frac{1$ \\x1b[31m'
    plt.close(ax.figure)


WRITERS = {'set_title', 'set_xlabel', 'set_ylabel', 'text', 'annotate', 'suptitle', 'set_xticklabels',
    'set_yticklabels',
    'figtext'}


def test_nobody_writes_onto_axes_but_by_write_text():
    package = Path(__file__).parent.parent/'radiology_ai'
    drawing = [p for p in package.rglob('*.py') if any(f'.{w}(' in p.read_text() for w in WRITERS)]
    calls = [f'{p.name}:{n.lineno}' for p in drawing for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in WRITERS]
    assert calls==[]


@pytest.mark.parametrize('text, wanted', [('a\x1b[2Jb', 'a\\x1b[2Jb'), ('\u202egpj', '\\u202egpj'),
    ('a\r\nb', 'a\\r\\nb'),
    ('\udcfc', '\\udcfc'), ('é 心 $', 'é 心 $'), ('\u2028\x9b', '\\u2028\\x9b'), (7, '7')])
def test_harmless(text, wanted): assert harmless(text)==wanted
