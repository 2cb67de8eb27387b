"""How far do two readings of the same chests agree? RSNA's boxes of lung opacity beside ChestX-Det's outlines, film by film and box by
box.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/readers.py [--draws 2000]

`chest_nih`: films of ChestX-ray14 that the RSNA challenge of 2018 has read (`rsna_class`, and boxes on the films of the class "Lung
Opacity") and that ChestX-Det (Deepwise, 2020) has read (outlines of 13 findings, or "No Finding"). Both are given on 1024 x 1024
pixels. RSNA asks for opacities that speak for pneumonia; ChestX-Det has no such finding, so it is mapped in two ways:
  consolidation   its outlines "Consolidation" alone
  any opacity     also "Atelectasis", "Fibrosis", "Nodule", "Mass" and "Diffuse Nodule": every opacity of the lung itself. Effusion,
                  pleural thickening, calcification, fracture, heart, emphysema and pneumothorax are none.
A box of ChestX-Det is that of its outline as its table gives it; the same box under two findings counts once. Boxes are matched by the
rules of the metrics: each takes the best free box of the other reading, above the threshold. A reading has no scores: the larger box
counts as the surer one, which matters for AP50 alone.
Intervals draw patients, of whom some have several films. "Another film" gives each film the boxes of another one (all shifts in turn):
what boxes agree by lying where opacities lie in most chests.
"""
import argparse
import os
import platform
from pathlib import Path

import numpy as np
import pandas as pd

from radiology_ai.metrics.boxes import by_image, match_boxes
from radiology_ai.metrics.classification import quadratic_kappa
from radiology_ai.metrics.detection import coco_map_ci, detection_table, rsna_map_ci
from radiology_ai.metrics.intervals import Interval, bootstrap, bootstrap_ci, draws_ci, mean_ci, proportion_ci

CONSOLIDATION = ('Consolidation',)
OPACITY = (*CONSOLIDATION, 'Atelectasis', 'Fibrosis', 'Nodule', 'Mass', 'Diffuse Nodule')
MAPPINGS = {'consolidation': CONSOLIDATION, 'any opacity': OPACITY}
LEVELS, SIDE = (.3, .4, .5), 1024


