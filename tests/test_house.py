"""The house keeps its own rules: floors, metadata stated once, a light import, notebooks and modules in
step."""
import ast
import configparser
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type']=='code']


def exported_module(notebook: Path) -> str|None:
    "The module that a notebook exports, such as `preprocess.knee`."
    found = re.search(r'#\|\s*default_exp\s+(\S+)', '\n'.join(code_cells(notebook)))
    return found[1] if found else None


def library_imports(source: str) -> set[str]:
    "The modules of this library which a cell imports."
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(('%','!'))]
    found = set()
    for node in ast.walk(ast.parse('\n'.join(lines))):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('radiology_ai'):
            found |= {f'{node.module}.{a.name}'.removeprefix('radiology_ai.')
                for a in node.names} | {node.module.removeprefix('radiology_ai.')}
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix('radiology_ai.') for a in node.names
                if a.name.startswith('radiology_ai.')}
    return found


MODULES = {m: nb for nb in NOTEBOOKS if (m:=exported_module(nb))}


def test_every_module_has_its_notebook():
    written = {'.'.join(p.relative_to(ROOT/'radiology_ai').with_suffix('').parts)
        for p in (ROOT/'radiology_ai').rglob('*.py')}
    assert {m for m in written if not m.endswith('__init__') and m!='_modidx'}==set(MODULES)


def test_notebook_name_is_the_module_path():
    for module, nb in MODULES.items():
        assert re.fullmatch(r'\d+_' + re.escape(module), nb.stem), f'{nb.name} exports {module}'


@pytest.mark.parametrize('notebook', [nb for nb in NOTEBOOKS if nb.parent.name=='nbs' and nb.stem!='index'],
    ids=lambda p: p.stem)
def test_notebook_imports_only_from_lower_floors(notebook):
    number = notebook.stem.split('_')[0]
    for cell in code_cells(notebook):
        for name in library_imports(cell) & set(MODULES):
            other = MODULES[name]
            assert other==notebook or other.stem.split('_')[0]<number, f'{notebook.name} imports {name}, which stands in {other.name}'


def test_floor_check_sees_a_breach():
    assert library_imports('from radiology_ai.train.learner import xray_learner') >= {'learner'}
    assert library_imports('import radiology_ai.models.backbone as b')=={'models.backbone'}
    assert library_imports('from radiology_ai.models import backbone') >= {'models.backbone'}


def test_settings_and_pyproject_agree():
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    ini = ini['DEFAULT']
    project = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['project']
    version = re.search(r'__version__ = "(.+)"', (ROOT/'radiology_ai/__init__.py').read_text())[1]
    assert (project['name'], project['description'])==(ini['lib_name'], ini['description'])
    assert project['requires-python']=='>=' + ini['min_python']
    assert version==ini['version']
    assert (project['urls']['Repository'], project['urls']['Documentation'])==(ini['git_url'], ini['doc_url'])
    assert {'version', 'dependencies', 'optional-dependencies', 'license', 'authors', 'keywords', 'scripts',
        'entry-points'}<=set(project['dynamic'])


def test_import_is_light():
    "`import radiology_ai` loads neither torch nor any other dependency and takes under a second."
    heavy = ('torch','fastai','pandas','numpy','cv2','pydicom','matplotlib','timm','sklearn')
    code = f"import time; t=time.perf_counter(); import radiology_ai, sys; print([m for m in {heavy} if m in sys.modules], time.perf_counter()-t<1)"
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
        check=True).stdout
    assert out.strip()=='[] True'


@pytest.mark.parametrize('module', sorted(m for m in MODULES if MODULES[m].stem[0] in '0123'), ids=str)
def test_lower_floors_load_no_torch(module):
    if module=='data.load': pytest.skip('the DataLoaders are torch')
    code = f"import radiology_ai.{module}, sys; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
        check=True).stdout
    assert out.strip()=='False False'


def differences(a: Path, b: Path) -> list[str]:
    compared = filecmp.dircmp(a, b, ignore=['__pycache__'])
    found = [f'{a.name}/{f}' for f in compared.left_only + compared.right_only + compared.diff_files]
    return found + [d for name in compared.common_dirs for d in differences(a/name, b/name)]


def test_export_and_clean_leave_no_difference(tmp_path):
    for name in ('nbs','radiology_ai'):
        shutil.copytree(ROOT/name, tmp_path/name,
            ignore=shutil.ignore_patterns('__pycache__','.ipynb_checkpoints','.last_checked'))
    for name in ('pyproject.toml','README.md'): shutil.copy(ROOT/name, tmp_path/name)
    tools = Path(sys.executable).parent
    for tool in ('nbdev-export','nbdev-clean'):
        subprocess.run([tools/tool], cwd=tmp_path, check=True, capture_output=True,
            env={**os.environ, 'PYTHONPATH': ''})
    assert differences(tmp_path/'radiology_ai', ROOT/'radiology_ai')==[]
    assert [d for d in differences(tmp_path/'nbs', ROOT/'nbs')
        if not d.endswith(('.last_checked','.ipynb_checkpoints'))]==[]


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_stay_small(notebook):
    assert notebook.stat().st_size<1_000_000
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        for output in cell.get('outputs', []):
            assert output.get('output_type')!='error', f'{notebook.name} was committed with a failing cell'
            for picture in ('image/png','image/jpeg'):
                assert len(output.get('data', {}).get(picture, ''))<140_000, 'a figure is over 100 kB'


def test_readme_is_the_index_notebook():
    subprocess.run([sys.executable, ROOT/'docs/readme.py', '--check'], check=True)


def test_ci_runs_readmes_test_command():
    commands = re.findall(r'```sh\n(.+?)\n```', (ROOT/'README.md').read_text(encoding='utf-8'), re.S)
    assert len(commands)>=2 and commands[1].strip() in (ROOT/'.ci/run').read_text(
        encoding='utf-8').splitlines()
