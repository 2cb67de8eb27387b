"""The command line on a user's own folder: each step, and each way in which input can be bad."""
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import COMMAND, fails, refuses, run_cli

# The steps

def test_help_names_every_command():
    text = run_cli('--help').stdout
    for command in ('demo','index','explore','deidentify','preprocess','verify','train','evaluate','predict',
            'explain'):
        assert command in text
        assert ('--out' in run_cli(command, '--help').stdout)==(command!='verify')


def test_index_lists_good_and_bad_files(hospital, tmp_path):
    done = run_cli('index', hospital/'dicom', '--out', tmp_path/'index.parquet')
    table = pd.read_parquet(tmp_path/'index.parquet')
    truth = pd.read_csv(hospital/'dicom/truth.csv', keep_default_na=False)
    assert len(table)>=len(truth)
    bad = table[table.error!='']
    assert len(bad)>0 and 'could not be used' in done.stdout
    assert set(table[table.error==''].SOPInstanceUID)>=set(truth[truth.broken==''].image_id)


def test_index_again_reads_what_has_changed(hospital, tmp_path):
    first = run_cli('index', hospital/'dicom', '--out', tmp_path/'index.parquet').stdout
    before = pd.read_parquet(tmp_path/'index.parquet')
    assert run_cli('index', hospital/'dicom', '--out', tmp_path/'index.parquet').stdout==first
    assert pd.read_parquet(tmp_path/'index.parquet').equals(before)


def test_explore_writes_a_page_without_identifiers(hospital, tmp_path):
    truth = pd.read_csv(hospital/'dicom/truth.csv', keep_default_na=False)
    labels = truth[['image_id', 'fractured']]
    labels.to_csv(tmp_path/'labels.csv', index=False)
    done = run_cli('explore', hospital/'dicom', '--out', tmp_path/'page.html', '--labels',
        tmp_path/'labels.csv')
    page = (tmp_path/'page.html').read_text()
    assert f'{len(truth)} files' in done.stdout and 'data:image' in page and 'fractured' in page
    assert not any(i in page for i in {*truth.patient_id, *truth.image_id} - {''})


def test_deidentify_copies_without_names(hospital, tmp_path):
    truth = pd.read_csv(hospital/'dicom/truth.csv', keep_default_na=False)
    some = hospital/'dicom'/Path(truth[truth.broken==''].path.iloc[0]).parts[0]
    run_cli('deidentify', some, '--out', tmp_path/'one', '--key', tmp_path/'key', '--retain',
        'dates_modified')
    run_cli('deidentify', some, '--out', tmp_path/'two', '--key', tmp_path/'key', '--retain',
        'dates_modified')
    files = [sorted(p.relative_to(tmp_path/k) for p in (tmp_path/k).rglob('*.dcm')) for k in ('one', 'two')]
    assert files[0]==files[1] and files[0]
    names = {str(v) for v in truth.patient_id} | set(truth.image_id) - {''}
    for f in files[0]:
        data = (tmp_path/'one'/f).read_bytes()
        assert not any(v.encode() in data for v in names if v) and not any(v in str(f) for v in names if v)
    assert fails('deidentify', some, '--out', tmp_path/'one')


def test_preprocess_stores_the_readable_and_lists_the_others(hospital, store):
    from radiology_ai.preprocess.places import film_id
    from radiology_ai.preprocess.store import ImageStore
    s = ImageStore(store)
    truth = pd.read_csv(hospital/'dicom/truth.csv', keep_default_na=False)
    assert set(s.index.image_id.map(film_id))==set(truth[truth.broken==''].image_id)
    assert set(s.errors.path)=={str(hospital/'dicom'/p) for p in truth[truth.broken!=''].path}
    assert (s.errors.cause.str.len()>0).all()


