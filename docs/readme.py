"""Write README.md from nbs/index.ipynb, with the outputs that stand in the notebook; `--check` only compares.

Pictures of the notebook's outputs are written to docs/images, where GitHub and PyPI find them.
"""
import argparse
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT/'docs/images'


def text_of(output: dict) -> str:
    data = output.get('data', {})
    text = output.get('text') or data.get('text/plain') or ''
    return re.sub(r'\x1b\[[0-9;]*m', '', ''.join(text)).rstrip()


def code_cell(cell: dict, number: int, pictures: dict) -> str:
    """A code cell as fenced source, its text output and its pictures; `#| hide` leaves it out, `#| echo:
    false` only its source."""
    source = ''.join(cell['source'])
    if re.match(r'#\|\s*hide', source): return ''
    shown = '\n'.join(line for line in source.splitlines() if not line.startswith('#|')).strip()
    parts = [] if re.search(r'#\|\s*echo:\s*false', source) else [f'```python\n{shown}\n```']
    for k, output in enumerate(cell.get('outputs', [])):
        if (png := output.get('data', {}).get('image/png')):
            name = f'readme_{number}_{k}.png'
            pictures[name] = base64.b64decode(''.join(png))
            parts.append(f'![Output of the example](docs/images/{name})')
        elif (text := text_of(output)): parts.append('\n'.join('    ' + line for line in text.splitlines()))
    return '\n\n'.join(parts)


def markdown_cell(source: str, folder: str='nbs') -> str:
    "Links to notebooks lead to the notebooks in the repository."
    return re.sub(r'\]\(((?!https?:|#)[^)]+\.ipynb)\)', rf']({folder}/\1)', source).strip()


def render(notebook: Path) -> tuple[str, dict]:
    pictures, parts = {}, ['<!-- Written by docs/readme.py from nbs/index.ipynb: edit the notebook. -->']
    for i, cell in enumerate(json.loads(notebook.read_text(encoding='utf-8'))['cells']):
        parts.append(markdown_cell(''.join(cell['source'])) if cell['cell_type']=='markdown'
            else code_cell(cell, i, pictures))
    return '\n\n'.join(p for p in parts if p) + '\n', pictures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true',
        help='write nothing; exit 1 if README.md or a picture differs')
    text, pictures = render(ROOT/'nbs/index.ipynb')
    if parser.parse_args().check:
        same = ((ROOT/'README.md').read_text(encoding='utf-8')==text
            and all((IMAGES/n).exists() and (IMAGES/n).read_bytes()==b for n, b in pictures.items()))
        if not same:
            print('README.md differs from nbs/index.ipynb: run python docs/readme.py', file=sys.stderr)
        return 0 if same else 1
    (ROOT/'README.md').write_text(text, encoding='utf-8')
    IMAGES.mkdir(exist_ok=True)
    for old in IMAGES.glob('readme_*.png'): old.unlink()
    for name, content in pictures.items(): (IMAGES/name).write_bytes(content)
    return 0


if __name__=='__main__': sys.exit(main())
