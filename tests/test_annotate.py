"""Readers and active learning: what comes back from two readers and their programs of tables. Each kind of answer, id and
table is tried with its siblings; one round goes through an Excel file, edited as readers do, into training."""
import importlib.util
import io
import shutil
from datetime import date
from pathlib import Path

import numpy as np
import openpyxl
import pandas as pd
import pytest
from openpyxl.worksheet.cell_range import CellRange

from radiology_ai.core import DataError
from radiology_ai.data.annotate import (
    Question,
    add_labels,
    agreement,
    answer_numbers,
    assign_readers,
    dawid_skene,
    labels_at,
    majority,
    next_readers,
    read_templates,
    write_templates,
)
from radiology_ai.weak.active import ActiveLearning, pick, simulate_active

FRACTURED = Question('fractured', ('no', 'yes', 'unsure'), 'Is there a fracture?')
GRADE = Question('grade', tuple(range(7)))
FILMS = ['a', 'b', 'c', 'd']


def plan_of(images=FILMS, readers=('Ada',)) -> pd.DataFrame:
    return pd.DataFrame([(i, r, 0) for r in readers for i in images], columns=['image_id', 'reader', 'block'])


def edit(file, change, out=None):
    "Open a table as a program does, `change(sheet)`, save."
    book = openpyxl.load_workbook(file)
    change(book['read'])
    book.save(out or file)
    return out or file


def column(sheet, name) -> int: return [c.value for c in sheet[1]].index(name)+1


def fill(file, answers: dict, name='fractured'):
    "Write the answer of each image into its row."
    def change(sheet):
        for row in range(2, sheet.max_row+1):
            if (v := answers.get(sheet.cell(row, 1).value)) is not None:
                sheet.cell(row, column(sheet, name)).value = v
    return edit(file, change)


def table(path, rows, names=('image_id', 'reader', 'fractured', 'comment')):
    "A CSV of one's own."
    path.write_text('\n'.join([','.join(names), *(','.join(map(str, r)) for r in rows)]) + '\n')
    return path


def values(votes) -> list: return votes.value.tolist()


# ---- words ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('answers, no, yes, unsure', [
    (('no', 'yes', 'unsure'), 'no', 'yes', 'unsure'), ((0, 1, 'unknown'), 0, 1, 'unknown'),
    (('negative', 'positive', 'uncertain'), 'negative', 'positive', 'uncertain'),
    (('Yes', 'No', 'Unsure'), 'No', 'Yes', 'Unsure'), ((False, True, 'unsure'), False, True, 'unsure')])
@pytest.mark.parametrize('kind', ['xlsx', 'csv'])
def test_words_of_yes_and_no_mean_the_two_answers(answers, no, yes, unsure, kind, tmp_path):
    said = {no: ['no', ' No ', 'FALSE', 'negative', '0', '0.0', 0, False, 0.],
        yes: ['yes', 'YES', 'true', 'Positive', '1', '1.0', 1, True, 1.],
        unsure: ['unsure', 'UNSURE ', 'unknown']}
    words = [(w, a) for a, ws in said.items() for w in ws]
    films = [f'f{k}' for k in range(len(words))]
    q = Question('fractured', answers)
    file, = write_templates(plan_of(films), [q], tmp_path, kind)
    if kind=='xlsx': fill(file, dict(zip(films, [w for w, _ in words])))
    else: table(file, [(f, 'Ada', w, '') for f, (w, _) in zip(films, words)])
    votes = read_templates(tmp_path, [q], plan_of(films))
    assert values(votes)==[a for _, a in words] and list(map(type, values(votes)))==[type(a)
        for _, a in words]
    numbers = answer_numbers(votes.value)
    assert numbers.fillna(-1).tolist()==[0]*9 + [1]*9 + [-1]*3


def test_yes_is_no_grade(tmp_path):
    file, = write_templates(plan_of(), [GRADE], tmp_path)
    fill(file, dict(a='yes', b='1', c='unsure', d=' 6.0 '), 'grade')
    votes, problems = read_templates(tmp_path, [GRADE], plan_of(), errors='list')
    assert values(votes)==[1, 6]
    assert [p.split(': ')[0] for p in problems]==[f"{file.name}, row {r}, column 'grade'" for r in (2, 4)]
    for q in (Question('usable', ('yes', 'wrong body part')), Question('side', ('no', '0', 'yes')),
            Question('n', ('0', '1', '2'))):
        fill(write_templates(plan_of(), [q], tmp_path/q.name)[0], dict(a='true'), q.name)
        with pytest.raises(DataError, match=f"row 2, column '{q.name}': 'true' is not one of"):
            read_templates(tmp_path/q.name, [q], plan_of())


