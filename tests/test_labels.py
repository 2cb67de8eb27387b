"""Tables as people have them are read right or named: columns, patients, views, files, rows."""
import datetime
import gzip
import sys
import warnings
from types import SimpleNamespace
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import openpyxl
import pandas as pd
import pytest

from radiology_ai.core import DataError
from radiology_ai.data.cells import cell_text, read_cells, read_labels, read_table
from radiology_ai.data.datasets import from_csv
from radiology_ai.data.duplicates import same_images
from radiology_ai.data.labels import (
    MANIFEST,
    contradicting_rows,
    find_images,
    find_problems,
    make_dataset,
    make_manifest,
    missing_rows,
    validate_manifest,
)
from radiology_ai.data.split import assert_no_leakage, official_split, patient_keys, patient_split
from radiology_ai.data.words import is_nobody, label_numbers, match_column, view_name, with_columns
from radiology_ai.tasks.kinds import Classes, Grades, Labels

# Columns

NEIGHBOURS = [('Fx', 'Fx?'), ('HER2+', 'HER2-'), ('Effusion L', 'Effusion-L'), ('T1', 'T1*'),
    ('p<.05', 'p>.05'),
    ('Перелом', 'Выпот'), ('骨折', '肺炎'), ('Größe', 'Grösse ♀'), ('#', '%'), ('Fx', 'fx'), ('a_b', 'ab')]


@pytest.mark.parametrize('one, two', NEIGHBOURS)
def test_columns_that_differ_stay_apart(tmp_path, one, two):
    (tmp_path/'t.csv').write_text(f'image_id,{one},{two}\na,1,0\nb,0,1\n')
    t = read_table(tmp_path/'t.csv', {'x': one, 'y': two}, [], optional=())
    assert t.x.tolist()==['1', '0'] and t.y.tolist()==['0', '1']
    t = read_labels(tmp_path/'t.csv', [one, two])
    assert t[one].tolist()==[1, 0] and t[two].tolist()==[0, 1]


@pytest.mark.parametrize('one, two', NEIGHBOURS)
def test_a_label_that_is_not_there_has_no_values_of_another(tmp_path, one, two):
    (tmp_path/'t.csv').write_text(f'image_id,{one}\na,1\n')
    if match_column([one], two) is None:
        with pytest.raises(DataError, match='there is no column'): read_labels(tmp_path/'t.csv', two)
        with pytest.raises(DataError, match='there is no column'):
            read_table(tmp_path/'t.csv', {'x': two}, [], optional=())
    # nor where both are asked for, and the second would do for want of a better
    with pytest.raises(DataError, match='there is no column'): read_labels(tmp_path/'t.csv', [one, two])
    with pytest.raises(DataError, match='there is no column'):
        read_table(tmp_path/'t.csv', {'x': one, 'y': two}, [], optional=())


@pytest.mark.parametrize('asked', ['Image Index', 'image_index', 'ImageIndex', ' IMAGE  INDEX ',
    'image index'])
def test_a_loose_name_is_found_where_it_is_the_only_one(tmp_path, asked):
    (tmp_path/'t.csv').write_text('Image Index,Fx\na,1\n')
    assert read_table(tmp_path/'t.csv', {'image_id': asked}, []).image_id.tolist()==['a']
    (tmp_path/'t.csv').write_text('Image Index,Image_Index,x\na,b,1\n')
    if asked=='Image Index': assert read_table(tmp_path/'t.csv', {'i': asked}, []).i.tolist()==['a']
    else:
        with pytest.raises(DataError, match="could be each of the columns 'Image Index', 'Image_Index'"):
            read_table(tmp_path/'t.csv', {'i': asked}, [])


def test_an_empty_name_is_no_column():
    for name in ('', ' ', '_', '[]'): assert match_column(['?', '+', '', ' ', 'a'], name) in (None, name)
    assert list(with_columns(pd.DataFrame(columns=['FX', 'b']), ['fx']))==['fx', 'b']
    with pytest.raises(DataError, match="no column 'fract'; did you mean 'Fract.'"):
        with_columns(pd.DataFrame(columns=['Fract.', 'b']), ['fract'])


