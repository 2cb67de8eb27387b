"""The house keeps its own rules: floors, the form of the code (rules.py), metadata stated once, light imports,
notebooks and modules in step."""
import ast
import configparser
import filecmp
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import quick
import rules
from conftest import COMMAND, pace

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
WRITTEN = sorted(p for p in (ROOT/'radiology_ai').rglob('*.py') if p.name!='_modidx.py')
SCRIPTS = sorted([ROOT/'setup.py', *(p for d in ('tests','docs','benchmarks')
    for p in (ROOT/d).glob('*.py'))])


def exported_module(notebook: Path) -> str|None:
    "The module that a notebook exports, such as `preprocess.knee`."
    found = re.search(r'#\|\s*default_exp\s+(\S+)', '\n'.join(rules.code_cells(notebook)))
    return found[1] if found else None


def library_imports(source: str) -> set[str]:
    "The modules of this library which a cell imports."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('radiology_ai'):
            found |= {f'{node.module}.{a.name}'.removeprefix('radiology_ai.')
                for a in node.names} | {node.module.removeprefix('radiology_ai.')}
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix('radiology_ai.') for a in node.names
                if a.name.startswith('radiology_ai.')}
    return found


MODULES = {m: nb for nb in NOTEBOOKS if (m:=exported_module(nb))}


def missing_names(source: str) -> list:
    "What a script wants from a module of the library that has no such name."
    wanted = [(n.module, a.name) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and not n.level
        and (n.module or '').split('.')[0]=='radiology_ai' for a in n.names]
    modules = {m.__name__: m for m in map(importlib.import_module, {m for m, _ in wanted})}
    return [f'{m}.{name}' for m, name in wanted if not hasattr(modules[m], name)
        and not any((ROOT/m.replace('.', '/')).glob(f'{name}*'))]


def test_scripts_import_what_is_there():
    assert missing_names('from radiology_ai.core import rng, nothing\nfrom radiology_ai import dicom')==[
        'radiology_ai.core.nothing']
    for p in [*(ROOT/'benchmarks').glob('*.py'), *(ROOT/'docs').glob('*.py')]:
        assert not missing_names(p.read_text()), p


def hidden_by(stems) -> list:
    "Those names of scripts that hide a package or a module of Python from whoever has the folder on its path."
    taken = {*packages_distributions(), *sys.stdlib_module_names} - {'build'} # this one builds packages, and nobody imports it
    return sorted(taken & set(stems))


def test_no_script_hides_a_package():
    assert hidden_by(['torch', 'json', 'house_of_nobody'])==['json', 'torch']
    assert not hidden_by(p.stem for p in SCRIPTS)


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
    for cell in rules.code_cells(notebook):
        for name in library_imports(cell) & set(MODULES):
            other = MODULES[name]
            assert other==notebook or other.stem.split('_')[0]<number, (
                f'{notebook.name} imports {name}, which stands in {other.name}')


def test_floor_check_sees_a_breach():
    assert library_imports('from radiology_ai.train.learner import xray_learner') >= {'train.learner'}
    assert library_imports('import radiology_ai.models.backbone as b')=={'models.backbone'}
    assert library_imports('from radiology_ai.models import backbone') >= {'models.backbone'}


# The form of the code

def breaches(rule, sources: list[tuple[str, str]]) -> list[str]:
    "What a rule finds in these sources, with the file before it."
    return [f'{name}: {found}' for name, source in sources for found in rule(source)]


def modules() -> list[tuple[str, str]]:
    return [(str(p.relative_to(ROOT)), p.read_text(encoding='utf-8')) for p in WRITTEN]


def scripts() -> list[tuple[str, str]]:
    return [(str(p.relative_to(ROOT)), p.read_text(encoding='utf-8')) for p in SCRIPTS]


def cells() -> list[tuple[str, str]]:
    return [(f'{p.name}, code cell {i}', c) for p in NOTEBOOKS for i, c in enumerate(rules.code_cells(p))]


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--output-format', 'concise', '.'],
        cwd=ROOT,
        capture_output=True, text=True)
    assert done.returncode==0, done.stdout + done.stderr


def test_ruff_sees_a_breach(tmp_path):
    settings = tmp_path/'pyproject.toml'
    shutil.copy(ROOT/'pyproject.toml', settings)
    (tmp_path/'plain.py').write_text('def f(path):\n    warnings.warn(path)\n')
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', tmp_path], cwd=tmp_path,
        capture_output=True,
        text=True)
    assert done.returncode==1 and 'F821' in done.stdout and 'warnings' in done.stdout


