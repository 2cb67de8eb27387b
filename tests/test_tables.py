"""Tables come back as they were written: texts of headers and file names, missing values, numbers; and nobody else reads
them."""
import io
import json
import os
import stat
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import openpyxl
import pandas as pd
import pydicom
import pytest

from radiology_ai.core import DataError, atomic_path
from radiology_ai.data.annotate import Question, read_templates, write_templates
from radiology_ai.data.cells import read_cells, read_labels
from radiology_ai.data.split import load_split, save_split
from radiology_ai.dicom.deidentify import deidentify
from radiology_ai.dicom.index import index_dicoms, write_index
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.serve.predict import predict
from radiology_ai.tables import (
    escape_text,
    foreign_table,
    load_table,
    parse_table,
    save_table,
    table_digest,
    table_text,
    unescape_text,
)
from radiology_ai.tasks.registry import evaluate, train
from radiology_ai.tasks.run import read_exactly

BREAKS = ['\r', '\n', '\r\n', '\x0b', '\x0c', '\x1c', '\x85', '\u2028', '\u2029']
HARD = [*BREAKS, '\0', '\t', ' ', '\xa0', '\ufeff', '\ufffe', '\udce9', '\ud83d', '"', "'", "''", ',', ';',
    '=', '+', '-', '@',
    '＝', '\\', '\\u0041', '_x000D_', '=1+1', '-1', '+5', '1e5', '007', '1', '.5', '-inf', 'nan', 'NA', 'None',
    'True', 'É',
    '\U0001f9b4', '#', 'a', '<b>', '\x1b[31m', '']


def texts(seed: int, n: int) -> list[str]:
    "Texts of up to four pieces that are hard for a table."
    gen = np.random.default_rng(seed)
    return [''.join(gen.choice(HARD, gen.integers(0, 5)).tolist()) for _ in range(n)]


def column(values: list) -> pd.Series: return pd.Series(values, dtype=object)


def kept(found: pd.Series, values: list) -> bool:
    "Are these the values, each of the same type, and the missing ones missing?"
    return [None if v is None or v is not v or pd.isna(v) else (type(v), v) for v in found.tolist()] == [
        None if v is None else (type(v), v) for v in values]


def test_escapes_come_off():
    for text in {*HARD, *texts(0, 20_000)}:
        for excel in (False, True):
            cell = escape_text(text, excel)
            assert unescape_text(cell, excel)==text
            assert unescape_text(escape_text(cell, excel), excel)==cell


def test_no_cell_is_a_formula():
    for text in {*HARD, *texts(1, 20_000)}:
        cell = escape_text(text)
        cell.encode('utf-8')
        assert '\0' not in cell
        start = cell.lstrip()
        assert cell[:1] not in '\t\r\n' or not cell
        if start[:1] in tuple('=+-@＝'): float(cell)


@pytest.mark.parametrize('seed', range(40))
def test_any_table_comes_back(seed, tmp_path):
    gen = np.random.default_rng(seed)
    rows, width = int(gen.integers(0, 30)), int(gen.integers(1, 6))
    data = []
    for k in range(width):
        values = texts(1000*seed + k, rows)
        if gen.random()<.3: values = [f'{int(gen.integers(1000)):03d}' for _ in values]
        if gen.random()<.5: values = [None if gen.random()<.3 else v for v in values]
        data.append(values)
    df = pd.DataFrame({i: column(v) for i, v in enumerate(data)})
    names = list(dict.fromkeys([*texts(seed, 20), *map(str, range(9))]))[:width]
    df.columns = pd.Index(names, dtype=object)
    save_table(df, tmp_path/'t.csv', head='# one line' if seed%2 else '')
    raw = (tmp_path/'t.csv').read_bytes().decode('utf-8')
    if seed%2: raw = raw.partition('\n')[2]
    for numbers in (True, False):
        back = parse_table(raw, numbers)
        assert list(back.columns)==names and len(back)==rows
        for i, values in enumerate(data): assert kept(back.iloc[:, i], values), (names[i], values)
    # what any other program reads has the same rows and columns
    plain = pd.read_csv(io.StringIO(raw, newline=''), dtype=str, keep_default_na=False, header=None)
    assert plain.shape==(rows+1, width)


