"""Judge the de-identification: every action of the Basic Profile's table, linkage, leaks, burned-in text and speed.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/deidentify.py [--films 45] [--pictures FOLDER]
        [--places 1000] [--dciodvfy PATH]

Parts, each printed as a line or a small table:
1. the table: one made-up element a row of Table E.1-1, at the top and in a sequence, for CR and DX; what came out
   against what the row allows;
2. a simulated hospital with a planted name, number, date and UID in every row's element: no original byte in the
   output, intervals and references kept;
5. (`--places`) files with identity in bits, streams, fragments, tails, texts and unlisted elements, as the places of
   tests/test_identity_reports.py, through `deidentify`: no byte of it in a copy, the picture bit for bit; with
   `--dciodvfy` (Debian dicom3tools) the kinds of error that copies have and their sources have not;
3. burned-in text on simulated films (fonts, sizes, polarities, places) and false alarms on films without and on real radiographs.
"""
import argparse
import importlib.util
import io
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
from pydicom.config import disable_value_validation
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from radiology_ai.core import RadiologyError, rng
from radiology_ai.dicom.burned_in import find_text
from radiology_ai.dicom.deidentify import clean_header, deidentify
from radiology_ai.dicom.profile import basic_profile
from radiology_ai.dicom.pseudonyms import Pseudonyms
from radiology_ai.phantom.chest import simulate_chest
from radiology_ai.phantom.hospital import simulate_hospital
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.phantom.limbs import simulate_hand
from radiology_ai.phantom.xray import expose

CLASSES = dict(CR='1.2.840.10008.5.1.4.1.1.1', DX='1.2.840.10008.5.1.4.1.1.1.1')
VALUES = dict(AE='PLANTEDAE', AS='047Y', CS='PLANTED', DA='19770615', DT='19770615101112', TM='101112.5',
    DS='47.11', IS='4711', LO='Planted Lo', LT='Planted text', PN='PLANTED^PERSON',
    SH='Planted Sh', ST='Planted st', UC='Planted uc', UT='Planted ut', UR='http://planted.example',
    UI='1.2.826.0.1.4711.99', OB=b'PLANTED!', OW=b'PLANTED!', UN=b'PLANTED!', US=4711, SS=4711,
    UL=4711, FL=47.5, FD=47.5)
# What the rows with a choice must become, by the Types in PS3.3 (written down here on its own, from the modules:
# Type 1 replaced, Type 2 emptied, Type 3 removed)
TYPE_2 = {'ContentDate', 'ContentTime', 'ContrastBolusAgent', 'PatientSexNeutered',
    'AcquisitionContextSequence'}
TYPE_1 = {'CR': {'PatientID'}, 'DX': {'PatientID', 'ReferencedPerformedProcedureStepSequence'}}


def planted(tag: int):
    "An element of that tag with a value that must not survive."
    vr = dictionary_VR(tag) if dictionary_has_tag(tag) else 'LO'
    vr = vr.split(' or ')[0]
    if vr=='SQ':
        item = Dataset()
        item.ReferencedSOPClassUID = CLASSES['CR']
        item.ReferencedSOPInstanceUID = VALUES['UI']
        item.PersonName = VALUES['PN']
        return DataElement(tag, 'SQ', Sequence([item]))
    return DataElement(tag, vr, VALUES[vr])


def allowed(action: str, keyword: str, kind: str, nested: bool) -> set:
    "The codes that are right for a row, as what is seen in the output: removed, empty, replaced, mapped."
    codes = set(action.split('/'))
    if len(codes)==1: return codes
    if 'U*' in codes: return {'U*'}
    if nested: return {'D'} if 'D' in codes else {'Z'}
    if keyword in TYPE_1[kind]: return {'D'} if 'D' in codes else {'Z'}
    if keyword in TYPE_2 and 'Z' in codes: return {'Z'}
    return {'X'} if 'X' in codes else {'Z'}


