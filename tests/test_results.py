"""DICOM results of findings: what goes in comes out again to the pixel, imperfect films have valid results in which nothing is
invented, and what cannot be written is named and does not stop a folder."""
import logging
import os
import sys
import warnings
from datetime import datetime
from pathlib import Path

import highdicom
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.sr.coding import Code

from radiology_ai.core import DataError, DicomError, MissingPackageError, rng
from radiology_ai.dicom import write
from radiology_ai.dicom.read import read_radiograph
from radiology_ai.dicom.source import TYPE2, read_source
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
from radiology_ai.phantom.hospital import made_up_uid, write_dicom
from radiology_ai.serve.outputs import Answered, named_outputs, write_outputs

H, W = 130, 101  # neither a multiple of eight: bits of a segmentation run on over the rows
BY = Algorithm('toy', 'ab'*32)
WHEN = datetime(2026, 3, 1, 12, 30)
PERSON = dict(PatientName='Doe^Jane', PatientID='P 1', PatientBirthDate='19700131', PatientSex='F',
    StudyDate='20240229',
    StudyTime='0730', StudyID='7', AccessionNumber='A1', ReferringPhysicianName='House^G',
    ImageLaterality='L',
    StudyInstanceUID=made_up_uid('study'), SeriesInstanceUID=made_up_uid('series'),
    SOPInstanceUID=made_up_uid('film'))
REGION = Code('111030', 'DCM', 'Image Region')


def film(path, shape=(H, W), **header) -> Path:
    "A film as a file, with a header as it should be but for what is given."
    write_dicom(path, rng(1, 'film').random(shape), header=PERSON | header, spacing=.5)
    return path


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return read_source(film(tmp_path_factory.mktemp('film')/'film.dcm'))


def masked() -> list[Finding]:
    "Overlapping masks, one of scattered pixels, one with nothing in it, and none."
    gen = rng(2, 'masks')
    half = np.zeros((H, W), bool)
    half[20:90, 10:60] = True
    return [Finding('heart', .9, True, mask=half), Finding('opacity', .2, False),
        Finding('opacity', .7, True, mask=gen.random((H, W))<.3),
        Finding('Pneumothorax', .1, mask=np.zeros((H, W), bool))]


def groups_of(ds) -> list:
    "The measurement groups of a report as highdicom reads them."
    content = highdicom.sr.ComprehensiveSR.from_dataset(ds).content
    return [*content.get_image_measurement_groups(), *content.get_planar_roi_measurement_groups()]


def told(group) -> dict:
    "What a group says: names and values."
    numbers = {m.name.meaning: m.value for m in group.get_measurements()}
    words = {q.name.meaning: q.value.meaning for q in group.get_qualitative_evaluations()}
    return numbers | {k: v for k, v in words.items() if k!='Finding category'}


def test_masks_come_back_as_they_were(source, tmp_path):
    findings = masked()
    masks = segmentation(source, findings, BY, when=WHEN)
    save_result(masks, tmp_path/'seg.dcm')
    seg = highdicom.seg.segread(tmp_path/'seg.dcm')
    kept = [f for f in findings if f.mask is not None]
    assert (seg.Rows, seg.Columns, seg.NumberOfFrames, seg.SegmentationType) == (H, W, 3, 'BINARY')
    by_source = seg.get_pixels_by_source_instance([source.header.SOPInstanceUID])
    np.testing.assert_array_equal(by_source[0].transpose(2, 0, 1).astype(bool), [f.mask for f in kept])
    np.testing.assert_array_equal(pydicom.dcmread(tmp_path/'seg.dcm').pixel_array.astype(bool),
        [f.mask for f in kept])
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ['heart', 'opacity 2', 'Pneumothorax']
    assert seg.ContentCreatorName == '' and seg.ContentDescription in ('', None)  # of type 2
    assert seg.SegmentSequence[0].SegmentedPropertyCategoryCodeSequence[
        0].CodeMeaning == 'Anatomical Structure'
    report = structured_report(source, findings, BY, masks=masks)
    tracked = {g.tracking_uid for g in groups_of(report)}
    assert {s.TrackingUID for s in seg.SegmentSequence} < tracked
    assert segmentation(source, findings[1:2], BY) is None
    assert oct((tmp_path/'seg.dcm').stat().st_mode)[-2:] == '00'  # patient data: for its owner alone


