"""Nobody's files are replaced: where a file is written that a user has named, or beside it, only what this library wrote there
before is; everything else is refused by name and stays as it is, to the byte."""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from radiology_ai.core import PAGE, DataError, RadiologyError, StoreError, check_replaced, save_picture
from radiology_ai.dicom.explore import explore_dicoms
from radiology_ai.dicom.index import check_index, index_dicoms, write_index
from radiology_ai.dicom.write import save_result
from radiology_ai.names import write_unreadable
from radiology_ai.phantom.hospital import write_dicom
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.report.page import write_report
from radiology_ai.serve.align import align_folder
from radiology_ai.serve.export import export_onnx
from radiology_ai.serve.outputs import Answered, write_outputs
from radiology_ai.serve.predict import explain, predict
from radiology_ai.tasks.pneumothorax import save_siim

GREY = np.linspace(0, 1, 64*64, dtype=np.float32).reshape(64, 64)
BAD = pd.DataFrame({'number': [1], 'path': ['a'], 'cause': ['b']})
BUNDLE = Path(__file__).parent/'data/bundles/knee_resnet'
TABLE = pd.DataFrame({'path': ['a'], 'image_id': ['1'], 'patient_id': ['P'], 'error': [''], 'remedy': ['']})


@pytest.fixture(scope='module')
def films(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('films')
    write_dicom(folder/'a.dcm', GREY, bits=12, header=dict(PatientID='P1', SOPInstanceUID='1.2.9.1'))
    return folder


def contents(folder): return {p.name: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


WRITERS = {'x.html': lambda d, films: explore_dicoms(films, workers=1).to_html(d/'x.html'),
    'film.dcm': lambda d, films: explore_dicoms(films, workers=1).to_html(d/'film.dcm'),
    'p.csv': lambda d, films: write_outputs(Answered('toy', TABLE, []), d/'p.csv'),
    'p.json': lambda d, films: write_outputs(Answered('toy', TABLE, []), d/'p.csv', ['csv', 'json']),
    'p.unreadable.csv': lambda d, films: write_unreadable(d/'p.csv', BAD),
    'i.parquet': lambda d, films: write_index(index_dicoms(films, workers=1), d/'i.parquet'),
    's.csv': lambda d, films: save_siim(pd.DataFrame({'image_id': ['1'], 'rle': ['1 3']}), d/'s.csv'),
    'knee.onnx': lambda d, films: export_onnx(BUNDLE, d/'knee.onnx'),
    '0001.png': lambda d, films: save_picture(d/'0001.png', np.zeros((8, 8), np.uint8))}


@pytest.mark.parametrize('name', WRITERS)
def test_a_file_of_somebody_is_refused_by_name_and_ours_is_replaced(name, films, tmp_path):
    mine = (films/'a.dcm').read_bytes() if name=='film.dcm' else b'thesis,of,three years\n'
    (tmp_path/name).write_bytes(mine)
    with pytest.raises(RadiologyError, match=f'{name} is there already.*nothing of yours'):
        WRITERS[name](tmp_path, films)
    assert (tmp_path/name).read_bytes()==mine
    (tmp_path/name).write_bytes(b'') # as `touch` makes it
    for _ in range(2): WRITERS[name](tmp_path, films)
    assert (tmp_path/name).stat().st_size


@pytest.mark.parametrize('name', ['gallery.html', 'poses.csv'])
def test_aligned_films_replace_nothing_of_others(name, films, tmp_path):
    model = Path(__file__).parent/'data/bundles/alignment_resnet'
    (tmp_path/name).write_text('mine')
    with pytest.raises(RadiologyError, match=f'{name} is there already'):
        align_folder(model, films, tmp_path, size=32, workers=1, show=False)
    assert contents(tmp_path)=={name: b'mine'}
    (tmp_path/name).unlink()
    for _ in range(2): align_folder(model, films, tmp_path, size=32, workers=1, show=False)
    assert {'gallery.html', 'poses.csv', '0001.png'}<=set(contents(tmp_path))


@pytest.mark.slow
def test_predictions_replace_nothing_of_others(hospital, run, tmp_path):
    "It is said before a model has worked for hours, where the name of the file tells it."
    film = next(p for p in sorted((hospital/'dicom').rglob('*')) if p.is_file() and p.stat().st_size>20_000)
    for name in ('p.csv', 'p.json', 'heat.csv'): (tmp_path/name).write_text('mine')
    before = contents(tmp_path)
    for to in ('csv', 'json'):
        with pytest.raises(RadiologyError, match=f'p.{to} is there already'):
            predict(run, hospital/'nowhere', out=tmp_path/'p.csv', to=[to], workers=1)
    with pytest.raises(RadiologyError, match='heat.csv is there already'): explain(run, film, tmp_path, workers=1)
    assert contents(tmp_path)==before


def test_a_film_in_the_place_of_a_result_stays(films, tmp_path):
    import pydicom
    ds = pydicom.dcmread(films/'a.dcm')
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = '1.2.9.2'
    ds.Manufacturer, ds.SOPClassUID = 'this library', '1.2.840.10008.5.1.4.1.1.88.33'
    (tmp_path/'0001_sr.dcm').write_bytes((films/'a.dcm').read_bytes())
    before = contents(tmp_path)
    with pytest.raises(RadiologyError, match='0001_sr.dcm is there already'): save_result(ds, tmp_path/'0001_sr.dcm')
    (tmp_path/'0002_sr.dcm').write_text('thesis')
    with pytest.raises(RadiologyError, match='0002_sr.dcm is there already'): save_result(ds, tmp_path/'0002_sr.dcm')
    assert contents(tmp_path)==before | {'0002_sr.dcm': b'thesis'}
    assert save_result(ds, tmp_path/'0003_sr.dcm') and not save_result(ds, tmp_path/'0003_sr.dcm')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes')
def test_what_is_no_file_is_not_replaced(tmp_path):
    "A device would be gone for everybody."
    os.mkfifo(tmp_path/'pipe')
    (tmp_path/'folder').mkdir()
    (tmp_path/'link').symlink_to('nowhere')
    for name in ('pipe', 'folder', 'link'):
        with pytest.raises(RadiologyError, match=f'{name} is there already'): check_replaced(tmp_path/name, PAGE)
    with pytest.raises(RadiologyError, match='null is there already'): check_replaced('/dev/null', PAGE)


def test_a_picture_says_who_made_it_and_is_the_same(tmp_path):
    import cv2
    from PIL import Image
    for pixels in (np.arange(64, dtype=np.uint8).reshape(8, 8), np.arange(192, dtype=np.uint8).reshape(8, 8, 3)):
        save_picture(tmp_path/'p.png', pixels)
        assert (np.array(Image.open(tmp_path/'p.png'))==pixels).all()
        assert Image.open(tmp_path/'p.png').info=={'Software': 'radiology_ai'}
        assert cv2.imread(str(tmp_path/'p.png'), cv2.IMREAD_UNCHANGED).shape==pixels.shape


@pytest.mark.parametrize('name', ['mine.html', 'mine.json'])
def test_a_report_in_the_place_of_a_page_of_others(name, tmp_path):
    (tmp_path/name).write_text('<html>mine</html>')
    with pytest.raises(RadiologyError, match=f'{name} is there already'):
        write_report(tmp_path/'mine.html', title='a', task='b', table=TABLE, labels=[])
    assert contents(tmp_path)=={name: b'<html>mine</html>'}


def test_a_table_of_somebody_is_no_index(films, tmp_path):
    pd.DataFrame({'path': ['a'], 'error': ['']}).to_parquet(tmp_path/'mine.parquet')
    (tmp_path/'link.parquet').symlink_to('nowhere')
    before = (tmp_path/'mine.parquet').read_bytes()
    for name in ('mine.parquet', 'link.parquet'):
        with pytest.raises(DataError, match=f'{name} is there already.*nothing of yours'): check_index(tmp_path/name)
        with pytest.raises(DataError, match='is no readable index'): write_index(pd.DataFrame(), tmp_path/name)
    assert (tmp_path/'mine.parquet').read_bytes()==before and (tmp_path/'link.parquet').is_symlink()


def test_a_folder_with_a_recipe_of_somebody_is_no_store(films, tmp_path):
    (tmp_path/'recipe.json').write_text('{"flour": 500}')
    (tmp_path/'thesis.txt').write_text('mine')
    before = contents(tmp_path)
    with pytest.raises(StoreError, match='recipe.json is damaged, or of something else.*Give a new folder'):
        preprocess_folder(films, tmp_path, 'plain', workers=1, show=False)
    assert contents(tmp_path)==before and not (tmp_path/'shards').exists()