def test_an_exact_answer_comes_before_a_like_one(tmp_path):
    q = Question('side', ('l', 'L', 'left  knee'))
    fill(write_templates(plan_of(), [q], tmp_path)[0], dict(a='l', b='L', c='LEFT knee'), 'side')
    assert values(read_templates(tmp_path, [q], plan_of()))==['l', 'L', 'left  knee']


def test_a_question_without_answers_takes_any_text(tmp_path):
    q = Question('what', ())
    fill(write_templates(plan_of(), [q], tmp_path)[0], dict(a='Yes', b='unsure', c='two  words'), 'what')
    assert values(read_templates(tmp_path, [q], plan_of()))==['Yes', 'unsure', 'two  words']


def test_answers_that_nobody_can_give_are_refused(tmp_path):
    for answers in ('yes', ('yes', ''), ('yes', None), ('yes', 'yes'), (1, '1')):
        with pytest.raises(DataError, match='none of them blank'):
            write_templates(plan_of(), [Question('q', answers)], tmp_path)


def test_labels_in_words():
    assert answer_numbers(pd.Series(['no', 'TRUE', None, '', 'unsure', 'Negative', True, 2,
        '3.0'])).fillna(-1).tolist()==[
        0, 1, -1, -1, -1, 0, 1, 2, 3]
    for numbers in (pd.Series([0, 1]), pd.Series([0., np.nan])): assert answer_numbers(numbers) is numbers
    assert answer_numbers(pd.Series([True, False])).tolist()==[1, 0]
    with pytest.raises(DataError,
            match=r"2 values of 'fx' are no labels \(row 7: 'perhaps', row 9: 'inf'\).*yes, no"):
        answer_numbers(pd.Series(['no', 'perhaps', 'inf'], [5, 7, 9], name='fx'))


# ---- ids -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['xlsx', 'csv'])
@pytest.mark.parametrize('ids', [[17, 18, 19], ['007', '7', '08'], [17., 18., 19.], ['17', '018', ' 5'],
    [-1, 0, 1]])
def test_ids_come_back_as_they_were(ids, kind, tmp_path):
    plan = plan_of(ids, (1, 2))
    for f in write_templates(plan, [FRACTURED], tmp_path, kind):
        if kind=='xlsx': edit(f, lambda s: [s.cell(r, 3, 'yes') for r in (2, 3, 4)])
        else:
            t = pd.read_csv(f, dtype=str, keep_default_na=False)
            t.assign(fractured='yes').to_csv(f, index=False)
    votes = read_templates(tmp_path, [FRACTURED], plan)
    assert votes.image_id.tolist()==ids*2 and votes.reader.tolist()==[1]*3+[2]*3
    assert [type(v) for v in votes.image_id.tolist()]==[type(v) for v in ids*2]
    labels = majority(votes)
    assert set(labels.index)==set(ids) and set(labels_at(add_labels(None, labels, 'x', 'y'),
        'x').index)==set(ids)
    assert set(dawid_skene(votes).labels.index)==set(ids)


def test_ids_that_a_program_wrote_as_numbers(tmp_path):
    rows = [('7', 'Ada', 'yes', ''), ('17.0', 'Ada', 'no', ''), ('8', 'Ada', 'no', '')]
    votes = read_templates(table(tmp_path/'t.csv', rows), [FRACTURED], plan_of(['007', 17, '08']))
    assert votes.image_id.tolist()==['007', 17, '08']
    # where several would do, none is taken
    _, problems = read_templates(table(tmp_path/'t.csv', rows[:1]), [FRACTURED], plan_of(['007', '07']),
        errors='list')
    assert "row 2, column 'image_id': '7' was not given to reader 'Ada'" in problems[0]
    _, problems = read_templates(table(tmp_path/'t.csv', [('"  b "', 'Ada', 'no', '')]), [FRACTURED],
        plan_of([' b', 'b ']),
        errors='list')
    assert 'was not given' in problems[0]


