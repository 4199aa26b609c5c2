"""Marks that say a file was made by a machine: a line in the container, and a signed C2PA manifest.

The line stands in every output. The manifest (https://c2pa.org, specification 2.2) is written by the `c2pa` package where a certificate
is given: the source is its parent ingredient, so a manifest that the source brings is kept; containers that hold none get it as a file
beside the output. Kinds of sources are the IPTC's: https://cv.iptc.org/newscodes/digitalsourcetype/.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import av.error

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import replacing
from keysync_jax.core.version import __version__

log = logging.getLogger(__name__)

_TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"
# By what was made: the IPTC's term, and words.
KINDS = {
    "dub": ("compositeWithTrainedAlgorithmicMedia", "the mouth in these pictures was made by KeySync-JAX"),
    "animate": ("trainedAlgorithmicMedia", "these pictures were made by KeySync-JAX from a still picture"),
}
_TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime"}  # that hold a manifest
_ANY = "application/octet-stream"
_PICTURES = {
    ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp", ".tif": "image/tiff", ".tiff": "image/tiff",
    ".avif": "image/avif", ".heic": "image/heic", ".gif": "image/gif", ".avi": "video/avi",
}  # fmt: skip
_NEEDED = "C2PA manifests need the c2pa extra: pip install 'keysync-jax[c2pa]'"


class Mark(NamedTuple):
    """What an output says of itself.

    Attributes:
      kind: of `KINDS`.
      source: the file that it was made from; None for arrays.
      consent: who agreed to it, or what else is to be said; "" for nothing.
      signature: signs the manifest; None: there is none.
    """

    kind: str
    source: str | None = None
    consent: str = ""
    signature: Signature | None = None

    @property
    def line(self) -> str:
        """The line in the container."""
        term, words = KINDS[self.kind]
        return f"AI-generated: {words} {__version__} ({_TERMS}{term})"

    def describe(self, metadata: dict[str, str]) -> None:
        """Adds the line to a container's metadata, after a comment that is there already."""
        own = metadata.get("comment", metadata.get("COMMENT", ""))
        metadata.pop("COMMENT", None)
        metadata["comment"] = own if self.line in own else f"{own} | {self.line}" if own else self.line


class Signature:
    """A certificate chain and its private key.

    Args:
      certificate: PEM file: the signer's certificate first, then those that vouch for it.
      key: PEM file of its private key, without a password.

    Raises:
      UsageError: one of the two is not given.
      KeySyncError: a file that cannot be read, or holds no certificate or key that C2PA takes, or two that do not fit each other.
    """

    def __init__(self, certificate: str | os.PathLike | None, key: str | os.PathLike | None):
        if certificate is None or key is None:
            raise UsageError(f"--{'key' if key is None else 'c2pa'} is missing: give --c2pa CERT and --key KEY, both as PEM files")
        c2pa = _package()
        chain, private = _pem(certificate, "certificate"), _pem(key, "private key")
        algorithm = getattr(c2pa.C2paSigningAlg, _algorithm(private, key))
        try:
            self._signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain, private, None))
            self._sign(_manifest("dub", None, ""), None, _ANY, io.BytesIO(b"test"), io.BytesIO(), embed=False)
        except c2pa.C2paError as error:
            raise KeySyncError(
                f"{certificate} and {key}: cannot sign ({_words(error)}); give the chain and the key of a C2PA signer"
            ) from error

    def seal(self, path: Path, output: Path, mark: Mark) -> str:
        """Signs the complete file at `path`, which is to stand at `output`: in the file, or beside it, in `beside(output)`.

        Returns:
          What was done, in words.

        Raises:
          KeySyncError: it cannot be signed, or no space; nothing is left.
        """
        c2pa = _package()
        manifest = _manifest(mark.kind, mark.source, mark.consent)
        kind = _TYPES.get(output.suffix.lower())
        try:
            with open(path, "rb") as made:
                if kind is not None:
                    with replacing(path) as signed, open(signed, "w+b") as file:
                        self._sign(manifest, mark.source, kind, made, file, embed=True)
                    return "signed C2PA manifest inside"
                data = self._sign(manifest, mark.source, _ANY, made, io.BytesIO(), embed=False)
            manifest_file = beside(output)
            with replacing(manifest_file) as partial:
                Path(partial).write_bytes(data)
            return f"signed C2PA manifest beside it (.c2pa): {output.suffix} holds none"
        except (c2pa.C2paError, OSError) as error:
            raise KeySyncError(f"{output}: could not be signed ({_words(error)})") from error

    def _sign(self, manifest: Mapping[str, Any], source: str | None, kind: str, made: BinaryIO, file: BinaryIO, *, embed: bool) -> bytes:
        c2pa = _package()
        builder = c2pa.Builder(json.dumps(manifest))
        if not embed:
            builder.set_no_embed()
        if source is not None:
            suffix = os.path.splitext(source)[1].lower()
            given = {"title": os.path.basename(source), "relationship": "parentOf", "instance_id": "source", "label": "source"}
            with open(source, "rb") as parent:
                builder.add_ingredient(json.dumps(given), (_TYPES | _PICTURES).get(suffix, _ANY), parent)
        return builder.sign(self._signer, kind, made, file)