def test_preprocess_notices_what_has_changed(hospital, tmp_path):
    from radiology_ai.preprocess.store import ImageStore
    truth = pd.read_csv(hospital/'dicom/truth.csv', keep_default_na=False)
    films = [hospital/'dicom'/p for p in truth[truth.broken==''].path[:7]]
    (tmp_path/'films').mkdir()
    for k, f in enumerate(films[:6]): shutil.copy(f, tmp_path/f'films/{k}.dcm')
    words = ['preprocess', tmp_path/'films', '--recipe', 'plain', '--size', 32, '--bits', 16, '--shard-size',
        2, '--workers', 1, '--out', tmp_path/'store']
    run_cli(*words)
    before = ImageStore(tmp_path/'store')
    assert before.recipe.bits==16 and before[0].dtype=='uint16' and before.index.shard.max()==2
    first = before.index.image_id[0]
    shutil.copy(films[6], tmp_path/'films/0.dcm')
    assert '--update' in fails(*words) and 'made of other files' in fails(*words)
    assert list(ImageStore(tmp_path/'store').index.image_id)==list(before.index.image_id)
    run_cli(*words, '--update')
    after = ImageStore(tmp_path/'store')
    assert first not in set(after.index.image_id) and len(after)==6 and '6 images' in run_cli('verify',
        tmp_path/'store').stdout
    assert 'bits are 12' in fails(*words[:-4], '--bits', 12, '--out', tmp_path/'other')


def test_verify_finds_a_flipped_bit_and_content_mends_it(hospital, store, tmp_path):
    shutil.copytree(store, tmp_path/'store')
    assert 'all as written' in run_cli('verify', tmp_path/'store').stdout
    shard = tmp_path/'store/shards/00001.npy'
    data = shard.read_bytes()
    shard.write_bytes(data[:3000] + bytes([data[3000]^1]) + data[3001:])
    line = fails('verify', tmp_path/'store')
    assert '00001.npy' in line and 'not those that were written' in line and 'content' in line
    words = ['preprocess', hospital/'dicom', '--recipe', 'knee', '--size', 64, '--out', tmp_path/'store']
    run_cli(*words) # sizes and times are as they were
    fails('verify', tmp_path/'store')
    run_cli(*words, '--content')
    run_cli('verify', tmp_path/'store')
    assert shard.read_bytes()==data
    assert 'no image store' in fails('verify', tmp_path/'nowhere')


def test_train_evaluate_predict_explain(hospital, run, tmp_path):
    assert (run/'model/model.safetensors').exists() and (run/'model/bundle.json').exists()
    done = run_cli('evaluate', run, '--out', tmp_path/'evaluation')
    page = (tmp_path/'evaluation/report.html').read_text()
    assert 'AUROC' in done.stdout and 'AUROC' in page and 'data:image' in page
    run_cli('predict', run/'model', hospital/'dicom', '--out', tmp_path/'predictions.csv')
    table = pd.read_csv(tmp_path/'predictions.csv', keep_default_na=False)
    truth = pd.read_csv(hospital/'dicom/truth.csv', keep_default_na=False)
    assert set(table.path)=={str(hospital/'dicom'/p) for p in truth.path}
    good = table[table.error=='']
    assert good.score.astype(float).between(0, 1).all() and len(good)>30
    assert (table[table.error!=''].score=='').all()
    one = hospital/'dicom'/truth[(truth.broken=='') & (truth.body_part=='KNEE')].path.iloc[0]
    run_cli('explain', run, one, '--out', tmp_path/'heat')
    assert len(list((tmp_path/'heat').glob('*.png')))==1


def test_prediction_of_a_file_equals_the_stored_image(hospital, run, tmp_path):
    held_out = pd.read_csv(run/'predictions.csv')
    held_out = held_out[held_out.split=='test'].head(3)
    run_cli('predict', run, *held_out.path, '--out', tmp_path/'three.csv')
    table = pd.read_csv(tmp_path/'three.csv').set_index('image_id').loc[held_out.image_id]
    assert (table.score.to_numpy() - held_out.score.to_numpy()).__abs__().max()<1e-4


