"""The way of the data on simulated films, each step beside what one would write without the library.

    python benchmarks/foundation.py [--patients 100]
"""
import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pydicom
from PIL import Image

from radiology_ai.dicom.index import image_files, index_dicoms
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.phantom.hospital import simulate_hospital
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder


def timed(f, n: int) -> float:
    "Calls or images a second."
    start = time.perf_counter()
    f()
    return n/(time.perf_counter()-start)


def plain_index(files: list) -> list:
    "What a notebook does: pydicom's own header reading, a few tags, errors skipped."
    rows = []
    for f in files:
        try: ds = pydicom.dcmread(f, stop_before_pixels=True)
        except Exception: continue
        rows.append({k: str(ds.get(k, '')) for k in ('PatientID', 'StudyInstanceUID', 'SOPInstanceUID',
            'Modality', 'BodyPartExamined', 'ViewPosition', 'Laterality', 'Manufacturer', 'Rows', 'Columns')})
    return rows


def plain_read(files: list):
    "What a notebook does: pydicom's default decoder, min-max, OpenCV's area resizing."
    for f in files:
        try: ds = pydicom.dcmread(f); a = ds.pixel_array.astype(np.float32)
        except Exception: continue
        a = (a-a.min())/max(np.ptp(a), 1)
        cv2.resize(1-a if ds.PhotometricInterpretation=='MONOCHROME1' else a, (224, 224),
            interpolation=cv2.INTER_AREA)


def our_read(files: list):
    for f in files: read_radiograph(f, size=(224, 224))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--patients', type=int, default=100)
    n = parser.parse_args().patients
    warnings.filterwarnings('ignore')
    with tempfile.TemporaryDirectory() as folder:
        folder, rows = Path(folder), []
        start = time.perf_counter()
        truth = simulate_hospital(folder/'dicom', n=n, show=False)
        rows.append(('simulate and write DICOM, 512 px, two processes',
            len(truth)/(time.perf_counter()-start), None))
        files = image_files(folder/'dicom')
        index_dicoms(files)
        rows.append(('index headers, one process (peer: pydicom loop)',
            timed(lambda: index_dicoms(files, workers=1), len(files)),
            timed(lambda: plain_index(files), len(files))))
        good = [str(folder/'dicom'/p) for p in truth.path[truth.broken=='']]
        rows.append(('read to 224 x 224, one process (peer: pydicom + OpenCV)',
            timed(lambda: our_read(good), len(good)), timed(lambda: plain_read(good), len(good))))
        start = time.perf_counter()
        store = preprocess_folder(folder/'dicom', folder/'store', recipe('knee'), show=False)
        rows.append(('preprocess, knee recipe, 224 px, two processes', len(files)/(time.perf_counter()-start),
            None))
        for i in range(len(store)): Image.fromarray(store[i]).save(folder/f'{i}.png')
        order = np.random.default_rng(0).integers(len(store), size=2000)
        rows.append(('random image from the store (peer: PNG by Pillow)',
            timed(lambda: [store[i].sum() for i in order], len(order)),
                     timed(lambda: [np.asarray(Image.open(folder/f'{i}.png')).sum() for i in order],
                     len(order))))
    print(f'{len(files)} files, {os.cpu_count()} cores')
    for name, ours, peer in rows:
        print(f'{name:60s} {ours:10.1f} /s' + (f'   peer {peer:10.1f} /s   ratio {ours/peer:.1f}' if peer
            else ''))


if __name__=='__main__': main()
