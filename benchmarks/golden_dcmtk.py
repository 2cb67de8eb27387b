"""Writes tests/golden.csv: what DCMTK (Debian's dcmtk) shows for each cell of the golden matrix, as hashes; and
compares the reader with it.

    python benchmarks/golden_dcmtk.py            # compare; writes nothing
    python benchmarks/golden_dcmtk.py --write    # writes tests/golden.csv as well

Where DCMTK deviates from the standard or has no such function, the expected value comes from the formula of PS3.3
C.11 in plain float64 (`golden_cells.shown`), and those cells are counted by themselves. JPEG 2000 and HTJ2K, which
Debian's DCMTK cannot decode, are expected to look like the same stored pixels uncompressed. Padding is left out of
the comparison with DCMTK, which shows it as grey: here it must be black. The test needs no DCMTK: it reads the
hashes.
"""
import argparse
import csv
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from radiology_ai.dicom.read import read_radiograph

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tests'))
from golden_cells import (
    digest,
    far_from_steps,
    golden_cells,
    modality_ends,
    modality_of,
    padding_of,
    quantise,
    rule_of,
    shown,
    stored_of,
    windows_of,
    write_cell,
)


def dcmtk_options(cell, depth) -> list[str]:
    "The options that make DCMTK show what the header says. Overlays are left out."
    if cell.colour: view = ['+G', '-W']
    elif cell.extra=='narrow': view = ['-W'] # whole range of the bits
    elif cell.voi.startswith('lut'): view = ['+Wl', str(cell.view + 1)]
    elif cell.voi=='exact':
        # the same line as a LINEAR window
        view = ['+Ww', *(str(v) for v in np.array(windows_of(cell)[0]) + (.5, 1))]
    elif cell.voi!='none': view = ['+Wi', str(cell.view + 1)]
    elif cell.extra.startswith('padding'):
        view = ['+Wr', '6', '0', str(cell.shape[1] - 6), str(cell.shape[0])]
    elif cell.bits==8 and cell.modality!='mlut': view = ['+Ww', *_whole(cell)]
    else: view = ['+Wm']
    if cell.voi=='sigmoid': view.append('+Wfs')
    if cell.frames>1: view += ['+F', str(cell.frames)]
    return ['-O', *view, '+opn', str(depth)]


def _whole(cell):
    "The window over all that 8 bits may hold."
    a,b = modality_ends(cell)
    return str((a + b + 1)/2),str(b - a + 1)


def dcmtk_shows(cell, folder) -> np.ndarray:
    "The whole numbers that DCMTK writes for a cell."
    path,out = folder/'cell.dcm',folder/'cell.pgm'
    write_cell(cell, path)
    out.unlink(missing_ok=True)
    tool = 'dcml2pnm' if cell.syntax=='jpegls' else 'dcmj2pnm'
    done = subprocess.run([tool, *dcmtk_options(cell, rule_of(cell)[1]), path, out], capture_output=True,
        text=True)
    if done.returncode or not out.exists():
        raise RuntimeError(done.stderr.strip()[:200] or f'exit code {done.returncode}')
    words = b' '.join(l for l in out.read_bytes().splitlines() if not l.startswith(b'#')).split()
    assert words[0]==b'P2', words[:4]
    w,h,top = map(int, words[1:4])
    assert top==2**rule_of(cell)[1] - 1, (top, cell)
    return np.array(words[4:], int).reshape(h, w)


def dcmtk_expected(cell, folder) -> np.ndarray:
    """What DCMTK shows; of syntaxes which it cannot decode, what it shows of the same stored pixels
    uncompressed."""
    a = dcmtk_shows(replace(cell, syntax='explicit') if cell.syntax in ('jpeg2000', 'htj2k') else cell,
        folder)
    a[padding_of(cell)] = 0 # DCMTK shows padding as grey; the reader shows nothing there
    return a