def test_numbers_come_back_to_the_last_bit():
    gen = np.random.default_rng(0)
    df = pd.DataFrame({'score': gen.random(500), 'small': gen.normal(0, 1e-300, 500),
        'n': gen.integers(-9, 9, 500),
        'true': gen.random(500)>.5, 'missing': np.where(gen.random(500)>.5, np.nan, 1.), 'none': np.nan,
        'single': gen.random(500).astype('float32').astype(float)})
    pd.testing.assert_frame_equal(parse_table(table_text(df)), df)
    mixed = pd.DataFrame({'a': column([1, '1']), 'b': column([np.int64(1), None]),
        'c': column([True, np.bool_(False)])})
    back = parse_table(table_text(mixed))
    assert back.a.tolist()==['1', '1'] and back.b.tolist()[0]==1 and back.c.tolist()==[True, False]


def test_an_ordinary_table_has_the_bytes_that_pandas_writes():
    gen = np.random.default_rng(1)
    df = pd.DataFrame({'image_id': [f'1.2.840.{i}' for i in range(50)],
        'patient_id': [f'{i:04d}' for i in range(50)],
        'view': ['AP', 'a, b', 'say "x"', None, 'é']*10, 'score': gen.random(50),
        'small': gen.random(50).astype('float32'),
        'n': range(50), 'call': gen.random(50)>.5,
        'x': np.where(gen.random(50)>.5, np.nan, gen.random(50)*1e9),
        'kind': pd.Categorical(['left', 'right']*25), 'whole': pd.array([1, None]*25, dtype='Int64'),
        'day': pd.to_datetime(['2020-01-01', '2021-02-03']*25), 'any': column([1, 2.5, True, None, 'x']*10)})
    for how in ({}, {'float_format': '%.6f'}):
        assert table_text(df, **how)==df.to_csv(index=False, lineterminator='\n', **how)
    one = pd.DataFrame({'x': [1.5, np.nan]})
    assert table_text(one)==one.to_csv(index=False)
    assert table_text(pd.DataFrame())=='\n' and parse_table('\n').shape==(0, 0)


def test_a_file_saved_again_is_read():
    df = pd.DataFrame({'image_id': ['a', 'b'], 'score': [.5, np.nan], 'note': ['=1', 'x\ny']})
    windows = '\ufeff' + table_text(df).replace('\n', '\r\n').replace('x\r\ny', 'x\ny')
    pd.testing.assert_frame_equal(parse_table(windows), df)
    # as version 0.2 wrote it: a carriage return stands unquoted
    assert parse_table('a,b\nP1\rX,\n\rY,2\n').a.tolist()==['P1\rX', '\rY']


@pytest.mark.parametrize('text', ['', 'a,b\n1\n', 'a,b\n1,2,3\n', 'a\n1,2\n', 'a,b\n"1,2\n3,4\n',
    'a,b\n"1"x,2\n', 'a,b\n1,2\n\n3,4\n'])
def test_torn_tables_are_refused(text, tmp_path):
    (tmp_path/'t.csv').write_text(text)
    if text:
        with pytest.raises(DataError, match='t.csv is no table'): load_table(tmp_path/'t.csv')
    else: assert load_table(tmp_path/'t.csv').shape==(0, 0)


def test_quotation_marks_cost_no_time():
    for text in ('"'*200_001, 'a,b\n' + '"x'*100_000, 'a\n' + '""'*100_000 + 'x'):
        start = time.process_time()
        with pytest.raises(DataError): parse_table(text)
        assert time.process_time()-start<1


def test_large_tables_are_fast():
    n = 20_000
    df = pd.DataFrame({'image_id': [f'1.2.3.{i}' for i in range(n)],
        'path': [f'a/b/{i}.dcm' for i in range(n)],
        **{f'p{k}': np.random.default_rng(k).random(n) for k in range(5)}})
    start = time.process_time()
    pd.testing.assert_frame_equal(parse_table(table_text(df)), df)
    assert time.process_time()-start<3


