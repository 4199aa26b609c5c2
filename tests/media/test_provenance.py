"""Marks of a machine's work: the line in every container, the signed manifest in it or beside it, and what cannot sign."""

import json
import shutil
import sys

import av
import c2pa
import certificates
import clips
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from keysync_jax.cli.main import main
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.inference.options import DubOptions, mark_of
from keysync_jax.media import provenance, video
from keysync_jax.media.provenance import Mark, Signature
from keysync_jax.media.writer import VideoWriter

TERM = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"


@pytest.fixture(scope="module")
def signer(tmp_path_factory):
    return certificates.make(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clip with a comment of its own."""
    folder = tmp_path_factory.mktemp("source")
    clips.make_clip(folder / "a.mp4", [512 * i for i in range(12)])
    with av.open(str(folder / "a.mp4")) as given, av.open(str(folder / "source.mp4"), "w") as made:
        made.metadata["comment"] = "take 7"
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                made.mux(packet)
    return folder / "source.mp4"


def write(source, target, mark):
    with VideoWriter(target, video.probe(source), extras=True, mark=mark) as writer:
        for frame in video.read(source):
            writer.write(frame)
    return writer


def packets(path):
    with av.open(str(path)) as container:
        return [(packet.pts, bytes(packet)) for packet in container.demux(video=0)]


def comment(path):
    with av.open(str(path)) as container:
        return next(value for name, value in container.metadata.items() if name.lower() == "comment")


@pytest.mark.parametrize("extension", [".mp4", ".m4v", ".mov", ".mkv", ".webm"])
def test_every_container_says_it_and_keeps_its_own_comment(source, tmp_path, extension):
    mark = Mark("dub", str(source))
    write(source, tmp_path / f"a{extension}", mark)
    assert provenance.find(tmp_path / f"a{extension}") == provenance.Found(mark.line) and TERM in mark.line
    assert comment(tmp_path / f"a{extension}") == f"take 7 | {mark.line}"
    write(tmp_path / f"a{extension}", tmp_path / f"b{extension}", mark)  # dubbed again, it does not say it twice
    assert comment(tmp_path / f"b{extension}") == f"take 7 | {mark.line}"
    assert provenance.find(source) == provenance.Found(None)


@pytest.mark.parametrize("extension", [".mp4", ".mov"])
def test_a_signed_file_is_valid_has_its_source_and_the_same_pictures(source, signer, tmp_path, extension):
    mark = Mark("dub", str(source), "signed by A on 1 May", Signature(*signer))
    writer = write(source, tmp_path / f"a{extension}", mark)
    write(source, tmp_path / f"plain{extension}", Mark("dub", str(source)))
    assert writer.seal == "signed C2PA manifest inside" and packets(tmp_path / f"a{extension}") == packets(tmp_path / f"plain{extension}")
    found = provenance.find(tmp_path / f"a{extension}")
    assert (found.manifest, found.where, found.signer, found.source_types) == ("Valid", "inside", "A. Signer", (TERM,))
    assert found.consent == "signed by A on 1 May" and found.reasons == ("signing certificate untrusted",) and found.line == mark.line
    # What is signed is a source again: its manifest is kept.
    again = Mark("animate", str(tmp_path / f"a{extension}"), "", mark.signature)
    write(tmp_path / f"a{extension}", tmp_path / f"b{extension}", again)
    store = json.loads(c2pa.Reader(str(tmp_path / f"b{extension}")).json())
    assert len(store["manifests"]) == 2
    (parent,) = store["manifests"][store["active_manifest"]]["ingredients"]
    assert parent["relationship"] == "parentOf" and parent["title"] == f"a{extension}" and parent["active_manifest"] in store["manifests"]
    data = bytearray((tmp_path / f"a{extension}").read_bytes())
    data[data.index(b"mdat") + 500] ^= 1
    (tmp_path / f"bent{extension}").write_bytes(data)
    assert provenance.find(tmp_path / f"bent{extension}").manifest == "Invalid"
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "b", "bent", "plain"]


def test_a_container_that_holds_none_gets_it_beside(source, signer, tmp_path, capsys):
    writer = write(source, tmp_path / "a.mkv", Mark("dub", str(source), "", Signature(*signer)))
    assert writer.seal == "signed C2PA manifest beside it (.c2pa): .mkv holds none"
    found = provenance.find(tmp_path / "a.mkv")
    assert (found.manifest, found.where, found.source_types) == ("Valid", "a.mkv.c2pa", (TERM,))
    assert main(["detect", str(tmp_path / "a.mkv"), str(source)]) == 0
    shown = capsys.readouterr().out
    assert "a.mkv: AI-generated: " in shown and "C2PA manifest a.mkv.c2pa: valid, signed by A. Signer" in shown
    assert "source.mp4: no mark of KeySync-JAX in the container\n  no C2PA manifest" in shown
    shutil.copy(source, tmp_path / "a.mkv")  # another film under the name
    assert provenance.find(tmp_path / "a.mkv").manifest == "Invalid"


def test_without_the_extra_the_line_is_read_and_signing_is_refused(source, signer, tmp_path, monkeypatch):
    write(source, tmp_path / "a.mp4", mark := Mark("dub", str(source)))
    monkeypatch.setitem(sys.modules, "c2pa", None)
    words = "C2PA manifests need the c2pa extra: pip install 'keysync-jax[c2pa]'"
    assert provenance.find(tmp_path / "a.mp4") == provenance.Found(mark.line, reasons=(words,))
    with pytest.raises(KeySyncError, match="need the c2pa extra"):
        Signature(*signer)


def test_other_keys_sign_too(source, tmp_path):
    chain = certificates.make(tmp_path, curve=ec.SECP384R1())
    write(source, tmp_path / "a.mp4", Mark("dub", None, "", Signature(*chain)))
    assert provenance.find(tmp_path / "a.mp4").manifest == "Valid"


def test_what_cannot_sign_is_refused_before_any_work(signer, tmp_path):
    certificate, key = signer
    _, other = certificates.make(tmp_path, "other")
    (tmp_path / "text.pem").write_text("a certificate\n")
    (tmp_path / "noise.pem").write_bytes(b"-----BEGIN PRIVATE KEY-----\n" + bytes(np.arange(60, 90, dtype=np.uint8)))
    for pair, words in (
        ((certificate, other), "signer.pem and .*other.key: cannot sign"),
        ((tmp_path / "text.pem", key), "text.pem: no PEM file"),
        ((certificate, tmp_path / "noise.pem"), "noise.pem: no private key without a password"),
        ((tmp_path / "gone.pem", key), "gone.pem: the certificate cannot be read"),
    ):
        with pytest.raises(KeySyncError, match=words):
            Signature(*pair)
    with pytest.raises(UsageError, match="--c2pa CERT and --key KEY belong together"):
        DubOptions(c2pa=str(certificate))
    assert mark_of("dub", str(tmp_path), DubOptions(consent="all")) == Mark("dub", None, "all", None)
    with pytest.raises(KeySyncError, match=r"gone.mp4: no such file"):
        provenance.find(tmp_path / "gone.mp4")
    with pytest.raises(KeySyncError, match=r"text.pem: not a media file"):
        provenance.find(tmp_path / "text.pem")