def test_regions_come_back_as_they_were(source, tmp_path):
    gen = rng(3, 'boxes')
    corners = np.sort(gen.random((12, 2, 2)).astype(np.float32)*np.float32([W, H]), 1)
    boxes = [tuple(float(v) for v in c.ravel()) for c in [*corners, np.float32([[0, 0], [W, H]])]]
    points = (gen.random((5, 2))*[W, H]).astype(np.float32)
    findings = [Finding('opacity', .5, box=b) for b in boxes] + [Finding('landmarks', 1., points=points)]
    save_result(structured_report(source, findings, BY), tmp_path/'sr.dcm')
    content = highdicom.sr.srread(tmp_path/'sr.dcm').content
    found = content.get_planar_roi_measurement_groups(reference_type=REGION)
    shapes = [g.roi.value for g in found]
    assert [(*s.min(0), *s.max(0)) for s in shapes[:13]] == boxes
    np.testing.assert_array_equal(np.concatenate(shapes[13:]), points)
    for group in found:
        ref = group.roi.ContentSequence[0].ReferencedSOPSequence[0]
        assert ref.ReferencedSOPInstanceUID == source.header.SOPInstanceUID
    assert [g.tracking_identifier for g in found[:2]] == ['opacity 1', 'opacity 2']


def test_outlines_of_a_mask_without_a_segmentation(source):
    mask = np.zeros((H, W), bool)
    mask[20:90, 10:60] = mask[100, 50:70] = mask[120, 5] = True
    parts = write.outlines(mask)
    corners = [(*p.min(0), *p.max(0)) for p in parts]
    assert corners[0] == (10.5, 20.5, 59.5, 89.5)  # the largest first
    assert sorted(corners[1:]) == [(5, 120, 6, 121), (50, 100, 70, 101)]
    assert all((p[0]==p[-1]).all() for p in parts)
    report = structured_report(source, [Finding('heart', .9, True, mask=mask)], BY)
    assert len(groups_of(report)) == 1 + 3


def test_places_lie_over_the_film(source):
    points = np.float32([(3.5, 4.25), (90, 100)])
    found = [Finding('opacity', .7, True, box=(10., 20.5, 60.25, 90.)), Finding('apices', 1., points=points),
        Finding('heart', .9, False, mask=masked()[0].mask), Finding('Pneumonia', .8, True), Finding('mass', .1, False)]
    ds = presentation_state(source, found, BY)
    told, = ds.GraphicAnnotationSequence
    drawn = [(o.GraphicType, np.reshape(o.GraphicData, (-1, 2))) for o in told.GraphicObjectSequence]
    assert [k for k, _ in drawn]==['POLYLINE', 'POINT', 'POINT', 'POLYLINE']
    np.testing.assert_array_equal([*drawn[0][1].min(0), *drawn[0][1].max(0)], found[0].box)
    np.testing.assert_array_equal([drawn[1][1][0], drawn[2][1][0]], points)
    np.testing.assert_array_equal([*drawn[3][1].min(0), *drawn[3][1].max(0)], [10.5, 20.5, 59.5, 89.5])
    # what was called is named, at its place or in the corner
    texts = [(t.UnformattedTextValue, 'AnchorPoint' in t) for t in told.TextObjectSequence]
    assert texts==[('opacity 0.70', True), ('Pneumonia 0.80', False)]
    assert told.GraphicObjectSequence[0].TrackingUID==write.tracking_uid(source, BY, 'opacity')
    assert ds.ReferencedSeriesSequence[0].ReferencedImageSequence[0].ReferencedSOPInstanceUID==PERSON['SOPInstanceUID']
    assert presentation_state(source, found[-1:], BY) is None
    assert presentation_state(source, found, BY).SOPInstanceUID==ds.SOPInstanceUID
    with pytest.raises(DataError, match='outside of the film'):
        presentation_state(source, [Finding('x', 1., box=(0, 0, W + 1, 5))], BY)


@pytest.mark.parametrize('how', [dict(), dict(photometric='MONOCHROME1'), dict(window='lut', rescale=(2, -512)),
    dict(window='sigmoid'), dict(rescale='lut', window=None), dict(window=None)])