def test_a_question_mark_may_be_a_part_of_a_name(tmp_path):
    (tmp_path/'o.csv').write_text('id,pat,Fx?,Fx\na,1,1,0\nb,2,0,1\n')
    m = from_csv(tmp_path/'o.csv', dict(image_id='id', patient_id='pat'), ['Fx', 'Fx?']).manifest
    assert m['Fx?'].tolist()==[1, 0] and m.Fx.tolist()==[0, 1]
    (tmp_path/'o.csv').write_text('id,pat,Fx\na,1,0\n')
    assert read_table(tmp_path/'o.csv', {'fx': 'Fx?', 'sex': 'Sex?'}, []).fx.tolist()==['0'] # may be missing
    assert list(read_table(tmp_path/'o.csv', {'fx': 'Fx', 'sex': 'Sex'}, [], optional=('sex',)))==['fx']
    with pytest.raises(DataError, match=r"no column 'Fx\?'; did you mean 'Fx'"):
        read_table(tmp_path/'o.csv', {'fx': 'Fx?'}, [], optional=())


def test_two_columns_of_one_name_are_named(tmp_path):
    (tmp_path/'t.csv').write_text('image_id,fx,fx \na,1,0\nb,0,0\n')
    with pytest.raises(DataError, match="two columns 'fx'"): read_labels(tmp_path/'t.csv')
    with pytest.raises(DataError, match="two columns 'fx'"): read_cells(tmp_path/'t.csv', exact=True)
    with pytest.raises(DataError, match="t.csv: There are 2 columns 'fx'"):
        read_table(tmp_path/'t.csv', {'y': 'fx'}, [])
    assert read_table(tmp_path/'t.csv', {'i': 'image_id'}, []).i.tolist()==['a', 'b']
    (tmp_path/'t.csv').write_text('image_id,fx,fx\na,1,1\nb,0,0\n') # doubled, and equal
    assert read_labels(tmp_path/'t.csv', 'fx').fx.tolist()==[1, 0]
    book = openpyxl.Workbook()
    for row in [['image_id', 'fx', 'fx'], ['a', 1, 0]]: book.active.append(row)
    book.save(tmp_path/'t.xlsx')
    with pytest.raises(DataError, match="two columns 'fx'"): read_labels(tmp_path/'t.xlsx')


def test_a_split_finds_its_columns():
    df = pd.DataFrame({'image_id': [f'i{k}' for k in range(40)],
        'Patient ID': [f'P{k//2}' for k in range(40)],
        'Fractured': [0., 1.]*20})
    assert patient_keys(df).tolist()==df['Patient ID'].tolist()
    with pytest.raises(DataError, match="no column 'patient_id'; did you mean"):
        patient_keys(df.rename(columns={'Patient ID': 'Patients'}))
    df = df.rename(columns={'Patient ID': 'patient_id'})
    assert patient_split(df, label='fractured').split.tolist()==patient_split(df,
        label='Fractured').split.tolist()


# Labels

def test_words_for_one_and_zero(tmp_path):
    words = {'1': 1, '0': 0, '0,0': 0, '1,0': 1, 'yes': 1, 'No': 0, 'TRUE': 1, 'false': 0, 'Positive': 1,
        'negative': 0, '': -1}
    (tmp_path/'t.csv').write_text('image_id;fx\n' + ''.join(f'i{k};{w}\n' for k, w in enumerate(words)))
    assert read_labels(tmp_path/'t.csv', 'fx').fx.fillna(-1).tolist()==list(words.values())
    assert label_numbers(pd.Series([True, False, None], dtype=object)).fillna(-1).tolist()==[1, 0, -1]
    (tmp_path/'t.csv').write_text('image_id;fx\na;1\nb;perhaps\n')
    with pytest.raises(DataError,
            match="'fx' of t.csv holds 1 values that are no numbers .line 3: 'perhaps'"):
        read_labels(tmp_path/'t.csv', 'fx')


# Files

ROWS = [['Image Index', 'Age, years', 'fx'], ['a.png', '50', '1'], ['b|c.png', '60', '0']]


