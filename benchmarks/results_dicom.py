"""DICOM results of every film of the kit, judged by validators and read back.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/results_dicom.py [--out FOLDER]

Findings made by hand (a mask, overlapping ones, a box, points, a grade, a label of other letters) on each DICOM film that can be
read become SR with and without a segmentation, SEG, presentation state and secondary capture, in a first version and as a
revision. Judges: dciodvfy (Debian: dicom3tools), dcmdump, dsr2html, dcm2pnm and dcmp2pgm (DCMTK: it shows the film through the
presentation state, in the grey of the library's reading), and whether highdicom and pydicom read back what was written, to the
pixel. A judge that is not installed is left out and said so.
Then the time of a film of 5 megapixels, by part, as processor time of one thread.
"""
import argparse
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import highdicom
import numpy as np
import pydicom

from radiology_ai.core import DicomError, RadiologyError, save_picture
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.dicom.source import read_source
from radiology_ai.dicom.write import (
    Algorithm,
    presentation_state,
    report_again,
    save_result,
    secondary_capture,
    segmentation,
    structured_report,
)
from radiology_ai.findings import Finding, Reading
from radiology_ai.serve.outputs import finding_picture

BY = Algorithm('chest', '0123456789abcdef'*4)


def findings_of(shape) -> list[Finding]:
    "Something of each kind, on a film of that shape."
    h, w = shape
    y, x = np.mgrid[:h, :w]
    disc = ((y - .4*h)/(.2*h))**2 + ((x - .3*w)/(.15*w))**2<1
    ring = (((y - .5*h)/(.25*h))**2 + ((x - .4*w)/(.25*w))**2<1) & ~disc
    points = np.array([[.2*w, .1*h], [.8*w, .12*h]])
    return [Finding('Pneumothorax', .83, True, mask=disc),
        Finding('opacity', .71, True, mask=ring | (y==h - 1)),
        Finding('opacity', .4, False, box=(.1*w, .1*h, .5*w, .7*h)), Finding('apices', 1., points=points),
        Finding('fractured', .62, True, value='Schatzker III'), Finding('Köhler\\Naht', .2, value=2.5)]


def overlay(source, findings):
    "The presentation state; None over a film that is not grey."
    try: return presentation_state(source, findings, BY)
    except DicomError: return None


def made(path, out) -> dict:
    "The results of one film as files, by kind; raises `RadiologyError`."
    source = read_source(path)
    findings = findings_of(source.shape)
    film = read_radiograph(path)
    masks = segmentation(source, findings, BY)
    picture = finding_picture(film, Reading(str(path), seen=(0, 0, source.shape[1], source.shape[0]),
        findings=tuple(findings)))
    facts = dict(tier='urgent', triage=.9)
    results = {'sr': structured_report(source, findings, BY, facts=facts, masks=masks),
        'sr, no seg': structured_report(source, findings, BY), 'seg': masks,
        'pr': overlay(source, findings), 'sc': secondary_capture(source, picture, BY)}
    results = {k: ds for k, ds in results.items() if ds is not None}
    files = {k: out/f'{Path(path).stem}_{n}.dcm' for n, k in enumerate(results)}
    for k, ds in results.items(): save_result(ds, files[k])
    files['sr, revised'] = out/f'{Path(path).stem}_r.dcm'
    shutil.copy(files['sr'], files['sr, revised'])
    save_result(report_again(files['sr, revised'], source, findings[:3], BY), files['sr, revised'])
    return dict(path=path, files=files, findings=findings, picture=picture)


def ran(*words) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, errors='replace')


def by_dciodvfy(kind, path, was):
    return [line for line in (ran('dciodvfy', path).stderr).splitlines() if line.startswith('Error')]


def by_dcmdump(kind, path, was):
    done = ran('dcmdump', path)
    return [done.stderr.strip()[:80]] if done.returncode or done.stderr.startswith('E:') else []


def by_dsr2html(kind, path, was):
    if not kind.startswith('sr'): return None
    done = ran('dsr2html', path)
    bad = [line for line in done.stderr.splitlines() if line.startswith(('E:', 'F:'))]
    return bad if done.returncode==0 and 'Measurement Report' in done.stdout else bad or ['no report']