def test_no_patient_crosses_a_split(run):
    manifest = pd.read_csv(run/'manifest.csv')
    assert manifest.groupby('patient_id').split.nunique().max()==1
    assert set(manifest.split)=={'train','valid','test'}


def test_cross_validation_predicts_every_image_once(hospital, store, tmp_path):
    run_cli('train', 'knee', '--data', store, '--labels', hospital/'labels.csv', '--out', tmp_path/'cv',
        '--arch', 'resnet10t', '--epochs', 1,
        '--bs', 16, '--folds', 3, '--no-pretrained')
    predictions = pd.read_csv(tmp_path/'cv/predictions.csv')
    tested = predictions[predictions.split=='test']
    assert tested.image_id.is_unique and set(tested.fold)=={0, 1, 2}
    assert tested.groupby('patient_id').fold.nunique().max()==1
    assert set(tested.image_id)==set(pd.read_csv(tmp_path/'cv/manifest.csv').image_id)


def test_a_killed_preprocessing_resumes(hospital, store, tmp_path):
    words = [COMMAND, 'preprocess', hospital/'dicom', '--recipe', 'knee', '--size', '64', '--workers', '1',
        '--out', tmp_path/'store']
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (process.poll() is None and time.monotonic()<deadline
            and not list((tmp_path/'store').glob('**/*.npy'))):
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_cli(*words[1:])
    from radiology_ai.preprocess.store import ImageStore
    killed, whole = ImageStore(tmp_path/'store'), ImageStore(store)
    assert list(killed.index.image_id)==list(whole.index.image_id)
    assert all((killed[i]==whole[i]).all() for i in range(len(whole)))


# Bad input

def test_a_missing_or_empty_folder(tmp_path):
    assert '(path 1) does not exist' in fails('index', tmp_path/'nowhere', '--out', tmp_path/'i.parquet')
    (tmp_path/'empty').mkdir()
    for words in (['index', tmp_path/'empty', '--out', tmp_path/'i.parquet'],
            ['preprocess', tmp_path/'empty', '--out', tmp_path/'s']):
        assert 'holds no image files' in fails(*words)
    assert not (tmp_path/'i.parquet').exists() and not (tmp_path/'s').exists()


@pytest.mark.parametrize('kind,cause', [('text', 'not'), ('truncated', ''), ('no_pixels', 'pixel'),
    ('nothing', 'empty')])
