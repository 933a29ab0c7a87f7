"""Volumes: every orientation, slices as they are looked at, boxes, labels of the tasks."""

import itertools
import json

import nibabel
import numpy as np
import pytest

from rg_jax.data.volume import (
    Volume,
    check_classes,
    component_boxes,
    orientation,
    plane_of,
    read_nifti,
    remap_labels,
    slice_of,
    to_lps,
    union_boxes,
)
from rg_jax.errors import UserError
from rg_jax.grounding.anatomy import TOTAL_MR_TO_OURS


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "volume.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def arrays(golden):
    return dict(np.load(golden / "volume.npz"))


def write(path, array, affine, slope=None, intercept=None):
    image = nibabel.Nifti1Image(array, affine)
    if slope is not None:
        # Stored numbers stay; the header says what they mean.
        image.header.set_slope_inter(slope, intercept or 0)
        image.header.set_data_dtype(array.dtype)
        image.to_filename(path)
        with open(path, "r+b") as file:  # nibabel would rather choose its own slope
            header = image.header.copy()
            header["scl_slope"], header["scl_inter"], header["vox_offset"] = slope, intercept, 352
            header["magic"] = b"n+1"
            file.write(header.binaryblock)
            file.seek(352)
            file.write(array.tobytes(order="F"))
        return
    image.to_filename(path)


# Golden


def header_of(case):
    """(slope, intercept) that a case puts into its file, whatever it calls them; None if none."""
    found = {}
    nested = [value for value in case.values() if isinstance(value, dict)]
    for name, value in (item for fields in (case, *nested) for item in fields.items()):
        pair = value if isinstance(value, list) else [value]
        if all(isinstance(x, int | float) and not isinstance(x, bool) for x in pair) and pair:
            if "slope" in name:
                found["slope"] = pair[0]
                if len(pair) == 2:
                    found["inter"] = pair[1]
            elif "inter" in name:
                found["inter"] = pair[0]
    return (found.get("slope", 1.0), found.get("inter", 0.0)) if found else None


def golden_volumes(case, arrays, tmp_path):
    """The volume of a case as read from a file, and as the numbers and affine that are given."""
    key, header = case["key"], header_of(case)
    given = arrays[f"{key}/in"]
    stored, values = given, given
    if header is not None:
        slope, intercept = header
        if np.array_equal(np.sort(given, None), np.sort(arrays[f"{key}/lps"], None)):
            stored = np.rint((given - intercept) / slope).astype(np.int16)  # given as values
        else:
            values = given * np.float64(np.float32(slope)) + np.float64(np.float32(intercept))
    path = tmp_path / f"{key}.nii"
    write(path, stored, arrays[f"{key}/affine"], *(header or ()))
    return read_nifti(path), Volume(values, arrays[f"{key}/affine"])


def assert_golden_values(got, expected, exact, key):
    if exact:
        np.testing.assert_array_equal(got, expected, err_msg=key)
    else:  # stored × slope + intercept: theirs is kept as float32
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6, err_msg=key)


def test_volume_golden_orientation_and_slices(cases, arrays, tmp_path):
    assert cases["volumes"]
    for case in cases["volumes"]:
        key, exact = case["key"], header_of(case) is None
        volumes = golden_volumes(case, arrays, tmp_path)
        if f"{key}/stored_affine" in arrays:
            np.testing.assert_allclose(volumes[0].affine, arrays[f"{key}/stored_affine"], atol=1e-6)
        # Ours is tried on the file and on the numbers as given.
        for volume in volumes:
            lps = to_lps(volume)
            if f"{key}/lps" in arrays:
                assert_golden_values(lps.array, arrays[f"{key}/lps"], exact, key)
            if f"{key}/lps_affine" in arrays:
                np.testing.assert_allclose(lps.affine, arrays[f"{key}/lps_affine"], atol=1e-4)
            for axis, index in case.get("slices") or ():
                expected = arrays[f"{key}/slice_a{axis}_i{index}"]
                assert_golden_values(slice_of(lps, axis, index), expected, exact, key)


