"""What a change needs, in about ten seconds: export, ruff, the rules of the house, the changed notebooks, and the tests
that belong to them without the slow ones.

`python tests/quick.py` (or `make quick`) looks at what differs from the branch `main`, and at new files."""
import re
import subprocess
import sys
import time
from pathlib import Path

import rules

ROOT = Path(__file__).resolve().parents[1]
MANY = 2 # files: a module that more of them import is the ground of all, and `pytest` tests it


def git(*words) -> list[str]:
    "The lines that git answers; none where it cannot."
    done = subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode==0 else []


def changed() -> list[Path]:
    "Files that differ from where this branch left `main`, and those that git does not know yet."
    base = git('merge-base', 'main', 'HEAD') or ['HEAD']
    names = {*git('diff', '--name-only', base[0]), *git('ls-files', '--others', '--exclude-standard')}
    return sorted(ROOT/n for n in names if (ROOT/n).exists())


def tests_of(module: str, tests: dict[str, str]) -> list[str]:
    """The test files of a module, such as test_split.py of `data.split`: of its name, else of its room, else those that
    import it; `tests` has the text of each file."""
    room, _, name = module.rpartition('.')
    for word in (name, room):
        if word and f'test_{word}.py' in tests: return [f'test_{word}.py']
    found = [f for f, text in tests.items() if re.search(rf'radiology_ai\.{re.escape(module)}\b', text)]
    return found if len(found)<=MANY else []


def matching(files: list[Path], tests: dict[str, str]) -> list[str]:
    "The test files of changed notebooks, and the changed test files themselves."
    modules = [p.stem.partition('_')[2] for p in files if p.suffix=='.ipynb' and re.match(r'\d+_', p.name)]
    named = [f for m in modules for f in tests_of(m, tests)]
    return sorted({*named, *(p.name for p in files if p.parent==ROOT/'tests' and p.name in tests)})


def step(*words):
    "Run a command and tell its time; end with its exit code if it fails."
    start = time.perf_counter()
    code = subprocess.run([sys.executable, '-m', *words] if words[0] in ('ruff', 'pytest')
        else [Path(sys.executable).parent/words[0], *words[1:]], cwd=ROOT).returncode
    print(f'{time.perf_counter()-start:5.1f} s  {" ".join(words)}', flush=True)
    if code not in (0, 5): sys.exit(code) # 5: all tests of these files are slow


def look(files: list[Path]):
    "Hold the changed files against the rules of the house."
    found = [f'{p.relative_to(ROOT)}: {b}' for p in files if p.suffix in ('.ipynb', '.py')
        and p.name!='_modidx.py'
        for b in rules.breaches(p)]
    if found: sys.exit('\n'.join(found))


def main():
    files = changed()
    tests = {p.name: p.read_text(encoding='utf-8') for p in (ROOT/'tests').glob('test_*.py')}
    notebooks = [p.stem for p in files if p.suffix=='.ipynb']
    step('nbdev-export')
    step('ruff', 'check', '.')
    look(changed())
    if notebooks:
        pattern = f"^({'|'.join(map(re.escape, notebooks))})\\.ipynb$"
        step('nbdev-test', '--n-workers', '2' if len(notebooks)>1 else '0', '--file-re', pattern)
    chosen = matching(files, tests)
    if chosen: step('pytest', '-n', '0', '-m', 'not slow', *(f'tests/{f}' for f in chosen))


if __name__=='__main__': main()
