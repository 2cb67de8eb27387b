"""A fault of the program is told as what it is, and never blamed on a file; a user's script and folders are left
alone; a point is (x, y) everywhere."""
import re
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from radiology_ai.core import DicomError, own_fault, rng
from radiology_ai.dicom import codecs, deidentify, explore, file, index, quality, read, residue, still, stored
from radiology_ai.findings import Finding, Reading
from radiology_ai.phantom.chest import simulate_chest
from radiology_ai.phantom.hospital import simulate_hospital, write_dicom
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.phantom.limbs import simulate_hand, simulate_hip
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess import recipe, scale
from radiology_ai.preprocess.knee import locate_knees
from radiology_ai.serve.outputs import finding_picture

ROOT = Path(__file__).parents[1]


def unnamed(*args, **kwargs):
    "What a forgotten import does."
    return no_such_name  # noqa: F821  the fault that is planted


def unasserted(*args, **kwargs): raise AssertionError('an invariant is broken')


def misspelt(*args, **kwargs): return np.zeros(3).no_such_method()


def miscalled(*args, **kwargs): return own_fault()


def unimportable(*args, **kwargs):
    from radiology_ai.core import no_such_name
    return no_such_name


FAULTS = {unnamed: NameError, unasserted: AssertionError, misspelt: AttributeError, miscalled: TypeError,
    unimportable: ImportError}


@pytest.fixture
def film(tmp_path) -> Path:
    "One good film."
    write_dicom(tmp_path/'film.dcm', np.random.default_rng(0).random((64, 48)).astype(np.float32), bits=12)
    return tmp_path/'film.dcm'


@pytest.fixture
def picture(tmp_path) -> Path:
    "One good PNG."
    cv2.imwrite(str(tmp_path/'picture.png'), np.random.default_rng(0).integers(0, 255, (64, 48),
        dtype=np.uint8))
    return tmp_path/'picture.png'


def test_high_bit_that_contradicts(film):
    "BitsStored 12 and HighBit 3: told in a warning, and read all the same."
    import pydicom
    ds = pydicom.dcmread(film)
    ds.HighBit = 3
    ds.save_as(film)
    with pytest.warns(UserWarning, match='HighBit 3 is impossible with 12 bits'):
        r = read.read_radiograph(film)
    assert r.shape==(64, 48) and np.ptp(r.pixels)>.5


PLACES = { # module and name of a function of ours, and a call that comes by it
    'header': (file, '_read', lambda f, p: file.open_dicom(f)),
    'settled': (file, '_settle', lambda f, p: file.open_dicom(f)),
    'size': (file, 'pixel_limit', lambda f, p: file.open_dicom(f) and read.read_radiograph(f)),
    'bits': (stored, '_fit_bits', lambda f, p: read.read_radiograph(f)),
    'raw': (stored, '_raw_frame', lambda f, p: read.read_radiograph(f)),
    'grey': (read, '_grey_values', lambda f, p: read.read_radiograph(f)),
    'tags': (index, '_text_value', lambda f, p: index.index_row(f)),
    'index': (index, '_pixel_fault', lambda f, p: index.index_row(f)),
    'still': (still, '_grey', lambda f, p: read.read_radiograph(p)),
    'digest': (quality, 'decode_stored', lambda f, p: quality.pixel_digest(f)),
    'walk': (deidentify.Walk, '_element', lambda f, p: deidentify.deidentify(f, f.parent/'out', show=False)),
    'values': (deidentify.Walk, '_remember', lambda f, p: deidentify.deidentify(f, f.parent/'out',
    show=False)),
    'residue': (residue, 'words_of', lambda f, p: deidentify.deidentify(f, f.parent/'out', show=False)),
    'recipe': (recipe.Preprocess, 'apply', lambda f, p: recipe.prepare(recipe.Source(str(f)),
    recipe.recipe('plain'))),
    'record': (recipe, 'view', lambda f, p: recipe.prepare(recipe.Source(str(f)), recipe.recipe('plain'))),
    'explore': (quality, 'decode_stored', lambda f, p: explore.explore_dicoms(f, pixels='all', show=False)),
    'folder': (recipe.Preprocess, 'apply',
        lambda f, p: scale.preprocess_folder(f, f.parent/'store', 'plain', workers=1, show=False)),
}