def test_ids_that_a_table_cannot_tell_apart_are_refused(tmp_path):
    for make in (lambda p: write_templates(p, [FRACTURED], tmp_path),
            lambda p: read_templates([], [FRACTURED], p),
            lambda p: assign_readers(p.image_id, ['Ada'], 1)):
        for ids, match in (([17, '17'], "17 and '17' look the same"), (['a', None], 'Row 1 has no image_id'),
                (['a', np.nan], 'Row 1 has'), ([' '], 'Row 0 has')):
            with pytest.raises(DataError, match=match): make(plan_of(ids))
    with pytest.raises(DataError, match="'1' look the same"):
        write_templates(plan_of(readers=(1, '1')), [FRACTURED], tmp_path)


def test_who_has_read_an_image_is_known_by_its_number(tmp_path):
    plan = plan_of([17, 18], ('Ada', 'Ben'))
    for f, v in zip(write_templates(plan, [FRACTURED], tmp_path), ('yes', 'no')):
        edit(f, lambda s, v=v: s.cell(2, 3, v))
    votes = read_templates(tmp_path, [FRACTURED], plan)
    more = next_readers(majority(votes), plan, ['Ada', 'Ben', 'Cleo'])
    assert more.values.tolist()==[[17, 'Cleo', 1]]
    with pytest.raises(DataError, match='such as 17'): next_readers(majority(votes), plan, ['Ada', 'Ben'])


# ---- tables --------------------------------------------------------------------------------------------------

def test_a_macro_workbook_is_read_and_others_are_named(tmp_path):
    file, = write_templates(plan_of(), [FRACTURED], tmp_path/'written')
    fill(file, dict.fromkeys(FILMS, 'yes'))
    shutil.copy(file, tmp_path/'t.XLSM')
    assert len(read_templates(tmp_path, [FRACTURED], plan_of()))==4
    (tmp_path/'t.XLSM').unlink()
    for kind in ('.ods', '.xls', '.XLS', '.xlsb', '.numbers'):
        other = tmp_path/f'back{kind}'
        other.write_bytes(b'x')
        for given in (tmp_path, other, [other]):
            with pytest.raises(DataError,
                    match=f"back{kind}.*[Ss]ave it as .xlsx"):
                read_templates(given, [FRACTURED], plan_of())
        other.unlink()
    (tmp_path/'~$t.xls').write_bytes(b'x')
    (tmp_path/'._t.ods').write_bytes(b'x')
    (tmp_path/'t.tsv').write_text('image_id\treader\tfractured\na\tAda\tyes\n')
    assert len(read_templates(tmp_path, [FRACTURED]))==1


@pytest.mark.parametrize('kind', ['xlsx', 'csv'])
@pytest.mark.parametrize('names, fails', [(['fractured', 'fractured'], True),
    (['Fractured', 'FRACTURED '], True),
    (['image_id', 'fractured'], True),
    (['fractured', 'Fractured'], False), (['note', 'fractured'], False), ([' Fractured', 'note'], False)])
def test_two_columns_of_one_name_are_named(kind, names, fails, tmp_path):
    file, head = tmp_path/f't.{kind}', ['image_id', 'reader', *names]
    row = ['a', 'Ada', 'yes', 'no'] if names[1]!='fractured' else ['a', 'Ada', 'no', 'yes']
    if kind=='csv': table(file, [row], head)
    else:
        book = openpyxl.Workbook()
        for r in (head, row): book.active.append(r)
        book.save(file)
    if not fails:
        assert values(read_templates(file, [FRACTURED], plan_of(['a'])))==['yes']
        return
    with pytest.raises(DataError, match='has two columns .*Rename one of|could be each of .*exact name'):
        read_templates(file, [FRACTURED])
    assert len(read_templates(file, [FRACTURED], errors='list')[1])==1


def test_a_question_named_like_a_copy_is_no_copy(tmp_path):
    qs = [FRACTURED, Question('fractured.1', ('no', 'yes')), Question('Fractured', ('no', 'yes'))]
    file = table(tmp_path/'t.csv', [('a', 'Ada', 'yes', 'no', 'no')],
        ['image_id', 'reader', *(q.name for q in qs)])
    assert values(read_templates(file, qs))==['yes', 'no', 'no']
    with pytest.raises(DataError, match="no column 'Fractured'"): # not read from `fractured`
        read_templates(table(tmp_path/'t.csv', [('a', 'Ada', 'yes')], ['image_id', 'reader', 'fractured']),
            [qs[0], qs[2]])
    with pytest.raises(DataError, match="two columns 'note'"):
        write_templates(pd.concat([plan_of().assign(note=1), pd.DataFrame({'note': [2]*4})], axis=1), qs,
            tmp_path)