def by_dcm2pnm(kind, path, was):
    if kind!='sc': return None
    with tempfile.TemporaryDirectory() as tmp:
        done = ran('dcm2pnm', '--write-raw-pnm', path, Path(tmp)/'a.ppm')
        if done.returncode: return [done.stderr.strip()[:80]]
        import cv2
        same = np.array_equal(cv2.imread(str(Path(tmp)/'a.ppm'))[..., ::-1], was['picture'])
    return [] if same else ['other pixels']


def by_places(ds, findings) -> list:
    "Box and points of a presentation state, as float32 holds them."
    drawn = [np.reshape(o.GraphicData, (-1, 2)) for o in ds.GraphicAnnotationSequence[0].GraphicObjectSequence]
    box = np.float32(next(f.box for f in findings if f.box))
    points = np.float32(next(f.points for f in findings if f.points is not None))
    bad = [] if any(np.array_equal([*d.min(0), *d.max(0)], box) for d in drawn) else ['other box']
    return bad + ['other point' for p in points if not any(len(d)==1 and np.array_equal(d[0], p) for d in drawn)]


def by_dcmp2pgm(kind, path, was):
    "The film as DCMTK shows it through the state, against the reading of the library, away from what is drawn."
    if kind!='pr': return None
    import cv2
    with tempfile.TemporaryDirectory() as tmp:
        film = pydicom.dcmread(was['path'], force=True)
        if film.file_meta.get('TransferSyntaxUID') is None:
            film.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        try: # what the tool can't
            if film.file_meta.TransferSyntaxUID.is_compressed: film.decompress()
        except RuntimeError: return None # nor pydicom
        if not film.get('PatientName'): return None # DCMTK opens no state without the name, which is none of type 1
        film.save_as(Path(tmp)/'film.dcm', enforce_file_format=True)
        done = ran('dcmp2pgm', '-p', path, Path(tmp)/'film.dcm', Path(tmp)/'a.pgm')
        if done.returncode or not (Path(tmp)/'a.pgm').exists(): return [done.stderr.strip()[:80]]
        shown = cv2.imread(str(Path(tmp)/'a.pgm'), cv2.IMREAD_GRAYSCALE)/255.
    own = read_radiograph(was['path']).pixels
    if shown.shape!=own.shape: return [f'{shown.shape} pixels, not {own.shape}']
    off = float(np.quantile(np.abs(shown - own), .95))
    return [] if off<.02 else [f'the grey is off by {off:.2f}']


def by_pydicom(kind, path, was):
    ds = pydicom.dcmread(path)
    if kind=='pr': return by_places(ds, was['findings'])
    if kind=='sc': return [] if np.array_equal(ds.pixel_array, was['picture']) else ['other pixels']
    if kind!='seg': return [] if ds.ContentTemplateSequence[0].TemplateIdentifier=='1500' else ['no TID 1500']
    masks = [f.mask for f in was['findings'] if f.mask is not None]
    return [] if np.array_equal(ds.pixel_array.astype(bool), masks) else ['other pixels']


def by_highdicom(kind, path, was):
    if kind in ('sc', 'pr'): return None
    if kind=='seg':
        seg = highdicom.seg.segread(path)
        source = seg.get_source_image_uids()[0][2]
        got = seg.get_pixels_by_source_instance([source])[0].transpose(2, 0, 1)
        return ([] if np.array_equal(got.astype(bool),
            [f.mask for f in was['findings'] if f.mask is not None]) else ['other pixels'])
    content = highdicom.sr.srread(path).content
    boxes = [g.roi.value for g in content.get_planar_roi_measurement_groups() if g.roi is not None
        and len(g.roi.value)==5]
    wanted = np.float32(next(f.box for f in was['findings'] if f.box))
    return [] if any(np.array_equal([*b.min(0), *b.max(0)], wanted) for b in boxes) else ['other box']


