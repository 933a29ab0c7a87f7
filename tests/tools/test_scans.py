"""Which scans are one patient's: one taken for a patient of its own leaks between splits."""

import shutil
from pathlib import Path

import pydicom.data
import pytest

from tools.scans import Scan, name_patients, patient_of

CT = Path(pydicom.data.__file__).parent / "test_files" / "CT_small.dcm"


def series(folder, *beside):
    """A DICOM series of one real file (PatientID 1CT1), with other files before it by name."""
    folder.mkdir(parents=True)
    shutil.copy(CT, folder / "IM0001.dcm")
    for name in beside:
        (folder / name).write_bytes(b"no slice")
    return Scan(folder.name, "CT", "", folder, folder / "mask.nii.gz", {}, "")


@pytest.mark.parametrize("beside", [(), ("DICOMDIR",), ("AAAA.dcm",), (".hidden", "0_readme.txt")])
def test_the_patient_is_found_whatever_lies_beside(tmp_path, beside):
    assert patient_of(series(tmp_path / "one", *beside)) == "1CT1"


def test_scans_of_one_patient_share_a_key(tmp_path):
    names = (("a1",), ("b2", "DICOMDIR"), ("c3",))
    scans = [series(tmp_path / name, *beside) for name, *beside in names]
    named = name_patients({"ct": scans}, "")
    assert set(named.values()) == {"a1"}  # the first scan stands for the patient
