"""The verb that brings what the package does not hold: `keysync fetch`."""

from __future__ import annotations

from keysync_jax.cli.verbs import add_verb


def add_fetch(verbs) -> None:
    """Add `keysync fetch`."""
    p = add_verb(
        verbs, "fetch", _fetch, "bring the face models into the model cache, once",
        "  keysync fetch faces\n  keysync fetch faces --from mediapipe-0.10.21-cp311-cp311-manylinux_2_28_x86_64.whl",
    )  # fmt: skip
    p.add_argument("what", choices=["faces"], help="faces: networks that find faces and hands (11 MB out of a wheel of 36 MB)")
    p.add_argument("--from", dest="source", metavar="PATH", help="a mediapipe 0.10.21 wheel, or a zip or folder with its models")


def _fetch(args) -> int:
    from keysync_jax.media import face_models

    folder = face_models.fetch(args.source)
    print(f"face and hand models of mediapipe {face_models.VERSION} ({face_models.LICENCE}): {folder}")
    return 0