def test_a_state_shows_the_grey_of_the_film(how, tmp_path):
    pixels = np.linspace(0, 1, H*W).reshape(H, W)
    write_dicom(tmp_path/'film.dcm', pixels, header=PERSON, spacing=.5, modality='CR', **how)
    film = pydicom.dcmread(tmp_path/'film.dcm')
    ds = presentation_state(read_source(tmp_path/'film.dcm'), [Finding('opacity', .7, True)], BY)
    save_result(ds, tmp_path/'pr.dcm')
    state = pydicom.dcmread(tmp_path/'pr.dcm')
    # the steps of the state alone, as PS3.3 C.11 has them, lead to the picture that was written
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    grey = pydicom.Dataset()
    for key in ('BitsStored', 'BitsAllocated', 'PixelRepresentation'): grey[key] = film[key]
    grey.PhotometricInterpretation = 'MONOCHROME2' # the inversion is the last step
    grey.set_original_encoding(False, True)
    for key in ('RescaleSlope', 'RescaleIntercept', 'ModalityLUTSequence'):
        if key in state: grey[key] = state[key]
    for item in state.get('SoftcopyVOILUTSequence', []): grey.update(item)
    x = apply_voi_lut(apply_modality_lut(film.pixel_array, grey), grey).astype(float)
    x = (x - x.min())/(x.max() - x.min())
    if state.PresentationLUTShape=='INVERSE': x = 1 - x
    own = read_radiograph(tmp_path/'film.dcm').pixels
    assert np.abs(x - own).max()<.02


def test_no_state_lies_over_colour(tmp_path):
    write_dicom(tmp_path/'film.dcm', rng(1, 'film').random((H, W)), header=PERSON, spacing=.5)
    ds = pydicom.dcmread(tmp_path/'film.dcm')
    ds.PhotometricInterpretation = 'PALETTE COLOR'
    ds.save_as(tmp_path/'colour.dcm')
    with pytest.raises(DicomError, match='no grey picture'):
        presentation_state(read_source(tmp_path/'colour.dcm'), [Finding('opacity', .7, True)], BY)


def test_what_a_report_says(source):
    findings = [Finding('Pleural_Effusion', .8312345678, True, box=(1, 2, 30, 40)),
        Finding('fractured', .25, False, value='III'),
        Finding('grade', .5, value=2.)]
    report = structured_report(source, findings, BY, facts=dict(tier='urgent', triage=.75, side=None))
    groups = groups_of(report)
    assert report.ContentTemplateSequence[0].TemplateIdentifier == '1500'
    by_name = {g.tracking_identifier: told(g) for g in groups}
    assert by_name == {
        'image': {'triage': .75, 'Summary of Detections': 'All algorithms succeeded; with findings',
        'tier': 'urgent'},
        'Pleural_Effusion': {'Probability': .831235, 'Presence': 'Present'},
        'fractured': {'Probability': .25, 'Presence': 'Absent', 'Grade or measure': 'III'},
        'grade': {'Probability': .5, 'Grade or measure': 2.}}
    kinds = {g.tracking_identifier: g.finding_type for g in groups if g.finding_type}
    assert kinds['Pleural_Effusion'] == Code('60046008', 'SCT', 'Pleural effusion')
    assert kinds['grade'].scheme_designator == '99RADIOLOGYAI'
    for g in groups:
        version = [i.value for i in g[0].ContentSequence if i.name.meaning=='Algorithm Version']
        assert version == [BY.release] and BY.digest[:12] in BY.release
    assert report.CurrentRequestedProcedureEvidenceSequence[
        0].StudyInstanceUID == source.header.StudyInstanceUID
    nothing = structured_report(source, [], BY)
    assert told(groups_of(nothing)[0]) == {'Summary of Detections': 'All algorithms succeeded; without findings'}


def test_picture_comes_back_as_it_was(source, tmp_path):
    picture = rng(4, 'picture').integers(0, 256, (60, 41, 3)).astype(np.uint8)
    save_result(secondary_capture(source, picture, BY), tmp_path/'sc.dcm')
    ds = pydicom.dcmread(tmp_path/'sc.dcm')
    np.testing.assert_array_equal(ds.pixel_array, picture)
    assert ds.SourceImageSequence[0].ReferencedSOPInstanceUID == source.header.SOPInstanceUID
    assert (ds.ConversionType, ds.Laterality, ds.ImageType[0]) == ('WSD', 'L', 'DERIVED')
    with pytest.raises(DataError, match='The picture is float'): secondary_capture(source, picture/2, BY)