@pytest.mark.parametrize("as_values", [False, True], ids=["stored", "values"])
@pytest.mark.parametrize("names", [("slope", "inter"), ("scl_slope", "scl_inter")])
def test_volume_golden_cases_of_another_set(tmp_path, as_values, names):
    """Slope and intercept, oblique axes and an axis of length 1, in the form of the golden set."""
    rng = np.random.default_rng(3)
    stored = rng.integers(-900, 900, (5, 1, 7), np.int16)
    values = stored * 0.5 - 20.0
    affine = np.array([[0.1, 0, -2, 5], [1.5, 0.1, 0.1, 9], [0.1, 3, 0, -7], [0, 0, 0, 1]])
    # Voxel axes run to A, S and L; LPS has them as (2, 0 turned, 1).
    lps = values.transpose(2, 0, 1)[:, ::-1]
    arrays = {"v/in": values if as_values else stored, "v/affine": affine, "v/lps": lps}
    arrays["v/lps"] = arrays["v/lps"].astype(np.float32)
    case = {"key": "v", names[0]: 0.5, names[1]: -20}
    for volume in golden_volumes(case, arrays, tmp_path):
        assert_golden_values(to_lps(volume).array, arrays["v/lps"], False, "v")
        with pytest.raises(AssertionError):
            assert_golden_values(to_lps(volume).array, arrays["v/lps"] + 0.5, False, "v")


def test_volume_golden_slice_errors(cases):
    volume = Volume(np.zeros((7, 9, 11), np.int16), np.diag([-1.0, -1, 1, 1]))
    kinds = {"ValueError": ValueError, "IndexError": IndexError}
    assert cases["slice_errors_axis_idx"]
    for axis, index, kind in cases["slice_errors_axis_idx"]:
        with pytest.raises(kinds[kind]):
            slice_of(volume, axis, index)


def test_volume_golden_boxes(cases, arrays):
    assert cases["masks"]
    for case in cases["masks"]:
        mask = arrays[case["key"]]
        if mask.size and mask.max() > 121:  # published code wraps at 255, ours refuses
            with pytest.raises(UserError):
                component_boxes(mask)
            continue
        if case.get("boxes") is not None:
            found = sorted(map(list, component_boxes(mask)))
            assert found == sorted(case["boxes"]), case["key"]
        if case.get("boxes_merged") is not None:
            found = [list(box) for box in union_boxes(mask)]
            assert found == case["boxes_merged"], case["key"]


def test_volume_golden_mr_labels(cases):
    table = {int(label): ours for label, ours in cases["mr_remap_ids_0_to_60"].items()}
    labels = np.array(sorted(table), np.int16)
    got = remap_labels(labels, "total_mr")
    np.testing.assert_array_equal(got, [table[int(label)] for label in labels])


def test_volume_golden_build(cases, arrays):
    """The class maps and union boxes of whole small builds."""
    checked = 0
    for case in cases.get("build") or ():
        task = {"CT": "total", "MR": "total_mr"}[case["modality"]]
        for image, entry in case["official_result"].items():
            scan = entry["scan_rserid"]
            volume = to_lps(Volume(arrays[f"build/{scan}/seg"], arrays[f"build/{scan}/affine"]))
            mask = remap_labels(slice_of(volume, entry["slice_axis"], entry["slice_idx"]), task)
            if f"build/out/{image}" in arrays:
                np.testing.assert_array_equal(mask, arrays[f"build/out/{image}"], err_msg=image)
            assert [list(box) for box in union_boxes(mask)] == entry["bboxes"], image
            checked += 1
    assert checked or not cases.get("build")


# All orientations


def oriented(order, signs, shape=(3, 4, 5)):
    """A volume whose value tells the world place: 100 R + 10 A + S, stored in another order.

    `order[i]` is the world axis of voxel axis i, `signs[i]` its direction.
    """
    ras = np.add.outer(
        np.add.outer(100 * np.arange(shape[0]), 10 * np.arange(shape[1])), np.arange(shape[2])
    )
    array = ras.transpose(order)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        affine[world, axis] = sign * (world + 1)  # spacings 1, 2, 3
        if sign < 0:
            array = np.flip(array, axis)
            affine[world, 3] = (shape[world] - 1) * (world + 1)
    return Volume(array, affine)


