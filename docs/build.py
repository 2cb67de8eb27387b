"""Build the site from the notebooks: stage them with nbdev, convert them for Sphinx, build with warnings as errors,
check every link inside.

    python docs/build.py [--force]      writes docs/_build/html; exits with 1 after a warning or a broken link

The notebooks are the only source of prose, and nothing is executed but imports and exported cells (for the API's
signatures): what a page shows is what was committed. `proc_nbs` of nbdev does the same for GitHub Pages, where Quarto
renders its result; here Sphinx and MyST-NB do, as Quarto cannot be installed everywhere.
"""
import argparse
import ast
import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
NBS, STAGE, HTML = ROOT/'nbs', ROOT/'docs/_stage', ROOT/'docs/_build/html'
FLOORS = {'0': 'Ground', '1': 'DICOM', '2': 'Preprocessing', '3': 'Data', '4': 'Vision', '5': 'Few labels',
    '6': 'Understanding', '7': 'Tasks', '8': 'Running', '9': 'Everything'}
URL = re.compile(
    r'https?://[^\s)"\'>]*?/radiology_ai/((?:[\w-]+/)*[\w.-]+?)\.html(?:\.md)?(#[\w.%-]+)?(?=[\s)"\'>])')


# What nbdev asks of a notebook

def code_of(cell: dict) -> str: return ''.join(cell['source'])


def mixed_imports(source: str) -> bool:
    """Does an example cell mix imports with other code? nbdev runs every cell that imports, by itself, and
    would fail in it."""
    if re.search(r'^#\|\s*(export|exporti|exports|default_exp)\b|^#\|\s*eval:\s*false', source, re.M):
        return False
    tree = ast.parse('\n'.join('pass' if line.lstrip().startswith(('%', '!')) else line
        for line in source.splitlines()))
    imports = (ast.Import, ast.ImportFrom)
    if not any(isinstance(node, imports) for node in ast.walk(tree)): return False
    harmless = imports + (ast.FunctionDef, ast.ClassDef)
    top = [node for node in tree.body if isinstance(node, imports)]
    return not all(isinstance(node, imports if top else harmless) or isinstance(node, ast.Pass)
        for node in tree.body)


def check_notebooks(paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        first = next((code_of(c) for c in json.loads(path.read_text(encoding='utf-8'))['cells']
            if c['cell_type']=='markdown'), '')
        if re.sub(r'\A# [^\n]*\n*(> [^\n]*)?', '', first).strip():
            found.append(f"{path.relative_to(ROOT)}: text after title and subtitle in their cell would be "
                "lost: give it a cell of its own")
        cells = [code_of(c) for c in json.loads(path.read_text(encoding='utf-8'))['cells']
            if c['cell_type']=='code']
        found += [f"{path.relative_to(ROOT)}: imports stand with other code: "
            f"{source.strip().splitlines()[0][:80]}" for source in cells if mixed_imports(source)]
    return found


# From nbdev's staged notebooks to MyST

def front_matter(nb: dict) -> dict:
    import yaml
    raw = next((code_of(c) for c in nb['cells'] if c['cell_type']=='raw'), '')
    found = re.match(r'\s*---\n(.*?)\n---', raw, re.S)
    return yaml.safe_load(found[1]) or {} if found else {}


def page_name(path: Path) -> str:
    """The page of a notebook, as nbdev and Quarto call it: `metrics.classification` for
    `42_metrics.classification.ipynb`."""
    rel = path.relative_to(ROOT/'_proc') if (ROOT/'_proc') in path.parents else path.relative_to(NBS)
    return rel.with_name(re.sub(r'^\d+[a-z]?_', '', rel.stem)).as_posix()


def local_links(text: str, page: str, pages: dict) -> str:
    "Links to this site's own pages and to notebooks, as links between staged notebooks."
    up = '../'*page.count('/')
    names = set(pages.values())

    def of_url(m):
        return f"{up}{m[1]}.ipynb{'#' + slug(unquote(m[2][1:])) if m[2] else ''}" if m[1] in names else m[0]

    def of_notebook(m):
        target = os.path.normpath(os.path.join(os.path.dirname(page), m[1]))
        target = pages.get(target, target.removesuffix('.ipynb'))
        return f"]({os.path.relpath(target, os.path.dirname(page) or '.')}.ipynb{m[2] or ''})"

    text = URL.sub(of_url, text)
    return re.sub(r'\]\(((?!https?:)[^)#\s]+\.ipynb)(#[^)\s]*)?\)', of_notebook, text)


def outside_code(text: str, change) -> str:
    "`change` applied to the parts of Markdown that are not fenced code."
    parts = re.split(r'(^```.*?^```[^\S\n]*$)', text, flags=re.S|re.M)
    return ''.join(p if p.startswith('```') else change(p) for p in parts)


def with_references(text: str, page: str, symbols: dict) -> str:
    "Names of the API in backticks become links to their place, where nbdev has not made them already."
    up = '../'*page.count('/')

    def link(m):
        target = symbols.get(m[1])
        return f"[`{m[1]}`](<{up}{target[0]}.ipynb#{target[1]}>)" if target else m[0]

    return outside_code(text, lambda p: '\n'.join(line if re.match(r'\s*(#|\()', line)
        else re.sub(r'(?<![\[`\w])`([A-Za-z_][\w.]*)`(?![\]`\w])', link, line) for line in p.split('\n')))


def slug(heading: str) -> str:
    "The anchor which MyST gives a heading (GitHub's rule)."
    return re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')


def is_show_doc(cell: dict) -> bool:
    return cell['cell_type']=='code' and bool(re.search(r'^show_doc\(', code_of(cell), re.M))


def doc_heading(cell: dict) -> str|None:
    "The name that a cell of `show_doc` documents."
    found = re.search(r'^#+ +(\S+)', ''.join(''.join(o.get('data', {}).get('text/markdown', ''))
        for o in cell.get('outputs', [])), re.M)
    return found[1] if found else None


def definition_order(nb: dict) -> dict:
    "Where each exported name is defined in a notebook: `Radiograph.crop` for a method added with `@patch`."
    order = {}
    for i, cell in enumerate(nb['cells']):
        if cell['cell_type']!='code' or not re.search(r'^#\|\s*exports?\b', code_of(cell), re.M): continue
        for node in ast.parse(code_of(cell)).body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): continue
            first = (node.args.args[0].annotation if not isinstance(node, ast.ClassDef) and node.args.args
                else None)
            patched = any(getattr(getattr(d, 'func', d), 'id', '').startswith('patch')
                for d in node.decorator_list)
            order[f'{ast.unparse(first)}.{node.name}' if patched and first is not None else node.name] = (i,
                node.lineno)
    return order


