"""Tables come back as they were written: texts of headers and file names, missing values, numbers; and nobody else reads
them."""
import io
import os
import stat
import threading
import time

import numpy as np
import pandas as pd
import pytest

from radiology_ai.core import DataError, atomic_path
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

BREAKS = ['\r', '\n', '\r\n', '\x0b', '\x0c', '\x1c', '\x85', '\u2028', '\u2029']
HARD = [*BREAKS, '\0', '\t', ' ', '\xa0', '\ufeff', '\ufffe', '\udce9', '\ud83d', '"', "'", "''", ',', ';', '=', '+', '-', '@',
    '＝', '\\', '\\u0041', '_x000D_', '=1+1', '-1', '+5', '1e5', '007', '1', '.5', '-inf', 'nan', 'NA', 'None', 'True', 'É',
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
    df = pd.DataFrame({'score': gen.random(500), 'small': gen.normal(0, 1e-300, 500), 'n': gen.integers(-9, 9, 500),
        'true': gen.random(500)>.5, 'missing': np.where(gen.random(500)>.5, np.nan, 1.), 'none': np.nan,
        'single': gen.random(500).astype('float32').astype(float)})
    pd.testing.assert_frame_equal(parse_table(table_text(df)), df)
    mixed = pd.DataFrame({'a': column([1, '1']), 'b': column([np.int64(1), None]), 'c': column([True, np.bool_(False)])})
    back = parse_table(table_text(mixed))
    assert back.a.tolist()==['1', '1'] and back.b.tolist()[0]==1 and back.c.tolist()==[True, False]


def test_an_ordinary_table_has_the_bytes_that_pandas_writes():
    gen = np.random.default_rng(1)
    df = pd.DataFrame({'image_id': [f'1.2.840.{i}' for i in range(50)], 'patient_id': [f'{i:04d}' for i in range(50)],
        'view': ['AP', 'a, b', 'say "x"', None, 'é']*10, 'score': gen.random(50), 'small': gen.random(50).astype('float32'),
        'n': range(50), 'call': gen.random(50)>.5, 'x': np.where(gen.random(50)>.5, np.nan, gen.random(50)*1e9),
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


@pytest.mark.parametrize('text', ['', 'a,b\n1\n', 'a,b\n1,2,3\n', 'a\n1,2\n', 'a,b\n"1,2\n3,4\n', 'a,b\n"1"x,2\n', 'a,b\n1,2\n\n3,4\n'])
def test_torn_tables_are_refused(text, tmp_path):
    (tmp_path/'t.csv').write_text(text)
    if text:
        with pytest.raises(DataError, match='t.csv is no table'): load_table(tmp_path/'t.csv')
    else: assert load_table(tmp_path/'t.csv').shape==(0, 0)


def test_quotation_marks_cost_no_time():
    for text in ('"'*200_001, 'a,b\n' + '"x'*100_000, 'a\n' + '""'*100_000 + 'x'):
        start = time.perf_counter()
        with pytest.raises(DataError): parse_table(text)
        assert time.perf_counter()-start<1


def test_large_tables_are_fast():
    n = 20_000
    df = pd.DataFrame({'image_id': [f'1.2.3.{i}' for i in range(n)], 'path': [f'a/b/{i}.dcm' for i in range(n)],
        **{f'p{k}': np.random.default_rng(k).random(n) for k in range(5)}})
    start = time.perf_counter()
    pd.testing.assert_frame_equal(parse_table(table_text(df)), df)
    assert time.perf_counter()-start<3


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