@pytest.mark.parametrize('sep', [',', ';', '\t', '|'])
@pytest.mark.parametrize('tail', ['', 2])
@pytest.mark.parametrize('first', ['', '\ufeff', '\n', 'sep={}\n'])
def test_csv_of_every_kind(tmp_path, sep, tail, first):
    quoted = [[f'"{c}"' if {*c} & {*',;\t|'} else c for c in r] for r in ROWS]
    text = first.format(sep) + '\r\n'.join(sep.join(r) + sep*(tail or 0) for r in quoted) + '\r\n'
    (tmp_path/'t.csv').write_text(text, encoding='utf-8', newline='')
    where = {'image_id': 'image_index', 'age': 'Age, years', 'fx': 'fx'}
    t = read_table(tmp_path/'t.csv', where, [])
    assert t.values.tolist()==ROWS[1:] and t.index.tolist()==[k + (first[-1:]=='\n') for k in (0, 1)]
    assert list(read_labels(tmp_path/'t.csv'))==ROWS[0]


def test_separators_behind_the_rows_alone(tmp_path):
    (tmp_path/'t.csv').write_text('image_id;fx\na;1;;;\n\nb;0;;;\n')
    t = read_table(tmp_path/'t.csv', {'i': 'image_id', 'fx': 'fx'}, [])
    assert t.values.tolist()==[['a', '1'], ['b', '0']] and t.index.tolist()==[0, 2]
    (tmp_path/'t.csv').write_text('image_id;fx\na;1;;;\nb;0;;x;\n')
    with pytest.raises(DataError, match='line 3: 5 cells, the header has 2'): read_labels(tmp_path/'t.csv')


def test_bars_in_cells_and_in_a_header_do_not_separate(tmp_path):
    (tmp_path/'t.csv').write_text('image_id,"Fx (yes|no|unsure)",Finding Labels\na,yes,Mass|Nodule|Edema\nb,no,Mass\n')
    assert list(read_labels(tmp_path/'t.csv'))==['image_id', 'Fx (yes|no|unsure)', 'Finding Labels']
    (tmp_path/'t.csv').write_text('image_id,Fx (yes|no|unsure)\na,yes\nb,no\n')
    assert list(read_labels(tmp_path/'t.csv'))==['image_id', 'Fx (yes|no|unsure)']


def test_a_table_alone_in_a_zip_file(tmp_path):
    text = 'image_id,fx\na,1\n'
    with ZipFile(tmp_path/'t.csv.zip', 'w') as z:
        for name in ('t/', 't/t.csv', '__MACOSX/t/._t.csv', 't/._t.csv', 't/.DS_Store'):
            z.writestr(name, text*(name[-1]!='/'))
    assert read_labels(tmp_path/'t.csv.zip', 'fx').values.tolist()==[['a', 1.]]
    assert read_table(tmp_path/'t.csv.zip', {'i': 'image_id'}, []).i.tolist()==['a']
    with ZipFile(tmp_path/'two.zip', 'w') as z:
        for name in ('a.csv', 'b.csv'): z.writestr(name, text)
    with pytest.raises(DataError, match='is a zip file of 2 files.*Unzip it'): read_labels(tmp_path/'two.zip')
    with ZipFile(tmp_path/'bomb.zip', 'w', ZIP_DEFLATED) as z: z.writestr('a.csv', bytes(2**26))
    with pytest.raises(DataError, match='holds more than'): read_labels(tmp_path/'bomb.zip')
    (tmp_path/'cut.zip').write_bytes((tmp_path/'t.csv.zip').read_bytes()[:40])
    with pytest.raises(DataError, match='no zip file that can be read'): read_labels(tmp_path/'cut.zip')
    (tmp_path/'t.csv.gz').write_bytes(gzip.compress(text.encode()))
    assert read_labels(tmp_path/'t.csv.gz', 'fx').fx.tolist()==[1]


def test_companions_of_macos_are_no_tables_and_no_images(tmp_path):
    (tmp_path/'._t.csv').write_bytes(b'\0\5\x16\7')
    with pytest.raises(DataError, match=r'macOS keeps .*Give t\.csv'): read_labels(tmp_path/'._t.csv')
    for name in ('a.png', '._a.png', '._b.png'): (tmp_path/name).touch()
    found = find_images(tmp_path, pd.Series([r'films\a.png', 'b.png', 'b', '._a.png']))
    assert [str(p).rsplit('/', 1)[-1] for p in found]==['a.png', 'nan', 'nan', 'nan']