def test_a_merged_cell_is_the_answer_of_each_of_its_rows(tmp_path):
    plan = plan_of([f'f{k}' for k in range(8)])
    file, = write_templates(plan, [FRACTURED, GRADE], tmp_path)
    def change(s):
        for ref, v in (('C2:C4', 'yes'), ('C5:C6', 'no'), ('D3:D9', 2), ('E2:E9', 'on a CT')):
            s[ref.split(':')[0]].value = v
            s.merge_cells(ref)
    edit(file, change)
    votes = read_templates(file, [FRACTURED, GRADE], plan)
    said = votes.pivot(index='image_id', columns='question', values='value')
    assert said.fractured.fillna('').tolist()==['yes']*3 + ['no']*2 + ['']*3
    assert said.grade.fillna(-1).tolist()==[-1] + [2]*7 and set(votes.comment)=={'on a CT'}


def test_a_cell_merged_over_two_questions_answers_both(tmp_path):
    questions = [FRACTURED, Question('old', ('no', 'yes'))]
    file, = write_templates(plan_of(), questions, tmp_path)
    def change(s):
        s['C2'].value = s['C4'].value = 'yes'
        s.merge_cells('C2:D3')
    edit(file, change)
    said = read_templates(file, questions, plan_of()).pivot(index='image_id', columns='question',
        values='value')
    assert said.fillna('').values.tolist()==[['yes', 'yes'], ['yes', 'yes'], ['yes', '']]


def test_a_merged_image_id_does_not_hide_its_neighbour(tmp_path):
    file, = write_templates(plan_of(), [FRACTURED], tmp_path)
    edit(file, lambda s: [s.cell(r, 3, 'yes') for r in (2, 3)] + [s.merge_cells('A2:A3')])
    _, problems = read_templates(file, [FRACTURED], plan_of(), errors='list')
    assert problems==[f"{file.name}: there is no row of 'b', which was given to reader 'Ada'"]


@pytest.mark.parametrize('typed, shape, text',
    [(date(2024, 3, 1), None, '2024-03-01'), (date(2024, 3, 1), 'dd.mm.yyyy', '01.03.2024'),
    (date(2024, 3, 1), '[$-407]d/m/yyyy;@', '1/3/2024'), (date(2024, 3, 1), 'mm-dd-yy', '2024-03-01'),
    ('01.03.2024', '@', '01.03.2024'), ('3-4', None, '3-4'), (2024, None, '2024'), (45352, None, '45352')])
def test_a_date_stays_as_typed(typed, shape, text, tmp_path):
    seen = Question('seen', ())
    file, = write_templates(plan_of(), [seen], tmp_path)
    def change(s):
        for c in (s['C2'], s['D2']):
            c.number_format = 'General'
            c.value = typed
            if shape: c.number_format = shape
    edit(file, change)
    votes = read_templates(file, [seen], plan_of())
    assert (values(votes), votes.comment.tolist())==([text], [text])


# ---- rows ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['xlsx', 'csv'])
def test_rows_that_are_missing_or_were_never_asked_for(kind, tmp_path):
    plan = plan_of(readers=('Ada', 'Ben'))
    ada, ben = write_templates(plan, [FRACTURED], tmp_path, kind)
    rows = [('a', 'Ada', 'yes', ''), ('x', 'Ada', '', ''), ('c', 'Eve', 'no', ''), ('', 'Ada', 'no', ''),
        ('d', '', 'no', ''),
        ('d', 'Ada', '', '')]
    if kind=='csv': table(ada, rows)
    else:
        def write(s):
            for i, r in enumerate(rows, 2):
                for j, v in enumerate(r, 1): s.cell(i, j).value = v or None
        edit(ada, write)
    votes, problems = read_templates(tmp_path, [FRACTURED], plan, errors='list')
    assert values(votes)==['yes']
    assert problems==[f"{ada.name}, row 3, column 'image_id': 'x' was not given to reader 'Ada'",
        f"{ada.name}, row 4, column 'image_id': 'c' was not given to reader 'Eve'",
        f"{ada.name}, row 5, column 'image_id': it is empty; write the image_id again",
        f"{ada.name}, row 6, column 'reader': it is empty; write the reader again",
        f"{ada.name}: there is no row of 'b', which was given to reader 'Ada'",
        f"{ada.name}: there is no row of 'c', which was given to reader 'Ada'"]
    with pytest.raises(DataError, match='6 cells cannot be used'): read_templates(tmp_path, [FRACTURED], plan)
    ben.unlink()
    _, problems = read_templates(tmp_path, [FRACTURED], plan, errors='list')
    assert problems[6:]==["no table of reader 'Ben', block 0, has come back (4 images)"]


