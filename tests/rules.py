"""The form of the code, as functions of a source text that return the breaches they find, a line each; test_house.py
holds the repository against them."""
import ast
import io
import json
import re
import tokenize
from functools import cache
from pathlib import Path

# characters: plain code; docstrings, comments and messages; 95 of 100 lines
CODE, MESSAGE, P95 = 120, 140, 110
LINES, POSITIONAL, TARGETS = 45, 5, 4 # of a function; its parameters before the star; of one assignment
SENTENCE = 40 # characters of a string literal from which its line is a message

ROOT = Path(__file__).resolve().parents[1]
parsed = cache(ast.parse)


def code_cells(notebook: Path) -> list[str]:
    "The code cells of a notebook, its magics replaced by `pass`."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type']=='code']
    return [re.sub(r'^(\s*)[%!].*$', r'\1pass', s, flags=re.M) for s in sources]


def comments(source: str) -> dict[int, int]:
    "Where the comment of a line begins."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.start[1] for t in tokens if t.type==tokenize.COMMENT}


def is_message(node: ast.AST) -> bool:
    "Does this statement or call speak to a person: `raise`, `assert` with its words, `warn`?"
    called = getattr(node.func, 'attr', getattr(node.func, 'id', '')) if isinstance(node, ast.Call) else ''
    return isinstance(node, (ast.Raise, ast.Assert)) or called in ('warn', 'warn_explicit')


def messages(tree: ast.AST) -> set[int]:
    "The lines of docstrings and messages: of `raise` and `warn`, or with a sentence in quotes."
    found = set()
    for node in ast.walk(tree):
        text = isinstance(node, ast.JoinedStr) or isinstance(getattr(node, 'value', None), (str, bytes))
        long = text and (node.end_lineno>node.lineno or node.end_col_offset-node.col_offset>=SENTENCE)
        if long or is_message(node):
            found |= set(range(node.lineno, node.end_lineno+1))
    return found


def long_lines(source: str) -> list[str]:
    "Lines of code over 120 characters, of messages and comments over 140."
    notes, spoken = comments(source), messages(parsed(source))
    found = []
    for number, line in enumerate(source.splitlines(), 1):
        code = line[:notes.get(number, len(line))].rstrip()
        if len(line)>MESSAGE or len(code)>CODE and number not in spoken:
            found.append(f'line {number} has {len(line)} characters: {line.strip()[:50]}')
    return found


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def long_functions(source: str) -> list[str]:
    "Functions over 45 lines."
    sizes = [(f, f.end_lineno - f.lineno + 1) for f in functions(parsed(source))]
    return [f'{f.name} has {n} lines' for f, n in sizes if n>LINES]


def many_positional(source: str) -> list[str]:
    "Functions with more than five parameters before the star; one that takes any number is excepted."
    found = []
    for f in functions(parsed(source)):
        names = [a.arg for a in f.args.posonlyargs + f.args.args]
        n = len(names) - (names[:1] in (['self'], ['cls']))
        if n>POSITIONAL and f.args.vararg is None: found.append(f'{f.name} has {n} positional parameters')
    return found


def is_private(name: str) -> bool: return name.startswith('_') and not name.startswith('__')


def private_imports(source: str) -> list[str]:
    """Private names that are taken from another module of the library, by name or as an attribute of that
    module."""
    found, modules = [], set()
    tree = parsed(source)
    for node in ast.walk(tree):
        if (isinstance(node, ast.ImportFrom) and (node.level
                or (node.module or '').split('.')[0]=='radiology_ai')):
            found += [f'{a.name} of {"."*node.level}{node.module or ""}' for a in node.names
                if is_private(a.name)]
            modules |= {a.asname or a.name for a in node.names}
        if isinstance(node, ast.Import):
            modules |= {a.asname for a in node.names if a.asname and a.name.startswith('radiology_ai.')}
    return found + [f'{n.value.id}.{n.attr}' for n in ast.walk(tree) if isinstance(n, ast.Attribute)
        and isinstance(n.value, ast.Name) and n.value.id in modules and n.value.id.islower()
        and is_private(n.attr)]


def inside(node: ast.AST) -> list[ast.AST]:
    "A node and all in it but the conditions of comprehensions, where `if (x := f(y))` is the plain way."
    parts = [p for p in ast.iter_child_nodes(node)
        if not (isinstance(node, ast.comprehension) and p in node.ifs)]
    return [node, *(n for p in parts for n in inside(p))]


def walruses(source: str) -> list[str]:
    "Assignments inside an argument list."
    found = set()
    for call in ast.walk(parsed(source)):
        if not isinstance(call, ast.Call): continue
        given = [*call.args, *(k.value for k in call.keywords)]
        found |= {(n.lineno, n.target.id) for a in given for n in inside(a) if isinstance(n, ast.NamedExpr)}
    return [f'line {line}: {name} := in an argument list' for line, name in sorted(found)]


def collections_as_statements(source: str) -> list[str]:
    "A tuple, a list or a comprehension that stands as a statement, for the sake of what its parts do."
    kinds = (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp,
        ast.GeneratorExp)
    return [f'line {n.lineno}: {type(n.value).__name__} as a statement' for n in ast.walk(parsed(source))
        if isinstance(n, ast.Expr) and isinstance(n.value, kinds)]


def many_targets(source: str) -> list[str]:
    "Assignments with more than four targets in one tuple."
    return [f'line {n.lineno}: {len(t.elts)} targets' for n in ast.walk(parsed(source))
        if isinstance(n, ast.Assign)
        for t in n.targets if isinstance(t, (ast.Tuple, ast.List)) and len(t.elts)>TARGETS]


OWN_TABLES = {'to_csv', 'read_csv', 'to_excel', 'read_excel'} # of pandas; `tables` alone may call them


def tables_elsewhere(source: str) -> list[str]:
    "Tables that are not written and read by `tables`, which keeps each text and lets nobody else read them."
    if "default_exp tables" in source or "../nbs/02_tables.ipynb" in source: return []
    found = [n.func for n in ast.walk(parsed(source)) if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute)]
    return [f'line {f.lineno}: {f.attr}' for f in found if f.attr in OWN_TABLES
        or getattr(f.value, 'id', '')=='csv' and f.attr in ('writer', 'DictWriter')]


IN_MODULES = [tables_elsewhere, long_functions, many_positional, walruses, collections_as_statements,
    many_targets]
IN_CELLS = [long_lines, private_imports]


def breaches(path: Path) -> list[str]:
    "What the rules find in a notebook, in a module that was exported from one, or in a script."
    if path.suffix=='.ipynb': return [b for c in code_cells(path) for rule in IN_CELLS for b in rule(c)]
    rules = IN_MODULES if path.is_relative_to(ROOT/'radiology_ai') else [long_lines]
    return [b for rule in rules for b in rule(path.read_text(encoding='utf-8'))]


def machine_paths(output: dict) -> list[str]:
    "Paths of the machine on which a notebook was run, in the text of an output."
    texts = [output.get('text', ''), *(v for k, v in output.get('data', {}).items()
        if not k.startswith('image/'))]
    text = '\n'.join(''.join(t) if isinstance(t, list) else str(t) for t in texts)
    text = re.sub(r'base64,[A-Za-z0-9+/=]+', '', text)
    places = 'root|home|work' + ('|tmp' if output.get('name')=='stderr' else '')
    return re.findall(rf'(?<![\w.])/(?:{places})/\S*|\S*site-packages\S*', text)


def percentile_95(lengths: list[int]) -> int:
    return sorted(lengths)[int(.95*(len(lengths) - 1))]