def workbook(path, rows, merged=(), formats=()):
    book = openpyxl.Workbook()
    for row in rows: book.active.append(row)
    for cells in merged: book.active.merge_cells(cells)
    for cell, shape in dict(formats).items(): book.active[cell].number_format = shape
    book.create_sheet('notes').append(['not this'])
    book.save(path)
    return path


@pytest.mark.parametrize('name', ['t.xlsx', 't.xlsm', 'T.XLSX', 't.csv'])
def test_workbooks(tmp_path, name):
    path = workbook(tmp_path/'t.xlsx', [[], ['Patient ID', 'Image', 'Fx', None], ['P1', 1, 'yes'],
        [None, 2, 'no'], [], ['P2', 3, 1.0],
        [None, 12345678, None]], ['A3:A4', 'A6:A7'], {'B3': '000'}).rename(tmp_path/name)
    t = read_table(path, {'patient_id': 'patient_id', 'image_id': 'image', 'fx': 'fx'}, [])
    assert t.patient_id.tolist()==['P1', 'P1', 'P2', 'P2'] and t.image_id.tolist()==['001', '2', '3',
        '12345678']
    assert t.index.tolist()==[1, 2, 4, 5] # line 3 of the sheet is row 1
    assert read_labels(path, 'fx').fx.fillna(-1).tolist()==[1, 0, 1, -1]
    assert read_cells(path, sheet='notes', exact=True).columns.tolist()==['not this']


def test_merged_cells_count_for_all_that_they_cover(tmp_path):
    path = workbook(tmp_path/'t.xlsx', [['id', 'fx', 'effusion', 'note'], ['a', 1, None, 'x'],
        ['b', None, None, None], ['c', 0, 1, 'y']],
        ['B2:C3', 'D2:D3'])
    assert read_cells(path).values.tolist()==[['a', '1', '1', 'x'], ['b', '1', '1', 'x'],
        ['c', '0', '1', 'y']]
    heading = workbook(tmp_path/'h.xlsx', [['id', 'fx', None], ['a', 1, 2]], ['B1:C1'])
    assert read_cells(heading).columns.tolist()==['id', 'fx', 'Unnamed: 2']


def test_a_cell_says_what_it_shows():
    day = datetime.datetime(2024, 5, 3)
    for value, shape, text in [(day, 'dd.mm.yyyy', '03.05.2024'), (day, 'd/m/yy', '3/5/24'),
            (day, 'mm-dd-yy', '2024-05-03'),
            (day, 'General', '2024-05-03'), (day, 'd-mmm', '3-May'),
            (day, '[$-407]yyyy-mm-dd;@', '2024-05-03'),
            (day.replace(hour=14, minute=7), 'yyyy-mm-dd h:mm', '2024-05-03 14:07'),
            (day.date(), 'General', '2024-05-03'),
            (datetime.time(14, 7), 'h:mm', '14:07:00'), (7, '000', '007'), (7., 'General', '7'),
            (.5, '0%', '0.5'),
            (8.3986e35, 'General', '8.3986e+35'), (True, 'General', 'True'), (None, 'General', ''),
            (np.nan, 'General', '')]:
        assert cell_text(value, shape)==text, (value, shape)


def test_old_and_open_workbooks_are_read_or_named(tmp_path, monkeypatch):
    with ZipFile(tmp_path/'t.ods', 'w') as z:
        z.writestr('mimetype', 'application/vnd.oasis.opendocument.spreadsheet')
        z.writestr('content.xml', '<x/>')
    (tmp_path/'t.xls').write_bytes(b'\xd0\xcf\x11\xe0' + bytes(600))
    monkeypatch.setitem(sys.modules, 'python_calamine', None)
    for name in ('t.ods', 't.xls'):
        with pytest.raises(DataError,
                match=f'{name} is an .{name[2:]} file.*Save it as .xlsx .*pip install python-calamine'):
            read_labels(tmp_path/name)
    page = SimpleNamespace(to_python=lambda skip_empty_area: [['id', 'fx'], ['a', 1.], ['', 0.]],
        merged_cell_ranges=[((1, 0), (2, 0))])
    book = SimpleNamespace(sheet_names=['s'], get_sheet_by_name=lambda name: page)
    reader = SimpleNamespace(CalamineError=type('E', (Exception,), {}),
        CalamineWorkbook=SimpleNamespace(from_filelike=lambda f: book))
    monkeypatch.setitem(sys.modules, 'python_calamine', reader)
    for name in ('t.ods', 't.xls'):
        assert read_table(tmp_path/name, {'i': 'id', 'f': 'fx'}, []).values.tolist()==[['a', '1'], ['a', '0']]
    (tmp_path/'bad.xlsx').write_text('no workbook')
    with pytest.raises(DataError, match='not a readable Excel file'): read_labels(tmp_path/'bad.xlsx')