def test_a_table_that_is_still_out_is_a_warning(tmp_path, recwarn):
    plan = assign_readers(range(30), ['Ada', 'Ben'], 1, block=5)
    files = write_templates(plan, [FRACTURED], tmp_path)
    assert not len(read_templates(tmp_path, [FRACTURED], plan)) and not recwarn.list # not yet read
    with pytest.warns(UserWarning, match='4 tables have not come back'):
        read_templates(files[:2], [FRACTURED], plan)


def test_rows_without_a_plan_need_an_image_and_a_reader(tmp_path):
    file = table(tmp_path/'t.csv', [('', 'Ada', 'no', ''), ('a', '', 'no', ''), ('17', 'Ada', 'no', '')])
    votes, problems = read_templates(file, [FRACTURED], errors='list')
    assert votes.image_id.tolist()==['17'] and ['row 2' in problems[0], 'row 3' in problems[1]]==[True]*2


def test_rows_are_numbered_as_in_the_file(tmp_path):
    (tmp_path/'t.csv').write_text(
        'image_id,reader,fractured,comment\na,Ada,yes,\n\n\nb,Ada,perhaps,\nc,Ada,no\n')
    votes, problems = read_templates(tmp_path/'t.csv', [FRACTURED], plan_of(), errors='list')
    assert votes.row.tolist()==[2, 6] and "row 5, column 'fractured': 'perhaps'" in problems[0]


def test_all_faults_are_collected(tmp_path):
    plan = plan_of(readers=('Ada', 'Ben', 'Cleo', 'Dora'))
    ada, ben, cleo, dora = write_templates(plan, [FRACTURED], tmp_path)
    fill(ada, dict(a='yes', b='perhaps', c='no'))
    edit(ben, lambda s: (s.cell(1, 3, 'image_id'), s.cell(2, 4, 'no')))
    dora.unlink()
    (tmp_path/'Dora_0.ods').write_bytes(b'x')
    shutil.copy(ada, tmp_path/'Ada again.xlsx')
    fill(tmp_path/'Ada again.xlsx', dict(a='no', b='yes'))
    votes, problems = read_templates(tmp_path, [FRACTURED], plan, errors='list')
    assert votes[['image_id', 'reader', 'value']].values.tolist()==[['b', 'Ada', 'yes'], ['c', 'Ada', 'no']]
    for part in ("row 3, column 'fractured': 'perhaps'", "two columns 'image_id'", 'Dora_0.ods',
            "answers 'yes' for 'a', and 'no' in Ada again.xlsx, row 2",
            "no table of reader 'Ben'", "no table of reader 'Dora'"):
        assert sum(part in p for p in problems)==1, part
    assert len(problems)==6


# ---- rounds that are taken twice -----------------------------------------------------------------------------

def test_the_same_labels_add_nothing():
    labels = pd.Series({17: 1, 18: 0})
    h = add_labels(None, labels, 'fx', 'first', when='2025-01-01')
    for same in (labels, labels.astype(float), labels.astype(str), labels.astype(bool).astype(str)):
        assert len(add_labels(h.astype({'value': str}), same, 'fx', 'again', when='2025-02-01'))==(
            2 if same.iloc[0]!='True' else 4)
    back = pd.read_csv(io.StringIO(h.to_csv(index=False)))
    assert len(add_labels(back, labels, 'fx', 'again'))==2 and len(add_labels(back, {17: 0}, 'fx', 'new'))==3
    assert labels_at(back, 'fx', '2025-01-02').to_dict()=={17: 1,
        18: 0} and not len(labels_at(back, 'fx', '2024-12-31'))
    with pytest.raises(DataError, match='Image 17 has two labels'):
        add_labels(None, pd.Series([1, 0], [17, 17]), 'fx', 'first')