IMPERFECT = {  # elements of the header, and what stands in the results in their place
    'as it should be': ({}, {}),
    'no patient': (dict.fromkeys(['PatientName', 'PatientID', 'PatientBirthDate', 'PatientSex']),
        dict(PatientName='', PatientID='', PatientBirthDate='', PatientSex='')),
    'no study': (dict.fromkeys(['StudyDate', 'StudyTime', 'StudyID', 'AccessionNumber',
    'ReferringPhysicianName']),
        dict(StudyDate='', StudyTime='', StudyID='', AccessionNumber='', ReferringPhysicianName='')),
    'dates that are none': (dict(StudyDate='20230229', PatientBirthDate='ANON', StudyTime='7:30',
    PatientAge='old'),
        dict(StudyDate='', PatientBirthDate='', StudyTime='')),
    'a sex that is none': (dict(PatientSex='W'), dict(PatientSex='')),
    'too long': (dict(PatientID='x'*65, AccessionNumber='x'*17), dict(PatientID='', AccessionNumber='')),
    'control characters': (dict(PatientID='a\x07b', StudyID='1\n2'), dict(PatientID='', StudyID='')),
    'no orientation': (dict(PatientOrientation=None), dict(PatientOrientation=None)),
    'an orientation that is none': (dict(PatientOrientation=['up', 'down']), dict(PatientOrientation=None)),
    'Japanese': (dict(SpecificCharacterSet=['', 'ISO 2022 IR 87'], PatientName='Yamada^Tarou=山田^太郎=やまだ^たろう'),
    {}),
    'Latin-1': (dict(SpecificCharacterSet='ISO_IR 100', PatientName='Müller^Jörg', StudyID='ß'), {}),
    'Cyrillic': (dict(SpecificCharacterSet='ISO_IR 144', PatientName='Люкceмбypг'), {}),
}


@pytest.mark.parametrize('case', IMPERFECT)
def test_imperfect_films(case, tmp_path, caplog):
    change, wanted = IMPERFECT[case]
    source = read_source(film(tmp_path/'film.dcm', **change))
    with warnings.catch_warnings(record=True) as said, caplog.at_level(logging.DEBUG):
        warnings.simplefilter('always')
        results = dict(seg=segmentation(source, masked(), BY), sr=structured_report(source, masked(), BY),
            sc=secondary_capture(source, np.zeros((8, 8, 3), np.uint8), BY))
    name = str((PERSON | change)['PatientName'] or 'Doe').split('^')[0]
    assert not any(name in text for text in [*(str(w.message) for w in said), caplog.text])
    for kind, ds in results.items():
        save_result(ds, tmp_path/f'{kind}.dcm')
        read = pydicom.dcmread(tmp_path/f'{kind}.dcm')
        for key in TYPE2:
            assert key in read, key
            given = {**PERSON, **change, **wanted}[key]
            assert str(read[key].value or '') == str(given), (kind, key)
        assert read.SpecificCharacterSet == 'ISO_IR 192'
        if kind!='sr': assert 'PatientOrientation' in read
        if 'PatientOrientation' in wanted and kind!='sr': assert not read.PatientOrientation
    lost = {k for k, v in wanted.items() if change[k] is not None and k!='PatientOrientation'}
    assert lost <= set(source.emptied) <= lost | {'PatientAge'}