def explained(cell, dcmtk, formula) -> bool:
    "Is what DCMTK shows what it would show for the stated reason?"
    if np.array_equal(dcmtk, formula): return True
    stored,(_,depth) = stored_of(cell)[-1].astype(int),rule_of(cell)
    # where it uses a table, the fraction of the lowest value comes back; on a step, the last bit of a double decides
    if cell.modality=='real':
        low = modality_of(cell, cell.low)
        shows = [shown(cell, stored, np.trunc(modality_of(cell, stored)) + f)
            for f in (0, low - np.trunc(low))]
        return any((far_from_steps(p, depth) <= (dcmtk==quantise(p, *rule_of(cell)))).all() for p in shows)
    if cell.extra=='shape identity':
        return np.array_equal(dcmtk, by_formula(replace(cell, photometric='MONOCHROME2')))
    # one short of white
    return np.array_equal(np.where(formula==2**depth - 1, dcmtk + (dcmtk==2**depth - 2), dcmtk), formula)


def attempt(f, *args):
    "The result, or the error as text."
    try: return f(*args)
    except Exception as e: return f'{type(e).__name__}: {e}'


def by_formula(cell) -> np.ndarray:
    "The display of PS3.3 C.11 in float64, as whole numbers."
    stored = stored_of(cell)[-1].astype(int)
    p = shown(cell, stored)
    p[padding_of(cell)] = 0
    a = quantise(p, *rule_of(cell))
    a[padding_of(cell)] = 0
    return a


def read_numbers(cell, folder) -> np.ndarray:
    "What the reader shows, as whole numbers."
    write_cell(cell, folder/'cell.dcm')
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*a colour picture')
        a = quantise(read_radiograph(folder/'cell.dcm', frame=cell.frame, voi=cell.view).pixels,
            *rule_of(cell))
    a[padding_of(cell)] *= (a[padding_of(cell)]>1) # an inverted table shows 0 as 0 or 1
    return a


def report(table, wrong):
    "Prints the table and the cells that differ."
    print(f"{'cells':>6} {'reader':>7} {'formula':>8} {'DCMTK':>6} {'explained':>10}   expected value from")
    for k,n in [*sorted(table.items()), ('all', sum(table.values()))]:
        print(f'{n[0]:6d} {n[1]:7d} {n[2]:8d} {n[3]:6d} {n[4]:10d}   {k}')
    print('reader, formula, DCMTK: cells equal to the expected value; explained: what DCMTK shows follows '
        'from the formula and the stated reason')
    for cell,why in wrong: print(f'not equal: {cell.name}: {why}')


def main():
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument('--write', action='store_true', help='write tests/golden.csv')
    parse.add_argument('--only', default='', help='only cells with this text in their name')
    args = parse.parse_args()
    if args.write and args.only: parse.error('--write needs all cells')
    print(subprocess.run(['dcmj2pnm', '--version'], capture_output=True, text=True).stdout.splitlines()[0])
    rows,table,wrong = [],Counter(),[]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for cell in golden_cells():
            if args.only not in cell.name: continue
            reader,formula = attempt(read_numbers, cell, folder),by_formula(cell)
            dcmtk = attempt(dcmtk_expected, cell, folder)
            truth = formula if cell.source.startswith('formula') else dcmtk
            same = {k: isinstance(truth, np.ndarray) and np.array_equal(truth, v)
                for k,v in dict(reader=reader, formula=formula, DCMTK=dcmtk).items()}
            why = isinstance(dcmtk, np.ndarray) and explained(cell, dcmtk, formula)
            table[cell.source] += np.array([1, *same.values(), why])
            if not same['reader']:
                wrong.append((cell, reader if isinstance(reader, str) else f'{(reader!=truth).sum()} pixels'))
            if not same['formula']:
                wrong.append((cell, f'DCMTK {dcmtk}' if isinstance(dcmtk, str)
                    else 'DCMTK is not the formula'))
            if not why:
                wrong.append((cell, f'DCMTK shows something else than stated{": " + dcmtk if isinstance(dcmtk, str) else ""}'))
            rows.append((cell.name, cell.source.split(':')[0], '%s%d'%rule_of(cell),
                digest(truth) if isinstance(truth, np.ndarray) else 'none'))
    report(table, wrong)
    if args.write:
        with open(ROOT/'tests'/'golden.csv', 'w', newline='') as f:
            csv.writer(f, lineterminator='\n').writerows([('cell', 'source', 'rule', 'hash'), *rows])


if __name__=='__main__': main()