def test_copies_of_a_table_add_nothing(tmp_path):
    file, = write_templates(plan_of(), [FRACTURED], tmp_path)
    fill(file, dict.fromkeys(FILMS, 'yes'))
    once = read_templates(tmp_path, [FRACTURED], plan_of())
    shutil.copy(file, tmp_path/'Ada_0 (1).xlsx')
    table(tmp_path/'Ada_0.csv', [(i, 'Ada', 'TRUE', '') for i in FILMS])
    assert len(read_templates(tmp_path, [FRACTURED], plan_of()))==len(once)==4


def manifest_of(ids, label=None) -> pd.DataFrame:
    return pd.DataFrame(dict(image_id=ids, path=[f'{i}.dcm' for i in ids], split='train',
        fractured=[np.nan]*len(ids) if label is None else label))


def rounds_of(folder, df, question=FRACTURED): return ActiveLearning(None, df, question, None, folder)


@pytest.mark.parametrize('ids', [[17, 18, 19, 20], ['007', '7', '08', 'x']])
@pytest.mark.parametrize('question', [FRACTURED, Question('fractured', (0, 1, 'unsure'))])
def test_a_round_in_words_is_taken_once(ids, question, tmp_path):
    df = manifest_of(ids)
    rounds = rounds_of(tmp_path, df, question)
    for f in rounds.ask(rounds.pool.iloc[:3], ['Ada', 'Ben'], n=2):
        fill(f, {str(ids[0]): 'No', str(ids[1]): 'TRUE', str(ids[2]): 'unsure'})
    first = rounds.take()
    history = rounds.history.copy()
    want = [0., 1., -1., -1.]
    for again in (rounds, rounds_of(tmp_path, df, question),
            rounds_of(tmp_path, df.sample(frac=1, random_state=1), question)):
        again.take()
        pd.testing.assert_frame_equal(again.history.astype({'value': str}), history.astype({'value': str}))
        label = again.manifest.set_index('image_id').fractured
        assert label[ids].fillna(-1).tolist()==want and label.dtype==float
        assert again.pool.image_id.tolist()==ids[3:] and list(again.unsure)==ids[2:3] and again.round==1
    assert first.value.tolist()==[question.answers[k] for k in (0, 1, 2)] or set(first.index)==set(ids[:3])
    (tmp_path/'round.zip').write_bytes(b'')
    (tmp_path/'round_old').mkdir()
    assert rounds_of(tmp_path, df, question).round==1


def test_a_label_that_readers_take_back_is_unknown_again(tmp_path):
    rounds = rounds_of(tmp_path, manifest_of([17, 18]))
    file, = rounds.ask(rounds.pool, ['Ada'])
    fill(file, {'17': 'yes', '18': 'no'})
    rounds.take()
    fill(file, {'17': 'unsure'})
    rounds.take()
    assert rounds.manifest.fractured.fillna(-1).tolist()==[-1,
        0] and len(rounds.history)==3 and not len(rounds.pool)


def test_faults_of_a_round_are_named_or_collected(tmp_path):
    rounds = rounds_of(tmp_path, manifest_of([17, 18, 19]))
    file, = rounds.ask(rounds.pool, ['Ada'])
    fill(file, {'17': 'yes', '18': 'perhaps'})
    edit(file, lambda s: s.delete_rows(next(r for r in range(2, 5) if s.cell(r, 1).value=='19')))
    with pytest.raises(DataError, match="2 cells cannot be used.*'perhaps' is not one of.*no row of 19"):
        rounds.take()
    assert rounds.history is None and not rounds.manifest.fractured.notna().any()
    labels, problems = rounds.take(errors='list')
    assert (labels.value.to_dict(), len(problems))==({17: 'yes'}, 2) and rounds.pool.image_id.tolist()==[18,
        19]