@pytest.mark.parametrize('charset', [None, 'ISO_IR 6', 'nonsense'])
def test_a_name_without_a_character_set(charset, tmp_path):
    "Bytes of which nobody says what they mean are not turned into letters."
    path = film(tmp_path/'film.dcm', PatientName='Mxller^Jane')
    data = path.read_bytes()
    path.write_bytes(data.replace(b'Mxller', b'M\xfcller'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds = pydicom.dcmread(path)
        if charset: ds.SpecificCharacterSet = charset
        elif 'SpecificCharacterSet' in ds: del ds.SpecificCharacterSet
        ds.save_as(path)
    assert b'M\xfcller' in path.read_bytes()
    source = read_source(path)
    assert 'PatientName' in source.emptied and source.header.PatientName == ''


def test_deidentified_films_stay_marked(tmp_path):
    source = read_source(film(tmp_path/'film.dcm', PatientIdentityRemoved='YES',
        DeidentificationMethod='by hand'))
    for ds in (structured_report(source, [], BY), segmentation(source, masked(), BY)):
        assert (ds.PatientIdentityRemoved, ds.DeidentificationMethod) == ('YES', 'by hand')


def test_same_film_and_bundle_same_result(source, tmp_path):
    def all_of(by, findings=None):
        findings = findings or masked()
        masks = segmentation(source, findings, by, when=WHEN)
        return [masks, structured_report(source, findings, by, masks=masks, when=WHEN),
            secondary_capture(source, np.zeros((8, 8, 3), np.uint8), by, when=WHEN)]
    uids = [{ds.SOPInstanceUID for ds in all_of(by)} for by in (BY, BY, Algorithm('toy', 'cd'*32))]
    assert uids[0]==uids[1] and uids[0].isdisjoint(uids[2]) and len(uids[0])==3
    for k, (one, two) in enumerate(zip(all_of(BY), all_of(BY))):
        for path, ds in ((tmp_path/f'{k}a', one), (tmp_path/f'{k}b', two)): save_result(ds, path)
        assert (tmp_path/f'{k}a').read_bytes() == (tmp_path/f'{k}b').read_bytes()
    series = {ds.SeriesInstanceUID for ds in all_of(BY)}
    assert series == {ds.SeriesInstanceUID for ds in all_of(BY, masked()[:1])} and len(series)==3


def test_a_revision_names_its_predecessor(source, tmp_path):
    path = tmp_path/'sr.dcm'
    first = report_again(path, source, masked(), BY)
    assert save_result(first, path) and 'PredecessorDocumentsSequence' not in first
    assert report_again(path, source, masked(), BY).SOPInstanceUID == first.SOPInstanceUID
    second = report_again(path, source, masked(), Algorithm('toy', 'cd'*32))
    assert write._predecessor(second).SOPInstanceUID == first.SOPInstanceUID
    assert save_result(second, path)
    again = report_again(path, source, masked(), Algorithm('toy', 'cd'*32))
    assert again.SOPInstanceUID == second.SOPInstanceUID and not save_result(again, path)
    other = read_source(film(tmp_path/'other.dcm', SOPInstanceUID=made_up_uid('another')))
    assert 'PredecessorDocumentsSequence' not in report_again(path, other, masked(), BY)
    path.write_bytes(b'no DICOM at all')
    assert 'PredecessorDocumentsSequence' not in report_again(path, source, masked(), BY)


def test_what_no_result_can_be_made_of(source, tmp_path):
    path = film(tmp_path/'film.dcm')
    stamp = path.stat().st_size, path.stat().st_mtime_ns
    assert read_source(path, PERSON['SOPInstanceUID'], stamp).shape == (H, W)
    os.utime(path, ns=(stamp[1] + 10**9,)*2)
    for why, call in {
            'changed after the prediction': lambda: read_source(path, PERSON['SOPInstanceUID'], stamp),
            'another film lies there now': lambda: read_source(path, '1.2.3'),
            'not there any more': lambda: read_source(tmp_path/'moved.dcm'),
            'no StudyInstanceUID': lambda: read_source(film(tmp_path/'a.dcm', StudyInstanceUID=None)),
            'several frames': lambda: read_source(film(tmp_path/'b.dcm', NumberOfFrames=3))}.items():
        with pytest.raises(DicomError, match=why): call()
    for why, finding in {
            'heart.* has 64 x 64 pixels, the film 130 x 101': Finding('heart', .9,
            mask=np.ones((64, 64), bool)),
            'outside of the film of 130 x 101': Finding('opacity', .9, box=(5, 5, W + 1, 20)),
            "A place of 'apex' lies outside": Finding('apex', .9, points=np.array([[-1., 3]]))}.items():
        with pytest.raises(DataError, match=why): structured_report(source, [finding], BY)


def test_without_highdicom(source, monkeypatch):
    monkeypatch.setitem(sys.modules, 'highdicom', None)
    with pytest.raises(MissingPackageError, match=r'radiology_ai\[dicom_results\]'):
        structured_report(source, [], BY)
    with pytest.raises(MissingPackageError):
        write_outputs(Answered('toy', pd.DataFrame(), []), 'x.csv', ['sr'])


def answered(folder, paths, **more) -> Answered:
    # noqa: E731  one a film
    findings = lambda: tuple(masked()) + (Finding('opacity', .8, True, box=(5, 6, 50, 60)),)
    readings = [Reading(str(p), image_id=str(pydicom.dcmread(p, force=True).get('SOPInstanceUID', '')),
        patient_id='P 1',
        findings=findings()) for p in paths]
    table = pd.DataFrame({'path': [str(p) for p in paths]})
    return Answered('toy', table, readings, BY, **more)


def test_a_folder_goes_on_over_faults(tmp_path):
    good = film(tmp_path/'good.dcm')
    twice = tmp_path/'twice.dcm'
    twice.write_bytes(good.read_bytes())
    moved, changed, small, bare = (film(tmp_path/f'{n}.dcm', SOPInstanceUID=made_up_uid(n))
        for n in ('moved', 'changed', 'small', 'bare'))
    film(bare, SOPInstanceUID=made_up_uid('bare'), SeriesInstanceUID=None)
    film(small, (64, 64), SOPInstanceUID=made_up_uid('small'))
    last = film(tmp_path/'last.dcm', SOPInstanceUID=made_up_uid('last'), PatientSex='W')
    paths = [good, twice, moved, changed, small, bare, last]
    said = answered(tmp_path, paths, stamps={str(changed): (1, 1)})
    moved.unlink()
    with pytest.warns(UserWarning, match='5 of 7 films lack a DICOM result: p_results.csv') as warned:
        write_outputs(said, tmp_path/'p.csv', named_outputs('csv, sr,seg,sc,sr'))
    assert not any(word in str(w.message) for w in warned for word in ('Doe', 'good', 'moved'))
    table = pd.read_csv(tmp_path/'p_results.csv', keep_default_na=False)
    files = table[table.error==''].groupby('number').output.agg(list).to_dict()
    assert files == {1: ['seg', 'sr', 'sc'], 5: ['sc'], 7: ['seg', 'sr', 'sc']}
    assert sorted(p.name for p in (tmp_path/'p').iterdir()) == sorted(table.file[table.file!=''])
    assert set(table.left_empty[table.number==7]) == {'PatientSex'}
    causes = table[table.error!=''].groupby('number').error.first().to_dict()
    for number, why in {2: 'the film of row 1', 3: 'not there any more', 4: 'changed after the prediction',
            5: '130 x 101 pixels, the film 64 x 64', 6: 'no SeriesInstanceUID'}.items():
        assert why in causes[number]
    assert 'Doe' not in (tmp_path/'p_results.csv').read_text() + (tmp_path/'p.csv').read_text()
    sr = pydicom.dcmread(tmp_path/'p'/'0001_sr.dcm')
    seg = pydicom.dcmread(tmp_path/'p'/'0001_seg.dcm')
    evidence = [r.ReferencedSOPInstanceUID for s in sr.CurrentRequestedProcedureEvidenceSequence
        for e in s.ReferencedSeriesSequence for r in e.ReferencedSOPSequence]
    assert sorted(evidence) == sorted([PERSON['SOPInstanceUID'], seg.SOPInstanceUID])
    before = {p: p.read_bytes() for p in (tmp_path/'p').iterdir()}
    with pytest.warns(UserWarning, match='5 of 7'): write_outputs(said, tmp_path/'p.csv', ['sr', 'seg', 'sc'])
    assert {p: p.read_bytes() for p in (tmp_path/'p').iterdir()} == before  # nothing new to say


def test_predict_writes_them(tmp_path):
    from radiology_ai.models.backbone import create_model
    from radiology_ai.models.bundle import load_bundle, save_bundle
    from radiology_ai.phantom.knee import simulate_knee
    from radiology_ai.phantom.xray import expose
    from radiology_ai.preprocess.recipe import recipe
    from radiology_ai.serve.predict import predict
    knee = simulate_knee(3, size=192)
    (tmp_path/'films').mkdir()
    write_dicom(tmp_path/'films'/'a.dcm', expose(knee, rng(3)), knee, header=PERSON)
    (tmp_path/'films'/'letter.dcm').write_text('Dear colleague')
    save_bundle(create_model('test_resnet', 7, pretrained=False), tmp_path/'model', recipe('knee', size=64),
        list(range(7)),
        task='knee', threshold=.3, answer={'kind': 'grades', 'activation': 'softmax'})
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)  # no film lacks a result
        table = predict(tmp_path/'model', tmp_path/'films', out=tmp_path/'p.csv', to='csv,sr,sc', workers=1,
            show=False)
    ds = pydicom.dcmread(tmp_path/'p'/'0001_sr.dcm')
    assert ds.DeviceSerialNumber == load_bundle(tmp_path/'model').meta['digest']
    groups = {g.tracking_identifier: told(g) for g in groups_of(ds)}
    assert groups['fractured']['Probability'] == pytest.approx(table.score[table.error==''].item(), abs=2e-6)
    assert sorted(p.name for p in (tmp_path/'p').iterdir()) == ['0001_sc.dcm', '0001_sr.dcm']