def in_order(cells: list[dict], order: dict) -> list[dict]:
    """Cells of `show_doc` that follow one another, in the order of definition (nbdev turns several of one
    cell round)."""
    out, run = [], []
    for cell in [*cells, None]:
        if cell is not None and is_show_doc(cell): run.append(cell)
        else:
            places = [order.get(doc_heading(c), (math.inf, 0)) for c in run]
            out += [c for _, _, c in sorted(zip(places, range(len(run)), run), key=lambda o: o[:2])]
            run = []
            if cell is not None: out.append(cell)
    return out


def as_markdown(cell: dict, level: int) -> dict|None:
    "The output of `show_doc` as a Markdown cell whose heading stands below the last one."
    text = ''.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in cell.get('outputs', []))
    if not text.strip(): return None
    text = re.sub(r'^\s*---\s*\n', '', text).replace('__main__.', '')
    text = re.sub(r"<class '[\w.]*?(\w+)'>", r'\1', text) # a default that is a class
    text = re.sub(r'(^```\n\n)\*(.+)\*$', r'\1\2', text, count=1, flags=re.M) # nbdev slants the first line of a sentence
    text = re.sub(r'^>>> .*(?:\n.*\S.*)*', r'```pycon\n\g<0>\n```', text, flags=re.M)
    source = re.search(r'^\[source\]\((\S+?)\)(\{.*?\})?[^\S\n]*\n', text, re.M)
    if source: text = text.replace(source[0], '')
    where = f'\n\n{{.source}}\n[source]({source[1]})' if source else ''
    text = re.sub(r'^#+ +(\S+)', lambda m: f"{'#'*min(level+1, 6)} {m[1]}{where}", text, count=1, flags=re.M)
    return {'cell_type': 'markdown', 'metadata': {}, 'source': text}


def example_cell(cell: dict) -> dict:
    "A code cell without nbdev's directives; `echo: false` hides its source."
    source, cell = code_of(cell), copy.deepcopy(cell)
    options = dict(re.findall(r'^#\|\s*([\w-]+):\s*(\S+)\s*$', source, re.M))
    cell['source'] = '\n'.join(line for line in source.splitlines() if not line.startswith('#|')).strip('\n')
    tags = (['remove-input'] if options.get('echo')=='false' or options.get('code-fold')
        else []) + (['remove-output'] if options.get('output')=='false' else [])
    if options.get('include')=='false': tags = ['remove-cell']
    cell['metadata'] = {'tags': tags} if tags else {}
    cell['execution_count'] = None
    for output in cell.get('outputs', []):
        if 'execution_count' in output: output['execution_count'] = None
    return cell


def convert(nb: dict, page: str, pages: dict, symbols: dict, order: dict) -> dict:
    "A staged notebook as MyST-NB builds it."
    head, cells, level = front_matter(nb), [], 1
    title = head.get('title') or page
    cells.append({'cell_type': 'markdown', 'metadata': {},
        'source': f"# {title}" + (f"\n\n{{.lead}}\n{' '.join(str(head['description']).split())}"
        if head.get('description') else '')})
    for cell in in_order([c for c in nb['cells'] if code_of(c).strip()], order):
        source = code_of(cell)
        if cell['cell_type']=='raw' or 'THIS FILE WAS AUTOGENERATED' in source: continue
        if is_show_doc(cell): new = as_markdown(cell, level)
        elif cell['cell_type']=='code': new = example_cell(cell)
        else:
            new = {'cell_type': 'markdown', 'metadata': {}, 'source': source}
            heads = re.findall(r'^(#+) ', re.sub(r'^```.*?^```', '', source, flags=re.S|re.M), re.M)
            if heads: level = len(heads[-1])
        if new is None: continue
        if new['cell_type']=='markdown':
            new['source'] = with_references(local_links(new['source'], page, pages), page, symbols)
        cells.append({**new, 'id': f'c{len(cells)}'})
    cells[0]['id'] = 'title'
    return {'cells': cells, 'metadata': {'kernelspec': {'display_name': 'Python 3', 'language': 'python',
        'name': 'python3'}, 'language_info': {'name': 'python'}}, 'nbformat': 4, 'nbformat_minor': 5}