def test_labels_of_a_manifest_are_answers(tmp_path):
    known = rounds_of(tmp_path, manifest_of(list('abcde'),
        ['No', 'TRUE', 'unsure', None, ''])).manifest.fractured
    assert known.fillna(-1).tolist()==[0, 1, -1, -1, -1]
    for label in ([0, 1], [0., np.nan], [True, False]):
        assert rounds_of(tmp_path, manifest_of(['a', 'b'], label)).manifest.fractured.dtype!=object
    with pytest.raises(DataError, match=r"no labels \(row 1: 'perhaps'\)"):
        rounds_of(tmp_path, manifest_of(['a', 'b'], ['no', 'perhaps']))
    with pytest.raises(DataError, match=r"1 labels of 'fractured' are none of no, yes, unsure \(row 0: -1"):
        rounds_of(tmp_path, manifest_of(['a', 'b'], [-1, 1]))
    with pytest.raises(DataError, match='no labels .row 1: .II'):
        rounds_of(tmp_path, manifest_of(['a']), Question('fractured', ('1', 'II')))
    with pytest.raises(DataError, match='the same label'):
        rounds_of(tmp_path, manifest_of(['a']), Question('fractured', ('yes', 1)))
    with pytest.raises(DataError, match='has 2 columns'):
        rounds_of(tmp_path, pd.concat([manifest_of(['a']), pd.DataFrame({'fractured': [1]})], axis=1))
    with pytest.raises(DataError, match='has no column'):
        rounds_of(tmp_path, manifest_of(['a']).drop(columns='fractured'))


def test_labels_of_other_images_are_a_warning(tmp_path):
    rounds = rounds_of(tmp_path, manifest_of([17, 18]))
    fill(rounds.ask(rounds.pool, ['Ada'])[0], {'17': 'yes', '18': 'no'})
    rounds.take()
    with pytest.warns(UserWarning,
            match='2 of 2 labels of readers are of images that the manifest does not have'):
        other = rounds_of(tmp_path, manifest_of(['17', '18']))
    assert other.manifest.fractured.isna().all()


def test_a_history_of_two_questions_keeps_them_apart(tmp_path):
    h = add_labels(None, {17: 'yes'}, 'fractured', 'one', when='2025-01-01')
    h = add_labels(h, {17: 5, 18: 3}, 'grade', 'two', when='2025-01-02')
    h.astype({'value': str}).to_parquet(tmp_path/'history.parquet')
    assert rounds_of(tmp_path, manifest_of([17, 18])).manifest.fractured.fillna(-1).tolist()==[1, -1]


def test_unknown_is_no_label_of_a_simulation():
    df = manifest_of(list('abcdefgh'), [0, 1, 0, 1, np.nan, np.nan, 0, np.nan])
    df.loc[6:, 'split'] = 'test'
    seen = []
    def train(m, seed): seen.append(m)
    curve = simulate_active(df, 'fractured', train, lambda learn: .5, 'random', start=4, step=1, rounds=0)
    assert curve.labels.tolist()==[4] and seen[0].image_id.tolist()==list('abcdg')


def test_outputs_that_are_no_numbers_are_refused():
    p = np.full((4, 2), .5)
    with pytest.raises(DataError, match='p hold 1 values'):
        pick('entropy', 2, np.where(np.arange(8).reshape(4, 2)==3, np.nan, p))
    with pytest.raises(DataError, match='features hold 8 values'):
        pick('badge', 2, p, np.full((4, 2), np.inf))


# ---- the whole round -----------------------------------------------------------------------------------------