def test_lines_are_short():
    assert breaches(rules.long_lines, cells() + scripts())==[]
    lengths = [len(line) for _, source in modules() for line in source.splitlines() if line.strip()]
    assert rules.percentile_95(lengths)<=rules.P95


@pytest.mark.parametrize('rule', rules.IN_MODULES, ids=lambda r: r.__name__)
def test_exported_code_is_plain(rule):
    assert breaches(rule, modules())==[]


def test_no_private_name_leaves_its_module():
    assert breaches(rules.private_imports, modules() + cells())==[]


WORDS = 'a message that is long enough to speak to a person'

@pytest.mark.parametrize('rule,bad,good', [
    (rules.long_lines, f"x = [{'1, '*40}]", f"x = [{'1, '*38}]"),
    (rules.long_lines, f"x = [{'1, '*38}] # {'a'*30}", f"x = [{'1, '*38}] # {'a'*16}"),
    (rules.long_lines, f"x = f({'1, '*38}'a', 'b')", f"x = f({'1, '*23}'{WORDS}')"),
    (rules.long_lines, f"raise ValueError({'1, '*45})", f"raise ValueError({'1, '*38}x)"),
    (rules.long_lines, f"warnings.warn(f({'1, '*45}))", f"warnings.warn(f({'1, '*35}))"),
    (rules.long_lines, '"""a\n' + 'b'*141 + '"""', '"""a\n' + 'b'*130 + '"""'),
    (rules.long_functions, 'def f():\n' + '    x = 1\n'*45, 'def f():\n' + '    x = 1\n'*44),
    (rules.many_positional, 'def f(self, a, b, c, d, e, f): pass', 'def f(self, a, b, c, d, e, *, f): pass'),
    (rules.many_positional, 'def f(a, b, c, d, e, f=1): pass', 'def f(a, b, c, d, e, f, *more): pass'),
    (rules.private_imports, 'from radiology_ai.core import _plain',
    'from radiology_ai.core import plain, __version__'),
    (rules.private_imports, 'from ..core import plain, _other', 'from os import _exit'),
    (rules.private_imports, 'from radiology_ai.dicom import index\nindex._row()', 'import os\nos._exit(0)'),
    (rules.private_imports, 'import radiology_ai.core as core\ncore._x',
    'import radiology_ai.core as core\ncore.x'),
    (rules.tables_elsewhere, 'df.to_csv(path)', 'save_table(df, path)'),
    (rules.tables_elsewhere, 'pd.read_csv(path)', 'load_table(path)'),
    (rules.tables_elsewhere, 'csv.writer(f)', 'csv.reader(f)'),
    (rules.walruses, 'f(1, (x := 2))', 'if (x := f(2)): pass'),
    (rules.walruses, 'f(key=max(x := 1, 2))', '(x := f(2))'),
    (rules.walruses, 'f([y for y in z if len(x := g(y))])', 'f(x for y in z if (x := g(y)))'),
    (rules.collections_as_statements, 'f(), g()', 'x = f(), g()'),
    (rules.collections_as_statements, '[f(x) for x in y]', 'for x in y: f(x)'),
    (rules.many_targets, 'a, b, c, d, e = f()', 'a, b, c, d = f()')])
def test_each_rule_sees_its_breach(rule, bad, good):
    assert len(rule(bad))==1 and rule(good)==[]


# Metadata and imports

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
    assert loaded('import radiology_ai', heavy)==[]
    assert seconds([sys.executable, '-c', 'import radiology_ai'])<pace()


def loaded(code: str, names: tuple) -> list[str]:
    "Which of these packages a process has loaded after `code`."
    code = f'{code}; import sys; print(*[m for m in {names!r} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def seconds(words: list) -> float:
    """The time that a process computes, the best of three: what else runs on the machine does not count, and once the
    files are in memory it is the time that a user waits."""
    found = []
    for _ in range(3):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode==0, words
        found.append(usage.ru_utime + usage.ru_stime)
    return min(found)


@pytest.mark.slow
def test_prediction_loads_no_training():
    code = 'import radiology_ai.models.bundle, radiology_ai.serve.predict'
    assert loaded(code, ('fastai', 'kornia', 'sklearn', 'timm'))==[]


@pytest.mark.slow
@pytest.mark.parametrize('code', ['import radiology_ai.all', 'from radiology_ai.all import *'])
def test_everything_is_imported_in_a_few_times_torch(code):
    "Measured beside torch itself, which is a good third of it; what is not needed is not loaded."
    assert loaded(code, ('timm', 'kornia', 'torch._dynamo', 'tensorboard', 'mlflow', 'lightly',
        'distributed'))==[]
    assert seconds([sys.executable, '-c', code])<3.3*seconds([sys.executable, '-c', 'import torch'])