# The index and the way through the pages

PLACEHOLDER = {'cells': [{'cell_type': 'raw', 'metadata': {},
    'source': '---\ntitle: radiology_ai\ndescription: From DICOM radiographs and few labels to evaluated models\n---'}]}


def toctree(caption: str, names: list[str]) -> str:
    return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *names, '```'])


def contents(pages: dict) -> str:
    "The trees of pages by floor; `pages` leads from notebooks to pages."
    groups = {}
    for path in sorted(pages, key=lambda p: re.split('[_/]', p)):
        if path=='index.ipynb': continue
        folder = os.path.dirname(path)
        groups.setdefault(folder.split('/')[0].capitalize() if folder
            else FLOORS.get(path[0], 'Further pages'), []).append(pages[path])
    order = ['Tutorials', *FLOORS.values(), 'Further pages']
    return '\n\n'.join(toctree(k, groups[k]) for k in sorted(groups,
        key=lambda k: (order.index(k) if k in order else len(order), k)))


def stage(processed: Path) -> dict:
    "Convert all staged notebooks into docs/_stage; returns notebook to page."
    shutil.rmtree(STAGE, ignore_errors=True)
    notebooks = {p: json.loads(p.read_text(encoding='utf-8')) for p in sorted(processed.rglob('*.ipynb'))}
    pages = {p.relative_to(processed).as_posix(): page_name(p) for p in notebooks}
    symbols = {name: (page_name(p), slug(name)) for p, nb in notebooks.items() for cell in nb['cells']
        if is_show_doc(cell) and (name := doc_heading(cell))}
    for path, nb in [*notebooks.items()] + ([] if 'index.ipynb' in pages
            else [(processed/'index.ipynb', PLACEHOLDER)]):
        page = page_name(path)
        original = NBS/path.relative_to(processed)
        new = convert(nb, page, pages, symbols,
            definition_order(json.loads(original.read_text(encoding='utf-8'))) if original.exists() else {})
        if page=='index':
            new['cells'].append({'cell_type': 'markdown', 'id': 'contents', 'metadata': {},
                'source': contents(pages)})
        target = STAGE/f'{page}.ipynb'
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(new), encoding='utf-8')
    for picture in NBS.rglob('*'):
        if (picture.suffix.lower() in ('.png', '.jpg', '.jpeg', '.svg', '.gif')
                and not any(part.startswith(('.', '_')) for part in picture.relative_to(NBS).parts)):
            (target := STAGE/picture.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, target)
    return pages


# Links

class Page(HTMLParser):
    "The anchors of a page and what it refers to."
    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links = {'', 'top'}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name=='id' or (name=='name' and tag=='a'): self.anchors.add(value)
            if name in ('href', 'src') and value: self.links.append(value)


def broken_links(html: Path) -> list[str]:
    "Links inside the site whose file or anchor does not exist."
    pages = {p.resolve(): Page(p.read_text(encoding='utf-8')) for p in html.rglob('*.html')
        if '_static' not in p.relative_to(html).parts}
    found = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            target = (path.parent/unquote(url.path)).resolve() if url.path else path
            if target.is_dir(): target = target/'index.html'
            if not target.exists(): found.append(f'{path.relative_to(html)}: {link} does not exist')
            elif target in pages and unquote(url.fragment) not in pages[target].anchors:
                found.append(f'{path.relative_to(html)}: {link} has no such anchor')
    return sorted(set(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--force', action='store_true',
        help='stage every notebook again, also unchanged ones')
    args = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    notebooks = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    if faults := check_notebooks(notebooks):
        print('nbdev cannot stage these notebooks (it runs every cell that imports by itself, so imports '
            'need a cell of their own):', *faults, sep='\n  ', file=sys.stderr)
        return 1
    os.environ.setdefault('MPLBACKEND', 'agg')
    os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1') # cells that import are run by themselves
    from nbdev.serve import proc_nbs
    pages = stage(proc_nbs(n_workers=0, force=args.force))
    shutil.rmtree(HTML, ignore_errors=True)
    code = subprocess.run([sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-E', '-b', 'html',
        '-d', HTML.parent/'doctrees', '-c', ROOT/'docs', STAGE, HTML]).returncode
    if code: return 1
    broken = broken_links(HTML)
    if broken: print(*broken, sep='\n', file=sys.stderr)
    print(f"{len(pages)} pages in {HTML.relative_to(ROOT)}, {len(broken)} broken links")
    return 1 if broken else 0


if __name__=='__main__': sys.exit(main())