def test_parquet(tmp_path):
    pd.DataFrame({'Image_ID': [7, 8], 'patient_id': [1., np.nan],
        'Fx': [True, False]}).to_parquet(tmp_path/'t.parquet')
    t = read_table(tmp_path/'t.parquet', {'image_id': 'image_id', 'patient_id': 'PatientID', 'fx': 'fx'}, [])
    assert t.fillna('').values.tolist()==[['7', '1', 'True'], ['8', '', 'False']]
    t = read_labels(tmp_path/'t.parquet', 'fx')
    assert t.Image_ID.tolist()==['7', '8'] and t.patient_id.tolist()==['1', None] and t.fx.tolist()==[1, 0]


# Patients

NOBODY = ['<NA>', 'unknown', 'Unknown', '-', '--', '8.3986E+35', '8,3986E+35', 8.3986e35, 'n/a', 'N/A',
    'None', 'nan', '?', '', ' ',
    None, np.nan, pd.NA, 'null']


def manifest(**columns):
    n = len(next(iter(columns.values()))) if columns else 3
    return pd.DataFrame({'image_id': [f'i{k}' for k in range(n)], 'path': [f'i{k}.png' for k in range(n)],
        'patient_id': [f'P{k}' for k in range(n)], 'study_id': '', 'split': '', 'view': '',
        'laterality': ''}).assign(**columns)


@pytest.mark.parametrize('nobody', NOBODY, ids=str)
def test_what_is_no_patient_is_named(nobody):
    df = manifest(patient_id=pd.Series(['P0', 7, nobody, 'P3'], dtype=object))
    assert is_nobody(df.patient_id).tolist()==[False, False, True, False]
    found = find_problems(df)
    assert [(p.row, p.column) for p in found]==[(2, 'patient_id')]
    with pytest.raises(DataError, match='row 2'): validate_manifest(df)
    with pytest.raises(DataError, match=r'rows? 2'): patient_keys(df)
    with pytest.raises(DataError, match=r'rows? 2'): assert_no_leakage(df.assign(split='train'))
    assert make_dataset(df, errors='list').manifest.image_id.tolist()==['i0', 'i1', 'i3']
    index = pd.DataFrame({'path': list('abcd'), 'PatientID': df.patient_id})
    with pytest.raises(DataError, match='1 of 4 images have no patient .such as c'): make_manifest(index)
    assert make_manifest(index, no_patient='image').patient_id.tolist()==['P0', 7, 'c', 'P3']


def test_patients_that_look_like_none_are_some():
    for name in ('0', 0, '1E5', '12e4', 'NA-3', 'unknown 7', 'P?', 'n', '李', 'None1'):
        assert not is_nobody(pd.Series([name], dtype=object)).any()
    df = manifest(image_id=['-', 'unknown'])
    assert official_split(df, {'test': ['-'], 'train': ['unknown']}).split.tolist()==['test', 'train']


# Views, studies, rows of one image

def test_views_have_one_vocabulary():
    for view, names in {'LAT': ['LAT', 'LATERAL', 'lateral', 'LL', 'RL', 'L', 'Left Lateral', 'll'],
            'PA': ['PA', 'pa', 'PA erect', 'Postero-Anterior', 'posterior_anterior'],
            'AP': ['AP', 'AP supine', 'AP_horizontal', 'ap erect', 'AnteroPosterior'],
            '': [None, np.nan, '', 'nan', 'unknown']}.items():
        assert {view_name(n) for n in names}=={view}
    assert view_name('Frontal')=='FRONTAL' and view_name('AP/PA') not in ('AP',
        'PA') and view_name('lateral decubitus')!='LAT'
    assert make_dataset(manifest(view=['Lateral', 'LL', 'PA erect'])).manifest.view.tolist()==['LAT', 'LAT',
        'PA']
    index = pd.DataFrame({'path': list('abc'), 'PatientID': list('123'), 'view': ['AP', '', '']})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = make_manifest(index, pd.DataFrame({'path': list('abc'), 'View': ['', 'LATERAL', 'L']}))
    assert m.view.tolist()==['AP', 'LAT', 'LAT'] and 'View' not in m