def seen(new: Dataset, e: DataElement, names: Pseudonyms) -> set:
    "What was done to element `e`, judged from the output alone; '' if it is still as it was."
    if e.tag not in new: return {'X'}
    n = new[e.tag]
    if n.VR=='SQ':
        if not len(n.value): return {'Z'}
        texts = [str(x.value) for x in n.value[0].iterall()]
        if any(v in t for t in texts for v in (VALUES['UI'], 'PLANTED', 'Planted')): return {''}
        return {'U*', 'D'} if names.uid(VALUES['UI']) in texts else {'D'}
    if n.is_empty: return {'Z'}
    if n.value==e.value: return {''}
    if str(n.value)==names.uid(VALUES['UI']): return {'U', 'D'}
    # "Z: a zero length value, or a non-zero length value that may be a dummy value" (PS3.15 table E.1-1a)
    return {'D', 'Z'}


def table_test() -> tuple[int, int, list]:
    "Right, total and the misses over rows, places and objects."
    names, right, total, misses = Pseudonyms(b'a benchmark secret'), 0, 0, []
    for (tag, mask), action in basic_profile().items():
        tags = ([tag] if mask==0xFFFFFFFF else [tag | (g<<16) for g in (0, 2, 0x1E)] if mask & 0xFFFF
            else [tag | (g<<16) | e for g, e in ((0, 0x3000), (4, 0x0005), (0x1E, 0x2500))])
        for t in tags:
            for kind, sop in CLASSES.items():
                for nested in (False, True):
                    e = planted(t)
                    ds = Dataset()
                    ds.SOPClassUID, ds.PatientID = sop, 'BENCH-4711'
                    with disable_value_validation():
                        if not nested: ds.add(e)
                        else:
                            item = Dataset(); item.add(e)
                            # Referenced SOP Sequence: not in the table
                            ds.add(DataElement(0x00081199, 'SQ', Sequence([item])))
                        out, _ = clean_header(ds, names)
                    where = out if not nested else out[0x00081199].value[0]
                    ok = bool(seen(where, e, names) & allowed(action, e.keyword, kind, nested))
                    right, total = right + ok, total + 1
                    if not ok:
                        misses.append((f'{t>>16:04x},{t & 0xFFFF:04x}', e.keyword, action, kind,
                            'nested' if nested else 'top', sorted(seen(where, e, names))))
    return right, total, misses


def plant(folder: Path, truth: pd.DataFrame, seed: int=0) -> list:
    """Puts a made-up value into every element of the table in each file that opens, at the top and in a
    sequence and in a private element; returns the originals as bytes."""
    secrets, gen = set(), rng(seed, 'plant')
    for n, row in enumerate(truth[truth.broken==''].itertuples()):
        path = folder/row.path
        ds, item = pydicom.dcmread(path), Dataset()
        mine = {vr: f'Zq{vr}{n:04d}Secret' for vr in ('LO', 'SH', 'ST', 'LT', 'UT', 'UC',
            'AE')} | {'PN': f'Quarrington{n:04d}^Zebulon', 'UI': f'1.2.826.0.1.77.{gen.integers(10**9)}'}
        mine['SH'], mine['AE'] = mine['SH'][:16], mine['AE'][:16]
        with disable_value_validation():
            for (tag, mask), _ in basic_profile().items():
                g = tag>>16
                if (g in (0, 2, 4) or mask!=0xFFFFFFFF
                        or tag in (0x0020000D, 0x0020000E, 0x00080018, 0x00100020)):
                    continue
                e = planted(tag)
                if e.VR in mine: e = DataElement(tag, e.VR, mine[e.VR])
                if e.VR=='SQ':
                    e.value[0].PersonName, e.value[0].ReferencedSOPInstanceUID = mine['PN'], mine['UI']
                if tag not in ds or e.VR not in ('DA', 'DT'): ds.add(e)
                item.add(e)
            ds.add(DataElement(0x00081199, 'SQ', Sequence([item])))
            ds.add_new(0x00090010, 'LO', 'ZQVENDOR'); ds.add_new(0x00091001, 'LO', mine['LO'])
            ds.Manufacturer = f"{ds.get('Manufacturer', '')} {mine['PN'].split('^')[0]}"
            pydicom.dcmwrite(path, ds, enforce_file_format=True)
        secrets |= {v.encode() for v in mine.values()} | {b'Zebulon', b'PLANTED!', b'19770615',
            row.patient_id.encode(), row.study_id.encode(), row.image_id.encode()}
    return sorted(secrets)