def test_the_owner_alone_reads_it_from_the_first_byte(tmp_path):
    seen, done = set(), threading.Event()
    def watch():
        while not done.is_set():
            for entry in os.scandir(tmp_path):
                try: seen.add(stat.S_IMODE(entry.stat().st_mode))
                except FileNotFoundError: pass
    watcher = threading.Thread(target=watch)
    watcher.start()
    old = os.umask(0)
    try:
        for k in range(60): save_table(pd.DataFrame({'x': range(500)}), tmp_path/f't{k%3}.csv')
    finally:
        os.umask(old)
        done.set()
        watcher.join()
    assert seen=={0o600}
    (tmp_path/'open.csv').touch(0o644)
    save_table(pd.DataFrame({'x': [1]}), tmp_path/'open.csv')
    assert stat.S_IMODE((tmp_path/'open.csv').stat().st_mode)==0o600
    with atomic_path(tmp_path/'report.html') as tmp: tmp.touch()
    assert stat.S_IMODE((tmp_path/'report.html').stat().st_mode)==0o666 & ~old


def test_a_table_is_whole_or_not_there(tmp_path):
    save_table(pd.DataFrame({'x': [1]}), tmp_path/'t.csv')
    class Broken:
        def __str__(self): raise RuntimeError('no text')
    with pytest.raises(RuntimeError): save_table(pd.DataFrame({'x': [Broken()]}), tmp_path/'t.csv')
    assert load_table(tmp_path/'t.csv').x.tolist()==[1] and len(list(tmp_path.iterdir()))==1


def test_tables_of_others():
    df = pd.DataFrame({"=name": ['=1', "'=2", 'plain', '-1'], 'n': [1, 2, 3, 4]})
    back = foreign_table(table_text(df))
    assert back['=name'].tolist()==df['=name'].tolist() and back.n.tolist()==[1, 2, 3, 4]
    pd.testing.assert_frame_equal(foreign_table(b"a,b\n1,it's\n"), pd.DataFrame({'a': [1], 'b': ["it's"]}))


def test_a_digest_stays_what_it_was():
    df = pd.DataFrame({'image_id': ['a', 'b'], 'kl': [0, 3], 'note': ['=1', None]})
    assert table_digest(df)==table_digest(df[['note', 'kl', 'image_id']])
    assert table_digest(df).startswith('ddedb85f3446')
    assert len(table_digest(pd.DataFrame({'path': column(['\udce9'])})))==64


BROKEN = ['\r', '\n', '\r\n', '\x0b', '\x1c', '\x85', '\u2028', ',', '"', '\t', '\r"\n,']


@pytest.fixture(scope='module')
def broken_hospital(hospital, tmp_path_factory) -> Path:
    "The readable knees of the small hospital, each with a PatientID that breaks lines or cells."
    folder = tmp_path_factory.mktemp('broken')
    truth = load_table(hospital/'dicom/truth.csv')
    for path in truth.path[(truth.body_part=='KNEE') & truth.broken.isin(['', None])]:
        ds = pydicom.dcmread(hospital/'dicom'/path)
        number = ds.PatientID
        ds.SpecificCharacterSet = 'ISO_IR 192'
        # the number alone is the same for two patients: only what is after the break tells them apart
        ds.PatientID = f'={int(number[-3:])%7}{BROKEN[sum(map(ord, number))%len(BROKEN)]}{number}'
        (folder/path).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ds.save_as(folder/path)
    return folder