def test_a_study_is_one_of_a_patient():
    two = manifest(patient_id=['P1', 'P1', 'P2', 'P2'], study_id='study1')
    validate_manifest(two)
    with pytest.raises(DataError, match='belongs to more than one patient'):
        validate_manifest(two.assign(study_id='1.2.840.1'))
    index = two.rename(columns={'image_id': 'SOPInstanceUID'}).drop(columns=['split', 'view', 'laterality'])
    labels = pd.DataFrame({'patient_id': ['P1', 'P2'], 'study_id': 'study1', 'fx': [1, 0]})
    assert make_manifest(index, labels).fx.tolist()==[1, 1, 0, 0]
    with pytest.raises(DataError, match="whose name several patients have .such as row 0: 'study1'"):
        make_manifest(index, labels.drop(columns='patient_id').head(1))
    own = index.assign(study_id=['s1', 's1', 's2', 's2'])
    assert make_manifest(own, pd.DataFrame({'study_id': ['s1', 's2'], 'fx': [1, 0]})).fx.tolist()==[1, 1, 0,
        0]


def test_rows_of_an_image_that_contradict_each_other_are_named():
    df = manifest(image_id=['a', 'a', 'b', 'b', 'c', 'c'], patient_id=['1', '2', '1', 1., '3', ''],
        split=['train', 'train', 'train', 'test', '', 'test'])
    assert [(p.row, p.column) for p in contradicting_rows(df)]==[(0, 'patient_id'), (1, 'patient_id'),
        (2, 'split'), (3, 'split')]
    assert "'1' here, '2' in another row of this image" in str(contradicting_rows(df, file='t.csv')[0])
    assert make_dataset(df, errors='list').manifest.image_id.tolist()==['b', 'c']


def test_all_faults_of_a_table_of_labels_can_be_listed(tmp_path):
    (tmp_path/'t.csv').write_text('image_id,fx,kl\n' + ''.join(f'i{k},often,{k}\n' for k in range(7))
        + 'z,yes,IV\n')
    with pytest.raises(DataError, match="7 values that are no numbers .line 2: 'often'"):
        read_labels(tmp_path/'t.csv', ['fx', 'kl'])
    t,problems = read_labels(tmp_path/'t.csv', ['fx', 'kl'], errors='list')
    assert t.fx.fillna(-1).tolist()==[-1]*7+[1] and t.kl.fillna(-1).tolist()==[*range(7), -1]
    assert problems[['line', 'column', 'value']].values.tolist()==[*([k+2, 'fx', 'often'] for k in range(7)),
        [9, 'kl', 'IV']]
    assert not len(read_labels(tmp_path/'t.csv', errors='list')[1])
    with pytest.raises(DataError, match="errors is 'all'"): read_labels(tmp_path/'t.csv', errors='all')


def test_doubled_rows_that_are_equal_are_one():
    index = pd.DataFrame({'path': list('abc'), 'SOPInstanceUID': list('ABC'), 'PatientID': list('123')})
    labels = pd.DataFrame({'image_id': ['A', 'A', 'B', 'C'], 'fx': [1., 1., np.nan, 0],
        'by': ['x', 'x', 'y', None]})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert make_manifest(index, labels).fx.fillna(-1).tolist()==[1, -1, 0]
    labels.loc[1, 'fx'] = 0
    with pytest.raises(DataError,
            match=r"hold 'A' in column 'image_id' 2 times \(rows 0 and 1 differ in 'fx'"):
        make_manifest(index, labels)


@pytest.mark.parametrize('ids', [[1, 2, 9], [1., 2., 9.], ['1.0', ' 2', '9'], np.array([1, 2, 9], 'int32')],
    ids=str)