@pytest.mark.slow
def test_a_film_is_predicted_within_five_seconds(run, hospital, tmp_path):
    "Or, on a machine that takes long for what a prediction can't do without, in at most twice that."
    film = min((hospital/'dicom').rglob('*.dcm'))
    taken = seconds([COMMAND, 'predict', run, film, '--out', tmp_path/'x.csv'])
    assert taken<5 or taken<2*seconds([sys.executable, '-c', 'import torch, timm'])


@pytest.mark.slow
@pytest.mark.parametrize('first', ['radiology_ai.all', 'torch._dynamo', 'torchvision', 'timm'])
def test_the_compiler_of_torch_comes_when_it_is_used(first):
    """Whatever is imported first, torchvision and timm have the true compiler when they call it, and nothing
    stands in for it."""
    code = f"""
import radiology_ai, sys, warnings
warnings.simplefilter('ignore')
import {first}, torch, torchvision, timm
assert not [m for m in sys.modules.values() if type(m) is radiology_ai._Later]
assert not [f for f in sys.meta_path if getattr(f, 'name', '')[:6] in ('torchv', 'timm.m')]
from torchvision.ops import roi_align
torch.use_deterministic_algorithms(True)
assert roi_align(torch.rand(1, 1, 8, 8), torch.tensor([[0., 0, 0, 4, 4]]), 2).shape==(1, 1, 2, 2)
once = timm.layers.disable_compiler(lambda v: v + 1)
assert once(1)==2 and torch._dynamo.utils.is_compile_supported and torch._dynamo.disable(lambda: 3)()==3
"""
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_help_comes_within_a_second():
    assert seconds([COMMAND, '--help'])<pace()


def test_time_and_packages_are_seen():
    assert seconds([sys.executable, '-c',
        'import time; t = time.process_time()\nwhile time.process_time()-t<.5: pass'])>=.5
    assert loaded('import json, numpy', ('numpy', 'json', 'torch'))==['numpy', 'json']


def test_lower_floors_load_no_torch():
    """One process imports the modules of the floors 0 to 3, the notebook with the lowest number first, and
    says which loads one."""
    # the DataLoaders are torch
    names = [m for m in MODULES if MODULES[m].stem[0] in '0123' and m not in ('data.dataset', 'data.load')]
    code = ('import importlib, sys\n'
            f'for m in {names!r}:\n'
            "    importlib.import_module(f'radiology_ai.{m}')\n"
            "    found = {'torch', 'matplotlib'} & set(sys.modules)\n"
            "    if found: sys.exit(f'{m} loads {found}')")
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert len(names)>30 and done.returncode==0, done.stderr


# the site's build, which may run beside, writes them into nbs
BUILT = ('.last_checked', '.ipynb_checkpoints', 'sidebar.yml')


def differences(a: Path, b: Path) -> list[str]:
    compared = filecmp.dircmp(a, b, ignore=['__pycache__'])
    found = [f'{a.name}/{f}' for f in compared.left_only + compared.right_only + compared.diff_files]
    return found + [d for name in compared.common_dirs for d in differences(a/name, b/name)]


@pytest.mark.slow
def test_export_and_clean_leave_no_difference(tmp_path):
    for name in ('nbs','radiology_ai'):
        shutil.copytree(ROOT/name, tmp_path/name,
            ignore=shutil.ignore_patterns('__pycache__', *BUILT))
    for name in ('pyproject.toml','README.md'): shutil.copy(ROOT/name, tmp_path/name)
    tools = Path(sys.executable).parent
    for tool in ('nbdev-export','nbdev-clean'):
        subprocess.run([tools/tool], cwd=tmp_path, check=True, capture_output=True,
            env={**os.environ, 'PYTHONPATH': ''})
    assert differences(tmp_path/'radiology_ai', ROOT/'radiology_ai')==[]
    assert [d for d in differences(tmp_path/'nbs', ROOT/'nbs') if not d.endswith(BUILT)]==[]


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_stay_small(notebook):
    assert notebook.stat().st_size<1_000_000
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        for output in cell.get('outputs', []):
            assert output.get('output_type')!='error', f'{notebook.name} was committed with a failing cell'
            for picture in ('image/png','image/jpeg'):
                assert len(output.get('data', {}).get(picture, ''))<140_000, 'a figure is over 100 kB'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_tell_no_path_of_the_machine(notebook):
    written = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    assert [path for cell in written for o in cell.get('outputs', []) for path in rules.machine_paths(o)]==[]