@pytest.mark.slow
def test_patients_with_line_breaks_stay_whole_and_apart(broken_hospital, hospital, tmp_path):
    store = preprocess_folder(broken_hospital, tmp_path/'store', replace(recipe('knee'), size=64), workers=1)
    patients = dict(zip(store.index.image_id, store.index.patient_id))
    assert len(store)>40 and any('\u2028' in p for p in patients.values()) and any('\r' in p
        for p in patients.values())
    seen = {}
    def keep(df, path, **how):
        seen[Path(path).name] = df.copy()
        save_table(df, path, **how)
    with patch('radiology_ai.tasks.fit.save_table', keep), patch('radiology_ai.data.split.save_table', keep):
        run = train('knee', store, hospital/'labels.csv', tmp_path/'run', arch='resnet10t', epochs=1, bs=16,
            pretrained=False)
    for name in ('manifest.csv', 'predictions.csv'):
        back, before = read_exactly(run/name), seen[name]
        assert len(back)==len(before)
        for c in ('image_id', 'patient_id', 'split'): assert back[c].tolist()==before[c].tolist()
        assert back.patient_id.tolist()==[patients[i] for i in back.image_id]
        assert len(pd.read_csv(run/name))==len(before)
    assert run.manifest.groupby('patient_id').split.nunique().max()==1
    split = load_split(run/'split.csv', run.manifest)
    assert split.split.tolist()==run.manifest.split.tolist()
    assert set(evaluate(run).table.patient_id)==set(run.manifest.patient_id[run.manifest.split=='test'])
    found = predict(run, broken_hospital, out=tmp_path/'p.csv', to=('csv', 'json'), workers=1)
    back = load_table(tmp_path/'p.csv')
    assert dict(zip(back.image_id, back.patient_id))==patients and back.path.tolist()==found.path.tolist()
    told = json.loads((tmp_path/'p.json').read_text())['readings']
    assert {r['image_id']: r['patient_id'] for r in told}==patients
    # its own manifest as the labels of another run
    again = read_labels(run/'manifest.csv')
    assert again.patient_id.tolist()==run.manifest.patient_id.tolist()


@pytest.mark.slow
def test_tables_with_identifiers_are_for_the_owner_alone(broken_hospital, tmp_path):
    old = os.umask(0)
    try:
        write_index(index_dicoms(broken_hospital, workers=1), tmp_path/'index.parquet')
        preprocess_folder(broken_hospital, tmp_path/'store', replace(recipe('knee'), size=64), workers=1)
        deidentify(broken_hospital, tmp_path/'shared', link=tmp_path/'link.csv', workers=1, burned_in='keep')
    finally: os.umask(old)
    mode = lambda p: stat.S_IMODE(p.stat().st_mode)
    names = {p.name for p in tmp_path.rglob('*') if p.is_file() and mode(p)==0o600}
    assert {'index.parquet', 'errors.parquet', 'account.csv', 'actions.jsonl', 'link.csv',
        '00000.parquet'} <= names
    tables = [p for p in tmp_path.rglob('*') if p.suffix in ('.parquet', '.csv', '.jsonl')]
    assert [p for p in tables if mode(p)!=0o600]==[]
    assert all(mode(p)==0o666 for p in (tmp_path/'store').rglob('*.npy'))
    links = load_table(tmp_path/'link.csv')
    assert len(links)==len(load_table(tmp_path/'shared'/'account.csv')) and links.iloc[:,
        1:].notna().all().all()


# Templates

def hard_texts(seed, n):
    "Different texts that are not blank, and that pandas can group by: without halves of surrogate pairs."
    return list(dict.fromkeys(t for t in texts(seed, 4*n) if t.strip()
        and t.encode('utf-8', 'ignore').decode()==t))[:n]


SEEN = Question('=seen', ('yes', '=no', 'a\x1bb', '007', 'NA'), 'What is \x00 seen')


def filled_in(path) -> list:
    "Answer each row of a template in turn, as a program of tables does; the texts that it shows as `note`."
    if path.suffix=='.csv':
        table = parse_table(path.read_bytes().decode('utf-8-sig'), numbers=False)
        table['=seen'] = [SEEN.answers[i%5] for i in range(len(table))]
        save_table(table, path, encoding='utf-8-sig')
        return table.note.fillna('').tolist()
    book = openpyxl.load_workbook(path)
    sheet, answers = book['read'], [c.value for c in book['answers']['A'][1:]]
    assert not [c for row in sheet for c in row if c.data_type=='f'] and len(answers)==5
    for i, row in enumerate(sheet.iter_rows(min_row=2)):
        row[3].value = answers[i%5]
        row[3].data_type = 's'
    book.save(path)
    return [unescape_text(row[2] or '', excel=True) for row in sheet.iter_rows(min_row=2, values_only=True)]