def test_two_readers_in_words_through_excel_into_training(hospital, store, tmp_path):
    from radiology_ai.data.labels import make_manifest
    from radiology_ai.data.load import xray_dataloaders
    from radiology_ai.data.split import patient_split
    from radiology_ai.preprocess.store import ImageStore
    from radiology_ai.train.learner import xray_learner
    images, truth = ImageStore(store), pd.read_csv(hospital/'labels.csv')
    df = patient_split(make_manifest(images.index, truth[['image_id', 'fractured']]), label='fractured',
        seed=0)
    df = df[df.fractured.notna()].reset_index(drop=True)
    right = dict(zip(df.image_id, np.where(df.fractured==1, 'yes', 'no')))
    df.loc[(df.split=='train') & (np.arange(len(df))%2>0), 'fractured'] = np.nan
    trained = []
    def train(manifest):
        trained.append(manifest)
        learn = xray_learner(xray_dataloaders(images, manifest, 'fractured', bs=8, seed=0), 'resnet10t',
            pretrained=False,
            seed=0, monitor=None)
        learn.fit(1)
        return learn
    rounds = ActiveLearning(images, df, FRACTURED, train, tmp_path, strategy='entropy')
    chosen = rounds.propose(6)
    def read_as(reader):
        def change(s):
            at, films = column(s, 'fractured'), [s.cell(r, 1).value for r in range(2, 8)]
            # the same answers lie beside one another in the sorted table, one merged cell for each
            for k, film in enumerate(sorted(films, key=lambda f: (f==undecided, right[f])), 2):
                s.cell(k, 1).value = film
                s.cell(k, column(s, 'path')).value = None
                word = dict(yes=' YES', no='No', unsure='Unsure')[right[film] if film!=undecided
                    else 'unsure']
                s.cell(k, at).value = word if reader=='Ada' else {' YES': True, 'No': 0,
                    'Unsure': 'unknown'}[word]
            said = [s.cell(k, at).value for k in range(2, 8)]
            for v in set(map(str, said)):
                rows = [k for k, o in enumerate(said, 2) if str(o)==v]
                if len(rows)>1:
                    s.merge_cells(CellRange(min_col=at, max_col=at, min_row=rows[0], max_row=rows[-1]).coord)
            s.cell(2, column(s, 'comment')).value = date(2026, 3, 1)
        return change
    undecided = chosen.image_id.iloc[0]
    for reader, file in zip(('Ada', 'Ben'), rounds.ask(chosen, ['Ada', 'Ben'], n=2)):
        edit(file, read_as(reader))
    votes = read_templates(tmp_path/'round000', [FRACTURED],
        pd.read_parquet(tmp_path/'round000/plan.parquet'))
    assert len(votes)==12 and (votes.comment=='2026-03-01').sum()==2
    assert agreement(votes).kappa.tolist()==[1., 1.]
    labels = rounds.take()
    want = {i: 'unsure' if i==undecided else right[i] for i in chosen.image_id}
    assert labels.value.to_dict()==want
    nexts = rounds.propose(4)
    assert len(trained[1])==len(trained[0])+5 and not set(nexts.image_id) & set(chosen.image_id)
    got = trained[1].set_index('image_id').fractured
    assert {i: got[i] for i in want if i!=undecided}=={i: float(v=='yes') for i, v in want.items()
        if v!='unsure'}
    assert undecided not in got.index and set(got.unique())=={0., 1.}


# ---- two readings of real films ------------------------------------------------------------------------------

def test_two_readings_of_chests_by_other_means(real_data):
    from sklearn.metrics import cohen_kappa_score
    spec = importlib.util.spec_from_file_location('readers',
        Path(__file__).parents[1]/'benchmarks'/'readers.py')
    readers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readers)
    films, boxes, outlines = readers.readings(real_data/'chest_nih')
    assert (len(films), films.patient_id.nunique(), boxes.image_id.nunique())==(62, 58, 21)
    for findings, counts in ((readers.CONSOLIDATION, [19, 2, 13, 28]), (readers.OPACITY, [20, 1, 20, 21])):
        *cells, agree, kappa = readers.presence(films, outlines, findings, 200)
        a, b = np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)
        assert cells==counts and agree.startswith(f'{np.mean(a==b):.2f} (')
        assert kappa.startswith(f'{cohen_kappa_score(a, b):.2f} (')
    rsna, det = readers.lists(films, boxes, outlines, readers.CONSOLIDATION)
    hits = 0
    for t, d in zip(rsna, det): # pair by pair
        free = [tuple(b) for b in t]
        for x in d:
            def iou(b, x=x):
                w, h = max(0, min(b[2], x[2])-max(b[0], x[0])), max(0, min(b[3], x[3])-max(b[1], x[1]))
                return w*h/((b[2]-b[0])*(b[3]-b[1]) + (x[2]-x[0])*(x[3]-x[1]) - w*h)
            best = max(free, key=iou, default=None)
            if best is not None and iou(best)>.4:
                hits += 1
                free.remove(best)
    assert (sum(map(len, rsna)), sum(map(len, det)))==(32, 52)
    f1 = readers.f1_ci(det, rsna, films.patient_id.to_numpy(), .4, 200)
    assert f1.value==pytest.approx(2*hits/84) and f1.low<f1.value<f1.high
    dice = readers.dice_of(np.array([[0, 0, 10, 10.]]), np.array([[5, 0, 15, 10.]]))
    assert dice==.5