class Found(NamedTuple):
    """Marks in a file.

    Attributes:
      line: of the container, None if there is none of ours.
      manifest: "Valid", "Trusted" or "Invalid" as the reader says of the active C2PA manifest, None if there is none.
      where: of the manifest: "inside", or the name of the file beside.
      signer: who signed it.
      source_types: the IPTC's terms that it states.
      consent: note in it, "" for none.
      reasons: why it is not valid, or not trusted; or why none can be read.
    """

    line: str | None
    manifest: str | None = None
    where: str = ""
    signer: str = ""
    source_types: tuple[str, ...] = ()
    consent: str = ""
    reasons: tuple[str, ...] = ()


def find(path: str | os.PathLike) -> Found:
    """The marks of a file.

    Raises:
      KeySyncError: it cannot be read as a video, or its manifest cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise KeySyncError(f"{path}: no such file")
    try:
        with av.open(os.path.abspath(path)) as container:
            comment = next((value for name, value in container.metadata.items() if name.lower() == "comment"), "")
    except (av.error.FFmpegError, OSError) as error:
        raise KeySyncError(f"{path}: not a media file; give a video") from error
    line = next((part for part in comment.split(" | ") if part.startswith("AI-generated: ")), None)
    aside, kind = beside(path), _TYPES.get(path.suffix.lower())
    if kind is None and not aside.is_file():
        return Found(line)
    try:
        c2pa = _package()
    except KeySyncError:
        return Found(line, reasons=(_NEEDED,))
    try:
        with open(path, "rb") as file:
            data = None if kind is not None else aside.read_bytes()
            reader = c2pa.Reader(kind or _ANY, file) if data is None else c2pa.Reader(_ANY, file, data)
            state, store = str(reader.get_validation_state()), json.loads(reader.json())
    except c2pa.C2paError as error:
        if "ManifestNotFound" in type(error).__name__ or "no JUMBF" in str(error):
            return Found(line)
        raise KeySyncError(f"{path}: its C2PA manifest cannot be read ({_words(error)})") from error
    active = store["manifests"][store["active_manifest"]]
    types, consent = [], ""
    for each in active["assertions"]:
        if each["label"].startswith("c2pa.actions"):
            types += [action["digitalSourceType"] for action in each["data"]["actions"] if "digitalSourceType" in action]
        elif each["label"] == _CONSENT:
            consent = each["data"]["note"]
    why = tuple(dict.fromkeys(status["explanation"] for status in store.get("validation_status", []) if "explanation" in status))
    where = "inside" if data is None else aside.name
    return Found(line, state, where, active.get("signature_info", {}).get("common_name", ""), tuple(types), consent, why)


_CONSENT = "org.keysync.consent"


def _manifest(kind: str, source: str | None, consent: str) -> dict[str, Any]:
    term, words = KINDS[kind]
    made: dict[str, Any] = {"action": "c2pa.edited" if source else "c2pa.created", "digitalSourceType": _TERMS + term, "description": words}
    opened = [{"action": "c2pa.opened", "parameters": {"ingredientIds": ["source"]}}] if source else []
    assertions: list[dict[str, Any]] = [{"label": "c2pa.actions.v2", "data": {"actions": [*opened, made]}}]
    if consent:
        assertions.append({"label": _CONSENT, "data": {"note": consent}})
    return {"claim_generator_info": [{"name": "KeySync-JAX", "version": __version__}], "assertions": assertions}


def beside(path: Path) -> Path:
    """Where the manifest of a file stands that holds none; with the whole name, so that `a.mkv` and `a.webm` have one each."""
    return path.with_name(path.name + ".c2pa")


def _package():
    try:
        import c2pa  # an extra: 50 MB
    except ImportError as error:
        raise KeySyncError(_NEEDED) from error
    return c2pa


def _pem(path: str | os.PathLike, what: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise KeySyncError(f"{path}: the {what} cannot be read ({error.strerror})") from error
    if b"-----BEGIN " not in data:
        raise KeySyncError(f"{path}: no PEM file; give the {what} as text that begins with -----BEGIN")
    return data


def _algorithm(private: bytes, path: str | os.PathLike) -> str:
    """C2PA's name of the algorithm that a key signs with."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # comes with c2pa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(private, None)
    except (ValueError, TypeError) as error:
        raise KeySyncError(f"{path}: no private key without a password ({error})") from error
    if isinstance(key, ec.EllipticCurvePrivateKey):
        names = {256: "ES256", 384: "ES384", 521: "ES512"}
        if key.curve.key_size in names:
            return names[key.curve.key_size]
    if isinstance(key, rsa.RSAPrivateKey):
        return "PS256"
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ED25519"
    raise KeySyncError(f"{path}: C2PA signs with keys of the kinds EC (P-256, P-384, P-521), RSA and Ed25519")


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