def hospital_test(n: int=20) -> dict:
    """A planted hospital through `deidentify` with modified dates: leaks in any byte of the output,
    intervals, references, pixels."""
    with tempfile.TemporaryDirectory() as t:
        t = Path(t)
        truth = simulate_hospital(t/'in', n=n, seed=7, size=256, show=False)
        secrets = plant(t/'in', truth)
        start = time.perf_counter()
        account = deidentify(t/'in', t/'out', retain=('dates_modified',), key=b'a benchmark secret',
            link=t/'link.csv', burned_in='keep', show=False)
        seconds = time.perf_counter() - start
        files = [p for p in (t/'out').rglob('*') if p.is_file()]
        data = {p: p.read_bytes() for p in files}
        for p in files: # deflated data sets as their elements
            if (p.suffix=='.dcm' and pydicom.dcmread(p,
                    stop_before_pixels=True).file_meta.TransferSyntaxUID.is_deflated):
                b, ds = io.BytesIO(), pydicom.dcmread(p)
                pydicom.dcmwrite(b, Dataset({e.tag: e for e in ds}), implicit_vr=False, little_endian=True)
                data[p] += b.getvalue()
        leaks = [(p.name, s) for p, d in data.items() for s in secrets if s in d or s in str(p).encode()]
        links = pd.read_csv(t/'link.csv').query("status=='ok'")
        links = links[links.original.isin([str((t/'in'/p).absolute()) for p in truth[truth.broken==''].path])]
        pairs = [(pydicom.dcmread(o), pydicom.dcmread(t/'out'/p)) for o, p in zip(links.original, links.path)]
        moved = pd.DataFrame([dict(p=a.PatientID,
            d=(pd.Timestamp(b.StudyDate) - pd.Timestamp(a.StudyDate)).days,
            s=(a.StudyInstanceUID, b.StudyInstanceUID), q=b.PatientID) for a, b in pairs])
        one = lambda a, b: len(set(zip(a, b)))==len(set(a))==len(set(b))
        return dict(files=len(account), ok=int((account.status=='ok').sum()),
            broken=int((truth.broken!='').sum()), tokens=len(secrets), leaks=len(leaks),
            first_leaks=leaks[:5],
            one_shift_a_patient=bool((moved.groupby('p').d.nunique()==1).all()),
            patients_1_to_1=one(moved.p, moved.q), studies_1_to_1=one(moved.s.str[0], moved.s.str[1]),
            same_pixels=all(a.PixelData==b.PixelData for a, b in pairs),
            files_per_s=round(len(account)/seconds, 1),
            causes=Counter(account.cause[account.status!='ok']).most_common(8))


NAMES = ['SMITH^JOHN', 'DOE, JANE', 'GARCIA LOPEZ MARIA', 'Mueller Anna', "O'Brien Pat", 'NGUYEN THI HOA',
    'JOHNSON WILLIAM', 'Rossi Paolo']


def film(seed: int, size: int):
    "A simulated film: its body part and pixels."
    part = ('knee', 'chest', 'hand')[seed%3]
    p = (simulate_knee(seed, size=size) if part=='knee' else simulate_chest(seed, size=size) if part=='chest'
        else simulate_hand(seed, side='R', size=size))
    return part, expose(p, rng(seed, 'film')).pixels