@pytest.mark.parametrize('kind', ['xlsx', 'csv'])
def test_templates_come_back(kind, tmp_path):
    images = hard_texts(5, 120)
    plan = pd.DataFrame({'image_id': column(images), 'reader': column(['=Ada', '007', 'NA']*40),
        'note': column(texts(6, 120))})
    files = write_templates(plan, [SEEN], tmp_path, kind)
    assert {stat.S_IMODE(p.stat().st_mode) for p in files}=={0o600}
    notes = [n for p in files for n in filled_in(p)]
    assert sorted(notes)==sorted(plan.note)
    for given in (plan, None):
        votes = read_templates(files, [SEEN], given)
        assert sorted(zip(votes.image_id, votes.reader))==sorted(zip(images, plan.reader))
        assert set(votes.value)==set(SEEN.answers)


def test_a_cell_too_long_for_excel_is_refused(tmp_path):
    plan = pd.DataFrame({'image_id': ['a'*40_000], 'reader': ['Ada']})
    with pytest.raises(DataError, match='40000 characters'): write_templates(plan, [SEEN], tmp_path)
    assert len(list(tmp_path.iterdir()))==0
    write_templates(plan, [SEEN], tmp_path, 'csv')


# Labels of others, and ours as labels

def test_a_quoted_line_break_splits_no_row_of_labels(tmp_path):
    for sep in ',;\t':
        text = sep.join(['image_id', '"a\r\u2028name"', 'fx']) + '\n'
        text += ''.join(f'i{k}{sep}"x{brk}y"{sep}{k%2}\n' for k, brk in enumerate(BREAKS))
        (tmp_path/'l.csv').write_bytes(text.encode())
        table = read_labels(tmp_path/'l.csv', 'fx')
        assert table.image_id.tolist()==[f'i{k}'
            for k in range(len(BREAKS))] and table.fx.sum()==len(BREAKS)//2
        assert table.iloc[:, 1].tolist()==[f'x{brk}y' for brk in BREAKS] and table.columns[1]=='a\r\u2028name'


def test_our_tables_are_labels(tmp_path):
    ids = ['=1', "'=2", '007', 'a\rb', 'c"d', 'scan\udce9.dcm', 'NUL\0', '-1']
    save_table(pd.DataFrame({'image_id': column(ids), '=fx': [0, 1]*4}), tmp_path/'l.csv')
    table = read_labels(tmp_path/'l.csv', '=fx')
    assert table.image_id.tolist()==ids and table['=fx'].tolist()==[0., 1.]*4
    assert read_cells(tmp_path/'l.csv', exact=True).image_id.tolist()==ids


def test_a_split_comes_back(tmp_path):
    patients = [f'P{brk}{k}' for k, brk in enumerate([*BREAKS, '=', '\0', '"', ','])]
    df = pd.DataFrame({'image_id': column([f'=i{p}' for p in patients]), 'patient_id': column(patients),
        'split': column(['train', 'valid', 'test', None]*(len(patients)//4) + ['test']*(len(patients)%4))})
    save_split(df, tmp_path/'split.csv')
    back = load_split(tmp_path/'split.csv', df.drop(columns='split'))
    assert back.split.tolist()==df.split.tolist()
    for old, new in ((b'train', b'test'), (b'"', b'""'), (b'\n=', b'\nx'), (b'P', b'\xff')):
        (tmp_path/'changed.csv').write_bytes((tmp_path/'split.csv').read_bytes().replace(old, new, 2))
        if new in (tmp_path/'changed.csv').read_bytes()[20:]:
            with pytest.raises(DataError): load_split(tmp_path/'changed.csv')