def test_a_path_of_the_machine_is_seen():
    for text in ('/root/.venv/x.py:3: UserWarning', 'in /home/me/x', '/work/main',
            'lib/site-packages/torch/x.py:1'):
        for output in ({'text': [text]}, {'name': 'stderr', 'text': text},
                {'data': {'text/plain': ['x\n', text]}}):
            assert len(rules.machine_paths(output))==1, text
    assert rules.machine_paths({'name': 'stderr', 'text': '/tmp/ipykernel_7/1.py:2: UserWarning'})
    picture = 'src="data:image/png;base64,AA/home/me/root/x="'
    for output in ({'name': 'stdout', 'text': '/tmp/films is full'}, {'text': 'https://x.org/home/me'},
            {'data': {'image/png': '/home/me', 'text/html': picture}}):
        assert rules.machine_paths(output)==[]


# The notebooks, the README and the scripts

def told_imports(sources: list[str]) -> list[str]:
    """Imports, in this order of cells, of packages that tell their makers about it before they were asked not to."""
    asked, found = set(), []
    for source in sources:
        asked |= {package for package, switch in UNTOLD.items() if switch in source
            or f"optional('{package}" in source}
        names = [a.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or '' for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
        found += [n for n in names if n.partition('.')[0] in set(UNTOLD) - asked]
    return found


UNTOLD = {'onnxruntime': 'ORT_DISABLE_TELEMETRY', 'mlflow': 'MLFLOW_DISABLE_TELEMETRY',
    'transformers': 'HF_HUB_DISABLE_TELEMETRY'}


def test_nothing_is_told_by_an_import():
    assert told_imports(['import numpy, onnxruntime as ort', 'from mlflow.tracking import x'])==[
        'onnxruntime', 'mlflow.tracking']
    assert told_imports(["os.environ['ORT_DISABLE_TELEMETRY'] = '1'", 'import onnxruntime'])==[]
    for notebook in NOTEBOOKS: assert told_imports(rules.code_cells(notebook))==[], notebook.name
    for script in (p for p in SCRIPTS if p.parent.name!='tests'): assert told_imports([script.read_text(encoding='utf-8')])==[], script


def test_readme_is_the_index_notebook():
    subprocess.run([sys.executable, ROOT/'docs/readme.py', '--check'], check=True)


def test_hooks_before_a_commit_are_local():
    yaml = pytest.importorskip('yaml')
    repos = yaml.safe_load((ROOT/'.pre-commit-config.yaml').read_text(encoding='utf-8'))['repos']
    hooks = {h['id']: h for r in repos for h in r['hooks']}
    assert [r['repo'] for r in repos]==['local'] and set(hooks)=={'nbdev-clean', 'nbdev-export', 'ruff'}
    assert all(h['language']=='system' for h in hooks.values())


def test_workflows_cancel_and_cover_both_ends():
    yaml = pytest.importorskip('yaml')
    flows = {p.stem: yaml.safe_load(p.read_text(encoding='utf-8'))
        for p in (ROOT/'.github/workflows').glob('*.yml')}
    assert set(flows)=={'site', 'test'} and all(f['concurrency']['cancel-in-progress'] is True
        for f in flows.values())
    job = flows['test']['jobs']['test']
    ends = job['strategy']['matrix']['include']
    assert ends[0]['python']==tomllib.loads((ROOT/'pyproject.toml').read_text())['project'][
        'requires-python'][2:]
    assert ends[0]['torch'].startswith('torch==') and '=' not in ends[1]['torch']
    assert job['steps'][-1]['run'] in (ROOT/'README.md').read_text(encoding='utf-8')


def test_quick_finds_the_tests_of_a_change():
    tests = {p.name: p.read_text(encoding='utf-8') for p in (ROOT/'tests').glob('test_*.py')}
    assert quick.tests_of('data.split', tests)==['test_split.py'] # its own name
    assert quick.tests_of('losses.robust', tests)==['test_losses.py'] # its room
    # who imports it
    assert quick.tests_of('a.b', {'test_x.py': 'from radiology_ai.a.b import c'})==['test_x.py']
    assert quick.tests_of('core', tests)==[] # all do
    files = [ROOT/f for f in ('nbs/32_data.split.ipynb', 'nbs/index.ipynb', 'tests/test_demo.py',
        'tests/conftest.py')]
    assert quick.matching(files, tests)==['test_demo.py', 'test_split.py']


def test_ci_runs_readmes_test_command():
    commands = re.findall(r'```sh\n(.+?)\n```', (ROOT/'README.md').read_text(encoding='utf-8'), re.S)
    assert len(commands)>=2 and commands[1].strip() in (ROOT/'.ci/run').read_text(
        encoding='utf-8').splitlines()