def type_on(pixels, gen):
    """The film with one line of type and which pixels are type (with a visible contrast), and its
    circumstances."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    h, w = pixels.shape
    t = [str(gen.choice(NAMES)), f'ID: {gen.integers(10**6, 10**8)}',
        f'{gen.integers(1, 29):02d}.{gen.integers(1, 13):02d}.{gen.integers(1930, 2010)}',
        f'DOB {gen.integers(1930, 2010)}-{gen.integers(1, 13):02d}-11',
         f'St. Mary Hospital {gen.integers(10, 24)}:{gen.integers(10, 60)}'][gen.integers(5)]
    high, stroke_font = max(9, int(max(h, w)*gen.uniform(.014, .035))), gen.random()<.4
    fonts = sorted((Path(matplotlib.get_data_path())/'fonts/ttf').glob('DejaVuSans*.ttf')) + sorted(
        (Path(matplotlib.get_data_path())/'fonts/ttf').glob('DejaVuSerif*.ttf'))
    if stroke_font:
        f = int(gen.choice([cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX,
            cv2.FONT_HERSHEY_PLAIN]))
        thick = max(1, high//12)
        scale = cv2.getFontScaleFromHeight(f, high, thick)
        (tw, th), _ = cv2.getTextSize(t, f, scale, thick)
    else:
        f = ImageFont.truetype(str(gen.choice([p for p in fonts if 'Display' not in p.name])), int(high*1.35))
        x0, y0, x1, y1 = f.getbbox(t)
        tw, th = x1-x0, y1-y0
    corner = gen.random()<.75
    right, low = max(w-tw-6, 4), max(h-th-10, 7)
    x, y = ((int(gen.choice([4, right])), int(gen.choice([6, low]))) if corner
        else (int(gen.uniform(4, right+1)), int(gen.uniform(6, low+1))))
    ink = np.zeros((h, w), np.uint8)
    if stroke_font: cv2.putText(ink, t, (x, y+th), f, scale, 255, thick, cv2.LINE_AA)
    else:
        page = Image.new('L', (w, h))
        ImageDraw.Draw(page).text((x, y), t, fill=255, font=f)
        ink = np.asarray(page)
    under = float(np.median(pixels[ink>128])) if (ink>128).any() else 0.
    value = (1. if gen.random()<.7 else max(.85, min(1., under+.4))) if under<.6 or gen.random()<.2 else 0.
    a = ink/255
    return np.clip(pixels*(1-a) + value*a, 0, 1).astype(np.float32), (ink>128) & (np.abs(pixels
        -value)>.1), dict(high=high, stroke_font=stroke_font, corner=corner,
        contrast=round(abs(value-under), 2))


def text_test(n: int, first: int=5000, pictures: Path|None=None) -> dict:
    """Recall of visible text pixels and false alarms on `n` simulated films; seeds from `first` on were not
    used for setting the limits."""
    rows, alarms, seconds, area = [], 0, 0., 0
    for seed in range(first, first+n):
        part, pixels = film(seed, (512, 900, 1400, 2000)[seed%4])
        start = time.perf_counter()
        alarms += len(find_text((pixels*4095).astype(np.uint16)))>0
        seconds, area = seconds + time.perf_counter() - start, area + pixels.size
        typed, ink, about = type_on(pixels, rng(seed, 'type'))
        if not ink.any(): continue
        cover = np.zeros(ink.shape, bool)
        for x1, y1, x2, y2 in find_text((typed*4095).astype(np.uint16)): cover[y1:y2, x1:x2] = True
        rows.append(dict(seed=seed, part=part, covered=(ink & cover).sum()/ink.sum(), black=cover.mean(),
            ink=int(ink.sum()), **about))
        if pictures and rows[-1]['covered']<.95:
            cv2.imwrite(str(pictures/f'missed_{seed}.png'), (typed*255).astype(np.uint8))
    d = pd.DataFrame(rows)
    d.attrs = {}
    return dict(films=len(d), pixels_covered=round(float((d.covered*d.ink).sum()/d.ink.sum()), 4),
        lines_found=round(float((d.covered>.5).mean()), 4),
        lines_whole=round(float((d.covered>=.99).mean()), 4),
        false_alarms=f'{alarms} of {n} films', ms_a_megapixel=round(1e9*seconds/area, 0),
        missed=d[d.covered<.99].drop(columns='ink').round(3).to_dict('records')[:8])


def real_test(folder: Path, pictures: Path|None=None) -> dict:
    """Files of each real folder in which text is found. ChestX-ray14 pictures do hold type (PORTABLE, AP,
    initials on markers): look at the pictures before calling them false."""
    out = {}
    for name, every in (('chest_nih', 9), ('knee_oai', 5)):
        files = sorted(p for p in (folder/name).rglob('*')
            if p.suffix in ('.jpg', '.png', '.jpeg'))[4::every][:160]
        hits, tiles = 0, []
        for p in files:
            im = cv2.imread(str(p), 0)
            boxes = find_text(im)
            hits += len(boxes)>0
            if len(boxes) and pictures:
                x1, y1, x2, y2 = map(int, boxes[0])
                im = cv2.copyMakeBorder(cv2.rectangle(cv2.cvtColor(im, cv2.COLOR_GRAY2BGR), (x1, y1),
                    (x2, y2), (0, 0, 255), 1), 64, 64, 64, 64, cv2.BORDER_CONSTANT)
                tiles.append(cv2.resize(im[(y1+y2)//2:(y1+y2)//2+128, (x1+x2)//2:(x1+x2)//2+128], (180, 180)))
        out[name] = f'{hits} of {len(files)}'
        if tiles:
            tiles += [np.zeros((180, 180, 3), np.uint8)]*(-len(tiles)%8)
            cv2.imwrite(str(pictures/f'{name}.png'),
                np.vstack([np.hstack(tiles[i:i+8]) for i in range(0, len(tiles), 8)]))
    from radiology_ai.dicom.read import read_radiograph
    found = []
    for p in sorted((folder/'dicom').glob('*.dcm')):
        try: found.append((p.name, len(find_text(read_radiograph(p).pixels))))
        except RadiologyError: continue
    return out | dict(dicom=f'{sum(n>0 for _, n in found)} of {len(found)}',
        dicom_with=[n for n, k in found if k])


def reports():
    "The tests of identity, which hold the places."
    spec = importlib.util.spec_from_file_location('reports',
        Path(__file__).parent.parent/'tests/test_identity_reports.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planted_film(r, i: int, gen):
    """The `i`-th film: its place, the data set, the bytes that must not be found again, and the picture
    (None: not compared)."""
    high = int(gen.integers(60, 140)), int(gen.integers(100, 200))
    a = r.grey(12, *high)
    told = (r.NAME, b'WINTERBOTTOM', b'MRN', b'17.3.1951')
    kind = ('jpeg', 'lossless', 'jpegls', 'jpeg2k', 'htj2k', 'rle', 'bits', 'bits in a stream', 'tail',
        'name', 'date', 'unlisted')[i%12]
    if kind in ('jpeg', 'lossless', 'jpegls', 'jpeg2k', 'htj2k', 'rle'):
        places = r.JPEG_PLACES if i%12<3 else r.J2K_PLACES if i%12<5 else r.RLE_PLACES
        name, b = sorted(places)[(i//12)%len(places)], (a>>4).astype('u1') if kind=='jpeg' else a
        return f'{kind} {name}', r.stream(kind, b, places[name]), told, r.numbers(r.stream(kind, b))
    if kind.startswith('bits'):
        t = cv2.resize(r.letters((120, 160)), a.shape[::-1],
            interpolation=cv2.INTER_NEAREST)<<int(gen.integers(12, 16))
        stream = ('lossless', 'jpegls', 'jpeg2k', 'htj2k', 'rle')[(i//12)%5]
        return kind, r.film(a | t) if kind=='bits' else r.stream(stream, a | t), (), a
    if kind=='tail':
        ds = r.film(a)
        ds.PixelData += r.even(r.TOLD)
        return kind, ds, told, a
    if kind=='name':
        text, name = r.NAMES[(i//12)%len(r.NAMES)]
        return kind, r.meaning(text, PatientName=name), [w.encode() for w in text.split()[1:]
            if len(w.encode())>3], None
    if kind=='date':
        text = r.DATES[(i//12)%len(r.DATES)]
        return kind, r.meaning(f'AP born {text}', PatientBirthDate='19510317'), [text.encode()], None
    inner = Dataset()
    for k, v in r.UNLISTED.items(): setattr(inner, k, v)
    return kind, r.film(a, ReferencedImageSequence=Sequence([inner]), **r.UNLISTED), told, a


def faults(dciodvfy: str, path: Path) -> set:
    "The errors that dciodvfy finds in a file, without values."
    said = subprocess.run([dciodvfy, str(path)], capture_output=True, text=True, errors='replace').stderr
    return {re.sub(r'[<=(].*', '', line).strip() for line in said.splitlines() if line.startswith('Error')}


def places_test(n: int, dciodvfy: str|None=None) -> dict:
    "Identity in `n` made-up files, a place each: what is found again, pictures that differ, files held back."
    r, films = reports(), []
    with tempfile.TemporaryDirectory() as t, disable_value_validation():
        t = Path(t)
        (t/'in').mkdir()
        for i in range(n):
            films.append(planted_film(r, i, rng(i, 'place')))
            films[-1][1].SOPInstanceUID = f'1.2.77.1.{i}'
            pydicom.dcmwrite(t/f'in/{i:05d}.dcm', films[-1][1], enforce_file_format=True)
        start = time.perf_counter()
        account = deidentify(t/'in', t/'out', key=b'a benchmark secret', burned_in='keep', show=False)
        seconds = time.perf_counter() - start
        left, other, new_faults = [], [], Counter()
        for row, (place, _, told, picture) in zip(account.itertuples(), films):
            if row.status!='ok': continue
            data = (t/'out'/row.path).read_bytes()
            if any(s in data or s in data.upper() for s in told): left.append(place)
            if (picture is not None and not np.array_equal(r.numbers(pydicom.dcmread(t/'out'/row.path)),
                    picture)):
                other.append(place)
            # not known to it
            if (dciodvfy and 'htj2k' not in place and films[row.number
                    -1][1].file_meta.TransferSyntaxUID!=r.HTJ2K):
                new_faults.update(faults(dciodvfy, t/'out'/row.path)
                    - faults(dciodvfy, t/f'in/{row.number:05d}.dcm'))
        return dict(files=n, ok=int((account.status=='ok').sum()), left=Counter(left),
            other_picture=Counter(other),
            not_ok=Counter(zip(account.cause[account.status!='ok'],
            [f[0] for f, s in zip(films, account.status) if s!='ok'])),
            files_per_s=round(n/seconds, 1), new_faults=dict(new_faults) if dciodvfy else 'not looked for')


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--films', type=int, default=45)
    a.add_argument('--pictures', type=Path)
    a.add_argument('--places', type=int, default=0)
    a.add_argument('--dciodvfy')
    o = a.parse_args()
    if o.pictures: o.pictures.mkdir(parents=True, exist_ok=True)
    if o.places:
        for k, v in places_test(o.places, o.dciodvfy).items(): print(f'5. {k}: {v}', flush=True)
        return
    right, total, misses = table_test()
    print(f'1. Table E.1-1: {right} of {total} actions right ({right/total:.4%}); misses: {misses[:20] or "none"}', flush=True)
    for k, v in hospital_test().items(): print(f'2. {k}: {v}', flush=True)
    for k, v in text_test(o.films, pictures=o.pictures).items(): print(f'3. {k}: {v}', flush=True)
    real = os.environ.get('RADIOLOGY_AI_REAL_DATA')
    print('4. real radiographs in which text is found:',
        real_test(Path(real), o.pictures) if real else 'skipped, RADIOLOGY_AI_REAL_DATA is not set')


if __name__=='__main__': main()
