"""Every function and class of `radiology_ai.all`, and every command, shows an example: it compiles, its names and
arguments are those of the library, and what it is said to print is what it prints."""
import ast
import contextlib
import doctest
import inspect
import io
import re
import shlex

import numpy as np
import pandas as pd
import pytest
import torch
import typer

import radiology_ai.all as everything
from radiology_ai.cli import EXAMPLES, app
from radiology_ai.report.predictions import simulated_predictions
from radiology_ai.weak.headers import BODY_PARTS

NAMES = {n: getattr(everything, n) for n in everything.__all__}
PUBLIC = {n: o for n, o in NAMES.items() if (inspect.isfunction(o) or inspect.isclass(o))
    and o.__module__.startswith('radiology_ai')}
SPACE = NAMES | {'np': np, 'pd': pd, 'torch': torch, 'BODY_PARTS': BODY_PARTS,
    'simulated_predictions': simulated_predictions}
# what an example may take as given, and what it calls beside the names of `all`
GIVEN = set('store manifest dls learn film table votes questions assignment images patients targets truths settings found found_a '
    'found_b p_cnn p_vit files heat mask algorithm x df index rsna nih fit logits template score Path read_source AlignBatch'.split())


def examples(o) -> list[str]:
    "The examples of a docstring, of either form, as source."
    doc = inspect.cleandoc(o.__doc__ or '').split('\nParameters, as they are')[0]
    runs = ''.join(e.source for e in doctest.DocTestParser().get_examples(doc))
    calls = re.findall(r'Example:\s+`([^`]+)`', doc)
    calls += [c for c in re.findall(r'`([^`]+)`', doc) if c not in calls and re.match(rf'{o.__name__}\(', c)]
    return [s for s in (runs, *calls) if s]


def faults(source: str, space: dict=SPACE) -> list[str]:
    "Names of an example that are not there, and calls that a function of the library would not take."
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    made = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    made |= {a.arg for n in nodes if isinstance(n, ast.Lambda) for a in n.args.args} | GIVEN | set(dir(__builtins__))
    made |= set(__builtins__ if isinstance(__builtins__, dict) else ())
    found = [n.id for n in nodes if isinstance(n, ast.Name) and n.id not in made and n.id not in space]
    for call in (n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in space):
        words = {k.arg: None for k in call.keywords if k.arg}
        taken = inspect.signature(space[call.func.id])
        own = [None]*('self' in taken.parameters) # of fastai's transforms, whose signature tells it
        try: taken.bind(*own, *call.args, **words)
        except TypeError as e: found.append(f'{call.func.id}: {e}')
    return found


def test_a_wrong_example_is_seen():
    assert faults('auroc_of([1, 0], [.9, .1])')==['auroc_of']
    assert 'trial' in faults("auroc_ci([1, 0], [.9, .1], trials=3)")[0]
    assert faults("print(auroc_ci([1, 0], [.9, .1], draws=3)); [x + y for y in store]")==[]
    assert examples(type('Plain', (), {'__doc__': 'Says `plain`, and nothing of a call.'}))==[]


def test_every_public_name_shows_an_example():
    assert len(PUBLIC)>290
    assert [n for n, o in PUBLIC.items() if not examples(o)]==[]
    assert [(n, f) for n, o in PUBLIC.items() for source in examples(o) for f in faults(source)]==[]


@pytest.mark.slow
def test_examples_print_what_they_say():
    wrong, run = [], 0
    check = doctest.OutputChecker()
    for name, o in PUBLIC.items():
        space = dict(SPACE)
        for e in doctest.DocTestParser().get_examples(inspect.cleandoc(o.__doc__ or '')):
            said = shown(e.source, space)
            run += 1
            if not check.check_output(e.want, said, doctest.NORMALIZE_WHITESPACE):
                wrong.append((name, e.source, said))
    assert wrong==[] and run>200


def shown(source: str, space: dict) -> str:
    "What the interpreter would print."
    out = io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(out):
        for node in ast.parse(source).body:
            if isinstance(node, ast.Expr):
                value = eval(compile(ast.Expression(node.value), '<example>', 'eval'), space)
                if value is not None: print(repr(value))
            else: exec(compile(ast.Module([node], []), '<example>', 'exec'), space)
    return out.getvalue()


def test_every_command_shows_an_example_that_it_takes():
    group = typer.main.get_command(app)
    assert set(group.commands)==set(EXAMPLES)
    for name, words in EXAMPLES.items():
        command = group.commands[name]
        context = command.make_context(name, shlex.split(words)) # refuses what is no option or argument of it
        assert f'Example: radiology_ai {name} {words}'.split()==command.get_help(context).split()[-2-len(words.split())-1:]