@pytest.mark.parametrize('fault', FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize('place', PLACES)
def test_our_fault_is_told_as_it_is(place, fault, film, picture, monkeypatch):
    home, name, call = PLACES[place]
    monkeypatch.setattr(home, name, fault)
    with warnings.catch_warnings(), pytest.raises(FAULTS[fault]):
        warnings.simplefilter('ignore')
        call(film, picture)


@pytest.mark.parametrize('fault', FAULTS, ids=lambda f: f.__name__)
def test_our_fault_beside_a_decoder(fault, film, monkeypatch):
    "A compressed frame: the decoder is third-party, what calls it is ours."
    import pydicom
    ds = pydicom.dcmread(film)
    ds.compress(pydicom.uid.RLELossless)
    ds.save_as(film)
    assert read.read_radiograph(film).codec=='imagecodecs.packbits'
    monkeypatch.setattr(codecs, '_rle', fault)
    with pytest.raises(FAULTS[fault]): read.read_radiograph(film)


class FaultyRecipe(recipe.Preprocess):
    "A recipe with a fault, in whatever process it runs."
    def apply(self, r): return unnamed()


def test_our_fault_in_a_worker(tmp_path):
    "It crosses to this process, and a note says where it was."
    for i in range(8):
        cv2.imwrite(str(tmp_path/f'{i}.png'), np.random.default_rng(i).integers(0, 255, (40, 50),
            dtype=np.uint8))
    with pytest.raises(NameError, match='no_such_name') as e:
        scale.preprocess_folder(tmp_path, tmp_path/'store', FaultyRecipe(size=16), workers=2, show=False)
    assert 'unnamed' in '\n'.join(e.value.__notes__)


def raised(fn, *args) -> Exception:
    try: fn(*args)
    except Exception as e: return e


def test_a_fault_of_the_file_is_none_of_ours():
    "What parsers and values of a header raise, also of the types that a slip of ours would have."
    import pydicom
    ds = pydicom.Dataset()
    assert not own_fault(raised(lambda: ds.LUTDescriptor)) # AttributeError in pydicom
    assert not own_fault(raised(lambda: int(['1', '2']))) # TypeError by a value
    assert not own_fault(raised(lambda: None.upper())) # a header's value that is not there
    assert not own_fault(raised(lambda: ['A'].upper()))
    assert not own_fault(raised(int, 'ten')) and not own_fault(raised(lambda: [][0]))
    assert not own_fault(raised(pydicom.dcmread, '/dev/null'))
    assert not own_fault(DicomError('a.dcm', 'it is damaged')) and not own_fault(MemoryError())


def run_script(folder, text) -> subprocess.CompletedProcess:
    (folder/'go.py').write_text(text)
    return subprocess.run([sys.executable, 'go.py'], cwd=folder, capture_output=True, text=True, timeout=240,
        env={'PYTHONPATH': str(ROOT), 'PATH': '/usr/bin:/bin', 'OMP_NUM_THREADS': '1'})


def pictures(folder, n=9):
    folder.mkdir()
    for i in range(n):
        cv2.imwrite(str(folder/f'{i}.png'), np.random.default_rng(i).integers(0, 255, (40, 50),
            dtype=np.uint8))


def test_a_script_without_guard(tmp_path):
    "Workers do not run the user's script: it says its line once, and nothing is complained of."
    pictures(tmp_path/'films')
    done = run_script(tmp_path, "print('a line of the script')\n"
        "from radiology_ai.preprocess.scale import preprocess_folder\n"
        "print(len(preprocess_folder('films', 'store', 'plain', workers=2, show=False)))\n")
    assert (done.returncode, done.stdout.splitlines())==(0, ['a line of the script', '9']), done.stderr
    assert done.stderr==''


def test_a_script_with_its_own_recipe(tmp_path):
    "What workers need of the script is in it: then it is imported, under another name than __main__."
    pictures(tmp_path/'films')
    done = run_script(tmp_path, "from radiology_ai.preprocess.scale import preprocess_folder\n"
        "from radiology_ai.preprocess.store import Preprocess\n"
        "class Mine(Preprocess): pass\n"
        "if __name__=='__main__':\n    print(len(preprocess_folder('films', 'store', Mine(size=16), workers=2, show=False)))\n")
    assert (done.returncode, done.stdout)==(0, '9\n'), done.stderr


def test_processes_of_the_user_are_as_before(tmp_path):
    "While workers start, and after, other processes still get their script."
    done = run_script(tmp_path,
        "import math, multiprocessing, threading\nfrom radiology_ai.parallel import run_parallel\n"
        "def twice(x): return 2*x\n"
        "def pool(out): out += multiprocessing.get_context('spawn').Pool(1).map(twice, [1, 2])\n"
        "if __name__=='__main__':\n"
        "    out, t = [], None\n"
        "    t = threading.Thread(target=pool, args=(out,)); t.start()\n"
        "    print(list(run_parallel(math.isqrt, [4]*9, workers=2, show=False)))\n"
        "    t.join(); pool(out); print(out)\n")
    assert (done.returncode, done.stdout)==(0, f'{[2]*9}\n[2, 4, 2, 4]\n'), done.stderr


@pytest.mark.parametrize('kind', ['folder', 'file'])
def test_a_folder_named_dl(tmp_path, kind):
    "gdcm does `import dl`, once a module of Python 2: it must not get the user's."
    if kind=='folder': (tmp_path/'dl').mkdir()
    else: (tmp_path/'dl.py').write_text("print('run')\n")
    done = run_script(tmp_path, "import sys\nimport radiology_ai.dicom.read, gdcm\n"
        "assert 'dl' not in sys.modules and 'gdcm' not in [getattr(f, 'name', '') for f in sys.meta_path]\n"
        "import dl\nprint(gdcm.Version.GetVersion()>'3', dl.__name__)\n")
    assert (done.returncode, done.stdout.splitlines()[-1:])==(0, ['True dl']), done.stderr


def test_a_second_opinion_beside_a_folder_named_dl(tmp_path, film):
    "The child process that holds gdcm does not look in the working directory either."
    import pydicom
    ds = pydicom.dcmread(film)
    ds.compress(pydicom.uid.RLELossless)
    ds.save_as(film)
    (tmp_path/'dl').mkdir()
    (tmp_path/'imagecodecs.py').write_text("raise RuntimeError('the wrong module')\n") # in the child only
    done = run_script(tmp_path,
        "import sys\nhere = sys.path.pop(0)\nfrom radiology_ai.dicom.read import read_radiograph\n"
        f"print(read_radiograph({str(film)!r}, verify=True).codec)\n")
    assert (done.returncode, done.stdout)==(0, 'imagecodecs.packbits + gdcm\n'), done.stderr


def test_a_table_that_is_no_index(tmp_path, monkeypatch):
    (tmp_path/'index.parquet').write_text('nonsense')
    with pytest.raises(Exception, match='not a readable parquet file'):
        index.read_index(tmp_path/'index.parquet')
    monkeypatch.setattr(index, 'read_parquet', unnamed)
    with pytest.raises(NameError): index.read_index(tmp_path/'index.parquet')


def test_a_knee_off_the_diagonal():
    "Right of the middle and above it, on a film as stored and on its mirror image."
    p = simulate_knee(4, fov=220, dx=.16, dy=-.12)
    x, y = p.points['joint']
    assert x>.6*p.shape[1] and y<.45*p.shape[0]
    film = expose(p, rng(4), collimate=False).radiograph()
    for r, at in ((film, (x, y)), (film.flip(), (p.shape[1]-x, y))):
        knee, = locate_knees(r)
        x1, y1, x2, y2 = knee.box
        assert np.hypot(*np.subtract(knee.center, at))*p.spacing<5
        assert np.allclose(((x1+x2)/2, (y1+y2)/2), knee.center)
    assert np.allclose(p.mirrored().points['joint'], (p.shape[1]-x, y))


def test_points_of_other_bodies():
    "Above and below are told by y, the patient's left and right by x."
    chest, hand, hip = simulate_chest(3, size=256), simulate_hand(3, size=256), simulate_hip(3, size=256)
    for side in ('right', 'left'):
        (x, y), (x2, y2) = chest.points[f'{side}_apex'], chest.points[f'{side}_costophrenic']
        assert y<y2 and chest.masks[f'{side}_lung'][int(y)+4, int(x)] and (x2<x)==(side=='right')
    assert hand.points['tip3'][1]<hand.points['mcp3'][1]<hand.points['wrist'][1]
    x, y = hip.points['head']
    assert x<hip.points['symphysis'][0] and hip.masks['femur'][int(y), int(x)]


def test_a_point_of_a_phantom_is_drawn_at_its_place():
    "On a wide film, where rows taken for columns would fall elsewhere."
    p = simulate_knee(3, 1, 'L', bilateral=True, size=320)
    film, at = expose(p, rng(3)).radiograph(), np.array([p.points['joint'], p.points['joint_other']])
    bare, drawn = (finding_picture(film, Reading('', findings=found)) for found in
        ((), (Finding('joint', .1, False, points=at),)))
    rows, cols = np.nonzero((bare!=drawn).any(-1))
    f, right = 768/p.shape[0], cols>drawn.shape[1]/2
    for (x, y), half in zip(at, (right, ~right)):
        assert np.allclose((cols[half].mean(), rows[half].mean()), (x*f, y*f), atol=1)


def test_the_truth_of_a_hospital_is_x_and_y(tmp_path):
    "The place of a joint in the stored file, as the localiser finds it."
    truth = simulate_hospital(tmp_path, n=8, size=192, seed=2, workers=1)
    knees = truth[(truth.body_part=='KNEE') & (truth.broken=='')]
    off = [min((np.hypot(k.center[0]-t.joint_x, k.center[1]-t.joint_y)*t.spacing_mm for k in
        locate_knees(read.read_radiograph(tmp_path/t.path))), default=np.inf) for t in knees.itertuples()]
    assert len(off)>=5 and np.median(off)<3


def test_only_spacings_are_row_and_column():
    "DICOM gives millimetres as (row, column); nothing else in the package is told in that order."
    lines = [(f.name, line) for f in (ROOT/'radiology_ai').rglob('*.py')
        for line in f.read_text().splitlines()]
    assert [o for o in lines if re.search(r'\(row, col(umn)?\)', o[1])
        and not re.search('mm|illimetre', o[1])]==[]