def test_integer_ids_and_missing_rows(ids):
    index = pd.DataFrame({'path': list('abc'), 'image_id': ['1', '2', '3'], 'patient_id': [7, 7, 8]})
    labels = pd.DataFrame({'Image ID': ids, 'fx': [1, 0, 1]})
    with pytest.warns(UserWarning, match='1 of 3 labels have no image, 1 of 3 images have no label'):
        assert make_manifest(index, labels).fx.fillna(-1).tolist()==[1, 0, -1]
    lost = missing_rows(index, labels)
    assert lost[['what', 'row']].values.tolist()==[['image without a label', 2],
        ['label without an image', 2]]
    assert lost.name[0]=='c' and float(lost.name[1])==9 and set(MANIFEST)<=set(make_manifest(index))


# Into training

def test_answers_in_words_reach_training():
    def checked(kind, *values, **more):
        df = pd.DataFrame({'image_id': [f'i{k}' for k in range(len(values))], 'fx': list(values), **more})
        settings = SimpleNamespace(labels=['fx', *more])
        return kind.checked(df[kind.known(df, settings)], settings)
    for words in (('yes', 'no'), ('Positive', ' negative'), ('TRUE', 'False'), ('1', 'no'), (1, 'n'),
            ('1.0', '0'),
            (True, False)):
        for empty in (None, '', ' ', np.nan):
            m = checked(Grades(), *words, empty)
            assert m.fx.tolist()==[1, 0] and m.fx.dtype==int
            assert checked(Labels(), *words, empty).fx.tolist()==[1, 0]
    assert checked(Grades(), '0', '3', 1).fx.tolist()==[0, 3, 1]
    two = checked(Labels(), 'yes', 'no', '', '', other=['', 'neg', 'pos', ' '])
    assert two[['fx', 'other']].fillna(-1).values.tolist()==[[1, -1], [0, 0], [-1, 1]]
    for odd in ('unsure', 'III', '1,5', -1, .5):
        with pytest.raises(DataError,
                match=f"Column 'fx' holds '?{odd}'? for image i2.*yes, no, positive, negative"):
            checked(Grades(), 'yes', 'no', odd)
        with pytest.raises(DataError, match=f"holds '?{odd}'? for image i2.*Use 1, 0, or yes, no"):
            checked(Labels(), 'yes', 'no', odd)
    with pytest.raises(DataError, match="holds 2 for image i2.*Use either grades, or yes, no"):
        checked(Grades(), 'yes', 'no', 2)
    assert checked(Classes(), 'knee', 'hand', '').fx.tolist()==['knee', 'hand']


# Identities

def test_identities_are_found_by_what_their_columns_hold():
    a = pd.DataFrame({'image_id': ['r1', 'r2'], 'patient_id': ['r1', 'r2']})
    b = pd.DataFrame({'image_id': ['1.png', '2.png', '3.png'], 'patient_id': list('xyz')})
    match = pd.DataFrame({'mse': [.1, .2, .3], 'cls': 'x?', 'theirs': [2., 1., 3.],
        'pid': ['r1', 'r2', 'r9']})
    expected = [['r1', '2.png', 'r1', 'y'], ['r2', '1.png', 'r2', 'x']]
    for columns in (['mse', 'cls', 'theirs', 'pid'], ['pid', 'theirs', 'mse', 'cls'], ['theirs', 'pid']):
        assert same_images(a, b, match[columns]).values.tolist()==expected
    assert same_images(a, b, match, on=('PID', 'theirs')).values.tolist()==expected
    with pytest.warns(UserWarning, match="'pid' names 2 of the first, .* 0 of the second"):
        assert not len(same_images(a, b.assign(image_id=list('uvw')), match))
    with pytest.raises(DataError, match="no column 'x'"): same_images(a, b, match, on=('pid', 'x'))
    missing = match.assign(pid=['r1', None, np.nan])
    assert same_images(a, b.assign(image_id=['2', 'nan', 'None']),
        missing).values.tolist()==[['r1', '2', 'r1', 'x']]


def test_the_same_row_twice_is_one_and_another_is_refused():
    index = pd.DataFrame({'image_id': list('abc'), 'path': [f'{k}.dcm' for k in 'abc'], 'patient_id': list('xyz')})
    labels = pd.DataFrame({'image_id': list('abc'), 'found': [0, 1, 1]})
    once = make_manifest(index, labels)
    assert make_manifest(index, pd.concat([labels, labels])).equals(once) and once.found.tolist()==[0, 1, 1]
    with pytest.raises(DataError, match='2 times'): make_manifest(index, pd.concat([labels, labels.assign(found=0)]))