def judged(films, judges, out) -> tuple:
    "Files and errors by (kind, judge), and why a film has no result."
    table, refused, errors = Counter(), Counter(), []
    for path in films:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                was = made(path, out)
        except RadiologyError as e:
            refused[f'{path.name}: {getattr(e, "cause", e.what)}'] += 1
            continue
        for kind, file in was['files'].items():
            for name, judge in judges.items():
                bad = judge(kind, file, was)
                if bad is None: continue
                table[kind, name] += np.array([1, len(bad)])
                errors += [f'{path.name} {kind} {name}: {b}' for b in bad]
    return table, refused, errors


def print_table(table, judges):
    kinds = list(dict.fromkeys(k for k, _ in table))
    print('| files / errors |' + ' | '.join(judges) + ' |\n|---|' + '---|'*len(judges))
    for kind in kinds:
        cells = [f'{table[kind, j][0]} / {table[kind, j][1]}' if (kind, j) in table else '-' for j in judges]
        print(f'| {kind} | ' + ' | '.join(cells) + ' |')


def speed(shape=(2500, 2048), n=7):
    "Prints the median processor time of each part, in milliseconds."
    from radiology_ai.core import rng
    from radiology_ai.phantom.hospital import write_dicom
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        write_dicom(tmp/'film.dcm', rng(0, 'film').random(shape), spacing=.14)
        findings, laps = findings_of(shape)[:3], []
        for k in range(n + 1):
            lap, t = {}, time.process_time()
            def took(part, lap=lap):
                nonlocal t
                lap[part], t = 1000*(time.process_time() - t), time.process_time()
            source = read_source(tmp/'film.dcm'); took('header')
            masks = segmentation(source, findings, BY); took('SEG')
            report = structured_report(source, findings, BY, masks=masks); took('SR')
            state = presentation_state(source, findings, BY); took('state')
            film = read_radiograph(tmp/'film.dcm'); took('pixels of the film')
            picture = finding_picture(film, Reading('', findings=tuple(findings))); took('picture')
            capture = secondary_capture(source, picture, BY); took('SC')
            for i, ds in enumerate((masks, report, state, capture)): save_result(ds, tmp/f'{k}_{i}.dcm')
            took('to the disk')
            laps.append(lap)
    parts = {p: float(np.median([lap[p] for lap in laps[1:]])) for p in laps[0]}
    print(f'{shape[0]} x {shape[1]} pixels, 3 findings, 2 of them masks: {sum(parts.values()):.0f} ms ('
        + ', '.join(f'{k} {v:.0f}' for k, v in parts.items())
        + f'); the first film of a process {sum(laps[0].values()):.0f} ms')


def main():
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument('--out', type=Path, help='where results and pictures stay')
    args = parse.parse_args()
    data = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])
    films = [p for folder in ('dicom', 'dicom_edge') for p in sorted((data/folder).glob('*.dcm'))]
    judges = {'dciodvfy': by_dciodvfy, 'dcmdump': by_dcmdump, 'dsr2html': by_dsr2html, 'dcm2pnm': by_dcm2pnm,
        'dcmp2pgm': by_dcmp2pgm}
    absent = [j for j in judges if not shutil.which(j)]
    judges = {k: v for k, v in judges.items() if k not in absent} | {'highdicom': by_highdicom,
        'pydicom': by_pydicom}
    if absent: print('not installed:', ', '.join(absent))
    with tempfile.TemporaryDirectory() as tmp:
        out = args.out or Path(tmp)
        out.mkdir(parents=True, exist_ok=True)
        table, refused, errors = judged(films, judges, out)
        if args.out:
            for p in sorted(p for p in out.glob('*.dcm') if pydicom.dcmread(p, stop_before_pixels=True).Modality=='OT'):
                save_picture(p.with_suffix('.png'), pydicom.dcmread(p).pixel_array)
    print(f'{len(films)} films, {len(films) - sum(refused.values())} with results\n')
    print_table(table, judges)
    print('\nno result:', *refused, sep='\n- ')
    for e in errors[:40]: print('error:', e)
    speed()


if __name__=='__main__': main()
