"""A face detector takes the drawings for faces."""

from keysync_jax.data_pipeline.synthetic.detection import format_report, report_detection


def test_mediapipe_finds_the_faces_and_their_mouths():
    rows = report_detection(6, (256,), frames=24, every=12)
    (row,) = rows
    assert row.frames == 12
    assert row.found >= 0.9 and row.one_face >= 0.9
    assert row.eye_error < 0.04 and row.mouth_error < 0.04 and row.opening_r > 0.9
    assert f"| 256 | 6 | 12 | {row.found:.1%}" in format_report(rows)
