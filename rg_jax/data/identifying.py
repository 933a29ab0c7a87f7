"""Which elements of a DICOM header may identify someone.

Told by keyword, never by value: the answer goes into reports and logs. It follows the basic
confidentiality profile of DICOM PS3.15 in what can name a patient, a person, a day or a place;
UIDs, ages and plain descriptions are left to an anonymiser. It cannot see what is burned into the
pixels. What private elements hold nobody can tell by keyword: that there are any is told.
"""

import re
from collections.abc import Iterator
from typing import Any

# A name with what stands before it; where else a text holds one nobody can tell.
NAME_IN_TEXT = (
    r"\b(?:Dr|Prof)\.\s?(?:med\.\s?)?[A-ZÄÖÜ][a-zäöüß]+"
    r"|\b(?:Herrn?|Frau|Mr\.?|Mrs\.?|Ms\.?)\s(?:Dr\.\s?)?[A-ZÄÖÜ][a-zäöüß]+"
    r"|\b(?:Patient(?:in)?|[Nn]ame)\s?:\s?[A-ZÄÖÜ][a-zäöüß]+"
)
# Names of people (VR PN) and dates (DA, DT) count wherever they stand and are not listed.
KEYWORDS = frozenset(
    (
        *("PatientID", "OtherPatientIDs", "PatientBirthDate", "PatientBirthTime", "PatientAddress"),
        *("PatientTelephoneNumbers", "PatientTelecomInformation", "PatientComments"),
        *("IssuerOfPatientID", "MedicalRecordLocator", "EthnicGroup", "Occupation"),
        *("MilitaryRank", "CountryOfResidence", "RegionOfResidence", "PatientReligiousPreference"),
        *("AdditionalPatientHistory", "AccessionNumber", "AdmissionID", "LastMenstrualDate"),
        *("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "AcquisitionDateTime"),
        *("InstanceCreationDate", "DateOfSecondaryCapture", "PerformedProcedureStepStartDate"),
        *("ScheduledProcedureStepStartDate", "AdmittingDate"),
        *("InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName"),
        *("DeviceSerialNumber", "RequestingService", "CurrentPatientLocation"),
        *("PatientInstitutionResidence", "PersonAddress", "PersonTelephoneNumbers"),
        *("ReferringPhysicianAddress", "ReferringPhysicianTelephoneNumbers"),
        *("PlacerOrderNumberImagingServiceRequest", "FillerOrderNumberImagingServiceRequest"),
        *("ImageComments", "RequestedProcedureComments", "StudyComments", "VisitComments"),
        *("StudyID", "InsurancePlanIdentification", "ServiceEpisodeID", "RequestedProcedureID"),
        *("PerformedProcedureStepID", "ScheduledProcedureStepID"),
        *("OverlayData", "OverlayComments", "CurveData"),
        *("SourceApplicationEntityTitle", "PrivateInformation"),  # of the file meta
    )
)
_TEXTS = ("LO", "SH", "ST", "LT", "UT", "UC")
_NAMED = re.compile(NAME_IN_TEXT)
_PSEUDONYMS = ("PatientName", "PatientID", "OtherPatientIDs")
# What an anonymiser writes into a name or an id: one such word, and digits. More than three digits
# without a word are what hospitals number their patients with.
_PLACEHOLDER = re.compile(
    r"\W*\d{0,3}\W*|(?:anon\w{0,9}|pseudo\w{0,4}|de-?identified|removed|redacted|patient|subject|case|study"
    r"|unknown|none|no[ _^]?name|phantom|test|na|n/a|x+)[\W_]*\d*",
    re.IGNORECASE,
)
# Names of people, whatever digits stand beside them: with a caret, as DICOM writes them, two words
# ("Doe, Jane 1960"), or a word and a whole date.
_LETTERS = r"[^\W\d_]{2,}"
_YEAR = r"(?:19|20)\d\d"
_NAME = re.compile(
    rf"\^|{_LETTERS}[ ,]+{_LETTERS}|{_LETTERS}[\W_](?:.*[\W_])?"
    rf"(?:{_YEAR}[-./]?[01]\d[-./]?[0-3]\d|[0-3]?\d[-./][01]?\d[-./]{_YEAR})(?!\w)"
)
# Digits without a word; long ones are what hospitals number their patients with.
_NUMBER = re.compile(r"[\W_]*(?:\d[\W_]*){4,}")
PRIVATE = "private elements"
# 1970-01-01, where computers begin to count, is left out: people were born on it.
_DUMMY_DATES = ("19000101", "00000000", "00010101")


def identifying_keywords(dataset: Any) -> tuple[str, ...]:
    """The keywords, sorted, of all elements of a pydicom data set that may identify someone.

    `PRIVATE` stands for all private elements that hold something. Other texts (descriptions,
    names of protocols) count where a name stands in them ("Dr. …", "Frau …").

    Empty elements and what anonymisers leave ("ANON^0006", "Anonymous", 1900-01-01) do not
    count. Where the header says that the identity was removed, a name or an id counts as a
    pseudonym if it holds a digit; birth dates, addresses and real names count all the same.
    Elements inside sequences are looked at too.
    """
    removed = str(dataset.get("PatientIdentityRemoved") or "").upper() == "YES"
    elements = [*_elements(dataset), *_elements(getattr(dataset, "file_meta", None) or {})]
    found = {keyword for keyword, value in elements if not _harmless(keyword, value, removed)}
    if str(dataset.get("BurnedInAnnotation") or "").upper() == "YES":
        found.add("BurnedInAnnotation")
    return tuple(sorted(found))


def may_be_pseudonym(value: str) -> bool:
    """Whether a patient's key is no name: a placeholder, or with a digit and not like a name.

    Like a name are a caret, two words side by side, and a word with a date. A single name with a
    number ("Doe7") cannot be told from the name of a study.
    """
    if _PLACEHOLDER.fullmatch(value):
        return True
    return any(map(str.isdigit, value)) and not _NAME.search(value)


def may_be_hospital_number(value: str) -> bool:
    """Whether a patient's key may be the number that a hospital knows the patient by."""
    return _NUMBER.fullmatch(value) is not None


def _elements(dataset: Any) -> Iterator[tuple[str, str]]:
    """(keyword, value) of the elements in question that hold something."""
    from pydicom.datadict import dictionary_keyword, dictionary_VR

    for tag in list(dataset.keys()):
        if tag.is_private:
            # Elements up to 00FF name who may write into the others.
            if tag.element > 0xFF and _raw(dataset, tag):
                yield PRIVATE, "not looked at"
            continue
        # Raw elements know their VR (implicit files: the dictionary does): most of a header is
        # passed over without being parsed.
        try:
            keyword, vr = dictionary_keyword(tag), dictionary_VR(tag)
        except KeyError:
            continue
        if vr not in ("SQ", "PN", "DA", "DT") and keyword not in KEYWORDS:
            if vr in _TEXTS and _NAMED.search(_raw(dataset, tag)):
                yield keyword, "holds a name"
            continue
        try:
            value = dataset[tag].value
        except Exception:  # damaged: it cannot be ruled out that it names someone
            yield keyword, "unreadable"
            continue
        if vr == "SQ":
            for item in value or ():
                yield from _elements(item)
        elif value is not None and (text := str(value).strip(" ^=\0")):
            yield keyword, text


def _raw(dataset: Any, tag: Any) -> str:
    """An element as it lies in the file, which takes no parsing; empty if it holds nothing."""
    value = dataset.get_item(tag).value
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return "" if value is None else str(value).strip(" \0")


def _harmless(keyword: str, value: str, removed: bool) -> bool:
    if keyword in _PSEUDONYMS or keyword.endswith("Name"):
        if _PLACEHOLDER.fullmatch(value):
            return True
        # What holds no digit may be a name, also where an id belongs.
        pseudonym = may_be_pseudonym(value) and not may_be_hospital_number(value)
        return removed and keyword in _PSEUDONYMS and pseudonym
    if keyword.endswith(("ID", "Title")) and _PLACEHOLDER.fullmatch(value):
        return True
    return value in _DUMMY_DATES or value[:8] in _DUMMY_DATES