ORIENTATIONS = list(
    itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
)


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 4, 5), (3, 4, 1)])
def test_volume_all_48_orientations(tmp_path, shape):
    assert len(ORIENTATIONS) == 48
    reference = to_lps(oriented((0, 1, 2), (1, 1, 1), shape))
    # L, P, S grow along the axes: x = 0 is the rightmost voxel.
    ras = oriented((0, 1, 2), (1, 1, 1), shape).array
    np.testing.assert_array_equal(reference.array, ras[::-1, ::-1])
    for order, signs in ORIENTATIONS:
        volume = oriented(order, signs, shape)
        assert orientation(volume.affine) == tuple(zip(order, signs, strict=True))
        path = tmp_path / "v.nii.gz"
        write(path, volume.array.astype(np.int16), volume.affine)
        for source in (volume, read_nifti(path)):
            lps = to_lps(source)
            np.testing.assert_array_equal(lps.array, reference.array)
            np.testing.assert_allclose(lps.affine, reference.affine, atol=1e-5)


def test_volume_slices_look_as_in_dicom():
    """Rows and columns of each plane, told by the world place that the voxels hold."""
    lps = to_lps(oriented((2, 0, 1), (-1, 1, -1)))
    r, a, s = (lambda v: v // 100), (lambda v: v // 10 % 10), (lambda v: v % 10)
    axial, coronal, sagittal = (slice_of(lps, axis, 1) for axis in (2, 1, 0))
    # Patient's right (R = 2 of 0 … 2) on the left, front (A = 3) or head (S = 4) up.
    assert axial.shape == (4, 3) and (r(axial[0, 0]), a(axial[0, 0])) == (2, 3)
    assert coronal.shape == (5, 3) and (r(coronal[0, 0]), s(coronal[0, 0])) == (2, 4)
    assert sagittal.shape == (5, 4) and (a(sagittal[0, 0]), s(sagittal[0, 0])) == (3, 4)
    assert (np.diff(s(coronal[:, 0])) == -1).all() and (np.diff(r(coronal[0])) == -1).all()
    assert (np.diff(a(sagittal[0])) == -1).all()
    np.testing.assert_array_equal(slice_of(lps, 2, -1), slice_of(lps, 2, 4))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_plane_of_a_slice_leads_back_to_its_voxels(axis):
    rng = np.random.default_rng(axis)
    tilt = np.linalg.qr(np.eye(3) + 0.1 * rng.normal(size=(3, 3)))[0]
    volume = oriented((1, 2, 0), (1, -1, -1))
    affine = volume.affine.copy()
    affine[:3] = tilt @ affine[:3]
    lps = to_lps(Volume(volume.array, affine))
    piece, plane = slice_of(lps, axis, 2), plane_of(lps, axis, 2)
    right, down = np.array(plane.orientation).reshape(2, 3)
    np.testing.assert_allclose([right @ right, down @ down, right @ down], [1, 1, 0], atol=1e-6)
    for row, column in itertools.product(*map(range, piece.shape)):
        place = np.array(plane.position) + right * column * plane.spacing_mm[1]
        place = place + down * row * plane.spacing_mm[0]
        x, y, z = place * (-1, -1, 1)
        voxel = np.linalg.inv(lps.affine) @ [x, y, z, 1]
        index = tuple(np.rint(voxel[:3]).astype(int))
        np.testing.assert_allclose(voxel[:3], index, atol=1e-4)
        assert lps.array[index] == piece[row, column]


def test_volume_oblique_affines_go_to_the_nearest_axes():
    rng = np.random.default_rng(0)
    for _ in range(300):
        matrix = rng.normal(size=(3, 3)) if rng.random() < 0.3 else np.eye(3)[rng.permutation(3)]
        matrix = (matrix + 0.3 * rng.normal(size=(3, 3))) * rng.uniform(0.5, 4, 3)
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = matrix, rng.normal(size=3)
        if abs(np.linalg.det(matrix / np.linalg.norm(matrix, axis=0))) < 0.05:
            continue
        theirs = nibabel.io_orientation(affine)
        assert orientation(affine) == tuple((int(axis), int(sign)) for axis, sign in theirs)
        array = rng.integers(0, 99, (2, 3, 4))
        lps = to_lps(Volume(array, affine))
        # Whatever was permuted and flipped, each voxel stays where it was.
        for index in np.ndindex(*lps.array.shape):
            place = np.linalg.solve(affine, lps.affine @ [*index, 1])[:3]
            assert lps.array[index] == array[tuple(np.rint(place).astype(int))]


# Files


def test_volume_header_slope_and_intercept(tmp_path):
    stored = np.arange(-12, 12, dtype=np.int16).reshape(2, 3, 4)
    path = tmp_path / "v.nii"
    write(path, stored, np.eye(4), slope=0.5, intercept=-50)
    np.testing.assert_allclose(read_nifti(path).array, stored * 0.5 - 50)
    write(path, stored, np.eye(4))
    got = read_nifti(path, "MR")
    assert got.array.dtype == np.int16 and got.modality == "MR"


def test_volume_number_of_axes(tmp_path):
    path = tmp_path / "v.nii.gz"
    for shape, read in (
        ((4, 5), (4, 5, 1)),
        ((4, 5, 6, 1), (4, 5, 6)),
        ((4, 5, 6, 1, 1), (4, 5, 6)),
    ):
        write(path, np.zeros(shape, np.int16), np.eye(4))
        assert read_nifti(path).array.shape == read
    write(path, np.zeros((4, 5, 6, 2), np.int16), np.eye(4))
    with pytest.raises(UserError, match="single volumes"):
        read_nifti(path)


def test_volume_that_cannot_be_read(tmp_path):
    path = tmp_path / "v.nii.gz"
    with pytest.raises(UserError, match=r"v\.nii\.gz: no such file"):
        read_nifti(path)
    write(path, np.random.default_rng(0).integers(0, 999, (9, 9, 9)).astype(np.int16), np.eye(4))
    whole = path.read_bytes()
    for cut in (0, 5, 40, len(whole) // 2, len(whole) - 6):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"v\.nii\.gz: "):
            read_nifti(path)
    for affine in (np.diag([1.0, 1, 0, 1]), np.array([[1.0, 1, 0, 0]] * 3 + [[0, 0, 0, 1]])):
        with pytest.raises(UserError, match="degenerate"):
            to_lps(Volume(np.zeros((2, 2, 2)), affine))


# Labels and boxes


def test_labels_of_the_tasks():
    labels = np.array([[0, 1, 51, 117]])
    got = remap_labels(labels, "total")
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, labels)
    np.testing.assert_array_equal(remap_labels(labels.astype(np.float32), "total"), labels)
    for label, ours in TOTAL_MR_TO_OURS.items():
        assert remap_labels(np.array([label]), "total_mr")[0] == ours


@pytest.mark.parametrize("task", ["total", "total_mr"])
@pytest.mark.parametrize("bad", [122, 256, 261, 1000, -1, 0.5, np.nan, np.inf, 1e12])
def test_labels_outside_the_schema_raise(task, bad):
    with pytest.raises(UserError):
        remap_labels(np.array([[0, bad]]), task)
    with pytest.raises(UserError):
        check_classes(np.array([[0, bad]]))


def test_ct_label_that_would_be_an_mr_class_raises():
    with pytest.raises(UserError, match="118"):
        remap_labels(np.array([118]), "total")
    with pytest.raises(ValueError, match="lung_vessels"):
        remap_labels(np.array([1]), "lung_vessels")


def test_parts_are_8_connected_and_boxes_exclusive():
    mask = np.array([[5, 0, 0, 2], [0, 5, 0, 2], [0, 0, 0, 0], [5, 0, 0, 121]])
    assert component_boxes(mask) == [
        (3, 0, 4, 2, 2),
        (0, 0, 2, 2, 5),
        (0, 3, 1, 4, 5),
        (3, 3, 4, 4, 121),
    ]
    assert union_boxes(mask) == [(3, 0, 4, 2, 2), (0, 0, 2, 4, 5), (3, 3, 4, 4, 121)]
    fraction = mask + 0.9 * (mask == 121)
    assert component_boxes(fraction) == component_boxes(mask)
    with pytest.raises(UserError, match="not whole"):
        check_classes(fraction)
    assert component_boxes(np.zeros((3, 3))) == union_boxes(np.zeros((3, 3))) == []