def readings(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The films that both have read (image_id, patient, rsna_class), the boxes of RSNA, and the outlines with
    their finding."""
    films = pd.read_csv(folder/'manifest.csv',
        dtype={'patient_id': str}).rename(columns={'image': 'image_id'})
    boxes = pd.read_csv(folder/'boxes_1024.csv').rename(columns={'image': 'image_id', 'x': 'x1', 'y': 'y1'})
    boxes = boxes[boxes.set=='RSNA'].assign(x2=lambda b: b.x1+b.w, y2=lambda b: b.y1+b.h)
    outlines = pd.read_csv(folder/'polygons_1024.csv').rename(columns={'image': 'image_id'})
    print(f"{boxes.image_id.nunique()} films with RSNA boxes, {outlines.image_id.nunique()} read by ChestX-Det, "
        f"{len(set(boxes.image_id) & set(outlines.image_id))} in both")
    films = films[films.rsna_class.notna() & films.image_id.isin(outlines.image_id)].reset_index(drop=True)
    print(f"{len(films)} films of {films.patient_id.nunique()} patients with a class of RSNA and a reading of ChestX-Det\n")
    return films, *(t[t.image_id.isin(films.image_id)] for t in (boxes, outlines))


def kind(findings) -> str:
    "What ChestX-Det says of a film."
    for name, of in {'consolidation': CONSOLIDATION, 'another opacity': OPACITY,
            'No Finding': ['No Finding']}.items():
        if findings.isin(of).any(): return name
    return 'findings, no opacity of the lung'


def shown(*ci) -> str: return f"{ci[0]:.2f} ({ci[1]:.2f} to {ci[2]:.2f})"


def presence(films, outlines, findings, draws) -> list:
    "Film by film: the four counts, the share of films that agree, and kappa."
    a = (films.rsna_class=='Lung Opacity').to_numpy()
    b = films.image_id.isin(outlines.image_id[outlines.finding.isin(findings)]).to_numpy()
    cells = [int((x & y).sum()) for x, y in ((a, b), (a, ~b), (~a, b), (~a, ~b))]
    kappa = bootstrap_ci(quadratic_kappa, a.astype(int), b.astype(int), groups=films.patient_id, draws=draws)
    return [*cells, shown(*proportion_ci(a==b, groups=films.patient_id)), shown(*kappa)]


def lists(films, boxes, outlines, findings) -> tuple[list, list]:
    "The boxes of both readings for each film, the larger first."
    def sorted_boxes(table):
        table = table.assign(area=(table.x2-table.x1)*(table.y2-table.y1)).drop_duplicates(['image_id', 'x1',
            'y1', 'x2', 'y2'])
        return by_image(films.image_id, table.sort_values('area', ascending=False, kind='stable'))
    return sorted_boxes(boxes), sorted_boxes(outlines[outlines.finding.isin(findings)])


def areas(boxes) -> list: return [(b[:, 2]-b[:, 0])*(b[:, 3]-b[:, 1]) for b in boxes]


def f1_ci(model, truth, patients, iou, draws) -> Interval:
    "F1 of all boxes together."
    m = match_boxes(model, areas(model), truth, (iou,))
    hits = np.bincount(m.image[m.hit[:, 0]], minlength=len(truth))
    both = m.boxes+m.truths
    def f1(w):
        with np.errstate(invalid='ignore'): return (2*hits)@w/(both@w)
    value = 2*hits.sum()/both.sum()
    return draws_ci(value, bootstrap(f1, patients, draws=draws), (0, 1), .95, len(set(patients[both>0])))


def by_chance(model, truth, iou) -> float:
    "F1 with the boxes of another film, over all shifts of the films that both call positive."
    model, truth = zip(*[(m, t) for m, t in zip(model, truth) if len(m) and len(t)])
    shifts, boxes = range(1, len(model)), sum(map(len, model)) + sum(map(len, truth))
    hits = sum(match_boxes(s, areas(s), truth, (iou,)).hit.sum()
        for s in (model[k:]+model[:k] for k in shifts))
    return 2*hits/(len(shifts)*boxes)


def covered(boxes) -> np.ndarray:
    "The pixels that any of the boxes covers."
    out = np.zeros((SIDE, SIDE), bool)
    for x1, y1, x2, y2 in np.clip(np.round(boxes).astype(int), 0, SIDE): out[y1:y2, x1:x2] = True
    return out


def dice_of(a, b) -> float:
    a, b = covered(a), covered(b)
    return 2*(a & b).sum()/(a.sum() + b.sum())


def where(films, rsna, det, draws) -> dict:
    "The rows of a table: how far the boxes lie on one another."
    patients, rows = films.patient_id.to_numpy(), {}
    args = det, areas(det), rsna
    for iou in LEVELS:
        t = detection_table(*args, 0., groups=patients, iou=iou, draws=draws)[['value', 'low', 'high']]
        rows[f"share of ChestX-Det's boxes that meet one of RSNA, IoU > {iou}"] = shown(*t.loc['boxes that hit'])
        rows[f"share of RSNA's boxes that are met, IoU > {iou}"] = shown(*t.loc['sensitivity by lesion'])
        rows[f"F1, IoU > {iou}"] = shown(*f1_ci(det, rsna, patients, iou, draws))
        rows[f"F1 with the boxes of another film, IoU > {iou}"] = f"{by_chance(det, rsna, iou):.2f}"
    rows["RSNA score, 0.40 to 0.75"] = shown(*rsna_map_ci(*args, groups=patients, draws=draws))
    for name, (m, t) in {'ChestX-Det as the model': (det, rsna), 'RSNA as the model': (rsna, det)}.items():
        ap = coco_map_ci(m, areas(m), t, groups=patients, draws=draws).loc['AP50']
        rows[f"AP50, {name}"] = shown(ap.value, ap.low, ap.high)
    both = [k for k in range(len(films)) if len(rsna[k]) and len(det[k])]
    dice = mean_ci([dice_of(rsna[k], det[k]) for k in both], patients[both], limits=(0, 1))
    rows["Dice of the covered areas of films with boxes of both"] = f"{shown(*dice)}, {len(both)} films"
    return rows


def table(rows: dict, head) -> str:
    lines = [f"| {' | '.join(map(str, ['', *head]))} |", '|'+'---|'*(len(head)+1)]
    return '\n'.join(lines + [f"| {name} | {' | '.join(map(str, r))} |" for name, r in rows.items()]) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--draws', type=int, default=2000, help='of patients')
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, pandas {pd.__version__}")
    films, boxes, outlines = readings(Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/'chest_nih')
    print(table({name: presence(films, outlines, f, args.draws) for name, f in MAPPINGS.items()},
        ['both', 'RSNA alone', 'ChestX-Det alone', 'neither', 'films that agree', 'kappa']))
    seen = pd.crosstab(films.rsna_class, films.image_id.map(outlines.groupby('image_id').finding.agg(kind)))
    print(table({k: list(r) for k, r in zip(seen.index, seen.values)}, list(seen.columns)))
    drawn = films.image_id.isin(boxes.image_id)
    columns = {}
    for which, keep in (('all films', np.ones(len(films), bool)),
            (f'the {drawn.sum()} films with boxes of RSNA', drawn)):
        some = films[keep].reset_index(drop=True)
        for name, findings in MAPPINGS.items():
            inside = [t[t.image_id.isin(some.image_id)] for t in (boxes, outlines)]
            rsna, det = lists(some, *inside, findings)
            head = f"{name}, {which}: {sum(map(len, rsna))} boxes of RSNA, {sum(map(len, det))} of ChestX-Det"
            columns[head] = where(some, rsna, det, args.draws)
    rows = pd.DataFrame(columns)
    rows = pd.DataFrame(columns).fillna('')
    print(table({k: list(r) for k, r in zip(rows.index, rows.values)}, list(columns)))


if __name__=='__main__': main()