def test_a_single_bad_file(hospital, run, tmp_path, kind, cause):
    truth = pd.read_csv(hospital/'dicom/truth.csv', keep_default_na=False)
    good = (hospital/'dicom'/truth[(truth.broken=='') & (truth.body_part=='KNEE')].path.iloc[0]).read_bytes()
    bad = tmp_path/f'{kind}.dcm'
    if kind=='text': bad.write_text('This is a letter.')
    if kind=='truncated': bad.write_bytes(good[:len(good)//2])
    if kind=='nothing': bad.write_bytes(b'')
    if kind=='no_pixels':
        import pydicom
        ds = pydicom.dcmread(hospital/'dicom'/truth[(truth.broken=='')
            & (truth.body_part=='KNEE')].path.iloc[0])
        del ds.PixelData
        ds.save_as(bad)
    line = refuses('predict', run, bad, '--out', tmp_path/'p.csv')
    assert 'file 1: ' in line and bad.name not in line and cause in line.lower()
    assert bad.name in refuses('predict', run, bad, '--out', tmp_path/'p.csv', '--names')
    assert not (tmp_path/'p.csv').exists()


def train_words(hospital, store, out):
    return ['train', 'knee', '--data', store, '--labels', hospital/'labels.csv', '--out', out, '--arch',
        'resnet10t', '--no-pretrained']


def test_bad_labels(hospital, store, tmp_path):
    words = train_words(hospital, store, tmp_path/'run')
    line = fails(*words, '--label', 'broken_bone')
    assert 'broken_bone' in line and 'schatzker' in line
    labels = pd.read_csv(hospital/'labels.csv')
    for name, table, expected in [('one_class', labels.assign(fractured=0), 'class'),
            ('strange', labels.assign(fractured='maybe'), 'maybe'),
                                  ('others', labels.assign(image_id=[f'1.2.{i}' for i in range(len(labels))],
                                  path=[f'elsewhere/{i}.dcm' for i in range(len(labels))]), 'None of the'),
                                  ('twice', pd.concat([labels, labels.assign(fractured=1-labels.fractured)]),
                '2 times')]:
        table.to_csv(tmp_path/f'{name}.csv', index=False)
        again = [tmp_path/f'{name}.csv' if w==hospital/'labels.csv' else w for w in words]
        assert re.search(expected, refuses(*again)), name
    assert 'no_labels.csv' in refuses(*[tmp_path/'no_labels.csv' if w==hospital/'labels.csv' else w
        for w in words])
    assert not (tmp_path/'run').exists()


def test_bad_store_model_and_output(hospital, store, run, tmp_path):
    words = train_words(hospital, store, run)
    assert '--overwrite' in refuses(*words)
    assert 'no_store' in refuses(*train_words(hospital, tmp_path/'no_store', tmp_path/'r'))
    assert 'resnet10t' in refuses(*[w if w!='resnet10t' else 'resnet10tt'
        for w in train_words(hospital, store, tmp_path/'r')])
    shutil.copytree(run/'model', tmp_path/'model')
    with open(tmp_path/'model/model.safetensors', 'r+b') as f: f.truncate(1000)
    assert 'model' in refuses('predict', tmp_path/'model', hospital/'dicom', '--out', tmp_path/'p.csv')
    (tmp_path/'model/bundle.json').write_text('{')
    assert 'bundle.json' in refuses('predict', tmp_path/'model', hospital/'dicom', '--out', tmp_path/'p.csv')
    assert 'nothing_here' in fails('predict', tmp_path/'nothing_here', hospital/'dicom', '--out',
        tmp_path/'p.csv')
    assert not (tmp_path/'p.csv').exists() and not (tmp_path/'r').exists()


def test_debug_shows_the_traceback(tmp_path):
    done = run_cli('index', tmp_path/'nowhere', '--out', tmp_path/'i.parquet', '--debug', check=False)
    assert done.returncode!=0 and 'Traceback' in done.stderr


# Real radiographs

@pytest.mark.parametrize('folder', ['dicom','dicom_edge'])
def test_real_dicom_folders_are_read_or_listed(real_data, run, tmp_path, folder):
    files = sorted(p.name for p in (real_data/folder).glob('*.dcm'))
    run_cli('index', real_data/folder, '--out', tmp_path/'index.parquet')
    table = pd.read_parquet(tmp_path/'index.parquet')
    assert set(files)<=set(table.path.map(lambda p: Path(p).name))
    run_cli('preprocess', real_data/folder, '--recipe', 'plain', '--size', 128, '--out', tmp_path/'store')
    from radiology_ai.preprocess.store import ImageStore
    s = ImageStore(tmp_path/'store')
    stored, listed = ({Path(p).name for p in t.path} for t in (s.index, s.errors))
    assert set(files)==(stored | listed) & set(files) and not stored & listed
    assert {f for f in files if 'badhuff' in f}<=listed
    run_cli('predict', run, real_data/folder, '--out', tmp_path/'p.csv', check=False)
    if (tmp_path/'p.csv').exists():
        p = pd.read_csv(tmp_path/'p.csv', keep_default_na=False)
        assert set(files)<=set(p.path.map(lambda p: Path(p).name)) and ((p.score!='') | (p.error!='')).all()
